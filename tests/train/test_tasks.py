"""What is learned: the option, and the class behind it."""

import pytest

from pae.train import tasks
from pae.train.options import Options, read_options, renamed
from pae.train.scores import metric_of, score_of
from tests.train.helpers import error_line


def test_a_protocols_task_of_an_older_file_has_its_name_of_today(tmp_path):
    path = tmp_path / "config.json"
    assert read_options(path, {"task": None}) == {}
    old = {"protocol": "vtab1k", "task": "svhn"}
    assert read_options(path, old) == {"protocol": "vtab1k", "protocol_task": "svhn"}
    new = {"protocol": "vtab1k", "task": "segmentation"}
    assert renamed(new) is new and read_options(path, new) == new
    with pytest.raises(ValueError, match='task = "svhn": expected one of classification'):
        read_options(path, {"task": "svhn"})  # of no protocol: somebody mistyped


def test_what_is_not_built_says_so(monkeypatch):
    monkeypatch.setattr(tasks, "import_module", lambda name: __import__(name + "_none"))
    with pytest.raises(ModuleNotFoundError):  # of something else that is missing: a defect
        tasks.kind_of(Options())


def test_an_unknown_task(capsys):
    line = error_line(capsys, ["train", "--task", "segmentaton"])
    assert "--task segmentaton: expected one of classification, segmentation, clip" in line


def test_the_score_is_the_first_that_was_validated_beside_the_loss():
    row = {"epoch": 1, "train_loss": 1.0, "val_loss": 2.0, "val_mean_iou": 0.5, "val_accuracy": 0.9}
    assert metric_of(row) == "mean_iou" and score_of(row) == 0.5
    result = {"val_accuracy": 0.25, "best_epoch": 2, "test_accuracy": None}
    assert score_of(result) == 0.25 and score_of(result, "test") is None
