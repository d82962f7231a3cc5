"""Checkpoints: what they hold, that they come back, and that damaged ones are told apart."""

import copy
import errno
import json
import os
import re
import stat
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

import pae
from pae import checkpoint, tensorfile
from pae.backbones.facts import difference, facts_of
from pae.prompts import DAVPT, VAPT, VFPTDeep, VPTDeep, VPTShallow
from tests import processes, tiny
from tests.conftest import GOLDEN
from tests.tiny import backbone, counted, counted_backbone, error, images


def model_of(family=None, kld=True, num_classes=7, feature="plain", dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    family = VPTDeep(3, dropout=0.1) if family is None else family
    kld = pae.KLD(8, "layerwise", 0.3, 0.1, "paper") if kld else None
    model = pae.PromptedViT(backbone(feature, dtype), family, kld, num_classes)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    return model


def refused(match, call):
    """A CheckpointError of one line that matches."""
    with pytest.raises(pae.CheckpointError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def same_state(one, other):
    a, b = one.trained_state(), other.trained_state()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- roundtrip


def test_save_and_load(tmp_path):
    path = tmp_path / "run" / "best.safetensors"  # the folder is made
    one, other = model_of(), model_of(seed=2)
    assert not same_state(one, other)
    one.save(path)
    assert other.load(path) is other
    assert same_state(one, other)
    x = images(one.backbone)
    assert torch.equal(other.eval()(x), one.eval()(x))
    assert torch.equal(pae.fast_forward(other, x), pae.fast_forward(one, x))
    assert all(p.requires_grad for p in (other.prompts.tokens, other.kld.K, other.head.weight))


def test_loading_keeps_the_parameters_an_optimiser_holds(tmp_path):
    one, other = model_of(), model_of(seed=2)
    one.save(tmp_path / "a")
    before = dict(other.named_parameters())
    other.load(tmp_path / "a")
    assert all(p is before[n] for n, p in other.named_parameters())


FAMILIES = {
    "deep": lambda: VPTDeep(3, dropout=0.1, dropout_scope="sample"),
    "ragged": lambda: VPTDeep([2, 0, 4]),
    "none": lambda: VPTDeep(0),
    "shallow": lambda: VPTShallow(3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_from_file(family, tmp_path):
    one = model_of(FAMILIES[family](), kld=family == "deep")
    one.save(tmp_path / "a")
    again = pae.PromptedViT.from_file(tmp_path / "a", backbone("plain", torch.float32))
    assert type(again.prompts) is type(one.prompts)
    assert again.prompts.config() == one.prompts.config()
    assert (again.kld is None) == (one.kld is None)
    if one.kld is not None:
        assert again.kld.config() == one.kld.config()
    assert again.num_classes == 7
    assert same_state(one, again)
    x = images(one.backbone)
    assert torch.equal(again.eval()(x), one.eval()(x))


def test_from_file_with_the_backbones_own_head(tmp_path):
    one = model_of(num_classes=None)
    one.save(tmp_path / "a")
    for classes in (5, 0):  # the new backbone's head does not matter
        vit = backbone("plain", torch.float32)
        vit.reset_classifier(classes)
        assert same_state(pae.PromptedViT.from_file(tmp_path / "a", vit), one)


def test_a_string_as_path(tmp_path):
    model = model_of()
    model.save(str(tmp_path / "a"))
    assert same_state(model_of(seed=2).load(str(tmp_path / "a")), model)


@pytest.mark.parametrize(
    "saved, loaded",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_another_dtype_of_the_same_backbone(saved, loaded, tmp_path):
    one, other = model_of(dtype=saved), model_of(dtype=loaded, seed=2)
    one.save(tmp_path / "a")
    if saved == torch.bfloat16:  # the wide copy of a rounded backbone
        other.backbone.to(saved).to(loaded)
    other.load(tmp_path / "a")
    for name, tensor in other.trained_state().items():
        assert tensor.dtype == loaded
        assert torch.equal(tensor, one.trained_state()[name].to(loaded))


# ---- what a file holds


def test_only_trained_tensors_are_stored(tmp_path):
    model = model_of()
    model.save(tmp_path / "a", extra={"epoch": "12"})
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert set(file.keys()) == model.trained_state().keys()
        assert not any(name.startswith("backbone.") for name in file.keys())  # noqa: SIM118
        metadata = file.metadata()
    meta = json.loads(metadata["pae"])
    assert metadata["epoch"] == "12"
    assert meta["backbone"] == "VisionTransformer"
    assert meta["fingerprint"] == checkpoint.fingerprint(model.backbone)
    assert meta["prompts"] == {"name": "VPTDeep", "config": model.prompts.config()}
    trained = sum(t.numel() * t.element_size() for t in model.trained_state().values())
    assert os.path.getsize(tmp_path / "a") < trained + 3000


def test_names_of_timm_backbones():
    import timm

    vit = timm.create_model("vit_tiny_patch16_224.augreg_in21k", depth=1, embed_dim=24, num_heads=2)
    assert checkpoint.backbone_name(vit) == "vit_tiny_patch16_224.augreg_in21k"
    assert checkpoint.backbone_name(nn.Linear(2, 2)) == "Linear"


# ---- fingerprint


def test_fingerprint_tells_backbones_apart():
    vit = backbone("plain", torch.float32)
    print_ = checkpoint.fingerprint(vit)
    assert checkpoint.fingerprint(backbone("plain", torch.float32)) == print_
    assert checkpoint.fingerprint(backbone("layer_scale", torch.float32)) != print_
    with torch.no_grad():
        vit.blocks[2].mlp.fc1.weight[-1, -1] += 0.1
    assert checkpoint.fingerprint(vit) != print_


def test_fingerprint_is_that_of_the_frozen_part():
    """The same in fp64, fp32 and bf16, with and without a head, before and after training."""
    vit = backbone("plain", torch.float32)
    print_ = checkpoint.fingerprint(vit)
    assert checkpoint.fingerprint(backbone("plain", torch.float64)) == print_
    assert checkpoint.fingerprint(backbone("plain", torch.bfloat16)) == print_
    nn.init.zeros_(vit.head.weight)
    assert checkpoint.fingerprint(vit) == print_
    model = pae.PromptedViT(vit, VPTDeep(2), num_classes=3)
    assert checkpoint.fingerprint(model.backbone) == print_
    pae.fast_forward(model, images(vit)).sum().backward()
    assert checkpoint.fingerprint(model.backbone) == print_


def test_wrong_backbone(tmp_path):
    one = model_of()
    one.save(tmp_path / "a")
    other = model_of(seed=2)
    with torch.no_grad():
        other.backbone.blocks[0].attn.qkv.weight[0, 0] += 0.5
    before = {k: v.clone() for k, v in other.trained_state().items()}
    found = checkpoint.fingerprint(other.backbone)
    match = rf"trained on backbone VisionTransformer with fingerprint \w+, got .* with {found}"
    refused(match, lambda: other.load(tmp_path / "a"))
    assert all(torch.equal(v, before[k]) for k, v in other.trained_state().items())
    vit = backbone("layer_scale", torch.float32)
    refused("trained on backbone", lambda: pae.PromptedViT.from_file(tmp_path / "a", vit))


# of the backbone below, whose weights have the same names and shapes in all of them
OTHER_FACTS = {
    "token": ({"global_pool": "token"}, "another readout of the last block's rows"),
    "max": ({"global_pool": "max"}, "another readout of the last block's rows"),
    "avgmax": ({"global_pool": "avgmax"}, "another readout of the last block's rows"),
    "prefix": ({"pool_include_prefix": True}, "another readout of the last block's rows"),
    "activation": ({"act_layer": "quick_gelu"}, "activation gelu, and here it is quick_gelu"),
    "heads": ({"num_heads": 2}, "num_heads 4, and here it is 2"),
    "eps": (
        {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
        r"norm1 \(layer\) 1e-06, and here it is",
    ),
}


@pytest.mark.parametrize("case", OTHER_FACTS)
def test_a_backbone_of_the_same_weights_that_computes_something_else(case, tmp_path):
    changes, message = OTHER_FACTS[case]
    saved = model_of(feature="avg_final_norm", kld=False)
    saved.save(tmp_path / "a")
    vit = backbone("avg_final_norm", torch.float32, **changes)
    assert checkpoint.fingerprint(vit) == checkpoint.fingerprint(saved.backbone)
    message = f"was trained on a backbone of these weights with {message}"
    refused(message, lambda: pae.PromptedViT.from_file(tmp_path / "a", vit))
    assert isinstance(vit.head, nn.Linear) and vit.training
    other = pae.PromptedViT(vit, VPTDeep(3), num_classes=7)
    refused(message, lambda: other.load(tmp_path / "a"))
    rewritten(tmp_path / "a", tmp_path / "old", drop=["facts"])
    other.load(tmp_path / "old")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("feature", ["plain", "avg", "map", "max", "avg_with_prefix", "qk_norm"])
def test_facts_are_the_same_in_every_dtype(feature, dtype):
    one, other = (pae.PromptedViT(backbone(feature, d), VPTDeep(1)) for d in (dtype, torch.float32))
    facts = [facts_of(model.view) for model in (one, other)]
    assert all(set(each) == {"blocks", "readout"} for each in facts)
    assert difference(*facts) is None and json.loads(json.dumps(facts[0])) == facts[0]


def test_a_readout_that_is_trained_or_watched_says_nothing(tmp_path):
    model = pae.PromptedViT(backbone(dtype=torch.float32), VPTDeep(1), train_backbone="norm.*")
    assert set(facts_of(model.view, model.trained_backbone)) == {"blocks"}
    seen = []
    model.backbone.norm.register_forward_hook(lambda *_: seen.append(1))
    model.save(tmp_path / "a")
    model.load(tmp_path / "a")
    assert not seen and set(facts_of(model.view)) == {"blocks"}


# ---- parts that do not fit


MISFITS = {
    "prompt count": (
        lambda: model_of(VPTDeep(4)),
        "was trained with VPTDeep's num_tokens 3, and this model has 4: build it with the same",
    ),
    "family": (
        lambda: model_of(VPTShallow(3), kld=False),
        "was trained with prompts VPTDeep, and this model has VPTShallow: build it with the same",
    ),
    "classes": (lambda: model_of(num_classes=8), r"head\.bias is \(7,\) in the file, \(8,\) in"),
    "no kld": (
        lambda: model_of(kld=False),
        r"kld\.K is \(2, 8, 8\) in the file, None in the model",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit(case, tmp_path):
    build, message = MISFITS[case]
    model_of().save(tmp_path / "a")
    other = build()
    before = {k: v.clone() for k, v in other.trained_state().items()}
    refused(message, lambda: other.load(tmp_path / "a"))
    assert all(torch.equal(v, before[k]) for k, v in other.trained_state().items())


# tensors of the same names and shapes that mean something else
MEANINGS = {
    "family": (VPTDeep(4), VFPTDeep(4), "prompts VPTDeep, and this model has VFPTDeep"),
    "activation": (VAPT(4), VAPT(4, activation="gelu"), "VAPT's activation 'relu', and this model"),
    "transform": (VFPTDeep(4), VFPTDeep(4, dimension="hidden"), "VFPTDeep's dimension 'all', and"),
    "blocks": (
        pae.prompts.APT(4, start=0, end=1),
        pae.prompts.APT(4, start=1, end=2),
        "APT's start 0, and this model has 1",
    ),
    "counts": (
        VPTDeep([2, 1, 3]),
        VPTDeep([1, 2, 3]),
        r"num_tokens \[2, 1, 3\], and this model has",
    ),
    "norm": (DAVPT(4, 4, 7), DAVPT(4, 4, 7, norm="l2"), "DAVPT's norm 'none', and this model has"),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_parts_that_fit_and_mean_something_else(case, tmp_path):
    of_file, of_model, message = (copy.deepcopy(part) for part in MEANINGS[case])
    model_of(of_file, kld=False).save(tmp_path / "a")
    other = model_of(of_model, kld=False, seed=2)
    before = {k: v.clone() for k, v in other.trained_state().items()}
    refused(message, lambda: other.load(tmp_path / "a"))
    assert all(torch.equal(v, before[k]) for k, v in other.trained_state().items())


# another value of every argument that acts in training alone, and what goes with it
TRAINING = {
    **dict.fromkeys(("dropout", "kv_dropout", "channel_dropout", "hidden_dropout"), 0.3),
    **dict.fromkeys(("patch_weight", "class_weight", "kappa", "alpha", "delta"), 0.3),
    **{"dropout_scope": "sample", "init_divisor": 2.0, "class_feature": "row", "remap_from": 3},
    **{
        "seed": 5,
        "spare_proxies": True,
        "sweep": "reuse",
        "score": "norm",
        "faithful": True,
        "mix_start": "independent",
    },
}
SAYS_THE_REST = ("trained_bases", "train_basis")  # of these the names of the tensors


@pytest.mark.parametrize("method", pae.prompts.METHODS)
def test_arguments_that_act_in_training_alone(method, tmp_path):
    """They may differ between file and model, and change nothing of what was trained."""
    kind = pae.prompts.METHODS[method]
    small = partial(tiny.small, kind, num_classes=7)
    saved = model_of(small(), kld=False).eval()
    saved.save(tmp_path / "a")
    x = tiny.images(saved.backbone)
    for name in set(kind.training_arguments) - {*SAYS_THE_REST}:
        other = model_of(small(**{name: TRAINING[name]}), kld=False, seed=2).eval()
        other.load(tmp_path / "a")
        assert torch.equal(other(x), saved(x)), name


def test_a_count_for_all_blocks_is_one_for_each(tmp_path):
    model_of(VPTDeep(3), kld=False).save(tmp_path / "a")
    other = model_of(VPTDeep([3, 3, 3]), kld=False, seed=2)
    other.load(tmp_path / "a")
    other.save(tmp_path / "b")
    model_of(VPTDeep(3), kld=False).load(tmp_path / "b")


# ---- damaged files


def both(path, match):
    """load and from_file refuse `path`; the message names it; the model stays as it was."""
    model = model_of(seed=3)
    before = {k: v.clone() for k, v in model.trained_state().items()}
    match = f"checkpoint {re.escape(str(path))} {match}"
    refused(match, lambda: model.load(path))
    vit = backbone("plain", torch.float32)
    refused(match, lambda: pae.PromptedViT.from_file(path, vit))
    assert all(torch.equal(v, before[k]) for k, v in model.trained_state().items())
    assert isinstance(vit.head, nn.Linear)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_half_written_files(keep, tmp_path):
    path = tmp_path / "a"
    model_of().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    both(path, "cannot be read")


def test_files_that_are_something_else(tmp_path):
    both(tmp_path / "missing", "cannot be read")
    both(tmp_path, "cannot be read")
    garbage = tmp_path / "garbage"
    garbage.write_bytes(os.urandom(5000))
    both(garbage, "cannot be read")
    torch.save({"a": torch.ones(3)}, tmp_path / "pickle")
    both(tmp_path / "pickle", "cannot be read")
    save_file({"a": torch.ones(3)}, tmp_path / "foreign")
    both(tmp_path / "foreign", "was not written by pae")
    save_file({"a": torch.ones(3)}, tmp_path / "text", metadata={"pae": "{"})
    both(tmp_path / "text", "was not written by pae")
    future = json.dumps({"format": "pae-9"})
    save_file({"a": torch.ones(3)}, tmp_path / "future", metadata={"pae": future})
    both(tmp_path / "future", "has format 'pae-9', expected 'pae-2'")


def rewritten(source, target, drop=(), state=None, **changes):
    """A file with another description and a digest that fits it: as another version writes it."""
    tensors, texts, _ = tensorfile.read_tensors(source)
    meta = {k: v for k, v in {**json.loads(texts["pae"]), **changes}.items() if k not in drop}
    tensorfile.write_tensors(target, tensors if state is None else state, {"pae": json.dumps(meta)})
    return target


DESCRIPTIONS = [  # (what is another, what the message says)
    ({"prompts": {"name": "VPTWide", "config": {}}}, "cannot build"),
    ({"prompts": {"name": "VPTDeep", "config": {"length": 3}}}, "cannot build"),
    ({"prompts": {"name": "VPTDeep", "config": {"num_tokens": -1}}}, "cannot build"),
    ({"prompts": {"name": "VPTDeep", "config": {"num_tokens": 4}}}, "tokens is .* in the file"),
    ({"prompts": {"name": "VPTDeep", "config": {"num_tokens": [3]}}}, "does not fit this backbone"),
    ({"prompts": {"name": ["VPTDeep"], "config": {}}}, "is damaged: its prompts"),
    ({"prompts": {"name": "VPTDeep"}}, "is damaged: its prompts"),
    ({"prompts": None}, "is damaged: its prompts"),
    ({"kld": {"dim": "wide"}}, "cannot build"),
    ({"kld": {"dim": 9, "mode": "layerwise"}}, "in the file"),
    ({"kld": [8]}, "is damaged: its kld"),
    ({"num_classes": "7"}, "is damaged: its num_classes"),
    ({"num_classes": -7}, "is damaged: its num_classes"),
    ({"num_classes": True}, "is damaged: its num_classes"),
    ({"num_classes": 8}, "in the file"),
    ({"fingerprint": 7}, "is damaged: its fingerprint"),
    ({"fingerprint": "0" * 32}, "was trained on backbone"),
    ({"backbone": None}, "is damaged: its backbone"),
    ({"image_size": 16}, "is damaged: its image_size"),
    ({"image_size": [8, 8]}, "at another image size: 8 x 8"),
    ({"positions": None}, "is damaged: its positions"),
    ({"positions": "0" * 32}, "with another position embedding"),
    ({"task": "birds"}, "task must be a table"),
    ({"task": {"classes": [1, 2]}}, "task.classes must be names or None"),
    ({"versions": {"pae": 1}}, "is damaged: its versions"),
    ({"facts": [1]}, "is damaged: its facts"),
    ({"facts": {"blocks": [7]}}, "is damaged: its facts"),
    ({"facts": {"readout": [[1.0], [2.0, 3.0]]}}, "is damaged: its facts"),
    ({"facts": {"blocks": [{"num_heads": 3}]}}, "num_heads 3, and here it is 4"),
    ({"format": "pae-9"}, "has format 'pae-9', expected 'pae-2'"),
    ({"format": ["pae-2"]}, r"has format \['pae-2'\]"),
]


@pytest.mark.parametrize("change, message", DESCRIPTIONS, ids=lambda v: str(v)[:40])
def test_another_description(change, message, tmp_path):
    """The digest is right and the content is not: still a CheckpointError, and nothing changed."""
    model_of().save(tmp_path / "a")
    with_backbone(rewritten(tmp_path / "a", tmp_path / "b", **change), message)


def test_a_part_of_the_description_is_missing(tmp_path):
    model_of().save(tmp_path / "a")
    parts = json.loads(tensorfile.read_tensors(tmp_path / "a")[1]["pae"])
    said_where_known = {"pool", "facts"}  # without a pool it is "image"
    for part in parts.keys() - {"format", *said_where_known}:
        with_backbone(rewritten(tmp_path / "a", tmp_path / "b", drop=[part]), f"not say its {part}")
    with_backbone(rewritten(tmp_path / "a", tmp_path / "b", drop=["format"]), "not written by pae")


def with_backbone(path, match, vit=None):
    """from_file refuses `path`, and the backbone is as it was: its flags, its head, its weights."""
    vit = backbone("plain", torch.float32) if vit is None else vit
    vit.blocks[1].eval()
    vit.norm.weight.requires_grad_(False)
    before = facts(vit)
    refused(match, lambda: pae.PromptedViT.from_file(path, vit))
    after = facts(vit)
    assert before[:-1] == after[:-1]
    assert all(torch.equal(v, after[-1][k]) for k, v in before[-1].items())


def facts(vit):
    flags = [(name, id(p), p.requires_grad, p.dtype) for name, p in vit.named_parameters()]
    modes = [(name, id(module), module.training) for name, module in vit.named_modules()]
    return flags, modes, {k: v.clone() for k, v in vit.state_dict().items()}


def test_unreadable_files(tmp_path, monkeypatch):
    """Also where the tests run as root, who may read everything."""
    model_of().save(tmp_path / "a")

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    both(tmp_path / "a", "cannot be read: .*Permission denied")


# ---- atomic writing


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_saving_again_replaces(tmp_path):
    one, other = model_of(), model_of(seed=2)
    one.save(tmp_path / "a")
    other.save(tmp_path / "a")
    assert files(tmp_path) == ["a"]
    assert same_state(model_of(seed=3).load(tmp_path / "a"), other)


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    one = model_of()
    one.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def fail(file):
        file.write_bytes(before[:50])
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomically(tmp_path / "a", fail)
    assert (tmp_path / "a").read_bytes() == before
    assert files(tmp_path) == ["a"]
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomically(tmp_path / "b", fail)
    assert files(tmp_path) == ["a"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_at_any_moment_leaves_the_old_file(moment, tmp_path, monkeypatch):
    """The new file is complete and on the disk before it takes the old one's place."""
    one, other = model_of(), model_of(seed=2)
    one.save(tmp_path / "a")

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, moment, crash)
    with pytest.raises(KeyboardInterrupt):
        other.save(tmp_path / "a")
    monkeypatch.undo()
    assert files(tmp_path) == ["a"]
    assert same_state(model_of(seed=3).load(tmp_path / "a"), one)


def test_the_new_file_is_complete_when_it_is_put_in_place(tmp_path, monkeypatch):
    order, replace, fsync = [], os.replace, os.fsync
    model = model_of()

    def spy_replace(source, target):
        order.append("replace")
        assert checkpoint.read(source).state.keys() == model.trained_state().keys()
        assert os.path.dirname(source) == os.path.dirname(target)  # one file system
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(os, "fsync", lambda f: order.append("fsync") or fsync(f))
    model.save(tmp_path / "a")
    assert order == ["fsync", "replace", "fsync"]  # data, name, folder


def test_saved_values_do_not_follow_the_model(tmp_path):
    model = model_of()
    model.save(tmp_path / "a")
    kept = {k: v.clone() for k, v in model.trained_state().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    state = checkpoint.read(tmp_path / "a").state
    assert all(torch.equal(state[k], v) for k, v in kept.items())


def test_a_plan_survives_loading(tmp_path):
    """Loading changes no backbone weight, so the folded ones stay."""
    one, other = model_of(), model_of(seed=2)
    one.save(tmp_path / "a")
    x = images(other.backbone)
    pae.fast_forward(other, x)
    plan = other.plan()
    other.load(tmp_path / "a")
    assert other.plan() is plan
    assert error(pae.fast_forward(other.eval(), x), other(x)) < 1e-5


# ---- another image size


def at(size, like=None, **options):
    """A backbone for images of `size`; with the weights of `like`, positions resampled."""
    vit = backbone("plain", torch.float32, img_size=size, **options)
    if like is not None:
        state = {k: v.clone() for k, v in like.state_dict().items()}
        grid = vit.patch_embed.grid_size
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=1)
        vit.load_state_dict(state)
    return vit


@pytest.fixture
def small(tmp_path):
    """A checkpoint at 16 x 16, and the same weights at 32 x 32."""
    model = model_of()
    model.save(tmp_path / "a")
    vit = backbone("plain", torch.float32)
    return model, tmp_path / "a", at((32, 32), like=vit)


def test_another_image_size_is_named_with_the_way_through(small):
    model, path, large = small
    match = (
        "trained on this backbone at another image size: 16 x 16, and this one is built for "
        "32 x 32; build it with img_size=16, or give other_size=True"
    )
    refused(match, lambda: pae.PromptedViT.from_file(path, large))
    again = pae.PromptedViT.from_file(path, large, other_size=True)
    assert same_state(again, model)
    assert again(images(large)).isfinite().all()
    other = pae.PromptedViT(at((32, 32), like=backbone("plain", torch.float32)), VPTDeep(3))
    refused(match, lambda: other.load(path))


def test_other_size_takes_no_other_weights(small):
    _, path, large = small
    with torch.no_grad():
        large.blocks[1].mlp.fc2.weight[0, 0] += 0.5
    for other in (False, True):
        load = partial(pae.PromptedViT.from_file, path, large, other_size=other)
        refused("was trained on backbone", load)


def test_other_positions_at_the_same_size(small):
    _, path, _ = small
    vit = backbone("plain", torch.float32)
    with torch.no_grad():
        vit.pos_embed[0, 3] += 0.5
    match = "with another position embedding .*other_size=True"
    refused(match, lambda: pae.PromptedViT.from_file(path, vit))
    pae.PromptedViT.from_file(path, vit, other_size=True)


def test_sizes_of_backbones_without_positions(tmp_path):
    vit = backbone("no_position", torch.float32)
    pae.PromptedViT(vit, VPTDeep(2), num_classes=3).save(tmp_path / "a")
    large = backbone("no_position", torch.float32, img_size=(16, 32))
    match = r"16 x 16, and this one is built for 16 x 32; build it with img_size=16"
    refused(match, lambda: pae.PromptedViT.from_file(tmp_path / "a", large))
    pae.PromptedViT.from_file(tmp_path / "a", large, other_size=True)


# ---- what it was trained for

INFO = pae.TaskInfo(
    classes=("cat", "dog"),
    input_size=(3, 16, 16),
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.25),
    interpolation="bicubic",
    crop_pct=0.875,
    crop_mode="center",
    integer_white=4095,
    real_white=1.0,
)


def test_what_a_checkpoint_needs_to_be_used_comes_back(tmp_path):
    model = model_of(num_classes=2)
    model.save(tmp_path / "a", task=INFO, extra={"epoch": "3"})
    found = pae.read_checkpoint(tmp_path / "a")
    assert found.task == INFO and found.extra == {"epoch": "3"}
    assert found.image_size == (16, 16) and found.num_classes == 2
    assert found.prompts == {"name": "VPTDeep", "config": model.prompts.config()}
    assert found.kld == model.kld.config()
    assert found.versions["pae"] == pae.__version__ and found.versions.keys() == {
        "pae",
        "torch",
        "timm",
    }
    again = pae.PromptedViT.from_file(tmp_path / "a", backbone("plain", torch.float32))
    assert again.task == INFO
    again.save(tmp_path / "b")  # it stays known
    assert pae.read_checkpoint(tmp_path / "b").task == INFO
    assert model.load(tmp_path / "b").task == INFO
    transform = timm.data.create_transform(**found.task.transform())
    size = transform(Image.new("RGB", (40, 20))).shape
    assert size == (3, 16, 16)


def test_a_task_that_is_not_known(tmp_path):
    model = model_of()
    model.save(tmp_path / "a", task=pae.TaskInfo())
    assert pae.read_checkpoint(tmp_path / "a").task == pae.TaskInfo()
    model.save(tmp_path / "a")
    assert pae.read_checkpoint(tmp_path / "a").task is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"classes": "cat"}, "task.classes must be names or None, got 'cat'"),
        ({"classes": ()}, "task.classes must be names"),
        ({"input_size": (3, 16)}, "task.input_size must be three positive integers"),
        ({"input_size": (3, 16, 0)}, "task.input_size"),
        ({"input_size": (3, 16.0, 16)}, "task.input_size"),
        ({"mean": (0.5, float("nan"), 0.5)}, "task.mean must be numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "task.std must be positive numbers"),
        ({"mean": (0.5,), "std": (1, 1, 1)}, "must have one number of channels"),
        ({"crop_pct": 0}, "task.crop_pct must be a positive number"),
        ({"crop_pct": True}, "task.crop_pct"),
        ({"crop_mode": "middle"}, "task.crop_mode must be one of squash, center, border"),
        ({"interpolation": 3}, "task.interpolation must be a text"),
        ({"integer_white": 4095.0}, "task.integer_white must be a positive integer"),
        ({"real_white": 0}, "task.real_white must be a positive number"),
    ],
)
def test_a_task_without_sense(wrong, message):
    with pytest.raises(ValueError, match=message):
        pae.TaskInfo(**wrong)


# ---- what is not written


def test_what_cannot_come_back_is_not_written(tmp_path):
    model = model_of()
    model.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def not_written(match, **options):
        with pytest.raises(ValueError, match=match) as caught:
            model.save(tmp_path / "a", **options)
        assert "\n" not in str(caught.value)
        assert (tmp_path / "a").read_bytes() == before and files(tmp_path) == ["a"]

    not_written("names 2 classes, and the model has 7", task=INFO)
    not_written("task must be a pae.TaskInfo or None, got dict", task={"classes": ["a"]})
    not_written("the name 'pae' is taken", extra={"pae": "mine"})
    not_written("the name 'pae.digest' is taken", extra={"pae.digest": "mine"})
    not_written("must be text, got 'epoch': 3", extra={"epoch": 3})
    not_written("must be text, got 3: 'epoch'", extra={3: "epoch"})
    not_written("cannot be stored", extra={"a": "\udcff"})
    with torch.no_grad():
        model.prompts.tokens[0, 0, :2] = float("nan")
    not_written("not written, as prompts.tokens holds NaN or infinity in 2 of 288 values")


def test_tensors_that_share_memory_and_odd_layouts(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    state = {
        "a": whole,
        "b": whole,
        "c": whole[:2],
        "d": whole.t(),
        "e": whole[:0],
        "f": whole[1, 1],
    }
    state |= {"g": torch.tensor([True]), "h": torch.tensor(3), "i": whole.bfloat16()}
    tensorfile.write_tensors(tmp_path / "a", state, {"note": 'a "pae.digest":"' + "0" * 64 + '"'})
    again, texts, vouched = tensorfile.read_tensors(tmp_path / "a")
    assert vouched and again.keys() == state.keys() and len(texts["note"]) > 64
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_permissions_are_those_of_other_files(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        model_of().save(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("file/a", "folder", "loop/a", "x" * 300):
        with pytest.raises(OSError, match=re.escape(path)) as caught:
            model_of().save(tmp_path / path)
        assert "\n" not in str(caught.value) and "pae-tmp" not in str(caught.value)
    assert files(tmp_path) == ["file", "folder", "loop"] and files(tmp_path / "folder") == ["full"]


def test_long_names_can_be_written(tmp_path):
    for name in ("x" * 255, "\N{SNOWMAN}" * 85):
        model_of().save(tmp_path / name)
    assert len(files(tmp_path)) == 2


def test_what_dead_processes_left_is_removed(tmp_path):
    code = "import os; from pae.files import write_atomically as w; "
    code += f"w({str(tmp_path / 'a')!r}, lambda p: (p.write_text('half'), os._exit(0)))"
    processes.run([sys.executable, "-c", code])
    (left,) = files(tmp_path)
    assert left.startswith(".a.")
    (tmp_path / ".gitignore").write_text("")
    checkpoint.remove_temporaries(tmp_path)
    assert files(tmp_path) == [".gitignore"]


# ---- files of version 0.1


def test_a_file_of_version_0_1(tmp_path):
    """Read with a warning of one line; written again, it has a digest and the same values."""
    old = GOLDEN / "checkpoint-pae-1.safetensors"
    with pytest.warns(UserWarning, match="written by an earlier version, without a digest") as seen:
        model = pae.PromptedViT.from_file(old, counted_backbone("plain")).eval()
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    x = counted((3, 3, 16, 16))
    expected = torch.tensor([-6.319042202409555, -5.047946397915029, -0.9989488191584677])
    assert error(model(x)[0], expected) < 1e-5
    model.save(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = pae.PromptedViT.from_file(tmp_path / "a", counted_backbone("plain"))
    assert same_state(again, model)


@pytest.mark.filterwarnings("ignore:.*earlier version")
def test_a_file_of_version_0_1_knows_one_image_size(tmp_path):
    old = GOLDEN / "checkpoint-pae-1.safetensors"
    found = pae.read_checkpoint(old)
    assert (found.format, found.positions, found.image_size, found.task) == ("pae-1", *[None] * 3)
    assert found.extra == {"note": "of version 0.1.0"}
    large = at((32, 32), like=counted_backbone("plain"))
    match = "at the image size of training alone: load it there, and save it again"
    for other in (False, True):
        refused(match, partial(pae.PromptedViT.from_file, old, large, other_size=other))
    state = {**found.state, "prompts.tokens": found.state["prompts.tokens"].clone()}
    state["prompts.tokens"][0, 0, 0] = float("inf")
    with safe_open(old, framework="pt") as file:
        save_file(state, tmp_path / "b", metadata=file.metadata())
    said = "prompts.tokens holds NaN or infinity in 1 of 192 values"
    with_backbone(tmp_path / "b", said, counted_backbone("plain"))


def test_a_digest_that_is_gone(tmp_path):
    """A new file that lost it is no old one."""
    model_of().save(tmp_path / "a")
    state, texts, _ = tensorfile.read_tensors(tmp_path / "a")
    del texts["pae.digest"]
    save_file(state, tmp_path / "b", metadata=texts)
    with_backbone(tmp_path / "b", "cannot be read: its digest is missing")


# ---- values


def test_values_that_become_infinite_and_dtypes_that_do_not_convert(tmp_path):
    wide = model_of(dtype=torch.float64)
    with torch.no_grad():
        wide.prompts.tokens[0] = 1e300
    wide.save(tmp_path / "a")
    with_backbone(tmp_path / "a", "tokens holds NaN or infinity in 96 of 288 values as torch.float")
    model_of().save(tmp_path / "a")
    state = tensorfile.read_tensors(tmp_path / "a")[0]
    for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn):
        odd = {**state, "head.bias": state["head.bias"].to(dtype)}
        with_backbone(rewritten(tmp_path / "a", tmp_path / "b", state=odd), f"head.bias is {dtype}")


def test_a_failure_in_the_middle_of_loading_changes_nothing(tmp_path, monkeypatch):
    one, other = model_of(), model_of(seed=2)
    one.save(tmp_path / "a")
    before = {k: v.clone() for k, v in other.trained_state().items()}

    def fail(self, *arguments):
        if torch.equal(other.head.bias, one.head.bias) or not torch.equal(
            other.prompts.tokens, before["prompts.tokens"]
        ):
            monkeypatch.undo()
            raise RuntimeError("a hook\nof a family")

    monkeypatch.setattr(nn.Linear, "_load_from_state_dict", fail)
    refused("does not fit this model: a hook of a family", lambda: other.load(tmp_path / "a"))
    assert all(torch.equal(v, before[k]) for k, v in other.trained_state().items())
    assert other.load(tmp_path / "a") is other


def test_odd_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "long").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    (tmp_path / "longer").write_bytes(b"\xff" * 100)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)  # of zeros, which take no room on the disk
    for name in ("pipe", "loop", "dangling", "empty", "long", "longer", "huge"):
        both(tmp_path / name, "cannot be read")


def raw(path, header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_odd_headers(tmp_path):
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    headers = [
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        {"a": one, "__metadata__": {"pae": 3}},
        {"a": one, "__metadata__": ["pae"]},
        {"a": one, "__metadata__": {"pae": "3"}},
        {"a": one, "__metadata__": {"pae": "null"}},
        {"a": one, "__metadata__": {"pae": "[" * 100_000}},
        {"a": one, "__metadata__": {"pae": '{"format": NaN}'}},
        {"a": one, "__metadata__": {"pae": "\ud800"}},
        {"a": one, "__metadata__": {"pae": '{"format": "pae-2"}'}},
        {"a": {**one, "dtype": "F128"}},
        {"a": {**one, "shape": [2**62, 4]}},
        {"a": {**one, "shape": [-1]}},
        {"a": {**one, "data_offsets": [4, 0]}},
        {"a": {**one, "data_offsets": [0, 2**60]}},
        {"__metadata__": None},
        {},
        [],
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a":' * 100_000,
    ]
    for header in headers:
        both(raw(tmp_path / "a", header, bytes(4)), "")
