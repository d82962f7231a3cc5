"""NSP2: prompts that learn a new task only where old tasks do not look.

Source: Lu et al., "Visual Prompt Tuning in Null Space for Continual Learning" (NeurIPS 2024, arXiv
2406.05658).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from pae_kernels.precision import exact_products

from .. import block as frozen
from ..model import PromptedViT
from ..plan import BlockPlan
from ..prompts import VPTDeep

SMOOTHED_FROM = 128  # singular values above which their curve is smoothed, and its ends left out
SMOOTHING = 10.0
ENDS = 0.03  # of both ends together
ACCUMULATIONS = ("images", "batches")


class NullSpace(nn.Module):
    """Projects every update of VPT-deep's prompts: D -> Pi2 D Pi1, per block.

    A change of the prompts, dP (P, D), leaves an old task's attention alone where Q W dP^T = 0 and
    S dP = 0: Q are the image's queries, W = W_k diag(g) the key weights behind the norm's scale g,
    S the attention on prompts. After each task, over its images,

        C1 += mean over images, heads, rows of (q W)^T (q W)     (D, D)
        C2 += the same mean of S^T S                             (P, P)

    and Pi = eta B + (1 - eta) I with B the projection onto the null space of C. How many singular
    values count as zero is where their curve bends most: at the largest second difference. Where
    there are 128 or more, the curve is smoothed with a Gaussian of 10 and 3 % of it are left out,
    half of them at each end.

    Means and standard deviations of prompt rows should not move either (LayerNorm divides by
    them): `penalty` is their L1 drift since the last task.

    Use: train task 1; `observe(batches)`; then for each further task wrap the optimiser with
    `project(optimizer)`, add `penalty()` to the loss, and `observe` again at its end. The released
    code starts prompts in U(-1, 1), divides logits by 28 in training, and gives every task a head;
    its CLIP variant prompts blocks 0 to 3 alone.

    Args:
        model: a `PromptedViT` over `VPTDeep` with one count in every block that has prompts, and no
            norm per head.
        eta: 0 leaves updates alone, 1 projects fully; published: 0.94 to 0.98. Two numbers are for
            Pi1 and Pi2 apart.
        official: as the released code: W = W_k without g, and B divided by its Frobenius norm, so
            that what lies in the null space shrinks too, to eta / sqrt(nullity) + 1 - eta.
        accumulate: what a task adds to C1 and C2: "images", the mean over all its images, or
            "batches", the sum of the means of its batches, as released: a task then counts by its
            number of batches.

    Attributes:
        C1, C2: (b, D, D) and (b, P, P), of the b blocks with prompts; like all of these buffers, so
            that `state_dict` resumes a sequence of tasks.
        tasks: how many were observed.
        means, deviations: (b, P) of the prompt rows at the end of the last.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what was expected.
    """

    model: PromptedViT
    C1: Tensor
    C2: Tensor
    tasks: Tensor
    means: Tensor
    deviations: Tensor

    def __init__(
        self,
        model: PromptedViT,
        eta: float | tuple[float, float] = 0.97,
        official: bool = False,
        accumulate: str = "images",
    ) -> None:
        super().__init__()
        if not isinstance(model, PromptedViT):
            raise TypeError(f"model must be a PromptedViT, got {type(model).__name__}")
        model.view.require_one_width("NullSpace")
        family = model.prompts
        counts = family.prompt_counts if type(family) is VPTDeep else []
        if len({count for count in counts if count}) != 1:
            raise ValueError(
                "model.prompts must be VPTDeep with one count of at least 1 in every block that "
                f"has prompts, got {family!r}"
            )
        weights = [model.view.read_block(i) for i in range(model.view.shape.depth)]
        if any(w.k_norm for w in weights):
            raise ValueError(
                "model's keys are normalised per head: a prompt's key is not linear in it"
            )
        if official and any(w.rotation for w in weights):
            raise ValueError(
                "model rotates queries, which has no place in the released rule: leave out official"
            )
        etas = eta if isinstance(eta, tuple) else (eta, eta)
        if len(etas) != 2 or any(
            isinstance(e, bool) or not isinstance(e, (int, float)) or not 0 <= e <= 1 for e in etas
        ):
            raise ValueError(f"eta must be a number in [0, 1], or two of them, got {eta!r}")
        if accumulate not in ACCUMULATIONS:
            raise ValueError(f"accumulate must be one of {ACCUMULATIONS}, got {accumulate!r}")
        self.eta, self.official, self.accumulate = etas, bool(official), accumulate
        object.__setattr__(self, "model", model)  # not a submodule: its state is its own
        self._prompted = [i for i, count in enumerate(counts) if count]
        depth, count, width = self._tokens.shape
        zeros = partial(torch.zeros, device=self._tokens.device, dtype=torch.float64)
        self.register_buffer("C1", zeros(depth, width, width))
        self.register_buffer("C2", zeros(depth, count, count))
        self.register_buffer("tasks", torch.zeros((), dtype=torch.int64))
        self.register_buffer("means", zeros(depth, count))
        self.register_buffer("deviations", zeros(depth, count))
        self._projections: tuple[int, Tensor, Tensor] | None = None

    @property
    def _parameter(self) -> nn.Parameter:
        return cast(VPTDeep, self.model.prompts).tokens

    @property
    def _tokens(self) -> Tensor:
        """(b, P, D): the prompts of the blocks that have any, a view."""
        tokens = self._parameter
        return tokens.view(len(self._prompted), -1, tokens.shape[-1])

    @torch.no_grad()
    def observe(self, batches: Iterable[Tensor | tuple]) -> None:
        """Add a finished task: its images, (B, C, H, W) or (images, ...) per batch; evaluated.

        Raises:
            ValueError: no batch.
        """
        view = self.model.view
        wide = torch.promote_types(view.like.dtype, torch.float32)
        c1, c2, rows = torch.zeros_like(self.C1), torch.zeros_like(self.C2), 0
        with torch.autocast(self.C1.device.type, enabled=False), exact_products:
            for batch in batches:
                images = batch if isinstance(batch, Tensor) else batch[0]
                height, width = images.shape[-2:]
                plan = self.model.plan(wide, (height, width))
                x = view.embed(images)
                each = x.shape[0] * x.shape[1]
                rows += each
                share = view.shape.num_heads * (each if self.accumulate == "batches" else 1)
                stream = frozen.Stream(x.to(plan.dtype).contiguous())
                for i, block in enumerate(plan.blocks):
                    stream = self._observe_block(i, block, stream, c1, c2, 1 / share)
        if rows == 0:
            raise ValueError("batches must hold at least one image, got none")
        share = 1 if self.accumulate == "batches" else rows
        self.C1 += c1 / share
        self.C2 += c2 / share
        means, deviations = _row_statistics(self._tokens)
        self.means.copy_(means)
        self.deviations.copy_(deviations)
        self.tasks += 1
        self._projections = None

    def _observe_block(
        self,
        index: int,
        block: BlockPlan,
        stream: frozen.Stream,
        c1: Tensor,
        c2: Tensor,
        weight: float,
    ) -> frozen.Stream:
        """Add one block's weighted sums to c1 and c2; the stream that enters the next block."""
        tokens = self._tokens
        prompted = index in self._prompted
        at = self._prompted.index(index) if prompted else 0
        prompts = tokens[at][None] if prompted else tokens[:1, :0]
        kv = frozen.keys_values(block, frozen.normalise(prompts, block.norm1, block.w_qkv.dtype))
        x, out, seen = frozen.attention_half(block, stream, frozen.Keys(kv))
        if prompted:
            q = seen.qkv[:, :, 0].transpose(1, 2)  # (B, H, N, d), scaled
            w_qkv = self.model.view.read_block(index).qkv.weight if self.official else block.w_qkv
            w_k = w_qkv.chunk(3)[1].unflatten(0, (block.num_heads, -1)).to(q)  # (H, d, D)
            interest = torch.einsum("bhnd,hde->bhne", q / block.scale, w_k).flatten(0, 2).double()
            c1[at].addmm_(interest.T, interest, alpha=weight)
            logits = torch.einsum("bhnd,phd->bhnp", q, kv[0, :, 0])
            attention = (logits - seen.lse[..., None]).exp().flatten(0, 2).double()
            c2[at].addmm_(attention.T, attention, alpha=weight)
        given = "keep", frozen.AS_A_BACKWARD_NEEDS, seen.xhat
        return frozen.Stream(*frozen.mlp_half(block, x, out, *given)[:2])

    def projections(self) -> tuple[Tensor, Tensor]:
        """Pi1 (b, D, D) and Pi2 (b, P, P); identities before the first task."""
        tasks = int(self.tasks)
        if self._projections is None or self._projections[0] != tasks:
            eta1, eta2 = self.eta
            self._projections = tasks, self._project(self.C1, eta1), self._project(self.C2, eta2)
        return self._projections[1:]

    def _project(self, C: Tensor, eta: float) -> Tensor:
        identity = torch.eye(C.shape[1], dtype=C.dtype, device=C.device).expand_as(C)
        if int(self.tasks) == 0:
            return identity
        _, values, rows = torch.linalg.svd(C)
        out = []
        for s, v, one in zip(values, rows, identity):
            null = v[_rank(s) :]
            B = null.T @ null
            if self.official:
                B = B / B.norm().clamp(min=torch.finfo(B.dtype).tiny)
            out.append(eta * B + (1 - eta) * one)
        return torch.stack(out)

    def project(self, optimizer: Optimizer) -> Optimizer:
        """Hook into `optimizer`: each `step` moves the prompts by the projected update.

        Whatever the optimiser's rule is (momentum, Adam, weight decay), its final update is what is
        projected. Other parameters are not touched.

        Returns:
            the optimiser.

        Raises:
            ValueError: `optimizer` does not hold the prompts.
        """
        tokens = self._parameter
        if not any(p is tokens for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer must hold model.prompts.tokens")
        before: dict[str, Tensor] = {}

        def keep(*_: Any) -> None:
            before["tokens"] = tokens.detach().clone()

        @torch.no_grad()
        def replace(*_: Any) -> None:
            old = before.pop("tokens")
            pi1, pi2 = self.projections()
            update = pi2 @ (tokens - old).view_as(self._tokens).to(pi2.dtype) @ pi1
            tokens.copy_(old + update.view_as(tokens).to(tokens.dtype))

        optimizer.register_step_pre_hook(keep)
        optimizer.register_step_post_hook(replace)
        return optimizer

    def penalty(self) -> Tensor:
        """Absolute drift of the prompt rows' means plus that of their deviations, each a mean over
        the prompts of a block, summed over blocks; 0 before the first task.
        """
        if int(self.tasks) == 0:
            return self._tokens.new_zeros(())
        means, deviations = _row_statistics(self._tokens)
        drift = (means - self.means).abs() + (deviations - self.deviations).abs()
        return drift.mean(dim=1).sum()


def _row_statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens.mean(dim=-1), tokens.std(dim=-1, correction=0)


def _rank(values: Tensor) -> int:
    """Where descending singular values bend most: from there on they count as zero."""
    count = len(values)
    rank = int((values > values[0] * count * torch.finfo(values.dtype).eps).sum())
    if count < 3:
        return rank
    curve, margin = values, 0
    if count >= SMOOTHED_FROM:
        curve, margin = _smoothed(values), int(ENDS * count / 2)
    bend = curve[:-2] - 2 * curve[1:-1] + curve[2:]  # at 1 .. count - 2
    at = margin + 1 + int(bend[margin : len(bend) - margin].argmax())
    # the last of equal values is the first zero; rounded zeros may be equal
    return min(int((values >= values[at]).sum()) - 1, rank)


def _smoothed(values: Tensor) -> Tensor:
    """Gaussian of width `SMOOTHING`, mirrored at the ends, the end value repeated."""
    radius = int(4 * SMOOTHING + 0.5)
    offset = torch.arange(-radius, radius + 1, dtype=values.dtype, device=values.device)
    weights = torch.exp(-0.5 * (offset / SMOOTHING) ** 2)
    padded = torch.cat([values[:radius].flip(0), values, values[-radius:].flip(0)])
    return F.conv1d(padded[None, None], (weights / weights.sum())[None, None])[0, 0]
