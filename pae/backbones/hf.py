"""Which models of Hugging Face's transformers are read, and which reader each has."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedBackbone
from .hf_beit import BeitView
from .hf_image import Kind, View
from .hf_video import VideoView
from .view import examined

LIBRARY = "transformers"

KINDS = {
    "ViTModel": Kind(reads="pooler"),
    "ViTForImageClassification": Kind("vit", head="classifier"),
    "DeiTModel": Kind(reads="pooler"),
    "DeiTForImageClassification": Kind("deit", head="classifier"),
    "BeitModel": Kind(reads="pooler"),
    "BeitForImageClassification": Kind("beit", "pooler", "classifier"),
    "Dinov2Model": Kind(),
    "Dinov2ForImageClassification": Kind("dinov2", "both", "classifier"),
    "Dinov2WithRegistersModel": Kind(),
    "Dinov2WithRegistersForImageClassification": Kind(
        "dinov2_with_registers", "both", "classifier"
    ),
    "DINOv3ViTModel": Kind(),
    "CLIPVisionModel": Kind(),
    "CLIPVisionModelWithProjection": Kind("vision_model", "projection"),
    "CLIPForImageClassification": Kind("vision_model", "bare mean", "classifier"),
    "SiglipVisionModel": Kind(reads="attention"),
    "SiglipForImageClassification": Kind("vision_model", "mean", "classifier"),
    "ViTMAEModel": Kind(),
    "VideoMAEModel": Kind(reads="mean"),
    "VideoMAEForVideoClassification": Kind("videomae", "mean", "classifier"),
    "VivitModel": Kind(reads="pooler"),
    "VivitForVideoClassification": Kind("vivit", head="classifier"),
}

# the towers inside of CLIP and SigLIP, which version 5 has as the models above
_TOWERS = {"CLIPVisionTransformer": Kind(), "SiglipVisionTransformer": Kind(reads="attention")}

# models that are one step away, and the step
STEPS = {
    "CLIPModel": "give its vision_model",
    "SiglipModel": "give its vision_model",
    "ViTForMaskedImageModeling": "give its vit",
    "ViTMAEForPreTraining": "give its vit",
    "VideoMAEForPreTraining": "give its videomae",
    "DeiTForMaskedImageModeling": "give its deit",
    "DeiTForImageClassificationWithTeacher": "give its deit, and num_classes",
    "BeitForMaskedImageModeling": "give its beit, and num_classes",
    "BeitForSemanticSegmentation": "give its beit, and num_classes",
    "BeitBackbone": "load the weights as BeitModel",
    "Dinov2Backbone": "load the weights as Dinov2Model",
    "Dinov2WithRegistersBackbone": "load the weights as Dinov2WithRegistersModel",
    "DINOv3ViTBackbone": "load the weights as DINOv3ViTModel",
    "TimesformerModel": "its attention is divided into time and space; use VideoMAE or ViViT",
    "TimesformerForVideoClassification": "its attention is divided into time and space; use "
    "VideoMAE or ViViT",
}


def _name(module: nn.Module, table: dict[str, Any]) -> str | None:
    """The class in `table` that `module` is an object of."""
    own = [kind for kind in type(module).__mro__ if kind.__module__.startswith(f"{LIBRARY}.")]
    return next((kind.__name__ for kind in own if kind.__name__ in table), None)


def head_name(module: nn.Module) -> str | None:
    name = _name(module, KINDS)
    return None if name is None else KINDS[name].head


def read_backbone(module: nn.Module) -> View:
    """View of a model of `KINDS`.

    Raises:
        UnsupportedBackbone: another class, with the step to take where one is known.
    """
    known = KINDS | _TOWERS
    name = _name(module, known)
    if name is None:
        step = STEPS.get(_name(module, STEPS) or "", f"expected one of {', '.join(KINDS)}")
        kind = type(module).__name__
        raise UnsupportedBackbone(f"{kind} of {LIBRARY} is no model that can be read: {step}")
    view = View
    if name.startswith(("VideoMAE", "Vivit")):
        view = VideoView
    elif name.startswith("Beit"):
        view = BeitView
    return examined(view(module, known[name]))
