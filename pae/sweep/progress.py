"""How far a sweep is: counts, what runs where, what failed, and about how long the rest takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from pae.sweep.plan import NONE, Plan, Run, shown
from pae.sweep.records import FINISHED, Record, Records
from pae.train import lock


class Progress(NamedTuple):
    """Runs that have their record, all that there are, what is known of the left ones, seconds that
    they take (None before the first run has ended), and those that did not finish.
    """

    done: int
    total: int
    left: list[Run]
    seconds: float | None
    failed: list[Run]

    def line(self, at_once: int = 1) -> str:
        """ "12/40 runs, 1 failed, 0:21:13 left".

        Args:
            at_once: runs that go on side by side.
        """
        parts = [f"{self.done}/{self.total} {plural('run', self.total)}"]
        if self.failed:
            parts.append(f"{len(self.failed)} did not finish")
        if self.seconds is not None and self.done < self.total:
            parts.append(f"about {clock(self.seconds / at_once)} left")
        return ", ".join(parts)


def progress(plan: Plan, records: Records) -> Progress:
    """Where the sweep is."""
    wanted = list(plan.runs(records))
    left = [run for run in wanted if not run.is_done(records)]
    total = sum(plan.count())
    known = {run.key for run in wanted}
    done = {run.key for run in wanted if run.key in records}
    failed = {run.key: run for run in wanted if run.key in done}
    failed = {k: run for k, run in failed.items() if records[k]["status"] != FINISHED}
    paces = _Paces(plan, records)
    trained = [run for run in left if run.key not in records]
    unknown = total - len(known)  # of cells that are not chosen yet
    each = [paces.of(run) for run in trained]
    mean = paces.mean()
    seconds = None if mean is None else sum(s or 0.0 for s in each) + unknown * mean
    return Progress(len(done), total, left, seconds, list(failed.values()))


class _Paces:
    """Seconds that runs took: the median of those of the same task and method, else of the method,
    else of all.
    """

    def __init__(self, plan: Plan, records: Records) -> None:
        self.seen: dict[tuple[str | None, str | None], list[float]] = {}
        self.paces: dict[tuple[str, str], float | None] = {}
        keys = {
            key: (group.task, group.method)
            for group in plan.groups
            for cell in group.cells
            for key in (*cell.keys, *cell.finals)
        }
        for key, (task, method) in keys.items():
            seconds = records.get(key, {}).get("seconds")
            if seconds is not None:
                for mark in ((task, method), (None, method), (None, None)):
                    self.seen.setdefault(mark, []).append(seconds)

    def of(self, run: Run) -> float | None:
        place = run.task, run.method
        if place not in self.paces:  # once, not for every run
            marks = (place, (None, run.method), (None, None))
            seen = next((self.seen[mark] for mark in marks if mark in self.seen), None)
            self.paces[place] = None if seen is None else statistics.median(seen)
        return self.paces[place]

    def mean(self) -> float | None:
        seen = self.seen.get((None, None))
        return statistics.mean(seen) if seen else None


def clock(seconds: float) -> str:
    """ "0:21:13"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def outcome(record: Record) -> str:
    """What came out of a run, in a few words."""
    if record["status"] != FINISHED:
        return f"{record['status']}: {record['reason']}"
    val = record["val"]  # None of a run that trained on those images too
    words = f"val {val:.3f} (epoch {record['best_epoch']})" if val is not None else "not validated"
    if record["test"] is not None:
        words += f", test {record['test']:.3f}"
    return f"{words}, {record['seconds']:.1f} s"


def announcement(plan: Plan) -> str:
    """How many runs there are, before the first one."""
    grid, more = plan.count()
    groups, cells = len(plan.groups), sum(len(group.cells) for group in plan.groups)
    where = f"{groups} {plural('pair', groups)} of task and method"
    seeds = f"{len(plan.seeds)} {plural('seed', len(plan.seeds))}"
    if not grid:
        where = f"{cells} {plural('cell', cells)} in {where}"
        return f"{plan.name}: {more} {plural('run', more)}: {where}, {seeds}"
    text = f"{plan.name}: {grid + more} runs: {grid} of the grid ({cells} cells in {where})"
    if more:
        text += f", then {more} of the chosen cells ({seeds})"
    return text


def plural(word: str, count: int) -> str:
    """The word, with an s unless there is one of it."""
    return word if count == 1 else f"{word}s"


def report(plan: Plan, records: Records) -> list[str]:
    """Lines of ``pae sweep --status``."""
    now = progress(plan, records)
    lines = [announcement(plan), now.line(), ""]
    rows: list[Sequence[str]] = [("task", "method", "grid", "chosen", "runs", "val", "test")]
    for group in plan.groups:
        grid = plan.grid(group)
        cells = group.cells if plan.select == NONE else plan.chosen(group, records)
        seen = f"{sum(run.key in records for run in grid)}/{len(grid)}" if grid else "-"
        if not cells:
            open_ = "none finished" if all(r.key in records for r in grid) else "open"
            rows.append((group.task, group.method, seen, open_, "-", "-", "-"))
        for cell in cells:
            finals = plan.tested(group, cell)
            values = " ".join(f"{n}={shown(v)}" for n, v in cell.values.items()) or "-"
            found = [records[run.key] for run in finals if run.is_done(records)]
            done = f"{len(found)}/{len(finals)}"
            place = group.task, group.method, seen, values, done
            rows.append((*place, _mean(found, "val"), _mean(found, "test")))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
    running = [(run, holder) for run in now.left if (holder := _holder(records, run))]
    if running:
        lines += ["", "under way:", *(f"  {run.key} {run}: {who}" for run, who in running)]
    if now.failed:
        lines += ["", "did not finish (--retry starts them again):"]
        lines += [f"  {run.key} {run}: {outcome(records[run.key])}" for run in now.failed]
    return lines


def _mean(found: list[Record], name: str) -> str:
    values = [record[name] for record in found if record[name] is not None]
    return f"{statistics.mean(values):.3f}" if values else "-"


def _holder(records: Records, run: Run) -> str | None:
    """Which process has a run, as its lock file says; None if none does."""
    holder = lock.holder(records.path(run.key))
    if holder["pid"] is None or lock.is_dead(holder):
        return None
    return f"process {holder['pid']} on {holder['host']}"
