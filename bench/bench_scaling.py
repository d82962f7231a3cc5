"""One training step of VPT-deep, scaled one size at a time: prompts, batch, image, depth, model.

All sizes but one are those of `base`. Rows are those of `bench_step` with a cost model: its FLOPs
and kept bytes (`bench.cost`) stand in the columns beside what was measured, and the sizes with
them. Small sizes, where a step is launches and Python rather than products, are there on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from . import bench_step, shapes
from .runner import Group, Provider, Runnable, Settings

PROVIDERS = (bench_step.OFFICIAL, bench_step.REFERENCE, "pae keep", "pae recompute8")


@dataclass(frozen=True)
class Case:
    """Sizes of one group; depth None is the backbone's own."""

    backbone: str
    prompts: int
    batch: int
    image: int
    dtype: str
    depth: int | None = None

    def open(self, device: torch.device) -> bench_step.Step:
        changes = {"img_size": self.image}
        if self.depth is not None:
            changes["depth"] = self.depth
        return bench_step.open_step(
            self.backbone, self.prompts, self.batch, self.dtype, device, **changes
        )


# axis -> values that every run but a quick one has, and those that only --full adds
Axes = dict[str, tuple[list, list]]

CPU: Axes = {
    "prompts": ([1, 5, 50, 200], [2, 20, 100]),
    "batch": ([1, 2, 4], [8, 16]),
    "image": ([96, 160, 224], [288, 384]),
    "depth": ([3, 6, 12], [18, 24]),
    "model": ([shapes.TINY, shapes.NARROW, shapes.SMALL], [shapes.BASE]),
}
GPU: Axes = {
    "prompts": ([1, 5, 10, 50, 100, 200], [2, 20, 400]),
    "batch": ([1, 8, 64, 256], [2, 4, 16, 32, 128]),
    "image": ([96, 224, 384], [160, 288, 512]),
    "depth": ([6, 12, 24], [3, 18]),
    "model": ([shapes.NARROW, shapes.SMALL, shapes.BASE, shapes.LARGE], [shapes.TINY]),
}


def base(settings: Settings) -> Case:
    """The sizes that stay while one is changed."""
    if settings.size == "smoke":
        return Case(shapes.TINY, 5, 2, 32, "fp32")
    if settings.device.type == "cuda":
        return Case(shapes.BASE, 50, settings.batch or 64, 224, "bf16")
    if settings.size == "full":
        return Case(shapes.SMALL, 50, settings.batch or 4, 224, "fp32")
    return Case(shapes.NARROW, 50, settings.batch or 2, 224, "fp32")


def scaled(settings: Settings) -> Iterator[tuple[str, Case, str]]:
    """Name, sizes and, where the chosen size of the run leaves it out, the reason."""
    start = base(settings)
    if settings.size == "smoke":
        yield "prompts/P1", replace(start, prompts=1), ""
        yield "depth/L2", replace(start, depth=2), ""
        return
    on_gpu = settings.device.type == "cuda"
    names = {
        "prompts": lambda count: (f"P{count}", replace(start, prompts=count)),
        "batch": lambda size: (f"B{size}", replace(start, batch=size)),
        "image": lambda side: (f"{side}px", replace(start, image=side)),
        "depth": lambda depth: (f"L{depth}", replace(start, depth=depth)),
        "model": lambda name: (
            name,
            replace(start, backbone=name, image=32 if name == shapes.TINY else start.image),
        ),
    }
    for axis, (few, more) in (GPU if on_gpu else CPU).items():
        for value in few + more if axis == "model" else sorted(few + more):
            label, case = names[axis](value)
            left_out = "" if settings.size == "full" or value in few else "runs with --full"
            if settings.size == "quick" and axis != "prompts":
                left_out = "runs without --quick"
            yield f"{axis}/{label}", case, left_out


def with_sizes(provider: Provider, case: Case) -> Provider:
    """The provider of `bench_step`, the sizes of its case among its columns."""

    def start(step: bench_step.Step) -> Runnable:
        runnable = provider.start(step)
        sizes = {
            "prompts": float(case.prompts),
            "rows": float(step.shape.rows),
            "depth": float(step.shape.depth),
            "width": float(step.shape.width),
        }
        return replace(runnable, check=lambda: runnable.check() | sizes)

    return replace(provider, start=start)


def groups(settings: Settings) -> list[Group]:
    """All groups of this file; those outside the chosen size carry a reason."""
    rows = {p.name: p for p in bench_step.providers(False, settings)}
    return [
        Group(
            name=f"scaling/{name}",
            open=partial(case.open, settings.device),
            providers=[with_sizes(rows[provider], case) for provider in PROVIDERS],
            baselines=PROVIDERS[:2],
            rounds=20 if settings.device.type == "cuda" else 3,
            unit="step",
            left_out=left_out,
        )
        for name, case, left_out in scaled(settings)
    ]


def test_scaling(benchmark, replay):
    replay(benchmark)
