"""One training step of VPT-deep beside the plain ViT: forward, cross-entropy, backward to prompts
and head. On Swin every row is in the mean, as released; backbones with rotary positions (DINOv3,
EVA02) have their own readout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import pae
from pae.packs import can_pack

from . import shown
from .bench_step import REFERENCE, narrowed
from .memory import SavedBytes, own_bytes, peak_bytes, tensors_in
from .peers.swin import OfficialStyleSwin
from .rows import checked, errors
from .runner import Group, Provider, Runnable, Settings
from .shapes import CLASSES, random_batch

BASE, TINY = "swin_base_patch4_window7_224", "tiny_swin"
ROTATED = {"vit_base_patch16_dinov3": {"img_size": 224}, "eva02_base_patch14_224": {}}
OFFICIAL, FUSED = "official-style", "official-style, SDPA"
LIMITS = {"logits": 1e-5, "d_prompts": 1e-4}
BF16_FACTOR = 2.0  # of the first peer's own errors, which scatter: ten logits in the smoke test


@dataclass
class Step:
    """What all providers share: one frozen backbone, one set of prompts, one batch, and what the
    first of the peers makes of them in fp32.
    """

    model: pae.PromptedViT
    images: Tensor
    labels: Tensor
    dtype: str = "fp32"
    expected: dict[str, Tensor] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=lambda: dict(LIMITS))

    def peer(self, fused: bool) -> OfficialStyleSwin:
        rows = [rows for rows in self.model.prompts.raw_prompts() if rows is not None]
        return OfficialStyleSwin(self.model.backbone, rows, self.model.head, fused)

    def run(self, forward: Callable[[Tensor], Tensor], trained: nn.Module) -> list[Tensor]:
        """One step: logits, and the gradient of all prompts in one row."""
        for p in trained.parameters():
            p.grad = None
        with self.autocast():
            logits = forward(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        ours = isinstance(trained, pae.PromptedViT)
        each: Any = [trained.prompts.tokens] if ours else trained.prompts
        return [logits, torch.cat([p.grad.flatten() for p in each])]

    def autocast(self) -> AbstractContextManager:
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.images.device.type, torch.bfloat16)


@torch.no_grad()
def random_weights(name: str, device: torch.device) -> nn.Module:
    """A backbone whose attention is far from uniform."""
    if name == TINY:
        sizes = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)}
        module: nn.Module = SwinTransformer(**sizes, window_size=4, num_classes=10)
    else:
        module = timm.create_model(name, num_classes=CLASSES, **ROTATED.get(name, {}))
    generator = torch.Generator().manual_seed(0)
    for part, p in module.named_parameters():
        values = torch.randn(p.shape, generator=generator)
        if "norm" in part and part.endswith("weight"):
            p.copy_(1 + 0.1 * values)
        else:
            p.copy_(values * (p[0].numel() ** -0.5 if part.endswith("weight") else 0.02))
        if part.endswith("table"):
            p.copy_(values)
    return module.to(device)


def open_step(name: str, prompts: int, dtype: str, batch: int, device: torch.device) -> Step:
    module = random_weights(name, device)
    pool = "image" if name in ROTATED else "all"
    model = pae.PromptedViT(module, pae.prompts.VPTDeep(prompts), pool=pool).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        tokens = model.prompts.tokens
        tokens.copy_(torch.randn(tokens.shape, generator=generator))
    step = Step(model, *random_batch(module, model.num_classes, batch, device, generator))
    first = model if name in ROTATED else step.peer(fused=False)
    step.expected = dict(zip(LIMITS, (t.detach() for t in step.run(first, first))))
    if dtype != step.dtype:
        step.dtype = dtype
        own = errors(step.run(first, first), step.expected)
        step.limits = {of: BF16_FACTOR * error for of, error in own.items()}
    return step


def prepare(
    step: Step,
    trained: nn.Module,
    forward: Callable[[Tensor], Tensor] | None = None,
    packed: bool = False,
) -> Runnable:
    """`forward`: of the model `trained` in the fast engine, its own if None; `packed`: it packs."""
    dtype = torch.bfloat16 if step.dtype == "bf16" else None
    folded = [] if forward is None else list(tensors_in(step.model.plan(dtype)))
    weights = [*trained.parameters(), *trained.buffers(), *step.model.parameters()]
    work = partial(step.run, trained if forward is None else forward, trained)

    def check() -> dict[str, float]:
        constants = [] if forward else [*getattr(trained, "masks", {}).values()]
        with SavedBytes([*weights, *folded, *constants, step.images]) as saved:
            results = work()
        peak = peak_bytes(work, step.images.device) + own_bytes(folded, weights)
        if packed:
            peak += sum(packs.nbytes for packs in step.model.plan(dtype).packs)
        return checked(results, step.expected, step.limits) | {
            "saved_mb_per_image": saved.activations / len(step.images) / 1e6,
            "peak_mb": peak / 1e6,
            "images": float(len(step.images)),
        }

    return Runnable(work, check, dtype=step.dtype)


def ours(memory: str) -> Provider:
    def start(step: Step) -> Runnable:
        forward = lambda x: pae.fast_forward(step.model, x, memory=memory)
        return prepare(step, step.model, forward, memory == "packed")

    return Provider(f"pae {memory}", start)


def group(
    name: str, prompts: int, dtype: str, batch: int, settings: Settings, left_out: str = ""
) -> Group:
    rotated = name in ROTATED
    peers: dict[str, Callable[[Step], Any]] = {
        OFFICIAL: lambda step: step.peer(fused=False),
        FUSED: lambda step: step.peer(fused=True),
    }
    peers = {REFERENCE: lambda step: step.model} if rotated else peers
    if dtype == "bf16":
        peers |= {n + shown.NARROW: lambda s, of=of: narrowed(of(s)) for n, of in peers.items()}
    return Group(
        name=f"{'rotated' if rotated else 'swin'}/{name}/P{prompts}/{dtype}/B{batch}",
        open=lambda: open_step(name, prompts, dtype, batch, settings.device),
        providers=[
            *(Provider(n, lambda s, of=of: prepare(s, of(s))) for n, of in peers.items()),
            *([] if rotated else [Provider("textbook", lambda s: prepare(s, s.model))]),
            *map(ours, ("keep", "recompute", *(["packed"] if on_mkl(dtype, settings) else []))),
        ],
        baselines=tuple(peers),
        rounds=20 if settings.on_gpu else 4,
        unit="step",
        left_out=left_out,
        dtype=dtype,
    )


def on_mkl(dtype: str, settings: Settings) -> bool:
    """Whether `memory="packed"` is another mode than "keep" there."""
    return dtype == "fp32" and can_pack(torch.empty(0, device=settings.device))


def groups(settings: Settings) -> list[Group]:
    """Swin-B, DINOv3-B and EVA02-B with 50 prompts; with --full Swin-B also with 10 and 100."""
    if settings.size == "smoke":
        return [group(TINY, 5, dtype, 2, settings) for dtype in ("fp32", "bf16")]
    batch = settings.batch or (64 if settings.on_gpu else 4)
    cases = [(name, 50) for name in (BASE, *ROTATED)] + [(BASE, count) for count in (10, 100)]
    dtypes = ("bf16",) if settings.on_gpu else ("fp32", "bf16")
    return [
        group(name, count, dtype, batch, settings, settings.why_not_size(False, count == 50))
        for name, count in cases
        for dtype in dtypes
    ]


def test_backbones(benchmark, replay):
    replay(benchmark)
