"""The folder of one run: what it was asked, what it measured, and where it can go on from.

    config.json        the resolved options and the versions that ran them; --config takes it
    metrics.csv        one row per epoch          metrics.json   the same, and the final result
    best.safetensors   trained parts at the best validation accuracy
    last.safetensors   trained parts at the end, or where the run was interrupted
    state.pt           everything that training needs to go on; state.previous.pt the one before
    curves.png         the curves
    .lock              while a process works here; see `pae.train.lock`

A comparison has results.csv and results.json instead, and a folder of the above per method.
Each file is replaced atomically. The state alone decides where a resumed run goes on; its format is
in `pae.train.state`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pae.errors import CheckpointError
from pae.files import (
    TEMPORARY,
    check_signature,
    from_json,
    remove_temporaries,
    signed,
    to_json,
    write_atomically,
)
from pae.train import lock
from pae.train.options import Options, read_config
from pae.train.state import read_state, write_state

Rows = list[dict[str, Any]]


class RunFolder:
    """Access to the files of one run.

    Args:
        path: the folder; made by `acquire`.

    Attributes:
        anew: what may be done where another run lies here, and where the runs beside it are on
            other images.
    """

    anew = "put it back, or start a new run", "put it back, or start a new comparison"

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
        self._hold: lock.Hold | None = None
        self._made: list[Path] = []  # by this object: the folder and its parents, deepest first

    def acquire(self) -> None:
        """Makes the folder where there is none and keeps other processes out of it until `release`;
        removes what dead ones left half-written. Nothing is done if it is held already.

        Raises:
            InUse: another process works here.
            OSError: the folder cannot be made or written.
        """
        if self._hold is not None:
            return
        made = _make(self.path)
        try:
            self._hold = lock.Hold(self.path)
        except BaseException:
            _remove(made)
            raise
        self._made += made
        remove_temporaries(self.path)

    def release(self) -> None:
        """Lets others in. A folder that was made here and holds no run goes with it."""
        if self._hold is None:
            return
        with contextlib.suppress(OSError):  # the folder may have been taken away
            if self._made and self.is_blank():
                shutil.rmtree(self.path)
                _remove(self._made[1:])
        self._hold.release()
        self._hold = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """`acquire` and `release` around a block, unless an outer one has done it."""
        outer = self._hold is not None
        self.acquire()
        try:
            yield
        finally:
            if not outer:
                self.release()

    def is_blank(self) -> bool:
        """Whether nothing is in the folder but what a run that never began may have left."""
        try:
            files = list(self.path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return True
        return all(file.name in lock.FILES or file.match(TEMPORARY) for file in files)

    def write_config(self, options: Options, **facts: Any) -> None:
        """Writes the options and `facts` (versions, classes, sizes)."""
        self._write_json(self.config, signed({"settings": dataclasses.asdict(options), **facts}))

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

    def facts(self) -> dict[str, Any]:
        """What config.json says beside the options; {} where it says nothing."""
        try:
            facts = from_json(self.config.read_bytes())
            return check_signature(facts) if isinstance(facts, dict) else {}
        except (OSError, ValueError):
            return {}

    def results(self) -> Rows | None:
        """The final results of a run (one) or of a comparison, or None while it is unfinished."""
        path = self.path / "results.json"
        if path.is_file():
            value = self._read_json(path, _results_of)
            if isinstance(value, dict):
                return value["results"]
            warnings.warn(
                f"{path} was written by an earlier version, without a digest, so damage may go "
                "unseen; delete it: going on writes it again",
                stacklevel=2,
            )
            return value
        result = self.result()
        return None if result is None else [result]

    def write_metrics(self, rows: Rows, result: dict[str, Any] | None = None) -> None:
        """Writes the rows measured so far as CSV and JSON; `result` marks the run as finished."""
        self._write_csv(self.metrics_csv, rows)
        self._write_json(self.metrics_json, signed({"epochs": rows, "result": result}))

    def write_comparison(self, results: Rows) -> None:
        """Writes the results of several runs, one row each, as results.csv and results.json."""
        self._write_csv(self.path / "results.csv", results)
        self._write_json(self.path / "results.json", signed({"results": results}))

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
        if not os.path.lexists(self.metrics_json):
            return {}
        return self._read_json(self.metrics_json, _metrics_of)

    def _read_json(self, path: Path, check: Callable[[Any], Any]) -> Any:
        try:
            if not path.is_file():  # a pipe, say, would be waited for
                raise ValueError("it is no file")
            return check(from_json(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}; delete it: going on writes it again"
            ) from error

    def _write_csv(self, path: Path, rows: Rows) -> None:
        table = io.StringIO()
        names = dict.fromkeys(name for row in rows for name in row)  # an older pae wrote fewer
        writer = csv.DictWriter(table, fieldnames=list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._write(path, table.getvalue().encode())

    def _write_json(self, path: Path, value: Any) -> None:
        self._write(path, (to_json(value, indent=2) + "\n").encode())

    def _write(self, path: Path, data: bytes) -> None:
        write_bytes(path, data)


def write_bytes(path: str | Path, data: bytes) -> None:
    """A file in one step."""
    write_atomically(path, lambda file: file.write_bytes(data))


def _rows_of(value: Any) -> Rows:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError("expected a list of rows")
    return value


def _results_of(value: Any) -> dict[str, Any] | Rows:
    if isinstance(value, list):  # of an older pae
        return _rows_of(value)
    if not isinstance(value, dict) or "results" not in value:
        raise ValueError("expected results")
    table = check_signature(value)
    if len(table) > 1:
        raise ValueError(f"nothing else than results was written, got {list(table)}")
    _rows_of(table["results"])
    return table


def _metrics_of(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not {"epochs", "result"} <= value.keys():
        raise ValueError("expected epochs and a result")
    table = check_signature(value)
    if len(table) > 2:
        raise ValueError(f"nothing else than epochs and a result was written, got {list(table)}")
    _rows_of(table["epochs"])
    if not (table["result"] is None or isinstance(table["result"], dict)):
        raise ValueError("its result is none")
    return table


def check_output(output: str) -> RunFolder:
    """The folder that --output names; nothing is made yet.

    Raises:
        ValueError: it already holds something, or is no folder.
    """
    folder = RunFolder(os.path.expanduser(output))
    if os.path.lexists(folder.path) and not folder.path.is_dir():
        raise ValueError(f"--output {output} is no folder; give another one")
    if not folder.is_blank():
        raise ValueError(
            f"--output {output} is not empty; go on with --resume {shlex.quote(output)}, or give "
            "another one"
        )
    return folder


def new_folder(output: str | None, default_name: str) -> RunFolder:
    """The folder of a new run, made and held: `output`, or the first free
    ``runs/<default_name>-NNN``. No two processes get the same.

    Raises:
        ValueError: `output` holds something, is in use, or cannot be made.
    """
    if output is None:
        return _numbered(Path("runs"), default_name)
    folder = check_output(output)
    try:
        folder.acquire()
        check_output(output)  # another process may have been here until a moment ago
    except OSError as error:
        folder.release()
        raise ValueError(
            f"--output {output} cannot be written ({error.strerror}); give another one"
        ) from error
    except ValueError:
        folder.release()
        raise
    return folder


def _numbered(parent: Path, name: str) -> RunFolder:
    number = 1
    try:
        made: list[Path] = []
        while True:
            made += _make(parent)
            folder = RunFolder(parent / f"{name}-{number:03d}")
            try:
                folder.path.mkdir()
            except FileExistsError:
                number += 1
                continue
            folder._made = [folder.path, *made]
            folder.acquire()
            return folder
    except OSError as error:
        raise ValueError(
            f"{parent / name}-{number:03d} cannot be made here ({error.strerror}); give a folder "
            "with --output"
        ) from error


def _make(path: Path) -> list[Path]:
    """Makes the folder and those above it; returns those that were not there, deepest first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing


def _remove(folders: list[Path]) -> None:
    """Removes folders that are empty, deepest first."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
