"""timm vision transformers, judged by capability: what a block has and computes, never what it is
called.

Every block is read attribute by attribute into `BlockWeights`, and then proved: the formula that
the plan will fold is run on a few random rows beside the block itself. A block that has the right
attributes but computes something else (a patched forward, post-norm, an extra adapter) is refused.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from ..choices import POOL_NORMS
from ..errors import UnsupportedBackbone
from ..prompts.base import BackboneShape, check_choice
from .timm_blocks import read_block
from .view import BackboneView, BlockWeights, added_to, evaluating, random_rows


class TimmView(BackboneView):
    """The face of a timm `VisionTransformer`, or of a module with the same attributes."""

    needs: str = (
        "blocks patch_embed _pos_embed patch_drop norm_pre norm forward_head embed_dim global_pool "
        "num_prefix_tokens attn_pool head"
    )
    _post = False  # whether the blocks' norms stand behind attention and MLP
    takes_more = False  # whether blocks may be given more than rows

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        vit: Any = module
        self.num_prefix_tokens = vit.num_prefix_tokens
        stem, grid = self._stem
        self.other_head = "head_dist" if hasattr(vit, "head_dist") else None
        patch = stem.patch_size
        heads, width = self._heads
        self.shape = BackboneShape(
            depth=len(vit.blocks),
            width=vit.embed_dim,
            num_heads=heads,
            patch_size=tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch),
            in_chans=vit.in_chans if hasattr(vit, "in_chans") else stem.proj.in_channels,
            num_tokens=math.prod(grid) + self.num_prefix_tokens,
            num_prefix_tokens=self.num_prefix_tokens,
            grid=grid,
            head_width=width,
            has_class_token=self.class_token is not None,
        )

    @property
    def _vit(self) -> Any:
        return self.module

    @property
    def _stem(self) -> tuple[Any, tuple[int, int]]:
        """The module that makes patch tokens, and the grid that it is built for."""
        stem = self._vit.patch_embed
        return stem, tuple(stem.grid_size)

    @property
    def _heads(self) -> tuple[int, int]:
        """Heads of a block, and features of a head."""
        try:
            block = self.read_block(0)
        except UnsupportedBackbone:  # blocks that run as they are
            attn = getattr(self._vit.blocks[0], "attn", None)
            heads = getattr(attn, "num_heads", 1)
            inner = getattr(getattr(attn, "proj", None), "in_features", self._vit.embed_dim)
            return heads, inner // heads
        return block.num_heads, block.head_width

    @property
    def _attn_pool(self) -> nn.Module | None:
        return getattr(self._vit, "attn_pool", None)

    @property
    def class_token(self) -> Tensor | None:
        return getattr(self._vit, "cls_token", None)

    @property
    def reads_class_only(self) -> bool:
        vit = self._vit
        if vit.global_pool != "token" or self._attn_pool is not None or added_to(vit.norm):
            return False  # a hook on the norm is shown all rows
        if self.like.device.type == "meta":
            return self.other_head is None
        rows = random_rows(2, 3, vit.embed_dim).to(self.like)
        try:  # what else a readout does is told by its values
            with (
                evaluating(vit),
                torch.no_grad(),
                torch.autocast(rows.device.type, enabled=False),
            ):
                alone, among = self.readout(rows[:, :1]), self.readout(rows)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        near = 8 * torch.finfo(rows.dtype).eps
        return alone.shape == among.shape and torch.allclose(alone, among, near, near)

    @property
    def pools_not(self) -> str | None:
        vit = self._vit
        if self._attn_pool is None and vit.global_pool in ("avg", "avgmax", "max"):
            return None
        return f"pools no rows (global_pool={vit.global_pool!r})"

    @property
    def readout_parts(self) -> list[Any]:
        vit, kind = self._vit, type(self._vit)
        return [
            *(vit.global_pool, self._attn_pool, vit.norm, type(vit.norm).forward),
            *(added_to(vit.norm) is None, kind.forward_head, getattr(kind, "pool", None)),
            *(vars(vit).get("forward_head"), vars(vit).get("pool")),
        ]

    def num_rows(self, size: tuple[int, int]) -> int:
        if size == self.image_size:
            return self.shape.num_tokens
        rows, columns = (-(-s // p) for s, p in zip(size, self.shape.patch_size))
        return self.num_prefix_tokens + rows * columns

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self._vit.blocks)

    @property
    def image_size(self) -> tuple[int, int] | None:
        if getattr(self._vit, "dynamic_img_size", False):
            return None
        height, width = self._vit.patch_embed.img_size
        return height, width

    @property
    def pads_images(self) -> bool:
        return getattr(self._vit.patch_embed, "dynamic_img_pad", False)

    def read_block(self, index: int) -> BlockWeights:
        return read_block(self.blocks[index], f"blocks.{index}", self._post)

    def prove_blocks(self) -> None:
        """With the norms in front, or behind: which of both is nowhere written."""
        self._post = False
        try:
            super().prove_blocks()
        except UnsupportedBackbone as error:
            self._post = True
            try:
                super().prove_blocks()
            except UnsupportedBackbone:
                self._post = False
                raise error from None

    @property
    def stem_norm(self) -> nn.Module | None:
        return getattr(self._vit, "norm_pre", None)

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

    def readout(self, x: Tensor) -> Tensor:
        m = self._vit
        return m.forward_head(m.norm(x), pre_logits=True)


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
