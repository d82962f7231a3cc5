"""SPT initialisation: prompts that start as tokens of the training images.

Source: Wang et al., "Revisiting the Power of Prompt for Visual Tuning" (ICML 2024, arXiv
2402.02382).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..choices import SPT_METHODS
from ..engine import unprompted
from ..model import PromptedViT
from ..mpa.incoming import check_positive, undisturbed
from ..prompts import PromptFamily

POOLED = ("mean_pooling", "max_pooling")
IMAGES_AT_ONCE = 64  # of a tensor; a loader's batches are taken as they come


@torch.no_grad()
def spt_init(
    model: PromptedViT,
    images: Tensor | Iterable,
    method: str = "random",
    sample: int = 4096,
    seed: int = 0,
    official: bool = False,
) -> None:
    """Set each block's prompts to patch tokens that enter this block when the frozen backbone runs
    on training images.

    Block 0 gets outputs of the patch embedding, without position embedding; block i > 0 outputs of
    block i - 1; class and register tokens never. For a block of P prompts:

    - "random": P tokens, drawn uniformly from all images and positions.
    - "mean_pooling", "max_pooling": the L tokens of an image are pooled in runs of L // (P - 1)
      neighbours, row by row, and one run of what is left; P of all pooled tokens are drawn.
      `official=True` pools as released: P - 1 runs, and one of the last L mod (L // (P - 1)) tokens
      or, where that is 0, of the whole image; P must then be from 2 to L + 1.
    - "kmeans": the P centres of scikit-learn's k-means on `sample` tokens, drawn uniformly. (The
      released code reads centres of 30 % of the data from files that it does not make.)

    The images are seen once, batch by batch, and only candidates are kept: every token gets a
    random key, and the P (or `sample`) largest keys stay. That is a uniform draw without
    replacement, and it does not depend on how the images are cut into batches. (The released code
    keeps all tokens of as many images as the training set has, drawn with replacement.)

    Nothing but the prompts changes, random states included.

    Args:
        model: its prompts can be set: VPT-deep-like, with any number per block, or VPT-shallow-like
            (then all prompts are for block 0).
        images: (B, C, H, W) float, normalised as the backbone wants it; or a DataLoader or any
            iterable of such batches, alone or first in a tuple.
        method: one of the above.
        sample: tokens per block that k-means sees; sample x D values are kept per block.
        seed: of the draws and of k-means.
        official: runs of the pooling methods as released; of no meaning for the others.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what was expected.
        ImportError: "kmeans" without scikit-learn (`pip install 'pae[clustering]'`).

    Numerics: the backbone's dtype, without autocast.
    """
    if method not in SPT_METHODS:
        raise ValueError(f"method must be one of {SPT_METHODS}, got {method!r}")
    check_positive("sample", sample)
    if official and method not in POOLED:
        raise ValueError(f"official=True is for the methods {POOLED}, got method {method!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
    counts = _counts(model)
    if method == "kmeans":
        _kmeans()  # before the images are looked at
        if sample < max(counts):
            raise ValueError(f"sample must be at least {max(counts)} prompts, got {sample}")

    reservoirs = [
        _Reservoir((sample if method == "kmeans" else count) if count else 0, (seed, block))
        for block, count in enumerate(counts)
    ]
    with undisturbed(model, images):
        for batch in _batches(model, images):
            for block, tokens in enumerate(_tokens(model, batch, len(counts))):
                if method in POOLED and counts[block]:
                    tokens = _pool(tokens, counts[block], method, official)
                reservoirs[block].add(tokens.flatten(0, 1))
    prompts: list[Tensor | None] = [None] * model.view.shape.depth
    for block, (count, reservoir) in enumerate(zip(counts, reservoirs)):
        if count == 0:
            continue
        if reservoir.seen < count:
            raise ValueError(
                f"images must give at least {count} tokens for the prompts of block {block}, got "
                f"{reservoir.seen}"
            )
        rows = reservoir.rows
        if method == "kmeans" and rows is not None:
            rows = _centres(rows, count, seed)
        prompts[block] = rows
    model.prompts.set_prompts(prompts)


class _Reservoir:
    """A uniform sample without replacement of all rows added: those with the largest random keys.

    Attributes:
        rows: (min(size, seen), D), in random order; None before the first.
        seen: rows added so far.
    """

    def __init__(self, size: int, seed: tuple[int, ...]) -> None:
        self.size, self.seen = size, 0
        self.random = np.random.default_rng(seed)  # its stream does not depend on how it is cut
        self.keys = torch.empty(0, dtype=torch.float64)
        self.rows: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Rows (M, D)."""
        if self.size == 0:
            return
        self.seen += len(rows)
        keys = torch.cat([self.keys, torch.from_numpy(self.random.random(len(rows)))])
        self.keys, best = keys.topk(min(self.size, len(keys)))
        held = 0 if self.rows is None else len(self.rows)
        new = best >= held  # gather the few new rows alone, not all that were added
        found = rows[(best[new] - held).to(rows.device)]
        if self.rows is None:
            self.rows = found
            return
        kept = rows.new_empty(len(best), rows.shape[1])
        new = new.to(rows.device)
        kept[new], kept[~new] = found, self.rows[best.to(rows.device)[~new]]
        self.rows = kept


def _tokens(model: PromptedViT, images: Tensor, blocks: int) -> Iterator[Tensor]:
    """Patch tokens (B, L, D) that enter each of the first `blocks` blocks."""
    view = model.view
    yield view.patch_tokens(images)
    if blocks > 1:
        height, width = images.shape[-2:]
        plan = model.plan(size=(height, width)).only(0, blocks - 1)
        rows = unprompted(plan, view.embed(images))
        next(rows)  # what enters block 0 has positions
        for x in rows:
            yield x[:, view.num_prefix_tokens :]


def _pool(tokens: Tensor, count: int, method: str, official: bool) -> Tensor:
    """(B, L, D) to (B, runs, D)."""
    length = tokens.shape[1]
    if official:
        if not 2 <= count <= length + 1:
            raise ValueError(
                f"official=True needs 2 to {length + 1} prompts per block, one more than the "
                f"{length} tokens of an image, got {count}"
            )
        run = length // (count - 1)
        parts = [tokens[:, start : start + run] for start in range(0, run * (count - 1), run)]
        parts.append(tokens[:, -(length % run) :])  # all of them where nothing is left
    else:
        parts = list(tokens.split(max(1, length // max(1, count - 1)), dim=1))
    if method == "mean_pooling":
        return torch.stack([part.mean(1) for part in parts], dim=1)
    return torch.stack([part.amax(1) for part in parts], dim=1)


def _kmeans() -> Any:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        message = "method 'kmeans' needs scikit-learn: pip install 'pae[clustering]'"
        raise ImportError(message) from error
    return KMeans


def _centres(rows: Tensor, count: int, seed: int) -> Tensor:
    points = rows.to(torch.promote_types(rows.dtype, torch.float32)).cpu().numpy()
    fit = _kmeans()(count, n_init=1, random_state=seed).fit(points)
    return torch.from_numpy(fit.cluster_centers_).to(rows)


def _counts(model: PromptedViT) -> list[int]:
    """Prompts of each block up to the last that has any, or raise when none can be set."""
    if not isinstance(model, PromptedViT):
        raise TypeError(
            f"model must be a PromptedViT, not a wrapper around one, got {type(model).__name__}"
        )
    model.view.require_one_width("spt_init")
    family = model.prompts
    if family.depends_on_input or type(family).set_prompts is PromptFamily.set_prompts:
        name = type(family).__name__
        raise ValueError(f"model.prompts ({name}) computes its prompts, so none can be set")
    counts = family.prompt_counts
    while counts and counts[-1] == 0:
        counts = counts[:-1]
    if not counts:
        raise ValueError("model.prompts has no prompts, expected at least 1")
    return counts


def _batches(model: PromptedViT, images: Tensor | Iterable) -> Iterator[Tensor]:
    """Checked batches on the model's device, in the backbone's dtype."""
    if isinstance(images, Tensor):
        images = images.split(IMAGES_AT_ONCE) if images.dim() else [images]
    elif not isinstance(images, Iterable):
        raise TypeError(f"images must be a tensor or a loader, got {type(images).__name__}")
    like = model.view.like
    for batch in images:
        batch = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(batch, Tensor):
            raise TypeError(f"images must yield tensors of images, got {type(batch).__name__}")
        if batch.is_floating_point():
            batch = batch.to(like)
        model.view.check_images(batch)
        yield batch
