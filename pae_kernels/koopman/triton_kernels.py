"""The kernels that `triton.py` launches for `koopman_losses`; its head comment says how they follow
each other. The spectral norm's are in `triton_spectral.py`, whose tile helpers are used here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_spectral import SCALE_PARTS, dot, load, load_flipped, read_scale, store, tile

EPS, CEILING = tl.constexpr(1e-8), tl.constexpr(10.0)
TINY = tl.constexpr(1.1754943508222875e-38)
# counts, whose divisibility says nothing about addresses: one kernel for all of them
COUNTS = ("rows", "prompts", "pairs", "groups", "stack", "blocks", "chunks", "tiles_in_row")


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


@triton.jit(do_not_specialize=COUNTS)
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


@triton.jit(do_not_specialize=COUNTS)
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


@triton.jit(do_not_specialize=COUNTS)
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


@triton.jit(do_not_specialize=COUNTS)
def koopman_pair_kernel(
    state_squares, predicted_squares, image_squares, scales, image, settled,
    pull, radial, spin, left, parts,
    k, prompts, pairs, blocks, groups, chunks,
    STEPS: tl.constexpr, CODE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
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
            level = tl.load(settled + matrix * STEPS) > 0
            tl.store(spin + 2 * matrix + 1, tl.where(level, 1.0 / (sigma * k), 0.0))

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
            tl.store(spin + 2 * matrix, -2 * flow * gain)
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
            tl.store(spin + 2 * run, tl.sum(spins, 0))


# ---- backward


@triton.jit(do_not_specialize=COUNTS)
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


@triton.jit(do_not_specialize=COUNTS)
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


@triton.jit(do_not_specialize=COUNTS)
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


@triton.jit(do_not_specialize=COUNTS)
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


@triton.jit(do_not_specialize=COUNTS)
def koopman_bwd_operators_kernel(
    d_consistency, d_lyapunov, states, predicted, images, pull, spin, left, right, L, d_points,
    d_K, d_L, rows, k, prompts, pairs, blocks, groups, stack, share,
    OF_L: tl.constexpr, CODE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of d K = now^T d predicted, or of d L = (pull images)^T points + spin left right^T;
    grid (tiles, R stack).

    d L takes the two rows of a prompt by their differences, as the reference does: exactly 0 where
    the operators change nothing. No sum is written as a product and its opposite, because a fused
    multiply-add would round only one of them.

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
                # its partner: the row of the same pair and prompt, before or after it
                later = o_d % (2 * prompts) < prompts
                o_e = tl.where(later, o_d + prompts, o_d - prompts)
                factor = tl.load(pull + 2 * first + o_d, mask=o_d < rows, other=0.0)
                other = tl.load(pull + 2 * first + o_e, mask=o_e < rows, other=0.0)
                a = load_flipped(images + 2 * first * k, o_m, o_d, k, rows, k)
                c = load_flipped(images + 2 * first * k, o_m, o_e, k, rows, k)
                both = weight * (factor + other)
                a = tl.where(
                    later[None, :],
                    weight * factor[None, :] * a,
                    both[None, :] * c + weight * factor[None, :] * (a - c),
                )
                at = predicted + first * k
                b = _points(states, at, o_d, o_n, rows, k, prompts, CODE, False)
                c = _points(states, at, o_e, o_n, rows, k, prompts, CODE, False)
                b -= tl.where(later[:, None], c, 0.0)
                acc = dot(a, b, acc)
            if CODE:
                matrix = run * groups + group
                x = tl.load(left + matrix * k + o_m, mask=o_m < k, other=0.0)
                y = tl.load(right + matrix * k + o_n, mask=o_n < k, other=0.0)
                level = tl.load(spin + 2 * matrix + 1)
                twist = x[:, None] * y[None, :]
                if level > 0.0:
                    at = L + tl.program_id(1).to(tl.int64) * k * k
                    twist = level * load(at, o_m, o_n, k, k, k)
                acc += weight * tl.load(spin + 2 * matrix) * twist
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
