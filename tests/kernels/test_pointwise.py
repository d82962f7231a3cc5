"""LayerNorm without affine and activations in every execution: values, adjoints, 8-bit slopes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from pae_kernels import backends, cpu, pointwise
from pae_kernels.pointwise import ACTIVATIONS, reference
from tests.errors import error
from tests.kernels.executions import BF16, FP16, FP32, FP64, KERNELS, each
from tests.properties import examples

OP = "pointwise"
OPS = torch.ops.pae
KINDS = sorted(ACTIVATIONS)
DTYPES = [FP64, FP32, BF16, FP16]
ROUNDING = {FP64: 1e-14, FP32: 1e-6, BF16: 4e-3, FP16: 5e-4}  # of a result, at the end

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


@examples(50)
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


# dtypes of the residual stream and of what a product returns
STREAMS = [(FP32, FP32), (FP32, FP16), (FP16, FP16)]
CPU_STREAMS = [(FP32, FP32), (FP32, BF16), (BF16, BF16), (BF16, FP32)]


@each(
    OP,
    "width, stream, narrow",
    reference=itertools.product([64], DTYPES, DTYPES[1:]),
    interpreter=[(width, *pair) for width in (16, 33, 72, 768) for pair in STREAMS],
    cpu=[(width, *pair) for width in (1, 15, 16, 33, 72, 768) for pair in CPU_STREAMS],
    gpu=itertools.product([384, 768, 1024, 1280], [FP32], [BF16, FP16, FP32]),
)
def test_norms(execution, width, stream, narrow):
    """One rounding of each result; statistics and the gradient in fp32 or wider."""
    shape = (*execution.pick(gpu=(4, 197), interpreter=(2, 5), other=(3, 4)), width)
    x, delta, d, residual = execution.moved(
        *(
            rows(*shape, dtype=dtype, seed=seed)
            for seed, dtype in enumerate((stream, narrow, narrow, stream))
        )
    )
    y, xhat, rstd = pointwise.add_layer_norm(x, delta, 1e-6, narrow)
    computed = torch.promote_types(stream, FP32)
    assert y.dtype == stream and xhat.dtype == narrow and rstd.dtype == computed
    assert torch.equal(y, (x.to(computed) + delta.to(computed)).to(stream))
    for got, expected in zip(pointwise.layer_norm(y, 1e-6, narrow), (xhat, rstd), strict=True):
        assert torch.equal(got, expected)
    wide = y.double()
    assert error(xhat, F.layer_norm(wide, (width,), eps=1e-6)) < ROUNDING[narrow]
    assert error(rstd[..., 0], (wide.var(-1, correction=0) + 1e-6).rsqrt()) < ROUNDING[computed]

    g, h = d.double(), xhat.double()
    inner = g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True)
    for around in (None, residual):
        exact = rstd.double() * inner + (0 if around is None else around.double())
        third = narrow, half(execution)
        for dtype, copied in ((stream, None), (stream, narrow), third):
            got = pointwise.layer_norm_backward(d, xhat, rstd, around, dtype=dtype, narrow=copied)
            dx, copy = got if copied else (got, None)
            assert dx.dtype == dtype and error(dx, exact) < ROUNDING[dtype]
            if copied:
                assert copy.dtype == copied and error(copy, exact) < ROUNDING[copied]


@each(OP, on=("reference", "interpreter", "cpu"))
def test_norms_of_any_shape(execution):
    """Against the formula in fp64. A row's mean is off by a few steps of fp32 at its size."""
    pairs = execution.pick(cpu=CPU_STREAMS, other=STREAMS)

    @examples(20)
    @given(
        count=st.integers(0, 9),
        width=st.integers(1, 300),
        streams=st.sampled_from(pairs),
        eps=st.sampled_from([1e-6, 1e-5, 0.1]),
        shift=st.sampled_from([0.0, 5.0]),
    )
    def any_shape(count, width, streams, eps, shift):
        stream, product = streams
        x = rows(count, width, dtype=stream) + shift
        delta, d = (rows(count, width, dtype=product, seed=seed) for seed in (1, 2))
        residual = rows(count, width, dtype=FP32, seed=3)
        y, xhat, rstd = pointwise.add_layer_norm(x, delta, eps, product)
        assert torch.equal(y, (x.float() + delta.float()).to(stream))
        wide = y.double()
        expected = F.layer_norm(wide, (width,), eps=eps)
        dx = pointwise.layer_norm_backward(d, xhat, rstd, residual, dtype=FP32)
        h, g = xhat.double(), d.double()
        inner = g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True)
        exact = residual.double() + rstd.double() * inner
        if count:
            limit = {FP32: 2e-6, FP16: 2e-3, BF16: 1.6e-2}[product]
            steps = 1e-6 * (1 + shift) / eps**0.5  # where all entries of a row are equal
            loose = {"rtol": 0, "atol": limit + (steps if width == 1 else 4e-6 * (1 + shift))}
            torch.testing.assert_close(xhat.double(), expected, **loose)
            assert error(dx, exact) < 2e-6

    any_shape()


@each(
    OP,
    "dtype",
    reference=[FP64, FP32, BF16],
    interpreter=[FP32, FP16],
    cpu=[FP32, BF16],
    gpu=[BF16, FP16, FP32],
)
def test_layer_norm_of_tiny_rows_obeys_eps(execution, dtype):
    """Near-zero prompt rows: eps decides, so no floor on the variance and none in 16 bits."""
    (x,) = execution.moved(rows(2, 3, 64) * 1e-5)
    x = x.to(dtype)
    xhat, rstd = pointwise.layer_norm(x, 1e-6)
    expected, expected_rstd = reference.layer_norm(x.double(), 1e-6, FP64)
    assert error(xhat, expected) < (1e-6 if dtype.itemsize > 2 else 4e-3)
    assert error(rstd, expected_rstd) < 1e-6
    assert 0 < xhat.abs().max() < 0.1
    zero, rstd = pointwise.layer_norm(torch.zeros(1, 1, 8, device=x.device, dtype=dtype), 1e-6)
    assert torch.equal(zero, torch.zeros_like(zero))
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e3))


def half(execution):
    """A 16-bit dtype that it computes."""
    return execution.pick(cpu=BF16, other=FP16)


def twice(function, *tensors, layout):
    """Results on tensors as they lie, and on dense ones: the same bits."""
    arranged = [LAYOUTS[layout](t) for t in tensors]
    first, second = function(*arranged), function(*(t.contiguous() for t in arranged))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    return arranged, first


@each(OP, "layout", other=LAYOUTS)
def test_layouts(execution, layout):
    dtype = execution.pick(reference=FP64, other=FP32)
    x, delta, d, r = execution.moved(*(rows(3, 5, 8, dtype=dtype, seed=s) for s in range(4)))
    (given, _), (_, xhat, rstd) = twice(
        lambda x, delta: pointwise.add_layer_norm(x, delta, 1e-6), x, delta, layout=layout
    )
    assert torch.equal(given, LAYOUTS[layout](x))  # not added to in place
    twice(lambda x: pointwise.layer_norm(x, 1e-6), x, layout=layout)
    back = lambda d, xhat, r: pointwise.layer_norm_backward(
        d, xhat, rstd, r, narrow=half(execution)
    )
    twice(back, d, xhat, r, layout=layout)
    for kind in execution.pick(interpreter=["gelu"], other=KINDS):
        (u,), (_, code) = twice(
            lambda u, kind=kind: pointwise.activation(u, kind, code=True), x, layout=layout
        )
        for kept in (u, code):
            slope = lambda d, u, kind=kind: [pointwise.activation_backward(d, u, kind)]
            twice(slope, d, kept, layout=layout)


@each(OP, "shape", other=[(0, 5, 16), (3, 0, 16)])
def test_no_rows(execution, shape):
    x = torch.empty(shape, device=execution.device)
    _, xhat, rstd = pointwise.add_layer_norm(x, x, 1e-6, half(execution))
    assert xhat.shape == shape and rstd.shape == (*shape[:2], 1)
    dx, narrow = pointwise.layer_norm_backward(x, xhat, rstd, x, dtype=FP32, narrow=half(execution))
    assert dx.shape == narrow.shape == shape
    y, code = pointwise.activation(x, "gelu", code=True)
    assert y.shape == code.shape == pointwise.activation_backward(x, code, "gelu").shape == shape


@each(OP)
def test_bitwise_the_same_on_every_run(execution):
    shape = execution.pick(gpu=(32, 197, 768), other=(7, 96))
    x, d = execution.moved(rows(*shape, dtype=FP32), rows(*shape, dtype=FP32, seed=1))
    first = None
    for _ in execution.runs():
        y, xhat, rstd = pointwise.add_layer_norm(x, d, 1e-6, half(execution))
        dx = pointwise.layer_norm_backward(d, xhat, rstd, x, dtype=FP32, narrow=half(execution))
        u, code = pointwise.activation(x, "gelu", code=True)
        slope = pointwise.activation_backward(d, code, "gelu")
        results = y, xhat, rstd, *dx, u, code, slope
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


@each(OP, on=KERNELS)
def test_the_kernels_run(execution, monkeypatch):
    """The public ops reach them, and the reference is not asked."""
    for name in ("layer_norm", "add_layer_norm", "layer_norm_backward", "activation"):
        monkeypatch.setattr(reference, name, None)
    (x,) = execution.moved(rows(2, 8, dtype=FP32))
    _, xhat, rstd = pointwise.add_layer_norm(x, x, 1e-6)
    assert torch.isfinite(pointwise.layer_norm_backward(x, xhat, rstd)).all()
    assert torch.isfinite(pointwise.activation(x, "gelu")[0]).all()
    monkeypatch.delenv("PAE_BACKEND")  # preferred also when nobody asks for it
    for dtype in execution.dtypes:
        assert backends.choose(OP, execution.device, dtype).__name__.endswith(execution.version)


@each(OP, "narrow", reference=[BF16, FP16, FP32], cpu=[BF16, FP32])
def test_layer_norm_backward_gives_the_same_gradient_twice(execution, narrow):
    xhat, rstd = pointwise.layer_norm(rows(3, 4, 64, dtype=torch.float32), 1e-6)
    d, r = (rows(3, 4, 64, dtype=torch.float32, seed=s) for s in (1, 2))
    alone = pointwise.layer_norm_backward(d, xhat, rstd, r)
    dx, copy = pointwise.layer_norm_backward(d, xhat, rstd, r, narrow=narrow)
    assert torch.equal(dx, alone) and torch.equal(copy, alone.to(narrow))
    assert copy.dtype == narrow and copy.data_ptr() != dx.data_ptr()


@each(OP, "dtype", reference=DTYPES, cpu=[FP32, BF16])
def test_layer_norm_backward_rounds_once(execution, dtype):
    """The result in any dtype is the fp32 one rounded; 16-bit inputs are widened first."""
    x, d, r = (rows(3, 4, 64, dtype=torch.bfloat16, seed=s) for s in range(3))
    xhat, rstd = pointwise.layer_norm(x, 1e-6)
    wide = pointwise.layer_norm_backward(d.float(), xhat.float(), rstd, r.float())
    got = pointwise.layer_norm_backward(d, xhat, rstd, r, dtype=dtype)
    assert got.dtype == dtype
    assert torch.equal(got, wide.to(dtype))


def test_layer_norm_ignores_shift_and_scale():
    x = rows(2, 5, 16)
    xhat, _ = pointwise.layer_norm(x, 0.0)
    moved, _ = pointwise.layer_norm(3.5 * x + 2.0, 0.0)
    assert error(moved, xhat) < 1e-13
    d = pointwise.layer_norm_backward(x.flip(1), *pointwise.layer_norm(x, 0.0))
    assert d.sum(-1).abs().max() < 1e-13  # no gradient along a shift
    assert (d * x).sum(-1).abs().max() < 1e-12  # nor along a scaling


# ---- RMSNorm, gates, rotations


@each(
    OP,
    "width, stream, narrow",
    reference=[(33, FP64, FP64), (33, FP32, BF16)],
    interpreter=[(33, FP32, FP16)],
    cpu=[(33, FP32, BF16), (72, BF16, BF16), (16, FP32, FP32)],
    gpu=[(1024, FP32, BF16)],
)
def test_rms_norm(execution, width, stream, narrow):
    """Values against the formula, gradients against autograd, in fp64."""
    shape = (2, 5, width)
    x, delta, d, around = execution.moved(
        *(
            rows(*shape, dtype=dtype, seed=seed) + 0.5
            for seed, dtype in enumerate((stream, narrow, narrow, stream))
        )
    )
    y, xhat, rstd = pointwise.add_layer_norm(x, delta, 0.1, narrow, rms=True)
    for got, expected in zip(pointwise.layer_norm(y, 0.1, narrow, rms=True), (xhat, rstd)):
        assert torch.equal(got, expected)
    wide = y.double().requires_grad_()
    exact = F.rms_norm(wide, (width,), eps=0.1)
    assert error(xhat, exact) < ROUNDING[narrow]
    dx, copy = pointwise.layer_norm_backward(
        d, xhat, rstd, around, dtype=stream, narrow=narrow, rms=True
    )
    (gradient,) = torch.autograd.grad(exact, wide, d.double())
    assert error(dx, gradient + around.double()) < 3 * max(ROUNDING[stream], ROUNDING[narrow])
    assert torch.equal(copy, dx.to(narrow)) or stream != FP32


@each(
    OP,
    "width, dtype",
    reference=itertools.product([3, 40], [FP64, FP32, BF16]),
    interpreter=[(40, FP16), (1030, FP32)],
    cpu=itertools.product([1, 16, 41], [FP32, BF16]),
    gpu=itertools.product([2048, 2730], [BF16, FP32]),
)
def test_gates(execution, width, dtype):
    """A product of act(gate) and up, and its gradient, rounded at the end."""
    for kind in execution.pick(interpreter=["silu"], other=KINDS):
        u, d = execution.moved(
            2 * rows(3, 2, 2 * width, dtype=dtype), rows(3, 2, width, dtype=dtype, seed=1)
        )
        wide = u.double().requires_grad_()
        gate, up = wide.chunk(2, -1)
        exact = ACTIVATIONS[kind](gate) * up
        (slope,) = torch.autograd.grad(exact, wide, d.double())
        y, du = pointwise.gated(u, kind), pointwise.gated_backward(d, u, kind)
        assert y.dtype == du.dtype == dtype
        room = 2e-5 if kind == "gelu" and execution.kind == "cpu" else 0
        assert error(y, exact) < 3 * ROUNDING[dtype] + room
        assert error(du, slope) < 3 * ROUNDING[dtype] + room
    empty = torch.empty(0, 2 * width, dtype=dtype, device=execution.device)
    assert pointwise.gated(empty, "silu").shape == (0, width)


@each(
    OP,
    "width, dtype",
    reference=itertools.product([3, 40], [FP64, FP32, BF16]),
    interpreter=[(40, FP16), (1030, FP32)],
    cpu=itertools.product([1, 16, 41, 200], [FP32, BF16]),
    gpu=itertools.product([2048, 2730], [BF16, FP32]),
)
@pytest.mark.parametrize("rms", [False, True])
def test_gates_with_norms(execution, width, dtype, rms):
    """Normalised rows of the gated rows that were rounded once, and the gradient of both."""
    eps = 0.1
    for kind in execution.pick(interpreter=["silu"], other=KINDS):
        u, d = execution.moved(
            2 * rows(3, 2, 2 * width, dtype=dtype) + 0.5, rows(3, 2, width, dtype=dtype, seed=1)
        )
        wide = u.double().requires_grad_()
        gate, up = wide.chunk(2, -1)
        inner = ACTIVATIONS[kind](gate) * up
        norm = F.rms_norm if rms else F.layer_norm
        exact = norm(inner, (width,), eps=eps)
        (slope,) = torch.autograd.grad(exact, wide, d.double())
        xhat = pointwise.gated_norm(u, kind, eps, rms)
        du = pointwise.gated_norm_backward(d, u, kind, eps, rms)
        assert xhat.dtype == du.dtype == dtype and xhat.shape == d.shape and du.shape == u.shape
        room = 2e-5 if kind == "gelu" and execution.kind == "cpu" else 0
        room += 1e-6 * 2.0 / eps**0.5 if width == 1 else 0  # all that is left of a row is rounding
        assert error(xhat, exact) < 4 * ROUNDING[dtype] + room
        assert error(du, slope) < 6 * ROUNDING[dtype] + room
    empty = torch.empty(0, 2 * width, dtype=dtype, device=execution.device)
    assert pointwise.gated_norm(empty, "silu", eps).shape == (0, width)


@each(
    OP,
    "heads, half, dtype",
    reference=[(3, 5, FP64), (1, 1, FP32), (2, 8, BF16)],
    interpreter=[(3, 5, FP32), (2, 8, FP16)],
    cpu=[(3, 5, FP32), (2, 32, BF16), (1, 17, FP32)],
    gpu=[(12, 32, BF16), (16, 40, FP32)],
)
@pytest.mark.parametrize("per_head", [False, True])
def test_rotations(execution, heads, half, dtype, per_head):
    """Queries and keys of the last rows as complex numbers times turns; all else stays; back is
    back.
    """
    count = 4
    angle_dtype = torch.promote_types(dtype, FP32)
    angles = rows(*((heads,) if per_head else ()), count, half, seed=1)
    (qkv, rotation) = execution.moved(
        rows(2, 7, 3, heads, 2 * half, dtype=dtype),
        torch.stack([angles.sin(), angles.cos()]).to(angle_dtype),
    )
    before = qkv.clone()
    assert pointwise.rotate_(qkv, rotation) is qkv
    assert torch.equal(qkv[:, :3], before[:, :3]) and torch.equal(qkv[:, :, 2], before[:, :, 2])
    turn = torch.polar(torch.ones_like(angles), angles).to(execution.device)
    turn = turn.transpose(0, 1)[:, None] if per_head else turn[:, None, None]
    exact = torch.complex(*before[:, 3:, :2].double().chunk(2, -1)) * turn
    assert error(qkv[:, 3:, :2], torch.cat([exact.real, exact.imag], -1)) < ROUNDING[dtype]
    keys = before[:, :, 1:2].contiguous()  # alone
    assert torch.equal(pointwise.rotate_(keys, rotation), qkv[:, :, 1:2])
    pointwise.rotate_(qkv, rotation, back=True)
    assert error(qkv, before.double()) < 2 * ROUNDING[dtype]


def test_rotations_and_gates_say_what_does_not_fit():
    qkv, angles = torch.zeros(2, 5, 3, 2, 8), torch.zeros(2, 4, 4)
    for rotation in (angles[..., :3], torch.zeros(2, 6, 4), torch.zeros(2, 3, 4, 4), angles.half()):
        with pytest.raises(ValueError, match=r"rotation must be \(2, n, 4\) or \(2, 2, n, 4\)"):
            pointwise.rotate_(qkv, rotation)
    with pytest.raises(ValueError, match="qkv must be contiguous"):
        pointwise.rotate_(qkv.transpose(0, 1), torch.zeros(2, 2, 4))
    with pytest.raises(ValueError, match=r"u must be \(\.\.\., 2 F\)"):
        pointwise.gated(torch.zeros(3, 5), "silu")
    with pytest.raises(ValueError, match=r"u must be \(3, 4\) like d"):
        pointwise.gated_backward(torch.zeros(3, 2), torch.zeros(3, 5), "silu")
    with pytest.raises(ValueError, match=r"u must be \(\.\.\., 2 F\)"):
        pointwise.gated_norm(torch.zeros(3, 5), "silu", 1e-6)
    with pytest.raises(ValueError, match=r"u must be \(3, 4\) like d"):
        pointwise.gated_norm_backward(torch.zeros(3, 2), torch.zeros(3, 5), "silu", 1e-6)


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


@each(
    OP,
    "kind, dtype",
    reference=itertools.product(KINDS, DTYPES),
    interpreter=itertools.product(KINDS, [FP32, FP16]),
    cpu=itertools.product(KINDS, [FP32, BF16]),
    gpu=itertools.product(KINDS, [BF16, FP16, FP32]),
)
def test_activations(execution, kind, dtype):
    shape = execution.pick(gpu=(5, 197, 3072), interpreter=(3, 1500), other=(3, 50))
    u, d = execution.moved(*(rows(*shape, dtype=dtype, seed=seed) for seed in range(2)))
    u = 3 * u
    wide = u.double().requires_grad_()
    exact = ACTIVATIONS[kind](wide)
    (slope,) = torch.autograd.grad(exact, wide, d.double())
    value, none = pointwise.activation(u, kind)
    assert none is None and value.dtype == dtype and error(value, exact) < ROUNDING[dtype]
    in_place = u.detach().clone()
    assert pointwise.activation_(in_place, kind) is in_place
    assert error(in_place, exact) < ROUNDING[dtype] * execution.pick(reference=2, other=1)
    strided = u.detach().mT.contiguous().mT
    assert error(pointwise.activation_(strided, kind), exact) < 2 * ROUNDING[dtype]
    got = pointwise.activation_backward(d, u, kind)
    # PyTorch rounds what quick_gelu's slope is made of as well
    assert got.dtype == dtype and error(got, slope) < ROUNDING[dtype] * execution.pick(
        reference=2, other=1
    )
    again, code = pointwise.activation(u, kind, code=True)
    assert torch.equal(again, value) and code.dtype == torch.uint8
    expected = reference.activation_coded(u.to(torch.promote_types(dtype, FP32)), kind)[1]
    assert (code.int() - expected.int()).abs().max() <= execution.pick(reference=2, other=1)
    got = pointwise.activation_backward(d, code, kind)
    assert got.dtype == dtype and error(got, slope) < 6e-3


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
        lambda: pointwise.activation_(rows(2), "tanh"),
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
        opcheck(OPS.layer_norm_fwd.default, (x, 1e-6, out, False), test_utils=quick)
        opcheck(OPS.add_layer_norm_fwd.default, (x, d.to(out), 1e-6, out, True), test_utils=quick)
    xhat, rstd = OPS.layer_norm_fwd(x, 1e-6, dtype, False)
    for residual in (None, d, d.float()):
        for narrow in (None, dtype, torch.bfloat16):
            args = (d, xhat, rstd, residual, rstd.dtype, narrow, False)
            opcheck(OPS.layer_norm_bwd.default, args, test_utils=quick)
    for kind in KINDS:
        opcheck(OPS.activation_fwd.default, (x, kind), test_utils=quick)
        opcheck(OPS.activation_coded_fwd.default, (x, kind), test_utils=quick)
        code = OPS.activation_coded_fwd(x, kind)[1]
        for kept in (x, code):
            opcheck(OPS.activation_bwd.default, (d, kept, kind), test_utils=quick)
    opcheck(OPS.gated_fwd.default, (x, "silu"), test_utils=quick)
    opcheck(OPS.gated_bwd.default, (d[..., :4], x, "silu"), test_utils=quick)
    opcheck(OPS.gated_norm_fwd.default, (x, "silu", 1e-6, False), test_utils=quick)
    given = d[..., :4], x, "silu", 1e-6, False
    opcheck(OPS.gated_norm_bwd.default, given, test_utils=quick)
    qkv = rows(2, 3, 3, 2, 4, dtype=dtype)
    angles = torch.zeros(2, 2, 2, dtype=torch.promote_types(dtype, FP32))
    opcheck(OPS.rotate_.default, (qkv, angles, False), test_utils=quick)


@pytest.mark.parametrize("reason", ["fp64", "not built"])
def test_the_reference_runs_where_no_kernel_can(monkeypatch, reason):
    calls = []
    layer_norm = reference.layer_norm
    monkeypatch.setattr(reference, "layer_norm", lambda *a: calls.append(1) or layer_norm(*a))
    dtype = FP64
    if reason == "not built":
        dtype = FP32
        monkeypatch.setattr(cpu, "_own", lambda: reason)
        assert backends.choose("pointwise", "cpu") is reference
    pointwise.layer_norm(rows(2, 8, dtype=dtype), 1e-6)
    assert calls == [1]


@each(
    OP,
    "kind, dtype",
    cpu=itertools.product(KINDS, [FP32, BF16]),
    interpreter=itertools.product(KINDS, [FP32]),
    gpu=itertools.product(KINDS, [FP32, BF16]),
)
def test_activations_of_every_size(execution, kind, dtype):
    """From the smallest to the largest numbers, with what is not finite, each against fp64: as far
    as rounding goes, and of entries themselves, not of the norm.
    """
    sizes = torch.logspace(-30, 30, 901, dtype=FP64)
    near = torch.linspace(-12, 12, 4801, dtype=FP64)
    (u,) = execution.moved(torch.cat([near, sizes, -sizes, torch.tensor([0.0, -0.0])]).to(dtype))
    wide = u.double().requires_grad_()
    exact = ACTIVATIONS[kind](wide)
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    y, code = pointwise.activation(u, kind, code=True)
    got = pointwise.activation_backward(torch.ones_like(u), u, kind)
    # a value is u times a number between 0 and 1, which is off by a few steps of fp32
    step, near, of_slope = torch.finfo(dtype).eps, 4e-7 * u.double().abs(), 1e-6
    short = execution.pick(cpu=dtype == BF16 and kind == "gelu", other=False)
    if short:  # a shorter polynomial
        near, of_slope = (2e-5 * u.double().abs()).clamp(max=1.1e-5), 2.1e-5
    assert ((y.double() - exact).abs() <= step * exact.abs() + near).all()
    assert ((got.double() - slope).abs() <= step * slope.abs() + of_slope).all()
    from_code = pointwise.activation_backward(torch.ones_like(u), code, kind)
    assert ((from_code.double() - slope).abs() <= 1 / 400 + step + of_slope).all()
    nan = torch.tensor([torch.nan] * 20, dtype=dtype, device=execution.device)
    assert pointwise.activation(nan, kind)[0].isnan().all()
    if kind != "relu":
        assert pointwise.activation_backward(torch.ones_like(nan), nan, kind).isnan().all()


@each(OP, on=("cpu",))
def test_threads_change_no_bit(execution):
    """Rows and entries are shared among threads; which one works on which is nobody's business."""
    x, d = (rows(3, 197, 768, dtype=FP32, seed=seed) for seed in range(2))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            y, xhat, rstd = pointwise.add_layer_norm(x, d, 1e-6, BF16)
            dx = pointwise.layer_norm_backward(d, xhat, rstd, x, dtype=FP32, narrow=BF16)
            u, code = pointwise.activation(x, "gelu", code=True)
            slope = pointwise.activation_backward(d, x, "gelu")
            found.append((y, xhat, rstd, *dx, u, code, slope))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_layer_norm_equals_pytorch():
    x = rows(2, 5, 32, dtype=torch.float32)
    torch.testing.assert_close(pointwise.layer_norm(x, 1e-5)[0], F.layer_norm(x, (32,), eps=1e-5))
