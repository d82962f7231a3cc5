"""One training step of VPT-deep on Swin, every row in the mean as released: forward, cross-entropy,
backward to prompts and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import pae

from .memory import SavedBytes, own_bytes, peak_bytes, tensors_in
from .peers.swin import OfficialStyleSwin
from .rows import checked
from .runner import Group, Provider, Runnable, Settings
from .shapes import CLASSES, random_batch

BASE, TINY = "swin_base_patch4_window7_224", "tiny_swin"
OFFICIAL, FUSED = "official-style", "official-style, SDPA"
LIMITS = {"logits": 1e-5, "d_prompts": 1e-4}


@dataclass
class Step:
    """What all providers share: one frozen backbone, one set of prompts, one batch, and what the
    official-style step makes of them.
    """

    model: pae.PromptedViT
    images: Tensor
    labels: Tensor
    expected: dict[str, Tensor]

    def peer(self, fused: bool) -> OfficialStyleSwin:
        rows = [rows for rows in self.model.prompts.raw_prompts() if rows is not None]
        return OfficialStyleSwin(self.model.backbone, rows, self.model.head, fused)

    def run(self, forward: Callable[[Tensor], Tensor], trained: nn.Module) -> list[Tensor]:
        """One step: logits, and the gradient of all prompts in one row."""
        for p in trained.parameters():
            p.grad = None
        logits = forward(self.images)
        F.cross_entropy(logits, self.labels).backward()
        ours = isinstance(trained, pae.PromptedViT)
        each: Any = [trained.prompts.tokens] if ours else trained.prompts
        return [logits, torch.cat([p.grad.flatten() for p in each])]


@torch.no_grad()
def random_swin(name: str, device: torch.device) -> SwinTransformer:
    """A Swin whose attention is far from uniform."""
    if name == TINY:
        sizes = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)}
        swin = SwinTransformer(**sizes, window_size=4, num_classes=10)
    else:
        swin = timm.create_model(name, num_classes=CLASSES)
    generator = torch.Generator().manual_seed(0)
    for part, p in swin.named_parameters():
        values = torch.randn(p.shape, generator=generator)
        if "norm" in part and part.endswith("weight"):
            p.copy_(1 + 0.1 * values)
        else:
            p.copy_(values * (p[0].numel() ** -0.5 if part.endswith("weight") else 0.02))
        if part.endswith("table"):
            p.copy_(values)
    return swin.to(device)


def open_step(name: str, prompts: int, batch: int, device: torch.device) -> Step:
    swin = random_swin(name, device)
    model = pae.PromptedViT(swin, pae.prompts.VPTDeep(prompts), pool="all").train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        tokens = model.prompts.tokens
        tokens.copy_(torch.randn(tokens.shape, generator=generator))
    step = Step(model, *random_batch(swin, model.num_classes, batch, device, generator), {})
    official = step.peer(fused=False)
    step.expected = dict(zip(LIMITS, (t.detach() for t in step.run(official, official))))
    return step


def prepare(
    step: Step, trained: nn.Module, forward: Callable[[Tensor], Tensor] | None = None
) -> Runnable:
    """`forward`: of the model `trained` in the fast engine, its own if None."""
    folded = [] if forward is None else list(tensors_in(step.model.plan()))
    weights = [*trained.parameters(), *trained.buffers(), *step.model.parameters()]
    work = partial(step.run, trained if forward is None else forward, trained)

    def check() -> dict[str, float]:
        constants = [] if forward else [*getattr(trained, "masks", {}).values()]
        with SavedBytes([*weights, *folded, *constants, step.images]) as saved:
            results = work()
        peak = peak_bytes(work, step.images.device) + own_bytes(folded, weights)
        return checked(results, step.expected, LIMITS) | {
            "saved_mb_per_image": saved.activations / len(step.images) / 1e6,
            "peak_mb": peak / 1e6,
            "images": float(len(step.images)),
        }

    return Runnable(work, check)


def ours(memory: str) -> Provider:
    def start(step: Step) -> Runnable:
        forward = lambda x: pae.fast_forward(step.model, x, memory=memory)
        return prepare(step, step.model, forward)

    return Provider(f"pae {memory}", start)


def group(name: str, prompts: int, batch: int, settings: Settings, left_out: str = "") -> Group:
    peers = {OFFICIAL: False, FUSED: True}
    return Group(
        name=f"swin/{name}/P{prompts}/fp32/B{batch}",
        open=lambda: open_step(name, prompts, batch, settings.device),
        providers=[
            *(
                Provider(n, lambda step, fused=fused: prepare(step, step.peer(fused)))
                for n, fused in peers.items()
            ),
            Provider("textbook", lambda step: prepare(step, step.model)),
            *map(ours, ("keep", "recompute")),
        ],
        baselines=(OFFICIAL, FUSED),
        rounds=20 if settings.on_gpu else 4,
        unit="step",
        left_out=left_out,
        dtype="fp32",
    )


def groups(settings: Settings) -> list[Group]:
    """Swin-B with 50 prompts; with --full also 10 and 100."""
    if settings.size == "smoke":
        return [group(TINY, 5, 2, settings)]
    batch = settings.batch or (64 if settings.on_gpu else 4)
    return [
        group(BASE, count, batch, settings, settings.why_not_size(False, count == 50))
        for count in (50, 10, 100)
    ]


def test_swin(benchmark, replay):
    replay(benchmark)
