"""fast_forward equals the reference in value and in every gradient, and keeps what it promises."""

import copy
import sys
from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pae
from pae import block, engine
from pae.plan import PlainNorm
from tests import counts, processes, tiny
from tests.errors import assert_not_worse
from tests.tiny import FEATURES, FromRows, Given, assert_engines_agree, error, gradients, prompted

DTYPES = [torch.float64, torch.float32]


# ---- equality of the two engines


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_backbone_feature(feature, dtype):
    model = prompted(feature, dtype=dtype)
    assert_engines_agree(model, tiny.images(model.backbone))


@pytest.mark.parametrize("feature", ["plain", "avg", "one_block", "qk_norm", "map"])
def test_without_a_gradient_of_the_images(feature):
    """The usual case: the first block then reads fewer saved tensors."""
    model = prompted(feature)
    assert_engines_agree(model, tiny.images(model.backbone), wrt_images=False)


@pytest.mark.parametrize("count", [0, 1, 5, 50])
@pytest.mark.parametrize("feature", ["plain", "avg", "qk_norm"])
def test_prompt_counts(feature, count):
    model = prompted(feature, count)
    assert_engines_agree(model, tiny.images(model.backbone))


@pytest.mark.parametrize("wrt_images", [True, False])
@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 0, 4), (0, 3, 2), (4, 1, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("feature", ["plain", "avg", "qk_norm"])
def test_ragged_prompt_counts(feature, counts, wrt_images):
    model = prompted(feature, list(counts))
    assert_engines_agree(model, tiny.images(model.backbone), wrt_images=wrt_images)


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("feature", ["plain", "avg", "registers", "avg_no_class_token", "no_pool"])
def test_prompts_that_stay_in_the_sequence(feature, count):
    model = prompted(feature, pae.prompts.VPTShallow(count))
    assert_engines_agree(model, tiny.images(model.backbone))
    assert_engines_agree(model, tiny.images(model.backbone), wrt_images=False)


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("family", [pae.prompts.VPTDeep, pae.prompts.VPTShallow])
def test_prompt_dropout(family, scope):
    """The same seed drops the same entries in both engines; evaluation drops none."""
    model = prompted("avg", family(5, dropout=0.5, dropout_scope=scope))
    x = tiny.images(model.backbone)
    assert_engines_agree(model, x)
    one, _ = gradients(model, x, "fast", seed=1)
    other, _ = gradients(model, x, "fast", seed=2)
    assert error(one, other) > 1e-2
    model.eval()
    assert_engines_agree(model, x)
    assert torch.equal(gradients(model, x, "fast", seed=1)[0], gradients(model, x, "fast")[0])


FAMILIES = {
    "shared": lambda: Given([4, 2, 3]),
    "per_sample": lambda: Given([4, 2, 3], sets=3),
    "per_sample_ragged": lambda: Given([0, 2, 0], sets=3),
    "grouped": lambda: Given([4, 2, 3], sets=2, group=[1, 0, 1]),
    "grouped_equal_counts": lambda: Given([4, 4, 4], sets=2, group=[1, 0, 1]),
    "group_unused": lambda: Given([4, 4, 4], sets=4, group=[2, 0, 2]),
    "one_group": lambda: Given([4, 2, 3], sets=1, group=[0, 0, 0]),
    "from_rows": lambda: FromRows([3, 3, 3]),
    "from_rows_ragged": lambda: FromRows([0, 2, 3]),
    "from_rows_grouped": lambda: FromRows([3, 2, 3], grouped=True),
}


@pytest.mark.parametrize("wrt_images", [True, False])
@pytest.mark.parametrize("feature", ["plain", "avg", "qk_norm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_family(family, feature, wrt_images):
    model = prompted(feature, FAMILIES[family]())
    assert_engines_agree(model, tiny.images(model.backbone), wrt_images=wrt_images)


@pytest.mark.parametrize("training", [True, False])
def test_training_and_evaluation(training):
    model = prompted("dropout").train(training)
    assert_engines_agree(model, tiny.images(model.backbone))


@pytest.mark.parametrize("batch", [0, 1, 7])
@pytest.mark.parametrize("feature", ["plain", "avg"])
def test_batch_sizes(feature, batch):
    model = prompted(feature)
    x = tiny.images(model.backbone, batch)
    assert_engines_agree(model, x)
    assert pae.fast_forward(model, x).shape == (batch, 5)


def test_gradients_of_an_empty_batch_are_zero():
    model = prompted("plain")
    pae.fast_forward(model, tiny.images(model.backbone, 0)).sum().backward()
    assert torch.equal(model.prompts.tokens.grad, torch.zeros_like(model.prompts.tokens))


def test_rows_that_are_not_contiguous():
    model = prompted("plain")
    x = tiny.images(model.backbone, 4)
    expected = pae.fast_forward(model, x[:2])
    wide = torch.stack([x[:2], x[2:]], dim=-1)
    assert torch.equal(pae.fast_forward(model, wide[..., 0]), expected)
    channels_last = x[:2].to(memory_format=torch.channels_last)
    assert error(pae.fast_forward(model, channels_last), expected) < 1e-12


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(context):
    model = prompted("plain")
    x = tiny.images(model.backbone)
    expected = model(x)
    with context():
        got = pae.fast_forward(model, x)
    assert not got.requires_grad
    assert error(got, expected) < 1e-12


@pytest.mark.parametrize("memory", engine.MEMORY_MODES)
@pytest.mark.parametrize("feature", ["plain", "avg", "qk_norm"])
def test_every_entry_is_written(poisoned_memory, feature, memory):
    for family in (pae.prompts.VPTDeep([2, 0, 3]), Given([2, 2, 2], sets=2, group=[1, 1, 1])):
        model = prompted(feature, family)
        tolerance = 5e-3 if memory == "recompute8" else 1e-7
        assert_engines_agree(model, tiny.images(model.backbone), grads=tolerance, memory=memory)


def test_training_after_evaluation_in_inference_mode():
    """The plan that evaluation built is one that autograd may use."""
    model = prompted("plain")
    x = tiny.images(model.backbone)
    with torch.inference_mode():
        pae.fast_forward(model, x)
    assert_engines_agree(model, x)


def test_the_same_from_run_to_run():
    model = prompted("avg", Given([4, 4, 4], sets=2, group=[1, 0, 1]), torch.float32)
    x = tiny.images(model.backbone)
    first, first_grads = gradients(model, x, "fast", wrt_images=True)
    second, second_grads = gradients(model, x, "fast", wrt_images=True)
    assert torch.equal(first, second)
    assert all(torch.equal(g, second_grads[n]) for n, g in first_grads.items())


def test_two_forwards_before_one_backward():
    """No block may keep state between calls: gradients of two batches add up."""
    model = prompted("plain")
    x = tiny.images(model.backbone, 4)
    both = pae.fast_forward(model, x[:2]).sum() + pae.fast_forward(model, x[2:]).sum()
    (got,) = torch.autograd.grad(both, model.prompts.tokens)
    (expected,) = torch.autograd.grad(model(x).sum(), model.prompts.tokens)
    assert error(got, expected) < 1e-12


def test_backward_twice_through_one_graph():
    model = prompted("avg")
    scalar = pae.fast_forward(model, tiny.images(model.backbone)).square().sum()
    (first,) = torch.autograd.grad(scalar, model.prompts.tokens, retain_graph=True)
    (second,) = torch.autograd.grad(scalar, model.prompts.tokens)
    assert torch.equal(first, second)


def test_double_backward_is_an_error():
    model = prompted("plain")
    scalar = pae.fast_forward(model, tiny.images(model.backbone)).square().sum()
    with pytest.raises(RuntimeError, match=r'no second derivatives .*engine="reference"'):
        torch.autograd.grad(scalar, model.prompts.tokens, create_graph=True)


def test_outputs_and_inputs_may_be_overwritten_after_the_forward():
    """What is saved for the backward is never a tensor that the caller holds."""
    model = prompted("plain")
    x = tiny.images(model.backbone)
    expected = gradients(model, x, "fast")[1]["prompts.tokens"]
    logits = pae.fast_forward(model, x)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    d_logits = weights + 2 * logits.detach()
    x.zero_()
    logits.detach().zero_()
    logits.backward(d_logits)
    assert error(model.prompts.tokens.grad, expected) < 1e-12


def test_activation_checkpointing_around_fast_forward():
    model = prompted("plain", pae.prompts.VPTDeep(3, dropout=0.3))
    x = tiny.images(model.backbone)
    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(pae.fast_forward(model, x).sum(), model.prompts.tokens)
    torch.manual_seed(0)
    logits = torch.utils.checkpoint.checkpoint(pae.fast_forward, model, x, use_reentrant=False)
    (got,) = torch.autograd.grad(logits.sum(), model.prompts.tokens)
    assert torch.equal(got, expected)


# ---- 16 bits


DRAWS = 24
MEASURED = ("logits", "prompts.tokens", "head.weight")


@cache
def exact(feature, seed):
    """(model, images, logits, gradients), all in fp64, of weights and images that fp32 holds."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
    generator = torch.Generator().manual_seed(seed)
    model = prompted(feature, 10, mlp_ratio=4, num_classes=40, **size)
    with torch.no_grad():
        model.backbone.pos_embed.mul_(3)  # in trained models the stream outgrows its updates
        for p in model.parameters():
            p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator))
            p.copy_(p.float())
    x = tiny.images(model.backbone, 6, seed).float().double()
    return model, x, *gradients(model, x, "reference")


def errors_in_16_bits(kind, feature, autocast, memory="keep"):
    """(draws, 3): errors against fp64 of logits, prompt gradient and head gradient."""
    errors = torch.zeros(DRAWS, len(MEASURED))
    dtype = torch.float32 if autocast else torch.bfloat16
    for seed in range(DRAWS):
        model, x, truth, truth_grads = exact(feature, seed)
        model = copy.deepcopy(model).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, grads = gradients(model, x.to(dtype), kind, memory)
        errors[seed] = torch.tensor(
            [error(logits, truth), *(error(grads[n], truth_grads[n]) for n in MEASURED[1:])]
        )
    return errors


of_the_reference = cache(partial(errors_in_16_bits, "reference"))


def assert_as_good_as_the_reference(feature, autocast, memory="keep"):
    fast = errors_in_16_bits("fast", feature, autocast, memory)
    assert_not_worse(fast, of_the_reference(feature, autocast), 1.2, MEASURED)


@pytest.mark.parametrize("feature", ["plain", "avg", "clip"])
def test_autocast_is_as_good_as_the_reference(feature):
    reference = of_the_reference(feature, autocast=True)
    assert reference.min() > 1e-4 and reference.max() < 0.1  # it did run in 16 bits
    assert_as_good_as_the_reference(feature, autocast=True)


@pytest.mark.parametrize("memory", ["recompute8", "recompute"])
def test_memory_modes_cost_nothing_visible_under_autocast(memory):
    assert_as_good_as_the_reference("plain", autocast=True, memory=memory)


@pytest.mark.parametrize("feature", ["plain", "avg", "clip"])
def test_a_16_bit_model_is_as_good_as_the_reference(feature):
    assert_as_good_as_the_reference(feature, autocast=False)


def narrow_stream(monkeypatch):
    """The residual stream is rounded to 16 bits before every norm."""
    original = block._sum_and_norm

    def rounded(*args):
        x, *normed = original(*args)
        return x.bfloat16().to(x.dtype), *normed

    monkeypatch.setattr(block, "_sum_and_norm", rounded)


def narrow_sums(monkeypatch):
    """Products are accumulated in 16 bits, sixteen terms at a time."""

    def product(self, rows, plan, name):
        weight, bias = plan.product(name)
        parts = zip(rows.split(16, -1), weight.split(16, -1), strict=True)
        return sum(left @ right.t() for left, right in parts) + bias

    monkeypatch.setattr(block.Steps, "product", product)


@pytest.mark.parametrize("fault", [narrow_stream, narrow_sums])
def test_a_fault_of_16_bits_is_seen(fault, monkeypatch):
    """The comparison above is sharp enough to see what a hasty kernel would do."""
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=r"expected at most 1\.2: logits"):
        assert_as_good_as_the_reference("plain", autocast=True)


@pytest.mark.parametrize("shape", [(2, 5, 64), (0, 5, 64), (1, 1, 24)])
@pytest.mark.parametrize("way", ["as here", "another schema", "switched off", "fp32"])
def test_product_with_its_bias(way, shape, monkeypatch):
    """In bf16 by oneDNN's own op where this PyTorch has it as we know it, and else by `F.linear`:
    rounded once, of rows that lie apart too, and counted alike.
    """
    block._fuses_bias.cache_clear()
    here = block._fuses_bias()
    block._fuses_bias.cache_clear()
    if way == "another schema":
        monkeypatch.setattr(block, "_FUSED", block._FUSED.replace("str attr", "int attr"))
    dtype = torch.float32 if way == "fp32" else torch.bfloat16
    torch.manual_seed(0)
    rows = torch.randn(*shape[:2], 2 * shape[2]).to(dtype)[..., : shape[2]]
    weight, bias = torch.randn(48, shape[2]).to(dtype), torch.randn(48).to(dtype)
    if way == "switched off":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with FlopCounterMode(display=False) as flops, counts.Work() as work:
        got = block._linear(rows, weight, bias)
    block._fuses_bias.cache_clear()
    assert work.ops["_linear_pointwise"] == (way == "as here" and here)
    assert flops.get_total_flops() == 2 * rows.shape[:2].numel() * weight.numel()
    wide = [t.double() for t in (rows, weight, bias)]
    exact, size = F.linear(*wide), F.linear(*(t.abs() for t in wide))
    step = torch.finfo(dtype).eps / 2
    assert got.dtype == dtype and got.shape == exact.shape
    assert ((got - exact).abs() <= step * exact.abs() + max(step / 2, 1e-6) * size).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_prompt_keys_of_all_blocks_in_16_bits(groups):
    """One by one, because a batched product copies weights; the same keys, values and gradients."""
    model = prompted("plain", [3, 3, 3], torch.bfloat16)
    plan = model.plan()
    torch.manual_seed(0)
    rows = torch.randn(3, groups, 3, plan.w_qkv.shape[-1]).bfloat16().requires_grad_()
    asked = [engine.BlockPrompts(each) for each in rows.unbind()]
    with counts.Work() as work:
        found = engine._with_keys_values(plan, asked, 2)
    assert not work.ops["baddbmm"] and found[2] is asked[2]
    if groups == 2:  # of each sample or group: block by block, as they came
        assert found == asked
        return
    assert work.ops["native_layer_norm"] == 1
    for i, prompts in enumerate(found[:2]):
        own = block.keys_values(
            plan.blocks[i], block.normalise(rows[i], PlainNorm(1e-6), torch.bfloat16)
        )
        assert error(prompts.kv, own) < 1e-6
        one, other = (
            torch.autograd.grad(kv.sum(), rows, retain_graph=True) for kv in (prompts.kv, own)
        )
        assert error(one[0], other[0]) < 1e-6


@pytest.mark.parametrize("feature", ["plain", "avg"])
def test_autocast_picks_the_plan_and_changes_nothing_else(feature):
    """Between stem and readout every dtype is chosen, not left to autocast."""
    model = prompted(feature, FromRows([2, 2, 2]), torch.float32)
    rows = model.view.embed(tiny.images(model.backbone))
    model.view.embed = lambda _: rows
    readout = []
    norm = model.backbone.norm if feature == "plain" else model.backbone.fc_norm
    norm.register_forward_pre_hook(lambda _, args: readout.append(args[0]))

    def run(context):
        with context:
            pae.fast_forward(model, tiny.images(model.backbone))
        wanted = model.prompts.maps.parameters()
        return [readout[-1], *torch.autograd.grad(readout[-1].square().sum(), list(wanted))]

    under_autocast = run(torch.autocast("cpu", torch.bfloat16))
    plan = model.plan(torch.bfloat16)
    model.plan = lambda **_: plan
    for a, b in zip(under_autocast, run(nullcontext()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("feature", ["plain", "avg"])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_in_16_bits(family, autocast, feature):
    model = prompted(feature, FAMILIES[family]())
    x = tiny.images(model.backbone)
    truth, truth_grads = gradients(model, x, "reference", wrt_images=True)
    dtype = torch.float32 if autocast else torch.bfloat16
    model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, grads = gradients(model, x.to(dtype), "fast", wrt_images=True)
    assert error(logits, truth) < 3e-2
    for name, g in truth_grads.items():
        assert (g is None) == (grads[name] is None)
        assert g is None or error(grads[name], g) < 8e-2, name


def test_autocast_leaves_fp64_alone():
    model = prompted("plain")
    x = tiny.images(model.backbone)
    with torch.autocast("cpu", torch.bfloat16):
        assert_engines_agree(model, x)


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_other_wrappers(wrapper):
    model = prompted("plain")
    x = tiny.images(model.backbone)
    assert error(pae.fast_forward(wrapper(model), x), model(x)) < 1e-12


def test_parameters_may_be_swapped_for_a_call():
    model = prompted("plain")
    x = tiny.images(model.backbone)
    swapped = {"prompts.tokens": torch.zeros_like(model.prompts.tokens)}
    got, expected = (
        torch.func.functional_call(model, swapped, (x,), {"engine": kind})
        for kind in ("fast", "reference")
    )
    assert error(got, expected) < 1e-12
    assert error(got, model(x)) > 1e-2


def test_autocast_casts_every_weight_once(monkeypatch):
    model = prompted("plain", dtype=torch.float32)
    x = tiny.images(model.backbone)
    folds = []
    fold = pae.plan.fold
    monkeypatch.setattr(pae.plan, "fold", lambda *a: folds.append(a[1]) or fold(*a))
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            pae.fast_forward(model, x).sum().backward()
        pae.fast_forward(model, x)
    assert folds == [torch.bfloat16, torch.float32]


def test_autocast_keeps_residual_stream_and_prompt_gradient_wide():
    model = prompted("no_pool", dtype=torch.float32)
    seen = []
    model.backbone.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = pae.fast_forward(model, tiny.images(model.backbone))
    logits.float().sum().backward()
    assert seen == [torch.float32]
    assert model.prompts.tokens.grad.dtype == torch.float32


# ---- memory


@pytest.mark.parametrize(
    "feature", ["plain", "avg", "qk_norm", "silu", "relu", "gelu_tanh", "clip"]
)
def test_low_memory_keeps_values_and_nearly_the_gradient(feature):
    model = prompted(feature, 5)
    x = tiny.images(model.backbone)
    exact, exact_grads = gradients(model, x, "fast", wrt_images=True)
    low, low_grads = gradients(model, x, "fast", "recompute8", wrt_images=True)
    assert torch.equal(low, exact)
    sizes = {n: error(low_grads[n], g) for n, g in exact_grads.items()}
    assert max(sizes.values()) <= 5e-3
    if feature != "relu":  # its derivative, 0 or 1, is exact in 8 bits
        assert sizes["prompts.tokens"] > 0


@pytest.mark.parametrize("feature", ["plain", "avg", "qk_norm", "silu"])
def test_lowest_memory_is_exact(feature):
    model = prompted(feature, 5)
    assert_engines_agree(model, tiny.images(model.backbone), memory="recompute")


def saved_bytes(model, x, memory="keep"):
    """Bytes that autograd keeps between forward and backward, parameters and plan apart."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for folded in model.plan().blocks:
        for t in vars(folded).values():
            if isinstance(t, torch.Tensor):
                known.add(t.untyped_storage().data_ptr())
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = pae.fast_forward(model, x, memory)
    assert logits.requires_grad
    return sum(storages.values())


def bytes_per_image(depth, counts, memory="keep", dtype=torch.float32, autocast=False):
    """`saved_bytes` of one more image, which leaves out what does not grow with the batch."""
    model = prompted("avg", counts, dtype, depth=depth, mlp_ratio=4)
    x = tiny.images(model.backbone, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return (saved_bytes(model, x, memory) - saved_bytes(model, x[:2], memory)) / 4


N, D, H = 17, 32, 4
S = N * D
STATISTICS = 4 * (2 * N + H * N)  # 1/std of two norms and the log-sum-exp, fp32


@pytest.mark.parametrize(
    "memory, autocast, expected",
    [
        ("keep", False, 10 * 4 * S),
        ("keep", True, 10 * 2 * S),
        ("recompute8", False, 3 * 4 * S + 4 * S),
        ("recompute8", True, 3 * 2 * S + 4 * S),
        ("recompute", False, 3 * 4 * S),
        ("recompute", True, 3 * 2 * S),
    ],
)
def test_what_a_middle_block_saves(memory, autocast, expected):
    three = bytes_per_image(3, [2, 2, 2], memory, autocast=autocast)
    four = bytes_per_image(4, [2, 2, 2, 2], memory, autocast=autocast)
    assert four - three == expected + STATISTICS


@pytest.mark.parametrize("memory, rows", [("keep", 7), ("recompute8", 4), ("recompute", 3)])
def test_what_the_first_prompted_block_saves(memory, rows):
    """Queries, output, normalised rows of the MLP and its hidden rows; no gradient passes it."""
    one = bytes_per_image(1, [2], memory)
    readout = 4 * 2 * (D + 1)  # what the norm of the pooled row and the head keep, about
    assert 0 <= one - (rows * 4 * S + 4 * (N + H * N)) <= 2 * readout


@pytest.mark.parametrize("memory", ["keep", "recompute8", "recompute"])
def test_nothing_below_the_first_prompted_block_is_saved(memory):
    assert bytes_per_image(4, [0, 0, 2, 2], memory) == bytes_per_image(2, [2, 2], memory)


def test_the_last_block_saves_one_set_of_rows():
    """With a class token head: normalised rows once, the rest belongs to one row."""

    def per_image(depth, counts):
        model = prompted("plain", counts, torch.float32, depth=depth)
        x = tiny.images(model.backbone, 6)
        return (saved_bytes(model, x) - saved_bytes(model, x[:2])) / 4

    one = per_image(1, [2])
    assert one <= 4 * (S + H * (N + 2) + N + 20 * D)


def test_nothing_is_saved_without_a_graph():
    model = prompted("plain")
    count = []
    with torch.autograd.graph.saved_tensors_hooks(count.append, lambda t: t), torch.no_grad():
        pae.fast_forward(model, tiny.images(model.backbone))
    assert count == []


def test_frozen_parameters_get_no_gradient():
    model = prompted("map")
    x = tiny.images(model.backbone).requires_grad_()
    pae.fast_forward(model, x).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("backbone."), name
        assert p.requires_grad != name.startswith("backbone."), name


# ---- training


def train(kind, family, steps=30, **options):
    torch.manual_seed(0)
    vit = tiny.backbone("plain", torch.float32)
    model = pae.PromptedViT(vit, family(), pae.KLD(dim=16), num_classes=4).train()
    x = tiny.images(vit, 16)
    labels = torch.arange(16) % 4
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.05, weight_decay=1e-3), momentum=0.9)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = F.cross_entropy(model(x, engine=kind, **options), labels) + model.penalty()
        optimizer.zero_grad()
        loss.backward()
        model.kld.clip_gradients()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_training_curves_overlay():
    family = lambda: pae.prompts.VPTDeep(4, dropout=0.1)
    reference = train("reference", family)
    fast = train("fast", family)
    assert reference[-1] < 0.5 * reference[0]  # it learned something
    assert ((fast - reference).abs() <= 1e-3 * reference).all()
    low = train("fast", family, memory="recompute8")
    assert ((low - reference).abs() <= 3e-2 * reference).all()


# ---- wrappers


@pytest.mark.parametrize("feature", ["plain", "avg"])
@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_compiled_step_in_16_bits_equals_eager(feature, precision):
    model = prompted(feature, 3, torch.float32, depth=2)
    if precision == "bf16":
        model.bfloat16()
    x = tiny.images(model.backbone)

    def run(forward):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            logits = forward(x)
        logits.float().square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    expected = run(lambda x: pae.fast_forward(model, x))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: pae.fast_forward(model, x), backend="aot_eager")
    for got, wanted in zip(run(compiled), expected, strict=True):
        assert error(got, wanted) < 3e-2


def test_compiled_step_equals_eager():
    """One graph break, at the plan; the compiled ops are the registered ones."""
    model = prompted("plain", 3, torch.float32, depth=2)
    x = tiny.images(model.backbone)

    def step(x):
        logits = pae.fast_forward(model, x)
        return logits, F.cross_entropy(logits, torch.tensor([0, 1, 2]))

    def run(step):
        model.zero_grad()
        logits, loss = step(x)
        loss.backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    expected = run(step)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    for _ in range(2):
        for got, wanted in zip(run(compiled), expected, strict=True):
            assert error(got, wanted) < 1e-6
    with torch.no_grad():  # a changed backbone reaches the compiled step, too
        model.backbone.blocks[0].mlp.fc1.weight.mul_(1.5)
    changed = run(step)
    assert error(changed[0], expected[0]) > 1e-2
    assert error(run(compiled)[0], changed[0]) < 1e-6


def test_compiled_model_is_unwrapped():
    model = prompted("plain", 3, torch.float32, depth=1)
    x = tiny.images(model.backbone)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert error(pae.fast_forward(compiled, x), pae.fast_forward(model, x)) < 1e-6


DISTRIBUTED = """
import sys
import torch, torch.distributed as dist, torch.multiprocessing as mp, torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
import pae
from tests import tiny

def work(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = pae.PromptedViT(tiny.backbone(), pae.prompts.VPTDeep(3), pae.KLD(dim=8)).train()
    x, labels = tiny.images(model.backbone, 6), torch.arange(6) % 5
    (F.cross_entropy(model(x), labels) + model.penalty()).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    parallel = DistributedDataParallel(model)
    mine = slice(3 * rank, 3 * rank + 3)
    for _ in range(2):
        model.zero_grad()
        logits = pae.fast_forward(parallel, x[mine])
        (F.cross_entropy(logits, labels[mine]) + model.penalty()).backward()
    for name, grad in expected.items():
        assert tiny.error(model.get_parameter(name).grad, grad) < 1e-9, name
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
    print("equal")
"""


def test_two_processes_equal_the_whole_batch(tmp_path):
    """DistributedDataParallel averages to the gradients of the whole batch, KLD's included."""
    done = processes.run([sys.executable, "-c", DISTRIBUTED, str(tmp_path / "store")])
    assert done.stdout.strip() == "equal"


def test_two_backbones_do_not_share_plans():
    one, other = prompted("plain"), prompted("layer_scale")
    x = tiny.images(one.backbone)
    assert error(pae.fast_forward(one, x), one(x)) < 1e-12
    assert error(pae.fast_forward(other, x), other(x)) < 1e-12
    twin = copy.deepcopy(one)
    with torch.no_grad():
        twin.backbone.blocks[1].attn.proj.weight.neg_()
    assert error(pae.fast_forward(twin, x), twin(x)) < 1e-12
    assert error(pae.fast_forward(one, x), one(x)) < 1e-12


# ---- arguments


@pytest.mark.parametrize("memory", ["tiny", None, 3])
def test_unknown_memory_mode(memory):
    model = prompted("plain", dtype=torch.float32)
    x = tiny.images(model.backbone)
    with pytest.raises(ValueError, match=r"memory must be one of .*'keep'.*got"):
        pae.fast_forward(model, x, memory=memory)
    with pytest.raises(ValueError, match="memory must be one of"):
        model(x, engine="fast", memory=memory)


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))], ids=repr)
def test_fast_forward_of_another_module(wrong):
    with pytest.raises(TypeError, match=f"model must be a PromptedViT.*{type(wrong).__name__}"):
        pae.fast_forward(wrong, torch.zeros(1, 3, 16, 16))
