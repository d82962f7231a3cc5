"""The default job: linear probe, VPT-deep and VPT-deep + PAE on one task, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pae.train.callbacks import Callback
from pae.train.data import Task
from pae.train.declared import declared
from pae.train.loop import train
from pae.train.options import RECIPE, Options
from pae.train.record import Record
from pae.train.report import Reporter
from pae.train.runfolder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

# (folder, name in the table, what distinguishes the run)
ENTRIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("linear", "linear probe", {"method": "linear"}),
    ("vpt-deep", "VPT-deep", {"method": "vpt-deep"}),
    ("vpt-deep-pae", "VPT-deep + PAE", {"method": "vpt-deep", "kld": True, "mpa": True}),
)


def entries(options: Options) -> list[tuple[str, str, Options]]:
    """[(folder name, table name, `Options`)]: `options` with each entry's method.

    The recipe and the dropout in `options` are those of the prompt runs; the probe, which trains on
    fixed features, keeps its own.
    """
    own = {name: option.default for name, option in declared(Options).items()}
    listed = []
    for folder, name, changes in ENTRIES:
        if changes["method"] == "linear":
            changes = {**changes, **{kept: own[kept] for kept in (*RECIPE, "dropout")}}
        listed.append((folder, name, dataclasses.replace(options, **changes).resolved()))
    return listed


def compare(
    options: Options,
    task: Task,
    folder: RunFolder,
    accelerator: Accelerator,
    reporter: Reporter,
    *,
    resume: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> list[dict[str, Any]]:
    """Runs every entry in its own folder below `folder`, one after the other.

    Args:
        options, task, accelerator, reporter: as for `train`.
        folder: a `RunFolder`; results.csv gets the table, curves.png all curves.
        callbacks: as for `train`, of every run in turn.
        resume: as for `train`: finished entries are taken as they are, the others go on.
    Returns:
        The results, one dict per entry.
    Raises:
        ValueError: finished entries had other images or another backbone; and as for `train`.
    """
    main = accelerator.is_main_process
    runs = {name: RunFolder(folder.path / name) for name, _, _ in entries(options)}
    with folder.held() if main else contextlib.nullcontext():
        if resume is None and main:
            folder.write_config(options, task={"name": task.name})
        try:
            results: list[dict[str, Any]] = []
            curves = {}
            for name, title, changed in entries(options):
                run = runs[name]
                results.append(
                    train(
                        changed,
                        task,
                        run,
                        accelerator,
                        reporter,
                        name=title,
                        callbacks=callbacks,
                        resume=resume if run.config.is_file() else None,
                        sibling=_record(next(iter(runs.values()))) if results else None,
                    )
                )
                curves[title] = run.rows()
        except BaseException:
            if main and not any(run.config.is_file() for run in runs.values()):
                folder.config.unlink(missing_ok=True)  # nothing began: nothing to go on with
            raise
        if main:
            reporter.curves(folder.curves, curves, {row["name"]: row for row in results})
            folder.write_comparison(results)  # last: it marks the comparison as finished
    return results


def _record(run: RunFolder) -> Record | None:
    """The record of a run, settings apart, as its config.json shows it; None in an older one."""
    facts = run.facts()
    if "splits" not in facts:
        return None
    return {**facts, "classes": facts["task"]["classes"]}
