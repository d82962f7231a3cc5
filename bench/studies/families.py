"""Every prompt family with and without PAE on a real task: accuracy, speed of learning, cost.

    python -m bench.studies.families run --output runs/families [--seeds 0 1 2] [--families ...]
    python -m bench.studies.families time --output runs/families
    python -m bench.studies.families report --output runs/families

`run` trains one model after the other and can be interrupted: what is finished is not repeated.
One recipe for all, the default of `pae train` for prompts: no family is tuned, so that no family is
tuned more than another. `time` times one training step of every family beside VPT-deep. `report`
writes bench/results/science/families.json; `python -m bench.report` draws it.

Accuracy intervals are percentile bootstraps over seeds: with three seeds they say how far the seeds
lie apart, no more.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import pae
from bench import figures as style
from bench.shapes import random_batch
from bench.table import table_of
from bench.timing import CLOCKS, interleave
from pae.train import methods
from pae.train.options import Options

from . import runs

# what a family needs beyond the number of prompts, and what of PAE can be had on top: the library
# refuses the rest and says why
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "vpt-deep": ({}, ("kld", "mpa")),
    "bpt": ({"rank": 10}, ("kld", "mpa")),
    "vapt": ({}, ("kld",)),
    "ivpt": ({}, ("kld", "mpa")),
    "vfpt": ({}, ("kld", "mpa")),
    "pro-vpt": ({"sweep": "reuse"}, ("mpa",)),
    "e2vpt": ({}, ("kld", "mpa")),
    "da-vpt": ({}, ()),  # with two classes its blocks differ in their number of prompts
    "lspt": ({}, ()),
    "apt": ({}, ()),
}
# family -> why its numbers are not shown, whatever was run
WITHDRAWN = {
    "da-vpt": "its rows measured the recipe and not the method. The common rate turns its prompts, "
    "which start two to three times shorter than VPT's, that much faster; the penalty weighed 1 "
    "and 1, where nearly all of the authors' configurations have 0.01 to 0.5; and ten proxies "
    "stood for two classes, where the released code takes two"
}
VARIANTS = {"plain": "plain", "pae": "+ PAE, as far as it applies"}
JSON = "families.json"


def changes(family: str, variant: str) -> dict[str, Any]:
    """What the run of one cell of the table changes in the default settings."""
    options, parts = FAMILIES[family]
    on_top = dict.fromkeys(parts if variant == "pae" else (), True)
    return {"method": family, "method_args": options, **on_top}


def cells(dataset: str, families: Iterable[str], seeds: Iterable[int]) -> Iterator[runs.Cell]:
    """Every run, seeds outermost: an early stop leaves whole seeds."""
    for seed in seeds:
        for family in families:
            for variant in VARIANTS:
                if variant == "plain" or FAMILIES[family][1]:
                    yield runs.Cell(f"{family}-{variant}", dataset, seed, changes(family, variant))


def run(arguments: argparse.Namespace) -> None:
    chosen = cells(arguments.dataset, arguments.families, arguments.seeds)
    runs.run(chosen, arguments.output, arguments.test_size, **runs.sizes(arguments))


def time(arguments: argparse.Namespace) -> None:
    """Ratios of one training step of each family to VPT-deep's, in turns. Random weights."""
    steps, device = {}, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for family in FAMILIES:
        torch.manual_seed(0)
        chosen = Options(
            model=arguments.model,
            pretrained=False,
            num_tokens=arguments.num_tokens,
            **changes(family, "plain"),
        ).resolved()
        module = methods.build_method(chosen, 2).to(device).train()
        steps[family] = _step(module, arguments.batch, device)
        steps[family]()  # warms up
    samples = interleave(steps, arguments.rounds, device)
    times = {f: [s.seconds(arguments.clock) for s in seen] for f, seen in samples.items()}
    ratios = {
        family: statistics.median(a / b for a, b in zip(mine, times["vpt-deep"]))
        for family, mine in times.items()
    }
    keep = ("model", "num_tokens", "batch", "rounds", "clock")
    record = {**{name: getattr(arguments, name) for name in keep}, "ratio": ratios}
    runs.write_json(arguments.output / "step_time.json", record)
    for family, ratio in ratios.items():
        print(f"{family:10} {ratio:.3f}")


def _step(module: pae.PromptedViT, batch: int, device: torch.device) -> Callable[[], None]:
    images, labels = random_batch(module.backbone, 2, batch, device, torch.Generator())

    def step() -> None:
        module.prompts.see_labels(labels)
        loss = F.cross_entropy(pae.fast_forward(module, images), labels) + module.penalty()
        loss.backward()
        module.zero_grad(set_to_none=True)

    return step


# ---- from runs to numbers


def report(arguments: argparse.Namespace) -> None:
    """Write the numbers of all finished runs and of the step times."""
    output, dataset = arguments.output, arguments.dataset
    shown = [family for family in FAMILIES if family not in WITHDRAWN]
    chosen = list(cells(dataset, shown, arguments.seeds))
    found = {name: records for (_, name), records in runs.collect(chosen, output).items()}
    timing = output / "step_time.json"
    rows: dict[str, dict] = {}
    for family in shown:
        for variant in VARIANTS:
            if records := found.get(f"{family}-{variant}"):
                rows.setdefault(family, {})[variant] = {
                    **runs.summary(records),
                    "gain over plain": runs.paired(records, found.get(f"{family}-plain", [])),
                    "converged": statistics.mean(r["converged"] for r in records),
                }
    numbers = {
        "facts": runs.facts(chosen, output),
        "dataset": dataset,
        "step_time": json.loads(timing.read_text()) if timing.is_file() else None,
        "rows": rows,
    }
    runs.write_json(arguments.to / JSON, numbers)
    print(blocks(numbers)["families table"])


# ---- from numbers to text and figures


def blocks(numbers: dict) -> dict[str, str]:
    return {
        "families setting": _setting(numbers),
        "families table": _table(numbers),
        "families verdict": _verdict(numbers["rows"]),
        "families withdrawn": " ".join(
            f"Withdrawn since the first edition: {family}, as {why}."
            for family, why in WITHDRAWN.items()
        ),
    }


def _setting(numbers: dict) -> str:
    facts, timed = numbers["facts"], numbers["step_time"]
    task = facts["tasks"][numbers["dataset"]]
    text = (
        f"{numbers['dataset']}, {task['train']} training, {task['val']} validation and "
        f"{task['test']} test images; {facts['model']} at {facts['img_size']} px, "
        f"{facts['num_tokens']} prompts per block, {facts['epochs']} epochs, one recipe for all "
        f"({facts['optimizer']}, lr {facts['lr']:g}, batch {facts['batch_size']}): no family is "
        "tuned."
    )
    if timed:
        text += (
            f" Step time: one training step of {timed['model']} with {timed['num_tokens']} prompts,"
            f" batch {timed['batch']}, over that of VPT-deep, {timed['clock']} time, median of "
            f"{timed['rounds']} interleaved rounds."
        )
    return text


def _table(numbers: dict) -> str:
    ratios, lines = (numbers["step_time"] or {}).get("ratio", {}), []
    for family, variants in numbers["rows"].items():
        for variant, row in variants.items():
            plain = variant == "plain"
            parts = "plain" if plain else "+ " + " + ".join(FAMILIES[family][1]).upper()
            lines.append(
                {
                    "family": family if plain else "",
                    "variant": parts,
                    "test accuracy (95 % interval)": runs.shown(row["test"], ".3f"),
                    "every seed": ", ".join(f"{t:.3f}" for t in row["tests"]),
                    "epochs to 95 % of own end": f"{row['converged']:.1f}",
                    "step time": f"{ratios[family]:.2f}x" if plain and family in ratios else "",
                    "trained": f"{row['parameters']:,}",
                }
            )
    return table_of(lines)


def _verdict(rows: dict) -> str:
    """Who gained and who lost, counted by code."""
    both = {f: v for f, v in rows.items() if "pae" in v and v["pae"]["gain over plain"]}
    if not both:
        return "No family has been run with and without PAE."
    gains = {family: v["pae"]["gain over plain"] for family, v in both.items()}
    apart = {family: runs.differences(v["pae"], v["plain"]) for family, v in both.items()}
    mean = statistics.mean(g["mean"] for g in gains.values())
    seeds = max(g["seeds"] for g in gains.values())

    def named(chosen: Iterable[str]) -> str:
        return ", ".join(chosen) or "none"

    better = [f for f, g in gains.items() if g["mean"] > 0]
    worse = [f for f, g in gains.items() if g["mean"] < 0]
    clear = [f for f, d in apart.items() if all(x > 0 for x in d) or all(x < 0 for x in d)]
    return (
        f"What PAE adds: {mean:+.3f} test accuracy on average over {len(gains)} families; "
        f"higher in {len(better)} ({named(better)}), lower in {len(worse)} ({named(worse)}). "
        f"All {seeds} seeds agree in sign for {named(clear)}; of {len(gains)} "
        f"families, {len(gains) * 2 ** (1 - seeds):.1f} would by chance."
    )


def figures(numbers: dict) -> dict[str, Callable[[], Figure]]:
    names = {"families_accuracy": draw_accuracy, "families_curves": draw_curves}
    return {name: partial(draw, numbers["rows"]) for name, draw in names.items()}


def draw_accuracy(rows: dict) -> Figure:
    """Test accuracy by family: a dot per seed, a bar at the mean."""
    figure, axes = style.figure(8, 3.4)
    for offset, (variant, label) in zip((-0.13, 0.13), VARIANTS.items()):
        colour = style.COLOURS[variant]
        for place, variants in enumerate(rows.values()):
            if variant in variants:
                row, x = variants[variant], place + offset
                axes.plot([x] * len(row["tests"]), row["tests"], "o", ms=4, alpha=0.6, color=colour)
                axes.plot([x - 0.1, x + 0.1], [row["test"]["mean"]] * 2, lw=2, color=colour)
        axes.plot([], [], "o", color=colour, label=label)
    axes.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right")
    axes.set_ylabel("test accuracy")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def draw_curves(rows: dict) -> Figure:
    """Validation accuracy by epoch, mean over seeds, one small panel per family."""
    columns = min(5, len(rows))
    lines = -(-len(rows) // columns)
    figure, grid = style.figure(1.9 * columns, 1.9 * lines, lines, columns, squeeze=False)
    low = min(min(row["val"]) for variants in rows.values() for row in variants.values())
    for place, (family, panel) in enumerate(zip(rows, grid.flat)):
        for variant, row in rows[family].items():
            epochs = range(1, len(row["val"]) + 1)
            panel.plot(epochs, row["val"], ".-", color=style.COLOURS[variant])
        panel.set_title(family)
        if place % columns == 0:
            panel.set_ylabel("val accuracy")
        if place >= len(rows) - columns:
            panel.set_xlabel("epoch")
    for panel in grid.flat:
        panel.set_ylim(low - 0.02, 1)
    for variant, label in VARIANTS.items():
        colour = style.COLOURS[variant]
        grid[0, 0].plot([], [], ".-", color=colour, label=label.split(",")[0])
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def options(name: str, command: argparse.ArgumentParser) -> None:
    if name == "time":
        command.add_argument("--model", default="vit_base_patch16_224", help="timm name")
        command.add_argument("--num-tokens", type=int, default=50)
        command.add_argument("--batch", type=int, default=2)
        command.add_argument("--rounds", type=int, default=7)
        command.add_argument("--clock", default="process", choices=CLOCKS)
    else:
        command.add_argument("--dataset", default="pneumonia")
    if name == "run":
        command.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)


if __name__ == "__main__":
    runs.main("families", {"run": run, "time": time, "report": report}, options)
