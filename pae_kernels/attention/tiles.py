"""Tiles of the attention kernels: one static table, no autotuning at first call.

Chosen from ahead-of-time compiles for sm_80 and sm_90 by Triton 3.6, 3.8 and 3.9. None spills, but
for 256 rows in the whole backward (32 bytes a thread, 40 by 3.6: the price of keys that are copied
while the tile before is worked on) and exact fp32 rows wider than 64 in the split backward's dq
(208). `python -m pae_kernels --compile` prints what each takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from .. import gpus
from ..ahead_of_time import OPTIONS


@dataclass(frozen=True)
class Tile:
    """block_m query rows by block_n key rows, warps of a program, stages of its load pipeline;
    where programs take images in turn, how many of them a multiprocessor holds.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int = 1

    def launch(self) -> dict:
        """As a kernel launch takes it; nobody changes it."""
        return _launch(self)


@lru_cache
def _launch(tile: Tile) -> dict:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **OPTIONS,
    }


# (16-bit?, head width: 64 stands for all up to 64, 128 for all above) -> tile
FORWARD = {
    (True, 64): Tile(128, 64, 8, 3),
    (True, 128): Tile(128, 64, 8, 2),
    (False, 64): Tile(64, 32, 8, 1),
    (False, 128): Tile(32, 32, 8, 2),
}
# (227 KB of shared memory?, 16-bit?, head width as above) -> tile
SPLIT = {
    (True, True, 64): Tile(64, 64, 4, 2),
    (True, True, 128): Tile(64, 64, 8, 1),
    (True, False, 64): Tile(32, 32, 8, 1),
    (True, False, 128): Tile(32, 32, 8, 1),
    (False, True, 64): Tile(32, 64, 4, 2),
    (False, True, 128): Tile(64, 64, 8, 1),
    (False, False, 64): Tile(32, 32, 8, 1),
    (False, False, 128): Tile(32, 32, 8, 1),
}
# (227 KB of shared memory?, rows padded) -> tile; 16 bits, head width up to 64. At 256 rows, one
# stage spills nothing and has 4 % fewer instructions (on sm_100 43 %: two are peeled there), but no
# keys are copied ahead; three stages spill as much as two and have 2 % more. None is measured.
WHOLE = {
    (True, 64): Tile(64, 64, 4, 2, programs=2),
    (True, 128): Tile(128, 64, 8, 2),
    (True, 256): Tile(256, 64, 8, 2),
    (False, 64): Tile(64, 32, 4, 2, programs=2),
    (False, 128): Tile(128, 32, 8, 2),
}


def _key(qkv: Tensor) -> tuple[bool, int]:
    return qkv.element_size() == 2, 64 if qkv.shape[-1] <= 64 else 128


def forward(qkv: Tensor, rows: int) -> Tile:
    """Tile of the forward kernel for packed qkv (B, N, 3, H, d) and this many query rows."""
    tile = FORWARD[_key(qkv)]
    if rows <= 16:
        return replace(tile, block_m=16, warps=4)
    # windows of 49 rows would leave most of a larger tile idle
    return replace(tile, block_m=64, warps=4) if rows <= 64 < tile.block_m else tile


def forward_with_places(tile: Tile, large: bool) -> Tile:
    """A tile of the forward with a bias or a mask: of 128 rows, what is copied ahead takes 128 KB
    of shared memory with one of them, 192 with both, and GPUs that are not large have 99 to 163.
    """
    if large or tile.stages == 1:
        return tile
    rows = min(tile.block_m, 64)
    warps = tile.warps if rows == tile.block_m else 4
    return replace(tile, block_m=rows, warps=warps, stages=2)


def backward_whole(qkv: Tensor, rows: int) -> Tile | None:
    """Tile of the one-pass backward, or None where all rows of a head do not fit on chip."""
    large = gpus.of(qkv.device).large
    if not _key(qkv)[0] or qkv.shape[-1] > 64 or rows > (256 if large else 128):
        return None
    return WHOLE[large, next(size for size in (64, 128, 256) if rows <= size)]


def with_places(tile: Tile, bias: bool, mask: bool) -> Tile:
    """A tile of the one-pass backward with a bias or a mask: of 256 rows, two tiles of it in flight
    do not fit into the shared memory of sm_100, and beside 64 keys both spill 190 bytes a thread.
    """
    if tile.block_m <= 128 or not (bias or mask):
        return tile
    return replace(tile, stages=1, block_n=32 if bias and mask else tile.block_n)


def backward_split(qkv: Tensor, rows: int) -> Tile:
    """Tile of both kernels of the two-pass backward."""
    narrow, width = _key(qkv)
    tile = SPLIT[gpus.of(qkv.device).large, narrow, width]
    return replace(tile, block_m=16) if rows <= 16 else tile


def images_per_program(qkv: Tensor, tile: Tile) -> int:
    """Images that a one-pass program takes in turn: as many programs as the GPU holds at a time."""
    batch, _, _, heads, _ = qkv.shape
    return max(1, -(-batch * heads // (tile.programs * gpus.of(qkv.device).multiprocessors)))
