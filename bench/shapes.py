"""Backbones that are measured, with random weights, and batches for them."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

CLASSES = 200
BASE, SMALL, TINY = "vit_base_patch16_224", "vit_small_patch16_224", "tiny"
NARROW, LARGE = "vit_tiny_patch16_224", "vit_large_patch16_224"
DEMO = "vit_small_patch14_dinov2"  # what `pae train` runs without weights of the user's own


def random_backbone(name: str, device: torch.device, seed: int = 0, **changes: Any) -> Any:
    """A timm model, `randomised`. `changes`: options that differ from its name's, e.g. img_size,
    depth.
    """
    if name == TINY:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
        vit: nn.Module = VisionTransformer(**{**sizes, "num_classes": 10, **changes})
    else:
        vit = timm.create_model(name, **{"num_classes": CLASSES, **changes})
    return randomised(vit, seed).to(device)


@torch.no_grad()
def randomised(backbone: nn.Module, seed: int = 0) -> nn.Module:
    """With weights whose attention is far from uniform, unlike that of a model that is freshly
    initialised.

    With PyTorch's usual tiny weights all scores are near 0, and wrong attention would hardly show.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in backbone.modules():
        for name, p in module.named_parameters(recurse=False):
            norm = p.dim() == 1 and name == "weight"
            if norm or name.startswith("gamma"):  # of a LayerScale, which begins near 0
                p.normal_(1, 0.1, generator=generator)
            elif name == "weight":
                p.normal_(0, p[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                p.normal_(0, 0.02, generator=generator)
            else:  # of positions
                spread = 1.0 if name.endswith("table") else 0.2
                p.normal_(0, spread, generator=generator)
    return backbone


def random_batch(
    vit: nn.Module, classes: int, batch: int, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) of the backbone's size, and labels (B,)."""
    images = torch.randn(batch, 3, *vit.patch_embed.img_size, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return images.to(device), labels.to(device)
