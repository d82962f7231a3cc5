"""LayerNorm without affine and activations: values, adjoints, 8-bit derivatives, registration."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from pae_kernels import backends, pointwise
from pae_kernels.pointwise import ACTIVATIONS, reference
from tests.tiny import error

OPS = torch.ops.pae
KINDS = sorted(ACTIVATIONS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "columns_first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "one_of_three": lambda t: torch.stack([t, t + 1, t + 2], dim=2)[:, :, 1],
    "every_second_entry": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "expanded": lambda t: t[:, :1].expand(t.shape),
}


def rows(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Norm(torch.autograd.Function):
    """The pair as an autograd function, with the residual's gradient joined in as in a block."""

    @staticmethod
    def forward(ctx, x, eps, with_residual):
        xhat, rstd = pointwise.layer_norm(x, eps)
        ctx.save_for_backward(xhat, rstd)
        ctx.with_residual = with_residual
        return xhat, x.clone()

    @staticmethod
    def backward(ctx, d_xhat, d_x):
        if ctx.with_residual:
            return pointwise.layer_norm_backward(d_xhat, *ctx.saved_tensors, d_x), None, None
        return pointwise.layer_norm_backward(d_xhat, *ctx.saved_tensors) + d_x, None, None


class Act(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, kind):
        ctx.save_for_backward(u)
        ctx.kind = kind
        return pointwise.activation(u, kind)[0]

    @staticmethod
    def backward(ctx, d):
        return pointwise.activation_backward(d, *ctx.saved_tensors, ctx.kind), None


# ---- layer norm


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(0, 4),
    count=st.integers(1, 5),
    width=st.integers(1, 40),
    eps=st.sampled_from([1e-12, 1e-6, 1e-5, 0.1]),
    size=st.sampled_from([1e-4, 1.0, 300.0]),
    shift=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_layer_norm_equals_the_formula(batch, count, width, eps, size, shift, seed):
    x = size * rows(batch, count, width, seed=seed) + shift
    xhat, rstd = pointwise.layer_norm(x, eps)
    mean = x.mean(-1, keepdim=True)
    expected = ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    torch.testing.assert_close(rstd, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(xhat, (x - mean) * expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_layer_norm_gradcheck(with_residual, eps):
    x = rows(2, 3, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Norm.apply(x, eps, with_residual), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_layer_norm_dtypes(dtype, out):
    """Statistics in fp32 or wider, one rounding of the rows at the end."""
    x = rows(3, 4, 64, dtype=dtype)
    xhat, rstd = pointwise.layer_norm(x, 1e-6, out)
    assert xhat.dtype == out
    assert rstd.dtype == torch.promote_types(dtype, torch.float32)
    exact, exact_rstd = pointwise.layer_norm(x.double(), 1e-6)
    assert error(rstd, exact_rstd) < 1e-6
    rounding = {torch.float64: 0, torch.float32: 1e-7, torch.bfloat16: 3e-3, torch.float16: 4e-4}
    assert error(xhat, exact) < rounding[out] + (1e-15 if dtype == torch.float64 else 1e-6)
    d = pointwise.layer_norm_backward(rows(3, 4, 64, dtype=out, seed=1), xhat, rstd)
    assert d.dtype == rstd.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("narrow", DTYPES[:3], ids=str)
def test_add_layer_norm_is_the_norm_of_the_rounded_sum(dtype, narrow):
    x, delta = rows(3, 4, 64, dtype=dtype), rows(3, 4, 64, dtype=narrow, seed=1)
    y, xhat, rstd = pointwise.add_layer_norm(x, delta, 1e-6, narrow)
    assert torch.equal(y, (x.double() + delta.double()).to(dtype)) or dtype == torch.float64
    assert y.dtype == dtype and error(y, x.double() + delta.double()) < 4e-3
    for got, expected in zip((xhat, rstd), pointwise.layer_norm(y, 1e-6, narrow)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("narrow", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_layer_norm_backward_gives_the_same_gradient_twice(narrow):
    xhat, rstd = pointwise.layer_norm(rows(3, 4, 64, dtype=torch.float32), 1e-6)
    d, r = (rows(3, 4, 64, dtype=torch.float32, seed=s) for s in (1, 2))
    alone = pointwise.layer_norm_backward(d, xhat, rstd, r)
    dx, copy = pointwise.layer_norm_backward(d, xhat, rstd, r, narrow=narrow)
    assert torch.equal(dx, alone) and torch.equal(copy, alone.to(narrow))
    assert copy.dtype == narrow and copy.data_ptr() != dx.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_backward_rounds_once(dtype):
    """The result in any dtype is the fp32 one rounded; 16-bit inputs are widened first."""
    x, d, r = (rows(3, 4, 64, dtype=torch.bfloat16, seed=s) for s in range(3))
    xhat, rstd = pointwise.layer_norm(x, 1e-6)
    wide = pointwise.layer_norm_backward(d.float(), xhat.float(), rstd, r.float())
    got = pointwise.layer_norm_backward(d, xhat, rstd, r, dtype=dtype)
    assert got.dtype == dtype
    assert torch.equal(got, wide.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_layer_norm_layouts(layout):
    x, delta = (LAYOUTS[layout](rows(3, 5, 8, seed=s)) for s in range(2))
    got = pointwise.add_layer_norm(x, delta, 1e-6)
    dense = pointwise.add_layer_norm(x.contiguous(), delta.contiguous(), 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))
    assert torch.equal(x, LAYOUTS[layout](rows(3, 5, 8)))  # not added to in place


def test_layer_norm_of_tiny_rows_obeys_eps():
    """Near-zero prompt rows: eps decides, so no floor on the variance and none in 16 bits."""
    x = rows(2, 3, 64) * 1e-5
    for dtype in DTYPES[:3]:
        xhat, _ = pointwise.layer_norm(x.to(dtype), 1e-6)
        expected, _ = pointwise.layer_norm(x.to(dtype).double(), 1e-6)
        assert error(xhat, expected) < (1e-6 if dtype.itemsize > 2 else 4e-3)
        assert 0 < xhat.abs().max() < 0.1
    zero, rstd = pointwise.layer_norm(torch.zeros(1, 1, 8), 1e-6)
    assert torch.equal(zero, torch.zeros_like(zero))
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e3))


def test_layer_norm_ignores_shift_and_scale():
    x = rows(2, 5, 16)
    xhat, _ = pointwise.layer_norm(x, 0.0)
    moved, _ = pointwise.layer_norm(3.5 * x + 2.0, 0.0)
    assert error(moved, xhat) < 1e-13
    d = pointwise.layer_norm_backward(x.flip(1), *pointwise.layer_norm(x, 0.0))
    assert d.sum(-1).abs().max() < 1e-13  # no gradient along a shift
    assert (d * x).sum(-1).abs().max() < 1e-12  # nor along a scaling


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_norm_layouts(layout):
    x, d, r = (LAYOUTS[layout](rows(3, 5, 8, seed=s)) for s in range(3))
    xhat, rstd = pointwise.layer_norm(x, 1e-6)
    expected, expected_rstd = pointwise.layer_norm(x.contiguous(), 1e-6)
    assert torch.equal(xhat, expected) and torch.equal(rstd, expected_rstd)
    got = pointwise.layer_norm_backward(d, LAYOUTS[layout](xhat), rstd, r)
    # an expanded layout repeats the first row, of the normalised rows as well
    plain = LAYOUTS[layout](xhat).contiguous()
    wanted = pointwise.layer_norm_backward(d.contiguous(), plain, rstd, r.contiguous())
    assert error(got, wanted) < 1e-14


# ---- activations


@pytest.mark.parametrize("kind", KINDS)
def test_activation_gradcheck(kind):
    u = rows(3, 4, 5, seed=2).requires_grad_()  # seed 2 has no entry near relu's kink
    assert u.abs().min() > 1e-3
    assert torch.autograd.gradcheck(lambda u: Act.apply(u, kind), u)


def test_activations_are_those_of_vision_transformers():
    u = torch.linspace(-8, 8, 301, dtype=torch.float64)
    expected = {
        "gelu": 0.5 * u * (1 + torch.erf(u / 2**0.5)),
        "gelu_tanh": 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3))),
        "quick_gelu": u / (1 + torch.exp(-1.702 * u)),
        "silu": u / (1 + torch.exp(-u)),
        "relu": u.clamp_min(0),
    }
    assert sorted(expected) == KINDS
    for kind, y in expected.items():
        got, code = pointwise.activation(u, kind)
        torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12)
        assert code is None


@pytest.mark.parametrize("kind", KINDS)
def test_8_bit_derivative(kind):
    """Off by at most 1/400, exact at 0 and 1, for any input; values are those without coding."""
    u = torch.cat([torch.linspace(-9, 9, 4001), torch.tensor([-1e4, -50.0, 50.0, 1e4])]).double()
    u = u[u != 0]
    y, code = pointwise.activation(u, kind, code=True)
    assert code.dtype == torch.uint8
    assert torch.equal(y, pointwise.activation(u, kind)[0])
    one = torch.ones_like(u)
    exact = pointwise.activation_backward(one, u, kind)
    got = pointwise.activation_backward(one, code, kind)
    assert (got - exact).abs().max() <= 1 / 400 + 1e-12
    assert exact.min() > -27 / 200 and exact.max() < (255 - 27) / 200  # nothing is clamped
    far = u.abs() > 40
    assert torch.equal(got[far], (u[far] > 0).double())
    if kind == "relu":
        assert torch.equal(got, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_activation_dtypes(kind, dtype):
    u, d = rows(3, 50, dtype=dtype), rows(3, 50, dtype=dtype, seed=1)
    y, code = pointwise.activation(u, kind, code=True)
    exact = pointwise.activation(u.double(), kind)[0]
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 5e-3}.get(dtype, 1e-3)
    assert y.dtype == dtype
    assert error(y, exact) < tolerance
    expected = pointwise.activation_backward(d.double(), u.double(), kind)
    got = pointwise.activation_backward(d, u, kind)
    assert got.dtype == dtype
    assert error(got, expected) < 2 * tolerance
    coded = pointwise.activation_backward(d, code, kind)
    assert coded.dtype == dtype
    assert error(coded, expected) < 2 * tolerance + 4e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_activation_layouts(kind, layout):
    u, d = (LAYOUTS[layout](rows(3, 5, 8, seed=s)) for s in range(2))
    y, code = pointwise.activation(u, kind, code=True)
    dense, dense_code = pointwise.activation(u.contiguous(), kind, code=True)
    assert torch.equal(y, dense) and torch.equal(code, dense_code)
    for kept in (u, code):
        got = pointwise.activation_backward(d, kept, kind)
        wanted = pointwise.activation_backward(d.contiguous(), kept.contiguous(), kind)
        assert torch.equal(got, wanted)


def test_inputs_are_not_changed():
    u, d = rows(3, 8), rows(3, 8, seed=1)
    before = u.clone(), d.clone()
    for kind in KINDS:
        _, code = pointwise.activation(u, kind, code=True)
        kept = code.clone()
        pointwise.activation_backward(d, u, kind)
        pointwise.activation_backward(d, code, kind)
        assert torch.equal(code, kept)
    xhat, rstd = pointwise.layer_norm(u, 1e-6)
    saved = xhat.clone(), rstd.clone()
    pointwise.layer_norm_backward(d, xhat, rstd, u)
    assert torch.equal(xhat, saved[0]) and torch.equal(rstd, saved[1])
    assert torch.equal(u, before[0]) and torch.equal(d, before[1])


def test_unknown_activation():
    for call in (
        lambda: pointwise.activation(rows(2), "tanh"),
        lambda: pointwise.activation_backward(rows(2), rows(2), "tanh"),
    ):
        with pytest.raises(ValueError, match=r"kind must be one of \['gelu'.*got 'tanh'"):
            call()


# ---- registration


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, dtype):
    """Schema and fake tensors; the ops record no gradient, so there is no autograd to check."""
    quick = ("test_schema", "test_faketensor")
    x, d = (LAYOUTS[layout](rows(3, 5, 8, dtype=dtype, seed=s)) for s in range(2))
    for out in (dtype, torch.bfloat16):
        opcheck(OPS.layer_norm_fwd.default, (x, 1e-6, out), test_utils=quick)
        opcheck(OPS.add_layer_norm_fwd.default, (x, d.to(out), 1e-6, out), test_utils=quick)
    xhat, rstd = OPS.layer_norm_fwd(x, 1e-6, dtype)
    for residual in (None, d, d.float()):
        for narrow in (None, dtype, torch.bfloat16):
            args = (d, xhat, rstd, residual, rstd.dtype, narrow)
            opcheck(OPS.layer_norm_bwd.default, args, test_utils=quick)
    for kind in KINDS:
        opcheck(OPS.activation_fwd.default, (x, kind), test_utils=quick)
        opcheck(OPS.activation_coded_fwd.default, (x, kind), test_utils=quick)
        code = OPS.activation_coded_fwd(x, kind)[1]
        for kept in (x, code):
            opcheck(OPS.activation_bwd.default, (d, kept, kind), test_utils=quick)


def test_the_reference_runs_on_the_cpu(monkeypatch):
    calls = []
    layer_norm = reference.layer_norm
    monkeypatch.setattr(reference, "layer_norm", lambda *a: calls.append(1) or layer_norm(*a))
    pointwise.layer_norm(rows(2, 8), 1e-6)
    assert calls == [1]
    assert backends.choose("pointwise", "cpu") is reference


def test_layer_norm_equals_pytorch():
    x = rows(2, 5, 32, dtype=torch.float32)
    torch.testing.assert_close(pointwise.layer_norm(x, 1e-5)[0], F.layer_norm(x, (32,), eps=1e-5))
