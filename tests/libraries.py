"""Tiny vision transformers of other libraries than timm, with random weights of trained size."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

SIZE = 16
COMMON = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
COMMON |= {"image_size": SIZE, "patch_size": 4}
WIDE = {**COMMON, "intermediate_size": 64}
DINO = {**COMMON, "mlp_ratio": 2}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
TEXT |= {"intermediate_size": 8, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
TOWERS = {"vision_config": WIDE, "text_config": TEXT}


def version_4() -> bool:
    """Whether transformers is, whose parts have other names."""
    return metadata.version("transformers").startswith("4.")


def _hf(name: str, config: dict[str, Any], **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, name)
        settings = kind.config_class(**config)
        return kind(settings, **more)

    return build


def _torchvision(**more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import VisionTransformer

        return VisionTransformer(SIZE, 4, 3, 4, 32, 64, num_classes=5, **more)

    return build


def _open_clip(**more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from open_clip.transformer import VisionTransformer

        return VisionTransformer(SIZE, 4, 32, 3, 4, 2.0, output_dim=24, **more)

    return build


def _tower(name: str, **more: Any) -> Callable[[], nn.Module]:
    """open_clip's adapter of a model of timm, of `SIZE` pixels."""

    def build() -> nn.Module:
        from open_clip.timm_model import TimmModel
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer

        tower = TimmModel("test_vit", 24, SIZE, **more)
        kind = {"vit": VisionTransformer, "eva": Eva}[name]
        pool = tower.trunk.global_pool
        tower.trunk = kind(
            *(SIZE, 4, 3), num_classes=0, embed_dim=64, depth=3, num_heads=4, global_pool=pool
        )
        return tower

    return build


VIDEO = {**WIDE, "num_frames": 4, "tubelet_size": 2}
CLIPS = ("VideoMAE", "ViViT")  # how the names of models begin that read them
VIVIT = {**WIDE, "num_frames": 4, "tubelet_size": [2, 4, 4]}
BIAS, SHARED = "use_relative_position_bias", "use_shared_relative_position_bias"

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViT": _hf("ViTModel", WIDE),
    "ViT, no pooler": _hf("ViTModel", WIDE, add_pooling_layer=False),
    "ViT, no qkv bias": _hf("ViTModel", {**WIDE, "qkv_bias": False}),
    "ViT, classes": _hf("ViTForImageClassification", {**WIDE, "num_labels": 5}),
    "DeiT": _hf("DeiTModel", WIDE),
    "DeiT, classes": _hf("DeiTForImageClassification", {**WIDE, "num_labels": 5}),
    "DINOv2": _hf("Dinov2Model", DINO),
    "DINOv2, gated": _hf("Dinov2Model", {**DINO, "use_swiglu_ffn": True}),
    "DINOv2, classes": _hf("Dinov2ForImageClassification", {**DINO, "num_labels": 5}),
    "DINOv2, registers": _hf("Dinov2WithRegistersModel", {**DINO, "num_register_tokens": 2}),
    "DINOv2, registers, classes": _hf(
        "Dinov2WithRegistersForImageClassification",
        {**DINO, "num_register_tokens": 2, "num_labels": 5},
    ),
    "DINOv3": _hf("DINOv3ViTModel", {**WIDE, "num_register_tokens": 2}),
    "DINOv3, gated": _hf("DINOv3ViTModel", {**WIDE, "use_gated_mlp": True}),
    "CLIP": _hf("CLIPVisionModel", WIDE),
    "CLIP, projected": _hf("CLIPVisionModelWithProjection", {**WIDE, "projection_dim": 24}),
    "CLIP, classes": _hf("CLIPForImageClassification", {**TOWERS, "num_labels": 5}),
    "SigLIP": _hf("SiglipVisionModel", WIDE),
    "SigLIP, no head": _hf("SiglipVisionModel", {**WIDE, "vision_use_head": False}),
    "SigLIP, classes": _hf("SiglipForImageClassification", {**TOWERS, "num_labels": 5}),
    "MAE": _hf("ViTMAEModel", {**WIDE, "mask_ratio": 0.0}),
    "BEiT": _hf("BeitModel", {**WIDE, BIAS: True}),
    "BEiT, shared bias": _hf("BeitModel", {**WIDE, SHARED: True, "layer_scale_init_value": 0.0}),
    "BEiT, row 0": _hf("BeitModel", {**WIDE, BIAS: True, SHARED: True, "use_mean_pooling": False}),
    "BEiT, positions": _hf("BeitModel", {**WIDE, "use_absolute_position_embeddings": True}),
    "BEiT, classes": _hf("BeitForImageClassification", {**WIDE, BIAS: True, "num_labels": 5}),
    "VideoMAE": _hf("VideoMAEModel", VIDEO),
    "VideoMAE, norm": _hf("VideoMAEModel", {**VIDEO, "use_mean_pooling": False}),
    "VideoMAE, classes": _hf("VideoMAEForVideoClassification", {**VIDEO, "num_labels": 5}),
    "VideoMAE, first tube": _hf(
        "VideoMAEForVideoClassification", {**VIDEO, "num_labels": 5, "use_mean_pooling": False}
    ),
    "ViViT": _hf("VivitModel", VIVIT),
    "ViViT, classes": _hf("VivitForVideoClassification", {**VIVIT, "num_labels": 5}),
    "torchvision": _torchvision(),
    "torchvision, pre-logits": _torchvision(representation_size=24),
    "open_clip": _open_clip(),
    "open_clip, mean": _open_clip(pool_type="avg", ls_init_value=0.1, no_ln_pre=True),
    "open_clip, norm behind mean": _open_clip(pool_type="avg", final_ln_after_pool=True),
    "open_clip, attention pool": _open_clip(
        attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2
    ),
    "open_clip, timm": _tower("vit", pool="token"),
    "open_clip, timm, no projection": _tower("vit", pool="avg", proj="none"),
    "open_clip, timm's EVA": _tower("eva", pool="avg", proj="mlp"),
}


def model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One of `MODELS`, in eval mode."""
    module = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in module.modules():
            for own, p in part.named_parameters(recurse=False):
                values = torch.randn(p.shape, generator=generator)
                if isinstance(part, nn.LayerNorm) and own == "weight":
                    p.copy_(1 + 0.3 * values)
                elif p.dim() > 1 and own.endswith("weight") and not isinstance(part, nn.Embedding):
                    p.copy_(values * p[0].numel() ** -0.5)
                else:
                    p.copy_(0.3 * values)
    return module.to(dtype).eval()


def images(batch: int = 3, size: tuple[int, int] = (SIZE, SIZE), name: str = "") -> Tensor:
    """A batch; of clips for those of `MODELS` that read them."""
    frames = (VIDEO["num_frames"],) if name.startswith(CLIPS) else ()
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, *frames, 3, *size, generator=generator).double()


def own_output(module: nn.Module, x: Tensor, **more: Any) -> Tensor:
    """What the model's own forward hands on: logits, or the pooled features."""
    if type(module).__name__ == "ViTMAEModel":  # it permutes patches by this
        more["noise"] = torch.arange(x[0, 0].numel() // 16).expand(len(x), -1)
    if not set(more) <= inspect.signature(module.forward).parameters.keys():
        # CLIP's classifier in version 4, which its parts make up for
        tower: Any = module
        return tower.classifier(tower.vision_model(x, **more)[0][:, 1:].mean(1))
    out = module(x, **more)
    if isinstance(out, Tensor):
        return out
    for name in ("logits", "image_embeds", "pooler_output"):
        if (found := getattr(out, name, None)) is not None:
            return found
    rows = out.last_hidden_state
    pooled = type(module).__name__.startswith(("Siglip", "VideoMAE"))
    return rows.mean(1) if pooled else rows[:, 0]
