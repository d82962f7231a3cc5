"""transformers' BEiT: what is added to the logits depends on where two rows lie, by a table of each
block or of all of them, which the module itself resamples for images of another size.

A block makes its bias for the rows of an image, so it cannot be called with prompts among them: its
formula runs instead, with a bias of 0 for prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .hf_image import Kind, View
from .view import Geometry


@dataclass(frozen=True)
class Placed(Geometry):
    """What the block's own forward is told instead of the sum of both biases.

    Attributes:
        size: of the images, (height, width).
        shared: (1, H, N, N), the bias that all blocks have, or None.
    """

    size: tuple[int, int] = (0, 0)
    shared: Tensor | None = None


class BeitView(View):
    """The face of a model with BEiT's blocks."""

    def __init__(self, module: nn.Module, kind: Kind) -> None:
        super().__init__(module, kind)
        self._told = False  # version 4 has the argument, and says that it does nothing
        if getattr(self._pooler, "layernorm", None) is not None:
            self.pools = "mean"  # with a norm behind it

    @property
    def _shared(self) -> Any:
        base = self.base
        if hasattr(base, "encoder"):  # version 4
            return getattr(base.encoder, "relative_position_bias", None)
        return base.shared_position_bias

    @torch.no_grad()
    def geometry(self, size: tuple[int, int]) -> list[Geometry]:
        """The same list, while no table changes."""
        names = ("relative_position_bias", "shared_position_bias")
        own = self.module.named_parameters()
        tensors = [(name, t) for name, t in own if any(word in name for word in names)]
        return self._remembered(size, tensors, self._biases)

    def _biases(self, size: tuple[int, int]) -> list[Geometry]:
        rows, columns = (s // p for s, p in zip(size, self._patch))
        shared = None if self._shared is None else self._shared((rows, columns))
        found: list[Geometry] = []
        for block in self.blocks:
            table, bias = _table(block), shared
            if table is not None:
                bias = table((rows, columns)) + (0 if shared is None else shared)
            bias = None if bias is None else bias[0]
            found.append(Placed(bias=bias, at=self.num_prefix_tokens, size=size, shared=shared))
        return found

    def block_arguments(self, geometry: Geometry, rows: int) -> dict[str, Any]:
        if not isinstance(geometry, Placed):
            return super().block_arguments(geometry, rows)
        own = hasattr(self.base, "encoder")
        name = "relative_position_bias" if own else "attention_mask"
        return {"resolution": geometry.size, name: geometry.shared}

    def proof(self, index: int, rows: int) -> tuple[int, Geometry]:
        geometry = self.geometry(self.default_size)[index]
        return (rows, geometry) if geometry.bias is None else (self.shape.num_tokens, geometry)


def _table(block: Any) -> Any:
    """The module that makes a block's own bias, or None."""
    inner = getattr(block.attention, "attention", None)  # version 4
    return getattr(block if inner is None else inner, "relative_position_bias", None)
