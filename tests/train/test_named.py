"""Models of other libraries by name: what is loaded, what is refused, and runs with them."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import pae
from pae.backbones import named
from pae.train import clips, methods, pixels, using
from pae.train.cli import main
from pae.train.images import Ranges
from pae.train.models import survey
from pae.train.options import Options
from tests import libraries
from tests.train import moving
from tests.train.helpers import CPU_FLAGS, error_line, save_shades

transformers = pytest.importorskip("transformers", reason="pip install pae[hf]")
open_clip = pytest.importorskip("open_clip", reason="pip install pae[clip]")

PREPROCESSING = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.5]}
PREPROCESSING |= {"do_resize": True, "resample": 3, "size": {"shortest_edge": 20}}
PREPROCESSING |= {"do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
PREPROCESSING |= {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "image_processor_type": "ViTImageProcessor",
}


def saved(name, folder, processing=PREPROCESSING):
    """hf:FOLDER of one of `libraries.MODELS`, and the model."""
    model = libraries.model(name, torch.float32)
    model.save_pretrained(folder)
    if processing is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    return f"hf:{folder}", model


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("shades"), train=6, test=3, size=(16, 18))


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """A folder of moving squares."""
    root = tmp_path_factory.mktemp("walks")
    for split, count, seed in (("train", 16, 0), ("test", 8, 1)):
        for i, (clip, label) in enumerate(zip(*moving.draw(count, seed))):
            folder = root / split / moving.CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{i:02}.npy", clip[:, :16, :16])
    return root


KINDS = ("ViT", "ViT, no pooler", "DeiT, classes", "DINOv2, registers, classes", "DINOv3", "CLIP")
KINDS += ("SigLIP, classes", "MAE", "BEiT", "VideoMAE, classes", "ViViT, classes")


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_folder_is_the_model(name, tmp_path):
    place, model = saved(name, tmp_path / "its name")
    said = []
    found = named.load_named(place, say=said.append)
    assert type(found) is type(model) and next(found.parameters()).dtype == torch.float32
    state = model.state_dict()
    own = found.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)
    assert bool(said) == (name == "ViT, no pooler")
    skeleton = named.load_named(place, skeleton=True)
    assert all(p.device.type == "meta" for p in skeleton.parameters())
    config = found.pretrained_cfg
    assert config["mean"] == (0.5, 0.4, 0.3) and config["std"] == (0.2, 0.25, 0.5)
    assert config["input_size"] == (3, 16, 16) and config["interpolation"] == "bicubic"
    assert (config["crop_pct"], config["crop_mode"]) == (0.8, "center")
    assert pae.checkpoint.backbone_name(found) == f"{type(model).__name__}.its name"
    assert named.frames_of(place) == (4 if name.startswith(libraries.CLIPS) else None)


def test_what_stands_around_a_backbone_is_left_out(tmp_path):
    """Decoders, text towers and classifiers, in one line; a norm that the file lacks is new."""
    mae = transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**libraries.VIDEO))
    mae.save_pretrained(tmp_path / "mae")
    said = []
    model = named.load_named(f"hf:{tmp_path / 'mae'}", say=said.append)
    assert type(model).__name__ == "VideoMAEForVideoClassification"
    assert all(
        torch.equal(p, model.videomae.state_dict()[n]) for n, p in mae.videomae.state_dict().items()
    )
    assert said[0].endswith("mae: a new norm behind the mean of the rows")
    assert "not taken of the file: " in said[1] and "decoder" in said[1] and "\n" not in said[1]
    clip = transformers.CLIPModel(transformers.CLIPConfig(**libraries.TOWERS))
    clip.save_pretrained(tmp_path / "clip")
    model = named.load_named(f"hf:{tmp_path / 'clip'}", say=said.append)
    assert type(model).__name__ == "CLIPVisionModel" and "text_model" in said[2]
    x = libraries.images(2).float()
    expected = clip.vision_model.eval()(x).pooler_output
    assert torch.allclose(model.eval()(x).pooler_output, expected, rtol=1e-5, atol=1e-6)


def test_weights_that_lack_a_part_are_refused(tmp_path):
    place, model = saved("DINOv2", tmp_path)
    state = {n: p for n, p in model.state_dict().items() if "layer.1." not in n}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"the weights lack encoder\.layer\.1\..* and \d+ more"):
        named.load_named(place)


def test_older_files_of_preprocessing(tmp_path):
    place, _ = saved("ViT", tmp_path, PREPROCESSING | {"size": 20, "crop_size": 16})
    config = named.load_named(place, skeleton=True).pretrained_cfg
    assert (config["crop_pct"], config["crop_mode"]) == (0.8, "center")
    saved("ViT", tmp_path, PREPROCESSING | {"size": 16, "do_center_crop": False})
    config = named.load_named(place, skeleton=True).pretrained_cfg
    assert (config["crop_pct"], config["crop_mode"]) == (1.0, "squash")


@pytest.mark.parametrize(
    ("scheme", "mean", "std"),
    [
        ({"do_normalize": False}, (0, 0, 0), (1, 1, 1)),
        ({"rescale_factor": 1 / 127.5, "offset": True}, (0.75, 0.7, 0.65), (0.1, 0.125, 0.25)),
    ],
)
def test_how_images_are_normalised(scheme, mean, std, tmp_path):
    """ViViT's files have its values between -1 and 1 before mean and deviation."""
    place, _ = saved("ViT", tmp_path, PREPROCESSING | scheme)
    config = named.load_named(place, skeleton=True).pretrained_cfg
    assert config["mean"] == pytest.approx(mean) and config["std"] == pytest.approx(std)


def test_a_run_on_a_folder_of_transformers(shades, tmp_path, capsys):
    """Trained, tested, gone on with from its checkpoint, and the same on both engines."""
    place, _ = saved("DINOv2, classes", tmp_path / "model")
    flags = ["train", "--data", str(shades), "--model", place, "--quiet", *CPU_FLAGS]
    flags += ["--method", "vpt-deep", "--num-tokens", "2", "--epochs", "1", "--batch-size", "6"]
    results = []
    for engine in ("fast", "reference"):
        out = tmp_path / engine
        assert main([*flags, "--engine", engine, "--output", str(out)]) == 0
        results.append(json.loads((out / "metrics.json").read_text())["epochs"])
    for ours, theirs in zip(*results, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
    found = pae.read_checkpoint(tmp_path / "fast" / "best.safetensors")
    assert found.backbone == "Dinov2ForImageClassification.model"
    assert found.task.input_size == (3, 16, 16) and found.task.mean == (0.5, 0.4, 0.3)
    backbone = named.load_named(place)
    model = pae.PromptedViT.from_file(tmp_path / "fast" / "best.safetensors", backbone)
    assert model.num_classes == 3 and model.head.in_features == 64
    used = pae.load(tmp_path / "fast")
    images = torch.stack([used.transform(p) for p in sorted(shades.glob("test/*/*.png"))])
    model.eval()
    assert torch.equal(used(images), model(images))
    (capsys.readouterr(), main(["predict", str(tmp_path / "fast"), str(shades / "test")]))
    assert "dark" in capsys.readouterr().out
    other, _ = saved("DINOv2", tmp_path / "other")
    with pytest.raises(pae.CheckpointError, match=r"trained on backbone Dinov2ForImageClassific"):
        pae.PromptedViT.from_file(tmp_path / "fast" / "best.safetensors", named.load_named(other))
    capsys.readouterr()


def test_models_without_a_place_for_a_head(shades, tmp_path, capsys):
    """They get one, initialised as the options say; another size where they take it."""
    place, _ = saved("CLIP", tmp_path / "model")
    flags = ["train", "--data", str(shades), "--model", place, "--quiet", *CPU_FLAGS]
    flags += ["--epochs", "1", "--batch-size", "9", "--img-size", "24"]
    for method, init in (("linear", "default"), ("vpt-shallow", "vpt")):
        out = str(tmp_path / method)
        assert main([*flags, "--method", method, "--head-init", init, "--output", out]) == 0
    capsys.readouterr()


def test_a_run_on_clips(walks, tmp_path, capsys):
    place, _ = saved("VideoMAE, classes", tmp_path / "model")
    flags = ["train", "--data", str(walks), "--model", place, "--quiet", *CPU_FLAGS]
    flags += ["--epochs", "1", "--batch-size", "8"]
    deep = ["--method", "vpt-deep", "--train-backbone", "fc_norm.*", "--spt", "random"]
    crop = ["--augment", "crop"]
    apt = ["--config", "apt-video", "--num-tokens", "4"]
    for more in ([*deep, *crop], ["--method", "linear", *crop], apt):
        assert main([*flags, *more, "--output", str(tmp_path / more[1])]) == 0
    assert pae.read_checkpoint(tmp_path / "apt-video" / "last.safetensors").prompts["name"] == "APT"
    found = pae.read_checkpoint(tmp_path / "vpt-deep" / "best.safetensors")
    assert found.train_backbone == ("fc_norm.weight", "fc_norm.bias")
    assert found.task.classes == ("left", "right")
    used = pae.load(tmp_path / "vpt-deep")
    file = next(walks.glob("test/left/*.npy"))
    clip = used.transform(file)
    assert clip.shape == (4, 3, 16, 16) and torch.equal(clip, used.transform(np.load(file)))
    assert used(clip[None]).shape == (1, 2)
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "vpt-deep"), str(file)]) == 0
    assert "left" in capsys.readouterr().out
    line = error_line(capsys, [*flags, "--method", "vpt-deep", "--mpa"])
    assert "--mpa: model takes clips of 4 frames, and Modal Pre-Alignment" in line
    line = error_line(capsys, ["train", "--model", place, "--method", "apt", *CPU_FLAGS])
    assert "it reads clips, and digits is one of images; give --data FOLDER with" in line
    line = error_line(capsys, [*flags, "--method", "vapt"])
    assert "(VAPT) convolves a grid of patches, and the backbone's are 2 x 4 x 4 tubes" in line


def test_predicting_and_evaluating_clips(walks, tmp_path, capsys):
    """Folders, patterns, files and class folders of .npy files; what is none is named."""
    place, model = saved("VideoMAE, classes", tmp_path / "model")
    run = ["train", "--data", str(walks), "--model", place, "--quiet", *CPU_FLAGS, "--method"]
    assert main([*run, "linear", "--epochs", "1", "--output", str(tmp_path / "run")]) == 0
    model = pae.load(tmp_path / "run")
    mixed = tmp_path / "mixed"
    shutil.copytree(walks / "test", mixed)
    (mixed / "notes.txt").write_text("no clip")
    np.save(mixed / "left" / "short.npy", np.zeros((2, 8, 8, 3), np.uint8))
    (mixed / "left" / "raw.mp4").write_bytes(b"video")
    capsys.readouterr()
    table = tmp_path / "out.csv"
    assert main(["predict", str(tmp_path / "run"), str(mixed), "--output", str(table)]) == 1
    err = capsys.readouterr().err
    assert "2 files other than .npy are left out" in err
    assert f"{mixed / 'left' / 'short.npy'} could not be read: 2 frames, and the model" in err
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 9 and [bool(row["error"]) for row in rows].count(True) == 1
    for row in rows:
        if not row["error"]:
            shares = model(model.transform(Path(row["image"]))[None]).softmax(1)[0]
            assert row["class_1"] == model.classes[int(shares.argmax())]
            assert float(row["probability_1"]) == pytest.approx(float(shares.max()), abs=1e-5)
    assert main(["predict", str(tmp_path / "run"), str(mixed / "*" / "raw.mp4")]) == 1
    assert "pae decodes no video: np.save its frames" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    line = error_line(capsys, ["predict", str(tmp_path / "run"), str(tmp_path / "empty")])
    assert "no clip (.npy) in it" in line
    out = tmp_path / "clips.pt2"
    export = ["export", str(tmp_path / "run"), "--format", "torch-export", "--output", str(out)]
    assert main(export) == 0
    clip = torch.stack([model.transform(p) for p in sorted(walks.glob("test/*/*.npy"))])
    assert torch.allclose(torch.export.load(out).module()(clip), model(clip), rtol=0, atol=1e-5)
    # labelled ones: a split of a training folder, and class folders alone
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())["result"]
    for data, split in ((walks, "test"), (walks / "test", "all")):
        assert main(["evaluate", str(tmp_path / "run"), "--data", str(data), "--quiet"]) == 0
        folder = next((tmp_path / "run").glob(f"evaluation-{data.name}-{split}"))
        found = json.loads((folder / "evaluation.json").read_text())
        assert found["images"] == 8 and found["accuracy"] == pytest.approx(result["test_accuracy"])
    capsys.readouterr()
    (mixed / "notes.txt").unlink()
    line = error_line(capsys, ["evaluate", str(tmp_path / "run"), "--data", str(mixed)])
    assert "raw.mp4: pae decodes no video" in line
    (mixed / "left" / "raw.mp4").unlink()
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(mixed)]) == 1
    assert "1 images could not be read" in capsys.readouterr().out
    (mixed / "left").rename(mixed / "up")
    line = error_line(capsys, ["evaluate", str(tmp_path / "run"), "--data", str(mixed)])
    assert "class 'up' is none of the model's 2 ('left', 'right')" in line
    line = error_line(
        capsys, ["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "empty")]
    )
    assert "expected <class>/*.npy for a model of clips" in line


WHOLE = ("DINOv2, classes", "CLIP", "MAE", "BEiT, classes", "SigLIP", "VideoMAE, classes")


@pytest.mark.parametrize("name", WHOLE)
def test_all_weights_are_trained(name, tmp_path):
    """The model's own forward, a gradient for all that it reads, and back from a file."""
    place, _ = saved(name, tmp_path / "model")
    options = Options(model=place, method="full")
    full = methods.build_method(options, 3)
    frozen = pae.PromptedViT(
        named.load_named(place), pae.prompts.VPTDeep(0), num_classes=3
    )  # the definition on the same weights
    frozen.head.load_state_dict(full.classifier.state_dict())
    x = libraries.images(2, name=name).float()
    full.eval()
    logits = full(x)
    assert logits.shape == (2, 3) and full.num_classes == 3
    assert torch.allclose(logits, frozen(x), rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    without = [n for n, p in full.named_parameters() if p.grad is None]
    assert all("mask_token" in n for n in without), without
    assert not any(full.get_parameter(n).requires_grad for n in without)
    groups = {g["weight_decay"]: g["params"] for g in full.parameter_groups(0.1, 0.2)}
    names = {id(p): n for n, p in full.named_parameters()}
    assert sum(map(len, groups.values())) == len(names) - len(without)
    decayed = [names[id(p)] for p in groups[0.2]]
    assert all(n.endswith("weight") and "position_embedding" not in n for n in decayed)
    assert not [n for n in decayed if "norm" in n] and len(decayed) > 15
    full.task = pae.TaskInfo(classes=("a", "b", "c"), backbone=methods.recipe(options))
    with torch.no_grad():
        for p in full.parameters():
            p.add_(0.01)
    full.save(tmp_path / "whole.safetensors")
    again = pae.load(tmp_path / "whole.safetensors")
    assert again.classes == ("a", "b", "c") and not again.training
    assert torch.allclose(again(x), full(x), rtol=1e-5, atol=1e-6)


def test_a_run_that_trains_all_weights(shades, tmp_path, capsys):
    """With dropped blocks, gone on with, and predicted with; the same of clips."""
    place, _ = saved("DINOv2, classes", tmp_path / "model")
    run = ["train", "--data", str(shades), "--model", place, "--quiet", *CPU_FLAGS]
    run += ["--epochs", "2", "--batch-size", "6", "--lr", "0.001"]
    full = [*run, "--method", "full", "--drop-path", "0.2", "--backbone-dropout", "0.1"]
    assert main([*full, "--output", str(tmp_path / "full")]) == 0
    model = pae.load(tmp_path / "full")
    rates = [p.drop_prob for p in model.modules() if type(p).__name__ == "Dinov2DropPath"]
    assert not rates  # what is loaded drops nothing
    own = named.load_named(place, drop_path=0.2, backbone_dropout=0.1)
    assert max(p.drop_prob for p in own.modules() if hasattr(p, "drop_prob")) == 0.2
    assert {p.p for p in own.modules() if type(p) is torch.nn.Dropout} == {0.1}
    files = sorted(shades.glob("test/*/*.png"))
    shares = [said.probabilities for said in using.predictions(model, files)]
    assert len(shares) == 9 and all(share.isfinite().all() for share in shares)
    prompts = [*run, "--method", "vpt-deep", "--engine", "reference", "--drop-path", "0.2"]
    assert main([*prompts, "--output", str(tmp_path / "vpt")]) == 0
    capsys.readouterr()


def test_weights_of_a_file(shades, tmp_path, capsys):
    """Of the same class, nested as other people's files are; what they lack is named."""
    place, _ = saved("ViT", tmp_path / "model")
    made = libraries.MODELS["ViT"]()
    file = tmp_path / "other.pth"
    torch.save({"epoch": 3, "state_dict": made.state_dict()}, file)
    found = named.load_named(place, weights=file).state_dict()
    assert all(torch.equal(found[key], t) for key, t in made.state_dict().items())
    run = ["train", "--data", str(shades), "--model", place, "--quiet", *CPU_FLAGS]
    run += ["--epochs", "1", "--batch-size", "9", "--method", "vpt-deep", "--weights", str(file)]
    assert main([*run, "--output", str(tmp_path / "run")]) == 0
    key = next(key for key in found if key.endswith("layer.1.output.dense.weight") or
               key.endswith("layers.1.mlp.fc2.weight"))  # fmt: skip
    state = pae.load(tmp_path / "run").backbone.state_dict()
    assert torch.equal(state[key], made.state_dict()[key])
    lacking = {n: t for n, t in made.state_dict().items() if n != key}
    torch.save(lacking, file)
    with pytest.raises(ValueError, match=rf"other\.pth: the weights lack {re.escape(key)}$"):
        named.load_named(place, weights=file)
    torch.save([1, 2], file)
    with pytest.raises(pae.CheckpointError, match=r"weights .*other\.pth: expected a state dict"):
        named.load_named(place, weights=file)
    capsys.readouterr()


def test_frames_are_drawn_alike(walks):
    """A crop is the same in all frames of a clip, and another one in the next epoch."""
    task = clips.read_clips(walks, 4)
    assert (len(task.train), len(task.val), len(task.test)) == (13, 3, 8)
    transform, is_random = pixels.make_transform("crop", True, 8, "bicubic")
    items = clips.Images(task.train.items[:1], [0])
    still = np.repeat(np.load(items.items[0])[:1], 4, axis=0)
    np.save(items.items[0].with_name("still.npy"), still)
    try:
        items = clips.Images([items.items[0].with_name("still.npy")], [0])
        split = pixels.PixelSplit(items, transform, is_random, ranges=Ranges(), frames=4)
        first = split.__getitems__(torch.tensor([0]))[0]
        assert first.shape == (1, 4, 3, 8, 8) and torch.equal(first, first[:, :1].expand_as(first))
        split.epoch = 1
        assert not torch.equal(split.__getitems__(torch.tensor([0]))[0], first)
    finally:
        items.items[0].unlink()


def test_frames_are_evenly_spaced(tmp_path):
    np.save(
        tmp_path / "a.npy",
        np.arange(10, dtype=np.uint8)[:, None, None] + np.zeros((1, 2, 3), np.uint8),
    )
    taken = [int(frame[0, 0]) for frame in clips.read_frames(tmp_path / "a.npy", 4)]
    assert taken == [1, 3, 6, 8]
    assert [int(f[0, 0]) for f in clips.read_frames(tmp_path / "a.npy", 10)] == list(range(10))


GOOD = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.mp4", b"video", r"a\.mp4: pae decodes no video: np\.save its frames"),
        ("a.png", b"image", r"a\.png: expected \.npy files of clips alone"),
        ("a.npy", b"text", r"unreadable clip .*a\.npy"),
        ("a.npy", GOOD[:2], r"a\.npy: 2 frames, and the model reads 4"),
        ("a.npy", GOOD / 2, r"a\.npy: float64 \(4, 8, 8, 3\), expected uint8"),
        ("a.npy", GOOD.transpose(0, 3, 1, 2), r"uint8 \(4, 3, 8, 8\), expected uint8"),
        ("a.npy", np.array([{}], dtype=object), r"unreadable clip .*a\.npy"),
    ],
)
def test_what_is_no_clip_is_named(name, content, message, tmp_path):
    for kind in ("one", "two"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        for i in range(8):
            np.save(tmp_path / "train" / kind / f"{i}.npy", GOOD)
    clips.read_clips(tmp_path, 4)
    file = tmp_path / "train" / "one" / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    with pytest.raises(ValueError, match=message) as caught:
        clips.read_clips(tmp_path, 4)
    assert "\n" not in str(caught.value)


def test_other_layouts_are_refused(tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError, match=r"expected train/<class>/\*\.npy for a model of clips"):
        clips.read_clips(tmp_path, 4)
    with pytest.raises(ValueError, match="no such folder"):
        clips.read_clips(tmp_path / "none", 4)
    (tmp_path / "train").mkdir()
    shutil.move(tmp_path / "one", tmp_path / "train")
    with pytest.raises(ValueError, match="one: class without clips"):
        clips.read_clips(tmp_path, 4)


def test_refusals(shades, tmp_path, capsys):
    flags = ["train", "--data", str(shades), "--method", "vpt-deep", *CPU_FLAGS]
    place, _ = saved("ViT", tmp_path / "model", processing=None)
    line = error_line(capsys, [*flags, "--model", place])
    assert "--norm model: " in line or "the model does not say how its images are normal" in line
    assert "give --norm imagenet" in line
    run = [*flags, "--model", place, "--norm", "none", "--epochs", "1", "--batch-size", "9"]
    assert main([*run, "--quiet", "--output", str(tmp_path / "run")]) == 0
    assert pae.load(tmp_path / "run").task.mean == (0.0, 0.0, 0.0)
    capsys.readouterr()
    place, _ = saved("ViT", tmp_path / "model")
    rate = ("--engine", "reference", "--drop-path", "0.1")
    (tmp_path / "no-weights").write_bytes(b"text")
    for more, message in {
        rate: "--drop-path 0.1: drop_path has no place in ViTModel of transformers",
        ("--weights", str(tmp_path / "no-weights")): "no-weights",
        ("--img-size", "18"): "takes images whose side the patch divides, 4",
    }.items():
        assert message in error_line(capsys, [*flags, "--model", place, *more])
    line = error_line(capsys, [*flags, "--model", "open_clip:ViT-B-32/openai", *rate])
    assert "drop_path has no place in the towers of open_clip" in line
    (tmp_path / "empty").mkdir()
    line = error_line(capsys, [*flags, "--model", f"hf:{tmp_path / 'empty'}"])
    assert "has no config.json; give the folder that save_pretrained wrote" in line
    bert = transformers.BertModel(transformers.BertConfig(**libraries.TEXT))
    bert.save_pretrained(tmp_path / "bert")
    line = error_line(capsys, [*flags, "--model", f"hf:{tmp_path / 'bert'}"])
    assert "BertModel is no model that can be read: expected one of ViTModel, " in line
    line = error_line(capsys, [*flags, "--model", "open_clip:ViT-B-32/nobody"])
    assert "expected open_clip:ViT-B-32/TAG, one of openai, " in line
    line = error_line(capsys, [*flags, "--model", "open_clip:no-such-model"])
    assert "open_clip has no model no-such-model" in line


def test_the_command_asks_a_folder(tmp_path, capsys):
    place, _ = saved("BEiT", tmp_path)
    assert main(["models", place]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == [place, "fast"]
    assert [row.engine for row in survey("open_clip:ViT-B-32")] == ["fast"]


def test_a_folder_of_open_clip(shades, tmp_path, capsys):
    from safetensors.torch import save_file

    vision = {"image_size": 16, "layers": 2, "width": 32, "head_width": 8, "patch_size": 4}
    text = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}}
    config["preprocess_cfg"] = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.5]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    made = open_clip.CLIP(24, vision, text)
    save_file(made.state_dict(), tmp_path / "open_clip_model.safetensors")
    place = f"open_clip:local-dir:{tmp_path}"
    tower = named.load_named(place)
    state = made.visual.state_dict()
    assert all(torch.equal(p, state[n]) for n, p in tower.state_dict().items())
    assert tower.pretrained_cfg["mean"] == (0.5, 0.4, 0.3)
    other = open_clip.CLIP(24, vision, text)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    tower = named.load_named(place, weights=tmp_path / "other.pt")
    state = other.visual.state_dict()
    assert all(torch.equal(p, state[n]) for n, p in tower.state_dict().items())
    lacking = {n: t for n, t in other.state_dict().items() if n != "visual.proj"}
    torch.save(lacking, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: they lack visual\.proj$"):
        named.load_named(place, weights=tmp_path / "other.pt")
    full = methods.build_method(Options(model=place, method="full"), 3)
    x = libraries.images(2).float()
    expected = full.head(named.load_named(place)(x))
    assert torch.allclose(full(x), expected, rtol=1e-4, atol=1e-5)
    flags = ["train", "--data", str(shades), "--model", place, "--quiet", *CPU_FLAGS]
    flags += ["--epochs", "1", "--batch-size", "9", "--method", "vpt-deep"]
    assert main([*flags, "--output", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    line = error_line(capsys, [*flags, "--img-size", "32"])
    assert "takes images of 16 x 16 alone" in line
