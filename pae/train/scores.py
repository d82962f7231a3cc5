"""The number by which epochs, runs and methods are compared, whatever its name is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {"accuracy": "accuracy", "mean_iou": "mean IoU"}  # in words for people


def metric_of(row: Mapping[str, Any]) -> str:
    """Its name in an epoch's row or in a result: the first that was validated, the loss apart."""
    return next(
        name[4:] for name in row if name.startswith("val_") and not name.startswith("val_loss")
    )


def score_of(row: Mapping[str, Any], split: str = "val") -> Any:
    """Its value on a split; None where there was none."""
    return row[f"{split}_{metric_of(row)}"]
