"""What the first command shows, `pae train` without arguments: why this task and this recipe, and
what comes out from several seeds.

    python -m bench.studies.first_command screen --output runs/first --dataset digits \\
        --set img_size=56 epochs=8 lr=0.005 [--seeds 0] [--arms linear vpt-deep vpt-deep-pae]
    python -m bench.studies.first_command run --output runs/first [--seeds 0 1 2 3 4]
    python -m bench.studies.first_command report --output runs/first

`screen` tries a task and a recipe on validation images; test images are not looked at. `run` is the
command itself, seed by seed, test included, with the defaults that were chosen. Whatever was
started and stopped goes on where it was; what is finished is not repeated. Two processes may share
an output. Times are process time of one core: `t` of a command on n cores is about t / n.

`report` writes bench/results/science/first_command.json, the seeds of this output, its screens and
those that stand there already; `python -m bench.report` puts them on the pages.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.roofline import device_name
from bench.table import table_of
from pae.train import compare, loop
from pae.train.data import Task
from pae.train.lock import InUse
from pae.train.options import RECIPE, Options
from pae.train.report import Reporter
from pae.train.runfolder import RunFolder

from . import runs

JSON = "first_command.json"
SEEDS = 5
ARMS = {folder: title for folder, title, _ in compare.ENTRIES}
PROBE, PLAIN, PAE = ARMS
SCREENS, FINAL = "screens", "final"  # folders


# ---- runs


def screen(arguments: argparse.Namespace) -> None:
    changes = dict(_change(text) for text in arguments.set)
    for seed in arguments.seeds:
        options = Options(dataset=arguments.dataset, seed=seed, workers=0, amp="no", **changes)
        for name, title, each in compare.entries(options.resolved()):
            if name not in arguments.arms:
                continue
            # a probe knows nothing of the prompts' recipe
            mine = {k: v for k, v in changes.items() if name != PROBE or k in _SEEN_BY_A_PROBE}
            label = ",".join(f"{k}={v}" for k, v in sorted(mine.items())) or "defaults"
            path = arguments.output / SCREENS / arguments.dataset / label / f"{name}-{seed}"
            task = dataclasses.replace(loop.load_task(each), test=None)
            _train(path, title, each, task, f"{arguments.dataset} {label}")


_SEEN_BY_A_PROBE = ("img_size", "train_size", "val_size")


def _change(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def run(arguments: argparse.Namespace) -> None:
    for seed in arguments.seeds:
        options = Options(seed=seed, workers=0, amp="no").resolved()
        for name, title, each in compare.entries(options):
            path = arguments.output / FINAL / f"{name}-{seed}"
            _train(path, title, each, loop.load_task(each), each.dataset or "")


def _train(path: Path, title: str, options: Options, task: Task, what: str) -> None:
    """Trains, or goes on, or leaves it to the process that is at it."""
    folder, cost = RunFolder(path), path / "process.json"
    if folder.result() is None:
        try:
            with folder.held():
                _spend(folder, title, options, task, cost)
        except InUse:
            return
    result, val = folder.result() or {}, [row["val_accuracy"] for row in folder.rows()]
    curve = " ".join(f"{value:.3f}" for value in val[:: max(1, len(val) // 10)])
    spent = json.loads(cost.read_text())["seconds"]
    print(
        f"{what}, {title}, seed {options.seed}: val {result['val_accuracy']:.3f} (last "
        f"{val[-1]:.3f}), test {result['test_accuracy']}, {spent:.0f} s; {curve}",
        flush=True,
    )


def _spend(folder: RunFolder, title: str, options: Options, task: Task, cost: Path) -> None:
    resume = "auto" if folder.config.is_file() else None
    began = time.process_time()
    try:
        place = folder, loop.make_accelerator(options), Reporter(quiet=True)
        loop.train(options, task, *place, name=title, resume=resume)
    finally:  # also of a part of a run, which will go on
        before = json.loads(cost.read_text())["seconds"] if cost.is_file() else 0.0
        runs.write_json(cost, {"seconds": round(before + time.process_time() - began, 2)})
    for heavy in (folder.state, folder.previous_state):
        heavy.unlink(missing_ok=True)


# ---- from runs to numbers


def report(arguments: argparse.Namespace) -> None:
    """Write the numbers of all finished screens and of all seeds of the command."""
    finals = _records(arguments.output / FINAL, "*")
    made = [r["seed"] for r in finals]
    finals = [r for r in finals if made.count(r["seed"]) == len(ARMS)]  # whole seeds
    if not finals:
        raise SystemExit(f"--output {arguments.output}: no finished run there")
    target = arguments.to / JSON
    known = json.loads(target.read_text())["screens"] if target.exists() else []
    screens = _lean(_records(arguments.output / SCREENS, "*/*/*"))
    fresh = {_cell(record) for record in screens}
    screens += [record for record in known if _cell(record) not in fresh]  # made elsewhere, before
    options = RunFolder(arguments.output / FINAL / f"{PAE}-{finals[0]['seed']}").read_config()
    facts = {
        "processor": device_name(torch.device("cpu")),
        "torch": str(torch.__version__),
        "settings": {name: getattr(options, name) for name in (*_SHOWN, *RECIPE)},
        "train": finals[0]["train"],
        "val": finals[0]["val_images"],
        "test": finals[0]["test_images"],
        "classes": finals[0]["classes"],
    }
    runs.write_json(target, {"facts": facts, "finals": _lean(finals), "screens": screens})
    numbers = json.loads(target.read_text())
    print(*blocks(numbers).values(), sep="\n\n")


_SHOWN = ("dataset", "model", "img_size", "num_tokens", "mpa_images", "mpa_window", "mpa_stride")
_FACTS = ("train", "val_images", "test_images", "classes")


def _lean(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in _FACTS} for record in records]


def _cell(record: dict) -> tuple:
    return tuple(record[name] for name in ("dataset", "changes", "arm", "seed"))


def _records(root: Path, pattern: str) -> list[dict]:
    """What finished runs left; the folders of screens say what was changed."""
    found = []
    for path in sorted(root.glob(pattern)):
        folder = RunFolder(path)
        if (result := folder.result()) is None:
            continue
        task, (name, _, seed) = folder.facts()["task"], path.name.rpartition("-")
        found.append(
            {
                "dataset": task["name"],
                "changes": "" if pattern == "*" else path.parent.name,
                "arm": name,
                "seed": int(seed),
                "val": result["val_accuracy"],
                "test": result["test_accuracy"],
                "curve": [row["val_accuracy"] for row in folder.rows()],
                "parameters": result["trained_parameters"],
                "passes": result.get("passes"),
                "mpa_passes": result.get("mpa_passes"),
                "seconds": json.loads((path / "process.json").read_text())["seconds"],
                "train": task["train"],
                "val_images": task["val"],
                "test_images": task["test"],
                "classes": len(task["classes"]),
            }
        )
    return found


# ---- from numbers to text


def blocks(numbers: dict) -> dict[str, str]:
    return {
        "first command setting": _setting(numbers["facts"]),
        "first command table": _table(numbers["finals"]),
        "first command short": _short(numbers["finals"], numbers["facts"]),
        "first command seeds": _seeds(numbers["finals"]),
        "first command curves": _curves(numbers["finals"]),
        "first command screens": _screens(numbers["screens"]),
    }


def _setting(facts: dict) -> str:
    chosen = facts["settings"]
    return (
        f"{chosen['dataset']}: {facts['classes']} classes, {facts['train']} / {facts['val']} / "
        f"{facts['test']} images (train / validation / test). {chosen['model']} at "
        f"{chosen['img_size']} px. Prompts: {chosen['num_tokens']} per block, {chosen['epochs']} "
        f"epochs of batch {chosen['batch_size']}, {chosen['optimizer']} at {chosen['lr']:g}, decay "
        f"{chosen['weight_decay']:g}, {chosen['warmup_epochs']:g} epochs of warm-up, cosine. "
        f"MPA on {chosen['mpa_images']} images. {facts['processor']}, fp32, one thread, process "
        f"time; torch {facts['torch']}."
    )


def _by_arm(records: list[dict]) -> dict[str, list[dict]]:
    return {
        arm: mine
        for arm in ARMS
        if (mine := sorted((r for r in records if r["arm"] == arm), key=lambda r: r["seed"]))
    }


def _table(finals: list[dict]) -> str:
    arms, lines = _by_arm(finals), []
    for arm, mine in arms.items():
        over = {key: runs.interval([r[key] for r in mine]) for key in ("val", "test")}
        gains = {
            other: runs.paired(mine, arms.get(other, [])) if other != arm else None
            for other in (PROBE, PLAIN)
        }
        lines.append(
            {
                "method": ARMS[arm],
                "seeds": str(len(mine)),
                "validation": runs.shown(over["val"], ".3f"),
                "test": runs.shown(over["test"], ".3f"),
                "over the probe, seed by seed": runs.shown(gains[PROBE], "+.3f"),
                "over VPT-deep": runs.shown(gains[PLAIN], "+.3f") if arm == PAE else "",
                **_cost(mine),
            }
        )
    return table_of(lines)


def _cost(mine: list[dict]) -> dict[str, str]:
    first = mine[0]
    return {
        "trained": f"{first['parameters']:,}",
        "passes": f"{first['passes']:,}",
        "of it MPA": f"{first['mpa_passes']:,}" if first["mpa_passes"] else "-",
        "process s": f"{statistics.median(r['seconds'] for r in mine):.0f}",
    }


def _short(finals: list[dict], facts: dict) -> str:
    table = table_of(
        [
            {
                "method": ARMS[arm],
                f"test accuracy, mean of {len(mine)} seeds": f"{_mean(mine, 'test'):.3f}",
                "lowest to highest": f"{min(r['test'] for r in mine):.3f} to "
                f"{max(r['test'] for r in mine):.3f}",
                **_cost(mine),
            }
            for arm, mine in _by_arm(finals).items()
        ]
    )
    return f"{table}\n\n{facts['processor']}, fp32, one thread; torch {facts['torch']}."


def _mean(records: list[dict], key: str) -> float:
    return statistics.mean(r[key] for r in records)


def _seeds(finals: list[dict]) -> str:
    lines = []
    for seed in sorted({r["seed"] for r in finals}):
        line = {"seed": str(seed)}
        for arm, mine in _by_arm([r for r in finals if r["seed"] == seed]).items():
            for split, key in (("validation", "val"), ("test", "test")):
                line[f"{ARMS[arm]}, {split}"] = f"{mine[0][key]:.3f}"
        lines.append(line)
    return table_of(lines)


def _curves(finals: list[dict]) -> str:
    """Validation accuracy after every epoch of the prompt runs, mean over seeds."""
    lines = []
    for arm, mine in _by_arm(finals).items():
        if arm != PROBE:
            means = [statistics.mean(each) for each in zip(*(r["curve"] for r in mine))]
            after = {f"epoch {i}": f"{mean:.3f}" for i, mean in enumerate(means, 1)}
            lines.append({"validation accuracy after": ARMS[arm], **after})
    return table_of(lines)


def _screens(screens: list[dict]) -> str:
    """A line for each task and recipe; a probe's is that of its task and image size."""
    lines, cells = [], dict.fromkeys((r["dataset"], r["changes"]) for r in screens)
    for dataset, changes in cells:
        mine = _by_arm([r for r in screens if (r["dataset"], r["changes"]) == (dataset, changes)])
        line = {"task": dataset, "changed": changes.replace(",", ", ").replace("_", " ")}
        for arm, title in ARMS.items():
            seen = mine.get(arm, [])
            many = f" ({len(seen)})" if len(seen) > 1 else ""
            line[title] = f"{_mean(seen, 'val'):.3f}{many}" if seen else ""
        spent = [[r["seconds"] for r in seen] for seen in mine.values()]
        line["process s of an arm"] = " / ".join(
            "-" if None in seen else f"{statistics.median(seen):.0f}" for seen in spent
        )
        lines.append(line)
    return table_of(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.studies.first_command")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, work in (("screen", screen), ("run", run), ("report", report)):
        command = commands.add_parser(name)
        command.set_defaults(work=work)
        add = command.add_argument
        add("--output", required=True, type=Path, help="folder of the runs")
        if name == "report":
            add("--to", type=Path, default=runs.RESULTS, help="folder of the numbers")
            continue
        add("--seeds", nargs="+", type=int, default=list(range(SEEDS)) if name == "run" else [0])
        if name == "screen":
            add("--dataset", required=True)
            add("--arms", nargs="+", default=list(ARMS), choices=ARMS)
            add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options of pae train")
    arguments = parser.parse_args()
    arguments.work(arguments)


if __name__ == "__main__":
    main()
