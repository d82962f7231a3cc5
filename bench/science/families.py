"""Every prompt family with and without PAE on a real task: accuracy, speed of learning, cost.

    python -m bench.science.families run --output runs/families [--seeds 0 1 2] [--families ...]
    python -m bench.science.families time --output runs/families
    python -m bench.science.families report --output runs/families --to bench/results/families

`run` trains one model after the other and can be interrupted: what is finished is not repeated, the
rest is resumed. One recipe for all, the default of `pae train` for prompts: no family is tuned, so
that no family is tuned more than another. `time` races one training step of every family against
VPT-deep. `report` writes a Markdown table, the numbers as JSON, and figures.

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
from bench.timing import CLOCKS, measure
from pae.checkpoint import write_atomically
from pae.train import methods
from pae.train.runfolder import RunFolder
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
SHARE = 0.95  # "converged" is this share of the final validation accuracy


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
    _write_json(Path(arguments.output) / "step_time.json", record)
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


# ---- the table


def collect(output: Path) -> dict[tuple[str, str], list[dict]]:
    """Finished runs: (family, variant) -> one record per seed."""
    found: dict[tuple[str, str], list[dict]] = {}
    for family in FAMILIES:
        for variant in VARIANTS:
            for path in sorted(output.glob(f"{family}-{variant}-*")):
                folder = RunFolder(path)
                result = folder.result()
                if result is None:
                    continue
                rows = folder.rows()
                found.setdefault((family, variant), []).append(
                    {
                        "seed": int(path.name.rpartition("-")[2]),
                        "test": result["test_accuracy"],
                        "val": [row["val_accuracy"] for row in rows],
                        "loss": [row["train_loss"] for row in rows],
                        "converged": epochs_to_share([row["val_accuracy"] for row in rows]),
                        "parameters": result["trained_parameters"],
                    }
                )
    return found


def epochs_to_share(accuracies: list[float], share: float = SHARE) -> int:
    """First epoch (from 1) whose validation accuracy reaches `share` of the last one's."""
    return next(i for i, a in enumerate(accuracies, 1) if a >= share * accuracies[-1])


def bootstrap(values: list[float], draws: int = 10000) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling seeds."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(values, dtype=torch.float64)
    index = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values[index].mean(dim=1)
    return tuple(torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist())


def report(arguments) -> None:
    """Write the table, the numbers and the figures."""
    output, to = Path(arguments.output), Path(arguments.to)
    found = collect(output)
    if not found:
        raise SystemExit(f"--output {output}: no finished run there")
    timing = output / "step_time.json"
    ratios = json.loads(timing.read_text())["ratio"] if timing.is_file() else {}
    to.mkdir(parents=True, exist_ok=True)
    write_atomically(to / "table.md", lambda p: p.write_text(table(found, ratios, _facts(output))))
    _write_json(
        to / "numbers.json",
        {
            "facts": _facts(output),
            "step_time": ratios,
            "runs": {f"{f} {v}": records for (f, v), records in found.items()},
        },
    )
    for name, draw in (("accuracy", draw_accuracy), ("curves", draw_curves)):
        for kind in ("svg", "png"):
            figure = draw(found)
            write_atomically(
                to / f"{name}.{kind}", lambda p, f=figure, k=kind: f.savefig(p, format=k, dpi=130)
            )
    print((to / "table.md").read_text())


def table(found, ratios, facts) -> str:
    """Markdown: one row per family and variant."""
    seeds = max(len(records) for records in found.values())
    lines = [
        f"{facts['task']}, {facts['train']} training images, {facts['test']} test images, "
        f"{facts['epochs']} epochs, {facts['num_tokens']} prompts per block, one recipe for all "
        f"({facts['optimizer']}, lr {facts['lr']:g}), up to {seeds} seeds; backbone "
        f"{facts['model']}. Test accuracy of the best validation epoch: mean, bootstrap interval, "
        "every seed.",
        "",
        "| family | variant | test accuracy | interval | seeds | epochs to 95 % | step time | "
        "trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (family, variant), records in found.items():
        tests = [r["test"] for r in records]
        low, high = bootstrap(tests)
        ratio = f"{ratios[family]:.2f}x" if variant == "plain" and family in ratios else ""
        name = "plain" if variant == "plain" else "+ " + " + ".join(PAE[family]).upper()
        lines.append(
            f"| {family} | {name} | {statistics.mean(tests):.3f} | {low:.3f} to {high:.3f} | "
            f"{', '.join(f'{t:.3f}' for t in tests)} | "
            f"{statistics.mean(r['converged'] for r in records):.1f} | {ratio} | "
            f"{records[0]['parameters']:,} |"
        )
    return "\n".join(lines) + "\n"


def _facts(output: Path) -> dict:
    config = next(output.glob("*/config.json"))
    read = json.loads(config.read_text())
    chosen, task = read["settings"], read["task"]
    keep = ("model", "epochs", "num_tokens", "optimizer", "lr", "batch_size")
    sizes = {k: task[k] for k in ("train", "val", "test") if k in task}
    return {"task": task["name"], **sizes, **{k: chosen[k] for k in keep}}


# Okabe and Ito: told apart by every eye
COLOURS = {"plain": "#0072B2", "pae": "#D55E00"}
LABELS = {"plain": "plain", "pae": "+ PAE, as far as it applies"}


def draw_accuracy(found):
    """Test accuracy by family: a dot per seed, a bar at the mean."""
    figure, axes = _figure(8, 3.4)
    for offset, variant in ((-0.13, "plain"), (0.13, "pae")):
        for place, family in enumerate(FAMILIES):
            tests = [r["test"] for r in found.get((family, variant), [])]
            if not tests:
                continue
            x = place + offset
            axes.plot([x] * len(tests), tests, "o", ms=4, alpha=0.6, color=COLOURS[variant])
            mean = statistics.mean(tests)
            axes.plot([x - 0.1, x + 0.1], [mean, mean], lw=2, color=COLOURS[variant])
    axes.set_xticks(range(len(FAMILIES)), list(FAMILIES), rotation=30, ha="right")
    axes.set_ylabel("test accuracy")
    for variant, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=LABELS[variant])
    axes.legend(frameon=False, loc="lower right")
    return figure


def draw_curves(found):
    """Validation accuracy by epoch, mean over seeds, one small panel per family."""
    columns = 5
    rows = -(-len(FAMILIES) // columns)
    figure, panels = _figure(9, 1.9 * rows, rows, columns)
    for panel, family in zip(panels.flat, FAMILIES):
        for variant, colour in COLOURS.items():
            records = found.get((family, variant), [])
            if records:
                mean = [statistics.mean(values) for values in zip(*(r["val"] for r in records))]
                panel.plot(range(1, len(mean) + 1), mean, ".-", color=colour)
        panel.set_title(family, fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("epoch")
    for panel in panels[:, 0]:
        panel.set_ylabel("val accuracy")
    for variant, colour in COLOURS.items():
        panels[0, 0].plot([], [], ".-", color=colour, label=LABELS[variant].split(",")[0])
    panels[0, 0].legend(frameon=False, fontsize=8)
    return figure


def _figure(width, height, rows=1, columns=1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    made = figure.subplots(rows, columns, sharex=rows * columns > 1, sharey=rows * columns > 1)
    for axes in made.flat if rows * columns > 1 else [made]:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, made


def _write_json(path: Path, value) -> None:
    text = json.dumps(value, indent=1)
    write_atomically(path, lambda p: p.write_text(text + "\n"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.science.families", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for name, work in (("run", run), ("time", time), ("report", report)):
        command = commands.add_parser(name)
        command.set_defaults(work=work)
        command.add_argument("--output", required=True, help="folder of the runs")
        if name == "report":
            command.add_argument("--to", default="bench/results/families")
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
