"""List files and tables as people write them, and damaged: read, or refused by name."""

from __future__ import annotations

import json
import random
import unicodedata
import warnings

import pytest

from pae.train.data import read_folder
from tests.properties import FRESH
from tests.train.folders import lists, read, refusal, save, tables


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
