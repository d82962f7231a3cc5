"""KLD: the golden vectors, independent oracles, training from the identity, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.peers import kld as peers
from pae.kld import KLD
from pae_kernels.koopman import reference, spectral
from tests.properties import examples

LN2_TERM = 10 * math.tanh(math.log(2) / 10)  # Lyapunov term of a pair whose energy does not change


def kld_and_prompts(
    mode="global", depth=5, count=4, width=12, dim=8, dtype=torch.float32, spread=0.2, **options
):
    """A bound KLD away from its initial state, and prompts (depth, P, D) that require grad."""
    kld = KLD(dim, mode, **options)
    kld.bind(depth, width)
    with torch.no_grad():
        kld.K += spread * torch.randn_like(kld.K)
        kld.L += spread * torch.randn_like(kld.L)
    prompts = torch.randn(depth, count, width) * torch.rand(depth, count, 1) * 3
    return kld.to(dtype), prompts.to(dtype).requires_grad_()


def results(kld, prompts):
    """The two terms and the gradients of prompts, lift, K and L."""
    terms = kld.terms(prompts)
    parameters = [kld.lift.weight, kld.K, kld.L]
    wanted = [*prompts] if isinstance(prompts, list) else [prompts]
    return [*terms, *torch.autograd.grad(sum(terms), wanted + parameters)]


def oracle(kld, prompts, terms=peers.official_style_terms):
    """The same in float64 by the per-pair formulation under autograd."""
    inputs = [prompts, kld.lift.weight, kld.K, kld.L]
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    values = terms(*inputs, kld.consistency_weight, kld.lyapunov_weight)
    return [*values, *torch.autograd.grad(sum(values), inputs)]


def error(actual, expected):
    """Relative in the norm, against at least 1e-6."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = actual.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-6)).item()


def close(actual, expected, rtol):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert error(a, e) <= rtol, f"relative error {error(a, e):.1e} > {rtol:.0e}"


# ----------------------------------------------------------------------------- the golden vectors


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("name", ["global", "layerwise", "init_global", "init_layerwise"])
def test_golden(golden, name, precision, as_list):
    file = {k: torch.as_tensor(v) for k, v in golden(f"pae_kld_{name}").items() if k != "meta_json"}
    dtype, value_rtol, gradient_rtol = {
        "f32": (torch.float32, 1e-5, 1e-4),
        "f64": (torch.float64, 1e-9, 1e-6),
    }[precision]
    kld = KLD(32, name.removeprefix("init_"))
    kld.bind(depth=4, width=64)
    kld.to(dtype)
    with torch.no_grad():
        kld.lift.weight.copy_(file["koopman_in_weight"])
        for operator, stored in ((kld.K, file["K"]), (kld.L, file["L"])):
            assert operator.shape == stored.shape
            if name.startswith("init"):
                assert torch.equal(operator, stored.to(dtype))  # our own initial state
            operator.copy_(stored)
    prompts = torch.cat([file["prompt_shallow"][None], file["prompt_deep"]]).to(dtype)
    if as_list:
        prompts = [p.clone().requires_grad_() for p in prompts]
        consistency, lyapunov = kld.terms(prompts)
        (consistency + lyapunov).backward()
        assert prompts[0].grad is None
        d_deep = torch.stack([p.grad for p in prompts[1:]])
    else:
        prompts.requires_grad_()
        consistency, lyapunov = kld.terms(prompts)
        (consistency + lyapunov).backward()
        assert not prompts.grad[0].any()
        d_deep = prompts.grad[1:]

    expected = {k.removeprefix(f"{precision}/"): v for k, v in file.items()}
    assert error(consistency, expected["koopman_loss"]) <= value_rtol
    assert error(lyapunov, expected["lyapunov_loss"]) <= value_rtol
    assert error(d_deep, expected["kld_grad_prompt_deep"]) <= gradient_rtol
    assert error(kld.lift.weight.grad, expected["kld_grad_koopman_in_weight"]) <= gradient_rtol
    assert error(kld.K.grad, expected["kld_grad_K"]) <= gradient_rtol
    if name.startswith("init"):
        assert kld.L.grad.abs().max() <= 1e-6
    else:
        assert error(kld.L.grad, expected["kld_grad_L"]) <= gradient_rtol
        norms = torch.cat([expected["z_norm"].flatten(), expected["zpred_norm"].flatten()])
        assert norms.min() < 1 < norms.max()  # both sides of the rescaling occur in this file


# ------------------------------------------------------------------------------ other formulations


@examples(20)
@given(
    mode=st.sampled_from(["global", "layerwise"]),
    depth=st.integers(3, 6),
    count=st.integers(1, 7),
    width=st.integers(1, 9),
    dim=st.integers(1, 10),
    weights=st.tuples(st.floats(0, 2), st.floats(0, 2)),
    seed=st.integers(0, 2**16),
)
def test_code_formulation_equals_the_per_pair_one(mode, depth, count, width, dim, weights, seed):
    torch.manual_seed(seed)
    kld, prompts = kld_and_prompts(
        mode,
        depth,
        count,
        width,
        dim,
        torch.float64,
        consistency_weight=weights[0],
        lyapunov_weight=weights[1],
    )
    close(results(kld, prompts), oracle(kld, prompts), 1e-7)


@pytest.mark.parametrize("mode", ["global", "layerwise"])
def test_single_precision_at_the_size_of_the_paper(mode):
    kld, prompts = kld_and_prompts(mode, depth=5, count=10, width=96, dim=128, spread=0.1)
    actual, expected = results(kld, prompts), oracle(kld, prompts)
    close(actual[:2], expected[:2], 1e-6)
    close(actual[2:], expected[2:], 1e-5)


def test_the_batched_peer_is_an_oracle_too():
    kld, prompts = kld_and_prompts(dtype=torch.float64)
    close(results(kld, prompts), oracle(kld, prompts, peers.batched_eigh_terms), 1e-7)


@pytest.mark.parametrize("mode", ["global", "layerwise"])
def test_paper_formulation_by_brute_force(mode):
    kld, prompts = kld_and_prompts(mode, depth=9, dtype=torch.float64, formulation="paper")
    U, K, L = kld.lift.weight.T, kld.K, kld.L
    consistency = lyapunov = 0.0
    for i in range(1, 8):
        K_i, L_i = (K[i - 1], L[i - 1]) if mode == "layerwise" else (K, L)
        now, following = prompts[i] @ U, prompts[i + 1] @ U
        Q = L_i.T @ L_i
        rise = torch.trace(following @ Q @ following.T) - torch.trace(now @ Q @ now.T)
        consistency = consistency + 0.5 * ((now @ K_i - following) ** 2).sum()
        lyapunov = lyapunov + 0.2 * torch.clamp(rise, min=0)
    parameters = [prompts, kld.lift.weight, K, L]
    gradients = torch.autograd.grad(consistency + lyapunov, parameters)
    close(results(kld, prompts), [consistency, lyapunov, *gradients], 1e-11)


def test_weights_scale_the_terms():
    plain, prompts = kld_and_prompts(consistency_weight=1, lyapunov_weight=1)
    weighted = KLD(8, consistency_weight=0.25, lyapunov_weight=3)
    weighted.bind(5, 12)
    weighted.load_state_dict(plain.state_dict())
    expected = [w * t for w, t in zip((0.25, 3), plain.terms(prompts))]
    close(weighted.terms(prompts), expected, 1e-6)


@pytest.mark.parametrize("mode", ["global", "layerwise"])
def test_equal_prompts_at_the_start_cost_the_floor(mode):
    kld = KLD(8, mode)
    kld.bind(6, 12)
    consistency, lyapunov = kld.terms(torch.rand(1, 3, 12).expand(6, 3, 12))
    assert consistency == 0
    assert math.isclose(lyapunov.item(), 0.2 * 4 * LN2_TERM, rel_tol=1e-6)


@pytest.mark.parametrize("mode", ["global", "layerwise"])
@pytest.mark.parametrize("formulation", ["code", "paper"])
def test_first_block_adds_the_pair_that_begins_the_evolution(mode, formulation):
    options = {"dtype": torch.float64, "formulation": formulation}
    kld, prompts = kld_and_prompts(mode, first_block=True, **options)
    other, _ = kld_and_prompts(mode, depth=6, **options)
    assert kld.K.shape == kld.L.shape == ((5, 8, 8) if mode == "layerwise" else (8, 8))
    other.load_state_dict(kld.state_dict())
    close(kld.terms(prompts), other.terms([None, *prompts]), 1e-12)  # one block later
    sum(kld.terms(prompts)).backward()
    assert prompts.grad[0].any()
    with pytest.raises(ValueError, match=r"same P in every block, got .*\(2, 12\)"):
        kld.terms([prompts[0, :2], *prompts[1:]])
    with pytest.raises(ValueError, match=r"prompts must be \(P >= 1, 12\) .*None"):
        kld.terms([None, *prompts[1:]])


@pytest.mark.parametrize("mode", ["global", "layerwise"])
def test_gauge_fixed_terms_are_those_of_what_the_network_sees(mode):
    kld, prompts = kld_and_prompts(mode, gauge="layernorm", gauge_eps=1e-5, dtype=torch.float64)
    free = KLD(8, mode)
    free.bind(5, 12)
    free.to(torch.float64).load_state_dict(kld.state_dict())
    terms = free.terms(torch.nn.functional.layer_norm(prompts, (12,), eps=1e-5))
    parameters = [prompts, free.lift.weight, free.K, free.L]
    close(results(kld, prompts), [*terms, *torch.autograd.grad(sum(terms), parameters)], 1e-10)
    close(kld.terms(prompts - 3), kld.terms(prompts), 1e-10)
    # shrinking every prompt pays without the gauge, and not with it
    assert free.terms(0.3 * prompts)[0] < 0.1 * free.terms(prompts)[0]
    assert kld.terms(0.3 * prompts)[0] > 0.9 * kld.terms(prompts)[0]


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("triple", [spectral.top_singular_triple, spectral.top_by_squaring])
@pytest.mark.parametrize("mode", ["global", "layerwise"])
@pytest.mark.parametrize("growing", [False, True], ids=["vpt-init", "growing"])
def test_training_from_the_identity_follows_float64(monkeypatch, mode, growing, triple):
    """50 steps of SGD with momentum and clipping, from K = L = I, beside the per-pair one in fp64.

    The first step moves L by rounding noise only and leaves its singular values equal to rounding,
    so the two runs may pick different top vectors in the second; hence the tolerance on the
    curves. At every fp32 state on the way the gradient itself must be right, that of L included,
    which an fp32 decomposition of L^T L gets wrong by a third in the first steps. With either way
    of taking the spectral norm: the reference's own, and that of the kernels.
    """
    monkeypatch.setattr(reference, "top_singular_triple", lambda L, *_: triple(L))
    depth, count, width, dim, steps = 6, 8, 48, 40, 50
    kld = KLD(dim, mode)
    kld.bind(depth, width)
    prompts = 0.125 * (torch.rand(depth, count, width) - 0.5)
    lr = 0.02 if growing else 0.25
    if growing:  # as after a pre-alignment: long rows that drift through the blocks
        prompts = torch.randn(count, width) + 0.3 * torch.randn(depth, count, width).cumsum(0)
    exact = [t.detach().double() for t in (prompts, kld.lift.weight, kld.K, kld.L)]
    for t in [prompts, *exact]:
        t.requires_grad_()

    optimizers = [
        torch.optim.SGD(group, lr=lr, momentum=0.9)
        for group in ([prompts, *kld.parameters()], exact)
    ]
    curves = [[], []]
    for step in range(steps):
        here = oracle(kld, prompts)
        losses = sum(kld.terms(prompts)), sum(peers.official_style_terms(*exact))
        for curve, optimizer, loss in zip(curves, optimizers, losses):
            curve.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
        # absolute in the scale of all gradients: that of L alone is pure noise in the first step
        gradients = [prompts.grad, kld.lift.weight.grad, kld.K.grad, kld.L.grad]
        scale = sum(g.square().sum() for g in here[2:]).sqrt()
        for actual, expected in zip(gradients, here[2:], strict=True):
            assert (actual.double() - expected).norm() <= 1e-4 * scale
        if step > 1:
            assert error(kld.L.grad, here[-1]) <= 1e-3
        kld.clip_gradients(10.0)
        torch.nn.utils.clip_grad_norm_(exact[1:], 10.0)
        for optimizer in optimizers:
            optimizer.step()
    assert curves[0][-1] < curves[0][0] - 1e-3
    assert max(abs(a - b) for a, b in zip(*curves)) <= 1e-4 * curves[1][0]
    assert (kld.L - torch.eye(dim)).abs().max() > 1e-6  # L did move


def test_clip_gradients_scales_the_regularisers_parameters_together():
    kld, prompts = kld_and_prompts(consistency_weight=500)
    sum(kld.terms(prompts)).backward()
    before = [p.grad.clone() for p in (kld.lift.weight, kld.K, kld.L)]
    untouched = prompts.grad.clone()
    norm = torch.cat([g.flatten() for g in before]).norm()
    assert norm > 10
    assert error(kld.clip_gradients(10.0), norm) < 1e-6
    for parameter, gradient in zip((kld.lift.weight, kld.K, kld.L), before):
        assert error(parameter.grad, 10 * gradient / norm) < 1e-6
    assert torch.equal(prompts.grad, untouched)

    small = [p.grad.clone() for p in kld.parameters()]
    kld.clip_gradients(1e6)
    assert all(torch.equal(p.grad, g) for p, g in zip(kld.parameters(), small))


def test_the_unused_layerwise_operator_gets_zeros_and_nothing_depends_on_it():
    kld, prompts = kld_and_prompts("layerwise")
    last = [t[-1].detach().clone() for t in (kld.K, kld.L)]
    optimizer = torch.optim.SGD([kld.K, kld.L], lr=0.1, momentum=0.9)
    sum(kld.terms(prompts)).backward()
    optimizer.step()
    assert not kld.K.grad[-1].any() and not kld.L.grad[-1].any()
    assert torch.equal(kld.K[-1], last[0]) and torch.equal(kld.L[-1], last[1])

    expected = results(kld, prompts)
    with torch.no_grad():  # as weight decay would, in a single step
        kld.K[-1] *= 0.1
        kld.L[-1] *= 0.1
    assert all(torch.equal(a, b) for a, b in zip(results(kld, prompts), expected))


# ------------------------------------------------------------------------- a module among modules


@pytest.mark.parametrize("mode", ["global", "layerwise"])
def test_bind_allocates_the_initial_state(mode):
    kld = KLD(7, mode)
    assert kld.K is None and kld.L is None and kld.lift is None
    kld.bind(depth=4, width=25)
    shape = (3, 7, 7) if mode == "layerwise" else (7, 7)
    assert kld.K.shape == kld.L.shape == shape
    assert torch.equal(kld.K, torch.eye(7).expand(shape)) and torch.equal(kld.L, kld.K)
    assert kld.K.data_ptr() != kld.L.data_ptr()
    assert kld.lift.weight.shape == (7, 25) and kld.lift.bias is None
    assert 0.1 < kld.lift.weight.abs().max() <= 1 / 5
    assert sorted(kld.state_dict()) == ["K", "L", "lift.weight"]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("formulation", ["code", "paper"])
@pytest.mark.parametrize("mode", ["global", "layerwise"])
def test_too_few_blocks_for_a_pair(mode, formulation, depth):
    kld = KLD(8, mode, formulation=formulation)
    kld.bind(depth, 12)
    for prompts in (torch.randn(depth, 3, 12), list(torch.randn(depth, 3, 12))):
        terms = kld.terms(prompts)
        assert not any(terms)
        for gradient in torch.autograd.grad(sum(terms), list(kld.parameters())):
            assert not gradient.any()


def test_block_0_is_not_looked_at():
    kld, prompts = kld_and_prompts()
    expected = kld.terms(prompts)
    deep = list(prompts[1:])
    for first in (None, torch.full((9, 12), math.nan)):
        assert all(torch.equal(a, b) for a, b in zip(kld.terms([first, *deep]), expected))


def test_config_builds_it_again():
    options = {
        "dim": 9,
        "mode": "layerwise",
        "consistency_weight": 0.25,
        "lyapunov_weight": 2.0,
        "formulation": "paper",
        "gauge": "layernorm",
        "gauge_eps": 1e-5,
        "first_block": True,
    }
    assert KLD(**options).config() == options
    assert KLD(**KLD().config()).config() == KLD().config()
    assert KLD().config() == {
        "dim": 256,
        "mode": "global",
        "consistency_weight": 0.5,
        "lyapunov_weight": 0.2,
        "formulation": "code",
        "gauge": "none",
        "gauge_eps": 1e-6,
        "first_block": False,
    }


def test_autocast_changes_nothing():
    kld, prompts = kld_and_prompts()
    expected = results(kld, prompts)
    with torch.autocast("cpu", torch.bfloat16):
        terms = kld.terms(prompts)
    gradients = torch.autograd.grad(sum(terms), [prompts, kld.lift.weight, kld.K, kld.L])
    assert all(torch.equal(a, b) for a, b in zip([*terms, *gradients], expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_computed_in_fp32(dtype):
    kld, prompts = kld_and_prompts(dtype=dtype)
    consistency, lyapunov, *gradients = results(kld, prompts)
    assert consistency.dtype == lyapunov.dtype == torch.float32
    assert all(g.dtype == dtype for g in gradients)
    expected = oracle(kld, prompts)
    close([consistency, lyapunov], expected[:2], 1e-5)
    close(gradients, expected[2:], 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mode", ["global", "layerwise"])
def test_compiles_without_a_break(mode):
    kld, prompts = kld_and_prompts(mode)
    torch.compiler.reset()
    compiled = torch.compile(lambda p: sum(kld.terms(p)), fullgraph=True, backend="aot_eager")
    parameters = [prompts, *kld.parameters()]
    expected = torch.autograd.grad(sum(kld.terms(prompts)), parameters)
    close(torch.autograd.grad(compiled(prompts), parameters), expected, 1e-6)


def test_a_non_finite_L_gives_nan():
    kld, prompts = kld_and_prompts()
    with torch.no_grad():
        kld.L[2, 3] = math.inf
    consistency, lyapunov = kld.terms(prompts)
    assert consistency.isfinite() and lyapunov.isnan()


# ------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 8.0}, TypeError, "dim must be an integer, got 8.0"),
        ({"dim": True}, TypeError, "dim must be an integer, got True"),
        ({"mode": "local"}, ValueError, "mode must be one of .*global.*layerwise.* got 'local'"),
        ({"formulation": "x"}, ValueError, "formulation must be one of .*code.*paper.* got 'x'"),
        ({"gauge": "l2"}, ValueError, "gauge must be one of .*none.*layernorm.* got 'l2'"),
        ({"gauge_eps": -1}, ValueError, "gauge_eps must be finite and at least 0, got -1"),
        ({"first_block": 1}, TypeError, "first_block must be True or False, got 1"),
        ({"consistency_weight": -1}, ValueError, "consistency_weight must be .* got -1"),
        ({"lyapunov_weight": math.nan}, ValueError, "lyapunov_weight must be finite .* got nan"),
        ({"lyapunov_weight": "1"}, TypeError, "lyapunov_weight must be a number, got '1'"),
    ],
)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message) as caught:
        KLD(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prompts, kind, message",
    [
        (None, TypeError, "prompts must be a tensor or a list of tensors, got None"),
        (torch.rand(4, 3, 12), ValueError, "prompts must hold 5 blocks, got 4"),
        (torch.rand(5, 3, 11), ValueError, r"prompts must be \(P >= 1, 12\) .* \(3, 11\)"),
        (torch.rand(5, 0, 12), ValueError, r"prompts must be \(P >= 1, 12\) .* \(0, 12\)"),
        (torch.rand(5, 12), ValueError, r"prompts must be \(P >= 1, 12\) .* \(12,\)"),
        ([torch.rand(3, 12)] * 4 + [None], ValueError, r"prompts must be \(P >= 1, 12\) .* None"),
        (
            [torch.rand(3, 12)] * 4 + [torch.rand(2, 12)],
            ValueError,
            r"prompts must have the same P in every block but the first, got .*\(2, 12\)",
        ),
    ],
)
def test_bad_prompts(prompts, kind, message):
    kld, _ = kld_and_prompts()
    with pytest.raises(kind, match=message) as caught:
        kld.terms(prompts)
    assert "\n" not in str(caught.value)


def test_binding():
    kld = KLD(8)
    with pytest.raises(RuntimeError, match="KLD is not bound"):
        kld.terms(torch.rand(5, 3, 12))
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        kld.bind(0, 12)
    with pytest.raises(TypeError, match="width must be an integer"):
        kld.bind(5, 12.0)
    kld.bind(5, 12)
    with pytest.raises(RuntimeError, match="this KLD already belongs to a model"):
        kld.bind(5, 12)
