"""The face of a frozen backbone: the weights that the plan folds, and what both engines ask.

Each source of backbones has a file beside this one that makes the face (`timm_vit`). Nothing here
knows how a source calls its attributes.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pae_kernels.checks import transform
from pae_kernels.pointwise import ACTIVATIONS
from pae_kernels.precision import exact_matmul, exact_products

from ..errors import UnsupportedBackbone
from ..prompts.base import BackboneShape


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm when kind is "rms": weight and bias (n,) or None, eps."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    kind: str = "layer"

    def __call__(self, rows: Tensor) -> Tensor:
        width = rows.shape[-1:]
        if self.kind == "layer":
            return F.layer_norm(rows, width, self.weight, self.bias, self.eps)
        return F.rms_norm(rows, width, self.weight, self.eps)


@dataclass(frozen=True)
class Linear:
    """x W^T + b: weight (out, in), bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def parts(self) -> tuple[Linear, ...]:
        """Itself: it is read as it lies in its module."""
        return (self,)

    def thirds(self) -> tuple[Linear, Linear, Linear]:
        """Queries, keys and values of a packed projection, views of it."""
        biases = (None,) * 3 if self.bias is None else self.bias.chunk(3)
        q, k, v = map(Linear, self.weight.chunk(3), biases)
        return q, k, v

    def repeated(self, times: int, heads: int) -> Linear:
        """Each of so many heads several times, new tensors."""

        def repeat(t: Tensor) -> Tensor:
            return t.unflatten(0, (heads, -1)).repeat_interleave(times, dim=0).flatten(0, 1)

        return Linear(repeat(self.weight), None if self.bias is None else repeat(self.bias))

    def exchanged(self) -> Stacked:
        """The second half of its rows before the first."""
        weights = self.weight.chunk(2)
        biases = (None, None) if self.bias is None else self.bias.chunk(2)
        return Stacked((Linear(weights[1], biases[1]), Linear(weights[0], biases[0])))

    def __call__(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight, self.bias)


@dataclass(frozen=True)
class Stacked:
    """Several products of the same rows, one behind the other: what one projection is here and lies
    in several modules, or in another order. Each part stays where it is.
    """

    parts: tuple[Linear | Behind, ...]

    def thirds(self) -> tuple[Linear, Linear, Linear]:
        """Queries, keys and values, of three products."""
        q, k, v = cast(tuple[Linear, Linear, Linear], self.parts)
        return q, k, v

    @property
    def weight(self) -> Tensor:
        """(out, in), a new tensor each time."""
        return torch.cat([part.weight for part in self.parts])

    @property
    def bias(self) -> Tensor | None:
        """(out,), 0 where a part has none; None when no part has one. A new tensor each time."""
        if all(part.bias is None for part in self.parts):
            return None
        each = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in self.parts]
        return torch.cat(each)

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.cat([part(rows) for part in self.parts], dim=-1)


@dataclass(frozen=True)
class Behind:
    """A product behind the affine part of a norm whose plain part others share: W (g x + c) + b."""

    norm: Norm
    linear: Linear

    @property
    def weight(self) -> Tensor:
        """(out, in) in fp64, a new tensor each time."""
        weight = self.linear.weight.double()
        return weight if self.norm.weight is None else weight * self.norm.weight.double()

    @property
    def bias(self) -> Tensor | None:
        """(out,) in fp64, a new tensor each time; None without any."""
        own, shift = self.linear.bias, self.norm.bias
        if shift is None:
            return None if own is None else own.double()
        shift = self.linear.weight.double() @ shift.double()
        return shift if own is None else shift + own.double()

    def __call__(self, rows: Tensor) -> Tensor:
        rows = rows if self.norm.weight is None else rows * self.norm.weight
        return self.linear(rows if self.norm.bias is None else rows + self.norm.bias)


Product = Linear | Stacked


@dataclass(frozen=True)
class Summed:
    """The sum of products, each scaled (D,) or not, of rows that lie one behind the other."""

    each: tuple[tuple[Linear, Tensor | None], ...]

    @property
    def parts(self) -> tuple[Linear, ...]:
        """The products."""
        return tuple(linear for linear, _ in self.each)

    @property
    def weight(self) -> Tensor:
        """(out, in of all) in fp64, a new tensor each time."""
        scaled = ((part.weight.double(), gamma) for part, gamma in self.each)
        return torch.cat([w if g is None else w * g.double()[:, None] for w, g in scaled], dim=1)

    @property
    def bias(self) -> Tensor | None:
        """(out,) in fp64, a new tensor each time; None when no product has one."""
        own = [(part.bias.double(), g) for part, g in self.each if part.bias is not None]
        each = [b if g is None else b * g.double() for b, g in own]
        return torch.stack(each).sum(0) if each else None

    def __call__(self, rows: Tensor) -> Tensor:
        widths = [part.weight.shape[1] for part in self.parts]
        made = [part(own) for part, own in zip(self.parts, rows.split(widths, dim=-1))]
        each = [m if g is None else m * g for m, (_, g) in zip(made, self.each)]
        return torch.stack(each).sum(0)


@dataclass(frozen=True)
class Difference:
    """Differential attention: (1 - start) norm(a - weight b), of what two softmaxes a and b make of
    the same values.

    weight = exp(sum of the products of `first`) - exp(that of `second`) + start, as timm has it:
    each is one number, or two vectors, whose sum is rounded to fp32.

    Source: "Differential Transformer", Ye et al. 2024.
    """

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    start: float
    norm: Norm

    @property
    def weight(self) -> Tensor:
        """()."""

        def power(factors: tuple[Tensor, ...]) -> Tensor:
            if len(factors) == 1:
                return factors[0].exp()
            return (factors[0] * factors[1]).sum().float().exp()

        return power(self.first) - power(self.second) + self.start

    def __call__(self, rows: Tensor, heads: int) -> Tensor:
        """(B, N, H d) of heads that come in fours: two halves of a, then those of b."""
        a, b = rows.unflatten(-1, (heads // 4, 2, -1)).unbind(-2)
        return ((1 - self.start) * self.norm(a - self.weight.type_as(b) * b)).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """One block:

        h = norm1(x);  q, k, v = qkv(h);  q, k = rotated(q_norm(q)), rotated(k_norm(k))
        o = difference(attn_norm(softmax(scale q k^T + bias) v))
        x += post1(scale1 proj(o))
        t = mlp_pre(norm2(x));  u = act(fc1(t)), or act(gate) up of (gate, up) = fc1(t) when gated
        x += post2(scale2 fc2(mlp_norm(u)))

    When parallel, t is h: both sums are added to the same x, and there is no norm2.

    qkv gives (3 H d) features: all queries, all keys, all values, each head by head, with as many
    heads of keys and values as of queries. q_norm and k_norm act per head; they, attn_norm (over
    H d), difference, mlp_pre, mlp_norm (over F) and the LayerScale factors scale1 and scale2 (D,)
    may be None,
    and so may norm1 and norm2 where the norms of a branch's output, post1 and post2, are not.
    activation is a key of `pae_kernels` ACTIVATIONS. fc1 gives 2 F features when gated, gates
    first.

    rotation: "" when nothing is rotated; else which entries of a head are turned together: "pairs"
    (0 with 1, 2 with 3, ...) or "half" (0 with d/2, 1 with d/2 + 1, ...). Angles and bias belong to
    an image size, not to the weights: `Geometry`.
    """

    qkv: Product
    num_heads: int
    scale: float
    proj: Linear | Summed
    fc1: Product
    activation: str
    fc2: Linear | Summed
    norm1: Norm | None = None
    norm2: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    scale1: Tensor | None = None
    scale2: Tensor | None = None
    gated: bool = False
    attn_norm: Norm | None = None
    mlp_pre: Norm | None = None
    mlp_norm: Norm | None = None
    rotation: str = ""
    post1: Norm | None = None
    post2: Norm | None = None
    parallel: bool = False
    difference: Difference | None = None

    @property
    def head_width(self) -> int:
        """d."""
        return sum(len(part.weight) for part in self.qkv.parts) // (3 * self.num_heads)

    def trainable(self) -> list[Tensor]:
        """The parameters that need not be frozen: its biases, and those of norms; of the inner ones
        the biases.
        """
        outer = self.norm1, self.norm2, self.q_norm, self.k_norm, self.post1, self.post2
        found = [t for n in outer if n is not None for t in (n.weight, n.bias)]
        inner = self.attn_norm, self.mlp_norm, self.mlp_pre
        found += [n.bias for n in inner if n is not None]
        for product in (self.qkv, self.proj, self.fc1, self.fc2):
            if not isinstance(product, Summed):
                found += [part.bias for part in product.parts if isinstance(part, Linear)]
        return [t for t in found if t is not None]


@dataclass(frozen=True)
class Merging:
    """What stands between two stages: norm and reduction of 2 x 2 rows, end to end column by
    column. A grid of odd sides is padded with 0.
    """

    norm: Norm
    reduction: Linear

    def trainable(self) -> list[Tensor]:
        """What may be trained of it: all."""
        own = self.norm.weight, self.norm.bias, self.reduction.weight, self.reduction.bias
        return [t for t in own if t is not None]

    def __call__(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, C) of an image's grid to (B, N / 4, out)."""
        rows = F.pad(rows.unflatten(1, grid), (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        fours = rows.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(fours.flatten(3))).flatten(1, 2)


@dataclass(frozen=True)
class Geometry:
    """What a block is given beside its rows: constants of an image size.

    Attributes:
        rotation: (2, n, d/2) or (2, H, n, d/2), sine and cosine of the angles by which queries and
            keys of the last n rows are turned; prefix and prompts are not. None without any.
        bias: (H or 1, N, N), what is added to the logits of rows that there are without prompts,
            or None. Prompts, which stand behind the first `at` rows, have none.
        at: rows of the prefix.
        causal: whether a row sees none behind it.
        grid: (rows, columns) of the image's rows, where stages have grids of their own; else zeros.
    """

    rotation: Tensor | None = None
    bias: Tensor | None = None
    at: int = 0
    causal: bool = False
    grid: tuple[int, int] = (0, 0)

    def mixed(self) -> Geometry:
        """With prompts that meet other images' windows, where there are windows."""
        return self

    def bias_of(self, rows: int, keys: int = 0) -> Tensor | None:
        """(H or 1, rows, keys + rows): of so many rows, with so many keys in front."""
        bias = self.bias
        if bias is None:
            return None
        more, at = rows - bias.shape[-1], self.at
        if more:
            bias = torch.cat([bias[:, :at], F.pad(bias[:, at:], (0, 0, more, 0))], dim=1)
            bias = torch.cat([bias[..., :at], F.pad(bias[..., at:], (more, 0))], dim=2)
        return F.pad(bias, (keys, 0)) if keys else bias


NO_GEOMETRY = Geometry()

# what attention reads, what it adds to the stream (both (B, N, D)) -> what is added instead
Bypass = Callable[[Tensor, Tensor], Tensor]


UNTRAINED = (
    "the fast engine trains biases and the norms' own parameters where a product or a norm is one "
    "module's; matrices, LayerScale and all others in a block are folded into constants"
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


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """With every part of a module in eval mode."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class BlocksView(ABC):
    """Frozen transformer blocks in a row, each proved to be its formula: what a plan is made of.

    Attributes:
        module: what they belong to.
        shape: its sizes, of which `block_widths` and `widths` are read.
        num_prefix_tokens: rows of the sequence that no rotation turns; they stand first.
        unproved: why no block formula stands for the blocks, which then run as they are and cannot
            be folded; None when they are proved to be their formulas.
    """

    module: nn.Module
    shape: Any
    num_prefix_tokens: int
    unproved: str | None = None

    @abstractmethod
    def examine(self) -> None:
        """Prove all blocks, or leave in `unproved` why there is nothing to prove."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in order."""

    @property
    def folded(self) -> dict[str, nn.Module]:
        """All modules that a plan is made of, and what to call them."""
        return {f"blocks.{i}": block for i, block in enumerate(self.blocks)}

    @property
    def mergings(self) -> dict[int, nn.Module]:
        """What stands between two stages, by the block behind it."""
        return {}

    def read_merging(self, index: int) -> Merging:
        """Neutral weights of the merging before block `index`; raises as `read_block`."""
        raise KeyError(index)

    @property
    @abstractmethod
    def reads_class_only(self) -> bool:
        """Whether only row 0 of the last block's output reaches the head, or a hook on the way."""

    @property
    @abstractmethod
    def readout_parts(self) -> list[Any]:
        """What `reads_class_only` follows from: the same objects, the same answer."""

    @property
    def like(self) -> Tensor:
        """A frozen weight: the device and dtype of all of them."""
        return next(self.blocks[0].parameters())

    @abstractmethod
    def read_block(self, index: int) -> BlockWeights:
        """Neutral weights of one block; raises UnsupportedBackbone naming what does not fit."""

    def prove_blocks(self) -> None:
        """Raise UnsupportedBackbone unless every block can be read and computes its formula, as far
        as the prefix and four rows of two images tell.
        """
        for i, block in enumerate(self.blocks):
            with evaluating(block):
                _prove(self, i, 2, self.num_prefix_tokens + 4)

    def prove_lengths(self, lengths: Sequence[int]) -> None:
        """Raise UnsupportedBackbone unless every block, in the mode it is in, computes its formula
        on sequences of its length, to within what fp64 leaves of a difference.
        """
        if len(self.blocks) != len(lengths):
            raise UnsupportedBackbone(
                f"the backbone has {len(self.blocks)} blocks, and the prompts were made for "
                f"{len(lengths)}: build a new model"
            )
        for i, rows in enumerate(lengths):
            _prove(self, i, 1, rows, torch.float64)

    def geometry(self, size: tuple[int, int]) -> list[Geometry]:
        """What each block is given beside the rows of images of this size."""
        return [NO_GEOMETRY] * len(self.blocks)

    def block_arguments(self, geometry: Geometry, rows: int) -> dict[str, Any]:
        """Keyword arguments of a block's own forward on so many rows, with `geometry` for the last
        of them.
        """
        return {}

    def proof(self, index: int, rows: int) -> tuple[int, Geometry]:
        """On how many rows, about as many as that, the block is compared with its formula, and what
        it is given then: any angles.
        """
        weights = self.read_block(index)
        if not weights.rotation:
            return rows, NO_GEOMETRY
        width = weights.proj.weight.shape[1] // weights.num_heads
        angles = random_rows(rows - self.num_prefix_tokens, width // 2)
        return rows, Geometry(torch.stack([angles.sin(), angles.cos()]))

    def as_given(self, rows: Tensor, geometry: Geometry) -> Tensor:
        """Rows (B, N, D) as a block's own forward takes them."""
        return rows

    def formula(self, weights: BlockWeights, x: Tensor, geometry: Geometry) -> Tensor:
        """A block in plain PyTorch, unfolded."""
        return apply_block(weights, x, geometry)

    def require_formula(self, index: int) -> None:
        """Raise UnsupportedBackbone where the formula does not stand for a block: nobody could
        prove it, or a part of the block does more.
        """
        for name, part in self.blocks[index].named_modules():
            if added := added_to(part):
                raise UnsupportedBackbone(
                    f"blocks.{index}.{name}".rstrip(".") + f" has {added}, which cannot be run "
                    "where the block's formula stands for it; remove it"
                )
        if self.unproved is not None:
            raise UnsupportedBackbone(f"prompts need the block's formula here: {self.unproved}")


class BackboneView(BlocksView):
    """What pae reads of a frozen backbone: its stem, its blocks, its readout.

    Attributes:
        module: the backbone.
        shape: its sizes.
        num_prefix_tokens: class and register tokens, which stand first in the sequence.
        other_head: name of a second head, with other features than the first's; None without one.
        unproved: why no block formula stands for the blocks, which then run as they are and cannot
            be folded; None when they are proved to be their formulas.
        head_name: dotted name of the module between readout and logits; None: there is no place
            for one.
        frames: T of a backbone that reads clips (B, T, C, H, W) of as many frames, where others
            read images (B, C, H, W); None there.
    """

    frames: int | None = None
    module: nn.Module
    shape: BackboneShape
    num_prefix_tokens: int
    other_head: str | None = None
    _known: tuple[Any, list[Geometry], list[Tensor]] | None = None
    _examining = False
    unproved: str | None = None
    head_name: str | None = "head"

    @property
    def stem_norm(self) -> nn.Module | None:
        """What `embed` does last, to every row by itself: the norm in front of the first block, or
        None where there is none.
        """
        return None

    @property
    def class_token(self) -> Tensor | None:
        """The parameter that row 0 is made of, where there is one."""
        return None

    @property
    def head(self) -> nn.Module | None:
        """What maps the readout to logits; an identity, or None, where nothing does."""
        return None if self.head_name is None else self.module.get_submodule(self.head_name)

    def require_one_width(self, what: str) -> None:
        """Raise UnsupportedBackbone where stages of several widths leave `what` undefined."""
        if self.shape.widths:
            raise UnsupportedBackbone(
                f"{what} needs blocks of one width, and {type(self.module).__name__} has stages of "
                "several: it is not defined there"
            )

    def take_head(self) -> None:
        """Leave an identity in the head's place."""
        if self.head_name is not None:
            self.module.set_submodule(self.head_name, nn.Identity())

    @property
    def feature_width(self) -> int:
        """Of the readout, F."""
        return getattr(self.module, "head_hidden_size", self.shape.width)

    def own_output(self, images: Tensor) -> Tensor:
        """Logits of the backbone's own forward; the features where it has no head."""
        return self.module(images)

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
    def image_size(self) -> tuple[int, int] | None:
        """The one size of images that the stem takes; None when it takes more."""

    @property
    def default_size(self) -> tuple[int, int]:
        """The size of images that the stem is built for."""
        rows, columns = (n * p for n, p in zip(self.shape.grid[-2:], self.shape.patch_size[-2:]))
        return self.image_size or (rows, columns)

    @property
    @abstractmethod
    def pads_images(self) -> bool:
        """Whether the stem takes images whose sides the patch does not divide."""

    def examine(self) -> None:
        """Prove all blocks, or leave in `unproved` why there is nothing to prove, when they run as
        they are on longer sequences.

        Raises:
            UnsupportedBackbone: they do not, or something else than the blocks stands between stem
                and readout.
        """
        self.unproved, self._examining = None, True  # before anybody has frozen anything
        try:
            self.prove_blocks()
        except UnsupportedBackbone as error:
            self.unproved = str(error)
            run_as_it_is(self)
        finally:
            self._examining = False

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

    def _remembered(
        self,
        size: Any,
        tensors: Iterable[tuple[str, Tensor]],
        make: Callable[[Any], list[Geometry]],
    ) -> list[Geometry]:
        """What `make` gives of a size and these named tensors, the same list while they are the
        same.

        Raises:
            UnsupportedBackbone: one of them requires a gradient, which would not reach it.
        """
        seen: tuple[Any, ...] = size, self.like.device, self.like.dtype
        held = []  # they keep the storage: no later tensor can lie at the same address
        for name, t in tensors:
            if t.requires_grad and not self._examining:
                raise UnsupportedBackbone(
                    f"{name}, positions that blocks are given, requires a gradient and is a "
                    "constant here: call requires_grad_(False)"
                )
            seen += (t.data_ptr(), t._version)
            held.append(t.detach())
        known = self._known  # another thread may put its own there at any time
        if known is None or known[0] != seen:
            known = self._known = seen, make(size), held
        return known[1]

    def enter(self, index: int, x: Tensor, geometry: Sequence[Geometry]) -> Tensor:
        """Rows (B, P + N, D) that leave block `index` - 1, as they enter block `index`: merged
        where a stage begins.
        """
        return x

    def run_block(
        self,
        index: int,
        x: Tensor,
        geometry: Geometry = NO_GEOMETRY,
        kv: Tensor | None = None,
        bypass: Bypass | None = None,
    ) -> Tensor:
        """The block's own forward on rows (B, N, D). Its formula with `kv` (P, 2, H, d) or
        (B, P, 2, H, d), keys and values in addition that stand as they are before attention; with
        `bypass`, what becomes of attention's rows; and where the block has a bias for another
        number of rows.

        Raises:
            UnsupportedBackbone: the block is not its formula where that is needed, or a part of it
                has a hook or a replaced forward, which the formula does not run.
        """
        block = self.blocks[index]
        as_it_is = kv is None and bypass is None
        if as_it_is and (geometry.bias is None or geometry.bias.shape[-1] == x.shape[1]):
            return _output(block(x, **self.block_arguments(geometry, x.shape[1])))
        self.require_formula(index)
        return apply_block(self.read_block(index), x, geometry, kv, bypass)

    @torch.no_grad()
    def class_attention(
        self, index: int, x: Tensor, geometry: Geometry = NO_GEOMETRY, kv: Tensor | None = None
    ) -> Tensor:
        """(B, H, N): attention of row 0 on every row in that forward, in at least fp32."""
        weights = self.read_block(index)
        q, k, _ = heads_of(weights, x, geometry, kv)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(k.dtype, torch.float32)
            scores = exact_matmul(weights.scale * q[:, :, :1].to(wide), k.to(wide).mT)
            bias = geometry.bias_of(q.shape[2], k.shape[2] - q.shape[2])
            scores = scores if bias is None else scores + bias[:, :1]
            return scores.softmax(-1)[:, :, 0, -x.shape[1] :]

    def class_query(self, index: int, x: Tensor) -> Tensor:
        """(B, H d): the query projection of row 0, before any per-head norm."""
        weights = self.read_block(index)
        return weights.qkv(_maybe(weights.norm1, x[:, :1]))[:, 0].chunk(3, dim=-1)[0]

    @abstractmethod
    def readout(self, x: Tensor) -> Tensor:
        """(B, N, D) rows after the last block to the features that enter the head, (B, F).

        When `reads_class_only`, (B, 1, D) with the class row alone gives the same.
        """

    def random_images(self, batch: int, size: tuple[int, int]) -> Tensor:
        """A batch as the stem takes it, of normal numbers."""
        frames = () if self.frames is None else (self.frames,)
        return random_rows(batch, *frames, self.shape.in_chans, *size).to(self.like)

    def check_images(self, images: Tensor) -> None:
        """Raise unless `images` is a finite float (B, C, H, W) batch of a size this backbone takes,
        or (B, T, C, H, W) where it takes clips.

        On a GPU the values are not looked at: asking for them would stall the stream.
        """
        frames = self.frames
        rank, layout = (4, "(B, C, H, W)") if frames is None else (5, "(B, T, C, H, W)")
        if not isinstance(images, Tensor) or images.dim() != rank or not images.is_floating_point():
            what = (
                f"{tuple(images.shape)} {images.dtype}"
                if isinstance(images, Tensor)
                else type(images)
            )
            raise ValueError(f"images must be a float tensor {layout}, got {what}")
        if images.shape[-3] != self.shape.in_chans:
            of = "" if frames is None else f" in clips {layout}"
            raise ValueError(
                f"images must have {self.shape.in_chans} channels{of}, got {images.shape[-3]}"
            )
        if frames is not None and images.shape[1] != frames:
            raise ValueError(
                f"images must be clips of {frames} frames, got {images.shape[1]} (take as many, or "
                "build the backbone with num_frames=... for another number)"
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


_View = TypeVar("_View", bound=BackboneView)


def examined(view: _View) -> _View:
    """`view`, after `examine`, with a warning when its blocks run as they are."""
    view.examine()
    if view.unproved is not None:
        warnings.warn(
            f'{type(view.module).__name__} runs as it is (engine="reference") and fast_forward '
            f"refuses it: {view.unproved}",
            stacklevel=5,  # who builds the model
        )
    return view


def apply_block(
    weights: BlockWeights,
    x: Tensor,
    geometry: Geometry = NO_GEOMETRY,
    kv: Tensor | None = None,
    bypass: Bypass | None = None,
) -> Tensor:
    """The formula of `BlockWeights`, unfolded, in plain PyTorch; `kv`, `bypass` as in
    `run_block`.
    """
    w = weights
    q, k, v = heads_of(w, x, geometry, kv)
    bias = geometry.bias_of(q.shape[2], k.shape[2] - q.shape[2])
    bias = None if bias is None else bias[None].to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=w.scale)
    return behind_attention(w, x, out.transpose(1, 2).flatten(2), bypass)


def behind_attention(
    w: BlockWeights, x: Tensor, out: Tensor, bypass: Bypass | None = None
) -> Tensor:
    """That formula from attention's output (B, N, H d) on."""

    def scaled(gamma: Tensor | None, rows: Tensor) -> Tensor:
        return rows if gamma is None else rows * gamma

    out = _maybe(w.attn_norm, out)
    out = out if w.difference is None else w.difference(out, w.num_heads)
    added = scaled(w.scale1, w.proj(out))
    added = added if bypass is None else bypass(_maybe(w.norm1, x), added)
    entered, x = x, x + _maybe(w.post1, added)
    before = _maybe(w.norm1, entered) if w.parallel else _maybe(w.norm2, x)
    hidden = w.fc1(_maybe(w.mlp_pre, before))
    act = ACTIVATIONS[w.activation]
    if w.gated:
        gate, up = hidden.chunk(2, dim=-1)
        hidden = act(gate) * up
    else:
        hidden = act(hidden)
    return x + _maybe(w.post2, scaled(w.scale2, w.fc2(_maybe(w.mlp_norm, hidden))))


def _maybe(norm: Norm | None, rows: Tensor) -> Tensor:
    return rows if norm is None else norm(rows)


def heads_of(
    w: BlockWeights, x: Tensor, geometry: Geometry = NO_GEOMETRY, kv: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, N, d), keys and values (B, H, P + N, d) of rows x (B, N, D), unscaled."""
    qkv = w.qkv(_maybe(w.norm1, x)).view(*x.shape[:2], 3, w.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q = q if w.q_norm is None else w.q_norm(q)
    k = k if w.k_norm is None else w.k_norm(k)
    if geometry.rotation is not None:
        q, k = (rotated(rows, geometry.rotation, w.rotation) for rows in (q, k))
    if kv is not None:
        kv = kv.to(v.dtype).expand(len(x), *kv.shape[-4:]).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([kv[0], k.to(v.dtype)], dim=2), torch.cat([kv[1], v], dim=2)
    return q.to(v.dtype), k.to(v.dtype), v


def rotated(rows: Tensor, rotation: Tensor, layout: str) -> Tensor:
    """Rows (B, H, N, d), of which the last n are turned as `Geometry` and `BlockWeights` say."""
    sin, cos = rotation
    still, turned = rows.tensor_split([rows.shape[2] - sin.shape[-2]], dim=2)
    half = layout == "half"
    a, b = turned.chunk(2, dim=-1) if half else turned.unflatten(-1, (-1, 2)).unbind(-1)
    pair = a * cos - b * sin, b * cos + a * sin
    turned = torch.cat(pair, dim=-1) if half else torch.stack(pair, dim=-1).flatten(-2)
    return torch.cat([still, turned.to(rows.dtype)], dim=2)


def random_rows(*size: int) -> Tensor:
    """The same on every device and whatever the default device is, a CPU's."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(*size, generator=generator, device="cpu")


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """`value` with every tensor in it so: a tensor, a dataclass of this file, a tuple, or none."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    if isinstance(value, tuple):
        return tuple(_moved(v, device, dtype) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: _moved(getattr(value, f.name), device, dtype) for f in fields(value)}
        return replace(value, **named)
    return value


def _output(made: Any) -> Tensor:
    """The rows that a block returns, alone or as the first of several things."""
    return made[0] if isinstance(made, tuple) else made


def _check_order(
    block: nn.Module, weights: BlockWeights, name: str, call: Callable[[], Any]
) -> None:
    """Raise unless `call` runs the block's norms where its formula has them."""
    order: list[nn.Module] = []
    parts = list(block.modules())
    owners = {id(t): part for part in parts for t in part.parameters(recurse=False)}
    handles = [part.register_forward_pre_hook(lambda part, _: order.append(part)) for part in parts]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    w = weights
    expected = (w.norm1, w.proj, w.post1, w.norm2, w.fc2, w.post2)
    weights_of = [part.weight for part in expected if part is not None]
    called = [owners[id(t)] for t in weights_of if id(t) in owners]
    seen = [order.index(part) for part in called if part in order]
    if seen != sorted(seen):
        raise UnsupportedBackbone(f"{name} runs its norms in another order than in front")


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Without a gradient and without autocast, fp32 products exact."""
    with torch.no_grad(), exact_products:
        if device.type == "meta":
            yield
        else:
            with torch.autocast(device.type, enabled=False):
                yield


def run_as_it_is(view: BackboneView) -> None:
    """Raise unless stem, blocks and readout are the backbone, and prompts can stand in its blocks,
    which run every image of a batch by itself.

    Raises:
        UnsupportedBackbone: with what `view.unproved` says first.
    """
    size, prompts = view.default_size, 3
    with evaluating(view.module), plainly(view.like.device):
        try:
            images = view.random_images(2, size)
            expected, x, own = view.own_output(images), view.embed(images), view.geometry(size)
            for i in range(len(view.blocks)):
                x, at = view.enter(i, x, own), view.num_prefix_tokens
                longer = torch.cat([x[:, :at], x[:, -prompts:], x[:, at:]], dim=1)
                both, alone = (view.run_block(i, rows, own[i]) for rows in (longer, longer[:1]))
                if both.shape != longer.shape:
                    raise ValueError(f"blocks.{i} gives rows of another shape")
                if not is_near(both[:1], alone):
                    raise ValueError(f"blocks.{i} mixes the images of a batch")
                x = view.run_block(i, x, own[i])
            head, got = view.head, view.readout(x)
            got = got if head is None else head(got)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise UnsupportedBackbone(
                f"{view.unproved}; nor do the blocks run as they are with prompts: {reason}"
            ) from error
    if not is_near(got, expected):
        raise UnsupportedBackbone(
            f"{view.unproved}; and the backbone is more than a stem, blocks and a readout"
        )


def is_near(got: Tensor, expected: Tensor) -> bool:
    """Whether they differ by no more than rounding; of shapes alone nothing can be said."""
    near = 64 * torch.finfo(expected.dtype).eps
    return expected.device.type == "meta" or bool((got - expected).norm() <= near * expected.norm())


def _prove(
    view: BlocksView, index: int, batch: int, count: int, dtype: torch.dtype | None = None
) -> None:
    """Run a block and its formula on the same (batch, count) rows; raise when they differ by more
    than rounding. `dtype`: to compute in; that of the weights, 32 bits at least, when None.

    On the meta device there are no values: what is proved is the order of its parts.
    """
    block, weights, name = view.blocks[index], view.read_block(index), f"blocks.{index}"
    name = f"{name} ({type(block).__name__})"
    like = view.like
    if count == 0:
        return
    count, geometry = view.proof(index, count)
    # in 16 bits rounding of the rows can hide or fake a difference in a small update
    dtype = torch.promote_types(like.dtype, torch.float32) if dtype is None else dtype
    tensors = chain(block.named_parameters(), block.named_buffers())
    own = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors}
    rows = random_rows(batch, count, view.shape.block_widths[index]).to(like.device, dtype)
    geometry = _moved(geometry, like.device, dtype)
    try:
        with plainly(like.device):
            got = view.formula(_moved(weights, like.device, dtype), rows, geometry)
            given = (view.as_given(rows, geometry),), view.block_arguments(geometry, count)
            call = partial(functional_call, block, own, *given)
            expected = _output(call()).reshape(rows.shape)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedBackbone(f"{name} cannot be run on {count} rows alone: {error}") from error
    if like.device.type == "meta":
        with plainly(like.device):
            _check_order(block, weights, name, call)
        return
    difference = (got - expected).norm() / (expected - rows).norm().clamp_min(1e-20)
    most = 1e-6 if dtype == torch.float64 else 1e-3
    if not difference <= most and torch.isfinite(expected).all():
        raise UnsupportedBackbone(
            f"{name} computes something else than pre-norm attention and MLP: {difference:.1e} "
            f"relative difference on {count} random rows"
        )
