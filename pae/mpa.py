"""Modal Pre-Alignment: prompts that start at the frequencies the frozen network leans on.

Phase I ranks windows of the spectrum by the loss of the batch that keeps only that window, with all
prompts zero. Phase II turns the best P of them into P prompts: the energy-weighted mean of the stem
tokens of the filtered batch; deep prompts then travel alone through the frozen blocks.

What is not computed, although the textbook does: a transform per window (one for the batch), a full
inverse transform (two thin products), P equal prompts (one key with + log P), their queries, the
rows nobody reads in the last block, KLD.

Source: "Visual Prompt-Agnostic Evolution" (arXiv 2601.20232), Sec. 2.2, Eq. 2-4.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pae_kernels.spectrum import shortcut_images, shortcut_pool

from . import engine
from .model import PromptedViT
from .prompts import PromptFamily
from .sequence import cut_rows, insert_rows

HEADS = ("as_is", "linear_probe")
RIDGES = tuple(10.0**k for k in range(-4, 3))
SCALES = tuple(2.0**k for k in range(7))

# what one forward may hold: enough for full-speed products, little beside the model
_FORWARD_BYTES = {"cpu": 1 << 27, "cuda": 1 << 31}


@dataclass(frozen=True, eq=False)
class MPAResult:
    """What Modal Pre-Alignment found; tensors are on the CPU.

    Attributes:
        losses: (S,) mean cross-entropy of the batch seen through each window.
        origins: (S, 2) int64, first row and column of each window in the centred spectrum,
            numbered row by row.
        selected: (P,) int64, the windows behind prompts 0 to P - 1: smallest losses, best first.
        window, stride: side and step of the windows in bins. head: what ranked them.
    """

    losses: Tensor
    origins: Tensor
    selected: Tensor
    window: int
    stride: int
    head: str

    def report(self) -> str:
        """One line for a log."""
        best, worst = self.losses[self.selected[0]], self.losses[self.selected[-1]]
        return (
            f"MPA: {len(self.selected)} of {len(self.losses)} windows ({self.window} bins, stride "
            f"{self.stride}, head {self.head}), losses {best:.4f} to {worst:.4f}, all "
            f"{self.losses.min():.4f} to {self.losses.max():.4f}"
        )


@torch.no_grad()
def mpa_init(
    model: PromptedViT,
    images: Tensor | Iterable,
    labels: Tensor | None = None,
    window: int = 16,
    stride: int = 8,
    head: str = "as_is",
    chunk: int | None = None,
    progress: bool = True,
) -> MPAResult:
    """Set the prompts to p_k = sum w t(x_k), x_k = Re F^-1(M_k F x), for the P windows M_k of
    smallest loss.

    Nothing but the prompts changes: head, backbone, training flags and random state (PyTorch's,
    NumPy's and Python's, also as the loader used them) are as before. The result is the same on
    every run. Call it before the model is wrapped for data-parallel training, so that all ranks
    start from the prompts of one.

    Memory beside the model: spectrum 2 x images, and per forward at most about 128 MiB (CPU) or
    2 GiB (GPU), or one window's batch where that is more. Filtered images exist only for the
    windows of one forward.

    Args:
        model: its prompts are VPT-deep-like with one count P in all blocks, or VPT-shallow-like.
        images: (B, C, H, W) float, normalised as the backbone wants it; or a DataLoader or any
            iterable of (images, labels), whose first batch is taken.
        labels: (B,) integers in [0, classes); None with a loader.
        window: side of the windows in bins of the spectrum.
        stride: step from window to window.
        head: "as_is" ranks with the model's head, as published (there it is still random);
            "linear_probe" with a head fitted to this batch's frozen features (zero prompts in
            place), then dropped.
        chunk: windows per forward; None chooses by memory.
        progress: show a progress bar (on a terminal only).

    Returns:
        `MPAResult`.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what was expected.

    Numerics: the backbone's dtype, at least float32 for spectrum and losses; autocast is off.
    """
    count = _prompt_count(model)
    _check_positive("window", window)
    _check_positive("stride", stride)
    if chunk is not None:
        _check_positive("chunk", chunk)
    if head not in HEADS:
        raise ValueError(f"head must be one of {HEADS}, got {head!r}")

    with _undisturbed(model, images):
        images, labels = _checked_batch(model, *_first_batch(images, labels), head)
        origins = _window_origins(images, window, stride)
        if count > len(origins):
            raise ValueError(
                f"model.prompts has {count} prompts per block, but window {window} with stride "
                f"{stride} gives {len(origins)} windows in {tuple(images.shape[-2:])} images"
            )
        size, dtype = tuple(images.shape[-2:]), _weight(model).dtype
        spectrum = torch.fft.fft2(images)

        def filtered(origins: Tensor) -> Tensor:
            """The batch seen through some windows: (S, 2) -> (S B, C, H, W)."""
            return shortcut_images(spectrum, origins, window, size).flatten(0, 1).to(dtype)

        chunk = chunk or _windows_per_forward(model, images)
        with _ranking_head(model, head, images.to(dtype), labels, count):
            losses = _window_losses(model, filtered, labels, origins, count, chunk, progress)
        selected = losses.sort(stable=True).indices[:count]
        rows = _pooled_tokens(model, filtered, origins[selected], chunk)
        model.prompts.set_prompts(_through_blocks(model, rows))
    return MPAResult(losses, origins, selected, window, stride, head)


def _window_origins(images: Tensor, window: int, stride: int) -> Tensor:
    """(S, 2) first bins of all windows, row by row."""
    size = images.shape[-2:]
    if window > min(size):
        raise ValueError(f"window must be at most min(H, W) = {min(size)} of images, got {window}")
    return torch.cartesian_prod(*(torch.arange(0, side - window + 1, stride) for side in size))


# ---- phase I: the loss of every window


def _window_losses(
    model: PromptedViT,
    filtered: Callable[[Tensor], Tensor],
    labels: Tensor,
    origins: Tensor,
    count: int,
    chunk: int,
    progress: bool,
) -> Tensor:
    """(S,) mean cross-entropy per window, with `count` zero prompts in place, on the CPU."""
    losses = []
    with _progress_bar(len(origins), progress) as advance:
        for part in origins.split(chunk):
            logits = _logits_with_zero_prompts(model, filtered(part), count)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            each = F.cross_entropy(logits, labels.repeat(len(part)), reduction="none")
            losses.append(each.view(len(part), -1).mean(dim=1).cpu())
            advance(len(part))
    losses = torch.cat(losses)
    bad = int((~losses.isfinite()).sum())
    if bad:
        raise ValueError(f"model gives no finite loss for {bad} of {len(losses)} windows of images")
    return losses


def _logits_with_zero_prompts(model: PromptedViT, images: Tensor, count: int) -> Tensor:
    view = model.view
    x, row = view.embed(images), torch.zeros_like(_weight(model)[0])
    if not model.prompts.enters_sequence:
        return engine.class_logits_with_equal_prompts(model, x, row, count)
    # rows that live on between the blocks are more than keys: all of them run
    x = insert_rows(x, row.expand(count, -1), view.num_prefix_tokens)
    for block in view.blocks:
        x = block(x)
    return model.head(view.readout(cut_rows(x, view.num_prefix_tokens, count)))


@contextmanager
def _ranking_head(
    model: PromptedViT, head: str, images: Tensor, labels: Tensor, count: int
) -> Iterator[None]:
    """Inside, `model.head` is the head that ranks windows; afterwards it is the model's own."""
    if head == "as_is":
        yield
        return
    own, model.head = model.head, nn.Identity()
    try:
        # the zero prompts are in place here too: they move the features by more than a probe bears
        features = _logits_with_zero_prompts(model, images, count)
        model.head = fit_probe(features, labels, own.out_features)
        yield
    finally:
        model.head = own


@torch.no_grad()
def fit_probe(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """s (W f + b) with (W, b) = argmin sum |W f + b - onehot(y)|^2 + ridge |W|^2, in closed form.

    `ridge` (relative to the mean eigenvalue of the centred Gram matrix) and the scale s are the
    pair of `RIDGES` x `SCALES` with the smallest leave-one-out cross-entropy, which has a closed
    form as well: an image's held-out prediction is (fit - h y) / (1 - h), h its leverage.

    Args:
        features: (B, F), B >= 2.
        labels: (B,) int64 in [0, classes).

    Returns:
        a linear layer in the dtype of `features`; computed in fp64.
    """
    x, y = features.double(), F.one_hot(labels, classes).double()
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    x = x - mean_x
    eigenvalues, basis = torch.linalg.eigh(x @ x.T)
    eigenvalues = eigenvalues.clamp_min(0)
    unit = eigenvalues.mean().clamp_min(1e-30)  # all features equal: W = 0 rather than 0 / 0

    best = (float("inf"), RIDGES[0], SCALES[0])
    for ridge in RIDGES:
        shrink = eigenvalues / (eigenvalues + ridge * unit)
        hat = (basis * shrink) @ basis.T + 1 / len(x)  # the intercept's share is 1 / B
        leverage = hat.diagonal()[:, None]
        held_out = (hat @ y - leverage * y) / (1 - leverage)
        for scale in SCALES:
            best = min(best, (F.cross_entropy(scale * held_out, labels).item(), ridge, scale))

    _, ridge, scale = best
    dual = (basis / (eigenvalues + ridge * unit)) @ (basis.T @ (y - mean_y))
    probe = nn.utils.skip_init(nn.Linear, x.shape[1], classes, device=x.device, dtype=x.dtype)
    probe.weight.copy_(scale * dual.T @ x)
    probe.bias.copy_(scale * mean_y - probe.weight @ mean_x)
    return probe.to(features.dtype)


# ---- phase II: windows to prompts


def _pooled_tokens(
    model: PromptedViT, filtered: Callable[[Tensor], Tensor], origins: Tensor, chunk: int
) -> Tensor:
    """(P, D): the energy-weighted mean of each window's stem tokens, prefix tokens left out."""
    rows = []
    for part in origins.split(chunk):
        tokens = model.view.embed(filtered(part))[:, model.view.num_prefix_tokens :]
        rows.append(shortcut_pool(tokens.unflatten(0, (len(part), -1))))
    return torch.cat(rows)


def _through_blocks(model: PromptedViT, rows: Tensor) -> list[Tensor | None]:
    """Prompts of every block: `rows` in block 0, and what each block alone makes of them next."""
    blocks = model.view.blocks
    if model.prompts.enters_sequence:
        return [rows] + [None] * (len(blocks) - 1)
    prompts = [rows]
    for block in blocks[:-1]:
        prompts.append(block(prompts[-1][None])[0])
    return prompts


# ---- what comes in, and what must not be disturbed


def _prompt_count(model: PromptedViT) -> int:
    """P, or raise when these prompts cannot be set to P rows per block."""
    if not isinstance(model, PromptedViT):
        raise TypeError(
            f"model must be a PromptedViT, not a wrapper around one, got {type(model).__name__}"
        )
    if model.num_classes == 0:
        raise ValueError("model.head must be linear to rank windows: give PromptedViT num_classes")
    family = model.prompts
    if family.depends_on_input or type(family).set_prompts is PromptFamily.set_prompts:
        name = type(family).__name__
        raise ValueError(f"model.prompts ({name}) computes its prompts, so none can be set")
    counts = family.prompt_counts[:1] if family.enters_sequence else family.prompt_counts
    if len(set(counts)) > 1:
        raise ValueError(
            "model.prompts must have one count for all blocks, because each block's prompts become "
            f"the next one's, got {counts}"
        )
    if counts[0] == 0:
        raise ValueError("model.prompts has 0 prompts per block, expected at least 1")
    return counts[0]


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _first_batch(images: Tensor | Iterable, labels: Tensor | None) -> tuple[Tensor, Tensor]:
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


def _checked_batch(
    model: PromptedViT, images: Tensor, labels: Tensor, head: str
) -> tuple[Tensor, Tensor]:
    """The batch on the model's device, images in at least float32, or an error that names it."""
    like = _weight(model)
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


def _weight(model: PromptedViT) -> Tensor:
    """(*, D): a frozen weight, for its device and dtype."""
    return model.view.blocks[0].attn.qkv.weight


def _windows_per_forward(model: PromptedViT, images: Tensor) -> int:
    """How many windows fit one forward; sizes alone decide, so that every run sums alike."""
    batch, channels, height, width = images.shape
    shape = model.view.shape
    rows = -(-height // shape.patch_size[0]) * -(-width // shape.patch_size[1])
    # widest moment: the rows, their norm, four times as many hidden ones twice, attention's rest
    elements = 12 * rows * shape.width + 3 * channels * height * width
    room = _FORWARD_BYTES.get(images.device.type, _FORWARD_BYTES["cpu"])
    return max(1, room // (batch * elements * images.element_size()))


@contextmanager
def _undisturbed(model: PromptedViT, loader) -> Iterator[None]:
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


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator:
    """Yields advance(n); a bar on stderr where that is a terminal."""
    if not show:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    visible = console.is_terminal or console.is_jupyter
    with Progress(console=console, transient=True, disable=not visible) as bar:
        task = bar.add_task("MPA windows", total=total)
        yield lambda n: bar.advance(task, n)
