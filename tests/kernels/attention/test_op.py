"""prompt_attention as an op: autograd, registration, arguments, choice of version."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.library import opcheck

from pae_kernels import backends, cpu, prompt_attention
from pae_kernels.attention import reference
from tests.errors import error
from tests.kernels.attention.cases import (
    BWD,
    FWD,
    LAYOUTS,
    OP,
    each_path,
    inputs,
    places,
    results,
)
from tests.kernels.executions import BF16, FP16, FP32, FP64, each

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


@pytest.mark.parametrize("queries", ["all", "class"])
@pytest.mark.parametrize(
    "heads, windows, weighted", [(2, None, False), (None, 2, True), (1, 4, False)]
)
def test_gradcheck_of_places(heads, windows, weighted, queries):
    qkv, kv = inputs(4, 3, 2, 2, 3)
    options = places(3, heads, windows)
    options["log_multiplicity"] = torch.rand(1, 2) if weighted else None
    function = lambda qkv, kv: prompt_attention(qkv, kv, queries=queries, **options)[0]
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
    out, lse = FWD(qkv, kv, None, 1.0, False, None, None, None)
    queries_alone = torch.full_like(qkv, torch.nan)
    queries_alone[:, :, 0] = qkv.detach()[:, :, 0]
    d_qkv, d_kv = BWD(out, queries_alone, kv, None, 1.0, False, None, None, None, out, lse, False)
    assert d_qkv.numel() == 0
    assert torch.isfinite(d_kv).all()


def test_log_sum_exp_carries_no_gradient():
    qkv, kv = inputs()
    _, lse = prompt_attention(qkv.requires_grad_(), kv)
    assert not lse.requires_grad


def test_registered_autograd_equals_the_eager_one():
    """Under torch.compile the op is called itself; its registered gradient is the same pair."""
    qkv, kv = inputs()
    eager = results(prompt_attention, qkv, kv)
    registered = results(lambda q, k: FWD(q, k, None, 8**-0.5, False, None, None, None), qkv, kv)
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
    cpu=[
        ("heads_first", sets, class_only, dtype)
        for sets, class_only, dtype in ((1, False, BF16), (2, True, FP32), (3, False, FP32))
    ],
)
def test_opcheck(execution, layout, sets, class_only, dtype):
    """Schema, fake tensors (shapes, strides, dtypes) and autograd registration."""
    qkv, kv = inputs(tokens=3, sets=sets, dtype=dtype)
    qkv = LAYOUTS[layout](qkv)
    group = torch.tensor([1, 0, 1]) if sets == 2 else None
    weight = torch.rand(sets, 4, dtype=dtype) if execution.kind == "reference" else None
    out, lse = FWD(qkv, kv, group, 1.0, class_only, weight, None, None)
    quick = ("test_schema", "test_faketensor")
    for need_qkv in (True, False):
        args = (out, qkv, kv, group, 1.0, class_only, weight, None, None, out, lse, need_qkv)
        opcheck(BWD, args, test_utils=quick)
    if execution.kind == "reference":
        qkv, kv = qkv.requires_grad_(), kv.requires_grad_()
        quick = (*quick, "test_autograd_registration")
    opcheck(FWD, (qkv, kv, group, 1.0, class_only, weight, None, None), test_utils=quick)


@each(OP, "dtype", interpreter=[FP16], reference=[FP64], cpu=[BF16], sdpa=[BF16])
def test_opcheck_of_places(execution, dtype):
    qkv, kv = execution.moved(*inputs(4, 3, dtype=dtype))
    given = None, 1.0, False, None, *execution.moved(*places(3, 2, 2).values())
    out, lse = FWD(qkv, kv, *given)
    quick = ("test_schema", "test_faketensor")
    opcheck(BWD, (out, qkv, kv, *given, out, lse, True), test_utils=quick)
    opcheck(FWD, (qkv, kv, *given), test_utils=quick)


def test_opcheck_with_dynamic_shapes():
    qkv, kv = inputs(dtype=torch.float32)
    opcheck(FWD, (qkv.requires_grad_(), kv.requires_grad_(), None, 1.0, False, None, None, None))


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
    "bias of other heads": (
        lambda q, k: {"bias": torch.zeros(3, 7, 7)},
        r"bias must be float \(2 or 1, 7, 7\) on cpu, got \(3, 7, 7\)",
    ),
    "bias of other rows": (
        lambda q, k: {"bias": torch.zeros(2, 7, 11)},
        r"bias must be float \(2 or 1, 7, 7\)",
    ),
    "bias of integers": (lambda q, k: {"bias": torch.zeros(1, 7, 7).int()}, "bias must .*int32"),
    "bias is trained": (
        lambda q, k: {"bias": torch.zeros(1, 7, 7).requires_grad_()},
        "bias requires a gradient, and this op has none for it: detach it",
    ),
    "mask of more windows": (
        lambda q, k: {"mask": torch.zeros(2, 7, 7)},
        r"mask must be float \(a divisor of 3, 7, 7\) on cpu, got \(2, 7, 7\)",
    ),
    "mask of no window": (lambda q, k: {"mask": torch.zeros(0, 7, 7)}, "mask must be float"),
    "mask is flat": (lambda q, k: {"mask": torch.zeros(7, 7)}, "mask must be float"),
    "mask is elsewhere": (
        lambda q, k: {"mask": torch.zeros(1, 7, 7, device="meta")},
        "mask must be float .* on cpu, got .* on meta",
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


@pytest.mark.parametrize("reason", ["fp64", "not built"])
def test_the_reference_runs_where_no_kernel_can(monkeypatch, reason):
    calls = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *a: calls.append(1) or forward(*a))
    dtype = torch.float64
    if reason == "not built":
        dtype = BF16
        monkeypatch.setattr(cpu, "_own", lambda: reason)
        assert backends.choose("prompt_attention", "cpu", dtype) is reference
    prompt_attention(*inputs(dtype=dtype))
    assert calls == [1]


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
    monkeypatch.delenv("PAE_BACKEND")  # a kernel is preferred also when nobody asks for it
    for dtype in execution.dtypes:
        preferred = backends.choose(OP, execution.device, dtype)
        assert (preferred is chosen) == (execution.version != "sdpa")
    assert backends.choose(OP, execution.device, FP64) is reference
