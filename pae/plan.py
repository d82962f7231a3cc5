"""FrozenPlan: the backbone's weights, folded once, and known to be those of the backbone.

Folds, all computed in fp64 and rounded once to the compute dtype:
    LayerNorm's scale and shift  -> the product behind it
    the logit scale              -> W_q (or q_norm's affine)
    LayerScale                   -> the projection before it
so that between two products only a plain normalisation, the softmax and the activation remain.

What of the backbone is trained (biases, the norms' own parameters) is left out of the constants,
and put in anew for every step (`FrozenPlan.now`); a matrix is folded but for a trained scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.modules.module as torch_modules
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

from pae_kernels.checks import transform
from pae_kernels.precision import exact_matmul

from .backbones.view import (
    HOOKS,
    NO_GEOMETRY,
    UNTRAINED,
    BlocksView,
    BlockWeights,
    Geometry,
    Linear,
    Merging,
    Norm,
    Stacked,
    Summed,
    added_to,
)
from .backbones.windows import Windows
from .errors import UnsupportedBackbone
from .packs import Packs

Made = TypeVar("Made")


class PlainNorm(NamedTuple):
    """A norm whose affine part is folded away: (x - mean) / sqrt(var + eps), or
    x / sqrt(mean(x^2) + eps) when rms.
    """

    eps: float
    rms: bool = False


@dataclass(frozen=True)
class HeadNorm:
    """A plain norm and an affine part that no product takes: weight and bias (d,)."""

    weight: Tensor
    bias: Tensor
    plain: PlainNorm


@dataclass(frozen=True)
class BlockPlan:
    """Folded constants of one block, all in the compute dtype but for q_norm and k_norm, whose rows
    are rounded once, behind them and the rotation: those are in at least fp32.

    w_qkv (3 H d, D), w_proj (D, H d), w_fc1 (F or 2 F, D), w_fc2 (D, F) and their biases act on
    normalised rows; logits need no further scale: `scale` is in w_qkv, or in q_norm where there is
    one. norm_out and norm_hidden stand in front of w_proj and w_fc2 in some backbones, and between
    norm2 and w_fc1 another norm, with norm2's affine before it (affine2, of width D). post1 and
    post2 (of width D) normalise what w_proj and w_fc2 give, mostly instead of norm1 and norm2.
    gated: the first half of w_fc1's rows goes through the activation and multiplies the other half.
    parallel: w_fc1 reads the rows that w_qkv reads, and there is no norm2. difference: (), in at
    least fp32, how much of the second of two softmaxes is taken from the first; a head of the
    result is four heads here, two halves of each, and norm_out is over each of these.

    bias: what is added to the logits, by the places of rows in the image, or None. windows: what
    stands instead where the block looks into windows. Some of their rows may be padding, which has
    `fill` (3 H d,) for its query, key and value: padding (m,) counts them from the last row back.
    rotation: (2, n, d/2) or (2, H, n, d/2), sine and cosine in at least fp32, of the images' size:
    queries and keys of the last n rows are turned, entry i of a head with i + d/2. order: (d,) the
    place in the backbone's heads of each entry of a query or key here, where it is another.

    causal: a row sees no row behind it.

    gain1 and gain2 (D,), in at least fp32: trained scales of the two norms, by which normalised
    rows are multiplied before w_qkv and w_fc1; None where they are in the weight. trained: names of
    those of its vectors that have a gradient ("b_fc1", "gain1", "q_norm.weight", ...). given1: the
    first norm as the backbone has it, its parameters themselves, for who reads rows behind it.

    packs: copies of the weights in another order, which products then read, or None.
    """

    num_heads: int
    head_width: int
    scale: float
    norm1: PlainNorm | None
    w_qkv: Tensor
    b_qkv: Tensor
    q_norm: HeadNorm | None
    k_norm: HeadNorm | None
    w_proj: Tensor
    b_proj: Tensor
    norm2: PlainNorm | None
    w_fc1: Tensor
    b_fc1: Tensor
    activation: str
    w_fc2: Tensor
    b_fc2: Tensor
    gated: bool = False
    parallel: bool = False
    difference: Tensor | None = None
    norm_out: PlainNorm | None = None
    norm_hidden: PlainNorm | None = None
    affine2: HeadNorm | None = None
    post1: HeadNorm | None = None
    post2: HeadNorm | None = None
    rotation: Tensor | None = None
    bias: Geometry | None = None
    order: Tensor | None = None
    gain1: Tensor | None = None
    gain2: Tensor | None = None
    trained: tuple[str, ...] = ()
    windows: Windows | None = None
    padding: Tensor | None = None
    fill: Tensor | None = None
    causal: bool = False
    given1: Norm | None = None
    packs: Packs | None = None

    def product(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of "qkv", "proj", "fc1" or "fc2"."""
        return getattr(self, f"w_{name}"), getattr(self, f"b_{name}")

    def vectors(self) -> list[Tensor]:
        """The trained ones, in the order of `trained`."""
        return [attrgetter(name)(self) for name in self.trained]

    @property
    def absorbs_keys(self) -> bool:
        """Whether a logit is a row times one matrix times a row, but for what their places add."""
        same = self.rotation is None and self.windows is None
        return self.q_norm is None and self.k_norm is None and same

    def asks_apart(self, rows: int) -> bool:
        """Whether row 0 of so many may have a query where no other row has one: nothing is trained,
        and it is none of the rotated rows.
        """
        turned = 0 if self.rotation is None else self.rotation.shape[-2]
        return self.windows is None and not self.trained and turned < rows

    @property
    def keys_are_linear(self) -> bool:
        """Whether a logit is a row times one matrix times a row, whichever rows they are."""
        return self.absorbs_keys and self.bias is None

    @property
    def w_kv(self) -> Tensor:
        """(2 H d, D): key and value rows of w_qkv."""
        return self.w_qkv[self.num_heads * self.head_width :]

    @property
    def b_kv(self) -> Tensor:
        """(2 H d,): key and value part of b_qkv."""
        return self.b_qkv[self.num_heads * self.head_width :]


@dataclass(frozen=True)
class MergingPlan:
    """Folded constants of what stands between two stages: weight (out, 4 C) and bias (out,) act on
    normalised rows. own: its weights unfolded, where one of them is trained and not folded.
    """

    norm: PlainNorm
    weight: Tensor
    bias: Tensor
    own: Merging | None = None


@dataclass(frozen=True)
class FrozenPlan:
    """All blocks of a backbone, folded for one device and compute dtype.

    w_qkv and b_qkv of the blocks are views of the stacked tensors here, so that the prompt keys and
    values of many blocks are one batched product; (0,) where the blocks have several widths.
    mergings: what stands between two stages, by the block behind it. packs: those of the blocks,
    which read them where the plan is `packed`. class_only: of the last
    block's rows only the class row is read. trained: the vectors that `now` puts in; without them,
    all is constant.
    """

    dtype: torch.dtype
    blocks: list[BlockPlan]
    w_qkv: Tensor
    b_qkv: Tensor
    class_only: bool
    trained: TrainedVectors | None = None
    mergings: Mapping[int, MergingPlan] = field(default_factory=dict)
    packs: Sequence[Packs] = ()

    def now(self) -> FrozenPlan:
        """With the trained vectors as they are, and on the tape of autograd; itself without any."""
        if self.trained is None:
            return self
        blocks = list(self.blocks)
        for i, vectors in self.trained.now(self.dtype).items():
            blocks[i] = _with(blocks[i], vectors)
        b_qkv = self.b_qkv
        if b_qkv.numel():  # else the blocks have several widths
            b_qkv = torch.stack([block.b_qkv for block in blocks])
        return replace(self, blocks=blocks, b_qkv=b_qkv, trained=None)

    def placed(self, geometry: list[Geometry]) -> FrozenPlan:
        """With what each block is given beside its rows."""
        wide = torch.promote_types(self.dtype, torch.float32)
        blocks = []
        for block, g in zip(self.blocks, geometry):
            if isinstance(g, Windows):
                mask = None if g.mask is None else g.mask.to(wide)
                empty = (g.places.flatten().flip(0) < 0).nonzero()[:, 0]
                padding = -1 - empty.to(block.w_qkv.device) if len(empty) else None
                windows = replace(g, bias=cast(Tensor, g.bias).to(wide), mask=mask)
                blocks.append(replace(block, windows=windows, padding=padding))
                continue
            rotation = None if g.rotation is None else g.rotation.to(wide)
            bias = None if g.bias is None else replace(g, bias=g.bias.to(wide))
            blocks.append(replace(block, rotation=rotation, bias=bias, causal=g.causal))
        return replace(self, blocks=blocks)

    def packed(self) -> FrozenPlan:
        """With weights that are packed at first use, and kept as long as this plan's blocks are."""
        blocks = [replace(b, packs=own) for b, own in zip(self.blocks, self.packs)]
        return replace(self, blocks=blocks)

    def only(self, start: int, stop: int) -> FrozenPlan:
        """The plan of blocks start to stop - 1."""
        part = slice(start, stop)
        folded = self.blocks[part], self.w_qkv[part], self.b_qkv[part]
        return FrozenPlan(self.dtype, *folded, class_only=False, packs=self.packs[part])


@dataclass(frozen=True)
class TrainedVector:
    """A vector of one block of which a part is trained: base + after (own + weight shift).

    Attributes:
        block, name: where it belongs, as in `BlockPlan.trained`.
        base, after: (n,) fp64, what frozen parts give, and what follows (LayerScale, logit scale).
        own: (n,) a trained parameter, or `Stacked` whose biases are; or None.
        weight, shift: (n, m) frozen and (m,) trained, a norm's shift before a product; or None.
        order: (n,) where the entries stand in the parameter, when it is another order.
    """

    block: int
    name: str
    base: Tensor
    after: Tensor
    own: Tensor | Stacked | None
    weight: Tensor | None = None
    shift: Tensor | None = None
    order: Tensor | None = None

    def varying(self) -> Tensor:
        """own + weight shift, on the tape of autograd."""
        found = self.own.bias if isinstance(self.own, Stacked) else self.own
        if self.weight is not None and self.shift is not None:
            shifted = exact_matmul(self.weight, self.shift[:, None])[:, 0]
            found = shifted if found is None else found + shifted
        assert found is not None
        return found if self.order is None else found[self.order]


class TrainedVectors:
    """All of a backbone, end to end in one vector: a few operations for all blocks."""

    def __init__(self, vectors: list[TrainedVector]) -> None:
        self._vectors = vectors
        self._sizes = [len(v.base) for v in vectors]
        wide = torch.promote_types(vectors[0].varying().dtype, torch.float32)
        self._base = torch.cat([v.base for v in vectors]).to(wide)
        self._after = torch.cat([v.after for v in vectors]).to(wide)

    def now(self, dtype: torch.dtype) -> dict[int, dict[str, Tensor]]:
        """{block: {name: vector}}: gains in at least fp32, all others in `dtype`."""
        wide = self._base + self._after * torch.cat([v.varying() for v in self._vectors])
        parts = wide.split(self._sizes), wide.to(dtype).split(self._sizes)
        found: dict[int, dict[str, Tensor]] = {}
        for v, exact, narrow in zip(self._vectors, *parts):
            is_gain = v.name.startswith("gain")
            found.setdefault(v.block, {})[v.name] = exact if is_gain else narrow
        return found


def _with(block: BlockPlan, vectors: dict[str, Tensor]) -> BlockPlan:
    """`block` with these as its trained vectors."""
    fields: dict[str, Any] = {}
    for name, vector in vectors.items():
        field, _, part = name.partition(".")
        if part:
            vector = replace(fields.get(field, getattr(block, field)), **{part: vector})
        fields[field] = vector
    return replace(block, **fields, trained=tuple(vectors))


@torch.inference_mode(False)
@torch.no_grad()
def fold(view: BlocksView, dtype: torch.dtype, settled: bool = True) -> FrozenPlan:
    """Fold every block of `view` for products in `dtype`.

    Normal tensors even under inference mode: a plan built during evaluation also serves training.

    Args:
        settled: what is trained is folded too, as it is now; otherwise it is left to
            `FrozenPlan.now`.
    """
    given = weights = [view.read_block(i) for i in range(len(view.blocks))]
    trained = None
    if not settled:
        weights = [_without_trained(w) for w in given]
        vectors = [v for i, w in enumerate(given) for v in _trained_vectors(i, w, weights[i])]
        if view.shape.widths:
            vectors += [v for i, w in enumerate(given) for v in _trained_fill(i, w, weights[i])]
        trained = TrainedVectors(vectors) if vectors else None
    qkv = [_fold_qkv(w) for w in weights]
    w_each, b_each = [w.to(dtype) for w, _ in qkv], [b.to(dtype) for _, b in qkv]
    w_qkv = b_qkv = w_each[0].new_empty(0)
    if len({w.shape for w in w_each}) == 1:
        w_qkv, b_qkv = torch.stack(w_each), torch.stack(b_each)
        w_each, b_each = list(w_qkv), list(b_qkv)
    blocks = [_fold_block(*parts, dtype) for parts in zip(weights, w_each, b_each)]
    blocks = [replace(block, given1=own.norm1) for block, own in zip(blocks, given)]
    if view.shape.widths:
        blocks = [replace(b, fill=_fill(w).to(dtype)) for w, b in zip(weights, blocks)]
    mergings = {i: _fold_merging(view.read_merging(i), dtype, settled) for i in view.mergings}
    packs = [Packs() for _ in blocks]
    only = view.reads_class_only
    return FrozenPlan(dtype, blocks, w_qkv, b_qkv, only, trained, mergings, packs)


def _fill(w: BlockWeights) -> Tensor:
    """(3 H d,): what becomes of a row of zeros behind the norm."""
    fill = _behind_norm(None, w.qkv)[1]
    fill[: len(fill) // 3] *= w.scale
    return fill


def _trained_fill(block: int, w: BlockWeights, fixed: BlockWeights) -> list[TrainedVector]:
    """Of a block whose `fill` is trained: with the bias, and with no shift of a norm."""
    own, base = _trained_bias(w.qkv), _fill(fixed)
    after = torch.ones_like(base)
    after[: len(after) // 3] = w.scale
    return [] if own is None else [TrainedVector(block, "fill", base, after, own)]


def _fold_merging(merging: Merging, dtype: torch.dtype, settled: bool) -> MergingPlan:
    weight, bias = _behind_norm(merging.norm, merging.reduction)
    live = not settled and any(_trained(t) is not None for t in merging.trainable())
    own = merging if live else None
    return MergingPlan(_plain(merging.norm), weight.to(dtype), bias.to(dtype), own)


def _trained(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is not None and tensor.requires_grad else None


def _without_trained(w: BlockWeights) -> BlockWeights:
    """What is left when trained shifts are 0 and trained scales 1."""

    def frozen(tensor: Tensor | None) -> Tensor | None:
        return None if _trained(tensor) is not None else tensor

    def left(part: Any) -> Any:
        if isinstance(part, Norm):
            return replace(part, weight=frozen(part.weight), bias=frozen(part.bias))
        if isinstance(part, Linear):
            return Linear(part.weight, frozen(part.bias))
        if isinstance(part, Stacked):
            return Stacked(tuple(map(left, part.parts)))
        return part

    return replace(w, **{f.name: left(getattr(w, f.name)) for f in fields(w)})


def _trained_bias(product: Linear | Stacked | Summed) -> Tensor | Stacked | None:
    """What of its bias is trained."""
    if isinstance(product, Linear):
        return _trained(product.bias)
    if isinstance(product, Summed):  # whose parts may train nothing
        return None
    parts = [Linear(part.weight.detach(), _trained(part.bias)) for part in product.parts]
    return None if all(part.bias is None for part in parts) else Stacked(tuple(parts))


def _trained_vectors(block: int, w: BlockWeights, fixed: BlockWeights) -> list[TrainedVector]:
    """Those of a block; `fixed` is `_without_trained` of it."""
    ones = partial(torch.ones, dtype=torch.float64, device=w.proj.weight.device)
    found = []

    def product(
        name: str,
        linear: Linear | Stacked | Summed,
        norm: Norm | None,
        base: Tensor,
        after: Tensor,
        order: Tensor | None = None,
    ) -> None:
        shift = None if norm is None else _trained(norm.bias)
        own, weight = _trained_bias(linear), None if shift is None else linear.weight.detach()
        if own is not None or shift is not None:
            found.append(TrainedVector(block, name, base, after, own, weight, shift, order))

    def scale(
        name: str, own: Tensor | None, after: float = 1.0, order: Tensor | None = None
    ) -> None:
        if _trained(own) is not None:
            one = ones(len(cast(Tensor, own)))
            found.append(TrainedVector(block, name, 0 * one, after * one, own, order=order))

    after = ones(3 * w.num_heads * w.head_width)
    if w.q_norm is None:
        after[: len(after) // 3] = w.scale
    scale("gain1", None if w.norm1 is None else w.norm1.weight)
    product("b_qkv", w.qkv, w.norm1, _fold_qkv(fixed)[1], after, _order_of_qkv(w))
    between = None if w.mlp_pre is None else w.norm2
    for name, norm, by, order in (
        ("q_norm", w.q_norm, w.scale, _order(w)),
        ("k_norm", w.k_norm, 1.0, _order(w)),
        *(("affine2", between, 1.0, None), ("post1", w.post1, 1.0, None)),
        ("post2", w.post2, 1.0, None),
    ):
        if norm is not None:
            scale(f"{name}.weight", norm.weight, by, order)
            scale(f"{name}.bias", norm.bias, by, order)
    for name, linear, norm, gamma in (
        ("proj", w.proj, _before_proj(w), w.scale1),
        ("fc2", w.fc2, w.mlp_norm, w.scale2),
    ):
        after = ones(len(linear.weight)) if gamma is None else gamma.detach().double()
        product(f"b_{name}", linear, norm, _fold_second(fixed, name)[1], after)
    before, of_fixed = _before_fc1(w), _before_fc1(fixed)
    if w.mlp_pre is None and not w.parallel:
        scale("gain2", None if w.norm2 is None else w.norm2.weight)
    base = _behind_norm(of_fixed, fixed.fc1)[1]
    product("b_fc1", w.fc1, before, base, ones(len(base)))
    return found


def _order(w: BlockWeights) -> Tensor | None:
    """`BlockPlan.order`: what is turned as neighbours lies half a head apart here."""
    if w.rotation != "pairs":
        return None
    weight = w.proj.weight
    return (
        torch.arange(weight.shape[1] // w.num_heads, device=weight.device).view(-1, 2).T.flatten()
    )


def _order_of_qkv(w: BlockWeights) -> Tensor | None:
    """That of the packed projection's features."""
    order = _order(w)
    if order is None:
        return None
    features = torch.arange(3 * w.num_heads * w.head_width, device=order.device)
    q, k, v = features.view(3, w.num_heads, -1)
    return torch.cat([q[:, order], k[:, order], v]).flatten()


def _before_proj(w: BlockWeights) -> Norm | None:
    """The norm whose affine is folded into it."""
    if w.difference is None:
        return w.attn_norm
    norm, left = w.difference.norm, 1 - w.difference.start
    ones = torch.ones(2 * w.head_width, dtype=torch.float64, device=w.proj.weight.device)
    one_head = left * (ones if norm.weight is None else norm.weight.detach().double())
    return replace(norm, weight=one_head.repeat(w.num_heads // 4))


def _before_fc1(w: BlockWeights) -> Norm | None:
    return w.mlp_pre or (w.norm1 if w.parallel else w.norm2)


def _fold_second(w: BlockWeights, name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of "proj" or "fc2", between an inner norm and LayerScale."""
    first = name == "proj"
    norm, gamma = (_before_proj(w), w.scale1) if first else (w.mlp_norm, w.scale2)
    return _before_scale(*_behind_norm(norm, w.proj if first else w.fc2), gamma)


def _fold_qkv(w: BlockWeights) -> tuple[Tensor, Tensor]:
    weight, bias = _behind_norm(w.norm1, w.qkv)
    if w.q_norm is None:
        rows = weight.shape[0] // 3
        weight[:rows] *= w.scale
        bias[:rows] *= w.scale
    order = _order_of_qkv(w)
    return (weight, bias) if order is None else (weight[order], bias[order])


def _fold_block(w: BlockWeights, w_qkv: Tensor, b_qkv: Tensor, dtype: torch.dtype) -> BlockPlan:
    def rounded(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0].to(dtype).contiguous(), pair[1].to(dtype)

    w_proj, b_proj = rounded(_fold_second(w, "proj"))
    w_fc1, b_fc1 = rounded(_behind_norm(_before_fc1(w), w.fc1))
    w_fc2, b_fc2 = rounded(_fold_second(w, "fc2"))
    heads = b_qkv.view(3 * w.num_heads, -1)
    wide = heads.to(torch.promote_types(dtype, torch.float32))
    affine2: HeadNorm | None = None
    if w.norm2 is not None and w.mlp_pre is not None:
        affine2 = _unfolded(w.norm2, _plain(w.mlp_pre), w_fc1)
    return BlockPlan(
        num_heads=w.num_heads,
        head_width=heads.shape[1],
        scale=w.scale,
        norm1=_known(w.norm1, _plain),
        w_qkv=w_qkv,
        b_qkv=b_qkv,
        q_norm=_known(w.q_norm, lambda n: _unfolded(n, _plain(n), wide, w.scale, _order(w))),
        k_norm=_known(w.k_norm, lambda n: _unfolded(n, _plain(n), wide, 1.0, _order(w))),
        w_proj=w_proj,
        b_proj=b_proj,
        norm2=_known(w.norm2 or w.mlp_pre, _plain),
        w_fc1=w_fc1,
        b_fc1=b_fc1,
        activation=w.activation,
        w_fc2=w_fc2,
        b_fc2=b_fc2,
        gated=w.gated,
        parallel=w.parallel,
        difference=None if w.difference is None else _wide(w.difference.weight, dtype),
        norm_out=_known(_before_proj(w), _plain),
        norm_hidden=_known(w.mlp_norm, _plain),
        affine2=affine2,
        post1=_known(w.post1, lambda n: _unfolded(n, _plain(n), w_fc1)),
        post2=_known(w.post2, lambda n: _unfolded(n, _plain(n), w_fc1)),
        order=_order(w),
    )


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(torch.promote_types(dtype, torch.float32))


def _known(norm: Norm | None, make: Callable[[Norm], Made]) -> Made | None:
    return None if norm is None else make(norm)


def _plain(norm: Norm) -> PlainNorm:
    return PlainNorm(norm.eps, norm.kind == "rms")


def _behind_norm(norm: Norm | None, linear: Linear | Stacked | Summed) -> tuple[Tensor, Tensor]:
    """W (g * xhat + c) + b = (W g) xhat + (W c + b): new tensors."""
    weight, own = linear.weight.detach().to(torch.float64, copy=True), linear.bias
    bias = torch.zeros_like(weight[:, 0]) if own is None else own.detach().double().clone()
    if norm is not None and norm.bias is not None:
        bias += weight @ norm.bias.detach().double()
    if norm is not None and norm.weight is not None:
        weight *= norm.weight.detach().double()
    return weight, bias


def _before_scale(weight: Tensor, bias: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """gamma * (W x + b) = (gamma W) x + gamma b."""
    if gamma is None:
        return weight, bias
    gamma = gamma.detach().double()
    return weight * gamma[:, None], bias * gamma


def _unfolded(
    norm: Norm,
    plain: PlainNorm,
    like: Tensor,
    scale: float = 1.0,
    order: Tensor | None = None,
) -> HeadNorm:
    """The affine of `norm`, scaled and in another order, beside `plain`; as wide as the last axis
    of `like`, in its dtype.
    """
    ones = torch.ones(like.shape[-1], dtype=torch.float64, device=like.device)
    weight = ones if norm.weight is None else norm.weight.detach().double()
    bias = 0 * ones if norm.bias is None else norm.bias.detach().double()
    if order is not None:
        weight, bias = weight[order], bias[order]
    return HeadNorm((scale * weight).to(like.dtype), (scale * bias).to(like.dtype), plain)


def wanted_dtype(like: Tensor) -> torch.dtype:
    """Of products with a frozen weight: autocast's, else its own."""
    kind, dtype = like.device.type, like.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:  # autocast skips fp64
        return torch.get_autocast_dtype(kind)
    return dtype


# ---- a plan belongs to what was folded


class Plans:
    """The plans of a backbone, by dtype, for as long as `current` says that they are its own.

    Raises:
        UnsupportedBackbone: from the constructor, when the plan would leave out something that the
            backbone's own forward does: a hook, a replaced forward, dropout, a gradient, or
            anything that its formula (`BlockWeights`) does not say. A gradient of a bias, or of a
            norm's own parameters, is no such thing.
    """

    def __init__(self, view: BlocksView) -> None:
        if view.unproved is not None:
            view.examine()  # it may have become what can be folded
        if view.unproved is not None:
            raise UnsupportedBackbone(f'{view.unproved}; use engine="reference"')
        self._view = view
        self._seen = _Seen(view)
        self._plans: dict[torch.dtype, FrozenPlan] = {}
        self._settled: dict[torch.dtype, tuple[list[Any], FrozenPlan]] = {}
        self._proven: set[tuple[int, ...]] = set()
        self._placed: tuple[Any, Any, FrozenPlan] | None = None

    def current(self) -> bool:
        """Whether nothing has changed that was folded, or that was looked at to allow it."""
        return self._seen.again()

    def plan(
        self,
        dtype: torch.dtype,
        lengths: tuple[int, ...],
        size: tuple[int, int],
        settled: bool = True,
    ) -> FrozenPlan:
        """Folded at first use.

        Args:
            lengths: of the sequences that each block would be given, prompts included: new ones are
                proved first.
            size: of the images.
            settled: as in `fold`.

        Raises:
            UnsupportedBackbone: a block computes something else at this length.
        """
        if lengths not in self._proven:
            try:
                self._view.prove_lengths(lengths)
            except UnsupportedBackbone as error:
                raise UnsupportedBackbone(f'{error}; use engine="reference"') from error
            self._proven.add(lengths)
        plan, geometry = self._of_weights(dtype, settled), self._view.geometry(size)
        if all(g is NO_GEOMETRY for g in geometry):
            return plan
        placed = self._placed  # another thread may put its own there at any time
        if placed is None or placed[0] is not plan or placed[1] is not geometry:
            placed = self._placed = plan, geometry, plan.placed(geometry)
        return placed[2]

    def _of_weights(self, dtype: torch.dtype, settled: bool) -> FrozenPlan:
        trained = self._seen.trained
        if settled and trained:
            written = [(t.data_ptr(), t._version) for t in trained]
            before, plan = self._settled.get(dtype, (None, None))
            if plan is None or before != written:
                plan = fold(self._view, dtype)
                self._settled[dtype] = written, plan
            return plan
        found = self._plans.get(dtype)
        if found is None:
            found = fold(self._view, dtype, settled=False) if trained else fold(self._view, dtype)
            self._plans[dtype] = found
        return found

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of the plans that were folded."""
        return list(self._plans)


BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}


class _Seen:
    """All blocks of a backbone as they were: modules, their own attributes, their tensors.

    `again` runs before every forward, so it is a few passes over flat lists. Attributes are
    compared by identity; a new object of the same value folds again, which does no harm. Of the
    parameters that are `trained`, values do not count: no constant holds them.

    Raises:
        UnsupportedBackbone: naming what the fast engine would not run.
    """

    def __init__(self, view: BlocksView) -> None:
        self._view = view
        folded = view.folded
        self._folded = list(folded.values())
        named = [
            (f"{at}.{name}".rstrip("."), module)
            for at, part in folded.items()
            for name, module in part.named_modules(remove_duplicate=False)
        ]
        _refuse_surroundings()
        for at, part in folded.items():
            _refuse_dropout(at, part)
        vectors = [view.read_block(i).trainable() for i in range(len(view.blocks))]
        between = [view.read_merging(i).trainable() for i in view.mergings]
        may = {id(t) for own in (*vectors, *between) for t in own}
        for name, module in named:
            _refuse(name, module, may)
        modules = [module for _, module in named]
        self._modules = modules
        self._types: list[Any] = list(map(type, modules))
        self._forwards = [(kind, kind.forward) for kind in set(self._types)]
        self._attributes = [vars(m) for m in modules]
        self._sizes = list(map(len, self._attributes))
        self._hooks = [getattr(m, name) for m in modules for name in HOOKS]
        self._children = [m._modules for m in modules]
        self._child = _values(self._children)
        self._readers = [_reader(d) for d in self._attributes]
        self._own = self._read()
        # tensors that are plain attributes are among `_own` too: there their identity counts
        plain = {id(t): t for t in self._own if isinstance(t, Tensor)}
        self._holders = [m._parameters for m in modules] + [m._buffers for m in modules] + [plain]
        self._tensors = _values(self._holders)
        self._states = _states(self._tensors)
        self.trained = [t for t in self._tensors if _trained(t) is not None]
        # aliases keep the storage: no later tensor can lie at the same address
        self._aliases = [t.detach() for t in self._tensors if t is not None]
        self._readout = view.readout_parts

    def again(self) -> bool:
        """Whether all is as it was; raises where nothing may be folded, whatever it was."""
        _refuse_surroundings()
        return (
            not any(self._hooks)
            and _same(list(self._view.folded.values()), self._folded)
            and list(map(type, self._modules)) == self._types
            and all(kind.forward is forward for kind, forward in self._forwards)
            and list(map(len, self._attributes)) == self._sizes
            and _same(_values(self._children), self._child)
            and _same(self._read(), self._own)
            and _same(_values(self._holders), self._tensors)
            and _states(self._tensors) == self._states
            and _same(self._view.readout_parts, self._readout)
        )

    def _read(self) -> list[Any]:
        try:
            return list(chain.from_iterable(read() for read in self._readers))
        except KeyError:  # an attribute has gone
            return []


def _reader(attributes: dict[str, Any]) -> Callable[[], tuple[Any, ...]]:
    """Reads the values of the attributes that a module has beyond those of every module."""
    names = [name for name in attributes if name not in BOOKKEEPING]
    get = itemgetter(*names)  # "training" is always there
    return (lambda: get(attributes)) if len(names) > 1 else lambda: (get(attributes),)


def _values(dicts: Iterable[dict[Any, Any]]) -> list[Any]:
    return [value for d in dicts for value in d.values()]


def _same(now: list[Any], then: list[Any]) -> bool:
    return len(now) == len(then) and all(map(is_, now, then))


def _states(tensors: list[Tensor | None]) -> list[tuple[Any, ...]]:
    return [
        (True, t.dtype, t.device, t.stride())
        if t.requires_grad
        else (t.data_ptr(), t._version, t.dtype, t.device, t.stride())
        for t in tensors
        if t is not None
    ]


def _refuse(name: str, module: nn.Module, may: set[int]) -> None:
    """Raise when the forward of `module` does what no plan does.

    Args:
        may: ids of the parameters that may require a gradient.
    """
    instead = 'use engine="reference" or'
    if added := added_to(module):
        raise UnsupportedBackbone(
            f"{name} has {added}: the fast engine would not run it; {instead} remove it"
        )
    for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        for own, tensor in tensors:
            if type(tensor) not in (Tensor, nn.Parameter):
                raise UnsupportedBackbone(
                    f"{name}.{own} is a {type(tensor).__name__}: the fast engine folds plain "
                    f"tensors (no sharded, traced or quantised ones); {instead} give it those"
                )
            if tensor.is_inference():
                raise UnsupportedBackbone(
                    f"{name}.{own} was made under torch.inference_mode, where PyTorch does not "
                    f"record changes: the fast engine would not see them; {instead} build or move "
                    "the backbone outside of it"
                )
            if tensor.requires_grad and id(tensor) not in may:
                raise UnsupportedBackbone(
                    f"{name}.{own} requires a gradient: {UNTRAINED}; {instead} call "
                    "requires_grad_(False)"
                )


def _refuse_dropout(name: str, block: nn.Module) -> None:
    """Raise when a block is not in eval mode and has something to drop."""
    parts = list(block.modules())
    drops = (getattr(part, "p", None) or getattr(part, "drop_prob", None) for part in parts)
    if any(part.training for part in parts) and any(isinstance(d, float) and d > 0 for d in drops):
        raise UnsupportedBackbone(
            f"{name} is in training mode and has dropout: the fast engine would drop nothing; use "
            'engine="reference" or call backbone.eval()'
        )


_GLOBAL_HOOKS = (
    torch_modules._global_forward_hooks,
    torch_modules._global_forward_pre_hooks,
    torch_modules._global_backward_hooks,
    torch_modules._global_backward_pre_hooks,
)


def _refuse_surroundings() -> None:
    """Raise inside of what follows the backbone's own operations: it would see none of them."""
    around = transform()
    if torch.jit.is_tracing():
        around = "torch.jit.trace"
    elif torch.compiler.is_exporting():
        around = "torch.export"
    if around is not None:
        raise UnsupportedBackbone(
            f"fast_forward was called inside {around}, which cannot follow the fast engine: use "
            'engine="reference"'
        )
    _refuse_global_hooks()


def _refuse_global_hooks() -> None:
    """Raise when hooks on all modules are set; those of PyTorch's own counters only watch."""
    if not any(_GLOBAL_HOOKS):
        return
    for hook in _values(_GLOBAL_HOOKS):
        if not isinstance(getattr(hook, "__self__", None), ModuleTracker):
            raise UnsupportedBackbone(
                f"a hook on all modules is set ({hook}): the fast engine would not run it in the "
                'blocks; use engine="reference" or remove it'
            )
