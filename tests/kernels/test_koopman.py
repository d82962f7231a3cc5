"""koopman_losses in every execution, brute force, and the spectra that break others."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from pae_kernels import backends, native
from pae_kernels.koopman import (
    cuda,
    koopman_losses,
    koopman_rollout,
    reference,
    runs_on_device,
    spectral,
    tiles,
)
from tests.kernels.executions import FP32, FP64, GPU, KERNELS, each, sanitized, tf32
from tests.properties import examples

OP = "koopman_losses"
FORMULATIONS = ("code", "paper")
MODES = ("global", "layerwise")
BOTH = pytest.mark.parametrize("formulation", FORMULATIONS)
EACH_MODE = pytest.mark.parametrize("mode", MODES)
GAUGES = ("none", "layernorm")
EACH_GAUGE = pytest.mark.parametrize("gauge", GAUGES)
LN2_TERM = 10 * math.tanh(math.log(2) / 10)  # Lyapunov term of a pair whose energy does not change
RESULTS = "consistency", "lyapunov", "d prompts", "d lift", "d K", "d L"


def use_tile(monkeypatch, tile):
    for name in ("product", "gradient", "square"):
        monkeypatch.setattr(tiles, name, lambda *_: tile)


@pytest.fixture
def execution(execution, monkeypatch):
    """In the interpreter on tiles of 16 rows, so that tiny inputs make several of them."""
    if execution.kind == "interpreter":
        use_tile(monkeypatch, 16)
    return execution


def problem(
    mode="global",
    blocks=4,
    count=3,
    k=6,
    dtype=torch.float64,
    seed=0,
    grad=True,
    runs=None,
    width=None,
):
    """prompts, lift, K, L with states on both sides of length 1 and distinct singular values."""
    draw = torch.Generator().manual_seed(seed)
    packed = () if runs is None else (runs,)
    width = k + 2 if width is None else width
    shape = (*packed, blocks, k, k) if mode == "layerwise" else (*packed, k, k)

    def normal(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    lengths = 0.2 + 2 * torch.rand(*packed, blocks, count, 1, generator=draw, dtype=torch.float64)
    prompts = lengths * normal(*packed, blocks, count, width) / k**0.5
    lift = normal(*packed, k, width) / width**0.5
    K = torch.eye(k) + 0.3 * normal(*shape)
    L = torch.eye(k) + 0.3 * normal(*shape)
    return [t.to(dtype).requires_grad_(grad) for t in (prompts, lift, K, L)]


def definition(prompts, lift, K, L, formulation="code", gauge="none", eps=1e-6):
    """The reference's definition, with or without the axis of runs."""
    inputs = prompts, lift, K, L
    eps = eps if gauge == "layernorm" else None
    if prompts.dim() == 4:
        return reference.koopman_losses(*inputs, formulation, eps)
    losses = reference.koopman_losses(*(t[None] for t in inputs), formulation, eps)
    return tuple(loss[0] for loss in losses)


def values_and_gradients(function, inputs, *options):
    """Both losses, and the gradients of a weighted sum; every run has a weight of its own."""
    consistency, lyapunov = function(*inputs, *options)
    loss = 0.7 * consistency + 1.3 * lyapunov
    if loss.dim():
        loss = (loss * torch.linspace(0.5, 2, len(loss), device=loss.device)).sum()
    return [consistency, lyapunov, *torch.autograd.grad(loss, inputs)]


def close(actual, expected, rtol):
    """Relative in the norm of every tensor, with an absolute floor of rtol for zeros."""
    for a, e in zip(actual, expected, strict=True):
        e = e.to(torch.float64)
        error = (a.to(torch.float64) - e).norm() / e.norm().clamp(min=1.0e-3)
        assert error <= rtol, f"relative error {error:.1e} > {rtol:.0e}"


def check(execution, inputs, *options):
    """Losses and gradients of a version, after comparing them with the definition in fp64."""
    inputs = execution.moved(*inputs)
    got = values_and_gradients(koopman_losses, inputs, *options)
    plain = values_and_gradients(definition, inputs, *options)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = values_and_gradients(definition, wide, *options)
    for name, a, b, c in zip(RESULTS, got, plain, exact, strict=True):
        execution.assert_as_exact(a, b, c, name, floor=execution.pick(gpu=2e-6, other=1e-6))
    return got


# ------------------------------------------------------------------------------ the same function

SWITCHES = list(itertools.product((None, 3), MODES, FORMULATIONS, GAUGES))
EVERY = list(itertools.product(MODES, FORMULATIONS, GAUGES))
# every switch with every other one at least once
FEW = [
    (None, "global", "code", "none"),
    (2, "global", "paper", "layernorm"),
    (2, "layerwise", "code", "layernorm"),
    (None, "layerwise", "paper", "none"),
]


@each(
    OP,
    "dtype, tile, runs, mode, formulation, gauge",
    reference=[(dtype, None, *rest) for dtype in (FP64, FP32) for rest in SWITCHES],
    interpreter=[(FP32, 16, *rest) for rest in FEW],
    emulated=[(FP32, tile, *rest) for tile in tiles.TILES for rest in SWITCHES],
    gpu=[(FP32, None, *rest) for rest in SWITCHES],
)
def test_values_and_gradients_equal_the_definition(
    execution, monkeypatch, dtype, tile, runs, mode, formulation, gauge
):
    """Several tiles in every direction where they are small, none of them full."""
    if tile is not None:
        use_tile(monkeypatch, tile)
    blocks, count, k, width = execution.pick(
        reference=(5, 7, 16, 18),
        interpreter=(3, 7, 18, 21),
        emulated=(4, 7, 18, 37),
        gpu=(5, 20, 96, 208),
    )
    inputs = problem(mode, blocks, count, k, dtype, runs=runs, width=width)
    losses = check(execution, inputs, formulation, gauge, execution.pick(gpu=1e-6, other=1e-3))
    assert losses[0].shape == losses[1].shape == (() if runs is None else (runs,))


TILED = [
    sanitized(tile, k) if k == 33 else (tile, k)
    for tile in tiles.TILES
    for k in (2, 16, 33, 64, 100)
]


@each(
    OP,
    "tile, k",
    interpreter=[(16, 16), (32, 16)],  # full tiles of 16, one of 32
    emulated=TILED,
    gpu=[(16, 64), (32, 1), (64, 40)],  # Triton compiles all kernels again for every tile
)
def test_widths_around_the_tiles(execution, monkeypatch, tile, k):
    use_tile(monkeypatch, tile)
    count, width = execution.pick(interpreter=(8, 2 * k), emulated=(5, k), gpu=(9, 2 * k))
    mode, *options = execution.pick(gpu=("layerwise", "code", "layernorm"), other=("global",))
    check(execution, problem(mode, 3, count, k, FP32, width=width), *options)


# blocks, prompts, width, k
REAL = [(11, 20, 768, 256), (12, 50, 768, 256), (11, 100, 768, 256), (23, 50, 1024, 1024)]
OTHER = [(12, 5, 70, 40), (19, 2, 6, 4)]  # tiles of the table, more pairs than warps


@each(OP, "size", gpu=[*REAL, (3, 7, 33, 17)], emulated=OTHER, reference=OTHER)
def test_other_sizes(execution, size):
    blocks, prompts, width, k = size
    for mode in execution.pick(gpu=("global",), other=MODES):
        check(execution, problem(mode, blocks, prompts, k, FP32, width=width))


PAIRS = list(itertools.product(MODES, FORMULATIONS))


@each(
    OP,
    "mode, formulation",
    reference=PAIRS,
    interpreter=[(mode, "code") for mode in MODES],
    emulated=[sanitized(*pair) for pair in PAIRS],
)
def test_one_pair_of_single_rows(execution, mode, formulation):
    check(execution, problem(mode, 2, 1, 1, FP32, width=1), formulation)


@each(OP, "mode, formulation, gauge", gpu=[sanitized(*EVERY[0]), sanitized(*EVERY[-1])])
def test_every_kernel_once(execution, mode, formulation, gauge):
    """Few enough calls for compute-sanitizer."""
    inputs = execution.moved(*problem(mode, 3, 5, 18, FP32, runs=2, width=37))
    results = values_and_gradients(koopman_losses, inputs, formulation, gauge)
    assert all(r.isfinite().all() for r in results)


@each(
    OP,
    "mode, formulation, gauge",
    reference=EVERY,
    interpreter=[("layerwise", "paper", "layernorm")],
    emulated=[sanitized(*EVERY[0]), *EVERY[1:]],
    gpu=EVERY,
)
def test_packed_runs_are_the_runs(execution, monkeypatch, mode, formulation, gauge):
    """Nothing passes from one run to another, and one packed run is that run, bit by bit."""
    use_tile(monkeypatch, 16)  # a table by the total size may choose other tiles for fewer runs
    dtype = execution.pick(reference=FP64, other=FP32)
    blocks, count, k = execution.pick(interpreter=(2, 2, 4), other=(4, 3, 6))
    inputs = execution.moved(*problem(mode, blocks, count, k, dtype, runs=3))
    together = values_and_gradients(koopman_losses, inputs, formulation, gauge)
    for r, weight in enumerate((0.5, 1.25, 2.0)):
        alone = [t[r].detach().requires_grad_() for t in inputs]
        losses = koopman_losses(*alone, formulation, gauge)
        loss = weight * (0.7 * losses[0] + 1.3 * losses[1])
        results = [*losses, *torch.autograd.grad(loss, alone)]
        if execution.kind == "reference":  # whose products of more matrices add in another order
            close([t[r] for t in together], results, 1e-12)
        else:
            assert all(torch.equal(t[r], one) for t, one in zip(together, results, strict=True))
        packed = [t[None].detach().requires_grad_() for t in alone]
        losses = koopman_losses(*packed, formulation, gauge)
        loss = (weight * (0.7 * losses[0] + 1.3 * losses[1])).sum()
        for a, b in zip([*losses, *torch.autograd.grad(loss, packed)], results, strict=True):
            assert torch.equal(a[0], b)


def test_the_gauge_is_layer_norm():
    """The losses of LayerNorm'd prompts: what the network cannot see, they cannot either."""
    prompts, lift, K, L = problem(grad=False)
    seen = torch.nn.functional.layer_norm(prompts, prompts.shape[-1:], eps=1e-3)
    fixed = koopman_losses(prompts, lift, K, L, gauge="layernorm", eps=1e-3)
    close(fixed, koopman_losses(seen, lift, K, L), 1e-12)
    expected = koopman_losses(prompts, lift, K, L, gauge="layernorm", eps=1e-12)
    for moved in (0.01 * prompts, prompts + 7):
        close(koopman_losses(moved, lift, K, L, gauge="layernorm", eps=1e-12), expected, 1e-6)
    free, shrunk = (koopman_losses(p, lift, K, L)[0] for p in (prompts, 0.01 * prompts))
    assert shrunk < 1e-3 * free


@EACH_MODE
def test_paper_formulation_by_brute_force(mode):
    prompts, lift, K, L = problem(mode, blocks=8, grad=False)
    states = prompts @ lift.T
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
    close(koopman_losses(prompts, lift, K, L, "paper"), expected, 1e-12)


def test_code_formulation_by_brute_force():
    prompts, lift, K, L = problem(grad=False)
    states = prompts @ lift.T
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
    close(koopman_losses(prompts, lift, K, L), expected, 1e-12)


@BOTH
@EACH_MODE
@EACH_GAUGE
@pytest.mark.parametrize("runs", [None, 2])
def test_gradcheck(formulation, mode, gauge, runs):
    inputs = problem(mode, blocks=3, count=2, k=3, width=5, runs=runs, seed=3)
    rows = inputs[0]
    if gauge == "layernorm":
        rows = torch.nn.functional.layer_norm(rows, rows.shape[-1:], eps=0.1)
    norms = (rows @ inputs[1].mT.unsqueeze(-3)).norm(dim=-1)
    assert (norms > 1.01).any() and (norms < 0.99).any()  # both sides of the rescaling
    assert gradcheck(lambda *t: koopman_losses(*t, formulation, gauge, 0.1), inputs)


@examples(25)
@given(
    mode=st.sampled_from(MODES),
    formulation=st.sampled_from(FORMULATIONS),
    blocks=st.integers(1, 5),
    count=st.integers(1, 6),
    k=st.integers(1, 9),
    width=st.integers(2, 9),
    gauge=st.sampled_from(GAUGES),
    runs=st.sampled_from([None, 1, 2]),
    seed=st.integers(0, 2**16),
)
def test_every_shape_equals_the_definition(
    mode, formulation, blocks, count, k, width, gauge, runs, seed
):
    inputs = problem(mode, blocks, count, k, seed=seed, runs=runs, width=width)
    expected = values_and_gradients(definition, inputs, formulation, gauge, 1e-2)
    close(values_and_gradients(koopman_losses, inputs, formulation, gauge, 1e-2), expected, 1e-7)


# -------------------------------------------------------------------------------- what must be so


@BOTH
def test_perfect_prediction_has_no_consistency_loss(formulation):
    _, _, K, L = problem(grad=False)
    states = koopman_rollout(torch.rand(3, 6, dtype=torch.float64), K, 3)
    lift = torch.eye(6, dtype=torch.float64)
    assert koopman_losses(states, lift, K, L, formulation)[0] < 1e-24


@EACH_MODE
def test_equal_states_under_the_identity_are_a_fixed_point(mode):
    prompts, lift, K, L = problem(mode)
    with torch.no_grad():
        prompts.copy_(prompts[:1].clone().expand_as(prompts))
        K.copy_(torch.eye(6).expand_as(K))
    consistency, lyapunov, d_prompts, d_lift, d_K, d_L = values_and_gradients(
        koopman_losses, [prompts, lift, K, L], "code"
    )
    assert consistency == 0
    assert math.isclose(lyapunov.item(), 3 * LN2_TERM, rel_tol=1e-12)
    # no energy changes ...
    assert max(d.abs().max() for d in (d_L, d_prompts, d_lift)) < 1e-15
    assert d_K.abs().max() > 1e-3  # ... but it would under another K


@BOTH
def test_layerwise_with_equal_operators_is_global(formulation):
    prompts, lift, K, L = problem()
    stacked = [t.detach().repeat(4, 1, 1).requires_grad_() for t in (K, L)]
    shared = values_and_gradients(koopman_losses, [prompts, lift, K, L], formulation)
    each = values_and_gradients(koopman_losses, [prompts, lift, *stacked], formulation)
    close([*each[:4], each[4].sum(0), each[5].sum(0)], shared, 1e-12)


@BOTH
def test_the_last_layerwise_operator_is_not_used(formulation):
    inputs = problem("layerwise")
    before = values_and_gradients(koopman_losses, inputs, formulation)
    assert not before[4][-1].any() and not before[5][-1].any()
    assert before[4][:-1].flatten(1).any(1).all()
    with torch.no_grad():
        inputs[2][-1], inputs[3][-1] = torch.nan, torch.nan
    after = values_and_gradients(koopman_losses, inputs, formulation)
    assert all(torch.equal(a, b) for a, b in zip(after, before))


@each(
    OP,
    "mode, formulation, blocks",
    interpreter=[("global", "code", 1)],
    other=list(itertools.product(MODES, FORMULATIONS, (0, 1))),
)
def test_no_pair_gives_zeros_that_can_be_differentiated(execution, mode, formulation, blocks):
    inputs = execution.moved(*problem(mode, blocks=blocks, dtype=FP32))
    for gauge in GAUGES:
        for result in values_and_gradients(koopman_losses, inputs, formulation, gauge):
            assert not result.any()


@each(
    OP,
    "mode, formulation",
    reference=PAIRS,
    interpreter=[("layerwise", "code")],
    emulated=[*PAIRS[:-1], sanitized(*PAIRS[-1])],
    gpu=PAIRS,
)
def test_bitwise_the_same_on_every_run_and_inputs_untouched(execution, mode, formulation):
    blocks, count, k, width = execution.pick(
        reference=(6, 5, 40, 42),
        interpreter=(2, 3, 6, 8),
        emulated=(4, 5, 20, 40),
        gpu=(11, 50, 128, 256),
    )
    inputs = execution.moved(*problem(mode, blocks, count, k, FP32, width=width))
    copies = [t.detach().clone() for t in inputs]
    first = None
    for _ in execution.runs():
        results = values_and_gradients(koopman_losses, inputs, formulation, "layernorm")
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies))


STRIDED = list(itertools.product(MODES, FORMULATIONS, (None, 2)))


@each(OP, "mode, formulation, runs", reference=STRIDED, emulated=STRIDED, gpu=STRIDED)
def test_strides_do_not_matter(execution, mode, formulation, runs):
    dtype = execution.pick(reference=FP64, other=FP32)
    inputs = execution.moved(*problem(mode, runs=runs, dtype=dtype))
    strided = [t.detach().mT.contiguous().mT.requires_grad_() for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    one, other = (
        values_and_gradients(koopman_losses, t, formulation, "layernorm") for t in (inputs, strided)
    )
    if execution.kind == "reference":
        close(other, one, 1e-12)
    else:  # which read them as they lie, or a copy
        assert all(torch.equal(a, b) for a, b in zip(other, one, strict=True))


@each(OP, "mode, formulation, gauge", reference=EVERY)
def test_no_unwritten_memory_is_read(execution, mode, formulation, gauge, poisoned_memory):
    """What the kernels run on in every other test here."""
    results = values_and_gradients(koopman_losses, problem(mode), formulation, gauge)
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


@each(OP, "spectrum, mode", reference=FINITE, emulated=FINITE, gpu=FINITE)
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


@each(
    OP,
    "triple, k, distance",
    reference=[
        (way, k, 10.0**-power)
        for way in (triple_of, by_squaring)
        for k in (16, 64)
        for power in range(2, 8)
    ],
    emulated=[(triple_of, 64, distance) for distance in (1e-7, 1e-5, 1e-3, 1e-1)],
)
def test_top_vector_next_to_the_identity(execution, triple, k, distance):
    """Resolved relative to the distance: the entries of L - I are all that fp32 rounds."""
    L = torch.eye(k) + distance * torch.randn(execution.pick(reference=10, other=2), k, k)
    exact = torch.linalg.svd(L.double())[2][:, 0]
    right = triple(execution, L)[2]
    angle = (right - exact * (right * exact).sum(1, keepdim=True)).norm(dim=1)
    assert angle.max() <= 1e-5


@each(OP, "k, distance", gpu=itertools.product([64, 256, 1024], [1e-6, 1e-4, 1e-2, 1e-1]))
def test_top_vector_next_to_the_identity_at_real_sizes(execution, k, distance):
    L = torch.eye(k) + distance * torch.randn(1, k, k)
    _, singular, vectors = torch.linalg.svd(L[0].double())
    sigma, _, right = triple_of(execution, L)
    assert abs(sigma.item() / singular[0].item() - 1) <= 1e-6
    gap = (singular[0] - singular[1]).item() / distance / k**0.5  # of the spread of the spectrum
    angle = (1 - (right[0] @ vectors[0]) ** 2).clamp(min=0).sqrt().item()
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


# -------------------------------------------------------------------------------------- rollout


def test_rollout_by_brute_force():
    z0, K = torch.randn(3, 6, dtype=torch.float64), problem(grad=False)[2]
    expected = [z0 @ torch.linalg.matrix_power(K, t) for t in range(6)]
    close([koopman_rollout(z0, K, 5)], [torch.stack(expected)], 1e-12)
    assert torch.equal(koopman_rollout(z0, K, 0), z0[None])


def test_rollout_of_packed_runs():
    z0, K = torch.randn(2, 3, 6), torch.randn(2, 6, 6)
    together = koopman_rollout(z0, K, 4)
    assert together.shape == (5, 2, 3, 6)
    for r in range(2):
        close([together[:, r]], [koopman_rollout(z0[r], K[r], 4)], 1e-6)
    close([koopman_rollout(z0, K[0], 4)[:, 1]], [koopman_rollout(z0[1], K[0], 4)], 1e-6)


def test_rollout_gradcheck():
    z0, K = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (z0, K)]
    assert gradcheck(lambda *t: koopman_rollout(*t, 3), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: koopman_rollout(*t, 2), inputs)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ({"steps": 2.0}, TypeError, "steps must be an integer, got 2.0"),
        ({"z0": torch.rand(6)}, ValueError, r"z0 must be \(\.\.\., P, k\), got \(6,\)"),
        ({"K": torch.rand(2, 6, 6)}, ValueError, r"K must be \(6, 6\) .* got \(2, 6, 6\)"),
        ({"K": torch.rand(6, 6).double()}, TypeError, "K must be like z0 .* got .* float64"),
    ],
)
def test_rollout_error_messages(change, error, message):
    with pytest.raises(error, match=message) as caught:
        koopman_rollout(**({"z0": torch.rand(3, 6), "K": torch.rand(6, 6), "steps": 2} | change))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ as an op

EPSILONS = pytest.mark.parametrize("eps", [None, 1e-6])


@BOTH
@EACH_MODE
@EPSILONS
@pytest.mark.parametrize("runs, blocks", [(None, 1), (None, 3), (2, 3)])
def test_opcheck(formulation, mode, eps, runs, blocks):
    inputs = problem(mode, blocks=blocks, dtype=torch.float32, runs=runs)
    options = formulation, eps
    torch.library.opcheck(torch.ops.pae.koopman_losses_fwd, (*inputs, *options))
    plain = [t.detach() for t in inputs]
    values = torch.ops.pae.koopman_losses_fwd(*plain, *options)
    ends = [torch.ones_like(v) for v in values[:2]]
    torch.library.opcheck(torch.ops.pae.koopman_losses_bwd, (*ends, *plain, *options, *values[2:]))


@BOTH
@EACH_MODE
@EPSILONS
def test_both_autograd_paths_agree(formulation, mode, eps):
    inputs = problem(mode)
    registered = values_and_gradients(
        lambda *args: torch.ops.pae.koopman_losses_fwd(*args)[:2], inputs, formulation, eps
    )
    gauge = "none" if eps is None else "layernorm"
    eager = values_and_gradients(koopman_losses, inputs, formulation, gauge)
    assert all(torch.equal(a, b) for a, b in zip(registered, eager))


@each(
    OP,
    "formulation, gauge, runs, backend",
    reference=itertools.product(FORMULATIONS, GAUGES, (None, 2), ["aot_eager"]),
    gpu=[("code", "layernorm", None, "inductor")],
)
def test_compiles_without_a_break(execution, formulation, gauge, runs, backend):
    def loss(prompts, lift, K, L):
        consistency, lyapunov = koopman_losses(2 * prompts, lift, K, L, formulation, gauge)
        return (consistency + 3 * lyapunov).sum()

    inputs = execution.moved(*problem(dtype=FP32, runs=runs))
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    expected = loss(*inputs), *torch.autograd.grad(loss(*inputs), inputs)
    actual = compiled(*inputs), *torch.autograd.grad(compiled(*inputs), inputs)
    close(actual, expected, 1e-6)


@each(OP, "formulation", reference=FORMULATIONS, gpu=FORMULATIONS)
def test_autocast_and_tf32_change_nothing_even_around_the_backward(execution, formulation):
    size = execution.pick(gpu=("global", 11, 50, 128), other=("global", 4, 3, 6))
    inputs = execution.moved(*problem(*size, dtype=FP32))
    expected = values_and_gradients(koopman_losses, inputs, formulation)
    with tf32(True), torch.autocast(execution.device.type, torch.bfloat16):
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


GOOD = {
    "prompts": torch.rand(4, 3, 9),
    "lift": torch.rand(6, 9),
    "K": torch.rand(6, 6),
    "L": torch.rand(6, 6),
}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"prompts": torch.rand(3, 9)}, ValueError, r"prompts must be .* got \(3, 9\) float32"),
        ({"prompts": torch.rand(4, 0, 9)}, ValueError, r"prompts must be .* got \(4, 0, 9\)"),
        ({"prompts": torch.rand(0, 4, 3, 9)}, ValueError, "prompts must be .*R >= 1"),
        ({"prompts": torch.rand(4, 3, 9).half()}, TypeError, "prompts must be float32 or float64"),
        ({"lift": torch.rand(6, 8)}, ValueError, r"lift must be \(k >= 1, 9\) .* got \(6, 8\)"),
        ({"lift": torch.rand(0, 9)}, ValueError, r"lift must be \(k >= 1, 9\) .* got \(0, 9\)"),
        ({"lift": torch.rand(1, 6, 9)}, ValueError, r"lift must be .* got \(1, 6, 9\)"),
        ({"lift": torch.rand(6, 9).double()}, TypeError, "lift must be like prompts .* float64"),
        ({"K": torch.rand(6, 5)}, ValueError, r"K must be \(6, 6\) or .*got \(6, 5\)"),
        ({"L": torch.rand(3, 6, 6)}, ValueError, r"L must be \(6, 6\) or \(4, 6, 6\)"),
        ({"L": torch.rand(4, 6, 6)}, ValueError, "K and L must have the same shape"),
        ({"K": torch.rand(6, 6).double()}, TypeError, "K must be like prompts .* got .* float64"),
        ({"formulation": "both"}, ValueError, "formulation must be one of .* got 'both'"),
        ({"gauge": "l2"}, ValueError, "gauge must be one of .* got 'l2'"),
        ({"eps": -1.0}, ValueError, "eps must be a number of at least 0, got -1.0"),
    ],
)
def test_error_messages(change, error, message):
    with pytest.raises(error, match=message) as caught:
        koopman_losses(**(GOOD | change))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- versions, and GPUs


@each(OP, on=KERNELS)
def test_fp64_is_refused_by_name_or_runs_on_the_reference(execution, monkeypatch):
    inputs = execution.moved(*problem())
    refusal = f"{execution.version}: computes in fp32 at most, not torch.float64"
    with pytest.raises(RuntimeError, match=refusal):
        koopman_losses(*inputs)
    monkeypatch.delenv("PAE_BACKEND")
    assert backends.choose(OP, execution.device, FP64) is reference
    assert runs_on_device(execution.device) or execution.kind != "gpu"
    expected = values_and_gradients(definition, inputs)
    close(values_and_gradients(koopman_losses, inputs), expected, 1e-10)


@each(
    OP,
    "change, message",
    emulated=[
        ({"blocks": 1}, "an empty size, or no pair of blocks"),
        ({"k": 10_000}, "a size beyond what the kernels count with"),
        ({"tile": 48}, "tiles are 48 and 16, expected 16, 32 or 64"),
        ({"squarings": 1}, "squarings is 1, expected 3 to 64"),
        ({"workspace_floats": 5}, "workspace has 5 floats, expected "),
        ({"struct_size": 8}, "struct_size is 8, expected "),
    ],
)
def test_the_library_checks_what_would_lead_it_astray(execution, change, message):
    fields = {"runs": 1, "blocks": 3, "prompts": 2, "width": 4, "k": 8, "code": 1, "squarings": 24}
    fields |= {"tile": 16, "square_tile": 16}
    params = cuda._Forward(**fields)
    for name, value in change.items():
        setattr(params, name, value)
    with pytest.raises(RuntimeError, match=message):
        native.call("pae_koopman_fwd", params, torch.device("cpu"))


@each(OP, "mode, formulation", gpu=itertools.product(MODES, FORMULATIONS))
def test_a_captured_graph_follows_its_inputs(execution, mode, formulation):
    """Values of eager calls on the new inputs, spectra that settle early or late among them."""
    inputs = execution.moved(*problem(mode, 6, 20, 64, FP32, width=96))

    def work():
        return values_and_gradients(koopman_losses, inputs, formulation, "layernorm")

    graph, captured = execution.captured(work)
    identity = torch.eye(64, device=GPU)
    for seed, L in enumerate((None, identity, identity + 1e-6 * torch.randn_like(identity))):
        fresh = problem(mode, 6, 20, 64, FP32, width=96, seed=seed + 1)
        with torch.no_grad():
            for t, new in zip(inputs, fresh):
                t.copy_(new)
            if L is not None:
                inputs[3].copy_(L.expand_as(inputs[3]))
        graph.replay()
        expected = work()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@each(OP, on=["gpu"])
def test_work_follows_the_callers_stream(execution):
    """Inputs are still being made when it is enqueued."""
    inputs = execution.moved(*problem("global", 11, 50, 128, FP32, width=256))
    expected = values_and_gradients(koopman_losses, inputs)
    with execution.late(*inputs) as late:
        results = values_and_gradients(koopman_losses, [t.requires_grad_() for t in late])
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
