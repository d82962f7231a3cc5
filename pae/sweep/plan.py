"""What a sweep consists of, and what follows from the records it has so far.

A group is a task with a method; its cells are what the grid and the draws vary. Runs of the grid
look at validation images alone; when all of a group have their record, the rule chooses a cell, and
its runs are the final ones, which are tested. `sweep.json` in the folder of a sweep is its plan, so
whoever reads its records needs no spec: `read`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pae.errors import CheckpointError
from pae.files import check_signature, from_json, signed, to_json, write_atomically
from pae.sweep.records import FINISHED, Records

PLAN = "sweep.json"
NONE, BEST, TWO_STAGE = "none", "best", "two-stage"
SELECT = (NONE, BEST, TWO_STAGE)
BEST_EPOCH, LAST_EPOCH = "best", "last"
EPOCHS = (BEST_EPOCH, LAST_EPOCH)
LOSS, FIRST = "loss", "first"
EQUAL = (LOSS, FIRST)


class Run(NamedTuple):
    """A run that a sweep wants: where it stands in it, and whether it is tested."""

    key: str
    task: str
    method: str
    values: Mapping[str, Any]
    seed: int
    test: bool

    def __str__(self) -> str:
        """ "digits, VPT-deep, lr=0.01, seed 0"."""
        values = [f"{name}={shown(value)}" for name, value in self.values.items()]
        return ", ".join([self.task, self.method, *values, f"seed {self.seed}"])

    def is_done(self, records: Records) -> bool:
        """Whether its record says all that is wanted of it."""
        record = records.get(self.key)
        if record is None:
            return False
        untested = self.test and record["test"] is None and record["images"].get("test", 0)
        return record["status"] != FINISHED or not untested


@dataclass(frozen=True)
class Cell:
    """A point of the grid: what it sets, and the keys of its runs, one a seed.

    `keys` are the runs that the choice looks at, `finals` those that are tested: the same unless
    the spec gives the final runs options of their own.
    """

    values: Mapping[str, Any]
    keys: tuple[str, ...]
    finals: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """A task with a method."""

    task: str
    method: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Plan:
    """All groups, and how a cell is chosen in each.

    Attributes:
        name: of the sweep.
        seeds: of every cell, the first of which a two-stage choice looks at.
        select: none: every cell is a result of its own; best: by the mean over all seeds;
            two-stage: by the first seed, and only the chosen cell runs from the others.
        epoch: whose validation counts: the best one's of a run, or the last one's.
        equal: which of equal accuracies wins: that of the lower loss, or the first cell.
        scheduler: None, or what may stop runs early, which makes a choice depend on order.
    """

    name: str
    seeds: tuple[int, ...]
    select: str
    epoch: str
    groups: tuple[Group, ...]
    scheduler: str | None = None
    equal: str = LOSS

    # ---- which runs

    def grid(self, group: Group) -> list[Run]:
        """The runs that the choice waits for; none where nothing is chosen."""
        if self.select == NONE or (len(group.cells) == 1):
            return []
        seeds = range(1 if self.select == TWO_STAGE else len(self.seeds))
        return [
            Run(cell.keys[i], group.task, group.method, cell.values, self.seeds[i], False)
            for cell in group.cells
            for i in seeds
        ]

    def finals(self, group: Group, records: Records) -> list[Run] | None:
        """The runs that are tested; None while the choice is open or there is nothing to choose."""
        cells = group.cells if self.select == NONE else self.chosen(group, records)
        if not cells:
            return None
        return [run for cell in cells for run in self.tested(group, cell)]

    def tested(self, group: Group, cell: Cell) -> list[Run]:
        """The final runs of a cell, one a seed."""
        return [
            Run(key, group.task, group.method, cell.values, seed, True)
            for key, seed in zip(cell.finals, self.seeds, strict=True)
        ]

    def runs(self, records: Records) -> Iterator[Run]:
        """The runs that are wanted and known by now, in the order in which they are done: task by
        task, the grids first.
        """
        for task in dict.fromkeys(group.task for group in self.groups):
            groups = [group for group in self.groups if group.task == task]
            for group in groups:
                yield from self.grid(group)
            for group in groups:
                yield from self.finals(group, records) or ()

    def count(self) -> tuple[int, int]:
        """How many runs there are: of grids, and beside them of chosen cells.

        A final run that the grid has done is tested, not run again.
        """
        grid = {run.key for group in self.groups for run in self.grid(group)}
        if self.select == NONE:
            cells = [cell for group in self.groups for cell in group.cells]
        else:
            cells = [group.cells[0] for group in self.groups]  # whichever is chosen: as many
        return len(grid), len({key for cell in cells for key in cell.finals} - grid)

    # ---- the choice

    def chosen(self, group: Group, records: Records) -> tuple[Cell, ...]:
        """The cell that the rule chooses, the first of equals; () while it is open, and where no
        run of the group has finished.
        """
        if len(group.cells) == 1:
            return group.cells
        if any(run.key not in records for run in self.grid(group)):
            return ()
        return self.ties(group, records)[:1]

    def ties(self, group: Group, records: Records) -> tuple[Cell, ...]:
        """All cells whose validation is the best, in their order: the first is the chosen one.

        Accuracy counts first, then the loss if `equal` says so. A cell with a run that diverged,
        failed or was stopped is none of them.
        """
        scores = {i: self.score(cell, records) for i, cell in enumerate(group.cells)}
        known = {i: score for i, score in scores.items() if score is not None}
        best = max(known.values(), default=None)
        return tuple(group.cells[i] for i, score in known.items() if score == best)

    def score(self, cell: Cell, records: Records) -> tuple[float, float] | None:
        """(accuracy, -loss) of the validation, a mean over the seeds that the choice looks at; None
        where one of them has not finished.
        """
        keys = cell.keys[:1] if self.select == TWO_STAGE else cell.keys
        seen = [records.get(key) for key in keys]
        last = "_last" if self.epoch == LAST_EPOCH else ""
        pairs = []
        for record in seen:
            if record is None or record["status"] != FINISHED:
                return None
            pairs.append((record[f"val{last}"], -record[f"val_loss{last}"]))
        accuracy, loss = (sum(part) / len(pairs) for part in zip(*pairs))
        return accuracy, loss if self.equal == LOSS else 0.0

    # ---- the file

    def write(self, folder: Path) -> None:
        """Writes the plan into the folder of the sweep, if it is not the one that is there."""
        table = {
            "name": self.name,
            "seeds": list(self.seeds),
            "select": self.select,
            "epoch": self.epoch,
            "equal": self.equal,
            "scheduler": self.scheduler,
            "groups": [
                {
                    "task": group.task,
                    "method": group.method,
                    "cells": [
                        {
                            "values": dict(cell.values),
                            "keys": list(cell.keys),
                            "finals": list(cell.finals),
                        }
                        for cell in group.cells
                    ],
                }
                for group in self.groups
            ],
        }
        text = to_json(signed(table), indent=1) + "\n"
        path = folder / PLAN
        if not path.is_file() or path.read_text("utf-8", "replace") != text:
            write_atomically(path, lambda file: file.write_text(text, "utf-8"))


def read(folder: str | Path) -> tuple[Plan, Records]:
    """The plan of the sweep in `folder`, and all its records.

    Raises:
        ValueError: there is no sweep.
        CheckpointError: the plan or a record is damaged.
    """
    path = Path(folder).expanduser() / PLAN
    if not path.is_file():
        raise ValueError(f"{folder}: no sweep here ({PLAN} is missing)")
    try:
        table = check_signature(from_json(path.read_bytes()))
        table["groups"] = tuple(
            Group(
                group["task"],
                group["method"],
                tuple(
                    Cell(cell["values"], tuple(cell["keys"]), tuple(cell["finals"]))
                    for cell in group["cells"]
                ),
            )
            for group in table["groups"]
        )
        plan = Plan(**{**table, "seeds": tuple(table["seeds"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; pae sweep SPEC writes it again"
        ) from error
    return plan, Records(path.parent)


def shown(value: Any) -> str:
    """A value of a cell as tables and lines show it."""
    return value if isinstance(value, str) else to_json(value)
