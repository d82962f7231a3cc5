"""Finished runs, wherever they lie: folders of runs, of comparisons and of sweeps, and records."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pae.files import check_signature, from_json
from pae.train.declared import declared
from pae.train.options import Options

# options that say where and how fast, not what: they never make two methods of one
_NOT_THE_METHOD = ("data", "dataset", "device", "save_every_steps", "workers")
SEEDS = ("seed", "split_seed")


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
    def seed(self) -> int:
        return int(self.settings.get("seed", 0))

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


def collect(paths: Sequence[str | Path]) -> Collected:
    """All runs in and below `paths`, each once.

    Args:
        paths: run folders, folders with such below them, or records of a sweep (`*.json`).
    Raises:
        ValueError: nothing is there, or a file is damaged.
    """
    found = Collected([], [])
    seen: set[str] = set()
    for given in paths:
        root = Path(os.path.expanduser(given))
        places = list(_places(root))
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
        if "config.json" in files and not _is_comparison(here):
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
    return "settings" in table and "result" in table


def _add(place: Path, found: Collected) -> None:
    if place.is_file():
        table = _read(place)
        if "settings" not in table:
            raise ValueError(f"{place}: expected a record with settings and a result")
        facts, result = table, table.get("result")
        if isinstance(facts.get("facts"), dict):
            facts = {**facts["facts"], **{k: v for k, v in facts.items() if k != "facts"}}
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
