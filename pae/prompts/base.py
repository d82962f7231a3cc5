"""What a prompt family is: the questions that the reference forward and the engine ask, and nothing
else.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import contracts


@dataclass(frozen=True)
class BackboneShape:
    """The sizes of a frozen vision transformer that a prompt family may depend on.

    Attributes:
        depth: number of transformer blocks.
        width: embedding width D.
        num_heads: attention heads per block.
        patch_size: (height, width) of a patch in pixels; of a tube (frames, height, width).
        in_chans: image channels.
        num_tokens: tokens of an image of the default size, or of a clip, prefix tokens included.
        num_prefix_tokens: class and register tokens, which stand before the patches.
        grid: (rows, columns) of patches of an image of the default size; of a clip (tubes one
            behind the other, rows, columns).
        head_width: width d of one attention head.
        has_class_token: whether row 0 is a class token.
        widths: embedding width of each block where a backbone has stages (Swin), whose first is
            `width`; empty where all blocks are alike. `num_heads`, `num_tokens` and `grid` are
            those of the first stage then.
    """

    depth: int
    width: int
    num_heads: int
    patch_size: tuple[int, ...]
    in_chans: int
    num_tokens: int
    num_prefix_tokens: int
    grid: tuple[int, ...]
    head_width: int
    has_class_token: bool
    widths: tuple[int, ...] = ()

    @property
    def block_widths(self) -> tuple[int, ...]:
        """Embedding width of each block."""
        return self.widths or (self.width,) * self.depth

    @property
    def patch_values(self) -> int:
        """C ph pw: numbers in a patch, of a tube in one of its frames."""
        return self.in_chans * self.patch_size[-2] * self.patch_size[-1]


class PerThread(threading.local):
    """Values of which every thread has its own; a copy or a pickle has none."""

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        return PerThread()

    def __reduce__(self) -> tuple[type[PerThread], tuple[()]]:
        return PerThread, ()


class PromptFamily(nn.Module):
    """Base class of all prompt families.

    A family knows how its prompts come about; it knows neither the backbone's code nor the engine.
    `PromptedViT` calls `bind` once with the backbone's sizes; from then on both forwards ask
    `block_prompts`, and what else the class overrides.

    What a family overrides is asked: three attributes follow from that when the class is made, and
    an instance may set its own to False when an option of its leaves that part out.

    Attributes:
        adjusts_rows: `adjust_rows` is overridden. reads_class_attention: `adjust_attended_rows` is
            overridden (iVPT); otherwise no class attention is computed. rewrites_rows: `next_rows`
            is overridden (LSPT). bypasses_attention: `attention_bypass` is (APT-VL).

    Some are facts that no method shows. A class says them:

    Attributes:
        enters_sequence: prompt rows given at block 0 stay in the sequence through all blocks
            (VPT-shallow). Otherwise the rows of block i are only read as keys and values of block i
            and then cut off.
        enters_before_norm: those rows join ahead of the norm that stands in front of the first
            block (CLIP's), which then acts on them too (UPT); on a backbone without one that is no
            difference.
        depends_on_input: `block_prompts`, `head_keys_values` or `group_index` reads the values of
            `x` (not only its batch size).
        moves_prompts: prompts change their block in training (PRO-VPT), so `prompt_counts` change
            and prompts of the same number in two blocks have nothing to do with each other.
        takes_stages: it is defined on a backbone whose blocks differ in width (Swin). Not
            inherited: each class says it of itself.
        mixes_windows: on windows (Swin), exchange those of a batch as the released code does: see
            `VPTShallow`.
        training_arguments: arguments of the constructor that act in training alone: a file is
            loaded into a family with others (`PromptedViT.load`).

    Raises:
        TypeError: when a class is made whose parts contradict each other, or in which something
            would never be asked: a flag without its method, `next_rows` without `enters_sequence`,
            `observe` without `observed`, a method under nearly the name of a question, or with
            arguments that nobody gives. When a family is bound whose answers contradict what it
            says of itself.
    """

    adjusts_rows: bool = False
    reads_class_attention: bool = False
    rewrites_rows: bool = False
    bypasses_attention: bool = False
    enters_sequence: bool = False
    enters_before_norm: bool = False
    depends_on_input: bool = False
    moves_prompts: bool = False
    takes_stages: bool = False
    mixes_windows: bool = False
    training_arguments: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self._shape: BackboneShape | None = None
        self._binding = False
        self._threads = PerThread()
        self._remembers = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        contracts.complete(cls, PromptFamily)
        if "bind" in vars(cls):
            cls.bind = _bound_once(cls.bind)  # type: ignore[method-assign]

    # ---- belonging to a model

    @property
    def shape(self) -> BackboneShape:
        """Sizes of the backbone that this family belongs to; also there inside `bind`.

        Raises:
            RuntimeError: it belongs to none yet.
        """
        if self._shape is None:
            raise RuntimeError(
                f"this {type(self).__name__} belongs to no model yet: give it to pae.PromptedViT"
            )
        return self._shape

    def bind(self, shape: BackboneShape) -> None:
        """Allocate and initialise the parameters for a backbone of these sizes.

        `PromptedViT` calls it. Whatever class overrides it, a family is bound once, and its answers
        are then compared with what it says of itself.

        Raises:
            RuntimeError: this family already belongs to a model.
            TypeError, ValueError: the answers contradict each other, or the sizes do not fit.
        """
        raise self._unanswered("bind")

    def config(self) -> dict[str, Any]:
        """Constructor arguments as plain JSON values, enough to build the family again.

        They are read from the attributes of the same names.

        Raises:
            TypeError: an argument is kept under another name or not at all, or is no JSON value.
        """
        return as_config(self)

    def extra_repr(self) -> str:
        return shown_config(self)

    # ---- what both forwards ask

    @property
    def prompt_counts(self) -> list[int]:
        """Number of prompt rows given to each block, (depth,)."""
        raise self._unanswered("prompt_counts")

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        """Prompts of block `index`, given the rows `x` (B, N, D) that enter it.

        Returns:
            (P, D) shared by the batch, (B, P, D) per sample, (G, P, D) picked by `group_index`, or
            None.
        """
        raise self._unanswered("block_prompts")

    def all_prompts(self, x: Tensor) -> list[Tensor | None]:
        """`block_prompts` of every block at once, in block order, with the same draws of dropout.

        Override it where that is cheaper. Not asked where prompts depend on the input, enter the
        sequence, or come with `head_keys_values`. A subclass that overrides `block_prompts` alone
        does not inherit it.
        """
        return [self.block_prompts(i, x) for i in range(len(self.prompt_counts))]

    def group_index(self, x: Tensor) -> Tensor | None:
        """For (G, P, D) prompts with 1 < G < B: which set each sample uses, (B,) int64 in [0,
        G).
        """
        return None

    def head_keys_values(self, index: int, x: Tensor) -> Tensor | None:
        """Learned keys and values of block `index` that enter attention as they are (E2VPT, APT).

        Returns:
            (P, 2, H, d) shared by the batch, (B, P, 2, H, d) per sample, or None. They pass neither
            norm nor projection; logits are scaled like all others.
        """
        return None

    def adjust_rows(self, index: int, x: Tensor) -> Tensor:
        """Image rows that enter block `index` >= 1, changed.

        Args:
            x: (B, N, D), prefix tokens first.

        Returns:
            (B, N, D), differentiable; not `x` changed in place.
        """
        raise self._unanswered("adjust_rows")

    def adjust_attended_rows(self, index: int, x: Tensor, class_attention: Tensor) -> Tensor:
        """As `adjust_rows`, given what the class row looked at; asked behind it.

        Args:
            class_attention: (B, H, N), how much the class row of block `index` - 1 looked at each
                image row; a softmax over all keys, prompts included. Without gradient.
        """
        raise self._unanswered("adjust_attended_rows")

    def next_rows(self, index: int, rows: Tensor, x: Tensor) -> Tensor:
        """Prompt rows that enter block `index` >= 1; needs `enters_sequence`.

        Args:
            rows: (B, P, D), the prompt rows of block `index` - 1's output.
            x: (B, N, D), its image rows.

        Returns:
            (B, P, D), differentiable.
        """
        raise self._unanswered("next_rows")

    def attention_bypass(self, index: int, h: Tensor, y: Tensor) -> Tensor:
        """What block `index` adds to its rows instead of attention's y.

        Each row by itself: of the rows that are thrown away behind the block (prompts; in the last
        block all but the class row, where only that is read) one engine asks and the other does
        not, and they may come in any number.

        Args:
            h: (B, n, D), what attention reads: the rows behind the block's first norm.
            y: (B, n, D), what attention gives for them: behind its projection and LayerScale,
                before the norm of its output where there is one, and before the residual sum.

        Returns:
            (B, n, D), differentiable; neither h nor y changed in place.
        """
        raise self._unanswered("attention_bypass")

    @property
    def observed(self) -> frozenset[int]:
        """Blocks whose input rows `observe` is shown; overridden together with it."""
        return frozenset()

    def observe(self, index: int, x: Tensor, class_query: Tensor) -> None:
        """Shown the rows (B, N, D) that enter block `index`, for every index in `observed`.

        Args:
            class_query: (B, H d) of the class row, as the block's query projection gives it, before
                any per-head norm. Both are differentiable.
        """
        raise self._unanswered("observe")

    def observe_features(self, features: Tensor) -> None:
        """Shown what the head reads, (B, F), at the end of every forward; differentiable."""

    def start_forward(self) -> None:
        """Called by both forwards before anything else: `this_forward` is empty again."""
        if self._remembers:
            self._threads_values().clear()

    @property
    def this_forward(self) -> dict[Any, Any]:
        """What the forward in progress leaves for its later blocks and for the penalty behind it.

        Every thread has its own, and nothing of one forward belongs anywhere else: a model that is
        shared by threads has one family. Empty when a forward starts; copies of the family do not
        have it.
        """
        if not self._remembers:
            self._remembers = True
        return self._threads_values()

    def note_graph(self) -> None:
        """Keep in `this_forward` whether the forward in progress has a graph, for
        `require_graph`.
        """
        self.this_forward["has a graph"] = torch.is_grad_enabled()

    def require_graph(self) -> None:
        """Raise where a gradient is wanted of what the last forward left and it has none: the
        penalty would be a constant, or lack a part of its gradient.

        Raises:
            RuntimeError: the last forward ran without gradients, and they are enabled now.
        """
        if torch.is_grad_enabled() and not self.this_forward.get("has a graph", True):
            raise RuntimeError(
                f"the penalty on {type(self).__name__} reads the last forward, which ran without a "
                "graph (under torch.no_grad, or in activation checkpointing with "
                "use_reentrant=True): run it with gradients (use_reentrant=False), or ask for the "
                "penalty under torch.no_grad"
            )

    @torch.compiler.disable  # which thread runs is no part of a graph
    def _threads_values(self) -> dict[Any, Any]:
        return self._threads.values

    # ---- what regularisers and initialisers ask

    def raw_prompts(self) -> list[Tensor | None]:
        """Per block the dropout-free prompts (P, D) as differentiable tensors: what a regulariser
        sees.
        """
        raise self._unanswered("raw_prompts")

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        """Overwrite the learned prompts with one (P, D) tensor per block (None where a block has
        none).
        """
        raise self._unanswered("set_prompts")

    def penalty(self) -> Tensor | None:
        """Scalar added to the training loss, or None."""
        return None

    # ---- what the training loop calls

    def start_of_epoch(
        self,
        losses: Callable[[], Iterable[tuple[Tensor, int]]],
        head: Sequence[Tensor] = (),
        last_loss: float | None = None,
    ) -> None:
        """Called by the training loop before every epoch, the model in training mode; not again in
        the middle of an epoch that is resumed.

        Args:
            losses: () -> one pass over the training data, of which a family makes use or not: for
                every batch its mean cross-entropy, differentiable and without penalties, and its
                number of images. It runs the bare model, not a data-parallel wrapper, on this
                rank's share. A loss's graph is used up before the next is asked for.
            head: the trained parameters of the head.
            last_loss: mean cross-entropy of the training images in the epoch before, over all
                ranks; None before the first.
        """

    def remap(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Called by the training loop before every epoch, ahead of `start_of_epoch`: the bare model
        and one pass of (images, labels), which is only drawn when it is read.
        """

    def see_labels(self, labels: Tensor) -> None:
        """Called by the training loop before every training forward: labels (B,) of its images."""

    def end_of_step(self) -> None:
        """Called by the training loop after every optimiser step."""

    def end_of_epoch(self) -> None:
        """Called by the training loop after every epoch."""

    def rank_state(self) -> dict[str, Tensor]:
        """What this process alone has gathered in the epoch so far, on the CPU: with several
        processes, a state that is to go on from has that of each beside one `state_dict`.
        """
        return {}

    def load_rank_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `rank_state` gave in this process, after `load_state_dict`."""

    def _unanswered(self, name: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} does not answer {name}")


def _bound_once(bind: Callable[[Any, BackboneShape], None]) -> Callable[..., None]:
    """`bind` with what belongs to every family: see `PromptFamily.bind`."""

    @functools.wraps(bind)
    def bound(self: PromptFamily, shape: BackboneShape) -> None:
        if self._binding:  # a subclass asks for `super().bind(shape)`
            bind(self, shape)
            return
        if self._shape is not None:
            raise RuntimeError(
                f"this {type(self).__name__} already belongs to a model; build a new one"
            )
        takes_stages = vars(type(self)).get("takes_stages", False) and not self.bypasses_attention
        if shape.widths and not takes_stages:
            raise ValueError(
                f"prompts ({type(self).__name__}) are not defined on a backbone with stages of "
                "several widths (Swin, PiT): use VPTDeep or VPTShallow"
            )
        self._shape, self._binding = shape, True
        try:
            bind(self, shape)
            contracts.check_answers(self, PromptFamily)
        except BaseException:
            self._shape = None
            raise
        finally:
            self._binding = False

    return bound


def as_config(owner: Any) -> dict[str, Any]:
    """Constructor arguments of a family, or of what is made like one, from the attributes of the
    same names; see `PromptFamily.config`.
    """
    found = {}
    for name, parameter in inspect.signature(type(owner)).parameters.items():
        where = f"{type(owner).__name__}.config()"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{where} must be overridden: the constructor takes *{name}")
        if not hasattr(owner, name):
            raise TypeError(
                f"{where} needs argument {name!r} as an attribute of that name: keep it, or "
                "override config"
            )
        found[name] = _as_json(getattr(owner, name), f"{where}: argument {name!r}")
    return found


def shown_config(owner: Any) -> str:
    """`owner.config()` in one line; nothing of what cannot be saved, which can still be printed."""
    try:
        return ", ".join(f"{name}={value!r}" for name, value in owner.config().items())
    except TypeError:
        return ""


def _as_json(value: Any, what: str) -> Any:
    """A copy of `value` as JSON gives it back, tuples as lists; TypeError where there is none."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_as_json(v, what) for v in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _as_json(v, what) for key, v in value.items()}
    raise TypeError(f"{what} must be a JSON value, got {type(value).__name__}: override config")


def sum_over_ranks(values: Tensor) -> Tensor:
    """`values` summed over all processes, in place; as they are where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def check_prompts(
    name: str,
    prompts: Sequence[Tensor | None],
    counts: list[int],
    width: int | Sequence[int],
) -> None:
    """Raise unless `prompts` holds one (counts[i], width, or width[i]) tensor per block."""
    widths = [width] * len(counts) if isinstance(width, int) else width
    if len(prompts) != len(counts):
        raise ValueError(f"{name} must hold one entry per block, {len(counts)}, got {len(prompts)}")
    for i, (prompt, size) in enumerate(zip(prompts, zip(counts, widths))):
        got = None if prompt is None else tuple(prompt.shape)
        if got != size and not (prompt is None and size[0] == 0):
            raise ValueError(f"{name}[{i}] must have shape {size}, got {got}")


def check_probability(name: str, value: float) -> float:
    """Return `value` as a float, or raise unless it lies in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
    return float(value)


def check_number(name: str, value: float) -> float:
    """Return `value` as a float, or raise unless it is finite and at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    return float(value)


def check_flag(name: str, value: bool) -> bool:
    """Return `value`, or raise unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value`, or raise unless it is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value


def check_count(name: str, value: int) -> int:
    """Return `value`, or raise unless it is an integer >= 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return value


def check_positive(name: str, value: int) -> int:
    """Return `value`, or raise unless it is an integer >= 1."""
    if check_count(name, value) == 0:
        raise ValueError(f"{name} must be at least 1, got 0")
    return value


def uniform_init_(tokens: Tensor, shape: BackboneShape) -> None:
    """Fill with U(-v, v), v = sqrt(6 / (C ph pw + D)): the initialisation of VPT (Jia et al.
    2022).
    """
    bound = (6.0 / (shape.patch_values + shape.width)) ** 0.5
    with torch.no_grad():
        tokens.uniform_(-bound, bound)
