"""The studies: their runs are `pae train`'s, their numbers are counted right, their verdicts are
cautious, and the committed numbers draw.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.train.helpers import BACKBONE, save_shades

ROOT = Path(__file__).parents[2]

from bench.studies import (  # noqa: E402
    convergence,
    families,
    first_command,
    protocol,
    runs,
)
from pae.train import loop, methods  # noqa: E402
from pae.train.data import read_folder  # noqa: E402
from pae.train.options import Options  # noqa: E402

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


@pytest.fixture
def shades(tmp_path, monkeypatch):
    """Whatever image set is asked for, a tiny one comes."""
    folder = save_shades(tmp_path / "shades")
    monkeypatch.setattr(loop, "load_task", lambda settings: read_folder(folder, seed=settings.seed))
    return tmp_path


TINY = {
    "method": "vpt-deep",
    "model": "test_vit",
    "pretrained": False,
    "num_tokens": 2,
    "dropout": 0.1,
    "optimizer": "sgd",
    "scheduler": "vpt",
    "epochs": 4,
    "warmup_epochs": 1,
    "batch_size": 6,
    "kld_dim": 8,
    "mpa_images": 4,
    "img_size": 32,
    "train_size": 29,
    "val_size": 7,
}
OWN = {"lrs": (0.1, 0.5), "decays": (0.0,)}
ARMS = {name: convergence.ARMS[name]._replace(**OWN) for name in ("plain", "mpa", "spt")}
STUDY = protocol.Study("convergence.json", ("mnist",), ARMS, seeds=2)


@pytest.fixture
def tiny(shades, monkeypatch):
    """The protocol with 6 + 3 runs of a second; its command line."""
    monkeypatch.setattr(protocol, "RECIPE", TINY)
    monkeypatch.setattr(protocol, "TEST_SIZE", 6)
    protocol._task.cache_clear()

    def command(*words, output=shades / "runs"):
        own = ["--output", str(output), "--to", str(shades / "numbers")]
        report = lambda given: protocol.store(STUDY, given)
        protocol.main(STUDY, {"report": report}, [*words, *own])

    return command


def test_the_protocol_from_runs_to_the_page(tiny, shades, capsys, monkeypatch):
    """Killed, gone on with elsewhere, shared: every run is done once, and what is open says so."""
    monkeypatch.setattr(convergence, "STUDY", STUDY)
    monkeypatch.setattr(convergence, "DATASETS", STUDY.datasets)
    tiny("plan")
    assert "mnist grid                   6     0" in capsys.readouterr().out
    tiny("run", "--minutes", "0")
    assert capsys.readouterr().out == "6 runs of these pieces are left\n"

    pixels_seen, build = [], loop.methods.build_method

    def watched(*given, **more):
        module = build(*given, **more)
        module.register_forward_pre_hook(lambda _, inputs: pixels_seen.append(len(inputs[0])))
        return module

    monkeypatch.setattr(loop.methods, "build_method", watched)
    cells = protocol.grid("mnist", ARMS["mpa"])
    first = protocol.train(cells[0], shades / "runs")
    backward = TINY["epochs"] * TINY["train_size"]
    assert cells[0].passes() == sum(pixels_seen) + backward + first["first_passes"]
    assert first["first_passes"] == 9 * TINY["mpa_images"]  # windows of 16 every 8 in 32 pixels
    assert [row[0] for row in first["val"]] == [2, 4] and len(first["turns"]) == 3
    assert protocol.train(cells[0], shades / "runs") is None  # it is there

    with protocol.RunFolder(shades / "runs" / "work" / cells[1].key).held():
        assert protocol.train(cells[1], shades / "runs") is None  # another process is at it
    tiny("report")
    numbers = json.loads((shades / "numbers" / "convergence.json").read_text())
    assert numbers["runs"] == {cells[0].key: json.loads(json.dumps(first))}
    blocks = convergence.blocks(numbers)
    assert blocks["convergence table"].count("open, grid") == 3
    assert blocks["convergence verdicts"].count("| open |") == 3  # of MPA and SPT
    assert not convergence.figures(numbers)
    (shades / "runs" / f"{cells[0].key}.json").unlink()  # another day, another folder
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_look", mock.Mock(side_effect=[None] * 8 + [loop._Asked]))
        tiny("run")
    assert capsys.readouterr().out == "stopped; what was under way begins again\n"
    tiny("run", "--piece", "mnist grid")
    out = capsys.readouterr().out
    assert out.count(": val ") == 5 and out.endswith("nothing is left to do\n")
    tiny("run")
    assert capsys.readouterr().out.count(": val ") == 3
    tiny("plan")
    assert "0.0 core hours left" in capsys.readouterr().out

    tiny("report")
    numbers = json.loads((shades / "numbers" / "convergence.json").read_text())
    assert len(numbers["runs"]) == 9
    assert len((shades / "numbers" / "convergence.json").read_text().splitlines()) < 60
    blocks = convergence.blocks(numbers)
    assert blocks["convergence table"].count("| complete |") == 3
    assert "open" not in blocks["convergence progress"] + blocks["convergence table"]
    chosen = protocol.finals("mnist", ARMS["plain"], 2, numbers["runs"])
    tests = [numbers["runs"][run.key]["test"] for run in chosen]
    assert f"| mnist | VPT-deep | complete | {sum(tests) / 2:.3f} (" in blocks["convergence table"]
    for draw in convergence.figures(numbers).values():
        draw().canvas.draw()


def test_an_unknown_piece_names_those_there_are(tiny):
    with pytest.raises(SystemExit, match="'mnist grid', 'mnist seeds'"):
        tiny("plan", "--piece", "mnist gird")


def test_a_run_that_diverges_is_a_record(tiny, shades):
    run = protocol.Run("mnist", {}, 1e30, 0.0)
    record = protocol.train(run, shades / "runs")
    assert (
        "not finite" in record["diverged"]
        or "inf" in record["diverged"]
        or "nan" in record["diverged"]
    )
    assert protocol.best(record) < (0.0, -1e9)


def recorded(*val, first=0, test=0.5):
    known = {"first_passes": first, "test": test, "parameters": 1}
    return {"val": [list(row) for row in val], **known}


def test_choice_is_by_validation_alone():
    arm = ARMS["plain"]._replace(decays=(0.0, 0.1))
    cells = protocol.grid("mnist", arm)
    rows = [
        recorded((2, 0.7, 0.9), (4, 0.6, 0.1), test=1.0),
        recorded((2, 0.5, 0.5), (4, 0.7, 0.8)),  # as good, with the lower loss
        recorded((2, 0.7, 0.8)),  # the same: the first of equals
        {"val": [], "diverged": "at once"},
    ]
    found = {run.key: row for run, row in zip(cells, rows)}
    assert protocol.choice(cells, found) == cells[1]
    seeds = protocol.finals("mnist", arm, 3, found)
    assert [run.seed for run in seeds] == [0, 1, 2] and seeds[0].key == cells[1].key
    del found[cells[3].key]
    assert protocol.choice(cells, found) is None
    assert protocol.finals("mnist", arm, 3, found) == []


def test_a_key_is_of_what_decides_a_run(monkeypatch):
    run = protocol.Run("mnist", {"kld": True, "mpa": True}, 0.25, 1e-3)
    assert run.key == protocol.Run("mnist", {"mpa": True, "kld": True}, 0.25, 0.001).key
    others = [protocol.replace(run, seed=1), protocol.replace(run, lr=1.0)]
    keys = {run.key, *(other.key for other in others)}
    monkeypatch.setattr(protocol, "VALIDATE", 3)
    before = run.key
    assert len({*keys, before}) == 4
    monkeypatch.setattr(protocol, "RECIPE", {**protocol.RECIPE, "epochs": 31})
    assert run.key != before


def test_speed_counts_what_comes_before_the_first_step(monkeypatch):
    """VPT-deep is at its best in epoch 8; the arm there after 4, for 2 epochs' worth of MPA."""
    monkeypatch.setattr(protocol, "RECIPE", {**protocol.RECIPE, "train_size": 100})
    base = {s: recorded((4, 0.5, 1), (8, 0.8, 1), (12, 0.8, 1), test=0.5 + s) for s in (0, 1)}
    arm = {
        s: recorded((4, 0.8, 1), (8, 0.7, 1), (12, 0.7, 1), first=400, test=0.6 + s) for s in base
    }
    arm[1]["val"][0][1] = 0.7  # seed 1 never gets there: as if with the last epoch
    names = ARMS["plain"], ARMS["mpa"]
    found = {}
    for own, rows in zip(names, (base, arm)):
        for run in protocol.grid("mnist", own):
            found[run.key] = recorded((4, 0.1, 1))
        first = protocol.grid("mnist", own)[0]
        found |= {protocol.replace(first, seed=s).key: row for s, row in rows.items()}
    results = convergence.results(STUDY._replace(arms=dict(zip("pm", names))), found, "mnist")
    assert results["p"]["epochs"]["mean"] == 8 and results["p"]["passes"]["mean"] == 1600
    row = results["m"]
    assert row["open"] is None and row["reached"] == 1
    assert row["epochs"]["mean"] == 8 and row["passes"]["mean"] == 1600 + 400
    assert row["faster"]["mean"] == 1.0 and row["cheaper"]["mean"] == 0.8
    assert row["gain"]["mean"] == pytest.approx(0.1)
    same = convergence.ratio([(4, 8), (2, 4)])
    assert same == {"mean": 2, "low": 2, "high": 2, "seeds": 2}


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


def test_turning_is_told_by_thirds():
    trace = runs.Trace()
    trace.norms = [[1.0, 2.0, 3.0], [3.0, 2.0, 3.0]]
    trace.cosines = [[-0.5, 0.5, -0.1]]
    found = protocol.turning(trace)
    assert found == {"swing": [runs.short(0.5**0.5), 0, 0], "turns": [1, 0, 1]}


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
    "low, high, key, bar, left, said",
    [
        (0.01, 0.02, "gain", 0, None, "yes"),
        (-0.02, -0.01, "gain", 0, None, "opposite"),
        (-0.01, 0.01, "gain", 0, None, "undecided"),
        (0.01, 0.02, "gain", 0, "seeds: 4 of 5", "open"),
        (1.2, 1.5, "faster", 1, None, "yes"),
        (0.8, 0.9, "faster", 1, None, "opposite"),
    ],
)
def test_verdicts_are_cautious(low, high, key, bar, left, said):
    arm = {"open": left, key: {"mean": (low + high) / 2, "low": low, "high": high}}
    assert said in convergence.verdict(arm, {"open": None}, key, bar)
    assert convergence.verdict(arm, {"open": "grid: 5 of 6"}, key, bar) == "open"


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


def test_both_studies_share_runs_of_vpt_deep():
    for variant, name in (("plain", convergence.BASELINE), ("pae", convergence.PAE)):
        ours = protocol.grid("pneumonia", families.STUDY.arms[f"vpt-deep {variant}"])
        theirs = protocol.grid("pneumonia", convergence.ARMS[name])
        assert [run.key for run in ours] == [run.key for run in theirs]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_can_be_run(name):
    """With all of PAE that it has; what would refuse options, refuses here."""
    arm = families.STUDY.arms.get(f"{name} pae") or families.STUDY.arms[f"{name} plain"]
    run = protocol.grid("fashion-mnist", arm)[0]
    weights = {"model": "vit_small_patch14_dinov2", "pretrained": False}
    methods.rehearse(Options(**weights, **run.settings(), device="cpu").resolved())


@pytest.mark.parametrize("study", [convergence, families])
def test_committed_numbers_are_of_the_study(study):
    numbers = json.loads((ROOT / "bench" / "results" / "science" / study.STUDY.store).read_text())
    known = [r.key for p in protocol.pieces(study.STUDY, numbers["runs"]) for r in p.runs]
    assert set(numbers["runs"]) <= set(known)
    for text in study.blocks(numbers).values():
        assert "nan" not in text
    if study is convergence:
        for draw in study.figures(numbers).values():
            draw().canvas.draw()
