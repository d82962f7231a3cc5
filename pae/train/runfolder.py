"""The folder of one run: what it was asked, what it measured, and where it can go on from.

    config.json        the resolved options and the versions that ran them; --config takes it
    metrics.csv        one row per epoch          metrics.json   the same, and the final result
    best.safetensors   trained parts at the best validation accuracy
    last.safetensors   trained parts at the end, or where the run was interrupted
    state.pt           everything that training needs to go on; state.previous.pt the one before
    curves.png         the curves

A comparison has results.csv and results.json instead, and a folder of the above per method.
Each file is replaced atomically. The state alone decides where a resumed run goes on; its format is
in `pae.train.state`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

from pae.checkpoint import write_atomically
from pae.errors import CheckpointError
from pae.train.options import Options, read_config
from pae.train.state import read_state, write_state

Rows = list[dict[str, Any]]


class RunFolder:
    """Access to the files of one run.

    Args:
        path: the folder; made when something is first written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics_csv = self.path / "metrics.csv"
        self.metrics_json = self.path / "metrics.json"
        self.best = self.path / "best.safetensors"
        self.last = self.path / "last.safetensors"
        self.state = self.path / "state.pt"
        self.previous_state = self.path / "state.previous.pt"
        self.curves = self.path / "curves.png"
        self._went_back = False  # to the previous state, as the last one is of no use

    def write_config(self, options: Options, **facts: Any) -> None:
        """Writes the options and `facts` (versions, classes, sizes)."""
        self._write_json(self.config, {"settings": dataclasses.asdict(options), **facts})

    def read_config(self) -> Options:
        """The options of the run.

        Raises:
            ValueError: the folder holds no run.
            CheckpointError: its config.json is damaged.
        """
        if not self.config.is_file():
            raise ValueError(f"{self.path}: no run here (config.json is missing)")
        try:
            return Options(**read_config(self.config))
        except ValueError as error:
            raise CheckpointError(f"{self.config} cannot be read: {error}") from error

    def write_metrics(self, rows: Rows, result: dict[str, Any] | None = None) -> None:
        """Writes the rows measured so far as CSV and JSON; `result` marks the run as finished."""
        self._write_csv(self.metrics_csv, rows)
        self._write_json(self.metrics_json, {"epochs": rows, "result": result})

    def write_comparison(self, results: Rows) -> None:
        """Writes the results of several runs, one row each, as results.csv and results.json."""
        self._write_csv(self.path / "results.csv", results)
        self._write_json(self.path / "results.json", results)

    def result(self) -> dict[str, Any] | None:
        """The final result, or None while the run is unfinished."""
        return self._metrics().get("result")

    def rows(self) -> Rows:
        """The rows of metrics.json."""
        return self._metrics().get("epochs", [])

    def write_state(self, state: dict[str, Any]) -> None:
        """Replaces state.pt; the one it replaces stays as state.previous.pt, unless this run went
        on from that one.
        """
        write_state(self.state, state, None if self._went_back else self.previous_state)
        self._went_back = False

    def read_state(self, previous: bool = False) -> dict[str, Any] | None:
        """The last state, or None when the run was stopped before the first one.

        Args:
            previous: the state before it instead.
        Raises:
            CheckpointError: unreadable, half-written, damaged, or not a state file.
        """
        there = os.path.lexists(self.previous_state)
        if previous:
            if not there:
                raise CheckpointError(f"{self.previous_state}: there is no previous state")
            self._went_back = True
            return read_state(self.previous_state)
        if os.path.lexists(self.state):
            advice = "; --previous-state goes on from the state before it" if there else ""
            return read_state(self.state, advice)
        # a crash between the two renames of `write_state` leaves the last state under this name
        return read_state(self.previous_state) if there else None

    def _metrics(self) -> dict[str, Any]:
        if not self.metrics_json.is_file():
            return {}
        try:
            return json.loads(self.metrics_json.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{self.metrics_json} cannot be read: {error}") from error

    def _write_csv(self, path: Path, rows: Rows) -> None:
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._write(path, table.getvalue().encode())

    def _write_json(self, path: Path, value: Any) -> None:
        self._write(path, (json.dumps(value, indent=2) + "\n").encode())

    def _write(self, path: Path, data: bytes) -> None:
        def write(file: Path) -> None:
            file.write_bytes(data)

        write_atomically(path, write)


def check_output(output: str) -> Path:
    """The folder that --output names.

    Raises:
        ValueError: it already holds something.
    """
    path = Path(output).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"--output {output} is not empty; go on with --resume {output}, or give another one"
        )
    return path


def new_folder(output: str | None, default_name: str) -> Path:
    """The folder of a new run: `output`, or the first free ``runs/<default_name>-NNN``.

    Raises:
        ValueError: `output` already holds something.
    """
    if output is not None:
        return check_output(output)
    number = 1
    while (path := Path("runs") / f"{default_name}-{number:03d}").exists():
        number += 1
    return path
