"""Every prompt family with and without PAE on a real task, each with its own best recipe; and what
a training step of each costs, by `bench.studies.family_steps`.

    python -m bench.studies.families plan   [--output runs/science]
    python -m bench.studies.families run    --output runs/science --minutes 60 [--piece ...]
    python -m bench.studies.families report --output runs/science

The protocol is that of `bench.studies.convergence`, with three seeds: with three, intervals say how
far the seeds lie apart, no more. DA-VPT runs by its authors' recipe, of which the grid is part.
`report` writes bench/results/science/families.json; `python -m bench.report` draws it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.table import table_of

from . import convergence, family_steps, protocol, runs
from .protocol import Arm, Study

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
    "da-vpt": ({"patch_weight": 0.05, "class_weight": 0.05}, ()),
    "lspt": ({}, ()),
    "apt": ({}, ()),
}
# DA-VPT+ as its authors ran it, but for drop-path, which the fast engine has not
DA_VPT = {
    "train_backbone": "da-vpt+",
    "scheduler": "cosine",
    "per_class": 2,
    "clip_value": 10.0,
}
DA_VPT_GRID = (5e-4, 1.6e-3, 5e-3), (1e-2, 1e-1)
VARIANTS = {"plain": "plain", "pae": "+ PAE, as far as it applies"}
STEPS = Path(__file__).parents[1] / "results" / "science" / family_steps.JSON
# whose step is measured with all that it trains here
STEP = {"da-vpt": "da-vpt, da-vpt+"}


def changes(family: str, variant: str) -> dict[str, Any]:
    """What a row changes in the recipe; VPT-deep's rows are runs of the other study."""
    options, parts = FAMILIES[family]
    own: dict[str, Any] = {"method": family} if family != "vpt-deep" else {}
    if options:
        own["method_args"] = options
    if family == "bpt":  # it has none
        own["dropout"] = 0.0
    on_top = dict.fromkeys(parts if variant == "pae" else (), True)
    return {**own, **(DA_VPT if family == "da-vpt" else {}), **on_top}


def arms() -> dict[str, Arm]:
    """By "FAMILY VARIANT"."""
    return {
        f"{family} {variant}": Arm(
            family if variant == "plain" else f"{family} + {' + '.join(parts).upper()}",
            variant,
            changes(family, variant),
            *(DA_VPT_GRID if family == "da-vpt" else ()),
        )
        for family, (_, parts) in FAMILIES.items()
        for variant in VARIANTS
        if variant == "plain" or parts
    }


STUDY = Study("families.json", ("fashion-mnist",), arms(), seeds=3)
DATASET = STUDY.datasets[0]


def report(arguments: argparse.Namespace) -> None:
    """Write the records of all finished runs."""
    print(blocks(protocol.store(STUDY, arguments))["families table"])


# ---- from numbers to text and figures


def results(numbers: dict) -> dict[str, dict[str, dict]]:
    """family -> variant -> `convergence.summary`, PAE's differences being from the family's own."""
    found = numbers["runs"]
    rows: dict[str, dict[str, dict]] = {}
    for family in FAMILIES:
        own = {v: arm for v in VARIANTS if (arm := STUDY.arms.get(f"{family} {v}"))}
        rows[family] = convergence.results(STUDY._replace(arms=own), found, DATASET)
    return rows


def blocks(numbers: dict) -> dict[str, str]:
    rows, (ratios, timed) = results(numbers), step_times()
    return {
        "families setting": (
            f"{DATASET}; setting and grid as above, {STUDY.seeds} seeds. Step time: one training "
            f"step of {timed['model']} with {timed['num_tokens']} prompts, batch {timed['batch']}, "
            f"over that of VPT-deep, {timed['clock']} time, where its prompts do not stay in the "
            "sequence."
        ),
        "families progress": convergence.progress(STUDY, numbers["runs"]),
        "families table": _table(rows, ratios),
        "families verdict": verdict(rows),
    }


def step_times() -> tuple[dict[str, float], dict[str, Any]]:
    """{family: time of a step, over VPT-deep's} as far as measured, and the setting."""
    records = json.loads(STEPS.read_text())["deep"]
    measured = {family: records.get(STEP.get(family, family)) for family in FAMILIES}
    ratios = {family: family_steps.ratio(r) for family, r in measured.items() if r}
    return {"vpt-deep": 1.0, **ratios}, records["vapt"]["setting"]


def _table(rows: dict[str, dict[str, dict]], ratios: dict[str, float]) -> str:
    lines = []
    for family, variants in rows.items():
        for variant, s in variants.items():
            plain, done = variant == "plain", not s["open"]
            state, s = "complete" if done else f"open, {s['open']}", s if done else {}
            lines.append(
                {
                    "family": STUDY.arms[f"{family} {variant}"].title,
                    "state": state,
                    "chosen": (
                        f"{s['lr']:g}{' (an end)' * s['edge']}, {s['weight_decay']:g}"
                        if done
                        else ""
                    ),
                    "test accuracy": runs.shown(s.get("test"), ".3f"),
                    "every seed": ", ".join(f"{t:.3f}" for t in s.get("tests", {}).values()),
                    "step time": f"{ratios[family]:.2f}x" if plain and family in ratios else "",
                    "trained": f"{s['parameters']:,}" if s.get("parameters") else "",
                }
            )
    return table_of(lines)


def verdict(rows: dict[str, dict[str, dict]]) -> str:
    """Who gained and who lost, counted by code, once every family has been run."""
    pairs = {family: variants for family, variants in rows.items() if "pae" in variants}
    whole = {f: v for f, v in pairs.items() if not (v["plain"]["open"] or v["pae"]["open"])}
    if len(whole) < len(pairs):
        return (
            f"Open: {len(whole)} of {len(pairs)} families have all their runs with and without PAE."
        )
    gains = {family: v["pae"]["gain"] for family, v in whole.items()}
    apart = {
        f: [test - v["plain"]["tests"][seed] for seed, test in v["pae"]["tests"].items()]
        for f, v in whole.items()
    }

    def named(chosen: Iterable[str]) -> str:
        return ", ".join(chosen) or "none"

    mean, seeds = statistics.mean(g["mean"] for g in gains.values()), STUDY.seeds
    better = [f for f, g in gains.items() if g["mean"] > 0]
    worse = [f for f, g in gains.items() if g["mean"] < 0]
    clear = [f for f, d in apart.items() if all(x > 0 for x in d) or all(x < 0 for x in d)]
    return (
        f"What PAE adds: {mean:+.3f} test accuracy on average over {len(gains)} families; "
        f"higher in {len(better)} ({named(better)}), lower in {len(worse)} ({named(worse)}). "
        f"All {seeds} seeds agree in sign for {named(clear)}; of {len(gains)} "
        f"families, {len(gains) * 2 ** (1 - seeds):.1f} would by chance."
    )


if __name__ == "__main__":
    protocol.main(STUDY, {"report": report})
