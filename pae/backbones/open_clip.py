"""open_clip's `VisionTransformer`, the image tower `model.visual`. The features are the embedding
that its own forward gives: projected, unless `visual.proj` is None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedBackbone
from .plain import PlainView
from .reading import BlockReader
from .torchvision import packed_attention
from .view import BlockWeights, examined

LIBRARY = "open_clip"
KINDS = ("VisionTransformer",)
STEPS = {"CLIP": "give its visual", "CoCa": "give its visual", "TimmModel": "give its trunk"}
STEPS |= {"CustomTextCLIP": "give its visual"}


def head_name(module: nn.Module) -> str | None:
    return None


class View(PlainView):
    """The face of an image tower.

    Raises:
        UnsupportedBackbone: another class, or a readout that gives rows.
    """

    head_name = None

    def __init__(self, module: nn.Module) -> None:
        self.module, kind = module, type(module).__name__
        if not (hasattr(module, "_embeds") and hasattr(module, "conv1")):
            step = STEPS.get(kind, "expected a VisionTransformer of open_clip 2.29 or later")
            raise UnsupportedBackbone(f"{kind} of {LIBRARY} is no model that can be read: {step}")
        tower = self._tower
        if tower.attn_pool is not None:
            self.pools = "pools its rows by attention"
        elif tower.pool_type == "none":
            raise UnsupportedBackbone(f"{kind}.pool_type is 'none', expected 'tok' or 'avg'")
        else:
            self.pools = "row" if tower.pool_type == "tok" else "mean"
        heads, width = tower.transformer.resblocks[0].attn.num_heads, tower.transformer.width
        self._measure(tower.patch_size, tower.image_size, 1, heads, width)

    @property
    def _tower(self) -> Any:
        return self.module

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self._tower.transformer.resblocks)

    @staticmethod
    def read(block: nn.Module, name: str) -> BlockWeights:
        read = BlockReader(block, name)
        weights = BlockWeights(
            norm1=read.norm("ln_1"),
            **packed_attention(read, "attn"),
            scale1=read.layer_scale("ls_1"),
            norm2=read.norm("ln_2"),
            fc1=read.linear("mlp.c_fc"),
            activation=read.activation("mlp.gelu"),
            fc2=read.linear("mlp.c_proj"),
            scale2=read.layer_scale("ls_2"),
        )
        read.close()
        return weights

    @property
    def stem(self) -> nn.Module:
        return self._tower.conv1

    def embed(self, images: Tensor) -> Tensor:
        return self._tower._embeds(images)

    def place(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        tower = self._tower
        first = tower.class_embedding.to(tokens.dtype).expand(len(tokens), 1, -1)
        rows = torch.cat([first, tokens], dim=1) + tower.positional_embedding.to(tokens.dtype)
        return tower.ln_pre(tower.patch_dropout(rows))

    @property
    def readers(self) -> list[nn.Module]:
        tower = self._tower
        parts = (tower.ln_post, tower.attn_pool, getattr(tower, "attn_pool_contrastive", None))
        return [part for part in parts if part is not None]

    def readout(self, x: Tensor) -> Tensor:
        pooled, _ = self._tower._pool(x)
        return pooled if self._tower.proj is None else pooled @ self._tower.proj


def read_backbone(module: nn.Module) -> View:
    return examined(View(module))
