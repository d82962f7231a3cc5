"""The passes between the products of a frozen block: LayerNorm and GELU, forward and backward.

An fp32 residual stream, and products in bf16, as autocast has them, or in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pae_kernels import pointwise
from pae_kernels.pointwise import reference

from .roofline import DTYPES
from .rows import compiled, ours_in_versions, row
from .runner import Group, Provider, Runnable, Settings

EAGER, COMPILED = "eager", "compiled"
EPS = 1e-6
# norm-relative to fp64: one rounding; the derivative in 8 bits is off by at most 1/400
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.uint8: 5e-3}

Piece = Callable[..., "tuple[Tensor, ...]"]


def norm_forward(x: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
    y = x + delta
    return y, F.layer_norm(y, y.shape[-1:], eps=EPS).to(delta.dtype)


def norm_backward(d: Tensor, xhat: Tensor, rstd: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    g, h = d.to(dy.dtype), xhat.to(dy.dtype)
    inner = g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True)
    dx = dy + rstd * inner
    return dx, dx.to(d.dtype)


@dataclass(frozen=True)
class Kind:
    """One pass: as a user would write it, and by pae; whether rows have the MLP's width rather than
    the stream's; and what it takes, drawn by `draw(dtype)` or, a column of statistics,
    `draw(dtype, 1)`. The products' dtype is `NARROW` here, and fp32 in groups of that.
    """

    written_out: Piece
    ours: Piece
    wide: bool
    arguments: Callable[[Callable[..., Tensor]], tuple[Tensor, ...]]


NARROW, WIDE = torch.bfloat16, torch.float32
KINDS = {
    "norm/forward": Kind(
        norm_forward, lambda x, delta: pointwise.add_layer_norm(x, delta, EPS, delta.dtype)[:2],
        False, lambda draw: (draw(WIDE), draw(NARROW)),
    ),
    "norm/backward": Kind(
        norm_backward,
        lambda d, xhat, rstd, dy: pointwise.layer_norm_backward(
            d, xhat, rstd, dy, dtype=dy.dtype, narrow=d.dtype
        ),
        False, lambda draw: (draw(NARROW), draw(NARROW), 1 + draw(WIDE, 1).abs(), draw(WIDE)),
    ),
    "gelu/forward": Kind(
        lambda u: (F.gelu(u),), lambda u: pointwise.activation(u, "gelu")[:1],
        True, lambda draw: (draw(NARROW),),
    ),
    "gelu/backward": Kind(
        lambda d, u: (torch.ops.aten.gelu_backward(d, u),),
        lambda d, u: (pointwise.activation_backward(d, u, "gelu"),),
        True, lambda draw: (draw(NARROW), draw(NARROW)),
    ),
    "coded gelu/forward": Kind(
        lambda u: reference.activation_coded(u, "gelu"),
        lambda u: pointwise.activation(u, "gelu", code=True),
        True, lambda draw: (draw(NARROW),),
    ),
    "coded gelu/backward": Kind(
        lambda d, code: (reference.activation_backward(d, code, "gelu"),),
        lambda d, code: (pointwise.activation_backward(d, code, "gelu"),),
        True, lambda draw: (draw(NARROW), reference.activation_coded(draw(NARROW), "gelu")[1]),
    ),
}  # fmt: skip


@dataclass
class Inputs:
    """What all providers share, and in fp64 what they should find."""

    kind: Kind
    arguments: tuple[Tensor, ...]
    floor_mb: float
    expected: dict[str, Tensor]


def open_inputs(name: str, rows: int, width: int, of: str, device: torch.device) -> Inputs:
    kind, generator = KINDS[name], torch.Generator(device).manual_seed(0)
    width = 4 * width if kind.wide else width

    def draw(dtype: torch.dtype, columns: int = width) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device)
        return drawn.to(DTYPES[of] if dtype == NARROW else dtype)

    arguments = kind.arguments(draw)
    exact = kind.written_out(*(t if t.dtype == torch.uint8 else t.double() for t in arguments))
    expected = {f"result {i}": t for i, t in enumerate(exact)}
    moved = (t for t in (*arguments, *kind.written_out(*arguments)) if t.shape[-1] > 1)
    return Inputs(kind, arguments, sum(t.nbytes for t in moved) / 1e6, expected)


def prepare(shared: Inputs, piece: Piece) -> Runnable:
    columns = {"floor_mb": shared.floor_mb}
    work = partial(piece, *shared.arguments)
    return row(work, shared.expected, LIMITS, columns, capture=True)


def start_compiled(shared: Inputs) -> Runnable:
    trial = lambda piece: piece(*shared.arguments)
    return prepare(shared, compiled(shared.kind.written_out, trial, dynamic=False))


def groups(settings: Settings) -> list[Group]:
    """ViT-B: rows of 128 images on a GPU, of 4 elsewhere; the quick size takes two passes."""
    if settings.size == "smoke":
        return [group(name, 5, 32, of, settings) for name in KINDS for of in DTYPES]
    rows = 197 * (settings.batch or (128 if settings.on_gpu else 4))
    quick = ("norm/forward", "gelu/backward")
    found = []
    for name in KINDS:
        for of in DTYPES:
            usual = of == "bf16" or not settings.on_gpu
            left_out = settings.why_not_size(usual and name in quick, usual)
            found.append(group(name, rows, 768, of, settings, left_out))
    return found


def group(
    name: str, rows: int, width: int, of: str, settings: Settings, left_out: str = ""
) -> Group:
    slow = settings.why_not_compile(settings.on_gpu)
    mine = lambda shared: prepare(shared, shared.kind.ours)
    return Group(
        name=f"{name}/{rows}x{4 * width if KINDS[name].wide else width}/{of}",
        open=lambda: open_inputs(name, rows, width, of, settings.device),
        providers=[
            Provider(EAGER, lambda shared: prepare(shared, shared.kind.written_out)),
            Provider(COMPILED, start_compiled, left_out=slow),
            *ours_in_versions("pointwise", settings, lambda shared: shared.arguments[0], mine),
        ],
        baselines=(EAGER, COMPILED),
        rounds=40 if settings.on_gpu else 9,
        unit="pass",
        left_out=left_out,
        dtype=of,
    )


def test_pointwise(benchmark, replay):
    replay(benchmark)
