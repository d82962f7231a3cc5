"""Tiles of the attention kernels: the shipped ones, and faster ones near them.

    python -m bench.studies.tune_attention [--seconds 300]   # on a GPU; `bench/gpu.sh tune` runs it

Prints, per kernel, the lines that `pae_kernels/attention/tiles.py` would hold, with medians in
microseconds of the shipped tile and of the best one. A tile that spills or does not fit is slow or
refused, so it cannot win; run the ahead-of-time compile test after writing a new one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench import timing
from bench.runner import relative
from pae_kernels.attention import tiles, triton
from pae_kernels.attention.tiles import Tile

CHOICES = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
}
WORTH = 0.98  # a tile replaces another when it needs at most this share of its time


class Target(NamedTuple):
    """One entry of one table, "FORWARD", "SPLIT" or "WHOLE", and the shape it is tuned for."""

    table: str
    key: tuple
    tokens: int
    heads: int
    head_width: int
    dtype: torch.dtype
    batch: int = 64
    prompts: int = 50


TARGETS = [
    Target("FORWARD", (True, 64), 197, 12, 64, torch.bfloat16, 128),
    Target("WHOLE", (True, 256), 197, 12, 64, torch.bfloat16, 128),
    Target("SPLIT", (True, True, 64), 577, 12, 64, torch.bfloat16, 32),
    Target("SPLIT", (True, True, 128), 257, 16, 80, torch.bfloat16),
    Target("FORWARD", (True, 128), 257, 16, 80, torch.bfloat16),
    Target("WHOLE", (True, 64), 50, 12, 64, torch.bfloat16, 128),
    Target("FORWARD", (False, 64), 197, 12, 64, torch.float32),
    Target("SPLIT", (True, False, 64), 197, 12, 64, torch.float32),
]

Seconds = Callable[[Tile], float]  # of a tile; infinite when it cannot run


def search(tile: Tile, seconds: Seconds, fixed_rows: bool, deadline: float) -> dict[Tile, float]:
    """Times of all tiles that were tried: one property after the other at every choice, the others
    as in the best so far, until nothing is faster or `time.monotonic()` passes `deadline`. The
    one-pass backward holds all rows, so block_m is fixed there.
    """
    times = {tile: seconds(tile)}
    best, before = tile, None
    while best != before:
        before = best
        for name in list(CHOICES)[fixed_rows:]:
            for other in [replace(best, **{name: choice}) for choice in CHOICES[name]]:
                if other not in times and time.monotonic() < deadline:
                    times[other] = seconds(other)
                    if times[other] < WORTH * times[best]:
                        best = other
    return times


def stopwatch(target: Target, device: torch.device) -> Seconds:
    """Median time of the target's kernel with a given tile, whose values are checked first."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(target.dtype)

    tail = target.heads, target.head_width
    qkv = draw(target.batch, target.tokens, 3, *tail)
    kv = draw(1, target.prompts, 2, *tail)
    d_out = draw(target.batch, target.tokens, target.heads * target.head_width)
    call = qkv, kv, None, target.head_width**-0.5, False, None
    out, lse = triton.forward(*call)

    def run() -> tuple[Tensor, ...]:
        if target.table == "FORWARD":
            return triton.forward(*call)
        # the two-pass tiles are tuned where the one-pass backward would be taken, too
        whole = tiles.backward_whole if target.table == "WHOLE" else lambda *_: None
        with mock.patch.object(tiles, "backward_whole", whole):
            return triton.backward(d_out, *call, out, lse, True)

    expected = run()

    def seconds(tile: Tile) -> float:
        with mock.patch.dict(getattr(tiles, target.table), {target.key: tile}):
            try:
                if not all(relative(got, want) < 1e-2 for got, want in zip(run(), expected)):
                    return math.inf
                replay = timing.captured(run, device)
            except Exception:  # does not compile or does not fit: no candidate
                return math.inf
            return statistics.median(timing.measure(replay, device).device for _ in range(25))

    return seconds


def report(target: Target, shipped: Tile, times: dict[Tile, float]) -> str:
    """The line of the table, and what it is worth."""
    best = min(times, key=lambda tile: times[tile] * (WORTH if tile == shipped else 1))
    us = f"{1e6 * times[best]:.1f} us, shipped {1e6 * times[shipped]:.1f} us"
    return (
        f"{target.table}: {target.key}: Tile({best.block_m}, {best.block_n}, {best.warps}, "
        f"{best.stages}),  # {us}; {len(times)} tiles, {str(target.dtype).removeprefix('torch.')} "
        f"N {target.tokens} H {target.heads} d {target.head_width} B {target.batch}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="for all kernels together")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    hopper = torch.cuda.get_device_properties(device).major >= 9
    print(f"tiles.py, {torch.cuda.get_device_name(device)}: what to write where", flush=True)
    end = time.monotonic() + options.seconds
    for i, target in enumerate(TARGETS):
        whole = target.table == "WHOLE"
        if whole:
            target = target._replace(key=(hopper, target.key[1]))
        shipped = getattr(tiles, target.table).get(target.key)
        if shipped is None:
            continue
        share = (end - time.monotonic()) / (len(TARGETS) - i)
        with timing.one_stream(device):
            seconds = stopwatch(target, device)
            times = search(shipped, seconds, whole, time.monotonic() + share)
        print(report(target, shipped, times), flush=True)


if __name__ == "__main__":
    main()
