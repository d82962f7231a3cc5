"""Blocks that look into one window of the grid of rows at a time: what Swin has, and a ViT not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .view import BlockWeights, Geometry, behind_attention, heads_of


@lru_cache(maxsize=256)
def places(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """(W, n) int64 on the CPU: which row of the grid stands in each place of each window, or -1 for
    padding.
    """
    (rows, columns), (high, wide) = grid, window
    found = torch.arange(rows * columns, device="cpu").view(rows, columns)
    found = found.roll([-s for s in shift], (0, 1))
    found = F.pad(found, (0, -columns % wide, 0, -rows % high), value=-1)
    found = found.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
    return found.transpose(1, 2).reshape(-1, high * wide)


@dataclass(frozen=True)
class Windows(Geometry):
    """The windows of one block, in which `bias` (H, n, n) is that of a window's own n rows.

    Attributes:
        window: (rows, columns) of a window, n in all. The grid is padded below and to the right
            where it is no multiple.
        shift: by how much the grid is rolled up and to the left before it is cut.
        mask: (W, n, n), what is added to the logits of the W windows, row by row; or None.
        mixes: prompts meet the windows of other images, as `VPTShallow(faithful=True)` has it.
    """

    window: tuple[int, int] = (0, 0)
    shift: tuple[int, int] = (0, 0)
    mask: Tensor | None = None
    mixes: bool = False

    def mixed(self) -> Windows:
        return replace(self, mixes=True)

    @property
    def count(self) -> int:
        """W, of an image."""
        return len(self.places)

    @property
    def places(self) -> Tensor:
        return places(self.grid, self.window, self.shift)

    def split(self, rows: Tensor) -> Tensor:
        """(B, N, C) rows of images to (B W, n, C) of their windows, image by image; padding is
        0.
        """
        padded = F.pad(rows, (0, 0, 0, 1))  # where -1 points to
        cut = padded[:, self.places.to(rows.device).flatten()]
        return cut.reshape(-1, self.places.shape[1], rows.shape[-1])

    def join(self, windows: Tensor) -> Tensor:
        """The inverse of `split`."""
        rows, columns = self.grid
        flat = windows.reshape(-1, self.places.numel(), windows.shape[-1])
        order = self.places.flatten().argsort()[-rows * columns :]  # behind the padding
        return flat[:, order.to(windows.device)]

    def copies(self, prompts: Tensor) -> Tensor:
        """Prompts (B, P, C) of images, for each of their windows: (B W, P, C)."""
        if self.mixes:
            return prompts.repeat(self.count, 1, 1)
        return prompts.repeat_interleave(self.count, dim=0)

    def mean(self, copies: Tensor) -> Tensor:
        """The mean (B, P, C) of what became of them in the windows."""
        if self.mixes:
            return copies.unflatten(0, (self.count, -1)).mean(0)
        return copies.unflatten(0, (-1, self.count)).mean(1)


def apply_windowed(w: BlockWeights, x: Tensor, geometry: Windows) -> Tensor:
    """The block on rows (B, P + N, C), prompts first, as VPT's released code has it.

    Every window attends over the prompts and itself, and so do the prompts in every window: what
    becomes of them is the mean over windows. Relative bias and mask are 0 for prompts.
    """
    rows, columns = geometry.grid
    count = x.shape[1] - rows * columns
    hat = x if w.norm1 is None else w.norm1(x)
    prompts, image = hat[:, :count], hat[:, count:]
    both = torch.cat([geometry.copies(prompts), geometry.split(image)], dim=1)
    q, k, v = heads_of(replace(w, norm1=None), both)  # (B W, H, P + n, d)
    scores = (w.scale * q @ k.transpose(-1, -2)).unflatten(0, (-1, geometry.count))
    for bias in (geometry.bias, None if geometry.mask is None else geometry.mask[:, None]):
        if bias is not None:
            scores = scores + F.pad(bias, (count, 0, count, 0)).to(scores.dtype)
    out = (scores.flatten(0, 1).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    out = torch.cat([geometry.mean(out[:, :count]), geometry.join(out[:, count:])], dim=1)
    return behind_attention(w, x, out)
