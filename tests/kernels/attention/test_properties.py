"""prompt_attention in every execution: what must hold at any input, whatever its layout."""

from __future__ import annotations

import itertools

import pytest
import torch

from pae_kernels import class_attention, prompt_attention
from tests.errors import error
from tests.kernels.attention.cases import (
    LAYOUTS,
    OP,
    along,
    by_definition,
    check,
    each_path,
    inputs,
    places,
    results,
    sdpa,
)
from tests.kernels.executions import BF16, FP16, FP32, FP64, each

# ---- properties


def exactly(execution):
    """(dtype, tolerance) where two ways to the same result are compared."""
    exact = FP64, 1e-13
    return execution.pick(reference=exact, sdpa=exact, other=(FP32, 1e-6))


PROPERTY = "reference", "interpreter", "cpu", "sdpa"


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
            same_bits = execution.kind in ("interpreter", "cpu")
            assert error(a, b) < (1e-300 if same_bits else tolerance)
        assert error(other[3].sum(0, keepdim=True), shared[3]) < tolerance
    assert not grouped[3][0].any()  # nobody reads set 0


@along(["all", "class"], "queries", reference=["all", "class"], cpu=["all", "class"])
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
    cpu=[(times, "all") for times in (1, 2, 7)],
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


@along(["all"], "queries", reference=["all", "class"], cpu=["all", "class"])
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
@pytest.mark.parametrize("placed", [False, True])
def test_class_attention_is_the_first_row_of_the_softmax(
    placed, queries, sets, group, weighted, dtype
):
    """Shown by values that name their key: the output is then the row itself."""
    qkv, kv = inputs(3, 5, 3, 2, 8, sets, dtype)  # 3 + 5 keys of width 8
    qkv[:, :, 2], kv[:, :, 1] = torch.eye(8)[3:, None], torch.eye(8)[:3, None]
    options = {"scale": 0.7, "group": None if group is None else torch.tensor(group)}
    if weighted:
        options["log_multiplicity"] = torch.tensor([[0.5, -torch.inf, 2.0]]).expand(sets, 3)
    if placed:
        options |= places(5, 2, 3)
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
    cpu=itertools.product([30.0, 1000.0], [0.0, -300.0]),
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


@along(LAYOUTS, "layout", reference=LAYOUTS, cpu=LAYOUTS, gpu=LAYOUTS)
def test_layouts_of_the_inputs(execution, path, layout):
    """Offsets, transposed storage, inner strides that are not 1: read as they lie, or copied."""
    arrange = LAYOUTS[layout]
    size = execution.pick(
        reference=(3, 7, 4, 2, 8, 1), other=(2, 9, 5, 2, 16, 2), gpu=(3, 197, 20, 12, 64, 3)
    )
    kinds = {"reference": (FP64, FP32), "interpreter": (FP32,), "cpu": (FP32, BF16)}
    for dtype in execution.pick(**kinds, other=(BF16,)):
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


@along(GRADIENTS, "layout", reference=GRADIENTS, cpu=GRADIENTS, gpu=GRADIENTS)
def test_layouts_of_the_gradient(execution, path, layout):
    size = execution.pick(
        reference=(3, 7, 4, 2, 8, 1), other=(2, 9, 5, 2, 16, 1), gpu=(3, 197, 20, 12, 64, 1)
    )
    dtype = execution.pick(reference=FP64, interpreter=FP32, other=BF16)
    qkv, kv = execution.moved(*inputs(*size, dtype=dtype))
    d_out = torch.randn(size[0], size[1], size[3] * size[4]).to(qkv)
    for prompts in execution.pick(reference=(kv, kv[:, :0]), other=(kv,)):
        check(execution, qkv, prompts, GRADIENTS[layout](d_out))


@each_path("reference", "interpreter", "cpu", "sdpa")
def test_inputs_are_not_changed(execution, path):
    qkv, kv = inputs(2, 17, 5, 2, 16, dtype=execution.pick(cpu=BF16, other=FP32))
    weight = torch.rand(1, 5)
    before = [t.clone() for t in (qkv, kv, weight)]
    results(prompt_attention, qkv, kv, log_multiplicity=weight)
    for a, b in zip((qkv, kv, weight), before, strict=True):
        assert torch.equal(a, b)


@along(
    [(17,)],
    "tokens",
    reference=[50],
    cpu=[50],
    gpu=[197, 577],
)
def test_bitwise_the_same_on_every_run(execution, path, tokens, poisoned_memory):
    """A race or an entry that nobody writes would show as another bit, or as NaN."""
    size, dtype = execution.pick(
        reference=((4, tokens, 10, 3, 64, 2), FP32),
        interpreter=((2, tokens, 18, 1, 16, 2), FP16),
        cpu=((3, tokens, 10, 3, 64, 2), BF16),
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
