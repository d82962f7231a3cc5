"""From a folder of tasks to a sweep: the published grid, the two stages, the seeds, as one file.

The rules: every setting is tried on the training images and judged by the validation accuracy of
the last epoch, from seed 42; of equal accuracies the smallest rate wins, then the smallest decay,
then the fewest prompts; the winner is trained on training and validation images together (FGVC: on
the training images, as VPT does) from five seeds, and the last epoch is tested.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pae.protocols.tasks import DRAWS, PROTOCOLS, SHOTS, Protocol
from pae.train.options import CONFIGS, read_config
from pae.train.protocols import listed

SEEDS = (42, 44, 82, 100, 800)
GRIDS = ("full", "coarse", "fixed")
# VPT's, before they are multiplied by batch size / 256
_RATES = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0)
_DECAYS = (0.0, 1e-4, 1e-3, 1e-2)
_PROMPTS = (1, 5, 10, 50, 100, 200)
_COARSE_RATES, _COARSE_DECAYS = (0.25, 2.5, 25.0), (1e-4, 1e-2)
# of methods that are published with another optimiser than SGD, around their own values: ours
_FACTORS, _COARSE_FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0), (0.25, 1.0, 4.0)
_WITH_PROMPTS = ("vpt-deep", "vpt-shallow")  # whose number VPT chooses per task


def write_spec(
    protocol: str,
    root: Path,
    methods: Sequence[str],
    *,
    grid: str = "full",
    tasks: Sequence[str] | None = None,
    shots: Sequence[int] = SHOTS,
    options: dict[str, Any] | None = None,
) -> tuple[str, list[str]]:
    """The text of a spec for `pae sweep`, and lines that say what it holds and what is missing.

    Args:
        protocol: "vtab1k", "fgvc" or "few-shot".
        root: the folder of its tasks.
        methods: words of ``pae train --method``, or names of published settings (`pae/configs`).
        grid: "full" (as published), "coarse" (3 rates x 2 decays), "fixed" (nothing is tuned).
        tasks: those to take, by any of their names; by default all that are there.
        shots: of few-shot.
        options: further options of all runs, e.g. {"model": ...}.
    Raises:
        ValueError: no task is there, or an unknown name.
    """
    known = PROTOCOLS[protocol]
    folders = chosen_tasks(known, root, tasks)
    wanted = [known.find(name).name for name in tasks or [task.name for task in known.tasks]]
    missing = [name for name in wanted if name not in folders]
    few = protocol == "few-shot"
    lines = [
        f"seeds = {list(SEEDS[:1] if few else SEEDS)}",
        'select = "two-stage"',
        'epoch = "last"  # whose validation counts',
        'equal = "first"  # of equal accuracies: the smallest rate, decay, number of prompts',
        "",
        "[options]",
        f"protocol = {json.dumps(protocol)}",
        'keep = "last"  # which is tested',
        *(f"{name} = {json.dumps(value)}" for name, value in (options or {}).items()),
    ]
    if protocol == "vtab1k":
        lines += ["", "[final]", 'train_on = "trainval"  # 800 and 200 images together']
    count = 0
    for name, folder in folders.items():
        for table in _tasks(protocol, name, folder, shots):
            count += 1
            lines += ["", f"[tasks.{json.dumps(table.pop('title'))}]"]
            lines += [f"{option} = {json.dumps(value)}" for option, value in table.items()]
    cells = {}
    for method in methods:
        values, axes = _method(protocol, method, "fixed" if few and grid == "full" else grid)
        cells[method] = 1
        for axis in axes.values():
            cells[method] *= len(axis)
        lines += ["", f"[methods.{json.dumps(method)}]"]
        lines += [f"{option} = {json.dumps(value)}" for option, value in values.items()]
        if axes:
            lines += [f"[methods.{json.dumps(method)}.grid]"]
            lines += [f"{option} = {json.dumps(list(axis))}" for option, axis in axes.items()]
    said = [f"{known.title}: {len(folders)} of {len(wanted)} tasks in {root}"]
    if missing:
        said.append(f"missing, so that no mean over them will be given: {', '.join(missing)}")
    seeds, total = len(SEEDS[:1] if few else SEEDS), 0
    for method, number in cells.items():
        tuned = 0 if number == 1 else number * count
        # where both stages train on the same images, the first seed has run already
        finals = (seeds - bool(tuned and protocol != "vtab1k")) * count
        total += tuned + finals
        said.append(f"{method}: {tuned:,} runs to tune ({number} settings), {finals:,} final ones")
    said.append(f"{total:,} runs in all; at one minute each {total / 60:,.0f} hours")
    return "\n".join(lines) + "\n", said


def chosen_tasks(
    known: Protocol, root: Path, tasks: Sequence[str] | None = None
) -> dict[str, Path]:
    """{task: its folder} of those that are there, of `tasks` if these are given.

    Raises:
        ValueError: none is there, or an unknown name.
    """
    folders = listed(known, root)
    if tasks is not None:
        wanted = [known.find(name).name for name in tasks]
        folders = {name: folder for name, folder in folders.items() if name in wanted}
    if not folders:
        raise ValueError(f"{root}: no task of {known.title} is here; expected a folder for each")
    return folders


def _tasks(protocol: str, name: str, folder: Path, shots: Sequence[int]) -> list[dict[str, Any]]:
    place = {"data": str(folder.absolute()), "protocol_task": name}
    if protocol != "few-shot":
        return [{"title": name, **place}]
    return [
        {"title": f"{name}-{k}shot-{draw}", **place, "shots": k, "draw": draw}
        for k in shots
        for draw in DRAWS
    ]


def _method(
    protocol: str, name: str, grid: str
) -> tuple[dict[str, Any], dict[str, Sequence[float]]]:
    """Options of a method, and what is varied, smallest first, the rate outermost."""
    path = CONFIGS / f"{name}.toml"
    config = read_config(path) if path.is_file() else {}
    values: dict[str, Any] = {"config": name} if config else {"method": name}
    if protocol == "fgvc":
        values |= {"augment": "crop"}
        if config.get("interpolation") == "tf1-bilinear":
            values |= {"interpolation": "bilinear", "batch_size": 128}
    if grid == "fixed":
        return values, {}
    if name == "linear":  # as VPT runs it: SGD, a large batch
        values |= {"optimizer": "sgd", "scheduler": "vpt", "epochs": 100, "warmup_epochs": 10}
        values |= {"batch_size": 1024}
    batch = values.get("batch_size", config.get("batch_size", 64))
    coarse = grid == "coarse"
    if name == "linear" or config.get("optimizer") == "sgd":
        rates = [r for r in _RATES if protocol == "vtab1k" or name == "linear" or r > _RATES[0]]
        rates = [rate * batch / 256 for rate in (_COARSE_RATES if coarse else rates)]
        axes: dict[str, Sequence[float]] = {
            "lr": rates,
            "weight_decay": _COARSE_DECAYS if coarse else _DECAYS,
        }
        if name in _WITH_PROMPTS and not coarse and protocol == "vtab1k":
            axes["num_tokens"] = _PROMPTS
        return values, axes
    own = float(config.get("lr", 1e-2))
    return values, {"lr": [own * f for f in (_COARSE_FACTORS if coarse else _FACTORS)]}
