"""One training step of VPT-deep: forward, cross-entropy, backward to prompts and head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import pae

from . import cost, shapes, shown
from .memory import SavedBytes, own_bytes, peak_bytes, tensors_in
from .peers.vpt import OfficialStyleVPT
from .rows import attempt, checked, compiled, errors
from .runner import Group, Provider, Runnable, Settings

OFFICIAL, REFERENCE = "official-style", "timm + SDPA"
COMPILED_REFERENCE = "timm + SDPA, compiled"
DTYPES = ("fp32", "bf16")

# Norm-relative errors against the official-style fp32 step that a row may show: in fp32 the promise
# of `fast_forward` ("recompute8" keeps the activation's derivative in 8 bits), in bf16 so often
# what the official-style step loses under autocast (rounding alone scatters that by a third).
FP32_LIMITS = {"logits": 1e-5, "d_prompts": 1e-4}
RECOMPUTE8_LIMITS = {"logits": 1e-5, "d_prompts": 5e-3}
BF16_FACTOR = 1.5
SLICE = 16  # images of the reference that are computed at one time


class Case(NamedTuple):
    """Sizes of one group; image and depth are the backbone's own unless given."""

    backbone: str
    prompts: int
    dtype: str
    batch: int
    image: int | None = None
    depth: int | None = None


@dataclass
class Step:
    """What all providers of one group share: one frozen backbone, one set of prompts, one batch.

    expected holds "logits" and the prompts' gradient of the official-style fp32 step; limits the
    errors allowed, empty meaning those of fp32.
    """

    model: pae.PromptedViT
    official: OfficialStyleVPT
    images: Tensor
    labels: Tensor
    dtype: str
    shape: cost.Shape
    expected: dict[str, Tensor] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    def run(self, forward: Callable[[Tensor], Tensor], trained: nn.Module) -> Tensor:
        """One step; returns the logits, leaves the gradients in `trained`."""
        for p in trained.parameters():
            p.grad = None
        with self.autocast():
            logits = forward(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        return logits

    def reference(self) -> list[Tensor]:
        """Logits and gradients of the official-style step, slice by slice: in fp32 a whole batch
        of a large model may not fit.
        """
        official, logits = self.official, []
        official.prompts.grad = official.head.weight.grad = official.head.bias.grad = None
        for images, labels in zip(self.images.split(SLICE), self.labels.split(SLICE)):
            with self.autocast():
                logits.append(official(images))
            loss = F.cross_entropy(logits[-1].float(), labels, reduction="sum")
            (loss / len(self.images)).backward()
            logits[-1] = logits[-1].detach()
        return [torch.cat(logits), official.prompts.grad.clone()]

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bf16" else 4

    def sizes(self) -> tuple[cost.Shape, int, int]:
        """What the cost model asks for first."""
        return self.shape, self.model.prompts.num_tokens, len(self.images)

    def checked(self, logits: Tensor, gradients: Tensor, memory: str) -> dict[str, float]:
        """Columns of a row whose values are right; an AssertionError otherwise."""
        limits = RECOMPUTE8_LIMITS if memory == "recompute8" else FP32_LIMITS
        return checked([logits, gradients], self.expected, self.limits or limits) | {
            "live_gflop": cost.live_step_flops(*self.sizes()) / 1e9,
            "floor_mb": cost.live_step_bytes(*self.sizes(), self.itemsize) / 1e6,
            "images": float(len(self.images)),
        }

    def folded(self) -> list[Tensor]:
        """The frozen weights as the engine multiplies with them: copies, where they are folded."""
        return list(tensors_in(self.model.plan(torch.bfloat16 if self.dtype == "bf16" else None)))

    def autocast(self) -> AbstractContextManager:
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.images.device.type, torch.bfloat16)


def open_step(case: Case, device: torch.device) -> Step:
    """Everything of a group, and in bf16 the errors that the official-style step shows itself."""
    changes = {"img_size": case.image, "depth": case.depth}
    given = {name: size for name, size in changes.items() if size is not None}
    vit = shapes.random_backbone(case.backbone, device, **given)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(case.prompts)).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.prompts.tokens.copy_(torch.randn(model.prompts.tokens.shape, generator=generator))
    batch = shapes.random_batch(vit, model.num_classes, case.batch, device, generator)
    official = OfficialStyleVPT(vit, model.prompts.tokens, model.head)
    step = Step(model, official, *batch, "fp32", cost.Shape.of(vit, model.num_classes))
    step.expected = dict(zip(FP32_LIMITS, step.reference()))
    if case.dtype == "bf16":
        step.dtype = case.dtype
        own = errors(step.reference(), step.expected)
        step.limits = {name: BF16_FACTOR * error for name, error in own.items()}
    return step


def prepare(
    step: Step,
    trained: OfficialStyleVPT | pae.PromptedViT,
    forward: Callable[[Tensor], Tensor] | None = None,
    memory: str | None = None,
    compiler: bool = False,
) -> Runnable:
    """`forward`: of the model `trained`, its own if None. `memory`: the mode of a row that runs on
    the folded plan, None for the others. `compiler`: it chooses what is kept, so no model of that
    is shown.
    """
    official = isinstance(trained, OfficialStyleVPT)
    method = "official" if official else "pae" if memory else "sdpa"
    prompts = trained.prompts if official else trained.prompts.tokens
    folded, memory = step.folded() if memory else [], memory or "keep"
    weights = [*trained.parameters(), *trained.buffers()]
    # a compiled module is asked for its length where it stands for a truth value
    work = partial(step.run, trained if forward is None else forward, trained)
    device, mb_per_image = step.images.device, len(step.images) * 1e6

    def check() -> dict[str, float]:
        with SavedBytes([*weights, *folded, step.images]) as saved:
            logits = work()
        columns = step.checked(logits, prompts.grad, memory) | {
            "saved_mb_per_image": saved.activations / mb_per_image,
            "weight_copies_mb": saved.weight_copies / 1e6,
            "model_gflop": cost.flops(*step.sizes(), method, memory).step / 1e9,
        }
        if not compiler:
            kept = cost.saved_bytes(*step.sizes(), method, memory, step.itemsize, device.type)
            columns["model_saved_mb_per_image"] = kept / mb_per_image
        columns["peak_mb"] = (peak_bytes(work, device) + own_bytes(folded, weights)) / 1e6
        return columns

    return Runnable(work, check, dtype=step.dtype)


def narrowed(model: nn.Module) -> nn.Module:
    """A copy whose frozen linears are stored in bf16, so that autocast casts no weight."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not layer.weight.requires_grad:
            layer.bfloat16()
    return model


def start_cudnn(step: Step) -> Runnable:
    """The reference with the attention kernels that are the fastest of PyTorch's on new GPUs."""

    def forward(images: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return step.model(images)

    attempt("refused", lambda: step.run(forward, step.model))  # no kernel for this device or dtype
    return prepare(step, step.model, forward)


def start_compiled(step: Step, mode: str | None = None) -> Runnable:
    forward = compiled(step.model, lambda forward: step.run(forward, step.model), mode=mode)
    return prepare(step, step.model, forward, compiler=True)


def start_graphed(step: Step) -> Runnable:
    """The step as one CUDA graph: a batch is copied in, and one launch runs it."""
    steps: list[Callable] = []

    def capture() -> None:
        with step.autocast():
            steps.append(pae.graphed_step(step.model, step.images, step.labels))

    peak = peak_bytes(capture, step.images.device)
    peak += own_bytes(step.folded(), [*step.model.parameters(), *step.model.buffers()])

    def check() -> dict[str, float]:
        _, logits = steps[0](step.images, step.labels)
        return step.checked(logits, step.model.prompts.tokens.grad, "keep") | {
            "peak_mb": peak / 1e6,
            "model_gflop": cost.flops(*step.sizes()).step / 1e9,
        }

    return Runnable(lambda: steps[0](step.images, step.labels), check, dtype=step.dtype)


def ours(memory: str) -> Provider:
    def start(step: Step) -> Runnable:
        forward = lambda x: pae.fast_forward(step.model, x, memory=memory)
        return prepare(step, step.model, forward, memory=memory)

    return Provider(f"pae {memory}", start)


def providers(compile_too: bool, settings: Settings, dtype: str) -> list[Provider]:
    slow, slowest = settings.why_not_compile(compile_too), settings.why_not_compile(False)
    no_gpu, autotuned = settings.why_not_cuda(), partial(start_compiled, mode="max-autotune")
    more = [ours("recompute")] if settings.size in ("full", "smoke") else []
    peers = {OFFICIAL: lambda step: step.official, REFERENCE: lambda step: step.model}
    if dtype == "bf16":
        peers |= {
            n + shown.NARROW: lambda step, of=of: narrowed(of(step)) for n, of in peers.items()
        }
    return [
        *(Provider(n, lambda step, of=of: prepare(step, of(step))) for n, of in peers.items()),
        Provider("timm + SDPA cuDNN", start_cudnn, left_out=no_gpu),
        Provider(COMPILED_REFERENCE, start_compiled, left_out=slow),
        Provider("timm + SDPA, compiled max-autotune", autotuned, left_out=no_gpu or slowest),
        ours("keep"),
        ours("recompute8"),
        *more,
        Provider("pae graphed", start_graphed, left_out=no_gpu),
    ]


def cases(settings: Settings) -> Iterator[tuple[Case, bool, bool]]:
    """Every case, whether --quick has it and whether a run by default has it.

    On a CPU both dtypes, in batches for which somebody would wait, the demo's task first. On a GPU
    bf16 autocast, the case that matters most first: a run that ends early has it.
    """
    batch = settings.batch
    if not settings.on_gpu:
        for dtype in DTYPES:
            yield Case(shapes.DEMO, 10, dtype, batch or 16, 112), True, True
        for count in (50, 10, 100, 200):
            for dtype in DTYPES:
                yield Case(shapes.BASE, count, dtype, batch or 4), False, count == 50
        return
    first = [
        *(Case(shapes.BASE, 50, "bf16", size) for size in ([batch] if batch else [128, 16, 64])),
        *(Case(shapes.BASE, count, "bf16", batch or 128) for count in (10, 100, 200)),
        Case(shapes.SMALL, 50, "bf16", batch or 128),
        Case(shapes.LARGE, 50, "bf16", batch or 64),
    ]
    every = [
        Case(name, count, "bf16", size)
        for name in (shapes.SMALL, shapes.BASE, shapes.LARGE)
        for size in ([batch] if batch else [16, 64, 128])
        for count in (10, 50, 100, 200)
    ]
    for case in dict.fromkeys(first + every):
        yield case, case in first[:2], case in first


def groups(settings: Settings) -> list[Group]:
    """All groups of this file; those outside the chosen size carry a reason."""
    if settings.size == "smoke":
        return [group(Case(shapes.TINY, 5, dtype, 2), settings) for dtype in DTYPES]
    return [
        group(case, settings, settings.why_not_size(quick, default))
        for case, quick, default in cases(settings)
    ]


def group(case: Case, settings: Settings, left_out: str = "") -> Group:
    # one group runs torch.compile without --full: it takes a minute each
    compile_too = case[:3] == (shapes.BASE, 50, "bf16" if settings.on_gpu else "fp32")
    if settings.size == "smoke":
        compile_too = case.dtype == "fp32"
    elif settings.on_gpu:
        compile_too &= case.batch >= 128 or settings.batch is not None
    else:
        compile_too &= settings.size != "quick"
    image = f"{case.image}px/" if case.image else ""
    return Group(
        name=f"step/{case.backbone}/{image}P{case.prompts}/{case.dtype}/B{case.batch}",
        open=lambda: open_step(case, settings.device),
        providers=providers(compile_too, settings, case.dtype),
        baselines=(OFFICIAL, REFERENCE, COMPILED_REFERENCE),
        rounds=20 if settings.on_gpu else 7 if settings.size == "full" else 4,
        unit="step",
        left_out=left_out,
        dtype=case.dtype,
    )


def test_step(benchmark, replay):
    replay(benchmark)
