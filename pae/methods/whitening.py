"""Whitened bases for BPT: what prompts meet in attention, and its inverse square root.

A prompt row p enters block i as a key. With u = gamma * p-hat, the normalised row under the frozen
norm's scale, head h adds q_jh . W_k,h u to the logits of query row j: the row meets

    y_jh = gamma * (W_k,h^T q_jh)        (D,)

and prompts P = A B^T, read as u, get the logits y_jh^T B a. They are uncorrelated and of equal size
over rows, heads and images when B^T S B = I with S = mean_{j,h} y_jh y_jh^T. With the
eigen-decomposition S = U diag(s) U^T and the ridge t = `ridge` mean(s),

    B = U diag(s + t)^-1/2 U^T           at rank D, the symmetric inverse square root of the paper
    B = U_r diag(s_r + t)^-1/2           below, the r directions in which the queries differ most

S costs no product over D: it is mean_h W_k,h^T (mean_j q_jh q_jh^T) W_k,h.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pae_kernels.precision import exact_products

from .. import block as frozen
from ..engine import unprompted
from ..model import PromptedViT
from ..plan import BlockPlan
from ..prompts.bpt import BPTDeep, BPTShallow

_CHUNK = 32  # images per forward


@torch.no_grad()
def whiten_init(
    model: PromptedViT, images: Tensor, ridge: float = 1e-3, official: bool = False
) -> Tensor:
    """Give a BPT model the bases that whiten its attention over `images` (about 100 are enough).

    Coefficients, head and backbone stay as they are, and so does the random state (except with
    `official`). Later `set_prompts` and `pae.mpa_init` keep these bases. The frozen backbone runs
    without prompts.

    Args:
        model: a PromptedViT with `BPTDeep` or `BPTShallow` prompts.
        images: (B, C, H, W) float, normalised as the backbone wants it.
        ridge: t relative to the mean eigenvalue: no direction is enlarged more than ridge^-1/2
            times what the mean one is. Unused with `official`.
        official: what the released code computes instead, for parity. It forms W_q W_k^T of the
            (out, in) weights, a product attention does not contain; applies it to the mean over the
            images of the rows before their norm; divides by D; adds no ridge, so that below full
            rank (197 rows in 768 dimensions) rounding noise decides the result; and then keeps r
            entries of every *row*, drawn anew for each row from PyTorch's random state, which
            leaves no whitening.

    Returns:
        (sets, D) eigenvalues of S per prompted block, largest first, fp64 on the CPU.

    Raises:
        TypeError: `model` is no PromptedViT with a BPT family.
        ValueError: images of a wrong shape or number; a ridge that is not a number above 0; a
            backbone that normalises keys per head, which are then not linear in the prompts; with
            `official`, heads whose widths do not add up to D.

    Source: "Attention to the Burstiness in Visual Prompt Tuning!" (arXiv 2506.22908), where S is
    formed from the means over images and all heads together. Rows of all images, heads one by one,
    query bias and norms are ours, because that is what the softmax reads.
    """
    family = getattr(model, "prompts", None)
    if not isinstance(model, PromptedViT) or not isinstance(family, (BPTDeep, BPTShallow)):
        raise TypeError(
            "model must be a PromptedViT with BPTDeep or BPTShallow prompts, got "
            f"{type(model).__name__} with {type(family).__name__}"
        )
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not ridge > 0:
        raise ValueError(f"ridge must be a number above 0, got {ridge!r}")
    model.view.check_images(images)
    if len(images) == 0:
        raise ValueError("images must hold at least 1 image, got 0")

    sets, dtype = len(family.coefficients), model.view.like.dtype
    height, width = images.shape[-2:]
    plan = model.plan(torch.promote_types(dtype, torch.float32), (height, width)).only(0, sets)
    gather: Callable[[BlockPlan, Tensor], Tensor] = _mean_rows if official else _query_moment
    statistics: list[Tensor | None] = [None] * sets
    with torch.autocast(images.device.type, enabled=False), exact_products:
        for part in images.to(dtype).split(_CHUNK):
            rows = unprompted(plan, model.view.embed(part).to(plan.dtype))
            for i, (block, x) in enumerate(zip(plan.blocks, rows)):
                found, before = gather(block, x) * (len(part) / len(images)), statistics[i]
                statistics[i] = found if before is None else before + found

    spectra, bases = [], []
    for i, statistic in enumerate(statistics):
        assert statistic is not None  # there is at least one image
        if official:
            width = statistic.shape[-1]
            w_q, w_k = model.view.read_block(i).qkv.weight.detach().double().chunk(3)[:2]
            if len(w_q) != width:
                raise ValueError(
                    f"official whitening needs heads of {width} dimensions in all, got {len(w_q)}"
                )
            spectrum, root = official_root(w_q, w_k, statistic)
            basis = scrambled(root, family.rank)
        else:
            moment = interaction(plan.blocks[i], statistic)
            spectrum, basis = whitening_basis(moment, family.rank, ridge)
        spectra.append(spectrum.cpu())
        bases.append(basis)
    family.set_bases(torch.stack(bases))
    return torch.stack(spectra)


def whitening_basis(moment: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,) of a second moment (D, D), largest first, and the basis B (D, rank)."""
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    scale = (values + ridge * values.mean()).rsqrt()
    basis = vectors[:, :rank] * scale[:rank]
    return values, basis @ vectors.T if rank == len(moment) else basis


def interaction(block: BlockPlan, query_moment: Tensor) -> Tensor:
    """(D, D): S of a block, from (H, d, d) second moments of its queries, in fp64."""
    heads, d, _ = query_moment.shape
    w_k = block.w_qkv.double().view(3, heads, d, -1)[1]
    return (w_k.transpose(1, 2) @ query_moment @ w_k).mean(dim=0)


def _query_moment(block: BlockPlan, x: Tensor) -> Tensor:
    """(H, d, d): mean over rows of x (B, N, D) of q q^T per head, in fp64, unscaled."""
    if block.k_norm is not None:
        raise ValueError(
            "model normalises keys per head, so its logits are not linear in the prompts and there "
            "is no basis that whitens them"
        )
    q = frozen.queries(block, x).flatten(0, 1).transpose(0, 1).double() / block.scale
    return q.transpose(1, 2) @ q / q.shape[1]


# ---- the released code's whitening


def _mean_rows(block: BlockPlan, x: Tensor) -> Tensor:
    """(N, D): mean over images of the rows that enter a block, before its norm."""
    return x.double().mean(dim=0)


def official_root(w_q: Tensor, w_k: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (D,) and "inverse square root" (D, D) as released.

    Args:
        w_q, w_k: (D, D) weights in (out, in) layout.
        rows: (N, D), the mean over the images.
    """
    y = w_q @ w_k.T @ rows.T
    u, s, vh = torch.linalg.svd(y @ y.T / len(y))
    return s, (u * s.rsqrt()) @ vh


def scrambled(root: Tensor, rank: int, columns: Tensor | None = None) -> Tensor:
    """(D, rank): `rank` entries of every row of root (D, D), at columns (D, rank) or drawn ones."""
    if columns is None:
        columns = torch.rand(root.shape).argsort(dim=1)[:, :rank]
    return root.gather(1, columns.to(root.device))
