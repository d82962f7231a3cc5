"""torchvision's `VisionTransformer`. The last layer of its `heads` is the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedBackbone
from .plain import PlainView
from .reading import BlockReader
from .view import BlockWeights, Linear, examined

LIBRARY = "torchvision"
KINDS = ("VisionTransformer",)
STEPS: dict[str, str] = {}


def head_name(module: nn.Module) -> str | None:
    heads = getattr(module, "heads", None)
    if not isinstance(heads, nn.Sequential):
        return "heads"
    *_, last = [None, *heads._modules]
    return None if last is None else f"heads.{last}"


def packed_attention(read: BlockReader, path: str) -> dict[str, Any]:
    """Fields of `BlockWeights` that an `nn.MultiheadAttention` has."""
    attention = read.get(path)
    plain = isinstance(attention, nn.MultiheadAttention) and attention._qkv_same_embed_dim
    if not plain or attention.bias_k is not None or attention.add_zero_attn:
        kind = type(attention).__name__
        raise UnsupportedBackbone(f"{path} is {kind}, expected a plain MultiheadAttention")
    if not attention.batch_first:
        raise UnsupportedBackbone(f"{path}.batch_first is False: build the model with True")

    def linear(weight: str, bias: str) -> Linear:
        found = read.tensor(f"{path}.{weight}")
        assert found is not None
        return Linear(found, read.tensor(f"{path}.{bias}"))

    return {
        "qkv": linear("in_proj_weight", "in_proj_bias"),
        "num_heads": attention.num_heads,
        "scale": attention.head_dim**-0.5,
        "proj": linear("out_proj.weight", "out_proj.bias"),
    }


class View(PlainView):
    """The face of torchvision's `VisionTransformer`.

    Raises:
        UnsupportedBackbone: another class.
    """

    pools = "row"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        if not hasattr(module, "_process_input"):
            kind = type(module).__name__
            raise UnsupportedBackbone(f"{kind} of {LIBRARY} is no VisionTransformer")
        vit, self.head_name = self._vit, head_name(module)
        heads, width = vit.encoder.layers[0].num_heads, vit.hidden_dim
        self._measure(vit.patch_size, vit.image_size, 1, heads, width)

    @property
    def _vit(self) -> Any:
        return self.module

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self._vit.encoder.layers)

    @staticmethod
    def read(block: nn.Module, name: str) -> BlockWeights:
        read = BlockReader(block, name)
        weights = BlockWeights(
            norm1=read.norm("ln_1"),
            **packed_attention(read, "self_attention"),
            norm2=read.norm("ln_2"),
            fc1=read.linear("mlp.0"),
            activation=read.activation("mlp.1"),
            fc2=read.linear("mlp.3"),
        )
        read.close()
        return weights

    @property
    def class_token(self) -> Tensor | None:
        return self._vit.class_token

    @property
    def stem(self) -> nn.Module:
        return self._vit.conv_proj

    def patch_tokens(self, images: Tensor) -> Tensor:
        return self._vit._process_input(images)

    def place(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        vit = self._vit
        rows = torch.cat([vit.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return vit.encoder.dropout(rows + vit.encoder.pos_embedding)

    @property
    def _before_head(self) -> list[nn.Module]:
        heads = self._vit.heads
        return list(heads)[:-1] if isinstance(heads, nn.Sequential) else []

    @property
    def readers(self) -> list[nn.Module]:
        return [self._vit.encoder.ln, *self._before_head]

    def readout(self, x: Tensor) -> Tensor:
        x = self._vit.encoder.ln(x)[:, 0]
        for part in self._before_head:
            x = part(x)
        return x


def read_backbone(module: nn.Module) -> View:
    return examined(View(module))
