"""The small VTAB: its spec, and its page from records that are not all there."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from bench.studies import small_vtab
from pae.protocols.tasks import SMALL
from pae.sweep.records import FINISHED, Records
from pae.sweep.spec import read_spec
from pae.train.cli import main
from pae.train.loop import load_task

SPEC = Path(__file__).parents[2] / small_vtab.SPEC


@pytest.fixture(scope="module")
def swept():
    return read_spec(SPEC)


def record(swept, run, val=0.5, test=None, status=FINISHED):
    settings = {**vars(swept.options[run.key])}
    good = status == FINISHED
    return {
        "key": run.key,
        "status": status,
        "reason": None if good else "the loss of step 3 is nan",
        "error": None if good else "ArithmeticError",
        "task": run.task,
        "method": run.method,
        "values": dict(run.values),
        "seed": run.seed,
        "scheduler": None,
        "settings": settings,
        "images": {"train": 340, "val": 0, "test": 400},
        "val": val,
        "val_last": val,
        "val_loss": 1.0,
        "val_loss_last": 1.0,
        "test": test,
        "parameters": 50_000,
        "parameters_without_head": 46_080,
        "seconds": 36.0,
        "peak_memory_mb": 900,
        "device": "cpu of tests",
        "image_size": 56,
        "backbone": {"name": "vit_small_patch14_dinov2"},
        "versions": {"pae": "1", "torch": "2", "timm": "3"},
    }


def test_the_spec_is_the_protocol_on_tasks_of_all_groups(swept):
    plan = swept.plan
    assert {group.task for group in plan.groups} == {task.name for task in SMALL.tasks}
    assert {group.method for group in plan.groups} == {
        *("linear", "VPT-deep", "VPT-deep + PAE", "BPT", "VAPT", "E2VPT")
    }
    assert plan.seeds == (0, 1, 2) and plan.count() == (7 * (4 + 5 * 5), 7 * 6 * 3)
    assert (plan.select, plan.epoch, plan.equal) == ("two-stage", "last", "first")
    grids = [run for group in plan.groups for run in plan.grid(group)]
    assert {swept.options[run.key].train_on for run in grids} == {"train"}
    finals = {key for group in plan.groups for cell in group.cells for key in cell.finals}
    assert {swept.options[key].train_on for key in finals} == {"trainval"}
    assert not finals & {run.key for run in grids}
    first = list(dict.fromkeys(group.task for group in plan.groups))[:3]
    groups = {task.name: task.group for task in SMALL.tasks}
    assert {groups[task] for task in first} == set(SMALL.groups())  # means of groups exist early


def test_the_page_of_a_sweep_that_goes_on(swept, tmp_path, capsys):
    out, plan = tmp_path / "out", swept.plan
    records = Records(out)
    plan.write(out)
    to = tmp_path / small_vtab.JSON
    blocks = small_vtab.blocks(small_vtab.report(out, to))
    assert "0 of 329 runs have ended" in blocks["small vtab state"]
    assert "still to come: digits, pneumonia, shapes-count, " in blocks["small vtab state"]
    assert not small_vtab.figures(json.loads(to.read_text()))
    groups = [group for group in plan.groups if group.task == "digits"]
    for place, group in enumerate(groups[:3]):
        for i, run in enumerate(plan.grid(group)):
            # the second and the third rate are equal, so the smaller one wins
            records.write(record(swept, run, val=(0.5, 0.75, 0.75, 0.625, 0.5)[i]))
        records.refresh()
        finals = plan.finals(group, records)
        assert {run.values["lr"] for run in finals} == {group.cells[1].values["lr"]}
        for seed, run in enumerate(finals[: 3 - place]):
            records.write(record(swept, run, None, 0.5 + place / 8 + seed / 16))
    failing = plan.grid(groups[3])[0]
    records.write(record(swept, failing, status="diverged"))
    numbers = small_vtab.report(out, to)
    blocks = small_vtab.blocks(numbers)
    state = blocks["small vtab state"]
    assert "21 of 329 runs have ended. " in state and "hours" not in state
    assert "digits, VPT-deep (1 of 3 runs), VPT-deep + PAE (2 of 3 runs), BPT, VAPT, E2VPT" in state
    assert "; pneumonia, shapes-count, traffic-lights, " in state
    assert "- digits, BPT, lr=0.001, seed 0: diverged, the loss of step 3 is nan" in state
    table = blocks["small vtab table"]
    assert "56.2" in table and "Not finished; still to come: digits" in table
    assert "Without a result (diverged, failed or stopped), runs: 1." in table
    assert "seconds" not in table and "memory" not in table and "Times" not in table
    assert "linear beside VPT-deep: " in table and " points on digits." in table
    rates = blocks["small vtab rates"]
    assert "| VPT-deep | 0.003: 75 %, 2 equal |" in rates and "tried" not in rates
    drawn = {name: draw() for name, draw in small_vtab.figures(numbers).items()}
    assert [f.axes[0].get_title() for f in drawn.values()] == ["digits", "digits"]
    lines = drawn["small_vtab_rates"].axes[0].get_lines()
    circled = [line.get_xydata().tolist() for line in lines if line.get_fillstyle() == "none"]
    assert circled == [[[0.002, 75.0]], [[0.003, 75.0]], [[0.003, 75.0]]]
    json.loads(to.read_text())
    assert main(["table", str(out)]) == 0
    said = capsys.readouterr()
    assert "not there yet: pneumonia, shapes-count, traffic-lights, " in said.err
    assert "56.2" in said.out


def test_a_rate_at_the_edge_of_what_was_tried():
    numbers = {
        "chosen": {"digits/BPT": 0.1, "digits/VAPT": 0.01},
        "tuned": {
            "digits/BPT": {"0.003": 0.5, "0.1": 0.75, "0.03": 0.5},
            "digits/VAPT": {"0.003": 0.5, "0.1": None, "0.01": 0.75},
        },
    }
    rates = small_vtab._rates(numbers)
    assert "| BPT | 0.1: 75 %, **the largest tried** |" in rates
    assert "| VAPT | 0.01: 75 % |" in rates  # a larger one diverged


def test_the_commonest_classes_are_those_of_the_images(swept):
    """Of the tasks that need no download; the page says the same."""
    page = (SPEC.parents[2] / "docs" / "small-vtab.md").read_text()
    for task, share in small_vtab.COMMONEST.items():
        assert re.search(rf"\| {task}: .* \| {100 * share:.1f} % \|", page), task
    for group in swept.plan.groups:
        if group.method == "linear" and group.task.startswith("shapes"):
            key = group.cells[0].finals[0]
            labels = load_task(swept.options[key].resolved(swept.given[key])).test.labels
            most = max(Counter(labels).values()) / len(labels)
            assert most == small_vtab.COMMONEST[group.task]
