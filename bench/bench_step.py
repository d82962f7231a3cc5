"""One training step of VPT-deep: forward, cross-entropy, backward to prompts and head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import pae

from . import cost, shapes
from .memory import SavedBytes, own_bytes, peak_bytes, tensors_in
from .peers.vpt import OfficialStyleVPT
from .runner import Group, Provider, Runnable, Settings, Unavailable, relative

OFFICIAL, REFERENCE = "official-style", "timm + SDPA"
REFERENCE_CUDNN = "timm + SDPA cuDNN"
COMPILED_REFERENCE = "timm + SDPA, compiled"

# Norm-relative errors against the official-style fp32 step that a row may show: in fp32 the promise
# of `fast_forward` ("recompute8" keeps the activation's derivative in 8 bits), in bf16 so often
# what the official-style step loses under autocast (rounding alone scatters that by a third).
FP32_LIMITS = {"logits": 1e-5, "gradients": 1e-4}
FP32_LOW_LIMITS = {"logits": 1e-5, "gradients": 5e-3}
BF16_FACTOR = 1.5
DTYPES = ("fp32", "bf16")

# the groups that run torch.compile without --full: it takes a minute each
COMPILED = {"cpu": (shapes.BASE, 50, "fp32"), "cuda": (shapes.BASE, 50, "bf16")}
SLICE = 16  # images of the reference that are computed at one time


@dataclass
class Step:
    """What all providers of one group share: one frozen backbone, one set of prompts, one batch.

    expected holds "logits" and prompt "gradients" of the official-style fp32 step; limits the
    errors allowed, None meaning those of fp32.
    """

    model: pae.PromptedViT
    official: OfficialStyleVPT
    images: Tensor
    labels: Tensor
    dtype: str
    shape: cost.Shape
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

    def reference(self) -> dict[str, Tensor]:
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
        return {"logits": torch.cat(logits), "gradients": official.prompts.grad.clone()}

    def errors(self, logits: Tensor, gradients: Tensor) -> dict[str, float]:
        got = {"logits": logits, "gradients": gradients}
        return {what: relative(got[what], expected) for what, expected in self.expected.items()}

    @property
    def count(self) -> int:
        return self.model.prompts.num_tokens

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bf16" else 4

    def modelled(self, method: str, memory: str) -> dict[str, float]:
        """Columns that `bench.cost` predicts of a row."""
        at = self.shape, self.count, len(self.images), method, memory
        saved = cost.saved_bytes(*at, self.itemsize, self.images.device.type)
        return {
            "model_gflop": cost.flops(*at).step / 1e9,
            "model_saved_mb_per_image": saved / len(self.images) / 1e6,
        }

    def folded(self) -> list[Tensor]:
        """The frozen weights as the engine multiplies with them: copies, where they are folded."""
        return list(tensors_in(self.model.plan(torch.bfloat16 if self.dtype == "bf16" else None)))

    def autocast(self):
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.images.device.type, torch.bfloat16)


def open_step(
    name: str, prompts: int, batch: int, dtype: str, device: torch.device, **changes
) -> Step:
    """`changes`: options of the backbone that differ from its name's."""
    vit = shapes.random_backbone(name, device, **changes)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(prompts)).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.prompts.tokens.copy_(torch.randn(model.prompts.tokens.shape, generator=generator))
    size = vit.patch_embed.img_size
    images = torch.randn(batch, 3, *size, generator=generator).to(device)
    labels = torch.randint(model.num_classes, (batch,), generator=generator).to(device)
    official = OfficialStyleVPT(vit, model.prompts.tokens, model.head)
    step = Step(model, official, images, labels, "fp32", cost.Shape.of(vit, model.num_classes))
    step.expected = step.reference()
    if dtype == "bf16":
        step.dtype = dtype
        own = step.errors(**step.reference())
        step.limits = {what: BF16_FACTOR * error for what, error in own.items()}
    return step


def prepare(
    step: Step,
    forward: Callable[[Tensor], Tensor],
    official: bool = False,
    memory: str | None = None,
    compiled: bool = False,
) -> Runnable:
    """`memory`: the mode of a row that runs on the folded plan, None for the others. `compiled`: a
    compiler chooses what is kept, so no model of that is shown.
    """
    method = "official" if official else "pae" if memory else "sdpa"
    trained = step.official if official else step.model
    prompts = trained.prompts if official else trained.prompts.tokens
    folded = step.folded() if memory else []
    weights = [*trained.parameters(), *trained.buffers()]

    def check() -> dict[str, float]:
        with SavedBytes([*weights, *folded, step.images]) as saved:
            logits = step.run(forward, trained)
        columns = checked_columns(step, logits, prompts.grad, memory or "keep") | {
            "saved_mb_per_image": saved.activations / len(step.images) / 1e6,
            "weight_copies_mb": saved.weight_copies / 1e6,
            **step.modelled(method, memory or "keep"),
        }
        if compiled:
            del columns["model_saved_mb_per_image"]
        peak = peak_bytes(lambda: step.run(forward, trained), step.images.device)
        columns["peak_mb"] = (peak + own_bytes(folded, weights)) / 1e6
        return columns

    return Runnable(lambda: step.run(forward, trained), check, dtype=step.dtype)


def checked_columns(step: Step, logits: Tensor, gradients: Tensor, memory: str) -> dict[str, float]:
    """Columns of a row whose values are right; an AssertionError otherwise."""
    errors = step.errors(logits, gradients)
    fp32_limits = FP32_LOW_LIMITS if memory == "recompute8" else FP32_LIMITS
    for what, limit in (step.limits or fp32_limits).items():
        assert errors[what] <= limit, f"{what} are off by {errors[what]:.1e} > {limit:.1e}"
    return {
        "value_error": errors["logits"],
        "gradient_error": errors["gradients"],
        "live_gflop": cost.live_step_flops(step.shape, step.count, len(step.images)) / 1e9,
        "floor_mb": cost.live_step_bytes(step.shape, step.count, len(step.images), step.itemsize)
        / 1e6,
        "images": float(len(step.images)),
    }


def start_cudnn(step: Step) -> Runnable:
    """The reference with the attention kernels that are the fastest of PyTorch's on new GPUs."""

    def forward(images: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return step.model(images)

    try:
        step.run(forward, step.model)
    except RuntimeError as error:  # no such kernel for this device or dtype
        raise Unavailable.because("refused", error) from error
    return prepare(step, forward)


def start_compiled(step: Step, mode: str | None = None) -> Runnable:
    torch._dynamo.reset()
    compiled = torch.compile(step.model, mode=mode)
    try:
        step.run(compiled, step.model)
    except Exception as error:  # whatever stops the compiler is no fault of the step
        raise Unavailable.because("torch.compile", error) from error
    return prepare(step, compiled, compiled=True)


def start_graphed(step: Step) -> Runnable:
    """The step as one CUDA graph: a batch is copied in, and one launch runs it."""
    device, tokens = step.images.device, step.model.prompts.tokens
    steps = []

    def capture() -> None:
        with step.autocast():
            steps.append(pae.graphed_step(step.model, step.images, step.labels))

    peak = peak_bytes(capture, device)
    own = own_bytes(step.folded(), [*step.model.parameters(), *step.model.buffers()])

    def check() -> dict[str, float]:
        _, logits = steps[0](step.images, step.labels)
        columns = checked_columns(step, logits, tokens.grad, "keep")
        gflop = step.modelled("pae", "keep")["model_gflop"]
        return columns | {"peak_mb": (peak + own) / 1e6, "model_gflop": gflop}

    return Runnable(lambda: steps[0](step.images, step.labels), check, dtype=step.dtype)


def providers(compile_too: bool, settings: Settings) -> list[Provider]:
    def ours(memory: str) -> Provider:
        return Provider(
            f"pae {memory}",
            lambda step: prepare(
                step, lambda x: pae.fast_forward(step.model, x, memory=memory), memory=memory
            ),
        )

    slow, slowest = settings.why_not_compile(compile_too), settings.why_not_compile(False)
    no_gpu = settings.why_not_cuda()
    rows = [
        Provider(OFFICIAL, lambda step: prepare(step, step.official, official=True)),
        Provider(REFERENCE, lambda step: prepare(step, step.model)),
        Provider(REFERENCE_CUDNN, start_cudnn, left_out=no_gpu),
        Provider(COMPILED_REFERENCE, start_compiled, left_out=slow),
        Provider(
            "timm + SDPA, compiled max-autotune",
            lambda step: start_compiled(step, "max-autotune"),
            left_out=no_gpu or slowest,
        ),
        ours("keep"),
        ours("recompute8"),
    ]
    if settings.size in ("full", "smoke"):
        rows.append(ours("recompute"))
    rows.append(Provider("pae graphed", start_graphed, left_out=no_gpu))
    return rows


def groups(settings: Settings) -> list[Group]:
    """All groups of this file; those outside the chosen size carry a reason."""
    if settings.size == "smoke":
        return [group(shapes.TINY, 5, dtype, 2, settings) for dtype in DTYPES]
    cases, chosen = (gpu_cases if settings.device.type == "cuda" else cpu_cases)(settings.batch)
    return [
        group(
            *case,
            settings,
            "" if settings.size == "full" or case in chosen[settings.size] else "runs with --full",
        )
        for case in cases
    ]


Case = tuple[str, int, str, int]  # backbone, prompts, dtype, batch


def cpu_cases(batch: int | None) -> tuple[list[Case], dict[str, set[Case]]]:
    """All cases, and those of the smaller sizes: small batches, or nobody would wait for them, and
    fp32, as a CPU without bf16 arithmetic needs five times as long for it.
    """
    batch = batch or 2
    chosen = {
        "quick": {(shapes.BASE, 50, "fp32", batch)},
        "default": {(shapes.BASE, count, "fp32", batch) for count in (50, 100)},
    }
    cases = [
        (name, count, dtype, batch)
        for name in (shapes.SMALL, shapes.BASE)
        for dtype in DTYPES
        for count in ((10, 50, 100, 200) if dtype == "fp32" else (50, 100))
    ]
    return cases, chosen


def gpu_cases(batch: int | None) -> tuple[list[Case], dict[str, set[Case]]]:
    """bf16 autocast, the case that matters most first: a run that ends early has it."""
    main = (shapes.BASE, 50, "bf16", batch or 128)
    first = [
        main,
        *((shapes.BASE, 50, "bf16", size) for size in ([] if batch else [16, 64])),
        *((shapes.BASE, count, "bf16", batch or 128) for count in (10, 100, 200)),
        (shapes.SMALL, 50, "bf16", batch or 128),
        (shapes.LARGE, 50, "bf16", batch or 64),
    ]
    every = [
        (name, count, "bf16", size)
        for name in (shapes.SMALL, shapes.BASE, shapes.LARGE)
        for size in ([batch] if batch else [16, 64, 128])
        for count in (10, 50, 100, 200)
    ]
    return list(dict.fromkeys(first + every)), {"quick": {*first[:2]}, "default": {*first}}


def group(
    name: str, count: int, dtype: str, batch: int, settings: Settings, left_out: str = ""
) -> Group:
    on_gpu, small = settings.device.type == "cuda", batch < 128 and not settings.batch
    compile_too = (name, count, dtype) == COMPILED[settings.device.type] and not (on_gpu and small)
    if settings.size == "smoke":
        compile_too = dtype == "fp32"
    elif settings.size == "quick" and not on_gpu:
        compile_too = False
    return Group(
        name=f"step/{name}/P{count}/{dtype}/B{batch}",
        open=lambda: open_step(name, count, batch, dtype, settings.device),
        providers=providers(compile_too, settings),
        baselines=(OFFICIAL, REFERENCE, COMPILED_REFERENCE),
        rounds=20 if on_gpu else 7 if settings.size == "full" else 4,
        unit="step",
        left_out=left_out,
    )


def test_step(benchmark, replay):
    replay(benchmark)
