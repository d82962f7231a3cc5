"""The pointwise kernels in Triton's interpreter, beside the reference."""

from __future__ import annotations

import pytest
import torch

from pae_kernels.pointwise import reference, triton

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
