"""The filter of Modal Pre-Alignment: one batch seen through every window, per window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pae_kernels.spectrum import shortcut_images

from . import peers_mpa
from .contest import Contestant, Group, Provider, Settings, relative

OFFICIAL, HOISTED = "official-style", "one FFT, full inverse"
LIMIT = 1e-5  # norm-relative to fp64


@dataclass
class Batch:
    """What all providers share: images, windows, and the filtered images in fp64."""

    images: Tensor
    origins: Tensor
    window: int
    expected: Tensor


def open_batch(size: int, window: int, windows: int, batch: int, device: torch.device) -> Batch:
    """Windows spread over the whole spectrum, the one at frequency 0 among them."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    steps = torch.linspace(0, size - window, windows).long()
    origins = torch.stack([steps, steps.roll(windows // 3)], dim=1)
    origins[0] = size // 2 - window // 2
    wide = images.double()
    expected = [peers_mpa.official_style_filter(wide, *o, window) for o in origins.tolist()]
    return Batch(images, origins, window, torch.stack(expected))


def one_transform(images: Tensor, origins: Tensor, window: int) -> Tensor:
    """The transform once for all windows, the inverse in full for each."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    filtered = []
    for row, col in origins.tolist():
        kept = torch.zeros_like(spectrum)
        box = (..., slice(row, row + window), slice(col, col + window))
        kept[box] = spectrum[box]
        filtered.append(torch.fft.ifft2(torch.fft.ifftshift(kept, dim=(-2, -1))).real)
    return torch.stack(filtered)


def official(images: Tensor, origins: Tensor, window: int) -> Tensor:
    filtered = [peers_mpa.official_style_filter(images, *o, window) for o in origins.tolist()]
    return torch.stack(filtered)


def ours(images: Tensor, origins: Tensor, window: int) -> Tensor:
    return shortcut_images(torch.fft.fft2(images), origins, window, tuple(images.shape[-2:]))


def contestant(shared: Batch, filtered: Callable[[Tensor, Tensor, int], Tensor]) -> Contestant:
    def work() -> Tensor:
        return filtered(shared.images, shared.origins, shared.window)

    def check() -> dict[str, float]:
        error = relative(work(), shared.expected)
        assert error <= LIMIT, f"filtered images are off by {error:.1e}, more than {LIMIT}"
        return {"value_error": error}

    return Contestant(work, check, units=len(shared.origins))


def groups(settings: Settings) -> list[Group]:
    if settings.size == "smoke":
        return [group(24, 8, 3, 2, settings)]
    return [
        group(112, 16, 16, settings.batch or 16, settings),
        group(224, 16, 16, settings.batch or 8, settings),
    ]


def group(size: int, window: int, windows: int, batch: int, settings: Settings) -> Group:
    providers = {OFFICIAL: official, HOISTED: one_transform, "pae": ours}
    return Group(
        name=f"filter/{size}px/window{window}/B{batch}",
        open=lambda: open_batch(size, window, windows, batch, settings.device),
        providers=[
            Provider(name, lambda shared, work=work: contestant(shared, work))
            for name, work in providers.items()
        ],
        baselines=(OFFICIAL, HOISTED),
        rounds=7,
        unit="window",
    )


def test_filter(benchmark, replay):
    replay(benchmark)
