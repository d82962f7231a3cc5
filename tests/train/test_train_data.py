"""Image folders, cuts and pixels, on images made here; no network."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pae.train.data import Images, make_task, read_folder, stratified_cut
from tests.properties import examples


def picture(seed, size=(12, 10)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def save_pictures(folder, count, start=0, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(start + i).save(folder / f"{i:03d}{suffix}")


def image_folder(root, splits):
    for split, classes in splits.items():
        for name, count in classes.items():
            save_pictures(root / split / name, count)
    return root


# ---- cuts


@examples(60)
@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    fractions=st.tuples(st.floats(0.1, 0.6), st.floats(0.1, 0.4)),
    seed=st.integers(0, 5),
)
def test_stratified_cut_takes_exact_sizes_with_the_shares_of_the_classes(counts, fractions, seed):
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    random.Random(seed).shuffle(labels)
    sizes = [max(1, int(f * len(labels))) for f in fractions]
    parts = stratified_cut(labels, sizes, seed)
    assert [len(part) for part in parts] == sizes
    assert not set(parts[0]) & set(parts[1])
    assert parts == stratified_cut(labels, sizes, seed)
    left = list(counts)
    for part, size in zip(parts, sizes):
        total = sum(left)
        for c in range(len(counts)):
            got = sum(labels[i] == c for i in part)
            assert abs(got - size * left[c] / total) < 1
            left[c] -= got


def test_another_seed_cuts_differently():
    labels = [0, 1] * 50
    assert stratified_cut(labels, [20], 0) != stratified_cut(labels, [20], 1)


@pytest.mark.parametrize("sizes", [[0], [8, 3], [-1, 2]])
def test_impossible_cut_is_refused(sizes):
    with pytest.raises(ValueError, match=r"at most 10 images"):
        stratified_cut([0, 1] * 5, sizes, 0)


def test_cut_that_must_lose_a_class_is_refused():
    images = Images([f"{i}" for i in range(101)], [0] * 100 + [1])
    with pytest.raises(ValueError, match=r"1 training images cannot cover 2 classes.*--train-size"):
        make_task("x", ["common", "rare"], images, None, None, train_size=1, val_size=2, seed=0)


# ---- layouts


def test_image_folder_with_all_splits(tmp_path):
    image_folder(
        tmp_path,
        {"train": {"a": 3, "b": 2}, "valid": {"a": 1, "b": 1}, "test": {"a": 2, "b": 1}},
    )
    task = read_folder(tmp_path)
    assert task.classes == ("a", "b")
    assert task.train.labels == [0, 0, 0, 1, 1]
    assert task.sizes() == {"train": 5, "val": 2, "test": 3}
    assert {path.parent.name for path in task.test.items} == {"a", "b"}


def test_training_folder_alone_is_cut_by_seed(tmp_path):
    image_folder(tmp_path, {"train": {"a": 10, "b": 20}})
    first, again, other = (read_folder(tmp_path, seed=s) for s in (0, 0, 1))
    assert first.sizes() == {"train": 24, "val": 6, "test": 0} and first.test is None
    assert first.val.labels.count(0) == 2
    assert first.val.items == again.val.items != other.val.items
    assert not set(first.train.items) & set(first.val.items)
    assert read_folder(tmp_path, train_size=9, val_size=3).sizes()["train"] == 9


def test_class_folders_without_split_folders_count_as_training(tmp_path):
    image_folder(tmp_path, {".": {"a": 5, "b": 5}})
    assert read_folder(tmp_path).sizes() == {"train": 8, "val": 2, "test": 0}


def vtab(root, lists):
    for name, lines in lists.items():
        (root / name).write_text("\n".join(lines) + "\n")
    return root


def test_vtab_layout(tmp_path):
    save_pictures(tmp_path / "images" / "train800", 3)
    save_pictures(tmp_path / "images" / "test", 2)
    line = "images/train800/{:03d}.png {}".format
    vtab(
        tmp_path,
        {
            "train800.txt": [line(0, 0), line(1, 2)],
            "val200.txt": [line(2, 1)],
            "test.txt": ["images/test/000.png 2", "images/test/001.png 0"],
        },
    )
    with pytest.warns(UserWarning, match=r"2 images, VTAB-1k has 800"):
        task = read_folder(tmp_path)
    assert task.classes == ("0", "1", "2")
    assert (task.train.labels, task.val.labels, task.test.labels) == ([0, 2], [1], [2, 0])


def test_vtab_layout_names_what_is_wrong(tmp_path):
    save_pictures(tmp_path / "images", 1)
    vtab(tmp_path, {"train800.txt": ["images/000.png 0"], "val200.txt": ["images/000.png 0"]})
    with pytest.raises(ValueError, match=r"missing split test\.txt"):
        read_folder(tmp_path)
    vtab(tmp_path, {"test.txt": ["images/gone.png 0"]})
    with pytest.raises(ValueError, match=r"lists a file that is absent.*gone.png"):
        read_folder(tmp_path)
    vtab(tmp_path, {"test.txt": ["images/000.png minus-one"]})
    with pytest.raises(ValueError, match=r"test\.txt:1: expected 'path label'"):
        read_folder(tmp_path)


@pytest.mark.filterwarnings("ignore:.*VTAB-1k has")
def test_exported_jpegs_in_vtab_layout_are_warned_about(tmp_path):
    save_pictures(tmp_path / "images", 2, suffix=".jpg")
    lines = ["images/000.jpg 0", "images/001.jpg 1"]
    vtab(tmp_path, {"train800.txt": lines, "val200.txt": lines, "test.txt": lines})
    with pytest.warns(UserWarning, match="encoded as JPEG of quality 75"):
        read_folder(tmp_path)


def fgvc(root, **tables):
    for split, table in tables.items():
        (root / f"{split}.json").write_text(json.dumps(table))
    return root


def test_fgvc_layout_numbers_classes_over_the_training_ids(tmp_path):
    save_pictures(tmp_path / "images", 5)
    fgvc(
        tmp_path,
        train={"000.png": 7, "001.png": 3, "002.png": 9},
        val={"003.png": 9},  # numbered per file this would be class 0
        test={"004.png": 7},
    )
    task = read_folder(tmp_path)
    assert task.classes == ("3", "7", "9")
    assert (task.train.labels, task.val.labels, task.test.labels) == ([1, 0, 2], [2], [1])
    assert task.val.items[0].is_file()


def test_fgvc_layout_names_what_is_wrong(tmp_path):
    save_pictures(tmp_path / "images", 2)
    fgvc(tmp_path, train={"000.png": 1, "001.png": 2}, val={"000.png": 1})
    with pytest.raises(ValueError, match=r"missing split test\.json"):
        read_folder(tmp_path)
    fgvc(tmp_path, test={"000.png": 5})
    with pytest.raises(ValueError, match=r"class 5 is not in train.json"):
        read_folder(tmp_path)


def test_folders_that_are_no_dataset(tmp_path):
    with pytest.raises(ValueError, match=r"no such folder"):
        read_folder(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"expected train/<class>/"):
        read_folder(tmp_path)
    image_folder(tmp_path / "t", {"test": {"a": 1, "b": 1}})
    with pytest.raises(ValueError, match=r"missing split train"):
        read_folder(tmp_path / "t")
    image_folder(tmp_path / "e", {"train": {"a": 1, "b": 0}})
    with pytest.raises(ValueError, match=r"b: class without images"):
        read_folder(tmp_path / "e")
    image_folder(tmp_path / "u", {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1, "z": 1}})
    with pytest.raises(ValueError, match=r"'z' is not among the training classes"):
        read_folder(tmp_path / "u")
