"""Derivatives beyond the first, and other ways to them: every differentiable op has those of its
definition, whatever computed the gradient itself.
"""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from pae_kernels.adaptive import prompt_bottleneck, token_mix
from pae_kernels.attention import prompt_attention
from pae_kernels.koopman import koopman_losses
from tests.errors import error


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(*sizes: tuple[int, ...]) -> list[Tensor]:
    return [randn(*size, seed=i) for i, size in enumerate(sizes)]


ATTENTION = tensors((2, 4, 3, 2, 3), (2, 2, 2, 2, 3))
KOOPMAN = tensors((3, 2, 5), (4, 5), (4, 4), (4, 4))
STACKED = tensors((2, 3, 2, 5), (2, 4, 5), (2, 3, 4, 4), (2, 3, 4, 4))
BOTTLENECK = tensors((2, 3, 4), (4,), (3, 4), (3,), (2, 4), (4, 2))
GROUP = torch.tensor([1, 1])
MASKS = {"channel_mask": randn(2, 4, seed=8), "hidden_mask": randn(2, 3, 2, seed=9)}

# what is differentiated once and again: visible outputs as a tuple, tensors
CASES = {
    "attention": (lambda *t: prompt_attention(*t)[:1], ATTENTION),
    "attention, class row": (lambda *t: prompt_attention(*t, queries="class")[:1], ATTENTION),
    "attention, groups": (lambda *t: prompt_attention(*t, GROUP)[:1], ATTENTION),
    "attention, causal": (lambda *t: prompt_attention(*t, causal=True)[:1], ATTENTION),
    "koopman": (koopman_losses, KOOPMAN),
    "koopman, paper": (partial(koopman_losses, formulation="paper"), KOOPMAN),
    "koopman, stacked, LayerNorm": (partial(koopman_losses, gauge="layernorm"), STACKED),
    "koopman, no pair": (koopman_losses, [KOOPMAN[0][:1], *KOOPMAN[1:]]),
    "token mix": (lambda *t: (token_mix(*t),), tensors((2, 4, 5), (3, 4))),
    "bottleneck": (lambda *t: (prompt_bottleneck(*t, "gelu", **MASKS),), BOTTLENECK),
}
OPS = [case for case in CASES if "no pair" not in case]


def leaves(case):
    function, given = CASES[case]
    return function, [t.clone().requires_grad_() for t in given]


def scalar(outputs):
    return sum(torch.linspace(1, 2, o.numel(), dtype=o.dtype) @ o.flatten().sin() for o in outputs)


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives(case):
    """Against finite differences of the gradient that the versions compute."""
    function, given = leaves(case)
    loss = lambda *t: scalar(function(*t))
    assert torch.autograd.gradgradcheck(loss, given, atol=1e-4, fast_mode=True)


def test_second_derivatives_of_the_registered_op():
    """As torch.compile and torch.export call it."""
    given = [t.clone().requires_grad_() for t in ATTENTION]
    loss = lambda *t: scalar(
        torch.ops.pae.prompt_attention_fwd(*t, None, 0.5, False, None, None, None)[:1]
    )
    assert torch.autograd.gradgradcheck(loss, given, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_asking_for_a_graph_changes_no_gradient(case):
    function, given = leaves(case)
    plain = torch.autograd.grad(scalar(function(*given)), given, allow_unused=True)
    graph = torch.autograd.grad(
        scalar(function(*given)), given, create_graph=True, allow_unused=True
    )
    for a, b in zip(plain, graph, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-14 * (1 + b.norm())


@pytest.mark.parametrize("case", OPS)
def test_a_way_that_leads_to_one_input(case):
    """The second derivative by one input alone, with the others held."""
    function, given = leaves(case)
    (first,) = torch.autograd.grad(scalar(function(*given)), given[:1], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), given[:1])
    step, direction = 1e-6, randn(*given[0].shape, seed=20)
    values = []
    for sign in (1, -1):
        moved = [(given[0] + sign * step * direction).detach().requires_grad_(), *given[1:]]
        (d,) = torch.autograd.grad(scalar(function(*moved)), moved[:1])
        values.append(d.square().sum())
    slope = (values[0] - values[1]) / (2 * step)
    assert abs((second * direction).sum() / slope - 1) < 1e-5


@pytest.mark.parametrize("case", ["koopman", "koopman, paper"])
def test_one_tensor_for_two_inputs(case):
    """A gradient that two ways lead to is not counted twice by either."""
    function, given = leaves(case)
    lift, both = given[1], given[3]

    def loss(both):
        return scalar(function(given[0], lift, both, both))

    assert torch.autograd.gradgradcheck(loss, (both,), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("case", OPS)
def test_transforms(case):
    """torch.func and dual numbers, against autograd."""
    function, given = leaves(case)
    given = [t.detach() for t in given]
    loss = lambda first: scalar(function(first, *given[1:]))
    first = given[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(first), first)
    assert error(grad(loss)(given[0]), expected) < 1e-12
    assert error(jacrev(loss)(given[0]), expected) < 1e-12
    assert error(jacfwd(loss)(given[0]), expected) < 1e-12
    two = vmap(grad(loss))(torch.stack([given[0], 2 * given[0]]))
    assert error(two[0], expected) < 1e-12 and error(two[1], grad(loss)(2 * given[0])) < 1e-12
    direction = randn(*given[0].shape, seed=20)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(given[0], direction))
        tangent = forward_ad.unpack_dual(dual).tangent
    assert abs(tangent / (expected * direction).sum() - 1) < 1e-10
    along = lambda s: loss(given[0] + s * direction)
    zero = torch.zeros((), dtype=torch.float64)
    assert error(hessian(along)(zero), grad(grad(along))(zero)) < 1e-8
