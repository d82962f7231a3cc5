"""A class per pixel: folders with masks, both transformed alike, the numbers, the commands."""

import copy
import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import pae
from pae.prompts import PromptFamily
from pae.train import embedded, masks, segmenting
from pae.train.cli import main
from pae.train.images import Ranges
from pae.train.options import Options
from pae.train.tasks import kind_of
from pae.train.tasks.segmentation import confusion, ious, mean_iou, pixel_accuracy
from tests import tiny
from tests.tiny import refused
from tests.train.helpers import BACKBONE_FLAGS, CPU_FLAGS, assert_same_run, error_line
from tests.train.test_train_loop import Stop, stop_after

NAMES = ("ground", "bright", "dark")
FLAGS = [*BACKBONE_FLAGS, *CPU_FLAGS, "--task", "segmentation", "--num-tokens", "2"]
FLAGS += ["--head", "pup", "--head-channels", "4", "--batch-size", "4", "--epochs", "2"]


def save_pair(root, split, name, number, size=(40, 36), shift=0):
    """An image whose left part is dark and right part bright, with its mask."""
    stream = np.random.default_rng(number)
    mask = np.zeros((size[1], size[0]), np.uint8)
    cut = 8 + number % 20
    mask[8:, :cut], mask[8:, cut + 4 :] = 2, 1
    values = np.array([120, 230, 20])[mask] + stream.normal(0, 10, mask.shape)
    colours = np.repeat(np.clip(values, 0, 255).astype(np.uint8)[..., None], 3, 2)
    for folder, picture, suffix in (
        ("images", Image.fromarray(colours), "jpg"),
        ("masks", Image.fromarray(mask + shift), "png"),
    ):
        path = root / folder / split / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def save_folder(root, train=12, val=4, test=4, shift=0):
    counts = {"train": train, "val": val, "test": test}
    for place, (split, count) in enumerate(counts.items()):
        for i in range(count):
            save_pair(root, split, f"{i:02d}", 100 * place + i, shift=shift)
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("masked"))


def read(root, **changes):
    given = {"train_size": None, "val_size": None, "test_size": None, "seed": 0, "workers": 1}
    return masks.read_folder(root, **{**given, **changes})


# ---- folders


def test_a_folder_with_masks(folder):
    task = read(folder)
    assert task.classes == NAMES and task.sizes() == {"train": 12, "val": 4, "test": 4}
    for image, mask in zip(task.train.items, task.train.labels, strict=True):
        assert mask == folder / "masks" / "train" / f"{image.stem}.png"
    fewer = read(folder, train_size=5, test_size=2)
    assert fewer.sizes() == {"train": 5, "val": 4, "test": 2}
    assert [m.stem for m in fewer.train.labels] == [i.stem for i in fewer.train.items]
    with pytest.warns(UserWarning, match="has its own val split"):
        read(folder, val_size=2)


def test_validation_is_cut_where_there_is_none(tmp_path):
    root = save_folder(tmp_path, train=10, val=0, test=0)
    task, again, other = read(root), read(root), read(root, seed=1)
    assert task.sizes() == {"train": 8, "val": 2, "test": 0}
    assert task.val.items == again.val.items != other.val.items
    assert not set(task.val.items) & set(task.train.items)
    refused(ValueError, "10 for validation leave none", lambda: read(root, val_size=10))
    refused(ValueError, "--train-size 9", lambda: read(root, train_size=9))
    refused(ValueError, "--test-size 1: ", lambda: read(root, test_size=1))


def test_ade20ks_layout(tmp_path):
    """annotations/training, names in a table, numbers from 1: 0 is no class."""
    save_folder(tmp_path, test=0, shift=1)
    for parent, name in ((p, n) for p in ("images", "masks") for n in ("train", "val")):
        long = {"train": "training", "val": "validation"}[name]
        (tmp_path / parent / name).rename(tmp_path / parent / long)
    (tmp_path / "masks").rename(tmp_path / "annotations")
    (tmp_path / "classes.txt").unlink()
    table = "Idx\tRatio\tName\n" + "".join(f"{i}\t0.1\t{n}\n" for i, n in enumerate(NAMES, 1))
    (tmp_path / "objectInfo150.txt").write_text(table)
    task = read(tmp_path)
    assert task.classes == NAMES and task.sizes() == {"train": 12, "val": 4, "test": 0}
    mask = task.train.labels[0]
    reduced = np.asarray(masks.read_mask(mask, 3, reduce_zero=True))
    assert set(np.unique(reduced)) == {0, 1, 2}
    refused(ValueError, "holds 3, expected class numbers below 3", lambda: masks.read_mask(mask, 3))
    zeros = np.asarray(masks.read_mask(np.array([[0, 1, 255]], np.uint8), 3, reduce_zero=True))
    assert zeros.tolist() == [[255, 0, 255]]


def test_masks_of_every_kind(tmp_path):
    numbers = np.array([[0, 1], [2, 255]], np.uint8)
    palette = Image.fromarray(numbers)
    palette.putpalette(list(range(256)) * 3)
    deep = Image.fromarray(numbers.astype(np.uint16))
    for name, picture in (("p", palette), ("i", deep), ("l", Image.fromarray(numbers))):
        picture.save(tmp_path / f"{name}.png")
        assert np.array_equal(masks.read_mask(tmp_path / f"{name}.png", 3), numbers)


def test_what_is_wrong_with_a_folder(tmp_path):
    refused(ValueError, "no such folder", lambda: read(tmp_path / "nowhere"))
    refused(ValueError, "no classes.txt", lambda: read(tmp_path))
    (tmp_path / "classes.txt").write_text("a\na\n")
    refused(ValueError, "classes.txt: expected at least two names", lambda: read(tmp_path))
    save_folder(tmp_path)
    mask = tmp_path / "masks" / "train" / "03.png"
    kept = mask.read_bytes()
    mask.unlink()
    refused(ValueError, "03.jpg: has no mask, expected", lambda: read(tmp_path))
    Image.new("RGB", (40, 36)).save(mask)
    refused(ValueError, "03.png: expected class numbers in one channel", lambda: read(tmp_path))
    Image.new("L", (36, 40)).save(mask)
    refused(ValueError, "03.png: 36 x 40 pixels, and its image has 40 x 36", lambda: read(tmp_path))
    mask.write_bytes(kept)
    (tmp_path / "images" / "train" / "03.png").write_bytes(kept)
    refused(ValueError, "two images have the mask 03.png", lambda: read(tmp_path))
    (tmp_path / "images" / "train" / "03.png").unlink()
    (tmp_path / "masks" / "test").rename(tmp_path / "masks" / "tests")
    refused(ValueError, "no folder of masks for images/test", lambda: read(tmp_path))
    (tmp_path / "images" / "train").rename(tmp_path / "images" / "trains")
    (tmp_path / "images" / "test").rename(tmp_path / "images" / "tests")
    refused(ValueError, "no folder images/train", lambda: read(tmp_path))


# ---- both alike


def joint(side=16):
    def resize(image):
        return torch.from_numpy(np.array(image.resize((side, side), 0))).permute(2, 0, 1)

    return masks.Joint(side, resize, Image.Resampling.NEAREST, (7, 7, 7))


@pytest.mark.parametrize("size", [(40, 36), (12, 90)], ids=str)
def test_images_and_masks_move_together(size):
    """Where the mask's number is k the image is 50 k, wherever a draw takes it; beyond the border
    stands the fill, and no class.
    """
    numbers = np.random.default_rng(0).integers(0, 5, (size[1] // 2, size[0] // 2))
    numbers = numbers.repeat(2, 0).repeat(2, 1).astype(np.uint8)
    image = Image.fromarray(np.repeat(50 * numbers[..., None], 3, 2))
    mask, seen = Image.fromarray(numbers), set()
    for draw in range(30):
        shown, cut = joint().drawn(image, mask, random.Random(draw))
        assert shown.shape == (3, 16, 16) and cut.shape == (16, 16)
        inside = cut != 255
        assert torch.equal(shown[0][inside], 50 * cut[inside])
        assert bool((shown[0][~inside] == 7).all())
        seen.add(bool(inside.all()))
    assert seen == {True, False}  # small ones are filled up
    shown, cut = joint().squashed(image, mask)
    assert torch.equal(shown[0], 50 * cut)


def test_a_draw_is_of_seed_epoch_and_image(folder):
    task = read(folder)

    def split(seed, epoch, is_random=True, **more):
        made = masks.MaskedSplit(
            *(task.train, joint(), 3),
            **{"is_random": is_random, "seed": seed, "workers": 1, "ranges": Ranges(None, None)},
            **more,
        )
        made.epoch = epoch
        return made.__getitems__(torch.arange(4))

    first, again = split(0, 0), split(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], split(0, 1)[0]) and not torch.equal(first[0], split(1, 0)[0])
    kept, drawn = split(0, 0, False), split(0, 0, False, cache_bytes=0)
    assert all(torch.equal(a, b) for a, b in zip(kept, drawn, strict=True))


def test_a_wrong_number_is_found_before_training(tmp_path, capsys):
    root = save_folder(tmp_path / "images")
    save_pair(root, "train", "05", 5, shift=1)
    line = error_line(capsys, ["train", "--data", str(root), "--method", "vpt-deep", *FLAGS])
    assert "05.png: holds 3, expected class numbers below 3, or 255; of files that count" in line


# ---- numbers


def test_numbers_by_hand():
    truth = torch.tensor([[0, 0, 1, 1, 255]])
    found = confusion(torch.tensor([[0, 1, 1, 1, 2]]), truth, 4)
    assert found.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0] * 4, [0] * 4]
    assert ious(found) == [1 / 2, 2 / 3, None, None]
    assert mean_iou(found) == pytest.approx(7 / 12) and pixel_accuracy(found) == 3 / 4
    nothing = torch.zeros(2, 2)
    assert (mean_iou(nothing), pixel_accuracy(nothing)) == (0.0, 0.0)


def test_sums_of_a_batch():
    kind = kind_of(Options(task="segmentation"))
    kind.classes = 3
    logits, targets = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    targets[0, 0] = 255
    sums = kind.sums(None, logits, targets.to(torch.uint8))
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=255, reduction="sum")
    assert float(sums[0]) == pytest.approx(float(loss) / 16)
    assert torch.equal(sums[1:].view(3, 3).long(), confusion(logits.argmax(1), targets, 3))
    means = dict(zip(kind.metrics, kind.means(sums, 2), strict=True))
    assert means["mean_iou"] == mean_iou(sums[1:].view(3, 3))


# ---- runs


def train(root, output, *flags):
    data = ["--data", str(root)] if root else []
    assert main(["train", *data, *FLAGS, *flags, "--output", str(output)]) == 0
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--method", "vpt-deep", "--augment", "crop", "--lr", "0.01"]
    return output, train(folder, output, *flags)


def test_a_run(trained, folder):
    output, metrics = trained
    rows, result = metrics["epochs"], metrics["result"]
    names = {f"{s}_{m}" for s in ("train", "val") for m in ("loss", "mean_iou", "pixel_accuracy")}
    assert names <= rows[0].keys() and "val_accuracy" not in rows[0]
    best = max(rows, key=lambda row: (row["val_mean_iou"], -row["val_loss"]))
    assert result["best_epoch"] == best["epoch"] and result["val_mean_iou"] == best["val_mean_iou"]
    known = [value for value in result["test_iou"].values() if value is not None]
    assert list(result["test_iou"]) == list(NAMES)
    assert result["test_mean_iou"] == pytest.approx(sum(known) / len(known))
    config = json.loads((output / "config.json").read_text())
    assert config["settings"]["task"] == "segmentation"
    assert config["splits"]["train"]["images"] == 12
    model = pae.load(output)
    assert isinstance(model, pae.PromptedSegmenter) and model.classes == NAMES
    assert len(model.heads.auxiliary) == 3 and model.out_blocks == (1, 3, 4, 5)
    count = sum(p.numel() for p in model.heads.parameters())
    assert result["head_parameters"] == count
    assert result["trained_parameters"] == count + model.prompts.tokens.numel()
    header = (output / "metrics.csv").read_text().splitlines()[0]
    assert "val_mean_iou" in header and (output / "curves.png").is_file()


def test_a_stopped_run_goes_on_bit_for_bit(folder, tmp_path, trained, monkeypatch):
    """Running statistics of batch norms among what the state keeps."""
    flags = ["--method", "vpt-deep", "--augment", "crop", "--lr", "0.01"]
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        data = ["--data", str(folder)]
        with pytest.raises(Stop):
            main(["train", *data, *FLAGS, *flags, "--output", str(output)])
    assert main(["train", "--resume", str(output)]) == 0
    assert_same_run(output, trained[0])


def test_evaluate_and_predict(trained, folder, tmp_path, capsys):
    output, metrics = trained
    capsys.readouterr()
    assert main(["evaluate", str(output), "--data", str(folder), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("test: mean IoU 0.") and "4 images, 5,760 pixels" in said
    found = output / f"evaluation-{folder.name}-test"
    numbers = json.loads((found / "evaluation.json").read_text())
    assert abs(numbers["mean_iou"] - metrics["result"]["test_mean_iou"]) < 0.1  # at full size
    assert (found / "per_class.csv").read_text().splitlines()[0] == "class,pixels,iou"
    images, shown = folder / "images" / "test", tmp_path / "out"
    assert main(["predict", str(output), str(images), "--output", str(shown)]) == 0
    assert len(list(shown.iterdir())) == 8
    mask = Image.open(shown / "00.png")
    assert mask.mode == "P" and mask.size == (40, 36)
    assert mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    model = pae.load(output)
    image = Image.open(images / "00.jpg")
    logits = model(model.transform(image)[None])
    large = torch.nn.functional.interpolate(
        logits, size=(36, 40), mode="bilinear", align_corners=False
    )
    assert np.array_equal(np.asarray(mask), large[0].argmax(0).numpy())
    capsys.readouterr()
    assert main(["predict", str(output), str(images / "00.jpg"), "--top", "1"]) == 0
    assert "00.jpg: " in capsys.readouterr().out
    line = error_line(capsys, ["predict", str(output), str(images), str(folder / "images/val")])
    assert "have one name" in line
    line = error_line(capsys, ["evaluate", str(output), "--data", str(folder), "--split", "dev"])
    assert "--split dev" in line


def test_what_segmentation_does_not_take(folder, capsys):
    def line(*flags):
        return error_line(capsys, ["train", "--data", str(folder), *FLAGS, *flags])

    assert "does not run the comparison of --method compare" in line()
    assert "does not train all weights" in line("--method", "full")
    deep = ["--method", "vpt-deep"]
    assert "--mpa is not for --task segmentation: it ranks" in line(*deep, "--mpa")
    assert "--label-smoothing 0.1 is not for" in line(*deep, "--label-smoothing", "0.1")
    assert "--per-class 2 is not for" in line(*deep, "--per-class", "2")
    assert "--augment timm is not for" in line(*deep, "--augment", "timm")
    assert "--out-blocks 1,9" in line(*deep, "--out-blocks", "1,9")
    assert "learn from the class of an image" in line("--method", "da-vpt")
    plain = ["train", "--method", "vpt-deep", "--head", "pup"]
    assert "--head pup needs --task segmentation" in error_line(capsys, plain)
    digits = ["train", *FLAGS, *deep, "--dataset", "digits"]
    assert "digits has a class per image" in error_line(capsys, digits)


@pytest.mark.parametrize("method", ["linear", "vpt-shallow", "ivpt"])
def test_every_kind_of_method(folder, tmp_path, method):
    more = ["--method-args", "num_reinforced=2"] if method == "ivpt" else []
    flags = ["--method", method, "--head", "linear", "--epochs", "1", "--engine", "fast"]
    metrics = train(folder, tmp_path / "run", *flags, *more)
    assert 0 <= metrics["result"]["test_mean_iou"] <= 1
    model = pae.load(tmp_path / "run")
    assert isinstance(model.prompts, PromptFamily) and model.out_blocks == (5,)


def test_drawn_shapes():
    task = embedded.load_masked("shapes-masks", train_size=20, val_size=10)
    again = embedded.load_masked("shapes-masks", train_size=20, val_size=10)
    assert task.sizes() == {"train": 20, "val": 10, "test": 100}
    assert task.classes == ("background", "disc", "square", "triangle")
    assert all(np.array_equal(a, b) for a, b in zip(task.train.items, again.train.items))
    numbers = np.stack(task.test.labels)
    shares = np.bincount(numbers.flatten(), minlength=4) / numbers.size
    assert len(shares) == 4 and shares[1:].min() > 0.02 and 0.6 < shares[0] < 0.95
    for image, mask in zip(task.test.items[:10], task.test.labels[:10]):
        assert image[mask > 0].mean() > image[mask == 0].mean() + 30


def test_colours_of_classes():
    colours = segmenting.palette(256)
    assert colours[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert len(set(colours)) == 256


# ---- what a user does with a trained model


def test_a_file_for_other_runtimes_gives_the_masks_of_both_engines(trained, folder, tmp_path):
    """SETR-PUP by the command, on the run's own images, whatever their size."""
    output, file = trained[0], tmp_path / "it.pt2"
    command = ["export", str(output), "--format", "torch-export", "--output", str(file)]
    assert main([*command, "--quiet"]) == 0
    model, exported = pae.load(output), torch.export.load(str(file)).module()
    images = [Image.open(path) for path in sorted((folder / "images" / "test").iterdir())]
    inputs = torch.stack([model.transform(image) for image in images])
    with torch.no_grad():
        got = exported(inputs[:3])
        for engine in ("reference", "fast"):
            expected = model(inputs[:3], engine=engine)
            size = max(1.0, float(expected.abs().max()))
            assert float((got - expected).abs().max()) <= 1e-5 * size, engine


@pytest.mark.parametrize("head", [pae.SETRPUP(32, 4, 8, 2), pae.LinearHead(32, 4)])
def test_onnx(tmp_path, head):
    import onnxruntime

    from pae.train.export import export

    torch.manual_seed(0)
    backbone = tiny.prompted("plain", pae.prompts.VPTDeep(3), torch.float32)
    model = pae.PromptedSegmenter(backbone, copy.deepcopy(head)).train()
    model(torch.randn(4, 3, 16, 16))  # running statistics that are no longer 0 and 1
    file = tmp_path / "it.onnx"
    assert export(model.eval(), torch.randn(3, 3, 16, 16), file, "onnx") < 1e-5
    images = torch.randn(2, 3, 16, 16)
    (got,) = onnxruntime.InferenceSession(str(file)).run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = model(images, engine="fast")
    assert got.shape == (2, 4, 16, 16)
    assert float((torch.from_numpy(got) - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("size", [(40, 36), (13, 90), (1, 1), (57, 8)], ids=str)
def test_images_of_any_size_and_kind(trained, tmp_path, capsys, size):
    """Not a multiple of the patch, no square, grey, transparent, turned: a mask as large as what
    is seen.
    """
    numbers = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4)).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # on its side
    Image.fromarray(numbers[..., :3]).save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(numbers).save(tmp_path / "clear.png")
    Image.fromarray(numbers[..., 0]).save(tmp_path / "grey.png")
    files = [str(tmp_path / name) for name in ("turned.jpg", "clear.png", "grey.png")]
    shown = tmp_path / "out"
    assert main(["predict", str(trained[0]), *files, "--output", str(shown), "--quiet"]) == 0
    for name, expected in (("turned", size[::-1]), ("clear", size), ("grey", size)):
        mask, over = Image.open(shown / f"{name}.png"), Image.open(shown / f"{name}-overlay.png")
        assert mask.mode == "P" and mask.size == over.size == expected
        assert np.asarray(mask).max() < len(NAMES)


def test_inputs_of_another_size_are_refused(trained):
    model = pae.load(trained[0])
    side = model.transform(Image.new("RGB", (50, 20))).shape[-1]
    assert model(torch.zeros(1, 3, side, side)).shape == (1, 3, side, side)
    refused(ValueError, "images must have sides", lambda: model(torch.zeros(1, 3, side, side + 1)))


def test_info_names_the_heads(trained, capsys):
    capsys.readouterr()
    assert main(["info", str(trained[0])]) == 0
    said = capsys.readouterr().out
    assert (
        "SETRPUP" in said and "out_blocks=[1, 3, 4, 5]" in said and "ground, bright, dark" in said
    )
    assert main(["info", str(trained[0]), "--json"]) == 0
    heads = json.loads(capsys.readouterr().out)["heads"]
    assert heads["decode"]["config"]["num_classes"] == 3 and len(heads["auxiliary"]) == 3


def test_evaluation_leaves_out_what_is_no_class(trained, folder, tmp_path, capsys):
    """255 counts nowhere: not in a class, not against it; tables agree with a count by hand."""
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    for path in (root / "masks" / "test").iterdir():
        mask = np.array(Image.open(path))
        mask[:, ::3] = 255
        Image.fromarray(mask).save(path)
    out, shown = tmp_path / "out", tmp_path / "masks"
    command = ["evaluate", str(trained[0]), "--data", str(root), "--output", str(out)]
    assert main([*command, "--quiet"]) == 0
    images = root / "images" / "test"
    assert main(["predict", str(trained[0]), str(images), "--output", str(shown), "--quiet"]) == 0
    counts = np.zeros((3, 3), int)
    for path in sorted((root / "masks" / "test").iterdir()):
        truth, got = np.array(Image.open(path)), np.array(Image.open(shown / path.name))
        for i, j in zip(truth.ravel(), got.ravel()):
            if i != 255:
                counts[i, j] += 1
    rows = (out / "confusion.csv").read_text().splitlines()
    assert rows[0] == "class,ground,bright,dark"
    assert [[int(n) for n in row.split(",")[1:]] for row in rows[1:]] == counts.tolist()
    expected = [
        counts[i, i] / (counts[i].sum() + counts[:, i].sum() - counts[i, i]) for i in (0, 1, 2)
    ]
    numbers = json.loads((out / "evaluation.json").read_text())
    assert numbers["mean_iou"] == pytest.approx(sum(expected) / 3)
    per_class = [row.split(",") for row in (out / "per_class.csv").read_text().splitlines()[1:]]
    assert [float(row[2]) for row in per_class] == pytest.approx(expected)
    assert len((out / "per_image.csv").read_text().splitlines()) == 5


WRONG = {
    "colours": (Image.new("RGB", (40, 36)), "expected class numbers in one channel or a palette"),
    "alpha": (Image.new("LA", (40, 36)), "expected class numbers in one channel or a palette"),
    "floats": (Image.new("F", (40, 36)), "expected class numbers in one channel or a palette"),
    "past": (Image.new("L", (40, 36), 3), "holds 3, expected class numbers below 3, or 255"),
    "deep": (
        Image.fromarray(np.full((36, 40), 256, np.uint16)),
        "holds 256, expected class numbers below 3, or 255",
    ),
    "size": (Image.new("L", (36, 40)), "36 x 40 pixels, and its image has 40 x 36"),
    "none": (None, "expected"),
    "cut": (b"\x89PNG\r\n\x1a\n", "02."),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_mask_is_one_line_that_names_it(trained, folder, tmp_path, capsys, kind):
    picture, said = WRONG[kind]
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    mask = root / "masks" / "test" / "02.png"
    mask.unlink()
    if isinstance(picture, bytes):
        mask.write_bytes(picture)
    elif picture is not None:
        picture.save(tmp_path / "it.tiff") if kind == "floats" else picture.save(mask)
        if kind == "floats":
            mask.write_bytes((tmp_path / "it.tiff").read_bytes())
    line = error_line(capsys, ["evaluate", str(trained[0]), "--data", str(root), "--quiet"])
    assert "02.png" in line and said in line
