"""koopman_losses in every execution: values and gradients against the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from pae_kernels.koopman import koopman_losses, tiles
from tests.kernels.executions import FP32, FP64, each, sanitized
from tests.kernels.koopman.cases import (
    BOTH,
    EACH_GAUGE,
    EACH_MODE,
    EVERY,
    FORMULATIONS,
    GAUGES,
    MODES,
    OP,
    PAIRS,
    check,
    close,
    definition,
    problem,
    use_tile,
    values_and_gradients,
)
from tests.properties import examples

SWITCHES = list(itertools.product((None, 3), MODES, FORMULATIONS, GAUGES))


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
    cpu=[(FP32, None, *rest) for rest in SWITCHES],
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
        cpu=(5, 7, 16, 18),
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


@each(OP, "size", gpu=[*REAL, (3, 7, 33, 17)], emulated=OTHER, reference=OTHER, cpu=OTHER)
def test_other_sizes(execution, size):
    blocks, prompts, width, k = size
    for mode in execution.pick(gpu=("global",), other=MODES):
        check(execution, problem(mode, blocks, prompts, k, FP32, width=width))


@each(
    OP,
    "mode, formulation",
    reference=PAIRS,
    interpreter=[(mode, "code") for mode in MODES],
    cpu=[sanitized(*pair) for pair in PAIRS],
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
    cpu=[EVERY[0], sanitized(*EVERY[-1])],
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
