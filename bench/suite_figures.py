"""The benchmark suite in pictures: README's first figure, and step time and memory by scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from . import figures as style
from . import suite, suite_pages, suite_scaling
from .suite import Run
from .suite_pages import COMPILED, EXACT, LOW, OFFICIAL, SDPA
from .suite_tables import label, ratio
from .table import Row

# provider -> what it is called in a figure, and its colour's role
LINES = {
    OFFICIAL: ("official-style", "official"),
    SDPA: ("timm + SDPA", "sdpa"),
    COMPILED: ("torch.compile", "compile"),
    LOW: ("pae recompute8", "pae recompute8"),
    EXACT: ("pae", "pae"),
}
# what PAE adds to a step: claim's name -> a reader's words
PARTS = {
    "kld 256": "regulariser, k = 256",
    "kld 1024": "regulariser, k = 1024",
    "filter": "filter of MPA",
    "mpa ranking": "ranking of MPA",
    "mpa": "whole MPA",
}


LINE = 0.075  # height of a name, as a share of the axes'


def figures(everything: list[Run]) -> dict[str, Callable]:
    cpu, gpu = suite.on_cpu(everything), suite.on_gpu(everything)
    drawn = {}
    if (run := suite_pages.several_prompts(cpu)) is not None:
        drawn["hero"] = partial(hero, run, cpu)
    for run in gpu:
        if suite_pages.several_prompts([run], "bf16"):
            drawn[run.figure("step")] = partial(step_by_prompts, run, "bf16")
    for run in filter(None, (suite.first_with(cpu, suite_scaling.PREFIX), *gpu)):
        for axis in suite_scaling.axes_of(run):
            drawn[run.figure(f"scaling_{axis.name}")] = partial(scaled, axis)
    return drawn


def hero(run: Run, chosen: list[Run]):
    """Time and memory of a step by the number of prompts; speed of PAE's own parts."""
    made, (time, memory, parts) = style.figure(10.4, 3.2, 1, 3, width_ratios=(1.15, 1.15, 0.8))
    draw_steps(time, memory, suite_pages.cases(run, suite_pages.STEP, "fp32"))
    draw_parts(parts, chosen)
    return made


def step_by_prompts(run: Run, dtype: str):
    """The same without PAE's parts."""
    made, (time, memory) = style.figure(8.2, 3.0, 1, 2)
    draw_steps(time, memory, suite_pages.cases(run, suite_pages.STEP, dtype))
    return made


def draw_steps(time, memory, steps: dict[int, list[Row]]) -> None:
    unit = min(suite.median(suite.measured(rows)[EXACT]) for rows in steps.values())
    ends = {
        time: draw_lines(time, steps, lambda row: suite.median(row) / unit, time_of),
        memory: draw_lines(memory, steps, saved, saved_of),
    }
    time.set(title="Time of a training step", ylabel="fastest of pae = 1")
    memory.set(title="Saved for backward", ylabel="MB per image")
    for axes in ends:
        axes.set_xlabel("prompts per block")
        axes.set_xticks(list(steps))
        axes.set_ylim(0)
        place_names(axes, ends[axes])


def scaled(axis: suite_scaling.Axis):
    """Time and saved memory of a step by one size: dots measured, dashes by the cost model."""
    made, (time, memory) = style.figure(9.2, 2.9, 1, 2)
    places = {group: axis.place(group) for group in axis.groups}
    if None in places.values():  # names: at equal distances, over several magnitudes
        places = {group: float(i) for i, group in enumerate(places)}
    cases = {places[group]: axis.groups[group] for group in sorted(places, key=places.get)}
    ends = {
        time: draw_lines(time, cases, per_image, time_of, at_product_rate),
        memory: draw_lines(memory, cases, saved, saved_of, modelled_saved, "o"),
    }
    time.set(title="Time of a training step", ylabel="ms per image")
    memory.set(title="Saved for backward", ylabel="MB per image")
    for axes, model in ((time, "FLOPs at the rate of one product"), (memory, "cost model")):
        axes.plot([], [], "--", color=style.COLOURS["model"], linewidth=1.2, label=model)
        axes.legend()
        axes.set_xlabel(axis.title)
        if axis.name == "model":
            labels = [label(g, ("scaling", axis.name)) for g in axis.groups]
            axes.set_xticks(list(cases), labels, fontsize=7.5)
            axes.set_yscale("log")
        else:
            axes.set_xticks(apart(list(cases)))
            axes.set_ylim(0)
        place_names(axes, ends[axes])
    return made


def time_of(a: Row, b: Row) -> float:
    return suite.times(a, b)[0]


def saved_of(a: Row, b: Row) -> float:
    return saved(a) / saved(b)


def per_image(row: Row) -> float:
    return suite.median(row) / row.columns["images"] * 1e3


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
    axes,
    cases: dict[float, Sequence[Row]],
    value: Callable[[Row], float],
    compare: Callable[[Row, Row], float],
    model: Callable[[Row], float | None] = lambda row: None,
    line: str = "o-",
) -> list[tuple[float, float, str, str]]:
    """A line per provider over the keys of `cases`. Returns the ends: x, y, the provider's name
    and how it compares there, colour.
    """
    ends, last = [], max(cases)
    for provider, (name, role) in LINES.items():
        rows = {x: suite.measured(case).get(provider) for x, case in cases.items()}
        rows = {x: row for x, row in rows.items() if row is not None}
        if len(rows) < 2:
            continue
        colour = style.COLOURS[role]
        axes.plot(list(rows), [value(row) for row in rows.values()], line, color=colour)
        predicted = [model(row) for row in rows.values()]
        if None not in predicted:
            axes.plot(list(rows), predicted, "--", color=colour, linewidth=1.2)
        if last in rows and provider != EXACT:
            against = compare(rows[last], suite.measured(cases[last])[EXACT])
            name += f"  {ratio(against)}"
        ends.append((max(rows), value(rows[max(rows)]), name, colour))
    return ends


def place_names(axes, ends: list[tuple[float, float, str, str]]) -> None:
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


def draw_parts(axes, chosen: list[Run]) -> None:
    """A bar per part of PAE: how many times as long the released formulation takes."""
    speeds = {words: suite_pages.speed(chosen, name) for name, words in PARTS.items()}
    speeds = {words: speed for words, speed in speeds.items() if speed is not None}
    places = range(len(speeds))
    axes.barh(places, list(speeds.values()), height=0.6, color=style.COLOURS["pae"])
    axes.axvline(1, color=style.COLOURS["official"], linewidth=1.5)
    for place, speed in zip(places, speeds.values()):
        axes.text(speed * 1.08, place, ratio(speed), va="center", fontweight="bold")
    axes.set_yticks(places, list(speeds))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.8, 2.2 * max(speeds.values(), default=1))
    axes.set_xticks([1, 3, 10, 30], ["1x", "3x", "10x", "30x"])
    axes.minorticks_off()
    axes.grid(axis="y", visible=False)
    axes.set(title="PAE's own parts", xlabel="times as fast as released")
