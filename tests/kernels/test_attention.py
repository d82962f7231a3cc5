"""prompt_attention: the pair that runs against the definition, its properties, its registration."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from pae_kernels import backends, class_attention, prompt_attention
from pae_kernels.attention import reference
from tests.errors import assert_rounded, error

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
        d_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
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


@settings(max_examples=60, deadline=None)
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


SHAPES = [(1, 50, 5, 3, 32), (2, 197, 50, 3, 64), (1, 198, 10, 2, 80), (1, 257, 1, 2, 72)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("queries", ["all", "class"])
def test_sizes_of_real_backbones(shape, queries):
    assert_as_defined(*inputs(*shape, dtype=torch.float32), queries=queries)


def test_long_sequences_and_many_prompts():
    assert_as_defined(*inputs(1, 1568, 2, 1, 8, dtype=torch.float32))
    assert_as_defined(*inputs(2, 4096, 512, 1, 32, dtype=torch.float32), queries="class")


# ---- 16 bits: at most twice the error of PyTorch's attention in the same precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries", ["all", "class"])
@pytest.mark.parametrize("sets", [1, 3])
def test_16_bits_against_plain_attention(dtype, queries, sets):
    squares = torch.zeros(2, 3)
    for seed in range(4):
        qkv, kv = inputs(3, 50, 10, 3, 64, sets, dtype, seed)
        truth = results(by_definition, qkv.double(), kv.double(), queries=queries)
        ours = results(prompt_attention, qkv, kv, queries=queries)

        def plain(qkv, kv, queries):
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            k_p, v_p = kv.expand(3, -1, -1, -1, -1).permute(2, 0, 3, 1, 4)
            q = q[:, :, :1] if queries == "class" else q
            out = F.scaled_dot_product_attention(
                q, torch.cat([k_p, k], dim=2), torch.cat([v_p, v], dim=2)
            )
            return out.transpose(1, 2).flatten(2), out[..., 0]

        theirs = results(plain, qkv, kv, queries=queries)
        assert ours[1].dtype == torch.float32
        assert error(ours[1], truth[1]) < 2e-3
        for row, got in enumerate((theirs, ours)):
            for column, i in enumerate((0, 2, 3)):
                assert got[i].dtype == dtype
                squares[row, column] += error(got[i], truth[i]) ** 2
    theirs, ours = squares.sqrt()
    assert (ours <= 2 * theirs).all(), ours / theirs


def test_shared_gradient_is_summed_in_fp32():
    """Many images: a sum in 16 bits would stop growing."""
    qkv, kv = inputs(1, 4, 2, 1, 8, dtype=torch.bfloat16)
    many = qkv.expand(512, -1, -1, -1, -1).contiguous()
    d_out = torch.ones(512, 4, 8, dtype=torch.bfloat16)
    d_kv = results(prompt_attention, many, kv, d_out)[3]
    expected = results(by_definition, many.double(), kv.double(), d_out.double())[3]
    assert error(d_kv, expected) < 1e-2


# ---- properties


def test_order_of_prompts_does_not_matter():
    qkv, kv = inputs(prompts=6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    out, lse, d_qkv, d_kv = results(prompt_attention, qkv, kv)
    permuted = results(prompt_attention, qkv, kv[:, order])
    for a, b in zip(permuted, (out, lse, d_qkv, d_kv[:, order]), strict=True):
        assert error(a, b) < 1e-13


def test_prompts_may_come_in_two_sets():
    """Attention over P1 and P2 is the mean of both, weighted by their shares of the softmax."""
    qkv, kv = inputs(prompts=6)
    whole, lse = prompt_attention(qkv, kv)
    first, lse_first = prompt_attention(qkv, kv[:, :2])
    second, lse_second = prompt_attention(qkv, kv[:, 2:])
    none, lse_none = prompt_attention(qkv, kv[:, :0])
    heads = lambda out: out.view(3, 7, 2, 8).transpose(1, 2)
    mixed = sum(
        sign * (part_lse - lse)[..., None].exp() * heads(part)
        for sign, part, part_lse in ((1, first, lse_first), (1, second, lse_second))
    ) - (lse_none - lse)[..., None].exp() * heads(none)
    assert error(mixed, heads(whole)) < 1e-13


def test_shared_equals_expanded():
    qkv, kv = inputs()
    shared = results(prompt_attention, qkv, kv)
    expanded = results(prompt_attention, qkv, kv.expand(3, -1, -1, -1, -1))
    grouped = results(
        prompt_attention, qkv, kv.expand(2, -1, -1, -1, -1), group=torch.ones(3).long()
    )
    for other in (expanded, grouped):
        for a, b in zip(other[:3], shared[:3], strict=True):
            assert error(a, b) < 1e-13
        assert error(other[3].sum(0, keepdim=True), shared[3]) < 1e-13
    assert torch.equal(grouped[3][0], torch.zeros_like(grouped[3][0]))  # nobody reads set 0


@pytest.mark.parametrize("queries", ["all", "class"])
def test_no_prompts_is_plain_attention(queries):
    qkv, kv = inputs(prompts=0)
    out, lse, d_qkv, d_kv = results(prompt_attention, qkv, kv, queries=queries)

    def plain(qkv, kv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q = q[:, :, :1] if queries == "class" else q
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return out + kv.sum(), lse  # kv is empty: its sum is 0

    expected = results(plain, qkv, kv)
    assert error(out, expected[0]) < 1e-13
    assert error(d_qkv, expected[2]) < 1e-13
    assert d_kv.shape == kv.shape


@pytest.mark.parametrize("queries", ["all", "class"])
@pytest.mark.parametrize("times", [1, 2, 7])
def test_log_multiplicity_stands_for_copies(times, queries):
    qkv, kv = inputs(prompts=3)
    copies = results(prompt_attention, qkv, kv.repeat_interleave(times, dim=1), queries=queries)
    weight = torch.full((1, 3), float(times), dtype=torch.float64).log()
    once = results(prompt_attention, qkv, kv, log_multiplicity=weight, queries=queries)
    for a, b in zip(once[:3], copies[:3], strict=True):
        assert error(a, b) < 1e-13
    assert error(once[3], copies[3].unflatten(1, (3, times)).sum(2)) < 1e-13


@pytest.mark.parametrize("queries", ["all", "class"])
def test_minus_infinity_masks_a_prompt(queries):
    qkv, kv = inputs(prompts=4)
    mask = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]], dtype=torch.float64)
    masked = results(prompt_attention, qkv, kv, log_multiplicity=mask, queries=queries)
    kept = results(prompt_attention, qkv, kv[:, ::2], queries=queries)
    for a, b in zip(masked[:3], kept[:3], strict=True):
        assert error(a, b) < 1e-13
    assert error(masked[3][:, ::2], kept[3]) < 1e-13
    assert torch.equal(masked[3][:, 1::2], torch.zeros_like(kept[3]))
    everything = torch.full_like(mask, -torch.inf)
    nothing = results(prompt_attention, qkv, kv, log_multiplicity=everything, queries=queries)
    plain = results(prompt_attention, qkv, kv[:, :0], queries=queries)
    assert error(nothing[0], plain[0]) < 1e-13


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


def test_class_attention_ranks_16_bit_rows_as_fp64_does():
    """Logits rounded to 16 bits would tie; products of 16-bit entries in fp32 do not."""
    qkv, kv = inputs(4, 197, 10, 3, 64, dtype=torch.bfloat16)
    top = lambda q, k: class_attention(q, k, prompt_attention(q, k)[1])[..., 10:].mean(1).topk(10)
    assert torch.equal(top(qkv, kv).indices, top(qkv.double(), kv.double()).indices)


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


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_large_logits(size):
    """No overflow, and the gradients stay those of the definition."""
    qkv, kv = inputs(dtype=torch.float32)
    assert_as_defined(
        qkv * size**0.5,
        kv * size**0.5,
    )


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("prompts", [0, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_inputs(layout, prompts, dtype):
    qkv, kv = inputs(prompts=prompts, dtype=dtype)
    for arranged in (LAYOUTS[layout](qkv), qkv):
        for kv_arranged in (LAYOUTS[layout](kv) if layout != "offset" else kv, kv):
            assert_as_defined(arranged, kv_arranged)
            assert_as_defined(arranged, kv_arranged, queries="class")


GRADIENTS = {
    "expanded": lambda t: t[:1, :1, :1].expand(t.shape),
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every_second_entry": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "batch_last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("layout", GRADIENTS)
@pytest.mark.parametrize("prompts", [0, 4])
def test_layouts_of_the_gradient(layout, prompts):
    qkv, kv = inputs(prompts=prompts)
    d_out = torch.randn(3, 7, 16, dtype=torch.float64)
    assert_as_defined(qkv, kv, d_out=GRADIENTS[layout](d_out))


def test_inputs_are_not_changed():
    qkv, kv = inputs(dtype=torch.float32)
    weight = torch.rand(1, 4)
    before = [t.clone() for t in (qkv, kv, weight)]
    results(prompt_attention, qkv, kv, log_multiplicity=weight)
    for a, b in zip((qkv, kv, weight), before, strict=True):
        assert torch.equal(a, b)


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


def test_bitwise_the_same_from_run_to_run():
    qkv, kv = inputs(4, 50, 10, 3, 64, 2, torch.float32)
    group = torch.tensor([1, 0, 0, 1])
    first = results(prompt_attention, qkv, kv, group=group)
    for _ in range(5):
        again = results(prompt_attention, qkv, kv, group=group)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


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


OPTIONS = [
    pytest.param(*case, id="-".join(map(str, case)))
    for case in itertools.product(["heads_first", "width_before_heads"], [1, 2, 3], [True, False])
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout, sets, class_only", OPTIONS)
def test_opcheck(layout, sets, class_only, dtype):
    """Schema, fake tensors (shapes, strides, dtypes) and autograd registration."""
    qkv, kv = inputs(sets=sets, dtype=dtype)
    qkv = LAYOUTS[layout](qkv)
    group = torch.tensor([1, 0, 1]) if sets == 2 else None
    weight = torch.rand(sets, 4, dtype=dtype)
    out, lse = FWD(qkv, kv, group, 1.0, class_only, weight)
    quick = ("test_schema", "test_faketensor")
    for need_qkv in (True, False):
        args = (out, qkv, kv, group, 1.0, class_only, weight, out, lse, need_qkv)
        opcheck(BWD, args, test_utils=quick)
    args = (qkv.requires_grad_(), kv.requires_grad_(), group, 1.0, class_only, weight)
    opcheck(FWD, args, test_utils=(*quick, "test_autograd_registration"))


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
