"""The fast engine on blocks that look into windows (Swin): `engine.run` with two more things.

Rows stand in the order of the block's windows, and everything but attention treats rows one by one:
so windows are a view, and between two blocks that cut the grid differently rows change places once.
Between two stages the merging's 2 x 2 rows are taken straight from the windows of one stage to
those of the next. What is not done beyond what `engine` names: prompts are not copied to windows.
Their keys and values are formed once per block for all windows of all images, and their own rows,
where they live on (VPT-shallow; the last block where they are pooled), once per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbones import BackboneView
from .backbones.view import Norm
from .backbones.windows import Windows, places
from .block import FrozenBlock, Stream, keys_values, normalise
from .engine import answers, kept_by
from .plan import FrozenPlan, MergingPlan
from .prompts import PromptFamily
from .sequence import insert_rows, pooled_rows


def run(
    plan: FrozenPlan,
    view: BackboneView,
    family: PromptFamily,
    x: Tensor,
    memory: str,
    pool: str = "image",
) -> Tensor:
    """As `engine.run`, for families that are defined on stages."""
    joins = pool != "image" and not family.enters_sequence  # for the last block alone
    x, live, _ = _prompted(plan, family, x, memory, joins)
    return pooled_rows(x, 0, live, pool)


def run_to(
    plan: FrozenPlan,
    view: BackboneView,
    family: PromptFamily,
    x: Tensor,
    memory: str,
    blocks: Sequence[int],
) -> list[Tensor]:
    """As `engine.run_to`; rows row by row of each block's own grid."""
    return _prompted(plan, family, x, memory, False, blocks)[2]


def _prompted(
    plan: FrozenPlan,
    family: PromptFamily,
    x: Tensor,
    memory: str,
    joins: bool,
    blocks: Sequence[int] = (),
) -> tuple[Tensor, int, list[Tensor]]:
    """As the engine's."""
    plan, memory = kept_by(plan, memory)
    family.start_forward()
    last, found = len(plan.blocks) - 1, []
    end = blocks[-1] if blocks else last
    with torch.autocast(x.device.type, enabled=False):
        plan, live = plan.now(), 0
        if family.enters_sequence:
            rows = family.block_prompts(0, x)
            if rows is not None:
                x, live = insert_rows(x, rows, 0), rows.shape[-2]
        ask = answers(plan, family, x, last if joins else end + 1)
        stream, before = Stream(x.contiguous()), None
        for i, block in enumerate(plan.blocks[: end + 1]):
            assert block.windows is not None
            cut, merging = Cut.of(block.windows), plan.mergings.get(i)
            if family.mixes_windows:
                block = replace(block, windows=block.windows.mixed())
            before = Cut(cut.grid) if before is None else before
            if merging is not None or before != cut:
                stream = Stream(_moved(stream.sum(), live, before, cut, merging))
            before, prompts = cut, ask(i, x)
            rows, kv, group = prompts.rows, prompts.kv, prompts.group
            if joins and i == last and rows is not None:
                live = rows.shape[-2]
                stream = Stream(insert_rows(stream.sum(), rows, 0))
                rows = kv = None
            if kv is None:
                rows = x.new_empty(1, 0, block.w_qkv.shape[1]) if rows is None else rows
                kv = keys_values(block, normalise(rows, block.norm1, plan.dtype))
            given = stream.rows, stream.pending, kv, group, None, block, memory, False, False, False
            stream = Stream(*FrozenBlock.apply(*given, *block.vectors()))
            if i in blocks:  # summed once, for both who read it
                stream = Stream(stream.sum())
                found.append(_moved(stream.rows, live, cut, Cut(cut.grid))[:, live:])
        x = stream.sum()
        if before is not None and before.padded:
            x = _moved(x, live, before, Cut(before.grid))
    return x, live, found


# ---- rows change places


class Cut(NamedTuple):
    """How a grid is cut into windows: the order of rows. Without a window, row by row."""

    grid: tuple[int, int]
    window: tuple[int, int] = (0, 0)
    shift: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, windows: Windows) -> Cut:
        return cls(windows.grid, windows.window, windows.shift)

    def places(self) -> Tensor:
        """Which row of the grid stands there, -1 for padding."""
        if self.window == (0, 0):
            return torch.arange(self.grid[0] * self.grid[1], device="cpu")
        return places(*self).flatten()

    @property
    def padded(self) -> bool:
        """Whether rows stand there that belong to no place of the grid."""
        return any(w and n % w for n, w in zip(self.grid, self.window))


class Way(NamedTuple):
    """From one order to another: `taken` (m,) is the old place of each new row, and `back` (n,)
    the new place of each old one. One beyond the last is a row of zeros, where `*_zeros` says that
    there is one.
    """

    taken: Tensor
    back: Tensor
    taken_zeros: bool
    back_zeros: bool


@lru_cache(maxsize=512)
def _way(before: Cut, after: Cut, merges: bool, live: int, device: torch.device) -> Way:
    """Of an image's rows, `live` rows of prompts in front, which stay. With `merges` four rows that
    are merged into one stand together, and prompts are left out.
    """
    old, new = before.places(), after.places()
    size = len(old)
    stands = torch.full((before.grid[0] * before.grid[1] + 1,), size)  # of each row of the grid
    inside = old >= 0
    stands[old[inside]] = torch.arange(size, device="cpu")[inside]
    source = new.clamp_min(0)  # what stands on padding is never read: any row
    if merges:
        (rows, columns), wide = before.grid, after.grid[1]
        y, x = 2 * (source // wide), 2 * (source % wide)
        y, x = torch.stack([y, y + 1, y, y + 1], 1), torch.stack([x, x, x + 1, x + 1], 1)
        source = torch.where((y < rows) & (x < columns), y * columns + x, rows * columns)
        new = new[:, None].expand(-1, 4)
    taken = stands[source].flatten()
    back = torch.full((size + 1,), len(taken))
    read = new.flatten() >= 0
    back[taken[read]] = torch.arange(len(taken), device="cpu")[read]
    front = torch.arange(0 if merges else live, device="cpu")
    back = back[:size]
    zeros = bool((taken == size).any()), bool((back == len(taken)).any())
    taken, back = (torch.cat([front, rows + len(front)]).to(device) for rows in (taken, back))
    return Way(taken, back, *zeros)


def _taken(rows: Tensor, index: Tensor, zeros: bool) -> Tensor:
    return (F.pad(rows, (0, 0, 0, 1)) if zeros else rows).index_select(1, index)


class _Move(torch.autograd.Function):
    """Rows (B, n, D) along a `Way`, and their gradient back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return _taken(rows, way.taken, way.taken_zeros)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None]:
        way = ctx.way
        return _taken(d_rows, way.back, way.back_zeros), None


def _moved(
    x: Tensor, live: int, before: Cut, after: Cut, merging: MergingPlan | None = None
) -> Tensor:
    """Rows (B, live + n, D) of one order in another, merged where a stage begins."""
    if merging is None:
        return _Move.apply(x, _way(before, after, False, live, x.device))
    prompts, image = x.tensor_split([live], dim=1)
    fours = _Move.apply(image, _way(before, after, True, 0, x.device))
    fours = fours.unflatten(1, (-1, 4)).flatten(2)
    if live:
        fours = torch.cat([prompts.repeat(1, 1, 4), fours], dim=1)
    dtype, own = merging.weight.dtype, merging.own
    if own is None:
        normed = normalise(fours, merging.norm, dtype)
        return F.linear(normed, merging.weight, merging.bias).to(x.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    bias = own.reduction.bias
    rows = _affine(normalise(fours, merging.norm, wide), own.norm).to(dtype)
    rows = F.linear(rows, own.reduction.weight.to(dtype), None if bias is None else bias.to(dtype))
    return rows.to(x.dtype)


def _affine(rows: Tensor, norm: Norm) -> Tensor:
    rows = rows if norm.weight is None else rows * norm.weight
    return rows if norm.bias is None else rows + norm.bias
