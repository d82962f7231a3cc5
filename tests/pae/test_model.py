"""PromptedViT: the reference forward, the parts, the plan's freshness, what is refused and how."""

import copy
import math
import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn

import pae
from pae.prompts import VPTDeep, VPTShallow
from tests import tiny
from tests.tiny import FEATURES, Given, backbone, error, images, prompted


def refused(kind, match, call):
    """`call` raises `kind` with one line that matches."""
    with pytest.raises(kind, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- the reference forward


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("feature", FEATURES)
def test_without_prompts_it_is_the_backbone(feature, engine):
    """Anchors both engines in timm's own forward."""
    vit = backbone(feature)
    x = images(vit)
    with torch.no_grad():
        expected = vit.eval()(x)
    for family in (VPTDeep(0), VPTShallow(0)):
        model = pae.PromptedViT(copy.deepcopy(vit), family).train()
        assert error(model(x, engine=engine), expected) < 1e-12


@pytest.mark.parametrize("feature", ["plain", "avg", "registers"])
def test_prompts_are_further_keys_of_their_block(feature):
    """The definition, spelled out: concatenate behind the prefix, run the block, cut off."""
    model = prompted(feature, [2, 0, 3])
    vit, x = model.backbone, images(model.backbone)
    at = vit.num_prefix_tokens
    rows = vit._pos_embed(vit.patch_embed(x))
    for block, prompt in zip(vit.blocks, model.prompts.tokens.split([2, 0, 3])):
        cat = torch.cat([rows[:, :at], prompt.expand(3, -1, -1), rows[:, at:]], dim=1)
        out = block(cat)
        rows = torch.cat([out[:, :at], out[:, at + len(prompt) :]], dim=1)
    expected = model.head(vit.forward_head(vit.norm(rows), pre_logits=True))
    assert error(model(x), expected) < 1e-13


@pytest.mark.parametrize("feature", ["plain", "avg"])
def test_shallow_prompts_run_through_all_blocks(feature):
    model = prompted(feature, VPTShallow(4))
    vit, x = model.backbone, images(model.backbone)
    rows = vit._pos_embed(vit.patch_embed(x))
    prompts = model.prompts.tokens.expand(3, -1, -1)
    out = vit.blocks(torch.cat([rows[:, :1], prompts, rows[:, 1:]], dim=1))
    image_rows = torch.cat([out[:, :1], out[:, 5:]], dim=1)
    expected = model.head(vit.forward_head(vit.norm(image_rows), pre_logits=True))
    assert error(model(x), expected) < 1e-13


def test_prompts_change_the_logits():
    model = prompted("plain")
    x = images(model.backbone)
    first = model(x)
    with torch.no_grad():
        model.prompts.tokens[-1].add_(torch.randn_like(model.prompts.tokens[-1]))
    assert error(model(x), first) > 1e-2


def test_position_of_prompts_does_not_matter_for_deep_prompts():
    model = prompted("avg", Given([4, 4, 4]))
    x = images(model.backbone)
    expected = model(x)
    with torch.no_grad():
        for rows in model.prompts.rows:
            rows.copy_(rows.flip(1))
    assert error(model(x), expected) < 1e-12


# ---- the parts


def test_backbone_is_frozen_and_in_eval_mode():
    vit = backbone("dropout").train()
    model = pae.PromptedViT(vit, VPTDeep(2))
    assert model.backbone is vit
    for mode in (True, False, True):
        model.train(mode)
        assert not any(m.training for m in vit.modules())
        assert model.prompts.training == model.head.training == model.training == mode
        assert not any(p.requires_grad for p in vit.parameters())
    x = images(vit)
    assert torch.equal(model(x), model(x))


def test_head_is_kept():
    vit = backbone("plain")
    head = vit.head
    model = pae.PromptedViT(vit, VPTDeep(2))
    assert model.head is head
    assert model.num_classes == 5
    assert all(p.requires_grad for p in model.head.parameters())
    assert isinstance(vit.head, nn.Identity)


def test_new_head_has_the_initialisation_of_vpt():
    model = pae.PromptedViT(backbone("plain", torch.float32), VPTDeep(2), num_classes=4000)
    weight, bias = model.head.weight, model.head.bias
    assert weight.shape == (4000, 32)
    assert torch.equal(bias, torch.full_like(bias, -math.log(99.0)))
    assert abs(weight.std().item() / (2 / 4000) ** 0.5 - 1) < 0.02
    assert abs(weight.mean().item()) < 2e-4
    assert model(images(model.backbone)).shape == (3, 4000)


def test_parts_follow_the_backbones_dtype():
    for dtype in (torch.float64, torch.bfloat16):
        model = pae.PromptedViT(backbone("plain", dtype), VPTDeep(2), pae.KLD(8), num_classes=3)
        assert {p.dtype for p in model.parameters()} == {dtype}


def test_names_in_the_state():
    model = pae.PromptedViT(backbone("plain"), VPTDeep(2), pae.KLD(8))
    assert model.trained_state().keys() == {
        "prompts.tokens",
        "kld.K",
        "kld.L",
        "kld.lift.weight",
        "head.weight",
        "head.bias",
    }
    names = model.state_dict().keys() - model.trained_state().keys()
    plain = backbone("plain").state_dict().keys()
    assert names == {f"backbone.{n}" for n in plain if not n.startswith("head.")}
    assert model.prompts.tokens.shape == (3, 2, 32)


def test_state_dict_roundtrip():
    one, other = prompted("plain"), prompted("plain", init_values=None)
    nn.init.normal_(other.prompts.tokens)
    x = images(one.backbone)
    assert error(other(x), one(x)) > 1e-3
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    model = prompted("plain", VPTDeep(3, dropout=0.1))
    x = images(model.backbone)
    model.eval()
    expected = pae.fast_forward(model, x)
    twin = copied(model)
    assert twin.view.module is twin.backbone
    assert twin.backbone is not model.backbone
    assert torch.equal(pae.fast_forward(twin, x), expected)
    nn.init.zeros_(twin.prompts.tokens)
    with torch.no_grad():
        twin.backbone.blocks[0].mlp.fc1.weight.zero_()
    assert torch.equal(pae.fast_forward(model, x), expected)
    assert error(pae.fast_forward(twin, x), twin(x)) < 1e-12


def test_parameter_groups():
    model = pae.PromptedViT(backbone("plain"), VPTDeep(2), pae.KLD(8))
    groups = {g["name"]: g for g in model.parameter_groups(lr=0.5, weight_decay=0.01)}
    assert list(groups) == ["prompts", "kld", "head", "head_bias"]
    assert groups["prompts"]["params"] == [model.prompts.tokens]
    assert groups["head"]["params"] == [model.head.weight]
    assert groups["head_bias"]["params"] == [model.head.bias]
    assert {id(p) for p in groups["kld"]["params"]} == {id(p) for p in model.kld.parameters()}
    assert {n: g["weight_decay"] for n, g in groups.items()} == {
        "prompts": 0.01,
        "kld": 0.01,
        "head": 0.01,
        "head_bias": 0.0,
    }
    assert {g["lr"] for g in groups.values()} == {0.5}
    listed = [id(p) for g in groups.values() for p in g["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    torch.optim.SGD(groups.values())


def test_empty_parameter_groups_are_left_out():
    vit = backbone("plain")
    vit.head = nn.Linear(vit.embed_dim, 3, bias=False)
    names = [g["name"] for g in pae.PromptedViT(vit, VPTDeep(2)).parameter_groups(1.0, 0.0)]
    assert names == ["prompts", "head"]


def test_a_backbone_without_a_head_needs_num_classes():
    vit = backbone("plain")
    pae.PromptedViT(vit, VPTDeep(2))
    with pytest.raises(ValueError, match="num_classes must be given: the backbone has no head"):
        pae.PromptedViT(vit, VPTDeep(2))
    assert pae.PromptedViT(vit, VPTDeep(2), num_classes=4).num_classes == 4


@pytest.mark.parametrize("engine", ("reference", "fast"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_images_that_are_not_finite_are_named(engine, value):
    model = prompted("plain")
    x = images(model.backbone)
    x[1, 0, 2, 2] = value
    with pytest.raises(ValueError, match="images holds NaN or infinity in 1 of 3 images"):
        model(x, engine=engine)


def test_penalty():
    model = pae.PromptedViT(backbone("plain"), VPTDeep(2), pae.KLD(8)).train()
    penalty = model.penalty()
    consistency, lyapunov = model.kld.terms(model.prompts.tokens)
    assert penalty.shape == ()
    assert penalty.item() == (consistency + lyapunov).item() > 0
    penalty.backward()
    assert model.prompts.tokens.grad.abs().sum() > 0
    assert model.eval().penalty().item() == 0.0
    assert not model.penalty().requires_grad
    assert prompted("plain").penalty().item() == 0.0


def test_penalty_sees_no_dropout():
    model = pae.PromptedViT(backbone("plain"), VPTDeep(4, dropout=0.5), pae.KLD(8)).train()
    assert model.penalty().item() == model.penalty().item()


def test_penalty_of_the_family_is_added():
    family = VPTDeep(2)
    family.penalty = lambda: family.tokens.square().sum()
    model = pae.PromptedViT(backbone("plain"), family, pae.KLD(8)).train()
    expected = sum(model.kld.terms(family.tokens)) + family.tokens.square().sum()
    assert model.penalty().item() == expected.item()
    alone = prompted("plain")
    alone.prompts.penalty = lambda: alone.prompts.tokens.square().sum()
    assert alone.penalty().item() == alone.prompts.tokens.square().sum().item()


# ---- a plan is never stale


def fresh(model, x):
    return error(pae.fast_forward(model, x), model(x)) < (1e-12 if x.dtype.itemsize > 4 else 1e-5)


def write_in_place(model):
    with torch.no_grad():
        model.backbone.blocks[1].attn.qkv.weight.mul_(1.3)


def load_state(model):
    vit = backbone("plain")
    with torch.no_grad():
        for p in vit.parameters():
            p.mul_(1.1)
    model.backbone.load_state_dict(vit.state_dict(), strict=False)


def load_state_by_assignment(model):
    vit = backbone("plain")
    with torch.no_grad():
        for p in vit.parameters():
            p.mul_(1.1)
    model.backbone.load_state_dict(vit.state_dict(), strict=False, assign=True)
    model.requires_grad_(False)


def replace_parameter(model):
    block = model.backbone.blocks[2]
    block.norm2.bias = nn.Parameter(block.norm2.bias.detach() + 1, requires_grad=False)


def replace_block(model):
    model.backbone.blocks[0] = copy.deepcopy(model.backbone.blocks[2])


def swap_data(model):
    p = model.backbone.blocks[0].mlp.fc2.weight
    p.data = p.data * 1.5


def write_rows(model):
    with torch.no_grad():
        model.backbone.blocks[0].attn.proj.bias[3] = 7.0


CHANGES = [
    write_in_place,
    load_state,
    load_state_by_assignment,
    replace_parameter,
    replace_block,
    swap_data,
    write_rows,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_are_noticed(change):
    model = prompted("plain")
    x = images(model.backbone)
    before = pae.fast_forward(model, x)
    change(model)
    after = pae.fast_forward(model, x)
    assert error(after, before) > 1e-4
    assert fresh(model, x)


def test_another_dtype_is_noticed():
    model = prompted("plain")
    x = images(model.backbone)
    assert fresh(model, x)
    model.float()
    assert pae.fast_forward(model, x.float()).dtype == torch.float32
    assert fresh(model, x.float())
    model.bfloat16().double()  # back to where it was, with rounded weights
    assert fresh(model, x)


def test_a_new_weight_at_an_old_address_is_noticed():
    """A freed weight's memory is soon used again; version counters start at 0 each time."""
    model = prompted("plain", 2, torch.float32, depth=1)
    x = images(model.backbone)
    norm = model.backbone.blocks[0].norm1
    for i in range(60):
        norm.bias = None  # free the old one first
        norm.bias = nn.Parameter(torch.full((32,), float(i)), requires_grad=False)
        assert fresh(model, x), i


def test_a_new_table_of_positions_at_an_old_address_is_noticed():
    """By the reference too, which makes a bias of it for the rows of image and prompts."""
    vit = tiny.filled(Beit(**{**tiny.SIZES, "depth": 1}, use_rel_pos_bias=True)).eval()
    model = tiny.over(vit).eval()
    x, attn = images(backbone("plain", torch.float32)), vit.blocks[0].attn
    size = attn.relative_position_bias_table.shape
    with torch.no_grad():
        for i in range(60):
            attn.relative_position_bias_table = None  # free the old one first
            table = torch.full(size, 0.0).index_fill_(0, torch.tensor(i % size[0]), 5.0)
            attn.relative_position_bias_table = nn.Parameter(table, requires_grad=False)
            del table
            assert torch.equal(model(x), copy.deepcopy(model)(x)), i


def test_another_backbone_in_its_place_is_refused():
    """It would be saved, and never run."""
    model = prompted("plain")
    x, own = images(model.backbone), model.backbone
    expected = model(x)
    model.backbone = copy.deepcopy(own)
    message = "model.backbone was replaced by another VisionTransformer, and the model reads the"
    for call in (lambda: model(x), lambda: model(x, engine="fast"), model.plan):
        refused(RuntimeError, message, call)
    model.backbone = torch.compile(own)  # the same one
    assert torch.equal(model(x), expected)


def test_changed_stem_norm_and_head_need_no_plan():
    model = prompted("plain")
    x = images(model.backbone)
    pae.fast_forward(model, x)
    with torch.no_grad():
        for p in (model.backbone.pos_embed, model.backbone.norm.weight, model.head.weight):
            p.mul_(1.2)
    assert fresh(model, x)


def test_hidden_writes_need_drop_plans():
    """What the docstring of `plan` says of writes through .data; else a rebuild is not needed."""
    model = prompted("plain")
    x = images(model.backbone)
    pae.fast_forward(model, x)
    model.backbone.blocks[0].mlp.fc2.weight.data.mul_(2.0)
    model.drop_plans()
    assert fresh(model, x)


def test_plan_is_built_once_per_dtype(monkeypatch):
    folds = []
    fold = pae.plan.fold
    monkeypatch.setattr(pae.plan, "fold", lambda *a: folds.append(a[1]) or fold(*a))
    model = prompted("plain", dtype=torch.float32)
    x = images(model.backbone)
    optimizer = torch.optim.SGD(model.parameter_groups(0.1, 0.0))
    for mode in (True, False, True):
        model.train(mode)
        for _ in range(2):
            F.cross_entropy(pae.fast_forward(model, x), torch.tensor([0, 1, 2])).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.inference_mode():
        pae.fast_forward(model, x)
    assert folds == [torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        pae.fast_forward(model, x)
    pae.fast_forward(model, x)
    assert folds == [torch.float32, torch.bfloat16]
    write_in_place(model)
    pae.fast_forward(model, x)
    pae.fast_forward(model, x)
    assert folds == [torch.float32, torch.bfloat16, torch.float32]


def test_old_plans_are_let_go():
    model = prompted("plain", dtype=torch.float32)
    x = images(model.backbone)
    with torch.autocast("cpu", torch.bfloat16):
        pae.fast_forward(model, x)
    pae.fast_forward(model, x)
    write_in_place(model)
    pae.fast_forward(model, x)
    assert model._plans.dtypes == [torch.float32]
    model.drop_plans()
    assert model._plans is None


# ---- backbones that are refused

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


class Gated(Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Linear(self.qkv.in_features, self.proj.in_features)  # timm's `gated=True`


def create(name, **changes):
    return timm.create_model(name, img_size=28, embed_dim=32, depth=2, num_heads=4, **changes)


def later_swin():
    size = {"img_size": 56, "window_size": 7, "embed_dim": 24, "depths": (1, 1)}
    return timm.create_model("swinv2_tiny_window8_256", **size, num_heads=(2, 2))


def patched():
    vit = VisionTransformer(**SMALL)
    block = vit.blocks[1]
    block.forward = lambda x: x + block.mlp(block.norm2(x))
    return vit


def hooked():
    vit = VisionTransformer(**SMALL)
    vit.blocks[1].attn.register_forward_hook(lambda module, args, out: 1.05 * out)
    return vit


def causal():
    vit = VisionTransformer(**SMALL)
    forward = vit.blocks[0].attn.forward
    vit.blocks[0].attn.forward = lambda x, **_: forward(x, is_causal=True)
    return vit


def adapted():
    vit = VisionTransformer(**SMALL)
    vit.blocks[0].attn.qkv = nn.Sequential(vit.blocks[0].attn.qkv)
    return vit


def more_than_blocks():
    vit = adapted()
    features = vit.forward_features
    vit.forward_features = lambda x, **_: 2 * features(x)
    return vit


def of_one_length():
    vit = adapted()
    forward = vit.blocks[1].forward
    table = torch.zeros(17, 1)
    vit.blocks[1].forward = lambda x: forward(x + table)
    return vit


REFUSED = {
    "later Swin": (later_swin, "SwinTransformerV2 compares rows by their cosine"),
    "convolutions": (lambda: timm.create_model("resnet18"), "ResNet has no attribute 'blocks'"),
    "more than blocks": (
        more_than_blocks,
        r"qkv is Sequential, .*; and the backbone is more than a stem, blocks and a readout",
    ),
    "one length": (of_one_length, "nor do the blocks run as they are with prompts"),
    "no blocks": (lambda: VisionTransformer(**{**SMALL, "depth": 0}), r"blocks is empty"),
    "linear layer": (lambda: nn.Linear(2, 2), "Linear has no attribute 'blocks'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_backbones_name_the_attribute(case):
    build, message = REFUSED[case]
    vit = build()
    family = VPTDeep(2)
    refused(pae.UnsupportedBackbone, message, lambda: pae.PromptedViT(vit, family))
    pae.PromptedViT(backbone("plain"), family)  # the family was not used up


# blocks that can run on longer sequences and cannot be folded
AS_THEY_ARE = {
    "gated attention": (
        lambda: VisionTransformer(**SMALL, attn_layer=Gated),
        r"blocks\.0\.attn\.gate is set",
    ),
    "simple norm": (
        lambda: VisionTransformer(**SMALL, norm_layer="simplenorm"),
        r"blocks\.0\.norm1 is SimpleNorm, expected LayerNorm or RMSNorm",
    ),
    "activation": (
        lambda: VisionTransformer(**SMALL, act_layer="hard_swish"),
        r"blocks\.0\.mlp\.act is Hardswish, expected one of \['gelu'",
    ),
    "patched forward": (patched, r"blocks\.1 \(Block\) computes something else.*relative"),
    "hook": (hooked, r"blocks\.1 \(Block\) computes something else"),
    "mask": (causal, r"blocks\.0 \(Block\) computes something else"),
    "adapter": (adapted, r"blocks\.0\.attn\.qkv is Sequential, expected Linear"),
}


@pytest.mark.parametrize("case", AS_THEY_ARE)
def test_blocks_that_cannot_be_folded_run_as_they_are(case):
    """With a warning; the fast engine refuses and says why."""
    build, message = AS_THEY_ARE[case]
    vit = build().eval()
    x = torch.randn(2, 3, 32, 32)
    expected = vit(x)
    with pytest.warns(UserWarning, match=rf"^\w+ runs as it is.*{message}") as caught:
        model = pae.PromptedViT(vit, VPTDeep(2))
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    refused(pae.UnsupportedBackbone, f'{message}.*engine="reference"', lambda: model(x, "fast"))
    assert torch.isfinite(model(x)).all() and error(model(x), expected) > 1e-6
    without = copy.deepcopy(model.backbone)
    without.head = copy.deepcopy(model.head)
    with pytest.warns(UserWarning):
        assert error(pae.PromptedViT(without, VPTDeep(0))(x), expected) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 1.0, 0.1, 1e-3, 1e-5, 1e-8])
def test_small_updates_are_not_mistaken_for_another_block(scale, dtype):
    """LayerScale starts as low as 1e-5: rounding of the rows then dwarfs a block's update."""
    for seed in range(3):
        torch.manual_seed(seed)
        vit = VisionTransformer(**SMALL, init_values=scale).to(dtype)
        pae.PromptedViT(vit, VPTDeep(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_block_is_found_in_any_dtype(dtype):
    for vit in (hooked(), causal()):
        with pytest.warns(UserWarning, match="computes something else"):
            pae.PromptedViT(vit.to(dtype), VPTDeep(1))


def test_hybrid_stems_and_other_real_architectures():
    """By name, at a small size: what timm calls them does not matter."""
    names = {
        "vit_tiny_r_s16_p8_224": {"img_size": 32},
        "vit_base_patch16_clip_224": {"img_size": 32},
        "vit_base_patch16_siglip_224": {"img_size": 32},
        "vit_small_patch14_reg4_dinov2": {"img_size": 28},
        "deit3_small_patch16_224": {"img_size": 32},
        "vit_little_patch16_reg4_gap_256": {"img_size": 32},
    }
    for name, size in names.items():
        vit = timm.create_model(name, **size, embed_dim=32, depth=2, num_heads=2, num_classes=3)
        model = pae.PromptedViT(vit, VPTDeep(2)).train()
        x = torch.randn(2, 3, size["img_size"], size["img_size"])
        assert error(pae.fast_forward(model, x), model(x)) < 1e-5, name


def test_a_backbone_without_memory_can_be_planned_for():
    """On the meta device nothing can be run; the shapes are enough to build the model."""
    model = pae.PromptedViT(VisionTransformer(**SMALL, device="meta"), VPTDeep(2))
    assert model.prompts.tokens.shape == (2, 2, 32)


# ---- arguments


def test_arguments_of_the_model():
    make = lambda *args, **kwargs: lambda: pae.PromptedViT(backbone("plain"), *args, **kwargs)
    refused(TypeError, "prompts must be a PromptFamily, got int", make(5))
    refused(TypeError, "kld must be a pae.KLD or None, got str", make(VPTDeep(2), "global"))
    for wrong in (0, -1, 2.5, True, "10"):
        match = re.escape(f"num_classes must be an integer of at least 1 or None, got {wrong!r}")
        refused(ValueError, match, make(VPTDeep(2), num_classes=wrong))
    for family in (VPTShallow(2), VPTDeep([2, 2, 3]), VPTDeep([2, 0, 0]), VPTDeep(0)):
        refused(ValueError, "kld pairs the prompts of neighbouring", make(family, pae.KLD(8)))
    refused(ValueError, r"num_tokens must be .*one per block \(3\), got 2", make(VPTDeep([1, 2])))


def test_parts_belong_to_one_model():
    family, kld = VPTDeep(2), pae.KLD(8)
    pae.PromptedViT(backbone("plain"), family, kld)
    refused(
        RuntimeError,
        "this VPTDeep already belongs to a model",
        lambda: pae.PromptedViT(backbone("plain"), family),
    )
    refused(
        RuntimeError,
        "this KLD already belongs to a model",
        lambda: pae.PromptedViT(backbone("plain"), VPTDeep(2), kld),
    )


BAD_IMAGES = {
    "three axes": (
        lambda x: x[0],
        r"images must be a float tensor \(B, C, H, W\), got \(3, 16, 16\)",
    ),
    "integers": (lambda x: (x * 255).to(torch.uint8), "images must be a float tensor.*uint8"),
    "no tensor": (lambda x: x.numpy(), "images must be a float tensor.*ndarray"),
    "grey": (lambda x: x[:, :1], "images must have 3 channels, got 1"),
    "small": (lambda x: x[..., :8], r"images must be \(16, 16\) pixels.*got \(16, 8\)"),
    "wide": (lambda x: x.double(), "images must be torch.float32.*got torch.float64"),
    "narrow": (lambda x: x.bfloat16(), "images must be torch.float32.*got torch.bfloat16"),
    "elsewhere": (lambda x: x.to("meta"), "images must be on cpu.*got meta"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(case):
    change, message = BAD_IMAGES[case]
    model = prompted("plain", dtype=torch.float32)
    x = change(images(model.backbone))
    refused(ValueError, message, lambda: model(x))
    refused(ValueError, message, lambda: pae.fast_forward(model, x))


def test_bad_images_of_a_dynamic_backbone():
    model = prompted("dynamic_size")
    x = torch.zeros(1, 3, 18, 16, dtype=torch.float64)
    refused(ValueError, r"sides divisible by the patch \(4, 4\), got \(18, 16\)", lambda: model(x))
    padded = prompted("dynamic_size", dynamic_img_pad=True)
    assert error(pae.fast_forward(padded, x), padded(x)) < 1e-12


def test_unknown_engine():
    model = prompted("plain")
    x = images(model.backbone)
    refused(
        ValueError,
        r"engine must be one of \('fast', 'reference'\), got 'turbo'",
        lambda: model(x, engine="turbo"),
    )


def test_images_of_any_float_dtype_under_autocast():
    model = prompted("plain", dtype=torch.float32)
    x = images(model.backbone)
    with torch.autocast("cpu", torch.bfloat16):
        for kind in ("reference", "fast"):
            assert torch.equal(model(x.bfloat16(), engine=kind), model(x.bfloat16(), engine=kind))
            assert error(model(x.bfloat16(), engine=kind), model(x, engine=kind)) < 3e-2


def test_readable_in_print():
    text = repr(pae.PromptedViT(backbone("plain"), VPTDeep(2, dropout=0.1), pae.KLD(8)))
    assert "VPTDeep(num_tokens=2, dropout=0.1, dropout_scope='batch')" in text
    assert "consistency_weight=0.5" in text


def test_tiny_backbones_use_every_parameter():
    """Guards this suite: a weight that no logit reads would hide a wrong fold.

    One shift of all keys is the exception: it drops out of the softmax.
    """
    for feature in FEATURES:
        vit = backbone(feature).eval().requires_grad_(True)
        vit(images(vit)).square().sum().backward()
        unread = [
            n for n, p in vit.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9
        ]
        assert all(n.endswith("k_norm.bias") for n in unread), feature
        assert tiny.FEATURES[feature] is FEATURES[feature]
