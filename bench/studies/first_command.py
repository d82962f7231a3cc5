"""What the first command shows, `pae train` without arguments: why this task and this recipe, and
what comes out from several seeds.

    python -m bench.studies.first_command run --output runs/first [--seeds 0 1 2 3 4]
    python -m bench.studies.first_command report --output runs/first

`run` is the command itself, seed by seed, test included. What is finished is not repeated, what was
stopped begins again. Times are process time of one core: a command that takes t of it takes about
t / n on n cores.

`report` writes bench/results/science/first_command.json; `python -m bench.report` puts it on the
pages. The screens, by which the task and the recipe were chosen on validation images, were made by
the same file as it stands in commit 8e685c4, and stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time

import torch

from bench.roofline import device_name
from bench.table import table_of
from pae.train import compare, loop
from pae.train.options import RECIPE, Options
from pae.train.report import Reporter
from pae.train.runfolder import RunFolder

from . import runs

JSON = "first_command.json"
SEEDS = 5
ARMS = {folder: title for folder, title, _ in compare.ENTRIES}
PROBE, PLAIN, PAE = ARMS
COST = "process.json"  # in the folder of a run
_SHOWN = ("dataset", "model", "img_size", "num_tokens", "mpa_images", "mpa_window", "mpa_stride")


def run(arguments: argparse.Namespace) -> None:
    for seed in arguments.seeds:
        options = Options(seed=seed, workers=0, amp="no").resolved()
        for arm, title, each in compare.entries(options):
            folder = RunFolder(arguments.output / f"{arm}-{seed}")
            if (folder.path / COST).is_file():
                continue
            shutil.rmtree(folder.path, ignore_errors=True)
            began = time.process_time()
            place = folder, loop.make_accelerator(each), Reporter(quiet=True)
            result = loop.train(each, loop.load_task(each), *place, name=title)
            spent = round(time.process_time() - began, 2)
            runs.write_json(folder.path / COST, {"seconds": spent})
            print(f"{title}, seed {seed}: test {result['test_accuracy']:.3f}, {spent:.0f} s")


def report(arguments: argparse.Namespace) -> None:
    """Write the numbers of all seeds of the command that are whole."""
    finals, task = [], {}
    for seed in arguments.seeds:
        folders = {arm: RunFolder(arguments.output / f"{arm}-{seed}") for arm in ARMS}
        if all((folder.path / COST).is_file() for folder in folders.values()):
            finals += [_record(arm, seed, folder) for arm, folder in folders.items()]
            task, options = folders[PAE].facts()["task"], folders[PAE].read_config()
    if not finals:
        raise SystemExit(f"--output {arguments.output}: no seed is finished there")
    target = arguments.to / JSON
    facts = {
        "processor": device_name(torch.device("cpu")),
        "torch": str(torch.__version__),
        "settings": {name: getattr(options, name) for name in (*_SHOWN, *RECIPE)},
        **{split: task[split] for split in ("train", "val", "test")},
        "classes": len(task["classes"]),
    }
    screens = json.loads(target.read_text())["screens"] if target.exists() else []
    runs.write_json(target, {"facts": facts, "finals": finals, "screens": screens})
    print(*blocks(json.loads(target.read_text())).values(), sep="\n\n")


def _record(arm: str, seed: int, folder: RunFolder) -> dict:
    result = folder.result() or {}
    return {
        "arm": arm,
        "seed": seed,
        "val": result["val_accuracy"],
        "test": result["test_accuracy"],
        "curve": [row["val_accuracy"] for row in folder.rows()],
        "parameters": result["trained_parameters"],
        "passes": result.get("passes"),
        "mpa_passes": result.get("mpa_passes"),
        "seconds": json.loads((folder.path / COST).read_text())["seconds"],
    }


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


if __name__ == "__main__":
    runs.main("first_command", {"run": run, "report": report}, lambda *_: None, SEEDS)
