"""timm's `Cait`: blocks of self-attention over patches alone, and behind them blocks in which a
class row looks at those.

Prompts stand in front of the patches in the former; the latter belong to the readout, and read what
the last of the former gives for the patches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedBackbone
from .timm_vit import TimmView
from .view import BlockWeights


class CaitView(TimmView):
    """The face of a timm `Cait`, whose rows are those of patches."""

    needs = (
        "blocks blocks_token_only forward_cls patch_embed pos_embed pos_drop norm forward_head "
        "embed_dim global_pool num_prefix_tokens head"
    )

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.num_prefix_tokens = 0
        patches = self.shape.num_tokens - self.shape.num_prefix_tokens
        self.shape = replace(
            self.shape, num_tokens=patches, num_prefix_tokens=0, has_class_token=False
        )

    @property
    def class_token(self) -> None:
        return None  # it is none of the rows

    @property
    def reads_class_only(self) -> bool:
        return False

    @property
    def pools_not(self) -> str | None:
        if self._vit.global_pool == "avg":
            return None
        return "reads its rows by class attention"

    @property
    def readout_parts(self) -> list[Any]:
        own = self._vit.blocks_token_only
        forward_cls = vars(self._vit).get("forward_cls")
        return [*super().readout_parts, own, *own, type(self._vit).forward_cls, forward_cls]

    def read_block(self, index: int) -> BlockWeights:
        attention: Any = getattr(self.blocks[index], "attn", None)
        if hasattr(attention, "proj_l") or hasattr(attention, "proj_w"):
            raise UnsupportedBackbone(
                f"blocks.{index}.attn mixes the logits of its heads (talking heads), which the "
                "fast engine's attention keeps apart"
            )
        return super().read_block(index)

    def embed(self, images: Tensor) -> Tensor:
        m = self._vit
        return m.pos_drop(m.patch_embed(images) + m.pos_embed)

    def embed_tokens(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        m = self._vit
        return m.pos_drop(m.patch_embed.norm(tokens) + m.pos_embed)

    def readout(self, x: Tensor) -> Tensor:
        m = self._vit
        return m.forward_head(m.norm(m.forward_cls(x)), pre_logits=True)
