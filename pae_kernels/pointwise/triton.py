"""Norms without affine, activations, gates and rotations in Triton: three memory passes each way in
a block, and one more where queries and keys are rotated.

add_layer_norm        one program: one warp and ROWS rows (one of 768); reads x (and delta), writes
                      their sum, the normalised rows in the product's dtype and 1/std. With an fp32
                      stream and 16-bit products 4 + 2 bytes in, 4 + 2 out per element. A warp sums
                      its rows by shuffles alone: no shared memory, no barrier up to 1024 wide.
layer_norm_backward   same tiling; reads d, xhat and the residual gradient, writes the sum in the
                      stream's dtype and a 16-bit copy that the next product reads: 2 + 2 + 4 in,
                      4 + 2 out. No weight gradient exists, so rows are independent.
activation(_backward) one program: BLOCK consecutive entries; 2 in, 2 out (4 in, 2 out); with 8-bit
                      derivatives 2 in, 3 out (3 in, 2 out).
gated(_backward)      one program: BLOCK entries of one row of the gates and of what they multiply;
                      4 in, 2 out (6 in, 4 out) per entry of the result.
rotate_               one program: all heads of queries and keys of one row, 4 in and 4 out per
                      entry of one of both; a row's angles are read once.

Arrays of one kernel differ in the size of their entries, and the compiler would give each the
layout that suits its own, with a pass through shared memory between two of them (and, with 8-bit
derivatives, the formula twice). `max_contiguous` binds all of them to one layout: 4 entries a
thread in norms, which is 16 bytes of the fp32 stream; 8 in activations, 16 bytes of 16-bit entries.

Floor at ViT-B, B = 128 (S = 19.4 M elements): 232 MB, 271 MB, 310 MB (465 MB) a pass, over the
bandwidth of a large copy.
Rows are padded to a power of two in registers only (768 -> 1024): masked lanes move no bytes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ahead_of_time import OPTIONS, Launch
from ..launching import Launcher, power_of_2, programs
from .reference import _CODE_SCALE, _CODE_ZERO

CODE_SCALE, CODE_ZERO = tl.constexpr(_CODE_SCALE), tl.constexpr(_CODE_ZERO)


@triton.jit
def layer_norm_fwd_kernel(
    x, delta, y, xhat, rstd, rows, eps,
    HAS_DELTA: tl.constexpr, RMS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_m < rows)[:, None] & (o_d < WIDTH)[None, :]
    at = tl.max_contiguous(o_m.to(tl.int64)[:, None] * WIDTH + o_d[None, :], [1, 4])
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        v += tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
        stored = v.to(y.dtype.element_ty)
        tl.store(y + at, stored, mask=mask)
        v = stored.to(tl.float32)  # the norm sees what the stream holds
    if RMS:
        centred = v
    else:
        mean = tl.sum(v, 1) / WIDTH
        centred = tl.where(mask, v - mean[:, None], 0.0)
    r = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    tl.store(xhat + at, (centred * r[:, None]).to(xhat.dtype.element_ty), mask=mask)
    tl.store(rstd + o_m, r, mask=o_m < rows)


@triton.jit
def layer_norm_bwd_kernel(
    d, xhat, rstd, residual, dx, narrow, rows,
    HAS_RESIDUAL: tl.constexpr, HAS_NARROW: tl.constexpr, RMS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_m < rows)[:, None] & (o_d < WIDTH)[None, :]
    at = tl.max_contiguous(o_m.to(tl.int64)[:, None] * WIDTH + o_d[None, :], [1, 4])
    g = tl.load(d + at, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(xhat + at, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(rstd + o_m, mask=o_m < rows, other=0.0)
    along = tl.sum(g * h, 1) / WIDTH
    if not RMS:
        g -= (tl.sum(g, 1) / WIDTH)[:, None]
    g = (g - h * along[:, None]) * r[:, None]
    if HAS_RESIDUAL:
        g += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + at, g.to(dx.dtype.element_ty), mask=mask)
    if HAS_NARROW:
        tl.store(narrow + at, g.to(narrow.dtype.element_ty), mask=mask)


@triton.jit
def _lower_tail(a):
    """1 - Phi(a), a >= 0, of the normal distribution: exp2 of a polynomial.

    Fitted to log2 of it on [0, 7], so that max(1 - Phi, 1e-4) weighs the error; off by at most
    2e-7, and by 1e-3 of itself up to 6. Beyond, it falls to 0: the leading coefficient decides.
    """
    p = -5.00733136e-07 * a + 9.2857541e-06
    p = p * a - 3.46129551e-05
    p = p * a - 5.16595109e-04
    p = p * a + 7.56455062e-03
    p = p * a - 5.28369975e-02
    p = p * a - 4.59100331e-01
    p = p * a - 1.15111755
    return tl.exp2(p * a - 0.999999772)


@triton.jit
def _sigmoid(x):
    """s = 1 / (1 + exp(-x)) and s (1 - s), of exp(-|x|): nothing overflows, nothing cancels.

    1 / (1 + e) is a root twice, two instructions, where a division is eight.
    """
    e = tl.exp2(tl.abs(x) * -1.4426950408889634)
    root = tl.rsqrt(1.0 + e)
    p = root * root
    return tl.where(x < 0, e * p, p), e * p * p


@triton.jit
def _act(u, KIND: tl.constexpr):
    """act(u) and act'(u)."""
    if KIND == "gelu":
        tail = _lower_tail(tl.abs(u))
        phi = tl.where(u < 0, tail, 1 - tail)
        return u * phi, phi + u * 0.3989422804014327 * tl.exp2(u * u * -0.7213475204444817)
    elif KIND == "gelu_tanh":
        s, rest = _sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        # u u may be infinite where nothing is left
        inner = tl.where(rest == 0, 0.0, 1.5957691216057308 * (1 + 0.134145 * u * u))
        return u * s, s + u * rest * inner
    elif KIND == "quick_gelu":
        s, rest = _sigmoid(1.702 * u)
        return u * s, s + 1.702 * u * rest
    elif KIND == "silu":
        s, rest = _sigmoid(u)
        return u * s, s + u * rest
    else:
        return tl.where(u < 0, 0.0, u), tl.where(u > 0, 1.0, 0.0)  # a maximum would lose NaN


@triton.jit
def _code(slope):
    """The byte of a derivative."""
    # added to 1.5 * 2^23 a number is rounded, halves to even, into the lowest bits of the sum
    rounded = slope * CODE_SCALE + (CODE_ZERO + 12582912.0)
    return rounded.to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def _entries(BLOCK: tl.constexpr):
    return tl.max_contiguous(tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), 8)


@triton.jit
def activation_fwd_kernel(
    u, y, code, count, KIND: tl.constexpr, CODED: tl.constexpr, BLOCK: tl.constexpr
):
    at = _entries(BLOCK)
    mask = at < count
    value, slope = _act(tl.load(u + at, mask=mask, other=0.0).to(tl.float32), KIND)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)
    if CODED:
        tl.store(code + at, _code(slope), mask=mask)


@triton.jit
def activation_bwd_kernel(
    d, kept, du, count, KIND: tl.constexpr, CODED: tl.constexpr, BLOCK: tl.constexpr
):
    at = _entries(BLOCK)
    mask = at < count
    g = tl.load(d + at, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(kept + at, mask=mask, other=0.0).to(tl.float32)
    if CODED:
        slope = (k - CODE_ZERO) * (1.0 / CODE_SCALE)
    else:
        _, slope = _act(k, KIND)
    tl.store(du + at, (g * slope).to(du.dtype.element_ty), mask=mask)


@triton.jit
def _of_row(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A program's row and its entries there."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.max_contiguous(at, 8)


@triton.jit
def gated_fwd_kernel(u, y, rows, KIND: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, at = _of_row(WIDTH, BLOCK)
    mask = (at < WIDTH) & (row < rows)
    gate = tl.load(u + row * (2 * WIDTH) + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(u + row * (2 * WIDTH) + WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    value, _ = _act(gate, KIND)
    tl.store(y + row * WIDTH + at, (value * up).to(y.dtype.element_ty), mask=mask)


@triton.jit
def gated_bwd_kernel(d, u, du, rows, KIND: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, at = _of_row(WIDTH, BLOCK)
    mask = (at < WIDTH) & (row < rows)
    g = tl.load(d + row * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(u + row * (2 * WIDTH) + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(u + row * (2 * WIDTH) + WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    value, slope = _act(gate, KIND)
    tl.store(du + row * (2 * WIDTH) + at, (g * up * slope).to(du.dtype.element_ty), mask=mask)
    tl.store(du + row * (2 * WIDTH) + WIDTH + at, (g * value).to(du.dtype.element_ty), mask=mask)


@triton.jit
def rotate_kernel(
    qkv, rotation, tokens, count,
    BACK: tl.constexpr, PER_HEAD: tl.constexpr, PARTS: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) % count
    image = (tl.program_id(0) // count).to(tl.int64)
    row = qkv + (image * tokens + tokens - count + at) * (2 * PARTS * HEADS * HALF)
    o_h, o_d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (o_h < min(PARTS, 2) * HEADS) & (o_d < HALF)
    own, size = o_h * 0, count * HALF  # of the table of one head
    if PER_HEAD:
        own, size = o_h % HEADS * size, size * HEADS
    # once for each head, though it may be the same: another shape would have another layout
    table = tl.max_contiguous(own + at * HALF + o_d, [1, 4])
    sin = tl.load(rotation + table, mask=mask, other=0.0)
    cos = tl.load(rotation + size + table, mask=mask, other=0.0)
    if BACK:
        sin = -sin
    # heads of queries, then of keys
    entries = tl.max_contiguous(o_h * (2 * HALF) + o_d, [1, 4])
    a = tl.load(row + entries, mask=mask, other=0.0).to(sin.dtype)
    b = tl.load(row + entries + HALF, mask=mask, other=0.0).to(sin.dtype)
    tl.store(row + entries, (a * cos - b * sin).to(qkv.dtype.element_ty), mask=mask)
    tl.store(row + entries + HALF, (b * cos + a * sin).to(qkv.dtype.element_ty), mask=mask)


_gate_forward, _gate_backward = Launcher(gated_fwd_kernel), Launcher(gated_bwd_kernel)
_turn = Launcher(rotate_kernel)
_norm_forward, _norm_backward = Launcher(layer_norm_fwd_kernel), Launcher(layer_norm_bwd_kernel)
_act_forward, _act_backward = Launcher(activation_fwd_kernel), Launcher(activation_bwd_kernel)


@lru_cache
def _rows_launch(width: int) -> dict:
    """Rows of a program and its warps: 1024 padded entries a warp, 32 a thread."""
    block = power_of_2(width)
    rows, warps = max(1, 1024 // block), min(max(1, block // 1024), 16)
    return {"WIDTH": width, "BLOCK_D": block, "ROWS": rows, "num_warps": warps, **OPTIONS}


def layer_norm(
    x: Tensor, eps: float, dtype: torch.dtype, rms: bool = False
) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's."""
    _, xhat, rstd = _norm(x, None, eps, dtype, rms)
    return xhat, rstd


def add_layer_norm(
    x: Tensor, delta: Tensor, eps: float, dtype: torch.dtype, rms: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the reference's."""
    return _norm(x, delta, eps, dtype, rms)


def _norm(x: Tensor, delta: Tensor | None, eps: float, dtype: torch.dtype, rms: bool):
    xhat = x.new_empty(x.shape, dtype=dtype)
    y = x if delta is None else torch.empty_like(x)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    rows, launch = rstd.numel(), _rows_launch(x.shape[-1])
    if rows:
        given = x, x if delta is None else delta, y, xhat, rstd, rows, eps
        constants = {"HAS_DELTA": delta is not None, "RMS": rms, **launch}
        _norm_forward(programs(rows, launch["ROWS"]), x.device, given, constants)
    return y, xhat, rstd


def layer_norm_backward(
    d_xhat: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
    narrow: torch.dtype | None,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's."""
    dx = d_xhat.new_empty(d_xhat.shape, dtype=dtype)
    copy = rstd.new_empty(0) if narrow is None else torch.empty_like(dx, dtype=narrow)
    rows, launch = rstd.numel(), _rows_launch(xhat.shape[-1])
    if rows:
        around = d_xhat if residual is None else residual
        given = d_xhat, xhat, rstd, around, dx, dx if narrow is None else copy, rows
        switches = {"HAS_RESIDUAL": residual is not None, "HAS_NARROW": narrow is not None}
        switches["RMS"] = rms
        _norm_backward(programs(rows, launch["ROWS"]), xhat.device, given, switches | launch)
    return dx, copy


_BLOCK = 4096


@lru_cache
def _flat_launch(kind: str, coded: bool) -> dict:
    """Entries of a program, 16 a thread."""
    return {"KIND": kind, "CODED": coded, "BLOCK": _BLOCK, "num_warps": 8, **OPTIONS}


def activation(u: Tensor, kind: str) -> Tensor:
    """Same contract as the reference's."""
    return _activate(u, kind, None)


def activation_coded(u: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's."""
    code = torch.empty_like(u, dtype=torch.uint8)
    return _activate(u, kind, code), code


def _activate(u: Tensor, kind: str, code: Tensor | None) -> Tensor:
    y = torch.empty_like(u)
    if u.numel():
        given = u, y, u if code is None else code, u.numel()
        constants = _flat_launch(kind, code is not None)
        _act_forward(programs(u.numel(), _BLOCK), u.device, given, constants)
    return y


def activation_backward(d: Tensor, kept: Tensor, kind: str) -> Tensor:
    """Same contract as the reference's."""
    du = torch.empty_like(d)
    if d.numel():
        constants = _flat_launch(kind, kept.dtype == torch.uint8)
        _act_backward(programs(d.numel(), _BLOCK), d.device, (d, kept, du, d.numel()), constants)
    return du


_GATED_BLOCK = 1024


@lru_cache
def _gated_launch(kind: str, width: int) -> dict:
    """Entries of a program, 8 a thread."""
    return {"KIND": kind, "WIDTH": width, "BLOCK": _GATED_BLOCK, "num_warps": 4, **OPTIONS}


def gated(u: Tensor, kind: str) -> Tensor:
    """Same contract as the reference's."""
    width = u.shape[-1] // 2
    y = u.new_empty((*u.shape[:-1], width))
    if y.numel():
        rows = y.numel() // width
        count = rows * programs(width, _GATED_BLOCK)
        _gate_forward(count, u.device, (u, y, rows), _gated_launch(kind, width))
    return y


def gated_backward(d: Tensor, u: Tensor, kind: str) -> Tensor:
    """Same contract as the reference's."""
    du = torch.empty_like(u)
    if d.numel():
        width = d.shape[-1]
        rows = d.numel() // width
        count = rows * programs(width, _GATED_BLOCK)
        _gate_backward(count, d.device, (d, u, du, rows), _gated_launch(kind, width))
    return du


def gated_norm(u: Tensor, kind: str, eps: float, rms: bool = False) -> Tensor:
    """Same contract as the reference's, by the kernels of both."""
    return layer_norm(gated(u, kind), eps, u.dtype, rms)[0]


def gated_norm_backward(d: Tensor, u: Tensor, kind: str, eps: float, rms: bool = False) -> Tensor:
    """Same contract as the reference's, by the kernels of both."""
    xhat, rstd = layer_norm(gated(u, kind), eps, u.dtype, rms)
    d, _ = layer_norm_backward(d, xhat, rstd, None, d.dtype, None, rms)
    return gated_backward(d, u, kind)


@lru_cache
def _rotate_launch(heads: int, half: int, per_head: bool, back: bool, parts: int = 3) -> dict:
    """All heads of queries and keys of a row, about 8 pairs a thread."""
    blocks = power_of_2(min(parts, 2) * heads), power_of_2(half)
    constants = {"BACK": back, "PER_HEAD": per_head, "PARTS": parts, "HEADS": heads, "HALF": half}
    constants |= {"BLOCK_H": blocks[0], "BLOCK_D": blocks[1]}
    return {**constants, "num_warps": min(max(1, blocks[0] * blocks[1] // 256), 8), **OPTIONS}


def rotate_(qkv: Tensor, rotation: Tensor, back: bool) -> None:
    """Same contract as the reference's."""
    batch, tokens, parts, heads, width = qkv.shape
    count = rotation.shape[-2]
    if batch and count:
        given = qkv, rotation.contiguous(), tokens, count
        constants = _rotate_launch(heads, width // 2, rotation.dim() == 4, back, parts)
        _turn(batch * count, qkv.device, given, constants)


def _shipped(label: str, kernel, launch: dict, changed=None) -> Launch:
    """`kernel` between an fp32 stream and bf16 products; `changed` types of other arguments."""
    narrow = ("xhat", "delta", "d", "narrow", "u", "y", "du", "kept")
    types = dict.fromkeys(narrow, "*bf16")
    types |= dict.fromkeys(("x", "rstd", "residual", "dx"), "*fp32")
    types |= {"rows": "i32", "count": "i32", "eps": "fp32", "code": "*u8"}
    types |= {"qkv": "*bf16", "rotation": "*fp32", "tokens": "i32"}
    constants = {n: v for n, v in launch.items() if n in kernel.arg_names}
    warps = launch["num_warps"]
    return Launch(label, kernel, types | (changed or {}), constants, warps, 3, ("count",))


def _norm_launch(label: str, kernel, width: int, changed=None, **constants) -> Launch:
    return _shipped(label, kernel, _rows_launch(width) | {"RMS": False} | constants, changed)


def _flat(label: str, kernel, coded: bool, kind: str = "gelu", changed=None) -> Launch:
    return _shipped(label, kernel, _flat_launch(kind, coded), changed)


def shipped_launches(architecture: int) -> list[Launch]:
    """Every kernel as ViT-B launches it: fp32 stream, bf16 products."""
    norm, wide = layer_norm_fwd_kernel, {"y": "*fp32"}
    both = {"HAS_RESIDUAL": True, "HAS_NARROW": True}
    return [
        _norm_launch("layer_norm fwd", norm, 768, wide, HAS_DELTA=False),
        _norm_launch("add + layer_norm", norm, 768, wide, HAS_DELTA=True),
        _norm_launch("layer_norm bwd", layer_norm_bwd_kernel, 768, **both),
        _flat("gelu fwd", activation_fwd_kernel, False),
        _flat("gelu coded", activation_fwd_kernel, True),
        _flat("gelu bwd", activation_bwd_kernel, False),
        _flat("gelu bwd coded", activation_bwd_kernel, True, changed={"kept": "*u8"}),
        _shipped("gated silu fwd", gated_fwd_kernel, _gated_launch("silu", 2048)),
        _shipped("gated silu bwd", gated_bwd_kernel, _gated_launch("silu", 2048)),
        _shipped("rotate", rotate_kernel, _rotate_launch(12, 32, False, False)),
        _shipped("rotate back", rotate_kernel, _rotate_launch(12, 32, False, True)),
    ]


def variant_launches(architecture: int) -> list[Launch]:
    """Rows of other widths and of one dtype throughout, and the other activations."""
    fp32 = dict.fromkeys(("y", "xhat", "delta", "d"), "*fp32")
    bf16 = dict.fromkeys(("x", "residual", "dx"), "*bf16")
    return [
        _norm_launch("add + layer_norm", layer_norm_fwd_kernel, 1408, fp32, HAS_DELTA=True),
        _norm_launch("add + layer_norm", layer_norm_fwd_kernel, 5120, bf16, HAS_DELTA=True),
        _norm_launch(
            "layer_norm bwd", layer_norm_bwd_kernel, 72, fp32, HAS_RESIDUAL=False, HAS_NARROW=False
        ),
        _norm_launch(
            "layer_norm bwd", layer_norm_bwd_kernel, 5120, bf16, HAS_RESIDUAL=True, HAS_NARROW=False
        ),
        _norm_launch("rms_norm", layer_norm_fwd_kernel, 1024, fp32, HAS_DELTA=True, RMS=True),
        _norm_launch(
            "rms_norm bwd",
            layer_norm_bwd_kernel,
            1024,
            HAS_RESIDUAL=True,
            HAS_NARROW=True,
            RMS=True,
        ),
        _shipped("gated gelu bwd", gated_bwd_kernel, _gated_launch("gelu", 2730)),
        _shipped("rotate per head odd", rotate_kernel, _rotate_launch(3, 33, True, False)),
        *(
            _flat(kind, kernel, coded, kind)
            for kind, kernel, coded in (
                ("gelu_tanh", activation_fwd_kernel, True),
                ("quick_gelu", activation_fwd_kernel, True),
                ("silu", activation_bwd_kernel, False),
                ("relu", activation_bwd_kernel, False),
            )
        ),
    ]
