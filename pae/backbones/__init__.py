"""Reads frozen backbones into neutral block weights, and other people's files into backbones."""

from .timm import read_backbone
from .timm_vit import average_pooled
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
