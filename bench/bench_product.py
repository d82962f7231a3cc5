"""Two products of a frozen MLP with the activation behind them: fc1 + GELU, fc2's backward + GELU'.

In bf16, as autocast has them, at the sizes of a step; "coded" where a backward is to find GELU's
derivative as one byte, "lean" where it finds nothing. One kernel each on request; by default the
product is PyTorch's and the pass behind it ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pae_kernels import pointwise, product
from pae_kernels.pointwise import reference

from .ops import COMPILED, EAGER, Inputs, Op, open_inputs, start, start_compiled
from .rows import start_in
from .runner import Group, Provider, Settings

TWO, ONE = "pae, two kernels", "pae, one kernel"
# norm-relative to fp64: u and its activation, or product and result, are rounded to bf16; the byte
# of a derivative differs by one where the entry behind it does
LIMITS = {torch.bfloat16: 5e-3, torch.uint8: 8e-3}


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


def op(keep: str, back: bool = False) -> Op:
    """By a user, in our two kernels, in one; `keep` is what is there between the directions."""
    pieces = {EAGER: forward, TWO: forward_two, ONE: forward_one}
    pieces = {name: partial(piece, keep=keep) for name, piece in pieces.items()}
    if back:
        pieces = {EAGER: backward, TWO: backward_two, ONE: backward_one}

    def arguments(draw: Callable[..., Tensor], rows: int, width: int) -> tuple[Tensor, ...]:
        sides = (width, 4 * width) if back else (4 * width, width)
        x, weight = draw(rows, width), (draw(*sides).float() / width**0.5).bfloat16()
        if not back:
            return x, weight, draw(4 * width)
        kept = draw(rows, 4 * width)
        return x, weight, reference.activation_coded(kept, "gelu")[1] if keep == "code" else kept

    return Op(pieces, arguments, lambda rows, width: 2.0 * rows * width * 4 * width)


KINDS = {
    "forward": op("hidden"),
    "coded forward": op("code"),
    "lean forward": op("nothing"),
    "backward": op("hidden", back=True),
    "coded backward": op("code", back=True),
}
SIZES = {"ViT-B": (128, 768), "ViT-B, B = 64": (64, 768), "ViT-S": (128, 384)}  # images, width


def groups(settings: Settings) -> list[Group]:
    """ViT-B and ViT-S in a step's sizes on a GPU; of 4 images elsewhere."""
    if settings.size == "smoke":
        return [group(name, 5, 32, settings) for name in KINDS]
    found = []
    for size, (batch, width) in SIZES.items():
        rows = 197 * (settings.batch or (batch if settings.on_gpu else 4))
        for name in KINDS:
            quick = size == "ViT-B" and name in ("forward", "backward")
            left_out = settings.why_not_size(quick and settings.on_gpu, quick or settings.on_gpu)
            if settings.on_gpu or not size.endswith("64"):
                found.append(group(name, rows, width, settings, left_out))
    return found


def group(name: str, rows: int, width: int, settings: Settings, left_out: str = "") -> Group:
    slow = settings.why_not_compile(settings.on_gpu)
    # Inductor tries templates of products with their epilogues, too
    tuned = partial(start_compiled, mode="max-autotune-no-cudagraphs")
    # nowhere is it what runs by itself
    fused = partial(start_in, "triton", "product", Inputs.first, partial(start, ONE))
    return Group(
        name=f"product/{name}/{rows}x{width}x{4 * width}/bf16",
        open=lambda: open_inputs(KINDS[name], rows, width, "bf16", LIMITS, settings.device),
        providers=[
            Provider(EAGER, partial(start, EAGER)),
            Provider(TWO, partial(start, TWO)),
            Provider(COMPILED, tuned, left_out=slow),
            Provider(ONE, fused, left_out=settings.why_not_cuda()),
        ],
        baselines=(TWO, EAGER, COMPILED),
        rounds=40 if settings.on_gpu else 5,
        unit="pass",
        left_out=left_out,
        dtype="bf16",
    )


def test_product(benchmark, replay):
    replay(benchmark)
