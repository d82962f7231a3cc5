"""timm's other containers and blocks: every one in both engines, and against its own forward."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

import pae
from pae import block as frozen
from pae.backbones.view import Geometry, rotated
from pae.methods.nsp2 import NullSpace
from pae.mpa.forward import ZeroPromptForward
from pae.prompts import E2VPT, VPTDeep, VPTShallow
from tests import tiny
from tests.timm_kinds import KINDS, ROPE, build, images
from tests.tiny import SIZES, assert_engines_agree, error, refused


def prompted(kind: str, family=None, **options) -> pae.PromptedViT:
    options = {"num_classes": 5 if kind == "distilled" else None, **options}
    family = VPTDeep([2, 0, 1]) if family is None else family
    model = pae.PromptedViT(build(kind), family, **options).train()
    with torch.no_grad():
        for p in model.prompts.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_without_prompts_it_is_the_backbone(kind):
    backbone = build(kind)
    x = images(backbone)
    expected = backbone(x)
    model = pae.PromptedViT(copy.deepcopy(backbone), VPTDeep(0), num_classes=5)
    model.head = copy.deepcopy(backbone.head)
    if kind == "distilled":
        features = backbone.forward_head(backbone.forward_features(x), pre_logits=True)
        expected = model.head(features)
    for engine in ("reference", "fast"):
        assert error(model(x, engine), expected) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_engines_agree(kind):
    for family in (VPTDeep([2, 0, 1]), VPTShallow(3)):
        model = prompted(kind, family)
        assert_engines_agree(model, images(model.backbone))


@pytest.mark.parametrize(
    "kind, memory",
    [
        ("eva02-b", "recompute8"),
        ("sapiens2", "recompute"),
        ("beit, one bias", "recompute"),
        ("vitamin", "recompute"),
        ("eva02-e", "recompute8"),
        ("parallel", "recompute"),
        ("differential and parallel", "recompute"),
    ],
)
def test_memory_modes(kind, memory):
    """A gate's derivative is kept whole, or computed again: both modes are exact."""
    model = prompted(kind)
    assert_engines_agree(model, images(model.backbone), memory=memory)


@pytest.mark.parametrize("kind", ["eva02-b", "dinov3", "mixed", "beit, one bias", "relpos"])
def test_one_row_that_is_read_asks_alone(kind, monkeypatch):
    """Queries and values of all rows are formed in two of three blocks."""
    project, seen = frozen.project, []
    monkeypatch.setattr(frozen, "project", lambda *given: seen.append(1) or project(*given))
    model = prompted(kind)
    assert_engines_agree(model, images(model.backbone))
    assert len(seen) == 2


@pytest.mark.parametrize(
    "kind", ["eva02-s", "dinov3", "mixed with norms of heads", "beit", "parallel things"]
)
def test_learned_keys_and_values(kind):
    """Keys in head space stand as the backbone's own heads lie, whatever order a plan has."""
    model = prompted(kind, E2VPT(3, num_kv=2))
    assert_engines_agree(model, images(model.backbone))


@pytest.mark.parametrize(
    "kind",
    ["eva02-s", "eva02-b", "mixed with norms of heads", "beit", "vitamin", "eva02-e", "post-norm"],
)
@pytest.mark.parametrize("which", ["biases", "blocks.*.norm?.*"])
def test_trained_biases_and_norms(kind, which):
    model = prompted(kind, train_backbone=which)
    assert any("bias" in name for name in model.trained_backbone)
    assert_engines_agree(model, images(model.backbone))


def _mixed() -> VisionTransformer:
    """Blocks that differ in heads, hidden width, activation, norms, eps and form."""
    vit = build("parallel")
    vit.blocks[0] = tiny.backbone("qk_norm", num_heads=2).eval().blocks[0]
    vit.blocks[2] = tiny.backbone("swiglu", mlp_ratio=3).eval().blocks[2]
    vit.blocks[2].norm2.eps = 0.1
    return vit


@pytest.mark.parametrize("family", [VPTDeep, VPTShallow])
def test_blocks_of_one_backbone_may_differ(family):
    model = pae.PromptedViT(_mixed(), family(3)).train()
    assert_engines_agree(model, images(model.backbone))


def test_keys_per_head_need_blocks_with_the_same_heads():
    message = "E2VPT) gives keys and values per head, and the backbone's blocks have different"
    refused(ValueError, message, lambda: pae.PromptedViT(_mixed(), E2VPT(3, num_kv=2)))


@pytest.mark.parametrize("kind", ["parallel, one product", "differential and parallel"])
def test_one_norm_that_attention_and_mlp_read_is_trained(kind):
    model = prompted(kind, train_backbone=["blocks.[12].in_norm.*", "blocks.*.out_proj.bias"])
    assert_engines_agree(model, images(model.backbone))


@pytest.mark.parametrize("kind", ["eva02-b", "dinov3", "beit", "pe", "naflex", "relpos"])
def test_da_vpt_plus(kind):
    """By what parts do: queries' biases and the second norms' scales are left out."""
    model = prompted(kind, train_backbone="da-vpt+")
    names = " ".join(model.trained_backbone)
    assert "norm1.weight" in names and "mlp.fc2.bias" in names and "norm2.weight" not in names
    assert "q_bias" not in names and "q_proj" not in names
    assert ("v_bias" in names or "v_proj.bias" in names or ":kv" in names) == (kind != "dinov3")
    assert_engines_agree(model, images(model.backbone))


@pytest.mark.parametrize(
    "kind, why",
    [
        (
            "sapiens2",
            "trains the biases of keys and values of blocks.0, which is no parameter here",
        ),
        (
            "post-norm",
            "trains norms in front of attention and MLP, and blocks.0 has them elsewhere",
        ),
        ("parallel", "trains norms in front of attention and MLP, and blocks.0 has them elsewhere"),
        ("differential", "the biases of keys and values of blocks.0, which is no parameter here"),
        ("parallel things", "trains the biases of keys and values of blocks.0, which is no"),
    ],
)
def test_where_da_vpt_plus_has_no_meaning(kind, why):
    refused(ValueError, why, lambda: prompted(kind, train_backbone="da-vpt+"))


@pytest.mark.parametrize(
    "kind, name",
    [
        ("parallel, one product", "blocks.0.in_proj.bias"),
        ("parallel things", "blocks.0.attns.0.norm.weight"),
        ("differential", "blocks.0.attn.qkv.bias"),
    ],
)
def test_parts_of_products_that_are_split_or_summed_are_not_trained(kind, name):
    message = f"train_backbone {name!r} takes {name}, and the fast engine"
    refused(ValueError, message, lambda: prompted(kind, train_backbone=name))


@pytest.mark.parametrize("kind", ["eva02-b", "dinov3", "beit", "post-norm", "differential"])
def test_zero_prompts(kind):
    """MPA's forward, which knows what a zero prompt is: its key is a bias."""
    for family in (VPTDeep(3), VPTShallow(3)):
        model = prompted(kind, family)
        with torch.no_grad():
            model.prompts.tokens.zero_()
            x = images(model.backbone)
            forward = ZeroPromptForward(model, 3, torch.float64, tuple(x.shape[-2:]))
            assert error(forward(model.view.embed(x)), model(x)) < 1e-10


def test_methods_that_need_linear_logits_say_so():
    model = prompted("eva02-s", VPTDeep(2))
    refused(ValueError, "model rotates queries", lambda: NullSpace(model, official=True))


@pytest.mark.parametrize("kind", ["eva02-s", "pe", "relpos, one bias"])
def test_the_class_rows_query(kind):
    model = prompted(kind)
    rows = model.view.embed(images(model.backbone))
    folded = model.plan().blocks[1]
    assert error(frozen.class_query(folded, rows), model.view.class_query(1, rows)) < 1e-12


def test_a_rotation_is_a_complex_product():
    """Both layouts, against numbers a + bi times cos + i sin."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)
    angles = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)
    rotation = torch.stack([angles.sin(), angles.cos()])
    pairs = torch.view_as_complex(rows[:, :, 1:].unflatten(-1, (4, 2)).contiguous()) * turn
    got = rotated(rows, rotation, "pairs")
    assert error(got[:, :, 1:], torch.view_as_real(pairs).flatten(-2)) < 1e-14
    half = torch.complex(*rows[:, :, 1:].chunk(2, -1)) * turn
    got = rotated(rows, rotation, "half")
    assert error(got[:, :, 1:], torch.cat([half.real, half.imag], -1)) < 1e-14
    assert torch.equal(got[:, :, :1], rows[:, :, :1])


def test_a_bias_is_none_of_the_prompts():
    bias = torch.arange(9.0).view(1, 3, 3) + 1
    got = Geometry(bias=bias, at=1).bias_of(5, 2)
    assert got.shape == (1, 5, 7) and got.sum() == bias.sum()
    rows, columns = [0, 3, 4], [2, 5, 6]
    assert torch.equal(got[0][rows][:, columns], bias[0])


@pytest.mark.parametrize(
    "kind, name", [("mixed", "rope.freqs"), ("beit", "blocks.0.attn.relative_position_bias_table")]
)
def test_positions_that_require_a_gradient_are_refused(kind, name):
    model = prompted(kind)
    model.backbone.get_parameter(name).requires_grad_(True)
    x = images(model.backbone)
    refused(pae.UnsupportedBackbone, "requires a gradient", lambda: model(x))
    refused(pae.UnsupportedBackbone, "requires a gradient", lambda: model(x, "fast"))


def test_a_second_head_is_not_forgotten():
    refused(
        ValueError,
        "num_classes must be given: the backbone averages the logits of its head and of head_dist",
        lambda: pae.PromptedViT(build("distilled"), VPTDeep(2)),
    )


def _shuffled(model: Eva) -> Eva:
    """Norms in front of the attention, and behind the MLP."""
    for block in model.blocks:
        block.forward = lambda x, block=block, **_: block.norm2(
            block.mlp(x + block.attn(block.norm1(x)))
        )
    return model


def test_blocks_are_told_apart_without_values():
    """On the meta device: post-norm by the order of its parts, others by what nobody reads."""
    with torch.device("meta"):
        sizes = {**SIZES, "depth": 2}
        post = Eva(**sizes, use_post_norm=True)
        for accepted in (Eva(**sizes, **ROPE), VisionTransformer(**sizes), post):
            assert pae.backbones.read_backbone(accepted).unproved is None
        unproved = {
            "in another order": _shuffled(Eva(**sizes)),
            "attn.norm stands behind a difference": VisionTransformer(
                **sizes, attn_layer="diff", scale_attn_norm=True
            ),
        }
    for reason, model in unproved.items():
        with pytest.warns(UserWarning, match=reason):
            assert reason in pae.backbones.read_backbone(model).unproved


def test_names():
    """By timm's names at a small size, what the fast engine runs."""
    names = {
        "vit_small_patch16_dinov3": {"img_size": 32},
        "vit_pe_core_tiny_patch16_384": {"img_size": 32},
        "deit_tiny_distilled_patch16_224": {"img_size": 32},
    }
    for name, size in names.items():
        backbone = timm.create_model(name, **size, depth=2, num_classes=3)
        model = pae.PromptedViT(backbone, VPTDeep(2), num_classes=3).eval()
        x = torch.randn(2, 3, *(2 * (size["img_size"],)))
        with torch.no_grad():
            assert error(model(x, "fast"), model(x)) < 1e-5, name
