"""The largest singular value, and the spectra that break others."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch

from pae_kernels import backends, cpu
from pae_kernels.koopman import cpu as koopman_cpu
from pae_kernels.koopman import koopman_losses, spectral
from tests.kernels import host_library
from tests.kernels.executions import FP32, each
from tests.kernels.koopman.cases import (
    MODES,
    OP,
    close,
    definition,
    problem,
    use_tile,
    values_and_gradients,
)
from tests.processes import run


def matrix_with(singular_values, dtype=torch.float32):
    k = len(singular_values)
    left, right = (torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0] for _ in range(2))
    return ((left * singular_values.double()) @ right.T).to(dtype)


SPECTRA = {
    "identity": lambda: torch.eye(24),
    "scaled identity": lambda: 3.7 * torch.eye(24),
    "zero": lambda: torch.zeros(24, 24),
    "one by one": lambda: torch.tensor([[-2.5]]),
    "rank one": lambda: torch.outer(torch.randn(24), torch.randn(24)),
    "two equal on top": lambda: matrix_with(torch.cat([torch.linspace(0.1, 1, 22), torch.ones(2)])),
    "all equal": lambda: matrix_with(torch.ones(24)),
    "a cluster on top": lambda: matrix_with(
        torch.cat([torch.linspace(0.1, 1, 16), 1.2 + 1e-6 * torch.arange(8)])
    ),
    "ratio 1e20": lambda: matrix_with(torch.logspace(-20, 0, 24)),
    "nilpotent": lambda: torch.diag(torch.arange(1.0, 24), 1),
    "minus identity": lambda: -torch.eye(24) + 1e-4 * torch.randn(24, 24),
    "near the identity": lambda: torch.eye(24) + 1e-6 * torch.randn(24, 24),
    "random": lambda: torch.randn(24, 24),
}


def triple_of(execution, L):
    """sigma, left, right of every matrix (b, k, k), as the forward of this version leaves them."""
    count, k, _ = L.shape
    L = L.to(execution.device)
    prompts, lift = L.new_zeros(count, 2, 1, 1), L.new_ones(count, k, 1)
    version = backends.choose(OP, execution.device, L.dtype)
    _, _, *saved = version.forward(prompts, lift, torch.zeros_like(L), L, "code", None)
    left, right = (t[:, 0].cpu().double() for t in saved[6:8])
    return torch.einsum("bi,bij,bj->b", left, L.cpu().double(), right), left, right


def by_squaring(execution, L):
    """The readable form of what the kernels do."""
    return [t.double() for t in spectral.top_by_squaring(L)]


SCALES = (1.0, 1e-20, 1e-37, 1e18, 1e36)


@each(
    OP,
    "triple, tile, scales",
    reference=[(way, None, [scale]) for way in (triple_of, by_squaring) for scale in SCALES],
    interpreter=[(triple_of, 32, [1.0, 1e-30, 1e30])],
    cpu=[(triple_of, None, [scale]) for scale in SCALES],
    emulated=[(triple_of, tile, [scale]) for tile in (16, 32) for scale in SCALES],
    gpu=[(triple_of, None, [scale]) for scale in SCALES],
)
def test_top_singular_value_is_exact_at_every_spectrum_and_scale(
    execution, monkeypatch, triple, tile, scales
):
    """All of them at once, packed as runs, and one by one."""
    if tile is not None:
        use_tile(monkeypatch, tile)
    scale = itertools.cycle(scales)
    every = {name: make() * next(scale) for name, make in SPECTRA.items()}
    for side in (1, 24):
        names = [name for name in every if len(every[name]) == side]
        L = torch.stack([every[name] for name in names])
        exact = torch.linalg.svdvals(L.double())[:, 0]
        sigma, left, right = triple(execution, L)
        for i, name in enumerate(names):
            assert (sigma[i].double() - exact[i]).abs() <= 1e-6 * exact[i], name
            assert abs(right[i].norm() - 1) < 1e-6, name
            gap = (L[i].double() @ right[i] - sigma[i] * left[i]).norm()
            assert gap <= 1e-6 * exact[i], name


def test_top_singular_value_in_double_precision():
    for make in SPECTRA.values():
        L = make().double()
        exact = torch.linalg.svdvals(L)[0]
        sigma, left, right = (t[0] for t in spectral.top_singular_triple(L[None]))
        assert (sigma - exact).abs() <= 1e-14 * exact
        assert (L @ right - sigma * left).norm() <= 1e-14 * exact


FINITE = list(itertools.product(SPECTRA, MODES))


@each(OP, "spectrum, mode", reference=FINITE, cpu=FINITE, emulated=FINITE, gpu=FINITE)
def test_losses_and_gradients_stay_finite_at_every_spectrum(execution, spectrum, mode):
    L = SPECTRA[spectrum]()
    prompts, lift, K, _ = problem(k=len(L), dtype=FP32)
    if mode == "layerwise":
        K, L = K.detach().repeat(4, 1, 1).requires_grad_(), L.repeat(4, 1, 1)
    inputs = execution.moved(prompts, lift, K, L.requires_grad_())
    results = values_and_gradients(koopman_losses, inputs, "code")
    exact = definition(*(t.detach().double() for t in inputs), "code")
    assert all(r.isfinite().all() for r in results)
    close(results[:2], exact, 2e-6)


def test_equal_singular_values_give_the_slope_of_one_of_them():
    L = matrix_with(torch.tensor([2.0, 2.0, 1.0, 0.5, 0.3, 0.1]), torch.float64)
    prompts, lift, K, _ = problem(k=6, grad=False)
    states = prompts @ lift.T
    _, _, right = spectral.top_singular_triple(L[None])
    L.requires_grad_()
    actual = torch.autograd.grad(koopman_losses(prompts, lift, K, L)[1], L)[0]

    Q = L.T @ L / ((L @ right[0]).square().sum() + 1e-8)  # the norm taken along that vector

    def energy(x):
        x = x / (x.norm(dim=-1, keepdim=True) + 1e-8).clamp(min=1)
        return (x @ Q * x).sum(-1)

    s = torch.nn.functional.softplus(energy(states[:-1] @ K) - energy(states[:-1])).mean(1)
    close([actual], torch.autograd.grad((10 * torch.tanh(s / 10)).sum(), L), 1e-10)


LEVEL = {
    "identity": torch.eye(18),
    "scaled": -0.37 * torch.eye(18),
}
EACH_LEVEL = list(itertools.product(LEVEL, MODES))


@each(
    OP,
    "spectrum, mode",
    reference=EACH_LEVEL,
    interpreter=EACH_LEVEL[::3],
    emulated=EACH_LEVEL,
    gpu=EACH_LEVEL,
)
def test_a_multiple_of_the_identity_spreads_the_slope_of_its_norm_evenly(execution, spectrum, mode):
    """As autograd does with ties of a decomposition: K moves before L, so training meets them."""
    prompts, lift, K, _ = problem(mode, 3, 5, 18, FP32, width=21)
    L = LEVEL[spectrum].expand_as(K).clone().requires_grad_()
    inputs = execution.moved(prompts, lift, K, L)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = values_and_gradients(definition, exact, "code")
    close(values_and_gradients(koopman_losses, inputs, "code"), expected, 1e-5)


@each(
    OP,
    "triple, k, distance",
    reference=[
        (way, k, 10.0**-power)
        for way in (triple_of, by_squaring)
        for k in (16, 64)
        for power in range(2, 8)
    ],
    cpu=[(triple_of, k, 10.0**-power) for k in (16, 64, 256) for power in range(1, 8)],
    emulated=[(triple_of, 64, distance) for distance in (1e-7, 1e-5, 1e-3, 1e-1)],
)
def test_top_vector_next_to_the_identity(execution, triple, k, distance):
    """Resolved relative to the distance: the entries of L - I are all that fp32 rounds."""
    L = torch.eye(k) + distance * torch.randn(execution.pick(reference=10, cpu=5, other=2), k, k)
    exact = torch.linalg.svd(L.double())[2][:, 0]
    right = triple(execution, L)[2]
    angle = (right - exact * (right * exact).sum(1, keepdim=True)).norm(dim=1)
    assert angle.max() <= 1e-5


@each(
    OP,
    "k, distance",
    emulated=[(64, d) for d in (1e-6, 1e-4, 1e-2, 1e-1)],
    gpu=itertools.product([64, 256, 1024], [1e-6, 1e-4, 1e-2, 1e-1]),
)
def test_top_vector_next_to_the_identity_at_real_sizes(execution, k, distance):
    L = torch.eye(k) + distance * torch.randn(1, k, k)
    _, singular, vectors = torch.linalg.svd(L[0].double())
    sigma, _, right = triple_of(execution, L)
    assert abs(sigma.item() / singular[0].item() - 1) <= 1e-6
    gap = (singular[0] - singular[1]).item() / distance / k**0.5  # of the spread of the spectrum
    # what is left beside the vector: 1 - cos^2 would see no more than how fp32 rounds its norm
    angle = (right[0] - vectors[0] * (right[0] @ vectors[0])).norm().item()
    assert angle <= 1e-6 / gap + 1e-5


@pytest.mark.parametrize("distance", [1e-7, 1e-5, 1e-3])
def test_gradient_of_L_next_to_the_identity(distance):
    """Where training starts; an fp32 decomposition of L^T L is off by 1 % to 100 % here."""
    k = 64
    prompts, lift, K, _ = problem(count=20, k=k, dtype=torch.float32)
    L = (torch.eye(k) + distance * torch.randn(k, k)).requires_grad_()
    inputs = [prompts, lift, K, L]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = values_and_gradients(definition, exact, "code")
    close(values_and_gradients(koopman_losses, inputs, "code"), expected, 1e-5)


@each(
    OP,
    "mode, bad",
    interpreter=[("global", math.nan), ("global", math.inf)],
    other=itertools.product(MODES, (math.nan, math.inf, -math.inf)),
)
def test_a_non_finite_L_gives_nan_and_spoils_no_other_run(execution, mode, bad):
    inputs = execution.moved(*problem(mode, dtype=FP32, runs=2))
    with torch.no_grad():
        inputs[3][1].view(-1)[7] = bad
    consistency, lyapunov, *gradients = values_and_gradients(koopman_losses, inputs)
    assert consistency.isfinite().all() and lyapunov[1].isnan()
    assert lyapunov[0].isfinite() and all(g[0].isfinite().all() for g in gradients)
    assert gradients[3][1].isnan().any()


@pytest.mark.parametrize("triple", [spectral.top_singular_triple, spectral.top_by_squaring])
def test_one_bad_matrix_does_not_spoil_its_neighbours(triple):
    L = torch.randn(3, 8, 8)
    L[1, 2, 3] = math.nan
    sigma = triple(L)[0]
    assert sigma[1].isnan()
    close([sigma[[0, 2]]], [torch.linalg.matrix_norm(L[[0, 2]].double(), 2)], 1e-6)


def test_a_bad_residual_falls_back_to_the_full_decomposition(monkeypatch):
    L = torch.eye(32) + 0.3 * torch.randn(2, 32, 32)
    expected = spectral.top_singular_triple(L.double())
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda M: calls.append(1) or eigh(M))
    close(spectral.top_singular_triple(L)[:1], expected[:1], 1e-6)
    assert not calls
    monkeypatch.setattr(spectral, "INVERSE_ITERATIONS", 0)
    sigma, _, right = spectral.top_singular_triple(L)
    assert calls
    close([sigma], expected[:1], 1e-6)
    assert ((right.double() * expected[2]).sum(1).abs() > 1 - 1e-6).all()


def test_many_matrices_are_decomposed_by_several_threads():
    """In a process of its own: what oneMKL does to a batch there may never end."""
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from pae_kernels.koopman import spectral\n"
        "L = torch.eye(256) + 0.1 * torch.randn(10, 256, 256)\n"
        "sigma = spectral.top_singular_triple(L)[0]\n"
        "exact = torch.linalg.svdvals(L.double())[:, 0]\n"
        "assert ((sigma - exact).abs() <= 1e-6 * exact).all()\n"
    )
    assert not run([sys.executable, "-c", code], env={"OMP_NUM_THREADS": "2"}, timeout=120).stderr


def spectrum_of(k):
    """A symmetric matrix whose largest eigenvalue is 2, alone, with its vector."""
    vectors = torch.linalg.qr(
        torch.cat([spectral.start_vector(k, "cpu")[:, None], torch.randn(k, k - 1)], 1).double()
    )[0]
    values = torch.cat([torch.linspace(-1, 1, k - 1, dtype=torch.float64), vectors.new_tensor([2])])
    return ((vectors * values) @ vectors.mT).float()[None], vectors[:, -1]


def test_lanczos_that_misses_the_largest_eigenvalue_is_not_believed():
    """The start is an eigenvector of -1, so that Lanczos' method ends there with no residual."""
    M, expected = spectrum_of(48)
    with cpu.using(host_library.cpu_library()):
        _, value, residual, *_ = koopman_cpu.lanczos(M)
        assert value < 1.9 and residual < 1e-5
        found = koopman_cpu.top_eigenvector(torch.cat([torch.eye(48)[None], M]))
    assert abs(found[1].double() @ expected) > 1 - 1e-6


def test_lanczos_is_enough_by_itself(monkeypatch):
    decomposed = []
    full = spectral.top_eigenvector
    monkeypatch.setattr(spectral, "top_eigenvector", lambda M: decomposed.append(1) or full(M))
    near = [torch.eye(256) + distance * torch.randn(2, 256, 256) for distance in (1e-6, 1e-3, 0.1)]
    even = matrix_with(torch.linspace(0.1, 1, 256))[None]
    with cpu.using(host_library.cpu_library()):
        for L in (*near, even):
            exact = torch.linalg.svdvals(L.double())[:, 0]
            sigma, _, _ = spectral.top_singular_triple(L, koopman_cpu.top_eigenvector)
            assert ((sigma - exact).abs() <= 1e-6 * exact).all()
        assert not decomposed
        monkeypatch.setattr(koopman_cpu, "STEPS", 4)
        sigma, _, _ = spectral.top_singular_triple(even, koopman_cpu.top_eigenvector)
        assert decomposed and (sigma - exact).abs() <= 1e-6 * exact


def test_a_failing_decomposition_gives_nan(monkeypatch):
    def gives_up(M):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", gives_up)
    assert spectral.top_singular_triple(torch.randn(2, 5, 5))[0].isnan().all()


@each(OP, "scale", interpreter=[1e30], other=[1e-20, 1e-5, 1e5, 1e18, 1e30])
def test_losses_at_any_scale_of_L(execution, scale):
    *others, L = problem(dtype=FP32)
    inputs = execution.moved(*others, (L.detach() * scale).requires_grad_())
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = values_and_gradients(definition, exact, "code")
    results = values_and_gradients(koopman_losses, inputs, "code")
    close(results[:5], expected[:5], 1e-5)
    # the gradient of L is of order V / scale: compared in its own units
    unit = expected[5].abs().max()
    close([results[5].double() / unit], [expected[5] / unit], 1e-5)
