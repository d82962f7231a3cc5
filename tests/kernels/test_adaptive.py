"""`token_mix` and `prompt_bottleneck` in every execution, against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from pae_kernels import backends
from pae_kernels.adaptive import prompt_bottleneck, reference, token_mix
from tests.errors import error
from tests.kernels.executions import (
    BF16,
    FP16,
    FP32,
    FP64,
    KERNELS,
    each,
    grads_of,
    in_three_ways,
    sanitized,
)

OP = "token_mix"  # and prompt_bottleneck, by the same versions
OPS = torch.ops.pae
ACTIVATIONS = sorted(reference.ACTIVATIONS)


def randn(*size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)


def mixed(x, weight, eps=1e-5):
    """The definition."""
    return weight @ F.layer_norm(x, x.shape[-1:], eps=eps)


def parts(batch=3, count=4, width=6, hidden=5, masks=True, dtype=torch.float64):
    """Arguments of `prompt_bottleneck`: what has a gradient, and the masks."""
    shapes = (
        (batch, count, width), (width,), (count, width), (count,), (hidden, width), (width, hidden)
    )  # fmt: skip
    tensors = [randn(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]
    if not masks:
        return tensors, {}
    channel = (randn(batch, width, seed=8) > -0.5).to(dtype) / 0.9
    unit = (randn(batch, count, hidden, seed=9) > -0.5).to(dtype) / 0.8
    return tensors, {"channel_mask": channel, "hidden_mask": unit}


def finished(u, gain, shift, bias, down, up, activation, channel_mask=None, hidden_mask=None):
    """The definition, one prompt at a time."""
    rows = []
    for b in range(len(u)):
        for p in range(u.shape[1]):
            g = u[b, p] * gain + shift[p]
            g = (g if channel_mask is None else g * channel_mask[b]) + bias[p]
            h = down @ g
            z = {
                "relu": lambda h: h.clamp_min(0),
                "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)),
                "sigmoid": lambda h: 1 / (1 + torch.exp(-h)),
                "softmax": lambda h: torch.exp(h) / torch.exp(h).sum(),
            }[activation](h)
            rows.append(g + up @ (z if hidden_mask is None else z * hidden_mask[b, p]))
    return torch.stack(rows).view_as(u)


# ---- token_mix


def check(execution, function, plain, tensors, d_out):
    """Value and every gradient of a version, after comparing them with PyTorch and fp64."""
    *tensors, d_out = (t.to(execution.device) for t in (*tensors, d_out))
    found = list(in_three_ways(function, plain, tensors, d_out))
    for i, (a, b, c) in enumerate(found):
        floor = execution.pick(gpu=2e-6, other=1e-6)
        execution.assert_as_exact(a, b, c, "gradient" if i else "value", floor)
    value, *grads = (version for version, _, _ in found)
    return value, grads


# batch, rows, width, prompts; tiled: part-full tiles in every direction, several of each
SIZES = [(3, 5, 7, 3), (1, 1, 2, 3), (2, 9, 1, 3), (0, 4, 3, 3), (2, 0, 8, 3)]
TILED = [(2, 70, 150, 70), (3, 17, 64, 5), (1, 1, 1, 1), (2, 33, 40, 16)]
REAL = [(4, 197, 768, 50), (3, 257, 1280, 100), (2, 50, 384, 5), (1, 577, 1024, 10), (5, 7, 33, 3)]
NEAR_ZERO = [(scale, (2, 9, 32, 3), FP32, 1e-5) for scale in (0.0, 1e-6, 1e-3)]


@each(
    OP,
    "scale, size, dtype, eps",
    reference=[
        *itertools.product([2.0], SIZES, [FP64, FP32], [1e-5, 0.3]),
        *itertools.product([2.0], [(2, 50, 64, 7)], [BF16, FP16], [1e-5]),
        *NEAR_ZERO,
    ],
    interpreter=[
        *itertools.product([2.0], TILED, [FP32, FP16], [1e-5]),
        *((2.0, size, FP32, 0.3) for size in SIZES[3:]),
        *NEAR_ZERO,
    ],
    gpu=[
        *itertools.product([2.0], REAL, [BF16, FP16, FP32], [1e-5]),
        *(sanitized(2.0, (2, 70, 72, 18), dtype, 1e-5) for dtype in (BF16, FP32)),
        (1e-6, (2, 197, 768, 50), FP32, 1e-5),
    ],
)
def test_mix_equals_the_definition(execution, scale, size, dtype, eps):
    """Near-zero rows too, where eps decides: a floor of the variance would show."""
    batch, rows, width, prompts = size
    x = (scale * (randn(batch, rows, width) + 0.25)).to(dtype)
    weight = (randn(prompts, rows, seed=1) / max(rows, 1) ** 0.5).to(dtype)
    d_u = randn(batch, prompts, width, seed=2, dtype=dtype)
    if width == 1 and dtype != FP64:  # no variance: the result is the row minus itself
        d_u = d_u * 0
    mix = lambda x, w: token_mix(x, w, eps)
    _, (d_x, _) = check(execution, mix, lambda x, w: mixed(x, w, eps), (x, weight), d_u)
    if scale == 0:
        centred = d_u.double() - d_u.double().mean(-1, keepdim=True)
        slope = weight.double().t() @ centred / eps**0.5
        torch.testing.assert_close(d_x.double().cpu(), slope, rtol=1e-5, atol=1e-3)


@each(OP, "narrow", reference=[BF16, FP16], interpreter=[FP16], gpu=[BF16, FP16])
def test_mix_of_narrow_rows_with_a_wide_weight(execution, narrow):
    """As good as the definition with a narrow weight."""
    x, d_u = randn(2, 50, 64, dtype=narrow), randn(2, 7, 64, seed=2, dtype=narrow)
    weight = (randn(7, 50, seed=1) / 50**0.5).to(narrow)
    x, d_u, weight = execution.moved(x, d_u, weight)
    got, got_grads = grads_of(token_mix, (x, weight.float()), d_u)
    exact, exact_grads = grads_of(mixed, (x.double(), weight.double()), d_u)
    plain, plain_grads = grads_of(mixed, (x, weight), d_u)
    assert got.dtype == FP32 and [g.dtype for g in got_grads] == [narrow, FP32]
    triples = zip((got, *got_grads), (plain, *plain_grads), (exact, *exact_grads), strict=True)
    for a, b, c in triples:
        execution.assert_as_exact(a, b.to(a.dtype), c)


@each(OP)
def test_mix_needs_no_gradient_of_rows_below_the_first_prompts(execution):
    x, weight = randn(2, 20, 48, dtype=FP32), randn(5, 20, seed=1, dtype=FP32)
    x, weight, d_u = execution.moved(x, weight.requires_grad_(), randn(2, 5, 48, dtype=FP32))
    token_mix(x, weight).sum().backward()
    assert weight.grad is not None
    weight = weight.detach()
    args = d_u, x, weight, *OPS.token_mix_fwd(x, weight, 1e-5)[1:]
    none, d_weight = OPS.token_mix_bwd(*args, False)
    assert none.numel() == 0 and none.dtype == FP32
    assert torch.equal(d_weight, OPS.token_mix_bwd(*args, True)[1])


def test_mix_passes_gradcheck():
    x, weight = randn(2, 4, 5).requires_grad_(), randn(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(token_mix, (x, weight))


def test_mix_of_rows_far_from_zero():
    """Rows that are a thousand times longer than they vary lose no digits but their own."""
    x = (randn(2, 6, 16) + 1e3).float()
    weight, d_u = randn(3, 6, seed=1).float(), randn(2, 3, 16, seed=2).float()
    got, (d_x, d_weight) = grads_of(token_mix, (x, weight), d_u)
    expected, expected_grads = grads_of(mixed, (x.double(), weight.double()), d_u)
    assert error(got, expected) < 1e-4  # the mean of a row is known to 1e-7 of 1e3
    assert error(d_x, expected_grads[0]) < 1e-4 and error(d_weight, expected_grads[1]) < 1e-4


def test_mix_leaves_out_rows_with_columns_of_zeros():
    x, weight = randn(2, 6, 4), F.pad(randn(3, 4, seed=1), (2, 0))
    d_u = randn(2, 3, 4, seed=2)
    got, (d_x, _) = grads_of(token_mix, (x, weight), d_u)
    assert error(got, mixed(x[:, 2:], weight[:, 2:])) < 1e-12
    assert not d_x[:, :2].any() and d_x[:, 2:].abs().min() > 0


def test_mix_saves_its_inputs_and_two_numbers_per_row():
    saved = []
    x, weight = randn(2, 4, 50).requires_grad_(), randn(3, 4, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        token_mix(x, weight)
    others = [t for t in saved if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert len(saved) == 4 and sum(t.numel() for t in others) == 2 * 2 * 4


# ---- prompt_bottleneck


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bottleneck_equals_the_definition(activation, masks):
    tensors, chosen = parts(masks=masks)
    d_out = randn(3, 4, 6, seed=7)
    got, got_grads = grads_of(
        lambda *t: prompt_bottleneck(*t, activation, **chosen), tensors, d_out
    )
    expected, expected_grads = grads_of(
        lambda *t: finished(*t, activation, **chosen), tensors, d_out
    )
    assert error(got, expected) < 1e-13
    for a, b in zip(got_grads, expected_grads, strict=True):
        assert error(a, b) < 1e-12


def plain_bottleneck(activation, channel_mask=None, hidden_mask=None):
    def plain(u, gain, shift, bias, down, up):
        g = u * gain + shift
        g = (g if channel_mask is None else g * channel_mask.to(u)[:, None]) + bias[:, None]
        z = reference.ACTIVATIONS[activation](F.linear(g, down))
        return g + F.linear(z if hidden_mask is None else z * hidden_mask.to(u), up)

    return plain


# batch (more than there are slots, and not a multiple), prompts, width, units
TILED_BOTTLENECKS = [
    ((17, 3, 20, 2), "relu", True),
    ((2, 18, 70, 3), "gelu", False),
    ((3, 17, 33, 20), "softmax", True),
    ((1, 1, 1, 1), "sigmoid", True),
    ((2, 4, 24, 0), "relu", True),
    ((0, 4, 6, 5), "relu", True),
]
REAL_BOTTLENECKS = [(33, 50, 768, 8), (4, 100, 1280, 3), (2, 5, 384, 64)]


@each(
    OP,
    "size, activation, masked, dtype",
    reference=itertools.product([(4, 8, 32, 8)], ACTIVATIONS, [True, False], [FP32, BF16, FP16]),
    interpreter=[(*case, dtype) for case in TILED_BOTTLENECKS for dtype in (FP32, FP16)],
    gpu=[
        *itertools.product(REAL_BOTTLENECKS, ACTIVATIONS, [True], [BF16, FP16, FP32]),
        *(sanitized((17, 18, 72, 3), "gelu", True, dtype) for dtype in (BF16, FP32)),
    ],
)
def test_bottleneck_is_as_good_as_plain_pytorch(execution, size, activation, masked, dtype):
    tensors, masks = parts(*size, masks=masked, dtype=dtype)
    if size[3]:
        tensors[4] = tensors[4] / size[2] ** 0.5
    # sums over images and channels stay of order 1
    d_out = (randn(*size[:3], seed=7) / max(1, size[0] * size[2]) ** 0.5).to(dtype)
    masks = {name: mask.to(execution.device) for name, mask in masks.items()}
    check(
        execution,
        lambda *t: prompt_bottleneck(*t, activation, **masks),
        plain_bottleneck(activation, **masks),
        tensors,
        d_out,
    )


@each(OP, on=["interpreter"])
def test_bottleneck_of_many_units_is_the_references(execution):
    tensors, masks = parts(2, 3, 8, 65, dtype=FP32)
    d_out, args = randn(2, 3, 8, seed=7, dtype=FP32), (*tensors, "gelu", *masks.values())
    got, expected = backends.choose("prompt_bottleneck", "cpu"), reference
    assert got is not expected
    assert torch.equal(got.prompt_bottleneck(*args), expected.prompt_bottleneck(*args))
    for a, b in zip(
        got.prompt_bottleneck_backward(d_out, *args),
        expected.prompt_bottleneck_backward(d_out, *args),
        strict=True,
    ):
        assert torch.equal(a, b)


@each(OP, "activation", reference=["relu", "gelu"], interpreter=["relu"], gpu=["relu", "gelu"])
def test_zeros_stay_exact_zeros(execution, activation):
    tensors, masks = parts(dtype=FP32)
    u, gain, shift, bias, down, up = execution.moved(*tensors)
    masks = {name: mask.to(execution.device) for name, mask in masks.items()}
    zeros = u * 0, gain, shift * 0, bias * 0, down, up
    assert not prompt_bottleneck(*zeros, activation, **masks).any()
    x, weight = execution.moved(randn(2, 20, 48, dtype=FP32), torch.zeros(5, 20))
    assert not token_mix(x, weight).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bottleneck_passes_gradcheck(activation):
    tensors, chosen = parts(2, 3, 4, 3)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: prompt_bottleneck(*t, activation, **chosen), leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bottleneck_of_no_units_is_the_affine_part(activation):
    (u, gain, shift, bias, _, _), _ = parts()
    down, up = randn(0, 6), randn(6, 0)
    expected = u * gain + shift + bias[:, None]
    assert error(prompt_bottleneck(u, gain, shift, bias, down, up, activation), expected) < 1e-15


# ---- both, as ops


def test_ops_pass_opcheck():
    x, weight = randn(2, 4, 5).requires_grad_(), randn(3, 4, seed=1).requires_grad_()
    torch.library.opcheck(OPS.token_mix_fwd, (x, weight, 1e-5))
    torch.library.opcheck(OPS.token_mix_fwd, (x.detach().bfloat16(), weight.float(), 1e-5))
    mean, rstd = OPS.token_mix_fwd(x, weight, 1e-5)[1:]
    args = (randn(2, 3, 5), x.detach(), weight.detach(), mean.detach(), rstd.detach())
    for need_x in (True, False):
        torch.library.opcheck(OPS.token_mix_bwd, (*args, need_x))
    for masks in (True, False):
        tensors, chosen = parts(masks=masks)
        chosen = chosen.get("channel_mask"), chosen.get("hidden_mask")
        args = (*(t.requires_grad_() for t in tensors), "gelu", *chosen)
        torch.library.opcheck(OPS.prompt_bottleneck_fwd, args)
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(OPS.prompt_bottleneck_bwd, (randn(3, 4, 6), *args))


def both(x, weight, gain, shift, bias, down, up, **masks):
    return prompt_bottleneck(token_mix(x, weight), gain, shift, bias, down, up, "relu", **masks)


@each(OP, on=KERNELS)
def test_the_kernels_run(execution, monkeypatch):
    """The public ops reach them, and the reference is not asked."""
    for op in ("token_mix", "prompt_bottleneck"):
        for name in (op, f"{op}_backward"):
            monkeypatch.setattr(reference, name, None)
    _same_bits(execution, FP32)
    monkeypatch.delenv("PAE_BACKEND")  # preferred also when nobody asks for it
    for op in ("token_mix", "prompt_bottleneck"):
        for dtype in execution.dtypes:
            assert backends.choose(op, execution.device, dtype).__name__.endswith(execution.version)
        assert backends.choose(op, execution.device, FP64) is reference


@each(OP, "dtype", reference=[FP64, FP32, BF16], interpreter=[FP32], gpu=[BF16, FP16, FP32])
def test_bitwise_the_same_on_every_run(execution, dtype, poisoned_memory):
    _same_bits(execution, dtype)


def _same_bits(execution, dtype):
    size = execution.pick(gpu=(19, 50, 768, 8, 197), other=(3, 5, 40, 4, 20))
    batch, prompts, width, hidden, rows = size
    (_, *tensors), masks = parts(batch, prompts, width, hidden, dtype=dtype)
    x, weight = randn(batch, rows, width), randn(prompts, rows, seed=1)
    tensors = execution.moved(*(t.to(dtype) for t in (x, weight, *tensors)))
    masks = {name: mask.to(execution.device) for name, mask in masks.items()}
    d_out = randn(batch, prompts, width, seed=7, dtype=dtype).to(execution.device)
    first = None
    for _ in execution.runs():
        out, grads = grads_of(lambda *t: both(*t, **masks), tensors, d_out)
        results = out, *grads
        first = first or results
        assert all(t.isfinite().all() for t in results)
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


def test_ops_are_one_graph_under_compile():
    (_, *tensors), masks = parts()
    tensors = [randn(3, 7, 6), randn(4, 7, seed=1), *tensors]
    d_out = randn(3, 4, 6, seed=7)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    got, got_grads = grads_of(lambda *t: compiled(*t, **masks), tensors, d_out)
    expected, expected_grads = grads_of(lambda *t: both(*t, **masks), tensors, d_out)
    for a, b in zip((got, *got_grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(a, b)


def test_ops_take_any_strides_and_write_every_entry(poisoned_memory):
    (_, gain, shift, bias, down, up), masks = parts()
    x, weight, d_out = randn(3, 7, 6), randn(4, 7, seed=1), randn(3, 4, 6, seed=7)
    dense = (x, weight, gain, shift, bias, down, up)
    strided = [t.t().contiguous().t() if t.dim() == 2 else t for t in dense]
    strided[0] = x.transpose(0, 2).contiguous().transpose(0, 2)
    strided[2] = gain.repeat_interleave(2)[::2]
    loose = d_out.transpose(1, 2).contiguous().transpose(1, 2)
    got = grads_of(lambda *t: both(*t, **masks), dense, d_out)
    leaves = [t.requires_grad_() for t in strided]
    out = both(*leaves, **masks)
    assert error(out, got[0]) < 1e-14
    for a, b in zip(torch.autograd.grad(out, leaves, loose), got[1], strict=True):
        assert error(a, b) < 1e-14


def test_ops_ignore_autocast():
    (_, *tensors), masks = parts(dtype=torch.float32)
    tensors = [randn(3, 7, 6).float(), randn(4, 7, seed=1).float(), *tensors]
    d_out = randn(3, 4, 6, seed=7).float()
    expected = grads_of(lambda *t: both(*t, **masks), tensors, d_out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = grads_of(lambda *t: both(*t, **masks), tensors, d_out)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], expected[1], strict=True))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.zeros(2, 4)}, ValueError, r"x must be \(B, N, D\), got \(2, 4\) float32"),
        ({"x": torch.zeros(2, 4, 5, dtype=torch.int64)}, TypeError, "x must be a float tensor"),
        ({"x": [1.0]}, TypeError, "x must be a float tensor .* got list"),
        ({"x": torch.zeros(2, 4, 0)}, ValueError, "x must have D >= 1"),
        (
            {"weight": torch.zeros(3, 5)},
            ValueError,
            r"weight must be \(3, 4\) on cpu, got",
        ),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must be \(P, N\)"),
        ({"eps": 0.0}, ValueError, "eps must be a positive number, got 0.0"),
        ({"eps": float("nan")}, ValueError, "eps must be a positive number, got nan"),
        ({"eps": True}, ValueError, "eps must be a positive number, got True"),
    ],
)
def test_mix_refuses_bad_arguments(change, kind, message):
    arguments = {"x": torch.zeros(2, 4, 5), "weight": torch.zeros(3, 4), "eps": 1e-5}
    token_mix(**arguments)
    with pytest.raises(kind, match=message) as caught:
        token_mix(**{**arguments, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"u": torch.zeros(2, 4)}, ValueError, r"u must be \(B, P, D\)"),
        ({"gain": torch.zeros(5)}, ValueError, r"gain must be \(6,\) on cpu, got \(5,\) float32"),
        ({"shift": torch.zeros(6)}, ValueError, r"shift must be \(4, 6\), got \(6,\)"),
        ({"bias": None}, TypeError, r"bias must be a float tensor \(4,\), got NoneType"),
        ({"down": torch.zeros(6)}, ValueError, r"down must be \(r, D\)"),
        ({"down": torch.zeros(5, 7)}, ValueError, r"down must be \(5, 6\)"),
        ({"up": torch.zeros(5, 6)}, ValueError, r"up must be \(6, 5\)"),
        ({"activation": "tanh"}, ValueError, "activation must be one of .* got 'tanh'"),
        ({"channel_mask": torch.ones(3, 1, 6)}, ValueError, r"channel_mask must be \(3, 6\)"),
        ({"hidden_mask": torch.ones(3, 4, 5) > 0}, TypeError, "hidden_mask must be a float"),
        (
            {"channel_mask": torch.ones(3, 6, requires_grad=True)},
            ValueError,
            "channel_mask must not require a gradient",
        ),
    ],
)
def test_bottleneck_refuses_bad_arguments(change, kind, message):
    tensors, _ = parts(dtype=torch.float32)
    names = ("u", "gain", "shift", "bias", "down", "up")
    arguments = dict(zip(names, tensors, strict=True))
    prompt_bottleneck(**arguments)
    with pytest.raises(kind, match=message) as caught:
        prompt_bottleneck(**{**arguments, **change})
    assert "\n" not in str(caught.value)
