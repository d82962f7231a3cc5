"""open_clip's image towers `model.visual`: its `VisionTransformer`, and `TimmModel` around a timm
model. The features are the embedding that its own forward gives: projected, unless the tower has no
projection (`visual.proj` is None; `proj` of a `TimmModel` is "none").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedBackbone
from . import timm
from .plain import PlainView
from .reading import BlockReader
from .timm_bias import BiasView
from .timm_eva import EvaView
from .timm_naflex import NaFlexView
from .timm_vit import TimmView
from .torchvision import packed_attention
from .view import BackboneView, BlockWeights, examined, random_rows

LIBRARY = "open_clip"
KINDS = ("VisionTransformer", "TimmModel")
STEPS = dict.fromkeys(("CLIP", "CoCa", "CustomTextCLIP"), "give its visual")


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
    def class_token(self) -> Tensor | None:
        return self._tower.class_embedding

    @property
    def stem(self) -> nn.Module:
        return self._tower.conv1

    @property
    def stem_norm(self) -> nn.Module | None:
        return self._tower.ln_pre

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


class _Trunk(TimmView):
    """The face of a `TimmModel`: that of its `trunk`, with a projection behind the readout."""

    def __init__(self, module: nn.Module, trunk: TimmView) -> None:
        vars(self).update(vars(trunk))
        self.module, self.head_name = module, None

    @property
    def _vit(self) -> Any:
        tower: Any = self.module
        return tower.trunk

    @property
    def feature_width(self) -> int:
        rows = random_rows(2, self.num_prefix_tokens + 1, self.shape.width).to(self.like)
        with torch.no_grad():
            return self.readout(rows).shape[-1]

    @property
    def readout_parts(self) -> list[Any]:
        tower: Any = self.module
        return [*super().readout_parts, *tower.head, self._vit.head]

    def readout(self, x: Tensor) -> Tensor:
        tower: Any = self.module
        return tower.head(self._vit.head(super().readout(x)))


class _EvaTrunk(_Trunk, EvaView):
    """Around a timm `Eva`."""


class _BiasTrunk(_Trunk, BiasView):
    """Around a timm `Beit` or `VisionTransformerRelPos`."""


class _NaFlexTrunk(_Trunk, NaFlexView):
    """Around a timm `NaFlexVit`."""


_TRUNKS: dict[type, type[_Trunk]] = {
    TimmView: _Trunk,
    EvaView: _EvaTrunk,
    BiasView: _BiasTrunk,
    NaFlexView: _NaFlexTrunk,
}


def _around_timm(tower: Any) -> BackboneView:
    """View of a `TimmModel`, whose trunk has been read and proved."""
    if hasattr(tower.head, "pool") or getattr(tower.trunk, "global_pool", "") == "":
        raise UnsupportedBackbone(
            f"TimmModel of {LIBRARY} pools the rows of its trunk by itself: give its trunk"
        )
    trunk = timm.read_backbone(tower.trunk)
    if not isinstance(trunk, TimmView) or type(trunk) not in _TRUNKS:
        raise UnsupportedBackbone(
            f"TimmModel of {LIBRARY} around {type(tower.trunk).__name__}: give its trunk"
        )
    return _TRUNKS[type(trunk)](tower, trunk)


def read_backbone(module: nn.Module) -> BackboneView:
    if hasattr(module, "trunk"):
        return _around_timm(module)
    return examined(View(module))
