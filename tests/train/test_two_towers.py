"""`pae train --task clip`: a tiny CLIP of transformers, learned from folders of images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pae
from pae.train import options as options_module
from pae.train.cli import main
from pae.train.runfolder import RunFolder
from pae.train.tasks import kind_of
from pae.train.tasks.clip import harmonic, readable
from tests.tiny import filled
from tests.train.helpers import error_line, save_shades
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


@pytest.fixture(scope="module")
def open_tower(tmp_path_factory):
    """A folder with a random CLIP of open_clip, as it is pushed to the hub."""
    open_clip = pytest.importorskip("open_clip", reason="pip install pae[clip]")
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open")
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    shape = {"embed_dim": 16, "vision_cfg": {**vision, "mlp_ratio": 2.0}, "text_cfg": text}
    seen = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"model_cfg": shape, "preprocess_cfg": {**seen, "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = filled(open_clip.model.CLIP(**shape))
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"open_clip:local-dir:{folder}"


RECIPE = {"task": "clip", "img_size": None, "epochs": 3, "num_tokens": 3, "lr": 0.02}
RECIPE |= {"optimizer": "adamw", "warmup_epochs": 0.5}
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


# ---- models of open_clip, and the lists of the few-shot protocol

LINE = ["--task", "clip", "--device", "cpu", "--workers", "0", "--amp", "no", "--num-tokens", "2"]


def test_models_of_open_clip(shades, open_tower, tmp_path, capsys):
    line = ["train", *LINE, "--method", "apt-vl-both", "--model", open_tower, "--data", str(shades)]
    assert main([*line, "--output", str(tmp_path), "--epochs", "2", "--lr", "0.05"]) == 0
    rows, _, _ = numbers(tmp_path)
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert "No pretrained weights" not in "".join(capsys.readouterr())


def test_texts_of_open_clip(shades, open_tower):
    """Those of the model that lies there, by its own tokenizer."""
    import open_clip

    place = open_tower.partition(":")[2]
    own, words = open_clip.create_model(place), open_clip.get_tokenizer(place)
    texts = words([f"a photo of a {name}." for name in ("dark", "light", "middle")])
    given = {**RECIPE, "model": open_tower, "method": "vpt-deep", "pretrained": True}
    found = kind_of(settings(shades, **given))
    made = found.build(found.read()).clip
    with torch.no_grad():
        expected = torch.nn.functional.normalize(own.eval().encode_text(texts), dim=1)
        assert torch.allclose(made.text_features("fast"), expected, atol=1e-5)


def test_architectures_of_open_clip(shades, open_tower, tmp_path, capsys):
    """By name, random, drawn by the seed; what has no weights of that name says so."""
    import open_clip

    folder = tmp_path / "configs"
    folder.mkdir()
    place = Path(open_tower.rpartition(":")[2])
    shape = json.loads((place / "open_clip_config.json").read_text())["model_cfg"]
    (folder / "pae-tiny.json").write_text(json.dumps(shape))
    open_clip.add_model_config(folder)
    own = {**RECIPE, "method": "dapt", "model": "open_clip:pae-tiny/none"}
    made = []
    for seed in (0, 0, 1):
        kind = kind_of(settings(shades, **own, seed=seed))
        made.append(kind.build(kind.read()).clip.text.view.table.weight)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    line = ["train", *LINE, "--method", "coop", "--model", "open_clip:pae-tiny/none"]
    capsys.readouterr()
    error = error_line(capsys, [*line, "--data", str(shades), "--output", str(tmp_path / "c")])
    assert "expected open_clip:pae-tiny/TAG, one of none; or give --no-pretrained" in error


SPLITS = {"train": 3, "val": 1, "test": 2}


def breed(label):
    return f"breed_{chr(97 + label % 26)}{label // 26}"


def few_pets(folder):
    """As CoOp has them: images in one folder, and a list of paths, labels and names."""
    rng = np.random.default_rng(1)
    (folder / "images").mkdir(parents=True)
    lists = {split: [] for split in SPLITS}
    for label in range(37):
        for i, split in enumerate(s for s, count in SPLITS.items() for _ in range(count)):
            noisy = np.clip(rng.normal(6 * label + 10, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / "images" / f"{label}_{i}.png")
            lists[split].append([f"{label}_{i}.png", label, breed(label)])
    (folder / "split_zhou_OxfordPets.json").write_text(json.dumps(lists))
    return folder


def test_few_shot_lists(tower, tmp_path, capsys):
    """`pae train --config coop --protocol few-shot`: the draw, its names, base and new."""
    pets = few_pets(tmp_path / "oxford_pets")
    line = ["train", "--config", "coop", *LINE, "--model", tower, "--data", str(tmp_path)]
    line += ["--protocol", "few-shot", "--protocol-task", "pets", "--shots", "2", "--base-to-new"]
    assert main([*line, "--epochs", "1", "--output", str(tmp_path / "run")]) == 0
    facts = json.loads((tmp_path / "run" / "config.json").read_text())
    assert facts["task"]["train"] == 2 * 19 and facts["task"]["test"] == 2 * 19
    names = [readable(breed(label)) for label in range(19)]
    assert facts["task"]["classes"] == names and facts["settings"]["warmup_lr"] == 1e-5
    assert 0 <= numbers(tmp_path / "run")[1]["harmonic_mean"] <= 1
    # the same draw as lists, whose classes are numbers where no names lie beside them
    assert main(["protocol", "few-shot", str(tmp_path), "--write-draws", "--shots", "2"]) == 0
    given = {**RECIPE, "method": "coop", "model": tower, "protocol": "few-shot", "shots": 2}
    kind = kind_of(settings(pets, **given, base_to_new=True))
    assert kind.read().classes == tuple(names)
    (pets / "annotations" / "classes.txt").unlink()
    capsys.readouterr()
    error = error_line(capsys, [*line, "--output", str(tmp_path / "numbers")])
    assert "its classes have numbers for names (0, ...)" in error
    (tmp_path / "names").write_text("\n".join([*names, *(f"breed {i}" for i in range(18))]))
    kind = kind_of(settings(pets, **given, class_names=str(tmp_path / "names")))
    assert kind.read().classes[18:20] == (names[18], "breed 0")


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
    names = {"tree_frog": "tree frog", "012.Tree_Frog": "Tree Frog", "2_cats": "cats", "747": "747"}
    names |= {n: n for n in ("747-400", "2012 BMW M3", "T-shirt", "crème brûlée", "1 Fuß", "_")}
    assert {folder: readable(folder) for folder in names} == names


def test_a_recipe_of_its_own(shades, tower):
    """CoOp's protocol where nothing else is said; a given part of it takes the place of that."""
    own = {"task": "clip", "model": tower, "method": "coop", "data": str(shades)}
    found = options_module.Options(**own).resolved()
    assert (found.optimizer, found.lr, found.weight_decay) == ("sgd", 2e-3, 5e-4)
    assert (found.warmup_epochs, found.warmup_lr) == (1, 1e-5) and found.resolved() == found
    for other in ({"warmup_epochs": 0.0}, {"scheduler": "none"}):
        assert options_module.Options(**own, **other).resolved().warmup_lr is None
    assert options_module.Options(**own, warmup_lr=1e-4).resolved().warmup_lr == 1e-4


@pytest.mark.parametrize("name", ["coop", "dapt", "upt"])
def test_recipes(name):
    found = options_module.read_config(options_module.find_config(name))
    assert found["task"] == "clip" and found["method"] == name
    given = pae.prompts.PAIRS[name](num_tokens=found["num_tokens"], **found.get("method_args", {}))
    assert given.num_tokens == found["num_tokens"]
