"""The face of a frozen backbone: the weights that the plan folds, and what both engines ask.

Each source of backbones has a file beside this one that makes the face (`timm_vit`). Nothing here
knows how a source calls its attributes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pae_kernels.checks import transform
from pae_kernels.pointwise import ACTIVATIONS
from pae_kernels.precision import exact_products

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

    def trainable(self) -> list[Tensor]:
        """The parameters that need not be frozen: its biases, and those of its norms."""
        norms = [n for n in (self.norm1, self.norm2, self.q_norm, self.k_norm) if n is not None]
        found = [t for n in norms for t in (n.weight, n.bias)]
        found += [linear.bias for linear in (self.qkv, self.proj, self.fc1, self.fc2)]
        return [t for t in found if t is not None]


UNTRAINED = (
    "the fast engine trains biases and the norms' own parameters in a block, whose matrices and "
    "LayerScale are folded into constants"
)


HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}


def added_to(module: nn.Module) -> str | None:
    """What a call of `module` does beyond the forward of its class, in words; None when nothing."""
    for hooks, kind in HOOKS.items():
        if getattr(module, hooks):
            return f"a {kind}"
    return "a replaced forward" if "forward" in vars(module) else None


class BackboneView(ABC):
    """What pae reads of a frozen backbone: its stem, its blocks, its readout.

    Attributes:
        module: the backbone.
        shape: its sizes.
        num_prefix_tokens: class and register tokens, which stand first in the sequence.
    """

    module: nn.Module
    shape: BackboneShape
    num_prefix_tokens: int

    @property
    @abstractmethod
    def reads_class_only(self) -> bool:
        """Whether only row 0 of the last block's output reaches the head, or a hook on the way."""

    @property
    @abstractmethod
    def readout_parts(self) -> list[Any]:
        """What `reads_class_only` follows from: the same objects, the same answer."""

    @property
    @abstractmethod
    def pools_not(self) -> str | None:
        """What the readout does other than to take the mean or the maximum of all rows behind the
        prefix that it is given, in words; None when it does just that.
        """

    @abstractmethod
    def num_rows(self, size: tuple[int, int]) -> int:
        """Rows that the stem makes of images of this size, prefix tokens included."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in order."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int] | None:
        """The one size of images that the stem takes; None when it takes more."""

    @property
    @abstractmethod
    def pads_images(self) -> bool:
        """Whether the stem takes images whose sides the patch does not divide."""

    @property
    def like(self) -> Tensor:
        """A frozen weight: the device and dtype of all of them."""
        return next(self.blocks[0].parameters())

    @abstractmethod
    def read_block(self, index: int) -> BlockWeights:
        """Neutral weights of one block; raises UnsupportedBackbone naming what does not fit."""

    def prove_blocks(self) -> None:
        """Raise UnsupportedBackbone unless every block can be read and computes its formula, as far
        as five rows of two images tell.
        """
        for i, block in enumerate(self.blocks):
            modes = {part: part.training for part in block.modules()}
            try:
                _prove(block.eval(), self.read_block(i), f"blocks.{i}", 2, 5)
            finally:
                for part, mode in modes.items():
                    part.training = mode

    def prove_lengths(self, lengths: Sequence[int]) -> None:
        """Raise UnsupportedBackbone unless every block, in the mode it is in, computes its formula
        on sequences of its length, to within what fp64 leaves of a difference.
        """
        if len(self.blocks) != len(lengths):
            raise UnsupportedBackbone(
                f"the backbone has {len(self.blocks)} blocks, and the prompts were made for "
                f"{len(lengths)}: build a new model"
            )
        for i, (block, rows) in enumerate(zip(self.blocks, lengths)):
            _prove(block, self.read_block(i), f"blocks.{i}", 1, rows, torch.float64)

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Stem: (B, C, H, W) images to (B, N, D) rows with position embedding, prefix tokens
        first.
        """

    @abstractmethod
    def patch_tokens(self, images: Tensor) -> Tensor:
        """(B, patches, D) as the patch embedding gives them: no position embedding, no prefix."""

    @abstractmethod
    def patch_convolution(self, size: tuple[int, int]) -> nn.Conv2d | None:
        """The convolution that alone makes patch tokens of images of this size, each patch once and
        no pixel outside; None when the stem does anything else with them.
        """

    @abstractmethod
    def embed_tokens(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """`embed` from what `patch_convolution` gives for images of this size: (B, patches, D), row
        by row.
        """

    @abstractmethod
    def run_block(self, block: nn.Module, x: Tensor, kv: Tensor | None = None) -> Tensor:
        """The block's own forward on rows (B, N, D); with `kv` (P, 2, H, d) or (B, P, 2, H, d), its
        parts around an attention that has these keys and values in addition.

        Raises:
            UnsupportedBackbone: with `kv`, when the block or its attention has a hook or a replaced
                forward, which its parts alone do not run.
        """

    @abstractmethod
    def class_attention(self, block: nn.Module, x: Tensor, kv: Tensor | None = None) -> Tensor:
        """(B, H, N): attention of row 0 on every row in that forward, in at least fp32."""

    @abstractmethod
    def class_query(self, block: nn.Module, x: Tensor) -> Tensor:
        """(B, H d): the query projection of row 0, before any per-head norm."""

    @abstractmethod
    def readout(self, x: Tensor) -> Tensor:
        """(B, N, D) rows after the last block to the features that enter the head, (B, F).

        When `reads_class_only`, (B, 1, D) with the class row alone gives the same.
        """

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
        size, only, like = tuple(images.shape[-2:]), self.image_size, self.like
        if images.device != like.device:
            raise ValueError(
                f"images must be on {like.device} like the backbone, got {images.device}"
            )
        if images.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
            raise ValueError(f"images must be {like.dtype} (backbone), got {images.dtype}")
        if only is not None and size != only:
            raise ValueError(
                f"images must be {only} pixels high and wide, got {size} (build the backbone with "
                "img_size=... or dynamic_img_size=True for another size)"
            )
        patch = self.shape.patch_size
        if only is None and not self.pads_images and any(s % p for s, p in zip(size, patch)):
            raise ValueError(f"images must have sides divisible by the patch {patch}, got {size}")
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if transform() is None:  # under vmap nobody can look at values
            bad = int((~images.isfinite().flatten(1).all(dim=1)).sum())
            if bad:
                raise ValueError(f"images holds NaN or infinity in {bad} of {len(images)} images")


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


def random_rows(*size: int) -> Tensor:
    """The same on every device and whatever the default device is, a CPU's."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(*size, generator=generator, device="cpu")


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every tensor in it so: a tensor, a dataclass of this file, or neither."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: _in_dtype(getattr(value, f.name), dtype) for f in fields(value)}
        return replace(value, **named)
    return value


def _prove(
    block: nn.Module,
    weights: BlockWeights,
    name: str,
    batch: int,
    count: int,
    dtype: torch.dtype | None = None,
) -> None:
    """Run block and formula on the same (batch, count) rows; raise when they differ by more than
    rounding. `dtype`: to compute in; that of the weights, 32 bits at least, when None.
    """
    like = weights.qkv.weight
    if like.device.type == "meta" or count == 0:
        return
    # in 16 bits rounding of the rows can hide or fake a difference in a small update
    dtype = torch.promote_types(like.dtype, torch.float32) if dtype is None else dtype
    parameters = {n: p.to(dtype) for n, p in block.named_parameters()}
    rows = random_rows(batch, count, like.shape[1]).to(like.device, dtype)
    try:
        with torch.no_grad(), torch.autocast(like.device.type, enabled=False), exact_products:
            got = apply_block(_in_dtype(weights, dtype), rows)
            expected = functional_call(block, parameters, (rows,))
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedBackbone(
            f"{name} ({type(block).__name__}) cannot be run on {count} rows alone: {error}"
        ) from error
    difference = (got - expected).norm() / (expected - rows).norm().clamp_min(1e-20)
    most = 1e-6 if dtype == torch.float64 else 1e-3
    if not difference <= most and torch.isfinite(expected).all():
        raise UnsupportedBackbone(
            f"{name} ({type(block).__name__}) computes something else than pre-norm attention and "
            f"MLP: {difference:.1e} relative difference on {count} random rows"
        )
