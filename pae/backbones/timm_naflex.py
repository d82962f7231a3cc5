"""timm's `NaFlexVit` on whole images: one stem that places positions on any grid, blocks as timm's
others. Sequences of patches with a mask, which it also takes, are not for prompts here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import UnsupportedBackbone
from .timm_vit import TimmView


class NaFlexView(TimmView):
    """The face of a timm `NaFlexVit`, or of a module with the same attributes."""

    needs = (
        "blocks embeds _forward_embeds norm forward_head embed_dim global_pool num_prefix_tokens "
        "attn_pool head"
    )

    @property
    def _stem(self) -> tuple[Any, tuple[int, int]]:
        stem = self._vit.embeds
        return stem, tuple(stem.pos_embed_grid_size or (1, 1))

    @property
    def class_token(self) -> Tensor | None:
        return self._vit.embeds.cls_token

    @property
    def image_size(self) -> None:
        return None

    @property
    def pads_images(self) -> bool:
        return self._vit.embeds.dynamic_img_pad

    def embed(self, images: Tensor) -> Tensor:
        return self._vit._forward_embeds(images, None, None, None)["patches"]

    def patch_tokens(self, images: Tensor) -> Tensor:
        raise UnsupportedBackbone(
            f"{type(self._vit).__name__} gives no patch tokens without their positions"
        )

    def patch_convolution(self, size: tuple[int, int]) -> None:
        return None

    def embed_tokens(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return self.patch_tokens(tokens)
