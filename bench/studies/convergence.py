"""What PAE's parts do to VPT-deep, on several real tasks, from several seeds.

    python -m bench.studies.convergence run --output runs/science [--datasets ...] [--seeds ...]
    python -m bench.studies.convergence report --output runs/science

Arms: VPT-deep; with the Koopman-Lyapunov regulariser; with Modal Pre-Alignment under the fresh
head, and under a linear probe's head; with regulariser and pre-alignment, which is PAE; and PAE
whose regulariser sees normalised prompts, as the network does ("gauge"). A control keeps of
Modal Pre-Alignment nothing but the length of every prompt: deep prompts are seen through a
LayerNorm, so a longer prompt is one that learns more slowly, whatever its direction. All share data
cut, order and first head per seed, so differences are taken seed by seed. One recipe for all arms.

`report` writes bench/results/science/convergence.json; `python -m bench.report` draws it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn

from bench import figures as style
from bench.table import table_of

from . import runs

DATASETS = ("pneumonia", "elpv-defect", "fashion-mnist")
SEEDS = 5
JSON = "convergence.json"


@torch.no_grad()
def random_directions(module: nn.Module) -> None:
    """Prompts of the same lengths, row by row, that point anywhere."""
    tokens = module.prompts.tokens
    noise = torch.randn_like(tokens)
    tokens.copy_(noise * (tokens.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)))


class Arm(NamedTuple):
    """What pages call it, its colour's role, what it changes in the settings and at the start."""

    title: str
    colour: str
    changes: dict[str, Any]
    on_start: Callable[[nn.Module], None] | None = None


# names agree with `bench.studies.families`, so that both studies share their runs
ARMS = {
    "vpt-deep-plain": Arm("VPT-deep", "plain", {}),
    "vpt-deep-kld": Arm("+ KLD", "kld", {"kld": True}),
    "vpt-deep-mpa": Arm("+ MPA", "mpa", {"mpa": True}),
    "vpt-deep-pae": Arm("+ PAE (both)", "pae", {"kld": True, "mpa": True}),
    "vpt-deep-pae-gauge": Arm(
        "+ PAE, gauge fixed", "pae gauge", {"kld": True, "mpa": True, "kld_gauge": "layernorm"}
    ),
    "vpt-deep-mpa-probe": Arm(
        "+ MPA, probe head", "mpa probe", {"mpa": True, "mpa_head": "linear_probe"}
    ),
    "vpt-deep-norms": Arm("+ lengths of MPA alone", "control", {"mpa": True}, random_directions),
}
BASELINE, PAE, CONTROL = "vpt-deep-plain", "vpt-deep-pae", "vpt-deep-norms"


def cells(
    datasets: Iterable[str] = DATASETS,
    seeds: Iterable[int] = range(SEEDS),
    arms: Iterable[str] = tuple(ARMS),
) -> Iterator[runs.Cell]:
    """All runs, seeds outermost: an early stop leaves whole seeds."""
    for seed in seeds:
        for dataset in datasets:
            for name in arms:
                yield runs.Cell(name, dataset, seed, ARMS[name].changes, ARMS[name].on_start)


def run(arguments: argparse.Namespace) -> None:
    chosen = cells(arguments.datasets, arguments.seeds, arguments.arms)
    runs.run(chosen, arguments.output, arguments.test_size, **runs.sizes(arguments))


# ---- from runs to numbers


def report(arguments: argparse.Namespace) -> None:
    """Write the numbers of all finished runs."""
    chosen = list(cells(arguments.datasets, arguments.seeds))
    found = runs.collect(chosen, arguments.output)
    results: dict[str, dict[str, dict]] = {}
    for (dataset, name), records in found.items():
        baseline = found.get((dataset, BASELINE), [])
        results.setdefault(dataset, {})[name] = summary(records, baseline)
    numbers = {"facts": runs.facts(chosen, arguments.output), "results": results}
    runs.write_json(arguments.to / JSON, numbers)
    print(blocks(numbers)["convergence table"])


def summary(records: list[dict], baseline: list[dict]) -> dict[str, Any]:
    """One arm on one task: means, intervals, differences from the baseline seed by seed.

    "mean val" is the validation accuracy averaged over epochs: the area under the learning curve,
    a finer measure of speed than a count of few epochs. "reached" counts epochs to 95 % of the
    *baseline's* final accuracy, one target for all arms; a run that never gets there counts as all
    its epochs.
    """
    target = {r["seed"]: runs.SHARE * r["val"][-1] for r in baseline}
    for record in records:
        record["mean val"] = statistics.mean(record["val"])
        if record["seed"] in target:
            record["reached"] = runs.first_at(record["val"], target[record["seed"]])
    traces = [gradients(r["trace"]) for r in records if r["trace"]["gradient_norm"]]
    return {
        **runs.summary(records),
        **{
            key: runs.interval([r[key] for r in records if key in r])
            for key in ("mean val", "converged", "converged_seconds", "reached")
        },
        "gain": runs.paired(records, baseline),
        "gain mean val": runs.paired(records, baseline, "mean val"),
        "gain reached": runs.paired(records, baseline, "reached"),
        "val range": [[min(v), max(v)] for v in zip(*(r["val"] for r in records))],
        "gradient": {
            key: _mean_over([t[key] for t in traces]) for key in (traces[0] if traces else ())
        },
    }


def gradients(trace: dict) -> dict[str, list]:
    """How restless the prompts' gradient is, per block. The regulariser's part is in it.

    norm (steps, depth); swing: standard deviation over mean of the norm, over the steps; flips:
    share of steps whose gradient points against the step before (negative cosine).
    """
    norm = torch.tensor(trace["gradient_norm"])
    cosine = torch.tensor(trace["cosine_with_last"])
    return {
        "norm": norm.tolist(),
        "swing": (norm.std(0) / norm.mean(0)).tolist(),
        "flips": (cosine < 0).double().mean(0).tolist(),
    }


def _mean_over(values: list) -> list:
    mean = torch.tensor(values).double().mean(0)
    mean.apply_(runs.short)
    return mean.tolist()


# ---- from numbers to text


def blocks(numbers: dict) -> dict[str, str]:
    return {
        "convergence setting": _setting(numbers["facts"]),
        "convergence table": _table(numbers["results"]),
        "convergence verdicts": _verdicts(numbers["results"]),
        "convergence gradients": _gradient_table(numbers["results"]),
    }


def _setting(facts: dict) -> str:
    sizes = "; ".join(
        f"{name}: {t['classes']} classes, {t['train']} / {t['val']} / {t['test']} images"
        for name, t in facts["tasks"].items()
    )
    return (
        f"Backbone {facts['model']} at {facts['img_size']} px, {facts['num_tokens']} prompts per "
        f"block, {facts['epochs']} epochs of batch {facts['batch_size']}, {facts['optimizer']} at "
        f"{facts['lr']:g}, cosine. Train / validation / test: {sizes}. pae "
        f"{facts['versions']['pae']}, torch {facts['versions']['torch']}, CPU."
    )


def _arms(results: dict) -> Iterator[tuple[str, str, dict]]:
    for dataset, arms in results.items():
        yield from ((dataset, name, found) for name, found in arms.items())


def _table(results: dict) -> str:
    return table_of(
        [
            {
                "task": dataset,
                "arm": ARMS[name].title,
                "seeds": str(len(s["seeds"])),
                "test accuracy": runs.shown(s["test"], ".3f"),
                "difference, seed by seed": runs.shown(s["gain"], "+.3f")
                if name != BASELINE
                else "",
                "mean val accuracy": runs.shown(s["mean val"], ".3f"),
                "epochs to 95 % of own end": runs.shown(s["converged"], ".1f"),
                "to 95 % of VPT-deep's end": runs.shown(s["reached"], ".1f"),
                "CPU seconds to 95 %": f"{s['converged_seconds']['mean']:.0f}",
            }
            for dataset, name, s in _arms(results)
        ]
    )


ENOUGH = 4  # seeds; of three, all fall on one side by chance in one case of four
# claim -> (arm, quantity of the summary, sign that confirms it)
CLAIMS = {
    "The regulariser raises accuracy": ("vpt-deep-kld", "gain", 1),
    "Modal Pre-Alignment raises accuracy": ("vpt-deep-mpa", "gain", 1),
    "The lengths of MPA's prompts alone, in random directions, raise it": (CONTROL, "gain", 1),
    "PAE raises accuracy": (PAE, "gain", 1),
    "PAE learns faster (validation accuracy averaged over epochs)": (PAE, "gain mean val", 1),
    "The lengths alone do the same": (CONTROL, "gain mean val", 1),
    "PAE needs fewer epochs to 95 % of VPT-deep's accuracy": (PAE, "gain reached", -1),
}


def verdict(gain: dict, sign: int) -> str:
    """In words: few seeds decide nothing, nor does an interval that contains 0."""
    if gain["seeds"] < ENOUGH:
        return "too few seeds"
    if gain["low"] <= 0 <= gain["high"]:
        return "undecided"
    return "yes" if gain["mean"] * sign > 0 else "**no, the opposite**"


def _verdicts(results: dict) -> str:
    lines = []
    for claim, (arm, key, sign) in CLAIMS.items():
        gains = {dataset: arms.get(arm, {}).get(key) for dataset, arms in results.items()}
        form = "+.1f" if key == "gain reached" else "+.3f"
        said = {
            d: f"{verdict(g, sign)} ({g['mean']:{form}})" if g else "" for d, g in gains.items()
        }
        lines.append({"claim": claim, **said})
    return table_of(lines)


def _gradient_table(results: dict) -> str:
    return table_of(
        [
            {
                "task": dataset,
                "arm": ARMS[name].title,
                "swing of the norm: first third of blocks, middle, last": _thirds(
                    s["gradient"]["swing"], ".2f"
                ),
                "gradient turns against the step before: first, middle, last": _thirds(
                    s["gradient"]["flips"], ".0%"
                ),
            }
            for dataset, name, s in _arms(results)
            if s["gradient"]
        ]
    )


def _thirds(values: list[float], form: str) -> str:
    third = len(values) // 3
    parts = values[:third], values[third:-third], values[-third:]
    return ", ".join(f"{statistics.mean(part):{form}}" for part in parts)


# ---- from numbers to figures


def figures(numbers: dict) -> dict[str, Callable[[], Figure]]:
    results = numbers["results"]
    drawn: dict[str, Callable[[], Figure]] = {
        f"convergence_gradients_{dataset}": partial(draw_gradients, dataset, arms)
        for dataset, arms in results.items()
    }
    drawn["convergence_curves"] = partial(draw_curves, results)
    drawn["convergence_gains"] = partial(draw_gains, results)
    return drawn


def _look(name: str) -> dict[str, str]:
    """Colour and label of an arm's line."""
    return {"color": style.COLOURS[ARMS[name].colour], "label": ARMS[name].title}


def _panels(results: dict, width: float, height: float) -> tuple[Figure, list[tuple[Any, dict]]]:
    """A panel for each task, side by side: (axes, arms)."""
    count = len(results)
    figure, grid = style.figure(width * count, height, 1, count, squeeze=False)
    for panel, dataset in zip(grid[0], results):
        panel.set_title(dataset)
    return figure, list(zip(grid[0], results.values()))


def draw_curves(results: dict) -> Figure:
    """Validation accuracy by epoch: mean over seeds; the span of the seeds for VPT-deep and PAE."""
    figure, panels = _panels(results, 3.4, 3.0)
    for panel, arms in panels:
        for name, s in arms.items():
            epochs = range(1, len(s["val"]) + 1)
            panel.plot(epochs, s["val"], ".-", lw=1.5, **_look(name))
            if name in (BASELINE, PAE):
                low, high = zip(*s["val range"])
                panel.fill_between(epochs, low, high, color=_look(name)["color"], alpha=0.12, lw=0)
        panel.set_xlabel("epoch")
    first = panels[0][0]
    first.set_ylabel("validation accuracy")
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=len(ARMS))
    return figure


def draw_gains(results: dict) -> Figure:
    """Difference in test accuracy from VPT-deep, seed by seed, with bootstrap intervals."""
    names = [name for name in reversed(ARMS) if name != BASELINE]
    figure, panels = _panels(results, 3.0, 2.6)
    for panel, arms in panels:
        panel.axvline(0, color="black", lw=0.8)
        for place, name in enumerate(names):
            gain, colour = arms.get(name, {}).get("gain"), _look(name)["color"]
            if not gain:
                continue
            dots = runs.differences(arms[name], arms[BASELINE])
            panel.plot(dots, [place] * len(dots), "o", ms=3, alpha=0.5, color=colour)
            panel.plot([gain["low"], gain["high"]], [place] * 2, color=colour, lw=2)
            panel.plot(gain["mean"], place, "D", ms=6, color=colour)
        panel.set_yticks(range(len(names)), [ARMS[name].title for name in names])
        panel.set_xlabel("test accuracy minus VPT-deep's")
    for panel, _ in panels[1:]:
        panel.tick_params(labelleft=False)
    return figure


def draw_gradients(dataset: str, arms: dict) -> Figure:
    """Norm of the prompts' gradient, block by block over the steps, and how often it turns."""
    shown = [name for name in (BASELINE, "vpt-deep-kld", PAE) if name in arms]
    logs = {n: torch.tensor(arms[n]["gradient"]["norm"]).clamp_min(1e-12).log10() for n in shown}
    low = min(v.quantile(0.02).item() for v in logs.values())
    high = max(v.quantile(0.98).item() for v in logs.values())
    figure, panels = style.figure(11, 2.4, 1, len(logs) + 1)
    *maps, turns = panels
    for panel, (name, values) in zip(maps, logs.items()):
        # one pixel a step and block, not smoothed
        how = {"aspect": "auto", "origin": "lower", "interpolation": "none"}
        image = panel.imshow(values.T.numpy(), vmin=low, vmax=high, **how)
        panel.grid(False)
        panel.set_title(f"{dataset}, {ARMS[name].title}")
        panel.set_xlabel("step")
    maps[0].set_ylabel("block")
    figure.colorbar(image, ax=maps, label="log10 |gradient|", pad=0.01)
    for name, s in arms.items():
        flips = [100 * v for v in s["gradient"]["flips"]]
        turns.plot(range(len(flips)), flips, **_look(name))
    turns.set_title("steps that turn back")
    turns.set_xlabel("block")
    turns.set_ylabel("%")
    figure.legend(loc="outside upper center", ncols=len(ARMS))
    return figure


def options(name: str, command: argparse.ArgumentParser) -> None:
    command.add_argument("--datasets", nargs="+", default=list(DATASETS))
    if name == "run":
        command.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)


if __name__ == "__main__":
    runs.main("convergence", {"run": run, "report": report}, options, SEEDS)
