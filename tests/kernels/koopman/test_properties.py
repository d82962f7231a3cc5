"""koopman_losses in every execution: what must hold at any input."""

from __future__ import annotations

import itertools
import math

import torch

from pae_kernels.koopman import koopman_losses, koopman_rollout
from tests.kernels.executions import FP32, FP64, each, sanitized
from tests.kernels.koopman.cases import (
    BOTH,
    EACH_MODE,
    EVERY,
    FORMULATIONS,
    GAUGES,
    LN2_TERM,
    MODES,
    OP,
    PAIRS,
    close,
    problem,
    values_and_gradients,
)


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


START = list(itertools.product(MODES, GAUGES))


@each(
    OP,
    "mode, gauge",
    reference=START,
    interpreter=START[::3],
    emulated=START,
    gpu=START,
)
def test_gradient_of_L_is_exactly_zero_at_the_start_of_training(execution, mode, gauge):
    """K = L = I changes no state: rounding of 1e-9 would be a full step of Adam."""
    blocks, count, k, width = execution.pick(interpreter=(3, 5, 18, 21), other=(6, 13, 40, 70))
    inputs = problem(mode, blocks, count, k, torch.float32, width=width)
    with torch.no_grad():
        for operator in inputs[2:]:
            operator.copy_(torch.eye(k).expand_as(operator))
    inputs = execution.moved(*inputs)
    *_, d_lift, d_K, d_L = values_and_gradients(koopman_losses, inputs, "code", gauge)
    assert d_L.abs().max() == 0
    assert d_lift.abs().max() > 1e-3 and d_K.abs().max() > 1e-3


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
    cpu=PAIRS,
    emulated=[*PAIRS[:-1], sanitized(*PAIRS[-1])],
    gpu=PAIRS,
)
def test_bitwise_the_same_on_every_run_and_inputs_untouched(execution, mode, formulation):
    blocks, count, k, width = execution.pick(
        reference=(6, 5, 40, 42),
        cpu=(6, 5, 40, 42),
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
