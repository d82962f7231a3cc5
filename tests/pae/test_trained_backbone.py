"""Biases and norms of the backbone that are trained: both engines, checkpoints, what is refused."""

import copy
import pickle
from fnmatch import fnmatchcase
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import pae
from pae import block
from pae.backbones.trained import PRESETS
from tests import tiny
from tests.errors import assert_not_worse, rounding
from tests.tiny import assert_engines_agree, error, gradients

NORMS = ["blocks.*norm*", "norm.*"]  # the per-head ones too


def made(feature="plain", which="biases", prompts=4, dtype=torch.float64, **changes):
    """A model in training mode that trains those of `which` that the backbone has."""
    vit = tiny.backbone(feature, dtype, **changes)
    names = [n for n, _ in vit.named_parameters()]
    if not isinstance(which, str):
        there = [w for w in which if any(fnmatchcase(n, w.partition(":")[0]) for n in names)]
        which = [w for w in which if w in PRESETS or w in there]
    if not isinstance(prompts, pae.prompts.PromptFamily):
        prompts = pae.prompts.VPTDeep(prompts)
    model = pae.PromptedViT(vit, prompts, train_backbone=which).train()
    with torch.no_grad():
        for p in model.prompts.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.7)
    return model


def own(model):
    """{name: parameter} of what is trained of the backbone."""
    return {n: p for n, p in model.backbone.named_parameters() if p.requires_grad}


# ---- values and gradients


KNOWN = {}  # what rounding may do to the reference of a model that several tests compare with


def remember(monkeypatch, *model):
    """Asks for it once: the reference is the same whatever the fast engine keeps or gets wrong."""

    def remembered(reference, dtype):
        if model not in KNOWN:
            KNOWN[model] = rounding(reference, dtype)
        return KNOWN[model]

    monkeypatch.setattr(tiny, "rounding", remembered)


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("which", ["biases", "da-vpt+", NORMS], ids=str)
@pytest.mark.parametrize("feature", ["plain", "avg", "qk_norm", "layer_scale", "no_qkv_bias"])
def test_engines_agree(feature, which, memory, monkeypatch):
    remember(monkeypatch, feature, str(which))
    model = made(feature, which)
    assert_engines_agree(model, tiny.images(model.backbone), memory=memory)


FEW = [  # with nothing that needs a gradient below, or of what stands around it
    ["blocks.1.attn.qkv.bias"],
    ["blocks.2.attn.qkv.bias"],
    ["blocks.1.norm1.weight"],
    ["blocks.2.norm1.weight"],
    ["blocks.1.norm1.bias"],
    ["blocks.2.norm1.bias"],
    ["blocks.1.attn.q_norm.weight"],
    ["blocks.2.attn.k_norm.weight"],
    ["blocks.2.norm2.weight", "blocks.0.mlp.fc1.bias"],
    ["blocks.1.norm2.bias", "cls_token"],
    ["blocks.0.attn.proj.bias", "pos_embed"],
    ["blocks.2.mlp.fc2.bias"],
]


@pytest.mark.parametrize("which", FEW, ids=str)
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_one_alone(which, memory):
    """Without prompts that learn: the gradient must find its own way."""
    model = made("qk_norm" if "k_norm" in str(which) or "q_norm" in str(which) else "plain", which)
    model.prompts.requires_grad_(False)
    assert own(model).keys() == set(which)
    assert_engines_agree(model, tiny.images(model.backbone), memory=memory, wrt_images=False)
    alone = gradients(model, tiny.images(model.backbone), "fast")[1]
    assert all(alone[f"backbone.{name}"].norm() > 1e-3 for name in which)


def test_below_the_first_prompted_block():
    model = made("plain", ["blocks.0.mlp.fc2.bias", "blocks.0.norm1.weight"], [0, 0, 3])
    assert_engines_agree(model, tiny.images(model.backbone), wrt_images=False)


def test_in_8_bits_as_near_as_prompts_are():
    model = made("avg", ["biases", *NORMS], dtype=torch.float32)
    assert_engines_agree(model, tiny.images(model.backbone), grads=2e-2, memory="recompute8")


@pytest.mark.parametrize("feature, part", [("plain", 1.0), ("qk_norm", 1.0), ("avg", 0.3)])
def test_gradients_are_the_derivatives(feature, part):
    """By differences, in the fast engine alone."""
    changes = {"depth": 2, "embed_dim": 8, "num_heads": 2, "img_size": 8, "patch_size": 4}
    model = made(feature, ["biases", *NORMS, "cls_token"], 2, **changes)
    names = [f"backbone.{n}" for n in own(model)]
    values = [p.detach().clone().requires_grad_() for p in own(model).values()]
    x = tiny.images(model.backbone, 2)

    def logits(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return functional_call(model, given, (x,), {"engine": "fast"})

    assert torch.autograd.gradcheck(logits, values, fast_mode=True)


@pytest.mark.parametrize("pool", ["all", "prompts"])
def test_with_pooled_prompts(pool):
    model = made("avg", ["biases", *NORMS])
    model.pool = pool
    assert_engines_agree(model, tiny.images(model.backbone))


def test_in_bf16_as_near_the_truth_as_the_reference():
    """Under autocast, and stored so."""
    which = ["biases", *NORMS]
    config = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    kinds = ("norm1.weight", "norm1.bias", "qkv.bias", "norm2.weight", "norm2.bias")
    kinds += ("proj.bias", "fc1.bias", "fc2.bias")
    errors = {(autocast, e): [] for autocast in (True, False) for e in ("fast", "reference")}
    for seed in range(16):
        torch.manual_seed(seed)
        model = made("plain", which, 4, torch.float32, **config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
                p.copy_(p.bfloat16())
        x = torch.randn(2, 3, 32, 32).bfloat16().float()
        _, exact = gradients(copy.deepcopy(model).double(), x.double(), "reference")
        for (autocast, engine), found in errors.items():
            narrow = model if autocast else model.bfloat16()  # which is the last that is asked
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                _, got = gradients(narrow, x.to(narrow.head.weight.dtype), engine)
            found.append(
                [
                    max(error(g, exact[n]) for n, g in got.items() if n.endswith(kind))
                    for kind in kinds
                ]
            )
    for autocast in (True, False):
        ours, theirs = (torch.tensor(errors[autocast, e]) for e in ("fast", "reference"))
        assert_not_worse(ours, theirs, 1.2, kinds)


def test_compiled_step_equals_eager():
    model = made("avg", ["biases", *NORMS, "cls_token"], 3, torch.float32, depth=1)
    x = tiny.images(model.backbone)

    def run(forward):
        model.zero_grad()
        logits = forward(x)
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: pae.fast_forward(model, x), backend="aot_eager")
    for _ in range(2):
        expected = run(lambda x: pae.fast_forward(model, x))
        for got, wanted in zip(run(compiled), expected, strict=True):
            assert error(got, wanted) < 1e-5
        with torch.no_grad():  # what a step of an optimiser does
            for p in own(model).values():
                p.add_(0.1)


# ---- the plan


def test_nothing_is_folded_again_in_training(monkeypatch):
    model = made("plain", ["biases", *NORMS])
    x = tiny.images(model.backbone)
    pae.fast_forward(model, x)
    monkeypatch.setattr(pae.plan, "fold", lambda *_, **__: pytest.fail("folded again"))
    optimizer = torch.optim.SGD(model.parameter_groups(0.1, 1e-3))
    for _ in range(2):
        optimizer.zero_grad()
        pae.fast_forward(model, x).square().mean().backward()
        optimizer.step()
        assert_engines_agree(model, x)


def test_a_settled_plan_is_of_now():
    """What reads a plan outside of a step (MPA, whitening, ...) gets what is trained as it is."""
    model = made("qk_norm", ["biases", *NORMS])
    x = tiny.images(model.backbone)
    rows = model.view.embed(x)
    for _ in range(2):
        plan = model.plan()
        assert plan is model.plan()
        assert plan.trained is None and not plan.b_qkv.requires_grad
        expected = rows
        for part in model.view.blocks:
            expected = part(expected)
        assert error(list(pae.engine.unprompted(plan, rows))[-1], expected) < 1e-12
        with torch.no_grad():
            for p in own(model).values():
                p.mul_(1.1)


def test_all_else_stays_as_it_was():
    model = made("qk_norm", "da-vpt+")
    before = copy.deepcopy(model.backbone.state_dict())
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1, 0.5))
    pae.fast_forward(model, tiny.images(model.backbone)).square().sum().backward()
    optimizer.step()
    changed = {n for n, t in model.backbone.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == own(model).keys()
    for i in range(3):  # the queries' part of a packed bias is not trained, nor decayed
        name = f"blocks.{i}.attn.qkv.bias"
        was, now = before[name].chunk(3), model.backbone.get_parameter(name).chunk(3)
        assert [torch.equal(a, b) for a, b in zip(was, now)] == [True, False, False]


def test_optimiser_between_forward_and_backward():
    """A step's gradients are those of the values that its forward read."""
    model = made("plain", NORMS)
    x = tiny.images(model.backbone)
    expected = gradients(model, x, "fast", "recompute")[1]["prompts.tokens"]
    logits = model(x, engine="fast", memory="recompute")
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    inside = [p for n, p in own(model).items() if n.startswith("blocks")]
    with torch.no_grad():
        for p in inside:
            p.add_(1.0)
    model.backbone.norm.requires_grad_(False)
    (got,) = torch.autograd.grad(logits, model.prompts.tokens, weights + 2 * logits.detach())
    assert error(got, expected) < 1e-12


# ---- names


def test_what_the_presets_train():
    assert set(own(made("plain", "biases"))) == {
        n for n, _ in tiny.backbone("plain").named_parameters() if "head" not in n and "bias" in n
    }
    model = made("plain", "da-vpt+")
    assert model.trained_backbone[:4] == (
        "cls_token",
        "blocks.0.norm1.weight",
        "blocks.0.norm1.bias",
        "blocks.0.attn.qkv.bias:kv",
    )
    assert len(model.trained_backbone) == 1 + 3 * 6
    again = made("plain", model.trained_backbone)
    assert again.trained_backbone == model.trained_backbone


def test_a_part_of_a_packed_bias():
    which = ["blocks.*.attn.qkv.bias:qv"]
    model = made("avg", which)
    x = tiny.images(model.backbone)
    assert_engines_agree(model, x)
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.load_state_dict(copies[1].state_dict(), assign=True)
    for each in copies:
        grads = gradients(each, x, "reference")[1]
        for i in range(3):
            q, k, v = grads[f"backbone.blocks.{i}.attn.qkv.bias"].chunk(3)
            assert q.norm() > 0 and k.norm() == 0 and v.norm() > 0
    vit = model.backbone
    vit.head = torch.nn.Linear(32, 5, dtype=torch.float64)
    del model, copies, each  # two that live cannot share what one of them trains
    other = pae.PromptedViT(vit, pae.prompts.VPTDeep(2), train_backbone="blocks.*.attn.qkv.bias")
    assert gradients(other, x, "fast")[1]["backbone.blocks.0.attn.qkv.bias"].chunk(3)[1].norm() > 0


REFUSED = {
    "blocks.1.attn.qkv.weight": r"takes blocks\.1\.attn\.qkv\.weight, and the fast engine trains b",
    "blocks.0.ls1.gamma": r"takes blocks\.0\.ls1\.gamma, and the fast engine trains biases",
    "blocks.9.norm1.bias": r"^train_backbone 'blocks\.9\.norm1\.bias' is neither one of biases",
    "bias": "^train_backbone 'bias' is neither",
    "cls_token:kv": "takes cls_token, and only the bias of the packed",
    "blocks.0.attn.qkv.bias:x": "expected q, k, v, qk, qv or kv after :",
}


@pytest.mark.parametrize("entry", REFUSED)
def test_names_are_refused(entry):
    vit = tiny.backbone("layer_scale")
    head = vit.head
    with pytest.raises(ValueError, match=REFUSED[entry]):
        pae.PromptedViT(vit, pae.prompts.VPTDeep(2), train_backbone=["biases", entry])
    assert vit.head is head


def test_two_parts_of_one_and_no_text():
    vit = tiny.backbone("plain")
    with pytest.raises(ValueError, match=r"names blocks\.0\.attn\.qkv\.bias twice"):
        pae.PromptedViT(vit, pae.prompts.VPTDeep(2), train_backbone=["biases", "da-vpt+"])
    with pytest.raises(TypeError, match="must be text, got int"):
        pae.PromptedViT(vit, pae.prompts.VPTDeep(2), train_backbone=[3])


def test_what_was_not_named_is_not_left_out_in_silence(tmp_path):
    model = tiny.prompted("plain")
    model.backbone.blocks[0].norm1.bias.requires_grad_(True)
    assert_engines_agree(model, tiny.images(model.backbone))
    line = r"^backbone\.blocks\.0\.norm1\.bias requires a gradient and is no part of"
    with pytest.raises(ValueError, match=line):
        model.parameter_groups(0.1, 0.0)
    with pytest.raises(ValueError, match=line):
        model.save(tmp_path / "model.safetensors")


def test_two_models_do_not_share_what_one_trains():
    """The constructor freezes the backbone, and one's training would change the other."""
    first, frozen = made(), tiny.prompted()

    def second(model, which):
        prompts = pae.prompts.VPTDeep(2)
        return pae.PromptedViT(model.backbone, prompts, num_classes=3, train_backbone=which)

    for model, which, trains in (
        (first, (), "another PromptedViT trains"),
        (first, "biases", "another PromptedViT trains"),
        (copy.deepcopy(first), (), "another PromptedViT trains"),
        (frozen, "biases", "this one is to train"),
    ):
        message = f"backbone belongs to another PromptedViT, and {trains} patch_embed.proj.bias of"
        tiny.refused(ValueError, message, partial(second, model, which))
    assert len(own(first)) == len(first.trained_backbone)
    assert second(frozen, ()).backbone is frozen.backbone  # what is frozen for both


def test_a_model_that_is_gone_shares_nothing():
    vit = tiny.backbone()
    for _ in range(2):
        model = pae.PromptedViT(vit, pae.prompts.VPTDeep(2), num_classes=3, train_backbone="biases")
        model.itself = [model]  # only the garbage collector lets it go
        del model


def test_parameter_groups():
    model = made("plain", "biases")
    groups = {g["name"]: g for g in model.parameter_groups(0.1, 0.5)}
    assert groups["backbone"]["weight_decay"] == 0.0
    assert [id(p) for p in groups["backbone"]["params"]] == [id(p) for p in own(model).values()]


# ---- checkpoints


def trained_file(tmp_path, which="da-vpt+"):
    model = made("plain", which)
    with torch.no_grad():
        for p in own(model).values():
            p.add_(0.3)
    model.save(tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


@pytest.mark.parametrize("which", ["da-vpt+", "biases", ["pos_embed", "cls_token"]], ids=str)
def test_round_trip(tmp_path, which):
    model, path = trained_file(tmp_path, which)
    x = tiny.images(model.backbone)
    expected = model.eval()(x)
    built = pae.PromptedViT.from_file(path, tiny.backbone("plain")).eval()
    assert built.trained_backbone == model.trained_backbone
    assert own(built).keys() == own(model).keys()
    assert torch.equal(built(x), expected)
    other = made("plain", which)
    pae.fast_forward(other, x)
    assert error(other.load(path).eval()(x, engine="fast"), expected) < 1e-12


def test_files_that_do_not_fit(tmp_path):
    model, path = trained_file(tmp_path)
    with pytest.raises(pae.CheckpointError, match=r"trained cls_token, .* and this model t"):
        made("plain", ()).load(path)
    vit = tiny.backbone("plain")
    with torch.no_grad():
        vit.blocks[1].attn.qkv.weight.mul_(2)  # what the file does not bring
    with pytest.raises(pae.CheckpointError, match="fingerprint"):
        pae.PromptedViT.from_file(path, vit)
    plain = made("plain", ())
    plain.save(tmp_path / "plain.safetensors")
    with pytest.raises(pae.CheckpointError, match="trained nothing of the backbone, and this mod"):
        model.load(tmp_path / "plain.safetensors")


# ---- a fault is seen


def no_sums(name):
    def fault(monkeypatch):
        over_rows = block._Sums.over_rows

        def off(self, own, d):
            over_rows(self, own, 1.001 * d if own == name else d)

        monkeypatch.setattr(block._Sums, "over_rows", off)

    return fault


NAMES = ["b_qkv", "gain1", "b_proj", "gain2", "b_fc1", "b_fc2"]
NAMES += ["q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"]


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_in_a_sum_is_seen(name, monkeypatch):
    feature, which = "qk_norm" if "_norm" in name else "plain", ["biases", *NORMS]
    model = made(feature, which)
    remember(monkeypatch, feature, str(which))
    no_sums(name)(monkeypatch)
    with pytest.raises(AssertionError):
        assert_engines_agree(model, tiny.images(model.backbone))


def test_losses_fall_alike():
    curves = []
    for engine in ("reference", "fast"):
        model = made("plain", "da-vpt+")
        x, labels = tiny.images(model.backbone, 6), torch.arange(6) % 5
        optimizer = torch.optim.SGD(model.parameter_groups(0.05, 1e-4), momentum=0.9)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x, engine=engine), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert (curves[1] - curves[0]).abs().max() < 1e-9
