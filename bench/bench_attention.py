"""Image queries over prompt and image keys: forward, backward, and both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

from pae_kernels import backends, prompt_attention
from pae_kernels.attention import reference, tiles

from . import roofline
from .memory import SavedBytes
from .peers import attention as peers
from .runner import Group, Provider, Runnable, Settings, Unavailable, relative

KINDS = ("forward", "backward", "both")
FLASH, CUDNN, SDPA = "SDPA flash", "SDPA cuDNN", "SDPA"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FACTOR = 2.0  # a row's error, in multiples of what the written-out softmax makes in its dtype


@dataclass
class Shape:
    """ViT-B/16 at 224 is Shape(12, 64, 197, ...)."""

    heads: int
    head_width: int
    tokens: int
    prompts: int
    batch: int
    dtype: str

    @property
    def name(self) -> str:
        heads = f"H{self.heads}d{self.head_width}"
        return f"{heads}/N{self.tokens}/P{self.prompts}/{self.dtype}/B{self.batch}"


@dataclass
class Inputs:
    """What all providers share, the fp64 values, and the errors that a row may show."""

    shape: Shape
    kind: str
    qkv: Tensor
    kv: Tensor
    d_out: Tensor
    expected: list[Tensor] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    def run(self, attend: peers.Attend) -> list[Tensor]:
        """[out, gradient of qkv, gradient of the prompts] in the dtype of the inputs."""
        out = attend(self.qkv, self.kv)
        return [out.detach(), *torch.autograd.grad(out, (self.qkv, self.kv), self.d_out)]


def open_inputs(shape: Shape, kind: str, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(DTYPES[shape.dtype])

    tail = shape.heads, shape.head_width
    qkv = draw(shape.batch, shape.tokens, 3, *tail).requires_grad_()
    kv = draw(1, shape.prompts, 2, *tail).requires_grad_()
    d_out = draw(shape.batch, shape.tokens, shape.heads * shape.head_width)
    shared = Inputs(shape, kind, qkv, kv, d_out)
    wide = Inputs(
        shape, kind, qkv.detach().double().requires_grad_(), kv.detach().double(), d_out.double()
    )
    wide.kv.requires_grad_()
    shared.expected = wide.run(
        lambda qkv, kv: reference.prompt_attention(
            qkv, kv, None, shape.head_width**-0.5, False, None
        )[0]
    )
    own = shared.run(peers.eager)
    shared.limits = [FACTOR * error for error in errors(own, shared.expected)]
    return shared


def errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Norm-relative; 0 for the gradient of no prompts."""
    return [relative(a, b) if b.numel() else 0.0 for a, b in zip(got, expected, strict=True)]


def prepare(shared: Inputs, attend: peers.Attend, routed=nullcontext) -> Runnable:
    """`attend` inside the context `routed`, which may choose how it runs."""

    def check() -> dict[str, float]:
        with routed(), SavedBytes((shared.qkv, shared.kv, shared.d_out)) as saved:
            found = errors(shared.run(attend), shared.expected)
        for what, value, limit in zip(("out", "d_qkv", "d_prompts"), found, shared.limits):
            assert value <= limit, f"{what} is off by {value:.1e}, more than {limit:.1e}"
        s, width = shared.shape, shared.shape.heads * shared.shape.head_width
        sizes = s.batch, s.tokens, s.prompts, width
        moved = roofline.attention_bytes(shared.kind, *sizes, shared.qkv.element_size())
        columns = {
            "value_error": found[0],
            "gradient_error": max(found[1:]),
            "live_gflop": roofline.attention_flops(shared.kind, *sizes) / 1e9,
            "floor_mb": moved / 1e6,
        }
        if shared.kind != "forward":  # which is timed without autograd
            columns["saved_mb_per_image"] = saved.activations / s.batch / 1e6
        work()  # a timed backward keeps its forward, which is then no part of its peak
        return columns

    work = work_of(shared, attend, routed)
    return Runnable(work, check, capture=True, dtype=shared.shape.dtype)


def work_of(shared: Inputs, attend, routed) -> Callable[[], object]:
    leaves = shared.qkv, shared.kv
    kept: list[Tensor] = []  # the forward that every timed backward starts from

    def forward() -> Tensor:
        with torch.no_grad(), routed():
            return attend(*leaves)

    def backward() -> tuple[Tensor, ...]:
        if not kept:
            kept.append(attend(*leaves))
        with routed():
            return torch.autograd.grad(kept[0], leaves, shared.d_out, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        with routed():
            return torch.autograd.grad(attend(*leaves), leaves, shared.d_out)

    return {"forward": forward, "backward": backward, "both": both}[shared.kind]


def ours(qkv: Tensor, kv_prompt: Tensor) -> Tensor:
    return prompt_attention(qkv, kv_prompt)[0]


def start_split(shared: Inputs) -> Runnable:
    """The two-pass backward where the table would take the one that holds a whole head."""
    version = backends.choose("prompt_attention", shared.qkv.device, shared.qkv.dtype)
    if not version.__name__.endswith(".triton"):
        raise Unavailable("needs the Triton kernels")
    if tiles.backward_whole(shared.qkv, shared.shape.tokens) is None:
        raise Unavailable("is what pae runs here")
    return prepare(
        shared, ours, lambda: mock.patch.object(tiles, "backward_whole", lambda *_: None)
    )


def start_peer(shared: Inputs, make: Callable[[], peers.Attend]) -> Runnable:
    try:
        attend = make()
        shared.run(attend)
    except Exception as error:  # no kernel for this shape or device, or a compiler that stops
        raise Unavailable.because("refused", error) from error
    return prepare(shared, attend)


def providers(kind: str, settings: Settings, compile_too: bool) -> list[Provider]:
    def peer(name: str, make: Callable[[], peers.Attend], left_out: str = "") -> Provider:
        return Provider(name, lambda shared: start_peer(shared, make), left_out)

    on_gpu = settings.device.type == "cuda"
    slow, no_gpu = settings.why_not_compile(compile_too), settings.why_not_cuda()
    rows = [peer("eager", lambda: peers.eager)]
    if on_gpu:
        rows.append(peer(FLASH, lambda: peers.sdpa("flash")))
    else:
        rows.append(peer(SDPA, peers.sdpa))
    rows += [
        peer(CUDNN, lambda: peers.sdpa("cuDNN"), no_gpu),
        peer("flash-attn", peers.flash_attn, no_gpu),
        peer("FlexAttention, compiled", peers.flex, slow),
        Provider("pae", lambda shared: prepare(shared, ours)),
    ]
    if on_gpu and kind != "forward":
        rows.append(Provider("pae, two passes", start_split))
    return rows


MAIN = Shape(12, 64, 197, 50, 128, "bf16")
GPU_SHAPES = [
    MAIN,
    *(Shape(12, 64, 197, prompts, 128, "bf16") for prompts in (0, 10, 100, 200)),
    Shape(6, 64, 197, 50, 128, "bf16"),
    Shape(16, 64, 197, 50, 128, "bf16"),
    Shape(16, 80, 257, 50, 64, "bf16"),
    Shape(12, 64, 577, 50, 32, "bf16"),
    Shape(12, 64, 197, 50, 16, "bf16"),
    Shape(12, 64, 1568, 50, 16, "bf16"),
    Shape(12, 64, 197, 50, 128, "fp32"),
]


def groups(settings: Settings) -> list[Group]:
    """All groups of this file; those outside the chosen size carry a reason."""
    if settings.size == "smoke":
        cases = [(Shape(2, 16, 9, 3, 2, "fp32"), kind) for kind in KINDS]
        return [group(*case, settings) for case in cases]
    if settings.device.type == "cuda":
        shapes = GPU_SHAPES
        chosen = {"quick": shapes[:1], "default": shapes[:9]}
        kinds = {"quick": KINDS, "default": ("forward", "backward")}
    else:
        shapes = [Shape(6, 64, 197, p, settings.batch or 4, "fp32") for p in (50, 0, 10, 100, 200)]
        chosen, kinds = {"quick": shapes[:1], "default": shapes[:1]}, {}
    cases = [(shape, kind) for shape in shapes for kind in KINDS]

    def why_not(shape: Shape, kind: str) -> str:
        if settings.size == "full" or (
            shape in chosen[settings.size]
            and (shape is shapes[0] or kind in kinds.get(settings.size, KINDS))
        ):
            return ""
        return "runs with --full"

    return [
        group(shape, kind, settings, shape is shapes[0], why_not(shape, kind))
        for shape, kind in cases
    ]


def group(
    shape: Shape, kind: str, settings: Settings, compile_too: bool = False, left_out: str = ""
) -> Group:
    on_gpu = settings.device.type == "cuda"
    return Group(
        name=f"attention/{kind}/{shape.name}",
        open=lambda: open_inputs(shape, kind, settings.device),
        providers=providers(kind, settings, compile_too),
        baselines=("eager", FLASH, CUDNN) if on_gpu else ("eager", SDPA),
        rounds=40 if on_gpu else 7,
        unit=kind if kind != "both" else "forward and backward",
        left_out=left_out,
    )


def test_attention(benchmark, replay):
    replay(benchmark)
