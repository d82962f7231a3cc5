"""The filter of Modal Pre-Alignment alone, filter and patch embedding, and the pooling of phase II;
times are per window.

Rows of the first two transform the batch in every work: once for all its windows, the
official-style ones once per window, as released. The pooling's versions are timed on tokens that
are there, ours on a GPU as the replay of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pae_kernels.spectrum import shortcut_images, shortcut_pool, shortcut_tokens

from .peers import mpa as peers
from .roofline import DTYPES
from .rows import in_version, row
from .runner import Group, Provider, Runnable, Settings
from .shown import OFFICIAL

HOISTED = "one FFT, full inverse"
PICTURES, EAGER = "pae images, convolution", "eager"
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # norm-relative to fp64
VERSIONS = {"reference": "reference", "Triton": "triton", "CUDA": "cuda"}


@dataclass(frozen=True)
class Case:
    """Images, windows, and the patch embedding behind them, if any."""

    size: int
    window: int
    windows: int
    batch: int
    patch: int = 16
    dim: int = 768
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        stem = f"{self.size}px/patch{self.patch}/D{self.dim}/window{self.window}"
        return f"{stem}/{self.dtype}/B{self.batch}"


@dataclass
class Batch:
    """What the providers of a group share, and in fp64 what they should find."""

    case: Case
    images: Tensor
    origins: Tensor
    weight: Tensor
    bias: Tensor
    filtered: Tensor

    def row(
        self, work: Callable[[], Tensor], expected: Tensor, moved: float, **how: Any
    ) -> Runnable:
        """`work` for all windows of the case, each of which moves `moved` bytes at least."""
        columns, units = {"floor_mb": moved / 1e6}, self.case.windows
        return row(lambda: [work()], {"result": expected}, LIMITS, columns, units=units, **how)

    def tokens(self) -> Tensor:
        spectrum, size = torch.fft.fft2(self.images), tuple(self.images.shape[-2:])
        stem = self.weight, self.bias
        return shortcut_tokens(spectrum, self.origins, self.case.window, size, *stem)

    def token_bytes(self) -> int:
        """Of one window."""
        patches = len(self.images) * (self.case.size // self.case.patch) ** 2
        return patches * self.case.dim * self.weight.itemsize

    def image_share(self) -> float:
        """Bytes of the images that fall on one window."""
        return self.images.nbytes / self.case.windows


def open_batch(case: Case, device: torch.device) -> Batch:
    """Windows spread over the whole spectrum, the one at frequency 0 among them."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.size, case.size, generator=generator).to(device)
    steps = torch.linspace(0, case.size - case.window, case.windows).long()
    origins = torch.stack([steps, steps.roll(case.windows // 3)], dim=1).to(device)
    origins[0] = case.size // 2 - case.window // 2
    weight = torch.randn(case.dim, 3, case.patch, case.patch, generator=generator)
    weight = weight / (3**0.5 * case.patch)
    bias = torch.randn(case.dim, generator=generator)
    stem = (t.to(device, DTYPES[case.dtype]) for t in (weight, bias))
    return Batch(case, images, origins, *stem, official(images.double(), origins, case.window))


# ---- filters: (images, origins, window) -> (S, B, C, H, W)

Filter = Callable[[Tensor, Tensor, int], Tensor]


def official(images: Tensor, origins: Tensor, window: int) -> Tensor:
    filtered = [peers.official_style_filter(images, *o, window) for o in origins.tolist()]
    return torch.stack(filtered)


def one_transform(images: Tensor, origins: Tensor, window: int) -> Tensor:
    """The transform once for all windows, the inverse in full for each."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    filtered = []
    for top, left in origins.tolist():
        kept = torch.zeros_like(spectrum)
        box = (..., slice(top, top + window), slice(left, left + window))
        kept[box] = spectrum[box]
        filtered.append(torch.fft.ifft2(torch.fft.ifftshift(kept, dim=(-2, -1))).real)
    return torch.stack(filtered)


def pictures(images: Tensor, origins: Tensor, window: int) -> Tensor:
    return shortcut_images(torch.fft.fft2(images), origins, window, tuple(images.shape[-2:]))


def start_filter(filtered: Filter, shared: Batch) -> Runnable:
    work = partial(filtered, shared.images, shared.origins, shared.case.window)
    return shared.row(work, shared.filtered, shared.images.nbytes + shared.image_share())


# ---- filter and patch embedding


def embed(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A stem's tokens (B, N, D): a convolution whose stride is its patch."""
    tokens = F.conv2d(images.to(weight.dtype), weight, bias, stride=weight.shape[2:])
    return tokens.flatten(2).transpose(1, 2)


def start_tokens(filtered: Filter | None, shared: Batch) -> Runnable:
    """Any filter, then the convolution window by window; None: ours, without images between."""

    def by_convolution() -> Tensor:
        images = filtered(shared.images, shared.origins, shared.case.window)
        return torch.stack([embed(x, shared.weight, shared.bias) for x in images])

    case, wide = shared.case, (shared.weight.double(), shared.bias.double())
    expected = torch.stack([embed(images, *wide) for images in shared.filtered])
    bins = len(shared.images) * 3 * case.window**2 * 8
    moved = shared.token_bytes() + bins + shared.weight.nbytes / case.windows
    work = by_convolution if filtered else shared.tokens
    return shared.row(work, expected, moved + shared.image_share())


# ---- pooling


def eager_pool(tokens: Tensor) -> Tensor:
    """As released, for every window: (S, B, N, D) -> (S, D)."""
    energy = tokens.pow(2).sum(dim=-1, keepdim=True)
    return (energy / energy.sum(dim=(1, 2), keepdim=True) * tokens).sum(dim=(1, 2))


def start_pooling(version: str | None, shared: Batch) -> Runnable:
    """A version of the op, or the eager one."""
    given = shared.tokens()
    work = lambda: (shortcut_pool if version else eager_pool)(given)
    if version:
        work = in_version(version, "shortcut_pool", given, work)
    capture, expected = version in ("triton", "cuda"), eager_pool(given.double())
    return shared.row(work, expected, shared.token_bytes(), capture=capture)


# ---- groups


def groups(settings: Settings) -> list[Group]:
    """All groups of this file; those outside the chosen size carry a reason."""
    if settings.size == "smoke":
        tiny = Case(24, 8, 3, 2, patch=6, dim=8)
        return [group(kind, tiny, settings) for kind in ROWS]
    on_gpu = settings.on_gpu
    base = Case(224, 16, 4 if on_gpu else 16, settings.batch or (128 if on_gpu else 8))
    small = replace(base, patch=14, dim=384)
    pooled = [base]
    if on_gpu:
        pooled = [replace(base, dtype="bf16"), replace(small, dtype="bf16"), base, small]
    return [
        group("filter", Case(112, 16, 16, settings.batch or 16), settings),
        group("filter", base, settings),
        group("tokens", base, settings),
        group("tokens", small, settings, settings.why_not_size(on_gpu, on_gpu)),
        *(group("pooling", case, settings) for case in pooled),
    ]


FILTERS = {OFFICIAL: official, HOISTED: one_transform}
# kind of group -> how a row starts, with what, and how many of the rows are baselines
ROWS: dict[str, tuple[Callable[..., Runnable], dict[str, Any], int]] = {
    "filter": (start_filter, {**FILTERS, "pae": pictures}, 2),
    "tokens": (start_tokens, {**FILTERS, PICTURES: pictures, "pae": None}, 3),
    "pooling": (start_pooling, {EAGER: None, **VERSIONS}, 1),
}


def group(kind: str, case: Case, settings: Settings, left_out: str = "") -> Group:
    start, rows, baselines = ROWS[kind]
    return Group(
        name=f"{kind}/{case.name}",
        open=lambda: open_batch(case, settings.device),
        providers=[Provider(name, partial(start, what)) for name, what in rows.items()],
        baselines=tuple(rows)[:baselines],
        rounds=20 if settings.on_gpu else 5,
        unit="window",
        left_out=left_out,
    )


def test_spectrum(benchmark, replay):
    replay(benchmark)
