"""FrozenPlan: the backbone's weights, folded once, and known to be those of the backbone.

Folds, all computed in fp64 and rounded once to the compute dtype:
    LayerNorm's scale and shift  -> the product behind it
    the logit scale              -> W_q (or q_norm's affine)
    LayerScale                   -> the projection before it
so that between two products only a plain normalisation, the softmax and the activation remain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
import torch.nn.modules.module as torch_modules
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

from pae_kernels.checks import transform

from .backbones.view import (
    HOOKS,
    BackboneView,
    BlockWeights,
    Linear,
    Norm,
    added_to,
)
from .errors import UnsupportedBackbone


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
    rows; logits need no further scale: `scale` is in w_qkv, or in q_norm where there is one.
    """

    num_heads: int
    head_width: int
    scale: float
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

    def product(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of "qkv", "proj", "fc1" or "fc2"."""
        return getattr(self, f"w_{name}"), getattr(self, f"b_{name}")

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
    values of many blocks are one batched product. class_only: of the last block's rows only the
    class row is read.
    """

    dtype: torch.dtype
    blocks: list[BlockPlan]
    w_qkv: Tensor
    b_qkv: Tensor
    class_only: bool

    def only(self, start: int, stop: int) -> FrozenPlan:
        """The plan of blocks start to stop - 1."""
        part = slice(start, stop)
        folded = self.blocks[part], self.w_qkv[part], self.b_qkv[part]
        return FrozenPlan(self.dtype, *folded, class_only=False)


@torch.inference_mode(False)
@torch.no_grad()
def fold(view: BackboneView, dtype: torch.dtype) -> FrozenPlan:
    """Fold every block of `view` for products in `dtype`.

    Normal tensors even under inference mode: a plan built during evaluation also serves training.
    """
    weights = [view.read_block(i) for i in range(len(view.blocks))]
    qkv = [_fold_qkv(w) for w in weights]
    w_qkv = torch.stack([w.to(dtype) for w, _ in qkv])
    b_qkv = torch.stack([b.to(dtype) for _, b in qkv])
    blocks = [_fold_block(w, w_qkv[i], b_qkv[i], dtype) for i, w in enumerate(weights)]
    return FrozenPlan(dtype, blocks, w_qkv, b_qkv, view.reads_class_only)


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
        scale=w.scale,
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


# ---- a plan belongs to what was folded


class Plans:
    """The plans of a backbone, by dtype, for as long as `current` says that they are its own.

    Raises:
        UnsupportedBackbone: from the constructor, when the plan would leave out something that the
            backbone's own forward does: a hook, a replaced forward, dropout, a gradient, or
            anything that its formula (`BlockWeights`) does not say.
    """

    def __init__(self, view: BackboneView) -> None:
        self._view = view
        self._seen = _Seen(view)
        self._plans: dict[torch.dtype, FrozenPlan] = {}
        self._proven: set[tuple[int, ...]] = set()

    def current(self) -> bool:
        """Whether nothing has changed that was folded, or that was looked at to allow it."""
        return self._seen.again()

    def plan(self, dtype: torch.dtype, lengths: tuple[int, ...]) -> FrozenPlan:
        """Folded at first use.

        Args:
            lengths: of the sequences that each block would be given, prompts included: new ones are
                proved first.

        Raises:
            UnsupportedBackbone: a block computes something else at this length.
        """
        if lengths not in self._proven:
            try:
                self._view.prove_lengths(lengths)
            except UnsupportedBackbone as error:
                raise UnsupportedBackbone(f'{error}; use engine="reference"') from error
            self._proven.add(lengths)
        found = self._plans.get(dtype)
        if found is None:
            found = self._plans[dtype] = fold(self._view, dtype)
        return found

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of the plans that were folded."""
        return list(self._plans)


_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}


class _Seen:
    """All blocks of a backbone as they were: modules, their own attributes, their tensors.

    `again` runs before every forward, so it is a few passes over flat lists. Attributes are
    compared by identity; a new object of the same value folds again, which does no harm.

    Raises:
        UnsupportedBackbone: naming what the fast engine would not run.
    """

    def __init__(self, view: BackboneView) -> None:
        self._view = view
        self._blocks = view.blocks
        named = [
            (f"blocks.{i}.{name}".rstrip("."), module)
            for i, block in enumerate(self._blocks)
            for name, module in block.named_modules(remove_duplicate=False)
        ]
        _refuse_surroundings()
        for i, block in enumerate(self._blocks):
            _refuse_dropout(f"blocks.{i}", block)
        for name, module in named:
            _refuse(name, module)
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
        # aliases keep the storage: no later tensor can lie at the same address
        self._aliases = [t.detach() for t in self._tensors if t is not None]
        self._readout = view.readout_parts

    def again(self) -> bool:
        """Whether all is as it was; raises where nothing may be folded, whatever it was."""
        _refuse_surroundings()
        return (
            not any(self._hooks)
            and _same(self._view.blocks, self._blocks)
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
    names = [name for name in attributes if name not in _BOOKKEEPING]
    get = itemgetter(*names)  # "training" is always there
    return (lambda: get(attributes)) if len(names) > 1 else lambda: (get(attributes),)


def _values(dicts: Iterable[dict[Any, Any]]) -> list[Any]:
    return [value for d in dicts for value in d.values()]


def _same(now: list[Any], then: list[Any]) -> bool:
    return len(now) == len(then) and all(map(is_, now, then))


def _states(tensors: list[Tensor | None]) -> list[tuple[Any, ...]]:
    return [
        (t.data_ptr(), t._version, t.dtype, t.device, t.stride(), t.requires_grad)
        for t in tensors
        if t is not None
    ]


def _refuse(name: str, module: nn.Module) -> None:
    """Raise when the forward of `module` does what no plan does."""
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
            if tensor.requires_grad:
                raise UnsupportedBackbone(
                    f"{name}.{own} requires a gradient, which the fast engine does not give to a "
                    f"frozen backbone; {instead} call requires_grad_(False)"
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
