"""`mpa_init`: from a batch to prompts, in the two phases of the paper."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from pae_kernels.spectrum import shortcut_pool

from ..backbones.view import NO_GEOMETRY
from ..choices import MPA_HEADS, MPA_PRECISIONS, MPA_SEARCHES
from ..engine import unprompted
from ..model import PromptedViT
from . import incoming
from .forward import ZeroPromptForward
from .losses import FilteredBatch, WindowLosses, backbone_dtype
from .near_ties import NearTies, confirm
from .probe import fit_probe
from .ranks import Ranks
from .search import Halving, Ranking, rank_all, rank_by_halving


@dataclass(frozen=True, eq=False)
class MPAResult:
    """What Modal Pre-Alignment found; tensors are on the CPU.

    Attributes:
        losses: (S,) mean cross-entropy of the batch seen through each window; an estimate for
            windows that a halving dropped, rounded where bf16 was not checked.
        origins: (S, 2) int64, first row and column of each window in the centred spectrum,
            numbered row by row.
        selected: (P,) int64, the windows behind prompts 0 to P - 1: smallest losses, best first.
        window, stride: side and step of the windows in bins. head: what ranked them.
        images_seen: (S,) int64, images that each window was ranked on; None for all.
        near_ties: what checking the bf16 losses found; None in exact precision.
        forwards: filtered images that went through the backbone, a second look counting again.
    """

    losses: Tensor
    origins: Tensor
    selected: Tensor
    window: int
    stride: int
    head: str
    images_seen: Tensor | None = None
    near_ties: NearTies | None = None
    forwards: int = 0

    def report(self) -> str:
        """One line for a log."""
        best, worst = self.losses[self.selected[0]], self.losses[self.selected[-1]]
        line = (
            f"MPA: {len(self.selected)} of {len(self.losses)} windows ({self.window} bins, stride "
            f"{self.stride}, head {self.head}), losses {best:.4f} to {worst:.4f}, all "
            f"{self.losses.min():.4f} to {self.losses.max():.4f}"
        )
        if self.images_seen is not None:
            share = self.images_seen.double().mean() / self.images_seen.max()
            line += f"; halving ran {100 * share:.0f} % of the forwards"
        if self.near_ties is not None:
            ties = self.near_ties
            line += f"; bf16, {len(ties.rechecked)} checked, {len(ties.added)} swapped"
        return line


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
    *,
    search: str | Halving = "exact",
    precision: str = "exact",
    devices: str | list | None = None,
) -> MPAResult:
    """Set the prompts to p_k = sum w t(x_k), x_k = Re F^-1(M_k F x), for the P windows M_k of
    smallest loss.

    Nothing but the prompts changes: head, backbone, training flags and random state (PyTorch's,
    NumPy's and Python's, also as the loader used them) are as before. The result is the same on
    every run. Call it before the model is wrapped for data-parallel training.

    Memory beside the model: spectrum 2 x images, and per forward at most about 128 MiB (CPU) or
    2 GiB (GPU); on a CPU also a second copy of the backbone's products, laid out for speed.

    Args:
        model: its prompts are VPT-deep-like with one count P in all blocks, or VPT-shallow-like.
            Of families that do more than add rows (head-space keys, changed image rows), the rows
            alone are in place while windows are ranked.
        images: (B, C, H, W) float, normalised as the backbone wants it; or a DataLoader or any
            iterable of (images, labels), whose first batch is taken.
        labels: (B,) integers in [0, classes); None with a loader.
        window: side of the windows in bins of the spectrum.
        stride: step from window to window.
        head: "as_is" ranks with the model's head, as published (there it is still random);
            "linear_probe" with a head fitted to this batch's frozen features (zero prompts in
            place), then dropped.
        chunk: windows per forward, with all images of the batch; None chooses by memory.
        progress: show a progress bar (on a terminal only).
        search: "exact" measures every window on every image. "halving", or a `Halving` with its
            settings, drops a window as soon as P others are surely better; what it may miss is
            bounded there. It pays with some 32 images and more.
        precision: "exact" is the backbone's. "bf16" ranks with products in bf16 and measures the
            windows near the boundary again in the backbone's precision, so that selection and
            order are those of "exact" (`near_ties.confirm` states the guarantee). For hardware that
            multiplies bf16; on a CPU without it (avx512_bf16 or AMX) it takes longer than fp32.
        devices: None: the model's. A list, e.g. ["cuda:0", "cuda:1"]: these share the windows, each
            with a copy of the model while it lasts. "ranks": all ranks of the default process group
            share them, if there is one; each must call this with a batch of the same shape and the
            same backbone, and all get the prompts of the first rank's batch and head.

    Returns:
        `MPAResult`.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what was expected.

    Numerics: at least float32 for spectrum and losses; autocast is off.
    """
    count = incoming.prompt_count(model)
    incoming.check_positive("window", window)
    incoming.check_positive("stride", stride)
    if chunk is not None:
        incoming.check_positive("chunk", chunk)
    _check_one_of("head", head, MPA_HEADS)
    _check_one_of("precision", precision, MPA_PRECISIONS)
    if not isinstance(search, Halving):
        _check_one_of("search", search, MPA_SEARCHES)
    ranks = Ranks(devices == "ranks", model.device)
    local = _local_devices(devices, model.device)

    with incoming.undisturbed(model, images):
        images, labels = incoming.checked_batch(model, *incoming.first_batch(images, labels), head)
        origins = _window_origins(images, window, stride)
        if count > len(origins):
            raise ValueError(
                f"model.prompts has {count} prompts per block, but window {window} with stride "
                f"{stride} gives {len(origins)} windows in {tuple(images.shape[-2:])} images"
            )
        _check_alike(ranks, model, count, len(origins), *images.shape)
        images, labels = ranks.from_first(images), ranks.from_first(labels)
        spectrum = torch.fft.fft2(images)
        with (
            _ranking_head(model, head, images, labels, count, ranks),
            _progress_bar(len(origins) * len(images), progress and ranks.rank == 0) as advance,
        ):
            losses = WindowLosses(
                model, spectrum, labels, origins, window, count, ranks, local, chunk, advance
            )
            ranking, ties = _ranking(losses, labels, count, search, precision)
        selected = ranking.complete[:count]
        batch = FilteredBatch(model, spectrum, origins, window)
        rows = [_pooled(batch, part, len(images)) for part in selected.split(chunk or 1)]
        prompts = _through_blocks(model, torch.cat(rows))
        model.prompts.set_prompts([None if p is None else ranks.from_first(p) for p in prompts])
    seen = None if search == "exact" else ranking.images_seen
    done = losses.forwards
    return MPAResult(ranking.losses, origins, selected, window, stride, head, seen, ties, done)


def _window_origins(images: Tensor, window: int, stride: int) -> Tensor:
    """(S, 2) first bins of all windows, row by row."""
    size = images.shape[-2:]
    if window > min(size):
        raise ValueError(f"window must be at most min(H, W) = {min(size)} of images, got {window}")
    return torch.cartesian_prod(*(torch.arange(0, side - window + 1, stride) for side in size))


def _local_devices(devices: str | list | None, own: torch.device) -> list[torch.device]:
    """The devices of this process that share its forwards."""
    if devices is None or devices == "ranks":
        return [own]
    if isinstance(devices, str) or not isinstance(devices, (list, tuple)) or not devices:
        raise ValueError(f"devices must be None, 'ranks' or a list of devices, got {devices!r}")
    try:
        return [torch.device(d) for d in devices]
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"devices must name devices, got {devices!r}: {error}") from error


def _check_alike(ranks: Ranks, model: PromptedViT, *sizes: int) -> None:
    """Raise on every rank when backbones or sizes differ between them."""
    if ranks.world == 1:
        return
    checksum = sum(p.double().abs().sum().item() for p in model.backbone.parameters())
    if not ranks.agree([checksum, *sizes]):
        raise ValueError(
            "devices='ranks' needs the same backbone, settings and batch shape on every rank, got "
            "different ones"
        )


# ---- phase I: the windows of smallest loss


def _ranking(
    losses: WindowLosses, labels: Tensor, count: int, search: str | Halving, precision: str
) -> tuple[Ranking, NearTies | None]:
    used = torch.bfloat16 if precision == "bf16" else losses.dtype
    if search == "exact":
        ranking = rank_all(losses.in_dtype(used), losses.windows, len(labels))
    else:
        how = search if isinstance(search, Halving) else Halving()
        ranking = rank_by_halving(losses.in_dtype(used), losses.windows, labels.cpu(), count, how)
    if used == losses.dtype:
        return ranking, None
    return confirm(ranking, count, losses.in_dtype(losses.dtype), len(labels))


@contextmanager
def _ranking_head(
    model: PromptedViT, head: str, images: Tensor, labels: Tensor, count: int, ranks: Ranks
) -> Iterator[None]:
    """Inside, `model.head` is the head that ranks windows; afterwards it is the model's own."""
    own = model.head
    try:
        if head == "linear_probe":
            model_classes = model.num_classes
            model.head = nn.Identity()
            # zero prompts are in place here too: they move the features by more than a probe bears
            dtype = backbone_dtype(model)
            height, width = images.shape[-2:]
            forward = ZeroPromptForward(model, count, dtype, (height, width))
            features = [forward(model.view.embed(part)) for part in images.to(dtype).split(_PROBED)]
            model.head = fit_probe(torch.cat(features), labels, model_classes)
        if ranks.world > 1:
            model.head = copy.deepcopy(model.head)
            for p in model.head.parameters():
                p.copy_(ranks.from_first(p))
        yield
    finally:
        model.head = own


_PROBED = 16  # images per forward of the probe's features


# ---- phase II: windows to prompts


def _pooled(batch: FilteredBatch, windows: Tensor, images: int) -> Tensor:
    """(s, D): the energy-weighted mean of each window's stem tokens, prefix tokens left out."""
    tokens = batch.rows(windows, torch.arange(images))[:, batch.num_prefix_tokens :]
    return shortcut_pool(tokens.unflatten(0, (len(windows), -1)))


def _through_blocks(model: PromptedViT, rows: Tensor) -> list[Tensor | None]:
    """Prompts of every block: `rows` in block 0, and what each block alone makes of them next."""
    depth = model.view.shape.depth
    if model.prompts.enters_sequence:
        return [rows] + [None] * (depth - 1)
    plan = model.plan().placed([NO_GEOMETRY] * depth)  # prompts stand at no place of the image
    return [x[0] for x in islice(unprompted(plan, rows[None]), depth)]


def _check_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


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
