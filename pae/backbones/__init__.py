"""Reads frozen backbones into neutral block weights."""

from .timm_vit import read_backbone
from .view import BackboneView, BlockWeights

__all__ = ["BackboneView", "BlockWeights", "read_backbone"]
