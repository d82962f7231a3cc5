"""DAPT: context in both towers, and two losses that shape how features are distributed.

Source: Cho et al., "Distribution-Aware Prompt Tuning for Vision-Language Models" (ICCV 2023, arXiv
2309.03406).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import PerThread, check_count, check_number
from .registry import register_pair
from .text_context import Pair, TextContext
from .vpt import VPTShallow

SPREAD = 2.0  # t of the Gaussian potential, published


@register_pair("dapt")
class DAPT(Pair):
    """VPT-shallow in the image tower, a shared `TextContext` in the text tower, and

        b_v mean (f - prototype[y])^2  +  b_t mean_{i<j} exp(-2 |g_i - g_j|^2)

    beside the cross-entropy, with f the unit image features, g the unit text features, both means
    over all entries. The first draws an image's features to the prototype of its class, the second
    drives the classes' texts apart. Prototypes are means of the frozen tower's unit features over
    a class's training images, as training shows them: `find_prototypes`.

    Args:
        num_tokens: rows n of the text context.
        image_tokens: prompts of the image tower.
        image_weight: b_v. text_weight: b_t.

    Attributes:
        image: `VPTShallow`. text: `TextContext`. prototypes: (C, E), or None; no part of a file.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.

    Source: Cho et al. 2023, eq. 4-8, as released.
    """

    prototypes: Tensor | None
    training_arguments = ("image_weight", "text_weight")

    def __init__(
        self,
        num_tokens: int = 16,
        image_tokens: int = 16,
        image_weight: float = 0.1,
        text_weight: float = 0.1,
    ) -> None:
        super().__init__(VPTShallow(image_tokens), TextContext(num_tokens))
        self.num_tokens = check_count("num_tokens", num_tokens)
        self.image_tokens = check_count("image_tokens", image_tokens)
        self.image_weight = check_number("image_weight", image_weight)
        self.text_weight = check_number("text_weight", text_weight)
        self.register_buffer("prototypes", None, persistent=False)
        self._seen = PerThread()

    def find_prototypes(self, model: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Set `prototypes` to the class means over one pass of training images.

        Args:
            model: the `PromptedCLIP` that this pair belongs to; its prompts are left out.
            batches: (images, labels in [0, C)), every class at least once.

        Returns:
            (C, E), not scaled to unit length again.

        Raises:
            ValueError: a class without an image.
        """
        vision, classes = model.vision, model.num_classes
        sums = counts = None
        for images, labels in batches:
            found = frozen_features(vision, images)
            if sums is None or counts is None:
                sums = found.new_zeros(classes, found.shape[1])
                counts = found.new_zeros(classes)
            sums.index_add_(0, labels, found)
            counts.index_add_(0, labels, torch.ones_like(found[:, 0]))
        if sums is None or counts is None or not bool(counts.all()):
            which = 0 if counts is None else int(counts.argmin())
            raise ValueError(
                f"batches must hold an image of every class for DAPT's prototypes, none of {which}"
            )
        self.prototypes = sums / counts[:, None]
        return self.prototypes

    def losses(
        self, image_features: Tensor, text_features: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both terms without their weights, of unit features (B, E) and (C, E).

        Raises:
            RuntimeError: there are no prototypes yet.
        """
        if self.prototypes is None:
            raise RuntimeError("DAPT has no prototypes yet: call pair.find_prototypes(model, data)")
        to_prototype = F.mse_loss(image_features, self.prototypes[labels].to(image_features))
        wide = torch.promote_types(text_features.dtype, torch.float32)
        squares = torch.pdist(text_features.to(wide)).square()
        if not len(squares):  # one class has nobody to keep away from
            return to_prototype, text_features.sum() * 0.0
        return to_prototype, (-SPREAD * squares).exp().mean()

    def see_features(self, image_features: Tensor, text_features: Tensor, labels: Tensor) -> None:
        image, text = self.losses(image_features, text_features, labels)
        self._seen.values["penalty"] = self.image_weight * image + self.text_weight * text

    def penalty(self) -> Tensor | None:
        if "penalty" not in self._seen.values:
            raise RuntimeError(
                "DAPT's losses read both towers' features and the labels: use "
                "model.loss(images, labels), or call pair.see_features ahead of each penalty()"
            )
        return self._seen.values.pop("penalty")


@torch.no_grad()
def frozen_features(vision: Any, images: Tensor) -> Tensor:
    """Unit features (B, E) of a `PromptedViT`'s backbone without its prompts, in at least fp32."""
    view = vision.view
    view.check_images(images)
    x = view.embed(images)
    for i, geometry in enumerate(view.geometry(tuple(images.shape[-2:]))):
        x = view.run_block(i, view.enter(i, x, [geometry] * (i + 1)), geometry)
    found = vision.head(view.readout(x))
    return F.normalize(found.to(torch.promote_types(found.dtype, torch.float32)), dim=-1)
