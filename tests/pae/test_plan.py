"""A folded plan belongs to what was folded: what changed is folded again or refused by name."""

import functools
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import pae
from tests import tiny
from tests.tiny import assert_engines_agree, error, prompted

HOOKS = {
    "forward hook": lambda m: m.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
}


def used(feature="layer_scale"):
    """A model that has run, so that its plan is folded, and images."""
    model = prompted(feature)
    x = tiny.images(model.backbone)
    pae.fast_forward(model, x)
    return model, x


def refuses(model, x, message):
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(pae.UnsupportedBackbone, match=message):
            pae.fast_forward(model, x)


# ---- changed attributes fold again


def on(path, name, value):
    def change(vit):
        setattr(vit.get_submodule(path), name, value)

    return change


def replace(path, make):
    def change(vit):
        vit.set_submodule(path, make(vit.get_submodule(path)))

    return change


def fewer_blocks(vit):
    vit.blocks = vit.blocks[:2]


SCALE = [("fused_attn", False), ("scale", 2.0)]
TWO_HEADS = [("num_heads", 2), ("head_dim", 16)]

CHANGES = {
    "eps of norm1": on("blocks.0.norm1", "eps", 0.5),
    "eps of norm2": on("blocks.1.norm2", "eps", 0.5),
    "scale": lambda vit: [setattr(vit.blocks[1].attn, *one) for one in SCALE],
    "another activation": replace("blocks.2.mlp.act", lambda _: nn.SiLU()),
    "form of the activation": on("blocks.2.mlp.act", "approximate", "tanh"),
    "number of heads": lambda vit: [setattr(vit.blocks[1].attn, *one) for one in TWO_HEADS],
    "no LayerScale": replace("blocks.1.ls2", lambda _: nn.Identity()),
    "another norm": replace("blocks.1.norm2", lambda _: nn.LayerNorm(32, dtype=torch.float64)),
    "a wider MLP's layers": replace("blocks.2.mlp.fc2", lambda old: tripled(old)),
    "blocks in another order": lambda vit: setattr(vit, "blocks", vit.blocks[::-1]),
    "transposed in place": lambda vit: transpose(vit.blocks[1].attn.proj.weight),
}


def tripled(linear):
    made = nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight.dtype)
    made.load_state_dict({n: 3 * t for n, t in linear.state_dict().items()})
    return made


def transpose(weight):
    weight.data = weight.data.t()


@pytest.mark.parametrize("change", CHANGES)
def test_changed_attributes_fold_again(change):
    model, x = used()
    before = pae.fast_forward(model, x)
    CHANGES[change](model.backbone)
    model.backbone.requires_grad_(False)
    assert error(model(x), before) > (1e-9 if "form" in change else 1e-4)
    assert_engines_agree(model, x)


def test_a_scale_that_the_block_does_not_read_changes_nothing():
    """timm's fused attention takes 1 / sqrt(d) whatever `scale` says."""
    model, x = used()
    before = pae.fast_forward(model, x)
    model.backbone.blocks[1].attn.scale = 2.0
    assert torch.equal(pae.fast_forward(model, x), before)
    assert_engines_agree(model, x)


@pytest.mark.parametrize("change", ["eps", "no norm"])
def test_changed_per_head_norms_fold_again(change):
    model, x = used("qk_norm")
    before = pae.fast_forward(model, x)
    for block in model.backbone.blocks:
        if change == "eps":
            block.attn.q_norm.eps = 1.0
        else:
            block.attn.q_norm = nn.Identity()
    assert error(model(x), before) > 1e-4
    assert_engines_agree(model, x)


def test_pooling_is_read_as_it_is_now():
    model, x = used("plain")
    model.backbone.global_pool = "avg"
    assert_engines_agree(model, x)


def test_nothing_is_folded_twice_without_a_change(monkeypatch):
    model, x = used()
    monkeypatch.setattr(pae.plan, "fold", lambda *_: pytest.fail("folded again"))
    for training in (True, False, True):
        model.train(training)
        pae.fast_forward(model, x).sum().backward()


# ---- what the fast engine would leave out is refused


PLACES = ["blocks.1", "blocks.0.norm1", "blocks.2.attn.qkv", "blocks.1.mlp.act", "blocks.1.ls1"]


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("path", PLACES)
def test_hooks_are_refused(path, kind):
    model, x = used()
    expected = pae.fast_forward(model, x)
    handle = HOOKS[kind](model.backbone.get_submodule(path))
    line = rf'^{path} has a {kind}: the fast engine would not run it; use engine="reference" or'
    refuses(model, x, line)
    with pytest.raises(pae.UnsupportedBackbone, match=line):
        pae.mpa_init(model, x, torch.zeros(len(x), dtype=torch.int64), window=6, stride=5)
    model(x)
    handle.remove()
    assert torch.equal(pae.fast_forward(model, x), expected)


def test_hooks_set_before_the_model_was_built_are_refused():
    vit = tiny.backbone("plain")
    vit.blocks[0].attn.register_forward_hook(lambda *_: None)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(2))
    refuses(model, tiny.images(vit), "blocks.0.attn has a forward hook")


@pytest.mark.parametrize("path", ["blocks.1", "blocks.1.attn", "blocks.1.mlp"])
def test_the_reference_runs_no_formula_of_a_block_that_has_a_hook(path):
    """Keys in head space enter between a block's parts: its formula runs, and no hook."""
    model = prompted("plain", pae.prompts.APT(3))
    x = tiny.images(model.backbone)
    expected = model(x)
    handle = model.backbone.get_submodule(path).register_forward_hook(lambda *_: None)
    with pytest.raises(pae.UnsupportedBackbone, match="has a forward hook, which cannot be run"):
        model(x)
    handle.remove()
    assert torch.equal(model(x), expected)


GLOBAL = {
    "forward": nn.modules.module.register_module_forward_hook,
    "pre": nn.modules.module.register_module_forward_pre_hook,
    "backward": nn.modules.module.register_module_full_backward_hook,
    "backward pre": nn.modules.module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", GLOBAL)
def test_hooks_on_all_modules_are_refused(kind):
    model, x = used()
    handle = GLOBAL[kind](lambda *_: None)
    try:
        refuses(model, x, "a hook on all modules is set")
    finally:
        handle.remove()
    pae.fast_forward(model, x)


def test_pytorchs_own_counter_is_no_such_hook():
    model, x = used()
    with FlopCounterMode(display=False) as counter:
        pae.fast_forward(model, x)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("path", ["blocks.1", "blocks.0.attn", "blocks.2.mlp.fc1"])
def test_replaced_forwards_are_refused(path):
    model, x = used()
    module = model.backbone.get_submodule(path)
    forward = module.forward
    module.forward = lambda *args, **named: 1.5 * forward(*args, **named)
    refuses(model, x, rf"^{path} has a replaced forward: the fast engine would not run")
    del module.forward
    assert_engines_agree(model, x)


def test_a_replaced_method_is_noticed():
    model, x = used()
    attn = model.backbone.blocks[1].attn
    forward = type(attn).forward
    changed = type(
        "Changed", (type(attn),), {"forward": lambda s, *a, **k: 2 * forward(s, *a, **k)}
    )
    attn.__class__ = changed
    refuses(model, x, r"^blocks\.1 \(Block\) computes something else")


def test_a_replaced_forward_of_a_class_is_noticed(monkeypatch):
    model, x = used()
    kind = type(model.backbone.blocks[0])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * forward(self, x))
    refuses(model, x, r"^blocks\.0 \(Block\) computes something else")


def test_a_block_that_is_not_frozen_is_refused():
    model, x = used()
    model.backbone.blocks[1].attn.qkv.weight.requires_grad_(True)
    refuses(model, x, r"^blocks\.1\.attn\.qkv\.weight requires a gradient")
    model.requires_grad_(True)
    refuses(model, x, r"^blocks\.0\.attn\.qkv\.weight requires a gradient")


def test_a_trained_stem_and_norm_get_their_gradients():
    """They are the backbone's own modules in both engines."""
    model, x = used("plain")
    trained = [model.backbone.patch_embed.proj.weight, model.backbone.norm.bias]
    grads = []
    for engine in ("reference", "fast"):
        for p in trained:
            p.requires_grad_(True)
        loss = model(x, engine=engine).square().sum()
        grads.append(torch.autograd.grad(loss, trained))
    for got, expected in zip(grads[1], grads[0], strict=True):
        assert expected.norm() > 0
        assert error(got, expected) < 1e-10


def test_hooks_on_stem_and_readout_are_honoured():
    model, x = used("plain")
    before = model(x)
    model.backbone.patch_embed.register_forward_hook(lambda _, args, out: 1.1 * out)
    model.backbone.norm.register_forward_pre_hook(lambda _, args: (args[0] + 0.5,))
    assert error(model(x), before) > 1e-3
    assert_engines_agree(model, x)


def test_dropout_in_training_mode_is_refused():
    model, x = used("dropout")
    model.backbone.train()
    refuses(model, x, r"^blocks\.0 is in training mode and has dropout")
    model.train()  # leaves the backbone in eval mode
    assert_engines_agree(model, x)


# ---- what others put into a linear layer


class LoRA(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False, dtype=linear.weight.dtype)
        self.up = nn.Linear(2, linear.out_features, bias=False, dtype=linear.weight.dtype)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


class LoRALinear(nn.Linear):
    """As some libraries do it: a Linear that is more than one."""

    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


def as_lora(linear):
    made = LoRALinear(linear.in_features, linear.out_features, dtype=linear.weight.dtype)
    made.load_state_dict(linear.state_dict())
    return made


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


INSTEAD = {
    "adapter around it": (
        replace("blocks.1.attn.qkv", LoRA),
        r"blocks\.1\.attn\.qkv is LoRA, expected Linear",
    ),
    "subclass": (
        replace("blocks.1.mlp.fc1", as_lora),
        r"blocks\.1\.mlp\.fc1 is LoRALinear, expected Linear",
    ),
    "parametrization": (
        lambda vit: parametrize.register_parametrization(
            vit.blocks[1].attn.proj, "weight", Doubled()
        ),
        r"blocks\.1\.attn\.proj is ParametrizedLinear, expected Linear",
    ),
    "weight norm": (
        lambda vit: parametrizations.weight_norm(vit.blocks[0].mlp.fc2),
        r"blocks\.0\.mlp\.fc2 is ParametrizedLinear, expected Linear",
    ),
    "pruning": (
        lambda vit: prune.l1_unstructured(vit.blocks[2].attn.qkv, "weight", amount=0.3),
        r"blocks\.2\.attn\.qkv\.weight_orig is a parameter of Block that no formula here has",
    ),
    "gated MLP": (
        replace("blocks.2.mlp.fc2", lambda old: nn.Linear(8, 32, dtype=torch.float64)),
        r"blocks\.2\.mlp\.fc2 reads 8 features",
    ),
    "unknown activation": (
        replace("blocks.2.mlp.act", lambda _: nn.Tanh()),
        r"blocks\.2\.mlp\.act is Tanh, expected one of",
    ),
    "no attention": (
        lambda vit: delattr(vit.blocks[0], "attn"),
        r"blocks\.0 \(Block\) has no attribute 'attn",
    ),
    "compiled": (
        lambda vit: vit.blocks.__setitem__(0, torch.compile(vit.blocks[0])),
        r"blocks\.0 has a replaced forward",
    ),
}


@pytest.mark.parametrize("case", INSTEAD)
def test_what_stands_in_for_a_part_is_refused(case):
    change, line = INSTEAD[case]
    model, x = used()
    change(model.backbone)
    model.backbone.requires_grad_(False).eval()
    refuses(model, x, line)


def test_pruning_made_permanent_is_honoured():
    model, x = used()
    linear = model.backbone.blocks[2].attn.qkv
    prune.l1_unstructured(linear, "weight", amount=0.3)
    prune.remove(linear, "weight")
    linear.requires_grad_(False)
    assert (linear.weight == 0).sum() > 500
    assert_engines_agree(model, x)


def test_a_parametrization_removed_is_honoured():
    model, x = used()
    linear = model.backbone.blocks[1].attn.proj
    before = pae.fast_forward(model, x)
    parametrize.register_parametrization(linear, "weight", Doubled())
    parametrize.remove_parametrizations(linear, "weight")
    linear.requires_grad_(False)
    assert error(pae.fast_forward(model, x), before) > 1e-4
    assert_engines_agree(model, x)


def test_a_bound_method_as_attribute_is_noticed():
    """Nothing that stands on an instance goes unseen, whatever it is called."""
    model, x = used()
    mlp = model.backbone.blocks[0].mlp
    mlp.extra = types.MethodType(lambda self, x: x, mlp)
    plans = model._plans
    assert_engines_agree(model, x)
    assert model._plans is not plans


def test_threads_share_one_plan():
    from concurrent.futures import ThreadPoolExecutor

    model, x = used()
    expected = model(x)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            model.drop_plans()
            forward = functools.partial(pae.fast_forward, model, x)
            for found in [pool.submit(forward) for _ in range(8)]:
                assert error(found.result(), expected) < 1e-10
