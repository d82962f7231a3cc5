"""Tiles of the attention kernels: walk from the shipped ones to the fastest neighbours.

    python -m bench.studies.tune_attention [--seconds 300]   # on a GPU; `bench/gpu.sh tune` runs it

Prints, per kernel, the lines that `pae_kernels/attention/tiles.py` would hold, with medians in
microseconds of the shipped tile and of the best one. A tile that spills or does not fit is slow or
refused, so it cannot win; run the ahead-of-time compile test after writing a new one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
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

Seconds = Callable[[Tile], "float | None"]  # of a tile; None when it cannot run


def neighbours(tile: Tile, fixed_rows: bool) -> Iterator[Tile]:
    """Tiles one step away in one property; the one-pass backward holds all rows, so block_m is
    fixed there.
    """
    for name, choices in CHOICES.items():
        if name == "block_m" and fixed_rows:
            continue
        at = choices.index(getattr(tile, name))
        for step in (at - 1, at + 1):
            if 0 <= step < len(choices):
                yield replace(tile, **{name: choices[step]})


def walk(tile: Tile, seconds: Seconds, fixed_rows: bool, deadline: float) -> dict[Tile, float]:
    """Times of all tiles that were visited: downhill, until no neighbour is faster, or until the
    `deadline` of `time.monotonic()`.
    """
    seen: dict[Tile, float | None] = {tile: seconds(tile)}
    best, here = tile, None
    while best != here:
        here = best
        for other in neighbours(here, fixed_rows):
            if other not in seen and time.monotonic() < deadline:
                seen[other] = seconds(other)
            time_of = seen.get(other)
            if time_of is not None and (seen[best] is None or time_of < WORTH * seen[best]):
                best = other
    return {visited: t for visited, t in seen.items() if t is not None}


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

    def seconds(tile: Tile) -> float | None:
        with mock.patch.dict(getattr(tiles, target.table), {target.key: tile}):
            try:
                if not all(relative(got, want) < 1e-2 for got, want in zip(run(), expected)):
                    return None
                replay = timing.captured(run, device)
            except Exception:  # does not compile or does not fit: no candidate
                return None
            return statistics.median(timing.measure(replay, device).device for _ in range(25))

    return seconds


def report(target: Target, shipped: Tile, times: dict[Tile, float]) -> str:
    """The line of the table, and what it is worth."""
    if not times:
        return f"{target.table}[{target.key}]: no tile runs"
    best = min(times, key=times.get)
    if shipped in times and times[best] > WORTH * times[shipped]:
        best = shipped
    us = {tile: f"{1e6 * t:.1f} us" for tile, t in times.items()}
    return (
        f"{target.table}: {target.key}: Tile({best.block_m}, {best.block_n}, {best.warps}, "
        f"{best.stages}),  # {us[best]}, shipped {us.get(shipped, 'does not run')}; {len(times)} "
        f"tiles, {str(target.dtype).removeprefix('torch.')} N {target.tokens} H {target.heads} "
        f"d {target.head_width} B {target.batch}"
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
            times = walk(shipped, seconds, whole, time.monotonic() + share)
        print(report(target, shipped, times), flush=True)


if __name__ == "__main__":
    main()
