"""The passes between the products of a frozen block: LayerNorm and GELU, forward and backward.

An fp32 residual stream, and products in bf16, as autocast has them, or in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pae_kernels import pointwise
from pae_kernels.pointwise import reference

from .ops import COMPILED, EAGER, Inputs, Op, Piece, open_inputs, start, start_compiled
from .roofline import DTYPES
from .rows import ours_in_versions
from .runner import Group, Provider, Settings

OURS = "pae"
EPS = 1e-6
# norm-relative to fp64: one rounding; the derivative in 8 bits is off by at most 1/400
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.uint8: 5e-3}


def norm_forward(x: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
    y = x + delta
    return y, F.layer_norm(y, y.shape[-1:], eps=EPS).to(delta.dtype)


def norm_backward(d: Tensor, xhat: Tensor, rstd: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    g, h = d.to(dy.dtype), xhat.to(dy.dtype)
    inner = g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True)
    dx = dy + rstd * inner
    return dx, dx.to(d.dtype)


def norm_backward_ours(d: Tensor, xhat: Tensor, rstd: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    given = d, xhat, rstd, dy
    return pointwise.layer_norm_backward(*given, dtype=dy.dtype, narrow=d.dtype)


def op(written_out: Piece, ours: Piece, *arguments: Callable[..., Tensor]) -> Op:
    """One pass by a user and by pae; each argument of `draw`, rows and width."""
    drawn = lambda draw, rows, width: tuple(each(draw, rows, width) for each in arguments)
    return Op({EAGER: written_out, OURS: ours}, drawn)


# in the dtype of the products; in that of the stream; a statistic of each row; a derivative's code
NARROW = lambda draw, rows, width: draw(rows, width)
WIDE = lambda draw, rows, width: draw(rows, width, dtype=torch.float32)
STATISTIC = lambda draw, rows, width: 1 + draw(rows, 1, dtype=torch.float32).abs()
CODE = lambda draw, *size: reference.activation_coded(draw(*size), "gelu")[1]
KINDS = {
    "norm/forward": op(
        norm_forward,
        lambda x, delta: pointwise.add_layer_norm(x, delta, EPS, delta.dtype)[:2],
        WIDE,
        NARROW,
    ),
    "norm/backward": op(norm_backward, norm_backward_ours, NARROW, NARROW, STATISTIC, WIDE),
    "gelu/forward": op(
        lambda u: (F.gelu(u),), lambda u: pointwise.activation(u, "gelu")[:1], NARROW
    ),
    "gelu/backward": op(
        lambda d, u: (torch.ops.aten.gelu_backward(d, u),),
        lambda d, u: (pointwise.activation_backward(d, u, "gelu"),),
        NARROW,
        NARROW,
    ),
    "coded gelu/forward": op(
        lambda u: reference.activation_coded(u, "gelu"),
        lambda u: pointwise.activation(u, "gelu", code=True),
        NARROW,
    ),
    "coded gelu/backward": op(
        lambda d, code: (reference.activation_backward(d, code, "gelu"),),
        lambda d, code: (pointwise.activation_backward(d, code, "gelu"),),
        NARROW,
        CODE,
    ),
}


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
    width = width if name.startswith("norm") else 4 * width  # of the MLP
    return Group(
        name=f"{name}/{rows}x{width}/{of}",
        open=lambda: open_inputs(KINDS[name], rows, width, of, LIMITS, settings.device),
        providers=[
            Provider(EAGER, partial(start, EAGER)),
            Provider(COMPILED, start_compiled, left_out=slow),
            *ours_in_versions("pointwise", settings, Inputs.first, partial(start, OURS)),
        ],
        baselines=(EAGER, COMPILED),
        rounds=40 if settings.on_gpu else 9,
        unit="pass",
        left_out=left_out,
        dtype=of,
    )


def test_pointwise(benchmark, replay):
    replay(benchmark)
