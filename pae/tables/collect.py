"""Finished runs, wherever they lie: folders of runs, of comparisons and of sweeps, and records."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pae.errors import CheckpointError
from pae.files import check_signature, from_json
from pae.sweep.plan import NONE, PLAN, TWO_STAGE, Plan, read
from pae.sweep.records import FILE, FINISHED, Records
from pae.train.declared import declared
from pae.train.options import Options

# options that say where and how fast, not what: they never make two methods of one
_NOT_THE_METHOD = ("data", "dataset", "device", "save_every_steps", "workers")
SEEDS = ("seed", "split_seed", "draw")


@dataclass(frozen=True)
class Run:
    """One finished run.

    `settings` are its options, `facts` what its config.json says beside them, `result` its row of
    numbers; accuracies are shares of 1.
    """

    path: Path
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    result: Mapping[str, Any]
    label: str
    task: str

    @property
    def seed(self) -> str:
        """What tells the run from its like: the seed, and of few-shot which draw of images."""
        draw, seed = self.order
        return f"{draw}:{seed}" if self.settings.get("protocol") == "few-shot" else str(seed)

    @property
    def order(self) -> tuple[int, int]:
        """(draw, seed)."""
        return int(self.settings.get("draw", 0)), int(self.settings.get("seed", 0))

    def accuracy(self, split: str) -> float:
        """In per cent, on split "test" or "val".

        Raises:
            ValueError: the run has no such images.
        """
        value = self.result.get(f"{split}_accuracy")
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            other = "val" if split == "test" else "test"
            raise ValueError(
                f"{self.path}: the run has no {split} accuracy; leave it out, or give --split "
                f"{other} for the table"
            )
        return 100 * float(value)

    def method_settings(self) -> dict[str, Any]:
        """The settings that make it this method and no other, seeds apart."""
        left = (*_NOT_THE_METHOD, *SEEDS)
        return {name: value for name, value in self.settings.items() if name not in left}

    def digest(self, split: str) -> str | None:
        """What identifies the images of a split; None where an older pae did not record it."""
        found = (self.facts.get("splits") or {}).get(split)
        return found["digest"] if isinstance(found, dict) else None


@dataclass
class Collected:
    """The finished runs below some paths, and those that were left out because they are not."""

    runs: list[Run]
    unfinished: list[Path]
    failed: list[str]  # runs of sweeps that diverged, failed or were stopped, in words
    missing: list[str]  # what sweeps have not come to yet, task by task, in words


def collect(paths: Sequence[str | Path]) -> Collected:
    """All runs in and below `paths`, each once.

    Args:
        paths: run folders, folders with such below them, or records of a sweep (`*.json`).
    Raises:
        ValueError: nothing is there, or a file is damaged.
    """
    found = Collected([], [], [], [])
    seen: set[str] = set()
    for given in paths:
        root = Path(os.path.expanduser(given))
        no_record = root.is_file() and root.suffix != ".json"
        places = [] if no_record else list(_places(root))
        if not places:
            raise ValueError(
                f"{given}: no run here; expected a folder with config.json and metrics.json, one "
                "with such folders below it, or a record of a sweep"
            )
        for place in places:
            key = os.path.realpath(place)
            if key not in seen:
                seen.add(key)
                _add(place, found)
    if not found.runs:
        if not found.unfinished:
            raise ValueError(f"{found.failed[0]}, and no other was given")
        first = found.unfinished[0]
        raise ValueError(f"{first}: the run is not finished, and no other was given")
    return found


def _places(root: Path) -> Iterator[Path]:
    """Run folders and records at or below `root`, in the order of their names."""
    if root.is_file():
        yield root
        return
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        here = Path(folder)
        if PLAN in files or ("config.json" in files and not _is_comparison(here)):
            inner.clear()
            yield here
        elif "config.json" not in files:
            yield from (here / name for name in sorted(files) if is_record(here / name))


def _is_comparison(folder: Path) -> bool:
    """Whether the runs of `folder` lie in folders below it."""
    return not (folder / "metrics.json").exists() and any(folder.glob("*/config.json"))


def is_record(path: Path) -> bool:
    """Whether a file holds one run, as sweeps record them; the reason otherwise is not told."""
    if path.suffix != ".json" or path.name.startswith("."):
        return False
    try:
        table = _read(path)
    except ValueError:
        return False
    return "settings" in table and ("result" in table or "status" in table)


def _add(place: Path, found: Collected) -> None:
    if (place / PLAN).is_file():
        _add_sweep(place, found)
        return
    if (record := place / FILE).is_file():
        _add_record(record, found)
        return
    if place.is_file():
        table = _read(place)
        if "status" in table:
            _add_record(place, found)
            return
        if "settings" not in table:
            raise ValueError(f"{place}: expected a record with settings and a result")
        facts, result = table, table.get("result")
    else:
        facts = _read(place / "config.json")
        metrics = place / "metrics.json"
        result = _read(metrics).get("result") if metrics.exists() else None
    if not isinstance(result, dict):
        found.unfinished.append(place)
        return
    settings = facts.get("settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{place}: settings: expected a table of options")
    settings = {**_defaults(), **settings}  # an older pae had fewer options
    found.runs.append(
        Run(place, settings, facts, result, _label(settings, facts), _task(settings, facts))
    )


def _add_sweep(folder: Path, found: Collected) -> None:
    """The tested runs of a sweep: of the cells that were chosen, or of all where none is."""
    try:
        plan, records = read(folder)
        found.missing += not_yet(plan, records)
        for group in plan.groups:
            cells = group.cells if plan.select == NONE else plan.chosen(group, records)
            if not cells:
                found.unfinished.append(folder)
            choice = None
            if plan.select != NONE and len(group.cells) > 1:
                seen = plan.seeds[:1] if plan.select == TWO_STAGE else plan.seeds
                choice = (
                    f"{plan.epoch} epoch's validation accuracy, seed {', '.join(map(str, seen))}"
                )
            for cell in cells:
                for key in cell.finals:
                    path = records.path(key) / FILE
                    if key in records:
                        _add_record(path, found, group.task, group.method, choice)
                    else:
                        found.unfinished.append(path.parent)
    except CheckpointError as error:
        raise ValueError(str(error)) from None


def not_yet(plan: Plan, records: Records) -> list[str]:
    """The tested runs that a sweep has not come to, in words: a line for each task that was begun,
    and one for the others.
    """
    lacking: dict[str, list[str]] = {}
    for group in plan.groups:
        wanted = plan.finals(group, records)
        if wanted is None:
            lacking.setdefault(group.task, []).append(group.method)
            continue
        left = sum(not run.is_done(records) for run in wanted)
        if left:
            words = f"{group.method} ({left} of {len(wanted)} runs)"
            lacking.setdefault(group.task, []).append(words)
    methods = len({group.method for group in plan.groups})
    whole = [task for task, words in lacking.items() if len(words) == methods]
    begun = [f"{t}, {', '.join(words)}" for t, words in lacking.items() if t not in whole]
    return begun + ([f"{', '.join(whole)}: all methods"] if whole else [])


def _add_record(
    path: Path,
    found: Collected,
    task: str | None = None,
    method: str | None = None,
    choice: str | None = None,
) -> None:
    """One run of a sweep, called as its plan calls it."""
    record = _read(path)
    task, method = task or str(record["task"]), method or str(record["method"])
    if record.get("status") != FINISHED:
        words = f"{path.parent}: {task}, {method}, seed {record.get('seed')}: {record['status']}"
        found.failed.append(words)
        return
    config = path.parent / "config.json"
    beside = _read(config) if config.is_file() else {}
    parameters, without = record.get("parameters"), record.get("parameters_without_head")
    if record["settings"].get("protocol") == "few-shot":  # whose draws are tasks of a sweep
        task = _task(record["settings"], beside)
    known: Any = beside.get("task")
    known = known if isinstance(known, dict) else record["images"]
    facts = {
        **beside,
        **{name: record.get(name) for name in ("image_size", "backbone", "device", "versions")},
        "task": {**known, "name": task},
        "chosen": choice,
        "scheduler": record.get("scheduler"),
    }
    last = record["settings"].get("keep") == "last"
    result = {
        "val_accuracy": record["val"],
        "test_accuracy": record["test"],
        "trained_parameters": parameters,
        "head_parameters": None if without is None else parameters - without,
        "seconds": record.get("seconds"),
        "memory_mb": record.get("peak_memory_mb"),
        "tested": "last epoch" if last else "epoch of best validation",
    }
    settings = {**_defaults(), **record["settings"]}
    found.runs.append(Run(path.parent, settings, facts, result, method, task))


def _read(path: Path) -> dict[str, Any]:
    try:
        table = from_json(path.read_bytes())
        if not isinstance(table, dict):
            raise ValueError("expected a table")
        return check_signature(table)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@lru_cache
def _defaults() -> Mapping[str, Any]:
    return {name: option.default for name, option in declared(Options).items()}


def _task(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    task = facts.get("task")
    if isinstance(task, dict) and isinstance(task.get("name"), str):
        return task["name"]
    return task if isinstance(task, str) else str(settings.get("dataset") or settings.get("data"))


def _label(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """What a run is called: its own name, or its method and what it adds to that."""
    method = str(settings.get("method"))
    name = facts.get("label") or facts.get("name")
    if isinstance(name, str) and name and name != method:
        return name
    kld, mpa, spt = (settings.get(part) for part in ("kld", "mpa", "spt"))
    parts = ["PAE"] if kld and mpa else ["KLD"] * bool(kld) + ["MPA"] * bool(mpa)
    parts += [f"SPT {spt}"] if spt else []
    return " + ".join([method, *parts])
