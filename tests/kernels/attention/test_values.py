"""prompt_attention in every execution, against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pae_kernels import pointwise, prompt_attention
from pae_kernels.attention import tiles
from pae_kernels.attention.reference import Sizes
from tests.errors import error
from tests.kernels.attention.cases import (
    BWD,
    FWD,
    LAYOUTS,
    OP,
    along,
    assert_as_defined,
    by_definition,
    check,
    each_path,
    force,
    inputs,
    places,
    results,
    sdpa,
)
from tests.kernels.executions import BF16, FP16, FP32, FP64, INTERPRETING, each
from tests.properties import examples

if INTERPRETING:
    from pae_kernels.attention import triton as kernels


def test_the_definition_itself():
    """One image, one head, spelled out with numbers."""
    q, k, v = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.0]]), torch.tensor([[3.0, 1.0]])
    k_p, v_p = torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [4.0, 0.0]])
    weights = torch.tensor([3.0 * 0.1, 4.0 * 0.1 + 0.7, 0.5 * 0.1]).exp()
    expected = (weights[0] * v_p[0] + weights[1] * v_p[1] + weights[2] * v[0]) / weights.sum()
    qkv = torch.stack([q, k, v], dim=1)[None, :, :, None]  # (1, 1, 3, 1, 2)
    kv = torch.stack([k_p, v_p], dim=1)[None, :, :, None]  # (1, 2, 2, 1, 2)
    for function in (prompt_attention, by_definition):
        bias = torch.tensor([[0.0, 0.7]])
        out, lse = function(qkv, kv, scale=0.1, log_multiplicity=bias)
        torch.testing.assert_close(out[0, 0], expected)
        torch.testing.assert_close(lse[0, 0, 0], weights.sum().log())


@examples(60)
@given(
    batch=st.integers(0, 4),
    tokens=st.integers(1, 12),
    prompts=st.integers(0, 9),
    heads=st.integers(1, 3),
    width=st.integers(1, 17),
    sets=st.sampled_from(["shared", "per_sample", "grouped"]),
    queries=st.sampled_from(["all", "class"]),
    weighted=st.booleans(),
    heads_placed=st.sampled_from([None, 1, "all"]),
    windows=st.sampled_from([None, 1, "all"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    scale=st.sampled_from([None, 1.0, 0.3]),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
@example(
    1, 3, 3, 2, 17, "shared", "class", False, None, None, torch.float32, 1.0, False, 77
)  # d_qkv cancels
def test_equals_the_definition(
    batch,
    tokens,
    prompts,
    heads,
    width,
    sets,
    queries,
    weighted,
    heads_placed,
    windows,
    dtype,
    scale,
    causal,
    seed,
):
    count = {"shared": 1, "per_sample": batch, "grouped": 3}[sets]
    qkv, kv = inputs(batch, tokens, prompts, heads, width, count, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    options = {"queries": queries, "scale": scale, "causal": causal}
    if sets == "grouped":
        options["group"] = torch.randint(3, (batch,), generator=generator)
    if weighted:
        options["log_multiplicity"] = torch.rand(count, prompts, generator=generator)
    heads_placed = heads if heads_placed == "all" else heads_placed
    options |= places(tokens, heads_placed, max(batch, 1) if windows == "all" else windows)
    out, lse, d_qkv, d_kv = assert_as_defined(qkv, kv, **options)
    assert out.dtype == d_qkv.dtype == d_kv.dtype == dtype
    assert lse.dtype == dtype
    rows = 1 if queries == "class" else tokens
    assert out.shape == (batch, rows, heads * width)
    assert lse.shape == (batch, heads, rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("queries", ["all", "class"])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
def test_one_narrow_tensor_is_more_than_rounding(dtype, queries, kept):
    """The bound is tight enough: it refuses keys, or a result, of the next narrower precision."""
    kept = kept if dtype == torch.float64 else torch.bfloat16

    def narrow_keys(qkv, kv, **options):
        k = qkv[:, :, 1:2]
        moved = torch.cat([qkv[:, :, :1], k + (k.to(kept) - k).detach(), qkv[:, :, 2:]], dim=2)
        return prompt_attention(moved, kv, **options)

    def narrow_out(qkv, kv, **options):
        out, lse = prompt_attention(qkv, kv, **options)
        return out.to(kept).to(out.dtype), lse

    for faulty in (narrow_keys, narrow_out):
        with pytest.raises(AssertionError, match="roundings"):
            assert_as_defined(*inputs(dtype=dtype), function=faulty, queries=queries)


TILED = [
    (2, 21, 5, 2, 16),
    (1, 16, 16, 2, 16),
    (2, 15, 16, 1, 16),
    (1, 33, 18, 1, 16),
    (2, 17, 0, 1, 16),
    (2, 1, 7, 2, 16),
    (1, 1, 0, 1, 16),
    (2, 20, 1, 1, 24),
    (1, 31, 33, 1, 32),
    (1, 20, 4, 1, 48),
    (1, 18, 3, 2, 64),
    (1, 17, 15, 1, 72),
    (1, 19, 6, 1, 80),
    (1, 17, 2, 1, 96),
    (1, 18, 5, 1, 128),
    (2, 5, 3, 3, 5),
]
INTERPRETED = [  # each backward sees every other shape in fp16
    (path, shape, (FP32, FP16)[(i + (path == "whole")) % 2], queries)
    for path in ("whole", "split")
    for i, shape in enumerate(TILED)
    for queries in (("all", "class") if i in (0, 3, 4, 5) else ("all",))
]
SHIPPED = [  # the table's own tiles: in 16 bits and up to 64 wide whole, else split
    (None, shape, dtype, "all")
    for shape in ((1, 50, 10, 1, 64), (1, 20, 5, 1, 80))
    for dtype in (FP32, FP16)
]
REFERENCE = [(1, 50, 5, 3, 32), (2, 197, 50, 3, 64), (1, 198, 10, 2, 80), (1, 257, 1, 2, 72)]
REAL = [
    *((4, 197, prompts, 12, 64, BF16) for prompts in (0, 1, 10, 50, 100, 200)),
    *((4, tokens, 50, 12, 64, BF16) for tokens in (50, 257, 577)),
    *((4, 197, 50, 12, 64, dtype) for dtype in (FP16, FP32)),
    (4, 577, 10, 12, 64, FP16),
    (4, 50, 10, 12, 64, FP32),
    (4, 197, 50, 6, 64, BF16),
    (4, 197, 50, 16, 64, BF16),
    (4, 257, 50, 16, 80, BF16),
    (4, 197, 50, 8, 48, BF16),
    *((4, 197, 50, 4, width, BF16) for width in (32, 72, 96, 128)),
    (4, 50, 10, 4, 128, FP32),
    *((4, tokens, 50, 12, 64, BF16) for tokens in (1, 256, 785, 1025, 1568)),
    (4, 197, 512, 12, 64, FP16),
    (4, 4096, 512, 2, 64, BF16),
    (128, 197, 50, 12, 64, BF16),  # programs take several images in turn, in a slot of their own
]


@each(
    OP,
    "path, shape, dtype, queries",
    through=["path"],
    reference=[
        *((None, shape, FP32, queries) for shape in REFERENCE for queries in ("all", "class")),
        (None, (1, 1568, 2, 1, 8), FP32, "all"),
        (None, (2, 4096, 512, 1, 32), FP32, "class"),
    ],
    interpreter=[*INTERPRETED, *SHIPPED],
    sdpa=[
        (None, shape, dtype, queries)
        for shape, dtype in ((REFERENCE[0], FP32), (REFERENCE[1], BF16), (REFERENCE[2], FP32))
        for queries in ("all", "class")
    ],
    cpu=[
        *((None, shape, BF16, queries) for shape in REFERENCE for queries in ("all", "class")),
        *((None, shape, FP32, "all") for shape in (*REFERENCE, *TILED)),
        *((None, (1, 577, 10, 2, 64), dtype, "all") for dtype in (FP32, BF16)),
        # many images in turn; more keys than a block of 48 or 24 rows is for
        (None, (70, 9, 3, 8, 16), FP32, "all"),
        *((None, (1, 1600, 9, 1, 16), FP32, queries) for queries in ("all", "class")),
    ],
    gpu=[
        *((None, shape, dtype, "all") for *shape, dtype in REAL),
        *((None, (4, 197, 50, 12, 64), dtype, "class") for dtype in (BF16, FP32)),
    ],
)
def test_shapes(execution, path, shape, dtype, queries):
    batch, tokens, _, heads, width = shape
    out, lse, d_qkv, _ = check(execution, *inputs(*shape, dtype=dtype), queries=queries)
    rows = 1 if queries == "class" else tokens
    assert out.shape == (batch, rows, heads * width) and lse.shape == (batch, heads, rows)
    assert not d_qkv[:, rows:, 0].any()


@each_path("reference", "interpreter", "cpu", "sdpa", "gpu")
def test_empty_batch(execution, path):
    qkv, kv = execution.moved(*inputs(0, 5, 3, 2, 16, dtype=FP32))
    out, lse, d_qkv, d_kv = results(prompt_attention, qkv, kv)
    assert out.shape == (0, 5, 32) and lse.shape == (0, 2, 5) and d_qkv.shape == (0, 5, 3, 2, 16)
    assert torch.equal(d_kv, torch.zeros_like(kv))


@each(OP, on=["interpreter", "cpu", "sdpa"])
def test_any_shape(execution):
    @examples(20)
    @given(
        batch=st.integers(1, 2),
        tokens=st.integers(1, 20),
        prompts=st.integers(0, 20),
        heads=st.integers(1, 2),
        width=st.integers(1, 20),
        sets=st.sampled_from(["shared", "per_image", "grouped"]),
        queries=st.sampled_from(["all", "class"]),
        weighted=st.booleans(),
        heads_placed=st.sampled_from([None, 1, 0]),
        windows=st.sampled_from([None, 1, 0]),
        scale=st.sampled_from([None, 1.0, -0.3]),
        causal=st.booleans(),
        dtype=st.sampled_from(execution.dtypes),
        path=st.sampled_from(["whole", "split"]),
        block_n=st.sampled_from([16, 32]),
        images=st.integers(1, 4),
    )
    def any_shape(
        batch,
        tokens,
        prompts,
        heads,
        width,
        sets,
        weighted,
        heads_placed,
        windows,
        dtype,
        path,
        block_n,
        images,
        **options,
    ):
        count = {"shared": 1, "per_image": batch, "grouped": 2}[sets]
        qkv, kv = inputs(batch, tokens, prompts, heads, width, count, dtype)
        if sets == "grouped":
            options["group"] = torch.arange(batch) % 2
        if weighted:
            weight = torch.linspace(-1, 2, count * prompts).view(count, prompts)
            options["log_multiplicity"] = weight
        windows = batch if windows == 0 else windows
        options |= places(tokens, heads if heads_placed == 0 else heads_placed, windows)
        with pytest.MonkeyPatch.context() as patch:
            force(patch, path, block_n, images)
            # of a few numbers in 16 bits another way to compute them may be lucky
            assert_as_defined(qkv, kv, **options)

    any_shape()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("queries", ["all", "class"])
@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("sharp", [1.0, 6.0])
def test_16_bits_against_plain_attention(dtype, queries, sets, sharp):
    """At most twice the error of PyTorch's attention in the same precision; also where queries are
    long, so that logits are large and a rounded one would show (5 times the error).
    """
    squares = torch.zeros(2, 3)
    for seed in range(4):
        qkv, kv = inputs(3, 50, 10, 3, 64, sets, dtype, seed)
        with torch.no_grad():
            qkv[:, :, 0] *= sharp
        truth = results(by_definition, qkv.double(), kv.double(), queries=queries)
        ours = results(prompt_attention, qkv, kv, queries=queries)
        theirs = results(sdpa, qkv, kv, queries=queries)
        assert ours[1].dtype == FP32
        assert error(ours[1], truth[1]) < 2e-3
        for row, got in enumerate((theirs, ours)):
            for column, i in enumerate((0, 2, 3)):
                assert got[i].dtype == dtype
                squares[row, column] += error(got[i], truth[i]) ** 2
    theirs, ours = squares.sqrt()
    assert (ours <= 2 * theirs).all(), ours / theirs


# ---- prompt sets

SETS = [(0, "all"), (3, "all"), (18, "class")]


@along(
    SETS,
    "prompts, queries",
    reference=SETS,
    cpu=SETS,
    sdpa=SETS,
    gpu=[(50, "all")],
)
def test_prompt_sets(execution, path, prompts, queries):
    """One per image; and three of which one is asked by nobody."""
    dtype, narrow = execution.pick(
        reference=(FP64, FP32), interpreter=(FP32, FP16), other=(BF16, BF16)
    )
    for tokens in execution.pick(gpu=(197, 577), other=(15,)):
        size = tokens, prompts, *execution.pick(gpu=(12, 64), other=(1, 16))
        check(execution, *inputs(2, *size, 2, dtype), queries=queries)
        group = torch.tensor([2, 0, 2])
        d_kv = check(execution, *inputs(3, *size, 3, narrow), group=group, queries=queries)[3]
        assert not d_kv[1].any()


@each_path("reference", "interpreter", "cpu", "sdpa", "gpu")
def test_group_in_pieces_of_memory(execution, path):
    for index in (torch.int64, torch.int32):
        group = torch.tensor([2, 9, 0, 9, 1, 9], dtype=index).to(execution.device)[::2]
        check(execution, *inputs(3, 15, 4, 1, 16, 3, FP32), group=group)


@each(OP, "images", interpreter=[1, 2, 3, 9])
def test_images_in_turn(execution, monkeypatch, images):
    """Programs that add the prompt gradients of several images; the last has fewer, or all."""
    force(monkeypatch, "whole", images=images)
    qkv, kv = inputs(3, 15, 18, 2, 16, dtype=FP32)
    check(execution, qkv[:, :, :, 1:], kv[:, :, :, 1:])
    check(execution, qkv[:, :, :, :1], kv[:, :4, :, :1], queries="class")


@each(OP, "path", interpreter=["whole", "split"], gpu=[None])
def test_sum_over_the_batch_is_in_fp32(execution, monkeypatch, path):
    """A large gradient, then many that are lost if the sum so far is rounded to 16 bits."""
    if path is not None:
        force(monkeypatch, path, images=9)
    qkv, kv = execution.moved(*inputs(1, 2, 2, 1, 16, dtype=FP16))
    qkv = qkv.expand(9, -1, -1, -1, -1).contiguous()
    d_out = torch.full((9, 2, 16), 2.0**-12, dtype=FP16, device=execution.device)
    d_out[0] = 1.0
    got = results(prompt_attention, qkv, kv, d_out)[3]
    exact = results(by_definition, qkv.double(), kv.double(), d_out.double())[3]
    assert error(got[:, :, 1], exact[:, :, 1]) < 8 * 2.0**-12 / 4  # values alone: no cancellation


# ---- the prompts' gradient alone

ALONE = [(18, 1, False), (16, 3, False), (18, 2, True), (0, 1, False)]


@along(
    ALONE,
    "prompts, sets, class_only",
    reference=ALONE,
    cpu=ALONE,
    sdpa=ALONE,
    gpu=[(50, sets, False) for sets in (1, 3, 2)],
)
def test_prompt_gradient_alone(execution, path, prompts, sets, class_only):
    """Also from the queries alone, which is all that the engine keeps of the first block."""
    dtype = execution.pick(interpreter=FP16, cpu=FP32, gpu=BF16, other=FP64)
    for tokens in execution.pick(gpu=(197, 577), other=(17,)):
        size = tokens, prompts, *execution.pick(gpu=(12, 64), other=(1, 16))
        qkv, kv = execution.moved(*inputs(2, *size, sets, dtype))
        group = torch.tensor([2, 0], device=execution.device) if sets == 3 else None
        out, lse = FWD(qkv, kv, group, 0.3, class_only, None, None, None)
        d_out = torch.randn(out.shape).to(out)
        _, expected = BWD(d_out, qkv, kv, group, 0.3, class_only, None, None, None, out, lse, True)
        for given_qkv in (qkv, qkv[:, :, :1].contiguous()):
            d_qkv, d_kv = BWD(
                d_out, given_qkv, kv, group, 0.3, class_only, None, None, None, out, lse, False
            )
            assert d_qkv.numel() == 0
            if execution.kind == "interpreter":
                assert torch.equal(d_kv, expected)
            else:  # another kernel, or other products
                assert error(d_kv, expected) < execution.pick(cpu=1e-6, gpu=1e-3, other=1e-13)


# ---- log multiplicity


@along(
    [(1, "all", FP32), (2, "all", FP16), (3, "class", FP32)],
    "sets, queries, dtype",
    reference=[(1, "all", FP64), (2, "all", FP32), (3, "class", FP32)],
    cpu=[(1, "all", BF16), (2, "all", FP32), (3, "class", BF16)],
    sdpa=[(1, "all", BF16), (2, "all", FP32), (3, "class", FP32)],
    gpu=[(1, "all", BF16)],
)
def test_log_multiplicity(execution, path, sets, queries, dtype):
    """Weights, masked prompts, and a whole masked first tile."""
    tokens, prompts, heads, width = execution.pick(gpu=(197, 50, 12, 64), other=(15, 20, 1, 16))
    qkv, kv = execution.moved(*inputs(2, tokens, prompts, heads, width, sets, dtype))
    group = torch.tensor([2, 0]) if sets == 3 else None
    weight = torch.randn(sets, prompts)
    weight[:, ::3] = -torch.inf
    weight[-1, :17] = -torch.inf
    options = {"group": group, "queries": queries}
    d_kv = check(execution, qkv, kv, log_multiplicity=weight, **options)[3]
    assert not d_kv[:, ::3].any() and not d_kv[-1, :17].any()
    wide = weight.double().t().contiguous().t()  # another dtype, and in pieces of memory
    again = check(execution, qkv, kv, log_multiplicity=wide, **options)[3]
    assert torch.equal(again, d_kv) or execution.kind == "reference"


# ---- what places add

PLACED = [  # heads of the bias, windows, prompt sets, queries
    (2, None, 1, "all"),
    (None, 2, 4, "all"),
    (1, 4, 2, "class"),
    (2, 2, 2, "all"),
]


@along(
    [(*case, (FP32, FP16)[i % 2]) for i, case in enumerate(PLACED)],
    "heads, windows, sets, queries, dtype",
    reference=[(*case, dtype) for case in PLACED for dtype in (FP64, FP32)],
    cpu=[(*case, dtype) for case in PLACED for dtype in (FP32, BF16)],
    sdpa=[(*case, FP32) for case in PLACED],
    gpu=[(*case, dtype) for case in PLACED for dtype in (BF16, FP32)],
)
def test_bias_and_mask(execution, path, heads, windows, sets, queries, dtype):
    """A bias of each head or of all, masks by window, and keys that are hidden for good; also given
    in another dtype, and in pieces of memory.
    """
    tokens, prompts, width = execution.pick(gpu=(197, 50, 64), other=(21, 5, 16))
    qkv, kv = execution.moved(*inputs(4, tokens, prompts, 2, width, sets, dtype))
    options = {"queries": queries, "group": torch.tensor([1, 0, 0, 1]) if sets == 2 else None}
    found = places(tokens, heads, windows)
    got = check(execution, qkv, kv, **options, **found)
    assert len(got) == 4
    apart = {name: t.double().mT.contiguous().mT for name, t in found.items()}
    again = check(execution, qkv, kv, **options, **apart)
    assert execution.kind == "reference" or torch.equal(again[2], got[2])


@each(OP, "dtype", reference=[FP64], interpreter=[FP16], cpu=[FP32], sdpa=[FP32])
def test_places_are_those_of_the_window(execution, dtype):
    """Each sample as if it were alone with its own mask."""
    qkv, kv = execution.moved(*inputs(6, 9, 3, 2, 16, 1, dtype))
    found = places(9, 2, 3)
    out = prompt_attention(qkv, kv, **found)[0]
    for i in range(6):
        own = {"bias": found["bias"], "mask": found["mask"][i % 3, None]}
        alone = prompt_attention(qkv[i : i + 1], kv, **own)[0]
        torch.testing.assert_close(out[i : i + 1], alone)
        if i % 3:
            own["mask"] = torch.zeros(1, 9, 9)
            assert error(prompt_attention(qkv[i : i + 1], kv, **own)[0], alone) > 0.1


def test_shared_gradient_is_summed_in_fp32():
    """Many images: a sum in 16 bits would stop growing."""
    qkv, kv = inputs(1, 4, 2, 1, 8, dtype=torch.bfloat16)
    many = qkv.expand(512, -1, -1, -1, -1).contiguous()
    d_out = torch.ones(512, 4, 8, dtype=torch.bfloat16)
    d_kv = results(prompt_attention, many, kv, d_out)[3]
    expected = results(by_definition, many.double(), kv.double(), d_out.double())[3]
    assert error(d_kv, expected) < 1e-2


# ---- what is particular to the Triton kernels


def vec(qkv, kv):
    """Entries that every load takes."""
    return kernels._common(Sizes.of(qkv, kv, False), qkv, kv, None).constants["VEC"]


@along(itertools.product([1, 4], [FP32, FP16]), "shift, dtype")
def test_unaligned_inputs(execution, path, shift, dtype):
    """Wide loads are promised only where every row starts at a multiple of 16 bytes."""

    def moved(t, by):
        return torch.cat([torch.full((by,), 7.0).to(t), t.flatten()])[by:].view(t.shape)

    qkv, kv = inputs(1, 9, 5, 2, 16, dtype=dtype)
    for by, kv_by in ((0, shift), (shift, 0), (shift, shift)):
        a, b = moved(qkv, by), moved(kv, kv_by)
        aligned = all(t.data_ptr() % 16 == 0 for t in (a, b))
        assert vec(a, b) == (16 // dtype.itemsize if aligned else 1)
        check(execution, a, b)


@each(OP, "dtype, most", interpreter=[(FP32, 4), (FP16, 8)])
def test_promised_width_of_loads(execution, dtype, most):
    vec = lambda qkv, kv: kernels._common(Sizes.of(qkv, kv, False), qkv, kv, None).constants["VEC"]
    qkv, kv = inputs(2, 17, 5, 2, 16, dtype=dtype)
    assert vec(qkv, kv) == most
    assert vec(LAYOUTS["heads_first"](qkv), kv) == most
    odd = inputs(2, 17, 5, 2, 15, dtype=dtype)
    assert vec(*odd) == 1  # rows of 15 entries
    wider = torch.zeros(*kv.shape[:-1], 17, dtype=dtype)[..., :16]
    assert vec(qkv, wider) == 1  # rows 17 entries apart


@each(OP, on=["interpreter"])
def test_rows_too_far_apart_are_copied(execution):
    """Offsets within an image are 32 bits wide in the kernels."""
    far = torch.empty_strided((2, 3, 3, 2, 16), (0, 2**29, 2**20, 16, 1), device="meta")
    assert kernels._readable(far) is far
    farther = torch.empty_strided((2, 3, 3, 2, 16), (0, 2**30, 2**20, 16, 1), device="meta")
    assert kernels._readable(farther).is_contiguous()


@each(OP, on=["interpreter"])
def test_grids_of_large_batches(execution, monkeypatch):
    """A GPU takes 2^31 programs along the first axis of a grid and 65535 along the others."""
    grids = []

    def keep(count, device, given, constants):
        grids.append(count)  # along the first axis, the only one

    for name in ("_forward", "_whole", "_queries", "_keys"):
        monkeypatch.setattr(kernels, name, keep)
    for dtype in (FP16, FP32):  # the whole backward, the split one
        qkv, kv = inputs(70_000, 1, 1, 2, 2, 70_000, dtype)
        out, lse = FWD(qkv, kv, None, 1.0, False, None, None, None)
        BWD(out, qkv, kv, None, 1.0, False, None, None, None, out, lse, True)
    assert len(grids) == 5  # forward and whole backward; forward and split backward
    assert all(140_000 <= count < 2**31 for count in grids)


# ---- what only a GPU can show


@each(OP, on=["gpu"])
def test_two_passes_agree_with_one(execution, monkeypatch):
    qkv, kv = execution.moved(*inputs(8, 197, 50, 12, 64, 1, BF16))
    assert tiles.backward_whole(qkv, 197) is not None
    one = results(prompt_attention, qkv, kv)
    monkeypatch.setattr(tiles, "backward_whole", lambda *_: None)
    two = check(execution, qkv, kv)
    for a, b in zip(one[2:], two[2:], strict=True):
        assert error(a, b) < 1e-2


@each(OP, on=["gpu"])
def test_work_follows_the_callers_stream(execution):
    """Inputs that the stream is still waiting for: a launch elsewhere would read NaN."""
    qkv, kv = execution.moved(*inputs(4, 197, 50, 12, 64, 1, BF16))
    expected = prompt_attention(qkv, kv)[0]
    with execution.late(qkv) as (late,):
        out = prompt_attention(late, kv)[0]
    assert torch.equal(out, expected)


@each(OP, on=["gpu"])
def test_a_captured_graph_follows_its_inputs(execution):
    qkv, kv = execution.moved(*inputs(4, 197, 50, 12, 64, 1, BF16))
    other, other_kv = execution.moved(*inputs(4, 197, 50, 12, 64, 1, BF16, seed=1))
    d_out = torch.randn(4, 197, 768).to(qkv)
    expected = results(prompt_attention, other, other_kv, d_out)
    graph, captured = execution.captured(lambda: results(prompt_attention, qkv, kv, d_out))
    qkv.copy_(other)
    kv.copy_(other_kv)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_another_gpu_than_the_current_one():
    qkv, kv = (t.to("cuda:1") for t in inputs(4, 197, 50, 12, 64, 1, BF16))
    with torch.cuda.device(0):
        got = results(prompt_attention, qkv, kv)
        xhat, _ = pointwise.layer_norm(qkv.flatten(2), 1e-6)
    assert all(t.device.index == 1 and t.isfinite().all() for t in (*got, xhat))
