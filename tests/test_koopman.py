"""The op koopman_losses: its definition, brute force, and the spectra that break others."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from pae_kernels import backends
from pae_kernels.koopman import koopman_losses, reference

FORMULATIONS = ("code", "paper")
MODES = ("global", "layerwise")
BOTH = pytest.mark.parametrize("formulation", FORMULATIONS)
EACH_MODE = pytest.mark.parametrize("mode", MODES)
LN2_TERM = 10 * math.tanh(math.log(2) / 10)  # Lyapunov term of a pair whose energy does not change


def problem(mode="global", blocks=4, count=3, k=6, dtype=torch.float64, seed=0, grad=True):
    """states, K, L with rows on both sides of length 1 and distinct singular values."""
    draw = torch.Generator().manual_seed(seed)
    shape = (blocks, k, k) if mode == "layerwise" else (k, k)

    def normal(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    lengths = 0.2 + 2 * torch.rand(blocks, count, 1, generator=draw, dtype=torch.float64)
    states = lengths * normal(blocks, count, k) / k**0.5
    K = torch.eye(k) + 0.3 * normal(*shape)
    L = torch.eye(k) + 0.3 * normal(*shape)
    return [t.to(dtype).requires_grad_(grad) for t in (states, K, L)]


def values_and_gradients(function, inputs, formulation):
    consistency, lyapunov = function(*inputs, formulation)
    gradients = torch.autograd.grad(0.7 * consistency + 1.3 * lyapunov, inputs)
    return [consistency, lyapunov, *gradients]


def close(actual, expected, rtol):
    """Relative in the norm of every tensor, with an absolute floor of rtol for zeros."""
    for a, e in zip(actual, expected, strict=True):
        e = e.to(torch.float64)
        error = (a.to(torch.float64) - e).norm() / e.norm().clamp(min=1.0e-3)
        assert error <= rtol, f"relative error {error:.1e} > {rtol:.0e}"


# ------------------------------------------------------------------------------ the same function


@BOTH
@EACH_MODE
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_values_and_gradients_equal_the_definition(formulation, mode, dtype, rtol):
    inputs = problem(mode, blocks=5, count=7, k=16, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = values_and_gradients(reference.koopman_losses, exact, formulation)
    close(values_and_gradients(koopman_losses, inputs, formulation), expected, rtol)


@EACH_MODE
def test_paper_formulation_by_brute_force(mode):
    states, K, L = problem(mode, blocks=8, grad=False)
    consistency = lyapunov = 0.0
    rises = []
    for j in range(len(states) - 1):
        K_j, L_j = (K[j], L[j]) if mode == "layerwise" else (K, L)
        Q = L_j.T @ L_j
        consistency += torch.linalg.matrix_norm(states[j] @ K_j - states[j + 1], "fro") ** 2
        energy = [torch.trace(z @ Q @ z.T) for z in (states[j], states[j + 1])]
        rises.append(float(energy[1] - energy[0]))
        lyapunov += max(0.0, rises[-1])
    assert min(rises) < 0 < max(rises)
    expected = torch.tensor([consistency, lyapunov], dtype=torch.float64)
    close(koopman_losses(states, K, L, "paper"), expected, 1e-12)


def test_code_formulation_by_brute_force():
    states, K, L = problem(grad=False)
    sigma2 = torch.linalg.svdvals(L)[0] ** 2

    def energy(z):
        z = z / max(float(z.norm()) + 1e-8, 1.0)
        return float((L @ z).square().sum() / (sigma2 + 1e-8))

    consistency = lyapunov = 0.0
    for now, following in itertools.pairwise(states):
        consistency += float(((now @ K - following) ** 2).mean())
        rises = [energy(z @ K) - energy(z) for z in now]
        s = sum(math.log1p(math.exp(r)) for r in rises) / len(rises)
        lyapunov += 10 * math.tanh(s / 10)
    expected = torch.tensor([consistency, lyapunov], dtype=torch.float64)
    close(koopman_losses(states, K, L), expected, 1e-12)


@BOTH
@EACH_MODE
def test_gradcheck(formulation, mode):
    inputs = problem(mode, blocks=3, count=2, k=4)
    norms = inputs[0].norm(dim=-1)
    assert (norms > 1.01).any() and (norms < 0.99).any()  # both sides of the rescaling
    assert gradcheck(lambda *t: koopman_losses(*t, formulation), inputs)


@settings(max_examples=25, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    formulation=st.sampled_from(FORMULATIONS),
    blocks=st.integers(1, 5),
    count=st.integers(1, 6),
    k=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_every_shape_equals_the_definition(mode, formulation, blocks, count, k, seed):
    inputs = problem(mode, blocks, count, k, seed=seed)
    expected = values_and_gradients(reference.koopman_losses, inputs, formulation)
    close(values_and_gradients(koopman_losses, inputs, formulation), expected, 1e-7)


# -------------------------------------------------------------------------------- what must be so


@BOTH
def test_perfect_prediction_has_no_consistency_loss(formulation):
    _, K, L = problem(grad=False)
    states = [torch.rand(3, 6, dtype=torch.float64)]
    for _ in range(3):
        states.append(states[-1] @ K)
    assert koopman_losses(torch.stack(states), K, L, formulation)[0] < 1e-24


@EACH_MODE
def test_equal_states_under_the_identity_are_a_fixed_point(mode):
    states, K, L = problem(mode)
    with torch.no_grad():
        states.copy_(states[:1].expand_as(states))
        K.copy_(torch.eye(6).expand_as(K))
    consistency, lyapunov, d_states, d_K, d_L = values_and_gradients(
        koopman_losses, [states, K, L], "code"
    )
    assert consistency == 0
    assert math.isclose(lyapunov.item(), 3 * LN2_TERM, rel_tol=1e-12)
    assert d_L.abs().max() < 1e-15 and d_states.abs().max() < 1e-15  # no energy changes ...
    assert d_K.abs().max() > 1e-3  # ... but it would under another K


@BOTH
def test_layerwise_with_equal_operators_is_global(formulation):
    states, K, L = problem()
    stacked = [t.detach().repeat(4, 1, 1).requires_grad_() for t in (K, L)]
    shared = values_and_gradients(koopman_losses, [states, K, L], formulation)
    each = values_and_gradients(koopman_losses, [states, *stacked], formulation)
    close([*each[:3], each[3].sum(0), each[4].sum(0)], shared, 1e-12)


@BOTH
def test_the_last_layerwise_operator_is_not_used(formulation):
    states, K, L = problem("layerwise")
    before = values_and_gradients(koopman_losses, [states, K, L], formulation)
    assert not before[3][-1].any() and not before[4][-1].any()
    assert before[3][:-1].flatten(1).any(1).all()
    with torch.no_grad():
        K[-1], L[-1] = torch.nan, torch.nan
    after = values_and_gradients(koopman_losses, [states, K, L], formulation)
    assert all(torch.equal(a, b) for a, b in zip(after, before))


@BOTH
@EACH_MODE
@pytest.mark.parametrize("blocks", [0, 1])
def test_no_pair_gives_zeros_that_can_be_differentiated(formulation, mode, blocks):
    inputs = problem(mode, blocks=blocks)
    for result in values_and_gradients(koopman_losses, inputs, formulation):
        assert not result.any()


@BOTH
@EACH_MODE
def test_bitwise_the_same_twice_and_inputs_untouched(formulation, mode):
    inputs = problem(mode, blocks=6, count=5, k=40, dtype=torch.float32)
    copies = [t.detach().clone() for t in inputs]
    first = values_and_gradients(koopman_losses, inputs, formulation)
    second = values_and_gradients(koopman_losses, inputs, formulation)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies))


@BOTH
@EACH_MODE
def test_strides_do_not_matter(formulation, mode):
    inputs = problem(mode)
    strided = [t.detach().mT.contiguous().mT.requires_grad_() for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    close(
        values_and_gradients(koopman_losses, strided, formulation),
        values_and_gradients(koopman_losses, inputs, formulation),
        1e-12,
    )


@BOTH
@EACH_MODE
def test_no_unwritten_memory_is_read(formulation, mode):
    """Deterministic mode fills every uninitialised tensor with NaN."""
    inputs = problem(mode)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        results = values_and_gradients(koopman_losses, inputs, formulation)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(r.isfinite().all() for r in results)


# ----------------------------------------------------------------------------------- the spectrum


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


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-37, 1e18, 1e36])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_top_singular_value_is_exact_at_every_spectrum_and_scale(spectrum, scale):
    L = SPECTRA[spectrum]() * scale
    exact = torch.linalg.svdvals(L.double())[0]
    sigma, left, right = (t[0] for t in reference.top_singular_triple(L[None]))
    assert (sigma.double() - exact).abs() <= 1e-6 * exact
    assert abs(right.double().norm() - 1) < 1e-6
    gap = (L.double() @ right.double() - sigma.double() * left.double()).norm()
    assert gap <= 1e-6 * exact


def test_top_singular_value_in_double_precision():
    for make in SPECTRA.values():
        L = make().double()
        exact = torch.linalg.svdvals(L)[0]
        sigma, left, right = (t[0] for t in reference.top_singular_triple(L[None]))
        assert (sigma - exact).abs() <= 1e-14 * exact
        assert (L @ right - sigma * left).norm() <= 1e-14 * exact


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_losses_and_gradients_stay_finite_at_every_spectrum(spectrum, mode):
    L = SPECTRA[spectrum]()
    states, K, _ = problem(k=len(L), dtype=torch.float32)
    if mode == "layerwise":
        K, L = K.detach().repeat(4, 1, 1).requires_grad_(), L.repeat(4, 1, 1)
    inputs = [states, K, L.requires_grad_()]
    results = values_and_gradients(koopman_losses, inputs, "code")
    exact = reference.koopman_losses(*(t.detach().double() for t in inputs), "code")
    assert all(r.isfinite().all() for r in results)
    close(results[:2], exact, 2e-6)


def test_equal_singular_values_give_the_slope_of_one_of_them():
    L = matrix_with(torch.tensor([2.0, 2.0, 1.0, 0.5, 0.3, 0.1]), torch.float64)
    states, K, _ = problem(k=6, grad=False)
    _, _, right = reference.top_singular_triple(L[None])
    L.requires_grad_()
    actual = torch.autograd.grad(koopman_losses(states, K, L)[1], L)[0]

    Q = L.T @ L / ((L @ right[0]).square().sum() + 1e-8)  # the norm taken along that vector

    def energy(x):
        x = x / (x.norm(dim=-1, keepdim=True) + 1e-8).clamp(min=1)
        return (x @ Q * x).sum(-1)

    s = torch.nn.functional.softplus(energy(states[:-1] @ K) - energy(states[:-1])).mean(1)
    close([actual], torch.autograd.grad((10 * torch.tanh(s / 10)).sum(), L), 1e-10)


@pytest.mark.parametrize("distance", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
def test_top_vector_next_to_the_identity(distance):
    """Resolved relative to the distance: the entries of L - I are all that fp32 rounds."""
    for k in (16, 64):
        L = torch.eye(k) + distance * torch.randn(10, k, k)
        exact = torch.linalg.svd(L.double())[2][:, 0]
        right = reference.top_singular_triple(L)[2].double()
        angle = (right - exact * (right * exact).sum(1, keepdim=True)).norm(dim=1)
        assert angle.max() <= 1e-5


@pytest.mark.parametrize("distance", [1e-7, 1e-5, 1e-3])
def test_gradient_of_L_next_to_the_identity(distance):
    """Where training starts; an fp32 decomposition of L^T L is off by 1 % to 100 % here."""
    k = 64
    states, K, _ = problem(count=20, k=k, dtype=torch.float32)
    L = (torch.eye(k) + distance * torch.randn(k, k)).requires_grad_()
    inputs = [states, K, L]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = values_and_gradients(reference.koopman_losses, exact, "code")
    close(values_and_gradients(koopman_losses, inputs, "code"), expected, 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@EACH_MODE
def test_a_non_finite_L_gives_nan_and_never_raises(bad, mode):
    states, K, L = problem(mode, dtype=torch.float32)
    with torch.no_grad():
        L.view(-1)[7] = bad
    consistency, lyapunov, *gradients = values_and_gradients(koopman_losses, [states, K, L], "code")
    assert consistency.isfinite() and lyapunov.isnan()
    assert gradients[2].isnan().any()


def test_one_bad_matrix_does_not_spoil_its_neighbours():
    L = torch.randn(3, 8, 8)
    L[1, 2, 3] = math.nan
    sigma = reference.top_singular_triple(L)[0]
    assert sigma[1].isnan()
    close([sigma[[0, 2]]], [torch.linalg.matrix_norm(L[[0, 2]].double(), 2)], 1e-6)


def test_a_bad_residual_falls_back_to_the_full_decomposition(monkeypatch):
    L = torch.eye(32) + 0.3 * torch.randn(2, 32, 32)
    expected = reference.top_singular_triple(L.double())
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda M: calls.append(1) or eigh(M))
    close(reference.top_singular_triple(L)[:1], expected[:1], 1e-6)
    assert not calls
    monkeypatch.setattr(reference, "INVERSE_ITERATIONS", 0)
    sigma, _, right = reference.top_singular_triple(L)
    assert calls
    close([sigma], expected[:1], 1e-6)
    assert ((right.double() * expected[2]).sum(1).abs() > 1 - 1e-6).all()


def test_a_failing_decomposition_gives_nan(monkeypatch):
    def gives_up(M):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", gives_up)
    assert reference.top_singular_triple(torch.randn(2, 5, 5))[0].isnan().all()


@pytest.mark.parametrize("scale", [1e-20, 1e-5, 1e5, 1e18, 1e30])
def test_losses_at_any_scale_of_L(scale):
    states, K, L = problem(dtype=torch.float32)
    scaled = (L.detach() * scale).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (states, K, scaled)]
    expected = values_and_gradients(reference.koopman_losses, exact, "code")
    results = values_and_gradients(koopman_losses, [states, K, scaled], "code")
    close(results[:4], expected[:4], 1e-5)
    # the gradient of L is of order V / scale: compared in its own units
    unit = expected[4].abs().max()
    close([results[4].double() / unit], [expected[4] / unit], 1e-5)


# ------------------------------------------------------------------------------------ as an op


@BOTH
@EACH_MODE
@pytest.mark.parametrize("blocks", [1, 3])
def test_opcheck(formulation, mode, blocks):
    inputs = problem(mode, blocks=blocks, dtype=torch.float32)
    torch.library.opcheck(torch.ops.pae.koopman_losses_fwd, (*inputs, formulation))
    plain = [t.detach() for t in inputs]
    saved = torch.ops.pae.koopman_losses_fwd(*plain, formulation)[2:]
    ones = torch.ones(()), torch.ones(())
    torch.library.opcheck(torch.ops.pae.koopman_losses_bwd, (*ones, *plain, formulation, *saved))


@BOTH
@EACH_MODE
def test_both_autograd_paths_agree(formulation, mode):
    inputs = problem(mode)
    registered = values_and_gradients(
        lambda *args: torch.ops.pae.koopman_losses_fwd(*args)[:2], inputs, formulation
    )
    eager = values_and_gradients(koopman_losses, inputs, formulation)
    assert all(torch.equal(a, b) for a, b in zip(registered, eager))


@BOTH
def test_compiles_without_a_break(formulation):
    def loss(states, K, L):
        consistency, lyapunov = koopman_losses(2 * states, K, L, formulation)
        return consistency + 3 * lyapunov

    inputs = problem(dtype=torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = loss(*inputs), *torch.autograd.grad(loss(*inputs), inputs)
    actual = compiled(*inputs), *torch.autograd.grad(compiled(*inputs), inputs)
    close(actual, expected, 1e-6)


@BOTH
def test_autocast_changes_nothing_even_around_the_backward(formulation):
    inputs = problem(dtype=torch.float32)
    expected = values_and_gradients(koopman_losses, inputs, formulation)
    with torch.autocast("cpu", torch.bfloat16):
        actual = values_and_gradients(koopman_losses, inputs, formulation)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_a_second_derivative_is_refused():
    inputs = problem()
    consistency, lyapunov = koopman_losses(*inputs)
    loss = (consistency + lyapunov).square()
    gradient = torch.autograd.grad(loss, inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_graph_without_grad():
    inputs = problem()
    with torch.no_grad():
        assert not any(t.requires_grad for t in koopman_losses(*inputs))
    assert not any(t.requires_grad for t in koopman_losses(*(t.detach() for t in inputs)))


def test_a_forced_version_that_does_not_exist_is_an_error(monkeypatch):
    assert backends.choose("koopman_losses", "cpu") is reference
    monkeypatch.setenv("PAE_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="PAE_BACKEND=cuda cannot run koopman_losses"):
        koopman_losses(*problem())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"states": torch.rand(3, 6)}, ValueError, r"states must be .* got \(3, 6\) float32"),
        ({"states": torch.rand(4, 0, 6)}, ValueError, r"states must be .* got \(4, 0, 6\)"),
        ({"states": torch.rand(4, 3, 6).half()}, TypeError, "states must be float32 or float64"),
        ({"K": torch.rand(6, 5)}, ValueError, r"K must be \(6, 6\) or \(4, 6, 6\).*got \(6, 5\)"),
        ({"L": torch.rand(3, 6, 6)}, ValueError, r"L must be \(6, 6\) or \(4, 6, 6\)"),
        ({"L": torch.rand(4, 6, 6)}, ValueError, "K and L must have the same shape"),
        ({"K": torch.rand(6, 6).double()}, TypeError, "K must be like states .* got .* float64"),
        ({"formulation": "both"}, ValueError, "formulation must be one of .* got 'both'"),
    ],
)
def test_error_messages(change, error, message):
    arguments = {"states": torch.rand(4, 3, 6), "K": torch.rand(6, 6), "L": torch.rand(6, 6)}
    with pytest.raises(error, match=message) as caught:
        koopman_losses(**(arguments | change))
    assert "\n" not in str(caught.value)
