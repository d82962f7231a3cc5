"""What a user would run instead of pae: VPT-deep in plain PyTorch, written from the method's text.

All of them share the frozen weights of one timm model, so that their values can be compared before
their times are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ExplicitAttention(nn.Module):
    """Multi-head attention as ViT code wrote it before fused kernels: q, k, v apart, no SDPA."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.num_heads, width = attn.num_heads, attn.qkv.in_features
        self.q, self.k, self.v = (
            linear_of(attn.qkv.weight[i * width : (i + 1) * width], rows)
            for i, rows in enumerate(attn.qkv.bias.split(width))
        )
        self.out = linear_of(attn.proj.weight, attn.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(layer(x)) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        context = scores.softmax(dim=-1) @ v
        return self.out(context.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ExplicitBlock(nn.Module):
    """Pre-norm transformer block of ViT."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.ls1, self.ls2 = block.ls1, block.ls2  # nn.Identity where there is no LayerScale
        self.attn = ExplicitAttention(block.attn)
        self.fc1 = linear_of(block.mlp.fc1.weight, block.mlp.fc1.bias)
        self.fc2 = linear_of(block.mlp.fc2.weight, block.mlp.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class OfficialStyleVPT(nn.Module):
    """VPT-deep, eager: prompts are concatenated behind the class token and replaced in every block.

    Args:
        vit: plain timm VisionTransformer (class token, no qk-norm), whose weights are shared, not
            copied.
        prompts: (depth, P, D). head: linear layer. Both are copied.
    """

    def __init__(self, vit: nn.Module, prompts: Tensor, head: nn.Linear) -> None:
        super().__init__()
        self.patches = vit.patch_embed.proj
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed
        self.blocks = nn.ModuleList(ExplicitBlock(block) for block in vit.blocks)
        self.norm = vit.norm
        self.requires_grad_(False)
        self.prompts = nn.Parameter(prompts.detach().clone())
        self.head = nn.Linear(head.in_features, head.out_features).to(head.weight)
        self.head.load_state_dict(head.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        batch, count = len(images), self.prompts.shape[1]
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1) + self.pos_embed
        for i, block in enumerate(self.blocks):
            prompts = self.prompts[i].expand(batch, -1, -1)
            rest = x[:, 1:] if i == 0 else x[:, 1 + count :]
            x = block(torch.cat([x[:, :1], prompts, rest], dim=1))
        return self.head(self.norm(x)[:, 0])


def linear_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A frozen linear layer on these very tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
