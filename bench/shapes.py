"""Backbones that are measured, with random weights, and batches for them."""

from __future__ import annotations

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

CLASSES = 200
BASE, SMALL, TINY = "vit_base_patch16_224", "vit_small_patch16_224", "tiny"
NARROW, LARGE = "vit_tiny_patch16_224", "vit_large_patch16_224"
DEMO = "vit_small_patch14_dinov2"  # what `pae train` runs without weights of the user's own


@torch.no_grad()
def random_backbone(name: str, device: torch.device, seed: int = 0, **changes) -> VisionTransformer:
    """A timm model whose attention is far from uniform, unlike one that is freshly initialised.

    With PyTorch's usual tiny weights all scores are near 0, and wrong attention would hardly show.
    `changes`: options of the model that differ from its name's, e.g. img_size, depth.
    """
    if name == TINY:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
        vit = VisionTransformer(**{**sizes, "num_classes": 10, **changes})
    else:
        vit = timm.create_model(name, **{"num_classes": CLASSES, **changes})
    generator = torch.Generator().manual_seed(seed)
    for module in vit.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, fan_in**-0.5, generator=generator)
            module.bias.normal_(0, 0.02, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            module.weight.normal_(1, 0.1, generator=generator)
            module.bias.normal_(0, 0.02, generator=generator)
        elif hasattr(module, "gamma"):  # LayerScale, which begins near 0
            module.gamma.normal_(1, 0.1, generator=generator)
    vit.pos_embed.normal_(0, 0.2, generator=generator)
    vit.cls_token.normal_(0, 0.2, generator=generator)
    return vit.to(device)


def random_batch(
    vit: nn.Module, classes: int, batch: int, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) of the backbone's size, and labels (B,)."""
    images = torch.randn(batch, 3, *vit.patch_embed.img_size, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return images.to(device), labels.to(device)
