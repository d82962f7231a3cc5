"""Causal prompt_attention in every execution."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from pae_kernels import prompt_attention
from tests.errors import error
from tests.kernels.attention.cases import (
    BWD,
    FWD,
    OP,
    along,
    by_definition,
    check,
    each_path,
    inputs,
    places,
    results,
)
from tests.kernels.executions import BF16, FP16, FP32, FP64, each


def triangle(tokens):
    """(1, N, N): a mask that hides what comes later."""
    return torch.ones(1, tokens, tokens, dtype=FP64).tril().log()


# ---- values


@pytest.mark.parametrize("queries", ["all", "class"])
@pytest.mark.parametrize("prompts", [0, 3])
@pytest.mark.parametrize("placed", [False, True])
def test_the_definition_is_a_mask_of_a_triangle(placed, prompts, queries):
    """Row 0 alone, "class", sees itself and prompts."""
    qkv, kv = inputs(2, 5, prompts)
    given = places(5, 2, 2, FP64) if placed else {"mask": torch.zeros(1, 5, 5)}
    got = results(by_definition, qkv, kv, queries=queries, causal=True, **given)
    given["mask"] = given["mask"] + triangle(5)
    expected = results(by_definition, qkv, kv, queries=queries, **given)
    plain = results(by_definition, qkv, kv, queries=queries)
    for a, b, other in zip(got, expected, plain, strict=True):
        assert torch.equal(a, b)
        assert other.numel() == 0 or error(other, b) > 1e-2


SHAPES = [  # with tiles of 16 rows; the last ends on a diagonal tile of one row
    (2, 1, 0, 2, 16),
    (1, 1, 7, 1, 16),
    (2, 33, 0, 1, 16),
    (1, 31, 18, 2, 16),
    (1, 20, 4, 1, 20),
    (1, 17, 16, 1, 72),
]
TEXT = [(2, 77, 0, 2, 64), (3, 24, 4, 2, 64), (1, 77, 50, 1, 80), (2, 45, 0, 1, 5)]


@along(
    [(shape, (FP32, FP16)[i % 2], "all") for i, shape in enumerate(SHAPES)]
    + [(SHAPES[3], FP32, "class")],
    "shape, dtype, queries",
    reference=[
        (shape, dtype, queries)
        for shape in TEXT
        for dtype in (FP64, FP32, BF16)
        for queries in (("all", "class") if shape[2] else ("all",))
    ],
    cpu=[
        *((shape, dtype, "all") for shape in (*SHAPES, *TEXT) for dtype in (FP32, BF16)),
        ((1, 260, 9, 1, 16), FP32, "all"),
        (SHAPES[3], BF16, "class"),
    ],
    sdpa=[
        (shape, dtype, queries)
        for shape, dtype in ((TEXT[0], FP32), (TEXT[1], BF16), (TEXT[2], FP32))
        for queries in ("all", "class")
    ],
    gpu=[
        *(((4, *shape), dtype, "all") for dtype in (BF16, FP16, FP32)
          for shape in ((77, 0, 8, 64), (24, 16, 8, 64), (197, 50, 12, 64), (577, 10, 4, 80))),
        ((4, 77, 16, 8, 64), BF16, "class"),
    ],
)  # fmt: skip
def test_shapes(execution, path, shape, dtype, queries):
    check(execution, *inputs(*shape, dtype=dtype), queries=queries, causal=True)


@each_path("reference", "interpreter", "cpu", "sdpa")
def test_a_negative_scale(execution, path):
    """Where -inf is a mask, a negative factor must not turn it around."""
    for scale in (-0.3, 0.0):
        check(execution, *inputs(1, 19, 0, 1, 16, dtype=FP32), causal=True, scale=scale)


@each(OP, "dtype", interpreter=[FP32, FP16])
def test_tiles_that_ship(execution, dtype):
    check(execution, *inputs(1, 70, 5, 1, 64, dtype=dtype), causal=True)


# ---- properties


@along(
    [(20, 5, 15)],
    "tokens, prompts, last",
    **{kind: [(77, 0, 23), (24, 4, 0), (77, 50, 47)] for kind in ("reference", "cpu", "sdpa")},
    gpu=[(77, 0, 23), (77, 16, 63)],
)
def test_later_rows_change_nothing(execution, path, tokens, prompts, last):
    """Not a bit of results and gradients of the rows before, nor of those of prompts."""
    dtype = execution.pick(reference=FP32, interpreter=FP16, other=execution.dtypes[-1])
    qkv, kv = execution.moved(*inputs(2, tokens, prompts, 2, 16, dtype=dtype))
    d_out = torch.randn(2, tokens, 32).to(qkv)
    d_out[:, last + 1 :] = 0
    other = qkv.clone()
    other[:, last + 1 :] = 30 * torch.randn(2, tokens - last - 1, 3, 2, 16).to(qkv)
    first, second = (results(prompt_attention, t, kv, d_out, causal=True) for t in (qkv, other))
    seen = slice(0, last + 1)
    for a, b in ((r[0][:, seen], r2[0][:, seen]) for r, r2 in ((first, second),)):
        assert torch.equal(a, b)
    assert torch.equal(first[1][..., seen], second[1][..., seen])
    assert torch.equal(first[2], second[2]) and torch.equal(first[3], second[3])
    assert not first[2][:, last + 1 :].any()
    cut = results(prompt_attention, qkv[:, seen], kv, d_out[:, seen], causal=True)
    tolerance = 2e-6 if dtype == FP32 else 2e-2
    for a, b in zip(cut, (first[0][:, seen], first[1][..., seen], first[2][:, seen], first[3])):
        assert b.numel() == 0 or error(a, b) < tolerance


@each(OP, "path, tile", through=["path"], interpreter=[("split", 16)], cpu=[(None, 24)])
def test_what_comes_later_is_not_read(execution, path, tile):
    """Nor are, for the gradients of its keys, rows of tiles before: all of it may be NaN."""
    qkv, kv = inputs(1, 3 * tile, 16, 1, 16, dtype=FP32)
    before, behind = slice(0, tile), slice(2 * tile, None)
    exact = results(by_definition, qkv.double(), kv.double(), causal=True)
    later = qkv.clone()
    later[:, behind] = torch.nan
    out, lse, d_qkv, _ = results(prompt_attention, later, kv, causal=True)
    assert error(out[:, before], exact[0][:, before]) < 1e-6
    assert error(lse[..., before], exact[1][..., before]) < 1e-6
    assert error(d_qkv[:, before, 0], exact[2][:, before, 0]) < 1e-6
    earlier = torch.randn(1, 3 * tile, 16)
    earlier[:, before] = torch.nan
    d_keys = results(prompt_attention, qkv, kv, earlier, causal=True)[2][:, behind]
    assert d_keys.isfinite().all()


@each_path("reference", "interpreter", "cpu", "sdpa")
def test_prompt_gradient_alone(execution, path):
    """The same as beside that of qkv: prompts are seen by all rows."""
    qkv, kv = execution.moved(*inputs(2, 33, 18, 1, 16, dtype=FP32))
    out, lse = FWD(qkv, kv, None, 0.3, False, None, None, None, True)
    d_out = torch.randn(out.shape).to(out)
    given = d_out, qkv, kv, None, 0.3, False, None, None, None, out, lse
    expected, alone = (BWD(*given, need_qkv, True) for need_qkv in (True, False))
    assert alone[0].numel() == 0 and error(alone[1], expected[1]) < 1e-6


@each_path("reference", "interpreter", "cpu", "sdpa")
def test_a_sum_of_two_orders(execution, path):
    """Rows in reverse see what comes later: with a row's own key they make up all."""
    dtype = execution.pick(reference=FP64, sdpa=FP64, other=FP32)
    qkv, kv = inputs(1, 33, 3, 1, 16, dtype=dtype)
    both = [prompt_attention(t, kv[:, :0], causal=True)[1].double() for t in (qkv, qkv.flip(1))]
    own = (qkv[:, :, 0].double() * qkv[:, :, 1].double()).sum(-1).transpose(1, 2) / 4
    every = (both[0].exp() + both[1].flip(-1).exp() - own.exp()).log()
    assert error(every, prompt_attention(qkv, kv[:, :0])[1]) < 1e-6


# ---- as an op


@pytest.mark.parametrize("queries", ["all", "class"])
@pytest.mark.parametrize("sets, group, prompts", [(1, None, 2), (2, (1, 0, 1), 2), (1, None, 0)])
@pytest.mark.parametrize("placed", [False, True])
def test_gradcheck(placed, sets, group, prompts, queries):
    qkv, kv = inputs(3, 4, prompts, 2, 3, sets)
    options = {"group": None if group is None else torch.tensor(group), "queries": queries}
    if placed:
        options |= places(4, 2, 3) | {"log_multiplicity": torch.rand(sets, prompts)}
    function = lambda qkv, kv: prompt_attention(qkv, kv, causal=True, **options)[0]
    assert torch.autograd.gradcheck(function, (qkv.requires_grad_(), kv.requires_grad_()))


@each(OP, "dtype", interpreter=[FP16], reference=[FP64], cpu=[BF16], sdpa=[BF16])
def test_opcheck(execution, dtype):
    qkv, kv = execution.moved(*inputs(3, 5, dtype=dtype))
    given = None, 1.0, False, None, None, None
    out, lse = FWD(qkv, kv, *given, True)
    quick = ["test_schema", "test_faketensor"]
    opcheck(BWD, (out, qkv, kv, *given, out, lse, True, True), test_utils=quick)
    quick += ["test_autograd_registration"] if execution.kind == "reference" else []
    leaves = qkv.requires_grad_(), kv.requires_grad_()
    opcheck(FWD, (*leaves, *given, True), test_utils=quick)
