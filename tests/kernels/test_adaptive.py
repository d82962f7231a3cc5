"""`token_mix` and `prompt_bottleneck` against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from pae_kernels.adaptive import prompt_bottleneck, reference, token_mix
from tests.tiny import error

OPS = torch.ops.pae
ACTIVATIONS = sorted(reference.ACTIVATIONS)


def randn(*size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)


def mixed(x, weight, eps=1e-5):
    """The definition."""
    return weight @ F.layer_norm(x, x.shape[-1:], eps=eps)


def parts(batch=3, count=4, width=6, hidden=5, masks=True, dtype=torch.float64):
    """Arguments of `prompt_bottleneck`: what has a gradient, and the masks."""
    shapes = (
        (batch, count, width), (width,), (count, width), (count,), (hidden, width), (width, hidden)
    )  # fmt: skip
    tensors = [randn(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]
    if not masks:
        return tensors, {}
    channel = (randn(batch, width, seed=8) > -0.5).to(dtype) / 0.9
    unit = (randn(batch, count, hidden, seed=9) > -0.5).to(dtype) / 0.8
    return tensors, {"channel_mask": channel, "hidden_mask": unit}


def finished(u, gain, shift, bias, down, up, activation, channel_mask=None, hidden_mask=None):
    """The definition, one prompt at a time."""
    rows = []
    for b in range(len(u)):
        for p in range(u.shape[1]):
            g = u[b, p] * gain + shift[p]
            g = (g if channel_mask is None else g * channel_mask[b]) + bias[p]
            h = down @ g
            z = {
                "relu": lambda h: h.clamp_min(0),
                "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)),
                "sigmoid": lambda h: 1 / (1 + torch.exp(-h)),
                "softmax": lambda h: torch.exp(h) / torch.exp(h).sum(),
            }[activation](h)
            rows.append(g + up @ (z if hidden_mask is None else z * hidden_mask[b, p]))
    return torch.stack(rows).view_as(u)


def grads_of(function, tensors, d_out):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, d_out.to(out.dtype))


# ---- token_mix


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 2), (2, 9, 1), (0, 4, 3)], ids=str)
def test_mix_equals_the_definition(shape, eps):
    x, weight = randn(*shape), randn(3, shape[1], seed=1)
    d_u = randn(shape[0], 3, shape[2], seed=2)
    got, got_grads = grads_of(lambda x, w: token_mix(x, w, eps), (x, weight), d_u)
    expected, expected_grads = grads_of(lambda x, w: mixed(x, w, eps), (x, weight), d_u)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_mix_passes_gradcheck():
    x, weight = randn(2, 4, 5).requires_grad_(), randn(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(token_mix, (x, weight))


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3])
def test_mix_of_near_zero_rows_obeys_eps(scale):
    """At 0 the slope is exactly 1 / sqrt(eps): a floor of the variance would show."""
    x, weight = scale * randn(2, 4, 8, dtype=torch.float32), randn(3, 4, seed=1).float()
    d_u = randn(2, 3, 8, seed=2).float()
    got, got_grads = grads_of(token_mix, (x, weight), d_u)
    expected, expected_grads = grads_of(mixed, (x.double(), weight.double()), d_u)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6 * b.abs().max().item())
    if scale == 0:
        centred = d_u.double() - d_u.double().mean(-1, keepdim=True)
        slope = weight.double().t() @ centred / 1e-5**0.5
        torch.testing.assert_close(got_grads[0].double(), slope, rtol=1e-5, atol=1e-3)


def test_mix_of_rows_far_from_zero():
    """Rows that are a thousand times longer than they vary lose no digits but their own."""
    x = (randn(2, 6, 16) + 1e3).float()
    weight, d_u = randn(3, 6, seed=1).float(), randn(2, 3, 16, seed=2).float()
    got, (d_x, d_weight) = grads_of(token_mix, (x, weight), d_u)
    expected, expected_grads = grads_of(mixed, (x.double(), weight.double()), d_u)
    assert error(got, expected) < 1e-4  # the mean of a row is known to 1e-7 of 1e3
    assert error(d_x, expected_grads[0]) < 1e-4 and error(d_weight, expected_grads[1]) < 1e-4


def test_mix_leaves_out_rows_with_columns_of_zeros():
    x, weight = randn(2, 6, 4), F.pad(randn(3, 4, seed=1), (2, 0))
    d_u = randn(2, 3, 4, seed=2)
    got, (d_x, _) = grads_of(token_mix, (x, weight), d_u)
    assert error(got, mixed(x[:, 2:], weight[:, 2:])) < 1e-12
    assert not d_x[:, :2].any() and d_x[:, 2:].abs().min() > 0


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", ["both", "x"])
def test_mix_in_16_bits_is_as_good_as_plain_pytorch(narrow, kept):
    """Rule: at most twice the error of the definition in the same precision, against fp64."""
    x, d_u = randn(2, 50, 64, dtype=narrow), randn(2, 7, 64, seed=2, dtype=narrow)
    weight = randn(7, 50, seed=1, dtype=narrow)
    truth, true_grads = grads_of(mixed, (x.double(), weight.double()), d_u)
    plain, plain_grads = grads_of(mixed, (x, weight), d_u)
    given = weight if kept == "both" else weight.float()
    got, got_grads = grads_of(token_mix, (x, given), d_u)
    assert got.dtype == given.dtype and got_grads[0].dtype == narrow
    assert got_grads[1].dtype == given.dtype
    assert error(got, truth) <= 2 * error(plain, truth)
    for a, b, true in zip(got_grads, plain_grads, true_grads, strict=True):
        assert error(a, true) <= 2 * error(b, true)


def test_mix_needs_no_gradient_of_rows_below_the_first_prompts():
    x, weight = randn(2, 4, 5), randn(3, 4, seed=1).requires_grad_()
    token_mix(x, weight).sum().backward()
    assert weight.grad is not None
    d_x, d_weight = OPS.token_mix_bwd(
        randn(2, 3, 5), x, weight.detach(), *OPS.token_mix_fwd(x, weight.detach(), 1e-5)[1:], False
    )
    assert d_x.numel() == 0 and d_weight.shape == (3, 4)


def test_mix_saves_its_inputs_and_two_numbers_per_row():
    saved = []
    x, weight = randn(2, 4, 50).requires_grad_(), randn(3, 4, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        token_mix(x, weight)
    others = [t for t in saved if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert len(saved) == 4 and sum(t.numel() for t in others) == 2 * 2 * 4


# ---- prompt_bottleneck


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bottleneck_equals_the_definition(activation, masks):
    tensors, chosen = parts(masks=masks)
    d_out = randn(3, 4, 6, seed=7)
    got, got_grads = grads_of(
        lambda *t: prompt_bottleneck(*t, activation, **chosen), tensors, d_out
    )
    expected, expected_grads = grads_of(
        lambda *t: finished(*t, activation, **chosen), tensors, d_out
    )
    assert error(got, expected) < 1e-13
    for a, b in zip(got_grads, expected_grads, strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bottleneck_passes_gradcheck(activation):
    tensors, chosen = parts(2, 3, 4, 3)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: prompt_bottleneck(*t, activation, **chosen), leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bottleneck_of_no_units_is_the_affine_part(activation):
    (u, gain, shift, bias, _, _), _ = parts()
    down, up = randn(0, 6), randn(6, 0)
    expected = u * gain + shift + bias[:, None]
    assert error(prompt_bottleneck(u, gain, shift, bias, down, up, activation), expected) < 1e-15


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bottleneck_keeps_zeros_exactly(activation):
    (u, gain, shift, bias, down, up), chosen = parts(dtype=torch.float32)
    zeros = u * 0, gain, shift * 0, bias * 0, down, up
    assert not prompt_bottleneck(*zeros, activation, **chosen).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bottleneck_in_16_bits_is_as_good_as_plain_pytorch(activation, dtype):
    tensors, chosen = parts(4, 8, 32, 8, dtype=dtype)
    d_out = randn(4, 8, 32, seed=7, dtype=dtype)

    def plain(u, gain, shift, bias, down, up):
        g = (u * gain + shift) * chosen["channel_mask"].to(u)[:, None] + bias[:, None]
        z = reference.ACTIVATIONS[activation](F.linear(g, down))
        return g + F.linear(z * chosen["hidden_mask"].to(u), up)

    truth, true_grads = grads_of(plain, [t.double() for t in tensors], d_out)
    theirs, their_grads = grads_of(plain, tensors, d_out)
    got, got_grads = grads_of(
        lambda *t: prompt_bottleneck(*t, activation, **chosen), tensors, d_out
    )
    assert got.dtype == dtype and error(got, truth) <= 2 * error(theirs, truth)
    for a, b, true in zip(got_grads, their_grads, true_grads, strict=True):
        assert a.dtype == dtype and error(a, true) <= 2 * error(b, true) + 1e-4


# ---- both, as ops


def test_ops_pass_opcheck():
    x, weight = randn(2, 4, 5).requires_grad_(), randn(3, 4, seed=1).requires_grad_()
    torch.library.opcheck(OPS.token_mix_fwd, (x, weight, 1e-5))
    torch.library.opcheck(OPS.token_mix_fwd, (x.detach().bfloat16(), weight.float(), 1e-5))
    mean, rstd = OPS.token_mix_fwd(x, weight, 1e-5)[1:]
    args = (randn(2, 3, 5), x.detach(), weight.detach(), mean.detach(), rstd.detach())
    for need_x in (True, False):
        torch.library.opcheck(OPS.token_mix_bwd, (*args, need_x))
    for masks in (True, False):
        tensors, chosen = parts(masks=masks)
        chosen = chosen.get("channel_mask"), chosen.get("hidden_mask")
        args = (*(t.requires_grad_() for t in tensors), "gelu", *chosen)
        torch.library.opcheck(OPS.prompt_bottleneck_fwd, args)
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(OPS.prompt_bottleneck_bwd, (randn(3, 4, 6), *args))


def both(x, weight, gain, shift, bias, down, up, **masks):
    return prompt_bottleneck(token_mix(x, weight), gain, shift, bias, down, up, "relu", **masks)


def test_ops_are_one_graph_under_compile():
    (_, *tensors), masks = parts()
    tensors = [randn(3, 7, 6), randn(4, 7, seed=1), *tensors]
    d_out = randn(3, 4, 6, seed=7)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    got, got_grads = grads_of(lambda *t: compiled(*t, **masks), tensors, d_out)
    expected, expected_grads = grads_of(lambda *t: both(*t, **masks), tensors, d_out)
    for a, b in zip((got, *got_grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(a, b)


def test_ops_take_any_strides_and_write_every_entry(poisoned_memory):
    (_, gain, shift, bias, down, up), masks = parts()
    x, weight, d_out = randn(3, 7, 6), randn(4, 7, seed=1), randn(3, 4, 6, seed=7)
    dense = (x, weight, gain, shift, bias, down, up)
    strided = [t.t().contiguous().t() if t.dim() == 2 else t for t in dense]
    strided[0] = x.transpose(0, 2).contiguous().transpose(0, 2)
    strided[2] = gain.repeat_interleave(2)[::2]
    loose = d_out.transpose(1, 2).contiguous().transpose(1, 2)
    got = grads_of(lambda *t: both(*t, **masks), dense, d_out)
    leaves = [t.requires_grad_() for t in strided]
    out = both(*leaves, **masks)
    assert error(out, got[0]) < 1e-14
    for a, b in zip(torch.autograd.grad(out, leaves, loose), got[1], strict=True):
        assert error(a, b) < 1e-14


def test_ops_ignore_autocast():
    (_, *tensors), masks = parts(dtype=torch.float32)
    tensors = [randn(3, 7, 6).float(), randn(4, 7, seed=1).float(), *tensors]
    d_out = randn(3, 4, 6, seed=7).float()
    expected = grads_of(lambda *t: both(*t, **masks), tensors, d_out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = grads_of(lambda *t: both(*t, **masks), tensors, d_out)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], expected[1], strict=True))


def test_ops_are_differentiable_once():
    x = randn(2, 4, 5).requires_grad_()
    (grad,) = torch.autograd.grad(token_mix(x, randn(3, 4)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.zeros(2, 4)}, ValueError, r"x must be \(B, N, D\), got \(2, 4\) float32"),
        ({"x": torch.zeros(2, 4, 5, dtype=torch.int64)}, TypeError, "x must be a float tensor"),
        ({"x": [1.0]}, TypeError, "x must be a float tensor .* got list"),
        ({"x": torch.zeros(2, 4, 0)}, ValueError, "x must have D >= 1"),
        (
            {"weight": torch.zeros(3, 5)},
            ValueError,
            r"weight must be \(3, 4\) on cpu, got",
        ),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must be \(P, N\)"),
        ({"eps": 0.0}, ValueError, "eps must be a positive number, got 0.0"),
        ({"eps": float("nan")}, ValueError, "eps must be a positive number, got nan"),
        ({"eps": True}, ValueError, "eps must be a positive number, got True"),
    ],
)
def test_mix_refuses_bad_arguments(change, kind, message):
    arguments = {"x": torch.zeros(2, 4, 5), "weight": torch.zeros(3, 4), "eps": 1e-5}
    token_mix(**arguments)
    with pytest.raises(kind, match=message) as caught:
        token_mix(**{**arguments, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"u": torch.zeros(2, 4)}, ValueError, r"u must be \(B, P, D\)"),
        ({"gain": torch.zeros(5)}, ValueError, r"gain must be \(6,\) on cpu, got \(5,\) float32"),
        ({"shift": torch.zeros(6)}, ValueError, r"shift must be \(4, 6\), got \(6,\)"),
        ({"bias": None}, TypeError, r"bias must be a float tensor \(4,\), got NoneType"),
        ({"down": torch.zeros(6)}, ValueError, r"down must be \(r, D\)"),
        ({"down": torch.zeros(5, 7)}, ValueError, r"down must be \(5, 6\)"),
        ({"up": torch.zeros(5, 6)}, ValueError, r"up must be \(6, 5\)"),
        ({"activation": "tanh"}, ValueError, "activation must be one of .* got 'tanh'"),
        ({"channel_mask": torch.ones(3, 1, 6)}, ValueError, r"channel_mask must be \(3, 6\)"),
        ({"hidden_mask": torch.ones(3, 4, 5) > 0}, TypeError, "hidden_mask must be a float"),
        (
            {"channel_mask": torch.ones(3, 6, requires_grad=True)},
            ValueError,
            "channel_mask must not require a gradient",
        ),
    ],
)
def test_bottleneck_refuses_bad_arguments(change, kind, message):
    tensors, _ = parts(dtype=torch.float32)
    names = ("u", "gain", "shift", "bias", "down", "up")
    arguments = dict(zip(names, tensors, strict=True))
    prompt_bottleneck(**arguments)
    with pytest.raises(kind, match=message) as caught:
        prompt_bottleneck(**{**arguments, **change})
    assert "\n" not in str(caught.value)
