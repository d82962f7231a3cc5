"""One training step of VPT-deep, scaled one size at a time: prompts, batch, image, depth, model.

All sizes but one are those of `base`. Rows are those of `bench_step` with a cost model: its FLOPs
and kept bytes (`bench.cost`) stand in the columns beside what was measured, and the sizes with
them. Small sizes, where a step is launches and Python rather than products, are there on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from . import shapes
from .bench_step import OFFICIAL, REFERENCE, Case, Step, open_step, providers
from .runner import Group, Provider, Runnable, Settings

PROVIDERS = (OFFICIAL, REFERENCE, "pae keep", "pae recompute8")

# size -> values that every run but a quick one has, and those that only --full adds
CPU: dict[str, tuple[list, list]] = {
    "prompts": ([1, 5, 50, 200], [2, 20, 100]),
    "batch": ([1, 2, 4], [8, 16]),
    "image": ([96, 160, 224], [288, 384]),
    "depth": ([3, 6, 12], [18, 24]),
    "backbone": ([shapes.TINY, shapes.NARROW, shapes.SMALL], [shapes.BASE]),
}
GPU: dict[str, tuple[list, list]] = {
    "prompts": ([1, 5, 10, 50, 100, 200], [2, 20, 400]),
    "batch": ([1, 8, 64, 256], [2, 4, 16, 32, 128]),
    "image": ([96, 224, 384], [160, 288, 512]),
    "depth": ([6, 12, 24], [3, 18]),
    "backbone": ([shapes.NARROW, shapes.SMALL, shapes.BASE, shapes.LARGE], [shapes.TINY]),
}
NAMES = {
    "prompts": "prompts/P{}",
    "batch": "batch/B{}",
    "image": "image/{}px",
    "depth": "depth/L{}",
    "backbone": "model/{}",
}


def base(settings: Settings) -> Case:
    """The sizes that stay while one is changed."""
    if settings.size == "smoke":
        return Case(shapes.TINY, 5, "fp32", 2, 32)
    if settings.on_gpu:
        return Case(shapes.BASE, 50, "bf16", settings.batch or 64, 224)
    if settings.size == "full":
        return Case(shapes.SMALL, 50, "fp32", settings.batch or 4, 224)
    return Case(shapes.NARROW, 50, "fp32", settings.batch or 2, 224)


def scaled(settings: Settings) -> Iterator[tuple[str, Case, str]]:
    """Name, sizes and, where the chosen size of the run leaves it out, the reason."""
    values = {"prompts": ([1], []), "depth": ([2], [])}
    if settings.size != "smoke":
        values = GPU if settings.on_gpu else CPU
    for size, (few, more) in values.items():
        for value in few + more if size == "backbone" else sorted(few + more):
            case = base(settings)._replace(**{size: value})
            if value == shapes.TINY:
                case = case._replace(image=32)
            chosen = value in few
            left_out = settings.why_not_size(chosen and size == "prompts", chosen)
            yield NAMES[size].format(value), case, left_out


def with_sizes(provider: Provider, case: Case) -> Provider:
    """The provider of `bench_step`, the sizes of its case among its columns."""

    def start(step: Step) -> Runnable:
        runnable, shape = provider.start(step), step.shape
        sizes = {"prompts": case.prompts, "rows": shape.rows, "depth": shape.depth}
        sizes["width"] = shape.width
        columns = {name: float(size) for name, size in sizes.items()}
        return replace(runnable, check=lambda: runnable.check() | columns)

    return replace(provider, start=start)


def groups(settings: Settings) -> list[Group]:
    """All groups of this file; those outside the chosen size carry a reason."""
    rows = {p.name: p for p in providers(False, settings, base(settings).dtype)}
    return [
        Group(
            name=f"scaling/{name}",
            open=partial(open_step, case, settings.device),
            providers=[with_sizes(rows[provider], case) for provider in PROVIDERS],
            baselines=PROVIDERS[:2],
            rounds=20 if settings.on_gpu else 3,
            unit="step",
            left_out=left_out,
        )
        for name, case, left_out in scaled(settings)
    ]


def test_scaling(benchmark, replay):
    replay(benchmark)
