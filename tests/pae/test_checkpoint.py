"""Checkpoints: what they hold, that they come back, and that damaged ones are told apart."""

import json
import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import pae
from pae import checkpoint
from pae.prompts import VPTDeep, VPTShallow
from tests.tiny import backbone, error, images


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


# ---- parts that do not fit


MISFITS = {
    "prompt count": (lambda: model_of(VPTDeep(4)), r"prompts\.tokens is \(3, 3, 32\) in the file"),
    "family": (lambda: model_of(VPTShallow(3), kld=False), r"kld\.K is \(2, 8, 8\).*None in the"),
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
    both(tmp_path / "future", "has format 'pae-9', expected 'pae-1'")


def test_damaged_description(tmp_path):
    """The frame is right and the content is not: still a CheckpointError."""
    model = model_of()
    model.save(tmp_path / "a")
    state, meta = checkpoint.read(tmp_path / "a")
    vit = backbone("plain", torch.float32)
    changes = [
        {"prompts": {"name": "VPTWide", "config": {}}},
        {"prompts": {"name": "VPTDeep", "config": {"length": 3}}},
        {"prompts": {"name": "VPTDeep", "config": {"num_tokens": -1}}},
        {"kld": {"dim": "wide"}},
    ]
    for change in changes:
        metadata = {"pae": json.dumps({**meta, **change})}
        save_file(state, tmp_path / "b", metadata=metadata)
        refused("cannot build", lambda: pae.PromptedViT.from_file(tmp_path / "b", vit))
    for missing in ("prompts", "kld", "fingerprint", "num_classes", "backbone"):
        metadata = {"pae": json.dumps({k: v for k, v in meta.items() if k != missing})}
        save_file(state, tmp_path / "b", metadata=metadata)
        refused(missing, lambda: pae.PromptedViT.from_file(tmp_path / "b", vit))


def test_unreadable_files(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    model_of().save(tmp_path / "a")
    (tmp_path / "a").chmod(0)
    both(tmp_path / "a", "cannot be read")


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
        state, _ = checkpoint.read(source)
        assert state.keys() == model.trained_state().keys()
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
    state, _ = checkpoint.read(tmp_path / "a")
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
