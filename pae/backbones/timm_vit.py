"""timm vision transformers, judged by capability: what a block has and computes, never what it is
called.

Every block is read attribute by attribute into `BlockWeights`, and then proved: the formula that
the plan will fold is run on a few random rows beside the block itself. A block that has the right
attributes but computes something else (a patched forward, post-norm, an extra adapter) is refused.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from pae_kernels.pointwise import ACTIVATIONS
from pae_kernels.precision import exact_matmul

from ..choices import POOL_NORMS
from ..errors import UnsupportedBackbone
from ..prompts.base import BackboneShape, check_choice
from .view import BackboneView, BlockWeights, Linear, Norm, added_to, random_rows


class TimmView(BackboneView):
    """The face of a timm `VisionTransformer`, or of a module with the same attributes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        vit: Any = module
        first, stem = vit.blocks[0].attn, vit.patch_embed
        patch = stem.patch_size
        self.num_prefix_tokens = vit.num_prefix_tokens
        self.shape = BackboneShape(
            depth=len(vit.blocks),
            width=vit.embed_dim,
            num_heads=first.num_heads,
            patch_size=tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch),
            in_chans=getattr(vit, "in_chans", stem.proj.in_channels),
            num_tokens=stem.num_patches + self.num_prefix_tokens,
            num_prefix_tokens=self.num_prefix_tokens,
            grid=tuple(stem.grid_size),
            head_width=first.qkv.out_features // (3 * first.num_heads),
            has_class_token=getattr(vit, "cls_token", None) is not None,
        )

    @property
    def _vit(self) -> Any:
        return self.module

    @property
    def reads_class_only(self) -> bool:
        vit = self._vit
        if vit.global_pool != "token" or vit.attn_pool is not None or added_to(vit.norm):
            return False  # a hook on the norm is shown all rows
        if self.like.device.type == "meta":
            return True
        rows = random_rows(2, 3, vit.embed_dim).to(self.like)
        modes = {part: part.training for part in vit.modules()}
        vit.eval()
        try:  # what else a readout does is told by its values
            with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
                alone, among = self.readout(rows[:, :1]), self.readout(rows)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        finally:
            for part, mode in modes.items():
                part.training = mode
        near = 8 * torch.finfo(rows.dtype).eps
        return alone.shape == among.shape and torch.allclose(alone, among, near, near)

    @property
    def pools_not(self) -> str | None:
        vit = self._vit
        if vit.attn_pool is None and vit.global_pool in ("avg", "avgmax", "max"):
            return None
        return f"pools no rows (global_pool={vit.global_pool!r})"

    @property
    def readout_parts(self) -> list[Any]:
        vit, kind = self._vit, type(self._vit)
        return [
            *(vit.global_pool, vit.attn_pool, vit.norm, type(vit.norm).forward),
            *(added_to(vit.norm) is None, kind.forward_head, getattr(kind, "pool", None)),
            *(vars(vit).get("forward_head"), vars(vit).get("pool")),
        ]

    def num_rows(self, size: tuple[int, int]) -> int:
        rows, columns = (-(-s // p) for s, p in zip(size, self.shape.patch_size))
        return self.num_prefix_tokens + rows * columns

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self._vit.blocks)

    @property
    def image_size(self) -> tuple[int, int] | None:
        if getattr(self.module, "dynamic_img_size", False):
            return None
        height, width = self._vit.patch_embed.img_size
        return height, width

    @property
    def pads_images(self) -> bool:
        return getattr(self._vit.patch_embed, "dynamic_img_pad", False)

    def read_block(self, index: int) -> BlockWeights:
        return read_block(self.blocks[index], f"blocks.{index}")

    def embed(self, images: Tensor) -> Tensor:
        m = self._vit
        x = m._pos_embed(m.patch_embed(images))
        return m.norm_pre(m.patch_drop(x))

    def patch_tokens(self, images: Tensor) -> Tensor:
        return self._vit.patch_embed(images).flatten(1, -2)

    def patch_convolution(self, size: tuple[int, int]) -> nn.Conv2d | None:
        embed, patch = self._vit.patch_embed, self.shape.patch_size
        conv = embed.proj
        plain = (
            type(embed) is PatchEmbed
            and type(conv) is nn.Conv2d
            and tuple(conv.kernel_size) == tuple(conv.stride) == patch
            and conv.padding in ((0, 0), "valid")
            and tuple(conv.dilation) == (1, 1)
            and conv.groups == 1
        )
        return conv if plain and not any(s % p for s, p in zip(size, patch)) else None

    def embed_tokens(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        m = self._vit
        if self.image_size is None:  # timm then places positions on a grid
            grid = [s // p for s, p in zip(size, self.shape.patch_size)]
            tokens = tokens.unflatten(1, grid)
        return m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed.norm(tokens))))

    def run_block(self, block: nn.Module, x: Tensor, kv: Tensor | None = None) -> Tensor:
        if kv is None:
            return block(x)
        parts: Any = block
        for name, part in (("block", block), ("block's attention", parts.attn)):
            if added := added_to(part):
                raise UnsupportedBackbone(
                    f"a {name} has {added}, which cannot be run beside keys and values in head "
                    "space; remove it"
                )
        q, k, v = _heads(parts, x)
        kv = kv.to(k.dtype).expand(len(x), *kv.shape[-4:]).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([kv[0], k], dim=2), torch.cat([kv[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, scale=_scale(parts.attn))
        x = x + parts.ls1(parts.attn.proj(out.transpose(1, 2).flatten(2)))
        return x + parts.ls2(parts.mlp(parts.norm2(x)))

    @torch.no_grad()
    def class_attention(self, block: nn.Module, x: Tensor, kv: Tensor | None = None) -> Tensor:
        parts: Any = block
        q, k, _ = _heads(parts, x)
        if kv is not None:
            kv = kv.to(k.dtype).expand(len(x), *kv.shape[-4:]).permute(2, 0, 3, 1, 4)
            k = torch.cat([kv[0], k], dim=2)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(k.dtype, torch.float32)
            q = _scale(parts.attn) * q[:, :, :1].to(wide)
            scores = exact_matmul(q, k.to(wide).transpose(-1, -2))
            return scores.softmax(-1)[:, :, 0, -x.shape[1] :]

    def class_query(self, block: nn.Module, x: Tensor) -> Tensor:
        parts: Any = block
        return parts.attn.qkv(parts.norm1(x[:, :1]))[:, 0].chunk(3, dim=-1)[0]

    def readout(self, x: Tensor) -> Tensor:
        m = self._vit
        return m.forward_head(m.norm(x), pre_logits=True)


def _heads(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, d) of the block's rows (B, N, D), unscaled."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return attn.q_norm(q), attn.k_norm(k), v


def _scale(attn: Any) -> float:
    """Of the logits. timm's fused attention takes d^-1/2 and leaves the attribute unread."""
    if getattr(attn, "fused_attn", False):
        return (attn.qkv.weight.shape[0] // (3 * attn.num_heads)) ** -0.5
    return attn.scale


def read_backbone(module: nn.Module) -> BackboneView:
    """View of a supported backbone.

    Raises:
        UnsupportedBackbone: naming the attribute that is missing or that pae cannot express.
    """
    name = type(module).__name__
    vit: Any = module
    needed = (
        "blocks patch_embed _pos_embed patch_drop norm_pre norm forward_head embed_dim global_pool "
        "num_prefix_tokens attn_pool head"
    )
    for attribute in needed.split():
        if not hasattr(module, attribute):
            raise UnsupportedBackbone(
                f"{name} has no attribute {attribute!r}, which a plain timm ViT has"
            )
    for attribute in ("rope", "head_dist", "rel_pos_bias", "shared_rel_pos_bias"):
        if getattr(module, attribute, None) is not None:
            raise UnsupportedBackbone(
                f"{name}.{attribute} is set: its blocks or head need more than the rows"
            )
    if len(vit.blocks) == 0:
        raise UnsupportedBackbone(f"{name}.blocks is empty")
    if not isinstance(getattr(vit.patch_embed, "proj", None), nn.Conv2d):
        raise UnsupportedBackbone(f"{name}.patch_embed.proj is not a convolution")
    for i, block in enumerate(vit.blocks):
        read_block(block, f"blocks.{i}")
    view = TimmView(module)
    view.prove_blocks()
    return view


def average_pooled(backbone: nn.Module, norm: str = "fresh") -> nn.Module:
    """Make a backbone that reads its class token read the mean of its rows, as MAE's are used.

    Args:
        backbone: a timm `VisionTransformer` with its weights; it is changed, and returned.
        norm: "fresh": a new norm (weight 1, bias 0) behind the mean; the backbone's own is left
            out, as an MAE checkpoint has none for it. "behind": its own, moved behind the mean.
            "before": its own on every row, before the mean.

    Returns:
        `backbone`, for `PromptedViT(..., pool=...)`.

    Raises:
        ValueError: an unknown norm.
        UnsupportedBackbone: it reads something else than its class token, or has no final LayerNorm
            to go by.

    Source: MAE (He et al. 2022) with VPT's code ("fresh"), BPT's ("behind") and DA-VPT's
    mae_pooling="all" ("before").
    """
    check_choice("norm", norm, POOL_NORMS)
    vit: Any = backbone
    name = type(backbone).__name__
    found = getattr(vit, "global_pool", None)
    if found != "token" or getattr(vit, "attn_pool", None) is not None:
        raise UnsupportedBackbone(
            f"{name}.global_pool is {found!r}, expected 'token': a class token's readout alone "
            "can be made a mean"
        )
    norms = (getattr(vit, part, nn.Identity()) for part in ("norm", "fc_norm"))
    own = [part for part in norms if not isinstance(part, nn.Identity)]
    if len(own) != 1 or not isinstance(own[0], nn.LayerNorm):
        kinds = [type(part).__name__ for part in own] or "none"
        raise UnsupportedBackbone(f"{name} has {kinds} as final norms, expected one LayerNorm")
    final = own[0]
    if norm == "fresh":
        final = copy.deepcopy(final)
        final.reset_parameters()
    before = norm == "before"
    vit.norm, vit.fc_norm = (final, nn.Identity()) if before else (nn.Identity(), final)
    vit.global_pool = "avg"
    return backbone


def read_block(block: nn.Module, name: str) -> BlockWeights:
    """Neutral weights of one block; raises UnsupportedBackbone naming what does not fit."""

    def get(path: str) -> Any:
        part: Any = block
        for attribute in path.split("."):
            if not hasattr(part, attribute):
                raise UnsupportedBackbone(
                    f"{name} ({type(block).__name__}) has no attribute {path!r}"
                )
            part = getattr(part, attribute)
        return part

    def norm(path: str) -> Norm:
        part = get(path)
        if not isinstance(part, nn.LayerNorm):
            raise UnsupportedBackbone(f"{name}.{path} is {type(part).__name__}, expected LayerNorm")
        return Norm(part.weight, part.bias, part.eps)

    def linear(path: str) -> Linear:
        part = get(path)
        if type(part) is not nn.Linear:
            raise UnsupportedBackbone(f"{name}.{path} is {type(part).__name__}, expected Linear")
        return Linear(part.weight, part.bias)

    def head_norm(path: str) -> Norm | None:
        return None if isinstance(get(path), nn.Identity) else norm(path)

    def layer_scale(path: str) -> Tensor | None:
        part = get(path)
        if isinstance(part, nn.Identity):
            return None
        if not isinstance(getattr(part, "gamma", None), Tensor):
            raise UnsupportedBackbone(
                f"{name}.{path} is {type(part).__name__}, expected LayerScale"
            )
        return part.gamma

    for path in ("attn.norm", "mlp.norm"):
        part = get(path.split(".")[0])
        if not isinstance(getattr(part, "norm", nn.Identity()), nn.Identity):
            raise UnsupportedBackbone(
                f"{name}.{path} is set: a norm inside attention or MLP is not folded"
            )
    if getattr(get("attn"), "gate", None) is not None:
        raise UnsupportedBackbone(f"{name}.attn.gate is set: gated attention is not folded")
    fc1, fc2 = linear("mlp.fc1"), linear("mlp.fc2")
    if fc2.weight.shape[1] != fc1.weight.shape[0]:
        raise UnsupportedBackbone(
            f"{name}.mlp.fc2 reads {fc2.weight.shape[1]} features and mlp.fc1 gives "
            f"{fc1.weight.shape[0]}: a gated MLP is not folded"
        )
    return BlockWeights(
        norm1=norm("norm1"),
        qkv=linear("attn.qkv"),
        q_norm=head_norm("attn.q_norm"),
        k_norm=head_norm("attn.k_norm"),
        num_heads=get("attn.num_heads"),
        scale=_scale(get("attn")),
        proj=linear("attn.proj"),
        scale1=layer_scale("ls1"),
        norm2=norm("norm2"),
        fc1=fc1,
        activation=_activation(get("mlp.act"), f"{name}.mlp.act"),
        fc2=fc2,
        scale2=layer_scale("ls2"),
    )


def _activation(module: nn.Module, name: str) -> str:
    """Key of the activation that `module` computes, told by its values."""
    u = torch.linspace(-6, 6, 97, device="cpu")
    with torch.no_grad():
        y = module(u.clone())
    for kind, function in ACTIVATIONS.items():
        if torch.allclose(y, function(u), rtol=1e-6, atol=1e-6):
            return kind
    raise UnsupportedBackbone(
        f"{name} is {type(module).__name__}, expected one of {sorted(ACTIVATIONS)}"
    )
