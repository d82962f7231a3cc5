"""Frozen weights in the order in which MKL multiplies by them.

A product of few rows spends a tenth to a fifth of its time on bringing the weight into that order,
every time. Here it is done once for each weight and direction, at the price of a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST_ROWS = 32  # below them MKL does not reorder


def can_pack(weight: Tensor) -> bool:
    """Whether PyTorch multiplies by packed weights of this dtype, on its device."""
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


class Packs:
    """Of one block. Each weight is held for the number of rows that came last, no other."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """What MKL asked for; it touches about half of that."""
        return sum(4 * packed.numel() for _, packed in self._held.values())

    def fits(self, rows: Tensor, weight: Tensor) -> bool:
        """Whether `linear` takes them: fp32 on a CPU with MKL, and enough rows."""
        enough = rows.shape[:-1].numel() >= FEWEST_ROWS
        return enough and rows.dtype == weight.dtype and can_pack(weight)

    def linear(self, rows: Tensor, name: str, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows W^T + b, without a gradient. `name` is always that of the same weight."""
        count = rows.shape[:-1].numel()
        for_rows, packed = self._held.get(name, (0, weight))
        if for_rows != count:
            packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, count)
            self._held[name] = count, packed
        return torch.ops.mkl._mkl_linear(rows, packed, weight, bias, count)
