"""A prompted model in the layout of VPT's and PAE's released code, from its description: names
of its parts, where prompts go, what drops when.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

SIZE, PATCH, WIDTH, HEADS, DEPTH = 16, 4, 32, 4, 3


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = HEADS, WIDTH // HEADS
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attn_dropout, self.proj_dropout = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        weights = (q @ k.mT / self.attention_head_size**0.5).softmax(-1)
        out = (self.attn_dropout(weights) @ v).transpose(1, 2).flatten(2)
        return self.proj_dropout(self.out(out)), weights


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.act_fn = F.gelu
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.act_fn(self.fc1(x)))))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn, self.ffn = _Attention(), _Mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.attn(self.attention_norm(x))
        x = x + out
        return x + self.ffn(self.ffn_norm(x)), weights


class _Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embeddings = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.position_embeddings = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2 + 1, WIDTH))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.dropout = nn.Dropout(0.1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embeddings(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return self.dropout(x + self.position_embeddings)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Block() for _ in range(DEPTH))
        self.encoder_norm = nn.LayerNorm(WIDTH, eps=1e-6)


def _add_prompts(
    model: Any, width: int, deep: bool, koopman: str, per_image: bool, count: int
) -> None:
    model.prompt_dropout = nn.Dropout(0.1)
    model.prompt_embeddings = nn.Parameter(torch.zeros(1, count, width))
    if deep:
        model.deep_prompt_embeddings = nn.Parameter(torch.zeros(DEPTH - 1, count, width))
    model.deep, model.per_image, model.count = deep, per_image, count
    if koopman:
        model.koopman_in = nn.Linear(WIDTH, 8, bias=False)
        model.koopman_out = nn.Linear(8, WIDTH, bias=False)
    for name in "KL":
        if koopman == "global":
            setattr(model, f"{name}_global", nn.Parameter(torch.zeros(8, 8)))
        elif koopman:
            parts = (nn.Parameter(torch.zeros(8, 8)) for _ in range(DEPTH - 1))
            setattr(model, f"{name}_layers", nn.ParameterList(parts))


def _prompted(model: Any, x: Tensor, blocks: nn.Module) -> Tensor:
    """The rows behind the last block, those of prompts among them."""

    def prompts(rows: Tensor) -> Tensor:
        rows = model.prompt_proj(rows) if hasattr(model, "prompt_proj") else rows
        rows = rows.expand(len(x) if model.per_image else -1, -1, -1)
        return model.prompt_dropout(rows).expand(len(x), -1, -1)

    x = torch.cat([x[:, :1], prompts(model.prompt_embeddings), x[:, 1:]], dim=1)
    for i, block in enumerate(blocks):
        if model.deep and i > 0:
            rows = prompts(model.deep_prompt_embeddings[i - 1 : i])
            x = torch.cat([x[:, :1], rows, x[:, 1 + model.count :]], dim=1)
        out = block(x)
        x = out[0] if isinstance(out, tuple) else out
    return x


class _Transformer(nn.Module):
    def __init__(self, deep: bool, project: int, koopman: str, per_image: bool, count: int) -> None:
        super().__init__()
        self.embeddings, self.encoder = _Embeddings(), _Encoder()
        self.prompt_proj = nn.Linear(project, WIDTH) if project else nn.Identity()
        _add_prompts(self, project or WIDTH, deep, koopman, per_image, count)

    def train(self, mode: bool = True) -> None:
        if not mode:
            for part in self.children():
                part.train(False)
            return
        self.encoder.eval()
        self.embeddings.eval()
        self.prompt_proj.train()
        self.prompt_dropout.train()

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.encoder_norm(
            _prompted(self, self.embeddings(images), self.encoder.layer)
        )


class _Inner(nn.Module):
    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer, self.head = transformer, nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.transformer(images)[:, 0])


class _Head(nn.Module):
    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.projection = nn.Sequential()
        for _ in range(hidden):
            parts = nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.BatchNorm1d(WIDTH), nn.Dropout(0.1)
            self.projection.extend(parts)
        self.last_layer = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.projection(x))


class _SelfSupervised(nn.Module):
    """The layout of MAE's and MoCo's backbones: timm's blocks, prompts on the root."""

    def __init__(self, kind: str, deep: bool, koopman: str, per_image: bool, count: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(SIZE, PATCH, 3, WIDTH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2 + 1, WIDTH))
        self.pos_drop = nn.Dropout(0.1)
        sizes = {"mlp_ratio": 2, "qkv_bias": True, "drop_path": 0.1, "proj_drop": 0.1}
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS, **sizes) for _ in range(DEPTH)))
        setattr(self, "norm" if kind == "moco" else "fc_norm", nn.LayerNorm(WIDTH, eps=1e-6))
        self.averages, self.head = kind != "moco", nn.Identity()
        if kind != "mae":
            self.VIT_POOL_TYPE = kind
        _add_prompts(self, WIDTH, deep, koopman, per_image, count)

    def train(self, mode: bool = True) -> None:
        if not mode:
            for part in self.children():
                part.train(False)
            return
        for part in (self.blocks, self.patch_embed, self.pos_drop):
            part.eval()
        self.prompt_dropout.train()

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = _prompted(self, self.pos_drop(x + self.pos_embed), self.blocks)
        if not self.averages:
            return self.head(self.norm(x)[:, 0])
        first = 1 + self.count
        kept = {"img_pool": x[:, first:], "prompt_pool": x[:, 1:first]}
        rows = kept.get(getattr(self, "VIT_POOL_TYPE", "original"), x[:, 1:])
        return self.head(self.fc_norm(rows.mean(1)))


class Model(nn.Module):
    """The wrapper with the head. koopman: "" (VPT), "layerwise" or "global" (PAE). kind: "" for the
    supervised backbone, "moco", or "mae" and its other choices of pooled rows.
    """

    def __init__(
        self,
        deep: bool = True,
        project: int = 0,
        koopman: str = "",
        hidden: int = 0,
        count: int = 4,
        kind: str = "",
    ) -> None:
        super().__init__()
        per_image = not koopman
        if kind:
            self.enc: nn.Module = _SelfSupervised(kind, deep, koopman, per_image, count)
        else:
            self.enc = _Inner(_Transformer(deep, project, koopman, per_image, count))
        self.head = _Head(hidden, 5)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in self.named_parameters():
                values = torch.randn(p.shape, generator=generator)
                if "norm" in name and name.endswith("weight"):
                    p.copy_(1 + 0.3 * values)
                elif name.endswith("weight") and p.dim() > 1:
                    p.copy_(values * p[0].numel() ** -0.5)
                else:
                    p.copy_(0.5 * values)
        for name, p in self.enc.named_parameters():
            p.requires_grad_(any(part in name for part in ("prompt", "koopman", "K_", "L_")))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.enc(images))
