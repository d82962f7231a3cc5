"""prompt_attention's Triton kernels against the definition in fp64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from pae_kernels import backends, prompt_attention
from pae_kernels.attention import reference, tiles
from pae_kernels.attention import triton as kernels
from tests.kernels.interpreted.conftest import as_exact_as
from tests.kernels.test_attention import (
    BWD,
    FWD,
    GRADIENTS,
    LAYOUTS,
    by_definition,
    inputs,
    results,
)
from tests.tiny import error

DTYPES = [torch.float32, torch.float16]  # the interpreter multiplies bf16 wrongly


def force(monkeypatch, backward: str, block_n: int = 16, images: int | None = None) -> None:
    """Tiles of 16 rows, so that tiny inputs make several of them, and one of the two backwards."""
    small = tiles.Tile(16, block_n, 4, 1)
    whole = lambda qkv, rows: tiles.Tile(max(16, triton.next_power_of_2(rows)), block_n, 4, 1)
    monkeypatch.setattr(tiles, "forward", lambda qkv, rows: small)
    monkeypatch.setattr(tiles, "backward_split", lambda qkv, rows: small)
    monkeypatch.setattr(
        tiles, "backward_whole", whole if backward == "whole" else lambda qkv, rows: None
    )
    if images is not None:
        monkeypatch.setattr(tiles, "images_per_program", lambda qkv: images)


@pytest.fixture(params=["whole", "split"])
def backward(request, monkeypatch) -> str:
    """Both backwards, on small tiles."""
    force(monkeypatch, request.param)
    return request.param


def check(qkv, kv, d_out=None, **options) -> list[torch.Tensor]:
    """Results of the kernels, after comparing them with the definition."""
    got = results(prompt_attention, qkv, kv, d_out, **options)
    plain = results(by_definition, qkv, kv, d_out, **options)
    d_wide = None if d_out is None else d_out.double()
    exact = results(by_definition, qkv.double(), kv.double(), d_wide, **options)
    for i in (0, 2, 3):
        as_exact_as(got[i], plain[i], exact[i])
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[1], exact[1].float(), rtol=2e-6, atol=2e-6)
    return got


# ---- shapes

# (batch, tokens, prompts, heads, width): keys fill tiles of 16 exactly, by one more or one less;
# a tile straddles prompts and image rows, or prompts fill tiles of their own
SHAPES = [
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backward, shape):
    """Each backward sees every other shape in fp16."""
    dtype = DTYPES[(SHAPES.index(shape) + (backward == "whole")) % 2]
    check(*inputs(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 50, 10, 1, 64), (1, 20, 5, 1, 80)], ids=str)
def test_tiles_that_ship(shape, dtype):
    """The table's own tiles: in 16 bits and up to 64 wide whole, else split."""
    check(*inputs(*shape, dtype=dtype))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[5], SHAPES[4]], ids=str)
def test_class_query(backward, shape):
    dtype = DTYPES[(SHAPES.index(shape) + (backward == "whole")) % 2]
    d_qkv = check(*inputs(*shape, dtype=dtype), queries="class")[2]
    assert not d_qkv[:, 1:, 0].any()


def test_empty_batch(backward):
    out, lse, d_qkv, d_kv = results(
        prompt_attention, *inputs(0, 5, 3, 2, 16, 1, dtype=torch.float32)
    )
    assert out.shape == (0, 5, 32) and lse.shape == (0, 2, 5) and d_qkv.shape == (0, 5, 3, 2, 16)
    assert torch.equal(d_kv, torch.zeros(1, 3, 2, 2, 16))


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
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
    dtype=st.sampled_from(DTYPES),
    path=st.sampled_from(["whole", "split"]),
    block_n=st.sampled_from([16, 32]),
    images=st.integers(1, 4),
)
def test_any_shape(
    monkeypatch,
    batch,
    tokens,
    prompts,
    heads,
    width,
    sets,
    queries,
    weighted,
    scale,
    dtype,
    path,
    block_n,
    images,
):
    force(monkeypatch, path, block_n, images)
    count = {"shared": 1, "per_image": batch, "grouped": 2}[sets]
    qkv, kv = inputs(batch, tokens, prompts, heads, width, count, dtype)
    options = {"queries": queries, "scale": scale}
    if sets == "grouped":
        options["group"] = torch.arange(batch) % 2
    if weighted:
        options["log_multiplicity"] = torch.linspace(-1, 2, count * prompts).view(count, prompts)
    check(qkv, kv, **options)


# ---- prompt sets


@pytest.mark.parametrize("prompts, queries", [(0, "all"), (3, "all"), (18, "class")])
def test_prompt_sets(backward, prompts, queries):
    """One per image; and three for three images, one of them asked by nobody."""
    check(*inputs(2, 15, prompts, 1, 16, 2, torch.float32), queries=queries)
    group = torch.tensor([2, 0, 2])
    qkv, kv = inputs(3, 15, prompts, 1, 16, 3, torch.float16)
    d_kv = check(qkv, kv, group=group, queries=queries)[3]
    assert not d_kv[1].any()


def test_group_in_pieces_of_memory(backward):
    for index in (torch.int64, torch.int32):
        group = torch.tensor([2, 9, 0, 9, 1, 9], dtype=index)[::2]
        check(*inputs(3, 15, 4, 1, 16, 3, torch.float32), group=group)


@pytest.mark.parametrize("images", [1, 2, 3, 9])
def test_images_in_turn(monkeypatch, images):
    """Programs that add the prompt gradients of several images; the last has fewer, or all."""
    force(monkeypatch, "whole", images=images)
    qkv, kv = inputs(3, 15, 18, 2, 16, dtype=torch.float32)
    check(qkv[:, :, :, 1:], kv[:, :, :, 1:])
    check(qkv[:, :, :, :1], kv[:, :4, :, :1], queries="class")


@pytest.mark.parametrize("path", ["whole", "split"])
def test_sum_over_the_batch_is_in_fp32(monkeypatch, path):
    """A large gradient, then many that are lost if the sum so far is rounded to 16 bits."""
    force(monkeypatch, path, images=9)
    qkv, kv = inputs(1, 2, 2, 1, 16, dtype=torch.float16)
    qkv = qkv.expand(9, -1, -1, -1, -1).contiguous()
    d_out = torch.full((9, 2, 16), 2.0**-12, dtype=torch.float16)
    d_out[0] = 1.0
    got = results(prompt_attention, qkv, kv, d_out)[3]
    exact = results(by_definition, qkv.double(), kv.double(), d_out.double())[3]
    assert error(got[:, :, 1], exact[:, :, 1]) < 8 * 2.0**-12 / 4  # values alone: no cancellation


# ---- the prompts' gradient alone


@pytest.mark.parametrize(
    "prompts, sets, class_only", [(18, 1, False), (16, 3, False), (18, 2, True), (0, 1, False)]
)
def test_prompt_gradient_alone(backward, prompts, sets, class_only):
    """Also from the queries alone, which is all that the engine keeps of the first block."""
    dtype = torch.float16
    qkv, kv = inputs(2, 17, prompts, 1, 16, sets, dtype)
    group = {1: None, 2: None, 3: torch.tensor([2, 0])}[sets]
    out, lse = FWD(qkv, kv, group, 0.3, class_only, None)
    d_out = torch.randn(out.shape).to(dtype)
    _, expected = BWD(d_out, qkv, kv, group, 0.3, class_only, None, out, lse, True)
    for given_qkv in (qkv, qkv[:, :, :1].contiguous()):
        d_qkv, d_kv = BWD(d_out, given_qkv, kv, group, 0.3, class_only, None, out, lse, False)
        assert d_qkv.numel() == 0
        assert torch.equal(d_kv, expected)


# ---- log multiplicity


@pytest.mark.parametrize(
    "sets, queries, dtype",
    [(1, "all", DTYPES[0]), (2, "all", DTYPES[1]), (3, "class", DTYPES[0])],
    ids=str,
)
def test_log_multiplicity(backward, sets, queries, dtype):
    """Weights, masked prompts, and a whole masked first tile."""
    qkv, kv = inputs(2, 15, 20, 1, 16, sets, dtype)
    group = torch.tensor([2, 0]) if sets == 3 else None
    weight = torch.randn(sets, 20)
    weight[:, ::3] = -torch.inf
    weight[-1, :17] = -torch.inf
    d_kv = check(qkv, kv, group=group, queries=queries, log_multiplicity=weight)[3]
    assert not d_kv[:, ::3].any() and not d_kv[-1, :17].any()
    wide = weight.double().t().contiguous().t()  # another dtype, and in pieces of memory
    again = results(prompt_attention, qkv, kv, group=group, queries=queries, log_multiplicity=wide)[
        3
    ]
    assert torch.equal(again, d_kv)


def test_all_prompts_masked(backward):
    qkv, kv = inputs(1, 17, 18, 1, 16, dtype=torch.float32)
    mask = torch.full((1, 18), -torch.inf)
    masked = results(prompt_attention, qkv, kv, log_multiplicity=mask)
    plain = results(prompt_attention, qkv, kv[:, :0])
    for a, b in zip(masked[:3], plain[:3], strict=True):
        assert error(a, b) < 1e-6
    assert not masked[3].any()


# ---- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backward, layout):
    """Offsets, transposed storage, inner strides that are not 1: read as they lie, or copied."""
    qkv, kv = inputs(2, 9, 5, 2, 16, 2, torch.float32)
    check(LAYOUTS[layout](qkv), kv)
    if layout != "offset":  # would change the number of prompts
        check(qkv, LAYOUTS[layout](kv))


@pytest.mark.parametrize("layout", GRADIENTS)
def test_layouts_of_the_gradient(backward, layout):
    qkv, kv = inputs(2, 9, 5, 2, 16, dtype=torch.float32)
    check(qkv, kv, GRADIENTS[layout](torch.randn(2, 9, 32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [1, 4])
def test_unaligned_inputs(backward, shift, dtype):
    """Wide loads are promised only where every row starts at a multiple of 16 bytes."""

    def moved(t, by):
        return torch.cat([torch.full((by,), 7.0).to(t), t.flatten()])[by:].view(t.shape)

    qkv, kv = inputs(1, 9, 5, 2, 16, dtype=dtype)
    for by, kv_by in ((0, shift), (shift, 0), (shift, shift)):
        a, b = moved(qkv, by), moved(kv, kv_by)
        aligned = all(t.data_ptr() % 16 == 0 for t in (a, b))
        assert kernels._common(a, b, None, None)["VEC"] == (16 // dtype.itemsize if aligned else 1)
        check(a, b)


def test_promised_width_of_loads():
    vec = lambda qkv, kv: kernels._common(qkv, kv, None, None)["VEC"]
    for dtype, most in ((torch.float32, 4), (torch.float16, 8)):
        qkv, kv = inputs(2, 17, 5, 2, 16, dtype=dtype)
        assert vec(qkv, kv) == most
        assert vec(LAYOUTS["heads_first"](qkv), kv) == most
        odd = inputs(2, 17, 5, 2, 15, dtype=dtype)
        assert vec(*odd) == 1  # rows of 15 entries
        wider = torch.zeros(*kv.shape[:-1], 17, dtype=dtype)[..., :16]
        assert vec(qkv, wider) == 1  # rows 17 entries apart


def test_rows_too_far_apart_are_copied():
    """Offsets within an image are 32 bits wide in the kernels."""
    far = torch.empty_strided((2, 3, 3, 2, 16), (0, 2**29, 2**20, 16, 1), device="meta")
    assert kernels._readable(far) is far
    farther = torch.empty_strided((2, 3, 3, 2, 16), (0, 2**30, 2**20, 16, 1), device="meta")
    assert kernels._readable(farther).is_contiguous()


def test_inputs_are_not_changed(backward):
    qkv, kv = inputs(2, 17, 5, 2, 16, dtype=torch.float32)
    weight = torch.rand(1, 5)
    before = [t.clone() for t in (qkv, kv, weight)]
    results(prompt_attention, qkv, kv, log_multiplicity=weight)
    for a, b in zip((qkv, kv, weight), before, strict=True):
        assert torch.equal(a, b)


# ---- numbers


@pytest.mark.parametrize("size", [30.0, 1000.0])
@pytest.mark.parametrize("shift", [0.0, -300.0])
def test_large_logits(backward, size, shift):
    """No overflow where the log-sum-exp is far from 0: padding keys have logit 0 all the same."""
    qkv, kv = inputs(1, 18, 3, 1, 16, dtype=torch.float32)
    qkv, kv = qkv * size**0.5, kv * size**0.5
    qkv[..., 0] = 1.0
    qkv[:, :, 1, :, 0] = kv[:, :, 0, :, 0] = shift * 4  # adds `shift` to every logit
    got = results(prompt_attention, qkv, kv)
    exact = results(by_definition, qkv.double(), kv.double())
    for a, b in zip(got, exact, strict=True):
        assert error(a, b) < 1e-6 * (size + abs(shift))


def test_bitwise_the_same_from_run_to_run(backward):
    qkv, kv = inputs(2, 17, 18, 1, 16, dtype=torch.float16)
    first = results(prompt_attention, qkv, kv)
    for _ in range(2):
        again = results(prompt_attention, qkv, kv)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


# ---- properties


def test_order_of_prompts_does_not_matter(backward):
    qkv, kv = inputs(1, 17, 18, 1, 16, dtype=torch.float32)
    order = torch.randperm(18)
    out, lse, d_qkv, d_kv = results(prompt_attention, qkv, kv)
    permuted = results(prompt_attention, qkv, kv[:, order])
    for a, b in zip(permuted, (out, lse, d_qkv, d_kv[:, order]), strict=True):
        assert error(a, b) < 1e-6


def test_prompts_may_come_in_two_sets(backward):
    """Attention over two sets of prompts from that over each, by their shares of the softmax."""
    qkv, kv = inputs(1, 17, 18, 1, 16, dtype=torch.float32)
    heads = lambda out: out.view(1, 17, 1, 16).transpose(1, 2).double()
    whole, lse = prompt_attention(qkv, kv)
    parts = [(1, kv[:, :7]), (1, kv[:, 7:]), (-1, kv[:, :0])]  # image rows are counted twice
    mixed = 0
    for sign, part in parts:
        out, lse_part = prompt_attention(qkv, part)
        mixed += sign * (lse_part - lse).double()[..., None].exp() * heads(out)
    assert error(mixed, heads(whole)) < 3e-6


def test_shared_equals_expanded(backward):
    qkv, kv = inputs(2, 17, 18, 1, 16, dtype=torch.float32)
    shared = results(prompt_attention, qkv, kv)
    expanded = results(prompt_attention, qkv, kv.expand(2, -1, -1, -1, -1))
    group = torch.ones(2, dtype=torch.int64)
    grouped = results(prompt_attention, qkv, kv.expand(2, -1, -1, -1, -1), group=group)
    for other in (expanded, grouped):
        assert all(torch.equal(a, b) for a, b in zip(other[:3], shared[:3], strict=True))
        assert error(other[3].sum(0, keepdim=True), shared[3]) < 1e-6
    assert not grouped[3][0].any()


@pytest.mark.parametrize("queries", ["all", "class"])
def test_no_prompts_is_plain_attention(backward, queries):
    qkv, kv = inputs(1, 33, 0, 1, 16, dtype=torch.float32)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).double()
    q = q[:, :, :1] if queries == "class" else q
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert error(prompt_attention(qkv, kv, queries=queries)[0], expected) < 1e-6


@pytest.mark.parametrize("times", [1, 2, 7])
def test_log_multiplicity_stands_for_copies(backward, times):
    qkv, kv = inputs(1, 17, 3, 1, 16, dtype=torch.float32)
    copies = results(prompt_attention, qkv, kv.repeat_interleave(times, dim=1))
    weight = torch.full((1, 3), float(times)).log()
    once = results(prompt_attention, qkv, kv, log_multiplicity=weight)
    for a, b in zip(once[:3], copies[:3], strict=True):
        assert error(a, b) < 1e-6
    assert error(once[3], copies[3].unflatten(1, (3, times)).sum(2)) < 1e-6


# ---- dispatch


def test_the_kernels_run(backward, monkeypatch):
    """The public op reaches them, and the reference is not asked."""
    calls = []
    for direction in ("forward", "backward"):
        run = getattr(kernels, direction)
        monkeypatch.setattr(
            kernels, direction, lambda *a, d=direction, run=run: calls.append(d) or run(*a)
        )
        monkeypatch.setattr(reference, direction, None)
    results(prompt_attention, *inputs(dtype=torch.float32))
    assert calls == ["forward", "backward"]
    monkeypatch.delenv("PAE_BACKEND")  # preferred also when nobody asks for it
    assert backends.choose("prompt_attention", "cpu", torch.float16) is kernels
    assert backends.choose("prompt_attention", "cpu", torch.float64) is reference


@pytest.mark.parametrize("layout", ["heads_first", "width_before_heads"])
@pytest.mark.parametrize("sets, class_only", [(1, False), (2, True), (3, False)])
def test_opcheck(layout, sets, class_only):
    """Shapes, strides and dtypes are those that the fake kernels announce."""
    qkv, kv = inputs(tokens=3, sets=sets, dtype=torch.float16)
    qkv = LAYOUTS[layout](qkv)
    group = torch.tensor([1, 0, 1]) if sets == 2 else None
    out, lse = FWD(qkv, kv, group, 1.0, class_only, None)
    quick = ("test_schema", "test_faketensor")
    opcheck(FWD, (qkv, kv, group, 1.0, class_only, None), test_utils=quick)
    for need_qkv in (True, False):
        args = (out, qkv, kv, group, 1.0, class_only, None, out, lse, need_qkv)
        opcheck(BWD, args, test_utils=quick)


def test_grids_of_large_batches(monkeypatch):
    """A GPU takes 2^31 programs along the first axis of a grid and 65535 along the others."""
    grids = []

    class Launcher:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("fwd", "bwd", "bwd_dq", "bwd_dkv"):
        monkeypatch.setattr(kernels, f"prompt_attention_{name}_kernel", Launcher())
    monkeypatch.setattr(kernels, "tiles", SimpleNamespace(**vars(tiles)))
    for dtype in (torch.float16, torch.float32):  # the whole backward, the split one
        qkv, kv = inputs(70_000, 1, 1, 2, 2, 70_000, dtype)
        out, lse = FWD(qkv, kv, None, 1.0, False, None)
        BWD(out, qkv, kv, None, 1.0, False, None, out, lse, True)
    assert len(grids) == 5  # forward and whole backward; forward and split backward
    for grid in grids:
        assert grid[0] >= 140_000 and all(size <= 65_535 for size in grid[1:])
