"""Prompts on timm's Swin v1: the released numbers, and both engines on models of every kind."""

import json
from fnmatch import fnmatchcase

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch.func import functional_call

import pae
from pae.prompts import VPTDeep, VPTShallow
from pae.train import models
from pae.train.cli import main
from tests.tiny import assert_engines_agree, backbone, error, refused
from tests.train.helpers import CPU_FLAGS, save_shades

PRECISIONS = {"f32": torch.float32, "f64": torch.float64}
VALUE = {"f32": 1e-5, "f64": 1e-9}
GRADIENT = {"f32": 1e-4, "f64": 1e-6}
ENGINES = ("reference", "fast")


# ---- golden vectors


def stored(golden, precision):
    """Arrays of swin_vpt.npz in one dtype, and its Swin."""
    arrays, dtype = golden("swin_vpt"), PRECISIONS[precision]
    meta = json.loads(str(arrays["meta_json"]))
    swin = SwinTransformer(
        **{k: meta[k] for k in ("img_size", "patch_size", "embed_dim", "depths", "num_heads")},
        window_size=meta["window"],
        mlp_ratio=meta["mlp_ratio"],
        num_classes=meta["num_classes"],
    )
    found = {k: torch.as_tensor(v) for k, v in arrays.items() if k != "meta_json"}
    weights = {k[5:]: v for k, v in found.items() if k.startswith("timm/")}
    swin.load_state_dict(weights)
    floats = {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}
    return floats, found, swin.to(dtype)


def released(arrays, swin, kind):
    """A model with the stored prompts: "deep", "shallow" (as released) or "fixed"."""
    family = VPTDeep(5) if kind == "deep" else VPTShallow(5, faithful=kind == "shallow")
    model = pae.PromptedViT(swin, family, pool="all").train()
    deep = [rows for s in range(4) for rows in arrays[f"deep_{s}"]]
    family.set_prompts([arrays["prompt_0"], *(deep if kind == "deep" else [None] * 6)])
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["deep", "shallow", "fixed"])
def test_as_released(golden, kind, engine, precision):
    arrays, exact, swin = stored(golden, precision)
    model = released(arrays, swin, kind)
    features = model.features(arrays["images"][:2], engine)
    logits = model.head(features)
    loss = F.cross_entropy(logits, arrays["labels"][:2])
    loss.backward()
    at = f"{kind}/{precision}/"
    for name, got in (("features", features), ("logits", logits), ("loss", loss)):
        off = (got.detach().double() - exact[at + name].double()).abs().max()
        assert off <= VALUE[precision], name
    grads = [g for s in range(4) for g in exact[f"{at}grad_deep_{s}"]] if kind == "deep" else []
    expected = torch.cat([g.flatten() for g in (exact[f"{at}grad_prompt_0"], *grads)])
    got = model.prompts.tokens.grad.flatten()
    assert error(got, expected) <= GRADIENT[precision]
    assert error(model.head.weight.grad, exact[f"{at}grad_head_weight"]) <= GRADIENT[precision]
    assert error(model.head.bias.grad, exact[f"{at}grad_head_bias"]) <= GRADIENT[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["deep", "shallow", "fixed"])
def test_what_other_images_do(golden, kind, engine, precision):
    """In the released shallow kind an image's features depend on its neighbours; in no other."""
    arrays, exact, swin = stored(golden, precision)
    model, images = released(arrays, swin, kind), arrays["images"]
    with torch.no_grad():
        batches = [images[[0, 1]], images[[0, 2]], images[:1]]
        got = torch.stack([model.features(batch, engine)[0] for batch in batches])
    if kind == "fixed":
        assert error(got, got[2].expand_as(got)) <= VALUE[precision]
    else:
        expected = exact[f"leak/{precision}/{kind}"]
        assert (got.double() - expected.double()).abs().max() <= VALUE[precision]
        assert (error(got[0], got[2]) > 0.01) == (kind == "shallow")


# ---- both engines

PLAIN = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
PLAIN |= {"window_size": 4, "mlp_ratio": 2, "num_classes": 5, "drop_path_rate": 0.3}
KINDS = {
    "plain": {},
    "three_stages": {"depths": (1, 3, 2), "num_heads": (2, 2, 4), "img_size": (48, 32)},
    "window_is_grid": {"img_size": 16, "patch_size": 4},
    "one_stage": {"depths": (2,), "num_heads": (2,)},
    "padded": {"img_size": 22, "patch_size": 2, "depths": (2, 2, 1), "num_heads": (1, 2, 2)},
    "oblong_window": {"window_size": (2, 4)},
    "always_partition": {"always_partition": True, "img_size": 12, "patch_size": 2},
    "no_qkv_bias": {"qkv_bias": False},
    "head_width": {"head_dim": 6, "global_pool": "max"},
    "any_size": {"dynamic_img_size": True},
    "dropout": {"drop_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5},
}
FAMILIES = {
    "deep": lambda depth: VPTDeep(3),
    "dropout": lambda depth: VPTDeep(3, dropout=0.3),
    "per_sample": lambda depth: VPTDeep(3, dropout=0.3, dropout_scope="sample"),
    "counts": lambda depth: VPTDeep([i % 3 for i in range(depth)]),
    "none": lambda depth: VPTDeep(0),
    "shallow": lambda depth: VPTShallow(3),
    "shallow_per_sample": lambda depth: VPTShallow(3, dropout=0.3, dropout_scope="sample"),
    "faithful": lambda depth: VPTShallow(3, faithful=True),
}


def small(kind="plain", dtype=torch.float64, seed=1):
    """A Swin with random weights of trained size."""
    swin = SwinTransformer(**{**PLAIN, **KINDS[kind]}).to(dtype)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in swin.named_parameters():
            values = torch.randn(p.shape, generator=draw)
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.3 * values)
            else:
                matrix = name.endswith("weight")
                p.copy_(values * p[0].numel() ** -0.5 if matrix else 0.5 * values)
    return swin


def made(kind="plain", family="deep", pool="all", dtype=torch.float64, batch=3):
    """A prompted model in training mode, and images for it."""
    swin = small(kind, dtype)
    depth = sum(len(stage.blocks) for stage in swin.layers)
    prompts = FAMILIES[family](depth) if isinstance(family, str) else family
    model = pae.PromptedViT(swin, prompts, pool=pool).train()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.prompts.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=draw))
    size = (24, 40) if kind == "any_size" else model.view.default_size
    return model, torch.randn(batch, 3, *size, generator=draw, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_without_prompts_it_is_the_backbone(kind):
    swin = small(kind).eval()
    images = torch.randn(2, 3, *swin.patch_embed.img_size, dtype=torch.float64)
    expected = swin(images)
    model = pae.PromptedViT(swin, VPTDeep(0))
    for engine in ENGINES:
        assert error(model(images, engine), expected) < 1e-12


@pytest.mark.parametrize("pool", ["all", "image"])
@pytest.mark.parametrize("family", FAMILIES)
def test_engines_agree_on_families(family, pool):
    assert_engines_agree(*made("three_stages", family, pool))


@pytest.mark.parametrize("family", ["per_sample", "faithful"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "three_stages"])
def test_engines_agree_on_kinds(kind, family):
    assert_engines_agree(*made(kind, family))


@pytest.mark.parametrize("memory", ["recompute8", "recompute"])
@pytest.mark.parametrize("kind", ["padded", "plain"])
def test_memory_modes(kind, memory):
    model, images = made(kind)
    tolerance = 5e-3 if memory == "recompute8" else None
    assert_engines_agree(model, images, grads=tolerance, memory=memory)


@pytest.mark.parametrize("family", ["deep", "shallow"])
def test_prompts_alone_pooled(family):
    assert_engines_agree(*made("plain", family, "prompts"))


def test_fp32():
    assert_engines_agree(*made(dtype=torch.float32))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["deep", "shallow", "faithful"])
def test_only_the_released_shallow_kind_mixes_images(family, engine):
    model, images = made("padded", family)
    with torch.no_grad():
        alone = torch.cat([model(image[None], engine) for image in images])
        apart = error(model(images, engine), alone)
    assert apart > 1e-3 if family == "faithful" else apart < 1e-12


def test_training_steps_agree():
    def trained(engine):
        model, images = made("plain", VPTDeep(3))
        optimiser = torch.optim.SGD(model.parameter_groups(0.1, 1e-3), momentum=0.9)
        for _ in range(4):
            loss = F.cross_entropy(model(images, engine), torch.tensor([0, 1, 2]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return model.prompts.tokens.detach()

    assert error(trained("fast"), trained("reference")) < 1e-9


@pytest.mark.parametrize("family", ["deep", "faithful"])
def test_gradients_are_derivatives(family):
    model, images = made("padded", family, batch=2)

    def loss(tokens):
        given = {"prompts.tokens": tokens}
        return functional_call(model, given, (images,), {"engine": "fast"}).square().sum()

    tokens = model.prompts.tokens.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (tokens,), fast_mode=True)


def test_checkpoint(tmp_path):
    model, images = made(family="faithful")
    model.save(tmp_path / "swin.safetensors")
    again = pae.PromptedViT.from_file(tmp_path / "swin.safetensors", small()).eval()
    assert again.prompts.faithful and again.pool == "all"
    assert torch.equal(again(images, "fast"), model.eval()(images, "fast"))
    refused(
        pae.CheckpointError,
        "backbone",
        lambda: made("no_qkv_bias", "faithful")[0].load(tmp_path / "swin.safetensors"),
    )


def test_command_line(tmp_path, capsys):
    flags = ["--method", "vpt-deep", "--model", "swin_tiny_patch4_window7_224", "--no-pretrained"]
    flags += ["--img-size", "32", "--pool", "all", "--epochs", "1", "--num-tokens", "2"]
    data = str(save_shades(tmp_path / "data"))
    flags += ["--data", data, "--output", str(tmp_path / "run"), *CPU_FLAGS]
    assert main(["train", *flags]) == 0
    assert "test acc" in capsys.readouterr().out


SWINS = ["swin_tiny_patch4_window7_224", "swin_large_patch4_window12_384", "swin_s3_small_224"]


@pytest.mark.parametrize("name", SWINS)
def test_names_of_timm(name):
    """`python -m docs.models` asks for all; these have each of the kinds of windows."""
    assert models.asked(name).engine == "fast"


def test_initial_prompts_have_the_range_of_the_first_width():
    model = pae.PromptedViT(small(), VPTDeep(50))
    bound = (6 / (3 * 2 * 2 + 8)) ** 0.5
    rows = model.prompts.raw_prompts()
    assert [tuple(r.shape) for r in rows] == [(50, 8), (50, 8), (50, 16), (50, 16)]
    assert all(0.98 * bound < r.abs().max() <= bound for r in rows)


def test_a_plan_follows_the_backbone():
    model, images = made()
    first = pae.fast_forward(model, images)
    plan = model.plan()
    pae.fast_forward(model, images)
    assert model.plan().w_qkv is plan.w_qkv  # and is not folded anew for every step
    with torch.no_grad():
        model.backbone.layers[1].downsample.reduction.weight.mul_(1.1)
        model.backbone.layers[0].blocks[1].attn.relative_position_bias_table.add_(
            torch.randn(49, 1, dtype=torch.float64)
        )
    assert error(pae.fast_forward(model, images), first) > 1e-3
    assert_engines_agree(model, images)


# ---- trained with the prompts

TRAINED = {
    "biases": "biases",
    "da-vpt+": "da-vpt+",
    "norms": ["layers.*norm*", "norm.*"],
    "between stages": ["layers.1.downsample.*"],
    "one alone": ["layers.1.blocks.1.attn.qkv.bias"],
}


def also_training(which, kind="plain", family="deep", dtype=torch.float64):
    swin = small(kind, dtype)
    depth = sum(len(stage.blocks) for stage in swin.layers)
    model = pae.PromptedViT(swin, FAMILIES[family](depth), pool="all", train_backbone=which)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.prompts.tokens.copy_(0.7 * torch.randn(model.prompts.tokens.shape, generator=draw))
    size = model.view.default_size
    return model.train(), torch.randn(3, 3, *size, generator=draw, dtype=dtype)


@pytest.mark.parametrize("kind", ["plain", "padded", "one_stage", "no_qkv_bias"])
@pytest.mark.parametrize("which", TRAINED)
def test_engines_agree_on_what_else_is_trained(which, kind):
    names = [name for name, _ in small(kind).named_parameters()]
    patterns = TRAINED[which]
    if isinstance(patterns, list) and not any(fnmatchcase(n, p) for n in names for p in patterns):
        refused(ValueError, "neither one of", lambda: also_training(patterns, kind))
        return
    if isinstance(patterns, list):
        patterns = [p for p in patterns if any(fnmatchcase(n, p) for n in names)]
    model, images = also_training(patterns, kind)
    assert_engines_agree(model, images)


@pytest.mark.parametrize("family", ["shallow", "faithful", "none"])
def test_biases_with_other_prompts(family):
    assert_engines_agree(*also_training("biases", "padded", family))


def test_trained_biases_reach_the_padding():
    """Rows of padding have the bias for their key and value: its gradient has their part."""
    model, images = also_training(["layers.*.blocks.*.attn.qkv.bias"], "padded")
    assert_engines_agree(model, images, memory="recompute")
    bias = model.backbone.layers[0].blocks[0].attn.qkv.bias
    before = pae.fast_forward(model, images)
    with torch.no_grad():
        bias.add_(0.1)
    assert error(pae.fast_forward(model, images), before) > 1e-4
    assert_engines_agree(model, images)


# ---- KLD


@pytest.mark.parametrize("mode", ["global", "layerwise"])
@pytest.mark.parametrize("first", [False, True])
def test_kld_pairs_blocks_of_one_stage(mode, first):
    """As one KLD for each stage with its own lift, of the same K and L."""
    kld = pae.KLD(6, mode, first_block=first)
    model = pae.PromptedViT(small("three_stages"), VPTDeep([2, 3, 3, 3, 1, 1]), kld).train()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in kld.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    rows, begin = model.prompts.raw_prompts(), 0 if first else 1
    expected = 0
    for lift, blocks in zip(kld.lifts, (range(1, 4), range(4, 6)), strict=True):
        alone = pae.KLD(6, mode, first_block=True)
        alone.bind(len(blocks), lift.in_features)
        alone.double().lift.weight = lift.weight
        own = slice(blocks.start - begin, blocks.stop - begin)
        alone.K, alone.L = (
            torch.nn.Parameter(t if t.dim() == 2 else t[own]) for t in (kld.K, kld.L)
        )
        expected = expected + sum(alone.terms([rows[i] for i in blocks]))
    penalty = model.penalty()
    assert error(penalty, expected) < 1e-12
    penalty.backward()
    assert all(p.grad.norm() > 0 for p in kld.parameters())


def test_kld_of_two_blocks_of_the_first_stage():
    """Which is a pair with `first_block` alone."""
    with_first = pae.PromptedViT(small(), VPTDeep(2), pae.KLD(6, first_block=True))
    assert [lift.in_features for lift in with_first.kld.lifts] == [8, 16]
    without = pae.PromptedViT(small(), VPTDeep(2), pae.KLD(6))
    assert [lift.in_features for lift in without.kld.lifts] == [16]


def test_kld_checkpoint(tmp_path):
    model = pae.PromptedViT(small(), VPTDeep(2), pae.KLD(6)).train()
    with torch.no_grad():
        model.kld.K.mul_(1.5)
    model.save(tmp_path / "a.safetensors")
    again = pae.PromptedViT.from_file(tmp_path / "a.safetensors", small()).train()
    assert torch.equal(again.penalty(), model.penalty())


# ---- what is refused


class Narrow(pae.prompts.VPTDeep):
    """A family of somebody's own, which says nothing of stages."""


def test_refusals():
    refused(
        ValueError,
        "prompts (BPTDeep) are not defined on a backbone with stages",
        lambda: pae.PromptedViT(small(), pae.prompts.BPTDeep(4, 2)),
    )
    refused(
        ValueError,
        "prompts (Narrow) are not defined on",
        lambda: pae.PromptedViT(small(), Narrow(4)),
    )
    refused(
        ValueError,
        "kld pairs blocks of one stage, and no two blocks but the first have one width, got widths "
        "(8, 8)",
        lambda: pae.PromptedViT(small("one_stage"), VPTDeep(4), pae.KLD(8)),
    )
    refused(
        ValueError,
        "in every block after the first of a stage, got [2, 2, 2, 1]",
        lambda: pae.PromptedViT(small(), VPTDeep([2, 2, 2, 1]), pae.KLD(8)),
    )
    kld = pae.PromptedViT(small(), VPTDeep(4), pae.KLD(8)).kld
    refused(
        ValueError,
        "kld must have one lift for all blocks",
        lambda: pae.analysis.analyse(kld, [torch.zeros(4, 8)] * 4),
    )
    refused(
        ValueError,
        "matrices, LayerScale and all others",
        lambda: also_training(["layers.0.blocks.0.attn.relative_position_bias_table"]),
    )
    refused(
        ValueError,
        "faithful must be False on a backbone without windows",
        lambda: pae.PromptedViT(backbone(), VPTShallow(4, faithful=True)),
    )
    model, images = made()
    refused(
        pae.UnsupportedBackbone,
        "Modal Pre-Alignment needs blocks of one width",
        lambda: pae.mpa_init(model, images, torch.tensor([0, 1, 2])),
    )
    refused(pae.UnsupportedBackbone, "spt_init needs", lambda: pae.spt_init(model, images))
    refused(pae.UnsupportedBackbone, "NullSpace needs", lambda: pae.NullSpace(model))
    refused(
        pae.UnsupportedBackbone,
        "condense needs",
        lambda: pae.condense(model, images, torch.tensor([0, 1, 2]), keep=0.5),
    )
    refused(pae.UnsupportedBackbone, "load_official needs", lambda: pae.load_official(model, {}))
    model.backbone.layers[0].blocks[0].mlp.fc1.weight.requires_grad_(True)
    refused(
        pae.UnsupportedBackbone,
        "layers.0.blocks.0.mlp.fc1.weight requires a gradient",
        lambda: pae.fast_forward(model, images),
    )
