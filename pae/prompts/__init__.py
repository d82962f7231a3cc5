"""Prompt families, one file each."""

from .apt import APT
from .base import BackboneShape, PromptFamily
from .bpt import BPTDeep, BPTShallow
from .da_vpt import DAVPT
from .e2vpt import E2VPT, E2VPTImportance, e2vpt_importance
from .ivpt import IVPT
from .lspt import LSPT
from .pro_vpt import ProVPT
from .vapt import VAPT
from .vfpt import VFPTDeep, VFPTShallow
from .vpt import VPTDeep, VPTShallow

__all__ = [
    "APT",
    "DAVPT",
    "E2VPT",
    "IVPT",
    "LSPT",
    "VAPT",
    "BPTDeep",
    "BPTShallow",
    "BackboneShape",
    "E2VPTImportance",
    "ProVPT",
    "PromptFamily",
    "VFPTDeep",
    "VFPTShallow",
    "VPTDeep",
    "VPTShallow",
    "build",
    "e2vpt_importance",
]

_FAMILIES = {
    name: value
    for name, value in globals().items()
    if isinstance(value, type) and issubclass(value, PromptFamily) and value is not PromptFamily
}


def build(name: str, config: dict) -> PromptFamily:
    """Build a family from its class name and `config()`, as stored in checkpoints."""
    if name not in _FAMILIES:
        raise ValueError(f"name must be one of {sorted(_FAMILIES)}, got {name!r}")
    return _FAMILIES[name](**config)
