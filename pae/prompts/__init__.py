"""Prompt families, one file each."""

from .base import BackboneShape, PromptFamily
from .vpt import VPTDeep, VPTShallow

__all__ = ["BackboneShape", "PromptFamily", "VPTDeep", "VPTShallow", "build"]

_FAMILIES = {cls.__name__: cls for cls in (VPTDeep, VPTShallow)}


def build(name: str, config: dict) -> PromptFamily:
    """Build a family from its class name and `config()`, as stored in checkpoints."""
    if name not in _FAMILIES:
        raise ValueError(f"name must be one of {sorted(_FAMILIES)}, got {name!r}")
    return _FAMILIES[name](**config)
