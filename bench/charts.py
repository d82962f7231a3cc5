"""The benchmark suite in pictures: README's first figure, and step time and memory by scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from . import figures as style
from . import shown
from .results import Row, Run, first_with, measured, on_cpu, on_gpu
from .shown import Axis
from .table import label, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# provider -> what it is called in a figure, and its colour's role
LINES = {
    shown.OFFICIAL: ("official-style", "official"),
    shown.SDPA: ("timm + SDPA", "sdpa"),
    shown.COMPILED: ("torch.compile", "compile"),
    shown.LOW: ("pae recompute8", "pae recompute8"),
    shown.EXACT: ("pae", "pae"),
}
LINE = 0.075  # height of a name, as a share of the axes'

End = tuple[float, float, str, str]  # x, y, what is written there, colour


def figures(everything: list[Run]) -> dict[str, Callable[[], Figure]]:
    cpu, gpu = on_cpu(everything), on_gpu(everything)
    drawn: dict[str, Callable[[], Figure]] = {}
    if (run := shown.several_prompts(cpu)) is not None:
        drawn["hero"] = partial(hero, run, cpu)
    for run in gpu:
        if shown.several_prompts([run], "bf16"):
            drawn[run.figure("step")] = partial(step_by_prompts, run, "bf16")
    for run in filter(None, (first_with(cpu, shown.SCALING), *gpu)):
        for axis in shown.axes_of(run):
            drawn[run.figure(f"scaling_{axis.name}")] = partial(scaled, axis)
    return drawn


def hero(run: Run, chosen: list[Run]) -> Figure:
    """Time and memory of a step by the number of prompts; speed of PAE's own parts."""
    made, (*axes, parts) = style.figure(11.0, 3.2, 1, 3, width_ratios=(1.15, 1.15, 0.9))
    draw_steps(axes, shown.cases(run, "fp32"))
    draw_parts(parts, chosen)
    return made


def step_by_prompts(run: Run, dtype: str) -> Figure:
    """The same without PAE's parts."""
    made, axes = style.figure(8.2, 3.0, 1, 2)
    draw_steps(axes, shown.cases(run, dtype))
    return made


def draw_steps(both: Sequence[Axes], steps: dict[float, list[Row]]) -> None:
    unit = min(measured(rows)[shown.EXACT].median for rows in steps.values())
    ends = [
        draw_lines(both[0], steps, lambda row: row.median / unit, time_of),
        draw_lines(both[1], steps, saved, saved_of),
    ]
    for axes in both:
        axes.set_xticks(list(steps))
        axes.set_ylim(0)
    finish(both, ends, "prompts per block", "time, pae's shortest = 1")


def scaled(axis: Axis) -> Figure:
    """Time and saved memory of a step by one size: dots measured, dashes by the cost model."""
    made, both = style.figure(9.2, 2.9, 1, 2)
    by_place = axis.by_place()
    ends = [
        draw_lines(both[0], by_place, per_image, time_of, at_product_rate),
        draw_lines(both[1], by_place, saved, saved_of, modelled_saved, "o"),
    ]
    for axes, model in zip(both, ("FLOPs at the rate of one product", "cost model")):
        axes.plot([], [], "--", color=style.COLOURS["model"], linewidth=1.2, label=model)
        axes.legend()
        if axis.name == "model":
            labels = [label(group, ("scaling", axis.name)) for group in axis.groups]
            axes.set_xticks(list(by_place), labels, fontsize=7.5)
            axes.set_yscale("log")
        else:
            axes.set_xticks(apart(list(by_place)))
            axes.set_ylim(0)
    finish(both, ends, axis.title, "ms per image")
    return made


def finish(both: Sequence[Axes], ends: Sequence[list[End]], size: str, unit: str) -> None:
    """Titles of time, in `unit`, and memory by `size`; names at the ends of the lines."""
    both[0].set(title="Time of a training step", xlabel=size, ylabel=unit)
    both[1].set(title="Saved for backward", xlabel=size, ylabel="MB per image")
    for axes, of_lines in zip(both, ends):
        place_names(axes, of_lines)


def time_of(a: Row, b: Row) -> float:
    return a.times(b)[0]


def saved_of(a: Row, b: Row) -> float:
    return saved(a) / saved(b)


def per_image(row: Row) -> float:
    return row.median / row.columns["images"] * 1e3


def at_product_rate(row: Row) -> float | None:
    """Time that the row's counted FLOPs take at the rate of one large product."""
    if not {"model_gflop", "peak_tflops", "images"} <= set(row.columns):
        return None
    return row.columns["model_gflop"] / row.columns["peak_tflops"] / row.columns["images"]


def saved(row: Row) -> float:
    return row.columns["saved_mb_per_image"]


def modelled_saved(row: Row) -> float | None:
    return row.columns.get("model_saved_mb_per_image")


def draw_lines(
    axes: Axes,
    by_place: dict[float, list[Row]],
    value: Callable[[Row], float],
    compare: Callable[[Row, Row], float],
    model: Callable[[Row], float | None] = lambda row: None,
    line: str = "o-",
) -> list[End]:
    """A line per provider over the keys of `by_place`. Returns the ends of the lines, where the
    provider's name and how it compares there will stand.
    """
    ends, last = [], max(by_place)
    for provider, (name, role) in LINES.items():
        found = {x: measured(rows).get(provider) for x, rows in by_place.items()}
        here = {x: row for x, row in found.items() if row is not None}
        if len(here) < 2:
            continue
        colour = style.COLOURS[role]
        axes.plot(list(here), [value(row) for row in here.values()], line, color=colour)
        predicted = [m for row in here.values() if (m := model(row)) is not None]
        if len(predicted) == len(here):
            axes.plot(list(here), predicted, "--", color=colour, linewidth=1.2)
        if last in here and provider != shown.EXACT:
            # of pae at the same place, which the axis is not in
            name += f"  {ratio(compare(here[last], measured(by_place[last])[shown.EXACT]))} pae"
        ends.append((max(here), value(here[max(here)]), name, colour))
    return ends


def place_names(axes: Axes, ends: list[End]) -> None:
    """Each line's name right of its last point, moved apart where they would overlap. Scales and
    limits of `axes` must be what they will be.
    """
    to_share = axes.transScale + axes.transLimits  # data -> share of the axes' height
    ends = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for x, y, *_ in ends:
        lowest = heights[-1] + LINE if heights else 0.0
        heights.append(max(to_share.transform((x, y))[1], lowest))
    for i in range(len(heights)):  # and none above the axes
        heights[i] = min(heights[i], 1 - LINE * (len(heights) - 1 - i))
    for height, (x, _, name, colour) in zip(heights, ends):
        axes.annotate(
            name, (x, height), (6, 0), xycoords=("data", "axes fraction"),
            textcoords="offset points", color=colour, va="center", fontsize=8.5,
            fontweight="bold" if name.startswith("pae") else None, annotation_clip=False,
        )  # fmt: skip


def apart(values: Sequence[float]) -> list[float]:
    """Those of `values`, from the greatest down, whose numbers have room at an axis."""
    kept: list[float] = []
    for value in sorted(values, reverse=True):
        if not kept or kept[-1] - value > 0.05 * (max(values) - min(values)):
            kept.append(value)
    return kept[::-1]


def draw_parts(axes: Axes, chosen: list[Run]) -> None:
    """A bar per part of PAE: how many times as long the released formulation takes."""
    found = {words: speed for words, (_, speed) in shown.speeds(chosen).items()}
    places = range(len(found))
    axes.barh(places, list(found.values()), height=0.6, color=style.COLOURS["pae"])
    axes.axvline(1, color=style.COLOURS["official"], linewidth=1.5)
    for place, speed in zip(places, found.values()):
        axes.text(speed * 1.08, place, ratio(speed), va="center", fontweight="bold")
    axes.set_yticks(places, list(found))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.8, 2.2 * max(found.values(), default=1))
    axes.set_xticks([1, 3, 10, 30], ["1x", "3x", "10x", "30x"])
    axes.minorticks_off()
    axes.grid(axis="y", visible=False)
    axes.set(title="PAE's own parts", xlabel="times as fast as released")
