"""timm's `Beit` and `VisionTransformerRelPos`: what is added to the logits depends on where two
rows lie, by a table or an MLP of each block or of all of them.

A block reads its bias for the rows that it was built for, so it cannot be called with prompts among
them: its formula runs instead, with a bias of 0 for prompts.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import timm_eva
from .timm_blocks import read_block
from .timm_vit import TimmView
from .view import BlockWeights, Geometry


class BiasView(TimmView):
    """The face of a timm `Beit` or `VisionTransformerRelPos`."""

    needs = (
        "blocks patch_embed cls_token norm forward_head embed_dim global_pool num_prefix_tokens "
        "head"
    )
    takes_more = True

    @property
    def _shared(self) -> nn.Module | None:
        vit = self._vit
        return getattr(vit, "rel_pos_bias", None) or getattr(vit, "shared_rel_pos", None)

    def read_block(self, index: int) -> BlockWeights:
        block, name = self.blocks[index], f"blocks.{index}"
        if hasattr(block, "gamma_1"):
            return timm_eva.read_block(block, name, rotation="", post=self._post)
        return read_block(block, name, self._post)

    def embed(self, images: Tensor) -> Tensor:
        return self._placed(self._vit.patch_embed(images))

    def embed_tokens(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return self._placed(self._vit.patch_embed.norm(tokens))

    def _placed(self, x: Tensor) -> Tensor:
        m = self._vit
        if m.cls_token is not None:
            x = torch.cat([m.cls_token.expand(len(x), -1, -1), x], dim=1)
        if getattr(m, "pos_embed", None) is not None:
            x = x + m.pos_embed
        return m.pos_drop(x) if hasattr(m, "pos_drop") else x

    @torch.no_grad()
    def geometry(self, size: tuple[int, int]) -> list[Geometry]:
        """The same list, while no table or MLP changes."""
        names = ("rel_pos", "relative_position_bias_table", "shared_")
        named = chain(self.module.named_parameters(), self.module.named_buffers())
        tensors = [(name, t) for name, t in named if any(word in name for word in names)]
        return self._remembered(size, tensors, lambda _: self._biases())

    def _biases(self) -> list[Geometry]:
        shared, found = self._shared_bias(), []
        for block in self._vit.blocks:
            bias, part = shared, block.attn
            if getattr(part, "relative_position_bias_table", None) is not None:
                bias = part._get_rel_pos_bias() + (0 if shared is None else shared)
            elif getattr(part, "rel_pos", None) is not None:  # which takes no other beside it
                bias = part.rel_pos.get_bias()
            bias = bias if bias is None or bias.dim() == 3 else bias[0]
            found.append(Geometry(bias=bias, at=self.num_prefix_tokens))
        return found

    def _shared_bias(self) -> Tensor | None:
        """(H, N, N), or (1, H, N, N)."""
        shared: Any = self._shared
        if shared is None:
            return None
        return shared.get_bias() if hasattr(shared, "get_bias") else shared()

    def block_arguments(self, geometry: Geometry, rows: int) -> dict[str, Any]:
        shared = self._shared_bias()
        if shared is None or geometry.bias is None:
            return {}
        name = "shared_rel_pos" if hasattr(self._vit, "shared_rel_pos") else "shared_rel_pos_bias"
        return {name: shared.to(geometry.bias.dtype)}

    def proof(self, index: int, rows: int) -> tuple[int, Geometry]:
        return self.shape.num_tokens, self.geometry(self.default_size)[index]
