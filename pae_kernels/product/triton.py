"""Products with the pointwise pass behind them as their epilogue, in Triton.

product_activation            act(u), u = x W^T + b, and u or its derivative's code: fc1 of an MLP
product_activation_backward   (d W) act'(u), from u or the code: fc2's backward

One program makes tiles in turn (BLOCK_M rows, BLOCK_N columns), as many programs as the GPU holds
at a time. On sm_90 the loops over tiles and over K are one, so that the next tile's factors arrive
while the epilogue of this one runs; on sm_100, whose products leave registers alone, the next tile
is multiplied meanwhile (its code has the epilogue twice: the last tile's comes behind the loop).
TOGETHER tiles below each other come one after the other: their rows and the columns of W that they
share stay in L2. Sums are in fp32, in one order: bitwise the same from run to run. Entries leave
once, and u, where it is not kept, never. An epilogue takes SLICE columns at a time: of a whole
tile, registers and shared memory would not hold it.

On sm_90 and newer all tiles travel by TMA, whose descriptors the host makes; rows that are no
multiple of 16 bytes, and older GPUs, take pointers, masked.

At ViT-B, B = 128, 25216 rows, K = 768, F = 3072, bf16: 119 GFLOP, 39 + 5 MB in and 155 MB out, with
u 310, with the code 232. The pass that goes away reads 155 MB and writes as much, or half as much
again. Products bind: the floor is 119 GFLOP over the rate of a large product. Tiles of 128 x 256
fill 132 multiprocessors 17.9 times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import gpus
from ..ahead_of_time import OPTIONS, Launch, meta, recorded
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

    def side(self, letter: str) -> int:
        """m, n, k, or s for a slice."""
        return {"m": self.block_m, "n": self.block_n, "k": self.block_k, "s": self.slice}[letter]


# (by TMA on sm_90 or sm_100, 16 bits) -> tile. With pointers, the addresses of a wider tile's odd
# rows would leave its sums no registers
TILES = {
    (True, True): Tile(128, 256, 64, 64, 8, 3),
    (False, True): Tile(128, 128, 32, 64, 8, 4),
    (True, False): Tile(64, 64, 32, 64, 4, 2, 2),
    (False, False): Tile(64, 64, 32, 64, 4, 2, 2),
}
TOGETHER = 8


@triton.jit
def _corner(
    i, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr
):  # fmt: skip
    """First row and column of tile i."""
    across = tl.cdiv(columns, BLOCK_N)
    first = i // (TOGETHER * across) * TOGETHER
    size = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, TOGETHER)
    within = i % (TOGETHER * across)
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
    x, weight, kept, y, bias, rows, columns, inner, stride_x, stride_w,
    KIND: tl.constexpr, KEEP: tl.constexpr, TMA: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    if TMA:
        tl.assume(inner > 0)  # or the loop that flattening makes is there once more, for no product
    count = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for i in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=TMA):
        m, n = _corner(i, rows, columns, BLOCK_M, BLOCK_N, TOGETHER)
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
    TOGETHER: tl.constexpr,
):  # fmt: skip
    if TMA:
        tl.assume(inner > 0)  # or the loop that flattening makes is there once more, for no product
    count = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for i in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=TMA):
        m, n = _corner(i, rows, columns, BLOCK_M, BLOCK_N, TOGETHER)
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, inner, BLOCK_K):
            a = _load(d, m, k, rows, inner, stride_d, TMA, BLOCK_M, BLOCK_K)
            b = _load(weight, k, n, inner, columns, stride_w, TMA, BLOCK_K, BLOCK_N)
            g = tl.dot(a, b, g, input_precision="ieee")
        _turned(
            g, kept, du, m, n, rows, columns, stride_kept,
            KIND, CODED, TMA, OUT, BLOCK_M, BLOCK_N, SLICE,
        )  # fmt: skip


# by whether matrices are described: what stands where among the arguments is then another kind
_forward, _backward = (
    {tma: Launcher(kernel) for tma in (False, True)}
    for kernel in (product_activation_fwd_kernel, product_activation_bwd_kernel)
)
_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def product_activation(
    x: Tensor, weight: Tensor, bias: Tensor, kind: str, keep: str
) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's."""
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    kept = x.new_empty(0)
    if keep != "nothing":
        kept = y.new_empty(y.shape, dtype=torch.uint8 if keep == "code" else y.dtype)
    if y.numel():
        rows, made = _rows(x), _rows(y)
        there = made if keep == "nothing" else _rows(kept)
        tiled = (rows, "mk"), (weight, "nk"), (there, "ms"), (made, "ms")
        others = bias, *made.shape, weight.shape[1], rows.stride(0), weight.stride(0)
        _launch(_forward, tiled, others, {"KIND": kind, "KEEP": _KEEP[keep]})
    return y, kept


def product_activation_backward(d: Tensor, weight: Tensor, kept: Tensor, kind: str) -> Tensor:
    """Same contract as the reference's."""
    du = d.new_empty((*d.shape[:-1], weight.shape[1]))
    if du.numel():
        rows, made, there = _rows(d), _rows(du), _rows(kept)
        tiled = (rows, "mk"), (weight, "kn"), (there, "ms"), (made, "ms")
        strides = rows.stride(0), weight.stride(0), there.stride(0)
        others = *made.shape, weight.shape[0], *strides
        _launch(_backward, tiled, others, {"KIND": kind, "CODED": kept.dtype == torch.uint8})
    return du


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


def _launch(
    launchers: dict[bool, Launcher],
    tiled: tuple[tuple[Tensor, str], ...],
    others: tuple,
    switches: dict[str, object],
) -> None:
    """One launch, of as many programs as the GPU holds.

    Args:
        tiled: the matrices and the two sides of their tiles (`Tile.side`); of the first are the
            device and the dtype, the last is what is made.
        others: what the kernel takes between them and its constants.
    """
    (first, _), (made, _) = tiled[0], tiled[-1]
    gpu, narrow = gpus.of(first.device), first.element_size() == 2
    tma = _has_tma(first.device) and all(_fits_tma(t) for t, _ in tiled)
    tile = TILES[tma and gpu.large, narrow]
    if not tma and narrow and switches.get("CODED") is False:
        # a slope that is computed from hidden values leaves no registers for wider slices of them
        tile = tile._replace(slice=32)
    given = [_described(t, tile, sides) if tma else t for t, sides in tiled]
    tiles = programs(made.shape[0], tile.block_m) * programs(made.shape[1], tile.block_n)
    constants = {**switches, "TMA": tma, "OUT": _TRITON[first.dtype], **_constants(tile)}
    count = min(tiles, tile.programs * gpu.multiprocessors)
    launchers[tma](count, first.device, (*given, *others), constants)


@lru_cache
def _constants(tile: Tile) -> dict:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "SLICE": tile.slice,
        "TOGETHER": TOGETHER,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **OPTIONS,
    }


def _has_tma(device: torch.device) -> bool:
    """Whether it reads tiles by descriptors; the interpreter knows them, too."""
    return device.type != "cpu" and gpus.of(device).major >= 9


def _fits_tma(t: Tensor) -> bool:
    """Rows begin at multiples of 16 bytes, and there are some."""
    return t.numel() > 0 and not (t.data_ptr() | t.stride(0) * t.element_size()) & 15


def _described(t: Tensor, tile: Tile, sides: str) -> TensorDescriptor:
    return TensorDescriptor(t, [*t.shape], [*t.stride()], [tile.side(side) for side in sides])


def _forward_launch(
    architecture: int,
    keep: str,
    kind: str = "gelu",
    dtype: torch.dtype = torch.bfloat16,
    inner: int = 768,
) -> Launch:
    """fc1 of ViT-B at 128 images; of 16-byte rows unless `inner` is something else."""
    x, weight, bias = meta(dtype, 25216, inner), meta(dtype, 3072, inner), meta(dtype, 3072)
    label = f"fc1 + {kind}, {keep}"
    call = partial(product_activation, x, weight, bias, kind, keep)
    return _recorded(label, architecture, call, dtype, inner)


def _backward_launch(
    architecture: int, coded: bool, kind: str = "gelu", inner: int = 768
) -> Launch:
    """fc2's backward there."""
    dtype = torch.bfloat16
    d, weight = meta(dtype, 25216, inner), meta(dtype, inner, 3072)
    kept = meta(torch.uint8 if coded else dtype, 25216, 3072)
    label = f"fc2 bwd + {kind}{' coded' * coded}"
    call = partial(product_activation_backward, d, weight, kept, kind)
    return _recorded(label, architecture, call, dtype, inner)


def _recorded(
    label: str, architecture: int, call: Callable[[], object], dtype: torch.dtype, inner: int
) -> Launch:
    wide = dtype == torch.float32
    launch = recorded(label, architecture, call, tensor_cores=not wide, may_spill=wide)
    sizes = "x".join(str(launch.constants[f"BLOCK_{side}"]) for side in "MNK")
    way = "tma" if launch.constants["TMA"] else "pointers"
    words = label, _TRITON[dtype].name, sizes, way, "" if inner % 8 == 0 else "odd"
    return replace(launch, label=" ".join(filter(None, words)))


def shipped_launches(architecture: int) -> list[Launch]:
    """fc1 and fc2's backward of ViT-B, in every memory mode."""
    return [
        *(_forward_launch(architecture, keep) for keep in _KEEP),
        *(_backward_launch(architecture, coded) for coded in (False, True)),
    ]


def variant_launches(architecture: int) -> list[Launch]:
    """Rows that no descriptor describes, the other activations, fp16 and fp32."""
    return [
        _forward_launch(architecture, "code", inner=770),
        _backward_launch(architecture, False, inner=770),
        _forward_launch(architecture, "code", "gelu_tanh"),
        _forward_launch(architecture, "nothing", "relu", torch.float16),
        _backward_launch(architecture, False, "silu"),
        _backward_launch(architecture, False, "quick_gelu"),
        _forward_launch(architecture, "hidden", dtype=torch.float32),
    ]
