"""koopman_losses' Triton kernels against the definition in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from pae_kernels import backends, koopman_losses
from pae_kernels.koopman import tiles
from pae_kernels.koopman.triton_spectral import spectral_norm
from tests.kernels.interpreted.conftest import as_exact_as
from tests.kernels.test_koopman import SPECTRA, definition, problem, values_and_gradients


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Of 16 rows, so that tiny inputs make several of them."""
    for name in ("product", "gradient", "square"):
        monkeypatch.setattr(tiles, name, lambda *_: 16)


def check(inputs, *options) -> list[torch.Tensor]:
    """Losses and gradients of the kernels, after comparing them with the definition."""
    assert backends.choose("koopman_losses", "cpu").__name__.endswith("triton")
    got = values_and_gradients(koopman_losses, inputs, *options)
    plain = values_and_gradients(definition, inputs, *options)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = values_and_gradients(definition, wide, *options)
    for a, b, c in zip(got, plain, exact, strict=True):
        as_exact_as(a, b, c)
    return got


# runs, mode, formulation, gauge: every switch with every other one at least once
CASES = [
    (None, "global", "code", "none"),
    (2, "global", "paper", "layernorm"),
    (2, "layerwise", "code", "layernorm"),
    (None, "layerwise", "paper", "none"),
]


@pytest.mark.parametrize(("runs", "mode", "formulation", "gauge"), CASES, ids=str)
def test_losses_and_gradients(runs, mode, formulation, gauge):
    """Several tiles in every direction, none of them full."""
    inputs = problem(mode, 3, 7, 18, torch.float32, runs=runs, width=21)
    check(inputs, formulation, gauge, 1e-3)


def test_one_tile_of_32_and_full_tiles_of_16(monkeypatch):
    inputs = problem("global", 3, 8, 16, torch.float32, width=32)
    check(inputs)
    for name in ("product", "gradient", "square"):
        monkeypatch.setattr(tiles, name, lambda *_: 32)
    check(inputs)


@pytest.mark.parametrize("mode", ["global", "layerwise"])
def test_one_pair_of_single_rows(mode):
    check(problem(mode, 2, 1, 1, torch.float32, width=1))


def test_no_pair():
    for result in values_and_gradients(koopman_losses, problem(blocks=1, dtype=torch.float32)):
        assert not result.any()


def test_bitwise_the_same_twice():
    inputs = problem(dtype=torch.float32)
    first, second = (values_and_gradients(koopman_losses, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_L_gives_nan_and_spoils_no_other_run(bad):
    inputs = problem(dtype=torch.float32, runs=2)
    with torch.no_grad():
        inputs[3][1, 2, 3] = bad
    consistency, lyapunov, *gradients = values_and_gradients(koopman_losses, inputs)
    assert consistency.isfinite().all() and lyapunov[1].isnan()
    assert lyapunov[0].isfinite() and all(g[0].isfinite().all() for g in gradients)
    assert gradients[3][1].isnan().any()


def test_the_spectral_norm_is_exact_at_every_spectrum(monkeypatch):
    """All of them at once, packed as runs, at scales far from 1."""
    monkeypatch.setattr(tiles, "square", lambda k, matrices: 32)
    square = [make() for make in SPECTRA.values() if make().shape == (24, 24)]
    scales = [1.0, 1e-30, 1e30]
    L = torch.stack([m * scales[i % 3] for i, m in enumerate(square)])
    right = torch.empty(len(L), 1, 24)
    image, parts = spectral_norm(L, right, 1, 1)
    largest = parts[:, :, 0].amax(1)
    unit = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent - 1)
    unit = torch.where(largest == 0, 1, unit)
    sigma = image.double().norm(dim=1) * unit
    exact = torch.linalg.svdvals(L.double())[:, 0]
    assert ((sigma - exact).abs() <= 1e-6 * exact).all()
    assert (right.norm(dim=2) - 1).abs().max() < 1e-6
