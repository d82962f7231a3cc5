"""Two products of a frozen MLP with the activation behind them: fc1 + GELU, fc2's backward + GELU'.

In bf16, as autocast has them, at the sizes of a step; "coded" where a backward is to find GELU's
derivative as one byte, "lean" where it finds nothing. One kernel each on request; by default the
product is PyTorch's and the pass behind it ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pae_kernels import pointwise, product
from pae_kernels.pointwise import reference

from .rows import compiled, in_version, row
from .runner import Group, Provider, Runnable, Settings

EAGER, TWO, ONE, COMPILED = "eager", "pae, two kernels", "pae, one kernel", "compiled"
# norm-relative to fp64: u and its activation, or product and result, are rounded to bf16; the byte
# of a derivative differs by one where the entry behind it does
LIMITS = {torch.bfloat16: 5e-3, torch.uint8: 8e-3}

Piece = Callable[..., "tuple[Tensor, ...]"]


def _kept(u: Tensor, y: Tensor, code: Tensor | None, keep: str) -> tuple[Tensor, ...]:
    """What a forward returns."""
    return {"hidden": (y, u), "code": (y, code), "nothing": (y,)}[keep]


def forward(x: Tensor, weight: Tensor, bias: Tensor, keep: str) -> tuple[Tensor, ...]:
    """fc1 as a user would write it, and its activation."""
    u = F.linear(x, weight, bias)
    y, code = reference.activation_coded(u, "gelu") if keep == "code" else (F.gelu(u), None)
    return _kept(u, y, code, keep)


def forward_two(x: Tensor, weight: Tensor, bias: Tensor, keep: str) -> tuple[Tensor, ...]:
    u = F.linear(x, weight, bias)
    return _kept(u, *pointwise.activation(u, "gelu", code=keep == "code"), keep)


def forward_one(x: Tensor, weight: Tensor, bias: Tensor, keep: str) -> tuple[Tensor, ...]:
    y, kept = product.product_activation(x, weight, bias, "gelu", keep)
    return (y,) if kept is None else (y, kept)


def backward(d: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    """fc2's backward as a user would write it, and the activation's."""
    g = d @ weight
    if kept.dtype == torch.uint8:
        return (reference.activation_backward(g, kept, "gelu"),)
    return (torch.ops.aten.gelu_backward(g, kept),)


def backward_two(d: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    return (pointwise.activation_backward(d @ weight, kept, "gelu"),)


def backward_one(d: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    return (product.product_activation_backward(d, weight, kept, "gelu"),)


@dataclass(frozen=True)
class Kind:
    """One product: as a user would write it, in our two kernels, in one; what is kept between the
    forward and the backward.
    """

    pieces: dict[str, Piece]
    keep: str
    forward: bool


def _forward(keep: str) -> Kind:
    pieces = {EAGER: forward, TWO: forward_two, ONE: forward_one}
    return Kind({name: partial(piece, keep=keep) for name, piece in pieces.items()}, keep, True)


def _backward(keep: str) -> Kind:
    return Kind({EAGER: backward, TWO: backward_two, ONE: backward_one}, keep, False)


KINDS = {
    "forward": _forward("hidden"),
    "coded forward": _forward("code"),
    "lean forward": _forward("nothing"),
    "backward": _backward("hidden"),
    "coded backward": _backward("code"),
}
SIZES = {"ViT-B": (128, 768), "ViT-B, B = 64": (64, 768), "ViT-S": (128, 384)}  # images, width


@dataclass
class Inputs:
    """What all providers share, what the work takes at least, and in fp64 what they should find."""

    kind: Kind
    arguments: tuple[Tensor, ...]
    columns: dict[str, float]
    expected: dict[str, Tensor]


def open_inputs(name: str, rows: int, width: int, device: torch.device) -> Inputs:
    kind, generator = KINDS[name], torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    hidden = 4 * width
    if kind.forward:
        weight = (draw(hidden, width).float() / width**0.5).bfloat16()
        arguments: tuple[Tensor, ...] = draw(rows, width), weight, draw(hidden)
    else:
        kept = draw(rows, hidden)
        kept = reference.activation_coded(kept, "gelu")[1] if kind.keep == "code" else kept
        arguments = draw(rows, width), (draw(width, hidden).float() / width**0.5).bfloat16(), kept
    written_out = kind.pieces[EAGER]
    exact = written_out(*(t if t.dtype == torch.uint8 else t.double() for t in arguments))
    moved = (*arguments, *written_out(*arguments))
    columns = {
        "live_gflop": 2 * rows * width * hidden / 1e9,
        "floor_mb": sum(t.nbytes for t in moved) / 1e6,
    }
    return Inputs(kind, arguments, columns, {f"result {i}": t for i, t in enumerate(exact)})


def prepare(shared: Inputs, work: Callable[[], tuple[Tensor, ...]]) -> Runnable:
    return row(work, shared.expected, LIMITS, shared.columns, capture=True, dtype="bf16")


def start(name: str, shared: Inputs) -> Runnable:
    work = partial(shared.kind.pieces[name], *shared.arguments)
    if name == ONE:  # nowhere else is it what runs by itself
        work = in_version("triton", "product", shared.arguments[0], work)
    return prepare(shared, work)


def start_compiled(shared: Inputs) -> Runnable:
    """Inductor tries templates of products with their epilogues, too. Every row is timed as a
    graph, so it need not make one of its own.
    """
    trial = lambda piece: piece(*shared.arguments)
    options = {"dynamic": False, "mode": "max-autotune-no-cudagraphs"}
    made = compiled(shared.kind.pieces[EAGER], trial, **options)
    return prepare(shared, partial(made, *shared.arguments))


def groups(settings: Settings) -> list[Group]:
    """ViT-B and ViT-S in a step's sizes on a GPU; of 4 images elsewhere."""
    if settings.size == "smoke":
        return [group(name, 5, 32, settings) for name in KINDS]
    return list(_groups(settings))


def _groups(settings: Settings) -> Iterator[Group]:
    for size, (batch, width) in SIZES.items():
        rows = 197 * (settings.batch or (batch if settings.on_gpu else 4))
        for name in KINDS:
            quick = size == "ViT-B" and name in ("forward", "backward")
            left_out = settings.why_not_size(quick and settings.on_gpu, quick or settings.on_gpu)
            if settings.on_gpu or not size.endswith("64"):
                yield group(name, rows, width, settings, left_out)


def group(name: str, rows: int, width: int, settings: Settings, left_out: str = "") -> Group:
    slow = settings.why_not_compile(settings.on_gpu)
    return Group(
        name=f"product/{name}/{rows}x{width}x{4 * width}/bf16",
        open=lambda: open_inputs(name, rows, width, settings.device),
        providers=[
            Provider(EAGER, partial(start, EAGER)),
            Provider(TWO, partial(start, TWO)),
            Provider(COMPILED, start_compiled, left_out=slow),
            Provider(ONE, partial(start, ONE), left_out=settings.why_not_cuda()),
        ],
        baselines=(TWO, EAGER, COMPILED),
        rounds=40 if settings.on_gpu else 5,
        unit="pass",
        left_out=left_out,
        dtype="bf16",
    )


def test_product(benchmark, replay):
    replay(benchmark)
