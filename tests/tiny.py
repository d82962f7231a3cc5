"""Tiny backbones with every supported feature, families that only tests need, error sizes."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from timm.layers import Attention, GluMlp, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import pae
from tests.errors import TIMES, distance, error, rounding


class WideHeads(Attention):
    """Heads of another width than dim / num_heads."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs, attn_head_dim=6)


FEATURES = {
    "plain": {},
    "one_block": {"depth": 1},
    "layer_scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 2},
    "registers_no_embed_class": {"reg_tokens": 2, "no_embed_class": True},
    "registers_no_class_token": {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
    "no_embed_class": {"no_embed_class": True},
    "avg": {"global_pool": "avg"},
    "avg_final_norm": {"global_pool": "avg", "fc_norm": False},
    "avg_with_prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "avg_no_class_token": {"global_pool": "avg", "class_token": False},
    "token_fc_norm": {"fc_norm": True},
    "max": {"global_pool": "max"},
    "avgmax": {"global_pool": "avgmax"},
    "map": {"global_pool": "map"},
    "map_no_class_token": {"global_pool": "map", "class_token": False},
    "no_pool": {"global_pool": ""},
    "no_final_norm": {"final_norm": False},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu"},
    "qk_norm": {"qk_norm": True},
    "qk_norm_avg": {"qk_norm": True, "global_pool": "avg"},
    "gelu_tanh": {"act_layer": "gelu_tanh"},
    "silu": {"act_layer": "silu"},
    "relu": {"act_layer": "relu"},
    "swiglu": {"mlp_layer": SwiGLU, "scale_attn_norm": True, "scale_mlp_norm": True},
    "packed_swiglu": {"mlp_layer": SwiGLUPacked, "init_values": 0.1, "reg_tokens": 1},
    "rms": {"norm_layer": "rmsnorm", "qk_norm": True, "mlp_layer": GluMlp, "act_layer": "silu"},
    "inner_norms": {"scale_attn_norm": True, "scale_mlp_norm": True, "proj_bias": False},
    "no_qkv_bias": {"qkv_bias": False},
    "no_proj_bias": {"proj_bias": False},
    "no_position": {"pos_embed": "none"},
    "not_square": {"img_size": (8, 16)},
    "dynamic_size": {"dynamic_img_size": True},
    "large_patch": {"patch_size": 8},
    "oblong_patch": {"patch_size": (4, 8)},
    "grey": {"in_chans": 1},
    "head_width": {"attn_layer": WideHeads},
    "dropout": {
        "drop_rate": 0.5,
        "pos_drop_rate": 0.5,
        "patch_drop_rate": 0.5,
        "proj_drop_rate": 0.5,
        "attn_drop_rate": 0.5,
        "drop_path_rate": 0.5,
    },
}


SIZES = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2,
    "num_classes": 5,
}


def backbone(
    feature: str = "plain", dtype: torch.dtype = torch.float64, **changes
) -> VisionTransformer:
    """A ViT of that feature with random weights of trained size: no path is negligible."""
    config = {**SIZES, "weight_init": "skip", **FEATURES[feature], **changes}
    vit = filled(VisionTransformer(**config))
    return vit.to(dtype).train()


def filled(module: nn.Module) -> Any:
    """`module` with random weights of trained size, no path of it negligible."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            values = torch.randn(p.shape, generator=generator)
            if name == "rope.freqs":
                continue
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.3 * values)
            elif "gamma" in name:
                p.copy_(0.5 + 0.2 * values)
            elif name.endswith("weight"):
                p.copy_(values * p[0].numel() ** -0.5)
            else:  # of biases, of tokens and positions
                p.copy_((0.2 if name.endswith("bias") else 0.5) * values)
    return module


def counted(shape: Sequence[int], number: int = 0) -> Tensor:
    """Numbers between -1/2 and 1/2 that are the same bits on every processor: random ones depend
    on its instructions, and a fingerprint on every bit.
    """
    count = torch.arange(math.prod(shape)).view(shape)
    return ((7919 * count + 104729 * number) % 2003) / 2003.0 - 0.5


def counted_backbone(feature: str) -> VisionTransformer:
    """A ViT of that feature in fp32 with such weights."""
    vit = backbone(feature, torch.float32)
    with torch.no_grad():
        for number, p in enumerate(vit.parameters()):
            p.copy_(counted(p.shape, number))
    return vit


def images(vit: VisionTransformer, batch: int = 3, seed: int = 0) -> Tensor:
    """A batch of the backbone's size (another one where it takes any) and dtype."""
    size = (8, 20) if vit.dynamic_img_size else vit.patch_embed.img_size
    generator = torch.Generator().manual_seed(seed)
    like = vit.patch_embed.proj.weight
    return torch.randn(batch, like.shape[1], *size, generator=generator).to(like.dtype)


def prompted(
    feature: str = "plain", prompts=5, dtype: torch.dtype = torch.float64, **changes
) -> pae.PromptedViT:
    """PromptedViT in training mode over `backbone(feature)`; `prompts`: a family, or counts."""
    if not isinstance(prompts, pae.prompts.PromptFamily):
        prompts = pae.prompts.VPTDeep(prompts)
    model = pae.PromptedViT(backbone(feature, dtype, **changes), prompts).train()
    with torch.no_grad():
        for p in model.prompts.parameters():  # as large as image rows, so that prompts matter
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.7)
    return model


def over(module: nn.Module, family=None, **options) -> pae.PromptedViT:
    """The same over any backbone, with a head where it has none; four deep prompts by default."""
    classes = None if pae.backbones.head_name(module) else 5
    family = pae.prompts.VPTDeep(4) if family is None else family
    model = pae.PromptedViT(module, family, num_classes=classes, **options).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.prompts.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=generator))
    return model


# small values of what families are made with
ARGUMENTS = {"num_tokens": 4, "rank": 4, "num_proxies": 4, "num_classes": 5}
ARGUMENTS |= {"fraction": 0.5, "num_kv": 3, "num_reinforced": 3}


def small(family: type[pae.prompts.PromptFamily], **changes) -> pae.prompts.PromptFamily:
    """One of this class for a tiny backbone, made with those of `ARGUMENTS` that it takes."""
    taken = inspect.signature(family).parameters
    return family(**{k: v for k, v in {**ARGUMENTS, **changes}.items() if k in taken})


def gradients(
    model: pae.PromptedViT,
    x: Tensor,
    engine: str,
    memory: str = "keep",
    wrt_images: bool = False,
    seed: int = 3,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits, and the gradient of one fixed scalar of them by every trained tensor."""
    x = x.clone().requires_grad_(wrt_images)
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if wrt_images:
        wanted["images"] = x
    torch.manual_seed(seed)  # prompt dropout
    logits = model(x, engine=engine, memory=memory)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    scalar = (logits * weights).sum() + logits.square().sum()
    grads = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True)
    return logits.detach(), dict(zip(wanted, grads))


def assert_engines_agree(
    model: pae.PromptedViT,
    x: Tensor,
    logits: float | None = None,
    grads: float | None = None,
    memory: str = "keep",
    wrt_images: bool = True,
) -> None:
    """The fast engine equals the reference in value and in every gradient.

    Relative to each, or within the rounding of the terms where little is left of them: a shift of
    a whole prompt row, say, has a gradient of zero in exact arithmetic.
    """
    double = x.dtype == torch.float64
    logits = (1e-9 if double else 1e-5) if logits is None else logits
    grads = (1e-7 if double else 1e-4) if grads is None else grads
    expected, expected_grads = gradients(model, x, "reference", "keep", wrt_images)
    got, got_grads = gradients(model, x, "fast", memory, wrt_images)
    assert got.dtype == expected.dtype
    off = {} if error(got, expected) <= logits else {"logits": error(got, expected)}
    for name, g in expected_grads.items():
        if g is None:
            assert got_grads[name] is None, f"{name} has a gradient in the fast engine alone"
            continue
        assert got_grads[name] is not None, f"{name} has no gradient in the fast engine"
        assert got_grads[name].dtype == g.dtype
        if error(got_grads[name], g) > grads:
            off[name] = error(got_grads[name], g)
    if not off:
        return
    wide = copy.deepcopy(model).double()

    def reference():
        values, by_name = gradients(wide, x.double(), "reference", "keep", wrt_images)
        return [values, *by_name.values()]

    exact, sizes = rounding(reference, x.dtype)
    for name, a, b, size in zip(
        ["logits", *got_grads], [got, *got_grads.values()], exact, sizes, strict=True
    ):
        if name in off:
            assert distance(a, b) <= TIMES * size, f"{name}: {off[name]:.1e}, relative"


class Given(pae.prompts.PromptFamily):
    """Learned prompts (sets, P_i, D) per block, picked per sample by a fixed group index.

    sets = 1: shared, as (P, D); sets = batch and no index: per sample.
    """

    def __init__(
        self, counts: Sequence[int], sets: int = 1, group: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.counts, self.sets = list(counts), sets
        self.register_buffer("group", None if group is None else torch.tensor(group))

    def bind(self, shape) -> None:
        self.rows = nn.ParameterList(
            nn.Parameter(torch.randn(self.sets, count, shape.width)) for count in self.counts
        )

    @property
    def prompt_counts(self):
        return self.counts

    def block_prompts(self, index, x):
        rows = self.rows[index]
        if rows.shape[1] == 0:
            return None
        return rows if self.sets > 1 or self.group is not None else rows[0]

    def group_index(self, x):
        return self.group


class FromRows(pae.prompts.PromptFamily):
    """Prompts computed from the rows that enter a block: per sample, or per group of samples."""

    depends_on_input = True

    def __init__(self, counts: Sequence[int], grouped: bool = False) -> None:
        super().__init__()
        self.counts, self.grouped = list(counts), grouped

    def bind(self, shape) -> None:
        self.maps = nn.ModuleList(
            nn.Linear(shape.width, max(count, 1) * shape.width, bias=False) for count in self.counts
        )

    @property
    def prompt_counts(self):
        return self.counts

    def group_index(self, x):
        if not self.grouped:
            return None
        return torch.arange(len(x), device=x.device) % 2

    def block_prompts(self, index, x):
        if self.counts[index] == 0:
            return None
        means = x.mean(1)  # (B, D)
        if self.grouped:
            means = torch.stack([means[0::2].mean(0), means[1::2].mean(0)])
        return self.maps[index](means).view(len(means), self.counts[index], -1)


def refused(kind, message, call):
    with pytest.raises(kind, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


def family(parent=pae.prompts.VPTDeep, **parts):
    """A class named Mine, as it stands in somebody's file."""
    return lambda: type("Mine", (parent,), parts)
