"""The bounds themselves: what they let pass, and what not."""

from __future__ import annotations

import pytest
import torch

from tests.errors import assert_not_worse, assert_rounded, rounding


def difference(a, b, c):
    """a b - c, which nearly cancels where c is near a b."""
    return (a @ b - c,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("left", [1.0, 1e-4, 1e-6, 0.0])
def test_what_is_left_of_large_terms_may_be_rounding(dtype, left):
    a, b = torch.randn(20, 30, dtype=dtype), torch.randn(30, 10, dtype=dtype)
    c = (a.double() @ b.double() - left * torch.randn(20, 10, dtype=torch.float64)).to(dtype)
    got = difference(a, b, c)
    wide = [t.double() for t in (a, b, c)]
    assert_rounded(got, lambda: difference(*wide), dtype)
    narrow = difference(a.bfloat16().to(dtype), b, c)
    with pytest.raises(AssertionError, match=r"result 0 is off by .* roundings"):
        assert_rounded(narrow, lambda: difference(*wide), dtype)


def test_the_rounding_of_a_sum_is_that_of_its_terms():
    """About the root of the sum of their squares, in units of half the last place."""
    terms = torch.randn(4000, dtype=torch.float64)
    terms -= terms.mean()
    (_,), (size,) = rounding(lambda: [terms.sum()], torch.float32, runs=64)
    expected = torch.finfo(torch.float32).eps / 2 * terms.norm() / 3**0.5  # uniform noise
    assert size == pytest.approx(expected.item(), rel=0.4)


def test_gradients_round_too_and_none_stays_none():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)

    def function():
        return [None, *torch.autograd.grad((x.sin() * x).sum(), x)]

    values, sizes = rounding(function, torch.float32)
    assert values[0] is None and sizes[0] == 0 and 1e-8 < sizes[1] / values[1].norm() < 1e-6
    with pytest.raises(AssertionError, match="result 0"):
        assert_rounded(values[1:] * 2, function, torch.float32)


def errors(draws, ratio, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    theirs = torch.rand(draws, 2, generator=generator) + 0.5
    noise = torch.randn(draws, 2, generator=generator)
    return theirs * ratio * (spread * noise).exp(), theirs


def test_a_comparison_of_errors_knows_its_spread():
    for seed in range(200):  # at a ratio of 1.05, not one false alarm
        assert_not_worse(*errors(24, 1.05, 0.2, seed), 1.2, "ab")
    caught = 0
    for seed in range(200):
        try:
            assert_not_worse(*errors(24, 1.5, 0.2, seed), 1.2, "ab")
        except AssertionError:
            caught += 1
    assert caught == 200
    with pytest.raises(AssertionError, match="few draws"):
        assert_not_worse(*errors(8, 1.0, 0.2), 1.2, "ab")
