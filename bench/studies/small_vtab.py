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
from collections.abc import Callable
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
_FACTS = ("image_size", "device", "chosen", "pixels")


def report(sweep: Path, to: Path) -> dict[str, Any]:
    """Writes what a sweep has so far; returns it."""
    plan, records = read(sweep)
    finished = collect([sweep]).runs if any(_tested(plan, records)) else []
    chosen = {}
    tuned = {}
    for group in plan.groups:
        scores = {
            cell.values["lr"]: records[cell.keys[0]]["val_last"]
            for cell in group.cells
            if cell.keys[0] in records and records[cell.keys[0]]["status"] == FINISHED
        }
        tuned[f"{group.task}/{group.method}"] = {str(lr): val for lr, val in scores.items()}
        if cells := plan.chosen(group, records):
            chosen[f"{group.task}/{group.method}"] = cells[0].values["lr"]
    known = [records[key] for key in records]
    numbers = {
        "facts": {
            "versions": known[0]["versions"] if known else {},
            "device": known[0].get("device") if known else None,
            "seconds": round(sum(record.get("seconds") or 0 for record in known)),
            "done": len(known),
            "wanted": sum(plan.count()),
            "lost": [r["reason"] for r in known if r["status"] != FINISHED],
        },
        "missing": not_yet(plan, records),
        "chosen": chosen,
        "tuned": tuned,
        "runs": [_lean(run) for run in finished],
    }
    runs.write_json(to, numbers)
    return numbers


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
    facts = dict(record["facts"])
    task = {"name": record["task"], **{name: facts.pop(name) for name in ("train", "val", "test")}}
    facts |= {"task": task, "backbone": {"name": facts["backbone"]}}
    place = Path(record["task"], record["method"], str(record["settings"]["seed"]))
    return Run(place, record["settings"], facts, record["result"], record["method"], record["task"])


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
    done, wanted = facts["done"], facts["wanted"]
    text = f"{done} of {wanted} runs have ended, which took {facts['seconds'] / 3600:.1f} hours."
    if facts["lost"]:
        text += f" {len(facts['lost'])} of them without a result."
    if numbers["missing"]:
        text += f" **Not finished**; still to come: {'; '.join(numbers['missing'])}."
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
        best = max(scores.values())
        ties = sum(value == best for value in scores.values())
        edge = " at the edge" if lr in (min(map(float, scores)), max(map(float, scores))) else ""
        return f"{lr:g}{edge}" + (f" ({ties} equal)" if ties > 1 else "")

    return markdown([["", *tasks], *([m, *(cell(task, m) for task in tasks)] for m in methods)])


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
    return (
        "![Test accuracy by task and method, a point for each seed](figures/small_vtab.svg)\n\n"
        "Points are seeds, lines their means; where a task has fewer methods, the rest is to come."
    )


def figures(numbers: dict[str, Any]) -> dict[str, Callable[[], Figure]]:
    """The drawings, by name; none before there is a result."""
    return {"small_vtab": lambda: draw(numbers["runs"])} if numbers["runs"] else {}


def draw(records: list[dict[str, Any]]) -> Figure:
    """A panel for each task: every seed's test accuracy, a row for each method."""
    order = [task.name for task in SMALL.tasks]
    tasks = sorted({record["task"] for record in records}, key=order.index)
    methods = list(dict.fromkeys(record["method"] for record in records))
    figure, axes = drawn.figure(
        1.9 * len(tasks) + 1.4, 0.32 * len(methods) + 1.1, 1, len(tasks), sharey=True, squeeze=False
    )
    for panel, task in zip(axes[0], tasks, strict=True):
        for row, method in enumerate(methods):
            values = [
                100 * r["result"]["test_accuracy"]
                for r in records
                if (r["task"], r["method"]) == (task, method)
            ]
            if values:
                colour = f"C{row}"
                panel.plot(values, [row] * len(values), "o", color=colour, alpha=0.6, markersize=4)
                mean = statistics.fmean(values)
                panel.plot([mean, mean], [row - 0.3, row + 0.3], color=colour, linewidth=2)
        panel.set_title(task, fontsize=9)
        panel.set_xlabel("test accuracy, %")
    axes[0][0].set_yticks(range(len(methods)), methods)
    axes[0][0].invert_yaxis()
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
