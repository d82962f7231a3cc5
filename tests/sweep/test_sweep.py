"""Sweeps: which runs a spec asks for, what becomes of them; nothing is lost, nor done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
import statistics
import sys
import time

import pytest

from pae.errors import CheckpointError
from pae.sweep import execute, plan, progress, work
from pae.sweep import spec as spec_of_sweeps
from pae.sweep.records import BULKY, FINISHED, Records, key_of
from pae.sweep.spec import read_spec
from pae.train import lock, loop
from pae.train.cli import main
from pae.train.runfolder import RunFolder
from tests import processes
from tests.sweep.specs import SLOW
from tests.train.helpers import ended, error_line, forked, save_shades


@pytest.fixture
def sweep(spec, tmp_path, capsys):
    """sweep(path, *flags) -> (status, stdout, stderr) of the command, in tmp_path/out."""

    def command(path, *flags):
        capsys.readouterr()
        status = main(["sweep", str(path), "--output", str(tmp_path / "out"), *flags])
        return status, *capsys.readouterr()

    return command


def keys_of(path, **records):
    return [run.key for run in read_spec(path).plan.runs(records)]


# ---- the spec


def test_grid_draws_seeds_tasks_and_methods(spec, shades):
    path = spec(
        'seeds = [3, 7]\nmethods = ["linear", "vpt-deep"]\nselect = "none"',
        '[tasks.a]\ndata = "x"\n[tasks.b]\ndata = "y"\naugment = "crop"\n[grid]\nlr = [0.1, 0.2]\n'
        "[random]\ndraws = 3\nweight_decay = {log-uniform = [1e-4, 1e-1]}\n",
    )
    swept = read_spec(path)
    assert [(g.task, g.method, len(g.cells)) for g in swept.plan.groups] == [
        (task, method, 6) for task in "ab" for method in ("linear", "vpt-deep")
    ]
    runs = list(swept.plan.runs({}))
    assert len(runs) == len({run.key for run in runs}) == 48 == sum(swept.plan.count())
    assert {run.seed for run in runs} == {3, 7} and all(run.test for run in runs)
    options = [swept.options[run.key] for run in runs]
    assert {o.augment for o in options if o.data == "y"} == {"crop"}
    decays = {o.weight_decay for o in options}
    assert len(decays) == 3 and all(1e-4 <= d <= 1e-1 for d in decays)


def test_more_draws_and_other_options_leave_the_first_draws(spec):
    text = "[random]\ndraws = {}\nlr = {{uniform = [0.1, 0.9]}}\n{}"
    few = keys_of(spec(below=text.format(2, "")))
    many = keys_of(spec(below=text.format(4, "")))
    assert many[:2] == few and len(set(many)) == 4
    lrs = lambda path: [o.lr for o in read_spec(path).options.values()]
    before = lrs(spec(below=text.format(2, "")))
    assert lrs(spec(below=text.format(2, "dropout = {choice = [0.1, 0.2]}"))) == before
    assert lrs(spec(below=text.format(2, "seed = 1"))) != before


def test_options_are_drawn_apart(spec):
    how = "{uniform = [0.1, 0.9]}"
    path = spec("", f"[methods.linear]\n[random]\ndraws = 4\nlr = {how}\nweight_decay = {how}")
    (group,) = read_spec(path).plan.groups
    drawn = [tuple(cell.values.values()) for cell in group.cells]
    assert len(drawn) == 4 and all(rate != decay for rate, decay in drawn)


def test_draws_of_integers(spec):
    path = spec(below="[random]\ndraws = 20\nnum_tokens = {log-uniform = [1, 4]}")
    assert {o.num_tokens for o in read_spec(path).options.values()} == {1, 2, 3, 4}


def test_a_key_is_of_the_settings_alone(spec, shades):
    one = keys_of(spec('methods = ["vpt-deep"]', "[grid]\nlr = [0.01]"))
    table = '[methods.mine]\nmethod = "vpt-deep"\nlr = 1e-2\n'
    tasks = f"[tasks.mine]\ndata = {json.dumps(str(shades))}\n"
    assert keys_of(spec("", table + tasks)) == one  # other names; lr is what it is by default too
    assert keys_of(spec(below="[grid]\nlr = [0.02]")) != one
    path = spec()
    path.write_text(path.read_text().replace("workers = 1", "workers = 2"))
    assert keys_of(path) == one
    assert key_of({"a": 1, "b": {"c": 2, "d": 3}}) == key_of({"b": {"d": 3, "c": 2}, "a": 1})


def test_keys_are_those_of_earlier_versions(spec):
    """A sweep that somebody began goes on: nothing that changes in pae may change these."""
    lines = """
[methods.linear]
[methods.vpt-deep]
lr = 0.02
[methods.pae]
method = "vpt-deep"
kld = true
mpa = true
mpa_images = 16
[methods.vapt]
config = "vapt"
weight_decay = 0.001
"""
    keys = keys_of(spec('tasks = ["digits"]', lines))
    assert keys == ["cf95ddaa0a1a", "d2b23aebb716", "9036441a363c", "53954cd0f856"]
    more = lines.replace("lr = 0.02", "lr = 0.02\nsave_every_steps = 5")
    assert keys_of(spec('tasks = ["digits"]', more)) == keys
    other = keys_of(spec('tasks = ["digits"]', lines.replace("lr = 0.02", "dropout = 0.0")))
    assert [a == b for a, b in zip(other, keys)] == [True, False, True, True]
    folders = '[tasks.a]\ndata = "x"\n[tasks.b]\ndata = "y"\n[methods.linear]'
    assert len(set(keys_of(spec("", folders)))) == 2


def test_what_a_method_has_no_use_for_is_left_out(spec):
    path = spec('methods = ["linear", "vpt-deep"]', "dropout = 0.1\n[grid]\nnum_tokens = [2, 4]\n")
    swept = read_spec(path)
    assert [len(group.cells) for group in swept.plan.groups] == [1, 2]
    assert swept.plan.groups[0].cells[0].values == {}
    assert any("linear has no use for dropout" in note for note in swept.notes)


def test_runs_of_two_tasks_that_are_one_are_told(spec, shades):
    folder = f"data = {json.dumps(str(shades))}"
    path = spec('seeds = 2\nmethods = ["vpt-deep"]', f"[tasks.a]\n{folder}\n[tasks.b]\n{folder}")
    swept = read_spec(path)
    assert swept.notes == (
        "b, vpt-deep: 2 of its runs are also those of a, vpt-deep, and run once",
    )
    assert sum(swept.plan.count()) == 2


def test_own_grids_and_arguments_of_families(spec):
    path = spec(
        "",
        "[methods.bpt]\nlr = 0.7\ngrid = { method_args.rank = [4, 8], lr = [0.1] }\n"
        '[methods."a b"]\nmethod = "vpt-deep"\nlr = 0.5\n[grid]\nlr = [0.2, 0.3]\n',
    )
    swept = read_spec(path)
    own, common = swept.plan.groups
    assert [cell.values for cell in own.cells] == [
        {"method_args.rank": 4, "lr": 0.1},
        {"method_args.rank": 8, "lr": 0.1},
    ]
    assert [swept.options[c.keys[0]].method_args for c in own.cells] == [{"rank": 4}, {"rank": 8}]
    assert {swept.options[c.keys[0]].lr for c in own.cells} == {0.1}  # over the method's option
    # the method's own option wins over the common grid, whose cells are then one
    assert [swept.options[cell.keys[0]].lr for cell in common.cells] == [0.5]


@pytest.mark.parametrize(
    ("top", "below", "words"),
    [
        ("metods = 1", "", ["there is no metods", "methods"]),
        ("lr = 0.1", "", ["there is no lr", "[options] lr"]),
        ("seeds = 0", "", ["seeds = 0"]),
        ("seeds = [1, 1]", "", ["seeds = [1, 1]"]),
        ("seeds = [-1]", "", ["[seeds]", "seed = -1"]),
        ('select = "test"\nmethods = ["bpt"]', "", ["select = 'test'", "two-stage"]),
        ('tasks = ["digts"]\nmethods = ["bpt"]', "", ["'digts'", "did you mean digits"]),
        ('methods = ["vpt-dep"]', "", ["[methods.vpt-dep]", "expected one of"]),
        ('methods = ["compare"]', "", ["compare is three runs"]),
        ("", "", ["expected methods"]),
        ('methods = ["bpt"]', "sed = 1", ["[options]", "sed"]),
        ('methods = ["bpt"]', "seed = 1", ["[options] seed", "seeds"]),
        ('methods = ["bpt"]', "kld_dim = 8", ["[options]", "kld_dim", "kld = true"]),
        ('methods = ["bpt"]', "[grid]\nmpa_window = [8]", ["[grid]", "mpa_window", "mpa = true"]),
        ('methods = ["bpt"]', "rate_of_learning = 1", ["rate_of_learning", "--help lists them"]),
        ('methods = ["bpt"]', 'lr = "0.1"', ["[options]", 'lr = "0.1"', "a number"]),
        ('methods = ["bpt"]', "[grid]\nlr = []", ["[grid] lr = []", "one value or more"]),
        ('methods = ["bpt"]', "[grid]\nlr = 0.1", ["[grid] lr = 0.1", "a list"]),
        ('methods = ["bpt"]', "[grid]\nlr = [0.1, -1]", ["[grid]", "lr = -1", "above 0"]),
        ('methods = ["bpt"]', '[grid]\ndataset = ["digits"]', ["[grid] dataset", "tasks"]),
        ('methods = ["bpt"]', "[grid]\nmethod_args.rnk = [4]", ["rnk", "rank"]),
        ('methods = ["bpt"]', "[random]\nlr = {choice = [1.0]}", ["draws = None"]),
        ('methods = ["bpt"]', "[random]\ndraws = 2\nlr = [1.0]", ["[random] lr", "log-uniform"]),
        (
            'methods = ["bpt"]',
            "[random]\ndraws = 2\nlr = {log-uniform = [0, 1]}",
            ["expected a low above 0"],
        ),
        (
            "",
            '[methods.linear]\nmethod = "linear"\nmpa = true',
            ["[methods.linear]: mpa = true", "needs a --method with prompts"],
        ),
        ("", '[methods.bpt]\nconfig = "vapt"\nmethod = "bpt"', ["'vapt'", "it is for vapt"]),
    ],
)
def test_what_is_refused_names_file_and_key(spec, capsys, top, below, words):
    path = spec(top, below)
    line = error_line(capsys, ["sweep", str(path), "--dry-run"])
    assert str(path) in line
    for word in words:
        assert word in line, line


# ---- the choice


def record(val, loss=1.0, status=FINISHED, **more):
    images = {"test": 5}
    return {"status": status, "val": val, "val_loss": loss, "test": None, "images": images, **more}


def plan_of(values, seeds=(0, 1), select="two-stage", finals=None, **more):
    cells = []
    for value in values:
        keys = tuple(f"{value}/{seed}" for seed in seeds)
        cells.append(plan.Cell({"lr": value}, keys, finals or keys))
    return plan.Plan("p", seeds, select, "best", (plan.Group("t", "m", tuple(cells)),), **more)


def test_the_best_validation_wins_then_the_loss_then_the_first():
    made = plan_of("abcd")
    (group,) = made.groups
    found = {"a/0": record(0.5), "b/0": record(0.7, 0.9), "c/0": record(0.7, 0.8)}
    assert made.chosen(group, found) == ()  # one is missing
    assert [run.key for run in made.runs(found)] == ["a/0", "b/0", "c/0", "d/0"]
    found["d/0"] = record(0.7, 0.8)
    assert [cell.values["lr"] for cell in made.ties(group, found)] == ["c", "d"]
    assert [(run.key, run.test) for run in made.runs(found)][4:] == [("c/0", True), ("c/1", True)]
    assert made.count() == (4, 1)


def test_the_grids_of_a_task_come_before_its_chosen_cells():
    made = plan_of("ab", seeds=(0,))
    (group,) = made.groups
    more = dataclasses.replace(group, method="n", cells=plan_of("cd", seeds=(0,)).groups[0].cells)
    made = dataclasses.replace(made, groups=(group, more))
    found = {"a/0": record(0.5), "b/0": record(0.7)}
    assert [run.key for run in made.runs(found)] == ["a/0", "b/0", "c/0", "d/0", "b/0"]


def test_many_runs_take_little_time_and_memory(tmp_path, monkeypatch):
    """What is asked after every run of so many must not grow with their square."""
    keys = [f"{number:02d}" for number in range(40)]
    cells = tuple(plan.Cell({"lr": key}, (key,), ("x",)) for key in keys)
    made = dataclasses.replace(plan_of("a", (0,)), groups=(plan.Group("t", "m", cells),))
    for key in keys[:30]:
        Records(tmp_path).write(record(0.5, key=key, reason=None, seconds=1.0, settings={"lr": 1}))
    records, looks, medians = Records(tmp_path, BULKY), [], []
    with monkeypatch.context() as patch:
        stat, median = os.stat, statistics.median
        patch.setattr(os, "stat", lambda p, **more: looks.append(str(p)) or stat(p, **more))
        patch.setattr(statistics, "median", lambda v: medians.append(v) or median(v))
        for _ in range(3):
            now = progress.progress(made, records)
    assert (now.done, now.total, len(now.left), now.seconds) == (30, 41, 10, 11.0)
    assert len([p for p in looks if p.endswith("record.json")]) == 30 and len(medians) == 3
    assert "settings" not in records["00"] and Records(tmp_path)["00"]["settings"] == {"lr": 1}


def test_records_are_looked_at_anew_after_refresh(tmp_path):
    mine, others = Records(tmp_path), Records(tmp_path)
    lean = {"key": "a", "reason": None, "settings": {}}
    others.write(record(0.5, **lean))
    assert "a" not in mine
    mine.refresh()
    assert mine["a"]["val"] == 0.5
    others.write(record(0.6, **lean))
    mine.refresh()
    assert mine["a"]["val"] == 0.6
    others.remove("a")
    mine.refresh()
    assert "a" not in mine and mine.get("a") is None and len(mine) == 0


def test_a_long_file_says_how_far_it_is_read(spec, monkeypatch):
    path, told = spec(below="[grid]\nlr = [0.1, 0.2, 0.3]"), []
    assert read_spec(path, told.append) and not told
    monkeypatch.setattr(spec_of_sweeps, "_TELL", -1.0)
    assert read_spec(path, told.append) and told == [1, 2, 3]


@pytest.mark.parametrize("status", ["diverged", "failed", "stopped"])
def test_what_did_not_finish_is_never_chosen(status):
    made = plan_of("ab")
    (group,) = made.groups
    found = {"a/0": record(None, status=status), "b/0": record(0.1)}
    assert [cell.values["lr"] for cell in made.chosen(group, found)] == ["b"]
    found["b/0"] = record(None, status=status)
    assert made.chosen(group, found) == () and made.finals(group, found) is None
    assert all(run.is_done(found) for run in made.runs(found))


def test_best_is_of_the_mean_over_seeds():
    made = plan_of("ab", select="best")
    found = {"a/0": record(0.9), "a/1": record(0.1), "b/0": record(0.6), "b/1": record(0.6)}
    assert [cell.values["lr"] for cell in made.chosen(made.groups[0], found)] == ["b"]
    assert len(made.grid(made.groups[0])) == 4 and made.count() == (4, 0)


def test_the_last_epoch_may_be_the_one_that_counts():
    made = plan_of("ab")
    made = plan.Plan(**{**vars(made), "epoch": "last"})
    found = {
        "a/0": record(0.9, val_last=0.2, val_loss_last=1.0),
        "b/0": record(0.8, val_last=0.3, val_loss_last=1.0),
    }
    assert [cell.values["lr"] for cell in made.chosen(made.groups[0], found)] == ["b"]


# ---- running


def test_a_sweep_from_its_spec_to_its_records(spec, sweep, tmp_path):
    path = spec('seeds = 2\nmethods = ["linear", "vpt-deep"]', "[grid]\nlr = [0.003, 0.01]")
    status, out, err = sweep(path)
    assert status == 0 and "6 of 6 runs finished" in out
    assert err.splitlines()[0].startswith("lrs: 6 runs: 4 of the grid")
    made, records = plan.read(tmp_path / "out")
    assert len(records) == 6
    for group in made.groups:
        (chosen,) = made.chosen(group, records)
        for cell in group.cells:
            first = records[cell.keys[0]]
            # only the chosen cell has ever looked at test images
            assert (first["test"] is not None) == (cell == chosen)
            assert first["values"] == cell.values and first["images"]["test"] == 15
            folder = RunFolder(records.path(first["key"]))
            assert folder.best.is_file() and not folder.previous_state.exists()
        tested = [records[key] for key in chosen.finals]
        assert [r["seed"] for r in tested] == [0, 1] and all(0 <= r["test"] <= 1 for r in tested)
    sample = next(iter(records.values()))
    documented = (processes.ROOT / "docs" / "sweeps.md").read_text()
    for name in sample:
        assert f"`{name}`" in documented, name
    heads = {r["method"]: r["parameters"] - r["parameters_without_head"] for r in records.values()}
    assert heads["linear"] == heads["vpt-deep"] == 64 * 3 + 3
    again = sweep(path)
    assert again[0] == 0 and len(again[2].splitlines()) <= 3  # nothing was left
    status = sweep(path, "--status")[1]
    assert "6/6 runs" in status and "under way" not in status


def test_a_run_of_a_sweep_is_that_of_pae_train(spec, sweep, shades, tmp_path):
    assert sweep(spec('seeds = [5]\nmethods = ["vpt-deep"]'))[0] == 0
    (found,) = Records(tmp_path / "out").values()
    flags = "--method vpt-deep --model test_vit --no-pretrained --img-size 32 --epochs 2"
    more = "--batch-size 16 --num-tokens 2 --device cpu --amp no --workers 1 --seed 5 --quiet"
    where = ["--data", str(shades), "--output", str(tmp_path / "alone")]
    assert main(["train", *where, *flags.split(), *more.split()]) == 0
    result = RunFolder(tmp_path / "alone").result()
    assert found["val"] == result["val_accuracy"] and found["test"] == result["test_accuracy"]
    assert found["best_epoch"] == result["best_epoch"] and found["passes"] == result["passes"]


def test_probes_share_features_and_find_the_same(spec, tmp_path, monkeypatch):
    """Cells of a probe compute each split once; another seed, cut or size computes its own."""
    path = spec('methods = ["linear"]\nselect = "none"\nseeds = 2', "[grid]\nlr = [0.003, 0.01]")
    swept, records, computed = read_spec(path), Records(tmp_path / "out"), []
    run = loop._Run._computed
    monkeypatch.setattr(loop._Run, "_computed", lambda s, d: computed.append(len(d)) or run(s, d))
    execute.serial(swept, records, work.Quiet(), lambda line: None)
    assert sorted(computed) == [7, 7, 15, 15, 29, 29]  # of two seeds, whose cuts and weights differ
    alone = Records(tmp_path / "alone")
    for wanted in swept.plan.runs(records):
        work.do(swept, alone, wanted, work.Quiet())  # which shares nothing
    for key, expected in alone.items():
        for name in ("val", "val_loss", "test", "passes"):
            assert records[key][name] == expected[name]
    assert len(computed) == 6 + 4 * 3


def test_final_options_are_of_the_chosen_cell_alone(spec, sweep, tmp_path):
    path = spec("seeds = 2", "[methods.linear]\n[grid]\nlr = [0.003, 0.01]\n[final]\nepochs = 3")
    assert sweep(path)[0] == 0
    made, records = plan.read(tmp_path / "out")
    assert made.count() == (2, 2) and len(records) == 4
    for record in records.values():
        assert (record["epochs"] == 3) == (record["test"] is not None)


def test_a_run_that_diverges_or_fails_stops_no_other(spec, sweep, tmp_path, monkeypatch):
    path = spec('methods = ["vpt-deep"]', "[grid]\nlr = [0.003, 0.01, 0.02]")
    train, calls = loop.train, []

    def broken(options, *args, **more):
        calls.append(options.lr)
        if options.lr == 0.003:
            raise ArithmeticError("the training loss\nis nan")
        if options.lr == 0.01:
            raise RuntimeError("a defect")
        return train(options, *args, **more)

    monkeypatch.setattr(loop, "train", broken)
    status, out, err = sweep(path)
    assert status == 1 and "1 of 3 runs finished" in out
    found = {r["values"]["lr"]: r for r in Records(tmp_path / "out").values()}
    assert found[0.003]["status"] == "diverged"
    assert found[0.003]["reason"] == "the training loss is nan"
    assert found[0.01]["status"] == "failed" and found[0.01]["error"] == "RuntimeError"
    trace = Records(tmp_path / "out").path(found[0.01]["key"]) / "error.txt"
    assert "a defect" in trace.read_text()
    assert found[0.02]["test"] is not None
    assert "did not finish" in sweep(path, "--status")[1]
    calls.clear()
    assert sweep(path)[0] == 1 and not calls  # they are not tried again by themselves
    monkeypatch.setattr(loop, "train", train)
    status, out, err = sweep(path, "--retry")
    assert status == 0 and "2 runs start again" in err and not trace.exists()


def test_a_full_disk_stops_the_sweep_and_loses_nothing(spec, sweep, tmp_path, monkeypatch):
    """Every run after it would fail by the same, so none is recorded as failed."""
    path = spec('methods = ["vpt-deep"]', "[grid]\nlr = [0.003, 0.01]")
    write, began = RunFolder.write_metrics, []

    def full(folder, rows, result=None):
        began.append(folder.path.name)
        if len(rows) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder.path))
        write(folder, rows, result)

    monkeypatch.setattr(RunFolder, "write_metrics", full)
    status, _, err = sweep(path)
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and "No space left on device" in line and "make room" in line
    assert not Records(tmp_path / "out") and len(set(began)) == 1
    monkeypatch.setattr(RunFolder, "write_metrics", write)
    assert sweep(path)[0] == 0


def test_records_of_another_spec_are_left_and_told(spec, sweep, tmp_path):
    assert sweep(spec(below="[grid]\nlr = [0.003, 0.01]"))[0] == 0
    before = dict(Records(tmp_path / "out"))
    status, out, err = sweep(spec(below="[grid]\nlr = [0.003, 0.02]"))
    assert status == 0 and "2 of 2 runs finished" in out
    assert "1 record of settings that lrs.toml does not ask for: left alone" in err
    after = Records(tmp_path / "out")
    assert len(after) == 3 and all(key in after for key in before)


def test_a_diverging_run_begins_again_and_others_go_on(spec, sweep, tmp_path):
    path = spec()
    assert sweep(path)[0] == 0
    records = Records(tmp_path / "out")
    (key,) = records
    for status, error, kept in [("diverged", None, False), ("failed", "OSError", True)]:
        (records.path(key) / "left.txt").write_text("")
        records.write({**records[key], "status": status, "error": error})
        assert work.retry(records, key) and key not in records
        assert (records.path(key) / "left.txt").exists() == kept
        assert sweep(path)[0] == 0
        records.refresh()


def test_another_run_in_the_place_of_one_says_what_begins_it_anew(
    spec, sweep, tmp_path, monkeypatch
):
    path = spec()
    with monkeypatch.context() as patch:
        patch.setattr(work, "_tidy", lambda *_: None)  # so that the state stays
        assert sweep(path)[0] == 0
    records = Records(tmp_path / "out")
    (key,) = records
    run = RunFolder(records.path(key))
    state, val = run.read_state(), records[key]["val"]
    state["record"]["settings"]["lr"] = 5.0
    run.write_state(state)
    run.metrics_json.unlink()
    records.remove(key)
    status, _, err = sweep(path)
    assert status == 1 and "lr 5.0, now 0.01; pae sweep SPEC --retry begins it anew" in err
    assert sweep(path, "--retry")[0] == 0
    records.refresh()
    assert records[key]["val"] == val


def test_runs_that_are_no_longer_on_the_same_images_fail(spec, sweep, tmp_path):
    folder = save_shades(tmp_path / "data", train=4, test=1)
    top = f'methods = ["linear"]\ntasks = [{json.dumps(str(folder))}]'
    assert sweep(spec(top, "[grid]\nlr = [0.003]"))[0] == 0
    (folder / "train" / "dark" / "00.png").unlink()
    status, _, err = sweep(spec(top, "[grid]\nlr = [0.003, 0.01]"))
    assert status == 1 and "cannot be compared with the runs beside it" in err
    assert "; put it back and give --retry, or give another --output" in err


def test_a_run_in_use_is_left_to_whoever_has_it(spec, tmp_path):
    swept = read_spec(spec())
    records = Records(tmp_path / "out")
    (run,) = swept.plan.runs(records)
    with RunFolder(records.path(run.key)).held(), pytest.raises(lock.InUse):
        work.do(swept, records, run, work.Quiet())
    assert not records.path(run.key).exists()


def test_a_process_leaves_what_others_are_at_and_does_nothing_twice(spec, tmp_path, monkeypatch):
    """Two runs, of which another process has the first until this one waits for it."""
    swept, out = (
        read_spec(spec('methods = ["linear"]', "[grid]\nlr = [0.003, 0.01]")),
        tmp_path / "out",
    )
    records, before, other = Records(out), Records(out), Records(out)
    first, second = swept.plan.grid(swept.plan.groups[0])
    held, lines, waited = RunFolder(records.path(first.key)).held(), [], []

    def ends(seconds):
        waited.append([*Records(out)])
        held.__exit__(None, None, None)
        assert work.do(swept, other, first, work.Quiet())["status"] == FINISHED

    monkeypatch.setattr(execute.time, "sleep", ends)
    with contextlib.ExitStack() as stack:
        stack.callback(held.__exit__, None, None, None)
        held.__enter__()
        execute.serial(swept, records, work.Quiet(), lines.append, only=[first, second])
        stack.pop_all()
    assert waited == [[second.key]] and len(lines) == 1
    assert not before  # of the time when there was no record
    assert work.do(swept, before, first, work.Quiet()) is None


def test_what_another_machine_chose_when_a_run_began_stays(spec, tmp_path):
    options = next(iter(read_spec(spec()).options.values()))
    chosen = dataclasses.replace(options, amp="bf16", mpa_images=7, mpa_precision="bf16")
    here = dataclasses.replace(options, amp="no", mpa_images=9, mpa_precision="fp32")
    folder = RunFolder(tmp_path)
    with folder.held():
        assert work._adopted(folder, here, options) == here  # a run that has not begun
        folder.write_config(chosen)
    asked = dataclasses.replace(options, amp="auto", mpa_images=None, mpa_precision="fp32")
    adopted = work._adopted(folder, here, asked)
    assert (adopted.amp, adopted.mpa_images, adopted.mpa_precision) == ("bf16", 7, "fp32")


def test_index_is_one_run_and_says_when_it_is_too_early(spec, sweep, tmp_path):
    path = spec('seeds = 2\nmethods = ["linear"]', "[grid]\nlr = [0.003, 0.01]")
    lines = [line for line in sweep(path, "--list")[1].splitlines() if line[0] != "#"]
    assert [line.split("\t")[2] for line in lines] == ["missing"] * 2 + ["open"] * 2
    assert [line.split("\t")[0] for line in lines] == list("0123")
    assert sweep(path, "--index", "0")[0] == 0 and len(Records(tmp_path / "out")) == 1
    status, _, err = sweep(path, "--index", "3")
    assert status == 3 and "1 runs of its grid have no record yet" in err
    assert sweep(path, "--index", "1-3")[0] == 3
    assert sweep(path, "--index", "1")[0] == sweep(path, "--index", "3")[0] == 0
    found = Records(tmp_path / "out")
    # the second seed, and the first of the chosen cell not tested yet
    assert sorted((r["seed"], r["test"] is not None) for r in found.values()) == [
        *[(0, False), (0, False)],
        (1, True),
    ]
    assert sweep(path, "--index", "2-3")[0] == 0 and len(Records(tmp_path / "out")) == 3
    lines = [line for line in sweep(path, "--list")[1].splitlines() if line[0] != "#"]
    assert [line.split("\t")[2] for line in lines] == ["finished"] * 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--index", "9"], ["--index 9", "0..0"]),
        (["--index", "1-0"], ["--index 1-0"]),
        (["--jobs", "0"], ["--jobs 0"]),
        (["--jobs", "2", "--index", "0"], ["not allowed with"]),
    ],
)
def test_wrong_flags(spec, tmp_path, capsys, flags, words):
    path = spec()
    where = ["--output", str(tmp_path / "out")]
    line = error_line(capsys, ["sweep", str(path), *where, *flags])
    assert all(word in line for word in words), line
    assert not (tmp_path / "out" / "runs").exists()


def test_a_damaged_record_is_one_line(spec, sweep, tmp_path, capsys):
    path = spec()
    assert sweep(path)[0] == 0
    (key,) = Records(tmp_path / "out")
    file = Records(tmp_path / "out").path(key) / "record.json"
    file.write_text(file.read_text().replace('"val": ', '"val": 1'))
    with pytest.raises(CheckpointError, match="was damaged"):
        Records(tmp_path / "out")[key]
    line = error_line(capsys, ["sweep", str(path), "--output", str(tmp_path / "out"), "--status"])
    assert str(file) in line and "delete it" in line
    file.unlink()
    assert sweep(path)[0] == 0  # from what the run itself has kept


def test_time_left_is_of_runs_like_it():
    made = plan_of("ab", seeds=(0,), select="none")
    found = {"a/0": record(0.5, seconds=60.0)}
    now = progress.progress(made, found)
    assert (now.done, now.total, now.seconds) == (1, 2, 60.0)
    assert now.line(2) == "1/2 runs, about 0:00:30 left"


# ---- kills


def test_killed_workers_and_a_killed_call_lose_nothing(spec, tmp_path, monkeypatch):
    """A worker is killed, then the process that watches over it; the next call ends the sweep.

    The numbers are those of an undisturbed one.
    """
    path = spec('methods = ["vpt-deep"]', "[grid]\nlr = [0.003, 0.01]", epochs=12)
    out = tmp_path / "out"
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(processes.ROOT)]))
    swept, records, lines = read_spec(path), Records(out), tmp_path / "lines.txt"
    command = [sys.executable, "-m", "pae", "sweep", str(path), "--output", str(out), "--worker"]
    (first, second) = swept.plan.runs(records)

    def say(line):
        with open(lines, "a") as file:
            file.write(line + "\n")

    def watch():
        execute.processes(swept, records, 1, command, say)
        return 0

    def wait_for(what):
        deadline = time.monotonic() + 200
        while not (found := what()):
            assert time.monotonic() < deadline, lines.read_text()
            time.sleep(0.05)
        return found

    def holder():
        found = lock.holder(records.path(first.key))["pid"]
        return found if found and not lock.is_dead(lock.holder(records.path(first.key))) else None

    def epochs():
        return len(RunFolder(records.path(first.key)).rows())

    watcher = forked(watch)
    try:
        killed = wait_for(lambda: epochs() > 1 and holder())
        os.kill(killed, signal.SIGKILL)
        other = wait_for(lambda: holder() not in (None, killed) and holder())
        before = epochs()
        assert before > 1
        wait_for(lambda: epochs() > before)  # it goes on
    finally:
        os.kill(watcher.pid, signal.SIGKILL)
        ended(watcher)
    wait_for(lambda: holder() is None)  # the worker has noticed
    assert other != killed and "SIGKILL" in lines.read_text()
    records.refresh()
    kept = epochs()
    assert not records and before < kept < 12
    execute.serial(swept, records, work.Quiet(), say)
    alone = Records(tmp_path / "alone")
    execute.serial(swept, alone, work.Quiet(), say)
    for run in (first, second):
        for name in ("val", "val_loss", "best_epoch", "test", "passes"):
            assert records[run.key][name] == alone[run.key][name]


def test_a_run_that_kills_two_processes_has_failed(spec, tmp_path):
    path, lines = spec(), []
    swept, records = read_spec(path), Records(tmp_path / "out")
    (run,) = swept.plan.runs(records)
    dies = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom pae.train.lock import Hold\n"
        f"Path({str(records.path(run.key))!r}).mkdir(parents=True, exist_ok=True)\n"
        f"hold = Hold(Path({str(records.path(run.key))!r}))\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    execute.processes(swept, records, 1, [sys.executable, "-c", dies], lines.append)
    assert records[run.key]["status"] == "failed"
    assert records[run.key]["reason"] == (
        "its process was ended by SIGKILL, twice: as a system does that runs out of memory"
    )
    assert "goes on in another one" in lines[0] and "failed: its process" in lines[1]


def test_processes_that_never_begin_are_not_started_for_ever(spec, tmp_path):
    swept, records = read_spec(spec()), Records(tmp_path / "out")
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    with pytest.raises(RuntimeError, match="end before they begin, by status 1"):
        execute.processes(swept, records, 1, command, lambda line: None)
