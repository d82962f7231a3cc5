"""What comes into Modal Pre-Alignment, checked, and what it must not disturb."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..model import PromptedViT
from ..prompts import PromptFamily


def prompt_count(model: PromptedViT) -> int:
    """P, or raise when these prompts cannot be set to P rows per block."""
    if not isinstance(model, PromptedViT):
        raise TypeError(
            f"model must be a PromptedViT, not a wrapper around one, got {type(model).__name__}"
        )
    model.view.require_one_width("Modal Pre-Alignment")
    if model.num_classes == 0:
        raise ValueError("model.head must be linear to rank windows: give PromptedViT num_classes")
    family = model.prompts
    if family.depends_on_input or type(family).set_prompts is PromptFamily.set_prompts:
        name = type(family).__name__
        raise ValueError(f"model.prompts ({name}) computes its prompts, so none can be set")
    if family.bypasses_attention:
        name = type(family).__name__
        raise ValueError(
            f"model.prompts ({name}) changes what attention gives (attention_bypass), and Modal "
            "Pre-Alignment (mpa) ranks windows by frozen blocks: leave it out"
        )
    counts = family.prompt_counts[:1] if family.enters_sequence else family.prompt_counts
    if len(set(counts)) > 1:
        raise ValueError(
            "model.prompts must have one count for all blocks, because each block's prompts become "
            f"the next one's, got {counts}"
        )
    if counts[0] == 0:
        raise ValueError("model.prompts has 0 prompts per block, expected at least 1")
    return counts[0]


def refuse_clips(model: PromptedViT) -> None:
    """Raise for a model whose inputs have no spectrum of an image."""
    if model.view.frames is not None:
        raise ValueError(
            f"model takes clips of {model.view.frames} frames, and Modal Pre-Alignment (mpa) "
            "filters the spectrum of images: use pae.spt_init, or the family's own first values"
        )


def check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def first_batch(images: Tensor | Iterable, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The batch itself, or the first one of a loader."""
    if isinstance(images, Tensor):
        if labels is None:
            raise ValueError("labels must be given when images is a tensor, got None")
        return images, labels
    if not isinstance(images, Iterable):
        raise TypeError(f"images must be a tensor or a loader, got {type(images).__name__}")
    if labels is not None:
        raise ValueError("labels must be None when images is a loader: its batches carry them")
    batch = next(iter(images), None)
    if batch is None:
        raise ValueError("images is a loader without a batch")
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(f"images must yield (images, labels) pairs, got {type(batch).__name__}")
    return batch[0], batch[1]


def checked_batch(
    model: PromptedViT, images: Tensor, labels: Tensor, head: str
) -> tuple[Tensor, Tensor]:
    """The batch on the model's device, images in at least float32, or an error that names it."""
    refuse_clips(model)
    like = model.view.like
    floating = isinstance(images, Tensor) and images.is_floating_point()
    model.view.check_images(images.to(like) if floating else images)
    needed = 2 if head == "linear_probe" else 1  # a probe is judged on images it was not fitted to
    if len(images) < needed:
        raise ValueError(f"images must be {needed} or more for head {head!r}, got {len(images)}")
    if images.device.type != "cpu":  # there check_images has looked
        bad = int((~images.isfinite().flatten(1).all(dim=1)).sum())
        if bad:
            raise ValueError(f"images holds NaN or infinity in {bad} of {len(images)} images")
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of integers (B,), got {got}")
    if tuple(labels.shape) != (len(images),):
        raise ValueError(f"labels must be ({len(images)},) like images, got {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= model.num_classes:
        raise ValueError(f"labels must lie in [0, {model.num_classes}), got {low} to {high}")
    wide = torch.promote_types(like.dtype, torch.float32)  # there is no 16-bit FFT on the CPU
    return images.to(like.device, wide), labels.to(like.device, torch.int64)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@contextmanager
def undisturbed(model: PromptedViT, loader: object) -> Iterator[None]:
    """Eval mode without autocast inside; training flags and random states as before afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    generator = getattr(loader, "generator", None)
    states = (generator and generator.get_state(), np.random.get_state(), random.getstate())
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.autocast(model.device.type, enabled=False),
        ):
            model.eval()
            yield
    finally:
        for module, training in flags:
            module.training = training
        if generator:
            generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
