"""Sizes of errors, and bounds on them that follow from what was computed.

A tolerance relative to a result is no bound where the result is what is left of larger terms: a
gradient that nearly cancels may be all rounding. `rounding` asks the formula itself: every number
that one of its operations reads or writes is moved by at most half a unit in the last place of
the working precision, at random, and the spread of the results is the size of the rounding that
any way of computing them is entitled to (Monte Carlo arithmetic: Parker, "Monte Carlo Arithmetic:
exploiting randomness in floating-point arithmetic", 1997; Vignes' CESTAC is the same idea).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


def error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of `expected`."""
    return distance(got, expected) / max(expected.detach().double().norm().item(), 1e-300)


def distance(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference, in fp64."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    return (got - expected).norm().item()


class Rounded(TorchDispatchMode):
    """Operations on fp64 read and write numbers that are off by up to `unit`, relatively.

    What is read is moved too, as the terms of a sum (a product of matrices) round, not its result
    alone. Views and what writes in place are left alone: they return what they were given.
    """

    def __init__(self, unit: float, seed: int) -> None:
        super().__init__()
        self.unit = unit
        # far from the seeds of the inputs, whose very numbers the noise would be
        self.generator = torch.Generator().manual_seed(0x5EED_0000 + seed)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float64:
            return value
        noise = torch.rand(value.shape, generator=self.generator, dtype=torch.float64)
        return value * (1 + self.unit * (2 * noise - 1))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(r.alias_info is not None for r in func._schema.returns):
            return func(*args, **kwargs)
        moved: dict[int, Any] = {}  # x == x asks for one number, not for two

        def once(value: Any) -> Any:
            return moved.setdefault(id(value), self._moved(value))

        return tree_map(self._moved, func(*tree_map(once, args), **tree_map(once, kwargs)))


# Sums that are computed one after the other, in blocks, or by instructions with several products
# each round more or less often than one term at a time does; the model knows none of this
TIMES = 32.0


def rounding(
    function: Callable[[], Sequence[Tensor | None]], dtype: torch.dtype, runs: int | None = None
) -> tuple[list[Tensor | None], list[float]]:
    """(results of `function`, norm of the rounding of each) where `dtype` were computed in.

    `function` computes in fp64, the same whenever it is called. The rounding is the root mean
    square over `runs` (fewer of them suffice for many numbers). None stays None, its size 0.
    """
    exact = list(function())
    if runs is None:
        runs = 3 if max((t.numel() for t in exact if t is not None), default=0) > 4096 else 8
    # one size of noise for every precision, far above what fp64 itself rounds: errors are linear
    unit = 2.0**-30
    squares = [0.0] * len(exact)
    for seed in range(runs):
        with Rounded(unit, seed):
            results = list(function())
        for i, (moved, value) in enumerate(zip(results, exact, strict=True)):
            if value is not None:
                squares[i] += distance(moved, value) ** 2
    scale = torch.finfo(dtype).eps / 2 / unit
    return exact, [scale * (square / runs) ** 0.5 for square in squares]


def assert_rounded(
    got: Sequence[Tensor | None],
    function: Callable[[], Sequence[Tensor | None]],
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
    times: float = TIMES,
) -> None:
    """`got` equals what `function` computes in fp64, but for `times` its rounding in `dtype`.

    `dtype`: that of the first of `got`, unless given.
    """
    dtype = dtype or next(t.dtype for t in got if t is not None)
    exact, sizes = rounding(function, dtype)
    for i, (a, b, size) in enumerate(zip(got, exact, sizes, strict=True)):
        name = names[i] if names else f"result {i}"
        assert (a is None) == (b is None), name
        if a is None or b is None:
            continue
        off = distance(a, b)
        assert off <= times * size, f"{name} is off by {off:.1e}: {off / size:.1f} roundings"


# How sure a comparison of errors is before it fails, in standard errors of the mean
SURE = 2.0


def assert_not_worse(
    ours: Tensor, theirs: Tensor, times: float, names: Sequence[str], sure: float = SURE
) -> None:
    """Errors of ours are at most `times` theirs, in the geometric mean over independent draws.

    ours, theirs: (draws, quantities), of the same inputs row by row. A ratio of two errors is a
    draw of its own, with a spread of 10 to 40 % here: the mean of its logarithm is what is
    compared, and fails where it is above log(times) by more than `sure` of its standard errors.
    """
    ratios = (ours / theirs).double().log()
    assert torch.isfinite(ratios).all()
    draws = len(ratios)
    assert draws >= 16, "the spread of a few draws is not known"
    mean, spread = ratios.mean(0), ratios.std(0) / draws**0.5
    worse = (mean - sure * spread).exp() > times
    said = [
        f"{name}: {m:.3f} times, at least {low:.3f}"
        for name, m, low in zip(names, mean.exp().tolist(), (mean - sure * spread).exp().tolist())
    ]
    assert not worse.any(), f"expected at most {times}: " + "; ".join(said)
