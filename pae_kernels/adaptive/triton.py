"""Prompts made of an image's rows, in Triton.

token_mix, forward. Row statistics first (one program: ROWS rows), then one program makes one tile
of BLOCK_P prompts and BLOCK_D channels of one image, over all rows in tiles of BLOCK_N: rows are
normalised in registers and meet W in a product. Grid B (P / BLOCK_P) (D / BLOCK_D), channels
fastest. Bytes: x twice, u once; W (40 KB) stays in L2.

token_mix, backward. One program owns BLOCK_N rows of one image and passes over the channels twice:
M = dU xhat^T first, which is this image's share of dW and, summed with W over the prompts, both
means of LayerNorm's backward; then dx = rstd (W^T dU - mean - xhat mean). Grid B (N / BLOCK_N).
Bytes: x twice (a tile of rows is re-read from L2), dU twice per tile of rows, dx and M once. M is
summed over images by PyTorch, in a fixed order.

prompt_bottleneck. Forward, one program: ROWS prompts of one image with all channels; the r hidden
units one after the other, so that any r fits. Backward, two kernels: the same tiles make the r
hidden gradients, which need all channels; then tiles of BLOCK_D channels walk through `images`
images, write du and keep the sums of all parameters in registers, one slot per program, added by
PyTorch. Bytes: u and the gradient twice, du once. fp32 throughout, no tensor cores: r is 8. Beyond
64 units the reference runs.

No atomics: bitwise the same from run to run.

Floor at ViT-B, B = 128, P = 50, bf16 (x 38.7 MB, u 9.8 MB), every array once: token_mix forward
48.5 MB, backward 92 MB; prompt_bottleneck 20 MB and 30 MB, over the bandwidth of a large copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead_of_time import OPTIONS, Launch
from ..launching import Launcher, power_of_2, programs
from . import reference

# one compiled kernel serves all sizes
_SIZES = ("tokens", "prompts", "hidden", "rows", "batch", "images")
_MOST_UNITS = 64  # wider bottlenecks are products worth a library's
_FORWARD_WARPS, _UNITS_WARPS = 4, 8  # of the kernels that hold whole rows of the bottleneck
_SLOTS = 16  # programs that share the images of one tile of parameter gradients


@triton.jit
def _tile(p, o_m, o_d, rows, WIDTH: tl.constexpr):
    """Rows o_m and channels o_d of a (rows, WIDTH) array in fp32, zeros outside."""
    mask = (o_m < rows)[:, None] & (o_d < WIDTH)[None, :]
    return tl.load(p + (o_m * WIDTH)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(p, o_m, o_d, rows, x, WIDTH: tl.constexpr):
    mask = (o_m < rows)[:, None] & (o_d < WIDTH)[None, :]
    tl.store(p + (o_m * WIDTH)[:, None] + o_d[None, :], x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _mixture(weight, o_p, o_n, prompts, tokens):
    """Tile of W, whose rows are padded with zeros to a multiple of 16."""
    stride = tl.cdiv(tokens, 16) * 16
    mask = (o_p < prompts)[:, None] & (o_n < stride)[None, :]
    return tl.load(weight + (o_p * stride)[:, None] + o_n[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def row_stats_kernel(
    x, mean, rstd, rows, eps,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    v = _tile(x, o_m, o_d, rows, WIDTH)
    centre = tl.sum(v, 1) / WIDTH
    v = tl.where((o_d < WIDTH)[None, :], v - centre[:, None], 0.0)
    tl.store(mean + o_m, centre, mask=o_m < rows)
    tl.store(rstd + o_m, tl.rsqrt(tl.sum(v * v, 1) / WIDTH + eps), mask=o_m < rows)


@triton.jit(do_not_specialize=_SIZES)
def token_mix_fwd_kernel(
    x, weight, mean, rstd, u, tokens, prompts,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_d = tl.program_id(0) % tl.cdiv(WIDTH, BLOCK_D)
    rest = tl.program_id(0) // tl.cdiv(WIDTH, BLOCK_D)
    i_p, i_b = rest % tl.cdiv(prompts, BLOCK_P), (rest // tl.cdiv(prompts, BLOCK_P)).to(tl.int64)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        w = _mixture(weight, o_p, o_n, prompts, tokens)
        m = tl.load(mean + i_b * tokens + o_n, mask=o_n < tokens, other=0.0)
        r = tl.load(rstd + i_b * tokens + o_n, mask=o_n < tokens, other=0.0)
        rows = _tile(x + i_b * tokens * WIDTH, o_n, o_d, tokens, WIDTH)
        xhat = ((rows - m[:, None]) * r[:, None]).to(w.dtype)
        acc = tl.dot(w, xhat, acc, input_precision="ieee")
    _store_tile(u + i_b * prompts * WIDTH, o_p, o_d, prompts, acc, WIDTH)


@triton.jit(do_not_specialize=_SIZES)
def token_mix_bwd_kernel(
    d_u, x, weight, mean, rstd, reads, d_x, tokens, prompts,
    NEED_X: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0) % tl.cdiv(tokens, BLOCK_N)
    i_b = (tl.program_id(0) // tl.cdiv(tokens, BLOCK_N)).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.load(mean + i_b * tokens + o_n, mask=o_n < tokens, other=0.0)
    r = tl.load(rstd + i_b * tokens + o_n, mask=o_n < tokens, other=0.0)
    p_x, p_d = x + i_b * tokens * WIDTH, d_u + i_b * prompts * WIDTH
    along = tl.zeros([BLOCK_N], tl.float32)  # D mean(dxhat xhat)
    across = tl.zeros([BLOCK_N], tl.float32)  # D mean(dxhat)
    for p in range(0, prompts, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        w = _mixture(weight, o_p, o_n, prompts, tokens)
        acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        sums = tl.zeros([BLOCK_P], tl.float32)
        for start in range(0, WIDTH, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            d = _tile(p_d, o_p, o_d, prompts, WIDTH)
            sums += tl.sum(d, 1)
            # channels beyond the last meet zeros in d
            xhat = ((_tile(p_x, o_n, o_d, tokens, WIDTH) - m[:, None]) * r[:, None]).to(w.dtype)
            acc = tl.dot(d.to(w.dtype), tl.trans(xhat), acc, input_precision="ieee")
        mask = (o_p < prompts)[:, None] & (o_n < tokens)[None, :]
        at = i_b * prompts * tokens + (o_p * tokens)[:, None] + o_n[None, :]
        tl.store(reads + at, acc, mask=mask)
        if NEED_X:
            wide = w.to(tl.float32)
            along += tl.sum(wide * acc, 0)
            across += tl.sum(wide * sums[:, None], 0)
    if NEED_X:
        along, across = along / WIDTH, across / WIDTH
        for start in range(0, WIDTH, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D)
            acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for p in range(0, prompts, BLOCK_P):
                o_p = p + tl.arange(0, BLOCK_P)
                w = _mixture(weight, o_p, o_n, prompts, tokens)
                d = _tile(p_d, o_p, o_d, prompts, WIDTH).to(w.dtype)
                acc = tl.dot(tl.trans(w), d, acc, input_precision="ieee")
            xhat = (_tile(p_x, o_n, o_d, tokens, WIDTH) - m[:, None]) * r[:, None]
            acc = (acc - across[:, None] - xhat * along[:, None]) * r[:, None]
            _store_tile(d_x + i_b * tokens * WIDTH, o_n, o_d, tokens, acc, WIDTH)


@triton.jit
def _affine(
    u, gain, shift, bias, channel_mask, i_b, o_p, o_d, prompts,
    HAS_CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """u, gain and channel mask of a tile, and g = (u gain + shift) mask + bias."""
    rows = _tile(u + i_b * prompts * WIDTH, o_p, o_d, prompts, WIDTH)
    a = tl.load(gain + o_d, mask=o_d < WIDTH, other=0.0).to(tl.float32)
    c = tl.full(a.shape, 1.0, tl.float32)
    if HAS_CHANNELS:
        c = tl.load(channel_mask + i_b * WIDTH + o_d, mask=o_d < WIDTH, other=0.0).to(tl.float32)
    b = tl.load(bias + o_p, mask=o_p < prompts, other=0.0).to(tl.float32)
    g = rows * a[None, :] + _tile(shift, o_p, o_d, prompts, WIDTH)
    # channels beyond the last stay 0, for sums over all of them
    g = tl.where((o_d < WIDTH)[None, :], g * c[None, :] + b[:, None], 0.0)
    return rows, a, c, g


@triton.jit
def _units(rows, weight, o_d, o_r, hidden, WIDTH: tl.constexpr):
    """rows (ROWS, D) times weight (r, D) transposed, one unit after the other."""
    h = tl.zeros([rows.shape[0], o_r.shape[0]], tl.float32)
    for j in range(hidden):
        w = tl.load(weight + j * WIDTH + o_d, mask=o_d < WIDTH, other=0.0).to(tl.float32)
        h += tl.where((o_r == j)[None, :], tl.sum(rows * w[None, :], 1)[:, None], 0.0)
    return h


@triton.jit
def _act(h, o_r, hidden, KIND: tl.constexpr):
    if KIND == "relu":
        return tl.maximum(h, 0.0)
    elif KIND == "gelu":
        return 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
    elif KIND == "sigmoid":
        return tl.sigmoid(h)
    else:
        h = tl.where((o_r < hidden)[None, :], h, float("-inf"))
        e = tl.exp(h - tl.max(h, 1)[:, None])
        return e / tl.sum(e, 1)[:, None]


@triton.jit
def _act_backward(d, h, z, KIND: tl.constexpr):
    """d act'(h), z = act(h)."""
    if KIND == "relu":
        return tl.where(h > 0, d, 0.0)
    elif KIND == "gelu":
        phi = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
        return d * (phi + h * 0.3989422804014327 * tl.exp(-0.5 * h * h))
    elif KIND == "sigmoid":
        return d * z * (1 - z)
    else:
        return z * (d - tl.sum(d * z, 1)[:, None])


@triton.jit
def _unit_mask(hidden_mask, at, mask, HAS_UNITS: tl.constexpr):
    """Dropout factors of a tile of hidden units."""
    if HAS_UNITS:
        return tl.load(hidden_mask + at, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.full(at.shape, 1.0, tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def prompt_bottleneck_fwd_kernel(
    u, gain, shift, bias, down, up, channel_mask, hidden_mask, out, prompts, hidden,
    KIND: tl.constexpr, HAS_CHANNELS: tl.constexpr, HAS_UNITS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """up lies transposed, (r, D)."""
    i_b = (tl.program_id(0) // tl.cdiv(prompts, ROWS)).to(tl.int64)
    o_p = tl.program_id(0) % tl.cdiv(prompts, ROWS) * ROWS + tl.arange(0, ROWS)
    o_d, o_r = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    _, _, _, g = _affine(
        u, gain, shift, bias, channel_mask, i_b, o_p, o_d, prompts, HAS_CHANNELS, WIDTH
    )
    z = _act(_units(g, down, o_d, o_r, hidden, WIDTH), o_r, hidden, KIND)
    at = (i_b * prompts + o_p)[:, None] * hidden + o_r[None, :]
    mask = (o_p < prompts)[:, None] & (o_r < hidden)[None, :]
    z *= _unit_mask(hidden_mask, at, mask, HAS_UNITS)
    for j in range(hidden):
        z_j = tl.sum(tl.where((o_r == j)[None, :], z, 0.0), 1)
        w = tl.load(up + j * WIDTH + o_d, mask=o_d < WIDTH, other=0.0).to(tl.float32)
        g += z_j[:, None] * w[None, :]
    _store_tile(out + i_b * prompts * WIDTH, o_p, o_d, prompts, g, WIDTH)


@triton.jit(do_not_specialize=_SIZES)
def prompt_bottleneck_bwd_units_kernel(
    d_out, u, gain, shift, bias, down, up, channel_mask, hidden_mask, units, d_units, d_bias,
    prompts, hidden,
    KIND: tl.constexpr, HAS_CHANNELS: tl.constexpr, HAS_UNITS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Units behind the activation, gradients before it, (B, P, r); the bias' gradient, (B, P)."""
    i_b = (tl.program_id(0) // tl.cdiv(prompts, ROWS)).to(tl.int64)
    o_p = tl.program_id(0) % tl.cdiv(prompts, ROWS) * ROWS + tl.arange(0, ROWS)
    o_d, o_r = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    _, _, _, g = _affine(
        u, gain, shift, bias, channel_mask, i_b, o_p, o_d, prompts, HAS_CHANNELS, WIDTH
    )
    h = _units(g, down, o_d, o_r, hidden, WIDTH)
    d = _tile(d_out + i_b * prompts * WIDTH, o_p, o_d, prompts, WIDTH)
    at = (i_b * prompts + o_p)[:, None] * hidden + o_r[None, :]
    mask = (o_p < prompts)[:, None] & (o_r < hidden)[None, :]
    keep = _unit_mask(hidden_mask, at, mask, HAS_UNITS)
    z = _act(h, o_r, hidden, KIND)
    d_h = _act_backward(_units(d, up, o_d, o_r, hidden, WIDTH) * keep, h, z, KIND)
    tl.store(units + at, z * keep, mask=mask)
    tl.store(d_units + at, d_h, mask=mask)
    total = tl.sum(d, 1)
    for j in range(hidden):
        w = tl.load(down + j * WIDTH + o_d, mask=o_d < WIDTH, other=0.0).to(tl.float32)
        total += tl.sum(tl.where((o_r == j)[None, :], d_h, 0.0), 1) * tl.sum(w, 0)
    tl.store(d_bias + i_b * prompts + o_p, total, mask=o_p < prompts)


@triton.jit(do_not_specialize=_SIZES)
def prompt_bottleneck_bwd_kernel(
    d_out, u, gain, shift, bias, down, channel_mask, units, d_units,
    d_u, d_gain, d_shift, d_down, d_up, batch, images, prompts, hidden,
    HAS_CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """du of one tile in `images` images, and their sums for the parameters in this program's slot.

    Grid: channels fastest, then prompts, then slots. d_up lies transposed, (r, D).
    """
    i_d = tl.program_id(0) % tl.cdiv(WIDTH, BLOCK_D)
    slot = (tl.program_id(0) // tl.cdiv(WIDTH, BLOCK_D)).to(tl.int64)  # (slot of images, tile of P)
    i_s, i_p = slot // tl.cdiv(prompts, BLOCK_P), slot % tl.cdiv(prompts, BLOCK_P)
    o_p = (i_p * BLOCK_P).to(tl.int32) + tl.arange(0, BLOCK_P)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_r = tl.arange(0, BLOCK_R)
    mask = (o_p < prompts)[:, None] & (o_r < hidden)[None, :]
    w = _tile(down, o_r, o_d, hidden, WIDTH)
    sum_shift = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    sum_gain = tl.zeros([BLOCK_D], tl.float32)
    sum_down = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    sum_up = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    first = (i_s * images).to(tl.int32)
    for i in range(first, tl.minimum(first + images, batch)):
        i_b = tl.cast(i, tl.int64)
        rows, a, c, g = _affine(
            u, gain, shift, bias, channel_mask, i_b, o_p, o_d, prompts, HAS_CHANNELS, WIDTH
        )
        d = _tile(d_out + i_b * prompts * WIDTH, o_p, o_d, prompts, WIDTH)
        at = (i_b * prompts + o_p)[:, None] * hidden + o_r[None, :]
        z = tl.load(units + at, mask=mask, other=0.0)
        d_h = tl.load(d_units + at, mask=mask, other=0.0)
        sum_up = tl.dot(tl.trans(z), d, sum_up, input_precision="ieee")
        sum_down = tl.dot(tl.trans(d_h), g, sum_down, input_precision="ieee")
        d_g = tl.dot(d_h, w, d, input_precision="ieee") * c[None, :]
        sum_shift += d_g
        sum_gain += tl.sum(d_g * rows, 0)
        _store_tile(d_u + i_b * prompts * WIDTH, o_p, o_d, prompts, d_g * a[None, :], WIDTH)
    _store_tile(d_shift + i_s * prompts * WIDTH, o_p, o_d, prompts, sum_shift, WIDTH)
    tl.store(d_gain + slot * WIDTH + o_d, sum_gain, mask=o_d < WIDTH)
    _store_tile(d_down + slot * hidden * WIDTH, o_r, o_d, hidden, sum_down, WIDTH)
    _store_tile(d_up + slot * hidden * WIDTH, o_r, o_d, hidden, sum_up, WIDTH)


_row_stats = Launcher(row_stats_kernel)
_mix = Launcher(token_mix_fwd_kernel)
_mix_backward = Launcher(token_mix_bwd_kernel)
_bottleneck = Launcher(prompt_bottleneck_fwd_kernel)
_bottleneck_units = Launcher(prompt_bottleneck_bwd_units_kernel)
_bottleneck_backward = Launcher(prompt_bottleneck_bwd_kernel)


def _power(size: int, least: int, most: int) -> int:
    return min(max(power_of_2(size), least), most)


def _stats_launch(width: int) -> dict:
    block = power_of_2(width)
    return {"WIDTH": width, "BLOCK_D": block, "ROWS": max(1, 4096 // block), "num_warps": 4}


def _mix_launch(narrow: bool, prompts: int, width: int) -> dict:
    """Tiles of the forward's product. Exact fp32 products keep both factors in registers."""
    most = 64 if narrow else 32
    return {
        "WIDTH": width,
        "BLOCK_P": _power(prompts, 16, most),
        "BLOCK_N": most,
        "BLOCK_D": _power(width, 16, 2 * most),
        "num_warps": 4,
    }


def _mix_backward_launch(narrow: bool, prompts: int, width: int) -> dict:
    most = 64 if narrow else 32
    return {
        "WIDTH": width,
        "BLOCK_P": _power(prompts, 16, most),
        "BLOCK_N": most,
        "BLOCK_D": _power(width, 16, most),
        "num_warps": 8 if narrow else 4,
    }


def _rows_launch(hidden: int, width: int, warps: int) -> dict:
    """Whole rows of the bottleneck, 4096 entries of g. The forward holds little else: 4 warps, 32
    entries a thread; with 8 warps the compiler caps registers and spills some of them. Its
    gradients take twice as much: 8 warps, 16 entries.
    """
    block = power_of_2(width)
    return {
        "WIDTH": width,
        "BLOCK_D": block,
        "BLOCK_R": _power(hidden, 2, _MOST_UNITS),
        "ROWS": _power(4096 // block, 1, 16),
        "num_warps": warps,
    }


def _sums_launch(hidden: int, width: int) -> dict:
    """Sums over images: more units leave registers for fewer channels."""
    units = _power(hidden, 16, _MOST_UNITS)
    return {
        "WIDTH": width,
        "BLOCK_P": 16,
        "BLOCK_D": _power(width, 16, max(16, min(64, 1024 // units))),
        "BLOCK_R": units,
        "num_warps": 8,
    }


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """W in the product's dtype, rows of a multiple of 16 entries: loads are whole vectors."""
    prompts, tokens = weight.shape
    padded = weight.new_zeros(prompts, programs(tokens, 16) * 16, dtype=dtype)
    padded[:, :tokens] = weight
    return padded


def token_mix(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the reference's."""
    batch, tokens, width = x.shape
    prompts = len(weight)
    u = weight.new_empty(batch, prompts, width)
    mean = x.new_empty(batch, tokens, 1, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if mean.numel() == 0:
        return u.zero_(), mean, rstd
    stats = _stats_launch(width)
    tile = _mix_launch(x.element_size() == 2, prompts, width)
    rows = batch * tokens
    given: tuple = x, mean, rstd, rows, eps
    _row_stats(programs(rows, stats["ROWS"]), x.device, given, stats | OPTIONS)
    if count := batch * programs(prompts, tile["BLOCK_P"]) * programs(width, tile["BLOCK_D"]):
        given = x, _padded(weight, x.dtype), mean, rstd, u, tokens, prompts
        _mix(count, x.device, given, tile | OPTIONS)
    return u, mean, rstd


def token_mix_backward(
    d_u: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, need_x: bool
) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's."""
    batch, tokens, width = x.shape
    prompts = len(weight)
    d_x = x.new_empty(x.shape if need_x else 0)
    reads = x.new_empty(batch, prompts, tokens, dtype=torch.float32)
    tile = _mix_backward_launch(x.element_size() == 2, prompts, width)
    if mean.numel():
        _mix_backward(
            batch * programs(tokens, tile["BLOCK_N"]),
            x.device,
            (d_u, x, _padded(weight, x.dtype), mean, rstd, reads, d_x, tokens, prompts),
            {"NEED_X": need_x, **tile, **OPTIONS},
        )
    return d_x, reads.sum(0).to(weight.dtype)


def prompt_bottleneck(
    u: Tensor,
    gain: Tensor,
    shift: Tensor,
    bias: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    channel_mask: Tensor | None,
    hidden_mask: Tensor | None,
) -> Tensor:
    """Same contract as the reference's."""
    masks = channel_mask, hidden_mask
    if len(down) > _MOST_UNITS:
        return reference.prompt_bottleneck(u, gain, shift, bias, down, up, activation, *masks)
    out = torch.empty_like(u)
    if u.numel() == 0:
        return out
    batch, prompts, width = u.shape
    tile = _rows_launch(len(down), width, _FORWARD_WARPS)
    _bottleneck(
        batch * programs(prompts, tile["ROWS"]),
        u.device,
        (u, gain, shift, bias.float(), down, up.t().contiguous(),
         *(u if m is None else m.float() for m in masks), out, prompts, len(down)),
        {"KIND": activation, "HAS_CHANNELS": channel_mask is not None,
         "HAS_UNITS": hidden_mask is not None, **tile, **OPTIONS},
    )  # fmt: skip
    return out


def prompt_bottleneck_backward(
    d_out: Tensor,
    u: Tensor,
    gain: Tensor,
    shift: Tensor,
    bias: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    channel_mask: Tensor | None,
    hidden_mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """Same contract as the reference's."""
    batch, prompts, width = u.shape
    hidden = len(down)
    if hidden > _MOST_UNITS:
        return reference.prompt_bottleneck_backward(
            d_out, u, gain, shift, bias, down, up, activation, channel_mask, hidden_mask
        )
    d_u = torch.empty_like(u)
    if u.numel() == 0:
        return d_u, *(torch.zeros_like(t) for t in (gain, shift, bias, down, up))

    def workspace(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=u.device)

    units, d_units = workspace(batch, prompts, hidden), workspace(batch, prompts, hidden)
    d_bias = workspace(batch, prompts)
    rows, sums = _rows_launch(hidden, width, _UNITS_WARPS), _sums_launch(hidden, width)
    images = programs(batch, _SLOTS)
    slots, tiles = programs(batch, images), programs(prompts, sums["BLOCK_P"])
    d_gain, d_shift = workspace(slots * tiles, width), workspace(slots, prompts, width)
    d_down, d_up = (workspace(slots * tiles, hidden, width) for _ in range(2))
    given = d_out, u, gain, shift, bias.float(), down
    channels, keep = (u if m is None else m.float() for m in (channel_mask, hidden_mask))
    _bottleneck_units(
        batch * programs(prompts, rows["ROWS"]),
        u.device,
        (*given, up.t().contiguous(), channels, keep, units, d_units, d_bias, prompts, hidden),
        {"KIND": activation, "HAS_CHANNELS": channel_mask is not None,
         "HAS_UNITS": hidden_mask is not None, **rows, **OPTIONS},
    )  # fmt: skip
    _bottleneck_backward(
        slots * tiles * programs(width, sums["BLOCK_D"]),
        u.device,
        (*given, channels, units, d_units, d_u, d_gain, d_shift, d_down, d_up,
         batch, images, prompts, hidden),
        {"HAS_CHANNELS": channel_mask is not None, **sums, **OPTIONS},
    )  # fmt: skip
    totals = [t.sum(0) for t in (d_gain, d_shift, d_bias, d_down, d_up)]
    totals[-1] = totals[-1].t()
    return d_u, *(
        t.to(like.dtype).contiguous()
        for t, like in zip(totals, (gain, shift, bias, down, up), strict=True)
    )


_ROWS = ("x", "weight", "d_x")
_PARAMETERS = ("u", "d_u", "d_out", "out", "gain", "shift", "down", "up")


def _launch(label: str, kernel, dtype: str, tile: dict, own: str = "fp32", **changes) -> Launch:
    """`kernel` with an image's rows in `dtype`, prompts and parameters in `own`, sums in fp32."""
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(_SIZES, "i32")
    types |= {"eps": "fp32"} | dict.fromkeys(_ROWS, f"*{dtype}")
    types |= dict.fromkeys((n for n in _PARAMETERS if n in types), f"*{own}")
    tile = dict(tile)
    warps = tile.pop("num_warps")
    products = kernel in (token_mix_fwd_kernel, token_mix_bwd_kernel)
    return Launch(
        label=f"{label} {dtype}" + (f" and {own}" if own != dtype else ""),
        kernel=kernel,
        types=types,
        constants=tile | changes,
        warps=warps,
        stages=3,
        tensor_cores=products and dtype != "fp32",
    )


def _mix_launches(
    dtype: str, prompts: int, width: int, own: str = "fp32", need_x: bool = True
) -> list[Launch]:
    narrow, name = dtype != "fp32", f"token_mix P={prompts}"
    forward, backward = (f(narrow, prompts, width) for f in (_mix_launch, _mix_backward_launch))
    return [
        _launch("row statistics", row_stats_kernel, dtype, _stats_launch(width)),
        _launch(f"{name} fwd", token_mix_fwd_kernel, dtype, forward, own),
        _launch(f"{name} bwd", token_mix_bwd_kernel, dtype, backward, own, NEED_X=need_x),
    ]


def _bottleneck_launches(
    own: str, hidden: int, width: int, kind: str = "relu", masks: bool = True
) -> list[Launch]:
    forward = _rows_launch(hidden, width, _FORWARD_WARPS)
    units, sums = _rows_launch(hidden, width, _UNITS_WARPS), _sums_launch(hidden, width)
    switches = {"KIND": kind, "HAS_CHANNELS": masks, "HAS_UNITS": masks}
    name = f"bottleneck {kind} r={hidden}"
    return [
        _launch(f"{name} fwd", prompt_bottleneck_fwd_kernel, own, forward, own, **switches),
        _launch(f"{name} units", prompt_bottleneck_bwd_units_kernel, own, units, own, **switches),
        _launch(f"{name} bwd", prompt_bottleneck_bwd_kernel, own, sums, own, HAS_CHANNELS=masks),
    ]


def shipped_launches(architecture: int) -> list[Launch]:
    """Every kernel as ViT-B launches it with 50 prompts: all in bf16, and all in fp32."""
    return [
        *_mix_launches("bf16", 50, 768, "bf16"),
        *_mix_launches("fp32", 50, 768),
        *_bottleneck_launches("bf16", 8, 768),
        *_bottleneck_launches("fp32", 8, 768),
    ]


def variant_launches(architecture: int) -> list[Launch]:
    """Other sizes, parameters wider than rows, no gradient of the rows, other activations."""
    return [
        *_mix_launches("bf16", 50, 768),
        *_mix_launches("fp16", 5, 72, need_x=False),
        *_mix_launches("fp32", 200, 1024, need_x=False),
        *_bottleneck_launches("fp32", 64, 1408, "softmax"),
        *_bottleneck_launches("fp16", 3, 384, "gelu", masks=False),
    ]
