"""--weights and the models of other sources, from the command line to the tensors in the model."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import pae
from pae.train import loop, methods
from pae.train.cli import main
from pae.train.options import Options
from tests.train.helpers import CPU_FLAGS, save_shades
from tests.train.test_train_cli import error_line


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("shades"), train=4, test=2)


@pytest.fixture(scope="module")
def vit():
    """timm's smallest vision transformer with every tensor random, also those that start at 0."""
    torch.manual_seed(1)
    model = timm.create_model("test_vit", img_size=32, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model


@pytest.fixture(scope="module")
def state(vit):
    return {k: v for k, v in vit.state_dict().items() if not k.startswith("head.")}


@pytest.fixture
def flags(shades, tmp_path):
    recipe = ["--method", "vpt-deep", "--num-tokens", "2", "--epochs", "1", "--batch-size", "8"]
    where = ["--data", str(shades), "--output", str(tmp_path / "run")]
    return ["train", *where, "--img-size", "32", *CPU_FLAGS, *recipe]


def options(shades, **given):
    return Options(**{"data": str(shades), "img_size": 32, "device": "cpu", "amp": "no", **given})


def is_the_files(backbone, state):
    own = backbone.state_dict()
    return all(torch.equal(own[key], tensor) for key, tensor in state.items())


@pytest.fixture
def first_backbone(monkeypatch):
    """The backbone of a run that is stopped as soon as it is built."""
    found = []
    build = methods.build_method

    def spy(*arguments, **more):
        module = build(*arguments, **more)
        found.append(module)
        return module

    monkeypatch.setattr(loop.methods, "build_method", spy)
    return found


def test_a_run_says_from_where_its_weights_are(flags, state, tmp_path, capsys, first_backbone):
    path = tmp_path / "moco.pth"
    momentum = {f"module.momentum_encoder.{k}": 2 * v for k, v in state.items()}
    base = {f"module.base_encoder.{k}": v for k, v in state.items()}
    torch.save({"epoch": 300, "state_dict": base | momentum}, path)
    assert main([*flags, "--model", "test_vit", "--weights", str(path)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "weights" in line]
    assert said == [
        f"weights {path}: all 78 tensors of the backbone from 'state_dict' without the prefix "
        "'module.base_encoder.'; not read: 78 of other copies, 1 other entries"
    ]
    assert is_the_files(first_backbone[-1].backbone, state)


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    flags, state, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loop, "load_task", lambda *_: pytest.fail("images were read"))
    path = tmp_path / "weights.pth"
    flags = [*flags, "--model", "test_vit", "--weights", str(path)]
    assert error_line(capsys, flags) == f"pae: error: --weights {path}: no such file"
    path.mkdir()
    assert error_line(capsys, flags) == f"pae: error: --weights {path}: not a file"
    path.rmdir()
    path.write_bytes(b"")
    assert f"{path}: the file is empty" in error_line(capsys, flags)
    path.write_bytes(b"PK\x03\x04nothing")
    assert f"weights {path} cannot be read, it is damaged" in error_line(capsys, flags)
    lacking = {k: v for k, v in state.items() if "blocks.3." not in k}
    torch.save({"state_dict": lacking}, path)
    line = error_line(capsys, flags)
    assert "do not fit test_vit: missing 12 of 78: blocks.3.norm1.weight, " in line
    assert not (tmp_path / "run").exists()


def test_the_rehearsal_reads_no_values(shades, state, tmp_path, monkeypatch):
    """Names and shapes are checked there; a NaN, which is a value, is found when it is loaded."""
    bad = state | {"norm.bias": torch.full((64,), torch.nan)}
    chosen = {"model": "test_vit", "method": "linear"}
    for end in ("safetensors", "pth", "old.pth", "npz"):
        path = tmp_path / f"weights.{end}"
        if end == "safetensors":
            save_file(bad, path)
        elif end == "npz":
            from tests.pae.test_weights import jax_archive

            np.savez(path, **jax_archive(bad))
        else:
            torch.save(bad, path, _use_new_zipfile_serialization=end == "pth")
        chosen["weights"] = str(path)
        methods.rehearse(options(shades, **chosen).resolved())
        with pytest.raises(pae.CheckpointError, match=f"{path}: .*(NaN|infinite)"):
            methods.build_backbone(options(shades, **chosen), 2)


@pytest.mark.parametrize(
    ("end", "pool"), [("safetensors", "all"), ("pth", "prompts"), ("old.pth", "image")]
)
def test_weights_that_were_fine_tuned_with_a_mean(shades, state, tmp_path, end, pool):
    """As MAE's are: their norm is behind the mean of the rows, where --pool puts one."""
    tuned = {k.replace("norm.", "fc_norm.") if k in NORM else k: v for k, v in state.items()}
    assert len(tuned.keys() - state.keys()) == 2
    path = tmp_path / f"weights.{end}"
    if end == "safetensors":
        save_file(tuned, path)
    else:
        head = {"head.weight": torch.ones(7, 64)}
        whole = {"model": tuned | head, "epoch": 49}
        torch.save(whole, path, _use_new_zipfile_serialization=end == "pth")
    chosen = {"model": "test_vit", "weights": str(path), "method": "vpt-deep"}
    told, said = options(shades, **chosen, pool=pool).resolved(), []
    methods.rehearse(told)
    module = methods.build_method(told, 3, say=said.append)
    backbone = module.backbone
    assert module.pool == pool and not backbone.fc_norm.weight.requires_grad
    assert is_the_files(backbone, tuned) and isinstance(backbone.norm, torch.nn.Identity)
    assert said[-1].endswith("is replaced by a mean of rows and the file's norm")
    x = torch.randn(2, 3, 32, 32)
    rows = backbone.forward_features(x)[:, 1:]
    expected = torch.nn.functional.layer_norm(
        rows.mean(1), (64,), tuned["fc_norm.weight"], tuned["fc_norm.bias"], backbone.fc_norm.eps
    )
    torch.testing.assert_close(backbone.forward_head(backbone.forward_features(x), True), expected)
    message = (
        r"do not fit test_vit: missing 2 of 78: norm\.weight, norm\.bias; unknown 2: fc_norm\..*; "
        r"it was fine-tuned with a mean of rows: pae\.backbones\.average_pooled"
    )
    with pytest.raises(pae.CheckpointError, match=message):
        methods.build_backbone(options(shades, **chosen), 3)


NORM = ("norm.weight", "norm.bias")


@pytest.mark.parametrize("pool", ["own", "all"])
def test_weights_with_a_norm_before_the_readout(shades, state, tmp_path, pool):
    """MAE's pretraining has it, and no use for it under a mean: the norm behind that is new."""
    save_file(state, tmp_path / "weights.safetensors")
    chosen = options(
        shades,
        model="test_vit",
        weights=str(tmp_path / "weights.safetensors"),
        method="vpt-deep",
        pool=pool,
    ).resolved()
    backbone = methods.build_backbone(chosen, 3)
    if pool == "own":
        assert is_the_files(backbone, state)
    else:
        assert is_the_files(backbone, {k: v for k, v in state.items() if k not in NORM})
        assert backbone.fc_norm.weight.eq(1).all() and backbone.fc_norm.bias.eq(0).all()


@pytest.mark.parametrize("absolute", [True, False])
def test_a_model_of_a_folder(shades, vit, state, tmp_path, monkeypatch, absolute):
    timm.models.save_for_hf(vit, tmp_path / "folder", safe_serialization=True)
    monkeypatch.chdir(tmp_path)
    name = f"local-dir:{tmp_path / 'folder' if absolute else 'folder'}"
    chosen = options(shades, model=name, method="vpt-deep").resolved()
    assert chosen.model == f"local-dir:{tmp_path / 'folder'}"
    said = []
    backbone = methods.build_backbone(chosen, 3, say=said.append)
    assert is_the_files(backbone, state) and backbone.num_classes == 3
    assert len(said) == 1 and str(tmp_path / "folder" / "model.safetensors") in said[0]
    random_ = methods.build_backbone(options(shades, model=name, pretrained=False), 3)
    assert not is_the_files(random_, state)
    other = {k: v + 1 for k, v in state.items()}
    torch.save(other, "other.pth")
    with_file = methods.build_backbone(options(shades, model=name, weights="other.pth"), 3)
    assert is_the_files(with_file, other)


def test_a_folder_that_lacks_tensors_is_refused(flags, vit, tmp_path, capsys):
    """timm takes it without a word, for the head has another size."""
    folder = tmp_path / "folder"
    timm.models.save_for_hf(vit, folder, safe_serialization=True)
    lacking = {k: v for k, v in vit.state_dict().items() if "blocks.3." not in k}
    save_file(lacking, folder / "model.safetensors")
    flags = [*flags, "--model", f"local-dir:{folder}"]
    assert "missing 12 of 78: blocks.3.norm1.weight" in error_line(capsys, flags)
    (folder / "model.safetensors").unlink()
    assert f"--model local-dir:{folder}: " in error_line(capsys, flags)
    assert f"one file of weights in {folder}, got 0" in error_line(capsys, flags)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    assert "config.json is not timm's, it lacks 'architecture'" in error_line(capsys, flags)
    (folder / "config.json").unlink()
    assert f"--model local-dir:{folder}: " in error_line(capsys, flags)


def test_a_model_of_the_hub(shades, flags, vit, state, tmp_path, capsys, monkeypatch):
    """From the hub's cache, without a network; what is not there is named."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "models--someone--their-vit"
    snapshot = place / "snapshots" / ("0" * 40)
    timm.models.save_for_hf(vit, snapshot, safe_serialization=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(
        timm.models._hub,
        "hf_hub_download",
        _with_cache(timm.models._hub.hf_hub_download, tmp_path / "cache"),
    )
    chosen = options(shades, model="hf-hub:someone/their-vit", method="vpt-deep").resolved()
    methods.rehearse(chosen)
    said = []
    assert is_the_files(methods.build_backbone(chosen, 3, say=said.append), state)
    assert said[0].startswith("weights hf-hub:someone/their-vit: all 78 tensors")
    lacking = {k: v for k, v in vit.state_dict().items() if "blocks.3." not in k}
    save_file(lacking, snapshot / "model.safetensors")
    with pytest.raises(pae.CheckpointError, match=r"hf-hub:someone/their-vit do not fit .*missing"):
        methods.build_backbone(chosen, 3)
    line = error_line(capsys, [*flags, "--model", "hf-hub:someone/else"])
    assert line.startswith("pae: error: --model hf-hub:someone/else: ")


def _with_cache(download, cache):
    def from_cache(*arguments, **more):
        return download(*arguments, **{**more, "cache_dir": str(cache), "local_files_only": True})

    return from_cache


def test_other_names_are_still_refused(flags, capsys):
    assert "timm has no such model" in error_line(capsys, [*flags, "--model", "hub:someone/vit"])
    line = error_line(capsys, [*flags, "--model", "someone/vit"])
    assert "timm has no such model; hf-hub:someone/vit is on the hub" in line
