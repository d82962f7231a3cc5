"""A training step on one backbone by everybody: forward, cross-entropy, backward to prompts and
head. What `bench_step` and `bench_backbones` share.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pae

from . import cost, shown
from .memory import SavedBytes, own_bytes, peak_bytes, tensors_in
from .peers.vpt import OfficialStyleVPT
from .rows import checked, errors
from .runner import Provider, Runnable

OFFICIAL, REFERENCE = shown.OFFICIAL, shown.SDPA
DTYPES = ("fp32", "bf16")
# Norm-relative errors against the first peer's fp32 step that a row may show: in fp32 the promise
# of `fast_forward` ("recompute8" keeps the activation's derivative in 8 bits).
FP32_LIMITS = {"logits": 1e-5, "d_prompts": 1e-4}
RECOMPUTE8_LIMITS = {"logits": 1e-5, "d_prompts": 5e-3}
# In bf16, times the first peer's own errors. Those of right rows scatter about them: with one
# prompt, two images and two narrow blocks by up to 2.4 times in 60 draws, else by a third.
BF16_FACTOR = 3.0


@dataclass
class Step:
    """What all providers of one group share: one frozen backbone, one set of prompts, one batch.

    Attributes:
        official: the released formulation, where it is one module.
        shape: sizes for the cost model, where that knows the backbone.
        expected: "logits" and the prompts' gradient of the first peer's fp32 step.
        limits: the errors allowed, those of fp32 where there are none.
    """

    model: pae.PromptedViT
    images: Tensor
    labels: Tensor
    official: Any = None
    shape: cost.Shape | None = None
    dtype: str = "fp32"
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

    def first(self, trained: nn.Module) -> list[Tensor]:
        """Logits and gradients of the prompts of a step of this peer, for `judge_by`."""
        return [self.run(trained, trained).detach(), gradient(trained).clone()]

    def judge_by(self, first: Callable[[], list[Tensor]], dtype: str) -> Step:
        """In fp32 every row beside `first`; in bf16 too, by the error that `first` has itself under
        autocast.
        """
        self.expected = dict(zip(FP32_LIMITS, first()))
        if dtype != self.dtype:
            self.dtype = dtype
            own = errors(first(), self.expected)
            self.limits = {name: BF16_FACTOR * error for name, error in own.items()}
        return self

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bf16" else 4

    def checked(self, logits: Tensor, gradients: Tensor, memory: str) -> dict[str, float]:
        """Columns of a row whose values are right; an AssertionError otherwise."""
        limits = RECOMPUTE8_LIMITS if memory == "recompute8" else FP32_LIMITS
        columns = checked([logits, gradients], self.expected, self.limits or limits)
        if self.shape:
            sizes = self.shape, self.model.prompts.num_tokens, len(self.images)
            columns["live_gflop"] = cost.live_step_flops(*sizes) / 1e9
            columns["floor_mb"] = cost.live_step_bytes(*sizes, self.itemsize) / 1e6
        return columns | {"images": float(len(self.images))}

    def modelled(
        self, method: str = "pae", memory: str = "keep", kept: bool = True
    ) -> dict[str, float]:
        """What the cost model says of a row, of the bytes that it keeps if `kept`."""
        if not self.shape:
            return {}
        way = self.shape, self.model.prompts.num_tokens, len(self.images), method, memory
        columns = {"model_gflop": cost.flops(*way).step / 1e9}
        if kept:
            saved = cost.saved_bytes(*way, self.itemsize, self.images.device.type)
            columns["model_saved_mb_per_image"] = saved / len(self.images) / 1e6
        return columns

    def plan(self) -> Any:
        return self.model.plan(torch.bfloat16 if self.dtype == "bf16" else None)

    def folded(self) -> list[Tensor]:
        """The frozen weights as the engine multiplies with them: copies, where they are folded."""
        return list(tensors_in(self.plan()))

    def autocast(self) -> AbstractContextManager:
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.images.device.type, torch.bfloat16)


def gradient(trained: nn.Module) -> Tensor:
    """Of all prompts; of those of several widths in one row."""
    prompts: Any = trained.prompts
    tokens = prompts.tokens if isinstance(trained, pae.PromptedViT) else prompts
    if isinstance(tokens, nn.ParameterList):
        return torch.cat([p.grad.flatten() for p in tokens])
    return tokens.grad if tokens.dim() == 3 else tokens.grad.flatten()


def random_prompts(model: pae.PromptedViT) -> torch.Generator:
    """Draws prompts as if they were trained; returns what draws the batch."""
    generator = torch.Generator().manual_seed(1)
    tokens: Any = model.prompts.tokens
    with torch.no_grad():
        tokens.copy_(torch.randn(tokens.shape, generator=generator))
    return generator


def prepare(
    step: Step,
    trained: nn.Module,
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
    folded = step.folded() if memory else []
    weights = [*trained.parameters(), *trained.buffers()]
    # a compiled module is asked for its length where it stands for a truth value
    work = partial(step.run, trained if forward is None else forward, trained)

    def check() -> dict[str, float]:
        masks = getattr(trained, "masks", None)  # of a peer that makes them once, in its first step
        if masks is not None and not masks:
            work()
        with SavedBytes([*weights, *folded, *(masks or {}).values(), step.images]) as saved:
            logits = work()
        peak = peak_bytes(work, step.images.device) + own_bytes(folded, weights)
        if memory == "packed":
            peak += sum(packs.nbytes for packs in step.plan().packs)
        return {
            **step.checked(logits, gradient(trained), memory or ""),
            "saved_mb_per_image": saved.activations / len(step.images) / 1e6,
            "weight_copies_mb": saved.weight_copies / 1e6,
            **step.modelled(method, memory or "keep", not compiler),
            "peak_mb": peak / 1e6,
        }

    return Runnable(work, check, dtype=step.dtype)


def narrowed(model: nn.Module) -> nn.Module:
    """A copy whose frozen linears are stored in bf16, so that autocast casts no weight."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not layer.weight.requires_grad:
            layer.bfloat16()
    return model


# ---- rows


def peers(made: Mapping[str, Callable[[Step], nn.Module]], dtype: str) -> list[Provider]:
    """Each as it comes, and in bf16 each with its frozen linears stored so."""
    if dtype == "bf16":
        narrow = {n + shown.NARROW: lambda s, of=of: narrowed(of(s)) for n, of in made.items()}
        made = {**made, **narrow}
    return [Provider(n, lambda step, of=of: prepare(step, of(step))) for n, of in made.items()]


def ours(memory: str) -> Provider:
    def start(step: Step) -> Runnable:
        forward = lambda x: pae.fast_forward(step.model, x, memory=memory)
        return prepare(step, step.model, forward, memory=memory)

    return Provider(f"pae {memory}", start)
