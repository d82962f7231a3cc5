"""Prompt rows in a token sequence: where they go, how they leave, what a family does in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backbones.view import BackboneView, Bypass
from .prompts import PromptFamily


def insert_rows(x: Tensor, rows: Tensor, at: int) -> Tensor:
    """Put `rows` (P, D) or (B, P, D) into `x` (B, N, D) behind its first `at` rows."""
    rows = rows.to(x.dtype).expand(x.shape[0], -1, -1)
    return torch.cat([x[:, :at], rows, x[:, at:]], dim=1)


def cut_rows(x: Tensor, at: int, count: int) -> Tensor:
    """Remove `count` rows behind the first `at`: the inverse of `insert_rows`."""
    if count == 0:
        return x
    return torch.cat([x[:, :at], x[:, at + count :]], dim=1)


def pooled_rows(x: Tensor, at: int, count: int, pool: str) -> Tensor:
    """The rows that the readout is given, of the last block's output.

    Args:
        x: (B, at + count + rest, D) with `count` prompt rows behind the first `at`.
        pool: "image": without the prompt rows; "all": as they are; "prompts": without the image's,
            the prefix apart.
    """
    if pool == "image":
        return cut_rows(x, at, count)
    return x if pool == "all" else x[:, : at + count]


def sequence_lengths(family: PromptFamily, rows: int) -> tuple[int, ...]:
    """Rows of the sequence that each block is given in the reference, of `rows` of the image."""
    counts = family.prompt_counts
    if family.enters_sequence:
        return (rows + counts[0],) * len(counts)
    return tuple([rows + count for count in counts])


def entering(family: PromptFamily, view: BackboneView, rows: Tensor) -> Tensor:
    """Rows that join the sequence, as they stand in front of the first block."""
    norm = view.stem_norm if family.enters_before_norm else None
    return rows if norm is None else norm(rows)


def touches_rows(family: PromptFamily, index: int) -> bool:
    """Whether `between_blocks` does anything before block `index`."""
    changes = family.rewrites_rows or family.adjusts_rows or family.reads_class_attention
    return index in family.observed or (index > 0 and changes)


def between_blocks(
    family: PromptFamily,
    index: int,
    x: Tensor,
    at: int,
    entered: int,
    class_attention: Tensor | None,
    class_query: Callable[[Tensor], Tensor],
) -> Tensor:
    """Everything a family does to, or reads of, the rows `x` that enter block `index`.

    Args:
        x: (B, at + entered + rest, D) with `entered` live prompt rows behind the first `at`.
        class_attention: (B, H, N) of the block before, without prompt columns, where the family
            reads it.
        class_query: rows to the class row's query in block `index`, called for observed blocks.
    """
    if index > 0 and family.rewrites_rows and entered:
        rows, image = x[:, at : at + entered], cut_rows(x, at, entered)
        x = insert_rows(image, family.next_rows(index, rows, image), at)
    if index > 0 and family.adjusts_rows:
        x = family.adjust_rows(index, x).to(x.dtype)
    if index > 0 and family.reads_class_attention:
        assert class_attention is not None  # the block before was asked for it
        x = family.adjust_attended_rows(index, x, class_attention).to(x.dtype)
    if index in family.observed:
        family.observe(index, cut_rows(x, at, entered), class_query(x))
    return x


def bypass_of(family: PromptFamily, index: int) -> tuple[Bypass, ...]:
    """What becomes of attention's rows in block `index`, or nothing."""
    return (asked(family, index),) if family.bypasses_attention else ()


def asked(owner: Any, index: int) -> Bypass:
    """The `attention_bypass` of a family, or of a text's context, in block `index`."""

    def bypass(h: Tensor, y: Tensor) -> Tensor:
        made = owner.attention_bypass(index, h, y)
        if made.shape != y.shape:
            raise ValueError(
                f"{type(owner).__name__}.attention_bypass({index}) must give rows like y, "
                f"{tuple(y.shape)}, got {tuple(made.shape)}"
            )
        return made.to(y.dtype)

    return bypass
