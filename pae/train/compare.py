"""The default job: linear probe, VPT-deep and VPT-deep + PAE on one task, side by side."""

from __future__ import annotations

import dataclasses

from pae.train.loop import train
from pae.train.report import plot_curves
from pae.train.runfolder import RunFolder

# (folder, name in the table, what distinguishes the run)
ENTRIES = (
    ("linear", "linear probe", {"method": "linear"}),
    ("vpt-deep", "VPT-deep", {"method": "vpt-deep"}),
    ("vpt-deep-pae", "VPT-deep + PAE", {"method": "vpt-deep", "kld": True, "mpa": True}),
)
# of the prompt runs unless --epochs says otherwise: the comparison is to end in minutes on a CPU
EPOCHS = 3
_RECIPE = ("epochs", "batch_size", "optimizer", "lr", "weight_decay", "warmup_epochs")


def entries(settings):
    """[(folder name, table name, `Settings`)]: `settings` with each entry's method.

    The recipe in `settings` is that of the prompt runs; the probe, which trains on fixed features,
    keeps its own.
    """
    listed = []
    for folder, name, changes in ENTRIES:
        if changes["method"] == "linear":
            changes = {**changes, **dict.fromkeys(_RECIPE)}
        listed.append((folder, name, dataclasses.replace(settings, **changes).resolved()))
    return listed


def compare(settings, task, folder, accelerator, reporter, *, resume=None):
    """Runs every entry in its own folder below `folder`, one after the other.

    Args:
        settings, task, accelerator, reporter: as for `train`.
        folder: a `RunFolder`; results.csv gets the table, curves.png all curves.
        resume: as for `train`: finished entries are taken as they are, the others go on.
    Returns:
        The results, one dict per entry.
    """
    results, curves = [], {}
    for name, title, changed in entries(settings):
        run = RunFolder(folder.path / name)
        how = resume if run.config.is_file() else None
        results.append(train(changed, task, run, accelerator, reporter, name=title, resume=how))
        curves[title] = run.rows()
    if accelerator.is_main_process:
        plot_curves(folder.curves, curves)
        folder.write_comparison(results)
    return results
