"""Tiles of the attention kernels: the shipped ones, and faster ones near them.

    python -m bench.studies.tune_attention [--seconds 300]   # on a GPU; `bench/gpu.sh c` runs it

Prints, per kernel, the lines that `pae_kernels/attention/tiles.py` would hold, with medians in
microseconds of the shipped tile and of the best one. A tile that spills or does not fit is slow or
refused, so it cannot win; run the ahead-of-time compile test after writing a new one.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch

from bench import bench_attention, timing
from bench.bench_attention import Shape
from pae_kernels.attention import tiles
from pae_kernels.attention.tiles import Tile

CHOICES = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
}
WORTH = 0.98  # a tile replaces another when it needs at most this share of its time

# table and entry (of "WHOLE" that of a large chip) -> the shape it is tuned for
TARGETS = {
    ("FORWARD", (True, 64)): Shape(12, 64, 197, 50, 128, "bf16"),
    ("WHOLE", (True, 256)): Shape(12, 64, 197, 50, 128, "bf16"),
    ("SPLIT", (True, True, 64)): Shape(12, 64, 577, 50, 32, "bf16"),
    ("SPLIT", (True, True, 128)): Shape(16, 80, 257, 50, 64, "bf16"),
    ("FORWARD", (True, 128)): Shape(16, 80, 257, 50, 64, "bf16"),
    ("WHOLE", (True, 64)): Shape(12, 64, 50, 50, 128, "bf16"),
    ("FORWARD", (False, 64)): Shape(12, 64, 197, 50, 64, "fp32"),
    ("SPLIT", (True, False, 64)): Shape(12, 64, 197, 50, 64, "fp32"),
}

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


def stopwatch(table: str, key: tuple, shape: Shape, device: torch.device) -> Seconds:
    """Median time of the kernel with a given tile, whose values are checked first."""
    kind = "forward" if table == "FORWARD" else "backward"
    inputs = bench_attention.open_inputs(shape, kind, device)
    ready = bench_attention.prepare(inputs, bench_attention.ours)
    # the two-pass tiles are tuned where the one-pass backward would be taken, too
    whole = tiles.backward_whole if table == "WHOLE" else lambda *_: None

    def seconds(tile: Tile) -> float:
        with (
            mock.patch.dict(os.environ, PAE_BACKEND="triton"),
            mock.patch.dict(getattr(tiles, table), {key: tile}),
            mock.patch.object(tiles, "backward_whole", whole),
        ):
            try:
                ready.check()
                replay = timing.captured(ready.work, device)
            except Exception:  # does not compile, does not fit or is wrong: no candidate
                return math.inf
            return statistics.median(timing.measure(replay, device).device for _ in range(25))

    return seconds


def report(table: str, key: tuple, shape: Shape, shipped: Tile, times: dict[Tile, float]) -> str:
    """The line of the table, and what it is worth."""
    best = min(times, key=lambda tile: times[tile] * (WORTH if tile == shipped else 1))
    us = f"{1e6 * times[best]:.1f} us, shipped {1e6 * times[shipped]:.1f} us"
    return (
        f"{table}: {key}: Tile({best.block_m}, {best.block_n}, {best.warps}, {best.stages}),  "
        f"# {us}; {len(times)} tiles, {shape.name}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="for all kernels together")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    large = torch.cuda.get_device_properties(device).major >= 9
    print(f"tiles.py, {torch.cuda.get_device_name(device)}: what to write where", flush=True)
    end = time.monotonic() + options.seconds
    for i, ((table, key), shape) in enumerate(TARGETS.items()):
        key = (large, *key[1:]) if table == "WHOLE" else key
        shipped = getattr(tiles, table).get(key)
        if shipped is None:
            continue
        share = (end - time.monotonic()) / (len(TARGETS) - i)
        with timing.one_stream(device):
            seconds = stopwatch(table, key, shape, device)
            times = search(shipped, seconds, table == "WHOLE", time.monotonic() + share)
        print(report(table, key, shape, shipped, times), flush=True)


if __name__ == "__main__":
    main()
