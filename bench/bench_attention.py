"""Image queries over prompt and image keys: forward, backward, and both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pae_kernels import prompt_attention
from pae_kernels.attention import reference

from . import roofline
from .memory import SavedBytes
from .peers import attention as peers
from .rows import attempt, checked, errors, ours_in_versions
from .runner import Group, Provider, Runnable, Settings

KINDS = ("forward", "backward", "both")
FLASH, CUDNN, SDPA = "SDPA flash", "SDPA cuDNN", "SDPA"
FACTOR = 2.0  # a row's error, in multiples of what the written-out softmax makes in its dtype


class Shape(NamedTuple):
    """ViT-B/16 at 224 is Shape(12, 64, 197, ...); CLIP's text tower, causal and with its prompts
    among the rows, Shape(8, 64, 77, 0, ..., causal=True).
    """

    heads: int
    head_width: int
    tokens: int
    prompts: int
    batch: int
    dtype: str
    causal: bool = False

    @property
    def name(self) -> str:
        heads = f"H{self.heads}d{self.head_width}{'/causal' if self.causal else ''}"
        return f"{heads}/N{self.tokens}/P{self.prompts}/{self.dtype}/B{self.batch}"


@dataclass
class Inputs:
    """What all providers share, the fp64 values, and the errors that a row may show."""

    shape: Shape
    kind: str
    qkv: Tensor
    kv: Tensor
    d_out: Tensor
    expected: dict[str, Tensor] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    def run(self, attend: peers.Attend) -> list[Tensor]:
        """[out, gradient of qkv, gradient of the prompts] in the dtype of the inputs."""
        out = attend(self.qkv, self.kv)
        return [out.detach(), *gradients(out, (self.qkv, self.kv), self.d_out)]


def gradients(
    out: Tensor, leaves: tuple[Tensor, ...], d_out: Tensor, **options: bool
) -> list[Tensor]:
    """Those of the leaves; of no prompts there are none, whoever reads them."""
    read = [t for t in leaves if t.numel()]
    found = iter(torch.autograd.grad(out, read, d_out, **options))
    return [next(found) if t.numel() else torch.empty_like(t) for t in leaves]


def open_inputs(shape: Shape, kind: str, device: torch.device) -> Inputs:
    generator, dtype = torch.Generator(device).manual_seed(0), roofline.DTYPES[shape.dtype]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    tail = shape.heads, shape.head_width
    qkv = draw(shape.batch, shape.tokens, 3, *tail).requires_grad_()
    kv = draw(1, shape.prompts, 2, *tail).requires_grad_()
    d_out = draw(shape.batch, shape.tokens, shape.heads * shape.head_width)
    shared = Inputs(shape, kind, qkv, kv, d_out)
    wide_qkv, wide_kv = (t.detach().double().requires_grad_() for t in (qkv, kv))
    given = None, shape.head_width**-0.5, False, None, None, None, shape.causal
    exact = Inputs(shape, kind, wide_qkv, wide_kv, d_out.double()).run(
        lambda qkv, kv: reference.prompt_attention(qkv, kv, *given)[0]
    )
    shared.expected = dict(zip(("out", "d_qkv", "d_prompts"), exact))
    own = errors(shared.run(written_out(shape.causal)), shared.expected)
    shared.limits = {name: FACTOR * error for name, error in own.items()}
    return shared


def prepare(shared: Inputs, attend: peers.Attend) -> Runnable:
    s, leaves = shared.shape, (shared.qkv, shared.kv)
    sizes = s.batch, s.tokens, s.prompts, s.heads * s.head_width
    columns = {
        "live_gflop": roofline.attention_flops(shared.kind, *sizes, s.causal) / 1e9,
        "floor_mb": roofline.attention_bytes(shared.kind, *sizes, shared.qkv.element_size()) / 1e6,
    }
    kept: list[Tensor] = []  # the forward that every timed backward starts from

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*leaves)

    def backward() -> list[Tensor]:
        if not kept:
            kept.append(attend(*leaves))
        return gradients(kept[0], leaves, shared.d_out, retain_graph=True)

    def both() -> list[Tensor]:
        return gradients(attend(*leaves), leaves, shared.d_out)

    work = {"forward": forward, "backward": backward, "both": both}[shared.kind]

    def check() -> dict[str, float]:
        with SavedBytes((*leaves, shared.d_out)) as saved:
            found = columns | checked(shared.run(attend), shared.expected, shared.limits)
        if shared.kind != "forward":  # which is timed without autograd
            found["saved_mb_per_image"] = saved.activations / s.batch / 1e6
        work()  # a timed backward keeps its forward, which is then no part of its peak
        return found

    return Runnable(work, check, capture=True, dtype=s.dtype)


def ours(qkv: Tensor, kv_prompt: Tensor, causal: bool = False) -> Tensor:
    return prompt_attention(qkv, kv_prompt, causal=causal)[0]


def written_out(causal: bool) -> peers.Attend:
    return peers.eager_causal if causal else peers.eager


def peer(name: str, make: Callable[[], peers.Attend], left_out: str = "") -> Provider:
    def start(shared: Inputs) -> Runnable:
        attend = attempt("refused", make)
        attempt("refused", lambda: shared.run(attend))  # no kernel for this shape or device
        return prepare(shared, attend)

    return Provider(name, start, left_out)


def providers(settings: Settings, compile_too: bool, causal: bool) -> list[Provider]:
    no_gpu, attend = settings.why_not_cuda(), partial(ours, causal=causal)
    flash = peer(FLASH, lambda: peers.sdpa("flash", causal))
    return [
        peer("eager", lambda: written_out(causal)),
        flash if settings.on_gpu else peer(SDPA, lambda: peers.sdpa(causal=causal)),
        peer(CUDNN, lambda: peers.sdpa("cuDNN", causal), no_gpu),
        peer("SDPA, prompts apart", lambda: peers.apart(causal)),
        peer("flash-attn", lambda: peers.flash_attn(causal), no_gpu),
        peer("FlexAttention, compiled", peers.flex, settings.why_not_compile(compile_too)),
        *ours_in_versions(
            "prompt_attention",
            settings,
            lambda shared: shared.qkv,
            lambda shared: prepare(shared, attend),
        ),
    ]


# ViT-S/16 of 224 pixels, the demo's ViT-S/14 of 112, ViT-B/16 of 384
CPU_SHAPES = [
    Shape(heads, 64, tokens, prompts, batch, dtype)
    for heads, tokens, prompts, batch in (
        (6, 197, 50, 4),
        (6, 65, 10, 16),
        (12, 577, 50, 1),
        # with --full
        *((6, 197, prompts, 4) for prompts in (0, 10, 100, 200)),
    )
    for dtype in ("fp32", "bf16")
]
# a text for each of 100 classes: cut behind the last end of one, and whole
TEXTS = [
    Shape(8, 64, tokens, 0, 100, dtype, causal=True)
    for tokens in (24, 77)
    for dtype in ("fp32", "bf16")
]
GPU_SHAPES = [
    *(Shape(12, 64, 197, prompts, 128, "bf16") for prompts in (50, 0, 10, 100, 200)),
    Shape(6, 64, 197, 50, 128, "bf16"),
    Shape(16, 64, 197, 50, 128, "bf16"),
    Shape(16, 80, 257, 50, 64, "bf16"),
    Shape(12, 64, 577, 50, 32, "bf16"),
    *(text for text in TEXTS if text.dtype == "bf16"),
    # with --full
    Shape(12, 64, 197, 50, 16, "bf16"),
    Shape(12, 64, 1568, 50, 16, "bf16"),
    Shape(12, 64, 197, 50, 128, "fp32"),
]


def groups(settings: Settings) -> list[Group]:
    """All groups of this file; those outside the chosen size carry a reason."""
    if settings.size == "smoke":
        return [group(Shape(2, 16, 9, 3, 2, "fp32"), kind, settings) for kind in KINDS]
    shapes, found = GPU_SHAPES, []
    if not settings.on_gpu:
        shapes = [*CPU_SHAPES[:6], *TEXTS, *CPU_SHAPES[6:]]
        shapes = [s._replace(batch=settings.batch or s.batch) for s in shapes]
    for i, shape in enumerate(shapes):
        for kind in KINDS:
            default = i == 0 or (i < 11 and kind != "both" if settings.on_gpu else i < 10)
            left_out = settings.why_not_size(i == 0, default)
            found.append(group(shape, kind, settings, i == 0, left_out))
    return found


def group(
    shape: Shape, kind: str, settings: Settings, compile_too: bool = False, left_out: str = ""
) -> Group:
    return Group(
        name=f"attention/{kind}/{shape.name}",
        open=lambda: open_inputs(shape, kind, settings.device),
        providers=providers(settings, compile_too, shape.causal),
        baselines=("eager", FLASH, CUDNN) if settings.on_gpu else ("eager", SDPA),
        rounds=40 if settings.on_gpu else 7,
        unit=kind if kind != "both" else "forward and backward",
        left_out=left_out,
        dtype=shape.dtype,
    )


def test_attention(benchmark, replay):
    replay(benchmark)
