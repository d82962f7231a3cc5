"""The studies: their files plan the committed runs, their numbers are counted right, their verdicts
are cautious.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

from bench.studies import convergence, families, first_command, runs, six_blocks
from pae.sweep.spec import read_spec
from pae.train import embedded, loop, methods
from pae.train.data import read_folder
from pae.train.options import Options
from tests.train.helpers import BACKBONE, save_shades

ROOT = Path(__file__).parents[2]
STUDIES = {
    name: read_spec(ROOT / "bench" / "studies" / f"{name}.toml")
    for name in ("convergence", "families")
}

SMALL = {
    **BACKBONE,
    "epochs": 2,
    "batch_size": 6,
    "num_tokens": 2,
    "kld_dim": 8,
    "mpa_images": 4,
    "mpa_window": 8,
    "device": "cpu",
    "amp": "no",
}


def committed(study):
    return json.loads((ROOT / "bench" / "results" / "science" / f"{study}.json").read_text())


# ---- the files that `pae sweep` runs, and the runs that are committed


@pytest.mark.parametrize("study", STUDIES)
def test_the_file_plans_the_committed_runs(study):
    """The grids from the first seed, and what their validation chose from the others."""
    sweep, numbers = STUDIES[study], committed(study)
    made = [{**numbers["recipe"], **run["settings"]} for run in numbers["runs"].values()]
    names = {name for settings in made for name in settings} - {"depth", "validate"}
    usual = dataclasses.asdict(Options())

    def told(settings):
        known = {name: {**usual, **settings}[name] for name in names}
        known |= {} if known["mpa"] else {"mpa_images": None}  # which nothing else has a use for
        same = {name: float(v) if type(v) is int else v for name, v in known.items()}  # 10 is 10.0
        return json.dumps(same, sort_keys=True)

    made = {told(settings) for settings in made}
    assert len(made) == len(numbers["runs"]) == sum(sweep.plan.count())
    planned = {key: told(dataclasses.asdict(options)) for key, options in sweep.options.items()}
    rows = convergence.results(convergence.spec(f"{study}.toml"), numbers)
    for group in sweep.plan.groups:
        row = rows[group.task][group.method]
        for cell in group.cells:
            chosen = cell.values == {name: row[name] for name in ("lr", "weight_decay")}
            assert {planned[key] for key in cell.keys[: None if chosen else 1]} <= made


@pytest.mark.parametrize("method", [group.method for group in STUDIES["families"].plan.groups])
def test_every_family_can_be_run(method):
    """What would refuse options, refuses here."""
    sweep = STUDIES["families"]
    (group,) = (g for g in sweep.plan.groups if g.method == method)
    weights = {"model": "vit_small_patch14_dinov2", "pretrained": False}
    options = dataclasses.replace(sweep.options[group.cells[0].keys[0]], **weights)
    methods.rehearse(options.resolved())


def test_six_blocks_of_the_backbone(monkeypatch, tmp_path):
    """As timm reads them, they are the first of the whole one."""
    whole = timm.create_model("vit_small_patch14_dinov2", img_size=56, num_classes=0).eval()
    monkeypatch.setattr(embedded, "load_backbone", lambda size: whole)
    six_blocks.cut(tmp_path / "cut")
    cut = timm.create_model(f"local-dir:{tmp_path / 'cut'}", pretrained=True).eval()
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        (expected,) = whole.forward_intermediates(images, [5], intermediates_only=True)
        (found,) = cut.forward_intermediates(images, [5], intermediates_only=True)
    assert len(cut.blocks) == 6 and torch.equal(found, expected)


# ---- from records to numbers


def recorded(*val, first=0, test=0.5):
    return {"val": val, "first_passes": first, "test": test, "parameters": 1}


def study(arms, train_size=1):
    """A spec and numbers of two cells and two seeds, from (cell's rate, seed): record by arm."""
    spec = {"seeds": 2, "tasks": {"mnist": {}}, "grid": {"lr": [0.1, 0.5], "weight_decay": [0.0]}}
    spec["methods"] = {name: {"method": "vpt-deep", "mpa": name == "mpa"} for name in arms}
    numbers = {"recipe": {"method": "vpt-deep", "mpa": False, "train_size": train_size}}
    numbers["runs"] = {}
    for name, found in arms.items():
        for (lr, seed), record in found.items():
            settings = {"dataset": "mnist", "lr": lr, "weight_decay": 0.0, "seed": seed}
            settings |= {"mpa": True} if name == "mpa" else {}
            numbers["runs"][f"{name} {lr} {seed}"] = {"settings": settings, **record}
    return spec, numbers


@pytest.mark.parametrize(
    "cells, chosen",
    [
        (((2, 0.7, 0.9), (2, 0.6, 0.1)), 0.1),
        (((2, 0.7, 0.9), (2, 0.7, 0.8)), 0.5),  # as good, with the lower loss
        (((2, 0.7, 0.8), (2, 0.7, 0.8)), 0.1),  # the first of equals
    ],
)
def test_choice_is_by_validation_alone(cells, chosen):
    rows = [recorded((1, 0.1, 9.0), row, test=test) for row, test in zip(cells, (0.2, 0.8))]
    found = {(0.1, 0): rows[0], (0.5, 0): rows[1]} | {(chosen, 1): recorded((2, 0.1, 1.0))}
    row = convergence.results(*study({"plain": found}))["mnist"]["plain"]
    assert row["lr"] == chosen and row["edge"] and row["grid"] == [c[1] for c in cells]
    assert row["tests"] == {0: 0.2 if chosen == 0.1 else 0.8, 1: 0.5}


@pytest.mark.parametrize("missing", [(0.1, 0), (0.5, 0), (0.5, 1)])
def test_nothing_is_concluded_from_a_part(missing):
    found = {(0.1, 0): recorded((2, 0.1, 1.0)), (0.5, 0): recorded((2, 0.7, 1.0))}
    found[0.5, 1] = recorded((2, 0.7, 1.0))
    convergence.results(*study({"plain": found}))
    del found[missing]
    with pytest.raises(ValueError, match="mnist, plain: runs of the grid or the seeds are missing"):
        convergence.results(*study({"plain": found}))


def test_speed_counts_what_comes_before_the_first_step():
    """VPT-deep is at its best in epoch 8; the arm there after 4, for 2 epochs' worth of MPA."""
    other = {(0.5, 0): recorded((4, 0.1, 1))}
    base = {
        (0.1, s): recorded((4, 0.5, 1), (8, 0.8, 1), (12, 0.8, 1), test=0.5 + s) for s in (0, 1)
    }
    arm = {
        (0.1, s): recorded((4, 0.8 - s / 10, 1), (12, 0.7, 1), first=400, test=0.6 + s)
        for s in (0, 1)  # seed 1 never gets there: as if with the last epoch
    }
    found = convergence.results(*study({"plain": base | other, "mpa": arm | other}, 100))["mnist"]
    assert found["plain"]["epochs"]["mean"] == 8 and found["plain"]["reached"] == 2
    row = found["mpa"]
    assert row["reached"] == 1 and row["epochs"]["mean"] == 8
    assert row["faster"]["mean"] == 1.0 and row["cheaper"]["mean"] == 0.8
    assert row["gain"]["mean"] == pytest.approx(0.1)
    same = convergence.ratio([(4, 8), (2, 4)])
    assert same == {"mean": 2, "low": 2, "high": 2, "seeds": 2}


def test_bootstrap_interval():
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    low, high = runs.bootstrap(values)
    spread = statistics.pstdev(values) / len(values) ** 0.5  # of a mean of resampled values
    assert low == pytest.approx(0.3 - 1.96 * spread, abs=0.02)
    assert high == pytest.approx(0.3 + 1.96 * spread, abs=0.02)


def test_differences_are_taken_seed_by_seed():
    records = [{"seed": 1, "test": 0.9}, {"seed": 0, "test": 0.6}, {"seed": 7, "test": 0}]
    baseline = [{"seed": 0, "test": 0.5}, {"seed": 1, "test": 0.8}]
    gain = runs.paired(records, baseline)
    assert gain["mean"] == pytest.approx(0.1) and gain["seeds"] == 2
    assert gain["low"] == pytest.approx(gain["high"])
    assert runs.paired(records[2:], baseline) is None


@pytest.mark.parametrize(
    "low, high, bar, said",
    [
        (0.01, 0.02, 0.0, "yes (+0.015)"),
        (-0.02, -0.01, 0.0, "**no, the opposite** (-0.015)"),
        (-0.01, 0.01, 0.0, "undecided (+0.000)"),
        (1.2, 1.5, 1.0, "yes (1.35)"),
        (0.8, 0.9, 1.0, "**no, the opposite** (0.85)"),
    ],
)
def test_verdicts_are_cautious(low, high, bar, said):
    assert convergence.verdict({"mean": (low + high) / 2, "low": low, "high": high}, bar) == said


def test_families_are_told_by_their_own_plain_runs():
    tests = {"a": {0: 0.5, 1: 0.6}, "a + KLD": {0: 0.6, 1: 0.7}, "b": {0: 0.5, 1: 0.5}}
    tests |= {"b + KLD + MPA": {0: 0.4, 1: 0.9}, "c": {0: 0.1, 1: 0.1}}
    said = families.verdict(tests)
    assert said.startswith("What PAE adds: +0.125 test accuracy on average over 2 families;")
    assert "higher in 2 (a, b), lower in 0 (none). All 2 seeds agree in sign for a; of 2" in said


def test_the_curves_draw():
    for draw in convergence.figures(committed("convergence")).values():
        draw().canvas.draw()


# ---- the first command


@pytest.fixture
def shades(tmp_path, monkeypatch):
    """Whatever image set is asked for, a tiny one comes."""
    folder = save_shades(tmp_path / "shades")
    monkeypatch.setattr(loop, "load_task", lambda settings: read_folder(folder, seed=settings.seed))
    return tmp_path


def test_first_command_from_runs_to_tables(shades, capsys, monkeypatch):
    """What is finished is not repeated, what was stopped begins again; screens stay."""
    small = {**SMALL, "epochs": 1}
    monkeypatch.setattr(first_command, "Options", partial(first_command.Options, **small))
    given = {"output": shades / "runs", "to": shades / "results", "seeds": [0, 1]}
    (shades / "runs" / "linear-1").mkdir(parents=True)
    for count in (6, 0):
        first_command.run(argparse.Namespace(**given))
        assert len(capsys.readouterr().out.splitlines()) == count

    screens = committed("first_command")["screens"]
    runs.write_json(given["to"] / first_command.JSON, {"screens": screens})
    first_command.report(argparse.Namespace(**{**given, "seeds": [0, 1, 2]}))
    numbers = json.loads((given["to"] / first_command.JSON).read_text())
    assert numbers["screens"] == screens
    assert len(numbers["finals"]) == 6 and numbers["facts"]["test"] == 15
    blocks = first_command.blocks(numbers)
    deep = [r for r in numbers["finals"] if r["arm"] == "vpt-deep"]
    mean = statistics.mean(r["test"] for r in deep)
    assert f"| VPT-deep | {mean:.3f} |" in blocks["first command short"]
    lines = blocks["first command seeds"].splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 0", "| 1"]
    assert f"| {deep[1]['val']:.3f} | {deep[1]['test']:.3f} |" in lines[3]
    assert "| digits | epochs=4, img size=56 |" in blocks["first command screens"]
    with pytest.raises(SystemExit, match="no seed is finished there"):
        first_command.report(argparse.Namespace(**{**given, "seeds": [2]}))
