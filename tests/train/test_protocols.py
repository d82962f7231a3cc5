"""Tasks of VTAB-1k, FGVC and few-shot from small folders in every layout, and what is refused."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import pae
from pae.protocols.tasks import FEW_SHOT, VTAB
from pae.sweep.spec import read_spec
from pae.train import loop, pixels, recompressed, resize
from pae.train.cli import main
from pae.train.data import Images
from pae.train.options import Options
from pae.train.protocols import find, listed, read_task
from tests.train.folders import fill, save
from tests.train.helpers import BACKBONE_FLAGS, CPU_FLAGS, error_line, save_shades


def task_of(protocol, root, task=None, shots=None, draw=0, seed=0):
    """The task, and what was said."""
    options = Options(protocol=protocol, data=str(root), protocol_task=task, shots=shots, draw=draw)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_task(options, {"train_size": None, "val_size": None}, seed)
    said = [str(warning.message) for warning in caught]
    assert not [text for text in said if "\n" in text]
    return found, said


def refused(protocol, root, **options):
    with pytest.raises(ValueError) as caught:
        task_of(protocol, root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def vtab(folder, train=(0, 1, 0), val=(1, 2), test=(0, 1, 2), joined=True, suffix="png"):
    """NOAH's lists and files: every split numbers its own files from 0."""
    lists = {"train800": train, "val200": val, "test": test}
    if joined:
        lists["train800val200"] = (*train, *val) if joined is True else joined
    for split, labels in lists.items():
        lines = []
        for i, label in enumerate(labels):
            name = f"images/{split}/{i:06d}.{suffix}"
            if suffix == "png":
                save(folder / name)
            else:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (10 * i, 90, 9)).save(folder / name)
            lines.append(f"{name} {label}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


# ---- VTAB-1k


def test_a_task_has_the_classes_of_the_protocol(tmp_path):
    vtab(tmp_path / "vtab" / "svhn")
    for root, name in ((tmp_path / "vtab", "svhn"), (tmp_path / "vtab" / "svhn", None)):
        task, said = task_of("vtab1k", root, name)
        assert task.name == "svhn" and task.classes == tuple(map(str, range(10)))
        assert task.sizes() == {"train": 3, "val": 2, "test": 3}
        assert any("3 images, VTAB-1k has 800" in line for line in said)
        assert any("3 test images, published are 26032" in line for line in said)
        assert any("the test images lack 7 of 10 classes" in line for line in said)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_and_validation_images_together(tmp_path):
    task, _ = task_of("vtab1k", vtab(tmp_path / "svhn"))
    both = task.joined()
    assert both.val is None and both.train.labels == [0, 1, 0, 1, 2]
    assert {path.parent.name for path in both.train.items} == {"train800val200"}
    assert both.sizes() == {"train": 5, "val": 0, "test": 3}
    task, _ = task_of("vtab1k", vtab(tmp_path / "dtd", joined=False))
    names = [f"{path.parent.name}/{path.stem[-1]}" for path in task.joined().train.items]
    assert names == ["train800/0", "train800/1", "train800/2", "val200/0", "val200/1"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lists_that_do_not_belong_together_are_refused(tmp_path):
    line = refused("vtab1k", vtab(tmp_path / "svhn", joined=(0, 1, 0, 2, 2)))
    assert "train800val200.txt: line 4 has label 2, expected 1" in line
    line = refused("vtab1k", vtab(tmp_path / "pets", joined=(0, 1, 0, 2)))
    assert "4 images where the two lists have 3 and 2" in line
    assert "label 2, and patch_camelyon has 2 classes" in refused(
        "vtab1k", vtab(tmp_path / "patch_camelyon")
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_root_of_tasks_under_any_of_their_names(tmp_path):
    root = tmp_path / "VTAB-1K"
    names = [
        "cifar",
        "Natural/SVHN",
        "specialised/EuroSAT",
        "Structured/dsprites_ori",
        "oxford_pet",
    ]
    for name in names:
        vtab(root / name)
    (root / "notes").mkdir()
    assert list(listed(VTAB, root)) == [
        "cifar100",
        "pets",
        "svhn",
        "eurosat",
        "dsprites_orientation",
    ]
    assert find(VTAB, root, "cifar_100")[1] == root / "cifar"
    vtab_name = 'dsprites(predicted_attribute="label_orientation",num_classes=16)'
    assert task_of("vtab1k", root, f"vtab-{vtab_name}")[0].name == "dsprites_orientation"
    line = refused("vtab1k", root)
    assert "is no task of VTAB-1k; say which with --protocol-task (cifar100, pets, svhn" in line
    line = refused("vtab1k", root, task="dmlab")
    assert "no folder of dmlab (dmlab); found cifar100, pets" in line
    assert "expected one of cifar100" in refused("vtab1k", root, task="imagenet")
    vtab(root / "cifar100")
    assert "are both cifar100" in refused("vtab1k", root, task="svhn")
    assert "no such folder" in refused("vtab1k", tmp_path / "gone")


def test_lists_without_a_protocol_know_their_task_by_its_folder(tmp_path):
    from tests.train.folders import read

    assert len(read(vtab(tmp_path / "svhn"))[0].classes) == 10
    assert len(read(vtab(tmp_path / "mine"))[0].classes) == 3
    task, said = read(vtab(tmp_path / "kitti", test=(0, 1, 7)))
    assert len(task.classes) == 8 and any("read as another task" in line for line in said)


# ---- what the headers say


def picture(size=(32, 32), mode="RGB"):
    rng = np.random.default_rng(0)
    shape = (*size, 3) if mode == "RGB" else size
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize(
    "options, found",
    [
        ({}, True),
        ({"quality": 75, "subsampling": 2}, True),
        ({"quality": 76}, False),
        ({"subsampling": 0}, False),
        ({"dpi": (72, 72)}, False),
        ({"comment": "a camera"}, False),
        ({"exif": Image.Exif()}, False),
        ({"progressive": True}, False),
        ({"format": "PNG"}, False),
    ],
)
def test_the_signature_of_an_export(tmp_path, options, found):
    path = tmp_path / "x.jpg"
    picture().save(path, **{"format": "JPEG", **options})
    assert recompressed.is_default_jpeg(path) == found
    picture(mode="L").save(path, **{"format": "JPEG", **options})
    assert recompressed.is_default_jpeg(path) == (found or "subsampling" in options)


def saved(folder, count=4, size=(96, 96), suffix="jpg", **options):
    folder.mkdir(parents=True)
    for i in range(count):
        picture(size).save(folder / f"{i}.{suffix}", **options)
    return sorted(folder.iterdir())


def test_the_verdict_over_lists(tmp_path):
    exported, camera = saved(tmp_path / "a"), saved(tmp_path / "b", quality=95, dpi=(300, 300))
    raw = saved(tmp_path / "c", suffix="png")
    assert recompressed.verdict([exported, exported], None) == "jpeg75"
    assert recompressed.verdict([camera], False) == "jpeg-original"
    assert recompressed.verdict([camera], True) == "jpeg"  # whatever its quality
    assert recompressed.verdict([raw], True) == recompressed.verdict([raw], False) == "lossless"
    assert recompressed.verdict([exported, camera], False) == "jpeg-original"
    assert recompressed.verdict([raw, [*raw, camera[0]]], True) == "jpeg"


@pytest.mark.parametrize("name", ["patch_camelyon", "smallnorb_azi", "clevr_count", "kitti"])
def test_large_images_of_lossless_sets_are_found_too(tmp_path, name):
    task, said = task_of("vtab1k", vtab(tmp_path / name, (0, 1), (1,), (0, 1), suffix="jpg"))
    assert task.pixels == "jpeg75" and any("originals are lossless" in line for line in said)


def test_genuine_jpegs_of_64_pixels_are_left_alone(tmp_path):
    folder = vtab(tmp_path / "eurosat", (0, 1), (1,), (0, 1), suffix="jpg")
    for path in folder.glob("images/*/*.jpg"):
        picture((64, 64)).save(path, quality=95, subsampling=0)
    task, said = task_of("vtab1k", folder)
    assert task.pixels == "jpeg-original" and not [line for line in said if "JPEG" in line]


# ---- FGVC


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fgvc_below_its_folder_of_images(tmp_path):
    root = tmp_path / "StanfordDogs"
    tables = {"train": {"a/0.jpg": 1, "b/0.jpg": 2, "a/1.jpg": 1}, "val": {"b/1.jpg": 2}}
    tables["test"] = {"a/2.jpg": 1, "b/2.jpg": 2}
    for split, table in tables.items():
        for name in table:
            (root / "Images" / name).parent.mkdir(parents=True, exist_ok=True)
            picture((8, 8)).save(root / "Images" / name, quality=95)
        (root / f"{split}.json").write_text(json.dumps(table))
    task, said = task_of("fgvc", tmp_path, "dogs")
    assert task.name == "dogs" and len(task.classes) == 120
    assert (task.train.labels, task.val.labels, task.test.labels) == ([0, 1, 0], [1], [0, 1])
    assert any("3 train images, published are 10800" in line for line in said)
    assert task.pixels == "jpeg-original"


# ---- few-shot


def noah(folder, doubled=False):
    lists = {"val_meta.list": 5, "test_meta.list": 3}
    lists |= {f"train_meta.list.num_shot_{k}.seed_{s}": k for k in (1, 2) for s in (0, 1)}
    for number, (name, count) in enumerate(lists.items()):
        lines = []
        for label in range(3):
            for i in range(count):
                path = f"a class {label}/{number}-{i}.jpg"
                save(folder / "images" / path)
                lines += [f"{path} {label}\n"] * (2 if doubled and "seed_0" in name else 1)
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / name).write_text("".join(lines))
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lists_of_shots(tmp_path):
    noah(tmp_path / "oxford-pets")
    task, _ = task_of("few-shot", tmp_path, "pets", shots=2, draw=1)
    assert task.name == "pets-2shot" and len(task.classes) == 37
    assert task.train.labels == [0, 0, 1, 1, 2, 2] and task.val.labels == [0, 0, 1, 1, 2, 2]
    assert len(task.test) == 9 and task.train.items[0].name == "5-0.jpg"
    line = refused("few-shot", tmp_path, task="pets", shots=4)
    assert "num_shot_4.seed_0: no such list; found train_meta.list.num_shot_1.seed_0" in line


def test_doubled_lines_count_once(tmp_path):
    task, said = task_of("few-shot", noah(tmp_path / "oxford-pets", doubled=True), shots=1)
    assert task.train.labels == [0, 1, 2]
    assert any("3 lines stand there twice; each counts once" in line for line in said)


def coop(folder, per_class=6):
    table = {
        split: [[f"{split}/{c}-{i}.jpg", c, f"breed {c}"] for c in (0, 1) for i in range(per_class)]
        for split in ("train", "val", "test")
    }
    for rows in table.values():
        for name, _, _ in rows:
            save(folder / "images" / name)
    (folder / "split_zhou_OxfordPets.json").write_text(json.dumps(table))
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_shots_drawn_from_coops_splits(tmp_path):
    folder = coop(tmp_path / "oxford_pets")
    task, _ = task_of("few-shot", folder, shots=4)
    again, _ = task_of("few-shot", folder, shots=4, seed=9)
    other, _ = task_of("few-shot", folder, shots=4, draw=1)
    assert task.classes[:3] == ("breed 0", "breed 1", "class 2")
    assert task.train.items == again.train.items != other.train.items
    assert task.train.labels == [0] * 4 + [1] * 4 == task.val.labels
    many, _ = task_of("few-shot", folder, shots=16)
    assert len(many.train) == 12 and len(many.val) == 8  # all there are, and 4 a class at most
    (folder / "split_zhou_OxfordPets.json").write_text('{"train": [1]}')
    assert "expected train, val and test" in refused("few-shot", folder, shots=4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_shots_drawn_from_any_folder(tmp_path):
    folder = fill(tmp_path / "flowers102", train={"a": 9, "b": 9}, test={"a": 2, "b": 2})
    task, _ = task_of("few-shot", folder, shots=2)
    assert task.train.labels == [0, 0, 1, 1] == task.val.labels
    assert not set(task.train.items) & set(task.val.items)
    assert "none is left" in refused("few-shot", folder, shots=9)
    assert FEW_SHOT.find("oxford-flowers").name == "flowers"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["folders", "coop"])
def test_draws_that_were_written_are_what_is_read(tmp_path, capsys, form):
    root = tmp_path / "few"
    if form == "coop":
        folder = coop(root / "oxford_pets")
        name = "pets"
    else:
        counts = {"a b": 9, "c": 1, "d": 7}
        folder = fill(root / "flowers102", train=counts, test={"a b": 2, "d": 2})
        name = "flowers"
    wanted = {
        (shots, draw): task_of("few-shot", root, name, shots=shots, draw=draw)[0]
        for shots in (1, 2)
        for draw in (0, 1, 2)
    }
    command = ["protocol", "few-shot", str(root), "--write-draws", "--shots", "1", "2"]
    assert main(command) == 0
    assert f"{folder / 'annotations'}: 14 new files" in capsys.readouterr().out
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    for (shots, draw), task in wanted.items():
        found, _ = task_of("few-shot", elsewhere, name, shots=shots, draw=draw)
        assert found.classes == task.classes and found.name == task.name
        for split in ("train", "val", "test"):
            was, now = getattr(task, split), getattr(found, split)
            assert now.labels == was.labels, split
            assert [str(p.relative_to(elsewhere)) for p in now.items] == [
                str(p.relative_to(folder)) for p in was.items
            ]
    lists = elsewhere / "annotations"
    first = lists / "train_meta.list.num_shot_1.seed_0"
    before = first.read_text()
    # a draw of ours in place of another is read as it stands; more shots leave it alone
    first.write_text("".join(reversed(before.splitlines(keepends=True))))
    reverse, _ = task_of("few-shot", elsewhere, name, shots=1)
    assert reverse.train.labels == wanted[1, 0].train.labels[::-1]
    elsewhere.rename(folder)
    assert main([*command[:-2], "1", "4"]) == 0
    assert ": 6 new files" in capsys.readouterr().out
    assert first.exists() is False and (folder / "annotations" / first.name).read_text() != before
    assert len(task_of("few-shot", root, name, shots=4)[0].train) == (8 if form == "coop" else 9)


def test_draws_are_of_few_shot_and_of_files(tmp_path, capsys):
    vtab(tmp_path / "svhn")
    line = error_line(capsys, ["protocol", "vtab1k", str(tmp_path), "--write-draws"])
    assert "--write-draws is of protocol few-shot, not vtab1k" in line
    line = error_line(capsys, ["protocol", "vtab1k", str(tmp_path)])
    assert "needs --methods" in line
    fill(tmp_path / "flowers102", train={"a": 3, "b": 3}, test={"a": 2, "b": 2})
    (tmp_path / "flowers102" / "train" / "a" / "x\n.png").write_bytes(b"not decoded here")
    command = ["protocol", "few-shot", str(tmp_path), "--write-draws", "--shots", "2"]
    line = error_line(capsys, command)
    assert "a name that no list can hold; rename the file" in line


# ---- the former bilinear rule


def by_hand(image, size):
    """Every output pixel from its four neighbours, one at a time, in float64."""
    height, width, _ = image.shape
    found = np.zeros((*size, 3))
    for i in range(size[0]):
        for j in range(size[1]):
            y, x = i * height / size[0], j * width / size[1]
            top, left = int(np.floor(y)), int(np.floor(x))
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a, b = y - top, x - left
            found[i, j] = (
                (1 - a) * (1 - b) * image[top, left]
                + (1 - a) * b * image[top, right]
                + a * (1 - b) * image[below, left]
                + a * b * image[below, right]
            )
    return found


@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (32, 32), (40, 9), (3, 1)])
@pytest.mark.parametrize("size", [(8, 8), (14, 5), (1, 3)])
def test_the_former_rule_of_tensorflow(shape, size):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    got = resize.legacy_bilinear(torch.from_numpy(image).permute(2, 0, 1), size)
    assert got.dtype == torch.float32 and got.shape == (3, *size)
    expected = torch.from_numpy(by_hand(image.astype(np.float64), size)).permute(2, 0, 1)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-3)


def test_it_is_no_other_rule():
    row = torch.tensor([[[0.0, 1.0]]])
    assert resize.legacy_bilinear(row, (1, 4)).flatten().tolist() == [0, 0.5, 1, 1]
    # what stands in the middle of pixel k of 32 stands at 7 k of 224, not at 7 k + 3
    peak = torch.zeros(1, 1, 32)
    peak[0, 0, 20] = 1
    assert resize.legacy_bilinear(peak, (1, 224)).argmax() == 140
    other = torch.nn.functional.interpolate(peak, size=224, mode="linear", align_corners=False)
    assert other.argmax() == 143
    with pytest.raises(ValueError, match="cannot be resized"):
        resize.legacy_bilinear(torch.zeros(3, 0, 4), (2, 2))


def test_pixels_are_kept_as_they_come(tmp_path):
    picture((5, 7)).save(tmp_path / "x.png")
    transform, is_random = pixels.make_transform("none", True, 8, "tf1-bilinear")
    split = pixels.PixelSplit(Images([tmp_path / "x.png"], [0]), transform, is_random)
    assert not is_random and split.pixels.dtype == torch.float32
    expected = by_hand(np.asarray(picture((5, 7)), np.float64), (8, 8))
    ((images, _),) = pixels.Pipeline(split, (0.5,) * 3, (0.5,) * 3, "cpu").batches(
        [torch.tensor([0])]
    )
    torch.testing.assert_close(
        images[0],
        torch.from_numpy(expected / 127.5 - 1).float().permute(2, 0, 1),
        rtol=0,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="needs augment none"):
        pixels.make_transform("crop", False, 8, "tf1-bilinear")


# ---- options


@pytest.mark.parametrize(
    "line, message",
    [
        ("--protocol vtab1k", "--protocol vtab1k needs --data"),
        ("--data . --protocol-task svhn", "--protocol-task svhn needs --protocol vtab1k"),
        ("--data . --protocol vtab1k --shots 4", "--shots 4 needs --protocol few-shot"),
        ("--data . --protocol few-shot", "--protocol few-shot needs --shots"),
        ("--train-on trainval --keep best", "the last one is tested"),
        ("--interpolation tf1-bilinear --augment crop", "squashed to a square"),
        ("--interpolation tf1-bilinear --rand-augment rand", "squashed to a square"),
    ],
)
def test_options_that_do_not_go_together(capsys, line, message):
    assert message in error_line(capsys, ["train", "--method", "vpt-deep", *line.split()])


def test_a_seed_for_the_cut_alone(tmp_path):
    save_shades(tmp_path, train=9, test=2)

    def train_items(**seeds):
        options = Options(data=str(tmp_path), device="cpu", amp="no", workers=0, **seeds)
        return loop.load_task(options.resolved()).train.items

    assert train_items(seed=1) != train_items(seed=2) == train_items(seed=5, split_seed=2)


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("shades"), train=8, test=3)


def run(shades, folder, *flags):
    fixed = ["--method", "vpt-deep", "--epochs", "3", "--batch-size", "8", "--num-tokens", "1"]
    place = ["--data", str(shades), "--output", str(folder), *BACKBONE_FLAGS, *CPU_FLAGS]
    assert main(["train", *place, *fixed, "--quiet", *flags]) == 0
    config = json.loads((folder / "config.json").read_text())
    return config, json.loads((folder / "metrics.json").read_text())


def test_a_run_on_all_images_is_not_validated(shades, tmp_path, capsys):
    config, metrics = run(shades, tmp_path / "run", "--train-on", "trainval")
    assert config["task"]["train"] == 24 and config["task"]["val"] == 0
    assert config["splits"]["val"] is None and config["settings"]["keep"] == "last"
    result = metrics["result"]
    assert result["val_accuracy"] is None and result["best_epoch"] == 3
    assert result["tested"] == "last epoch" and 0 <= result["test_accuracy"] <= 1
    assert {row["val_accuracy"] for row in metrics["epochs"]} == {None}
    assert result["passes"] == 3 * 2 * 24 + 9
    assert " - " in capsys.readouterr().out  # the table's validation accuracy
    saved = [(tmp_path / "run" / f"{name}.safetensors").exists() for name in ("best", "last")]
    assert saved == [True, True]


def test_the_last_epoch_is_tested_where_a_protocol_says_so(shades, tmp_path, monkeypatch):
    accuracies = iter([0.9, 0.5, 0.1, 0.3])  # of three epochs and of the test
    tested = []

    def evaluate(self, data):
        tested.append({k: v.clone() for k, v in self.module.trained_state().items()})
        return {"loss": 1.0, "accuracy": next(accuracies)}, self._no_sums()

    monkeypatch.setattr(loop._Run, "_evaluate", evaluate)
    _, metrics = run(shades, tmp_path / "run", "--keep", "last", "--lr", "0.1")
    result = metrics["result"]
    assert (result["best_epoch"], result["val_accuracy"], result["test_accuracy"]) == (3, 0.1, 0.3)
    for name, value in tested[-1].items():
        assert torch.equal(value, tested[2][name])
    assert not all(torch.equal(value, tested[0][name]) for name, value in tested[-1].items())


def test_a_run_of_a_protocol_says_what_its_pixels_are(tmp_path, capsys):
    root = vtab(tmp_path / "vtab" / "svhn", (0, 1, 2, 0), (1, 2), (0, 1), suffix="jpg").parent
    flags = ["--protocol", "vtab1k", "--protocol-task", "svhn", "--interpolation", "tf1-bilinear"]
    flags += ["--norm", "none"]
    config, _ = run(root, tmp_path / "run", *flags, "--train-on", "trainval")
    assert config["task"]["name"] == "svhn" and len(config["task"]["classes"]) == 10
    assert config["pixels"] == "jpeg75" and config["task"]["train"] == 6
    assert "originals are lossless" in capsys.readouterr().err
    path = root / "svhn" / "images" / "test" / "000001.jpg"
    shown = pae.load(tmp_path / "run" / "best.safetensors").transform(path)
    expected = by_hand(np.asarray(Image.open(path), np.float64), (32, 32)) / 255
    expected = torch.from_numpy(expected).float().permute(2, 0, 1)
    torch.testing.assert_close(shown, expected, rtol=0, atol=1e-4)


# ---- the sweep of a protocol


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_sweep_of_vtab(tmp_path, capsys):
    for name in ("cifar", "svhn"):
        vtab(tmp_path / "root" / name)
    spec = tmp_path / "vtab.toml"
    command = ["protocol", "vtab1k", str(tmp_path / "root"), "--output", str(spec)]
    assert main([*command, "--methods", "vpt-deep", "linear", "bpt"]) == 0
    said = capsys.readouterr().err
    assert "2 of 19 tasks" in said and "missing, so that no mean" in said and "dmlab" in said
    assert "vpt-deep: 480 runs to tune (240 settings), 10 final ones" in said
    assert "linear: 80 runs to tune (40 settings), 10 final ones" in said
    sweep = read_spec(spec)
    assert sweep.plan.count() == (480 + 80 + 12, 30)
    (group, *_) = [g for g in sweep.plan.groups if g.method == "vpt-deep"]
    assert group.task == "cifar100" and sweep.plan.seeds == (42, 44, 82, 100, 800)
    # of equal accuracies the first: the smallest rate, then decay, then number of prompts
    cells = [tuple(c.values[n] for n in ("lr", "weight_decay", "num_tokens")) for c in group.cells]
    assert cells == sorted(cells) and cells[0] == (0.0125, 0.0, 1)  # 0.05 x 64 / 256
    tuned, final = (sweep.options[keys[0]] for keys in (group.cells[0].keys, group.cells[0].finals))
    assert (tuned.train_on, final.train_on) == ("train", "trainval")
    assert tuned.interpolation == "tf1-bilinear" and tuned.keep == final.keep == "last"
    equal = {key: {"status": "finished", "val_last": 0.5, "val_loss_last": 1 / (i + 1)}
             for i, key in enumerate(c.keys[0] for c in group.cells)}  # fmt: skip
    assert sweep.plan.chosen(group, equal)[0] is group.cells[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_sweeps_of_fgvc_and_few_shot(tmp_path, capsys):
    noah(tmp_path / "few" / "oxford-pets")
    spec = tmp_path / "few.toml"
    command = ["protocol", "few-shot", str(tmp_path / "few"), "--output", str(spec)]
    assert main([*command, "--methods", "vpt-deep", "--shots", "1", "2"]) == 0
    assert "vpt-deep: 0 runs to tune (1 settings), 6 final ones" in capsys.readouterr().err
    made = read_spec(spec)
    tasks = [group.task for group in made.plan.groups]
    assert tasks == [f"pets-{k}shot-{draw}" for k in (1, 2) for draw in (0, 1, 2)]
    (tmp_path / "f" / "CUB").mkdir(parents=True)
    (tmp_path / "f" / "CUB" / "train.json").write_text("{}")
    command = ["protocol", "fgvc", str(tmp_path / "f"), "--methods", "vpt-deep"]
    assert main([*command, "--grid", "coarse", "--output", str(spec)]) == 0
    made = read_spec(spec)
    assert made.plan.count() == (6, 4)
    options = next(iter(made.options.values()))
    assert (options.augment, options.interpolation, options.batch_size) == ("crop", "bilinear", 128)
    assert {options.train_on for options in made.options.values()} == {"train"}
    capsys.readouterr()
    line = error_line(capsys, ["protocol", "vtab1k", str(tmp_path / "f"), "--methods", "linear"])
    assert "no task of VTAB-1k is here" in line
