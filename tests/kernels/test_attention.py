"""prompt_attention in every execution: the definition, its properties, its registration."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch.library import opcheck

from pae_kernels import backends, class_attention, pointwise, prompt_attention
from pae_kernels.attention import reference, tiles
from tests.errors import assert_rounded, error
from tests.kernels.executions import BF16, FP16, FP32, FP64, INTERPRETING, each
from tests.properties import examples

if INTERPRETING:
    from pae_kernels.attention import triton as kernels

OP = "prompt_attention"
FWD = torch.ops.pae.prompt_attention_fwd.default
BWD = torch.ops.pae.prompt_attention_bwd.default


def inputs(batch=3, tokens=7, prompts=4, heads=2, width=8, sets=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator, dtype=torch.float64)
    kv = torch.randn(sets, prompts, 2, heads, width, generator=generator, dtype=torch.float64)
    return qkv.to(dtype), kv.to(dtype)


def by_definition(qkv, kv, group=None, scale=None, queries="all", log_multiplicity=None):
    """The formula with every softmax written out, differentiable."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return reference.prompt_attention(qkv, kv, group, scale, queries == "class", log_multiplicity)


def results(function, qkv, kv, d_out=None, **options):
    """(out, lse, gradient of qkv, gradient of kv)."""
    qkv = qkv.detach().requires_grad_()
    kv = kv.detach().requires_grad_()
    out, lse = function(qkv, kv, **options)
    if d_out is None:
        generator = torch.Generator().manual_seed(9)
        d_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    grads = torch.autograd.grad(out, (qkv, kv), d_out)
    return [out.detach(), lse.detach(), *grads]


def assert_as_defined(qkv, kv, d_out=None, function=prompt_attention, **options):
    """Value and gradients equal those of the definition, computed in fp64, but for rounding."""
    got = results(function, qkv, kv, d_out, **options)
    wide = d_out if d_out is None else d_out.double()

    def definition():
        return results(by_definition, qkv.double(), kv.double(), wide, **options)

    assert_rounded(got, definition, qkv.dtype, ("out", "lse", "d_qkv", "d_kv"))
    return got


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
    dtype=st.sampled_from([torch.float64, torch.float32]),
    scale=st.sampled_from([None, 1.0, 0.3]),
    seed=st.integers(0, 99),
)
@example(1, 3, 3, 2, 17, "shared", "class", False, torch.float32, 1.0, 77)  # d_qkv cancels
def test_equals_the_definition(
    batch, tokens, prompts, heads, width, sets, queries, weighted, dtype, scale, seed
):
    count = {"shared": 1, "per_sample": batch, "grouped": 3}[sets]
    qkv, kv = inputs(batch, tokens, prompts, heads, width, count, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    options = {"queries": queries, "scale": scale}
    if sets == "grouped":
        options["group"] = torch.randint(3, (batch,), generator=generator)
    if weighted:
        options["log_multiplicity"] = torch.rand(count, prompts, generator=generator)
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


# ---- executions


def force(monkeypatch, backward, block_n=16, images=None):
    """Tiles of 16 rows, so that tiny inputs make several of them, and one of the two backwards."""
    small = tiles.Tile(16, block_n, 4, 1)
    whole = lambda qkv, rows: tiles.Tile(max(16, 1 << (rows - 1).bit_length()), block_n, 4, 1)
    monkeypatch.setattr(tiles, "forward", lambda qkv, rows: small)
    monkeypatch.setattr(tiles, "backward_split", lambda qkv, rows: small)
    monkeypatch.setattr(
        tiles, "backward_whole", whole if backward == "whole" else lambda qkv, rows: None
    )
    if images is not None:
        monkeypatch.setattr(tiles, "images_per_program", lambda qkv: images)


@pytest.fixture
def path(request, monkeypatch):
    """Which of the two backwards, on small tiles; None: what the table of tiles says."""
    if request.param is not None:
        force(monkeypatch, request.param)
    return request.param


def each_path(*kinds):
    """A test of these executions, in the interpreter on both backwards."""
    paths = {kind: ["whole", "split"] if kind == "interpreter" else [None] for kind in kinds}
    return each(OP, "path", through=["path"], **paths)


def along(interpreter=(), names="", **cases):
    """The same with cases: those of the interpreter on both backwards."""
    single = [c if isinstance(c, tuple) else (c,) for c in interpreter]
    cases = {
        k: [(None, *(c if isinstance(c, tuple) else (c,))) for c in v] for k, v in cases.items()
    }
    both = [(path, *case) for case in single for path in ("whole", "split")]
    return each(OP, f"path, {names}", through=["path"], interpreter=both, **cases)


def sdpa(qkv, kv, group=None, scale=None, queries="all", log_multiplicity=None):
    """PyTorch's attention over concatenated keys, and nothing for the log-sum-exp."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q = q[:, :, :1] if queries == "class" else q
    k_p, v_p = reference.take_groups(kv, group, len(qkv)).permute(2, 0, 3, 1, 4)
    mask = None
    if log_multiplicity is not None:
        mask = reference.take_groups(log_multiplicity, group, len(qkv))
        mask = F.pad(mask, (0, k.shape[2]))[:, None, None].to(q.dtype)
        mask = mask.expand(-1, q.shape[1], q.shape[2], -1)
    out = F.scaled_dot_product_attention(
        q, torch.cat([k_p, k], dim=2), torch.cat([v_p, v], dim=2), attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2).flatten(2), out[..., 0]


def check(execution, qkv, kv, d_out=None, **options):
    """Results of a version, after comparing them with the definition in fp64."""
    if execution.kind == "reference":
        return assert_as_defined(qkv, kv, d_out=d_out, **options)
    qkv, kv, d_out = (t if t is None else t.to(execution.device) for t in (qkv, kv, d_out))
    for name in ("group", "log_multiplicity"):
        if options.get(name) is not None:
            options[name] = options[name].to(execution.device)
    plain = execution.pick(interpreter=by_definition, gpu=sdpa)
    got = results(prompt_attention, qkv, kv, d_out, **options)
    theirs = results(plain, qkv, kv, d_out, **options)
    d_wide = None if d_out is None else d_out.double()
    exact = results(by_definition, qkv.double(), kv.double(), d_wide, **options)
    for i, name in ((0, "out"), (2, "d_qkv"), (3, "d_kv")):
        execution.assert_as_exact(got[i], theirs[i], exact[i], name)
    # fp32 sums of products in the inputs' own precision, whatever that is
    assert got[1].dtype == FP32
    if execution.kind == "gpu":
        assert exact[1].numel() == 0 or error(got[1], exact[1]) < 3e-5
    else:
        torch.testing.assert_close(got[1], exact[1].float(), rtol=2e-6, atol=2e-6)
    return got


# (batch, tokens, prompts, heads, width): keys fill tiles of 16 exactly, by one more or one less;
# a tile straddles prompts and image rows, or prompts fill tiles of their own
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


@each_path("reference", "interpreter", "gpu")
def test_empty_batch(execution, path):
    qkv, kv = execution.moved(*inputs(0, 5, 3, 2, 16, dtype=FP32))
    out, lse, d_qkv, d_kv = results(prompt_attention, qkv, kv)
    assert out.shape == (0, 5, 32) and lse.shape == (0, 2, 5) and d_qkv.shape == (0, 5, 3, 2, 16)
    assert torch.equal(d_kv, torch.zeros_like(kv))


@each(OP, on=["interpreter"])
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
        scale=st.sampled_from([None, 1.0, -0.3]),
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
        with pytest.MonkeyPatch.context() as patch:
            force(patch, path, block_n, images)
            check(execution, qkv, kv, **options)

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
    gpu=[(50, "all")],
)
def test_prompt_sets(execution, path, prompts, queries):
    """One per image; and three of which one is asked by nobody."""
    dtype, narrow = execution.pick(
        reference=(FP64, FP32), interpreter=(FP32, FP16), gpu=(BF16, BF16)
    )
    for tokens in execution.pick(gpu=(197, 577), other=(15,)):
        size = tokens, prompts, *execution.pick(gpu=(12, 64), other=(1, 16))
        check(execution, *inputs(2, *size, 2, dtype), queries=queries)
        group = torch.tensor([2, 0, 2])
        d_kv = check(execution, *inputs(3, *size, 3, narrow), group=group, queries=queries)[3]
        assert not d_kv[1].any()


@each_path("reference", "interpreter", "gpu")
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
    gpu=[(50, sets, False) for sets in (1, 3, 2)],
)
def test_prompt_gradient_alone(execution, path, prompts, sets, class_only):
    """Also from the queries alone, which is all that the engine keeps of the first block."""
    dtype = execution.pick(reference=FP64, interpreter=FP16, gpu=BF16)
    for tokens in execution.pick(gpu=(197, 577), other=(17,)):
        size = tokens, prompts, *execution.pick(gpu=(12, 64), other=(1, 16))
        qkv, kv = execution.moved(*inputs(2, *size, sets, dtype))
        group = torch.tensor([2, 0], device=execution.device) if sets == 3 else None
        out, lse = FWD(qkv, kv, group, 0.3, class_only, None)
        d_out = torch.randn(out.shape).to(out)
        _, expected = BWD(d_out, qkv, kv, group, 0.3, class_only, None, out, lse, True)
        for given_qkv in (qkv, qkv[:, :, :1].contiguous()):
            d_qkv, d_kv = BWD(d_out, given_qkv, kv, group, 0.3, class_only, None, out, lse, False)
            assert d_qkv.numel() == 0
            if execution.kind == "interpreter":
                assert torch.equal(d_kv, expected)
            else:  # another kernel, or other products
                assert error(d_kv, expected) < execution.pick(reference=1e-13, gpu=1e-3)


# ---- log multiplicity


@along(
    [(1, "all", FP32), (2, "all", FP16), (3, "class", FP32)],
    "sets, queries, dtype",
    reference=[(1, "all", FP64), (2, "all", FP32), (3, "class", FP32)],
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


def test_shared_gradient_is_summed_in_fp32():
    """Many images: a sum in 16 bits would stop growing."""
    qkv, kv = inputs(1, 4, 2, 1, 8, dtype=torch.bfloat16)
    many = qkv.expand(512, -1, -1, -1, -1).contiguous()
    d_out = torch.ones(512, 4, 8, dtype=torch.bfloat16)
    d_kv = results(prompt_attention, many, kv, d_out)[3]
    expected = results(by_definition, many.double(), kv.double(), d_out.double())[3]
    assert error(d_kv, expected) < 1e-2


# ---- properties


def exactly(execution):
    """(dtype, tolerance) where two ways to the same result are compared."""
    return execution.pick(reference=(FP64, 1e-13), other=(FP32, 1e-6))


PROPERTY = "reference", "interpreter"


@each_path(*PROPERTY)
def test_order_of_prompts_does_not_matter(execution, path):
    dtype, tolerance = exactly(execution)
    qkv, kv = inputs(1, 17, 18, 1, 16, dtype=dtype)
    order = torch.randperm(18)
    out, lse, d_qkv, d_kv = results(prompt_attention, qkv, kv)
    permuted = results(prompt_attention, qkv, kv[:, order])
    for a, b in zip(permuted, (out, lse, d_qkv, d_kv[:, order]), strict=True):
        assert error(a, b) < tolerance


@each_path(*PROPERTY)
def test_prompts_may_come_in_two_sets(execution, path):
    """Attention over two sets of prompts from that over each, by their shares of the softmax."""
    dtype, tolerance = exactly(execution)
    qkv, kv = inputs(1, 17, 18, 1, 16, dtype=dtype)
    heads = lambda out: out.view(1, 17, 1, 16).transpose(1, 2).double()
    whole, lse = prompt_attention(qkv, kv)
    parts = [(1, kv[:, :7]), (1, kv[:, 7:]), (-1, kv[:, :0])]  # image rows are counted twice
    mixed = 0
    for sign, part in parts:
        out, lse_part = prompt_attention(qkv, part)
        mixed += sign * (lse_part - lse).double()[..., None].exp() * heads(out)
    assert error(mixed, heads(whole)) < 3 * tolerance


@each_path(*PROPERTY)
def test_shared_equals_expanded(execution, path):
    dtype, tolerance = exactly(execution)
    qkv, kv = inputs(2, 17, 18, 1, 16, dtype=dtype)
    shared = results(prompt_attention, qkv, kv)
    expanded = results(prompt_attention, qkv, kv.expand(2, -1, -1, -1, -1))
    group = torch.ones(2, dtype=torch.int64)
    grouped = results(prompt_attention, qkv, kv.expand(2, -1, -1, -1, -1), group=group)
    for other in (expanded, grouped):
        for a, b in zip(other[:3], shared[:3], strict=True):
            assert error(a, b) < execution.pick(reference=tolerance, other=1e-300)  # the same bits
        assert error(other[3].sum(0, keepdim=True), shared[3]) < tolerance
    assert not grouped[3][0].any()  # nobody reads set 0


@along(["all", "class"], "queries", reference=["all", "class"])
def test_no_prompts_is_plain_attention(execution, path, queries):
    dtype, tolerance = exactly(execution)
    qkv, kv = inputs(1, 33, 0, 1, 16, dtype=dtype)
    out, _, d_qkv, d_kv = results(prompt_attention, qkv, kv, queries=queries)
    expected = results(sdpa, qkv.double(), kv.double(), queries=queries)
    assert error(out, expected[0]) < tolerance
    assert error(d_qkv, expected[2]) < tolerance
    assert d_kv.shape == kv.shape


COPIES = list(itertools.product([1, 2, 7], ["all", "class"]))


@along(
    [(times, "all") for times in (1, 2, 7)],
    "times, queries",
    reference=COPIES,
)
def test_log_multiplicity_stands_for_copies(execution, path, times, queries):
    dtype, tolerance = exactly(execution)
    qkv, kv = inputs(1, 17, 3, 1, 16, dtype=dtype)
    copies = results(prompt_attention, qkv, kv.repeat_interleave(times, dim=1), queries=queries)
    weight = torch.full((1, 3), float(times), dtype=dtype).log()
    once = results(prompt_attention, qkv, kv, log_multiplicity=weight, queries=queries)
    for a, b in zip(once[:3], copies[:3], strict=True):
        assert error(a, b) < tolerance
    assert error(once[3], copies[3].unflatten(1, (3, times)).sum(2)) < tolerance


@along(["all"], "queries", reference=["all", "class"])
def test_minus_infinity_masks_a_prompt(execution, path, queries):
    dtype, tolerance = exactly(execution)
    qkv, kv = inputs(1, 17, 18, 1, 16, dtype=dtype)
    mask = torch.zeros(1, 18, dtype=dtype)
    mask[:, 1::2] = -torch.inf
    masked = results(prompt_attention, qkv, kv, log_multiplicity=mask, queries=queries)
    kept = results(prompt_attention, qkv, kv[:, ::2], queries=queries)
    for a, b in zip(masked[:3], kept[:3], strict=True):
        assert error(a, b) < tolerance
    assert error(masked[3][:, ::2], kept[3]) < tolerance
    assert not masked[3][:, 1::2].any()
    everything = torch.full_like(mask, -torch.inf)
    nothing = results(prompt_attention, qkv, kv, log_multiplicity=everything, queries=queries)
    plain = results(prompt_attention, qkv, kv[:, :0], queries=queries)
    for a, b in zip(nothing[:3], plain[:3], strict=True):
        assert error(a, b) < tolerance
    assert not nothing[3].any()


def test_attention_weights_sum_to_one():
    qkv, kv = inputs(dtype=torch.float32)
    qkv[:, :, 2], kv[:, :, 1] = 1.0, 1.0
    out, _ = prompt_attention(qkv, kv)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)


def test_class_query_is_the_first_row():
    qkv, kv = inputs()
    everything, lse = prompt_attention(qkv, kv)
    first, lse_first = prompt_attention(qkv, kv, queries="class")
    assert error(first, everything[:, :1]) < 1e-13
    assert error(lse_first, lse[..., :1]) < 1e-13
    d_qkv = results(prompt_attention, qkv, kv, queries="class")[2]
    assert torch.equal(d_qkv[:, 1:, 0], torch.zeros_like(d_qkv[:, 1:, 0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sets, group", [(1, None), (3, None), (2, (1, 0, 1))])
@pytest.mark.parametrize("queries", ["all", "class"])
def test_class_attention_is_the_first_row_of_the_softmax(queries, sets, group, weighted, dtype):
    """Shown by values that name their key: the output is then the row itself."""
    qkv, kv = inputs(3, 5, 3, 2, 8, sets, dtype)  # 3 + 5 keys of width 8
    qkv[:, :, 2], kv[:, :, 1] = torch.eye(8)[3:, None], torch.eye(8)[:3, None]
    options = {"scale": 0.7, "group": None if group is None else torch.tensor(group)}
    if weighted:
        options["log_multiplicity"] = torch.tensor([[0.5, -torch.inf, 2.0]]).expand(sets, 3)
    out, lse = prompt_attention(qkv, kv, queries=queries, **options)
    weights = class_attention(qkv, kv, lse, **options)
    assert weights.shape == (3, 2, 8) and weights.dtype == lse.dtype
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-6  # lse of rounded logits
    torch.testing.assert_close(
        weights, out[:, 0].view(3, 2, 8).to(lse.dtype), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(
        weights.sum(-1), torch.ones_like(lse[..., 0]), rtol=0, atol=tolerance
    )
    if weighted:
        assert not weights[..., 1].any()


@each(OP, on=["reference", "gpu"])
def test_class_attention_ranks_16_bit_rows_as_fp64_does(execution):
    """Logits rounded to 16 bits would tie; products of 16-bit entries in fp32 do not."""
    prompts, heads = execution.pick(reference=(10, 3), gpu=(50, 12))
    qkv, kv = execution.moved(*inputs(4, 197, prompts, heads, 64, dtype=BF16))
    weights = class_attention(qkv, kv, prompt_attention(qkv, kv)[1])
    wide = qkv.double(), kv.double()
    exact = class_attention(*wide, by_definition(*wide)[1])
    top = lambda w: w[..., prompts:].mean(1).topk(10).indices
    assert torch.equal(top(weights), top(exact))
    assert execution.kind == "reference" or error(weights, exact) < 1e-4


def test_class_attention_carries_no_gradient():
    qkv, kv = inputs()
    _, lse = prompt_attention(qkv.requires_grad_(), kv)
    assert not class_attention(qkv, kv, lse).requires_grad


def test_class_attention_of_another_shape():
    qkv, kv = inputs()
    with pytest.raises(ValueError, match=r"lse must be \(3, 2, 7\) or \(3, 2, 1\), got \(3, 7\)"):
        class_attention(qkv, kv, torch.zeros(3, 7))
    with pytest.raises(ValueError, match="kv_prompt must be"):
        class_attention(qkv, kv[..., :4], torch.zeros(3, 2, 7))


@along(
    itertools.product([30.0, 1000.0], [0.0, -300.0]),
    "size, shift",
    reference=itertools.product([30.0, 1000.0], [0.0, -300.0]),
)
def test_large_logits(execution, path, size, shift):
    """No overflow where the log-sum-exp is far from 0: padding keys have logit 0 all the same."""
    qkv, kv = inputs(1, 18, 3, 1, 16, dtype=FP32)
    qkv, kv = qkv * size**0.5, kv * size**0.5
    qkv[..., 0] = 1.0
    qkv[:, :, 1, :, 0] = kv[:, :, 0, :, 0] = shift * 4  # adds `shift` to every logit
    if execution.kind == "reference":
        check(execution, qkv, kv)
        return
    got = results(prompt_attention, qkv, kv)
    exact = results(by_definition, qkv.double(), kv.double())
    for a, b in zip(got, exact, strict=True):
        assert error(a, b) < 1e-6 * (size + abs(shift))


# ---- layouts


LAYOUTS = {
    "views_of_a_product": lambda t: t.flatten(2).view(t.shape),
    "heads_first": lambda t: t.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4),
    "width_before_heads": lambda t: t.transpose(3, 4).contiguous().transpose(3, 4),
    "tokens_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "every_second_entry": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "offset": lambda t: torch.cat([t[:, :2] + 1, t, t[:, :1]], dim=1)[:, 2 : 2 + t.shape[1]],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@along(LAYOUTS, "layout", reference=LAYOUTS, gpu=LAYOUTS)
def test_layouts_of_the_inputs(execution, path, layout):
    """Offsets, transposed storage, inner strides that are not 1: read as they lie, or copied."""
    arrange = LAYOUTS[layout]
    size = execution.pick(
        reference=(3, 7, 4, 2, 8, 1), other=(2, 9, 5, 2, 16, 2), gpu=(3, 197, 20, 12, 64, 3)
    )
    for dtype in execution.pick(reference=(FP64, FP32), interpreter=(FP32,), gpu=(BF16,)):
        qkv, kv = execution.moved(*inputs(*size, dtype=dtype))
        arranged = [(arrange(qkv), kv)]
        if layout != "offset":  # would change the number of prompts
            arranged += [(qkv, arrange(kv)), (arrange(qkv), arrange(kv))]
        for pair in arranged[: execution.pick(reference=3, other=2)]:
            for queries in execution.pick(reference=("all", "class"), other=("all",)):
                check(execution, *pair, queries=queries)
        if execution.kind == "reference":
            check(execution, arrange(qkv), kv[:, :0])


GRADIENTS = {
    "expanded": lambda t: t[:1, :1, :1].expand(t.shape),
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every_second_entry": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "batch_last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


@along(GRADIENTS, "layout", reference=GRADIENTS, gpu=GRADIENTS)
def test_layouts_of_the_gradient(execution, path, layout):
    size = execution.pick(
        reference=(3, 7, 4, 2, 8, 1), interpreter=(2, 9, 5, 2, 16, 1), gpu=(3, 197, 20, 12, 64, 1)
    )
    dtype = execution.pick(reference=FP64, interpreter=FP32, gpu=BF16)
    qkv, kv = execution.moved(*inputs(*size, dtype=dtype))
    d_out = torch.randn(size[0], size[1], size[3] * size[4]).to(qkv)
    for prompts in execution.pick(reference=(kv, kv[:, :0]), other=(kv,)):
        check(execution, qkv, prompts, GRADIENTS[layout](d_out))


@each_path("reference", "interpreter")
def test_inputs_are_not_changed(execution, path):
    qkv, kv = inputs(2, 17, 5, 2, 16, dtype=FP32)
    weight = torch.rand(1, 5)
    before = [t.clone() for t in (qkv, kv, weight)]
    results(prompt_attention, qkv, kv, log_multiplicity=weight)
    for a, b in zip((qkv, kv, weight), before, strict=True):
        assert torch.equal(a, b)


@along(
    [(17,)],
    "tokens",
    reference=[50],
    gpu=[197, 577],
)
def test_bitwise_the_same_on_every_run(execution, path, tokens, poisoned_memory):
    """A race or an entry that nobody writes would show as another bit, or as NaN."""
    size, dtype = execution.pick(
        reference=((4, tokens, 10, 3, 64, 2), FP32),
        interpreter=((2, tokens, 18, 1, 16, 2), FP16),
        gpu=((32, tokens, 50, 12, 64, 1), BF16),
    )
    qkv, kv = execution.moved(*inputs(*size, dtype=dtype))
    group = None if size[-1] == 1 else (torch.arange(len(qkv)) + 1) % 2
    first = None
    for _ in execution.runs():
        again = results(prompt_attention, qkv, kv, group=group)
        first = first or again
        assert all(t.isfinite().all() for t in again)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", ["all", "class"])
@pytest.mark.parametrize("sets", [1, 2, 3])
def test_every_entry_is_written(poisoned_memory, sets, queries, dtype):
    qkv, kv = inputs(sets=sets, dtype=dtype)
    options = {"queries": queries}
    if sets == 2:
        options["group"] = torch.tensor([1, 1, 1])
    for got in results(prompt_attention, qkv, kv, **options):
        assert torch.isfinite(got).all()


# ---- autograd and registration


@pytest.mark.parametrize("queries", ["all", "class"])
@pytest.mark.parametrize("sets, group", [(1, None), (3, None), (2, (1, 0, 1))])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(sets, group, queries, weighted):
    qkv, kv = inputs(3, 3, 2, 2, 3, sets)
    group = None if group is None else torch.tensor(group)
    weight = torch.rand(sets, 2, dtype=torch.float64) if weighted else None
    function = lambda qkv, kv: prompt_attention(
        qkv, kv, group, queries=queries, log_multiplicity=weight
    )[0]
    assert torch.autograd.gradcheck(function, (qkv.requires_grad_(), kv.requires_grad_()))


@pytest.mark.parametrize("wanted", ["qkv", "kv"])
def test_gradient_of_one_input_alone(wanted):
    """Image keys and values are not read for the prompts' gradient, and none is made for them."""
    qkv, kv = inputs()
    both = results(prompt_attention, qkv, kv, torch.ones(3, 7, 16, dtype=torch.float64))
    x = (qkv if wanted == "qkv" else kv).requires_grad_()
    out, _ = prompt_attention(qkv, kv)
    (alone,) = torch.autograd.grad(out.sum(), x)
    assert error(alone, both[2 if wanted == "qkv" else 3]) < 1e-13
    out, lse = FWD(qkv, kv, None, 1.0, False, None)
    queries_alone = torch.full_like(qkv, torch.nan)
    queries_alone[:, :, 0] = qkv.detach()[:, :, 0]
    d_qkv, d_kv = BWD(out, queries_alone, kv, None, 1.0, False, None, out, lse, False)
    assert d_qkv.numel() == 0
    assert torch.isfinite(d_kv).all()


def test_log_sum_exp_carries_no_gradient():
    qkv, kv = inputs()
    _, lse = prompt_attention(qkv.requires_grad_(), kv)
    assert not lse.requires_grad


def test_no_second_derivative():
    qkv, kv = inputs()
    out, _ = prompt_attention(qkv.requires_grad_(), kv)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_registered_autograd_equals_the_eager_one():
    """Under torch.compile the op is called itself; its registered gradient is the same pair."""
    qkv, kv = inputs()
    eager = results(prompt_attention, qkv, kv)
    registered = results(lambda q, k: FWD(q, k, None, 8**-0.5, False, None), qkv, kv)
    for a, b in zip(registered, eager, strict=True):
        assert torch.equal(a, b)


def test_compiled_whole():
    qkv, kv = inputs(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(prompt_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, qkv, kv), results(prompt_attention, qkv, kv), strict=True):
        assert error(a, b) < 1e-6


OPTIONS = itertools.product(
    ["heads_first", "width_before_heads"], [1, 2, 3], [True, False], [FP32, BF16]
)
FEW = itertools.product(
    ["heads_first", "width_before_heads"], [(1, False), (2, True), (3, False)], [FP16]
)


@each(
    OP,
    "layout, sets, class_only, dtype",
    reference=OPTIONS,
    interpreter=[(layout, *which, dtype) for layout, which, dtype in FEW],
)
def test_opcheck(execution, layout, sets, class_only, dtype):
    """Schema, fake tensors (shapes, strides, dtypes) and autograd registration."""
    qkv, kv = inputs(tokens=3, sets=sets, dtype=dtype)
    qkv = LAYOUTS[layout](qkv)
    group = torch.tensor([1, 0, 1]) if sets == 2 else None
    weight = torch.rand(sets, 4, dtype=dtype) if execution.kind == "reference" else None
    out, lse = FWD(qkv, kv, group, 1.0, class_only, weight)
    quick = ("test_schema", "test_faketensor")
    for need_qkv in (True, False):
        args = (out, qkv, kv, group, 1.0, class_only, weight, out, lse, need_qkv)
        opcheck(BWD, args, test_utils=quick)
    if execution.kind == "reference":
        qkv, kv = qkv.requires_grad_(), kv.requires_grad_()
        quick = (*quick, "test_autograd_registration")
    opcheck(FWD, (qkv, kv, group, 1.0, class_only, weight), test_utils=quick)


def test_opcheck_with_dynamic_shapes():
    qkv, kv = inputs(dtype=torch.float32)
    opcheck(FWD, (qkv.requires_grad_(), kv.requires_grad_(), None, 1.0, False, None))


# ---- arguments and choice of version


BAD = {
    "qkv is flat": (lambda q, k: {"qkv": q.flatten(2)}, "qkv must be a float tensor"),
    "qkv holds integers": (lambda q, k: {"qkv": q.long()}, "qkv must be a float tensor.*int64"),
    "qkv has two parts": (lambda q, k: {"qkv": q[:, :, :2]}, "qkv must be .*3, H, d"),
    "qkv has no rows": (lambda q, k: {"qkv": q[:, :0]}, "qkv must have at least one row"),
    "kv has three parts": (lambda q, k: {"kv_prompt": q}, r"kv_prompt must be \(G, P, 2, 2, 8\)"),
    "kv has other heads": (lambda q, k: {"kv_prompt": k[:, :, :, :1]}, "kv_prompt must be"),
    "kv has another width": (lambda q, k: {"kv_prompt": k[..., :4]}, "kv_prompt must be"),
    "kv is wider": (lambda q, k: {"kv_prompt": k.float()}, "kv_prompt must be like qkv.*float32"),
    "group is needed": (lambda q, k: {"kv_prompt": k.expand(2, -1, -1, -1, -1)}, "group is needed"),
    "group is short": (
        lambda q, k: {"group": torch.zeros(2).long()},
        "group must be int32 or int64",
    ),
    "group is float": (
        lambda q, k: {"group": torch.zeros(3)},
        "group must be int32 or int64.*float32",
    ),
    "queries": (lambda q, k: {"queries": "first"}, "queries must be 'all' or 'class', got 'first'"),
    "weights": (
        lambda q, k: {"log_multiplicity": torch.zeros(4)},
        r"log_multiplicity must be float \(1, 4\) on cpu, got \(4,\)",
    ),
    "weights are integers": (
        lambda q, k: {"log_multiplicity": torch.zeros(1, 4).long()},
        "log_multiplicity must be float.*int64",
    ),
    "weights are elsewhere": (
        lambda q, k: {"log_multiplicity": torch.zeros(1, 4, device="meta")},
        "log_multiplicity must be float.* on cpu, got .* on meta",
    ),
    "group is elsewhere": (
        lambda q, k: {"group": torch.zeros(3, device="meta").long()},
        "group must be int32 or int64 .* on cpu, got .* on meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    change, message = BAD[case]
    qkv, kv = inputs()
    arguments = {"qkv": qkv, "kv_prompt": kv, **change(qkv, kv)}
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        prompt_attention(arguments.pop("qkv"), arguments.pop("kv_prompt"), **arguments)
    assert "\n" not in str(caught.value)


def test_the_reference_runs_on_the_cpu(monkeypatch):
    calls = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *a: calls.append(1) or forward(*a))
    prompt_attention(*inputs())
    assert calls == [1]
    assert backends.choose("prompt_attention", "cpu") is reference


def test_forced_versions(monkeypatch):
    qkv, kv = inputs()
    monkeypatch.setenv("PAE_BACKEND", "reference")
    prompt_attention(qkv, kv)
    monkeypatch.setenv("PAE_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="PAE_BACKEND=cuda cannot run prompt_attention on cpu"):
        prompt_attention(qkv, kv)
    monkeypatch.setenv("PAE_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"PAE_BACKEND must be auto or one of .*got 'fastest'"):
        prompt_attention(qkv, kv)


@each_path("interpreter", "gpu")
def test_the_kernels_run(execution, path, monkeypatch):
    """The public op reaches them, and the reference is not asked."""
    calls = []
    chosen = backends.choose(OP, execution.device, FP16)
    for direction in ("forward", "backward"):
        run = getattr(chosen, direction)
        monkeypatch.setattr(
            chosen, direction, lambda *a, d=direction, run=run: calls.append(d) or run(*a)
        )
        monkeypatch.setattr(reference, direction, None)
    results(prompt_attention, *execution.moved(*inputs(width=16, dtype=FP32)))
    assert calls == ["forward", "backward"]
    monkeypatch.delenv("PAE_BACKEND")  # preferred also when nobody asks for it
    for dtype in execution.dtypes:
        assert backends.choose(OP, execution.device, dtype) is chosen
    assert backends.choose(OP, execution.device, FP64) is reference


# ---- what is particular to the Triton kernels


@along(itertools.product([1, 4], [FP32, FP16]), "shift, dtype")
def test_unaligned_inputs(execution, path, shift, dtype):
    """Wide loads are promised only where every row starts at a multiple of 16 bytes."""

    def moved(t, by):
        return torch.cat([torch.full((by,), 7.0).to(t), t.flatten()])[by:].view(t.shape)

    qkv, kv = inputs(1, 9, 5, 2, 16, dtype=dtype)
    for by, kv_by in ((0, shift), (shift, 0), (shift, shift)):
        a, b = moved(qkv, by), moved(kv, kv_by)
        aligned = all(t.data_ptr() % 16 == 0 for t in (a, b))
        assert kernels._common(a, b, None, None)["VEC"] == (16 // dtype.itemsize if aligned else 1)
        check(execution, a, b)


@each(OP, "dtype, most", interpreter=[(FP32, 4), (FP16, 8)])
def test_promised_width_of_loads(execution, dtype, most):
    vec = lambda qkv, kv: kernels._common(qkv, kv, None, None)["VEC"]
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

    class Launcher:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("fwd", "bwd", "bwd_dq", "bwd_dkv"):
        monkeypatch.setattr(kernels, f"prompt_attention_{name}_kernel", Launcher())
    monkeypatch.setattr(kernels, "tiles", SimpleNamespace(**vars(tiles)))
    for dtype in (FP16, FP32):  # the whole backward, the split one
        qkv, kv = inputs(70_000, 1, 1, 2, 2, 70_000, dtype)
        out, lse = FWD(qkv, kv, None, 1.0, False, None)
        BWD(out, qkv, kv, None, 1.0, False, None, out, lse, True)
    assert len(grids) == 5  # forward and whole backward; forward and split backward
    for grid in grids:
        assert grid[0] >= 140_000 and all(size <= 65_535 for size in grid[1:])


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
