"""A run from Python: the options of the command line, its folder, and the model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pae.train import cli, loop, runfolder, tasks, using
from pae.train.callbacks import Callback, Tracker
from pae.train.declared import declared, near
from pae.train.options import Options, combine, find_config, read_config
from pae.train.report import Reporter

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run; everything is read from its folder, so `Run(folder)` opens one again.

    Attributes:
        folder: where it lies, as `pae train` writes it.
    """

    folder: Path

    @cached_property
    def model(self) -> using.Loaded:
        """The tested model, as `pae.load` gives it: with `transform` and `classes`."""
        return using.load(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A row per epoch, as in metrics.csv."""
        return runfolder.RunFolder(self.folder).rows()

    @property
    def result(self) -> dict[str, Any]:
        """What the run came to: "val_accuracy", "test_accuracy", "best_epoch", "seconds", ..."""
        (result,) = runfolder.RunFolder(self.folder).results() or [{}]
        return result

    @property
    def options(self) -> Options:
        """What it was run with, resolved."""
        return runfolder.RunFolder(self.folder).read_config()


def fit(
    method: str = "vpt-deep",
    data: str | Path | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    config: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    log_with: str | Sequence[str] = (),
    quiet: bool = False,
    **options: Any,
) -> Run:
    """`pae train` from Python, as often in one process as wanted.

    The random streams of Python, NumPy and torch are set by the run's `seed`.

    Args:
        method: as --method, but for the comparison.
        data: a folder in any layout of `pae train`; None for an embedded image set (`dataset`).
        output: the run's folder, which must not hold anything; None: runs/DATA-NNN.
        resume: with `output`: go on with the run there, or take it as it is where it has finished,
            if it has these options; begin it where there is none.
        config: published settings by name, or a file of options. What is given here wins.
        callbacks: see `pae.Callback`.
        log_with: names of trackers: "tensorboard", "wandb", "trackio".
        quiet: no progress and no lines.
        options: all others of the command line, by name, with _ for -.

    Returns:
        The finished run.

    Raises:
        ValueError: an option that is unknown, of a wrong type or out of range, or that contradicts
            another; data that cannot be read.
        KeyboardInterrupt: it was stopped; the state is saved.
        ArithmeticError: a loss is not finite.
    """
    known = declared(Options)
    for name in options:
        if name not in known:
            raise ValueError(f"pae.fit: there is no option {name}{near(name, known)}")
    if method == "compare":
        raise ValueError("pae.fit runs one method, got 'compare'; the comparison is pae train")
    if resume and output is None:
        raise ValueError("pae.fit: resume=True needs output, the folder to go on in")
    values = {**options, "method": method}
    if data is not None:
        values["data"] = os.fspath(data)
    if values.get("weights") is not None:
        values["weights"] = os.fspath(values["weights"])
    path = None if config is None else find_config(str(config))
    in_file = {} if path is None else read_config(path)
    unresolved, given = combine(path, in_file, values)
    resolved = unresolved.resolved(given)
    names = [log_with] if isinstance(log_with, str) else list(log_with)
    callbacks = [*callbacks, *map(Tracker, names)]
    folder = None
    if output is not None:
        found = runfolder.RunFolder(os.path.expanduser(output))
        if resume and found.config.is_file():
            folder, resolved = found, cli.same_run(found, resolved, {**in_file, **values})
            if folder.results() is not None:
                return Run(folder.path)
        else:
            runfolder.check_output(str(output))
    tasks.kind_of(resolved).rehearse(given)
    accelerator = _accelerator(resolved)
    reporter = Reporter(accelerator.is_main_process, quiet)
    with reporter.warnings(), contextlib.ExitStack() as stack:
        with accelerator.main_process_first():
            task = loop.load_task(resolved)
        task = task.surveyed(resolved.workers)
        again = "auto" if folder is not None else None
        folder = cli.take(accelerator, folder, None if output is None else str(output), task.name)
        stack.callback(folder.release)
        place = resolved, task, folder, accelerator, reporter
        try:
            loop.train(*place, resume=again, callbacks=callbacks)
        except loop.Interrupted:
            raise KeyboardInterrupt(
                f"stopped; pae.fit(..., output={str(folder.path)!r}, resume=True) goes on"
            ) from None
    return Run(folder.path)


def _accelerator(options: Options) -> Accelerator:
    """accelerate's view of the machine is one per process: anew, where it had another precision."""
    from accelerate.state import AcceleratorState, PartialState

    if AcceleratorState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    return loop.make_accelerator(options)
