"""Folders as people have them: what is read, what is said in one line, what is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata

import pytest

from pae.train.cli import main
from tests.train.folders import fill, lists, read, refusal, save, tables
from tests.train.helpers import BACKBONE_FLAGS, CPU_FLAGS, save_shades

# ---- names of splits and classes


@pytest.mark.parametrize(
    "train, val, test",
    [
        ("Training", "VALID", "Testing"),
        ("TRAIN", "Validation", "TEST"),
        ("train", "Val", "testing"),
    ],
)
def test_splits_in_any_case_and_their_synonyms(tmp_path, train, val, test):
    fill(tmp_path, **{train: {"a": 2, "b": 2}, val: {"a": 1, "b": 1}, test: {"a": 1, "b": 2}})
    task, said = read(tmp_path)
    assert task.sizes() == {"train": 4, "val": 2, "test": 3} and not said
    for split, name in (("train", train), ("val", val), ("test", test)):
        for part in ("a", "b"):
            (tmp_path / name / part).rename(tmp_path / f"{split}-{part}")
        names = {
            str((tmp_path / f"{split}-{part}" / f.name).relative_to(tmp_path)): number
            for number, part in enumerate("ab")
            for f in (tmp_path / f"{split}-{part}").iterdir()
        }
        (tmp_path / name).rmdir()
        (tmp_path / f"{name}.json").write_text(json.dumps(names))
    task, said = read(tmp_path)
    assert task.sizes() == {"train": 4, "val": 2, "test": 3} and not said


@pytest.mark.parametrize("first, second", [("train", "Training"), ("val", "valid")])
def test_two_folders_for_one_split_are_refused(tmp_path, first, second):
    both = {first: {"a": 2, "b": 2}, second: {"a": 2, "b": 2}}
    line = refusal(fill(tmp_path, **{"train": {"a": 2, "b": 2}, **both}))
    assert first in line and second in line and "split" in line


@pytest.mark.parametrize(
    "classes",
    [
        ["images", "annotations"],
        ["images", "labels"],
        ["img", "mask"],
        ["train2017", "val2017"],
        ["seg_train", "seg_test"],
        ["trainset", "testset"],
        ["train_images", "test_images"],
        ["cat", "dog", "Validation"],
        ["Annotations", "JPEGImages", "cat"],
        ["train", "val"],
    ],
)
def test_folders_of_a_data_set_are_never_learned_as_classes(tmp_path, classes):
    fill(tmp_path / "below", train=dict.fromkeys(classes, 2))
    line = refusal(tmp_path / "below")
    assert "in place of classes" in line and "train/<class>/" in line
    if not {"train", "Validation"} & set(classes):  # which are splits where they lie here
        fill(tmp_path, alone=dict.fromkeys(classes, 2))
        assert "in place of classes" in refusal(tmp_path / "alone")


def test_classes_that_only_sound_like_splits(tmp_path):
    """CIFAR-100 and COCO have trains; a mask and no mask is a task."""
    fill(tmp_path / "vehicles", train={"bus": 2, "train": 2}, val={"bus": 1, "train": 1})
    assert read(tmp_path / "vehicles")[0].classes == ("bus", "train")
    fill(tmp_path / "faces", train={"mask": 5, "no_mask": 5, "label": 5})
    assert read(tmp_path / "faces")[0].classes == ("label", "mask", "no_mask")
    # but an archive unpacked one folder too deep holds no vehicles
    fill(tmp_path / "deep" / "train", train={"a": 2, "b": 2})
    fill(tmp_path / "deep", train={"other": 2})
    assert "in place of classes: 'train';" in refusal(tmp_path / "deep")


def test_splits_inside_the_classes_are_refused(tmp_path):
    fill(tmp_path / "cat", train={".": 2}, val={".": 2})
    fill(tmp_path / "dog", train={".": 2}, val={".": 2})
    assert "splits inside a class ('train', 'val')" in refusal(tmp_path)


def test_folders_and_files_beside_the_splits_are_named(tmp_path):
    fill(tmp_path, train={"a": 5, "b": 5}, val2017={"a": 1, "b": 1}, notes={"c": 1})
    save(tmp_path / "loose.jpg")
    save(tmp_path / "val.json")
    task, said = read(tmp_path)
    assert task.sizes() == {"train": 8, "val": 2, "test": 0}
    assert any("'notes', 'val2017'; a split is called" in line for line in said)
    assert any("1 images outside the class folders" in line for line in said)
    assert any("'val.json' ignored" in line for line in said)


def test_folders_win_over_a_json_file_without_its_test(tmp_path):
    """Annotations of the images in train/ often lie beside it, under the same name."""
    fill(tmp_path, train={"a": 5, "b": 5})
    (tmp_path / "train.json").write_text('{"images": []}')
    task, said = read(tmp_path)
    assert task.sizes()["train"] == 8 and any("'train.json' ignored" in line for line in said)


def test_what_is_said_reaches_the_terminal(tmp_path, capsys):
    save_shades(tmp_path / "data", train=5, test=2)
    for name in ("a.txt", "b.svg"):
        save(tmp_path / "data" / "train" / "dark" / name)
    shutil.rmtree(tmp_path / "data" / "test" / "light")
    flags = [*BACKBONE_FLAGS, *CPU_FLAGS, "--method", "linear", "--epochs", "1", "--quiet"]
    folders = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "run")]
    assert main(["train", *flags, *folders]) == 0  # --quiet is about progress
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    train = tmp_path / "data" / "train"
    assert warned == [
        f"warning: {train}: 2 files with other suffixes ignored (.txt 1, .svg 1)",
        "warning: data: split test has no images of 1 of 3 classes: 'light'",
    ]


def test_one_class_alone_is_refused_in_every_layout(tmp_path):
    fill(tmp_path / "f", train={"a": 3}, val={"a": 3})
    assert "one class alone, 'a'" in refusal(tmp_path / "f")
    fill(tmp_path / "deep" / "inner", train={"a": 3, "b": 3})
    assert str(tmp_path / "deep" / "inner") in refusal(tmp_path / "deep")
    lists(tmp_path / "v", [(f"images/{i}.png", 1) for i in range(3)])
    assert "one class alone, '1'" in refusal(tmp_path / "v")
    tables(tmp_path / "j", {"0.png": "x", "1.png": "x"})
    assert "one class alone, 'x'" in refusal(tmp_path / "j")


def test_names_of_classes_that_need_care(tmp_path):
    accented = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    fill(tmp_path / "n", train={accented[0]: 2, "b": 2}, val={accented[1]: 1, "b": 1})
    assert read(tmp_path / "n")[0].val.labels == [0, 1]
    fill(tmp_path / "n", train={accented[1]: 2})
    assert "two folders of one name" in refusal(tmp_path / "n")
    fill(tmp_path / "c", train={"Cat": 2, "cat": 2}, val={"Cat": 1, "cat": 1})
    assert any("differ in case alone: 'Cat', 'cat'" in line for line in read(tmp_path / "c")[1])
    fill(tmp_path / "d", train={"cat": 2, "dog": 2}, val={"Cat": 1})
    assert "'Cat' is not among the training classes (which have 'cat')" in refusal(tmp_path / "d")
    fill(tmp_path / "o", train={"10": 1, "2": 1, "a\nb": 1}, val={"2": 1, "a\nb": 1})
    task, said = read(tmp_path / "o")
    assert task.classes == ("10", "2", "a\nb") and "'10'" in said[0]
    fill(tmp_path / "s", train={os.fsdecode(b"caf\xe9"): 2, "b": 2})
    assert r"caf\udce9" in refusal(tmp_path / "s") and "not UTF-8" in refusal(tmp_path / "s")


# ---- files


def test_hidden_parts_are_left_out_everywhere(tmp_path):
    fill(tmp_path, train={"a": 3, "b": 3}, val={"a": 1, "b": 1}, test={"a": 1, "b": 1})
    litter = [".ipynb_checkpoints/x.png", "__MACOSX/x.png", "@eaDir/x.png", ".git/x.png"]
    for split in ("train", "val", "test", "."):
        for below in (".", "a", "b/deeper"):
            for name in [*litter, "._x.png", ".DS_Store", "Thumbs.db", "desktop.ini"]:
                save(tmp_path / split / below / name)
    for name in ("a", "b"):
        (tmp_path / name).rename(tmp_path / f".{name}")  # made by the loop, below the root
    task, said = read(tmp_path)
    assert task.sizes() == {"train": 6, "val": 2, "test": 2} and not said
    assert task.classes == ("a", "b")


def test_hidden_files_are_left_out_of_lists(tmp_path):
    root = tmp_path / ".cache" / "data"  # where the data lies is not asked
    rows = [(f"images/{i}.png", i % 2) for i in range(4)]
    rows += [("images/.ipynb_checkpoints/0.png", 0), ("./images/._1.png", 1)]
    rows += [(f"{root}/images/{i}.png", i % 2) for i in range(4, 6)]
    lists(root, rows)
    task, said = read(root)
    assert task.sizes()["train"] == 6
    assert sum("2 hidden files left out" in line for line in said) == 3
    tables(tmp_path / "j", {"0.png": 0, "1.png": 1, ".git/2.png": 2})
    task, said = read(tmp_path / "j")
    assert task.sizes()["train"] == 2 and task.classes == ("0", "1")
    assert any("1 hidden files left out" in line for line in said)


def test_links_are_followed_once(tmp_path):
    fill(tmp_path / "data", train={"a": 2, "b": 2}, val={"a": 1, "b": 1})
    fill(tmp_path, disk={"more": 3, "whole": 2})
    train = tmp_path / "data" / "train"
    (train / "a" / "more").symlink_to(tmp_path / "disk" / "more")
    (train / "c").symlink_to(tmp_path / "disk" / "whole")
    (train / "b" / "file.png").symlink_to(tmp_path / "disk" / "whole" / "0.png")
    assert sorted(read(tmp_path / "data")[0].train.labels) == [0] * 5 + [1] * 3 + [2] * 2
    loops = [train / "a" / "self", train / "a" / "more" / "again", train / "b" / "up"]
    for link, target in zip(loops, [train / "a", tmp_path / "disk" / "more", tmp_path / "data"]):
        link.symlink_to(target)
    task, said = read(tmp_path / "data")
    assert sorted(task.train.labels) == [0] * 5 + [1] * 3 + [2] * 2
    assert any("3 links to folders that were read already" in line for line in said)
    # the file linked into b is one of c's own
    assert any("split train has 1 images with two labels, e.g." in line for line in said)


@pytest.mark.parametrize("place", ["train/a/gone.png", "train/a/gone", "train/gone", "gone"])
def test_broken_links_are_named(tmp_path, place):
    fill(tmp_path, train={"a": 5, "b": 5})
    (tmp_path / place).symlink_to(tmp_path / "nowhere")
    line = refusal(tmp_path)
    assert str(tmp_path / place) in line and "broken link" in line and "nowhere" in line
    (tmp_path / place).unlink()
    (tmp_path / place).symlink_to(tmp_path / place)  # a link to itself
    assert str(tmp_path / place) in refusal(tmp_path)


def test_a_val_folder_that_is_the_train_folder_is_said(tmp_path):
    fill(tmp_path, train={"a": 2, "b": 2}, test={"a": 1})
    (tmp_path / "val").symlink_to(tmp_path / "train")
    os.link(tmp_path / "train" / "a" / "0.png", tmp_path / "test" / "a" / "linked.png")
    said = read(tmp_path)[1]
    assert any("4 images of split val are in split train too" in line for line in said)
    assert any("1 images of split test are in split train too" in line for line in said)


def test_val_and_test_may_lack_a_class(tmp_path):
    fill(tmp_path, train={"a": 2, "b": 2, "c": 2}, val={"a": 1, "b": 1}, test={"a": 1})
    (tmp_path / "val" / "c").mkdir()
    task, said = read(tmp_path)
    assert task.sizes() == {"train": 6, "val": 2, "test": 1}
    assert len(said) == 2
    assert "split val has no images of 1 of 3 classes: 'c'" in said[0]
    assert "split test has no images of 2 of 3 classes: 'b', 'c'" in said[1]
    fill(tmp_path, val={"z": 1})
    assert "'z' is not among the training classes" in refusal(tmp_path)


def test_loose_images(tmp_path):
    fill(tmp_path, train={"a": 3, "b": 3}, val={"a": 1, "b": 1}, test={".": 4})
    task, said = read(tmp_path)
    assert task.test is None and len(said) == 1
    assert f"{tmp_path / 'test'}: 4 images without class folders; going on without" in said[0]
    (tmp_path / "test").rename(tmp_path / "images")
    (tmp_path / "test").mkdir()
    assert f"{tmp_path / 'test'}: no images" in refusal(tmp_path)
    (tmp_path / "images").rename(tmp_path / "test" / "images")  # as in Tiny ImageNet
    assert read(tmp_path)[0].test is None
    save(tmp_path / "train" / "loose.png")
    assert any("1 images outside the class folders" in line for line in read(tmp_path)[1])
    fill(tmp_path / "val_is_loose", train={"a": 3, "b": 3}, val={".": 4})
    assert "val: 4 images without class folders; expected val/" in refusal(
        tmp_path / "val_is_loose"
    )
    fill(tmp_path / "train_is_loose", train={".": 4}, val={"a": 1, "b": 1})
    assert "train: 4 images without class folders" in refusal(tmp_path / "train_is_loose")
    fill(tmp_path / "all_loose", **{".": {".": 4}})
    assert "4 images without class folders" in refusal(tmp_path / "all_loose")


def test_files_that_are_not_read_are_counted(tmp_path):
    fill(tmp_path, train={"a": 5, "b": 5})
    for name in ("a/1.txt", "b/2.TXT", "b/3.svg", "b/README"):
        save(tmp_path / "train" / name)
    said = read(tmp_path)[1]
    assert said == [
        f"{tmp_path / 'train'}: 4 files with other suffixes ignored (.txt 2, .svg 1, no suffix 1)"
    ]
    fill(tmp_path / "w", train={"a": 5})
    save(tmp_path / "w" / "train" / "b" / "1.heicx")
    assert "b: class without images (but .heicx 1)" in refusal(tmp_path / "w")
    (tmp_path / "w" / "train" / "b" / "1.heicx").rename(tmp_path / "w" / "train" / "b" / "1.png")
    save(tmp_path / "w" / "val" / "b" / "1.heicx")
    assert "val: no images (but .heicx 1)" in refusal(tmp_path / "w")


def test_empty_and_odd_files_are_named(tmp_path):
    fill(tmp_path, train={"a": 3, "b": 3})
    save(tmp_path / "train" / "b" / "1.png", b"")
    assert "b/1.png: an empty file" in refusal(tmp_path)
    (tmp_path / "train" / "b" / "1.png").unlink()
    os.mkfifo(tmp_path / "train" / "b" / "1.png")
    assert "b/1.png: not a regular file" in refusal(tmp_path)
    (tmp_path / "train" / "b" / "1.png").unlink()
    (tmp_path / "train" / "b" / "1.png").mkdir()  # a folder of that name
    assert read(tmp_path)[0].sizes()["train"] == 4
    assert "a file; unpack it" in refusal(tmp_path / "train" / "a" / "0.png")


def test_unreadable_folders_are_named(tmp_path, monkeypatch):
    fill(tmp_path, train={"a": 3, "b": 3})
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "train/b: cannot be read (Permission denied)" in refusal(tmp_path)


def test_files_come_in_the_order_of_their_parts(tmp_path):
    """Seeded cuts depend on the order: parts of a path, not its text, and never the disk's."""
    names = ["a-1.png", "a/2.png", "a/1.png", "a.png", "B.png", "10.png", "9.png", "a/b/0.png"]
    for name in names:
        save(tmp_path / "train" / "x" / name)
        save(tmp_path / "train" / "y" / name)
        save(tmp_path / "val" / "x" / name)
    task = read(tmp_path)[0]
    assert task.train.items == sorted(task.train.items)
    got = [str(path.relative_to(tmp_path / "val" / "x")) for path in task.val.items]
    expected = ["10.png", "9.png", "B.png", "a/1.png", "a/2.png", "a/b/0.png", "a-1.png", "a.png"]
    assert got == expected


def test_a_folder_is_read_with_few_calls(tmp_path, monkeypatch):
    """One look per file: folders of 100,000 files are read in about a second."""
    fill(tmp_path, train={"a": 200, "b": 200}, val={"a": 1, "b": 1})
    calls = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *a, **k: calls.append(a) or stat(*a, **k))
    assert read(tmp_path)[0].sizes()["train"] == 400
    assert len(calls) < 150
