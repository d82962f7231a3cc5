"""The walk through a text tower: what CLIP computes of the texts of all classes, and this does not.

- Rows behind the end token of a text: no row before them sees them. Texts of about one length run
  together, in as many groups as pay.
- Rows that all classes begin with, once per class: they see nothing that differs. Those before the
  first learned row are constants of every block; shared learned rows, and whatever common words
  follow, run once, and the classes read their keys and values as those of prompts.
- In the last block, all but the one row at which a text is read, every key and every value (see
  `block.ClassBlock`).
- Gradients where no learned row reaches.

Where a context changes what attention gives (`attention_bypass`), every row is learned: nothing is
constant, and what all classes begin with still runs once.

Where rows see each other (SigLIP), only the last block is left to skip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .backbones.view import Bypass
from .block import ClassBlock, FrozenBlock, Stream, forward, keys_values, normalise
from .engine import rest_of_block
from .plan import FrozenPlan


@dataclass(frozen=True)
class Layout:
    """Where the sequences of all classes begin to differ, and where they end.

    Attributes:
        lengths: rows of each sequence from which on nobody reads any.
        constant: first rows that are the same for all classes and see no learned row.
        shared: first rows that are the same for all classes where the learned ones are.
        learned: how many of the learned rows are among those.
    """

    lengths: tuple[int, ...]
    constant: int
    shared: int
    learned: int

    @classmethod
    def of(cls, tokens: Tensor, live: Tensor, ends: Tensor, causal: bool) -> Layout:
        """Of token ids (C, N), places of learned rows (C, n) and the rows that are read (C,)."""
        if not causal:
            return cls((tokens.shape[1],) * len(tokens), 0, 0, 0)
        count = live.shape[1]
        marks = tokens.scatter(
            1, live, -1 - torch.arange(count, device=live.device).expand_as(live)
        )
        same = (marks == marks[:1]).all(0).int()
        shared = min(
            int(same.cumprod(0).sum()), int(ends.min())
        )  # each keeps the row it is read at
        first = int(live.min()) if count else shared
        learned = int((live[0] < shared).sum())
        return cls(tuple((ends + 1).tolist()), min(first, shared), shared, learned)

    def of_own_rows(self) -> Layout:
        """Where each class has learned rows of its own."""
        return Layout(self.lengths, self.constant, self.constant, 0)

    def of_changed_attention(self) -> Layout:
        """Where what is learned acts on every row."""
        return replace(self, constant=0)


@dataclass(frozen=True)
class Constants:
    """What the constant rows are in every block.

    Attributes:
        kv: per block keys and values (1, c, 2, H, d). normed: their normalised rows (1, c, D) in
            the last block.
    """

    kv: list[Tensor]
    normed: Tensor


@torch.inference_mode(False)
@torch.no_grad()
def constants(plan: FrozenPlan, x: Tensor) -> Constants:
    """Of embedded rows x (1, c, D) that see nothing but themselves; c may be 0."""
    stream, kv, normed = Stream(x.contiguous()), [], x.new_empty(0)
    for i, block in enumerate(plan.blocks):
        normed = normalise(stream.sum(), block.norm1, plan.dtype)
        kv.append(keys_values(block, normed))
        if i + 1 < len(plan.blocks) and x.shape[1]:
            stream = forward(block, stream)
    return Constants(kv, normed)


def walk(
    plan: FrozenPlan,
    known: Constants,
    shared: Tensor,
    own: Sequence[Tensor],
    at: Sequence[Tensor],
    memory: str,
    bypasses: Sequence[Bypass] = (),
) -> list[Tensor]:
    """The rows at which texts are read, (C, D) of each group, behind the last block.

    Args:
        known: of the rows that stand first.
        shared: (1, s, D), embedded rows of all classes, which stand behind those; s may be 0.
        own: of each group (C, m, D), embedded rows of each class.
        at: of each group (C,) int64, which of its own rows a class is read at.
        memory: see `pae.fast_forward`; "packed" is "keep", as groups have several numbers of rows.
        bypasses: of every block what is added to its rows instead of attention's; none: that.
    """
    memory = "keep" if memory == "packed" else memory
    first, groups = Stream(shared.contiguous()), [Stream(x.contiguous()) for x in own]
    stops = bool(bypasses)

    def ran(i: int, stream: Stream, kv: Tensor) -> Stream:
        block = plan.blocks[i]
        given = kv, None, None, block, memory, False, False, stops
        made = FrozenBlock.apply(*stream[:2], *given)
        return rest_of_block(block, bypasses[i], memory, *made) if stops else Stream(*made)

    for i, (block, constant) in enumerate(zip(plan.blocks[:-1], known.kv)):
        normed = normalise(first.sum(), block.norm1, plan.dtype)
        kv = torch.cat([constant, keys_values(block, normed)], dim=1)
        groups = [ran(i, stream, kv) for stream in groups]
        if shared.shape[1]:
            first = ran(i, first, constant)
    last = plan.blocks[-1]
    normed = torch.cat([known.normed, normalise(first.sum(), last.norm1, plan.dtype)], dim=1)

    def read(stream: Stream, row: Tensor) -> Tensor:
        made = ClassBlock.apply(*stream[:2], normed, None, None, row, last, stops)
        return rest_of_block(last, bypasses[-1], "keep", *made).sum() if stops else made

    return [read(stream, row)[:, 0] for stream, row in zip(groups, at)]


# what one more group costs, in rows that run through all blocks: on a CPU to read the weights, on
# a GPU to launch
_GROUP = {"cpu": 32}
_GROUP_ELSEWHERE = 4096


def groups_of(lengths: Sequence[int], device_type: str) -> list[list[int]]:
    """Sequences of these lengths in groups, each padded to its longest, so that rows and what
    groups cost beside them are fewest. Indices, each once.
    """
    cost = _GROUP.get(device_type, _GROUP_ELSEWHERE)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    ends = [
        e
        for e in range(1, len(order) + 1)
        if e == len(order) or lengths[order[e]] > lengths[order[e - 1]]
    ]
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # where a group ends: least cost, its beginning
    for end in ends:
        longest = lengths[order[end - 1]]
        best[end] = min((c + cost + (end - b) * longest, b) for b, (c, _) in best.items())
    found, end = [], len(order)
    while end:
        begin = best[end][1]
        found.append(order[begin:end])
        end = begin
    return found[::-1]
