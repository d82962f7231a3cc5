"""One training step of VPT-deep: forward, cross-entropy, backward to prompts and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import pae

from . import cost, shapes, shown, steps
from .memory import own_bytes, peak_bytes
from .peers.vpt import OfficialStyleVPT
from .rows import attempt, compiled
from .runner import Group, Provider, Runnable, Settings
from .steps import DTYPES, OFFICIAL, REFERENCE, Step, gradient, ours, prepare

COMPILED_REFERENCE = shown.COMPILED
SLICE = 16  # images of the reference that are computed at one time


class Case(NamedTuple):
    """Sizes of one group; image and depth are the backbone's own unless given."""

    backbone: str
    prompts: int
    dtype: str
    batch: int
    image: int | None = None
    depth: int | None = None


def reference(step: Step) -> list[Tensor]:
    """Logits and gradients of the official-style step, slice by slice: in fp32 a whole batch of a
    large model may not fit.
    """
    official, logits = step.official, []
    official.prompts.grad = official.head.weight.grad = official.head.bias.grad = None
    for images, labels in zip(step.images.split(SLICE), step.labels.split(SLICE)):
        with step.autocast():
            logits.append(official(images))
        loss = F.cross_entropy(logits[-1].float(), labels, reduction="sum")
        (loss / len(step.images)).backward()
        logits[-1] = logits[-1].detach()
    return [torch.cat(logits), official.prompts.grad.clone()]


def open_step(case: Case, device: torch.device) -> Step:
    """Everything of a group, and in bf16 the errors that the official-style step shows itself."""
    changes = {"img_size": case.image, "depth": case.depth}
    given = {name: size for name, size in changes.items() if size is not None}
    vit = shapes.random_backbone(case.backbone, device, **given)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(case.prompts)).train()
    generator = steps.random_prompts(model)
    batch = shapes.random_batch(vit, model.num_classes, case.batch, device, generator)
    official = OfficialStyleVPT(vit, model.prompts.tokens, model.head)
    step = Step(model, *batch, official, cost.Shape.of(vit, model.num_classes))
    return step.judge_by(partial(reference, step), case.dtype)


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
    captured: list[Callable] = []

    def capture() -> None:
        with step.autocast():
            captured.append(pae.graphed_step(step.model, step.images, step.labels))

    peak = peak_bytes(capture, step.images.device)
    peak += own_bytes(step.folded(), [*step.model.parameters(), *step.model.buffers()])

    def check() -> dict[str, float]:
        _, logits = captured[0](step.images, step.labels)
        columns = step.checked(logits, gradient(step.model), "keep")
        return columns | {"peak_mb": peak / 1e6} | step.modelled(kept=False)

    return Runnable(lambda: captured[0](step.images, step.labels), check, dtype=step.dtype)


def providers(compile_too: bool, settings: Settings, dtype: str) -> list[Provider]:
    slow, slowest = settings.why_not_compile(compile_too), settings.why_not_compile(False)
    no_gpu, autotuned = settings.why_not_cuda(), partial(start_compiled, mode="max-autotune")
    more = [ours("recompute")] if settings.size in ("full", "smoke") else []
    peers = {OFFICIAL: lambda step: step.official, REFERENCE: lambda step: step.model}
    return [
        *steps.peers(peers, dtype),
        Provider(f"{REFERENCE} cuDNN", start_cudnn, left_out=no_gpu),
        Provider(COMPILED_REFERENCE, start_compiled, left_out=slow),
        Provider(f"{COMPILED_REFERENCE} max-autotune", autotuned, left_out=no_gpu or slowest),
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
