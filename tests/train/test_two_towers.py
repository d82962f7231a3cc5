"""`pae train --task clip`: a tiny CLIP of transformers, learned from folders of images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pae
from pae.backbones import named
from pae.train import options as options_module
from pae.train.cli import main
from pae.train.hub import model_card
from pae.train.runfolder import RunFolder
from pae.train.tasks import kind_of
from pae.train.tasks.clip import harmonic, readable
from tests.tiny import filled, refused
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
    "upt": {"lr": 1e-3, "epochs": 5},
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


# ---- after training


@pytest.fixture(scope="module")
def trained(shades, tower, tmp_path_factory):
    """A run of CoOp on a random CLIP that lies in a folder, two epochs, and its images."""
    folder = tmp_path_factory.mktemp("after")
    own = {**RECIPE, "model": tower, "method": "coop", "epochs": 2, "pretrained": True}
    run(shades, folder / "run", **own, template="a {}, noisy.")
    return folder / "run"


def test_a_run_becomes_a_model(trained, shades, tower):
    """`pae.load`: the logits of training; other names are other texts with the same rows."""
    model = pae.load(trained)
    assert model.classes == ("dark", "light", "middle") and model.template == "{}, noisy."
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    kind = kind_of(settings(shades, **{**RECIPE, "model": tower, "method": "coop"}))
    result = json.loads((trained / "metrics.json").read_text())["result"]
    task = kind.read()
    x = torch.stack([model.transform(item) for item in task.test.items])
    with torch.no_grad():
        hits = model(x, engine="fast").argmax(1) == torch.tensor(task.test.labels)
    assert hits.double().mean() == pytest.approx(result["test_accuracy"])
    other = pae.load(trained, classes=["light", "a thing", "dark"])
    with torch.no_grad():
        assert torch.allclose(other(x)[:, [2, 0]], model(x)[:, :2], atol=1e-5)
    assert torch.equal(other.text.context.tokens, model.text.context.tokens)


def test_predict(trained, shades, tmp_path, capsys):
    line = ["predict", str(trained), str(shades / "test" / "dark"), "--device", "cpu", "--quiet"]
    table = tmp_path / "a.csv"
    assert main([*line, "--output", str(table)]) == 0
    head, first, *rest = table.read_text().splitlines()
    assert head.startswith("image,class_1,probability_1") and len(rest) == 4
    assert sorted(first.split(",")[1:7:2]) == ["dark", "light", "middle"]
    capsys.readouterr()
    assert main([*line, "--classes", "night, broad daylight", "--top", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 5 and all("night" in s and "broad daylight" in s for s in shown)


def test_evaluate(trained, shades, tmp_path, capsys):
    line = ["evaluate", str(trained), "--data", str(shades), "--device", "cpu", "--quiet"]
    assert main([*line, "--output", str(tmp_path / "a")]) == 0
    found = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    result = json.loads((trained / "metrics.json").read_text())["result"]
    assert found["images"] == 15 and found["accuracy"] == pytest.approx(result["test_accuracy"])
    # other names, in the order of the folders; those that the folder has come by their names
    names = ["--classes", "night,day,dusk"]
    assert main([*line, *names, "--output", str(tmp_path / "b")]) == 0
    head = (tmp_path / "b" / "confusion.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in head] == ["class", "night", "day", "dusk"]
    assert main([*line, "--classes", "middle,dark,x,light", "--output", str(tmp_path / "c")]) == 0
    rows = (tmp_path / "c" / "per_class.csv").read_text().splitlines()[1:]
    found = {row.split(",")[0]: row.split(",")[1] for row in rows}
    assert found == {"middle": "5", "dark": "5", "x": "0", "light": "5"}
    capsys.readouterr()
    error = error_line(capsys, [*line, "--classes", "x,y"])
    assert "class 'dark' is none of the model's 2, 'x', ...: give --classes" in error


def test_evaluate_on_new_classes(shades, tower, tmp_path, capsys):
    """Of a base-to-new run: the other half by name, which is the number that its result has."""
    own = {**RECIPE, "model": tower, "method": "coop", "epochs": 1, "base_to_new": True}
    result = run(shades, tmp_path / "run", **own)
    line = ["evaluate", str(tmp_path / "run"), "--device", "cpu", "--quiet", "--data", str(shades)]
    out = ["--output", str(tmp_path / "out")]
    for classes, key, count in (("dark,light", "test", 10), ("middle", "new", 5)):
        assert main([*line, "--classes", classes, *out]) == 0
        found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert found["accuracy"] == pytest.approx(result[f"{key}_accuracy"])
        assert found["images"] == count
    capsys.readouterr()
    error = error_line(capsys, line)
    assert "class 'middle' is none of the model's 2, 'dark', ...: give --classes" in error


def test_info_and_card(trained, capsys):
    assert main(["info", str(trained), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["prompts"] == "CoOp" and table["template"] == "{}, noisy."
    assert table["classes"] == ["dark", "light", "middle"] and table["parameters"] == 3 * 32
    assert main(["info", str(trained / "last.safetensors")]) == 0
    assert "text tower" in capsys.readouterr().out
    assert "the two frozen towers of a CLIP" in model_card(trained)


def test_export(trained, tmp_path, capsys):
    """Images to logits, the texts as numbers: no text tower in the file."""
    model, path = pae.load(trained), tmp_path / "a.pt2"
    line = ["export", str(trained), "--format", "torch-export", "--output", str(path)]
    assert main(line) == 0
    program = torch.export.load(path).module()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(program(x), model(x), atol=1e-4)
    names = [name for name, _ in program.named_parameters()]
    assert names and not any("text" in name for name in names)


PARTS = {
    "dapt": {"method_args": {"image_tokens": 2}},
    "upt": {"dropout": 0.2},
    "apt-vl-both": {"method_args": {"context_tokens": 2}},
    "vpt-deep": {"train_backbone": "biases", "kld": True, "kld_dim": 8},
}


@pytest.mark.parametrize("method", PARTS)
def test_files_of_every_kind_become_models(shades, tower, tmp_path, method):
    chosen = settings(shades, **{**RECIPE, "model": tower, "method": method, **PARTS[method]})
    kind = kind_of(chosen)
    made = kind.build(kind.read()).clip.eval()
    recipe = {"model": tower, "pretrained": False, "seed": 0}
    made.save(tmp_path / "a.safetensors", task=pae.TaskInfo(made.classes, backbone=recipe))
    again = pae.load(tmp_path / "a.safetensors")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(x), made(x))
    assert again.transform is None and again.template == made.template


def test_files_that_cannot_become_models(shades, tower, trained, tmp_path):
    made = pae.load(trained)
    path = tmp_path / "a.safetensors"
    refused(ValueError, "whose texts need their tokenizer", lambda: pae.load(trained, made))
    refused(ValueError, "is of two towers, and vit_tiny", lambda: pae.load(trained, "vit_tiny"))
    refused(ValueError, "take their own size", lambda: pae.load(trained, img_size=64))
    refused(ValueError, "have those of the model", lambda: pae.load(trained, weights="x"))
    refused(ValueError, "holds two towers, and shares no b", lambda: pae.serve_many([trained]))
    made.save(path, task=pae.TaskInfo(classes=made.classes))
    refused(ValueError, "does not say how its backbone (CLIPModel.", lambda: pae.load(path))
    assert pae.load(path, tower).classes == made.classes
    own = {"num_classes": 3}
    kind = kind_of(settings(shades, **RECIPE, model=tower, method="coop", method_args=own))
    rows = kind.build(kind.read()).clip
    rows.save(path, task=pae.TaskInfo(rows.classes, backbone={"model": tower, "pretrained": False}))
    message = "--classes: 1 names, and"
    refused(ValueError, message, lambda: pae.load(path, classes=["x"]))

    class Mine(pae.prompts.TextContext):
        pass

    clip, words, _ = named.load_two_towers(tower)
    mine = pae.prompted_clip(clip, None, Mine(2), ["a", "b"], tokenizer=words)
    mine.save(path)
    message = "has prompts of Mine, which nothing here registers: build pae.prompted_clip"
    refused(pae.CheckpointError, message, lambda: pae.load(path, tower))


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
    ({"method_args": {"rank": 3}}, "coop has no rank; it has position, num_classes"),
    ({"dropout": 0.1}, "coop has no dropout"),
    ({"method_args": {"num_tokens": 2}}, "num_tokens is --num-tokens"),
    ({"method": "upt", "method_args": {"dropout": 0.2}}, "dropout is --dropout"),
    ({"method": "upt", "method_args": {"faithful": 1}}, "expected true or false as faithful"),
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


def test_dropout_is_published_or_given(shades, tower):
    for method, given, expected in (
        ("upt", {}, 0.1),
        ("upt-deep", {}, 0.1),
        ("upt", {"dropout": 0.0}, 0.0),
        ("upt", {"dropout": 0.3}, 0.3),
        ("vpt-deep", {}, 0.0),
    ):
        kind = kind_of(settings(shades, **{**RECIPE, "model": tower, "method": method, **given}))
        clip = kind.build(kind.read()).clip
        prompts = clip.vision.prompts if clip.pair is None else clip.pair
        assert prompts.dropout == expected, (method, given)


@pytest.mark.parametrize("name", ["coop", "dapt", "upt"])
def test_recipes(name):
    found = options_module.read_config(options_module.find_config(name))
    assert found["task"] == "clip" and found["method"] == name
    given = pae.prompts.PAIRS[name](num_tokens=found["num_tokens"], **found.get("method_args", {}))
    assert given.num_tokens == found["num_tokens"]
