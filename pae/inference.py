"""How a frozen block runs where nothing follows its forward: sums and activations happen in place,
and on a CPU in fp32 products may read weights that MKL has laid out for one number of rows.
"""

from __future__ import annotations

from torch import Tensor

from pae_kernels import pointwise

from .block import Steps
from .packs import Packs, can_pack
from .plan import BlockPlan


class InPlace(Steps):
    """The rows of the stream that comes in are overwritten; `lay_out` is optional."""

    overwrites = True

    def __init__(self) -> None:
        self._rows, self._packs = 0, Packs()

    def lay_out(self, block: BlockPlan, rows: int) -> None:
        """Weights in MKL's own order for products of `rows` rows, where there is such an order: a
        second copy of them, made at first use. 0 gives it up.
        """
        if rows != self._rows:
            self._rows, self._packs = rows if can_pack(block.w_qkv) else 0, Packs()

    def product(self, rows: Tensor, block: BlockPlan, name: str) -> Tensor:
        if not self._fits(rows):
            return super().product(rows, block, name)
        return self._packs.linear(rows, name, *block.product(name))

    def add(
        self, x: Tensor, rows: Tensor, block: BlockPlan, name: str, overwrite: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self._fits(rows) and x.dtype == rows.dtype:  # which is fp32
            return x.add_(self.product(rows, block, name)), None
        return super().add(x, rows, block, name, overwrite)

    def activation(self, hidden: Tensor, kind: str, code: bool) -> tuple[Tensor, Tensor | None]:
        return pointwise.activation_(hidden, kind), None

    def _fits(self, rows: Tensor) -> bool:
        return self._rows > 0 and rows.shape[:-1].numel() == self._rows
