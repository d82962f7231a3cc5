"""The small VTAB (small_vtab.toml), from the folder of its sweep to a page.

    pae sweep bench/studies/small_vtab.toml --jobs 2
    python -m bench.studies.small_vtab --sweep sweeps/small_vtab

The second command writes bench/results/science/small_vtab.json from whatever has finished, also
while the sweep goes on, and names what has not; `python -m bench.report` puts it on the page. The
table is that of `pae table`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import figures as drawn
from bench.pages import UNMEASURED
from bench.table import markdown
from pae.protocols.tasks import SMALL
from pae.sweep.plan import read
from pae.sweep.records import FINISHED
from pae.tables import build, write
from pae.tables.collect import Run, collect, not_yet

from . import runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JSON = "small_vtab.json"
SPEC = "bench/studies/small_vtab.toml"
BASELINE = "VPT-deep"
# what a table of `pae table` asks of a run beside its numbers
_SETTINGS = (
    *("lr", "seed", "train_on", "epochs", "batch_size", "augment", "norm", "interpolation"),
    *("model", "num_tokens", "optimizer", "weight_decay", "keep", "img_size"),
)
# the share of the test images that naming the commonest class gets right
COMMONEST = {
    **{"digits": 0.1, "fashion-mnist": 0.1, "pneumonia": 0.5025, "shapes-count": 0.1675},
    **{"shapes-angle": 0.125, "traffic-lights": 0.6094, "elpv-defect": 0.575},
}
_FACTS = ("image_size", "device", "chosen", "pixels")


def report(sweep: Path, to: Path) -> dict[str, Any]:
    """Writes what a sweep has so far; returns it."""
    plan, records = read(sweep)
    finished = collect([sweep]).runs if any(_tested(plan, records)) else []
    chosen = {}
    tuned: dict[str, dict[str, float | None]] = {}
    for group in plan.groups:
        name = f"{group.task}/{group.method}"
        for run, cell in zip(plan.grid(group), group.cells, strict=True):
            if run.key in records:
                known = records[run.key]
                val = known["val_last"] if known["status"] == FINISHED else None
                tuned.setdefault(name, {})[str(cell.values["lr"])] = val
        if cells := plan.chosen(group, records):
            chosen[name] = cells[0].values["lr"]
    known = list({r.key: records[r.key] for r in plan.runs(records) if r.key in records}.values())
    numbers = {
        "facts": {
            "versions": known[0]["versions"] if known else {},
            "device": known[0].get("device") if known else None,
            "done": len(known),
            "wanted": sum(plan.count()),
            "lost": [_lost(record) for record in known if record["status"] != FINISHED],
        },
        "missing": not_yet(plan, records),
        "chosen": chosen,
        "tuned": tuned,
        "runs": [_lean(run) for run in finished],
    }
    runs.write_json(to, numbers)
    return numbers


def _lost(record: dict[str, Any]) -> str:
    """A run without a result, in words."""
    values = [f"{name}={value:g}" for name, value in record["values"].items()]
    place = ", ".join([record["task"], record["method"], *values, f"seed {record['seed']}"])
    return f"{place}: {record['status']}, {record['reason']}"


def _tested(plan: Any, records: Any) -> list[str]:
    """Keys of the runs that have a test accuracy."""
    found = []
    for group in plan.groups:
        wanted = plan.finals(group, records) or ()
        found += [run.key for run in wanted if run.key in records and run.is_done(records)]
    return found


def _lean(run: Run) -> dict[str, Any]:
    backbone = (run.facts.get("backbone") or {}).get("name")
    task = {name: run.facts["task"].get(name) for name in ("train", "val", "test")}
    return {
        "task": run.task,
        "method": run.label,
        "settings": {name: run.settings[name] for name in _SETTINGS},
        "facts": {**{name: run.facts.get(name) for name in _FACTS}, "backbone": backbone} | task,
        "result": dict(run.result),
    }


def _run(record: dict[str, Any]) -> Run:
    """For a table without seconds and memory, which other work on the machine decided."""
    result = {**record["result"], "seconds": None, "memory_mb": None}
    facts = dict(record["facts"])
    task = {"name": record["task"], **{name: facts.pop(name) for name in ("train", "val", "test")}}
    facts |= {"task": task, "backbone": {"name": facts["backbone"]}}
    place = Path(record["task"], record["method"], str(record["settings"]["seed"]))
    return Run(place, record["settings"], facts, result, record["method"], record["task"])


# ---- from numbers to text


def blocks(numbers: dict[str, Any]) -> dict[str, str]:
    """What docs/small-vtab.md shows."""
    facts = numbers["facts"]
    return {
        "small vtab state": _state(numbers),
        "small vtab table": _table(numbers),
        "small vtab figure": _figure_line(numbers),
        "small vtab rates": _rates(numbers),
        "small vtab setting": _setting(numbers["runs"], facts),
    }


def _state(numbers: dict[str, Any]) -> str:
    facts = numbers["facts"]
    text = f"{facts['done']} of {facts['wanted']} runs have ended."
    if numbers["missing"]:
        text += f" **Not finished**; still to come: {'; '.join(numbers['missing'])}."
    if facts["lost"]:
        text += "\n\nWithout a result:\n\n" + "\n".join(f"- {lost}" for lost in facts["lost"])
    return text


def _table(numbers: dict[str, Any]) -> str:
    if not numbers["runs"]:
        return UNMEASURED
    found = [_run(record) for record in numbers["runs"]]
    labels = {run.label for run in found}
    return write.FORMATS["markdown"](
        build.build(
            found,
            protocol=SMALL.name,
            baseline=BASELINE if BASELINE in labels and len(labels) > 1 else None,
            failed=numbers["facts"]["lost"],
            missing=numbers["missing"],
        )
    ).strip()


def _rates(numbers: dict[str, Any]) -> str:
    """The rate that validation chose, and how many had the same accuracy."""
    if not numbers["chosen"]:
        return UNMEASURED
    places = [name.split("/") for name in numbers["chosen"]]
    tasks = list(dict.fromkeys(task for task, _ in places))
    methods = list(dict.fromkeys(method for _, method in places))

    def cell(task: str, method: str) -> str:
        lr, scores = (numbers[kind].get(f"{task}/{method}") for kind in ("chosen", "tuned"))
        if lr is None:
            return ""
        known = {float(rate): val for rate, val in scores.items() if val is not None}
        ties = sum(val == known[lr] for val in known.values())
        text = f"{lr:g}: {100 * known[lr]:.0f} %"
        if lr in (ends := (min(map(float, scores)), max(map(float, scores)))):
            text += ", **the smallest tried**" if lr == ends[0] else ", **the largest tried**"
        return text + (f", {ties} equal" if ties > 1 else "")

    return (
        markdown([["", *tasks], *([m, *(cell(task, m) for task in tasks)] for m in methods)])
        + "\n\n![Validation accuracy over the learning rate, a line for each method]"
        "(figures/small_vtab_rates.svg)\n\nCircles mark the chosen rates; a run without a result "
        "has no point."
    )


def _setting(records: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    if not records:
        return UNMEASURED
    first = records[0]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("pae", "torch", "timm"))
    images = first["facts"]
    return (
        f"{images['backbone']} at {images['image_size']} pixels, {images['train']} training images "
        f"in the final runs, {first['settings']['epochs']} epochs, batch "
        f"{first['settings']['batch_size']}; {facts['device']}; {versions}."
    )


def _figure_line(numbers: dict[str, Any]) -> str:
    if not numbers["runs"]:
        return UNMEASURED
    rest = "; where a task has fewer methods, the rest is to come" if numbers["missing"] else ""
    return (
        "![Test accuracy by task and method, a point for each seed](figures/small_vtab.svg)\n\n"
        "Points are seeds, bars their means, dotted lines what naming the commonest class reaches"
        f"{rest}."
    )


def figures(numbers: dict[str, Any]) -> dict[str, Callable[[], Figure]]:
    """The drawings, by name; none before there is a result."""
    found: dict[str, Callable[[], Figure]] = {}
    if numbers["runs"]:
        found["small_vtab"] = lambda: draw(numbers["runs"])
    if numbers["chosen"]:
        found["small_vtab_rates"] = lambda: draw_rates(numbers["tuned"], numbers["chosen"])
    return found


def _panels(tasks: set[str], height: float, below: float = 0.0) -> tuple[Figure, list]:
    """A figure with a panel for each task, four in a row: (it, [(task, its axes)])."""
    order = [task.name for task in SMALL.tasks if task.name in tasks]
    across = min(4, len(order))
    down = -(-len(order) // across)
    size = (1.9 * across + 1.4, height * down + below)
    figure, axes = drawn.figure(*size, down, across, sharey=True, squeeze=False)
    places = list(axes.flat)
    for empty in places[len(order) :]:
        empty.set_visible(False)
    for panel, task in zip(places, order):
        panel.set_title(task, fontsize=9)
    return figure, list(zip(order, places))


def _colours(methods: Iterable[str]) -> dict[str, str]:
    return {method: f"C{number}" for number, method in enumerate(dict.fromkeys(methods))}


def draw(records: list[dict[str, Any]]) -> Figure:
    """A panel for each task: every seed's test accuracy, a row for each method."""
    methods = _colours(record["method"] for record in records)
    tasks = {record["task"] for record in records}
    figure, panels = _panels(tasks, 0.26 * len(methods) + 0.9)
    for task, panel in panels:
        for row, (method, colour) in enumerate(methods.items()):
            values = [
                100 * r["result"]["test_accuracy"]
                for r in records
                if (r["task"], r["method"]) == (task, method)
            ]
            if values:
                panel.plot(values, [row] * len(values), "o", color=colour, alpha=0.6, markersize=4)
                mean = statistics.fmean(values)
                panel.plot([mean, mean], [row - 0.3, row + 0.3], color=colour, linewidth=2)
        panel.axvline(100 * COMMONEST[task], color="0.5", linewidth=0.8, linestyle=":")
        panel.set_xlabel("test accuracy, %")
    panels[0][1].set_yticks(range(len(methods)), list(methods))
    panels[0][1].invert_yaxis()
    return figure


def draw_rates(tuned: dict[str, dict[str, float | None]], chosen: dict[str, float]) -> Figure:
    """A panel for each task: validation accuracy over the rate, a line for each method."""
    methods = _colours(name.partition("/")[2] for name in tuned)
    figure, panels = _panels({name.partition("/")[0] for name in tuned}, 2.0, 0.5)
    for task, panel in panels:
        for method, colour in methods.items():
            name = f"{task}/{method}"
            known = sorted(
                (float(lr), 100 * val) for lr, val in tuned.get(name, {}).items() if val is not None
            )
            line = panel.plot(*zip(*known), ".-", linewidth=1, label=method) if known else []
            for drawn_line in line:
                drawn_line.set_color(colour)
            for lr, val in known:
                if chosen.get(name) == lr:
                    panel.plot(lr, val, "o", color=colour, markersize=7, fillstyle="none")
        panel.set_xscale("log")
        panel.minorticks_off()  # a third of the file, and of no use for five rates
        panel.set_xlabel("learning rate")
    panels[0][1].set_ylabel("validation accuracy, %")
    handles, labels = panels[0][1].get_legend_handles_labels()
    columns = min(len(labels), max(3, 2 * len(panels)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies.small_vtab", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--sweep", type=Path, default=Path("sweeps/small_vtab"))
    parser.add_argument("--to", type=Path, default=Path("bench/results/science") / JSON)
    arguments = parser.parse_args()
    report(arguments.sweep, arguments.to)
    print(*blocks(json.loads(arguments.to.read_text())).values(), sep="\n\n")


if __name__ == "__main__":
    main()
