"""Folders as people have them: what is read, what is said in one line, what is refused by name."""

from __future__ import annotations

import json
import os
import random
import shutil
import unicodedata
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pae.train.cli import main
from pae.train.data import read_folder, stratified_cut
from tests.properties import FRESH, examples
from tests.train.helpers import BACKBONE_FLAGS, CPU_FLAGS, save_shades


def save(path, content=b"not decoded here"):
    """A file where an image would be: layouts look at names, and at whether there is anything."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def fill(root, **splits):
    """`split={"class": count}` as folders; returns `root`."""
    for split, classes in splits.items():
        for name, count in classes.items():
            for i in range(count):
                save(root / split / name / f"{i}.png")
    return root


def read(root, **options):
    """The task, and what was said; every warning is one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task = read_folder(root, **options)
    said = [str(warning.message) for warning in caught]
    assert not [text for text in said if "\n" in text]
    return task, said


def refusal(root, **options):
    """The one line that refuses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError) as caught:
            read_folder(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- cuts


def cut_in_quadratic_time(labels, sizes, seed):
    """The cut of published runs, as first written: a scan of all images for every class."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    pools = {}
    for name in sorted(set(labels)):
        members = [i for i, label in enumerate(labels) if label == name]
        order = torch.randperm(len(members), generator=generator).tolist()
        pools[name] = [members[i] for i in order]
    parts = []
    for size in sizes:
        left = {name: len(pool) for name, pool in pools.items()}
        shares = {name: size * n / sum(left.values()) for name, n in left.items()}
        take = {name: int(share) for name, share in shares.items()}
        by_remainder = sorted(shares, key=lambda name: (take[name] - shares[name], name))
        for name in by_remainder[: size - sum(take.values())]:
            take[name] += 1
        parts.append(sorted(i for name, n in take.items() for i in pools[name][:n]))
        pools = {name: pool[take[name] :] for name, pool in pools.items()}
    return parts


@examples(150)
@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=9),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_cuts_of_published_runs_stay_as_they_are(counts, seed, data):
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    random.Random(seed).shuffle(labels)
    first = data.draw(st.integers(1, len(labels) - 1))
    sizes = [first, data.draw(st.integers(1, len(labels) - first))]
    before = cut_in_quadratic_time(labels, sizes, seed)
    assert stratified_cut(labels, sizes, seed) == before
    covered = {labels[i] for i in before[0]} == set(labels)
    if covered:
        assert stratified_cut(labels, sizes, seed, cover=True) == before
    elif first >= len(counts):
        parts = stratified_cut(labels, sizes, seed, cover=True)
        assert {labels[i] for i in parts[0]} == set(labels)
        assert [len(part) for part in parts] == sizes and not set(parts[0]) & set(parts[1])
    else:
        with pytest.raises(ValueError, match=f"{first} images cannot cover"):
            stratified_cut(labels, sizes, seed, cover=True)


def test_room_for_one_image_of_every_class_is_enough():
    labels = [c for c, n in enumerate([6, 5, 1, 1, 1, 1, 1, 1]) for _ in range(n)]
    for seed in range(5):
        train, _ = stratified_cut(labels, [8, 9], seed, cover=True)
        assert [labels[i] for i in train] == list(range(8))


def test_a_cut_reads_each_label_once():
    """Linear in the images, whatever the number of classes."""

    class Counted(list):
        read = 0

        def __iter__(self):
            for label in super().__iter__():
                Counted.read += 1
                yield label

    labels = Counted(i % 3000 for i in range(9000))
    parts = stratified_cut(labels, [6000, 3000], 0)
    assert [len(part) for part in parts] == [6000, 3000] and Counted.read == 9000


def test_long_tailed_classes_stay_in_training(tmp_path):
    fill(tmp_path, train={"common": 40, "pair": 2, "single": 1})
    for seed in range(10):
        task, said = read(tmp_path, seed=seed)
        assert set(task.train.labels) == {0, 1, 2} and task.train.labels.count(2) == 1
        assert task.sizes() == {"train": 35, "val": 8, "test": 0}
        lacking = [c for c in ("pair", "single") if task.classes.index(c) not in task.val.labels]
        assert any(f"{len(lacking)} of 3 classes" in line and "'single'" in line for line in said)
    task, _ = read(tmp_path, train_size=4, val_size=30)
    assert set(task.train.labels) == {0, 1, 2} and task.sizes()["val"] == 30
    fill(tmp_path / "rare", train={"common": 2, **dict.fromkeys("abcdefgh", 1)})
    assert read(tmp_path / "rare")[0].sizes() == {"train": 9, "val": 1, "test": 0}


def test_sizes_that_cannot_be_had_name_the_option(tmp_path):
    fill(tmp_path, train={"a": 1, "b": 1})
    assert "2 images of as many classes leave none for validation" in refusal(tmp_path)
    fill(tmp_path, train={"a": 3, "b": 3})
    line = refusal(tmp_path, train_size=5, val_size=4)
    assert "at most 6 images are there, 5 + 4 are wanted" in line
    assert "0 training images cannot cover 2 classes" in refusal(tmp_path, val_size=6)
    fill(tmp_path, val={"a": 1, "b": 1})
    _, said = read(tmp_path, val_size=3)
    assert any("--val-size is ignored" in line for line in said)


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
    flags = [*BACKBONE_FLAGS, *CPU_FLAGS, "--method", "linear", "--epochs", "1"]
    folders = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "run")]
    assert main(["train", *flags, *folders]) == 0
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


# ---- lists


def lists(root, rows, form="{} {}", end="\n", encoding="utf-8"):
    """The three list files of VTAB-1k, all with these rows, and the files that they name."""
    for name, _ in rows:
        if not (root / name).exists():
            save(root / name)
    text = "".join(form.format(name, label) + end for name, label in rows)
    (root / "images").mkdir(exist_ok=True)
    for name in ("train800.txt", "val200.txt", "test.txt"):
        (root / name).write_bytes(text.encode(encoding))
    return root


def tables(root, table, **others):
    """FGVC's files; without `others`, all with this table."""
    others = {"val": table, "test": table, **others}
    for split, each in {"train": table, **others}.items():
        root.mkdir(parents=True, exist_ok=True)
        text = each if isinstance(each, str) else json.dumps(each)
        (root / f"{split}.json").write_text(text, encoding="utf-8")
        for name in each if isinstance(each, dict) else ():
            if not (root / "images" / name).exists():
                save(root / "images" / name)
    return root


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"end": "\r\n"},
        {"end": "\r"},
        {"end": "\n\n"},
        {"encoding": "utf-8-sig"},
        {"form": "{}\t{}"},
        {"form": "{},{}"},
        {"form": "{} , {}"},
        {"form": "{};{}"},
        {"form": '"{}" {}'},
        {"form": '"{}",{}'},
        {"form": "  {}   {}  "},
        {"form": "./{} +{}"},
        {"form": "images/../{} 0{}"},
    ],
)
def test_list_files_as_people_write_them(tmp_path, options):
    rows = [(f"images/im {i}, of 8.png", i % 2) for i in range(8)]
    task, _ = read(lists(tmp_path, rows, **options))
    assert task.train.labels == [0, 1] * 4 and task.classes == ("0", "1")
    assert [path.name for path in task.train.items] == [f"im {i}, of 8.png" for i in range(8)]


def test_list_files_from_elsewhere(tmp_path):
    name = "images/\u00e9t\u00e9.png"
    rows = [(unicodedata.normalize("NFC", name), 0), ("images/b.png", 1)]
    lists(tmp_path, rows)
    both = "".join(f"{unicodedata.normalize('NFD', n)} {label}\n" for n, label in rows)
    for form in (both, both.replace("/", "\\"), both.replace("images", f"{tmp_path}/images")):
        (tmp_path / "train800.txt").write_text(form, encoding="utf-8")
        task, said = read(tmp_path)
        assert task.train.labels == [0, 1]
        assert any("2 images of split val are in split train too" in line for line in said)
    (tmp_path / "train800.txt").rename(tmp_path / "Train800.TXT")
    assert read(tmp_path)[0].train.labels == [0, 1]


@pytest.mark.parametrize(
    "line, message",
    [
        ("images/0.png -1", "label -1, expected a class number from 0"),
        ("images/0.png 1.5", "expected 'path label'"),
        ("images/0.png cat", "expected 'path label'"),
        ("images/0.png \u0663", "expected 'path label'"),
        ("images/0.png \u00b2", "expected 'path label'"),
        ("3", "expected 'path label'"),
        ("images/0.png " + "9" * 5000, "label 999"),
        ("images/0.png 60000000", "label 60000000 among 3 different ones"),
        ("images/0.png 1000", "without large gaps"),
        ("images/gone.png 1", "lists a file that is absent"),
        ("images/\0.png 1", "zero bytes"),
    ],
)
def test_lines_that_cannot_be_meant_are_refused(tmp_path, line, message):
    lists(tmp_path, [("images/0.png", 0), ("images/1.png", 1)])
    text = (tmp_path / "val200.txt").read_text()
    (tmp_path / "val200.txt").write_text(text + line + "\n", encoding="utf-8")
    assert message in refusal(tmp_path)
    assert str(tmp_path) in refusal(tmp_path) and len(refusal(tmp_path)) < 400


def test_labels_with_small_gaps_are_said(tmp_path):
    task, said = read(lists(tmp_path, [(f"images/{i}.png", 1 + 2 * i) for i in range(9)]))
    assert len(task.classes) == 18
    line = "has no images of 9 of 18 classes: '0', '2', '4', '6', '8', ..."
    assert sum(line in each for each in said) == 3


def test_doubled_and_leaking_files_are_counted(tmp_path):
    lists(tmp_path, [("images/0.png", 0), ("images/1.png", 1), ("images/2.png", 1)])
    (tmp_path / "val200.txt").write_text("images/../images/1.png 1\nimages/3.png 0\n")
    (tmp_path / "test.txt").write_text("images/3.png 0\nimages/3.png 1\nimages/3.png 1\n")
    save(tmp_path / "images" / "3.png")
    said = read(tmp_path)[1]
    for part in (
        "1 images of split val are in split train too",
        "1 images of split test are in split val too",
        "split test has 2 images twice",
        "split test has 1 images with two labels, e.g. " + str(tmp_path / "images" / "3.png"),
    ):
        assert sum(part in line for line in said) == 1, part
    assert not [line for line in said if "test are in split train" in line]


@pytest.mark.parametrize("name", ["train800.txt", "val200.txt", "test.txt"])
def test_list_files_that_are_no_text_are_named(tmp_path, name):
    rows = [("images/0.png", 0), ("images/1.png", 1)]
    for content, message in (
        ("".join(f"{n} {c}\n" for n, c in rows).encode("utf-16"), "UTF-16"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not a text file"),
        (b"images/caf\xe9.png 0\n", "not text in UTF-8 (byte 0xe9 at 10)"),
        (b"", "lists no images"),
        (b"\n \r\n", "lists no images"),
    ):
        lists(tmp_path, rows)
        (tmp_path / name).write_bytes(content)
        line = refusal(tmp_path)
        assert message in line and str(tmp_path / name) in line


def test_ids_of_mixed_kinds_are_compared_as_text(tmp_path):
    tables(tmp_path, {"0.png": 10, "1.png": 9, "2.png": 10.0}, val={"0.png": "9", "1.png": 10})
    task, _ = read(tmp_path)
    assert task.classes == ("9", "10") and task.train.labels == [1, 0, 1]
    assert task.val.labels == [0, 1]
    tables(tmp_path, {"0.png": "10", "1.png": 9, "2.png": "9"})
    assert read(tmp_path)[0].classes == ("10", "9")
    tables(tmp_path, {"0.png": True, "1.png": False})
    assert read(tmp_path)[0].classes == ("False", "True")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"0.png": 0, "1.png": 1, "0.png": 1}', "1 names stand there twice: '0.png'"),
        ('{"0.png": NaN}', "'0.png' has nan"),
        ('{"0.png": Infinity}', "'0.png' has inf"),
        ('{"0.png": 1e999}', "'0.png' has inf"),
        ('{"0.png": 1.5}', "'0.png' has 1.5"),
        ('{"0.png": null}', "'0.png' has None"),
        ('{"0.png": ""}', "'0.png' has ''"),
        ('{"0.png": "\\ud800"}', r"'0.png' has '\ud800'"),
        ('{"0.png": [1]}', "'0.png' has a list or an object"),
        ('{"images": [{"id": 1}], "annotations": []}', "'images' has a list or an object"),
        ('{"\\ud800.png": 0, "1.png": 1}', "absent or unreadable: "),
        ('{"a\\u0000.png": 0, "1.png": 1}', "absent or unreadable: "),
        ('{"0.png": ' + "1" * 5000 + "}", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ('{"a":' * 100_000, "not a JSON file"),
        ("[]", "expected a non-empty object"),
        ("{}", "expected a non-empty object"),
        ("7", "expected a non-empty object"),
        ('{"0.png": 0', "not a JSON file"),
        ("", "not a JSON file"),
        (json.dumps({"0.png": "x" * 9999, "1.png": "y" * 9999}), "class 0 is not in train.json"),
        (json.dumps({"0" * 9999: 0, "1.png": 1}), "absent or unreadable: "),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(tmp_path, text, message):
    tables(tmp_path, {"0.png": 0, "1.png": 1}, train=text)
    line = refusal(tmp_path)
    assert message in line and str(tmp_path) in line and len(line) < 900


def test_two_tables_for_one_split_are_refused(tmp_path):
    tables(tmp_path, {"0.png": 0, "1.png": 1}, Valid={"0.png": 0})
    line = refusal(tmp_path)
    assert "Valid.json" in line and "val.json" in line


# ---- damaged files


def damaged(content, draw):
    """`content` with some bytes changed, cut out, put in, or all that follows lost."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(6)
        if kind == 0:
            data[at : at + 1] = draw.randbytes(1)
        elif kind == 1:
            del data[at : at + draw.randint(1, 20)]
        elif kind == 2:
            data[at:at] = draw.randbytes(draw.randint(1, 20))
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:at] = draw.choice([b"[", b"{", b'"', b"9", b" ", b"\\"]) * draw.randint(1, 9999)
        else:
            data[at:at] = draw.choice(
                [b"NaN", b"null", b"\\ud800", b"-1", b"1e999", b"\xef\xbb\xbf", b"\xff\xfe", b"\r"]
            )
    return bytes(data)


@pytest.mark.parametrize("kind", ["list", "table"])
def test_damaged_lists_are_read_or_refused_by_name(tmp_path, kind, request):
    """With `pytest --fresh`, other damage and more of it: 500 files of each kind."""
    rows = [(f"images/im {i}.png", i % 3) for i in range(9)]
    if kind == "list":
        lists(tmp_path, rows)
        file = tmp_path / "train800.txt"
    else:
        tables(tmp_path, {f"im {i}.png": f"class {i % 3}" for i in range(9)})
        file = tmp_path / "train.json"
    whole = file.read_bytes()
    fresh = request.config.getoption("--fresh")
    draw = random.Random(None if fresh else 0)
    for _ in range(100 * FRESH if fresh else 60):
        content = damaged(whole, draw)
        file.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                task = read_folder(tmp_path)
            except ValueError as error:
                line = str(error)
                # about one split of two, or sizes: the folder's own name
                assert tmp_path.name in line and len(line) < 1500, (content, line)
                assert type(error) is ValueError, content
            else:
                assert len(task.classes) < 1000 and len(task.train) <= 20
