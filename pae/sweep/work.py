"""One run of a sweep, from its options to its record. Every executor does this and nothing else.

A run is held while it is worked on (`pae.train.lock`), so that no two processes are in one folder,
and goes on from its own state if it has one. Whatever ends it becomes a record, except a stop that
was asked for: then the next call goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pae
from pae.errors import CheckpointError, one_line
from pae.files import to_json, write_atomically
from pae.sweep.plan import Run
from pae.sweep.records import DIVERGED, FAILED, FILE, FINISHED, STOPPED, Record, Records
from pae.sweep.shared import Shared
from pae.sweep.spec import Sweep
from pae.train import lock, loop
from pae.train import record as records_of_runs
from pae.train.declared import declared
from pae.train.options import Options
from pae.train.report import Reporter
from pae.train.runfolder import Rows, RunFolder
from pae.train.scores import score_of

OnEpoch = Callable[[dict[str, Any]], None]
_TRACE = "error.txt"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def do(
    sweep: Sweep,
    records: Records,
    run: Run,
    reporter: Reporter,
    shared: Shared | None = None,
    on_epoch: OnEpoch | None = None,
) -> Record | None:
    """Trains a run, or goes on with it, or tests it, and writes its record.

    Args:
        sweep: that it is of.
        records: of the sweep.
        run: one that has no record, or one that is tested.
        reporter: what the run says.
        shared: what runs of one process have in common.
        on_epoch: called with the row of every epoch that ends.
    Returns:
        The record; None if another process has just written it.
    Raises:
        InUse: another process is at it.
        Interrupted, KeyboardInterrupt: a stop was asked for; what was done is kept.
        OSError: the disk is full; what was done is kept, and the run has no record.
    """
    folder = _Folder(records.path(run.key), on_epoch)
    with folder.held():
        records.refresh()
        if run.is_done(records):
            return None
        (folder.path / _TRACE).unlink(missing_ok=True)
        options = sweep.options[run.key]
        try:
            body = _train(sweep, records, run, folder, options, reporter, shared)
        except (loop.Interrupted, KeyboardInterrupt):
            raise
        except OSError as error:
            if error.errno in _FULL:  # so would be all runs after it
                text = f"{error.strerror}; make room, and the same command goes on"
                raise OSError(error.errno, text, error.filename) from error
            body = _failure(folder, FAILED, error)
        except ArithmeticError as error:
            body = _failure(folder, DIVERGED, error)
        except Exception as error:
            body = _failure(folder, FAILED, error)
        record = {**_head(sweep, run), **body}
        records.write(record)
        _tidy(folder, record, run)
        return record


def _head(sweep: Sweep, run: Run) -> Record:
    """What a record has, however its run ends, in the words of one that finished."""
    return {
        "key": run.key,
        "status": FINISHED,
        "reason": None,
        "error": None,
        "task": run.task,
        "method": run.method,
        "values": dict(run.values),
        "seed": run.seed,
        "scheduler": sweep.plan.scheduler,
        "settings": dataclasses.asdict(sweep.options[run.key]),
        "images": {},
        "val": None,
        "test": None,
    }


def _train(
    sweep: Sweep,
    records: Records,
    run: Run,
    folder: RunFolder,
    options: Options,
    reporter: Reporter,
    shared: Shared | None,
) -> Record:
    """What a finished run adds to its record."""
    shared = Shared() if shared is None else shared
    options = _adopted(folder, options.resolved(sweep.given[run.key]), options)
    if shared.workers is not None and sweep.options[run.key].workers is None:
        options = dataclasses.replace(options, workers=shared.workers)
    task = shared.task(options)
    result = loop.train(
        options,
        task,
        folder,
        shared.accelerator(options),
        reporter,
        name=run.method,
        resume="auto" if folder.config.is_file() else None,
        sibling=_sibling(sweep, records, run),
        test=run.test,
        features=shared.features,
    )
    rows, facts = folder.rows(), folder.facts()
    best = rows[result["best_epoch"] - 1]
    return {
        "settings": facts["settings"],
        "images": {name: facts["task"][name] for name in ("train", "val", "test")},
        "classes": len(facts["task"]["classes"]),
        "image_size": facts["image_size"],
        "backbone": facts["backbone"],
        "val": score_of(result),
        "val_loss": best["val_loss"],
        "best_epoch": result["best_epoch"],
        "val_last": score_of(rows[-1]),
        "val_loss_last": rows[-1]["val_loss"],
        "epochs": len(rows),
        "test": score_of(result, "test"),
        "parameters": result["trained_parameters"],
        "parameters_without_head": result["trained_parameters"] - result["head_parameters"],
        "seconds": result["seconds"],
        "passes": result["passes"],
        "mpa_passes": result["mpa_passes"],
        "mpa_seconds": result["mpa_seconds"],
        "peak_memory_mb": result["memory_mb"],
        "device": facts["device"],
        "versions": {**facts["versions"], "code": code()},
    }


class _Folder(RunFolder):
    """A run folder that tells when an epoch has ended."""

    anew = (
        "pae sweep SPEC --retry begins it anew",
        "put it back and give --retry, or give another --output",
    )

    def __init__(self, path: Path, on_epoch: OnEpoch | None) -> None:
        super().__init__(path)
        self.on_epoch = on_epoch

    def write_metrics(self, rows: Rows, result: dict[str, Any] | None = None) -> None:
        super().write_metrics(rows, result)
        if self.on_epoch is not None and result is None:
            self.on_epoch(rows[-1])


def _adopted(folder: RunFolder, resolved: Options, asked: Options) -> Options:
    """The options to go on with: what another machine chose when the run began stays."""
    if not folder.config.is_file():
        return resolved
    stored = folder.read_config()
    left = [n for n in records_of_runs.CHOSEN if getattr(asked, n) in (None, "auto")]
    return dataclasses.replace(resolved, **{name: getattr(stored, name) for name in left})


def _sibling(sweep: Sweep, records: Records, run: Run) -> records_of_runs.Record | None:
    """What a finished run on the same images and backbone had, which this one must have too."""
    mine = _place(sweep.options[run.key])
    for key, options in sweep.options.items():
        if key != run.key and key in records and _place(options) == mine:
            facts = RunFolder(records.path(key)).facts()
            if records[key]["status"] == FINISHED and "splits" in facts:
                return {**facts, "classes": facts["task"]["classes"]}
    return None


def _place(options: Options) -> list[Any]:
    known = declared(Options).values()
    names = [option.name for option in known if option.group in ("images", "backbone")]
    return [getattr(options, name) for name in (*names, "seed")]


# ---- how it ended


def _failure(folder: RunFolder, status: str, error: Exception) -> Record:
    """What a run that did not finish adds to its record: one line, and what it had reached."""
    if not isinstance(error, (ValueError, OSError, ImportError, ArithmeticError)):
        text = traceback.format_exc()
        write_atomically(folder.path / _TRACE, lambda file: file.write_text(text, "utf-8"))
    try:
        epochs = len(folder.rows())
    except CheckpointError:
        epochs = 0
    return {
        "status": status,
        "reason": one_line(error),
        "error": type(error).__name__,
        "epochs": epochs,
        "versions": {"pae": pae.__version__, "torch": str(torch.__version__), "code": code()},
    }


def failed(sweep: Sweep, records: Records, run: Run, reason: str) -> None:
    """Writes the record of a run that could not write its own: its process was ended."""
    _without_run(sweep, records, run, FAILED, reason)


def stopped(sweep: Sweep, records: Records, run: Run, reason: str) -> None:
    """Writes the record of a run that a scheduler stopped early."""
    _without_run(sweep, records, run, STOPPED, reason)


def _without_run(sweep: Sweep, records: Records, run: Run, status: str, reason: str) -> None:
    folder = RunFolder(records.path(run.key))
    with contextlib.suppress(lock.InUse), folder.held():
        records.refresh()
        if run.is_done(records):
            return
        try:
            epochs = len(folder.rows())
        except CheckpointError:
            epochs = 0
        records.write(
            {
                **_head(sweep, run),
                "status": status,
                "reason": reason,
                "epochs": epochs,
                "versions": {"pae": pae.__version__, "code": code()},
            }
        )


def retry(records: Records, key: str) -> bool:
    """Takes the record of a run that did not finish away; whether there was one.

    A run that diverged, or whose files did not fit, begins again; others go on where they were.
    """
    record = records.get(key)
    if record is None or record["status"] == FINISHED:
        return False
    folder = RunFolder(records.path(key))
    try:
        with folder.held():
            if record["status"] == DIVERGED or record["error"] == "CheckpointError":
                for path in folder.path.iterdir():
                    if path.name not in (FILE, *lock.FILES):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            records.remove(key)
    except lock.InUse:
        return False
    return True


def _tidy(folder: RunFolder, record: Record, run: Run) -> None:
    """Removes what nothing can go on from any more: states of a tested run, which are several times
    as large as what it trained.
    """
    folder.previous_state.unlink(missing_ok=True)
    if record["status"] == FINISHED and (run.test or not record["images"]["test"]):
        folder.state.unlink(missing_ok=True)


@functools.lru_cache
def code() -> str:
    """A digest of the Python sources that ran, changed or not since their version was named."""
    digest = hashlib.blake2b(digest_size=6)
    import pae_kernels

    for package in (pae, pae_kernels):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(to_json(path.relative_to(root).as_posix()).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Quiet(Reporter):
    """What a run says while many are done: its bar, on a terminal, and every warning once."""

    _warned: set[str]

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(True, quiet)
        self._warned = set()

    def say(self, text: str) -> None:
        """Nothing: the sweep has a line for every run."""

    def warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            super().warn(text)

    def curves(self, path: Path, runs: Any, results: Any = None) -> None:
        """None: they take half a second a run, and metrics.csv has them."""
