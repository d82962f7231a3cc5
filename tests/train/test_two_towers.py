"""`pae train --task clip`: a tiny CLIP of transformers, learned from folders of images."""

import json

import pytest
import torch

import pae
from pae.train import options as options_module
from pae.train.cli import main
from pae.train.runfolder import RunFolder
from pae.train.tasks import kind_of
from pae.train.tasks.clip import harmonic, readable
from tests.tiny import filled
from tests.train.helpers import save_shades
from tests.train.test_train_loop import Stop, assert_same_run, numbers, run, settings, stop_after

transformers = pytest.importorskip("transformers", reason="pip install pae[hf]")

PART = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PART |= {"intermediate_size": 64}


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A folder with a random CLIP and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokens = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokens.save_pretrained(folder)
    text = {"vocab_size": len(words), "max_position_embeddings": 40}
    text |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    config = transformers.CLIPConfig(
        text_config={**PART, **text, "pad_token_id": len(words) - 1},
        vision_config={**PART, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = filled(transformers.CLIPModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    model.save_pretrained(folder)
    seen = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True}
    seen |= {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "resample": 3}
    seen |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(seen))
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("shades"))


RECIPE = {"task": "clip", "img_size": None, "epochs": 3, "num_tokens": 3, "lr": 0.02}
METHODS = {
    "coop": {},
    "dapt": {"method_args": {"image_tokens": 3}},
    "upt": {},
    "upt-deep": {"method_args": {"hidden": 16}},
    "vpt-deep": {},
    "apt-vl": {},
    "apt-vl-both": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_learns(shades, tower, tmp_path, method):
    own = {**RECIPE, "model": tower, "method": method, **METHODS[method]}
    result = run(shades, tmp_path, **own)
    rows, stored, _ = numbers(tmp_path)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert 0 <= result["zero_shot_accuracy"] <= 1 and result["head_parameters"] == 0
    assert result["trained_parameters"] > 0 and stored["test_accuracy"] == result["test_accuracy"]


def test_goes_on_where_it_was_stopped(shades, tower, tmp_path, monkeypatch):
    """DAPT's prototypes are part of the state, and are not found again."""
    own = {**RECIPE, "model": tower, "method": "dapt", "epochs": 2, "augment": "crop"}
    own["save_every_steps"] = 1
    run(shades, tmp_path / "whole", **own)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 2)
        run(shades, tmp_path / "cut", **own)
    state = RunFolder(tmp_path / "cut").read_state()
    assert state["module"]["prototypes"].norm(dim=1).min() > 0.1
    run(shades, tmp_path / "cut", resume="last", **own)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_base_to_new(shades, tower, tmp_path):
    own = {**RECIPE, "model": tower, "method": "coop", "base_to_new": True}
    result = run(shades, tmp_path, **own)
    task = kind_of(settings(shades, **own)).read()
    assert task.classes == ("dark", "light") and set(task.test.labels) == {0, 1}
    assert len(task.test) == 10 and result["new_accuracy"] == 1.0  # one class alone is always right
    expected = harmonic(result["test_accuracy"], result["new_accuracy"])
    assert result["harmonic_mean"] == pytest.approx(expected)
    assert {"zero_shot_accuracy", "zero_shot_new_accuracy", "zero_shot_harmonic_mean"} <= set(
        result
    )


def test_command_and_its_table(shades, tower, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("a dark thing\na light thing\na grey thing\n")
    line = ["train", "--task", "clip", "--method", "coop", "--model", tower, "--data", str(shades)]
    line += ["--class-names", str(names), "--epochs", "1", "--device", "cpu", "--workers", "0"]
    line += [
        "--template",
        "a photo of {}, noisy.",
        "--output",
        str(tmp_path / "run"),
        "--amp",
        "no",
    ]
    assert main([*line, "--num-tokens", "2"]) == 0
    shown = capsys.readouterr().out
    assert "zero-shot" in shown and "coop" in shown
    facts = json.loads((tmp_path / "run" / "config.json").read_text())
    assert facts["task"]["classes"] == ["a dark thing", "a light thing", "a grey thing"]


REFUSED = [
    ({"model": "vit_tiny_patch16_224"}, "--task clip needs a model of two towers"),
    ({"method": "linear"}, "--task clip expects one of apt, apt-vl"),
    (
        {"mpa": True, "method": "vpt-deep"},
        "not with --task clip: in a script PromptedCLIP.mpa_init",
    ),
    ({"pool": "all"}, "not with --task clip: the image tower has its own readout"),
    ({"template": "a photo"}, "expected one {} for the name of a class"),
    ({"class_names": "nowhere.txt"}, "no such file"),
    ({"method_args": {"rank": 3}}, "coop has no rank; it has num_tokens, position, num_classes"),
    ({"dropout": 0.1}, "coop has no dropout"),
    ({"base_to_new": True, "method_args": {"num_classes": 3}}, "new classes would have none"),
    ({"task": "classification"}, "it needs --task clip"),
    ({"task": "classification", "method": "vpt-deep", "base_to_new": True}, "needs --task clip"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused_before_anything_is_loaded(shades, tower, changes, message):
    own = {**RECIPE, "model": tower, "method": "coop", **changes}
    with pytest.raises(ValueError) as raised:
        kind_of(settings(shades, **own)).rehearse()
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_names_of_folders():
    names = {"tree_frog": "tree frog", "012.Tree-Frog": "Tree Frog", "2_cats": "cats", "747": "747"}
    assert {folder: readable(folder) for folder in names} == names


@pytest.mark.parametrize("name", ["coop", "dapt", "upt"])
def test_recipes(name):
    found = options_module.read_config(options_module.find_config(name))
    assert found["task"] == "clip" and found["method"] == name
    given = pae.prompts.PAIRS[name](num_tokens=found["num_tokens"], **found.get("method_args", {}))
    assert given.num_tokens == found["num_tokens"]
