"""Finished runs that nobody ran: folders as `pae train` leaves them, as far as tables read them."""

from __future__ import annotations

import dataclasses
import json

from pae.files import signed
from pae.train.options import Options

CLASSES = {"a": ["x", "y"], "b": ["x", "y", "z"]}


def save_run(
    folder, accuracy, *, task="a", name=None, finished=True, facts=None, result=None, **settings
):
    """A run folder with this test accuracy, a share of 1; returns it."""
    options = {"method": "vpt-deep", "epochs": 3, "seed": 0, "lr": 0.01, **settings}
    known = {
        "name": name or options["method"],
        "task": {
            "name": task,
            "classes": CLASSES.get(task, ["x", "y"]),
            "train": 800,
            "val": 200,
            "test": 100,
        },
        "device": "a cpu",
        "splits": {s: {"images": 1, "digest": f"{s} of {task}"} for s in ("train", "val", "test")},
        "image_size": 56,
        "backbone": {"name": "vit", "fingerprint": "f"},
        **(facts or {}),
    }
    row = {
        "name": known["name"],
        "trained_parameters": 46_080,
        "head_parameters": 5_000,
        "val_accuracy": accuracy - 0.01,
        "test_accuracy": accuracy,
        "seconds": 100.0,
        "memory_mb": 1500.0,
        **(result or {}),
    }
    folder.mkdir(parents=True)
    written = {"settings": dataclasses.asdict(Options(**options)), **known}
    (folder / "config.json").write_text(json.dumps(signed(written)))
    metrics = {"epochs": [], "result": row if finished else None}
    (folder / "metrics.json").write_text(json.dumps(signed(metrics)))
    return folder
