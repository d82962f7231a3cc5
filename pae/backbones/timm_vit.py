"""timm vision transformers, judged by capability: what a block has and computes, never what it is
called.

Every block is read attribute by attribute into `BlockWeights`, and then proved: the formula that
the plan will fold is run on a few random rows beside the block itself. A block that has the right
attributes but computes something else (a patched forward, post-norm, an extra adapter) is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.func import functional_call

from pae_kernels.pointwise import ACTIVATIONS

from ..errors import UnsupportedBackbone
from ..prompts.base import BackboneShape


@dataclass(frozen=True)
class Norm:
    """LayerNorm: weight and bias (n,) or None, eps."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Linear:
    """x W^T + b: weight (out, in), bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class BlockWeights:
    """One pre-norm block: x += s1 proj(attention(norm1(x))); x += s2 fc2(act(fc1(norm2(x)))).

    qkv is the packed (3 H d, D) projection; q_norm and k_norm act per head before the logits, or
    are None; scale1 and scale2 are LayerScale's (D,) factors, or None; activation is a key of
    `pae_kernels` ACTIVATIONS.
    """

    norm1: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    num_heads: int
    scale: float
    proj: Linear
    scale1: Tensor | None
    norm2: Norm
    fc1: Linear
    activation: str
    fc2: Linear
    scale2: Tensor | None


class BackboneView:
    """What pae reads of a frozen backbone: its stem, its blocks, its readout.

    Attributes:
        module: the backbone.
        shape: its sizes.
        num_prefix_tokens: class and register tokens, which stand first in the sequence.
        reads_class_only: only row 0 of the last block's output reaches the head.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        patch = module.patch_embed.patch_size
        self.num_prefix_tokens: int = module.num_prefix_tokens
        self.reads_class_only: bool = module.global_pool == "token" and module.attn_pool is None
        self.shape = BackboneShape(
            depth=len(module.blocks),
            width=module.embed_dim,
            num_heads=module.blocks[0].attn.num_heads,
            patch_size=tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch),
            in_chans=getattr(module, "in_chans", module.patch_embed.proj.in_channels),
            num_tokens=module.patch_embed.num_patches + self.num_prefix_tokens,
            num_prefix_tokens=self.num_prefix_tokens,
            grid=tuple(module.patch_embed.grid_size),
            head_width=module.blocks[0].attn.qkv.out_features
            // (3 * module.blocks[0].attn.num_heads),
            has_class_token=getattr(module, "cls_token", None) is not None,
        )

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in order."""
        return list(self.module.blocks)

    def embed(self, images: Tensor) -> Tensor:
        """Stem: (B, C, H, W) images to (B, N, D) rows with position embedding, prefix tokens
        first.
        """
        m = self.module
        x = m._pos_embed(m.patch_embed(images))
        return m.norm_pre(m.patch_drop(x))

    def patch_tokens(self, images: Tensor) -> Tensor:
        """(B, patches, D) as the patch embedding gives them: no position embedding, no prefix."""
        return self.module.patch_embed(images).flatten(1, -2)

    def patch_convolution(self, size: tuple[int, int]) -> nn.Conv2d | None:
        """The convolution that alone makes patch tokens of images of this size, each patch once and
        no pixel outside; None when the stem does anything else with them.
        """
        embed, patch = self.module.patch_embed, self.shape.patch_size
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
        """`embed` from what `patch_convolution` gives for images of this size: (B, patches, D), row
        by row.
        """
        m = self.module
        if getattr(m, "dynamic_img_size", False):  # timm then places positions on a grid
            grid = [s // p for s, p in zip(size, self.shape.patch_size)]
            tokens = tokens.unflatten(1, grid)
        return m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed.norm(tokens))))

    def run_block(self, block: nn.Module, x: Tensor, kv: Tensor | None = None) -> Tensor:
        """The block's own forward on rows (B, N, D); with `kv` (P, 2, H, d) or (B, P, 2, H, d), its
        parts around an attention that has these keys and values in addition.
        """
        if kv is None:
            return block(x)
        attn = block.attn
        q, k, v = self.heads(block, x)
        kv = kv.to(k.dtype).expand(len(x), *kv.shape[-4:]).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([kv[0], k], dim=2), torch.cat([kv[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        x = x + block.ls1(attn.proj(out.transpose(1, 2).flatten(2)))
        return x + block.ls2(block.mlp(block.norm2(x)))

    def heads(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, N, d) of the block's rows (B, N, D), unscaled."""
        return _heads(block.attn, block.norm1(x))

    @torch.no_grad()
    def class_attention(self, block: nn.Module, x: Tensor, kv: Tensor | None = None) -> Tensor:
        """(B, H, N): attention of row 0 on every row in that forward, in at least fp32."""
        q, k, _ = self.heads(block, x)
        if kv is not None:
            kv = kv.to(k.dtype).expand(len(x), *kv.shape[-4:]).permute(2, 0, 3, 1, 4)
            k = torch.cat([kv[0], k], dim=2)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(k.dtype, torch.float32)
            scores = (block.attn.scale * q[:, :, :1].to(wide)) @ k.to(wide).transpose(-1, -2)
            return scores.softmax(-1)[:, :, 0, -x.shape[1] :]

    def class_query(self, block: nn.Module, x: Tensor) -> Tensor:
        """(B, H d): the query projection of row 0, before any per-head norm."""
        return block.attn.qkv(block.norm1(x[:, :1]))[:, 0].chunk(3, dim=-1)[0]

    def readout(self, x: Tensor) -> Tensor:
        """(B, N, D) rows after the last block to the features that enter the head, (B, F).

        When `reads_class_only`, (B, 1, D) with the class row alone gives the same.
        """
        m = self.module
        return m.forward_head(m.norm(x), pre_logits=True)

    def check_images(self, images: Tensor) -> None:
        """Raise unless `images` is a finite float (B, C, H, W) batch of a size this backbone takes.

        On a GPU the values are not looked at: asking for them would stall the stream.
        """
        if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
            what = (
                f"{tuple(images.shape)} {images.dtype}"
                if isinstance(images, Tensor)
                else type(images)
            )
            raise ValueError(f"images must be a float tensor (B, C, H, W), got {what}")
        if images.shape[1] != self.shape.in_chans:
            raise ValueError(
                f"images must have {self.shape.in_chans} channels, got {images.shape[1]}"
            )
        embed, size = self.module.patch_embed, tuple(images.shape[-2:])
        like = embed.proj.weight
        if images.device != like.device:
            raise ValueError(
                f"images must be on {like.device} like the backbone, got {images.device}"
            )
        if images.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
            raise ValueError(f"images must be {like.dtype} (backbone), got {images.dtype}")
        patch, fixed = self.shape.patch_size, not getattr(self.module, "dynamic_img_size", False)
        if fixed and size != tuple(embed.img_size):
            raise ValueError(
                f"images must be {tuple(embed.img_size)} pixels high and wide, got {size} (build "
                "the backbone with img_size=... or dynamic_img_size=True for another size)"
            )
        padded = getattr(embed, "dynamic_img_pad", False)
        if not fixed and not padded and any(s % p for s, p in zip(size, patch)):
            raise ValueError(f"images must have sides divisible by the patch {patch}, got {size}")
        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            bad = int((~images.isfinite().flatten(1).all(dim=1)).sum())
            if bad:
                raise ValueError(f"images holds NaN or infinity in {bad} of {len(images)} images")


def _heads(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, d) of normalised rows, per-head norms done."""
    qkv = attn.qkv(x).view(*x.shape[:2], 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return attn.q_norm(q), attn.k_norm(k), v


def read_backbone(module: nn.Module) -> BackboneView:
    """View of a supported backbone.

    Raises:
        UnsupportedBackbone: naming the attribute that is missing or that pae cannot express.
    """
    name = type(module).__name__
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
    if len(module.blocks) == 0:
        raise UnsupportedBackbone(f"{name}.blocks is empty")
    if not isinstance(getattr(module.patch_embed, "proj", None), nn.Conv2d):
        raise UnsupportedBackbone(f"{name}.patch_embed.proj is not a convolution")
    for i, block in enumerate(module.blocks):
        weights = read_block(block, f"blocks[{i}]")
        _prove(block, weights, f"blocks[{i}]")
    return BackboneView(module)


def read_block(block: nn.Module, name: str) -> BlockWeights:
    """Neutral weights of one block; raises UnsupportedBackbone naming what does not fit."""

    def get(path: str) -> nn.Module:
        part = block
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
        scale=get("attn.scale"),
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
    u = torch.linspace(-6, 6, 97)
    with torch.no_grad():
        y = module(u.clone())
    for kind, function in ACTIVATIONS.items():
        if torch.allclose(y, function(u), rtol=1e-6, atol=1e-6):
            return kind
    raise UnsupportedBackbone(
        f"{name} is {type(module).__name__}, expected one of {sorted(ACTIVATIONS)}"
    )


def apply_block(weights: BlockWeights, x: Tensor) -> Tensor:
    """The formula of `BlockWeights`, unfolded, in plain PyTorch."""
    w, (batch, rows, _) = weights, x.shape

    def norm(n: Norm, t: Tensor) -> Tensor:
        return F.layer_norm(t, t.shape[-1:], n.weight, n.bias, n.eps)

    def scaled(gamma: Tensor | None, t: Tensor) -> Tensor:
        return t if gamma is None else t * gamma

    qkv = F.linear(norm(w.norm1, x), w.qkv.weight, w.qkv.bias)
    q, k, v = qkv.view(batch, rows, 3, w.num_heads, -1).permute(2, 0, 3, 1, 4)
    q = q if w.q_norm is None else norm(w.q_norm, q)
    k = k if w.k_norm is None else norm(w.k_norm, k)
    o = ((w.scale * q) @ k.transpose(-1, -2)).softmax(-1) @ v
    x = x + scaled(w.scale1, F.linear(o.transpose(1, 2).flatten(2), w.proj.weight, w.proj.bias))
    h = ACTIVATIONS[w.activation](F.linear(norm(w.norm2, x), w.fc1.weight, w.fc1.bias))
    return x + scaled(w.scale2, F.linear(h, w.fc2.weight, w.fc2.bias))


def _in_fp32(value):
    """`value` with every tensor in it as fp32: a tensor, a dataclass of this file, or neither."""
    if isinstance(value, Tensor):
        return value.float()
    if is_dataclass(value):
        return replace(value, **{f.name: _in_fp32(getattr(value, f.name)) for f in fields(value)})
    return value


def _prove(block: nn.Module, weights: BlockWeights, name: str) -> None:
    """Run block and formula on the same five rows; raise when they differ by more than rounding."""
    like = weights.qkv.weight
    if like.device.type == "meta":
        return
    parameters = dict(block.named_parameters())
    if like.dtype.itemsize < 4:
        # in 16 bits rounding of the rows can hide or fake a difference in a small update
        parameters = {n: p.float() for n, p in parameters.items()}
        weights, like = _in_fp32(weights), like.float()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 5, like.shape[1], generator=generator).to(like)
    training = block.training
    try:
        with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            got = apply_block(weights, rows)
            expected = functional_call(block.eval(), parameters, (rows,))
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedBackbone(
            f"{name} ({type(block).__name__}) cannot be run on rows alone: {error}"
        ) from error
    finally:
        block.train(training)
    difference = (got - expected).float().norm() / (expected - rows).float().norm().clamp_min(1e-20)
    if not difference <= 1e-3 and torch.isfinite(expected).all():
        raise UnsupportedBackbone(
            f"{name} ({type(block).__name__}) computes something else than pre-norm attention and "
            f"MLP: {difference:.1e} relative difference on random rows"
        )
