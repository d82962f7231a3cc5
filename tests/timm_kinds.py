"""Tiny models of timm of every container and block, with random weights of trained size."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import DiffAttention, RmsNorm
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from tests.tiny import SIZES, filled

ROPE = {"use_rot_pos_emb": True}
DINOV3 = {**ROPE, "rope_type": "dinov3", "rope_rotate_half": True, "rope_temperature": 100.0}
NAFLEX = {"embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}


class TwoNumbers(DiffAttention):
    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options, dual_lambda=True)


def eva(**changes):
    return lambda: Eva(**{**SIZES, **changes})


def of(kind, **changes):
    return lambda: kind(**SIZES, **changes)


KINDS = {
    "eva": eva(),
    "eva02-s": eva(**ROPE, swiglu_mlp=True, ref_feat_shape=(3, 5)),
    "eva02-b": eva(
        **ROPE, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, scale_attn_inner=True,
        global_pool="token",
    ),
    "dinov3": eva(
        **DINOV3, init_values=0.1, num_reg_tokens=2, qkv_bias=False, use_abs_pos_emb=False,
        dynamic_img_size=True, global_pool="token",
    ),
    "pe": eva(
        **ROPE, attn_type="rope", rope_grid_indexing="xy", rope_grid_offset=1.0,
        use_pre_transformer_norm=True, global_pool="map", attn_pool_num_heads=4,
        attn_pool_mlp_ratio=2.0,
    ),
    "mixed": eva(**ROPE, rope_type="mixed", global_pool="token"),
    "mixed with norms of heads": eva(**ROPE, rope_type="mixed", attn_type="rope", qk_norm=True),
    "no prefix": eva(**ROPE, class_token=False),
    "sapiens2": eva(
        **DINOV3, attn_type="rope", qkv_fused=False, num_kv_heads=2, qk_norm=True,
        norm_layer=RmsNorm, swiglu_mlp=True, init_values=0.1, attn_only_layer_scale=True,
        num_reg_tokens=2,
    ),
    "beit": of(Beit, use_rel_pos_bias=True, init_values=0.1, use_abs_pos_emb=False),
    "beit, one bias": of(
        Beit, use_shared_rel_pos_bias=True, global_pool="token", swiglu_mlp=True, scale_mlp=True
    ),
    "relpos": of(
        VisionTransformerRelPos, rel_pos_type="mlp", class_token=True, global_pool="token"
    ),
    "relpos, one bias": of(VisionTransformerRelPos, shared_rel_pos=True, qk_norm=True),
    "vitamin": of(VisionTransformer, mlp_layer=GeGluMlp, class_token=False, global_pool="avg"),
    "distilled": of(VisionTransformerDistilled),
    "eva02-e": eva(use_post_norm=True, swiglu_mlp=True, global_pool="token"),
    "post-norm": of(VisionTransformer, block_fn=ResPostBlock, global_pool="avg"),
    "parallel": of(
        VisionTransformer, block_fn=ParallelScalingBlock, qkv_bias=False, qk_norm=True,
        norm_layer="rmsnorm", init_values=0.1,
    ),
    "parallel, one product": of(
        VisionTransformer, block_fn=partial(ParallelScalingBlock, fuse_out_proj=True),
        global_pool="avg",
    ),
    "parallel things": of(VisionTransformer, block_fn=ParallelThingsBlock, init_values=0.1),
    "differential": of(VisionTransformer, attn_layer="diff", qk_norm=True),
    "differential, two numbers": of(
        VisionTransformer, attn_layer=TwoNumbers, global_pool="avg",
    ),
    "differential and parallel": of(
        VisionTransformer, block_fn=DiffParallelScalingBlock, init_values=0.1, reg_tokens=1,
    ),
    "naflex": lambda: NaFlexVit(
        NaFlexVitCfg(**NAFLEX, pos_embed_grid_size=(4, 4), reg_tokens=2, global_pool="token",
                     class_token=True),
        num_classes=5,
    ),
}  # fmt: skip


def build(kind: str) -> nn.Module:
    return filled(KINDS[kind]()).double().eval()


def images(backbone: nn.Module) -> Tensor:
    some = isinstance(backbone, NaFlexVit) or getattr(backbone, "dynamic_img_size", False)
    size = (8, 20) if some else (16, 16)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, *size, generator=generator, dtype=torch.float64)
