"""The vision transformers of VPT's released code and its descendants: `transformer.encoder.layer`,
below `enc` where a wrapper is around it; and those of MAE and MoCo, whose `blocks` are as timm's.
Prompts inside are not read here: `pae.adopt` does.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedBackbone
from .plain import PlainView
from .reading import BlockReader
from .timm_blocks import read_block
from .view import BlockWeights, Stacked, examined


def transformer(module: nn.Module) -> Any | None:
    """What holds `embeddings` and `encoder.layer` of that layout, in `module` or it itself."""
    for path in ("enc.transformer", "transformer", ""):
        part: Any = module
        for name in filter(None, path.split(".")):
            part = getattr(part, name, None)
        layers = getattr(getattr(part, "encoder", None), "layer", None)
        if layers is not None and len(layers) and hasattr(layers[0], "attention_norm"):
            return part
    return None


def self_supervised(module: nn.Module) -> Any | None:
    """What holds `patch_embed`, `blocks` and `prompt_embeddings` of that layout, in `module` or it
    itself.
    """
    for part in (getattr(module, "enc", None), module):
        if all(hasattr(part, n) for n in ("patch_embed", "blocks", "prompt_embeddings")):
            return part
    return None


class SelfSupervised(nn.Module):
    """The frozen parts of such a model, and its head.

    Raises:
        UnsupportedBackbone: it has a distillation token, or no final norm.
    """

    def __init__(self, inner: Any, head: nn.Module) -> None:
        super().__init__()
        name = type(inner).__name__
        if getattr(inner, "dist_token", None) is not None:
            raise UnsupportedBackbone(f"{name}.dist_token is set, expected a class token alone")
        self.patch_embed, self.blocks, self.head = inner.patch_embed, inner.blocks, head
        self.cls_token, self.pos_embed = inner.cls_token, inner.pos_embed
        behind, before = (getattr(inner, norm, None) for norm in ("fc_norm", "norm"))
        self.averages = not isinstance(behind, (nn.Identity, type(None)))
        final = behind if self.averages else before
        if final is None:
            raise UnsupportedBackbone(f"{name} has neither fc_norm nor norm")
        self.final = final
        self.pre_logits = getattr(inner, "pre_logits", None) or nn.Identity()


def head_name(module: nn.Module) -> str | None:
    return "head" if hasattr(module, "head") else None


class View(PlainView):
    """The face of a model in that layout."""

    pools = "row"

    def __init__(self, module: nn.Module) -> None:
        self.module, self.head_name = module, head_name(module)
        embeddings = self._inner.embeddings
        patch = tuple(self.stem.kernel_size)
        patches = embeddings.position_embeddings.shape[1] - 1
        side = isqrt(patches)
        if side * side != patches:
            raise UnsupportedBackbone(
                f"embeddings.position_embeddings has {patches} patches, expected a square"
            )
        heads = self._inner.encoder.layer[0].attn.num_attention_heads
        size, width = (side * patch[0], side * patch[1]), embeddings.cls_token.shape[-1]
        self._measure(patch, size, 1, heads, width)

    @property
    def _inner(self) -> Any:
        return transformer(self.module)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self._inner.encoder.layer)

    @staticmethod
    def read(block: nn.Module, name: str) -> BlockWeights:
        read = BlockReader(block, name)
        parts = tuple(read.linear(f"attn.{part}") for part in ("query", "key", "value"))
        heads = read.get("attn.num_attention_heads")
        weights = BlockWeights(
            norm1=read.norm("attention_norm"),
            qkv=Stacked(parts),
            num_heads=heads,
            scale=(len(parts[0].weight) // heads) ** -0.5,
            proj=read.linear("attn.out"),
            norm2=read.norm("ffn_norm"),
            fc1=read.linear("ffn.fc1"),
            activation=read.activation("ffn.act_fn"),
            fc2=read.linear("ffn.fc2"),
        )
        read.close()
        return weights

    @property
    def class_token(self) -> Tensor | None:
        return self._inner.embeddings.cls_token

    @property
    def stem(self) -> Any:
        return self._inner.embeddings.patch_embeddings

    def place(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        embeddings = self._inner.embeddings
        rows = torch.cat([embeddings.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return rows + embeddings.position_embeddings  # its dropout is off in a frozen backbone

    @property
    def readers(self) -> list[nn.Module]:
        return [self._inner.encoder.encoder_norm]

    def readout(self, x: Tensor) -> Tensor:
        return self._inner.encoder.encoder_norm(x)[:, 0]


class SelfSupervisedView(PlainView):
    """The face of a `SelfSupervised`."""

    head_name = "head"

    def __init__(self, module: SelfSupervised) -> None:
        self.module = module
        self.pools = "mean" if module.averages else "row"
        embed: Any = module.patch_embed
        heads, width = self._first_heads(), module.cls_token.shape[-1]
        self._measure(embed.patch_size, embed.img_size, 1, heads, width)
        expected = self.shape.num_tokens
        if module.pos_embed.shape[1] != expected:
            raise UnsupportedBackbone(
                f"pos_embed has {module.pos_embed.shape[1]} rows, expected {expected}"
            )

    def _first_heads(self) -> int:
        return self.read(self.blocks[0], "blocks.0").num_heads

    @property
    def _vit(self) -> Any:
        return self.module

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self._vit.blocks)

    @staticmethod
    def read(block: nn.Module, name: str) -> BlockWeights:
        return read_block(block, name)

    @property
    def class_token(self) -> Tensor | None:
        return self._vit.cls_token

    @property
    def stem(self) -> Any:
        return self._vit.patch_embed.proj

    def patch_tokens(self, images: Tensor) -> Tensor:
        return self._vit.patch_embed(images)

    def place(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        rows = torch.cat([self._vit.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return rows + self._vit.pos_embed

    @property
    def readers(self) -> list[nn.Module]:
        return [self._vit.final, self._vit.pre_logits]

    def readout(self, x: Tensor) -> Tensor:
        vit = self._vit
        return vit.final(x[:, 1:].mean(1)) if vit.averages else vit.pre_logits(vit.final(x)[:, 0])


def read_backbone(module: nn.Module) -> View | SelfSupervisedView:
    if isinstance(module, SelfSupervised):
        return examined(SelfSupervisedView(module))
    return examined(View(module))
