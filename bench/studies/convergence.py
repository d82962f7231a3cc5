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
from functools import partial
from pathlib import Path

import torch

from bench import figures as style

from . import runs

# names agree with `bench.studies.families`, so that both studies share their runs
ARMS = {
    "vpt-deep-plain": {},
    "vpt-deep-kld": {"kld": True},
    "vpt-deep-mpa": {"mpa": True},
    "vpt-deep-pae": {"kld": True, "mpa": True},
    "vpt-deep-pae-gauge": {"kld": True, "mpa": True, "kld_gauge": "layernorm"},
    "vpt-deep-mpa-probe": {"mpa": True, "mpa_head": "linear_probe"},
    "vpt-deep-norms": {"mpa": True},
}
BASELINE, PAE, CONTROL = "vpt-deep-plain", "vpt-deep-pae", "vpt-deep-norms"
TITLES = {
    "vpt-deep-plain": "VPT-deep",
    "vpt-deep-kld": "+ KLD",
    "vpt-deep-mpa": "+ MPA",
    "vpt-deep-pae": "+ PAE (both)",
    "vpt-deep-pae-gauge": "+ PAE, gauge fixed",
    "vpt-deep-mpa-probe": "+ MPA, probe head",
    "vpt-deep-norms": "+ lengths of MPA alone",
}
COLOURS = {
    arm: style.COLOURS[key]
    for arm, key in zip(ARMS, ("plain", "kld", "mpa", "pae", "pae gauge", "mpa probe", "control"))
}
DATASETS = ("pneumonia", "elpv-defect", "fashion-mnist")
JSON = "convergence.json"


@torch.no_grad()
def random_directions(module) -> None:
    """Prompts of the same lengths, row by row, that point anywhere."""
    tokens = module.prompts.tokens
    noise = torch.randn_like(tokens)
    tokens.copy_(noise * (tokens.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)))


ON_START = {"vpt-deep-norms": random_directions}


def cells(datasets=DATASETS, seeds=range(5), arms=tuple(ARMS)):
    """All runs, seeds outermost: an early stop leaves whole seeds."""
    for seed in seeds:
        for dataset in datasets:
            for name in arms:
                yield runs.Cell(name, dataset, seed, ARMS[name], ON_START.get(name))


def run(arguments) -> None:
    chosen = cells(arguments.datasets, arguments.seeds, arguments.arms)
    runs.run(chosen, Path(arguments.output), arguments.test_size, **runs.sizes(arguments))


# ---- from runs to numbers


def report(arguments) -> None:
    """Write the numbers of all finished runs."""
    output = Path(arguments.output)
    chosen = list(cells(arguments.datasets, arguments.seeds))
    found = runs.collect(chosen, output)
    if not found:
        raise SystemExit(f"--output {output}: no finished run there")
    results: dict[str, dict[str, dict]] = {}
    for (dataset, name), records in found.items():
        baseline = found.get((dataset, BASELINE), [])
        results.setdefault(dataset, {})[name] = summary(records, baseline)
    numbers = {"facts": runs.facts(chosen, output), "results": results}
    path = Path(arguments.to) / JSON
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, numbers)
    print(blocks(numbers)["convergence table"])


def summary(records: list[dict], baseline: list[dict]) -> dict:
    """One arm on one task: means, intervals, differences from the baseline seed by seed.

    "mean val" is the validation accuracy averaged over epochs: the area under the learning curve,
    a finer measure of speed than a count of few epochs. "reached" counts epochs to 95 % of the
    *baseline's* final accuracy, one target for all arms; a run that never gets there counts as all
    its epochs.
    """
    target = {r["seed"]: runs.SHARE * r["val"][-1] for r in baseline}
    for record in records:
        record["mean val"] = statistics.mean(record["val"])
        aim, val = target.get(record["seed"]), record["val"]
        if aim is not None:
            record["reached"] = next((i for i, v in enumerate(val, 1) if v >= aim), len(val))
    traces = [gradients(r["trace"]) for r in records if r["trace"]["gradient_norm"]]
    return {
        "seeds": [r["seed"] for r in records],
        **{
            key: _with_interval([r[key] for r in records if key in r])
            for key in ("test", "mean val", "converged", "converged_seconds", "reached", "seconds")
        },
        "gain": runs.paired(records, baseline),
        "gain mean val": runs.paired(records, baseline, "mean val"),
        "gain reached": runs.paired(records, baseline, "reached"),
        "tests": [r["test"] for r in records],
        "val": [statistics.mean(v) for v in zip(*(r["val"] for r in records))],
        "val range": [[min(v), max(v)] for v in zip(*(r["val"] for r in records))],
        "gradient": {
            key: _mean_over([t[key] for t in traces]) for key in (traces[0] if traces else ())
        },
        "parameters": records[0]["parameters"],
    }


def gradients(trace: dict) -> dict:
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


def _mean_over(values):
    mean = torch.tensor(values).double().mean(0)
    if mean.dim() == 1:
        return [_short(v) for v in mean]
    return [[_short(v) for v in row] for row in mean]


def _short(value) -> float:
    return float(f"{float(value):.4g}")


def _with_interval(values: list[float]) -> dict | None:
    if not values:
        return None
    low, high = runs.bootstrap(values)
    return {"mean": _short(statistics.mean(values)), "low": _short(low), "high": _short(high)}


# ---- from numbers to text and figures


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


def _table(results: dict) -> str:
    lines = [
        "| task | arm | seeds | test accuracy | difference, seed by seed | mean val accuracy | "
        "epochs to 95 % of own end | to 95 % of VPT-deep's end | CPU seconds to 95 % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for dataset, arms in results.items():
        for name, s in arms.items():
            cells = (
                dataset,
                TITLES[name],
                str(len(s["seeds"])),
                _interval(s["test"], ".3f"),
                _gain(s["gain"]) if name != BASELINE else "",
                _interval(s["mean val"], ".3f"),
                _interval(s["converged"], ".1f"),
                _interval(s["reached"], ".1f") if s["reached"] else "",
                f"{s['converged_seconds']['mean']:.0f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(value: dict, form: str) -> str:
    return f"{value['mean']:{form}} ({value['low']:{form}} to {value['high']:{form}})"


def _gain(gain: dict | None) -> str:
    if gain is None:
        return ""
    return f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"


ENOUGH = 4  # seeds; of three, all fall on one side by chance in one case of four
# claim -> (arm, baseline, quantity of the summary, sign that confirms it)
CLAIMS = {
    "The regulariser raises accuracy": ("vpt-deep-kld", "gain", 1),
    "Modal Pre-Alignment raises accuracy": ("vpt-deep-mpa", "gain", 1),
    "The lengths of MPA's prompts alone, in random directions, raise it": (CONTROL, "gain", 1),
    "PAE raises accuracy": (PAE, "gain", 1),
    "PAE learns faster (validation accuracy averaged over epochs)": (PAE, "gain mean val", 1),
    "The lengths alone do the same": (CONTROL, "gain mean val", 1),
    "PAE needs fewer epochs to 95 % of VPT-deep's accuracy": (PAE, "gain reached", -1),
}


def verdict(gain: dict | None, sign: int) -> str:
    """In words: few seeds decide nothing, nor does an interval that contains 0."""
    if gain is None:
        return "not measured"
    if gain["seeds"] < ENOUGH:
        return "too few seeds"
    if gain["low"] <= 0 <= gain["high"]:
        return "undecided"
    return "yes" if gain["mean"] * sign > 0 else "**no, the opposite**"


def _verdicts(results: dict) -> str:
    lines = [
        "| claim | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
    ]
    for claim, (arm, key, sign) in CLAIMS.items():
        cells = []
        for arms in results.values():
            gain = arms.get(arm, {}).get(key)
            form = "+.1f" if key == "gain reached" else "+.3f"
            cells.append(f"{verdict(gain, sign)} ({gain['mean']:{form}})" if gain else "")
        lines.append(f"| {claim} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gradient_table(results: dict) -> str:
    lines = [
        "| task | arm | swing of the norm: first third of blocks, middle, last | gradient turns "
        "against the step before: first, middle, last |",
        "|---|---|---|---|",
    ]
    for dataset, arms in results.items():
        for name, s in arms.items():
            if not s["gradient"]:
                continue
            swing, flips = (_thirds(s["gradient"][key]) for key in ("swing", "flips"))
            lines.append(
                f"| {dataset} | {TITLES[name]} | {', '.join(f'{v:.2f}' for v in swing)} | "
                f"{', '.join(f'{v:.0%}' for v in flips)} |"
            )
    return "\n".join(lines)


def _thirds(values: list[float]) -> list[float]:
    third = len(values) // 3
    parts = values[:third], values[third:-third], values[-third:]
    return [statistics.mean(part) for part in parts]


def figures(numbers: dict) -> dict:
    results = numbers["results"]
    return {
        "convergence_curves": lambda: draw_curves(results),
        "convergence_gains": lambda: draw_gains(results),
        **{
            f"convergence_gradients_{dataset}": partial(draw_gradients, dataset, arms)
            for dataset, arms in results.items()
        },
    }


def draw_curves(results):
    """Validation accuracy by epoch: mean over seeds; the span of the seeds for VPT-deep and PAE."""
    figure, panels = style.figure(3.4 * len(results), 3.0, 1, len(results))
    for panel, (dataset, arms) in zip(_flat(panels), results.items()):
        for name, s in arms.items():
            epochs = range(1, len(s["val"]) + 1)
            panel.plot(epochs, s["val"], ".-", color=COLOURS[name], label=TITLES[name], lw=1.5)
            if name in (BASELINE, PAE):
                low, high = zip(*s["val range"])
                panel.fill_between(epochs, low, high, color=COLOURS[name], alpha=0.12, lw=0)
        panel.set_title(dataset)
        panel.set_xlabel("epoch")
    _flat(panels)[0].set_ylabel("validation accuracy")
    handles = _flat(panels)[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(ARMS))
    return figure


def draw_gains(results):
    """Difference in test accuracy from VPT-deep, seed by seed, with bootstrap intervals."""
    names = [name for name in ARMS if name != BASELINE]
    figure, panels = style.figure(3.0 * len(results), 2.6, 1, len(results))
    for panel, (dataset, arms) in zip(_flat(panels), results.items()):
        panel.axvline(0, color="black", lw=0.8)
        base = dict(zip(arms[BASELINE]["seeds"], arms[BASELINE]["tests"]))
        for place, name in enumerate(reversed(names)):
            gain = arms.get(name, {}).get("gain")
            if not gain:
                continue
            pairs = zip(arms[name]["seeds"], arms[name]["tests"])
            dots = [test - base[seed] for seed, test in pairs if seed in base]
            panel.plot(dots, [place] * len(dots), "o", ms=3, alpha=0.5, color=COLOURS[name])
            panel.plot([gain["low"], gain["high"]], [place] * 2, color=COLOURS[name], lw=2)
            panel.plot(gain["mean"], place, "D", ms=6, color=COLOURS[name])
        panel.set_title(dataset)
        panel.set_yticks(range(len(names)), [TITLES[name] for name in reversed(names)])
        panel.set_xlabel("test accuracy minus VPT-deep's")
    for panel in _flat(panels)[1:]:
        panel.tick_params(labelleft=False)
    return figure


def draw_gradients(dataset, arms):
    """Norm of the prompts' gradient, block by block over the steps, and how often it turns."""
    shown = [name for name in (BASELINE, "vpt-deep-kld", PAE) if name in arms]
    logs = {n: torch.tensor(arms[n]["gradient"]["norm"]).clamp_min(1e-12).log10() for n in shown}
    low = min(v.quantile(0.02).item() for v in logs.values())
    high = max(v.quantile(0.98).item() for v in logs.values())
    figure, panels = style.figure(11, 2.4, 1, len(logs) + 1)
    *maps, turns = _flat(panels)
    for panel, (name, values) in zip(maps, logs.items()):
        image = panel.imshow(  # one pixel a step and block, not smoothed
            values.T.numpy(),
            aspect="auto",
            origin="lower",
            interpolation="none",
            vmin=low,
            vmax=high,
        )
        panel.grid(False)
        panel.set_title(f"{dataset}, {TITLES[name]}")
        panel.set_xlabel("step")
    maps[0].set_ylabel("block")
    figure.colorbar(image, ax=maps, label="log10 |gradient|", pad=0.01)
    for name, s in arms.items():
        flips = [100 * v for v in s["gradient"]["flips"]]
        turns.plot(range(len(flips)), flips, color=COLOURS[name], label=TITLES[name])
    turns.set_title("steps that turn back")
    turns.set_xlabel("block")
    turns.set_ylabel("%")
    figure.legend(loc="outside upper center", ncols=len(ARMS))
    return figure


def _flat(panels) -> list:
    return list(getattr(panels, "flat", [panels]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.studies.convergence")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, work in (("run", run), ("report", report)):
        command = commands.add_parser(name)
        command.set_defaults(work=work)
        command.add_argument("--output", required=True, help="folder of the runs")
        command.add_argument("--datasets", nargs="+", default=list(DATASETS))
        if name == "run":
            command.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
            runs.add_arguments(command)
            command.set_defaults(seeds=list(range(5)))
        else:
            command.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
            command.add_argument("--to", default="bench/results/science")
    arguments = parser.parse_args()
    arguments.work(arguments)


if __name__ == "__main__":
    main()
