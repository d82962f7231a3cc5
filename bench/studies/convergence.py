"""What PAE's parts do to VPT-deep, on several real tasks, each arm with its own best recipe.

    python -m bench.studies.convergence plan   [--output runs/science]
    python -m bench.studies.convergence run    --output runs/science --minutes 60 [--piece ...]
    python -m bench.studies.convergence report --output runs/science

`bench.studies.protocol` says how: grids, then seeds. Arms: VPT-deep; with the Koopman-Lyapunov
regulariser; with Modal Pre-Alignment; with both, which is PAE; and a control that starts from
random tokens of the same images (SPT), for what Modal Pre-Alignment writes into prompts are
averages of patch tokens too.

Speed is the published measure, epochs until validation reaches VPT-deep's own best of the same
seed, beside the same in passes, with what was spent before the first step. A run that never gets
there counts as its last epoch, in favour of the arm, and is told.

`report` writes bench/results/science/convergence.json; `python -m bench.report` draws it. An arm
whose grid or whose seeds are not all there is open: it is shown, and nothing is concluded from it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

from bench import figures as style
from bench.table import table_of

from . import protocol, runs
from .protocol import Arm, Found, Run, Study

DATASETS = ("fashion-mnist", "elpv-defect", "pneumonia")
BASELINE, PAE, MPA, KLD, SPT = "plain", "pae", "mpa", "kld", "spt"
ARMS = {
    BASELINE: Arm("VPT-deep", "plain", {}),
    PAE: Arm("+ PAE (both)", "pae", {"kld": True, "mpa": True}),
    MPA: Arm("+ MPA", "mpa", {"mpa": True}),
    KLD: Arm("+ KLD", "kld", {"kld": True}),
    SPT: Arm("+ random tokens of images", "control", {"spt": "random"}),
}
STUDY = Study("convergence.json", DATASETS, ARMS, seeds=5)
CURVES = "![Validation accuracy by epoch, per task and arm](figures/convergence_curves.svg)"


# ---- from records to numbers


def results(study: Study, found: Found, dataset: str) -> dict[str, dict[str, Any]]:
    """By arm of a task what `summary` says."""
    done = {
        name: [
            {**found[run.key], "seed": run.seed}
            for run in protocol.finals(dataset, arm, study.seeds, found)
            if run.key in found
        ]
        for name, arm in study.arms.items()
    }
    baseline = [r for r in done[next(iter(study.arms))] if "diverged" not in r]
    return {
        name: summary(study, protocol.grid(dataset, arm), found, done[name], baseline)
        for name, arm in study.arms.items()
    }


def summary(
    study: Study, cells: list[Run], found: Found, records: list[dict], baseline: list[dict]
) -> dict[str, Any]:
    """One arm on one task: the cell that its grid chose, its tests, and how soon it was as good as
    the baseline's best. "open" says what is missing, None where nothing is.
    """
    ran = sum(run.key in found for run in cells)
    if ran < len(cells):
        return {"open": f"grid: {ran} of {len(cells)}"}
    chosen = protocol.choice(cells, found)
    assert chosen is not None
    left = None if len(records) == study.seeds else f"seeds: {len(records)} of {study.seeds}"
    if diverged := [str(r["seed"]) for r in records if "diverged" in r]:
        left = f"diverged: seed {', '.join(diverged)}"
    records = [r for r in records if "diverged" not in r]
    reached, pairs = 0, []
    for theirs in baseline:
        for mine in (r for r in records if r["seed"] == theirs["seed"]):
            target = protocol.best(theirs)[0]
            epoch, last = epochs_to(mine, target), mine["val"][-1][0]
            reached += epoch is not None
            pairs.append((spent(mine, epoch or last), spent(theirs, epochs_to(theirs, target))))
    rates = {run.lr for run in cells}
    return {
        "open": left,
        "lr": chosen.lr,
        "weight_decay": chosen.weight_decay,
        "edge": chosen.lr in (min(rates), max(rates)),
        "grid": [protocol.best(found[run.key])[0] for run in cells],
        "tests": {r["seed"]: r["test"] for r in records},
        "test": runs.interval([r["test"] for r in records]),
        "gain": runs.paired(records, baseline),
        "vals": [r["val"] for r in records],
        "reached": reached,
        "epochs": runs.interval([mine[0] for mine, _ in pairs]),
        "passes": runs.interval([mine[1] for mine, _ in pairs]),
        "faster": ratio([(mine[0], theirs[0]) for mine, theirs in pairs]),
        "cheaper": ratio([(mine[1], theirs[1]) for mine, theirs in pairs]),
        "parameters": records[0]["parameters"] if records else None,
        **{
            key: [statistics.mean(v) for v in zip(*(r[key] for r in records if key in r))]
            for key in ("swing", "turns")
        },
    }


def epochs_to(record: dict, target: float) -> int | None:
    """The first validated epoch that is at least as good; None if there is none."""
    return next((epoch for epoch, accuracy, _ in record["val"] if accuracy >= target), None)


def spent(record: dict, epoch: int) -> tuple[int, int]:
    """Until the end of an epoch: epochs; and passes, with those ahead of the first step."""
    an_epoch = protocol.RECIPE["train_size"] * protocol.PASSES_OF_A_STEP
    return epoch, record["first_passes"] + epoch * an_epoch


def ratio(pairs: list[tuple[float, float]]) -> dict[str, float] | None:
    """How many times as much the baseline took: ratio of means, seeds resampled in pairs."""
    if not pairs:
        return None
    index = runs.resampled(len(pairs))
    mine, theirs = (torch.tensor(v, dtype=torch.float64) for v in zip(*pairs))
    drawn = theirs[index].mean(1) / mine[index].mean(1)
    low, high = runs.ends(drawn)
    mean = (theirs.mean() / mine.mean()).item()
    shown = {"mean": mean, "low": low, "high": high}
    return {**{k: runs.short(v) for k, v in shown.items()}, "seeds": len(pairs)}


def report(arguments: argparse.Namespace) -> None:
    """Write the records of all finished runs."""
    numbers = protocol.store(STUDY, arguments)
    print(blocks(numbers)["convergence table"])


# ---- from numbers to text


def blocks(numbers: dict) -> dict[str, str]:
    tasks = {d: results(STUDY, numbers["runs"], d) for d in DATASETS}
    return {
        "convergence setting": setting(numbers),
        "convergence progress": progress(STUDY, numbers["runs"]),
        "convergence grid": grid_table(tasks),
        "convergence table": _table(tasks),
        "convergence verdicts": _verdicts(tasks),
        "convergence gradients": _gradient_table(tasks),
        "convergence figure": CURVES if complete(numbers["runs"]) else "",
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
        f"dropout {r['dropout']:g}; MPA on {r['mpa_images']} images. Runs by "
        f"{'; '.join(sorted(by)) or 'nobody yet'}."
    )


def progress(study: Study, found: Found) -> str:
    """How much of the study there is."""
    lines: dict[str, dict[str, str]] = {}
    for piece in protocol.pieces(study, found):
        dataset, kind = piece.name.rsplit(" ", 1)
        done = sum(run.key in found for run in piece.runs)
        words = f"{done} of {piece.count}" if done < piece.count else f"all {piece.count}"
        lines.setdefault(dataset, {"task": dataset})[f"runs of the {kind}"] = words
    return table_of(list(lines.values()))


def shown_arms(
    tasks: dict[str, dict], arms: dict[str, Arm] = ARMS
) -> Iterator[tuple[str, str, dict]]:
    """(task, arm's title, numbers) of the tasks of which something has been run."""
    for dataset, own in tasks.items():
        if any("test" in s or not s["open"].startswith("grid: 0") for s in own.values()):
            yield from ((dataset, arms[name].title, s) for name, s in own.items())


def grid_table(tasks: dict[str, dict], arms: dict[str, Arm] = ARMS) -> str:
    """What every arm chose, and the validation accuracy of every cell."""
    rows = []
    for dataset, title, s in shown_arms(tasks, arms):
        done = "lr" in s
        rows.append(
            {
                "task": dataset,
                "arm": title,
                "chosen learning rate": f"{s['lr']:g}" + ", an end" * s["edge"] if done else "open",
                "weight decay": f"{s['weight_decay']:g}" if done else s["open"],
                "validation of every cell": " ".join(f"{v:.2f}" for v in s.get("grid", ())),
            }
        )
    return table_of(rows)


def _table(tasks: dict[str, dict]) -> str:
    rows = []
    for dataset, title, s in shown_arms(tasks):
        other, done = title != ARMS[BASELINE].title, not s["open"]
        state, s = "complete" if done else f"open, {s['open']}", s if done else {}
        rows.append(
            {
                "task": dataset,
                "arm": title,
                "state": state,
                "test accuracy": runs.shown(s.get("test"), ".3f"),
                "difference, seed by seed": runs.shown(s.get("gain"), "+.3f") if other else "",
                "reached VPT-deep's best": f"{s['reached']} of {len(s['tests'])}" if done else "",
                "epochs until then": runs.shown(s.get("epochs"), ".1f"),
                "times as fast in epochs": runs.shown(s.get("faster"), ".2f") if other else "",
                "in passes, start included": runs.shown(s.get("cheaper"), ".2f") if other else "",
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


def verdict(arm: dict, baseline: dict, key: str, bar: float) -> str:
    """In words; nothing is concluded before both arms are complete."""
    if arm["open"] or baseline["open"]:
        return "open"
    value = arm[key]
    form = "+.3f" if key == "gain" else ".2f"
    if value["low"] <= bar <= value["high"]:
        said = "undecided"
    else:
        said = "yes" if value["mean"] > bar else "**no, the opposite**"
    return f"{said} ({value['mean']:{form}})"


def _verdicts(tasks: dict[str, dict]) -> str:
    return table_of(
        [
            {
                "claim": claim,
                **{d: verdict(arms[name], arms[BASELINE], key, bar) for d, arms in tasks.items()},
            }
            for claim, (name, key, bar) in CLAIMS.items()
            if name in STUDY.arms
        ]
    )


def _gradient_table(tasks: dict[str, dict]) -> str:
    def listed(values: Iterable[float], form: str) -> str:
        return ", ".join(f"{v:{form}}" for v in values)

    return table_of(
        [
            {
                "task": dataset,
                "arm": title,
                "swing of the norm: first third of blocks, middle, last": listed(s["swing"], ".2f"),
                "gradient turns against the step before: first, middle, last": listed(
                    s["turns"], ".0%"
                ),
            }
            for dataset, title, s in shown_arms(tasks)
            if not s["open"] and s["swing"]
        ]
    )


# ---- from numbers to a figure


def figures(numbers: dict) -> dict[str, Callable[[], Figure]]:
    """Curves of the arms that are complete; none before there is one."""
    tasks = complete(numbers["runs"])
    return {"convergence_curves": partial(draw_curves, tasks)} if tasks else {}


def complete(found: Found) -> dict[str, dict]:
    """The complete arms by task, where there are any."""
    tasks = {d: results(STUDY, found, d) for d in DATASETS}
    whole = {d: {n: s for n, s in arms.items() if not s["open"]} for d, arms in tasks.items()}
    return {dataset: arms for dataset, arms in whole.items() if arms}


def draw_curves(tasks: dict) -> Figure:
    """Validation accuracy by epoch: mean over seeds; their span for VPT-deep and PAE."""
    count = len(tasks)
    figure, grid = style.figure(max(5.0, 3.6 * count), 3.2, 1, count, squeeze=False)
    for panel, (dataset, arms) in zip(grid[0], tasks.items()):
        for name, s in arms.items():
            epochs = [row[0] for row in s["vals"][0]]
            look = {"color": style.COLOURS[ARMS[name].colour], "label": ARMS[name].title}
            seeds = list(zip(*([row[1] for row in rows] for rows in s["vals"])))
            panel.plot(epochs, [statistics.mean(v) for v in seeds], ".-", lw=1.5, **look)
            if name in (BASELINE, PAE):
                low, high = zip(*((min(v), max(v)) for v in seeds))
                panel.fill_between(epochs, low, high, color=look["color"], alpha=0.12, lw=0)
        panel.set_title(dataset)
        panel.set_xlabel("epoch")
    grid[0][0].set_ylabel("validation accuracy")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


if __name__ == "__main__":
    protocol.main(STUDY, {"report": report})
