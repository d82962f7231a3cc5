"""Patch tokens and pooled prompts of frequency windows in Triton.

`shortcut_tokens` is three kernels, after the formula in `reference.py`; w bins a side, K = C ph:

strips   one program: BLOCK_H image rows of one colour plane at 16 column bins. Inverse transform of
         the window along the rows; complex, (S, w, 2, B nh, K) in the dtype of the factors.
taps     one program: BLOCK_D channels at one row of a patch and 16 column bins. Transform of the
         embedding's taps along the columns, a wave's every value formed once; complex,
         (S, w, 2, K, D).
tokens   one program: BLOCK_M rows of patches, BLOCK_D channels, up to 16 patches of each row. For
         every column bin strips @ taps on the tensor cores, then each entry of the product is
         added, turned by its phase, to the sums of all patches of its row, which stay in registers
         to the end. A wave of even column frequency is the same half an image on, one of odd
         frequency changes its sign: two sums for the halves' first 8 patches serve 16.

Products: bf16 results take theirs from bf16 factors (rounded once: window and taps, as the textbook
rounds images and weights) with fp32 sums. fp32 and fp16 results take them from three TF32 products
of split fp32 factors, exact to about 2^-21: TF32 alone loses near-ties of a ranking, fp16 factors
the range of faint windows.

ViT-B/16 at 224 px, w = 16, B = 128, one window. Bytes that must move: 38.5 MB (bf16) or 77 MB
(fp32) of tokens, 0.8 MB of spectrum, 2.4 MB of weights. Beside them 8 MB (16 MB) of
strips and taps are written and read, in L2. Work: 8.5 GFLOP of products (three times that in TF32),
0.7 GFLOP of turned sums outside the tensor cores; 200 MB (fp32, in tiles half as large: 660 MB) of
operands come from L2, since 16 sums of every entry fill the registers at 2048 entries. So L2 and
tensor cores bind, not memory: the floor by bytes is an estimated fifth of the time in bf16 and an
eighth in fp32. Filter and convolution multiply 31 GFLOP and move the images three times.

`shortcut_pool` is two: partial sums of 64 tokens a program, which reads each token once, and
their sum in a fixed order. Bytes: the tokens, and 12 / 64 of one token's fp32 row each for
partials written and read. Energies leave the range of fp32, so sums are kept relative to the
largest exponent seen, a power of two: exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead_of_time import OPTIONS, Launch
from ..launching import Launcher, power_of_2, programs

_SIZES = ("images", "lines", "window", "tokens_per_image", "rows_in_all", "parts")


@triton.jit
def _wave(turns, size):
    """cos and sin of 2 pi turns / size, 0 <= turns < size, to the last bit or two.

    The angle is reduced in integers, to at most pi / 4, where short series are exact.
    """
    quarter = (4 * turns + size // 2) // size  # nearest quarter of a turn, 0 to 4
    x = (4 * turns - quarter * size).to(tl.float32) / size * 1.5707963267948966
    y = x * x
    s = x + x * y * (-1.6666667e-1 + y * (8.3333333e-3 + y * (-1.9841270e-4 + y * 2.7557319e-6)))
    c = 4.1666668e-2 + y * (-1.3888889e-3 + y * (2.4801587e-5 + y * -2.7557319e-7))
    c = 1 - (0.5 * y - y * y * c)
    odd = quarter % 2 == 1  # (c, s) a quarter of a turn on: (-s, c)
    cos, sin = tl.where(odd, -s, c), tl.where(odd, c, s)
    half = quarter % 4 >= 2
    return tl.where(half, -cos, cos), tl.where(half, -sin, sin)


@triton.jit
def _bins(first, offsets, size):
    """Unshifted bins of the centred ones from `first` on; offsets up to one turn too far."""
    return (first + offsets + (size - size // 2)) % size


@triton.jit(do_not_specialize=_SIZES)
def shortcut_strips_kernel(
    spectrum, origins, strips,
    images, window,
    stride_b, stride_c, stride_u, stride_v,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """sum_u X[b, c, u, v] exp(2 pi i u h / H) / HW; grid (S B C tiles of h, tiles of v)."""
    TILES: tl.constexpr = (HEIGHT + BLOCK_H - 1) // BLOCK_H
    i_h = tl.program_id(0) % TILES
    i_c = tl.program_id(0) // TILES % CHANNELS
    i_b = tl.program_id(0) // (TILES * CHANNELS) % images
    i_s = tl.program_id(0) // (TILES * CHANNELS * images)
    o_h = i_h * BLOCK_H + tl.arange(0, BLOCK_H)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_u = tl.arange(0, BLOCK_V)
    first_u = tl.load(origins + 2 * i_s).to(tl.int32)
    first_v = tl.load(origins + 2 * i_s + 1).to(tl.int32)
    v = _bins(first_v, o_v, WIDTH)
    p_plane = spectrum + i_b.to(tl.int64) * stride_b + i_c.to(tl.int64) * stride_c
    re = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    im = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    for start in range(0, window, BLOCK_V):
        u = _bins(first_u, start + o_u, HEIGHT)
        mask = (start + o_u < window)[:, None] & (o_v < window)[None, :]
        at = u.to(tl.int64)[:, None] * stride_u + v.to(tl.int64)[None, :] * stride_v
        x_re = tl.load(p_plane + at, mask=mask, other=0.0)
        x_im = tl.load(p_plane + at + 1, mask=mask, other=0.0)
        cos, sin = _wave(o_h[:, None] % HEIGHT * u[None, :] % HEIGHT, HEIGHT)
        re = tl.dot(cos, x_re, re, input_precision=PRECISION)
        re = tl.dot(-sin, x_im, re, input_precision=PRECISION)
        im = tl.dot(cos, x_im, im, input_precision=PRECISION)
        im = tl.dot(sin, x_re, im, input_precision=PRECISION)
    GRID: tl.constexpr = HEIGHT // PATCH
    lines = images * GRID
    at = (i_b * GRID + o_h // PATCH) * (CHANNELS * PATCH) + i_c * PATCH + o_h % PATCH
    plane = lines.to(tl.int64) * (CHANNELS * PATCH)
    at = (i_s * window + o_v).to(tl.int64)[None, :] * 2 * plane + at[:, None]
    mask = (o_h < HEIGHT)[:, None] & (o_v < window)[None, :]
    tl.store(strips + at, (re / (HEIGHT * WIDTH)).to(strips.dtype.element_ty), mask=mask)
    tl.store(strips + at + plane, (im / (HEIGHT * WIDTH)).to(strips.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def shortcut_taps_kernel(
    weight, origins, taps,
    window,
    WIDTH: tl.constexpr, INNER: tl.constexpr, PATCH: tl.constexpr, DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sum_q weight[q, k, d] exp(2 pi i v q / W); grid (S K tiles of d, tiles of v)."""
    TILES: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    i_d = tl.program_id(0) % TILES
    i_k = tl.program_id(0) // TILES % INNER
    i_s = tl.program_id(0) // (TILES * INNER)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    v = _bins(tl.load(origins + 2 * i_s + 1).to(tl.int32), o_v, WIDTH)
    re = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    im = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for start in range(0, PATCH, BLOCK_Q):
        o_q = start + tl.arange(0, BLOCK_Q)
        mask = (o_q < PATCH)[:, None] & (o_d < DIM)[None, :]
        at = (o_q * INNER + i_k)[:, None] * DIM + o_d[None, :]
        tap = tl.load(weight + at, mask=mask, other=0.0)
        cos, sin = _wave(v[:, None] * o_q[None, :] % WIDTH, WIDTH)
        re = tl.dot(cos, tap, re, input_precision="ieee")
        im = tl.dot(sin, tap, im, input_precision="ieee")
    at = (i_s * window + o_v).to(tl.int64)[:, None] * (2 * INNER * DIM) + i_k * DIM + o_d[None, :]
    mask = (o_v < window)[:, None] & (o_d < DIM)[None, :]
    tl.store(taps + at, re.to(taps.dtype.element_ty), mask=mask)
    tl.store(taps + at + INNER * DIM, im.to(taps.dtype.element_ty), mask=mask)


@triton.jit
def _product(
    strips, taps, k, window, plane, o_m, o_d, m_m,
    INNER: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Real and imaginary part of strips @ taps at the k-th column bin, 0 behind the last one."""
    re = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    minus = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    im = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    p_a = strips + tl.cast(k, tl.int64) * 2 * plane + o_m[:, None] * INNER
    p_b = taps + tl.cast(k, tl.int64) * (2 * INNER * DIM) + o_d[None, :]
    inner = tl.where(k < window, INNER, 0)
    for start in tl.static_range(0, INNER, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < inner
        m_a = m_m[:, None] & m_k[None, :]
        m_b = m_k[:, None] & (o_d < DIM)[None, :]
        a_re = tl.load(p_a + o_k[None, :], mask=m_a, other=0.0)
        a_im = tl.load(p_a + plane + o_k[None, :], mask=m_a, other=0.0)
        b_re = tl.load(p_b + o_k[:, None] * DIM, mask=m_b, other=0.0)
        b_im = tl.load(p_b + INNER * DIM + o_k[:, None] * DIM, mask=m_b, other=0.0)
        re = tl.dot(a_re, b_re, re, input_precision=PRECISION)
        minus = tl.dot(a_im, b_im, minus, input_precision=PRECISION)
        im = tl.dot(a_re, b_im, im, input_precision=PRECISION)
        im = tl.dot(a_im, b_re, im, input_precision=PRECISION)
    return re - minus, im


@triton.jit
def _turned(sums, re, im, v, o_j, GRID: tl.constexpr):
    """sums (J, M, D) + Re(exp(2 pi i v j / nw) (re + i im))."""
    cos, sin = _wave(v % GRID * o_j % GRID, GRID)
    sums += cos[:, None, None] * re[None, :, :]
    sums -= sin[:, None, None] * im[None, :, :]
    return sums


@triton.jit
def _store_tokens(
    out, shift, sums, line, o_m, o_j, o_d, m_m, m_j,
    LINES_PER_IMAGE: tl.constexpr, GRID: tl.constexpr, DIM: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """sums (J, M, D) to patches o_j of the lines from `line` on, those o_m of their window."""
    mask = m_j[:, None, None] & m_m[None, :, None] & (o_d < DIM)[None, None, :]
    within = (o_j * DIM)[:, None, None] + o_d[None, None, :]
    if SHIFT == "of channels":
        sums += tl.load(shift + o_d, mask=o_d < DIM, other=0.0)[None, None, :]
    elif SHIFT == "of tokens":
        at = (o_m % LINES_PER_IMAGE * (GRID * DIM))[None, :, None] + within
        sums += tl.load(shift + at, mask=mask, other=0.0)
    at = (tl.arange(0, BLOCK_M) * (GRID * DIM))[None, :, None] + within
    tl.store(out + line * (GRID * DIM) + at, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def shortcut_tokens_kernel(
    strips, taps, origins, shift, out,
    lines, window,
    LINES_PER_IMAGE: tl.constexpr, WIDTH: tl.constexpr, GRID: tl.constexpr, INNER: tl.constexpr,
    DIM: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tokens from strips and taps; grid (S tiles of lines, tiles of d and of patches)."""
    HALVED: tl.constexpr = GRID % 2 == 0  # an even number of patches: one sum serves two
    REACH: tl.constexpr = GRID // 2 if HALVED else GRID
    TILES: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    tiles_m = (lines + BLOCK_M - 1) // BLOCK_M
    i_s = tl.program_id(0) // tiles_m
    first_m = tl.program_id(0) % tiles_m * BLOCK_M
    line = i_s.to(tl.int64) * lines + first_m
    o_m = first_m + tl.arange(0, BLOCK_M)
    o_d = tl.program_id(1) % TILES * BLOCK_D + tl.arange(0, BLOCK_D)
    o_j = tl.program_id(1) // TILES * BLOCK_J + tl.arange(0, BLOCK_J)
    m_m, m_j = o_m < lines, o_j < REACH
    first = tl.load(origins + 2 * i_s + 1).to(tl.int32)
    plane = lines.to(tl.int64) * INNER
    p_strips = strips + i_s.to(tl.int64) * window * 2 * plane
    p_taps = taps + i_s.to(tl.int64) * window * (2 * INNER * DIM)
    even = tl.zeros([BLOCK_J, BLOCK_M, BLOCK_D], tl.float32)
    odd = tl.zeros([BLOCK_J, BLOCK_M, BLOCK_D], tl.float32)
    for k in range(0, window, 2):
        re, im = _product(
            p_strips, p_taps, k, window, plane, o_m, o_d, m_m,
            INNER, DIM, PRECISION, BLOCK_M, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        even = _turned(even, re, im, _bins(first, k, WIDTH), o_j, GRID)
        re, im = _product(
            p_strips, p_taps, k + 1, window, plane, o_m, o_d, m_m,
            INNER, DIM, PRECISION, BLOCK_M, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        if HALVED:
            odd = _turned(odd, re, im, _bins(first, k + 1, WIDTH), o_j, GRID)
        else:
            even = _turned(even, re, im, _bins(first, k + 1, WIDTH), o_j, GRID)
    if HALVED:
        sign = 1.0 - 2.0 * (_bins(first, 0, WIDTH) % 2).to(tl.float32)
        even, odd = even + odd, sign * (even - odd)  # in place: there are no registers for more
        _store_tokens(
            out, shift, even, line, o_m, o_j, o_d, m_m, m_j,
            LINES_PER_IMAGE, GRID, DIM, SHIFT, BLOCK_M,
        )  # fmt: skip
        _store_tokens(
            out, shift, odd, line, o_m, o_j + REACH, o_d, m_m, m_j,
            LINES_PER_IMAGE, GRID, DIM, SHIFT, BLOCK_M,
        )  # fmt: skip
    else:
        _store_tokens(
            out, shift, even, line, o_m, o_j, o_d, m_m, m_j,
            LINES_PER_IMAGE, GRID, DIM, SHIFT, BLOCK_M,
        )  # fmt: skip


@triton.jit
def _power_of_two(field):
    """The number with this biased exponent; 0 from 0 down."""
    return (tl.maximum(field, 0) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=_SIZES)
def shortcut_pool_kernel(
    tokens, rows, exponents, energies, sums,
    tokens_per_image, rows_in_all, parts,
    stride_s, stride_b, stride_n,
    HAS_ROWS: tl.constexpr, DIM: tl.constexpr, PER_PROGRAM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums of e and e t over PER_PROGRAM tokens of a window; grid (S parts)."""
    i_s = tl.program_id(0) // parts
    o_d = tl.arange(0, BLOCK_D)
    field = 1  # biased exponent that all sums are relative to
    energy = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, PER_PROGRAM, ROWS):
        o_r = tl.program_id(0) % parts * PER_PROGRAM + start + tl.arange(0, ROWS)
        image, token = o_r // tokens_per_image, o_r % tokens_per_image
        at = i_s.to(tl.int64) * stride_s + image.to(tl.int64) * stride_b
        at += token.to(tl.int64) * stride_n
        mask = (o_r < rows_in_all)[:, None] & (o_d < DIM)[None, :]
        t = tl.load(tokens + at[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_ROWS:
            shift = tl.load(rows + token[:, None] * DIM + o_d[None, :], mask=mask, other=0.0)
            t += shift.to(tl.float32)
        largest = tl.max(tl.max(tl.abs(t), 1), 0).to(tl.int32, bitcast=True) >> 23
        before = field
        field = tl.minimum(tl.maximum(largest, before), 253)
        shrunk = _power_of_two(127 + before - field)
        t *= _power_of_two(254 - field)
        e = tl.sum(t * t, 1)
        energy = energy * (shrunk * shrunk) + tl.sum(e, 0)
        acc = acc * (shrunk * shrunk * shrunk) + tl.sum(e[:, None] * t, 0)
    tl.store(exponents + tl.program_id(0), field)
    tl.store(energies + tl.program_id(0), energy)
    tl.store(sums + tl.program_id(0).to(tl.int64) * DIM + o_d, acc, mask=o_d < DIM)


@triton.jit(do_not_specialize=_SIZES)
def shortcut_pool_sum_kernel(
    exponents, energies, sums, out, parts,
    DIM: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of a window's parts, and the quotient; grid (S, tiles of d)."""
    i_s = tl.program_id(0)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = i_s * parts
    field = 1
    for start in range(0, parts, PARTS):
        o_p = start + tl.arange(0, PARTS)
        field = tl.maximum(field, tl.max(tl.load(exponents + first + o_p, o_p < parts, 1), 0))
    energy = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, parts, PARTS):
        o_p = start + tl.arange(0, PARTS)
        shrunk = _power_of_two(127 + tl.load(exponents + first + o_p, o_p < parts, 1) - field)
        energy += tl.sum(tl.load(energies + first + o_p, o_p < parts, 0.0) * shrunk * shrunk, 0)
        at = (first + o_p).to(tl.int64)[:, None] * DIM + o_d[None, :]
        mask = (o_p < parts)[:, None] & (o_d < DIM)[None, :]
        part = tl.load(sums + at, mask=mask, other=0.0)
        acc += tl.sum(part * (shrunk * shrunk * shrunk)[:, None], 0)
    pooled = acc / tl.where(energy == 0.0, 1.0, energy) * _power_of_two(field)
    tl.store(out + i_s * DIM + o_d, pooled.to(out.dtype.element_ty), mask=o_d < DIM)


_SHIFTS = ("none", "of channels", "of tokens")
_STRIPS = {"BLOCK_H": 64, "BLOCK_V": 16, "num_warps": 4}
_TAPS = {"BLOCK_V": 16, "BLOCK_Q": 16, "BLOCK_D": 128, "num_warps": 4}
_TOKENS = {"BLOCK_J": 8, "BLOCK_D": 64, "num_warps": 8}
_strips = Launcher(shortcut_strips_kernel)
_taps = Launcher(shortcut_taps_kernel)
_tokens = Launcher(shortcut_tokens_kernel)
_pool = Launcher(shortcut_pool_kernel)
_pool_sum = Launcher(shortcut_pool_sum_kernel)

_POOLED_TOGETHER = 64  # tokens of a program: a fixed number, so that a window's bits never change
_PARTS = {"PARTS": 32, "BLOCK_D": 128, "num_warps": 4}


def shortcut_tokens(
    spectrum: Tensor,
    origins: Tensor,
    window: int,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Same contract as the reference's, for complex64."""
    batch, channels, height, width = spectrum.shape
    dim, _, ph, pw = weight.shape
    count, lines, inner, grid = len(origins), batch * (height // ph), channels * ph, width // pw
    out = spectrum.new_empty((count, batch, height // ph * grid, dim), dtype=dtype)
    if out.numel() == 0:
        return out
    factor = dtype if dtype == torch.bfloat16 else torch.float32
    strips = out.new_empty(count, window, 2, lines, inner, dtype=factor)
    taps = out.new_empty(count, window, 2, inner, dim, dtype=factor)
    columns = torch.empty((pw, channels, ph, dim), dtype=torch.float32, device=spectrum.device)
    columns.copy_(weight.permute(3, 1, 2, 0))
    added = [t.to(torch.float32) for t in (bias, rows) if t is not None]
    shift = sum(added[1:], added[0]).contiguous() if added else None
    values = torch.view_as_real(spectrum.resolve_conj())
    origins = origins.contiguous()
    reach = grid // 2 if grid % 2 == 0 else grid
    tile = _tokens_launch(dtype == torch.bfloat16, inner)
    tiles = lambda size, launch, name: programs(size, launch[name])
    _strips(
        (count * batch * channels * tiles(height, _STRIPS, "BLOCK_H"),
         tiles(window, _STRIPS, "BLOCK_V")),
        spectrum.device,
        (values, origins, strips, batch, window, *values.stride()[:4]),
        {"CHANNELS": channels, "HEIGHT": height, "WIDTH": width, "PATCH": ph,
         "PRECISION": "tf32x3", **_STRIPS, **OPTIONS},
    )  # fmt: skip
    _taps(
        (count * inner * tiles(dim, _TAPS, "BLOCK_D"), tiles(window, _TAPS, "BLOCK_V")),
        spectrum.device,
        (columns, origins, taps, window),
        {"WIDTH": width, "INNER": inner, "PATCH": pw, "DIM": dim, **_TAPS, **OPTIONS},
    )
    _tokens(
        (count * tiles(lines, tile, "BLOCK_M"),
         tiles(dim, tile, "BLOCK_D") * tiles(reach, tile, "BLOCK_J")),
        spectrum.device,
        (strips, taps, origins, strips if shift is None else shift, out, lines, window),
        {"LINES_PER_IMAGE": height // ph, "WIDTH": width, "GRID": grid, "INNER": inner,
         "DIM": dim, "SHIFT": _SHIFTS[0 if shift is None else shift.dim()],
         "PRECISION": "tf32x3", **tile, **OPTIONS},
    )  # fmt: skip
    return out


def shortcut_pool(tokens: Tensor, rows: Tensor | None = None) -> Tensor:
    """Same contract as the reference's, up to fp32."""
    count, batch, per_image, dim = tokens.shape
    out = tokens.new_empty(count, dim)
    if out.numel() == 0:
        return out
    tokens = tokens if tokens.stride(3) == 1 else tokens.contiguous()
    parts = programs(batch * per_image, _POOLED_TOGETHER)
    exponents = tokens.new_empty(count, parts, dtype=torch.int32)
    energies = tokens.new_empty(count, parts, dtype=torch.float32)
    sums = tokens.new_empty(count, parts, dim, dtype=torch.float32)
    _pool(
        count * parts,
        tokens.device,
        (tokens, tokens if rows is None else rows.contiguous(), exponents, energies, sums,
         per_image, batch * per_image, parts, *tokens.stride()[:3]),
        {"HAS_ROWS": rows is not None, "DIM": dim, **_pool_launch(dim), **OPTIONS},
    )  # fmt: skip
    _pool_sum(
        (count, programs(dim, _PARTS["BLOCK_D"])),
        tokens.device,
        (exponents, energies, sums, out, parts),
        {"DIM": dim, **_PARTS, **OPTIONS},
    )
    return out


def _tokens_launch(narrow: bool, inner: int) -> dict:
    """Tile of the last kernel: split factors need twice the registers. The factors of two bins,
    whole, are what is copied ahead, where the smallest shared memory (99 KB) has room for them.
    """
    rows, size = (32, 2) if narrow else (16, 4)
    block_k = 16 if inner <= 64 else 32
    ahead = 4 * (rows + _TOKENS["BLOCK_D"]) * programs(inner, block_k) * block_k * size
    stages = 2 if ahead <= 80 * 1024 else 1
    return _TOKENS | {"BLOCK_M": rows, "BLOCK_K": block_k, "num_stages": stages}


def _pool_launch(dim: int) -> dict:
    """Tokens that a program holds at a time: 4096 padded entries, 32 a thread."""
    block = power_of_2(dim)
    rows = min(_POOLED_TOGETHER, max(1, 4096 // block))
    warps = {"num_warps": 4 if block <= 4096 else 8}
    return {"PER_PROGRAM": _POOLED_TOGETHER, "ROWS": rows, "BLOCK_D": block, **warps}


def _launches(
    kernels: tuple,
    dtype: str,
    *,
    channels: int = 3,
    size: int = 224,
    patch: int = 16,
    dim: int = 768,
    shift: str = "of tokens",
) -> list[Launch]:
    """`kernels` for results of `dtype` and a stem of these sizes."""
    types = dict.fromkeys(_SIZES, "i32") | {"origins": "*i64", "exponents": "*i32"}
    types |= {f"stride_{axis}": "i32" for axis in "bcuvsn"}
    types |= dict.fromkeys(("spectrum", "weight", "shift", "energies", "sums"), "*fp32")
    types |= dict.fromkeys(("strips", "taps"), "*bf16" if dtype == "bf16" else "*fp32")
    types |= dict.fromkeys(("out", "tokens", "rows"), f"*{dtype}")
    constants = {
        "CHANNELS": channels,
        "HEIGHT": size,
        "WIDTH": size,
        "PATCH": patch,
        "INNER": channels * patch,
        "DIM": dim,
        "GRID": size // patch,
        "LINES_PER_IMAGE": size // patch,
        "SHIFT": shift,
        "HAS_ROWS": shift == "of tokens",
        "PRECISION": "tf32x3",
    }
    tiles = {
        shortcut_strips_kernel: _STRIPS,
        shortcut_taps_kernel: _TAPS,
        shortcut_tokens_kernel: _tokens_launch(dtype == "bf16", channels * patch),
        shortcut_pool_kernel: _pool_launch(dim),
        shortcut_pool_sum_kernel: _PARTS,
    }

    def launch(kernel) -> Launch:
        known = constants | tiles[kernel]
        return Launch(
            label=f"{kernel.fn.__name__.removesuffix('_kernel')} {dtype} /{patch} D={dim}",
            kernel=kernel,
            types=types,
            constants={n: known[n] for n in kernel.arg_names if n in known},
            warps=tiles[kernel]["num_warps"],
            stages=tiles[kernel].get("num_stages", 3),
            aligned=("stride_s", "stride_n", "stride_b", "stride_c", "stride_u"),
            tensor_cores=kernel in (shortcut_strips_kernel, shortcut_tokens_kernel),
        )

    return [launch(kernel) for kernel in kernels]


_PRODUCTS = (shortcut_strips_kernel, shortcut_taps_kernel, shortcut_tokens_kernel)
_POOLING = (shortcut_pool_kernel, shortcut_pool_sum_kernel)


def shipped_launches(architecture: int) -> list[Launch]:
    """Every kernel at ViT-B/16 and 224 px, in bf16 and fp32."""
    return _launches((*_PRODUCTS, *_POOLING), "bf16") + _launches((*_PRODUCTS, *_POOLING), "fp32")


def variant_launches(architecture: int) -> list[Launch]:
    """Other patches and widths, an odd number of patches a row, other shifts, fp16 results."""
    return [
        *_launches((shortcut_tokens_kernel,), "bf16", patch=14, dim=384, shift="none"),
        *_launches((shortcut_tokens_kernel,), "fp32", patch=32),
        *_launches(
            (shortcut_tokens_kernel,), "fp16", size=120, patch=8, dim=384, shift="of channels"
        ),
        *_launches(_POOLING, "fp16", dim=5000, shift="none"),
    ]
