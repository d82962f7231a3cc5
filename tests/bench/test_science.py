"""The studies: their runs are `pae train`'s, their numbers are counted right, their verdicts are
cautious, and the committed numbers draw.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.train.helpers import BACKBONE, save_shades

ROOT = Path(__file__).parents[2]

from bench.studies import convergence, families, first_command, mpa_bf16, runs  # noqa: E402
from pae import MPAResult  # noqa: E402
from pae.mpa import NearTies  # noqa: E402
from pae.train import loop  # noqa: E402
from pae.train.data import read_folder  # noqa: E402

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
STUDIES = {"convergence": convergence, "families": families}


@pytest.fixture
def shades(tmp_path, monkeypatch):
    """Whatever image set is asked for, a tiny one comes."""
    folder = save_shades(tmp_path / "shades")
    monkeypatch.setattr(loop, "load_task", lambda settings: read_folder(folder, seed=settings.seed))
    return tmp_path


def test_a_study_from_runs_to_figures(shades, capsys):
    output, arms = shades / "runs", ("vpt-deep-plain", "vpt-deep-norms")
    cells = list(convergence.cells(["mnist"], [0, 1], arms))
    runs.run(cells, output, 6, **SMALL)
    assert capsys.readouterr().out.count(": test ") == len(cells) == 4
    runs.run(cells, output, 6, **SMALL)  # nothing is left to do
    assert capsys.readouterr().out == ""

    found = runs.collect(cells, output)
    assert [r["seed"] for r in found["mnist", "vpt-deep-norms"]] == [0, 1]
    trace = found["mnist", "vpt-deep-norms"][0]["trace"]
    steps = 2 * -(-30 // 6)  # 36 training images, 7 of them validate
    assert len(trace["process_seconds"]) == len(trace["gradient_norm"]) == steps
    assert len(trace["cosine_with_last"]) == steps - 1
    assert trace["process_seconds"] == sorted(trace["process_seconds"])
    facts = runs.facts(cells, output)
    assert facts["tasks"]["mnist"]["test"] == 6 and facts["num_tokens"] == 2

    baseline = found["mnist", "vpt-deep-plain"]
    results = {"mnist": {n: convergence.summary(found["mnist", n], baseline) for n in arms}}
    numbers = json.loads(json.dumps({"facts": facts, "results": results}))
    row = convergence.blocks(numbers)["convergence table"].splitlines()[2]
    mean = statistics.mean(r["test"] for r in baseline)
    assert row.startswith(f"| mnist | VPT-deep | 2 | {mean:.3f} (")
    for draw in convergence.figures(numbers).values():
        draw().canvas.draw()


def test_an_interrupted_run_is_left_to_its_owner(shades, capsys):
    cell = runs.Cell("vpt-deep-plain", "mnist", 0, {})
    cell.folder(shades).path.mkdir(parents=True)
    runs.run([cell], shades, None, **SMALL)
    assert "left alone" in capsys.readouterr().out


def test_trace_sees_a_turn():
    module = torch.nn.Module()
    module.prompts = torch.nn.Module()
    module.prompts.tokens = torch.nn.Parameter(torch.zeros(2, 1, 3))
    trace = runs.Trace()
    for gradient in ([[[3, 4, 0]], [[1, 0, 0]]], [[[-6, -8, 0]], [[0, 2, 0]]]):
        module.prompts.tokens.grad = torch.tensor(gradient, dtype=torch.float32)
        trace(module, 0)
    assert trace.norms == [[5, 1], [10, 2]]
    assert trace.cosines == [pytest.approx([-1, 0])]
    counted = convergence.gradients(
        {"gradient_norm": trace.norms, "cosine_with_last": trace.cosines}
    )
    assert counted["flips"] == [1, 0]


def test_control_keeps_lengths_alone():
    module = torch.nn.Module()
    module.prompts = torch.nn.Module()
    module.prompts.tokens = torch.nn.Parameter(
        torch.randn(3, 4, 64) * torch.arange(1.0, 5)[:, None]
    )
    before = module.prompts.tokens.detach().clone()
    convergence.random_directions(module)
    after = module.prompts.tokens.detach()
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    assert torch.cosine_similarity(after, before, dim=-1).abs().max() < 0.6


def test_first_epoch_at_an_accuracy():
    assert runs.first_at([0.5, 0.94, 0.96, 1.0], 0.95) == 3
    assert runs.first_at([1.0, 0.5], 0.475) == 1
    assert runs.first_at([0.1, 0.2], 0.3) == 2  # never: as if at the end


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
    "low, high, seeds, sign, said",
    [
        (0.01, 0.02, 5, 1, "yes"),
        (-0.02, -0.01, 5, 1, "opposite"),
        (-0.02, -0.01, 5, -1, "yes"),
        (-0.01, 0.01, 5, 1, "undecided"),
        (0.01, 0.02, 2, 1, "too few"),
    ],
)
def test_verdicts_are_cautious(low, high, seeds, sign, said):
    gain = {"mean": (low + high) / 2, "low": low, "high": high, "seeds": seeds}
    assert said in convergence.verdict(gain, sign)


def test_first_command_from_runs_to_tables(shades, capsys, monkeypatch):
    """Screens see no test images, the command sees them; what is finished is not repeated."""
    monkeypatch.setattr(first_command, "Options", partial(first_command.Options, **SMALL))
    given = {"output": shades / "runs", "to": shades / "results", "seeds": [0, 1]}
    screens = {"dataset": "mnist", "arms": ["vpt-deep"], "set": ["epochs=1", "augment=crop"]}
    first_command.screen(argparse.Namespace(**given, **screens))
    assert capsys.readouterr().out.count("test None") == 2
    for _ in range(2):
        first_command.run(argparse.Namespace(**given))
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 12 and out[:6] == out[6:] and "test None" not in "".join(out)

    first_command.report(argparse.Namespace(**given))
    numbers = json.loads((shades / "results" / first_command.JSON).read_text())
    assert {(r["arm"], r["seed"]) for r in numbers["screens"]} == {("vpt-deep", 0), ("vpt-deep", 1)}
    assert all(r["test"] is None for r in numbers["screens"])
    assert len(numbers["finals"]) == 6 and numbers["facts"]["test"] == 15
    blocks = first_command.blocks(numbers)
    deep = [r for r in numbers["finals"] if r["arm"] == "vpt-deep"]
    mean = statistics.mean(r["test"] for r in deep)
    assert f"| VPT-deep | {mean:.3f} |" in blocks["first command short"]
    lines = blocks["first command seeds"].splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 0", "| 1"]
    assert f"| {deep[1]['val']:.3f} | {deep[1]['test']:.3f} |" in lines[3]
    assert "| shades | augment=crop, epochs=1 |" in blocks["first command screens"]


def test_precision_of_mpa_from_runs_to_a_table(shades, capsys):
    given = {**SMALL, "train_size": 20, "val_size": 8, "img_size": 32}
    cell = mpa_bf16.measure("mnist", 0, **given)
    assert cell["windows"] == 16 and cell["prompts"] == 2
    assert cell["checked_misses"] == 0 and cell["same_order"]
    assert all(seconds > 0 for seconds in cell["seconds"].values())
    facts = {"processor": "a", "instructions": [], "torch": "t", "bf16_product_gain": 0.5}
    numbers = {"facts": {**facts, "settings": given}, "cells": [cell, {**cell, "seed": 1}]}
    assert "| mnist | 2 | " in mpa_bf16.blocks(numbers)["mpa bf16 table"]


def test_precision_of_mpa_is_compared_by_selections():
    """Five windows; rounding would have taken window 3 for window 1, the check put it right."""
    losses = torch.tensor([1.0, 2.0, 5.0, 2.5, 4.0])
    whole = losses, torch.zeros(5, 2), torch.tensor([0, 1]), 8, 8, "as_is"
    chosen = torch.tensor([1]), torch.tensor([3])  # added, dropped
    ties = NearTies(torch.tensor([0, 1, 3]), chosen[1], chosen[0], torch.tensor([-0.5, 0.1]))
    found = mpa_bf16.compared(MPAResult(*whole), MPAResult(*whole, near_ties=ties))
    assert (found["rounded_misses"], found["checked_misses"], found["same_order"]) == (1, 0, True)
    spread = losses.double().std().item()
    assert found["gap"] == pytest.approx(0.5 / spread, rel=1e-3)
    assert found["error"] == pytest.approx(0.3 / spread, rel=1e-3)
    wrong = MPAResult(losses, whole[1], torch.tensor([3, 0]), 8, 8, "as_is", near_ties=ties)
    found = mpa_bf16.compared(MPAResult(*whole), wrong)
    assert (found["checked_misses"], found["same_order"]) == (1, False)


def test_cells_of_both_studies_agree():
    """Runs are shared by name: the same name must be the same run."""
    shared = {c.name: c for c in families.cells("pneumonia", ["vpt-deep"], [0])}
    for cell in convergence.cells(["pneumonia"], [0]):
        if cell.name in shared:
            ours = {"method": "vpt-deep", "method_args": {}, **cell.changes}
            assert shared[cell.name].changes == ours


@pytest.mark.parametrize("name", STUDIES)
def test_committed_numbers_draw(name):
    study = STUDIES[name]
    numbers = json.loads((ROOT / "bench" / "results" / "science" / study.JSON).read_text())
    for text in study.blocks(numbers).values():
        assert text and "nan" not in text
    for draw in study.figures(numbers).values():
        draw().canvas.draw()
    if name == "families":
        assert set(numbers["rows"]) == set(families.FAMILIES) - set(families.WITHDRAWN)
        for family, variants in numbers["rows"].items():
            assert set(variants) == (
                {"plain", "pae"} if families.FAMILIES[family][1] else {"plain"}
            )
    else:
        assert len(numbers["results"]) >= 3
        for arms in numbers["results"].values():
            assert set(arms) == set(convergence.ARMS)
