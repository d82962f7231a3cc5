"""Reads frozen backbones into neutral block weights."""

from .timm_vit import BackboneView, BlockWeights, read_backbone

__all__ = ["BackboneView", "BlockWeights", "read_backbone"]
