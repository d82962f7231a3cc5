"""Per-image losses of the batch seen through windows of its spectrum, packed into forwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pae_kernels.spectrum import shortcut_images, shortcut_tokens

from ..model import PromptedViT
from .forward import ZeroPromptForward
from .ranks import Ranks

# what one forward may hold: enough for full-speed products, little beside the model
_FORWARD_BYTES = {"cpu": 1 << 27, "cuda": 1 << 31}


class FilteredBatch:
    """The batch seen through windows, as rows that enter the first block.

    Where the stem is a plain patch convolution its tokens come straight from the spectrum, and no
    filtered image exists.

    Args:
        model: a PromptedViT.
        spectrum: (B, C, H, W) complex, `torch.fft.fft2` of the images.
        origins: (S, 2) int64, first bins of all windows in the centred spectrum.
        window: side of the windows.
    """

    def __init__(self, model: PromptedViT, spectrum: Tensor, origins: Tensor, window: int) -> None:
        self._view, self._spectrum = model.view, spectrum
        self._origins, self._window = origins, window
        self.size = spectrum.shape[-2], spectrum.shape[-1]
        self._dtype = backbone_dtype(model)
        self.num_prefix_tokens = model.view.num_prefix_tokens
        self._stem = model.view.patch_convolution(self.size)

    def rows(self, windows: Tensor, images: Tensor) -> Tensor:
        """(s b, N, D), window by window, for windows (s,) and images (b,), int64 on the CPU."""
        spectrum, device = self._spectrum, self._spectrum.device
        if not torch.equal(images, torch.arange(len(spectrum))):
            spectrum = spectrum[images.to(device)]
        origins = self._origins[windows.to(device)]
        if self._stem is None:
            pixels = shortcut_images(spectrum, origins, self._window, self.size)
            return self._view.embed(pixels.flatten(0, 1).to(self._dtype))
        weight, bias = self._stem.weight, self._stem.bias
        tokens = shortcut_tokens(spectrum, origins, self._window, self.size, weight, bias)
        return self._view.embed_tokens(tokens.flatten(0, 1), self.size)


def backbone_dtype(model: PromptedViT) -> torch.dtype:
    """Of the frozen weights."""
    return model.view.like.dtype


def images_per_forward(model: PromptedViT, size: tuple[int, int]) -> int:
    """How many filtered images fit one forward; sizes alone decide, so that every run sums
    alike.
    """
    shape, (height, width) = model.view.shape, size
    rows = -(-height // shape.patch_size[0]) * -(-width // shape.patch_size[1])
    # widest moment: the rows, their norm, four times as many hidden ones twice, attention's rest
    elements = 12 * rows * shape.width + 3 * shape.in_chans * height * width
    room = _FORWARD_BYTES.get(model.device.type, _FORWARD_BYTES["cpu"])
    return max(1, room // (elements * backbone_dtype(model).itemsize))


class WindowLosses:
    """Losses of any windows on any images of the batch, on demand.

    A forward holds whole windows, or a part of the images of one where they are many. The forwards
    are the same for every number of ranks and devices, which take turns at them; so the losses are
    the same too, bit for bit where the machines round alike.

    Args:
        model: a PromptedViT, with the head that ranks.
        spectrum, origins, window: as in `FilteredBatch`.
        labels: (B,) int64, on the device of `spectrum`.
        count: P.
        ranks: which share the forwards.
        devices: of this rank, which share its forwards; each but the model's gets a copy of it.
        chunk: windows per forward; None chooses by memory.
        advance: called with the number of filtered images that are done.

    Attributes:
        windows: S. dtype: the backbone's. forwards: filtered images asked for so far.
    """

    def __init__(
        self,
        model: PromptedViT,
        spectrum: Tensor,
        labels: Tensor,
        origins: Tensor,
        window: int,
        count: int,
        ranks: Ranks,
        devices: list[torch.device],
        chunk: int | None,
        advance: Callable[[int], None],
    ) -> None:
        self.windows, self.dtype, self.forwards = len(origins), backbone_dtype(model), 0
        self._ranks, self._chunk, self._advance = ranks, chunk, advance
        self._room = images_per_forward(model, (spectrum.shape[-2], spectrum.shape[-1]))
        self._workers = []
        for device in devices:
            own = model if device == model.device else copy.deepcopy(model).to(device)
            batch = FilteredBatch(own, spectrum.to(device), origins.to(device), window)
            self._workers.append(_Worker(own, batch, labels.to(device), count))

    def in_dtype(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        """(windows (s,), images (b,)) -> losses (s, b) on the CPU, with products in `dtype`."""

        def losses_of(windows: Tensor, images: Tensor) -> Tensor:
            return self._losses(windows, images, dtype)

        return losses_of

    def _losses(self, windows: Tensor, images: Tensor, dtype: torch.dtype) -> Tensor:
        self.forwards += len(windows) * len(images)
        parts = self._parts(len(windows), len(images))[self._ranks.rank :: self._ranks.world]
        found = []
        for i, (rows, columns) in enumerate(parts):
            worker = self._workers[i % len(self._workers)]
            times = (len(parts) - i) // len(self._workers) if i < len(self._workers) else None
            found.append(worker.losses(windows[rows], images[columns], dtype, times))
            self._advance(found[-1].numel() * self._ranks.world)
        wide = torch.promote_types(self.dtype, torch.float32)
        table = torch.zeros(len(windows), len(images), dtype=wide)
        for (rows, columns), part in zip(parts, found):  # only now a device is waited for
            table[rows, columns] = part.to(table)
        return self._ranks.sum(table)

    def _parts(self, windows: int, images: int) -> list[tuple[slice, slice]]:
        """Which windows and images each forward holds."""
        blocks = 1 if self._chunk else math.ceil(images / self._room)
        width = math.ceil(images / blocks)
        height = self._chunk or max(1, self._room // width)
        return [
            (slice(s, s + height), slice(i, i + width))
            for s in range(0, windows, height)
            for i in range(0, images, width)
        ]


class _Worker:
    """Runs forwards on one device."""

    def __init__(
        self, model: PromptedViT, batch: FilteredBatch, labels: Tensor, count: int
    ) -> None:
        self._model, self._batch, self._labels, self._count = model, batch, labels, count
        self._forwards: dict[torch.dtype, ZeroPromptForward] = {}

    def losses(
        self, windows: Tensor, images: Tensor, dtype: torch.dtype, times: int | None
    ) -> Tensor:
        """(s, b) on this device; `times`: how often a forward of this size comes, if known."""
        if dtype not in self._forwards:
            self._forwards[dtype] = ZeroPromptForward(
                self._model, self._count, dtype, self._batch.size
            )
        forward, device = self._forwards[dtype], self._labels.device
        x = self._batch.rows(windows, images)
        if times is not None:
            forward.expect(x.shape[:2].numel(), times)
        logits = forward(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = self._labels[images.to(device)].repeat(len(windows))
        return F.cross_entropy(logits, labels, reduction="none").view(len(windows), -1)
