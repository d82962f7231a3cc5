"""Reads frozen backbones into neutral block weights, and other people's files into backbones."""

from __future__ import annotations

from types import ModuleType

from torch import nn

from ..errors import UnsupportedBackbone
from . import hf, open_clip, released, timm, torchvision
from .timm_vit import average_pooled
from .view import BackboneView, BlockWeights
from .weights import LoadedWeights, load_weights

__all__ = [
    "BackboneView",
    "BlockWeights",
    "LoadedWeights",
    "average_pooled",
    "head_name",
    "load_weights",
    "read_backbone",
]

_READERS: dict[str, ModuleType] = {r.LIBRARY: r for r in (hf, open_clip, torchvision)}


def _reader(module: nn.Module) -> ModuleType:
    """Of the library that the class of `module`, or one that it derives from, is defined in: no
    library is imported to ask. What comes from none of them is judged by its attributes.
    """
    for kind in type(module).__mro__:
        if (library := kind.__module__.partition(".")[0]) in _READERS:
            return _READERS[library]
    own = isinstance(module, released.SelfSupervised) or released.transformer(module) is not None
    return released if own else timm


def read_backbone(module: nn.Module) -> BackboneView:
    """View of a supported backbone, whose blocks are proved to be what they were read as.

    Raises:
        UnsupportedBackbone: naming the class, or the attribute that is missing or that pae cannot
            express.
    """
    kind = type(module)
    if kind.__module__.startswith("peft."):
        raise UnsupportedBackbone(
            f"{kind.__name__} of peft wraps a backbone: give merge_and_unload() of it, or for "
            "adapters that are not merged get_base_model()"
        )
    return _reader(module).read_backbone(module)


def head_name(module: nn.Module) -> str | None:
    """Dotted name of the module that makes logits of a backbone's features; None when it has no
    place for one.
    """
    return _reader(module).head_name(module)
