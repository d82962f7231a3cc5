"""FrozenPlan: the backbone's weights, folded once.

Folds, all computed in fp64 and rounded once to the compute dtype:
    LayerNorm's scale and shift  -> the product behind it
    the logit scale              -> W_q (or q_norm's affine)
    LayerScale                   -> the projection before it
so that between two products only a plain normalisation, the softmax and the activation remain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backbones.timm_vit import BackboneView, BlockWeights, Linear, Norm, read_block


@dataclass(frozen=True)
class HeadNorm:
    """A per-head LayerNorm of queries or keys: weight and bias (d,), eps."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class BlockPlan:
    """Folded constants of one block, all in the compute dtype.

    w_qkv (3 H d, D), w_proj (D, H d), w_fc1 (F, D), w_fc2 (D, F) and their biases act on normalised
    rows; logits need no further scale.
    """

    num_heads: int
    head_width: int
    eps1: float
    w_qkv: Tensor
    b_qkv: Tensor
    q_norm: HeadNorm | None
    k_norm: HeadNorm | None
    w_proj: Tensor
    b_proj: Tensor
    eps2: float
    w_fc1: Tensor
    b_fc1: Tensor
    activation: str
    w_fc2: Tensor
    b_fc2: Tensor

    @property
    def w_kv(self) -> Tensor:
        """(2 H d, D): key and value rows of w_qkv."""
        return self.w_qkv[self.num_heads * self.head_width :]

    @property
    def b_kv(self) -> Tensor:
        """(2 H d,): key and value part of b_qkv."""
        return self.b_qkv[self.num_heads * self.head_width :]


@dataclass(frozen=True)
class FrozenPlan:
    """All blocks of a backbone, folded for one device and compute dtype.

    w_qkv and b_qkv of the blocks are views of the stacked tensors here, so that the prompt keys and
    values of many blocks are one batched product.
    """

    dtype: torch.dtype
    blocks: list[BlockPlan]
    w_qkv: Tensor
    b_qkv: Tensor


def signature(view: BackboneView) -> tuple:
    """Changes whenever a backbone parameter is replaced, moved, re-typed or written in place."""
    return tuple(
        (p.data_ptr(), p._version, p.dtype, p.device) for p in view.module.blocks.parameters()
    )


@torch.inference_mode(False)
@torch.no_grad()
def fold(view: BackboneView, dtype: torch.dtype) -> FrozenPlan:
    """Fold every block of `view` for products in `dtype`.

    Normal tensors even under inference mode: a plan built during evaluation also serves training.
    """
    weights = [read_block(block, f"blocks[{i}]") for i, block in enumerate(view.blocks)]
    qkv = [_fold_qkv(w) for w in weights]
    w_qkv = torch.stack([w.to(dtype) for w, _ in qkv])
    b_qkv = torch.stack([b.to(dtype) for _, b in qkv])
    blocks = [_fold_block(w, w_qkv[i], b_qkv[i], dtype) for i, w in enumerate(weights)]
    return FrozenPlan(dtype, blocks, w_qkv, b_qkv)


def _fold_qkv(w: BlockWeights) -> tuple[Tensor, Tensor]:
    weight, bias = _behind_norm(w.norm1, w.qkv)
    if w.q_norm is None:
        rows = weight.shape[0] // 3
        weight[:rows] *= w.scale
        bias[:rows] *= w.scale
    return weight, bias


def _fold_block(w: BlockWeights, w_qkv: Tensor, b_qkv: Tensor, dtype: torch.dtype) -> BlockPlan:
    def rounded(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0].to(dtype).contiguous(), pair[1].to(dtype)

    w_proj, b_proj = rounded(_before_scale(w.proj, w.scale1))
    w_fc1, b_fc1 = rounded(_behind_norm(w.norm2, w.fc1))
    w_fc2, b_fc2 = rounded(_before_scale(w.fc2, w.scale2))
    return BlockPlan(
        num_heads=w.num_heads,
        head_width=w_qkv.shape[0] // (3 * w.num_heads),
        eps1=w.norm1.eps,
        w_qkv=w_qkv,
        b_qkv=b_qkv,
        q_norm=_head_norm(w.q_norm, w.scale if w.q_norm is not None else 1.0, w_qkv, w.num_heads),
        k_norm=_head_norm(w.k_norm, 1.0, w_qkv, w.num_heads),
        w_proj=w_proj,
        b_proj=b_proj,
        eps2=w.norm2.eps,
        w_fc1=w_fc1,
        b_fc1=b_fc1,
        activation=w.activation,
        w_fc2=w_fc2,
        b_fc2=b_fc2,
    )


def _wide(linear: Linear) -> tuple[Tensor, Tensor]:
    weight = linear.weight.detach().double()
    bias = torch.zeros_like(weight[:, 0]) if linear.bias is None else linear.bias.detach().double()
    return weight, bias


def _behind_norm(norm: Norm, linear: Linear) -> tuple[Tensor, Tensor]:
    """W (g * xhat + c) + b = (W g) xhat + (W c + b)."""
    weight, bias = _wide(linear)
    if norm.bias is not None:
        bias = bias + weight @ norm.bias.detach().double()
    return (
        weight.clone() if norm.weight is None else weight * norm.weight.detach().double(),
        bias.clone(),
    )


def _before_scale(linear: Linear, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """gamma * (W x + b) = (gamma W) x + gamma b."""
    weight, bias = _wide(linear)
    if gamma is None:
        return weight, bias
    gamma = gamma.detach().double()
    return weight * gamma[:, None], bias * gamma


def _head_norm(norm: Norm | None, scale: float, like: Tensor, num_heads: int) -> HeadNorm | None:
    if norm is None:
        return None
    width = like.shape[0] // (3 * num_heads)
    ones = torch.ones(width, dtype=torch.float64, device=like.device)
    weight = ones if norm.weight is None else norm.weight.detach().double()
    bias = 0 * ones if norm.bias is None else norm.bias.detach().double()
    return HeadNorm((scale * weight).to(like.dtype), (scale * bias).to(like.dtype), norm.eps)
