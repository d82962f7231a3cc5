"""`koopman_losses` in Triton, fp32, for machines without nvcc: the steps of `csrc/koopman.cuh`.

One program makes one square tile of an output, 16, 32 or 64 wide (`tiles`), over the whole depth of
the product; what stands before and behind the product is fused into it. `input_precision="ieee"`
everywhere: FMAs, no TF32. Reductions across programs are left as partial sums that the next launch
adds in a fixed order.

forward   lift (LayerNorm and row norms), scale, predict, split, images, 24 squarings, vector, pair,
          total: 32 launches, 5 for "paper"
backward  points, states, prompts, three outer products, LayerNorm's: 6 launches, 7 with the gauge

Where csrc/koopman.cuh lays independent steps side by side in one launch, here they follow each
other, and a tile's depth is not shared by groups of warps, so a squaring at k = 256 lasts about
twice as long. Estimate for a captured graph on an H200 at 11 blocks x 50 prompts, D = 768, k = 256,
where latency decides: 12 active squarings 6 us each and 11 settled ones 1.5 us, the other launches
6 us: 180 us. Without a graph the host's launches are what counts, about 0.5 ms: capture the step
(`pae.graphed_step`) or build the CUDA version.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead_of_time import OPTIONS, Launch
from . import tiles
from .triton_spectral import (
    SCALE_PARTS,
    dot,
    load,
    load_flipped,
    product,
    read_scale,
    spectral_launches,
    spectral_norm,
    store,
    tile,
)  # fmt: skip

EPS, CEILING = tl.constexpr(1e-8), tl.constexpr(10.0)
TINY = tl.constexpr(1.1754943508222875e-38)
# counts, whose divisibility says nothing about addresses: one kernel for all of them
_COUNTS = ("rows", "prompts", "pairs", "groups", "stack", "blocks", "chunks", "tiles_in_row")


@triton.jit
def _store_row_sums(base, o_row, rows, chunks, chunk, x):
    """Sum of squares of each row of a tile, as part `chunk` of that row."""
    tl.store(base + o_row * chunks + chunk, tl.sum(x * x, 1), mask=o_row < rows)


@triton.jit
def _offset(run, group, count, prompts):
    """First row of block (or pair) `group` of a run that has `count` of them."""
    return (run.to(tl.int64) * count + group) * prompts


@triton.jit
def _points(
    states, predicted, o_row, o_column, rows, k, prompts, CODE: tl.constexpr, FLIP: tl.constexpr
):
    """Arguments of V: of each pair its later state, then its earlier one; FLIP as (column, row).

    The later state is the prediction in "code", the actual one in "paper". `states` begins at the
    first pair's earlier state, `predicted` at its prediction.
    """
    within = o_row % (2 * prompts)
    later = within < prompts
    at = o_row // (2 * prompts) * prompts + tl.where(later, within, within - prompts)
    if not CODE:
        at += tl.where(later, prompts, 0)
    if FLIP:
        mask = (o_column < k)[:, None] & (o_row < rows)[None, :]
        offset = at[None, :] * k + o_column[:, None]
        later = later[None, :]
    else:
        mask = (o_row < rows)[:, None] & (o_column < k)[None, :]
        offset = at[:, None] * k + o_column[None, :]
        later = later[:, None]
    if CODE:
        x = tl.load(states + offset, mask=mask & (later == 0), other=0.0)
        return x + tl.load(predicted + offset, mask=mask & later, other=0.0)
    return tl.load(states + offset, mask=mask, other=0.0)


# ---- forward


@triton.jit(do_not_specialize=_COUNTS)
def koopman_lift_kernel(
    prompt_rows, lift, states, statistics, squares, rows, k, width, chunks, eps,
    GAUGE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of states = g(prompts) lift^T; grid (tiles, R)."""
    run = tl.program_id(1).to(tl.int64)
    o_m, o_n = tile(tl.program_id(0), tl.cdiv(k, BLOCK), BLOCK)
    prompt_rows += run * rows * width
    lift += run * k * width
    mean = tl.zeros([BLOCK], tl.float32)
    rstd = tl.full([BLOCK], 1.0, tl.float32)
    if GAUGE:
        for start in range(0, width, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            mean += tl.sum(load(prompt_rows, o_m, o_d, rows, width, width), 1)
        mean = mean / width
        variance = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            x = load(prompt_rows, o_m, o_d, rows, width, width) - mean[:, None]
            x = tl.where((o_d < width)[None, :], x, 0.0)
            variance += tl.sum(x * x, 1)
        rstd = 1.0 / tl.sqrt(variance / width + eps)
        if tl.program_id(0) % tl.cdiv(k, BLOCK) == 0:
            at = statistics + 2 * (run * rows + o_m)
            tl.store(at, mean, mask=o_m < rows)
            tl.store(at + 1, rstd, mask=o_m < rows)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        x = load(prompt_rows, o_m, o_d, rows, width, width)
        if GAUGE:
            x = (x - mean[:, None]) * rstd[:, None]  # lift is 0 where o_d is outside
        acc = dot(x, load_flipped(lift, o_d, o_n, width, k, width), acc)
    acc = tl.where((o_m < rows)[:, None], acc, 0.0)
    store(states + run * rows * k, o_m, o_n, rows, k, k, acc)
    chunk = tl.program_id(0) % tl.cdiv(k, BLOCK)
    _store_row_sums(squares + run * rows * chunks, o_m, rows, chunks, chunk, acc)


@triton.jit(do_not_specialize=_COUNTS)
def koopman_predict_kernel(
    states, K, predicted, squares, errors, rows, k, prompts, pairs, blocks, groups, stack, chunks,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of predicted = now K, and the sum of its squared errors; grid (tiles, R G)."""
    run, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    o_m, o_n = tile(tl.program_id(0), tl.cdiv(k, BLOCK), BLOCK)
    states += _offset(run, group, blocks, prompts) * k
    first = _offset(run, group, pairs, prompts)
    K += (run.to(tl.int64) * stack + group) * k * k
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, k, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        acc = dot(load(states, o_m, o_d, rows, k, k), load(K, o_d, o_n, k, k, k), acc)
    store(predicted + first * k, o_m, o_n, rows, k, k, acc)
    chunk = tl.program_id(0) % tl.cdiv(k, BLOCK)
    _store_row_sums(squares + first * chunks, o_m, rows, chunks, chunk, acc)
    error = acc - load(states + prompts * k, o_m, o_n, rows, k, k)
    at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(errors + at, tl.sum(tl.sum(error * error, 1), 0))


@triton.jit(do_not_specialize=_COUNTS)
def koopman_image_kernel(
    states, predicted, L, scales, images, squares,
    rows, k, prompts, pairs, blocks, groups, stack, chunks,
    CODE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of images = points L^T / unit; grid (tiles, R G)."""
    run, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    o_m, o_n = tile(tl.program_id(0), tl.cdiv(k, BLOCK), BLOCK)
    states += _offset(run, group, blocks, prompts) * k
    first = _offset(run, group, pairs, prompts)
    L += (run.to(tl.int64) * stack + group) * k * k
    inverse = 1.0
    if CODE:
        unit, _, _ = read_scale(scales + tl.program_id(1) * 3 * SCALE_PARTS, k)
        inverse = 1.0 / unit
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, k, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        x = _points(states, predicted + first * k, o_m, o_d, rows, k, prompts, CODE, False)
        acc = dot(x, load_flipped(L, o_d, o_n, k, k, k) * inverse, acc)
    store(images + 2 * first * k, o_m, o_n, rows, k, k, acc)
    chunk = tl.program_id(0) % tl.cdiv(k, BLOCK)
    _store_row_sums(squares + 2 * first * chunks, o_m, rows, chunks, chunk, acc)


# ---- the scalars


@triton.jit
def _row_sum(base, o_row, mask, chunks):
    total = tl.zeros(o_row.shape, tl.float32)
    for c in range(chunks):
        total += tl.load(base + o_row * chunks + c, mask=mask, other=0.0)
    return total


@triton.jit
def _value(squares, norms, weight):
    """V and length of rows, from their sums of squares: of the image, and of the row."""
    norm = tl.sqrt(norms)
    length = tl.maximum(norm + EPS, 1.0)
    return squares * weight / (length * length), norm, length


@triton.jit
def _tanh(x):
    """tanh of x >= 0. V in [0, 1] keeps x below 0.14, where a quotient of exponentials cancels."""
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    e = tl.exp(-2 * x)
    return tl.where(x < 0.25, series, (1 - e) / (1 + e))


@triton.jit
def _store_row_factors(pull, radial, o_row, mask, slope, over, value, norm, length):
    tl.store(pull + o_row, 2 * slope * over / (length * length), mask=mask)
    safe = tl.where(norm > 0.0, norm, 1.0)
    along = tl.where(norm + EPS > 1.0, 2 * slope * value / (safe * length), 0.0)
    tl.store(radial + o_row, along, mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def koopman_pair_kernel(
    state_squares, predicted_squares, image_squares, scales, image,
    pull, radial, spin, left, parts,
    k, prompts, pairs, blocks, groups, chunks,
    CODE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """lyapunov and spin of one pair, and the factors of its rows; grid (m, R)."""
    j, run = tl.program_id(0), tl.program_id(1)
    group = tl.where(groups == 1, 0, j)
    matrix = run * groups + group
    o_t = tl.arange(0, BLOCK_P)
    mask = o_t < prompts
    first = _offset(run, j, pairs, prompts)
    image_squares += 2 * first * chunks
    later = _row_sum(image_squares, o_t, mask, chunks)
    now = _row_sum(image_squares + prompts * chunks, o_t, mask, chunks)
    pull += 2 * first
    radial += 2 * first
    at = parts + 2 * (run * pairs + j)
    if CODE:
        o_k = tl.arange(0, BLOCK_K)
        unit, _, _ = read_scale(scales + matrix * 3 * SCALE_PARTS, k)
        x = tl.load(image + matrix * k + o_k, mask=o_k < k, other=0.0)
        stretch = tl.sqrt(tl.sum(x * x, 0))
        # no sigma^2 and no division by sigma = 0: right wherever L z itself is finite
        sigma = tl.where(unit == unit, tl.maximum(stretch * unit, TINY), unit)
        gain = 1.0 / (sigma + EPS / sigma)
        over = gain / (sigma / unit)
        if j == group:
            tl.store(left + matrix * k + o_k, x / tl.maximum(stretch, TINY), mask=o_k < k)

        norms = _row_sum(predicted_squares + first * chunks, o_t, mask, chunks)
        later, later_norm, later_length = _value(later, norms, over * unit)
        states = _offset(run, j, blocks, prompts)
        norms = _row_sum(state_squares + states * chunks, o_t, mask, chunks)
        now, now_norm, now_length = _value(now, norms, over * unit)
        rise = later - now
        soft = tl.maximum(rise, 0.0) + tl.log(1 + tl.exp(-tl.abs(rise)))
        s = tl.sum(tl.where(mask, soft, 0.0), 0) / prompts / CEILING
        saturated = _tanh(s)
        slope = (1 - saturated * saturated) / prompts * tl.sigmoid(rise)
        flow = tl.sum(tl.where(mask, slope * rise, 0.0), 0)
        tl.store(at, saturated * CEILING)
        tl.store(at + 1, -2 * flow * gain)
        if groups > 1:
            tl.store(spin + matrix, -2 * flow * gain)
        _store_row_factors(pull, radial, o_t, mask, slope, over, later, later_norm, later_length)
        _store_row_factors(
            pull, radial, o_t + prompts, mask, -slope, over, now, now_norm, now_length
        )
    else:
        rise = tl.sum(tl.where(mask, later, 0.0), 0) - tl.sum(tl.where(mask, now, 0.0), 0)
        tl.store(at, tl.where(rise <= 0.0, 0.0, rise))  # NaN stays
        slope = tl.where(rise > 0.0, 2.0, 0.0)
        tl.store(pull + o_t, tl.where(mask, slope, 0.0), mask=mask)
        tl.store(pull + prompts + o_t, tl.where(mask, -slope, 0.0), mask=mask)
        tl.store(radial + o_t, tl.zeros([BLOCK_P], tl.float32), mask=mask)
        tl.store(radial + prompts + o_t, tl.zeros([BLOCK_P], tl.float32), mask=mask)


@triton.jit(do_not_specialize=("pairs", "groups", "count"))
def koopman_total_kernel(
    parts, errors, consistency, lyapunov, spin, pairs, groups, count, share,
    CODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the pairs of a run; grid (R,)."""
    run = tl.program_id(0)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        o = start + tl.arange(0, BLOCK)
        squares += tl.load(errors + run * count + o, mask=o < count, other=0.0)
    losses = tl.zeros([BLOCK], tl.float32)
    spins = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pairs, BLOCK):
        o = start + tl.arange(0, BLOCK)
        at = parts + 2 * (run * pairs + o)
        losses += tl.load(at, mask=o < pairs, other=0.0)
        if CODE:
            spins += tl.load(at + 1, mask=o < pairs, other=0.0)
    tl.store(consistency + run, share * tl.sum(squares, 0))
    tl.store(lyapunov + run, tl.sum(losses, 0))
    if CODE:  # noqa: SIM102 - of compile time, unlike the next one
        if groups == 1:
            tl.store(spin + run, tl.sum(spins, 0))


# ---- backward


@triton.jit(do_not_specialize=_COUNTS)
def koopman_bwd_points_kernel(
    d_consistency, d_lyapunov, states, predicted, images, pull, radial, L, d_points,
    rows, k, prompts, pairs, blocks, groups, stack, share,
    CODE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of d points = pull (images L) - radial points; grid (tiles, R G).

    Of the later half, in "code", d predicted, its error's part included.
    """
    run, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    o_m, o_n = tile(tl.program_id(0), tl.cdiv(k, BLOCK), BLOCK)
    states += _offset(run, group, blocks, prompts) * k
    first = _offset(run, group, pairs, prompts)
    predicted += first * k
    images += 2 * first * k
    L += (run.to(tl.int64) * stack + group) * k * k
    weight = tl.load(d_lyapunov + run)
    factor = weight * tl.load(pull + 2 * first + o_m, mask=o_m < rows, other=0.0)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, k, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        x = load(images, o_m, o_d, rows, k, k) * factor[:, None]
        acc = dot(x, load(L, o_d, o_n, k, k, k), acc)
    along = weight * tl.load(radial + 2 * first + o_m, mask=o_m < rows, other=0.0)
    acc -= along[:, None] * _points(states, predicted, o_m, o_n, rows, k, prompts, CODE, False)
    if CODE:
        within = o_m % (2 * prompts)
        at = o_m // (2 * prompts) * prompts + within
        mask = ((within < prompts) & (o_m < rows))[:, None] & (o_n < k)[None, :]
        offset = at[:, None] * k + o_n[None, :]
        error = tl.load(predicted + offset, mask=mask, other=0.0)
        error -= tl.load(states + prompts * k + offset, mask=mask, other=0.0)
        acc += 2 * share * tl.load(d_consistency + run) * error
    store(d_points + 2 * first * k, o_m, o_n, rows, k, k, acc)


@triton.jit
def _d_predicted(
    d_points, states, predicted, weight, o_row, o_column, rows, k, prompts, CODE: tl.constexpr
):
    """Rows of d predicted, (o_row, o_column); pointers at the first pair of the operator."""
    mask = (o_row < rows)[:, None] & (o_column < k)[None, :]
    if CODE:
        at = o_row + o_row // prompts * prompts
        return tl.load(d_points + at[:, None] * k + o_column[None, :], mask=mask, other=0.0)
    offset = o_row[:, None] * k + o_column[None, :]
    error = tl.load(predicted + offset, mask=mask, other=0.0)
    return weight * (error - tl.load(states + prompts * k + offset, mask=mask, other=0.0))


@triton.jit(do_not_specialize=_COUNTS)
def koopman_bwd_states_kernel(
    d_consistency, states, predicted, d_points, K, d_states,
    rows, k, prompts, pairs, blocks, stack, share,
    CODE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of d states = d predicted K^T + d now - d error; grid (tiles, R stack).

    `rows` are those of all blocks of a run for a global operator, of one block for a layerwise one.
    """
    run, group = tl.program_id(1) // stack, tl.program_id(1) % stack
    o_m, o_n = tile(tl.program_id(0), tl.cdiv(k, BLOCK), BLOCK)
    first_state = _offset(run, group, blocks, prompts)
    first = _offset(run, group, pairs, prompts)
    K += (run.to(tl.int64) * stack + group) * k * k
    weight = 2 * share * tl.load(d_consistency + run)
    with_pair = tl.minimum(rows, (pairs - group) * prompts)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if with_pair > 0:
        for start in range(0, k, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            x = _d_predicted(
                d_points + 2 * first * k, states + first_state * k, predicted + first * k,
                weight, o_m, o_d, with_pair, k, prompts, CODE,
            )  # fmt: skip
            acc = dot(x, load_flipped(K, o_d, o_n, k, k, k), acc)
    inside = (o_m < rows)[:, None] & (o_n < k)[None, :]
    block = group + o_m // prompts
    # row of (run, pair) and within it, counted from the first pair of the run
    pair_row = _offset(run, 0, pairs, prompts) + block.to(tl.int64) * prompts + o_m % prompts
    point_row = pair_row + (run.to(tl.int64) * pairs + block) * prompts
    has_now = inside & (block < pairs)[:, None]
    offset = (point_row + prompts)[:, None] * k + o_n[None, :]
    acc += tl.load(d_points + offset, mask=has_now, other=0.0)
    has_error = inside & (block > 0)[:, None]
    error = tl.load(predicted + (pair_row - prompts)[:, None] * k + o_n, mask=has_error, other=0.0)
    state = (first_state + o_m)[:, None] * k + o_n[None, :]
    error -= tl.load(states + state, mask=has_error, other=0.0)
    acc -= weight * error
    if not CODE:
        offset = (point_row - 2 * prompts)[:, None] * k + o_n[None, :]
        acc += tl.load(d_points + offset, mask=has_error, other=0.0)
    tl.store(d_states + state, acc, mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def koopman_bwd_prompts_kernel(
    d_states, lift, d_prompts, rows, k, width, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A tile of d states lift, before LayerNorm's backward; grid (tiles, R)."""
    run = tl.program_id(1).to(tl.int64)
    o_m, o_n = tile(tl.program_id(0), tl.cdiv(width, BLOCK), BLOCK)
    d_states += run * rows * k
    lift += run * k * width
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, k, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        x = load(d_states, o_m, o_d, rows, k, k)
        acc = dot(x, load(lift, o_d, o_n, k, width, width), acc)
    store(d_prompts + run * rows * width, o_m, o_n, rows, width, width, acc)


@triton.jit(do_not_specialize=_COUNTS)
def koopman_bwd_lift_kernel(
    d_states, prompt_rows, statistics, d_lift, rows, k, width,
    GAUGE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of d lift = d states^T g(prompts); grid (tiles, R)."""
    run = tl.program_id(1).to(tl.int64)
    o_m, o_n = tile(tl.program_id(0), tl.cdiv(width, BLOCK), BLOCK)
    d_states += run * rows * k
    prompt_rows += run * rows * width
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, rows, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        x = load(prompt_rows, o_d, o_n, rows, width, width)
        if GAUGE:
            at = statistics + 2 * (run * rows + o_d)
            mean = tl.load(at, mask=o_d < rows, other=0.0)
            rstd = tl.load(at + 1, mask=o_d < rows, other=0.0)
            x = (x - mean[:, None]) * rstd[:, None]
        acc = dot(load_flipped(d_states, o_m, o_d, k, rows, k), x, acc)
    store(d_lift + run * k * width, o_m, o_n, k, width, width, acc)


@triton.jit(do_not_specialize=_COUNTS)
def koopman_bwd_operators_kernel(
    d_consistency, d_lyapunov, states, predicted, images, pull, spin, left, right, d_points,
    d_K, d_L, rows, k, prompts, pairs, blocks, groups, stack, share,
    OF_L: tl.constexpr, CODE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of d K = now^T d predicted, or of d L = (pull images)^T points + spin left right^T;
    grid (tiles, R stack).

    `rows` are those that meet one operator; the layerwise one that belongs to no pair gets zeros.
    """
    run, group = tl.program_id(1) // stack, tl.program_id(1) % stack
    o_m, o_n = tile(tl.program_id(0), tl.cdiv(k, BLOCK), BLOCK)
    states += _offset(run, group, blocks, prompts) * k
    first = _offset(run, group, pairs, prompts)
    used = group < groups
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if used:
        if OF_L:
            weight = tl.load(d_lyapunov + run)
            for start in range(0, rows, BLOCK_D):
                o_d = start + tl.arange(0, BLOCK_D)
                a = load_flipped(images + 2 * first * k, o_m, o_d, k, rows, k)
                factor = tl.load(pull + 2 * first + o_d, mask=o_d < rows, other=0.0)
                a *= weight * factor[None, :]
                b = _points(states, predicted + first * k, o_d, o_n, rows, k, prompts, CODE, False)
                acc = dot(a, b, acc)
            if CODE:
                matrix = run * groups + group
                x = tl.load(left + matrix * k + o_m, mask=o_m < k, other=0.0)
                y = tl.load(right + matrix * k + o_n, mask=o_n < k, other=0.0)
                acc += weight * tl.load(spin + matrix) * (x[:, None] * y[None, :])
        else:
            weight = 2 * share * tl.load(d_consistency + run)
            for start in range(0, rows, BLOCK_D):
                o_d = start + tl.arange(0, BLOCK_D)
                a = load_flipped(states, o_m, o_d, k, rows, k)
                b = _d_predicted(
                    d_points + 2 * first * k, states, predicted + first * k,
                    weight, o_d, o_n, rows, k, prompts, CODE,
                )  # fmt: skip
                acc = dot(a, b, acc)
    out = d_L if OF_L else d_K
    store(out + tl.program_id(1).to(tl.int64) * k * k, o_m, o_n, k, k, k, acc)


@triton.jit(do_not_specialize=("rows",))
def koopman_bwd_gauge_kernel(
    prompt_rows, statistics, d_rows, d_prompts, rows, width,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """LayerNorm's backward of ROWS rows; grid (rows / ROWS,)."""
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_m < rows)[:, None] & (o_d < width)[None, :]
    at = o_m.to(tl.int64)[:, None] * width + o_d[None, :]
    mean = tl.load(statistics + 2 * o_m, mask=o_m < rows, other=0.0)
    rstd = tl.load(statistics + 2 * o_m + 1, mask=o_m < rows, other=0.0)
    x = (tl.load(prompt_rows + at, mask=mask, other=0.0) - mean[:, None]) * rstd[:, None]
    d = tl.load(d_rows + at, mask=mask, other=0.0)
    along = tl.sum(d * x, 1) / width  # d is 0 beyond the row
    d = (d - (tl.sum(d, 1) / width)[:, None] - x * along[:, None]) * rstd[:, None]
    tl.store(d_prompts + at, d, mask=mask)


# ---- launches


def _tiles(rows: int, columns: int, block: int) -> int:
    return triton.cdiv(rows, block) * triton.cdiv(columns, block)


def _gauge_rows(width: int) -> dict:
    """Rows of a program and its warps: 4096 padded entries."""
    wide = triton.next_power_of_2(width)
    return {"BLOCK_D": wide, "ROWS": max(1, 4096 // wide), "num_warps": 4 if wide <= 4096 else 8}


class _Sizes:
    """Sizes of a call, as the kernels name them."""

    def __init__(self, prompts: Tensor, lift: Tensor, K: Tensor, formulation: str) -> None:
        self.runs, self.blocks, self.prompts, self.width = prompts.shape
        self.k, self.pairs = lift.shape[1], max(self.blocks - 1, 0)
        self.layerwise, self.code = K.dim() == 4, formulation == "code"
        self.groups = self.pairs if self.layerwise else 1
        self.stack = self.blocks if self.layerwise else 1
        self.rows = self.blocks * self.prompts  # of a run
        self.now_rows = (1 if self.layerwise else self.pairs) * self.prompts  # of an operator
        self.matrices = self.runs * self.groups
        self.share = 1 / (self.prompts * self.k) if self.code else 1.0
        self.block = tiles.product(self.runs * self.rows, self.k)


def forward(
    prompts: Tensor, lift: Tensor, K: Tensor, L: Tensor, formulation: str, eps: float | None
) -> tuple[Tensor, ...]:
    """Same contract as the reference's."""
    prompts, lift, K, L = (t.contiguous() for t in (prompts, lift, K, L))
    n = _Sizes(prompts, lift, K, formulation)
    new = prompts.new_empty
    made = new if n.code and n.pairs else prompts.new_zeros  # without V's norm these are 0
    states = new(n.runs, n.blocks, n.prompts, n.k)
    predicted = new(n.runs, n.pairs, n.prompts, n.k)
    images = new(n.runs, n.pairs, 2 * n.prompts, n.k)
    pull, radial = new(images.shape[:3]), new(images.shape[:3])
    spin, left, right = (
        made(n.runs, n.groups, *tail) for tail in ((), (n.k,), (n.k,))
    )  # fmt: skip
    statistics = new(0) if eps is None else new(n.runs, n.blocks, n.prompts, 2)
    saved = states, predicted, images, pull, radial, spin, left, right, statistics
    if not n.pairs:
        states.zero_(), statistics.zero_()
        return prompts.new_zeros(n.runs), prompts.new_zeros(n.runs), *saved

    chunks = triton.cdiv(n.k, n.block)
    state_squares = new(*states.shape[:3], chunks)
    predicted_squares = new(*predicted.shape[:3], chunks)
    image_squares = new(*images.shape[:3], chunks)
    error_tiles = _tiles(n.now_rows, n.k, n.block)
    errors = new(n.matrices, error_tiles)
    parts = new(n.runs, n.pairs, 2)
    consistency, lyapunov = new(n.runs), new(n.runs)
    image = scales = statistics  # neither is looked at in "paper"
    tiling = product(n.block)
    with _on(prompts.device):
        koopman_lift_kernel[(_tiles(n.rows, n.k, n.block), n.runs)](
            prompts, lift, states, statistics, state_squares, n.rows, n.k, n.width, chunks,
            eps or 0.0, GAUGE=eps is not None, **tiling,
        )  # fmt: skip
        koopman_predict_kernel[(error_tiles, n.matrices)](
            states, K, predicted, predicted_squares, errors, n.now_rows, n.k, n.prompts, n.pairs,
            n.blocks, n.groups, n.stack, chunks, **tiling,
        )  # fmt: skip
        if n.code:
            image, scales = spectral_norm(L, right, n.groups, n.stack)
        koopman_image_kernel[(_tiles(2 * n.now_rows, n.k, n.block), n.matrices)](
            states, predicted, L, scales, images, image_squares, 2 * n.now_rows, n.k, n.prompts,
            n.pairs, n.blocks, n.groups, n.stack, chunks, CODE=n.code, **tiling,
        )  # fmt: skip
        koopman_pair_kernel[(n.pairs, n.runs)](
            state_squares, predicted_squares, image_squares, scales, image,
            pull, radial, spin, left, parts,
            n.k, n.prompts, n.pairs, n.blocks, n.groups, chunks,
            CODE=n.code, BLOCK_P=triton.next_power_of_2(n.prompts),
            BLOCK_K=triton.next_power_of_2(n.k), num_warps=4, **OPTIONS,
        )  # fmt: skip
        koopman_total_kernel[(n.runs,)](
            parts, errors, consistency, lyapunov, spin, n.pairs, n.groups,
            n.groups * error_tiles, n.share, CODE=n.code, BLOCK=128, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return consistency, lyapunov, *saved


def backward(
    d_consistency: Tensor,
    d_lyapunov: Tensor,
    prompts: Tensor,
    lift: Tensor,
    K: Tensor,
    L: Tensor,
    formulation: str,
    eps: float | None,
    states: Tensor,
    predicted: Tensor,
    images: Tensor,
    pull: Tensor,
    radial: Tensor,
    spin: Tensor,
    left: Tensor,
    right: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same contract as the reference's."""
    prompts, lift, K, L = inputs = [t.contiguous() for t in (prompts, lift, K, L)]
    n = _Sizes(prompts, lift, K, formulation)
    if not n.pairs:
        return tuple(torch.zeros_like(t) for t in inputs)
    d_prompts, d_lift, d_K, d_L = (torch.empty_like(t) for t in inputs)
    d_states, d_points = torch.empty_like(states), torch.empty_like(images)
    d_rows = d_prompts if eps is None else torch.empty_like(prompts)
    d_consistency, d_lyapunov = d_consistency.contiguous(), d_lyapunov.contiguous()
    tiling = product(n.block)
    with _on(prompts.device):
        koopman_bwd_points_kernel[(_tiles(2 * n.now_rows, n.k, n.block), n.matrices)](
            d_consistency, d_lyapunov, states, predicted, images, pull, radial, L, d_points,
            2 * n.now_rows, n.k, n.prompts, n.pairs, n.blocks, n.groups, n.stack, n.share,
            CODE=n.code, **tiling,
        )  # fmt: skip
        rows = n.prompts if n.layerwise else n.rows
        koopman_bwd_states_kernel[(_tiles(rows, n.k, n.block), n.runs * n.stack)](
            d_consistency, states, predicted, d_points, K, d_states,
            rows, n.k, n.prompts, n.pairs, n.blocks, n.stack, n.share, CODE=n.code, **tiling,
        )  # fmt: skip
        tiling = product(tiles.gradient(d_prompts.numel()))
        koopman_bwd_prompts_kernel[(_tiles(n.rows, n.width, tiling["BLOCK"]), n.runs)](
            d_states, lift, d_rows, n.rows, n.k, n.width, **tiling
        )
        tiling = product(tiles.gradient(d_lift.numel()))
        koopman_bwd_lift_kernel[(_tiles(n.k, n.width, tiling["BLOCK"]), n.runs)](
            d_states, prompts, statistics, d_lift, n.rows, n.k, n.width, GAUGE=eps is not None,
            **tiling,
        )  # fmt: skip
        tiling = product(tiles.gradient(d_K.numel()))
        grid = _tiles(n.k, n.k, tiling["BLOCK"]), n.runs * n.stack
        for of_L, rows in ((False, n.now_rows), (True, 2 * n.now_rows)):
            koopman_bwd_operators_kernel[grid](
                d_consistency, d_lyapunov, states, predicted, images, pull, spin, left, right,
                d_points, d_K, d_L, rows, n.k, n.prompts, n.pairs, n.blocks, n.groups, n.stack,
                n.share, OF_L=of_L, CODE=n.code, **tiling,
            )  # fmt: skip
        if eps is not None:
            count, rows = n.runs * n.rows, _gauge_rows(n.width)
            koopman_bwd_gauge_kernel[(triton.cdiv(count, rows["ROWS"]),)](
                prompts, statistics, d_rows, d_prompts, count, n.width, **rows, **OPTIONS
            )
    return d_prompts, d_lift, d_K, d_L


def _on(device: torch.device):
    """Launch on the tensor's device; Triton takes the caller's current stream there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ---- ahead of time

_INTEGERS = (*_COUNTS, "k", "width", "side", "count", "q")
_FLOATS = ("eps", "share", "below")


def _launch(label: str, kernel, aligned: tuple[str, ...], **options) -> Launch:
    """`kernel` with these compile-time constants, `num_warps` and `num_stages`."""
    constants = {name: v for name, v in options.items() if name in kernel.arg_names}
    types = {}
    for name in kernel.arg_names:
        kind = "i32" if name in _INTEGERS else "fp32" if name in _FLOATS else "*fp32"
        types[name] = "*i32" if name == "settled" else kind
    return Launch(
        f"{label} fp32",
        kernel,
        types,
        constants,
        options.get("num_warps", 4),
        options.get("num_stages", 3),
        tuple(name for name in aligned if name in kernel.arg_names),
    )


def _launches(k: int, width: int, count: int, block: int, square: int, code: bool, gauge: bool):
    """Every kernel of a forward and a backward of 11 blocks."""
    aligned = tuple(n for n, size in (("k", k), ("width", width)) if size % 16 == 0)
    tiled = {"CODE": code, "GAUGE": gauge, **product(block)}
    flat = {
        "CODE": code,
        "BLOCK_P": triton.next_power_of_2(count),
        "BLOCK_K": triton.next_power_of_2(k),
    }
    name = f"k{k} {'code' if code else 'paper'}"
    made = [
        _launch(f"koopman {what} {name} {block}", kernel, aligned, **tiled)
        for what, kernel in (
            ("lift", koopman_lift_kernel),
            ("predict", koopman_predict_kernel),
            ("image", koopman_image_kernel),
            ("bwd points", koopman_bwd_points_kernel),
            ("bwd states", koopman_bwd_states_kernel),
        )
    ]
    for what, kernel, outputs, options in (
        ("prompts", koopman_bwd_prompts_kernel, 11 * count * width, {}),
        ("lift", koopman_bwd_lift_kernel, k * width, {}),
        ("K", koopman_bwd_operators_kernel, k * k, {"OF_L": False}),
        ("L", koopman_bwd_operators_kernel, k * k, {"OF_L": True}),
    ):
        side = tiles.gradient(outputs)
        options |= tiled | product(side)
        made.append(_launch(f"koopman bwd {what} {name} {side}", kernel, aligned, **options))
    made += [
        _launch(f"koopman pair {name}", koopman_pair_kernel, aligned, **flat),
        _launch(f"koopman total {name}", koopman_total_kernel, aligned, CODE=code, BLOCK=128),
    ]
    if gauge:
        made.append(
            _launch(
                f"koopman bwd gauge {name}", koopman_bwd_gauge_kernel, aligned, **_gauge_rows(width)
            )
        )
    if code:
        made += [
            _launch(f"koopman {what} k{k} {square}", kernel, aligned, **options)
            for what, kernel, options in spectral_launches(k, square)
        ]
    return made


def shipped_launches(architecture: int) -> list[Launch]:
    """The paper's setting at 50 prompts in ViT-B, in the tiles that it gets."""
    return _launches(256, 768, 50, tiles.product(550, 256), tiles.square(256, 1), True, False)


def variant_launches(architecture: int) -> list[Launch]:
    """The released code's default width, the gauge, "paper", and sizes that align nothing."""
    wide = _launches(1024, 768, 50, tiles.product(550, 1024), tiles.square(1024, 1), True, True)
    odd = _launches(33, 50, 7, 16, 16, False, True)
    rare = ("lift", "gauge", "split", "square", "vector")
    return [
        *(launch for launch in wide if any(word in launch.label for word in rare)),
        *(launch for launch in odd if not any(word in launch.label for word in rare)),
    ]
