"""How the ops say what they were given, in the one line of an error."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def describe(t: Any) -> str:
    """Shape, dtype and device of a tensor; the type of anything else."""
    if not isinstance(t, Tensor):
        return type(t).__name__
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"
