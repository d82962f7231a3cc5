"""Approximated prompt tuning: what prompt rows would add to attention, without prompt rows.

Source: Wu et al., "Approximated Prompt Tuning for Vision-Language Pre-trained Models" (arXiv
2306.15706), of image and language; other than the APT of video (`apt`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import (
    BackboneShape,
    PerThread,
    check_count,
    check_positive,
    check_probability,
    check_prompts,
    uniform_init_,
)
from .registry import register, register_pair
from .text_context import Pair, TextContext
from .vpt import _VPT

INIT_STD = 0.02


class Approximation(nn.Module):
    """The parameters of approximated prompts in some blocks, and what they do to attention.

    With h what attention reads and y what it gives, for each row by itself,

        R = P + (P A^T) B^T,   a = relu(h R^T),   y' = exp(s) (y + max_m(a) a P),

    where the maximum over the m prompts has no gradient. There is no softmax, no 1/sqrt(d), and
    there are no heads. A family of any kind can hold one and answer `attention_bypass` with it.

    Args:
        blocks: number of blocks.
        num_tokens: m.
        width: D.
        rank: r.

    Attributes:
        prompts: (blocks, m, D), P ~ N(0, 0.02).
        down: (blocks, r, D), A ~ N(0, 1).
        up: (blocks, D, r), B = 0: R is P at first, and A has no gradient.
        scale: (blocks,), s = 0.
    """

    def __init__(self, blocks: int, num_tokens: int, width: int, rank: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(INIT_STD * torch.randn(blocks, num_tokens, width))
        self.down = nn.Parameter(torch.randn(blocks, rank, width))
        self.up = nn.Parameter(torch.zeros(blocks, width, rank))
        self.scale = nn.Parameter(torch.zeros(blocks))

    def masks(self, dropout: float) -> Tensor | None:
        """(blocks, m) of one step: which activations of each block are dropped, and the factor of
        the others; None in eval mode and where none is.
        """
        if not self.training or dropout == 0.0:
            return None
        ones = self.scale.new_ones(len(self.scale), self.prompts.shape[1])
        return F.dropout(ones, dropout, training=True)

    def forward(self, index: int, h: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """y' (B, n, D) of h and y (B, n, D), in the dtype of y.

        Args:
            mask: (m,), by which the activations a are multiplied (dropout), or None.
        """
        p = self.prompts[index]
        keys = p + (p @ self.down[index].T) @ self.up[index].T
        a = F.relu(F.linear(h, keys.to(h.dtype)))
        a = a if mask is None else a * mask.to(a.dtype)
        scale = self.scale[index].exp().to(y.dtype)
        weights = (a.detach().amax(-1, keepdim=True) * scale) * a
        # the product lands on y: the sum of both is no pass of its own
        rows, added = scale * y, weights.to(y.dtype).flatten(0, -2)
        made = torch.addmm(rows.flatten(0, -2), added, p.to(y.dtype))
        return made.view(y.shape).to(y.dtype)


@register("apt-vl")
class ApproximatedPrompts(_VPT):
    """APT-VL: every block's attention has the effect of m prompts added to it, `Approximation`.

    No prompt is a token, so no block's sequence grows: per row 4 m D operations, where m more keys
    and values of plain attention cost as much and their own rows 24 m D^2.

    Args:
        num_tokens: m, at least 1 (published: 50 on ViLT, 200 on METER).
        rank: r, at least 1 (published: 4).
        num_rows: VPT-deep's prompts beside them, rows of every block that are read as keys and
            values; 0 for none.
        dropout: of the activations a, and of the rows, one mask per block and step for the whole
            batch and all its rows (the released code draws one per entry).

    Attributes:
        approximation: `Approximation` of all blocks.
        tokens: (depth, num_rows, D) as in `VPTDeep`; None without rows.

    KLD acts on the rows beside; MPA, whose forward runs frozen blocks, does not apply.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.

    Source: Wu et al. 2023, section 3, as released.
    """

    approximation: Approximation

    def __init__(
        self, num_tokens: int = 50, rank: int = 4, num_rows: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__(check_probability("dropout", dropout), "batch")
        self.num_tokens = check_positive("num_tokens", num_tokens)
        self.rank = check_positive("rank", rank)
        self.num_rows = check_count("num_rows", num_rows)

    def bind(self, shape: BackboneShape) -> None:
        self.approximation = Approximation(shape.depth, self.num_tokens, shape.width, self.rank)
        if self.num_rows:
            self.tokens = nn.Parameter(torch.empty(shape.depth, self.num_rows, shape.width))
            uniform_init_(self.tokens, shape)

    @property
    def prompt_counts(self) -> list[int]:
        return [self.num_rows] * self.shape.depth

    def raw_prompts(self) -> list[Tensor | None]:
        return list(self.tokens.unbind(0)) if self.num_rows else [None] * self.shape.depth

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        return self._drop(self.tokens[index], x) if self.num_rows else None

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        check_prompts("prompts", prompts, self.prompt_counts, self.shape.width)
        with torch.no_grad():
            for own, given in zip(self.tokens if self.num_rows else (), prompts):
                if given is not None:
                    own.copy_(given)

    def start_forward(self) -> None:
        super().start_forward()  # before anything else draws, in both engines
        self.this_forward["masks"] = self.approximation.masks(self.dropout)

    def attention_bypass(self, index: int, h: Tensor, y: Tensor) -> Tensor:
        masks = self.this_forward["masks"]
        return self.approximation(index, h, y, None if masks is None else masks[index])


class ApproximatedContext(TextContext):
    """APT-VL of a text tower: every block's attention has the effect of m prompts added to it, for
    every row of every text; beside them CoOp's rows, or none.

    Every row of a text is changed, its start token's too, so nothing of the tower is constant; what
    all texts begin with runs once all the same.

    Args:
        num_prompts: m, at least 1 (published: 50 on ViLT, 200 on METER).
        rank: r, at least 1 (published: 4).
        num_tokens, position: of the rows beside them, as in `TextContext`; 0: none.
        dropout: of the activations a, one mask per block and step for all texts and rows.

    Attributes:
        approximation: `Approximation` of all blocks. tokens: (n, D), as in `TextContext`.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.

    Source: Wu et al. 2023, section 3, as released.
    """

    approximation: Approximation
    training_arguments = ("dropout",)

    def __init__(
        self,
        num_prompts: int = 50,
        rank: int = 4,
        num_tokens: int = 0,
        position: str = "end",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_tokens, position)
        self.num_prompts = check_positive("num_prompts", num_prompts)
        self.rank = check_positive("rank", rank)
        self.dropout = check_probability("dropout", dropout)
        self._threads = PerThread()

    def bind(self, width: int, depth: int) -> None:
        super().bind(width, depth)
        self.approximation = Approximation(depth, self.num_prompts, width, self.rank)

    def start_forward(self) -> None:
        """Draws dropout, once for both engines."""
        self._threads.values["masks"] = self.approximation.masks(self.dropout)

    def attention_bypass(self, index: int, h: Tensor, y: Tensor) -> Tensor:
        """What block `index` adds to rows h (C, n, D) instead of attention's y."""
        masks = self._threads.values["masks"]
        return self.approximation(index, h, y, None if masks is None else masks[index])


@register_pair("apt-vl-both")
class ApproximatedPair(Pair):
    """APT-VL in both towers: `ApproximatedPrompts` and `ApproximatedContext`.

    Args:
        num_tokens, rank: m and r of either tower.
        num_rows: VPT-deep's prompts beside them in the image tower. context_tokens: CoOp's rows
            beside them in the text tower.
        dropout: of either tower.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.

    Source: Wu et al. 2023.
    """

    training_arguments = ("dropout",)

    def __init__(
        self,
        num_tokens: int = 50,
        rank: int = 4,
        num_rows: int = 0,
        context_tokens: int = 0,
        dropout: float = 0.0,
    ) -> None:
        image = ApproximatedPrompts(num_tokens, rank, num_rows, dropout)
        check_count("context_tokens", context_tokens)
        text = ApproximatedContext(num_tokens, rank, context_tokens, dropout=dropout)
        super().__init__(image, text)
        self.num_tokens, self.rank, self.num_rows = num_tokens, rank, num_rows
        self.context_tokens, self.dropout = context_tokens, image.dropout
