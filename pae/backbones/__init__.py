"""Reads frozen backbones into neutral block weights, and other people's files into backbones."""

from .timm_vit import average_pooled, read_backbone
from .view import BackboneView, BlockWeights
from .weights import LoadedWeights, load_weights

__all__ = [
    "BackboneView",
    "BlockWeights",
    "LoadedWeights",
    "average_pooled",
    "load_weights",
    "read_backbone",
]
