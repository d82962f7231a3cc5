"""Visual prompt tuning: free prompt tokens, in every block (deep) or at the input (shallow).

Source: Jia et al., "Visual Prompt Tuning", ECCV 2022.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import (
    BackboneShape,
    PromptFamily,
    check_choice,
    check_count,
    check_flag,
    check_probability,
    check_prompts,
    uniform_init_,
)
from .registry import register

DROPOUT_SCOPES = ("batch", "sample")


class _VPT(PromptFamily):
    """What deep and shallow share: learned `tokens`, and dropout with an explicit scope."""

    tokens: nn.Parameter
    training_arguments: tuple[str, ...] = ("dropout", "dropout_scope")

    def __init__(self, dropout: float, dropout_scope: str) -> None:
        super().__init__()
        self.dropout = check_probability("dropout", dropout)
        self.dropout_scope = check_choice("dropout_scope", dropout_scope, DROPOUT_SCOPES)
        self.register_parameter("tokens", None)

    def _drop(self, rows: Tensor, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0.0:
            return rows
        if self.dropout_scope == "sample":
            rows = rows.expand(x.shape[0], -1, -1)
        return F.dropout(rows, self.dropout, training=True)

    def _drop_each(self, blocks: Iterable[Tensor], x: Tensor) -> list[Tensor | None]:
        """`_drop` block by block; None where a block has no rows."""
        return [self._drop(rows, x) if rows.shape[-2] else None for rows in blocks]

    def _allocate(self, shape: BackboneShape, *size: int) -> None:
        self.tokens = nn.Parameter(torch.empty(*size, shape.width))
        uniform_init_(self.tokens, shape)


@register("vpt-deep")
class VPTDeep(_VPT):
    """VPT-deep: block i reads its own learned prompts P_i as extra keys and values; their outputs
    are cut off.

    Args:
        num_tokens: prompts per block: one integer for all blocks, or one per block (0 allowed).
        dropout: probability with which prompt entries are zeroed in training (the papers use 0.1 on
            ViT-B).
        dropout_scope: "batch" draws one mask per block and step for the whole batch (PAE, APT),
            which keeps the prompts shared by the batch and therefore cheap; "sample" draws one per
            image (the original VPT code).

    Attributes:
        tokens: (depth, P, D), or (sum of counts, D) block after block when the counts differ. On a
            backbone with stages (Swin) all entries in one row, block after block, prompt after
            prompt.

    Raises:
        ValueError, TypeError: on a negative or non-integer count, a dropout outside [0, 1), an
        unknown scope.

    Source: Jia et al. 2022, eq. 4-5; on stages the released code, in which the initial range of
    the first width is that of all.
    """

    takes_stages = True

    def __init__(
        self,
        num_tokens: int | Sequence[int],
        dropout: float = 0.0,
        dropout_scope: str = "batch",
    ) -> None:
        super().__init__(dropout, dropout_scope)
        if isinstance(num_tokens, Sequence) and not isinstance(num_tokens, str):
            self.num_tokens: int | list[int] = [
                check_count(f"num_tokens[{i}]", n) for i, n in enumerate(num_tokens)
            ]
        else:
            self.num_tokens = check_count("num_tokens", num_tokens)
        self._counts: list[int] = []

    def _counts_of(self, depth: int) -> list[int]:
        counts = self.num_tokens
        counts = [counts] * depth if isinstance(counts, int) else list(counts)
        if len(counts) != depth:
            raise ValueError(
                f"num_tokens must be one integer or one per block ({depth}), "
                f"got {len(counts)} values"
            )
        return counts

    def bind(self, shape: BackboneShape) -> None:
        counts = self._counts_of(shape.depth)
        if shape.widths:
            size = sum(p * d for p, d in zip(counts, shape.widths))
            self.tokens = nn.Parameter(torch.empty(size))
            uniform_init_(self.tokens, shape)
        elif len(set(counts)) == 1:
            self._allocate(shape, shape.depth, counts[0])
        else:
            self._allocate(shape, sum(counts))
        self._counts = counts

    @property
    def prompt_counts(self) -> list[int]:
        return list(self._counts)

    def raw_prompts(self) -> list[Tensor | None]:
        return [*self._blocks()]

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        return self._drop(self._block(index), x) if self._counts[index] else None

    def all_prompts(self, x: Tensor) -> list[Tensor | None]:
        return self._drop_each(self._blocks(), x)

    def _blocks(self) -> Sequence[Tensor]:
        """Rows of every block before dropout."""
        if self.tokens.dim() == 3:
            return self.tokens.unbind(0)
        if self.tokens.dim() == 1:
            sizes = list(zip(self._counts, self.shape.widths))
            parts = self.tokens.split([p * d for p, d in sizes])
            return [part.view(size) for part, size in zip(parts, sizes)]
        return self.tokens.split(self._counts)

    def _block(self, index: int) -> Tensor:
        """`_blocks()[index]`, alone."""
        if self.tokens.dim() == 3:
            return self.tokens[index]
        if self.tokens.dim() == 1:
            return self._blocks()[index]
        start = sum(self._counts[:index])
        return self.tokens[start : start + self._counts[index]]

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        check_prompts("prompts", prompts, self._counts, self.shape.block_widths)
        rows = [p.flatten() for p in prompts if p is not None]
        if rows:
            with torch.no_grad():
                self.tokens.copy_(torch.cat(rows).view_as(self.tokens))


@register("vpt-shallow")
class VPTShallow(_VPT):
    """VPT-shallow: P learned prompts join the sequence before block 0 and run through all blocks.

    Args:
        num_tokens: number of prompts P.
        dropout, dropout_scope: as in `VPTDeep`.
        faithful: on windows (Swin): as the released code has it, which lays prompts out window by
            window and the windows themselves image by image, so that from block 1 on the windows of
            an image meet the prompts of other images of its batch. False gives every window its own
            image's.

    Attributes:
        tokens: (P, D).

    Raises:
        ValueError, TypeError: on a negative or non-integer count, a dropout outside [0, 1), an
        unknown scope; `faithful` on a backbone without windows.

    Source: Jia et al. 2022, eq. 2-3.
    """

    enters_sequence = True
    takes_stages = True

    def __init__(
        self,
        num_tokens: int,
        dropout: float = 0.0,
        dropout_scope: str = "batch",
        faithful: bool = False,
    ) -> None:
        super().__init__(dropout, dropout_scope)
        self.num_tokens = check_count("num_tokens", num_tokens)
        self.mixes_windows = self.faithful = check_flag("faithful", faithful)

    def bind(self, shape: BackboneShape) -> None:
        if self.faithful and not shape.widths:
            raise ValueError("faithful must be False on a backbone without windows, got True")
        self._allocate(shape, self.num_tokens)

    @property
    def prompt_counts(self) -> list[int]:
        return [self.num_tokens] + [0] * (self.shape.depth - 1)

    def raw_prompts(self) -> list[Tensor | None]:
        return [self.tokens, *[None] * (self.shape.depth - 1)]

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        if index > 0 or self.num_tokens == 0:
            return None
        return self._drop(self.tokens, x)

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        check_prompts("prompts", prompts, self.prompt_counts, self.tokens.shape[-1])
        if prompts[0] is not None:
            with torch.no_grad():
                self.tokens.copy_(prompts[0])
