"""Whose rows a pooling readout takes: every family, every kind of readout, and what is refused.

The released numbers are in test_golden and test_bpt.
"""

import copy
import json
from functools import partial

import pytest
import torch

import pae
from pae import prompts as p
from pae import tensorfile
from pae.backbones import average_pooled
from pae.mpa.forward import ZeroPromptForward
from tests import tiny
from tests.pae.test_families import FAMILIES
from tests.tiny import assert_engines_agree, error, refused

POOLING = ["avg", "avg_final_norm", "avg_with_prefix", "max", "avgmax", "registers_no_class_token"]


def pooled(feature, family, pool, dtype=torch.float64, **changes):
    model = tiny.prompted(feature, family, dtype, **changes)
    model.pool = pool
    return model


def by_hand(model, x):
    """The readout's rows from the blocks themselves, deep prompts or live ones."""
    vit, at, family = model.backbone, model.view.num_prefix_tokens, model.prompts
    rows = model.view.embed(x)
    count = 0
    for block, own in zip(vit.blocks, family.raw_prompts(), strict=True):
        if own is not None:
            rows = torch.cat([rows[:, :at], rows[:, at + count :]], 1)
            count = len(own)
            rows = torch.cat([rows[:, :at], own.expand(len(x), -1, -1), rows[:, at:]], 1)
        rows = block(rows)
    image, prompts = rows[:, at + count :], rows[:, at : at + count]
    kept = {"image": [image], "all": [image, prompts], "prompts": [prompts]}[model.pool]
    prefix = [rows[:, :at]] if vit.pool_include_prefix else []
    kept = vit.norm(torch.cat(prefix + kept, 1))
    mean, most = kept.mean(1), kept.amax(1)
    features = {"avg": mean, "max": most, "avgmax": (mean + most) / 2}[vit.global_pool]
    return model.head(vit.fc_norm(features))


@pytest.mark.parametrize("pool", ["image", "all", "prompts"])
@pytest.mark.parametrize("feature", POOLING)
@pytest.mark.parametrize("family", [p.VPTDeep, p.VPTShallow])
def test_rows_of_every_readout(family, feature, pool):
    model = pooled(feature, family(5), pool).eval()
    x = tiny.images(model.backbone)
    expected = by_hand(model, x)
    assert error(model(x), expected) < 1e-12
    assert error(pae.fast_forward(model, x), expected) < 1e-12
    assert_engines_agree(model, x)


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        (name, pool)
        for name in FAMILIES
        for pool in ("all", "prompts")
        # a mixture's bias has a gradient of nothing but rounding, whose size takes long to find
        if name not in ("ivpt", "ivpt_max_shared") and (pool == "all" or "ivpt" not in name)
    ],
)
def test_every_family(name, pool):
    """Also with dropout, groups, rows of the image, learned keys, and counts that differ."""
    family = FAMILIES[name]()
    if family.reads_class_attention or isinstance(family, p.DAVPT):
        vit = tiny.backbone("avg")
    else:
        vit = tiny.backbone("avg_no_class_token")
    rowless = isinstance(family, p.APT) or name in ("e2vpt_kv_alone", "apt-vl")
    none = isinstance(family, p.ProVPT) or rowless
    if pool == "prompts" and none:
        refused(
            ValueError,
            "pool must be 'image' or 'all' unless there are prompts in the last block: prompts "
            f"({type(family).__name__}) ",
            lambda: pae.PromptedViT(vit, family, pool=pool),
        )
        return
    model = pae.PromptedViT(vit, family, pool=pool).train()
    with torch.no_grad():
        for q in model.prompts.parameters():
            q.add_(0.3 * torch.randn(q.shape, dtype=q.dtype))
    x = tiny.images(vit)
    assert_engines_agree(model, x)
    torch.manual_seed(3)
    given = model(x)
    model.pool = "image"
    torch.manual_seed(3)
    assert (error(given, model(x)) > 1e-3) == (not rowless)


@pytest.mark.parametrize("pool", ["all", "prompts"])
@pytest.mark.parametrize(
    "family",
    [
        lambda: tiny.Given([2, 0, 3], sets=2, group=[0, 1, 1]),
        lambda: tiny.Given([2, 1, 3], sets=3),
        lambda: tiny.FromRows([2, 1, 3], grouped=True),
        lambda: p.VPTDeep([3, 0, 2], dropout=0.5, dropout_scope="sample"),
        lambda: p.VPTDeep([0, 0, 2]),
    ],
)
@pytest.mark.parametrize("memory", ["keep", "recompute", "recompute8"])
def test_sets_counts_and_memory(family, pool, memory):
    agree_with_memory(pooled("qk_norm_avg", family(), pool), memory)


@pytest.mark.parametrize("pool", ["all", "prompts"])
@pytest.mark.parametrize("memory", ["keep", "recompute", "recompute8"])
def test_one_block_alone(pool, memory):
    agree_with_memory(pooled("qk_norm_avg", p.VPTDeep(4, dropout=0.5), pool, depth=1), memory)


def agree_with_memory(model, memory):
    x, grads = tiny.images(model.backbone), 2e-2 if memory == "recompute8" else None
    assert_engines_agree(model, x, grads=grads, memory=memory)
    if memory == "keep":  # the lowest blocks then have less to do, whatever is kept
        assert_engines_agree(model, x, wrt_images=False)


def test_no_prompts_at_all():
    """ "all" is then what there is."""
    model = tiny.prompted("avg", p.VPTDeep([3, 2, 0]))
    x = tiny.images(model.backbone)
    expected = model(x)
    model.pool = "all"
    assert torch.equal(model(x), expected)
    assert error(pae.fast_forward(model, x), expected) < 1e-12
    with pytest.raises(ValueError, match=r"prompts \(VPTDeep\) has none there, got 'prompts'$"):
        model.pool = "prompts"
    assert model.pool == "all"


def test_under_autocast_and_in_16_bits():
    for dtype in (torch.float32, torch.bfloat16):
        model = pooled("avg", p.VPTDeep(5), "all", dtype)
        x = tiny.images(model.backbone)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            got, expected = pae.fast_forward(model, x), model(x)
        assert got.dtype == expected.dtype
        assert error(got.float(), expected.float()) < 5e-2


def test_compiled():
    model = pooled("avg", p.VPTDeep(5), "all", torch.float32, depth=1)
    x = tiny.images(model.backbone)
    step = torch.compile(lambda x: pae.fast_forward(model, x), backend="aot_eager")
    for pool in ("all", "prompts"):  # the second of them is another graph
        model.pool = pool
        expected = pae.fast_forward(model, x)
        expected.square().sum().backward()
        grad, model.prompts.tokens.grad = model.prompts.tokens.grad, None
        got = step(x)
        got.square().sum().backward()
        assert error(got, expected) < 1e-6
        assert error(model.prompts.tokens.grad, grad) < 1e-5
        model.prompts.tokens.grad = None


# ---- what a model with it is for the rest


@pytest.mark.parametrize("pool", ["all", "prompts"])
@pytest.mark.parametrize("family", [p.VPTDeep, p.VPTShallow])
@pytest.mark.parametrize("feature", ["avg", "qk_norm_avg", "max"])
def test_zero_prompts_of_mpa(feature, family, pool):
    model = pooled(feature, family(4), pool).eval()
    with torch.no_grad():
        model.prompts.tokens.zero_()
        x = tiny.images(model.backbone)
        got = ZeroPromptForward(model, 4, torch.float64)(model.view.embed(x))
        assert error(got, model(x)) < 1e-12


def test_condensed_and_copied():
    model = pooled("avg", p.VPTDeep(4), "all")
    x = tiny.images(model.backbone)
    assert copy.deepcopy(model).pool == "all"
    fewer = pae.condense(model, x, torch.arange(len(x)), keep=1.0)
    assert fewer.pool == "all" and error(fewer(x), model(x)) < 1e-12


def test_checkpoints(tmp_path):
    model = pooled("avg", p.VPTDeep(4), "all", torch.float32).eval()
    x = tiny.images(model.backbone)
    model.save(tmp_path / "a")
    assert pae.read_checkpoint(tmp_path / "a").pool == "all"
    again = pae.PromptedViT.from_file(tmp_path / "a", tiny.backbone("avg", torch.float32)).eval()
    assert again.pool == "all" and torch.equal(again(x), model(x))
    other = tiny.prompted("avg", p.VPTDeep(4), torch.float32)
    tokens = other.prompts.tokens.detach().clone()
    message = "was trained with pool='all', and the model has 'image': set model.pool, or build the"
    refused(pae.CheckpointError, message, lambda: other.load(tmp_path / "a"))
    assert torch.equal(other.prompts.tokens, tokens)
    other.pool = "all"
    assert torch.equal(other.load(tmp_path / "a").eval()(x), model(x))
    # one of a version that did not know it
    state, texts, _ = tensorfile.read_tensors(tmp_path / "a")
    described = json.loads(texts["pae"])
    for pool, message in ((None, None), ("mean", "is damaged: its pool is 'mean'")):
        del described["pool"]
        if pool is not None:
            described["pool"] = pool
        tensorfile.write_tensors(tmp_path / "b", state, {"pae": json.dumps(described)})
        described["pool"] = pool
        if message is None:
            assert pae.read_checkpoint(tmp_path / "b").pool == "image"
            old = pae.PromptedViT.from_file(tmp_path / "b", tiny.backbone("avg", torch.float32))
            assert old.pool == "image"
        else:
            refused(pae.CheckpointError, message, lambda: pae.read_checkpoint(tmp_path / "b"))


def test_a_checkpoint_for_a_class_token(tmp_path):
    """The readout is no weight, so the fingerprint is the same."""
    pooled("avg_final_norm", p.VPTDeep(4), "all").save(tmp_path / "a")
    refused(
        pae.CheckpointError,
        "does not fit this backbone: pool must be 'image' for a backbone whose readout pools no",
        lambda: pae.PromptedViT.from_file(tmp_path / "a", tiny.backbone("plain")),
    )


# ---- refused


@pytest.mark.parametrize(
    ("feature", "found"), [("plain", "token"), ("map", "map"), ("no_pool", ""), ("clip", "token")]
)
def test_readouts_that_pool_nothing(feature, found):
    model = pae.PromptedViT(tiny.backbone(feature), p.VPTDeep(2))
    for pool in ("all", "prompts"):
        message = (
            f"pool must be 'image' for a backbone whose readout pools no rows "
            f"(global_pool={found!r}), got {pool!r}; pae.backbones.average_pooled makes"
        )
        vit = tiny.backbone(feature)
        head = vit.head
        refused(ValueError, message, partial(pae.PromptedViT, vit, p.VPTDeep(2), pool=pool))
        assert vit.head is head
        refused(ValueError, message, partial(setattr, model, "pool", pool))
        assert model.pool == "image"


@pytest.mark.parametrize("word", ["original", "", None, 3, ["all"]])
def test_words(word):
    message = f"pool must be one of ('image', 'all', 'prompts'), got {word!r}"
    refused(
        ValueError, message, lambda: pae.PromptedViT(tiny.backbone("avg"), p.VPTDeep(2), pool=word)
    )


# ---- average_pooled


@pytest.mark.parametrize("feature", ["plain", "token_fc_norm", "registers"])
def test_norms_of_a_mean(feature):
    x = tiny.images(tiny.backbone(feature), 2)
    for norm in ("fresh", "behind", "before"):
        vit = tiny.backbone(feature).eval()
        own = vit.fc_norm if feature == "token_fc_norm" else vit.norm
        rows = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
        for block in vit.blocks:
            rows = block(rows)
        rows = rows[:, vit.num_prefix_tokens :]
        plain = torch.nn.functional.layer_norm(rows.mean(1), rows.shape[-1:], eps=own.eps)
        expected = {"fresh": plain, "behind": own(rows.mean(1)), "before": own(rows).mean(1)}
        assert average_pooled(vit, norm) is vit
        assert error(vit(x), vit.head(expected[norm])) < 1e-12
        model = pae.PromptedViT(vit, p.VPTDeep(3), pool="all")
        assert not any(q.requires_grad for q in vit.parameters())
        assert_engines_agree(model, x)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ("avg", "VisionTransformer.global_pool is 'avg', expected 'token'"),
        ("map", "VisionTransformer.global_pool is 'map', expected 'token'"),
        ("no_final_norm", "VisionTransformer has none as final norms, expected one LayerNorm"),
    ],
)
def test_no_class_token_to_begin_with(feature, message):
    vit = tiny.backbone(feature)
    before = vit.global_pool, vit.norm, vit.fc_norm
    refused(pae.UnsupportedBackbone, message, lambda: average_pooled(vit))
    assert (vit.global_pool, vit.norm, vit.fc_norm) == before
    with pytest.raises(ValueError, match="norm must be one of"):
        average_pooled(tiny.backbone("plain"), "own")
