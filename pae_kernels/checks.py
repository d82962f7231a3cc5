"""What ops and models ask of what they were given, and how they say it in one line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def describe(t: Any) -> str:
    """Shape, dtype and device of a tensor; the type of anything else."""
    if not isinstance(t, Tensor):
        return type(t).__name__
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def transform() -> str | None:
    """What follows PyTorch's own operations here, in words, and would see nothing of a kernel."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform (grad, vmap, jvp, ...)"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation (torch.autograd.forward_ad)"
    return None
