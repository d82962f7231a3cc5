"""Every prompt family with and without PAE on a real task: accuracy, speed of learning, cost.

    python -m bench.studies.families run --output runs/families [--seeds 0 1 2] [--families ...]
    python -m bench.studies.families time --output runs/families
    python -m bench.studies.families report --output runs/families

`run` trains one model after the other and can be interrupted: what is finished is not repeated, the
rest is resumed. One recipe for all, the default of `pae train` for prompts: no family is tuned, so
that no family is tuned more than another. `time` races one training step of every family against
VPT-deep. `report` writes bench/results/science/families.json; `python -m bench.report` draws it.

Accuracy intervals are percentile bootstraps over seeds: with three seeds they say how far the seeds
lie apart, no more.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

import pae
from bench import figures as style
from bench.timing import CLOCKS, measure
from pae.train import methods
from pae.train.settings import Settings

from . import runs

# what a family needs beyond the number of prompts
FAMILIES = {
    "vpt-deep": {},
    "bpt": {"rank": 10},
    "vapt": {},
    "ivpt": {},
    "vfpt": {},
    "pro-vpt": {"sweep": "reuse"},
    "e2vpt": {},
    "da-vpt": {},
    "lspt": {},
    "apt": {},
}
# what PAE can be had on top of each; the library refuses the rest and says why
PAE = {
    "vpt-deep": ("kld", "mpa"),
    "bpt": ("kld", "mpa"),
    "vapt": ("kld",),
    "ivpt": ("kld", "mpa"),
    "vfpt": ("kld", "mpa"),
    "pro-vpt": ("mpa",),
    "e2vpt": ("kld", "mpa"),
    "da-vpt": ("kld", "mpa"),
    "lspt": (),
    "apt": (),
}
VARIANTS = ("plain", "pae")
COLOURS = {variant: style.COLOURS[variant] for variant in VARIANTS}
JSON = "families.json"


def changes(family: str, variant: str) -> dict:
    """What the run of one cell of the table changes in the default settings."""
    on_top = dict.fromkeys(PAE[family] if variant == "pae" else (), True)
    return {"method": family, "family": FAMILIES[family], **on_top}


def cells(dataset, families, seeds):
    """Every run, seeds outermost: an early stop leaves whole seeds."""
    for seed in seeds:
        for family in families:
            for variant in VARIANTS:
                if variant == "plain" or PAE[family]:
                    yield runs.Cell(f"{family}-{variant}", dataset, seed, changes(family, variant))


def run(arguments) -> None:
    chosen = cells(arguments.dataset, arguments.families, arguments.seeds)
    runs.run(chosen, Path(arguments.output), arguments.test_size, **runs.sizes(arguments))


def time(arguments) -> None:
    """Race one training step of each family with VPT-deep; write the ratios. Random weights."""
    steps, clock = {}, arguments.clock
    for family in FAMILIES:
        torch.manual_seed(0)
        chosen = Settings(
            model=arguments.model,
            pretrained=False,
            num_tokens=arguments.num_tokens,
            **changes(family, "plain"),
        ).resolved()
        module = methods.build_method(chosen, 2)
        module = module.to(chosen.device).train()
        steps[family] = _step(module, chosen, arguments.batch)
    rounds = {family: [] for family in steps}
    for repeat in range(arguments.rounds + 1):
        for family, step in steps.items():
            sample = measure(step, torch.device(chosen.device))
            if repeat:  # the first round warms up
                rounds[family].append(sample.seconds(clock))
    ratios = {
        family: statistics.median(a / b for a, b in zip(times, rounds["vpt-deep"]))
        for family, times in rounds.items()
    }
    keep = ("model", "num_tokens", "batch", "rounds", "clock")
    record = {**{name: getattr(arguments, name) for name in keep}, "ratio": ratios}
    runs.write_json(Path(arguments.output) / "step_time.json", record)
    for family, ratio in ratios.items():
        print(f"{family:10} {ratio:.3f}")


def _step(module, chosen, batch):
    size = module.backbone.patch_embed.img_size
    images = torch.randn(batch, 3, *size, device=chosen.device)
    labels = torch.arange(batch, device=chosen.device) % 2

    def step():
        module.prompts.see_labels(labels)
        loss = F.cross_entropy(pae.fast_forward(module, images), labels) + module.penalty()
        loss.backward()
        module.zero_grad(set_to_none=True)

    return step


# ---- from runs to numbers, text and figures


def report(arguments) -> None:
    """Write the numbers of all finished runs and of the step times."""
    output = Path(arguments.output)
    chosen = list(cells(arguments.dataset, list(FAMILIES), arguments.seeds))
    found = runs.collect(chosen, output)
    if not found:
        raise SystemExit(f"--output {output}: no finished run there")
    timing = output / "step_time.json"
    baseline = {v: found.get((arguments.dataset, f"vpt-deep-{v}"), []) for v in VARIANTS}
    rows = {}
    for family in FAMILIES:
        for variant in VARIANTS:
            records = found.get((arguments.dataset, f"{family}-{variant}"))
            if records:
                own = found.get((arguments.dataset, f"{family}-plain"), [])
                rows.setdefault(family, {})[variant] = _row(records, own, baseline[variant])
    numbers = {
        "facts": runs.facts(chosen, output),
        "dataset": arguments.dataset,
        "step_time": json.loads(timing.read_text()) if timing.is_file() else None,
        "rows": rows,
    }
    path = Path(arguments.to) / JSON
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, numbers)
    print(blocks(numbers)["families table"])


def _row(records, own, deep) -> dict:
    low, high = runs.bootstrap([r["test"] for r in records])
    return {
        "seeds": [r["seed"] for r in records],
        "tests": [r["test"] for r in records],
        "test": {"mean": statistics.mean(r["test"] for r in records), "low": low, "high": high},
        "gain over plain": runs.paired(records, own),
        "gain over vpt-deep": runs.paired(records, deep),
        "converged": statistics.mean(r["converged"] for r in records),
        "val": [statistics.mean(v) for v in zip(*(r["val"] for r in records))],
        "parameters": records[0]["parameters"],
    }


def blocks(numbers: dict) -> dict[str, str]:
    return {
        "families setting": _setting(numbers),
        "families table": _table(numbers),
        "families verdict": _verdict(numbers["rows"]),
    }


def _setting(numbers) -> str:
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


def _table(numbers) -> str:
    lines = [
        "| family | variant | test accuracy (95 % interval) | every seed | epochs to 95 % of own "
        "end | step time | trained |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios = (numbers["step_time"] or {}).get("ratio", {})
    for family, variants in numbers["rows"].items():
        for variant, row in variants.items():
            ratio = f"{ratios[family]:.2f}x" if variant == "plain" and family in ratios else ""
            test = row["test"]
            lines.append(
                f"| {family if variant == 'plain' else ''} | {_variant(family, variant)} | "
                f"{test['mean']:.3f} ({test['low']:.3f} to {test['high']:.3f}) | "
                f"{', '.join(f'{t:.3f}' for t in row['tests'])} | {row['converged']:.1f} | "
                f"{ratio} | {row['parameters']:,} |"
            )
    return "\n".join(lines)


def _variant(family, variant) -> str:
    return "plain" if variant == "plain" else "+ " + " + ".join(PAE[family]).upper()


def _verdict(rows) -> str:
    """Who gained and who lost, counted by code."""
    gains = {f: v["pae"]["gain over plain"] for f, v in rows.items() if "pae" in v}
    gains = {family: gain for family, gain in gains.items() if gain}
    if not gains:
        return "No family has been run with and without PAE."
    better = [f for f, g in gains.items() if g["mean"] > 0]
    worse = [f for f, g in gains.items() if g["mean"] < 0]
    mean = statistics.mean(g["mean"] for g in gains.values())
    text = (
        f"What PAE adds: {mean:+.3f} test accuracy on average over {len(gains)} families; "
        f"higher in {len(better)} ({', '.join(better) or 'none'}), "
        f"lower in {len(worse)} ({', '.join(worse) or 'none'}). "
    )
    clear = [f for f, v in rows.items() if "pae" in v and _same_sign(v)]
    seeds = max(g["seeds"] for g in gains.values())
    return text + (
        f"All {seeds} seeds agree in sign for {', '.join(clear) or 'none'}; of {len(gains)} "
        f"families, {len(gains) * 2 ** (1 - seeds):.1f} would by chance."
    )


def _same_sign(variants) -> bool:
    plain = dict(zip(variants["plain"]["seeds"], variants["plain"]["tests"]))
    pairs = zip(variants["pae"]["seeds"], variants["pae"]["tests"])
    gains = [test - plain[seed] for seed, test in pairs if seed in plain]
    return all(g > 0 for g in gains) or all(g < 0 for g in gains)


LABELS = {"plain": "plain", "pae": "+ PAE, as far as it applies"}


def figures(numbers: dict) -> dict:
    rows = numbers["rows"]
    return {
        "families_accuracy": lambda: draw_accuracy(rows),
        "families_curves": lambda: draw_curves(rows),
    }


def draw_accuracy(rows):
    """Test accuracy by family: a dot per seed, a bar at the mean."""
    figure, axes = style.figure(8, 3.4)
    for offset, variant in ((-0.13, "plain"), (0.13, "pae")):
        colour = COLOURS[variant]
        for place, variants in enumerate(rows.values()):
            if variant in variants:
                row, x = variants[variant], place + offset
                axes.plot([x] * len(row["tests"]), row["tests"], "o", ms=4, alpha=0.6, color=colour)
                axes.plot([x - 0.1, x + 0.1], [row["test"]["mean"]] * 2, lw=2, color=colour)
        axes.plot([], [], "o", color=colour, label=LABELS[variant])
    axes.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right")
    axes.set_ylabel("test accuracy")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def draw_curves(rows):
    """Validation accuracy by epoch, mean over seeds, one small panel per family."""
    columns = min(5, len(rows))
    lines = -(-len(rows) // columns)
    figure, panels = style.figure(1.9 * columns, 1.9 * lines, lines, columns)
    panels = list(getattr(panels, "flat", [panels]))
    for place, (panel, (family, variants)) in enumerate(zip(panels, rows.items())):
        for variant, row in variants.items():
            epochs = range(1, len(row["val"]) + 1)
            panel.plot(epochs, row["val"], ".-", color=COLOURS[variant])
        panel.set_title(family)
        if place % columns == 0:
            panel.set_ylabel("val accuracy")
        if place >= len(rows) - columns:
            panel.set_xlabel("epoch")
    low = min(min(row["val"]) for variants in rows.values() for row in variants.values())
    for panel in panels:
        panel.set_ylim(low - 0.02, 1)
    for variant, colour in COLOURS.items():
        panels[0].plot([], [], ".-", color=colour, label=LABELS[variant].split(",")[0])
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.studies.families", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for name, work in (("run", run), ("time", time), ("report", report)):
        command = commands.add_parser(name)
        command.set_defaults(work=work)
        command.add_argument("--output", required=True, help="folder of the runs")
        if name == "report":
            command.add_argument("--to", default="bench/results/science")
            command.add_argument("--dataset", default="pneumonia")
            command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
            continue
        if name == "run":
            command.add_argument("--dataset", default="pneumonia")
            command.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
            runs.add_arguments(command)
        else:
            command.add_argument("--model", default="vit_base_patch16_224", help="timm name")
            command.add_argument("--num-tokens", type=int, default=50)
            command.add_argument("--batch", type=int, default=2)
            command.add_argument("--rounds", type=int, default=7)
            command.add_argument("--clock", default="process", choices=CLOCKS)
    arguments = parser.parse_args()
    arguments.work(arguments)


if __name__ == "__main__":
    main()
