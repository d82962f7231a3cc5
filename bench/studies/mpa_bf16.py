"""Whether Modal Pre-Alignment in bf16 selects the windows that it selects in fp32, and its time.

    python -m bench.studies.mpa_bf16 run --output runs/mpa_bf16 [--datasets ...] [--seeds ...]
    python -m bench.studies.mpa_bf16 report --output runs/mpa_bf16

Every cell aligns one model twice, as `pae train` does before its first step: same images, same
random head. "Rounded" is the selection by bf16 losses alone; "checked" is what `precision="bf16"`
returns, in which the windows near the boundary were measured again in fp32. Times are process time;
`report` says on which processor, for bf16 products are several times as fast as fp32's on one and
half as fast on another.

`report` writes bench/results/science/mpa_bf16.json; `python -m bench.report` puts it on the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import set_seed

import pae
from bench.roofline import bf16_instructions, device_name
from bench.table import table_of
from pae.train import loop
from pae.train.options import Options, bf16_gain
from pae.train.report import Reporter
from pae.train.runfolder import RunFolder

from . import convergence, runs

JSON = "mpa_bf16.json"
SEEDS = 5


class _Aligned(loop._Run):
    """A run that gets as far as its first prompts."""

    process_seconds = 0.0

    def _align(self) -> None:
        began = time.process_time()
        super()._align()
        self.process_seconds = time.process_time() - began


def run(arguments: argparse.Namespace) -> None:
    for seed in arguments.seeds:
        for dataset in arguments.datasets:
            path = arguments.output / f"{dataset}-{seed}.json"
            if not path.is_file():
                cell = measure(dataset, seed, **runs.sizes(arguments))
                runs.write_json(path, cell)
                print(f"{dataset} {seed}: {cell}", flush=True)


def measure(dataset: str, seed: int, **common: Any) -> dict[str, Any]:
    """Both alignments of one model, compared."""
    found, seconds = {}, {}
    for precision in ("exact", "bf16"):
        own = {"dataset": dataset, "seed": seed, "mpa": True, "mpa_precision": precision}
        chosen = {"method": "vpt-deep", "workers": 0, "amp": "no", **common, **own}
        options = Options(**chosen).resolved()
        task = dataclasses.replace(loop.load_task(options), test=None)
        with tempfile.TemporaryDirectory() as folder:
            set_seed(seed)
            place = RunFolder(folder), loop.make_accelerator(options), Reporter(quiet=True)
            aligned = _Aligned(options, task, *place, None, None, None, None)
        found[precision], seconds[precision] = aligned.alignment, aligned.process_seconds
    return {
        "dataset": dataset,
        "seed": seed,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        **compared(found["exact"], found["bf16"]),
    }


def compared(exact: pae.MPAResult, checked: pae.MPAResult) -> dict[str, Any]:
    """What `checked`, in bf16, made of the selection of `exact`.

    Losses are told in standard deviations of all windows' losses: "error" is the largest of a
    rounded loss among those measured twice, its common part apart (it moves no window past
    another); "gap" lies between the last window selected and the first one left out.
    """
    ties = checked.near_ties
    assert ties is not None
    right, got = set(exact.selected.tolist()), set(checked.selected.tolist())
    rounded = got - set(ties.added.tolist()) | set(ties.dropped.tolist())
    ordered, count = exact.losses.double().sort().values, len(exact.selected)
    spread = ordered.std()
    return {
        "windows": len(ordered),
        "prompts": count,
        "rechecked": len(ties.rechecked),
        "rounded_misses": len(right - rounded),
        "checked_misses": len(right - got),
        "same_order": torch.equal(exact.selected, checked.selected),
        "error": runs.short(((ties.error[1] - ties.error[0]) / 2 / spread).item()),
        "gap": runs.short(((ordered[count] - ordered[count - 1]) / spread).item()),
    }


def report(arguments: argparse.Namespace) -> None:
    """Write the numbers of all finished cells, and what the processor makes of bf16."""
    cells = [
        json.loads(path.read_text())
        for dataset in arguments.datasets
        for seed in arguments.seeds
        if (path := arguments.output / f"{dataset}-{seed}.json").is_file()
    ]
    if not cells:
        raise SystemExit(f"--output {arguments.output}: no finished cell there")
    facts = {
        "processor": device_name(torch.device("cpu")),
        "instructions": bf16_instructions(),
        "torch": str(torch.__version__),
        "bf16_product_gain": runs.short(bf16_gain()),
        "settings": {"img_size": arguments.img_size, "mpa_images": arguments.mpa_images},
    }
    numbers = {"facts": facts, "cells": cells}
    runs.write_json(arguments.to / JSON, numbers)
    print(blocks(numbers)["mpa bf16 table"])


# ---- from numbers to text


def blocks(numbers: dict) -> dict[str, str]:
    return {"mpa bf16 setting": _setting(numbers), "mpa bf16 table": _table(numbers["cells"])}


def _setting(numbers: dict) -> str:
    facts, cell = numbers["facts"], numbers["cells"][0]
    return (
        f"{cell['prompts']} of {cell['windows']} windows, {facts['settings']['mpa_images']} images "
        f"at {facts['settings']['img_size']} px, fresh head. {facts['processor']} with "
        f"{' and '.join(facts['instructions']) or 'no bf16 instructions'}, where a bf16 product "
        f"runs at {facts['bf16_product_gain']:.2g}x the rate of an fp32 one; torch "
        f"{facts['torch']}, 1 thread, process time."
    )


def _by_dataset(cells: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    for dataset in dict.fromkeys(cell["dataset"] for cell in cells):
        yield dataset, [cell for cell in cells if cell["dataset"] == dataset]


def _table(cells: list[dict]) -> str:
    lines = []
    for dataset, mine in _by_dataset(cells):

        def over(key: str, mine: list[dict] = mine) -> list:
            return [cell[key] for cell in mine]

        n = len(mine)
        ratio = statistics.median(c["seconds"]["bf16"] / c["seconds"]["exact"] for c in mine)
        lines.append(
            {
                "task": dataset,
                "seeds": str(n),
                "same windows, rounded": f"{sum(m == 0 for m in over('rounded_misses'))} of {n}",
                "most missed, rounded": f"{max(over('rounded_misses'))} of {mine[0]['prompts']}",
                "same windows, checked": f"{sum(m == 0 for m in over('checked_misses'))} of {n}",
                "same order, checked": f"{sum(over('same_order'))} of {n}",
                "error of a loss, most": f"{max(over('error')):.2g}",
                "gap at the boundary, least": f"{min(over('gap')):.2g}",
                "measured again, most": f"{max(over('rechecked'))} of {mine[0]['windows']}",
                "time, bf16 over fp32": f"{ratio:.2f}x",
            }
        )
    return table_of(lines)


def figures(numbers: dict) -> dict[str, Callable[[], Any]]:
    """None: the table says it all."""
    return {}


def options(name: str, command: argparse.ArgumentParser) -> None:
    command.add_argument("--datasets", nargs="+", default=list(convergence.DATASETS))
    if name == "report":  # what the runs had
        command.add_argument("--img-size", type=int, default=84)
        command.add_argument("--mpa-images", type=int, default=4)


if __name__ == "__main__":
    runs.main("mpa_bf16", {"run": run, "report": report}, options, SEEDS)
