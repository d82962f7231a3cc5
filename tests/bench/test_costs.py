"""What a step costs is what the model says, and no committed count gets worse unnoticed."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import pae
from pae.backbones import BackboneView
from pae.choices import POOLS
from pae.plan import fold
from pae_kernels import flops as formulas
from pae_kernels.adaptive import reference as adaptive
from pae_kernels.attention import reference as attention
from pae_kernels.koopman import reference as koopman
from pae_kernels.maps import cpu as maps
from pae_kernels.spectrum import reference as spectrum

ROOT = Path(__file__).parents[2]

from bench import bench_scaling, bench_step, cost, runner, shapes  # noqa: E402
from bench.memory import SavedBytes  # noqa: E402
from bench.peers.vpt import OfficialStyleVPT  # noqa: E402
from tests import counts, guard, processes  # noqa: E402

CPU = torch.device("cpu")
OPS = {  # as imported: other tests define ops of their own
    schema.name.removeprefix("pae::")
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("pae::")
}
WAYS = [("official", "keep"), ("sdpa", "keep"), *(("pae", memory) for memory in cost.MEMORY)]


# ---- the model


# PyTorch's own fused attention on a CPU, which its counter does not know in 2.11
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda d_out, q, k, v, *_, **__: sdpa_backward_flop_count(d_out, q, k, v)
    ),
}


def flop_counter(formulas=None):
    """PyTorch's counter, silent, with further `formulas`."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION | (formulas or {}))


@cache
def counted_flops(name, prompts, batch, method, memory, **options):
    """`bench.cost.flops` as PyTorch's counter sees it, on tensors without values: no product is
    computed and no weight allocated. Seconds for a whole ViT-B, so once.
    """
    with torch.device("meta"):
        vit = timm.create_model(name, **options)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(prompts)).train()
    # the quickest without values are tensors on "meta", where neither autocast nor SDPA runs
    mode, device = nullcontext(), "meta"
    if method != "official":
        mode, device = FakeTensorMode(allow_non_fake_inputs=True), "cpu"
    with mode:
        model.to_empty(device=device)
        embed = vit.patch_embed
        images = torch.empty(batch, embed.proj.in_channels, *embed.img_size, device=device)
    forward = model
    if method == "official":
        forward = OfficialStyleVPT(vit, model.prompts.tokens, model.head)
    elif method == "pae":
        # there are no values to tell what a readout reads
        with patch.object(type(model.view), "reads_class_only", True):
            plan = fold(model.view, torch.float32)
        model.plan = lambda **_: plan  # a signature of addresses would find none
        forward = lambda x: pae.fast_forward(model, x, memory=memory)
    # images are looked at before they are used: these have no values
    with mode, patch.object(BackboneView, "check_images"):
        with flop_counter() as ahead:
            logits = forward(images)
        with flop_counter() as back:
            logits.sum().backward()
    return cost.Flops(ahead.get_total_flops(), back.get_total_flops())


@pytest.mark.parametrize(
    ("name", "prompts", "batch", "method", "memory", "options"),
    [
        (shapes.BASE, 50, 128, "pae", "keep", {}),
        (shapes.BASE, 50, 128, "official", "keep", {}),
        (shapes.BASE, 100, 128, "pae", "keep", {}),
        (shapes.BASE, 50, 128, "sdpa", "keep", {"depth": 3}),
        (shapes.LARGE, 200, 16, "pae", "recompute", {"depth": 4}),
        (shapes.SMALL, 10, 1, "pae", "recompute8", {"depth": 5, "img_size": 384}),
        (shapes.NARROW, 1, 3, "pae", "keep", {"depth": 2, "num_classes": 7}),
    ],
)
def test_counted_flops_are_those_of_the_model(name, prompts, batch, method, memory, options):
    """Both directions, of real sizes, to the last operation."""
    counted = counted_flops(name, prompts, batch, method, memory, **options)
    assert counted == cost.flops(cost.Shape.named(name, **options), prompts, batch, method, memory)


@pytest.mark.parametrize(("prompts", "bar"), [(50, 0.76), (100, 0.63)])
def test_forward_flops_against_the_official_path(prompts, bar):
    """ViT-B/16, 224 pixels, 128 images: at most that share of what concatenation pays for."""
    official = counted_flops(shapes.BASE, prompts, 128, "official", "keep")
    ours = counted_flops(shapes.BASE, prompts, 128, "pae", "keep")
    assert ours.forward / official.forward <= bar
    assert ours.backward < official.backward


@pytest.fixture(scope="module", params=bench_step.DTYPES)
def step(request):
    return bench_step.open_step(bench_step.Case(shapes.TINY, 5, request.param, 3), CPU)


def run_of(step, method, memory):
    """The module that is trained, and its forward."""
    if method == "pae":
        return step.model, lambda x: pae.fast_forward(step.model, x, memory)
    trained = step.official if method == "official" else step.model
    return trained, trained


@pytest.mark.parametrize(("method", "memory"), WAYS)
def test_saved_bytes_are_those_of_the_model(step, method, memory):
    """All that one step keeps, to the last byte."""
    trained, forward = run_of(step, method, memory)
    constants = [*trained.parameters(), *trained.buffers(), step.images]
    with SavedBytes([*constants, *(step.folded() if method == "pae" else [])]) as saved:
        step.run(forward, trained)
    sizes = step.shape, 5, 3, method, memory
    assert saved.activations == cost.saved_bytes(*sizes, step.itemsize)


@pytest.mark.parametrize(("method", "memory"), WAYS)
def test_flops_of_a_step_that_runs(step, method, memory):
    """On tensors with values, under autocast too."""
    trained, forward = run_of(step, method, memory)
    step.folded()  # blocks are proven when a plan is made, not in a step
    with flop_counter() as counter:
        step.run(forward, trained)
    assert counter.get_total_flops() == cost.flops(step.shape, 5, 3, method, memory).step


@pytest.mark.parametrize("memory", cost.MEMORY)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", bench_step.DTYPES)
def test_costs_of_an_average(dtype, pool, memory):
    """Of FLOPs and of bytes, to the last one: the last block is a middle one."""
    step = bench_step.open_step(bench_step.Case(shapes.TINY, 5, dtype, 3), CPU)
    pae.backbones.average_pooled(step.model.backbone, norm="behind")
    step.model.pool = pool
    forward = lambda x: pae.fast_forward(step.model, x, memory)
    constants = [*step.model.parameters(), *step.model.buffers(), step.images, *step.folded()]
    with SavedBytes(constants) as saved, flop_counter() as counter:
        step.run(forward, step.model)
    sizes = step.shape, 5, 3, "pae", memory
    assert counter.get_total_flops() == cost.flops(*sizes, pool=pool).step
    assert saved.activations == cost.saved_bytes(*sizes, step.itemsize, pool=pool)


def test_all_rows_cost_in_the_last_block_alone():
    """ViT-B/16 at 224 pixels, 50 prompts: 50 of 197 rows more in one block of twelve."""
    shape = cost.Shape.named(shapes.BASE)
    image, every = (cost.flops(shape, 50, 4, pool=pool).step for pool in ("image", "all"))
    assert 1.01 < every / image < 1 + 50 / 197 / 10


def test_live_flops_are_less_than_any_method_executes():
    shape = cost.Shape.named(shapes.BASE)
    for prompts in (1, 50, 200):
        live = cost.live_step_flops(shape, prompts, 8)
        assert all(live < cost.flops(shape, prompts, 8, *way).step for way in WAYS)


def test_softmax_in_fp32_costs_the_official_path_memory_on_a_gpu():
    shape = cost.Shape.named(shapes.BASE)
    on = {
        d: cost.saved_bytes(shape, 50, 1, "official", itemsize=2, device=d) for d in ("cpu", "cuda")
    }
    assert on["cuda"] - on["cpu"] == 12 * 4 * 12 * 247**2
    fp32 = [cost.saved_bytes(shape, 50, 1, "official", device=d) for d in ("cpu", "cuda")]
    assert fp32[0] == fp32[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "flash"}, r"method must be one of .* got 'flash'"),
        ({"memory": "none"}, r"memory must be one of .* got 'none'"),
        ({"pool": "mean"}, r"pool must be one of .* got 'mean' of 'pae'"),
        (
            {"pool": "all", "method": "sdpa"},
            r"pool must be .* of method 'pae', got 'all' of 'sdpa'",
        ),
    ],
)
def test_unknown_ways_are_refused(arguments, message):
    shape = cost.Shape.named(shapes.NARROW)
    for model in (cost.flops, cost.saved_bytes):
        with pytest.raises(ValueError, match=message):
            model(shape, 5, 1, **arguments)
    with pytest.raises(ValueError, match="depth must be at least 2, got 1"):
        cost.Shape.named(shapes.NARROW, depth=1)


# ---- PyTorch's counter and the ops


def counted(function, *args) -> int:
    """What the counter sees of a reference, once it knows that a complex multiply-add is 4 real
    ones, and `baddbmm_`.
    """

    def product(a, b, *_, out_val, **__):
        return (8 if out_val.is_complex() else 2) * out_val.numel() * a.shape[-1]

    def added(_, *factors, out_val, **__):
        return product(*factors, out_val=out_val)

    product._get_raw = added._get_raw = True
    aten = torch.ops.aten
    known = {aten.bmm: product, aten.mm: product, aten.baddbmm_: added}
    with flop_counter(known) as seen:
        function(*args)
    return seen.get_total_flops()


def formula(op: str, *args) -> int:
    """What the counter will say of an op with these arguments."""
    shapes_of = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
    return formulas.formulas()[op](*shapes_of, out_shape=None)


@pytest.mark.parametrize("class_only", [False, True])
@pytest.mark.parametrize("sets", [1, 2])
def test_attention_formulas(class_only, sets):
    """Those of the reference's products: none is hidden, none is counted twice."""
    qkv, kv = torch.randn(2, 7, 3, 4, 8), torch.randn(sets, 5, 2, 4, 8)
    args = qkv, kv, None, 0.3, class_only, None, None, None
    assert formula("prompt_attention_fwd", *args) == counted(attention.forward, *args)
    out, lse = attention.forward(*args)
    for need_qkv in (True, False):
        back = torch.randn_like(out), *args, out, lse, need_qkv
        assert formula("prompt_attention_bwd", *back) == counted(attention.backward, *back)


@pytest.mark.parametrize("prompts", [0, 5])
def test_causal_attention_formulas(prompts):
    """A row costs what one query over it and the rows before costs."""
    draw = lambda rows: (torch.randn(2, rows, 3, 4, 8), torch.randn(1, prompts, 2, 4, 8))
    rest = None, 0.3, False, None, None, None
    one_by_one = [(*draw(rows), None, 0.3, True, None, None, None) for rows in range(1, 8)]
    expected = sum(formula("prompt_attention_fwd", *args) for args in one_by_one)
    qkv, kv = draw(7)
    assert formula("prompt_attention_fwd", qkv, kv, *rest, True) == expected
    given = qkv[:, :, 0].flatten(2), qkv, kv, *rest, None, None
    assert 2 * formula("prompt_attention_bwd", *given, True, True) == 5 * expected
    assert formula("prompt_attention_bwd", *given, False, True) == formula(
        "prompt_attention_bwd", *given, False
    )


def test_adaptive_formulas():
    x, weight = torch.randn(2, 7, 8), torch.randn(3, 7)
    assert formula("token_mix_fwd", x, weight, 1e-5) == counted(adaptive.token_mix, x, weight, 1e-5)
    u, mean, rstd = adaptive.token_mix(x, weight, 1e-5)
    for need_x in (True, False):
        back = torch.randn_like(u), x, weight, mean, rstd, need_x
        assert formula("token_mix_bwd", *back) == counted(adaptive.token_mix_backward, *back)
    down, up = torch.randn(4, 8), torch.randn(8, 4)
    args = u, torch.randn(8), torch.randn(3, 8), torch.randn(3), down, up, "relu", None, None
    assert formula("prompt_bottleneck_fwd", *args) == counted(adaptive.prompt_bottleneck, *args)
    back = torch.randn_like(u), *args
    expected = counted(adaptive.prompt_bottleneck_backward, *back)
    assert formula("prompt_bottleneck_bwd", *back) == expected


def test_enlarged_conv_formulas():
    x, weight = torch.randn(2, 3, 4, 8), torch.randn(5, 8, 3, 3)
    once = counted(maps.enlarged_conv, x, weight, 2)
    assert formula("enlarged_conv_fwd", x, weight, 2) == once
    d_y = torch.randn(2, 6, 8, 5)
    for needs in ((True, True), (True, False), (False, True)):  # a product for each gradient
        assert formula("enlarged_conv_bwd", d_y, x, weight, 2, *needs) == sum(needs) * once
    back = d_y, x, weight, 2, True, False
    assert counted(maps.enlarged_conv_backward, *back) == once


@pytest.mark.parametrize("formulation", ["code", "paper"])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("blocks", [1, 5])
def test_koopman_formulas(formulation, stacked, blocks):
    """The spectral norm's own products, of vectors, are all that is left out."""
    k = 64
    prompts, lift = torch.randn(2, blocks, 3, 16), torch.randn(2, k, 16)
    K, L = (torch.randn(2, *([blocks] if stacked else []), k, k) for _ in range(2))
    args = prompts, lift, K, L, formulation, None
    expected = counted(koopman.forward, *args)
    assert formula("koopman_losses_fwd", *args) == pytest.approx(expected, rel=0.04)
    saved = koopman.forward(*args)[2:]
    back = torch.ones(2), torch.ones(2), *args, *saved
    assert formula("koopman_losses_bwd", *back) == counted(koopman.backward, *back)
    single = [t[0] for t in (prompts, lift, K, L)]
    assert 2 * formula("koopman_losses_fwd", *single, formulation, None) == formula(
        "koopman_losses_fwd", *args
    )


def test_spectrum_formulas():
    images = torch.randn(2, 3, 16, 24)
    args = torch.fft.fft2(images), torch.tensor([[1, 2], [5, 7], [3, 4]]), 4
    assert formula("shortcut_images_fwd", *args) == counted(spectrum.shortcut_images, *args)
    embedding = torch.randn(8, 3, 4, 8), None, None, torch.float32
    expected = counted(spectrum.shortcut_tokens, *args, *embedding)
    assert formula("shortcut_tokens_fwd", *args, *embedding) == expected
    tokens = torch.randn(3, 2, 6, 8)
    assert formula("shortcut_pool_fwd", tokens, None) == counted(spectrum.shortcut_pool, tokens)


def test_every_op_with_products_has_a_formula():
    without = "layer_norm_fwd add_layer_norm_fwd layer_norm_bwd"
    without += " pixel_loss_fwd pixel_loss_bwd"
    without += " activation_fwd activation_coded_fwd activation_bwd gated_fwd gated_bwd rotate_"
    without += " gated_norm_fwd gated_norm_bwd"
    assert formulas.formulas().keys() | set(without.split()) == OPS


def test_formulas_read_the_arguments_that_they_name():
    """In the order of the schema, under its names."""
    for name, function in formulas.formulas().items():
        schema = getattr(torch.ops.pae, name).default._schema
        kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        named = [
            p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds
        ]
        assert named == [a.name for a in schema.arguments][: len(named)], name


def test_formulas_wait_for_the_counter():
    """Importing the kernels imports neither the counter nor Triton."""
    code = """
import sys, torch, pae_kernels
print({"torch.utils.flop_counter", "triton"} & set(sys.modules))
from torch.utils.flop_counter import flop_registry
print({getattr(torch.ops.pae, op) for op in pae_kernels.flops.formulas()} <= set(flop_registry))
print([f for f in sys.meta_path if type(f).__module__.startswith("pae")])
"""
    done = processes.run([sys.executable, "-c", code])
    assert done.stdout.split("\n") == ["set()", "True", "[]", ""]


def test_formulas_are_registered_at_once_where_the_counter_is_there(monkeypatch):
    registered = []
    monkeypatch.setattr(formulas, "register", lambda: registered.append(True))
    finders = list(sys.meta_path)
    formulas.register_when_imported()
    assert registered == [True] and sys.meta_path == finders


def test_registering_twice_does_no_harm():
    formulas.register()
    formulas.register()


# ---- the guard


@pytest.fixture(scope="module")
def committed() -> dict[str, int]:
    return guard.read()[1]


def test_no_count_is_worse_than_committed(committed):
    """Nor better, nor missing, nor new: one test, as most of its time is one measurement."""
    measured, (version, _) = guard.measure(), guard.read()
    if importlib.util.find_spec("triton") is None:  # which then counts nothing
        parts = "triton/", "host/"
        committed = {n: count for n, count in committed.items() if not n.startswith(parts)}
    names = committed.keys() | measured.keys()
    said = [guard.complaint(n, committed.get(n), measured.get(n), version) for n in sorted(names)]
    assert not any(said), "\n".join(filter(None, said))


def test_every_family_is_guarded(committed):
    """Those that pae ships: another test may have registered one of its own."""
    shipped = {f.__name__ for f in pae.prompts.METHODS.values() if f.__module__.startswith("pae.")}
    assert {name.split("/")[1] for name in committed if name.startswith("family/")} == shipped


def test_a_block_is_four_products_attention_and_three_passes(committed):
    """Each way; a kernel of our own for all but the products. On a CPU in 16 bits there is one
    product more, of the prompts' keys and values, which elsewhere is one for all blocks.
    """
    for way in guard.WAYS:
        assert committed[f"step/bf16/{way}/operations in a block"] == 4 + 1 + 3 + 1
        assert committed[f"triton/step/{way}/kernels in a block"] == 1 + 3


def worse(*parts: str) -> set[str]:
    """Names of what the guard finds worse than committed."""
    version, committed = guard.read()
    found = guard.measure(*parts)
    said = {
        name: guard.complaint(name, committed.get(name), found[name], version) for name in found
    }
    return {name for name, line in said.items() if "is worse" in line}


def test_one_needless_copy_is_noticed(monkeypatch):
    """On every PyTorch: one of eight operations is more than another version's room."""
    mlp_half = pae.block.mlp_half
    monkeypatch.setattr(
        pae.block, "mlp_half", lambda block, x, out, *rest: mlp_half(block, x, out.clone(), *rest)
    )
    found = worse("step")
    assert "step/fp32/forward/operations in a block" in found
    assert "step/bf16/forward/operations in a block" in found
    assert not {name for name in found if "backward" in name or "FLOPs" in name}
    if guard.read()[0] == guard.VERSION:
        assert "step/bf16/forward/tensors allocated" in found
        assert "step/fp32/forward/bytes allocated" in found


def test_a_kept_tensor_is_noticed(monkeypatch):
    """As if "recompute8" kept the hidden rows themselves."""
    monkeypatch.setattr(pae.block.pointwise, "activation", keeps_hidden_rows)
    found = worse("memory")
    assert found >= {f"memory/{d}/recompute8/bytes of an image in a block" for d in guard.DTYPES}
    assert not {name for name in found if "/recompute8/" not in name}


def keeps_hidden_rows(u, kind, code=False):
    return torch.ops.pae.activation_fwd(u, kind), u if code else None


def test_needless_products_are_noticed(monkeypatch):
    project = pae.block.project

    def twice(block, xhat, *rest):
        project(block, xhat, *rest)
        return project(block, xhat, *rest)

    monkeypatch.setattr(pae.block, "project", twice)
    assert "step/fp32/forward/FLOPs" in worse("step")


def test_one_more_kernel_is_noticed(monkeypatch):
    pytest.importorskip("triton")
    from pae_kernels.pointwise import triton

    activation = triton.activation
    monkeypatch.setattr(triton, "activation", lambda u, kind: activation(activation(u, kind), kind))
    found = worse("triton")
    assert "triton/step/forward/kernels in a block" in found
    assert not {name for name in found if "backward" in name}


def test_the_host_waits_for_no_value(monkeypatch, committed):
    """In a step on a GPU: it would stand still. One that is read in each block is noticed."""
    pytest.importorskip("triton")
    from tests import host

    steps = {n.split("/")[1] for n in committed if n.startswith("host/")} - {"ranking"}
    assert steps == {*host.STEPS}
    assert not {n for n in committed if "/waits" in n and n.split("/")[1] in steps}
    mlp_half = pae.block.mlp_half

    def reads(block, x, out, *rest):
        assert out.sum().item()
        return mlp_half(block, x, out, *rest)

    monkeypatch.setattr(pae.block, "mlp_half", reads)
    seen = host.step("keep", host.DEPTH)["forward"]
    assert seen["waits"] >= host.DEPTH - 1
    assert seen["operations"] > committed["host/keep/forward/operations"]


def test_complaints_say_what_was_what_is_and_how_to_accept_it():
    here = guard.VERSION
    say = guard.complaint
    assert say("a", 5, 5, here) == ""
    assert say("a", 4, 5, here) == (
        "a is worse: 5, was 4 (+25.0%). If it must be: python -m tests.guard --update"
    )
    assert say("a", 5, 4, here) == (
        "a is better: 4, was 5. Keep it so: python -m tests.guard --update"
    )
    assert "a is new (5)" in say("a", None, 5, here)
    assert "a is no longer counted (was 5)" in say("a", 5, None, here)


def test_another_pytorch_has_a_little_room_where_it_dispatches():
    say = guard.complaint
    for name in ("step/operations in a block", "step/bytes allocated"):
        assert say(name, 100, 105, "1.0") == say(name, 100, 90, "1.0") == ""
        assert "on PyTorch 1.0" in say(name, 100, 106, "1.0")
    for name in ("memory/bytes of an image", "step/FLOPs", "triton/kernels"):
        assert "is worse" in say(name, 100, 101, "1.0")


def test_update_writes_what_is_counted_and_the_check_reads_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(guard, "FILE", tmp_path / "costs.json")
    monkeypatch.setattr(guard, "measure", lambda: {"a": 2})
    assert guard.main([]) == 1
    assert guard.main(["--update"]) == 0
    assert json.loads(guard.FILE.read_text()) == {"torch": guard.VERSION, "counts": {"a": 2}}
    assert guard.main([]) == 0
    monkeypatch.setattr(guard, "measure", lambda: {"a": 3})
    capsys.readouterr()
    assert guard.main([]) == 1
    assert "a is worse: 3, was 2" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [guard.FILE]


def test_work_counts_results_once_and_views_never():
    x = torch.randn(4, 8)
    with counts.Work() as seen:
        y = x + 1  # one operation, one tensor
        y.view(8, 4).t().mul_(2)  # one operation, no memory
        torch.addmm(y, x, torch.empty(8, 8), out=y)  # one operation; one tensor, by empty
    assert seen.ops == {"add": 1, "mul_": 1, "addmm": 1}
    assert (seen.tensors, seen.bytes) == (2, 4 * (4 * 8 + 8 * 8))


# ---- scaling


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_scaling_groups(device):
    """Sizes nest, names are unique, and every axis has a value where others would win."""

    def names(size):
        settings = runner.Settings(size, 1, None, None, torch.device(device), "process")
        groups = bench_scaling.groups(settings)
        assert len({g.name for g in groups}) == len(groups)
        assert all(len(g.providers) == 4 and g.name.startswith("scaling/") for g in groups)
        return {g.name for g in groups if not g.left_out}

    assert names("quick") < names("default") < names("full")
    axes = {name.split("/")[1] for name in names("default")}
    assert axes == {"prompts", "batch", "image", "depth", "model"}
    assert {"scaling/prompts/P1", "scaling/batch/B1"} <= names("default")


def test_columns_of_a_scaled_step():
    settings = runner.Settings("smoke", 1, None, None, CPU, "process")
    group = next(g for g in bench_scaling.groups(settings) if g.name == "scaling/depth/L2")
    outcomes = runner.run_group(group, {"pae keep"}, settings)
    columns = outcomes["pae keep"].columns
    assert columns["depth"] == 2 and columns["prompts"] == 5 and columns["images"] == 2
    assert columns["saved_mb_per_image"] == pytest.approx(columns["model_saved_mb_per_image"])
    assert columns["live_gflop"] < columns["model_gflop"]
