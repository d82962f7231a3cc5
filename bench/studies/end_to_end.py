"""Time from image files to an accuracy: `pae train` with PAE against an official-style loop.

    python -m bench.studies.end_to_end run --output runs/end_to_end [--tokens 10 50] [--seeds 0 1]
    python -m bench.studies.end_to_end report --output runs/end_to_end

Three loops train the same thing (VPT-deep + KLD + MPA in fp32) from the same seed, with the same
data cut, order, first head and recipe:

- "official": `bench.peers.loop`, whose docstring says what of it are facts of the released code;
- "reference": our loop with our data pipeline, MPA and regulariser, but the network as timm blocks
  on concatenated rows, with fused attention (`--engine reference`);
- "pae": our loop as it is.

What is timed begins with building the model and ends with the last test, imports apart. Seconds are
of the process and its data workers together (`process`), and of the clock on the wall (`wall`).
Time to accuracy leaves out the test split, which the official loop evaluates after every epoch and
ours once; the total has it. Our loop decodes the test images before it starts, which counts as
loading.

`report` refuses numbers whose curves do not agree: the loops must select the same windows and must
have the same losses in the first epoch, up to `LOSS_TOLERANCE`. It writes
bench/results/science/end_to_end.json, which `bench.report` draws.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor

import pae
from bench import figures as style
from bench import roofline
from bench.table import table_of
from pae.train import loop
from pae.train.options import Options

from . import loops, runs
from .loops import PHASES

# loop -> what pages call it, and its colour's role
ARMS = {
    "official": ("official-style loop", "official"),
    "reference": ("our loop, reference engine", "sdpa"),
    "pae": ("pae", "pae"),
}
PHASE_LABELS = {
    "loading": ("loading", "plain"),
    "alignment": ("MPA", "mpa"),
    "steps": ("training steps", "pae"),
    "validation": ("validation", "pae recompute8"),
    "test": ("test", "kld"),
    "rest": ("rest", "model"),
}
CLOCKS = ("process", "wall")
SHARE = 0.95  # a loop has arrived at this share of the lowest final validation accuracy
# of the options of `pae train`: what "run" takes, and its default
SIZES = {
    "train_size": 800,
    "val_size": 200,
    "test_size": None,
    "epochs": 10,
    "img_size": None,
    "mpa_images": 8,
}
JSON = "end_to_end.json"

# Relative, of the mean training loss of the first epoch. Engines differ by 1e-7 there, the official
# loop by some 1e-4, for two reasons that were found by removing them. At the start, K = L = I, the
# gradient of L is zero: exactly so in the official formula, up to rounding in ours, and Adam
# divides what rounding leaves by itself. Then, while all singular values of L are still equal, each
# takes another one of the equally valid subgradients of the spectral norm. With L's gradient at
# zero in the first two steps and one subgradient for both, 1e-7 is left (28 px, 10 prompts).
LOSS_TOLERANCE = 1e-3


# ---- the study


def place(output: Path, dataset: str, arm: str, tokens: int, seed: int) -> Path:
    """The folder of one loop in one race."""
    return output / dataset / f"{arm}-{tokens}-{seed}"


def run_arm(arm: str, settings: Options, task: Any, folder: Path) -> dict[str, Any]:
    """Runs one loop and writes what it did to `folder`; returns that."""
    runner = loops.run_official if arm == "official" else loops.run_ours
    folder.mkdir(parents=True, exist_ok=True)
    found = runner(settings, task, folder)
    torch.save(found.pop("prompts"), folder / "first_prompts.pt")
    record = {
        "settings": dataclasses.asdict(settings),
        "task": {"name": task.name, "classes": len(task.classes), **task.sizes()},
        "machine": machine(settings.device),
        **found,
    }
    runs.write_json(folder / "race.json", record)
    return record


def machine(device: str) -> dict[str, Any]:
    """What the times belong to."""
    versions = {package.__name__: package.__version__ for package in (pae, torch, timm)}
    return {
        "device": roofline.device_name(torch.device(device)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {**versions, "python": platform.python_version()},
    }


def run(arguments: argparse.Namespace) -> None:
    """Seeds outermost: an early stop leaves whole seeds. Every seed another loop comes first. fp32
    everywhere: the released code knows nothing else, and the curves must agree.
    """
    torch.backends.cudnn.allow_tf32 = False  # the patch embedding of an fp32 network
    common = {name: getattr(arguments, name) for name in ("dataset", *SIZES)}
    common |= {"method": "vpt-deep", "kld": True, "mpa": True, "amp": "no"}
    for seed, tokens in itertools.product(arguments.seeds, arguments.tokens):
        shift = seed % len(ARMS)
        for arm in (*ARMS, *ARMS)[shift : shift + len(ARMS)]:
            folder = place(arguments.output, arguments.dataset, arm, tokens, seed)
            if (folder / "race.json").is_file():
                continue
            engine = "reference" if arm == "reference" else "fast"
            own = {"num_tokens": tokens, "seed": seed, "engine": engine}
            settings = Options(**common, **own).resolved()
            record = run_arm(arm, settings, loop.load_task(settings), folder)
            process, wall = (seconds(record["total"], clock) for clock in CLOCKS)
            print(f"{folder}: {process:.0f} s of process time, {wall:.0f} s", flush=True)


# ---- the numbers


class Disagreement(ValueError):
    """The loops did not compute the same thing, so their times say nothing."""


def collect(dataset: str, tokens: list[int], seeds: list[int], output: Path) -> dict[str, Any]:
    """The parsed JSON of all finished races.

    Raises:
        Disagreement: loops of one race differ; or the races are of several machines or settings.
        FileNotFoundError: no race is finished.
    """
    found: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    for seed, count in itertools.product(seeds, tokens):
        folders = {arm: place(output, dataset, arm, count, seed) for arm in ARMS}
        files = {arm: folder / "race.json" for arm, folder in folders.items()}
        if not all(file.is_file() for file in files.values()):
            continue
        records = {arm: json.loads(file.read_text()) for arm, file in files.items()}
        for arm, record in records.items():
            facts = facts or facts_of(record)
            if facts_of(record) != facts:
                raise Disagreement(f"{files[arm]}: {facts_of(record)}, others have {facts}")
        prompts = {
            arm: torch.load(folder / "first_prompts.pt", weights_only=True)
            for arm, folder in folders.items()
        }
        # the lowest final accuracy, so that all reach the target; and the latest epoch that does,
        # so that all have done the same work by then
        curves = [[row["val_accuracy"] for row in r["epochs"]] for r in records.values()]
        target = SHARE * min(curve[-1] for curve in curves)
        race = {"tokens": count, "seed": seed, "target": target}
        race["epoch"] = max(first_at(curve, target) for curve in curves)
        race["agreement"] = {
            arm: agree(records["pae"], records[arm], prompts["pae"], prompts[arm])
            for arm in ("official", "reference")
        }
        race["arms"] = {
            arm: {key: record[key] for key in ("epochs", "test", "total")}
            for arm, record in records.items()
        }
        found.append(race)
    if not found:
        raise FileNotFoundError(f"--output {output}: no finished race there")
    return {"facts": facts, "share": SHARE, "races": found}


def facts_of(record: dict) -> dict[str, Any]:
    """What all races of a study share."""
    recipe = ("epochs", "batch_size", "optimizer", "lr", "weight_decay", "scheduler")
    method = ("method", "kld_dim", "kld_mode", "mpa_images", "mpa_window", "mpa_stride")
    keep = ("model", "img_size", "workers", "device", *recipe, *method)
    chosen = {key: record["settings"][key] for key in keep}
    return {**chosen, **{key: record[key] for key in ("rows", "task", "machine")}}


def first_at(accuracies: list[float], target: float) -> int:
    """First epoch (from 1) whose accuracy is at least `target`; the last one if none is."""
    return next((i for i, a in enumerate(accuracies, 1) if a >= target), len(accuracies))


def agree(ours: dict, other: dict, prompts: Tensor, other_prompts: Tensor) -> dict[str, Any]:
    """How far two loops are apart.

    Returns:
        "prompts" and per epoch "train_loss", relative; per epoch "val_accuracy", absolute.
    Raises:
        Disagreement: other windows, or other losses in the first epoch.
    """
    name = f"{other['settings']['num_tokens']} prompts, seed {other['settings']['seed']}"
    if ours["picks"] != other["picks"]:
        raise Disagreement(f"{name}: windows {other['picks']}, pae selects {ours['picks']}")
    pairs = list(zip(ours["epochs"], other["epochs"], strict=True))
    losses = [abs(b["train_loss"] / a["train_loss"] - 1) for a, b in pairs]
    if losses[0] > LOSS_TOLERANCE:
        raise Disagreement(
            f"{name}: first training loss {pairs[0][1]['train_loss']}, pae has "
            f"{pairs[0][0]['train_loss']}"
        )
    return {
        "prompts": ((other_prompts - prompts).norm() / prompts.norm()).item(),
        "train_loss": losses,
        "val_accuracy": [abs(b["val_accuracy"] - a["val_accuracy"]) for a, b in pairs],
    }


def seconds(spent: dict[str, list[float]], clock: str, phases: Iterable[str] = PHASES) -> float:
    """Sum over phases."""
    return sum(spent[name][CLOCKS.index(clock)] for name in phases)


TO_TARGET = tuple(name for name in PHASES if name != "test")


def to_target(race: dict, arm: str) -> dict[str, list[float]]:
    """What was spent when the target was reached by all."""
    return race["arms"][arm]["epochs"][race["epoch"] - 1]["clock"]


def report(arguments: argparse.Namespace) -> None:
    numbers = collect(arguments.dataset, arguments.tokens, arguments.seeds, arguments.output)
    runs.write_json(arguments.to / JSON, numbers)
    for text in blocks(numbers).values():
        print(text, end="\n\n")


# ---- what pages and README show


def blocks(numbers: dict) -> dict[str, str]:
    gained = {
        f"end to end gain official {tokens}": _spread(gains(numbers, group, "official"))
        for tokens, group in _by_tokens(numbers).items()
    }
    return {
        "end to end setting": _setting(numbers),
        "end to end agreement": _agreement(numbers),
        "end to end table": _table(numbers),
        **gained,
    }


def figures(numbers: dict) -> dict[str, Callable[[], Figure]]:
    names = {"end_to_end_curves": draw_curves, "end_to_end_phases": draw_phases}
    return {name: functools.partial(draw, numbers) for name, draw in names.items()}


def gains(numbers: dict, group: list[dict], other: str) -> list[float]:
    """Per seed: how many times the seconds of "pae" another loop takes to the target."""

    def spent(race: dict, arm: str) -> float:
        return seconds(to_target(race, arm), _clock(numbers), TO_TARGET)

    return [spent(race, other) / spent(race, "pae") for race in group]


def _by_tokens(numbers: dict) -> dict[int, list[dict]]:
    groups: dict[int, list[dict]] = {}
    for race in numbers["races"]:
        groups.setdefault(race["tokens"], []).append(race)
    return dict(sorted(groups.items()))


def _clock(numbers: dict) -> str:
    """Other programs on the machine do not change process time; of a GPU's work it knows little."""
    return "wall" if numbers["facts"]["device"] == "cuda" else "process"


def _spread(values: list[float]) -> str:
    low, high = (f"{end(values):.1f}" for end in (min, max))
    return f"{low}x" if low == high else f"{low}x to {high}x"


def _setting(numbers: dict) -> str:
    facts = numbers["facts"]
    task, where = facts["task"], facts["machine"]
    size = f" at {facts['img_size']} px" if facts["img_size"] else ""
    threads = f"{where['threads']} thread" + "s" * (where["threads"] > 1)
    seeds = sorted({race["seed"] for race in numbers["races"]})
    return (
        f"{task['name']}, {task['train']} training, {task['val']} validation and {task['test']} "
        f"test images; {facts['model']}{size} ({facts['rows']} rows per image), {facts['method']} "
        f"with KLD (dimension {facts['kld_dim']}, {facts['kld_mode']}) and MPA on "
        f"{facts['mpa_images']} images; {facts['epochs']} epochs, batch {facts['batch_size']}, "
        f"{facts['optimizer']}, lr {facts['lr']:g}, fp32; {'seeds' if len(seeds) > 1 else 'seed'} "
        f"{', '.join(map(str, seeds))}. {where['device']}, {threads} and {facts['workers']} data "
        f"workers, torch {where['versions']['torch']}."
    )


def _agreement(numbers: dict) -> str:
    """The largest differences, in one sentence."""
    found = [apart for race in numbers["races"] for apart in race["agreement"].values()]
    task = numbers["facts"]["task"]
    prompts = max(apart["prompts"] for apart in found)
    first = max(apart["train_loss"][0] for apart in found)
    later = max(max(apart["train_loss"]) for apart in found)
    images = round(max(max(apart["val_accuracy"]) for apart in found) * task["val"])
    return (
        f"All loops selected the same windows in every race; first prompts differ by at most "
        f"{prompts:.0e} (relative norm), the training loss by {first:.0e} in the first epoch and "
        f"{later:.0e} in any, the validation accuracy by {images} of {task['val']} images."
    )


def _table(numbers: dict) -> str:
    clock = _clock(numbers)
    parts = " / ".join(PHASE_LABELS[name][0] for name in TO_TARGET)
    unit = "s, process time" if clock == "process" else "s"
    share = f"to {numbers['share']:.0%} of the final accuracy, {unit}"
    lines = []
    for tokens, group in _by_tokens(numbers).items():
        for arm, (label, _) in ARMS.items():
            spent = [to_target(race, arm) for race in group]
            totals = [race["arms"][arm]["total"] for race in group]
            of_it = " / ".join(f"{_mean(spent, clock, [name]):.1f}" for name in TO_TARGET)
            lines.append(
                {
                    "prompts": str(tokens),
                    "loop": label,
                    share: f"{_mean(spent, clock, TO_TARGET):.1f}",
                    f"of it {parts}": of_it,
                    "times pae's": _spread(gains(numbers, group, arm)) if arm != "pae" else "1",
                    "wall clock": f"{_mean(spent, 'wall', TO_TARGET):.0f} s",
                    f"whole run with tests, {unit}": f"{_mean(totals, clock, PHASES):.0f}",
                }
            )
    return table_of(lines)


def _mean(spent: list[dict], clock: str, phases: Iterable[str]) -> float:
    return statistics.mean(seconds(s, clock, phases) for s in spent)


def draw_curves(numbers: dict) -> Figure:
    """Validation accuracy against seconds since the start: a panel per number of prompts."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    groups, clock = _by_tokens(numbers), _clock(numbers)
    width = 1.2 + 3.2 * len(groups)
    figure, axes = style.figure(width, 3.2, 1, len(groups), sharey=True, squeeze=False)
    for panel, (tokens, group) in zip(axes[0], groups.items()):
        for arm, (label, colour) in ARMS.items():
            for number, race in enumerate(group):
                rows = race["arms"][arm]["epochs"]
                panel.plot(
                    [seconds(row["clock"], clock, TO_TARGET) for row in rows],
                    [row["val_accuracy"] for row in rows],
                    "o-",
                    color=style.COLOURS[colour],
                    alpha=0.85,
                    label=label if number == 0 else None,
                )
        for target in sorted({race["target"] for race in group}):
            panel.axhline(target, color=style.COLOURS["model"], linewidth=0.8, linestyle=":")
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"{tokens} prompts per block")
        panel.set_xlabel(_unit(clock))
    axes[0, 0].set_ylabel("validation accuracy")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(ARMS))
    return figure


def draw_phases(numbers: dict) -> Figure:
    """Where the seconds of a whole run go, mean over seeds: one bar per loop."""
    groups, clock = _by_tokens(numbers), _clock(numbers)
    figure, axes = style.figure(7.2, 0.9 + 1.1 * len(groups))
    names = {}  # by place
    for i, (tokens, group) in enumerate(groups.items()):
        for line, (arm, (label, _)) in enumerate(ARMS.items()):
            place, left = i * (len(ARMS) + 0.7) + line, 0.0
            names[place] = f"{label}, {tokens} prompts"
            for phase, (_, colour) in PHASE_LABELS.items():
                width = _mean([race["arms"][arm]["total"] for race in group], clock, [phase])
                axes.barh(place, width, left=left, color=style.COLOURS[colour], height=0.8)
                left += width
    for label, colour in PHASE_LABELS.values():
        axes.barh(0, 0, color=style.COLOURS[colour], label=label)
    axes.set_yticks(list(names), list(names.values()))
    axes.invert_yaxis()
    axes.set_xlabel(_unit(clock))
    figure.legend(loc="outside lower center", ncols=len(PHASES))
    return figure


def _unit(clock: str) -> str:
    return "process time, s" if clock == "process" else "wall clock, s"


def options(name: str, command: argparse.ArgumentParser) -> None:
    command.add_argument("--dataset", default="pneumonia", help="an image set made of files")
    command.add_argument("--tokens", nargs="+", type=int, default=[10, 50], help="per block")
    for size, default in SIZES.items() if name == "run" else ():
        command.add_argument(f"--{size.replace('_', '-')}", type=int, default=default)


if __name__ == "__main__":
    runs.main("end_to_end", {"run": run, "report": report}, options)
