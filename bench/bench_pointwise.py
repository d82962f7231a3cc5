"""The passes between the products of a frozen block: LayerNorm and GELU, forward and backward.

An fp32 residual stream and bf16 products, as autocast has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pae_kernels import pointwise
from pae_kernels.pointwise import reference

from .memory import tensors_in
from .runner import Group, Provider, Runnable, Settings, Unavailable, relative

EAGER, COMPILED = "eager", "compiled"
EPS = 1e-6
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3}  # norm-relative to fp64: one rounding
CODED_LIMIT = 5e-3  # the derivative in 8 bits is off by at most 1/400

Piece = Callable[..., "tuple[Tensor, ...]"]


# ---- what a user would write


def norm_forward(x: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
    y = x + delta
    return y, F.layer_norm(y, y.shape[-1:], eps=EPS).to(delta.dtype)


def norm_backward(d: Tensor, xhat: Tensor, rstd: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    g, h = d.to(dy.dtype), xhat.to(dy.dtype)
    inner = g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True)
    dx = dy + rstd * inner
    return dx, dx.to(d.dtype)


def gelu_forward(u: Tensor) -> tuple[Tensor, ...]:
    return (F.gelu(u),)


def gelu_backward(d: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    return (torch.ops.aten.gelu_backward(d, u),)


def coded_forward(u: Tensor) -> tuple[Tensor, ...]:
    return reference.activation_coded(u, "gelu")


def coded_backward(d: Tensor, code: Tensor) -> tuple[Tensor, ...]:
    return (reference.activation_backward(d, code, "gelu"),)


# ---- the same by pae, and the bytes that each must move per element of its input


@dataclass(frozen=True)
class Kind:
    written_out: Piece
    ours: Piece
    bytes_per_element: int
    wide: bool  # rows of the MLP's width rather than the stream's


KINDS = {
    "norm/forward": Kind(
        norm_forward, lambda x, delta: pointwise.add_layer_norm(x, delta, EPS, delta.dtype)[:2],
        12, False,
    ),
    "norm/backward": Kind(
        norm_backward,
        lambda d, xhat, rstd, dy: pointwise.layer_norm_backward(
            d, xhat, rstd, dy, dtype=dy.dtype, narrow=d.dtype
        ),
        14, False,
    ),
    "gelu/forward": Kind(
        gelu_forward, lambda u: pointwise.activation(u, "gelu")[:1], 4, True
    ),
    "gelu/backward": Kind(
        gelu_backward, lambda d, u: (pointwise.activation_backward(d, u, "gelu"),), 6, True
    ),
    "coded gelu/forward": Kind(
        coded_forward, lambda u: pointwise.activation(u, "gelu", code=True), 5, True
    ),
    "coded gelu/backward": Kind(
        coded_backward, lambda d, c: (pointwise.activation_backward(d, c, "gelu"),), 5, True
    ),
}  # fmt: skip


@dataclass
class Inputs:
    kind: Kind
    arguments: list[Tensor]
    floor_mb: float
    expected: list[Tensor] = field(default_factory=list)


def open_inputs(name: str, rows: int, width: int, device: torch.device) -> Inputs:
    kind, generator = KINDS[name], torch.Generator(device).manual_seed(0)
    width = 4 * width if kind.wide else width

    def draw(dtype: torch.dtype, columns: int = width) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).to(dtype)

    narrow = torch.bfloat16
    arguments = {
        "norm/forward": lambda: [draw(torch.float32), draw(narrow)],
        "norm/backward": lambda: [
            draw(narrow),
            draw(narrow),
            1 + draw(torch.float32, 1).abs(),
            draw(torch.float32),
        ],
        "gelu/forward": lambda: [draw(narrow)],
        "gelu/backward": lambda: [draw(narrow), draw(narrow)],
        "coded gelu/forward": lambda: [draw(narrow)],
        "coded gelu/backward": lambda: [
            draw(narrow),
            reference.activation_coded(draw(narrow), "gelu")[1],
        ],
    }[name]()
    shared = Inputs(kind, arguments, rows * width * kind.bytes_per_element / 1e6)
    wide = [t if t.dtype == torch.uint8 else t.double() for t in arguments]
    shared.expected = list(kind.written_out(*wide))
    return shared


def prepare(shared: Inputs, piece: Piece) -> Runnable:
    def work() -> tuple[Tensor, ...]:
        return piece(*shared.arguments)

    def check() -> dict[str, float]:
        worst = 0.0
        for got, expected in zip(tensors_in(work()), shared.expected, strict=True):
            error, limit = relative(got, expected), LIMITS.get(got.dtype, CODED_LIMIT)
            assert error <= limit, f"{got.dtype} result is off by {error:.1e}, more than {limit}"
            worst = max(worst, error)
        return {"value_error": worst, "floor_mb": shared.floor_mb}

    return Runnable(work, check, capture=True)


def start_compiled(shared: Inputs) -> Runnable:
    torch._dynamo.reset()
    compiled = torch.compile(shared.kind.written_out, dynamic=False)
    try:
        compiled(*shared.arguments)
    except Exception as error:  # whatever stops the compiler is no fault of ours
        raise Unavailable.because("torch.compile", error) from error
    return prepare(shared, compiled)


def groups(settings: Settings) -> list[Group]:
    """ViT-B: rows of 128 images on a GPU, of 4 elsewhere; the quick size takes two groups."""
    if settings.size == "smoke":
        return [group(name, 5, 32, settings) for name in KINDS]
    images = settings.batch or (128 if settings.device.type == "cuda" else 4)
    quick = ("norm/forward", "gelu/backward")
    return [
        group(
            name,
            images * 197,
            768,
            settings,
            "runs without --quick" if settings.size == "quick" and name not in quick else "",
        )
        for name in KINDS
    ]


def group(name: str, rows: int, width: int, settings: Settings, left_out: str = "") -> Group:
    on_gpu = settings.device.type == "cuda"
    return Group(
        name=f"{name}/{rows}x{4 * width if KINDS[name].wide else width}",
        open=lambda: open_inputs(name, rows, width, settings.device),
        providers=[
            Provider(EAGER, lambda shared: prepare(shared, shared.kind.written_out)),
            Provider(COMPILED, start_compiled, left_out=settings.why_not_compile(on_gpu)),
            Provider("pae", lambda shared: prepare(shared, shared.kind.ours)),
        ],
        baselines=(EAGER, COMPILED),
        rounds=40 if on_gpu else 9,
        unit="pass",
        left_out=left_out,
    )


def test_pointwise(benchmark, replay):
    replay(benchmark)
