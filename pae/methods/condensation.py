"""Prompt Condensation: keep the few prompts that matter of many that were trained.

Source: Kim et al., "Do We Really Need a Large Number of Visual Prompts?" (arXiv 2305.17223). No
code is public and the score's formula was not found: the scores here are reconstructions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import PromptedViT, fast_forward
from ..mpa.incoming import undisturbed
from ..prompts import VPTDeep

SCORES = ("taylor", "elementwise")
IMAGES_AT_ONCE = 64  # of a tensor; a loader's batches are taken as they come


def condense(
    model: PromptedViT,
    images: Tensor | Iterable,
    labels: Tensor | None = None,
    keep: float = 0.3,
    score: str = "taylor",
) -> PromptedViT:
    """A model with the most important share of a trained VPT-deep's prompts, ranked over all blocks
    together.

    The paper's stages: 1. train VPT-deep with many prompts; 2. this; 3. fine-tune what is returned,
    with a new optimiser. The cross-entropy of the given images, in eval mode, has the gradient g_k
    by prompt p_k; a score is averaged over the batches, each weighted by its images:

    - "taylor": |sum_d g_kd p_kd|, the first-order change of the loss when p_k becomes 0.
    - "elementwise": sum_d |g_kd p_kd|.

    "taylor" is the usual form, but deep prompts are read through a LayerNorm, which takes their
    length out: along p_k itself the loss hardly changes, by eps / (var + eps) of what one would
    expect, and the sum cancels to far less than a thousandth of its terms. It ranks well all the
    same: `bench/results/prompt_scores.md` compares both scores with what the loss does without a
    prompt.

    Args:
        model: its prompts are a `VPTDeep`. It is left as it was.
        images: (B, C, H, W) float, normalised as the backbone wants it; or a DataLoader or any
            iterable of (images, labels), read once.
        labels: (B,) integers; None with a loader.
        keep: share of the prompts that stay, in (0, 1]; at least one does.
        score: one of the above.

    Returns:
        A new `PromptedViT` on the same frozen backbone (a copy where a part of it is trained), with
        a copy of the head, `VPTDeep` prompts whose number differs between blocks (0 is possible),
        the same dropout, and no KLD, which needs equal numbers.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what was expected.

    Numerics: the backbone's dtype, without autocast; sums in at least fp32.
    """
    family = model.prompts if isinstance(model, PromptedViT) else None
    if type(family) is not VPTDeep:
        raise TypeError(
            "model must be a PromptedViT with VPTDeep prompts, got "
            f"{type(model if family is None else family).__name__}"
        )
    model.view.require_one_width("condense")
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ValueError(f"keep must be a number in (0, 1], got {keep!r}")
    if score not in SCORES:
        raise ValueError(f"score must be one of {SCORES}, got {score!r}")
    counts = family.prompt_counts
    if sum(counts) == 0:
        raise ValueError("model.prompts has no prompts, expected at least 1")

    with undisturbed(model, images):
        scores = _scores(model, _batches(images, labels), score)
        best = scores.argsort(descending=True, stable=True)[: max(1, round(keep * len(scores)))]
        kept = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, best, True).split(counts)
        rows = [p.detach()[k] for p, k in zip(family.raw_prompts(), kept) if p is not None]
        fewer = VPTDeep([len(r) for r in rows], family.dropout, family.dropout_scope)
        shared = model.backbone  # but for what is trained of it, which is each model's own
        condensed = PromptedViT(
            copy.deepcopy(shared) if model.trained_backbone else shared,
            fewer,
            num_classes=model.num_classes or 1,
            pool=model.pool,
            train_backbone=model.trained_backbone,
        )
        condensed.head = copy.deepcopy(model.head)
        condensed.prompts.set_prompts(rows)
    return condensed.train(model.training)


@torch.enable_grad()
def _scores(model: PromptedViT, batches: Iterable[tuple[Tensor, Tensor]], score: str) -> Tensor:
    """(prompts of all blocks,), in at least fp32."""
    tokens, seen = cast(VPTDeep, model.prompts).tokens, 0
    wide = torch.promote_types(tokens.dtype, torch.float32)
    total = torch.zeros(tokens.shape[:-1].numel(), dtype=wide, device=tokens.device)
    for images, labels in batches:
        logits = fast_forward(model, images.to(tokens))
        loss = F.cross_entropy(logits, labels.to(logits.device))
        (grad,) = torch.autograd.grad(loss, tokens)
        terms = grad.to(wide) * tokens.detach()
        terms = terms.abs().sum(-1) if score == "elementwise" else terms.sum(-1).abs()
        total += len(images) * terms.flatten()
        seen += len(images)
    if seen == 0:
        raise ValueError("images must give at least one batch, got none")
    return total / seen


def _batches(images: Tensor | Iterable, labels: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(images, Tensor):
        if not isinstance(labels, Tensor) or len(labels) != len(images):
            got = tuple(labels.shape) if isinstance(labels, Tensor) else labels
            raise ValueError(f"labels must be ({len(images)},) like images, got {got}")
        yield from zip(images.split(IMAGES_AT_ONCE), labels.split(IMAGES_AT_ONCE))
        return
    if not isinstance(images, Iterable):
        raise TypeError(f"images must be a tensor or a loader, got {type(images).__name__}")
    if labels is not None:
        raise ValueError("labels must be None when images is a loader: its batches carry them")
    for batch in images:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TypeError(f"images must yield (images, labels) pairs, got {type(batch).__name__}")
        yield batch[0], batch[1]
