"""UPT: one small transformer makes the prompts of both towers; and its deep variant.

Sources: Zang et al., "Unified Vision and Language Prompt Learning" (arXiv 2210.07225); Shen et al.,
"Multitask Vision-Language Prompt Tuning" (WACV 2024, arXiv 2211.11720).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import (
    BackboneShape,
    PromptFamily,
    check_flag,
    check_positive,
    check_probability,
    uniform_init_,
)
from .registry import register_pair
from .text_context import INIT_STD, Context, Pair

NARROW = 128  # width of the deep variant's transformer, published


class Mixer(nn.Module):
    """s = LN1(s + drop(attention(s))); s = s + drop(W2 drop(relu(W1 LN2(s)))), with one head.

    Args:
        width: of the rows. dropout: also of the attention's weights.
        mixes: whether rows are one sequence; otherwise each is a sequence of its own.

    Attributes:
        self_attn: `nn.MultiheadAttention`. norm1, norm2, linear1, linear2: in PyTorch's initial
            state.
    """

    def __init__(self, width: int, dropout: float, mixes: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, 1, dropout, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout, self.mixes = dropout, mixes

    def forward(self, rows: Tensor) -> Tensor:
        """(n, width) to (n, width)."""
        sequences = rows[None] if self.mixes else rows[:, None]
        mixed, _ = self.self_attn(sequences, sequences, sequences, need_weights=False)
        rows = self.norm1(rows + self._drop(mixed.view(rows.shape)))
        hidden = self._drop(F.relu(self.linear1(self.norm2(rows))))
        return rows + self._drop(self.linear2(hidden))

    def _drop(self, rows: Tensor) -> Tensor:
        return F.dropout(rows, self.dropout, self.training)


class _Made(PromptFamily):
    """Image prompts that a pair makes, which is no part of this module.

    The pair makes them when a forward starts, once for all blocks, so that both engines draw alike.
    """

    def __init__(self, pair: UPT | UPTDeep) -> None:
        super().__init__()
        self._pair = (pair,)  # in a tuple: no part of this module

    @property
    def pair(self) -> UPT | UPTDeep:
        """Whose prompts these are."""
        return self._pair[0]

    def config(self) -> dict[str, Any]:
        """Nothing: the pair's says it all."""
        return {}

    def start_forward(self) -> None:
        super().start_forward()
        if self.training:
            self.this_forward["rows"] = self.pair.image_rows()

    def _rows(self) -> Tensor:
        made = self.this_forward.get("rows") if self.training else None
        return self._without_dropout() if made is None else made

    def _without_dropout(self) -> Tensor:
        modes = {part: part.training for part in self.pair.modules()}
        try:
            self.pair.eval()
            return self.pair.image_rows()
        finally:
            for part, mode in modes.items():
                part.training = mode


class _MadeContext(Context):
    """Text rows that a pair makes."""

    def __init__(self, pair: UPT | UPTDeep, num_tokens: int) -> None:
        super().__init__()
        self._pair, self.num_tokens = (pair,), num_tokens

    def bind(self, width: int, depth: int) -> None:
        self._refuse_second(self._pair[0].width != 0)
        self._pair[0].take_text(width)

    def rows(self) -> Tensor:
        return self._pair[0].text_rows()


class _ImageUPT(_Made):
    """Rows that live on, entering ahead of the norm in front of the first block."""

    enters_sequence = True
    enters_before_norm = True

    def bind(self, shape: BackboneShape) -> None:
        self.pair.take_image(shape)

    @property
    def prompt_counts(self) -> list[int]:
        return [self.pair.num_tokens] + [0] * (self.shape.depth - 1)

    def raw_prompts(self) -> list[Tensor | None]:
        return [self._without_dropout(), *[None] * (self.shape.depth - 1)]

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        return self._rows() if index == 0 and self.pair.num_tokens else None


class _DeepImageUPT(_Made):
    """Rows of every block, read as keys and values."""

    def bind(self, shape: BackboneShape) -> None:
        self.pair.take_image(shape)

    @property
    def prompt_counts(self) -> list[int]:
        return [self.pair.num_tokens] * self.shape.depth

    def raw_prompts(self) -> list[Tensor | None]:
        return [*self._without_dropout().unbind(0)]

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        return self._rows()[index]

    def all_prompts(self, x: Tensor) -> list[Tensor | None]:
        return [*self._rows().unbind(0)]


class _UPT(Pair):
    """What both variants share: who is bound when."""

    width: int = 0
    training_arguments = ("dropout",)

    def __init__(self, num_tokens: int, dropout: float, image: _Made) -> None:
        super().__init__(image, None)
        self.num_tokens = check_positive("num_tokens", num_tokens)
        self.dropout = check_probability("dropout", dropout)

    def _text_width(self) -> int:
        if self.width == 0:
            raise RuntimeError(
                f"{type(self).__name__} makes the image prompts from the text tower's width: build "
                "its pae.PromptedText before its pae.PromptedViT"
            )
        return self.width


@register_pair("upt")
class UPT(_UPT):
    """Unified prompts: 2 n learned rows go through one small transformer of the text's width; the
    first n are the text context, the others, mapped to the image tower's width, its prompts.

    The image prompts enter behind the class row and ahead of the norm that stands in front of the
    first block (CLIP's ln_pre), without a position, and live through all blocks. In training either
    half has its own draws of dropout, as the layer runs once for each.

    Args:
        num_tokens: n of either half (published: 4).
        dropout: of the transformer (published: 0.1).
        faithful: as released, where a wrong layout makes each row a sequence of its own, so that
            attention mixes nothing. False, the default, mixes all rows, as the paper has it.

    Attributes:
        image: its family. text: its context. uni_ctx: (2 n, D), N(0, 0.02), D the text's width.
        mixer: `Mixer`. mlp: `nn.Linear(D, D')`, D' the image's width.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
        RuntimeError: when the image tower is bound before the text tower.

    Source: Zang et al. 2022, section 3.3, as released.
    """

    uni_ctx: nn.Parameter
    mixer: Mixer
    mlp: nn.Linear

    def __init__(self, num_tokens: int = 4, dropout: float = 0.1, faithful: bool = False) -> None:
        super().__init__(num_tokens, dropout, _ImageUPT(self))
        self.text = _MadeContext(self, num_tokens)
        self.faithful = check_flag("faithful", faithful)

    def take_text(self, width: int) -> None:
        """Allocate what is of the text's width."""
        self.width = width
        self.uni_ctx = nn.Parameter(INIT_STD * torch.randn(2 * self.num_tokens, width))
        self.mixer = Mixer(width, self.dropout, not self.faithful)

    def take_image(self, shape: BackboneShape) -> None:
        """Allocate the map to the image tower's width."""
        self.mlp = nn.Linear(self._text_width(), shape.width)
        self.mlp.to(self.uni_ctx.device, self.uni_ctx.dtype)

    def text_rows(self) -> Tensor:
        """(n, D)."""
        return self.mixer(self.uni_ctx)[: self.num_tokens]

    def image_rows(self) -> Tensor:
        """(n, D')."""
        return self.mlp(self.mixer(self.uni_ctx)[self.num_tokens :])


@register_pair("upt-deep")
class UPTDeep(_UPT):
    """The deep variant: prompts of every image block and the text context are mixed by one narrow
    transformer.

    All depth n image rows and n text rows are mapped to a width of `hidden`, go through one `Mixer`
    as one sequence, and are mapped back. They depend on parameters alone: once per step.

    Reconstructed: that image prompts are deep and the transformer is narrow is the paper's; that it
    is UPT's layer, with linear maps before and behind it, is a reading of it.

    Args:
        num_tokens: n per block, and of the text.
        hidden: width of the transformer (published: 128).
        dropout: of the transformer, as in `UPT`.

    Attributes:
        image: its family. text: its context. image_tokens: (depth, n, D'), VPT's uniform start.
        text_tokens: (n, D), N(0, 0.02). mixer: `Mixer`. image_in, image_out, text_in, text_out:
            linear maps.

    Raises:
        ValueError, TypeError, RuntimeError: as `UPT`.

    Source: Shen et al. 2024, section 3.2.
    """

    image_tokens: nn.Parameter
    text_tokens: nn.Parameter

    def __init__(self, num_tokens: int = 4, hidden: int = NARROW, dropout: float = 0.1) -> None:
        super().__init__(num_tokens, dropout, _DeepImageUPT(self))
        self.text = _MadeContext(self, num_tokens)
        self.hidden = check_positive("hidden", hidden)

    def take_text(self, width: int) -> None:
        """Allocate what is of the text's width."""
        self.width = width
        self.text_tokens = nn.Parameter(INIT_STD * torch.randn(self.num_tokens, width))
        self.text_in, self.text_out = nn.Linear(width, self.hidden), nn.Linear(self.hidden, width)
        self.mixer = Mixer(self.hidden, self.dropout, mixes=True)

    def take_image(self, shape: BackboneShape) -> None:
        """Allocate what is of the image tower's width."""
        self._text_width()
        like = self.text_tokens
        tokens = torch.empty(shape.depth, self.num_tokens, shape.width)
        uniform_init_(tokens, shape)
        self.image_tokens = nn.Parameter(tokens.to(like.device, like.dtype))
        self.image_in = nn.Linear(shape.width, self.hidden).to(like.device, like.dtype)
        self.image_out = nn.Linear(self.hidden, shape.width).to(like.device, like.dtype)

    def _mixed(self) -> Tensor:
        rows = [self.image_in(self.image_tokens).flatten(0, 1), self.text_in(self.text_tokens)]
        return self.mixer(torch.cat(rows))

    def text_rows(self) -> Tensor:
        """(n, D)."""
        return self.text_out(self._mixed()[-self.num_tokens :])

    def image_rows(self) -> Tensor:
        """(depth, n, D')."""
        made = self.image_out(self._mixed()[: -self.num_tokens])
        return made.unflatten(0, (-1, self.num_tokens))
