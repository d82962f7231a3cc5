"""After training: a checkpoint alone is enough to predict, to evaluate, and to say what it is."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import pae
from pae.backbones import named
from pae.files import write_atomically
from pae.sweep.records import Records
from pae.train import evaluation, hub, methods, pixels, using
from pae.train.cli import main
from pae.train.data import Images, read_folder
from pae.train.export import export
from pae.train.runfolder import RunFolder
from tests import tiny
from tests.train.helpers import BACKBONE_FLAGS, CPU_FLAGS, error_line, save_shades

METHODS = ("vpt-deep", "linear", "full")


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("after") / "shades")


@pytest.fixture(scope="module")
def runs(shades):
    """The folder of a finished run per method."""
    for method in METHODS:
        flags = ["train", "--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, "--method", method]
        flags += ["--epochs", "2", "--batch-size", "16", "--quiet"]
        flags += ["--augment", "crop", "--norm", "imagenet"] if method == "vpt-deep" else []
        assert main([*flags, "--output", str(shades.parent / method)]) == 0
    return shades.parent


@pytest.fixture
def alone(runs, tmp_path):
    """A function: method -> its checkpoint in a folder without a run."""

    def copied(method):
        return str(shutil.copy(runs / method / "best.safetensors", tmp_path / f"{method}.st"))

    return copied


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- load


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_alone_is_what_was_trained(runs, shades, alone, method):
    model = pae.load(alone(method))
    assert model.classes == ("dark", "light", "middle") and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    test = read_folder(shades).test
    found = evaluation.evaluate(model, test, batch_size=4)
    assert found.accuracy == RunFolder(runs / method).result()["test_accuracy"]
    images = torch.stack([model.transform(path) for path in test.items])
    shares = [said.probabilities for said in using.predictions(model, test.items, batch_size=6)]
    torch.testing.assert_close(torch.stack(shares), model(images).softmax(1))


def test_images_become_what_evaluation_in_training_makes_of_them(runs, shades):
    model, options = pae.load(runs / "vpt-deep"), RunFolder(runs / "vpt-deep").read_config()
    config = methods.data_config(model.backbone)
    transform, _ = pixels.make_transform("crop", False, 32, config["interpolation"], config)
    test = read_folder(shades).test
    mean, std = pixels.normalisation("imagenet", config)
    pipeline = pixels.Pipeline(pixels.PixelSplit(test, transform), mean, std, "cpu")
    ((images, _),) = pipeline.batches([torch.arange(len(test))])
    assert options.augment == "crop"
    for path, image in zip(test.items, images):
        assert torch.equal(model.transform(path), image)
        assert torch.equal(model.transform(Image.open(path)), image)
        assert torch.equal(model.transform(np.asarray(Image.open(path))), image)


def test_an_image_of_pil_is_read_like_its_file(runs, tmp_path):
    model = pae.load(runs / "vpt-deep")
    rng = np.random.default_rng(0)
    turned = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    clear = Image.fromarray(rng.integers(0, 255, (40, 60, 4), dtype=np.uint8), "RGBA")
    clear.save(tmp_path / "clear.png")
    clear.convert("P").save(tmp_path / "small.gif")
    for name in ("turned.png", "clear.png", "small.gif"):
        expected = model.transform(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert torch.equal(model.transform(image), expected)
            assert torch.equal(model.transform(image), expected)  # and is what it was
    plain = model.transform(turned.convert("RGB"))
    assert not torch.equal(plain, model.transform(tmp_path / "turned.png"))


def test_no_folder_of_this_machine_is_in_the_file(runs, shades, tmp_path):
    vit = timm.create_model("test_vit", img_size=32)
    weights = tmp_path / "secret-folder" / "vit.pth"
    weights.parent.mkdir()
    torch.save(vit.state_dict(), weights)
    flags = ["train", "--data", str(shades), "--model", "test_vit", "--img-size", "32"]
    flags += ["--weights", str(weights), "--method", "linear", "--epochs", "1", "--quiet"]
    assert main([*flags, *CPU_FLAGS, "--output", str(tmp_path / "run")]) == 0
    assert pae.load(tmp_path / "run").classes  # the run's folder knows where it lay
    file = shutil.copy(tmp_path / "run" / "best.safetensors", tmp_path / "a.safetensors")
    assert b"secret-folder" not in file.read_bytes()
    with pytest.raises(ValueError, match=r"weights of vit\.pth, which is not here.*--weights"):
        pae.load(file)
    model = pae.load(file, weights=weights)
    assert torch.equal(model.backbone.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)
    with pytest.raises(pae.CheckpointError, match="was trained on backbone"):
        pae.load(file, weights=None, backbone=timm.create_model("test_vit", img_size=32))


def bare(tmp_path, **task):
    """A checkpoint that somebody's own loop wrote."""
    model = pae.PromptedViT(tiny.backbone(dtype=torch.float32), pae.prompts.VPTDeep(2))
    model.save(tmp_path / "bare.safetensors", task=pae.TaskInfo(**task) if task else None)
    return tmp_path / "bare.safetensors"


def test_what_an_older_file_does_not_say_is_asked_for_and_taken(tmp_path, shades, capsys):
    file = bare(tmp_path)
    with pytest.raises(ValueError, match=r"does not say how its backbone \(VisionTransformer\)"):
        pae.load(file)
    vit = tiny.backbone(dtype=torch.float32)
    model = pae.load(file, vit)
    assert model.classes is None and model.transform is None
    with pytest.raises(ValueError, match="--norm and --augment"):
        using.require(using.find(file), model, "transform", "classes")
    vit = tiny.backbone(dtype=torch.float32)
    model = pae.load(file, vit, norm="inception", augment="none", classes=list("abcde"))
    using.require(using.find(file), model, "transform", "classes")
    assert model.task.mean == (0.5, 0.5, 0.5) and model.task.crop_mode == "squash"
    assert model(model.transform(shades / "test/dark/00.png")[None]).shape == (1, 5)
    vit = tiny.backbone(dtype=torch.float32)
    with pytest.raises(ValueError, match="expected 5 names, got 2"):
        pae.load(file, vit, classes=["a", "b"])
    line = error_line(capsys, ["predict", str(file), str(shades / "test")])
    assert "give its name (--model NAME)" in line


def test_the_command_line_gives_what_a_file_lacks(runs, shades, tmp_path, capsys):
    model = pae.load(runs / "vpt-deep")
    only = {"model": "test_vit", "img_size": 32, "pretrained": False, "seed": 0}
    model.task = pae.TaskInfo(backbone=only)
    model.save(tmp_path / "old.safetensors")
    command = ["predict", str(tmp_path / "old.safetensors"), str(shades / "test"), "--quiet"]
    assert "give --norm and --augment" in error_line(capsys, command)
    command += ["--norm", "imagenet", "--augment", "crop"]
    assert "does not say its 3 classes: give --classes" in error_line(capsys, command)
    (tmp_path / "names.txt").write_text("dark\nlight\nmiddle\n")
    for names in ("dark,light,middle", str(tmp_path / "names.txt")):
        assert main([*command, "--classes", names, "--output", str(tmp_path / "a.csv")]) == 0
        assert main(["predict", str(runs / "vpt-deep"), *command[2:], "--output", "-"]) == 0
        assert (tmp_path / "a.csv").read_text() == capsys.readouterr().out


def test_a_known_name_is_enough(tmp_path, monkeypatch):
    asked = []

    def build(options, num_classes, *_):
        asked.append((options, num_classes))
        return tiny.backbone(dtype=torch.float32)

    monkeypatch.setattr(methods, "build_backbone", build)
    vit = tiny.backbone(dtype=torch.float32)
    vit.pretrained_cfg = {"architecture": "vit_tiny_patch16_224", "tag": "augreg_in21k"}
    pae.PromptedViT(vit, pae.prompts.VPTDeep(2)).save(tmp_path / "a.safetensors")
    model = pae.load(tmp_path / "a.safetensors")
    ((options, classes),) = asked
    assert (options.model, options.img_size) == ("vit_tiny_patch16_224.augreg_in21k", 16)
    assert options.pretrained and options.weights is None and classes == 5
    assert model.task.backbone == {"model": "vit_tiny_patch16_224.augreg_in21k", "img_size": 16}
    pae.load(tmp_path / "a.safetensors", "vit_small_patch16_224", img_size=32)
    assert (asked[1][0].model, asked[1][0].img_size) == ("vit_small_patch16_224", 32)


def test_models_of_other_libraries_by_name(tmp_path, monkeypatch):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=4,
    )  # fmt: skip
    vit = transformers.ViTModel(config).eval()
    vit.config._name_or_path = "somebody/vit"
    pae.PromptedViT(vit, pae.prompts.VPTDeep(2), num_classes=3).save(tmp_path / "a.safetensors")
    asked = []

    def load_named(name, **more):
        asked.append((name, more))
        fresh = transformers.ViTModel(config)
        fresh.load_state_dict(vit.state_dict())
        return fresh

    with monkeypatch.context() as patched:
        patched.setattr(named, "load_named", load_named)
        assert pae.load(tmp_path / "a.safetensors").num_classes == 3
    assert asked == [("hf:somebody/vit", {"kind": "ViTModel"})]
    with pytest.raises(
        ValueError, match=r"open_clip:nobody/openai: open_clip has no model nobody$"
    ):
        pae.load(bare(tmp_path), "open_clip:nobody/openai")
    with pytest.raises(ValueError, match=r"later pae wrote.*'size_of_patches'"):
        pae.load(bare(tmp_path, backbone={"model": "test_vit", "size_of_patches": 3}))


def test_damaged_and_foreign_files_cost_one_line(runs, alone, tmp_path, capsys):
    file = alone("full")
    content = bytearray(Path(file).read_bytes())
    content[-3] ^= 1
    Path(file).write_bytes(content)
    for command in (["info", file], ["predict", file, str(runs / "shades")]):
        assert "half-written or damaged" in error_line(capsys, command)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "b.safetensors")
    line = error_line(capsys, ["info", str(tmp_path / "b.safetensors")])
    assert "was not written by pae" in line


# ---- which run


def test_of_a_comparison_the_best_on_validation_is_taken(runs, tmp_path, capsys):
    results = {m: RunFolder(runs / m).result()["val_accuracy"] for m in METHODS}
    best = max(sorted(results), key=results.get)  # of equals the first by name
    place = using.find(runs)
    assert place.file == runs / best / "best.safetensors"
    assert f"holds 3 runs: taking {best}" in place.note
    assert using.find(runs / best, "last").file.name == "last.safetensors"
    (tmp_path / "empty").mkdir()
    for name, words in (("empty", "holds no best.safetensors"), ("gone", "no such file or folder")):
        with pytest.raises(ValueError, match=words):
            using.find(tmp_path / name)


# ---- predict


def test_predictions_as_csv(runs, shades, tmp_path):
    out = tmp_path / "preds.csv"
    command = ["predict", str(runs / "vpt-deep"), str(shades / "test"), "--output", str(out)]
    assert main([*command, "--quiet", "--top", "2", "--batch-size", "4"]) == 0
    rows = table(out)
    model = pae.load(runs / "vpt-deep")
    assert [row["image"] for row in rows] == sorted(map(str, (shades / "test").rglob("*.png")))
    for row in rows:
        values, order = (
            model(model.transform(row["image"])[None])[0].softmax(0).sort(descending=True)
        )
        assert [row["class_1"], row["class_2"]] == [model.classes[i] for i in order[:2]]
        assert abs(float(row["probability_2"]) - float(values[1])) < 2e-6 and row["error"] == ""
    before = out.read_bytes()
    assert main([*command, "--quiet", "--top", "2", "--batch-size", "32", "--workers", "0"]) == 0
    assert [r["class_1"] for r in table(out)] == [r["class_1"] for r in rows]
    assert len(out.read_bytes()) == len(before)


def test_unreadable_images_are_named_and_counted(runs, shades, tmp_path, capsys):
    folder = shutil.copytree(shades / "test", tmp_path / "images")
    (folder / "dark" / "00.png").write_text("<html>")
    (folder / "light" / "01.jpg").touch()
    (folder / "notes.txt").write_text("mine")
    command = ["predict", str(runs / "vpt-deep"), str(folder), "--output", str(tmp_path / "a.csv")]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "00.png could not be read: it is a web page; download the image again" in err
    assert "01.jpg could not be read: the file is empty" in err
    assert "2 of 16 images could not be read" in err and "1 files without a suffix" in err
    bad = [row for row in table(tmp_path / "a.csv") if row["error"]]
    assert [row["class_1"] for row in bad] == ["", ""] and len(table(tmp_path / "a.csv")) == 16
    assert main(["predict", str(runs / "vpt-deep"), str(folder / "dark" / "00.png")]) == 1
    assert "1 of 1 images could not be read" in capsys.readouterr().err


def test_files_folders_and_patterns(shades, tmp_path, monkeypatch):
    monkeypatch.chdir(shades)
    files, others = using.expand(["test/dark/01.png", "test/*/00.png", "test/dark", "test"])
    names = [str(f) for f in files]
    assert names[:4] == [f"test/{n}.png" for n in ("dark/01", "dark/00", "light/00", "middle/00")]
    assert len(files) == 15 and others == 0  # none twice
    assert len(using.expand(["**/*.png"])[0]) == 15 + 36
    assert [f.name for f in using.expand(["te*"])[0]] == [f"{i:02d}.png" for i in range(5)] * 3
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "sub" / ".hidden" / "a.png")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path / "sub")
    with pytest.raises(ValueError, match="no image in it"):
        using.expand([str(tmp_path / "sub")])
    for name in ("gone.png", "gone/*.png"):
        with pytest.raises(ValueError, match=r"gone.*: no such file, folder or pattern"):
            using.expand([name])


def test_what_cannot_be_written_is_said_before_the_work(
    runs, shades, tmp_path, capsys, monkeypatch
):
    run, images, file = str(runs / "vpt-deep"), str(shades / "test"), tmp_path / "file"
    file.touch()
    monkeypatch.setattr(using.Transform, "pixels", None)  # nothing is worked on
    for output in (file / "x", "/dev/null", tmp_path / ("x" * 300)):
        for command in (["predict", run, images], ["evaluate", run, "--data", images]):
            line = error_line(capsys, [*command, "--output", str(output)])
            assert f"--output {output} cannot be written (" in line
            assert line.endswith("); give another one")
        line = error_line(capsys, ["export", run, "--output", str(output)])
        assert f"--output {output} cannot be written (" in line
    with pytest.raises(OSError, match="no regular file; give another name"):
        write_atomically("/dev/null", lambda file: file.touch())
    assert not os.listdir(tmp_path)[1:]


def test_deep_images_where_training_had_none(runs, tmp_path, capsys):
    Image.fromarray(np.full((9, 9), 999, np.uint16)).save(tmp_path / "deep.png")
    assert main(["predict", str(runs / "linear"), str(tmp_path)]) == 1
    assert "999, more than 8 bits, and those of the training images were not" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_run_whose_checkpoint_was_moved(runs, tmp_path):
    shutil.copytree(runs / "linear", tmp_path / "run")
    (tmp_path / "run" / "best.safetensors").rename(tmp_path / "mine.safetensors")
    assert using.find(tmp_path / "mine.safetensors").run is None
    with pytest.raises(ValueError, match="or it was moved; give the file itself"):
        using.find(tmp_path / "run")


def test_of_a_sweep_the_best_on_validation_is_taken(tmp_path):
    records = Records(tmp_path)
    (tmp_path / "sweep.json").touch()
    with pytest.raises(ValueError, match="a sweep without a validated run; give one of its runs"):
        using.find(tmp_path)
    for key, task, val in [("k", "a", 0.5), ("l", "a", 0.7), ("m", "a", 0.9), ("n", "a", None)]:
        more = {"settings": {}, "images": {}, "test": None, "reason": None, "method": "bpt"}
        records.write({"key": key, "status": "finished", "task": task, "val": val, **more})
        if key != "m":
            (records.path(key) / "best.safetensors").touch()
    place = using.find(tmp_path)
    assert place.file == records.path("l") / "best.safetensors"
    assert "taking l (bpt), the best on validation images (0.700)" in place.note
    records.write({**records["k"], "task": "b"})
    with pytest.raises(ValueError, match=f"of 2 tasks; .*the best of b is {records.path('k')}"):
        using.find(tmp_path)


def test_bad_commands_cost_one_line(runs, shades, tmp_path, capsys):
    run, images = str(runs / "vpt-deep"), str(shades / "test")
    for command, words in (
        (["predict", run, images, "--output", str(tmp_path)], "written (no regular file); give"),
        (["export", run, "--output", str(tmp_path)], "written (no regular file); give"),
        (["evaluate", run, "--data", images, "--output", f"{run}/config.json"], "(no folder);"),
        (["predict", run, images, "--top", "0"], "--top 0: expected an integer from 1"),
        (["predict", str(tmp_path / "gone"), images], "gone: no such file or folder"),
        (["predict", run, images, "--classes", "a,,b"], "expected a file, or names, each once"),
        (["evaluate", run], "needs --data FOLDER"),
        (["evaluate", run, "--data", str(tmp_path / "gone")], "no such folder"),
        (["evaluate", run, "--data", str(shades), "--split", "val"], "has no val split"),
        (["predict", run], "the following arguments are required: IMAGES"),
    ):
        assert words in error_line(capsys, command), command


# ---- evaluate


@pytest.mark.parametrize(
    "hits, count, low, high",  # R: prop.test(correct = FALSE), binom::binom.wilson
    [(5, 10, 0.2365931, 0.7634069), (10, 10, 0.7224672, 1), (0, 10, 0, 0.2775328), (0, 0, 0, 1)],
)
def test_interval_of_a_share(hits, count, low, high):
    assert evaluation.wilson(hits, count) == pytest.approx((low, high), abs=1e-6)


def test_interval_covers_the_share_that_was_drawn_from():
    for share in (0.5, 0.9, 0.98):
        hits = torch.binomial(
            torch.full((20_000,), 200.0),
            torch.full((20_000,), share),
            generator=torch.Generator().manual_seed(0),
        )
        inside = [
            low <= share <= high for low, high in (evaluation.wilson(int(h), 200) for h in hits)
        ]
        assert 0.93 < sum(inside) / len(inside) < 0.975


def test_evaluation_of_a_folder(runs, shades, tmp_path, capsys):
    command = ["evaluate", str(runs / "vpt-deep"), "--data", str(shades), "--quiet"]
    assert main(command) == 0
    folder = runs / "vpt-deep" / "evaluation-shades-test"
    record = json.loads((folder / "evaluation.json").read_text())
    result = RunFolder(runs / "vpt-deep").result()
    assert record["accuracy"] == result["test_accuracy"] and record["images"] == 15
    assert (record["low"], record["high"]) == evaluation.wilson(record["correct"], 15)
    assert record["split"] == "test" and record["unread"] == []
    assert f"({record['correct']} of 15; 95 % interval" in capsys.readouterr().out
    said = table(folder / "predictions.csv")
    confusion = table(folder / "confusion.csv")
    for row in confusion:
        for other in ("dark", "light", "middle"):
            count = sum(r["label"] == row["class"] and r["predicted"] == other for r in said)
            assert int(row[other]) == count
    for row in table(folder / "per_class.csv"):
        own = [r for r in said if r["label"] == row["class"]]
        taken = [r for r in said if r["predicted"] == row["class"]]
        hits = sum(r["predicted"] == row["class"] for r in own)
        assert (int(row["images"]), int(row["correct"])) == (5, hits)
        assert float(row["accuracy"]) == hits / 5
        assert row["precision"] == ("" if not taken else str(hits / len(taken)))
    with Image.open(folder / "confusion.png") as picture:
        assert min(picture.size) > 400 and len(picture.getcolors(10**6)) > 20
    # class folders alone, of which some are not there, and in another order than the model's
    part = tmp_path / "part"
    for name in ("middle", "light"):
        shutil.copytree(shades / "test" / name, part / name)
    assert main([*command[:2], "--data", str(part), "--output", str(tmp_path / "ev")]) == 0
    kept = [r for r in said if r["label"] != "dark"]
    again = json.loads((tmp_path / "ev" / "evaluation.json").read_text())
    assert again["split"] == "all" and again["images"] == 10
    assert again["correct"] == sum(r["label"] == r["predicted"] for r in kept)
    assert table(tmp_path / "ev" / "per_class.csv")[0]["accuracy"] == ""  # of no dark image


def test_names_are_one_however_unicode_writes_them():
    composed, apart = ["\u00e9t\u00e9", "x"], ["x", "e\u0301te\u0301"]
    assert using.match(composed, apart, "d") == using.match(apart, composed, "d") == [1, 0]
    both = ["e\u0301", "\u00e9"]  # a model may have been trained on both
    assert using.match(both, both[::-1], "d") == [1, 0]
    with pytest.raises(ValueError, match="d: class 'y' is none of the model's 2"):
        using.match(both, ["y"], "d")


def test_a_pipe_among_images_is_not_waited_for(runs, shades, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "broken.png").symlink_to("nowhere")
    shutil.copy(shades / "test" / "dark" / "00.png", tmp_path)
    assert main(["predict", str(runs / "linear"), str(tmp_path)]) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "pipe.jpg could not be read: no regular file" in err
    assert "broken.png could not be read: No such file" in err and "2 of 3 images" in err


def test_names_of_classes_are_no_formulas(tmp_path):
    names = ["a$b_{$", "$5"]
    evaluation.plot_confusion(tmp_path / "c.png", names, torch.eye(2, dtype=torch.long), "t")
    assert (tmp_path / "c.png").is_file()


def test_labels_are_matched_by_name(runs, shades, tmp_path, capsys):
    other = shutil.copytree(shades / "test", tmp_path / "other")
    (other / "dark").rename(other / "drak")
    line = error_line(capsys, ["evaluate", str(runs / "vpt-deep"), "--data", str(other)])
    assert "class 'drak' is none of the model's 3; did you mean dark?" in line
    model = pae.load(runs / "vpt-deep")
    images, split = evaluation.read_labelled(shades, ["middle", "dark", "x", "light"], None)
    assert split == "test" and images.labels == [1] * 5 + [3] * 5 + [0] * 5
    train_only = tmp_path / "only"
    shutil.copytree(shades / "train", train_only / "train")
    with pytest.raises(ValueError, match="neither a test nor a val split"):
        evaluation.read_labelled(train_only, model.classes, None)
    assert evaluation.read_labelled(train_only, model.classes, "train")[1] == "train"


def test_unreadable_labelled_images_count_nowhere(runs, shades):
    model = pae.load(runs / "vpt-deep")
    items = [shades / "test" / "dark" / "00.png", shades / "gone.png"]
    found = evaluation.evaluate(model, Images(items, [0, 1]))
    assert found.count == 1 and [item for item, _ in found.unread] == items[1:]
    assert "1 images could not be read" in found.summary()
    assert found.rows[1]["predicted"] is None and "No such file" in found.rows[1]["error"]


# ---- export


def trained(family, **changes):
    """A model with prompts of trained size, of few pixels and blocks."""
    vit = tiny.backbone(dtype=torch.float32, depth=2, **changes)
    model = pae.PromptedViT(vit, family).eval().requires_grad_(False)
    for p in model.prompts.parameters():
        p.add_(0.3 * torch.randn_like(p))
    model.task = pae.TaskInfo(classes=tuple("abcde"))
    return model


def test_export_to_onnx(tmp_path):
    import onnxruntime

    model, path = trained(pae.prompts.VPTDeep(3)), tmp_path / "new" / "a.onnx"
    assert export(model, torch.randn(3, 3, 16, 16), path, "onnx") < 1e-6
    assert [f.name for f in path.parent.iterdir()] == ["a.onnx"]
    session = onnxruntime.InferenceSession(str(path))
    about = session.get_modelmeta().custom_metadata_map["pae"]
    assert json.loads(about)["classes"] == list("abcde")
    for count in (1, 2, 7):
        images = torch.randn(count, 3, 16, 16)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_export_of_a_run(runs, shades, tmp_path, capsys, method):
    """Compared on images of its own data; one of another path where there is no run beside it."""
    out = str(tmp_path / "a.pt2")
    command = ["export", str(runs / method), "--format", "torch-export", "--output", out]
    assert main([*command, "--quiet"]) == 0
    assert "logits of 7 images differ by at most" in capsys.readouterr().out
    extra = {"pae.json": ""}
    program = torch.export.load(out, extra_files=extra).module()
    assert json.loads(extra["pae.json"])["classes"] == ["dark", "light", "middle"]
    model = pae.load(runs / method)
    images = torch.stack([model.transform(path) for path in read_folder(shades).test.items])
    torch.testing.assert_close(program(images), model(images), rtol=0, atol=1e-5)


def test_export_without_images_is_refused(runs, shades, alone, capsys):
    command = ["export", alone("linear"), "--format", "torch-export", "--quiet"]
    assert "give --images, real ones to compare on" in error_line(capsys, command)
    image = str(shades / "test" / "dark" / "00.png")
    assert main([*command, "--images", image]) == 0
    assert Path(alone("linear")).with_suffix(".pt2").is_file()


def test_what_cannot_be_exported_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    class Reads(pae.prompts.VPTDeep):
        def block_prompts(self, index, x):
            rows = super().block_prompts(index, x)
            return rows + 1 if float(rows.sum()) > 0 else rows

    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match="Reads cannot be exported: "):
        export(trained(Reads(3)), images, tmp_path / "a.pt2", "torch-export")
    for family in (pae.prompts.VAPT, pae.prompts.E2VPT):
        with pytest.raises(ValueError, match=f"^{family.__name__} cannot be exported: "):
            export(trained(tiny.small(family)), images, tmp_path / "a.pt2", "torch-export")
    model, path = trained(pae.prompts.VPTDeep(3)), tmp_path / "b.pt2"
    path.write_text("former")
    load = torch.export.load
    with monkeypatch.context() as patch:
        # all logits a little off, one image alone, and none at all
        for off in (lambda y: y + 3e-5, lambda y: y + (len(y) == 1), lambda y: y * torch.nan):

            class Off:
                def __init__(self, file, off=off):
                    self.module = lambda: lambda x: off(load(file).module()(x))

            patch.setattr(torch.export, "load", Off)
            with pytest.raises(ArithmeticError, match="VPTDeep gives logits that differ by"):
                export(model, images, path, "torch-export")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ImportError, match=r'needs onnxscript: pip install "pae\[export\]"'):
            export(model, images, path, "onnx")
    for wrong, words in (((images, "tflite"), "format must be"), ((images[:1], "onnx"), "two")):
        with pytest.raises(ValueError, match=words):
            export(model, wrong[0], path, wrong[1])
    assert path.read_text() == "former" and [f.name for f in tmp_path.iterdir()] == ["b.pt2"]


# ---- the hub


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("vit_base_patch16_224.augreg_in21k", "timm/vit_base_patch16_224.augreg_in21k"),
        ("hf:facebook/dinov2-base", "facebook/dinov2-base"),
        ("hf-hub:timm/vit_base_patch16_224", "timm/vit_base_patch16_224"),
        ("hf:my-folder.v2", None),
        ("local-dir:vit.v2", None),
        ("open_clip:ViT-B-32/openai", None),
        ("test_vit", None),
    ],
)
def test_a_card_names_the_backbone_of_the_hub_where_it_is_there(name, base, tmp_path):
    card = hub.model_card(bare(tmp_path, classes=tuple("abcde"), backbone={"model": name}))
    lines = [line for line in card.splitlines() if line.startswith("base_model:")]
    assert lines == ([] if base is None else [f"base_model: {base}"]) and name in card


def test_a_whole_model_is_not_pushed(runs):
    with pytest.raises(ValueError, match=r"full.best\.safetensors holds a whole model, and no"):
        pae.push_to_hub(runs / "full", "me/a")


# ---- info


def test_info(runs, alone, capsys):
    assert main(["info", alone("vpt-deep")]) == 0
    out = capsys.readouterr().out
    for words in ("VPTDeep", "dark, light, middle", "test_vit", "32 x 32", "mean=[0.485"):
        assert words in out
    assert main(["info", str(runs / "full"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = pae.load(runs / "full")
    assert found["method"] == "full fine-tuning" and found["classes"] == list(model.classes)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["result"] == RunFolder(runs / "full").result()


def test_commands_show_their_help_without_torch(capsys):
    for name in ("predict", "evaluate", "info"):
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "%(" not in text and max(map(len, text.splitlines())) < 160
