"""koopman_losses as an op, koopman_rollout, versions, and what only a GPU shows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from pae_kernels import backends, native
from pae_kernels.koopman import cuda, koopman_losses, koopman_rollout, reference, runs_on_device
from tests.kernels.executions import FP32, FP64, GPU, KERNELS, each, tf32
from tests.kernels.koopman.cases import (
    BOTH,
    EACH_MODE,
    FORMULATIONS,
    GAUGES,
    MODES,
    OP,
    close,
    definition,
    problem,
    values_and_gradients,
)

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


def test_no_graph_without_grad():
    inputs = problem()
    with torch.no_grad():
        assert not any(t.requires_grad for t in koopman_losses(*inputs))
    assert not any(t.requires_grad for t in koopman_losses(*(t.detach() for t in inputs)))


def test_a_forced_version_that_does_not_exist_is_an_error(monkeypatch):
    assert backends.choose("koopman_losses", "cpu", torch.float64) is reference
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
    known = execution.pick(cpu="fp32 and bf16", other="fp32 at most")
    refusal = f"{execution.version}: computes in {known}, not torch.float64"
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
