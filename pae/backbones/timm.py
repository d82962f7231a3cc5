"""Which reader a timm model has: told by the attributes of its container."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedBackbone
from .timm_bias import BiasView
from .timm_cait import CaitView
from .timm_eva import EvaView
from .timm_naflex import NaFlexView
from .timm_pit import PitView
from .timm_swin import SwinView
from .timm_vit import TimmView
from .view import BackboneView, examined

# Containers without a place for prompts, told by an attribute: a row is more there than one of a
# sequence.
_NO_PLACE = {
    "cls_attn_blocks": "its blocks convolve the grid of their rows (local patch interaction)",
    "local_up_to_layer": "its blocks weigh rows by places in a square grid (positional attention)",
    "post_network": "its first blocks weigh the neighbours of each place (outlook attention)",
    "unroll": "its blocks pool queries within squares of a grid (mask units)",
    "pixel_pos": "its blocks look at the pixels of each row's patch",
    "neck": "its blocks cut a grid of rows into windows, with biases for its places",
}


def _refusal(module: nn.Module, missing: str) -> str:
    """Why a container without that attribute is not taken."""
    name = type(module).__name__
    for attribute, reason in _NO_PLACE.items():
        if hasattr(module, attribute):
            return f"{name} has no place for prompts: {reason}"
    if any(part.endswith("logit_scale") for part, _ in module.named_parameters()):
        return f"{name} compares rows by their cosine, which no formula here has"
    return f"{name} has no attribute {missing!r}, which a plain timm ViT has"


def _kind(module: nn.Module) -> type[TimmView]:
    if hasattr(module, "blocks_token_only"):
        return CaitView
    if hasattr(module, "rope_mixed"):
        return EvaView
    if hasattr(module, "rel_pos_bias") or hasattr(module, "shared_rel_pos"):
        return BiasView
    return NaFlexView if hasattr(module, "embeds") else TimmView


def _has_stages(module: nn.Module) -> bool:
    return hasattr(module, "layers") and not hasattr(module, "blocks")


def head_name(module: nn.Module) -> str | None:
    return SwinView.head_name if _has_stages(module) else "head"


def read_backbone(module: nn.Module) -> BackboneView:
    """View of a supported backbone.

    Raises:
        UnsupportedBackbone: naming the attribute that is missing or that pae cannot express.
    """
    if _has_stages(module):
        return examined(SwinView(module))
    if hasattr(module, "transformers") and hasattr(module, "head_dist"):
        return examined(PitView(module))
    name = type(module).__name__
    vit: Any = module
    kind = _kind(module)
    for attribute in kind.needs.split():
        if not hasattr(module, attribute):
            raise UnsupportedBackbone(_refusal(module, attribute))
    for attribute in () if kind.takes_more else ("rope", "rel_pos_bias", "shared_rel_pos_bias"):
        if getattr(module, attribute, None) is not None:
            raise UnsupportedBackbone(
                f"{name}.{attribute} is set: its blocks or head need more than the rows"
            )
    if len(vit.blocks) == 0:
        raise UnsupportedBackbone(f"{name}.blocks is empty")
    return examined(kind(module))
