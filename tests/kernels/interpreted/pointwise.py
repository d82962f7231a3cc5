"""The pointwise kernels in Triton's interpreter, beside the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pae_kernels import pointwise
from pae_kernels.pointwise import reference, triton
from tests.kernels.test_pointwise import LAYOUTS

STREAMS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
]


def rows(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got, expected):
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def limit(*tensors):
    return 2e-3 if any(t.dtype == torch.float16 for t in tensors) else 2e-6


@pytest.mark.parametrize("width", (16, 33, 72, 768))
@pytest.mark.parametrize(("stream", "product"), STREAMS)
def test_norms(width, stream, product):
    x, delta = rows(2, 5, width, dtype=stream), rows(2, 5, width, dtype=product, seed=1)
    for got, expected in zip(
        triton.add_layer_norm(x, delta, 1e-6, product),
        reference.add_layer_norm(x, delta, 1e-6, product),
        strict=True,
    ):
        assert got.dtype == expected.dtype and error(got, expected) < limit(got)
    xhat, rstd = triton.layer_norm(x, 1e-6, product)
    assert error(xhat, reference.layer_norm(x, 1e-6, product)[0]) < limit(xhat)
    d, residual = rows(2, 5, width, dtype=product, seed=2), rows(2, 5, width, dtype=stream, seed=3)
    for around in (None, residual):
        for narrow in (None, torch.float16):
            args = d, xhat, rstd, around, stream, narrow
            for got, expected in zip(
                triton.layer_norm_backward(*args),
                reference.layer_norm_backward(*args),
                strict=True,
            ):
                assert got.shape == expected.shape and got.dtype == expected.dtype
                assert error(got, expected) < limit(got) if got.numel() else True


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    count=st.integers(0, 9),
    width=st.integers(1, 300),
    streams=st.sampled_from(STREAMS),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    shift=st.sampled_from([0.0, 5.0]),
)
def test_norms_of_any_shape(count, width, streams, eps, shift):
    """Against the formula in fp64. A row's mean is off by a few steps of fp32 at its size."""
    stream, product = streams
    x, delta = rows(count, width, dtype=stream) + shift, rows(count, width, dtype=product, seed=1)
    d, residual = rows(count, width, dtype=product, seed=2), rows(count, width, seed=3)
    y, xhat, rstd = triton.add_layer_norm(x, delta, eps, product)
    assert torch.equal(y, (x.float() + delta.float()).to(stream))
    wide = y.double()
    expected = reference.layer_norm(wide, eps, torch.float64)
    dx, _ = triton.layer_norm_backward(d, xhat, rstd, residual, torch.float32, None)
    h, g = xhat.double(), d.double()
    inner = g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True)
    exact = residual.double() + rstd.double() * inner
    if count:
        steps = 1e-6 * (1 + shift) / eps**0.5  # where all entries of a row are equal
        loose = {"rtol": 0, "atol": limit(xhat) + (steps if width == 1 else 4e-6 * (1 + shift))}
        torch.testing.assert_close(xhat.double(), expected[0], **loose)
        assert error(dx, exact) < limit(dx)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Through the ops, which hand the kernels contiguous rows."""
    x, d, r = (LAYOUTS[layout](rows(3, 5, 8, seed=s)) for s in range(3))
    y, xhat, rstd = pointwise.add_layer_norm(x, d, 1e-6)
    dense = pointwise.add_layer_norm(x.contiguous(), d.contiguous(), 1e-6)
    for a, b in zip((y, xhat, rstd), dense, strict=True):
        assert torch.equal(a, b)
    got = pointwise.layer_norm_backward(d, LAYOUTS[layout](xhat), rstd, r, narrow=torch.float16)
    plain = d.contiguous(), LAYOUTS[layout](xhat).contiguous(), rstd, r.contiguous()
    for a, b in zip(got, pointwise.layer_norm_backward(*plain, narrow=torch.float16)):
        assert torch.equal(a, b)
    u, code = pointwise.activation(x, "gelu", code=True)
    for a, b in zip((u, code), pointwise.activation(x.contiguous(), "gelu", code=True)):
        assert torch.equal(a, b)
    for kept in (x, code):
        a = pointwise.activation_backward(d, kept, "gelu")
        b = pointwise.activation_backward(d.contiguous(), kept.contiguous(), "gelu")
        assert torch.equal(a, b)


def test_the_kernels_run(monkeypatch):
    """The public ops reach them, and the reference is not asked."""
    for name in ("layer_norm", "add_layer_norm", "layer_norm_backward", "activation"):
        monkeypatch.setattr(reference, name, None)
    x = rows(2, 8)
    _, xhat, rstd = pointwise.add_layer_norm(x, x, 1e-6)
    assert torch.isfinite(pointwise.layer_norm_backward(x, xhat, rstd)).all()
    assert torch.isfinite(pointwise.activation(x, "gelu")[0]).all()


def test_bitwise_the_same_from_run_to_run():
    x, d = rows(7, 96), rows(7, 96, seed=1)

    def run():
        y, xhat, rstd = triton.add_layer_norm(x, d, 1e-6, torch.float16)
        dx, narrow = triton.layer_norm_backward(d, xhat, rstd, x, torch.float32, torch.float16)
        u, code = triton.activation_coded(x, "gelu")
        return y, xhat, rstd, dx, narrow, u, code, triton.activation_backward(d, code, "gelu")

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5, 16), (3, 0, 16)])
def test_no_rows(shape):
    x = torch.empty(shape)
    _, xhat, rstd = triton.add_layer_norm(x, x, 1e-6, torch.float16)
    assert xhat.shape == shape and rstd.shape == (*shape[:2], 1)
    dx, narrow = triton.layer_norm_backward(x, xhat, rstd, x, torch.float32, torch.float16)
    assert dx.shape == narrow.shape == shape
    y, code = triton.activation_coded(x, "gelu")
    assert y.shape == code.shape == triton.activation_backward(x, code, "gelu").shape == shape


def test_near_zero_rows_obey_eps():
    x = rows(1, 4, 64) * 1e-5
    got, rstd = triton.layer_norm(x, 1e-6, torch.float32)
    expected, expected_rstd = reference.layer_norm(x.double(), 1e-6, torch.float64)
    assert error(got, expected) < 1e-5 and error(rstd, expected_rstd) < 1e-6


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_activations(kind, dtype):
    u, d = 3 * rows(3, 1500, dtype=dtype), rows(3, 1500, dtype=dtype, seed=1)
    wide = reference.activation(u.double(), kind)
    assert error(triton.activation(u, kind), wide) < limit(u)
    y, code = triton.activation_coded(u, kind)
    assert error(y, wide) < limit(u)
    assert (code.int() - reference.activation_coded(u.float(), kind)[1].int()).abs().max() <= 1
    slope = reference.activation_backward(d.double(), u.double(), kind)
    assert error(triton.activation_backward(d, u, kind), slope) < limit(u)
    assert error(triton.activation_backward(d, code, kind), slope) < 8e-3
