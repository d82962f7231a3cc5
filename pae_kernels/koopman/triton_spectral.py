"""The spectral norm of `koopman_losses` in Triton, by squaring, and what all its kernels share:
loads, stores and products of square tiles. `spectral.top_by_squaring` has the mathematics,
`triton.py` the cost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gpus
from ..ahead_of_time import OPTIONS
from ..launching import Launcher, power_of_2, programs
from . import spectral, tiles

SMALLEST_SPREAD = tl.constexpr(spectral.SMALLEST_SPREAD)
SCALE_PARTS = tl.constexpr(32)  # programs that look for max |L| in one matrix
TRACE_PART = tl.constexpr(1 / 4096)  # a sum of many huge entries must stay finite
STEPS = spectral.SQUARINGS + 1  # M itself counted


@triton.jit
def tile(index, tiles_in_row, BLOCK: tl.constexpr):
    """Rows and columns of tile `index`, counted row by row."""
    o = tl.arange(0, BLOCK)
    return index // tiles_in_row * BLOCK + o, index % tiles_in_row * BLOCK + o


@triton.jit
def dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load(base, o_row, o_column, rows, columns, stride):
    """base[o_row, o_column], (rows, columns) with 0 outside."""
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    return tl.load(base + o_row[:, None] * stride + o_column[None, :], mask=mask, other=0.0)


@triton.jit
def load_flipped(base, o_row, o_column, rows, columns, stride):
    """base[o_column, o_row]^T: tile (o_row, o_column) of the transpose."""
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    return tl.load(base + o_column[None, :] * stride + o_row[:, None], mask=mask, other=0.0)


@triton.jit
def store(base, o_row, o_column, rows, columns, stride, x):
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    tl.store(base + o_row[:, None] * stride + o_column[None, :], x, mask=mask)


@triton.jit(do_not_specialize=("groups", "stack"))
def koopman_scale_kernel(L, scales, k, groups, stack, BLOCK: tl.constexpr):
    """A part of max |L|, of trace L, and whether L is finite; grid (SCALE_PARTS, R G)."""
    run, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    L += (run.to(tl.int64) * stack + group) * k * k
    largest = tl.zeros([BLOCK], tl.float32)
    trace = tl.zeros([BLOCK], tl.float32)
    wild = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0) * BLOCK, k * k, SCALE_PARTS * BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(L + at, mask=at < k * k, other=0.0)
        finite = tl.abs(x) <= 3.4028234663852886e38
        wild = tl.where(finite, wild, 1.0)
        x = tl.where(finite, x, 0.0)
        largest = tl.maximum(largest, tl.abs(x))
        trace += tl.where(at // k == at % k, x * TRACE_PART, 0.0)
    scales += (tl.program_id(1) * SCALE_PARTS + tl.program_id(0)) * 3
    tl.store(scales, tl.max(largest, 0))
    tl.store(scales + 1, tl.sum(trace, 0))
    tl.store(scales + 2, tl.max(wild, 0))


@triton.jit
def read_scale(scales, k):
    """unit (NaN where L is not finite), 1 / unit (then 0), and the mean diagonal entry of L / unit.

    unit is the power of two of max |L|, 1 for zeros; neither it nor its inverse is denormal.
    """
    at = scales + 3 * tl.arange(0, SCALE_PARTS)
    largest = tl.max(tl.load(at), 0)
    trace = tl.sum(tl.load(at + 1), 0)
    finite = tl.max(tl.load(at + 2), 0) == 0.0
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    unit = tl.where(largest == 0.0, 1.0, unit)
    mean = trace / unit / (TRACE_PART * k)
    return tl.where(finite, unit, float("nan")), tl.where(finite, 1.0 / unit, 0.0), mean


@triton.jit
def _without_identity(L, o_row, o_column, k, inverse, mean):
    x = load(L, o_row, o_column, k, k, k)
    x = tl.where(inverse == 0.0, 0.0, x * inverse)
    on_diagonal = (o_row[:, None] == o_column[None, :]) & (o_row < k)[:, None]
    return tl.where(on_diagonal, x - mean, x)


@triton.jit
def _store_mirrored(base, o_m, o_n, k, x):
    """An upper tile of a symmetric matrix, and its mirror image below the diagonal."""
    store(base, o_m, o_n, k, k, k, x)
    mask = (o_m < k)[:, None] & (o_n < k)[None, :]
    tl.store(base + o_n[None, :] * k + o_m[:, None], x, mask=mask)


@triton.jit
def _store_sums(sums, index, side, a, b):
    """Sums over an upper tile, which stands for its mirror image too."""
    weight = tl.where(index // side == index % side, 1.0, 2.0)
    tl.store(sums + 2 * index, weight * tl.sum(tl.sum(a, 1), 0))
    tl.store(sums + 2 * index + 1, weight * tl.sum(tl.sum(b, 1), 0))


@triton.jit
def _read_sums(sums, side, TILES: tl.constexpr):
    at = tl.arange(0, TILES)
    mask = (at < side * side) & (at // side <= at % side)
    first = tl.load(sums + 2 * at, mask=mask, other=0.0)
    return tl.sum(first, 0), tl.sum(tl.load(sums + 2 * at + 1, mask=mask, other=0.0), 0)


@triton.jit(do_not_specialize=("groups", "stack"))
def koopman_split_kernel(
    L, scales, M, sums, settled, k, groups, stack,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """An upper tile of M = E^T E + s (E + E^T), with |M|^2 and tr M; grid (side side, R G)."""
    i_t, i_b = tl.program_id(0), tl.program_id(1)
    side = tl.cdiv(k, BLOCK)
    if i_t // side > i_t % side:
        return
    o_m, o_n = tile(i_t, side, BLOCK)
    L += ((i_b // groups).to(tl.int64) * stack + i_b % groups) * k * k
    _, inverse, mean = read_scale(scales + i_b * 3 * SCALE_PARTS, k)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, k, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        a = tl.trans(_without_identity(L, o_d, o_m, k, inverse, mean))
        acc = dot(a, _without_identity(L, o_d, o_n, k, inverse, mean), acc)
    acc += mean * (
        _without_identity(L, o_m, o_n, k, inverse, mean)
        + tl.trans(_without_identity(L, o_n, o_m, k, inverse, mean))
    )
    _store_mirrored(M + i_b.to(tl.int64) * k * k, o_m, o_n, k, acc)
    diagonal = tl.where(o_m[:, None] == o_n[None, :], acc, 0.0)
    _store_sums(sums + i_b * STEPS * 2 * side * side, i_t, side, acc * acc, diagonal)
    if i_t == 0:
        tl.store(settled + i_b * STEPS + 2, -1)


@triton.jit
def _projector(
    M, before, o_row, o_column, k, spread, shift, weight, FIRST: tl.constexpr, PLAIN: tl.constexpr
):
    """What is squared: M / |M| (PLAIN), weight (M / |M| + shift)^2 (FIRST), or the projector."""
    if PLAIN:
        return load(M, o_row, o_column, k, k, k) * spread
    x = load(before, o_row, o_column, k, k, k)
    if FIRST:
        x += 2 * shift * spread * load(M, o_row, o_column, k, k, k)
        on_diagonal = (o_row[:, None] == o_column[None, :]) & (o_row < k)[:, None]
        x = weight * tl.where(on_diagonal, x + shift * shift, x)
    return x


@triton.jit(do_not_specialize=("q", "below"))
def koopman_square_kernel(
    M, before, after, scales, sums, settled, k, q, below,
    PLAIN: tl.constexpr, FIRST: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """An upper tile of squaring q: 1 (PLAIN, of M itself), 2 (FIRST) or later; grid (side^2, R G).

    A squaring after the projector has settled (its last change below `below`) returns at once.
    """
    i_t, i_b = tl.program_id(0), tl.program_id(1)
    side = tl.cdiv(k, BLOCK)
    if i_t // side > i_t % side:
        return
    sums += i_b * STEPS * 2 * side * side
    spread = 1.0
    shift = 0.0
    weight = 1.0
    share = 1.0
    if PLAIN or FIRST:
        squares, trace = _read_sums(sums, side, TILES)
        if PLAIN and i_t == 0:  # for the gradient: whether L is s I
            tl.store(settled + i_b * STEPS, (squares < SMALLEST_SPREAD).to(tl.int32))
        spread = tl.where(squares < SMALLEST_SPREAD, 0.0, 1.0 / tl.sqrt(squares))
        if FIRST:
            fourth, _ = _read_sums(sums + 2 * side * side, side, TILES)
            _, _, mean = read_scale(scales + i_b * 3 * SCALE_PARTS, k)
            shift = tl.minimum(tl.sqrt(tl.sqrt(fourth)), mean * mean * spread)
            shift = tl.where(spread == 0.0, 1.0, shift)
            square = tl.where(spread == 0.0, 0.0, 1.0)
            weight = 1.0 / (square + 2 * shift * trace * spread + shift * shift * k)
    else:
        before_settled = tl.load(settled + i_b * STEPS + q - 1)
        if before_settled >= 0:  # since when; sums of squarings since then were never written
            if i_t == 0:
                tl.store(settled + i_b * STEPS + q, before_settled)
            return
        squares, change = _read_sums(sums + (q - 1) * 2 * side * side, side, TILES)
        now = change <= below * below * squares
        if i_t == 0:
            tl.store(settled + i_b * STEPS + q, tl.where(now, q - 1, -1))
        if now:
            return
        share = 1.0 / squares
    o_m, o_n = tile(i_t, side, BLOCK)
    M += i_b.to(tl.int64) * k * k
    before += i_b.to(tl.int64) * k * k
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, k, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        a = _projector(M, before, o_d, o_m, k, spread, shift, weight, FIRST, PLAIN)
        b = _projector(M, before, o_d, o_n, k, spread, shift, weight, FIRST, PLAIN)
        acc = dot(tl.trans(a), b, acc)
    acc = acc * share
    _store_mirrored(after + i_b.to(tl.int64) * k * k, o_m, o_n, k, acc)
    moved = acc - _projector(M, before, o_m, o_n, k, spread, shift, weight, FIRST, PLAIN)
    _store_sums(sums + q * 2 * side * side, i_t, side, acc * acc, moved * moved)


@triton.jit(do_not_specialize=("groups", "stack"))
def koopman_vector_kernel(
    L, scales, even, odd, settled, right, image, k, groups, stack,
    STEPS: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """right, the projector's longest column, and ROWS rows of L right / unit; grid (parts, R G)."""
    i_b = tl.program_id(1)
    o_k = tl.arange(0, BLOCK_K)
    last = tl.load(settled + i_b * STEPS + STEPS - 1)
    last = tl.where(last >= 0, last, STEPS - 1)
    offset = i_b.to(tl.int64) * k * k
    # one of the two buffers is read: to choose a pointer would take a branch
    in_even = tl.where(last % 2 == 0, k, 0)
    in_odd = k - in_even
    o_diagonal = offset + o_k.to(tl.int64) * (k + 1)
    diagonal = tl.load(even + o_diagonal, mask=o_k < in_even, other=0.0)
    diagonal += tl.load(odd + o_diagonal, mask=o_k < in_odd, other=0.0)
    best = tl.max(diagonal, 0)
    column = tl.min(tl.where((diagonal == best) & (o_k < k), o_k, k - 1), 0)
    o_column = offset + column.to(tl.int64) * k + o_k
    v = tl.load(even + o_column, mask=o_k < in_even, other=0.0)
    v += tl.load(odd + o_column, mask=o_k < in_odd, other=0.0)
    v = v / best  # its entries may be 1 / k and less: their squares might vanish
    v = v / tl.sqrt(tl.sum(v * v, 0))
    if tl.program_id(0) == 0:
        tl.store(right + i_b * k + o_k, v, mask=o_k < k)
    _, inverse, _ = read_scale(scales + i_b * 3 * SCALE_PARTS, k)
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    L += ((i_b // groups).to(tl.int64) * stack + i_b % groups) * k * k
    x = load(L, o_r, o_k, k, k, k)
    x = tl.where(inverse == 0.0, 0.0, x * inverse)
    tl.store(image + i_b * k + o_r, tl.sum(x * v[None, :], 1), mask=o_r < k)


# ---- launches

_scale = Launcher(koopman_scale_kernel)
_split = Launcher(koopman_split_kernel)
_square = Launcher(koopman_square_kernel)
_vector = Launcher(koopman_vector_kernel)


def product(block: int) -> dict:
    warps = tiles.WARPS[block]
    return {"BLOCK": block, "BLOCK_D": 32, "num_warps": warps, "num_stages": 2, **OPTIONS}


def spectral_norm(L: Tensor, right: Tensor, groups: int, stack: int) -> tuple[Tensor, ...]:
    """Writes `right` (R, G, k), the top right singular vectors of the first `groups` of every
    `stack` matrices in L, (R stack, k, k) in memory.

    Returns:
        L right / unit, (R G, k), whose length is sigma / unit; (R G, 32, 3), from which
        `read_scale` reads the unit; and (R G, STEPS) int32, whose first column is 1 where L is
        a multiple of the identity.
    """
    matrices, k = right.shape[0] * groups, right.shape[2]
    block = tiles.square(k, matrices, gpus.of(L.device).multiprocessors)
    side = programs(k, block)
    tiling = product(block)
    scales = L.new_empty(matrices, 32, 3)
    sums = L.new_empty(matrices, STEPS, side * side, 2)
    settled = torch.empty(matrices, STEPS, dtype=torch.int32, device=L.device)
    image = L.new_empty(matrices, k)
    # M, M^2, then the projector in turns: after squaring q in the third (q even) or first (odd)
    buffers = L.new_empty(3, matrices, k, k)
    M, square, even = buffers
    grid = side * side, matrices
    constants = {"BLOCK": 1024, "num_warps": 4, **OPTIONS}
    _scale((32, matrices), L.device, (L, scales, k, groups, stack), constants)
    given: tuple = L, scales, M, sums, settled, k, groups, stack
    _split(grid, L.device, given, {"STEPS": STEPS, **tiling})
    tiling |= {"STEPS": STEPS, "TILES": power_of_2(side * side)}
    for q in range(1, STEPS):
        before = square if q == 2 else (even, M)[(q - 1) % 2]
        after = square if q == 1 else (even, M)[q % 2]
        below = spectral.settled_below(q - 1)
        given = M, before, after, scales, sums, settled, k, q, below
        _square(grid, L.device, given, {"PLAIN": q == 1, "FIRST": q == 2, **tiling})
    rows = _vector_rows(k)
    given = L, scales, even, M, settled, right, image, k, groups, stack
    constants = {"STEPS": STEPS, "num_warps": 4, **rows, **OPTIONS}
    _vector((programs(k, rows["ROWS"]), matrices), L.device, given, constants)
    return image, scales, settled


def _vector_rows(k: int) -> dict:
    """Rows of L that one program multiplies with the vector."""
    wide = power_of_2(k)
    return {"BLOCK_K": wide, "ROWS": max(1, min(16, 8192 // wide))}


def spectral_launches(k: int, block: int) -> list[tuple[str, object, dict]]:
    """(label, kernel, compile-time constants and options) of every launch of `spectral_norm`."""
    side = programs(k, block)
    tiling = {"STEPS": STEPS, "TILES": power_of_2(side * side), **product(block)}
    square = [
        (f"square {what}", koopman_square_kernel, {"PLAIN": plain, "FIRST": first, **tiling})
        for what, plain, first in (("M", True, False), ("first", False, True), ("", False, False))
    ]
    return [
        ("scale", koopman_scale_kernel, {"BLOCK": 1024}),
        ("split", koopman_split_kernel, tiling),
        *square,
        ("vector", koopman_vector_kernel, {"STEPS": STEPS, **_vector_rows(k)}),
    ]
