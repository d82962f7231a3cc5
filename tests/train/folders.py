"""Data folders that tests make, in the layouts that people have, and how they are read."""

from __future__ import annotations

import json
import warnings

import pytest

from pae.train.data import read_folder


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
