"""The walk through a text tower: what CLIP computes of the texts of all classes, and this does not.

- Rows behind the last end token: no row before them sees them.
- Rows that all classes begin with, once per class: they see nothing that differs. Those before the
  first learned row are constants of every block; shared learned rows, and whatever common words
  follow, run once, and the classes read their keys and values as those of prompts.
- In the last block, all but the one row at which a text is read, every key and every value (see
  `block.ClassBlock`).
- Gradients where no learned row reaches.

Where rows see each other (SigLIP), only the last block is left to skip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .block import ClassBlock, FrozenBlock, Stream, forward, keys_values, normalise
from .plan import FrozenPlan


@dataclass(frozen=True)
class Layout:
    """Where the sequences of all classes begin to differ, and where they end.

    Attributes:
        length: rows from which on nobody reads any.
        constant: first rows that are the same for all classes and see no learned row.
        shared: first rows that are the same for all classes where the learned ones are.
        learned: how many of the learned rows are among those.
    """

    length: int
    constant: int
    shared: int
    learned: int

    @classmethod
    def of(cls, tokens: Tensor, live: Tensor, ends: Tensor, causal: bool) -> Layout:
        """Of token ids (C, N), places of learned rows (C, n) and the rows that are read (C,)."""
        if not causal:
            return cls(tokens.shape[1], 0, 0, 0)
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
        return cls(int(ends.max()) + 1, min(first, shared), shared, learned)

    def of_own_rows(self) -> Layout:
        """Where each class has learned rows of its own."""
        return Layout(self.length, self.constant, self.constant, 0)


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
    plan: FrozenPlan, known: Constants, shared: Tensor, own: Tensor, at: Tensor, memory: str
) -> Tensor:
    """The rows at which texts are read, (C, D), behind the last block.

    Args:
        known: of the rows that stand first.
        shared: (1, s, D), embedded rows of all classes, which stand behind those; s may be 0.
        own: (C, m, D), embedded rows of each class.
        at: (C,) int64, which of its own rows a class is read at.
        memory: see `pae.fast_forward`.
    """
    first, streams = Stream(shared.contiguous()), Stream(own.contiguous())
    for block, constant in zip(plan.blocks[:-1], known.kv):
        normed = normalise(first.sum(), block.norm1, plan.dtype)
        kv = torch.cat([constant, keys_values(block, normed)], dim=1)
        more = None, None, block, memory, False, False
        streams = Stream(*FrozenBlock.apply(*streams[:2], kv, *more))
        if shared.shape[1]:
            first = Stream(*FrozenBlock.apply(*first[:2], constant, *more))
    last = plan.blocks[-1]
    normed = torch.cat([known.normed, normalise(first.sum(), last.norm1, plan.dtype)], dim=1)
    return ClassBlock.apply(*streams[:2], normed, None, None, at, last)[:, 0]
