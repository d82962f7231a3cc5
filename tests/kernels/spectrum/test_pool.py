"""shortcut_pool in every execution, against its definition and the released prompts."""

from __future__ import annotations

import itertools

import pytest
import torch

from pae_kernels.spectrum import reference, shortcut_pool
from tests.kernels.executions import BF16, FP16, FP32, FP64, each, sanitized
from tests.kernels.spectrum.cases import OP, pooled_by_loop, tokens_of

# ---- shortcut_pool


@each(
    OP,
    "shape, dtype",
    reference=[((2, 3, 50, 40), dtype) for dtype in (FP64, FP32, BF16, FP16)],
    interpreter=itertools.product(
        [(1, 1, 1, 1), (2, 3, 50, 40), (3, 2, 31, 129), (1, 5, 40, 33)], [FP32, FP16]
    ),
    emulated=itertools.product(
        [(1, 1, 1, 1), (2, 3, 50, 40), (2, 2, 31, 129), (1, 1, 9, 1300)], [FP32, BF16, FP16]
    ),
    gpu=[
        *itertools.product(
            [(3, 8, 196, 768), (2, 5, 31, 130), (1, 2, 257, 1280)], [BF16, FP16, FP32]
        ),
        *(sanitized((2, 3, 42, 70), dtype) for dtype in (BF16, FP32)),
    ],
)
def test_pool_equals_the_definition(execution, shape, dtype):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(*shape, generator=generator).to(execution.device, dtype)
    tokens[0] *= 1e-3
    for rows in (None, torch.randn(*shape[2:], generator=generator).to(tokens)):
        exact = reference.shortcut_pool(tokens.double(), rows if rows is None else rows.double())
        plain = reference.shortcut_pool(tokens, rows)
        execution.assert_as_exact(shortcut_pool(tokens, rows), plain, exact)


@each(
    OP,
    "scale",
    reference=[1e-30, 1e30],
    gpu=[1e-30, 1e30],
    other=[1e-40, 1e-30, 1e-15, 1e15, 1e30, 1e37],
)
def test_pool_outlives_squares_beyond_the_range_of_float32(execution, scale):
    tokens = torch.randn(2, 3, 40, 5, generator=torch.Generator().manual_seed(2))
    tokens = tokens.to(execution.device) * scale
    exact = reference.shortcut_pool(tokens.double())
    step = 1e-6 if scale > 1e-38 else 1e-3  # steps of numbers below the normal ones
    torch.testing.assert_close(
        shortcut_pool(tokens).double() / scale, exact / scale, rtol=step, atol=step
    )


@each(OP)
def test_pool_of_tokens_that_grow_by_powers(execution):
    """Every tile rescales what came before; only the last tokens count in the end."""
    tokens = torch.ones(1, 1, 200, 3)
    tokens *= 2.0 ** torch.linspace(-120, 120, 200).round()[:, None]
    for t in execution.moved(tokens, tokens.flip(2)):
        exact = reference.shortcut_pool(t.double())
        torch.testing.assert_close(shortcut_pool(t).double(), exact, rtol=1e-6, atol=0)


@each(OP)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_pool_of_no_energy_nan_and_infinity_keeps_to_its_window(execution):
    count, width = execution.pick(gpu=(70, 8), other=(40, 5))
    tokens = torch.ones(4, 3, count, width, device=execution.device)
    tokens[0] = 0
    tokens[1, 1, 2, 3] = torch.nan
    tokens[2, 2, count - 1, 4] = torch.inf
    got = shortcut_pool(tokens)
    assert not got[0].any() and got[1].isnan().all() and got[2].isnan().all()
    torch.testing.assert_close(got[3], torch.ones_like(got[3]))


@pytest.mark.sanitize
@each(OP, on=("interpreter", "emulated"))
def test_pool_reads_tokens_as_they_lie(execution):
    whole = torch.randn(2, 3, 45, 8)
    moved = torch.cat([torch.zeros(1), whole.flatten()])[1:].view(whole.shape)
    views = (whole[:, :, 5:], whole.transpose(0, 1), whole[..., :6], moved)
    for t in (*views, whole[:, :, :40].mT.contiguous().mT):
        expected = shortcut_pool(t.contiguous())
        for _ in execution.runs():
            assert torch.equal(shortcut_pool(t), expected)
    assert shortcut_pool(whole[:0]).shape == (0, 8)


@each(OP, on=["emulated"])
def test_pool_of_rows_too_wide_for_a_warp_is_the_references(execution):
    tokens = torch.randn(1, 1, 2, 2052)
    assert torch.equal(shortcut_pool(tokens), reference.shortcut_pool(tokens))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)],
)
def test_pool_equals_the_loop(dtype, tolerance):
    tokens = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    tokens[1] *= 1e-3  # weights are per window: a faint one does not borrow from a strong one
    ours = shortcut_pool(tokens)
    assert ours.dtype == dtype
    expected = pooled_by_loop(tokens)
    scale = expected.abs().amax(dim=1, keepdim=True)
    assert ((ours - expected).abs() / scale).max() < tolerance


def test_pool_weights_are_a_convex_combination():
    tokens = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    tokens[..., 0] = 1.0
    torch.testing.assert_close(shortcut_pool(tokens)[:, 0], torch.ones(2, dtype=torch.float64))


def test_pool_does_not_depend_on_the_order_of_images_and_tokens():
    tokens = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    shuffled = tokens[:, torch.tensor([2, 0, 1])][:, :, torch.tensor([3, 1, 0, 2])]
    torch.testing.assert_close(shortcut_pool(shuffled), shortcut_pool(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_adds_rows_before_the_energies(dtype):
    tokens, rows = torch.randn(2, 3, 4, 5).to(dtype), torch.randn(4, 5).to(dtype)
    ours = shortcut_pool(tokens, rows)
    assert ours.dtype == dtype
    expected = pooled_by_loop(tokens.double() + rows.double())
    torch.testing.assert_close(ours, expected.to(dtype))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.zeros(5), ValueError, r"rows must be \(4, 5\) on cpu, got \(5,\)"),
        (torch.zeros(4, 5).int(), TypeError, r"rows must be a float tensor \(4, 5\) or None"),
        (torch.zeros(4, 5, requires_grad=True), ValueError, "rows requires a gradient"),
    ],
)
def test_pool_refuses_bad_rows(rows, error, message):
    with pytest.raises(error, match=message):
        shortcut_pool(torch.zeros(2, 3, 4, 5), rows)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 5, dtype=torch.int64), TypeError, "tokens must be a float tensor"),
        ([[1.0]], TypeError, "tokens must be a float tensor .* got list"),
        (torch.zeros(3, 4, 5), ValueError, r"tokens must be \(S, B, N, D\)"),
        (torch.zeros(2, 0, 4, 5), ValueError, "B, N >= 1"),
        (torch.zeros(1, 1, 1, 1, requires_grad=True), ValueError, "tokens requires a gradient"),
    ],
)
def test_pool_refuses_bad_arguments(tokens, error, message):
    with pytest.raises(error, match=message) as caught:
        shortcut_pool(tokens)
    assert "\n" not in str(caught.value)


# ---- golden vectors


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"), [("f64", torch.float64, 1e-6), ("f32", torch.float32, 1e-5)]
)
def test_pooled_tokens_are_the_released_prompts(kind, dtype, tolerance, golden, tiny_vit):
    """Phase II from the spectrum, without an image: the P prompts of the released code."""
    expected, vit = golden("pae_mpa"), tiny_vit(dtype)
    images = torch.from_numpy(golden("data")["images"]).to(dtype)
    origins = torch.from_numpy(expected["top_origins"])
    with torch.no_grad():
        stem, positions = vit.patch_embed.proj, vit.pos_embed[0, 1:]
        tokens = tokens_of(images, origins, 8, stem.weight, stem.bias)
        theirs = torch.from_numpy(expected[f"{kind}/prompt_shallow"])
        assert (shortcut_pool(tokens, positions) - theirs).norm() / theirs.norm() < tolerance
        tokens = tokens_of(images, origins[:1], 8, stem.weight, stem.bias, rows=positions)
    energy = torch.from_numpy(expected[f"{kind}/top0_token_energy"])
    torch.testing.assert_close(tokens[0].square().sum(-1), energy, rtol=3e-6, atol=0)
