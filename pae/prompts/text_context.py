"""Learned rows in the texts of a text tower, and pairs of prompts for both towers of a CLIP.

Source of `TextContext` and `CoOp`: Zhou et al., "Learning to Prompt for Vision-Language Models"
(IJCV 2022, arXiv 2109.01134).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import PromptFamily, as_config, check_choice, check_count, shown_config
from .registry import register_pair
from .vpt import VPTDeep

POSITIONS = ("end", "middle")
INIT_STD = 0.02


class Context(nn.Module):
    """What `pae.PromptedText` asks for the learned rows of its texts.

    Attributes:
        num_tokens: rows n of a text. position: of the class name, behind all of them ("end"), or
            with n // 2 of them in front and the others behind it ("middle").
    """

    num_tokens: int
    position: str = "end"
    training_arguments: tuple[str, ...] = ()  # as those of a `PromptFamily`

    def bind(self, width: int, depth: int) -> None:
        """Allocate the parameters for a tower of width D and so many blocks. `PromptedText` calls
        it, once.

        Raises:
            RuntimeError: it belongs to a tower already.
        """
        raise NotImplementedError(f"{type(self).__name__} does not answer bind")

    def rows(self) -> Tensor:
        """(n, D), or (C, n, D) where each class has its own; positions are added behind it."""
        raise NotImplementedError(f"{type(self).__name__} does not answer rows")

    def _refuse_second(self, bound: bool) -> None:
        if bound:
            raise RuntimeError(
                f"this {type(self).__name__} already belongs to a model; build a new one"
            )


class TextContext(Context):
    """CoOp's context: n free rows in front of the class name, for all classes or for each its own.

    Args:
        num_tokens: n (published: 16; 4 in later work).
        position: where the class name stands: "end", or "middle", between both halves.
        num_classes: C, for rows of each class's own; 0: all classes share them.

    Attributes:
        tokens: (n, D) or (C, n, D), N(0, 0.02).

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.

    Source: Zhou et al. 2022, eq. 2-3; both positions and both sharings are the paper's.
    """

    tokens: nn.Parameter

    def __init__(self, num_tokens: int = 16, position: str = "end", num_classes: int = 0) -> None:
        super().__init__()
        self.num_tokens = check_count("num_tokens", num_tokens)
        self.position = check_choice("position", position, POSITIONS)
        self.num_classes = check_count("num_classes", num_classes)
        self.register_parameter("tokens", None)

    def bind(self, width: int, depth: int) -> None:
        self._refuse_second(self.tokens is not None)
        sets = (self.num_classes,) if self.num_classes else ()
        self.tokens = nn.Parameter(INIT_STD * torch.randn(*sets, self.num_tokens, width))

    def rows(self) -> Tensor:
        return self.tokens

    def config(self) -> dict[str, Any]:
        """Constructor arguments as plain JSON values."""
        return as_config(self)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())


class Pair(nn.Module):
    """Prompts of an image tower and of a text tower that belong together.

    A pair may look at both towers' features in training (`see_features`) and add to the loss
    (`penalty`); what both prompts are made of is part of the pair alone.

    Attributes:
        image: the family of the image tower. text: the context of the text tower, or None.
    """

    image: PromptFamily
    text: Context | None
    training_arguments: tuple[str, ...] = ()  # as those of a `PromptFamily`

    def __init__(self, image: PromptFamily, text: Context | None) -> None:
        super().__init__()
        self.image, self.text = image, text

    def config(self) -> dict[str, Any]:
        """Constructor arguments as plain JSON values, enough to build the pair again.

        Raises:
            TypeError: an argument is kept under another name or not at all, or is no JSON value.
        """
        return as_config(self)

    def extra_repr(self) -> str:
        return shown_config(self)

    def see_features(self, image_features: Tensor, text_features: Tensor, labels: Tensor) -> None:
        """Shown, in training, unit features (B, E) and (C, E), and labels (B,) in [0, C)."""

    def penalty(self) -> Tensor | None:
        """Scalar added to the training loss, or None."""
        return None


@register_pair("coop")
class CoOp(Pair):
    """CoOp: a `TextContext` alone; the image tower has no prompts.

    Args:
        num_tokens, position: as in `TextContext`.
        num_classes: as there: 0 shares the rows among classes, which base-to-new evaluation needs.

    Raises:
        ValueError, TypeError: as `TextContext`.

    Source: Zhou et al. 2022.
    """

    def __init__(self, num_tokens: int = 16, position: str = "end", num_classes: int = 0) -> None:
        context = TextContext(num_tokens, position, num_classes)
        super().__init__(VPTDeep(0), context)
        self.num_tokens, self.position = context.num_tokens, context.position
        self.num_classes = context.num_classes
