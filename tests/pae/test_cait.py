"""timm's CaiT, which runs as it is; and containers that have no place for prompts."""

import pytest
import torch
from timm.models.cait import Cait

import pae
from pae.prompts import METHODS, VPTDeep, VPTShallow
from pae.train import models
from tests.tiny import error, filled, over, refused, small

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
SIZES |= {"mlp_ratio": 2, "num_classes": 5, "init_values": 0.1}


def cait(**changes):
    return filled(Cait(**{**SIZES, **changes})).double().eval()


def made(family=None, pool="image", **changes):
    with pytest.warns(UserWarning, match="Cait runs as it is .*talking heads"):
        return over(cait(**changes), family, pool=pool)


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("pooled", ["token", "avg"])
def test_without_prompts_it_is_the_backbone(pooled):
    expected = cait(global_pool=pooled)(images())
    assert error(made(VPTDeep(0), global_pool=pooled)(images()), expected) < 1e-12


@pytest.mark.parametrize("family", [VPTDeep([2, 0, 1]), VPTShallow(3)])
def test_prompts_stand_before_the_patches(family):
    """Written out: block by block, and the class row looks at patches alone."""
    model, x = made(family), images()
    vit, rows = cait(), model.prompts.raw_prompts()
    y, lives = vit.patch_embed(x) + vit.pos_embed, 0
    for block, own in zip(vit.blocks, rows):
        if own is not None and len(own):
            y, lives = torch.cat([own.expand(3, -1, -1), y], dim=1), len(own)
        y = block(y)
        if isinstance(family, VPTDeep):
            y, lives = y[:, lives:], 0
    row = vit.cls_token.expand(3, -1, -1)
    for block in vit.blocks_token_only:
        row = block(y[:, lives:], row)
    expected = vit.head(vit.norm(row)[:, 0])
    got = model(x)
    assert error(got, expected) < 1e-12
    got.square().sum().backward()
    assert all(p.grad.norm() > 1e-3 for p in model.prompts.parameters())


def test_rows_of_blocks_are_those_of_all_patches():
    """There is no class row among them that would be cut off."""
    model, x = made(VPTDeep(0)), images()
    vit = cait()
    expected = vit.blocks[0](vit.patch_embed(x) + vit.pos_embed)
    (got,) = model.forward_features(x, [0])
    assert got.shape == expected.shape and error(got, expected) < 1e-12


def test_patches_one_by_one_are_embedded_as_in_an_image():
    view, x = made(VPTDeep(0)).view, images()
    norm = view.module.patch_embed.norm
    view.module.patch_embed.norm = torch.nn.Identity()
    tokens = view.module.patch_embed(x)
    view.module.patch_embed.norm = norm
    assert error(view.embed_tokens(tokens, (16, 16)), view.embed(x)) < 1e-12


def test_every_row_in_the_mean():
    model = made(pool="all", global_pool="avg")
    features = model.features(images())
    model.pool = "image"
    assert error(model.features(images()), features) > 1e-3


def test_the_fast_engine_refuses():
    refused(
        pae.UnsupportedBackbone,
        "blocks.0.attn mixes the logits of its heads (talking heads)",
        lambda: pae.fast_forward(made(), images()),
    )


@pytest.mark.parametrize("method", ["ivpt", "da-vpt"])
@pytest.mark.filterwarnings("ignore")
def test_no_class_token_among_the_rows(method):
    refused(ValueError, "class token", lambda: over(cait(), small(METHODS[method])))
    refused(ValueError, "reads its rows by class attention", lambda: over(cait(), pool="all"))


NO_PLACE = {
    "xcit_nano_12_p16_224": "Xcit has no place for prompts: its blocks convolve",
    "convit_tiny": "ConVit has no place for prompts: its blocks weigh rows by places",
    "volo_d1_224": "VOLO has no place for prompts: its first blocks weigh the neighbours",
    "hiera_tiny_224": "Hiera has no place for prompts: its blocks pool queries",
    "tnt_s_legacy_patch16_224": "TNT has no place for prompts: its blocks look at the pixels",
    "samvit_base_patch16": "VisionTransformerSAM has no place for prompts: its blocks cut",
    "swinv2_cr_tiny_224": "SwinTransformerV2Cr compares rows by their cosine",
    "swinv2_tiny_window8_256": "SwinTransformerV2 compares rows by their cosine",
}


@pytest.mark.parametrize("name", NO_PLACE)
def test_no_place_for_prompts(name):
    row = models.asked(name)
    assert row.engine == "none" and row.why.startswith(NO_PLACE[name])
