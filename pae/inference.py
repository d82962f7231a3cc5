"""How a frozen block runs where nothing follows its forward: sums and activations happen in place,
and on a CPU in fp32 products may read weights that MKL has laid out for one number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pae_kernels import pointwise

from .block import Steps
from .plan import BlockPlan


class InPlace(Steps):
    """The rows of the stream that comes in are overwritten; `lay_out` is optional."""

    overwrites = True

    def __init__(self) -> None:
        self._rows = 0
        self._laid_out: dict[str, Tensor] = {}

    def lay_out(self, block: BlockPlan, rows: int) -> None:
        """Weights in MKL's own order for products of `rows` rows, where there is such an order: a
        second copy of them. 0 gives it up.
        """
        if rows == self._rows:
            return
        self._rows, self._laid_out = rows, {}
        if rows and _mkl_can_pack(block.w_qkv):
            for name in ("qkv", "proj", "fc1", "fc2"):
                weight, _ = block.product(name)
                self._laid_out[name] = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)

    def product(self, rows: Tensor, block: BlockPlan, name: str) -> Tensor:
        if not self._fits(rows, name):
            return super().product(rows, block, name)
        return torch.ops.mkl._mkl_linear(
            rows, self._laid_out[name], *block.product(name), self._rows
        )

    def add(
        self, x: Tensor, rows: Tensor, block: BlockPlan, name: str, overwrite: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self._fits(rows, name) and x.dtype == rows.dtype:  # which is fp32
            return x.add_(self.product(rows, block, name)), None
        return super().add(x, rows, block, name, overwrite)

    def activation(self, hidden: Tensor, kind: str, code: bool) -> tuple[Tensor, Tensor | None]:
        return pointwise.activation_(hidden, kind), None

    def _fits(self, rows: Tensor, name: str) -> bool:
        return name in self._laid_out and rows.shape[:2].numel() == self._rows


def _mkl_can_pack(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
