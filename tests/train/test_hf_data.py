"""Tables of Hugging Face `datasets`: found by types, read as they were encoded."""

from __future__ import annotations

import json
import pickle
import sys
import warnings

import numpy as np
import pytest

from pae.sweep.spec import read_spec
from pae.train import hf_data, images
from pae.train.cli import main
from pae.train.data import read_folder
from pae.train.stored import Columns
from tests.train.folders import read, refusal
from tests.train.helpers import BACKBONE_FLAGS, CPU_FLAGS, PROBE_FLAGS, error_line
from tests.train.rows import encoded, pixels, shades
from tests.train.test_protocols import refused, task_of

datasets = pytest.importorskip("datasets", reason='needs pip install "pae[data]"')


def table(count=6, names=("crow", "wren"), **more):
    """Rows with an image and a class, others by name."""
    columns = {"photo": [{"bytes": encoded(i), "path": None} for i in range(count)]}
    kinds = {"photo": datasets.Image()}
    if names is not None:
        columns["kind"] = [i % len(names) for i in range(count)]
        kinds["kind"] = datasets.ClassLabel(names=list(names))
    for name, (values, kind) in more.items():
        columns[name], kinds[name] = values, kind
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def save(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return f"hf:{folder}"


def test_a_table_that_was_saved(tmp_path):
    data = save(tmp_path / "birds", train=table(8), validation=table(4), test=table(5))
    task, said = read(data)
    assert task.name == "birds" and task.classes == ("crow", "wren") and not said
    assert task.sizes() == {"train": 8, "val": 4, "test": 5}
    assert task.test.labels == [0, 1, 0, 1, 0]
    item = task.test.items[3]
    assert str(item) == "birds/test[3]" and item.read() == encoded(3)
    assert np.array_equal(pixels(pickle.loads(pickle.dumps(item))), pixels(item))
    assert "give --data hf:" in refusal(tmp_path / "birds")
    one = table(8)
    one.save_to_disk(str(tmp_path / "one"))
    assert read(f"hf:{tmp_path / 'one'}", val_size=2)[0].sizes()["train"] == 6


def test_a_run_on_parquet_and_its_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    made = [(i, image) for i, level in enumerate((40, 220)) for image in shades(8, level)]
    rows = {"image": [{"bytes": b, "path": None} for _, b in made], "label": [i for i, _ in made]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])}
    whole = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    folder = tmp_path / "shades"
    for split in ("train", "test"):
        whole.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    data, out = f"hf:{folder}", tmp_path / "run"
    flags = [*BACKBONE_FLAGS, *CPU_FLAGS, *PROBE_FLAGS]
    assert main(["train", "--data", data, *flags, "--output", str(out)]) == 0
    kept = json.loads((out / "config.json").read_text())["settings"]
    assert kept["data"] == data
    assert json.loads((out / "metrics.json").read_text())["result"]["test_accuracy"] == 1.0
    said = tmp_path / "said"
    assert main(["evaluate", str(out), "--data", data, "--output", str(said), "--quiet"]) == 0
    facts = json.loads((said / "evaluation.json").read_text())
    assert facts["data"] == data and facts["split"] == "test"


def test_columns_are_named_where_types_do_not_tell(tmp_path):
    more = {"race": ([i % 3 for i in range(6)], datasets.ClassLabel(names=list("abc")))}
    data = save(tmp_path / "two", train=table(6, **more))
    line = refusal(data)
    assert "2 columns are of type ClassLabel; say which is the label with --label-column" in line
    assert "('kind', 'race')" in line
    task = read_folder(data, val_size=2, columns=Columns(None, "race"))
    assert task.classes == ("a", "b", "c")
    assert "has no such column; expected one of photo, kind, race" in refusal(
        data, columns=Columns("picture")
    )
    line = refusal(data, columns=Columns("kind", "race"))
    assert "--image-column kind: a column of ClassLabel, expected images" in line
    data = save(tmp_path / "none", train=table(6, names=None))
    assert "no column is of type ClassLabel; say which is the label" in refusal(data)


def test_labels_that_are_numbers_or_texts(tmp_path):
    texts = (["b", "a", "b", "a"], datasets.Value("string"))
    numbers = ([3, 0, 3, 0], datasets.Value("int64"))
    reals = ([0.5, 0.5, 0.5, 1.5], datasets.Value("float32"))
    data = save(tmp_path / "s", train=table(4, None, text=texts, number=numbers, real=reals))
    task = read_folder(data, val_size=1, columns=Columns(label="text"))
    assert task.classes == ("a", "b") and sorted(task.train.labels + task.val.labels) == [
        0,
        0,
        1,
        1,
    ]
    with pytest.warns(UserWarning, match="has no images of 2 of 4 classes"):
        task = read_folder(data, val_size=1, columns=Columns(label="number"))
    assert task.classes == tuple("0123")
    assert "has float in row 0, expected class numbers or names" in refusal(
        data, columns=Columns(label="real")
    )
    other = (["b", "c", "b", "a"], datasets.Value("string"))
    data = save(tmp_path / "t", train=table(4, None, text=texts), test=table(4, None, text=other))
    line = refusal(data, columns=Columns(label="text"))
    assert "class 'c' is not in the training rows" in line


def test_splits_and_labels_that_lack(tmp_path):
    bare = table(4).remove_columns("kind")
    unknown = ([-1] * 4, datasets.ClassLabel(names=["crow", "wren"]))
    kind = {"kind": unknown}
    blank = table(4, None, **kind)
    data = save(tmp_path / "a", train=table(6), test=blank, extra=table(4))
    task, said = read(data, val_size=2)
    assert task.test is None
    assert any("4 test images without labels" in line for line in said)
    assert any("splits left out: 'extra'" in line for line in said)
    data = save(tmp_path / "b", train=table(6), validation=blank)
    assert "b/validation[0] of split val has no label, expected 0..1" in refusal(data)
    data = save(tmp_path / "c", test=table(6))
    assert "missing split train (found 'test')" in refusal(data)
    data = save(tmp_path / "d", train=table(6), test=bare)
    assert "split test has no column kind" in refusal(data)
    hole = datasets.Dataset.from_dict(
        {"photo": [None, {"bytes": encoded(1), "path": None}] * 3, "kind": [0, 1] * 3},
        features=table(2).features,
    )
    task, _ = read(save(tmp_path / "e", train=hole), val_size=2)
    item = next(item for item in task.train.items if item.number == 0)
    with pytest.raises(ValueError, match=r"unreadable image e/train\[0\]: the row has none"):
        images.decode(item, images.Ranges())


def test_a_task_of_a_protocol_in_a_table(tmp_path):
    names = [str(i) for i in range(10)]
    splits = {"train800": table(6, names), "val200": table(3, names), "test": table(12, names)}
    data = save(tmp_path / "svhn", **splits)
    task, said = task_of("vtab1k", data)
    assert task.name == "svhn" and task.sizes() == {"train": 6, "val": 3, "test": 12}
    assert any("6 images of train, VTAB-1k has 800" in line for line in said)
    assert "missing split test" in refused(
        "vtab1k", save(tmp_path / "dtd", train800=table(6), val200=table(3))
    )
    assert "its name is no task" in refused("vtab1k", save(tmp_path / "mine", train=table(6)))
    data = save(tmp_path / "pets", train=table(12), test=table(4))
    task, _ = task_of("few-shot", data, shots=2)
    assert task.train.labels == [0, 1, 0, 1] or sorted(task.train.labels) == [0, 0, 1, 1]
    assert len(task.val) == 4 and not {str(i) for i in task.val.items} & set(
        map(str, task.train.items)
    )


def test_refusals_of_names_and_options(tmp_path, capsys, monkeypatch):
    line = error_line(capsys, ["train", "--label-column", "a", *CPU_FLAGS])
    assert "--label-column a needs --data hf:NAME" in line
    folder = tmp_path / "plain"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.png").write_bytes(encoded())
    assert "has no columns" in refusal(folder, columns=Columns(label="a"))
    (tmp_path / "empty").mkdir()
    assert "--data hf:" in refusal(f"hf:{tmp_path / 'empty'}")
    assert hf_data.title("hf:owner/name:config") == "name"
    assert hf_data.absolute("hf:owner/name") == "hf:owner/name"
    monkeypatch.chdir(tmp_path)
    assert hf_data.absolute("hf:plain") == f"hf:{folder}"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "pae[data]"' in refusal("hf:owner/name")


def test_survey_and_warnings_of_tables(tmp_path):
    jpegs = {"photo": [{"bytes": encoded(i, format="JPEG"), "path": None} for i in range(8)]}
    kinds = {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=list("0123456789"))}
    rows = {**jpegs, "kind": [i % 10 for i in range(8)]}
    one = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    with warnings.catch_warnings(record=True):
        data = save(tmp_path / "svhn", train=one, validation=one, test=one)
        task, said = task_of("vtab1k", data)
    assert task.pixels == "jpeg75" and any("its originals are lossless" in line for line in said)


def test_a_sweep_calls_its_tasks_as_their_sets(tmp_path, capsys):
    data, path = f"hf:{tmp_path / 'birds'}", tmp_path / "a.toml"
    path.write_text(f'tasks = [{json.dumps(data)}, "hf:owner/bees:small"]\nmethods = ["linear"]\n')
    swept = read_spec(path)
    assert [group.task for group in swept.plan.groups] == ["birds", "bees"]
    assert [options.data for options in swept.options.values()] == [data, "hf:owner/bees:small"]
    path.write_text(f'methods = ["linear"]\n[options]\ndata = {json.dumps(data)}\n')
    assert [group.task for group in read_spec(path).plan.groups] == ["birds"]
    path.write_text('tasks = ["bees"]\nmethods = ["linear"]\n')
    line = error_line(capsys, ["sweep", str(path), "--dry-run"])
    assert "expected a folder, hf:NAME, or one of digits" in line
