"""The filter of Modal Pre-Alignment alone, filter and patch embedding, and the pooling of phase II;
times are per window.

Rows of the first two transform the batch in every work: once for all its windows, the
official-style ones once per window, as released. On a GPU two more groups time the kernels behind
a transform that is there, each version as the replay of a CUDA graph, against what any version must
move: tokens, the windows' bins and the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from pae_kernels import backends
from pae_kernels.spectrum import shortcut_images, shortcut_pool, shortcut_tokens

from .peers import mpa as peers
from .runner import Group, Provider, Runnable, Settings, Unavailable, relative

OFFICIAL, HOISTED = "official-style", "one FFT, full inverse"
PICTURES, EAGER = "pae images, convolution", "eager"
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # norm-relative to fp64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VERSIONS = {"reference": "reference", "triton": "Triton", "cuda": "CUDA"}


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

    @property
    def token_bytes(self) -> int:
        count = self.batch * (self.size // self.patch) ** 2
        return count * self.dim * DTYPES[self.dtype].itemsize

    @property
    def image_bytes(self) -> int:
        """Of the whole batch."""
        return self.batch * 3 * self.size**2 * 4

    @property
    def stem_bytes(self) -> float:
        """Beside the tokens: the window's bins, and its share of the weights."""
        weights = self.dim * 3 * self.patch**2 * DTYPES[self.dtype].itemsize
        return self.batch * 3 * self.window**2 * 8 + weights / self.windows


@dataclass
class Batch:
    """What the providers of a group share, and in fp64 what they should find."""

    images: Tensor
    origins: Tensor
    window: int
    weight: Tensor
    bias: Tensor
    filtered: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.images.shape[-2:])


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
    return Batch(
        images, origins, case.window, *stem, official(images.double(), origins, case.window)
    )


def prepare(
    work: Callable[[], Tensor], expected: Tensor, case: Case, moved: float = 0, capture=False
) -> Runnable:
    """`work` for all windows of the case; `moved` bytes a window at least, 0 to leave that out."""

    def check() -> dict[str, float]:
        got = work()
        error, limit = relative(got, expected), LIMITS[got.dtype]
        assert error <= limit, f"values are off by {error:.1e}, more than {limit}"
        return {"value_error": error} | ({"floor_mb": moved / 1e6} if moved else {})

    return Runnable(work, check, units=case.windows, capture=capture)


# ---- filters: (images, origins, window) -> (S, B, C, H, W)

Filter = Callable[[Tensor, Tensor, int], Tensor]


def official(images: Tensor, origins: Tensor, window: int) -> Tensor:
    filtered = [peers.official_style_filter(images, *o, window) for o in origins.tolist()]
    return torch.stack(filtered)


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


def pictures(images: Tensor, origins: Tensor, window: int) -> Tensor:
    return shortcut_images(torch.fft.fft2(images), origins, window, tuple(images.shape[-2:]))


def start_filter(case: Case, filtered: Filter, shared: Batch) -> Runnable:
    work = partial(filtered, shared.images, shared.origins, shared.window)
    moved = case.image_bytes * (1 + 1 / case.windows)  # written for each window, read once
    return prepare(work, shared.filtered, case, moved)


# ---- filter and patch embedding


def embed(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A stem's tokens (B, N, D): a convolution whose stride is its patch."""
    tokens = F.conv2d(images.to(weight.dtype), weight, bias, stride=weight.shape[2:])
    return tokens.flatten(2).transpose(1, 2)


def expected_tokens(shared: Batch) -> Tensor:
    wide = shared.weight.double(), shared.bias.double()
    return torch.stack([embed(images, *wide) for images in shared.filtered])


def start_convolution(case: Case, filtered: Filter, shared: Batch) -> Runnable:
    """Any filter, then the convolution window by window."""

    def work() -> Tensor:
        images = filtered(shared.images, shared.origins, shared.window)
        return torch.stack([embed(x, shared.weight, shared.bias) for x in images])

    return prepare(work, expected_tokens(shared), case, embedded_bytes(case))


def embedded_bytes(case: Case) -> float:
    """A window's tokens, and its share of the images and of the weights."""
    return case.token_bytes + case.stem_bytes + case.image_bytes / case.windows


def tokens(shared: Batch, spectrum: Tensor) -> Tensor:
    return shortcut_tokens(
        spectrum, shared.origins, shared.window, shared.size, shared.weight, shared.bias
    )


def start_tokens(case: Case, shared: Batch) -> Runnable:
    work = lambda: tokens(shared, torch.fft.fft2(shared.images))
    return prepare(work, expected_tokens(shared), case, embedded_bytes(case))


def start_token_kernels(case: Case, version: str, shared: Batch) -> Runnable:
    spectrum = torch.fft.fft2(shared.images)
    work = forced(version, shared, partial(tokens, shared, spectrum))
    moved = case.token_bytes + case.stem_bytes
    return prepare(work, expected_tokens(shared), case, moved, capture=True)


def forced(version: str, shared: Batch, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`work` in this version of the ops, or the reason why it cannot run here."""
    predicates = {"triton": backends.with_triton, "cuda": backends.with_cuda}
    predicate = predicates.get(version, backends.anywhere)
    if reason := predicate(shared.images.device.type, shared.weight.dtype):
        raise Unavailable(reason)

    def forced_work() -> Tensor:
        with mock.patch.dict(os.environ, PAE_BACKEND=version):
            return work()

    return forced_work


# ---- pooling


def start_pooling(case: Case, version: str, shared: Batch) -> Runnable:
    pool = forced(version, shared, lambda: shortcut_pool(given))
    given, expected = tokens_and_pooled(shared)
    return prepare(pool, expected, case, case.token_bytes, capture=version != "reference")


def start_eager_pooling(case: Case, shared: Batch) -> Runnable:
    given, expected = tokens_and_pooled(shared)
    return prepare(lambda: eager_pool(given), expected, case, case.token_bytes)


def tokens_and_pooled(shared: Batch) -> tuple[Tensor, Tensor]:
    given = tokens(shared, torch.fft.fft2(shared.images))
    return given, eager_pool(given.double())


def eager_pool(tokens: Tensor) -> Tensor:
    """As released, for every window: (S, B, N, D) -> (S, D)."""
    energy = tokens.pow(2).sum(dim=-1, keepdim=True)
    return (energy / energy.sum(dim=(1, 2), keepdim=True) * tokens).sum(dim=(1, 2))


# ---- groups


def groups(settings: Settings) -> list[Group]:
    if settings.size == "smoke":
        tiny = Case(24, 8, 3, 2, patch=6, dim=8)
        return [make(tiny, settings) for make in (filters, embeddings, kernels, pooling)]
    on_gpu = settings.device.type == "cuda"
    batch = settings.batch or (128 if on_gpu else 8)
    base = Case(224, 16, 4 if on_gpu else 16, batch)
    small = Case(224, 16, base.windows, batch, patch=14, dim=384)
    found = [filters(Case(112, 16, 16, settings.batch or 16), settings), filters(base, settings)]
    slow = "" if on_gpu or settings.size == "full" else "runs with --full"
    found += [embeddings(base, settings), embeddings(small, settings, slow)]
    if on_gpu:
        for case in (replace(base, dtype="bf16"), replace(small, dtype="bf16"), base, small):
            found += [kernels(case, settings), pooling(case, settings)]
    else:
        found.append(pooling(base, settings))
    return found


def group(
    kind: str,
    case: Case,
    settings: Settings,
    starts: dict[str, Callable],
    baselines: tuple,
    left_out: str = "",
) -> Group:
    return Group(
        name=f"{kind}/{case.name}",
        open=lambda: open_batch(case, settings.device),
        providers=[Provider(name, start) for name, start in starts.items()],
        baselines=baselines,
        rounds=20 if settings.device.type == "cuda" else 5,
        unit="window",
        left_out=left_out,
    )


def filters(case: Case, settings: Settings) -> Group:
    rows = {OFFICIAL: official, HOISTED: one_transform, "pae": pictures}
    starts = {name: partial(start_filter, case, filtered) for name, filtered in rows.items()}
    return group("filter", case, settings, starts, (OFFICIAL, HOISTED))


def embeddings(case: Case, settings: Settings, left_out: str = "") -> Group:
    rows = {OFFICIAL: official, HOISTED: one_transform, PICTURES: pictures}
    starts = {name: partial(start_convolution, case, filtered) for name, filtered in rows.items()}
    starts["pae"] = partial(start_tokens, case)
    return group("tokens", case, settings, starts, (OFFICIAL, HOISTED, PICTURES), left_out)


def kernels(case: Case, settings: Settings) -> Group:
    starts = {VERSIONS[v]: partial(start_token_kernels, case, v) for v in VERSIONS}
    return group("token kernels", case, settings, starts, (VERSIONS["reference"],))


def pooling(case: Case, settings: Settings) -> Group:
    starts = {EAGER: partial(start_eager_pooling, case)}
    starts |= {VERSIONS[v]: partial(start_pooling, case, v) for v in VERSIONS}
    return group("pooling", case, settings, starts, (EAGER,))


def test_spectrum(benchmark, replay):
    replay(benchmark)
