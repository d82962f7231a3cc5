"""timm's PiT, which runs as it is: stages of other grids and widths, a convolution between them."""

from functools import partial

import pytest
import torch
from timm.models.pit import PoolingVisionTransformer
from torch import nn

import pae
from pae.prompts import METHODS, VPTDeep, VPTShallow
from pae.train import models
from tests.tiny import error, filled, over, refused, small

SIZES = {"img_size": (32, 24), "patch_size": 8, "stride": 4, "base_dims": (8, 8, 8)}
SIZES |= {"depth": (1, 2, 1), "heads": (1, 2, 4), "mlp_ratio": 2, "num_classes": 5}
GRIDS, WIDTHS = [(7, 5), (4, 3), (4, 3), (2, 2)], (8, 16, 16, 32)


def pit(**changes):
    return filled(PoolingVisionTransformer(**{**SIZES, **changes})).double().eval()


def made(module=None, family=None, **options):
    with pytest.warns(UserWarning, match="PoolingVisionTransformer runs as it is .*convolution"):
        return over(pit() if module is None else module, family, **options)


def images(batch=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, 32, 24, generator=generator, dtype=torch.float64)


def test_without_prompts_it_is_the_backbone():
    expected = pit()(images())
    assert error(made(family=VPTDeep(0))(images()), expected) < 1e-12


@pytest.mark.filterwarnings("ignore:PoolingVisionTransformer runs as it is")
def test_two_class_rows_have_one_head():
    """It reads their mean."""
    two = "averages the logits of its head and of head_dist"
    refused(ValueError, two, lambda: pae.PromptedViT(pit(distilled=True), VPTDeep(0)))
    model = pae.PromptedViT(pit(distilled=True), VPTDeep(0), num_classes=3)
    with torch.no_grad():
        expected = pit(distilled=True).forward_features(images()).mean(1)
        assert error(model.features(images()), expected) < 1e-12
    assert model.num_classes == 3 and model.view.num_prefix_tokens == 2


def test_a_norm_that_begins_a_stage():
    def normed():
        module = pit()
        for stage, width in zip(module.transformers, (8, 16, 32)):
            stage.norm = filled(nn.LayerNorm(width)).double()
        return module

    assert error(made(normed(), VPTDeep(0))(images()), normed()(images())) < 1e-12


@pytest.mark.parametrize("family", [VPTDeep([2, 0, 1, 3]), VPTShallow(3)])
def test_prompts_stand_behind_the_class_row(family):
    """Written out: those that live on are widened as the class row is."""
    model, x = made(family=family), images()
    m, rows = pit(), model.prompts.raw_prompts()
    image = m.patch_embed(x) + m.pos_embed
    others, i = m.cls_token.expand(3, -1, -1), 0
    for stage in m.transformers:
        if stage.pool is not None:
            image, others = stage.pool.conv(image), stage.pool.fc(others)
        for block in stage.blocks:
            own, i = rows[i], i + 1
            if own is not None and len(own):
                others = torch.cat([others[:, :1], own.expand(3, -1, -1), others[:, 1:]], dim=1)
            count = others.shape[1]
            y = block(torch.cat([others, image.flatten(2).mT], dim=1))
            others, image = y[:, :count], y[:, count:].mT.unflatten(2, image.shape[2:])
            if isinstance(family, VPTDeep):
                others = others[:, :1]
    got = model(x)
    assert error(got, m.head(m.norm(others[:, 0]))) < 1e-12
    got.square().sum().backward()
    tokens = [model.prompts.tokens] if isinstance(family, VPTDeep) else model.prompts.parameters()
    assert all(p.grad.norm() > 1e-3 for p in tokens)


def test_rows_of_blocks_are_maps_of_their_stages():
    model = made(family=VPTDeep(2))
    rows = model.forward_features(images(), [0, 1, 2, 3])
    assert [tuple(r.shape[1:]) for r in rows] == [(h * w, d) for (h, w), d in zip(GRIDS, WIDTHS)]
    for block in (0, 2, 3):
        head = pae.LinearHead(WIDTHS[block], 4).double()
        segmenter = pae.PromptedSegmenter(made(family=VPTDeep(2)), head, (block,)).eval()
        assert segmenter(images()).shape == (3, 4, 32, 24)


def test_regulariser_and_file(tmp_path):
    """The pairs of a stage; a file comes back."""
    model, x = made(kld=pae.KLD(dim=3)), images()
    assert model.penalty() > 0
    model.save(tmp_path / "pit.safetensors")
    other = made(kld=pae.KLD(dim=3))
    with torch.no_grad():
        other.prompts.tokens.zero_()
    other.load(tmp_path / "pit.safetensors")
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.filterwarnings("ignore")
def test_what_is_refused():
    unsupported = pae.UnsupportedBackbone
    refused(unsupported, "use engine=", lambda: pae.fast_forward(made(), images()))
    for method in ("bpt", "vapt", "e2vpt"):
        refused(ValueError, "several widths", partial(over, pit(), small(METHODS[method])))
    refused(ValueError, "pools no rows", lambda: over(pit(), pool="all"))
    refused(unsupported, "global_pool is '', expected 'token'", lambda: over(pit(global_pool="")))
    refused(
        ValueError,
        "must be (32, 24) pixels high and wide, got (32, 32)",
        lambda: made()(torch.zeros(1, 3, 32, 32, dtype=torch.float64)),
    )


def test_every_architecture_is_taken():
    row = models.asked("pit_ti_224")
    assert row.engine == "reference" and "convolution between its stages" in row.why
