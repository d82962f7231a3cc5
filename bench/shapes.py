"""Backbones that are measured, with random weights, and the work that one step on them needs."""

from __future__ import annotations

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

CLASSES = 200
BASE, SMALL, TINY = "vit_base_patch16_224", "vit_small_patch16_224", "tiny"
LARGE = "vit_large_patch16_224"


@torch.no_grad()
def random_backbone(name: str, device: torch.device, seed: int = 0) -> VisionTransformer:
    """A timm model whose attention is far from uniform, unlike one that is freshly initialised.

    With PyTorch's usual tiny weights all scores are near 0, and wrong attention would hardly show.
    """
    if name == TINY:
        vit = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=10
        )
    else:
        vit = timm.create_model(name, num_classes=CLASSES)
    generator = torch.Generator().manual_seed(seed)
    for module in vit.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, fan_in**-0.5, generator=generator)
            module.bias.normal_(0, 0.02, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            module.weight.normal_(1, 0.1, generator=generator)
            module.bias.normal_(0, 0.02, generator=generator)
    vit.pos_embed.normal_(0, 0.2, generator=generator)
    vit.cls_token.normal_(0, 0.2, generator=generator)
    return vit.to(device)


def live_step_flops(vit: VisionTransformer, prompts: int, batch: int) -> float:
    """Floating-point operations of one VPT-deep step that reach the logits or a trained gradient.

    Forward: image rows only, P prompt keys and values once per batch, the class row alone in the
    last block. Backward: of activations only; none to the image rows of block 0. Products are
    counted, 2 per multiply-add; norms, softmax and activations are not.
    """
    depth, D, F = len(vit.blocks), vit.embed_dim, vit.blocks[0].mlp.fc1.out_features
    ph, pw = vit.patch_embed.patch_size
    n = vit.patch_embed.num_patches
    N = n + 1
    row = 2 * D * D  # one row through one D x D matrix
    mlp = 4 * D * F
    keys = N + prompts
    middle = N * (4 * row + mlp) + 4 * N * keys * D
    last = N * 2 * row + 2 * row + mlp + 4 * keys * D
    forward = 2 * n * vit.patch_embed.proj.in_channels * ph * pw * D + (depth - 1) * middle + last
    back_middle = N * (4 * row + mlp) + 8 * N * keys * D
    back_last = N * 2 * row + 2 * row + mlp + 8 * keys * D
    back_first = N * (row + mlp) + 6 * N * prompts * D  # dP, dS_p -> dK_p, dV_p: prompt columns
    backward = (depth - 2) * back_middle + back_last + back_first
    prompt_rows = 2 * depth * prompts * 2 * row  # keys and values, forward and backward
    return batch * (forward + backward) + prompt_rows


def live_step_bytes(vit: VisionTransformer, prompts: int, batch: int, itemsize: int) -> float:
    """Bytes of the same step where every product, attention, norm and activation is one pass that
    reads its inputs once and writes its output once.

    The residual stream is fp32, all else `itemsize` bytes; a norm also adds what the product before
    it leaves for the stream. Epilogues that swallow a pass would go below this.
    """
    depth, D, F = len(vit.blocks), vit.embed_dim, vit.blocks[0].mlp.fc1.out_features
    n = vit.patch_embed.num_patches
    e, stream, narrow = itemsize, 4, itemsize if itemsize < 4 else 0
    norm = 2 * (stream + e) * D
    norm_back = (2 * e + 2 * stream + narrow) * D
    mlp = 2 * e * (D + F)  # both products; 2 e F more for the activation, 3 e F for its gradient
    forward = 2 * norm + e * (4 * D + 4 * D + 2 * D) + mlp + 2 * e * F
    half_back = mlp + 3 * e * F + norm_back + 2 * e * D
    backward = half_back + e * (8 * D + 4 * D) + norm_back
    first_back = half_back + 3 * e * D  # attention: q, out and the gradient of out
    last = norm + 2 * e * D + 3 * e * D + norm_back  # scores, mixture; their gradients
    rows = (depth - 1) * forward + (depth - 2) * backward + first_back + last
    weights = e * (4 * D * D + 2 * D * F) * 2 * depth
    prompt_rows = e * 2 * prompts * D * 3 * depth
    image = 4 * vit.patch_embed.proj.in_channels * vit.patch_embed.img_size[0] ** 2 + 4 * n * D
    return float(batch * ((n + 1) * rows + image) + weights + prompt_rows)
