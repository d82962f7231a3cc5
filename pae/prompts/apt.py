"""Attention prompt tuning: learned keys and values in head space, one set for all heads.

Source: Bandara, Patel, "Attention Prompt Tuning: Parameter-efficient Adaptation of Pre-trained
Models for Spatiotemporal Modeling" (FG 2024, arXiv 2403.06978).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import BackboneShape, PromptFamily, check_count, check_probability
from .registry import register


@register("apt")
class APT(PromptFamily):
    """Attention of block i reads T more keys and values: k_t max(s_t, 1) and v_t max(s'_t, 1).

    They pass neither norm nor projection, and all heads share them: 2 T d numbers and 2 T scales
    per block. No prompt has a query, so no work is thrown away even by the reference.

    The family was published for VideoMAE (1568 tokens of 8 x 14 x 14 tubes, mean pooling). It works
    on any backbone of `PromptedViT`, of images or of clips.

    Args:
        num_tokens: T, at least 1.
        start, end: first and last block with prompts; None is the last of all.
        dropout: on prompts, one mask per step for the whole batch (published: 0.1).

    Attributes:
        keys, values: (blocks, T, d), U(-v, v) with v = sqrt(6 / (C ph pw + d)).
        scales: (blocks, 2, T), ones; below 1 a scale has no effect and no gradient. At 1, where
            all start, a tie of max(s, 1), the gradient is half of the one above 1, as released.

    Neither KLD nor MPA applies: there are no prompts in the width of the rows.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
    """

    keys: nn.Parameter
    values: nn.Parameter
    scales: nn.Parameter
    training_arguments = ("dropout",)

    def __init__(
        self, num_tokens: int, start: int = 0, end: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_tokens = check_count("num_tokens", num_tokens)
        if num_tokens == 0:
            raise ValueError("num_tokens must be at least 1, got 0")
        self.start = check_count("start", start)
        self.end = None if end is None else check_count("end", end)
        self.dropout = check_probability("dropout", dropout)
        for name in ("keys", "values", "scales"):
            self.register_parameter(name, None)

    def bind(self, shape: BackboneShape) -> None:
        last = shape.depth - 1 if self.end is None else self.end
        if not self.start <= last < shape.depth:
            raise ValueError(
                f"start and end must satisfy 0 <= start <= end < {shape.depth}, got {self.start} "
                f"and {self.end}"
            )
        self._blocks = range(self.start, last + 1)
        size = len(self._blocks), self.num_tokens, shape.head_width
        bound = (6.0 / (shape.patch_values + shape.head_width)) ** 0.5
        self.keys = nn.Parameter(torch.empty(size).uniform_(-bound, bound))
        self.values = nn.Parameter(torch.empty(size).uniform_(-bound, bound))
        self.scales = nn.Parameter(torch.ones(len(self._blocks), 2, self.num_tokens))

    @property
    def prompt_counts(self) -> list[int]:
        return [0] * self.shape.depth

    def raw_prompts(self) -> list[Tensor | None]:
        return [None] * self.shape.depth

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        return None

    def head_keys_values(self, index: int, x: Tensor) -> Tensor | None:
        if index not in self._blocks:
            return None
        i = index - self.start
        pair = torch.stack([self.keys[i], self.values[i]], dim=1)  # (T, 2, d)
        scales = self.scales[i]
        # not clamp, which gives a tie the whole gradient
        scales = torch.maximum(scales, scales.new_ones(()))
        pair = pair * scales.t()[..., None]
        pair = F.dropout(pair, self.dropout, self.training)
        return pair[:, :, None].expand(-1, -1, self.shape.num_heads, -1)
