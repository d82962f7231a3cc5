"""One training step of VPT-deep: forward, cross-entropy, backward to prompts and head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pae

from . import peers, shapes
from .contest import Contestant, Group, Provider, Settings, Unavailable, relative
from .memory import SavedBytes, tensors_in

OFFICIAL, TEXTBOOK = "official-style", "timm + SDPA"

# Norm-relative errors against the official-style fp32 step that a row may show: in fp32 the promise
# of `fast_forward` ("low" keeps the activation's derivative in 8 bits), in bf16 so many times what
# the official-style step itself loses under autocast (rounding alone scatters that by a third).
FP32_LIMITS = {"logits": 1e-5, "gradients": 1e-4}
FP32_LOW_LIMITS = {"logits": 1e-5, "gradients": 5e-3}
BF16_FACTOR = 1.5

# the groups that run torch.compile without --full: it takes a minute each
COMPILED = {(shapes.BASE, 50, "fp32"), (shapes.TINY, 5, "fp32")}


@dataclass
class Step:
    """What all providers of one group share: one frozen backbone, one set of prompts, one batch.

    expected holds "logits" and prompt "gradients" of the official-style fp32 step; limits the
    errors allowed, None meaning those of fp32.
    """

    model: pae.PromptedViT
    official: peers.OfficialStyleVPT
    images: Tensor
    labels: Tensor
    dtype: str
    live_flops: float
    expected: dict[str, Tensor] = field(default_factory=dict)
    limits: dict[str, float] | None = None

    def run(self, forward: Callable[[Tensor], Tensor], trained: nn.Module) -> Tensor:
        """One step; returns the logits, leaves the gradients in `trained`."""
        for p in trained.parameters():
            p.grad = None
        with self.autocast():
            logits = forward(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        return logits

    def errors(self, logits: Tensor, gradients: Tensor) -> dict[str, float]:
        got = {"logits": logits, "gradients": gradients}
        return {what: relative(got[what], expected) for what, expected in self.expected.items()}

    def autocast(self):
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.images.device.type, torch.bfloat16)


def open_step(name: str, prompts: int, batch: int, dtype: str, device: torch.device) -> Step:
    vit = shapes.random_backbone(name, device)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(prompts)).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.prompts.tokens.copy_(torch.randn(model.prompts.tokens.shape, generator=generator))
    size = vit.patch_embed.img_size
    images = torch.randn(batch, 3, *size, generator=generator).to(device)
    labels = torch.randint(model.num_classes, (batch,), generator=generator).to(device)
    official = peers.OfficialStyleVPT(vit, model.prompts.tokens, model.head)
    live_flops = shapes.live_step_flops(vit, prompts, batch)
    step = Step(model, official, images, labels, "fp32", live_flops)
    logits = step.run(official, official).detach()
    step.expected = {"logits": logits, "gradients": official.prompts.grad}
    if dtype == "bf16":
        step.dtype = dtype
        own = step.errors(step.run(official, official), official.prompts.grad)
        step.limits = {what: BF16_FACTOR * error for what, error in own.items()}
    return step


def contestant(
    step: Step, forward: Callable[[Tensor], Tensor], official: bool = False, memory: str = "exact"
) -> Contestant:
    trained = step.official if official else step.model
    prompts = trained.prompts if official else trained.prompts.tokens

    def check() -> dict[str, float]:
        frozen = [*trained.parameters(), *trained.buffers(), step.images]
        if not official:
            dtype = torch.bfloat16 if step.dtype == "bf16" else None
            frozen += tensors_in(step.model.plan(dtype))
        with SavedBytes(frozen) as saved:
            logits = step.run(forward, trained)
        errors = step.errors(logits, prompts.grad)
        fp32_limits = FP32_LOW_LIMITS if memory == "low" else FP32_LIMITS
        for what, limit in (step.limits or fp32_limits).items():
            assert errors[what] <= limit, f"{what} are off by {errors[what]:.1e} > {limit:.1e}"
        batch = len(step.images)
        return {
            "value_error": errors["logits"],
            "gradient_error": errors["gradients"],
            "saved_mb_per_image": saved.activations / batch / 1e6,
            "weight_copies_mb": saved.weight_copies / 1e6,
            "live_gflop": step.live_flops / 1e9,
        }

    return Contestant(lambda: step.run(forward, trained), check)


def start_compiled(step: Step) -> Contestant:
    torch._dynamo.reset()
    compiled = torch.compile(step.model)
    try:
        step.run(compiled, step.model)
    except Exception as error:  # whatever stops the compiler is no fault of the step
        raise Unavailable.because("torch.compile", error) from error
    return contestant(step, compiled)


def providers(compile_too: bool, settings: Settings) -> list[Provider]:
    def ours(memory: str) -> Provider:
        return Provider(
            f"pae {memory}",
            lambda step: contestant(
                step, lambda x: pae.fast_forward(step.model, x, memory=memory), memory=memory
            ),
        )

    slow = settings.why_not_compile(compile_too)
    rows = [
        Provider(OFFICIAL, lambda step: contestant(step, step.official, official=True)),
        Provider(TEXTBOOK, lambda step: contestant(step, step.model)),
        Provider("timm + SDPA, compiled", start_compiled, left_out=slow),
        ours("exact"),
        ours("low"),
    ]
    if settings.size in ("full", "smoke"):
        rows.append(ours("lowest"))
    return rows


def groups(settings: Settings) -> list[Group]:
    """All groups of this file; those outside the chosen size carry a reason."""
    if settings.size == "smoke":
        return [group(shapes.TINY, 5, dtype, 2, settings) for dtype in ("fp32", "bf16")]
    chosen = {
        "quick": {(shapes.SMALL, 50, "fp32")},
        "default": {
            (shapes.SMALL, 50, "fp32"),
            *((shapes.BASE, count, dtype) for count in (50, 100) for dtype in ("fp32", "bf16")),
        },
    }
    cases = [
        (name, count, dtype)
        for name in (shapes.SMALL, shapes.BASE)
        for dtype in ("fp32", "bf16")
        for count in ((10, 50, 100, 200) if dtype == "fp32" else (50, 100))
    ]
    return [
        group(
            *case,
            settings.batch or 4,
            settings,
            "" if settings.size == "full" or case in chosen[settings.size] else "runs with --full",
        )
        for case in cases
    ]


def group(
    name: str, count: int, dtype: str, batch: int, settings: Settings, left_out: str = ""
) -> Group:
    return Group(
        name=f"step/{name}/P{count}/{dtype}/B{batch}",
        open=lambda: open_step(name, count, batch, dtype, settings.device),
        providers=providers((name, count, dtype) in COMPILED, settings),
        baselines=(OFFICIAL, TEXTBOOK),
        rounds=7 if settings.size == "full" else 4,
        unit="step",
        left_out=left_out,
    )


def test_step(benchmark, replay):
    replay(benchmark)
