"""Folders of TensorFlow Datasets, and VTAB-1k cut from them."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pae.protocols.tasks import CUTS, VTAB
from pae.train import images, record, tfds
from pae.train.cli import main
from pae.train.data import read_folder
from pae.train.stored import Columns
from tests.train.folders import read, refusal
from tests.train.helpers import BACKBONE_FLAGS, CPU_FLAGS, PROBE_FLAGS
from tests.train.rows import (
    IMAGE,
    encoded,
    example,
    framed,
    of_classes,
    pixels,
    shades,
    write_tfds,
)
from tests.train.test_protocols import refused, task_of

pytest.importorskip("google_crc32c", reason='needs pip install "pae[data]"')
LABELLED = {"image": IMAGE, "label": of_classes(2)}


def labelled(seeds, classes=2):
    return [example(image=encoded(seed), label=seed % classes) for seed in seeds]


@pytest.fixture
def birds(tmp_path):
    splits = {"train": labelled(range(10)), "test": labelled(range(20, 25))}
    names = {"label": ["crow", "wren"]}
    return write_tfds(tmp_path / "birds" / "1.0.0", splits, LABELLED, names, shards=3)


def test_a_folder_of_tensorflow_datasets(birds):
    task, said = read(birds.parent)
    assert task.name == "birds" and task.classes == ("crow", "wren") and not said
    assert task.sizes() == {"train": 8, "val": 2, "test": 5}
    assert task.test.labels == [0, 1, 0, 1, 0]
    for seed, item in zip(range(20, 25), task.test.items):
        assert item.read() == encoded(seed)
        assert np.array_equal(pixels(pickle.loads(pickle.dumps(item))), pixels(item))
    assert str(task.test.items[1]) == "birds-test.tfrecord-00001-of-00003[0]"
    assert read(birds)[0].train.labels == task.train.labels


def test_a_folder_that_tensorflow_datasets_itself_wrote():
    """`tests/train/tfds/README.md` says how; the pixel in the corner is the number of the image."""
    folder = Path(__file__).with_name("tfds") / "made"
    task, _ = read(folder)
    assert task.name == "made" and task.classes == ("red", "green", "blue")
    assert task.sizes() == {"train": 6, "val": 1, "test": 3}
    seen = {}
    for split in (task.train, task.val, task.test):
        for item, label in zip(split.items, split.labels):
            image = np.asarray(pixels(item))
            number = image[0, 0].tolist()
            assert image.shape == (8, 8, 3) and number == [number[0]] * 3
            assert label == number[0] % 3 and (image[1, 1] == 255 * np.eye(3)[label]).all()
            seen[number[0]] = split
    assert sorted(seen) == list(range(10)) and all(seen[n] is task.test for n in (7, 8, 9))
    info = tfds.read_info(folder / "1.0.0")
    assert [len(files) for files in info.shards.values()] == [2, 2]
    keys = ["label", "weight", "file_name", "boxes/id", "boxes/bbox", "no such"]
    for _, found in tfds.records(info, "train", keys):
        (name,) = found["file_name"]
        number = int(name.decode().removesuffix(".png"))
        boxes = number % 2
        assert found == {
            "label": [number % 3],
            "weight": [number / 2],
            "file_name": [name],
            "boxes/id": [-number] * boxes,
            "boxes/bbox": [0.0, 0.0, 0.5, 0.5] * boxes,
        }


def test_a_run_on_a_folder_of_tensorflow_datasets(tmp_path):
    made = [(image, i) for i, level in enumerate((40, 220)) for image in shades(8, level)]
    records = [example(image=image, label=label) for image, label in made]
    folder = write_tfds(
        tmp_path / "two" / "1.0.0", {"train": records, "test": records[::2]}, LABELLED
    )
    flags = [*BACKBONE_FLAGS, *CPU_FLAGS, *PROBE_FLAGS]
    out = tmp_path / "run"
    assert main(["train", "--data", str(folder), *flags, "--output", str(out)]) == 0
    assert json.loads((out / "metrics.json").read_text())["result"]["test_accuracy"] == 1.0
    checkpoint = ["evaluate", str(out), "--data", str(folder), "--split", "test", "--quiet"]
    assert main([*checkpoint, "--output", str(tmp_path / "said")]) == 0


def test_the_digest_of_a_split_knows_the_bytes(birds):
    def digest():
        return record._split(read(birds)[0].test, str(birds))["digest"]

    before = digest()
    assert digest() == before
    path = birds / "birds-test.tfrecord-00001-of-00003"
    path.write_bytes(framed(*labelled([31, 30])))
    assert read(birds)[0].test.labels == [0, 1, 0, 1, 0] and digest() != before


def test_features_are_named_where_types_do_not_tell(tmp_path):
    both = {"image": IMAGE, "other": IMAGE, "fine": of_classes(3), "coarse": of_classes(2)}
    made = [
        example(image=encoded(i), other=encoded(i + 50), fine=i % 3, coarse=i % 2) for i in range(6)
    ]
    folder = write_tfds(tmp_path / "two" / "1.0.0", {"train": made}, both)
    assert "2 features are of the type of the image; say which with --image-column" in refusal(
        folder
    )
    assert "--label-column ('fine', 'coarse')" in refusal(folder, columns=Columns("image"))
    assert "--label-column race: " in refusal(folder, columns=Columns("image", "race"))
    task = read_folder(folder, val_size=2, columns=Columns("other", "fine"))
    assert len(task.classes) == 3
    assert {item.read() for item in (*task.train.items, *task.val.items)} == {
        encoded(i + 50) for i in range(6)
    }


def test_features_as_older_versions_wrote_them(birds):
    content = {
        "image": {"type": IMAGE["pythonClassName"], "content": {"shape": [None, None, 3]}},
        "label": {
            "type": of_classes(2)["pythonClassName"],
            "content": json.dumps({"num_classes": 2}),
        },
    }
    kind = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    for form in (content, json.dumps({"features": content})):
        (birds / "features.json").write_text(json.dumps({"type": kind, "content": form}))
        assert read(birds)[0].classes == ("crow", "wren")


def test_damaged_and_foreign_folders_are_one_line(birds):
    path = birds / "birds-test.tfrecord-00002-of-00003"
    whole = path.read_bytes()
    for content, text in (
        (whole[:-1], "ends in record 1"),
        (whole[: len(whole) // 2 - 40], "ends in record 0"),
        (whole + whole, "holds more records than the 2"),
        (whole[:60] + b"?" + whole[61:], "record 0 is damaged"),
        (b"\x1f\x8b" + whole, "or the file is compressed"),
        (framed(b"\x0a\x7f"), "not a tf.train.Example"),
        (framed(example(image=b"none", label=7), example(label=0)), "has label 7, expected 0..1"),
        (framed(example(image=b"none", label=1.5)), "label is [1.5], expected one class number"),
    ):
        path.write_bytes(content)
        assert text in refusal(birds), text
    path.write_bytes(framed(example(image=b"none", label=1), example(label=0)))
    task, _ = read(birds)
    with pytest.raises(ValueError, match=r"unreadable image birds-test.*\[0\]: PIL knows no"):
        images.decode(task.test.items[3], images.Ranges())
    with pytest.raises(ValueError, match=r"\[1\]: it has no image image$"):
        images.decode(task.test.items[4], images.Ranges())
    path.unlink()
    assert "No such file" in refusal(birds)
    (birds / "label.labels.txt").write_text("crow\n")
    info = json.loads((birds / "dataset_info.json").read_text())
    (birds / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "array_record"}))
    assert "fileFormat 'array_record', expected tfrecord; prepare the set" in refusal(birds)
    (birds / "dataset_info.json").write_text('{"name": "a"}')
    assert "is not what tensorflow-datasets writes (KeyError" in refusal(birds)
    write_tfds(birds.parent / "1.0.1", {}, {})
    assert "holds several versions (1.0.0, 1.0.1)" in refusal(birds.parent)


def test_a_number_of_names_other_than_of_classes(birds):
    (birds / "label.labels.txt").write_text("crow\n")
    assert "1 names, label has 2 classes" in refusal(birds)


def test_reading_without_the_checksums_package(birds, monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    assert 'pip install "pae[data]"' in refusal(birds)


def test_the_parser_of_examples():
    made = example(a=[-1, 0, 2**62], b=[0.5, -3.25], c=[b"", b"\0\xff"], d__e=[7])
    assert tfds.parse(made, ["a", "b", "c", "d/e", "gone"], "here") == {
        "a": [-1, 0, 2**62],
        "b": [0.5, -3.25],
        "c": [b"", b"\0\xff"],
        "d/e": [7],
    }
    # not packed, as writers of proto2 leave numbers; fields that are not known are passed over
    loose = b"\x0a\x0e\x0a\x0c\x0a\x01a\x12\x07\x1a\x05\x08\x05\x08\x96\x01" + b"\x15\0\0\0\0"
    assert tfds.parse(loose, ["a"], "here") == {"a": [5, 150]}
    for cut in range(1, len(made)):
        try:
            tfds.parse(made[:cut], ["a", "b"], "here")
        except ValueError as error:
            assert str(error).startswith("here: not a tf.train.Example")
    assert (
        tfds.checksum(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32
    )


# ---- VTAB-1k in them


def test_the_cuts_of_vtab():
    """N and s of VTAB's code, for the sets whose sizes are known."""
    for name, sizes, val, test in (
        ("cifar100", {"train": 50000, "test": 10000}, ("train", 45000), ("test", 0, 10000)),
        ("svhn", {"train": 73257, "test": 26032}, ("train", 65931), ("test", 0, 26032)),
        ("eurosat", {"train": 27000}, ("train", 16200), ("train", 21600, 27000)),
        ("resisc45", {"train": 31500}, ("train", 18900), ("train", 25200, 31500)),
        ("caltech101", {"train": 3059, "test": 6085}, ("train", 2753), ("test", 0, 6085)),
        ("pets", {"train": 3680, "test": 3669}, ("train", 2944), ("test", 0, 3669)),
        (
            "clevr_count",
            {"train": 70000, "validation": 15000, "test": 15000},
            ("train", 63000),
            ("validation", 0, 15000),
        ),
        ("dsprites_location", {"train": 737280}, ("train", 589824), ("train", 663552, 737280)),
        (
            "smallnorb_azimuth",
            {"train": 24300, "test": 24300},
            ("test", 0),
            ("test", 12150, 24300),
        ),
        (
            "kitti_distance",
            {"train": 6347, "validation": 423, "test": 711},
            ("validation", 0),
            ("test", 0, 711),
        ),
    ):
        known = VTAB.find(name)
        found = CUTS[known.cut].slices(sizes)
        assert found["train"] == ("train", 0, 800)
        assert found["val"] == (*val, val[1] + 200), name
        assert found["test"] == test, name
        assert known.test in (None, test[2] - test[1]) or name == "caltech101"


def boxes(depths):
    return [value for depth in depths for value in (1.0, 2.0, depth)]


def write_vtab(root, name, version, splits, features, cut, monkeypatch):
    """A set of VTAB with a protocol that takes 4 images for 800 and 2 for 200."""

    def small(self, sizes):
        found = whole(self, sizes)
        at = found["val"]
        return {
            "train": ("train", 0, 4),
            "val": (at[0], at[1], at[1] + 2),
            "test": found["test"],
        }

    whole = type(CUTS["90"]).slices
    monkeypatch.setattr(type(CUTS["90"]), "slices", small)
    return write_tfds(root / name / version, splits, features, name=name.partition("/")[0])


def test_structured_labels(tmp_path, monkeypatch):
    """Every bound of the bins of VTAB's code, from below and above."""
    depths = [8.0, 8.25, 8.5, 8.75, 9.0, 9.25, 9.5, 9.75, 10.0, 10.25, 99.0, 0.5]
    labels = [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0]
    clevr = [
        example(image=encoded(i), objects__pixel_coords=boxes([d] + [50.0] * (2 + i % 8)))
        for i, d in enumerate(depths)
    ]
    root = tmp_path / "tfds"
    features = {"image": IMAGE}
    splits = {"train": clevr, "validation": clevr}
    write_vtab(root, "clevr", "3.1.0", splits, features, "", monkeypatch)
    task, said = task_of("vtab1k", root, "clevr_distance")
    assert task.test.labels == labels and task.classes == tuple("012345")
    assert not any("version" in line for line in said)
    assert task.train.labels == labels[:4] and task.val.labels == labels[10:]
    task, _ = task_of("vtab1k", root / "clevr", "clevr_count")
    assert task.test.labels == [i % 8 for i in range(12)] and len(task.classes) == 8
    kitti = [
        ([7.9, 30.0], [0, 1], 0),
        ([8.0], [2], 0),
        ([8.1], [0], 1),
        ([20.0, 5.0], [1, 3], 1),
        ([20.5, -1.0], [0, 7], 2),
        ([998.0], [1], 2),
        ([3.0], [4], 3),
    ]
    made = [
        example(image=encoded(i), objects__location=boxes(z), objects__type=kind)
        for i, (z, kind, _) in enumerate(kitti)
    ]
    made.append(example(image=encoded(9)))  # nobody there
    splits = dict.fromkeys(("train", "validation", "test"), made)
    write_vtab(root, "kitti", "3.1.0", splits, features, "", monkeypatch)
    task, said = task_of("vtab1k", root, "kitti_dist")
    assert task.test.labels == [*(row[2] for row in kitti), 3]
    assert any("version 3.1.0 of kitti, VPT ran 3.2.0" in line for line in said)


def test_dsprites_are_white_and_their_bins_alternate(tmp_path, monkeypatch):
    def picture(i):
        out = io.BytesIO()
        Image.fromarray(np.eye(4, dtype=np.uint8) * (i % 2)).save(out, "PNG")
        return out.getvalue()

    made = [
        example(image=picture(i), label_x_position=i % 32, label_orientation=i % 40)
        for i in range(400)
    ]
    features = {"image": IMAGE, "label_x_position": of_classes(32)}
    write_vtab(tmp_path, "dsprites", "2.0.0", {"train": made}, features, "", monkeypatch)
    task, _ = task_of("vtab1k", tmp_path, "dsprites_ori")
    assert task.test.labels == [int(np.floor(np.float32(i) / np.float32(2.5))) for i in range(40)]
    assert len(set(task.test.labels)) == 16 and task.pixels == "lossless"
    first = pixels(task.test.items[1])
    assert np.array_equal(first, np.eye(4, dtype=np.uint8)[..., None].repeat(3, 2) * 255)
    task, _ = task_of("vtab1k", tmp_path, "dsprites_loc")
    assert task.test.labels == [i % 32 // 2 for i in range(360, 400)]


def test_a_set_of_classes_and_its_tasks_listed(tmp_path, monkeypatch, capsys):
    features = {"image": IMAGE, "label": of_classes(10), "filename": {"type": "a.Text"}}
    made = [example(image=encoded(i), label=i % 10) for i in range(30)]
    write_vtab(tmp_path, "eurosat/rgb", "2.0.0", {"train": made}, features, "", monkeypatch)
    task, _ = task_of("vtab1k", tmp_path, "eurosat")
    assert task.test.labels == [i % 10 for i in range(24, 30)]
    assert [item.read() for item in task.val.items] == [encoded(18), encoded(19)]
    both = task.joined().train
    assert both.labels == [0, 1, 2, 3, 8, 9]
    spec = tmp_path / "vtab.toml"
    command = ["protocol", "vtab1k", str(tmp_path), "--methods", "linear", "--grid", "fixed"]
    assert main([*command, "--output", str(spec)]) == 0
    assert '[tasks."eurosat"]' in spec.read_text()
    capsys.readouterr()
    few = made[:7]
    write_vtab(tmp_path / "few", "resisc45", "3.0.0", {"train": few}, features, "", monkeypatch)
    assert "too few: those of" in refused("vtab1k", tmp_path / "few", task="resisc45")
    write_vtab(tmp_path / "alien", "dtd", "3.0.1", {"train": few}, features, "", monkeypatch)
    assert "missing split validation" in refused("vtab1k", tmp_path / "alien", task="dtd")
