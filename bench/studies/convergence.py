"""What PAE's parts do to VPT-deep, on several real tasks, each arm with its own best recipe.

The study is convergence.toml, which `pae sweep` runs; here is what docs/science.md shows of the
committed runs. Arms: VPT-deep; with the Koopman-Lyapunov regulariser; with Modal Pre-Alignment;
with both, which is PAE; and a control that starts from random tokens of the same images (SPT).

Speed is the published measure, epochs until validation reaches VPT-deep's own best of the same
seed, beside the same in passes of one image through the backbone: one forward is 1, an image of a
training step 2, as `pae train` counts: forward, and the backward to the prompts, which has the same
products, for no frozen weight has a gradient. Modal Pre-Alignment is a forward of every image
through every window, tokens of images (SPT) one of every training image, both before the first
step. Validation, which all arms have alike, is not counted. A run that never gets there counts as
its last epoch, in favour of the arm, and is told.

The runs (bench/results/science/convergence.json) were made by `bench/studies/protocol.py` as it
stands in commit 8e685c4, which validated every second epoch and watched the prompts' gradients.
"swing" is the standard deviation over the mean of their norm, over the steps; "turns" the share of
steps whose gradient points against the step before; both as means over the first third of the
blocks, the middle and the last.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bench import figures as style
from bench.table import table_of
from pae.train.declared import parsed

from . import runs

BASELINE, PAE, MPA, KLD = "VPT-deep", "+ PAE (both)", "+ MPA", "+ KLD"
SPT = "+ random tokens of images"
# the colour's role of every arm
COLOURS = {BASELINE: "plain", PAE: "pae", MPA: "mpa", KLD: "kld", SPT: "control"}
PASSES_OF_A_STEP = 2

Record = dict[str, Any]  # of one run: "val" [(epoch, accuracy, loss)], "test", "first_passes", ...
Cell = tuple[float, float]  # learning rate and weight decay
Results = dict[str, dict[str, dict[str, Any]]]  # task -> arm -> `summary`


def spec(name: str) -> dict[str, Any]:
    """A study's file for `pae sweep`."""
    return parsed(Path(__file__).with_name(name))


# ---- from records to numbers


def results(study: dict[str, Any], numbers: dict) -> Results:
    """What came out for all tasks and methods of a spec, the first of which is the baseline.

    Raises:
        ValueError: runs are missing, so that nothing can be concluded.
    """
    found: Results = {}
    for task in study["tasks"]:
        baseline: list[Record] = []
        for method, options in study["methods"].items():
            grid = options.get("grid", study["grid"])
            cells = [(lr, decay) for lr in grid["lr"] for decay in grid["weight_decay"]]
            ran = runs_of(numbers, {**options, "dataset": task})
            first = [ran[cell, 0] for cell in cells if (cell, 0) in ran]
            chosen = cells[max(range(len(first)), key=lambda i: best(first[i]), default=0)]
            finals = [ran[chosen, s] for s in range(study["seeds"]) if (chosen, s) in ran]
            if len(first) < len(cells) or len(finals) < study["seeds"]:
                raise ValueError(f"{task}, {method}: runs of the grid or the seeds are missing")
            baseline = baseline or finals
            about = {
                "lr": chosen[0],
                "weight_decay": chosen[1],
                "edge": chosen[0] in (min(grid["lr"]), max(grid["lr"])),
                "grid": [best(record)[0] for record in first],
            }
            epoch_passes = numbers["recipe"]["train_size"] * PASSES_OF_A_STEP
            row = about | summary(finals, baseline, epoch_passes)
            found.setdefault(task, {})[method] = row
    return found


def runs_of(numbers: dict, options: dict[str, Any]) -> dict[tuple[Cell, int], Record]:
    """By cell and seed the runs with these options, grid and what the recipe says too left out."""
    recipe, found = numbers["recipe"], {}
    wanted = {k: v for k, v in options.items() if k != "grid" and recipe.get(k) != v}
    for record in numbers["runs"].values():
        settings = dict(record["settings"])
        cell, seed = (settings.pop("lr"), settings.pop("weight_decay")), settings.pop("seed")
        if settings == wanted:
            found[cell, seed] = {**record, "seed": seed}
    return found


def best(record: Record) -> tuple[float, float]:
    """(accuracy, -loss) of the best validation."""
    return max((accuracy, -loss) for _, accuracy, loss in record["val"])


def summary(records: list[Record], baseline: list[Record], epoch_passes: int = 1) -> dict[str, Any]:
    """One arm on one task from the same seeds as the baseline: its tests, and how soon it was as
    good as the baseline's best. `epoch_passes`: what an epoch takes.
    """

    def spent(record: Record, target: float) -> tuple[bool, int, int]:
        """Whether it got there, epochs until then, and passes, with those before the first step."""
        epoch = next((e for e, accuracy, _ in record["val"] if accuracy >= target), None)
        epochs = epoch or record["val"][-1][0]
        return epoch is not None, epochs, record["first_passes"] + epochs * epoch_passes

    pairs = [
        (spent(mine, best(theirs)[0]), spent(theirs, best(theirs)[0]))
        for mine, theirs in zip(records, baseline, strict=True)
    ]
    return {
        "tests": {r["seed"]: r["test"] for r in records},
        "test": runs.interval([r["test"] for r in records]),
        "gain": runs.paired(records, baseline),
        "vals": [r["val"] for r in records],
        "reached": sum(mine[0] for mine, _ in pairs),
        "epochs": runs.interval([mine[1] for mine, _ in pairs]),
        "faster": ratio([(mine[1], theirs[1]) for mine, theirs in pairs]),
        "cheaper": ratio([(mine[2], theirs[2]) for mine, theirs in pairs]),
        "parameters": records[0]["parameters"],
        **{
            key: [statistics.mean(v) for v in zip(*(r[key] for r in records if key in r))]
            for key in ("swing", "turns")
        },
    }


def ratio(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """How many times as much the baseline took: ratio of means, seeds resampled in pairs."""
    index = runs.resampled(len(pairs))
    mine, theirs = (torch.tensor(v, dtype=torch.float64) for v in zip(*pairs))
    low, high = runs.ends(theirs[index].mean(1) / mine[index].mean(1))
    shown = {"mean": (theirs.mean() / mine.mean()).item(), "low": low, "high": high}
    return {**{k: runs.short(v) for k, v in shown.items()}, "seeds": len(pairs)}


# ---- from numbers to text


def blocks(numbers: dict) -> dict[str, str]:
    tasks = results(spec("convergence.toml"), numbers)
    return {
        "convergence setting": setting(numbers),
        "convergence grid": grid_table(tasks),
        "convergence table": _table(tasks),
        "convergence verdicts": _verdicts(tasks),
        "convergence gradients": _gradient_table(tasks),
    }


def setting(numbers: dict) -> str:
    r, made = numbers["recipe"], [run["code"] for run in numbers["runs"].values()]
    by = {f"pae {c['pae']} at {c['commit']}, torch {c['torch']}" for c in made}
    return (
        f"The first {r['depth']} blocks of dinov2-s14-derived at {r['img_size']} px, "
        f"{r['num_tokens']} prompts per block; {r['train_size']} / {r['val_size']} / "
        f"{r['test_size']} images for training, validation and test; {r['epochs']} epochs of batch "
        f"{r['batch_size']}, validated every {r['validate']} epochs; {r['optimizer']}, "
        f"{r['warmup_epochs']} epochs of warm-up and a cosine per epoch, prompt "
        f"dropout {r['dropout']:g}; MPA on {r['mpa_images']} images. {len(made)} runs by "
        f"{'; '.join(sorted(by))}."
    )


def each_arm(tasks: Results) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """The first cells of a table's row, and the arm's numbers."""
    for task, arms in tasks.items():
        yield from (({"task": task, "arm": arm}, row) for arm, row in arms.items())


def grid_table(tasks: Results) -> str:
    """What every arm chose, and the validation accuracy of every cell."""
    return table_of(
        [
            {
                **where,
                "chosen learning rate": f"{row['lr']:g}" + ", an end" * row["edge"],
                "weight decay": f"{row['weight_decay']:g}",
                "validation of every cell": " ".join(f"{v:.2f}" for v in row["grid"]),
            }
            for where, row in each_arm(tasks)
        ]
    )


def _table(tasks: Results) -> str:
    rows = []
    for where, row in each_arm(tasks):
        shown = runs.shown if where["arm"] != BASELINE else lambda *_: ""
        rows.append(
            {
                **where,
                "test accuracy": runs.shown(row["test"], ".3f"),
                "difference, seed by seed": shown(row["gain"], "+.3f"),
                "reached VPT-deep's best": f"{row['reached']} of {len(row['tests'])}",
                "epochs until then": runs.shown(row["epochs"], ".1f"),
                "times as fast in epochs": shown(row["faster"], ".2f"),
                "in passes, start included": shown(row["cheaper"], ".2f"),
            }
        )
    return table_of(rows)


# claim -> (arm, quantity of the summary, from where on it holds)
CLAIMS = {
    "The regulariser raises accuracy": (KLD, "gain", 0.0),
    "Modal Pre-Alignment raises accuracy": (MPA, "gain", 0.0),
    "Random tokens of images raise accuracy": (SPT, "gain", 0.0),
    "PAE raises accuracy": (PAE, "gain", 0.0),
    "PAE needs fewer epochs to VPT-deep's best": (PAE, "faster", 1.0),
    "PAE needs fewer passes, MPA included": (PAE, "cheaper", 1.0),
    "Random tokens of images need fewer passes": (SPT, "cheaper", 1.0),
}


def verdict(value: dict[str, float], bar: float) -> str:
    """In words, of an interval beside the bar above which a claim holds."""
    form = ".2f" if bar else "+.3f"
    if value["low"] <= bar <= value["high"]:
        said = "undecided"
    else:
        said = "yes" if value["mean"] > bar else "**no, the opposite**"
    return f"{said} ({value['mean']:{form}})"


def _verdicts(tasks: Results) -> str:
    return table_of(
        [
            {"claim": claim, **{t: verdict(arms[arm][key], bar) for t, arms in tasks.items()}}
            for claim, (arm, key, bar) in CLAIMS.items()
        ]
    )


def _gradient_table(tasks: Results) -> str:
    def listed(values: Iterable[float], form: str) -> str:
        return ", ".join(f"{v:{form}}" for v in values)

    return table_of(
        [
            {
                **where,
                "swing of the norm: first third of blocks, middle, last": listed(
                    row["swing"], ".2f"
                ),
                "gradient turns against the step before: first, middle, last": listed(
                    row["turns"], ".0%"
                ),
            }
            for where, row in each_arm(tasks)
        ]
    )


# ---- from numbers to a figure


def figures(numbers: dict) -> dict[str, Callable[[], Figure]]:
    tasks = results(spec("convergence.toml"), numbers)
    return {"convergence_curves": partial(draw_curves, tasks)}


def draw_curves(tasks: Results) -> Figure:
    """Validation accuracy by epoch: mean over seeds; their span for VPT-deep and PAE."""
    figure, panels = style.figure(3.6 * len(tasks), 3.2, 1, len(tasks))
    for panel, (task, arms) in zip(panels, tasks.items()):
        for arm, row in arms.items():
            epochs = [epoch for epoch, _, _ in row["vals"][0]]
            seeds = list(zip(*([v[1] for v in val] for val in row["vals"])))
            look = {"color": style.COLOURS[COLOURS[arm]], "label": arm}
            panel.plot(epochs, [statistics.mean(v) for v in seeds], ".-", lw=1.5, **look)
            if arm in (BASELINE, PAE):
                low, high = zip(*((min(v), max(v)) for v in seeds))
                panel.fill_between(epochs, low, high, color=look["color"], alpha=0.12, lw=0)
        panel.set_title(task)
        panel.set_xlabel("epoch")
    panels[0].set_ylabel("validation accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
