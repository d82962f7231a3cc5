"""The vision transformer of VPT's released code and its descendants: `transformer.encoder.layer`,
below `enc` where a wrapper is around it. Prompts inside are not read here: `pae.adopt` does.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedBackbone
from .plain import PlainView
from .reading import BlockReader
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
            q_norm=None,
            k_norm=None,
            num_heads=heads,
            scale=(len(parts[0].weight) // heads) ** -0.5,
            proj=read.linear("attn.out"),
            scale1=None,
            norm2=read.norm("ffn_norm"),
            fc1=read.linear("ffn.fc1"),
            activation=read.activation("ffn.act_fn"),
            fc2=read.linear("ffn.fc2"),
            scale2=None,
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


def read_backbone(module: nn.Module) -> View:
    return examined(View(module))
