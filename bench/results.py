"""Results of the suite: the JSON files of --benchmark-json as runs, groups and rows.

`cpu.json` is the suite on a CPU, other CPU files hold what it lacks: another processor, cases that
take too long for it. Files with CUDA times are of GPUs; of every GPU the newest counts.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .timing import Sample

CANONICAL = "cpu.json"
DESCRIBED = ("provider", "clock", "unit", "baselines", "columns")  # what a file says of a row
OURS = ("pae", "reference", "Triton", "CUDA")  # how names of this library's versions begin


@dataclass
class Row:
    """One provider of one group; `seconds` is empty when it was left out for `reason`.

    In the session that measures also what they come from: `samples` of `units` each, or the `error`
    that is the reason.
    """

    group: str
    provider: str
    seconds: Sequence[float] = ()
    reason: str = ""
    clock: str = ""
    unit: str = ""
    baselines: Sequence[str] = ()
    columns: dict[str, float] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    units: int = 1
    error: Exception | None = None

    def read(self, clock: str) -> list[float]:
        """Seconds of one unit by that clock, round by round."""
        return [sample.seconds(clock) / self.units for sample in self.samples]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def failed(self) -> bool:
        """It gave wrong values or raised, rather than being left out."""
        return self.reason.startswith("failed")

    @property
    def is_ours(self) -> bool:
        """A version of this library's; one that others are compared with counts as a peer."""
        first_word = re.split("[, ]", self.provider)[0]
        return first_word in OURS and self.provider not in self.baselines

    def times(self, other: Row) -> tuple[float, float, float]:
        """How many times as long as `other` it takes, round by round: median, 20th and 80th
        percentile.
        """
        ratios = [a / b for a, b in zip(self.seconds, other.seconds)]
        return statistics.median(ratios), *spread(ratios)


@dataclass(frozen=True)
class Run:
    """One file: its rows by group, in the order measured."""

    name: str
    date: str
    machine: dict[str, Any]
    groups: dict[str, list[Row]]
    left_out: dict[str, str]

    @classmethod
    def of(cls, read: dict, name: str = "") -> Run:
        """The run whose parsed JSON is `read`.

        Raises:
            KeyError, TypeError: it is no JSON of --benchmark-json.
        """
        rows = [
            Row(
                row["group"],
                seconds=row["stats"]["data"],
                **{name: row["extra_info"][name] for name in DESCRIBED},
            )
            for row in read["benchmarks"]
        ]
        groups: dict[str, list[Row]] = {}
        for row in [*rows, *(Row(**entry) for entry in read["left_out"]["providers"])]:
            groups.setdefault(row.group, []).append(row)
        machine, left_out = read["machine_info"]["summary"], read["left_out"]["groups"]
        return cls(name, read.get("datetime", ""), machine, groups, left_out)

    @property
    def device(self) -> str:
        return self.machine["device"]

    @property
    def on_gpu(self) -> bool:
        return "CUDA" in self.machine

    @property
    def rows(self) -> list[Row]:
        """All, those without a time too."""
        return [row for rows in self.groups.values() for row in rows]

    def figure(self, name: str) -> str:
        """What a figure of this run is called: a GPU has figures of its own."""
        device = re.sub(r"\W+", "-", self.device.lower()).strip("-")
        return f"{name}_{device}" if self.on_gpu else name

    def named(self, *prefixes: str) -> dict[str, list[Row]]:
        """Groups whose name begins with one of `prefixes`, in which * is anything."""
        return {
            name: rows
            for name, rows in self.groups.items()
            if any(fnmatchcase(name, f"{prefix}*") for prefix in prefixes)
        }

    def matching(self, *prefixes: str) -> dict[str, list[Row]]:
        """Those of `named` with a measured row."""
        return {name: rows for name, rows in self.named(*prefixes).items() if measured(rows)}


def runs(numbers: dict[str, dict]) -> list[Run]:
    """All benchmark runs among parsed files by name: the canonical one, then the newest first."""
    needed = {"benchmarks", "left_out", "machine_info"}
    found = [Run.of(read, name) for name, read in numbers.items() if needed <= set(read)]
    found.sort(key=lambda run: run.date, reverse=True)
    return sorted(found, key=lambda run: run.name != CANONICAL)


def on_cpu(everything: list[Run]) -> list[Run]:
    return [run for run in everything if not run.on_gpu]


def on_gpu(everything: list[Run]) -> list[Run]:
    """The newest run of every GPU."""
    newest: dict[str, Run] = {}
    for run in everything:
        if run.on_gpu:
            newest.setdefault(run.device, run)
    return list(newest.values())


def first_with(chosen: list[Run], *prefixes: str) -> Run | None:
    """The run that is shown for these groups: one table shows one run alone."""
    return next((run for run in chosen if run.matching(*prefixes)), None)


def measured(rows: Iterable[Row]) -> dict[str, Row]:
    """Those with a time, by provider."""
    return {row.provider: row for row in rows if row.seconds}


def our_first(rows: Iterable[Row]) -> Row | None:
    """The first of ours: the default where there is a choice. Ratios are to it."""
    return next((row for row in rows if row.seconds and row.is_ours), None)


def pairs(run: Run) -> Iterator[tuple[Row, Row]]:
    """Every row of ours with every peer of its group."""
    for rows in run.groups.values():
        here = measured(rows).values()
        ours, peers = filter(lambda row: row.is_ours, here), [r for r in here if not r.is_ours]
        yield from ((a, b) for a in ours for b in peers)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """20th and 80th percentile, linear between samples."""
    low, high = np.percentile(values, (20, 80))
    return float(low), float(high)
