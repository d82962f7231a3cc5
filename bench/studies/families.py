"""Every prompt family with and without PAE on a real task, each with its own best recipe; and what
a training step of each costs, by `bench.studies.family_steps`.

The study is families.toml, which `pae sweep` runs; here is what docs/science.md shows of the
committed runs, which were made as those of `bench.studies.convergence`. With three seeds, intervals
say how far the seeds lie apart, no more. DA-VPT ran by its authors' recipe, grid included.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.table import table_of

from . import family_steps, runs
from .convergence import results, spec

STEPS = Path(__file__).parents[1] / "results" / "science" / family_steps.JSON
STEP = {"da-vpt": "da-vpt, da-vpt+"}  # whose step is measured with all that it trains here


def blocks(numbers: dict) -> dict[str, str]:
    study = spec("families.toml")
    ((task, rows),) = results(study, numbers).items()
    ratios, timed = step_times(rows)
    return {
        "families setting": (
            f"{task}; setting and grid as above, {study['seeds']} seeds, {len(numbers['runs'])} "
            f"runs. Step time: one training step of {timed['model']} with {timed['num_tokens']} "
            f"prompts, batch {timed['batch']}, over that of VPT-deep, {timed['clock']} time, where "
            "its prompts do not stay in the sequence."
        ),
        "families table": _table(rows, ratios),
        "families verdict": verdict({row: numbers["tests"] for row, numbers in rows.items()}),
    }


def step_times(rows: Iterable[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """{family: time of a step, over VPT-deep's} as far as measured, and the setting."""
    records = json.loads(STEPS.read_text())["deep"]
    measured = {family: records.get(STEP.get(family, family)) for family in rows}
    ratios = {family: family_steps.ratio(r) for family, r in measured.items() if r}
    return {"vpt-deep": 1.0, **ratios}, records["vapt"]["setting"]


def _table(rows: dict[str, dict[str, Any]], ratios: dict[str, float]) -> str:
    return table_of(
        [
            {
                "family": name,
                "chosen": f"{s['lr']:g}{' (an end)' * s['edge']}, {s['weight_decay']:g}",
                "test accuracy": runs.shown(s["test"], ".3f"),
                "every seed": ", ".join(f"{t:.3f}" for t in s["tests"].values()),
                "step time": f"{ratios[name]:.2f}x" if name in ratios else "",
                "trained": f"{s['parameters']:,}",
            }
            for name, s in rows.items()
        ]
    )


def verdict(tests: dict[str, dict[int, float]]) -> str:
    """Who gained and who lost, counted by code, of test accuracies by row's name and seed."""
    apart = {
        family: [test - tests[family][seed] for seed, test in mine.items()]
        for name, mine in tests.items()
        for family, plus, _ in [name.partition(" + ")]
        if plus
    }
    gains = {family: statistics.mean(each) for family, each in apart.items()}

    def named(chosen: Iterable[str]) -> str:
        return ", ".join(chosen) or "none"

    seeds = len(next(iter(tests.values())))
    better = [f for f, gain in gains.items() if gain > 0]
    worse = [f for f, gain in gains.items() if gain < 0]
    clear = [f for f, d in apart.items() if all(x > 0 for x in d) or all(x < 0 for x in d)]
    return (
        f"What PAE adds: {statistics.mean(gains.values()):+.3f} test accuracy on average over "
        f"{len(gains)} families; higher in {len(better)} ({named(better)}), lower in {len(worse)} "
        f"({named(worse)}). All {seeds} seeds agree in sign for {named(clear)}; of {len(gains)} "
        f"families, {len(gains) * 2 ** (1 - seeds):.1f} would by chance."
    )
