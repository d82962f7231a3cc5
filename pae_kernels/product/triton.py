"""Products with the pointwise pass behind them as their epilogue, in Triton.

product_activation            act(u), u = x W^T + b, and u or its derivative's code: fc1 of an MLP
product_activation_backward   (d W) act'(u), from u or the code: fc2's backward

One program makes tiles in turn (BLOCK_M rows, BLOCK_N columns), as many programs as the GPU holds
at a time. On sm_90 the loops over tiles and over K are one, so that the next tile's factors arrive
while the epilogue of this one runs. GROUP row tiles go together through the columns: their rows and
the columns of W that they share stay in L2. Sums are in fp32, in one order: bitwise the same from
run to run. Entries leave once, and u, where it is not kept, never. An epilogue takes SLICE columns
at a time: of a whole tile, registers and shared memory would not hold it.

On sm_90 and newer all tiles travel by TMA, whose descriptors the host makes; rows that are no
multiple of 16 bytes, and older GPUs, take pointers, masked.

At ViT-B, B = 128, 25216 rows, K = 768, F = 3072, bf16: 119 GFLOP, 39 + 5 MB in and 155 MB out, with
u 310, with the code 232. The pass that goes away reads 155 MB and writes as much, or half as much
again. Products bind: the floor is 119 GFLOP over the rate of a large product. Tiles of 128 x 256
fill 132 multiprocessors 17.9 times.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ahead_of_time import OPTIONS, Launch
from ..attention import tiles as attention_tiles
from ..launching import Launcher, programs
from ..pointwise.triton import CODE_SCALE, CODE_ZERO, _act, _code

HIDDEN, CODE, NOTHING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_KEEP = {"hidden": 0, "code": 1, "nothing": 2}


class Tile(NamedTuple):
    """Sizes of a tile, columns that an epilogue works on at a time, warps and stages of a program,
    programs of a multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    slice: int
    warps: int
    stages: int
    programs: int = 1


# (sm_90 and newer, 16 bits) -> tile
TILES = {
    (True, True): Tile(128, 256, 64, 64, 8, 3),
    (False, True): Tile(128, 128, 32, 64, 8, 4),
    (True, False): Tile(64, 64, 32, 64, 4, 2, 2),
    (False, False): Tile(64, 64, 32, 64, 4, 2, 2),
}
GROUP = 8


@triton.jit
def _corner(
    i, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """First row and column of tile i."""
    across = tl.cdiv(columns, BLOCK_N)
    first = i // (GROUP * across) * GROUP
    size = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    within = i % (GROUP * across)
    return (first + within % size) * BLOCK_M, within // size * BLOCK_N


@triton.jit
def _at(row, column, rows, columns, stride, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of a tile's entries, and which exist."""
    o_r, o_c = row + tl.arange(0, HIGH), column + tl.arange(0, WIDE)
    mask = (o_r < rows)[:, None] & (o_c < columns)[None, :]
    return o_r.to(tl.int64)[:, None] * stride + o_c[None, :], mask


@triton.jit
def _load(
    t, row, column, rows, columns, stride,
    TMA: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    if TMA:
        return t.load([row, column])
    else:
        at, mask = _at(row, column, rows, columns, stride, HIGH, WIDE)
        return tl.load(t + at, mask=mask, other=0)


@triton.jit
def _store(
    t, value, row, column, rows, columns,
    TMA: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    if TMA:
        t.store([row, column], value)
    else:
        at, mask = _at(row, column, rows, columns, columns, HIGH, WIDE)
        tl.store(t + at, value, mask=mask)


@triton.jit
def _halves(t, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """The left and the right half of a tile."""
    return t.reshape(HIGH, 2, WIDE // 2).permute(0, 2, 1).split()


@triton.jit
def _activated(
    u, bias, y, kept, m, n, rows, columns,
    KIND: tl.constexpr, KEEP: tl.constexpr, TMA: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile, SLICE columns at a time."""
    if BLOCK_N > SLICE:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = _halves(u, BLOCK_M, BLOCK_N)
        _activated(
            left, bias, y, kept, m, n, rows, columns, KIND, KEEP, TMA, OUT, BLOCK_M, HALF, SLICE
        )
        _activated(
            right, bias, y, kept, m, n + HALF, rows, columns,
            KIND, KEEP, TMA, OUT, BLOCK_M, HALF, SLICE,
        )  # fmt: skip
    else:
        o_n = n + tl.arange(0, BLOCK_N)
        u += tl.load(bias + o_n, mask=o_n < columns, other=0.0).to(tl.float32)[None, :]
        if KEEP == HIDDEN:
            _store(kept, u.to(OUT), m, n, rows, columns, TMA, BLOCK_M, BLOCK_N)
        value, slope = _act(u, KIND)
        _store(y, value.to(OUT), m, n, rows, columns, TMA, BLOCK_M, BLOCK_N)
        if KEEP == CODE:
            _store(kept, _code(slope), m, n, rows, columns, TMA, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["rows"])
def product_activation_fwd_kernel(
    x, weight, bias, y, kept, rows, columns, inner, stride_x, stride_w,
    KIND: tl.constexpr, KEEP: tl.constexpr, TMA: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    count = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for i in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=TMA):
        m, n = _corner(i, rows, columns, BLOCK_M, BLOCK_N, GROUP)
        u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, inner, BLOCK_K):
            a = _load(x, m, k, rows, inner, stride_x, TMA, BLOCK_M, BLOCK_K)
            b = _load(weight, n, k, columns, inner, stride_w, TMA, BLOCK_N, BLOCK_K)
            u = tl.dot(a, b.T, u, input_precision="ieee")
        _activated(
            u, bias, y, kept, m, n, rows, columns, KIND, KEEP, TMA, OUT, BLOCK_M, BLOCK_N, SLICE
        )


@triton.jit
def _turned(
    g, kept, du, m, n, rows, columns, stride_kept,
    KIND: tl.constexpr, CODED: tl.constexpr, TMA: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile, SLICE columns at a time."""
    if BLOCK_N > SLICE:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = _halves(g, BLOCK_M, BLOCK_N)
        _turned(
            left, kept, du, m, n, rows, columns, stride_kept,
            KIND, CODED, TMA, OUT, BLOCK_M, HALF, SLICE,
        )  # fmt: skip
        _turned(
            right, kept, du, m, n + HALF, rows, columns, stride_kept,
            KIND, CODED, TMA, OUT, BLOCK_M, HALF, SLICE,
        )  # fmt: skip
    else:
        u = _load(kept, m, n, rows, columns, stride_kept, TMA, BLOCK_M, BLOCK_N).to(tl.float32)
        if CODED:
            slope = (u - CODE_ZERO) * (1.0 / CODE_SCALE)
        else:
            _, slope = _act(u, KIND)
        _store(du, (g * slope).to(OUT), m, n, rows, columns, TMA, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["rows"])
def product_activation_bwd_kernel(
    d, weight, kept, du, rows, columns, inner, stride_d, stride_w, stride_kept,
    KIND: tl.constexpr, CODED: tl.constexpr, TMA: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    count = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for i in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=TMA):
        m, n = _corner(i, rows, columns, BLOCK_M, BLOCK_N, GROUP)
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, inner, BLOCK_K):
            a = _load(d, m, k, rows, inner, stride_d, TMA, BLOCK_M, BLOCK_K)
            b = _load(weight, k, n, inner, columns, stride_w, TMA, BLOCK_K, BLOCK_N)
            g = tl.dot(a, b, g, input_precision="ieee")
        _turned(
            g, kept, du, m, n, rows, columns, stride_kept,
            KIND, CODED, TMA, OUT, BLOCK_M, BLOCK_N, SLICE,
        )  # fmt: skip


_forward, _backward = (
    Launcher(product_activation_fwd_kernel),
    Launcher(product_activation_bwd_kernel),
)
_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def product_activation(
    x: Tensor, weight: Tensor, bias: Tensor, kind: str, keep: str
) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's."""
    columns = weight.shape[0]
    y = x.new_empty((*x.shape[:-1], columns))
    kept = x.new_empty(0)
    if keep != "nothing":
        kept = y.new_empty(y.shape, dtype=torch.uint8 if keep == "code" else y.dtype)
    if y.numel():
        flat = _rows(x)
        there = _rows(y) if keep == "nothing" else _rows(kept)
        tile = _tile(x)
        shapes = (
            (flat, tile.block_m, tile.block_k),
            (weight, tile.block_n, tile.block_k),
            (_rows(y), tile.block_m, tile.slice),
            (there, tile.block_m, tile.slice),
        )
        tma = _by_tma(x.device, *(t for t, *_ in shapes))
        a, w, out, second = (_described(*s) for s in shapes) if tma else (t for t, *_ in shapes)
        given = a, w, bias, out, second, len(flat), *weight.shape, flat.stride(0), weight.stride(0)
        constants = {"KIND": kind, "KEEP": _KEEP[keep], "TMA": tma, **_launch(tile, x.dtype)}
        _forward(_programs(tile, len(flat), columns, x.device), x.device, given, constants)
    return y, kept


def product_activation_backward(d: Tensor, weight: Tensor, kept: Tensor, kind: str) -> Tensor:
    """Same contract as the reference's."""
    inner, columns = weight.shape
    du = d.new_empty((*d.shape[:-1], columns))
    if du.numel():
        flat, there = _rows(d), _rows(kept)
        tile = _tile(d)
        shapes = (
            (flat, tile.block_m, tile.block_k),
            (weight, tile.block_k, tile.block_n),
            (there, tile.block_m, tile.slice),
            (_rows(du), tile.block_m, tile.slice),
        )
        tma = _by_tma(d.device, *(t for t, *_ in shapes))
        given = tuple(_described(*s) for s in shapes) if tma else tuple(t for t, *_ in shapes)
        strides = flat.stride(0), weight.stride(0), there.stride(0)
        given = *given, len(flat), columns, inner, *strides
        coded = kept.dtype == torch.uint8
        constants = {"KIND": kind, "CODED": coded, "TMA": tma, **_launch(tile, d.dtype)}
        _backward(_programs(tile, len(flat), columns, d.device), d.device, given, constants)
    return du


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


def _tile(x: Tensor) -> Tile:
    return TILES[attention_tiles._large(x.device), x.element_size() == 2]


def _launch(tile: Tile, dtype: torch.dtype) -> dict:
    """Constants that both kernels take."""
    return {
        "OUT": _TRITON[dtype],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "SLICE": tile.slice,
        "GROUP": GROUP,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **OPTIONS,
    }


def _programs(tile: Tile, rows: int, columns: int, device: torch.device) -> int:
    tiles = programs(rows, tile.block_m) * programs(columns, tile.block_n)
    return min(tiles, tile.programs * attention_tiles._device(device)[1])


def _by_tma(device: torch.device, *tiled: Tensor) -> bool:
    """Whether these matrices can be described to a GPU that reads descriptors."""
    return _has_tma(device) and all(_fits_tma(t) for t in tiled)


def _has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and attention_tiles._device(device)[0] >= 9


def _fits_tma(t: Tensor) -> bool:
    """Rows begin at multiples of 16 bytes, and there are some."""
    return t.numel() > 0 and not (t.data_ptr() | t.stride(0) * t.element_size()) & 15


def _described(t: Tensor, high: int, wide: int) -> TensorDescriptor:
    return TensorDescriptor(t, [*t.shape], [*t.stride()], [high, wide])


def _shipped(
    label: str, kernel, architecture: int, word: str = "bf16", tma: bool | None = None, **switches
) -> Launch:
    """`kernel` as ViT-B launches it; `tma` where another GPU would take the other way."""
    tile = TILES[architecture in (90, 100), word != "fp32"]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[word]
    tma = architecture >= 90 if tma is None else tma
    constants = {"TMA": tma, **switches, **_launch(tile, dtype)}
    backward = kernel is product_activation_bwd_kernel
    by_code = constants.get("CODED") or constants.get("KEEP") == _KEEP["code"]
    second = "u8" if by_code else word
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    blocks = {"x": (m, k), "d": (m, k), "weight": (k, n) if backward else (n, k)}
    blocks |= dict.fromkeys(("y", "du", "kept"), (m, tile.slice))
    types = {}
    for name, (high, wide) in blocks.items():
        kind = second if name == "kept" else word
        types[name] = f"tensordesc<{kind}[{high}, {wide}]>" if tma else f"*{kind}"
    types["bias"] = f"*{word}"
    numbers = "rows", "columns", "inner", "stride_x", "stride_d", "stride_w", "stride_kept"
    types |= dict.fromkeys(numbers, "i32")
    names = kernel.arg_names
    return Launch(
        f"{label} {m}x{n}x{k} {'tma' if tma else 'pointers'}", kernel,
        {name: kind for name, kind in types.items() if name in names},
        {name: value for name, value in constants.items() if name in names},
        tile.warps, tile.stages, tuple(n for n in numbers[1:] if n in names),
        tensor_cores=word != "fp32", may_spill=word == "fp32",
    )  # fmt: skip


def shipped_launches(architecture: int) -> list[Launch]:
    """fc1 and fc2's backward of ViT-B, in every memory mode."""
    forward, backward = product_activation_fwd_kernel, product_activation_bwd_kernel
    return [
        *(
            _shipped(f"fc1 + gelu, {keep}", forward, architecture, KIND="gelu", KEEP=number)
            for keep, number in _KEEP.items()
        ),
        _shipped("fc2 bwd + gelu", backward, architecture, KIND="gelu", CODED=False),
        _shipped("fc2 bwd + gelu coded", backward, architecture, KIND="gelu", CODED=True),
    ]


def variant_launches(architecture: int) -> list[Launch]:
    """Pointers where TMA is the usual way, the other activations, fp16 and fp32."""
    forward, backward = product_activation_fwd_kernel, product_activation_bwd_kernel
    at = architecture, "bf16", False
    return [
        _shipped("fc1 + gelu, code", forward, *at, KIND="gelu", KEEP=_KEEP["code"]),
        _shipped("fc2 bwd + gelu", backward, *at, KIND="gelu", CODED=False),
        _shipped("fc1 + gelu_tanh, code", forward, architecture, KIND="gelu_tanh", KEEP=1),
        _shipped("fc1 + relu fp16", forward, architecture, "fp16", KIND="relu", KEEP=2),
        _shipped("fc2 bwd + silu", backward, architecture, KIND="silu", CODED=False),
        _shipped("fc2 bwd + quick_gelu", backward, architecture, KIND="quick_gelu", CODED=False),
        _shipped("fc1 + gelu fp32", forward, *at[:1], "fp32", False, KIND="gelu", KEEP=0),
    ]
