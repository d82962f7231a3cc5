"""The benchmark suite's JSON files as a source of `bench.report`: which file is shown where.

`cpu.json` is the suite on a CPU, other CPU files hold what it lacks: another processor, cases that
take too long for it. A table shows one run alone: the first in the order of `runs` that measured
such groups. What later runs add is in block "suite other". Files with CUDA times are of GPUs; of
every GPU the newest is shown.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from . import table
from .table import Row

CANONICAL = "cpu.json"


@dataclass(frozen=True)
class Run:
    """One file: its rows by group, in the order measured."""

    name: str
    date: str
    machine: dict
    groups: dict[str, list[Row]]
    left_out: dict[str, str]

    @property
    def device(self) -> str:
        return self.machine["device"]

    @property
    def on_gpu(self) -> bool:
        return "CUDA" in self.machine

    def figure(self, name: str) -> str:
        """What a figure of this run is called: a GPU has figures of its own."""
        device = re.sub(r"\W+", "-", self.device.lower()).strip("-")
        return f"{name}_{device}" if self.on_gpu else name

    def matching(self, *prefixes: str) -> dict[str, list[Row]]:
        """Groups with a measured row whose name begins with one of `prefixes`."""
        return {
            name: rows
            for name, rows in self.groups.items()
            if name.startswith(prefixes) and any(row.seconds for row in rows)
        }


def runs(numbers: dict[str, dict]) -> list[Run]:
    """All benchmark runs among `numbers`: the canonical one, then the newest first."""
    found = [
        _run(name, read)
        for name, read in numbers.items()
        if {"benchmarks", "left_out", "machine_info"} <= set(read)
    ]
    found.sort(key=lambda run: run.date, reverse=True)
    return sorted(found, key=lambda run: run.name != CANONICAL)


def _run(name: str, read: dict) -> Run:
    rows, left_out, machine = table.rows_from_json(read)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return Run(name, read.get("datetime", ""), machine, groups, left_out)


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
    """The run that is shown for these groups."""
    return next((run for run in chosen if run.matching(*prefixes)), None)


# ---- rows


def median(row: Row) -> float:
    return statistics.median(row.seconds)


def measured(rows: list[Row]) -> dict[str, Row]:
    return {row.provider: row for row in rows if row.seconds}


def is_ours(row: Row) -> bool:
    """A version of this library's; one that others are compared with counts as a peer."""
    if row.provider in row.baselines:
        return False
    return row.provider.split(",")[0].split()[0] in ("pae", "reference", "Triton", "CUDA")


def our_first(rows: list[Row]) -> Row | None:
    """The first of ours: the default where there is a choice. Ratios are to it."""
    return next((row for row in rows if row.seconds and is_ours(row)), None)


def times(a: Row, b: Row) -> tuple[float, float, float]:
    """How many times as long `a` takes as `b`, round by round: median, 20th and 80th percentile."""
    ratios = [x / y for x, y in zip(a.seconds, b.seconds)]
    return statistics.median(ratios), *table.spread(ratios)


@dataclass(frozen=True)
class Loss:
    """A peer that beats one of our rows."""

    group: str
    ours: Row
    peer: Row
    ratio: float
    clear: bool


def pairs(run: Run) -> Iterator[tuple[str, Row, Row]]:
    """Every group, row of ours and row of a peer that took turns with each other."""
    for name, rows in run.groups.items():
        here = measured(rows).values()
        ours, peers = filter(is_ours, here), [row for row in here if not is_ours(row)]
        yield from ((name, a, b) for a in ours for b in peers)


def lost(run: Run) -> Iterator[Loss]:
    """Pairs that the peer won; clear ones where 80 % of the rounds agree."""
    for name, ours, peer in pairs(run):
        middle, _, high = times(peer, ours)
        if middle < 1:
            yield Loss(name, ours, peer, middle, high < 1)


def blocks(numbers: dict[str, dict]) -> dict[str, str]:
    from . import suite_pages

    return suite_pages.blocks(runs(numbers))


def figures(numbers: dict[str, dict]) -> dict:
    from . import suite_figures

    return suite_figures.figures(runs(numbers))
