"""One op on the same arguments by everybody: as a user would write it, compiled, and by pae.

`bench_pointwise` and `bench_product` are tables of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .roofline import DTYPES
from .rows import compiled, row
from .runner import Runnable

EAGER, COMPILED = "eager", "compiled"

Piece = Callable[..., "tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Op:
    """What is done and to what.

    Attributes:
        pieces: ways to do it, by row; `EAGER` is how a user would write it.
        arguments: of `draw(*shape, dtype=...)`, which by itself draws in the dtype of the products,
            and of the numbers of rows and of columns.
        flops: of its products, of the same two numbers.
    """

    pieces: Mapping[str, Piece]
    arguments: Callable[[Callable[..., Tensor], int, int], tuple[Tensor, ...]]
    flops: Callable[[int, int], float] = lambda rows, width: 0.0


@dataclass
class Inputs:
    """What all rows of an op share, what the work takes at least, and in fp64 what they should
    find, with what error at most by dtype of the result.
    """

    op: Op
    arguments: tuple[Tensor, ...]
    columns: dict[str, float]
    expected: dict[str, Tensor]
    limits: Mapping[torch.dtype, float]
    dtype: str

    def first(self) -> Tensor:
        return self.arguments[0]


def open_inputs(
    op: Op, rows: int, width: int, of: str, limits: Mapping[torch.dtype, float], device: Any
) -> Inputs:
    """`of`: the dtype of the products, "fp32" or "bf16"."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = DTYPES[of]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    arguments, written_out = op.arguments(draw, rows, width), op.pieces[EAGER]
    exact = written_out(*(t if t.dtype == torch.uint8 else t.double() for t in arguments))
    # one statistic a row is next to nothing
    moved = (t for t in (*arguments, *written_out(*arguments)) if t.shape[-1] > 1)
    columns = {"floor_mb": sum(t.nbytes for t in moved) / 1e6}
    if flops := op.flops(rows, width):
        columns["live_gflop"] = flops / 1e9
    expected = {f"result {i}": t for i, t in enumerate(exact)}
    return Inputs(op, arguments, columns, expected, limits, of)


def start(piece: str | Piece, shared: Inputs) -> Runnable:
    """A way to do it: a row of `pieces`, or the piece itself."""
    how = shared.op.pieces[piece] if isinstance(piece, str) else piece
    options = {"capture": True, "dtype": shared.dtype}
    work = partial(how, *shared.arguments)
    return row(work, shared.expected, shared.limits, shared.columns, **options)


def start_compiled(shared: Inputs, **options: Any) -> Runnable:
    """How a user would write it, by torch.compile. Every row is timed as a graph, so it need not
    make one of its own.
    """
    trial = lambda piece: piece(*shared.arguments)
    return start(compiled(shared.op.pieces[EAGER], trial, dynamic=False, **options), shared)
