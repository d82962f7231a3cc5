"""What a prompt family is: the questions that the reference forward and the engine ask, and nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BackboneShape:
    """The sizes of a frozen vision transformer that a prompt family may depend on.

    Attributes:
        depth: number of transformer blocks.
        width: embedding width D.
        num_heads: attention heads per block.
        patch_size: (height, width) of a patch in pixels.
        in_chans: image channels.
        num_tokens: tokens of an image of the default size, prefix tokens included.
        num_prefix_tokens: class and register tokens, which stand before the patches.
        grid: (rows, columns) of patches of an image of the default size.
        head_width: width d of one attention head.
        has_class_token: whether row 0 is a class token.
    """

    depth: int
    width: int
    num_heads: int
    patch_size: tuple[int, int]
    in_chans: int
    num_tokens: int
    num_prefix_tokens: int
    grid: tuple[int, int]
    head_width: int
    has_class_token: bool


class PromptFamily(nn.Module):
    """Base class of all prompt families.

    A family knows how its prompts come about; it knows neither the backbone's code nor the engine.
    `PromptedViT` calls `bind` once with the backbone's sizes; from then on both forwards ask
    `block_prompts`.

    Attributes:
        enters_sequence: prompt rows given at block 0 stay in the sequence through all blocks
            (VPT-shallow). Otherwise the rows of block i are only read as keys and values of block i
            and then cut off.
        rewrites_rows: `next_rows` replaces those rows between blocks (LSPT); needs enters_sequence.
        depends_on_input: `block_prompts` reads the values of `x` (not only its batch size).
        adjusts_rows: `adjust_rows` changes image rows at the inputs of blocks 1, 2, ... (iVPT).
        reads_class_attention: it is given the class row's attention, which otherwise is never
            computed; needs adjusts_rows.
        observed: blocks whose input rows `observe` is shown (DA-VPT).
        moves_prompts: prompts change their block in training (PRO-VPT), so `prompt_counts` change
            and prompts of the same number in two blocks have nothing to do with each other.
    """

    enters_sequence: bool = False
    rewrites_rows: bool = False
    depends_on_input: bool = False
    adjusts_rows: bool = False
    reads_class_attention: bool = False
    observed: frozenset[int] = frozenset()
    moves_prompts: bool = False

    def bind(self, shape: BackboneShape) -> None:
        """Allocate and initialise the parameters for a backbone of these sizes."""
        raise NotImplementedError

    @property
    def prompt_counts(self) -> list[int]:
        """Number of prompt rows given to each block, (depth,)."""
        raise NotImplementedError

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        """Prompts of block `index`, given the rows `x` (B, N, D) that enter it.

        Returns:
            (P, D) shared by the batch, (B, P, D) per sample, (G, P, D) picked by `group_index`, or
            None.
        """
        raise NotImplementedError

    def all_prompts(self, x: Tensor) -> list[Tensor | None]:
        """`block_prompts` of every block at once, in block order; only asked when
        `depends_on_input` is False.
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

    def adjust_rows(self, index: int, x: Tensor, class_attention: Tensor | None) -> Tensor:
        """Image rows that enter block `index` >= 1, changed; asked when `adjusts_rows`.

        Args:
            x: (B, N, D), prefix tokens first.
            class_attention: (B, H, N), how much the class row of block `index` - 1 looked at each
                image row; a softmax over all keys, prompts included. Without gradient. None unless
                `reads_class_attention`.

        Returns:
            (B, N, D), differentiable; not `x` changed in place.
        """
        raise NotImplementedError

    def next_rows(self, index: int, rows: Tensor, x: Tensor) -> Tensor:
        """Prompt rows that enter block `index` >= 1; asked when `rewrites_rows`.

        Args:
            rows: (B, P, D), the prompt rows of block `index` - 1's output.
            x: (B, N, D), its image rows.

        Returns:
            (B, P, D), differentiable.
        """
        raise NotImplementedError

    def observe(self, index: int, x: Tensor, class_query: Tensor) -> None:
        """Shown the rows (B, N, D) that enter block `index`, for every index in `observed`.

        Args:
            class_query: (B, H d) of the class row, as the block's query projection gives it, before
                any per-head norm. Both are differentiable.
        """

    def raw_prompts(self) -> list[Tensor | None]:
        """Per block the dropout-free prompts (P, D) as differentiable tensors: what a regulariser
        sees.
        """
        raise NotImplementedError

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        """Overwrite the learned prompts with one (P, D) tensor per block (None where a block has
        none).
        """
        raise NotImplementedError

    def config(self) -> dict:
        """Constructor arguments as plain JSON values, enough to build the family again."""
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """Scalar added to the training loss, or None."""
        return None

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


def check_prompts(
    name: str, prompts: Sequence[Tensor | None], counts: list[int], width: int
) -> None:
    """Raise unless `prompts` holds one (counts[i], width) tensor per block."""
    if len(prompts) != len(counts):
        raise ValueError(f"{name} must hold one entry per block, {len(counts)}, got {len(prompts)}")
    for i, (prompt, count) in enumerate(zip(prompts, counts)):
        got = None if prompt is None else tuple(prompt.shape)
        if got != (count, width) and not (prompt is None and count == 0):
            raise ValueError(f"{name}[{i}] must have shape {(count, width)}, got {got}")


def check_probability(name: str, value: float) -> float:
    """Return `value` as a float, or raise unless it lies in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
    return float(value)


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return `value`, or raise unless it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")
    return value


def check_count(name: str, value: int) -> int:
    """Return `value`, or raise unless it is an integer >= 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return value


def uniform_init_(tokens: Tensor, shape: BackboneShape) -> None:
    """Fill with U(-v, v), v = sqrt(6 / (C ph pw + D)): the initialisation of VPT (Jia et al.
    2022).
    """
    fan = shape.in_chans * shape.patch_size[0] * shape.patch_size[1] + shape.width
    bound = (6.0 / fan) ** 0.5
    with torch.no_grad():
        tokens.uniform_(-bound, bound)
