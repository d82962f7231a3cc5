"""What the suite of koopman_losses shares: problems, their definition, its switches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pae_kernels.koopman import koopman_losses, reference, tiles

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


PAIRS = list(itertools.product(MODES, FORMULATIONS))
EVERY = list(itertools.product(MODES, FORMULATIONS, GAUGES))
