"""The benchmark suite in pictures: README's first figure, and step time and memory by scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import figures as style
from . import suite, suite_tables
from .suite import Run
from .suite_tables import COMPILED, EXACT, LOW, OFFICIAL, SDPA
from .table import Row

# provider -> what it is called in a figure, and its colour's role
LINES = {
    OFFICIAL: ("official-style", "official"),
    SDPA: ("timm + SDPA", "sdpa"),
    COMPILED: ("torch.compile", "compile"),
    LOW: ("pae low", "pae low"),
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


def figures(everything: list[Run]) -> dict[str, Callable]:
    cpu = suite.on_cpu(everything)
    run = suite_tables.several_prompts(cpu)
    return {} if run is None else {"hero": lambda: hero(run, cpu)}


def hero(run: Run, chosen: list[Run]):
    """Time and memory of a step by the number of prompts; speed of PAE's own parts."""
    steps = suite_tables.cases(run, suite_tables.STEP, "fp32")
    made, (time, memory, parts) = style.figure(10.4, 3.2, 1, 3, width_ratios=(1.15, 1.15, 0.8))
    unit = min(suite.median(suite.measured(rows)[EXACT]) for rows in steps.values())
    draw_lines(time, steps, lambda row: suite.median(row) / unit, lambda a, b: suite.times(a, b)[0])
    draw_lines(memory, steps, saved, lambda a, b: saved(a) / saved(b))
    time.set(title="Time of a training step", ylabel=f"pae with {min(steps)} prompts = 1")
    memory.set(title="Kept for backward", ylabel="MB per image")
    for axes in (time, memory):
        axes.set_xlabel("prompts per block")
        axes.set_xticks(list(steps))
        axes.set_ylim(0)
    draw_parts(parts, chosen)
    return made


def saved(row: Row) -> float:
    return row.columns["saved_mb_per_image"]


def draw_lines(
    axes,
    cases: dict[float, Sequence[Row]],
    value: Callable[[Row], float],
    compare: Callable[[Row, Row], float],
) -> None:
    """A line per provider over the keys of `cases`; at its end its name and how it compares."""
    ends, last = [], max(cases)
    for provider, (name, role) in LINES.items():
        rows = {x: suite.measured(case).get(provider) for x, case in cases.items()}
        rows = {x: row for x, row in rows.items() if row is not None}
        if len(rows) < 2:
            continue
        axes.plot(list(rows), [value(r) for r in rows.values()], "o-", color=style.COLOURS[role])
        if last in rows and provider != EXACT:
            name += (
                f"  {suite_tables.ratio(compare(rows[last], suite.measured(cases[last])[EXACT]))}"
            )
        ends.append((max(rows), value(rows[max(rows)]), name, style.COLOURS[role]))
    place_names(axes, ends)


def place_names(axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Each line's name right of its last point, moved apart where they would overlap."""
    axes.margins(x=0.06)
    axes.autoscale_view()
    low, high = axes.get_ylim()
    step = 0.075 * (high - min(0, low))
    y_before = None
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        y_text = y if y_before is None else max(y, y_before + step)
        axes.annotate(
            name, (x, y_text), (6, 0), textcoords="offset points", color=colour, va="center",
            fontsize=8.5, fontweight="bold" if name.startswith("pae") else None,
            annotation_clip=False,
        )  # fmt: skip
        y_before = y_text


def draw_parts(axes, chosen: list[Run]) -> None:
    """A bar per part of PAE: how many times as long the released formulation takes."""
    speeds = {words: suite_tables.speed(chosen, name) for name, words in PARTS.items()}
    speeds = {words: speed for words, speed in speeds.items() if speed is not None}
    places = range(len(speeds))
    axes.barh(places, list(speeds.values()), height=0.6, color=style.COLOURS["pae"])
    axes.axvline(1, color=style.COLOURS["official"], linewidth=1.5)
    for place, speed in zip(places, speeds.values()):
        axes.text(speed * 1.08, place, suite_tables.ratio(speed), va="center", fontweight="bold")
    axes.set_yticks(places, list(speeds))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.8, 2.2 * max(speeds.values(), default=1))
    axes.set_xticks([1, 3, 10, 30], ["1x", "3x", "10x", "30x"])
    axes.minorticks_off()
    axes.grid(axis="y", visible=False)
    axes.set(title="PAE's own parts", xlabel="times as fast as released")
