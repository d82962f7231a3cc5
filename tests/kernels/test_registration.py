"""What a declaration of an op may say; that its ops work is shown by the suites of the ops."""

import pytest
import torch

from pae_kernels import backends, prompt_bottleneck, registration, token_mix

FORWARD = "(Tensor x, float cap) -> (Tensor y, Tensor norm)"


def declared(backward, **options):
    registration.differentiable(
        "never", FORWARD, backward, ("forward", "backward"), lambda x, cap: (x, x), **options
    )


@pytest.mark.parametrize(
    ("backward", "strange"),
    [
        ("(Tensor d_y, Tensor x, Tensor z) -> (Tensor d_x)", "z"),
        ("(Tensor d_y, Tensor x) -> (Tensor d_weight)", "d_weight"),
        ("(Tensor d_y, Tensor x, bool need_y) -> (Tensor d_x)", "need_y"),
        ("(Tensor d_norm, Tensor x) -> (Tensor d_x)", "d_norm"),  # the first outputs have gradients
    ],
)
def test_names_that_nothing_explains_are_refused(backward, strange):
    with pytest.raises(
        ValueError, match=rf"never: nothing in the forward explains \['{strange}'\]"
    ):
        declared(backward)
    assert not hasattr(torch.ops.pae, "never_fwd")


def test_a_gradient_needs_a_shape():
    with pytest.raises(ValueError, match=r"never: fake_gradients is needed, .* lacks \['x'\]"):
        declared("(Tensor d_y, Tensor y) -> (Tensor d_x)")
    assert not hasattr(torch.ops.pae, "never_fwd")


def test_a_definition_needs_its_arguments():
    with pytest.raises(ValueError, match=r"never: the definition needs \['x'\]"):
        declared(
            "(Tensor d_y, Tensor y) -> (Tensor d_x)",
            fake_gradients=lambda d_y, y: y,
            definition=lambda x, cap: x,
        )
    assert not hasattr(torch.ops.pae, "never_fwd")


def test_without_a_definition_further_derivatives_are_refused():
    class Version:
        forward = staticmethod(lambda x: x.sin())
        backward = staticmethod(lambda d_y, x: d_y * x.cos())

    backends.register("once", backends.Version("reference", Version, backends.anywhere))
    once = registration.differentiable(
        "once",
        "(Tensor x) -> (Tensor y)",
        "(Tensor d_y, Tensor x) -> (Tensor d_x)",
        ("forward", "backward"),
        lambda x: x.new_empty(x.shape),
    )
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(once, (x,))
    for op in (once, torch.ops.pae.once_fwd):
        with pytest.raises(RuntimeError, match=r"pae::once has no second derivatives \(create_gr"):
            torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"pae::once cannot be followed by a torch\.func"):
        torch.func.grad(lambda x: once(x).sum())(x)


def test_autocast_does_not_reach_into_an_op():
    x, weight = torch.randn(2, 5, 8), torch.randn(3, 5)
    expected = token_mix(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_mix(x, weight), expected)


def test_a_graph_names_its_op():
    u = torch.randn(2, 3, 8, requires_grad=True)
    parts = (torch.randn(*shape) for shape in ((8,), (3, 8), (3,), (4, 8), (8, 4)))
    assert prompt_bottleneck(u, *parts).grad_fn.name() == "PromptBottleneckBackward"
