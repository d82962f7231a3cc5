"""The executor on a cluster: its seam with an engine that stands in for Ray, and Ray itself.

Ray's part takes minutes, most of them to start processes: `PAE_RAY=1 pytest -n0 tests/sweep`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

import pytest

from pae.sweep import execute, on_ray, work
from pae.sweep.records import Records
from pae.sweep.spec import read_spec
from pae.train import lock
from pae.train.cli import main
from pae.train.runfolder import RunFolder
from tests import processes
from tests.sweep.specs import SLOW
from tests.train.helpers import error_line


class StandIn:
    """Runs trials here, in order; `events` says for (wave, place) what befalls one instead."""

    at_once = 1

    def __init__(self, **events):
        self.events, self.waves, self.stops = events, [], []

    def fit(self, trial, keys, look, stops):
        self.waves.append(keys)
        self.stops.append(stops)
        ended = []
        for place, key in enumerate(keys):
            event = self.events.get(f"w{len(self.waves)}_{place}")
            if event == "dies":
                ended.append(on_ray.Ended(key, 1, "its process on the cluster ended 4 times"))
                continue
            told = []

            def report(row, told=told, event=event):
                told.append(row)
                if row["epoch"] == event:
                    raise SystemExit  # as Ray has a trial that its scheduler stops

            with contextlib.suppress(SystemExit):
                trial(key, report)
            look()
            ended.append(on_ray.Ended(key, told[-1]["epoch"] if told else 0, None))
        return ended


def test_waves_of_the_grid_and_of_the_chosen_cell(spec, tmp_path):
    path = spec('seeds = 2\nmethods = ["vpt-deep"]', "[grid]\nlr = [0.003, 0.01]")
    swept, records, lines = read_spec(path), Records(tmp_path / "out"), []
    engine = StandIn()
    on_ray.run(swept, records, engine, lines.append)
    first, second = swept.plan.groups[0].cells
    (chosen,) = swept.plan.chosen(swept.plan.groups[0], records)
    assert engine.waves == [[first.keys[0], second.keys[0]], list(chosen.finals)]
    assert [records[key]["test"] is None for key in chosen.finals] == [False, False]
    assert len(lines) == 4 and "3/3 runs" in lines[-1]
    engine = StandIn()
    on_ray.run(swept, records, engine, lines.append)
    assert engine.waves == []  # nothing was left


def test_a_trial_whose_process_dies_has_failed_and_stops_no_other(spec, tmp_path):
    path = spec('methods = ["vpt-deep"]\nselect = "none"', "[grid]\nlr = [0.003, 0.01]")
    swept, records = read_spec(path), Records(tmp_path / "out")
    on_ray.run(swept, records, StandIn(w1_0="dies"), lambda line: None)
    status = [records[run.key]["status"] for run in swept.plan.runs(records)]
    assert status == ["failed", "finished"]


def test_stopped_runs_are_recorded_never_chosen_and_named_in_the_table(spec, tmp_path, capsys):
    path = spec(
        'methods = ["vpt-deep"]', "[grid]\nlr = [0.003, 0.01, 0.02]\n[asha]\ngrace = 1\n", epochs=3
    )
    swept, out = read_spec(path), tmp_path / "out"
    records = Records(out)
    swept.plan.write(out)
    engine = StandIn(w1_0=1, w1_2=2, w2_0=1)
    on_ray.run(swept, records, engine, lambda line: None)
    assert engine.stops == [True, False]  # the chosen cell's run is never stopped
    found = [records[cell.keys[0]] for cell in swept.plan.groups[0].cells]
    assert [r["status"] for r in found] == ["stopped", "finished", "stopped"]
    assert [r["reason"] for r in found][::2] == ["by ASHA after epoch 1", "by ASHA after epoch 2"]
    assert all(r["scheduler"] == "asha" for r in found)
    (chosen,) = swept.plan.chosen(swept.plan.groups[0], records)
    assert chosen.values == {"lr": 0.01}
    assert main(["table", str(out)]) == 0
    table = capsys.readouterr().out
    assert "runs stopped early by asha" in table


def test_only_runs_of_one_grid_are_compared(spec, tmp_path):
    path = spec('methods = ["bpt", "vpt-deep"]', "[grid]\nlr = [0.003, 0.01]\n[asha]\ngrace = 1\n")
    swept = read_spec(path)
    left = list(swept.plan.runs({}))
    found = list(on_ray._experiments(swept, left))
    assert [(stops, {r.method for r in runs.values()}) for stops, runs in found] == [
        (True, {"bpt"}),
        (True, {"vpt-deep"}),
    ]


def test_a_run_that_another_call_has_is_waited_for(spec, tmp_path, monkeypatch):
    swept, records = read_spec(spec()), Records(tmp_path / "out")
    (run,) = swept.plan.runs(records)
    folder = RunFolder(records.path(run.key))
    folder.acquire()
    monkeypatch.setattr(on_ray.time, "sleep", lambda seconds: folder.release())
    engine = StandIn()
    on_ray.run(swept, records, engine, lambda line: None)
    assert len(engine.waves) == 2 and records[run.key]["status"] == "finished"


def test_asha_needs_ray_and_ray_needs_to_be_there(spec, tmp_path, capsys, monkeypatch):
    where = ["--output", str(tmp_path / "out")]
    path = spec('methods = ["vpt-deep"]', "[asha]\nreduction = 3\n")
    assert "[asha] needs --ray ADDRESS" in error_line(capsys, ["sweep", str(path), *where])
    path = spec('methods = ["vpt-deep"]', "[asha]\nreduction = 1\n")
    line = error_line(capsys, ["sweep", str(path), *where])
    assert f"{path}: [asha] reduction = 1: expected an integer of at least 2" in line
    monkeypatch.setitem(sys.modules, "ray", None)
    line = error_line(capsys, ["sweep", str(spec()), *where, "--ray", "local"])
    assert 'pip install "pae[sweep]"' in line
    line = error_line(capsys, ["sweep", str(spec()), *where, "--run-cpus", "2"])
    assert "--run-cpus needs --ray ADDRESS" in line


# ---- Ray itself


def wait_for(what, seconds=400):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


@pytest.mark.skipif("PAE_RAY" not in os.environ, reason="Ray's part takes minutes: PAE_RAY=1")
def test_two_workers_one_killed_then_the_driver_then_all_is_finished(spec, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason='Ray is not installed: pip install "pae[sweep]"')
    path = spec('methods = ["vpt-deep"]', "[grid]\nlr = [0.003, 0.01]\n", epochs=100)
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(processes.ROOT)]))
    out = tmp_path / "out"
    swept, records = read_spec(path), Records(out)
    first, second = (run.key for run in swept.plan.runs(records))
    command = [sys.executable, "-m", "pae", "sweep", str(path), "--output", str(out)]

    def holder(key):
        found = lock.holder(records.path(key))
        return found["pid"] if found["pid"] and not lock.is_dead(found) else None

    def epochs(key):
        return len(RunFolder(records.path(key)).rows())

    with processes.started([*command, "--ray", "local"]) as driver:
        wait_for(lambda: epochs(first) > 0 and epochs(second) > 0 and holder(first))
        killed, before = holder(first), epochs(first)
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: holder(first) not in (None, killed))  # Ray has started it again
        wait_for(lambda: epochs(first) > before)  # and it went on
        driver.kill()
        wait_for(lambda: holder(first) is None and holder(second) is None)
        records.refresh()
        assert records.get(first) is None
    kept = epochs(first)
    assert 0 < kept < 100
    (tmp_path / "sitecustomize.py").unlink()
    done = processes.run([*command, "--ray", "local", "--quiet"])
    assert "2 of 2 runs finished" in done.stdout
    assert not (out / "ray").exists()
    records.refresh()
    alone = Records(tmp_path / "alone")
    execute.serial(swept, alone, work.Quiet(), lambda line: None)
    for key in (first, second):
        for name in ("val", "val_loss", "best_epoch", "test", "passes"):
            assert records[key][name] == alone[key][name]


@pytest.mark.skipif("PAE_RAY" not in os.environ, reason="Ray's part takes minutes: PAE_RAY=1")
def test_asha_stops_runs_that_are_behind(spec, tmp_path, capsys):
    """Rates that learn come first, so that those that do not are behind them when they arrive."""
    pytest.importorskip("ray", reason='Ray is not installed: pip install "pae[sweep]"')
    rates, still = [0.02, 0.01], [1e-9, 2e-9, 3e-9, 4e-9]
    below = f"[grid]\nlr = {rates + still}\n[asha]\ngrace = 1\nreduction = 2\n"
    path = spec('seeds = 1\nmethods = ["vpt-deep"]', below, epochs=9)
    out = tmp_path / "out"
    command = ["sweep", str(path), "--output", str(out), "--ray", "local", "--quiet"]
    assert main(command) == 1  # some were stopped
    swept, records = read_spec(path), Records(out)
    (group,) = swept.plan.groups
    found = {cell.values["lr"]: records[cell.keys[0]] for cell in group.cells}
    assert all(record["scheduler"] == "asha" for record in found.values())
    stopped = {lr: record for lr, record in found.items() if record["status"] == "stopped"}
    # one that learns may be behind the other; those that do not learn are equals, and some go on
    assert stopped.keys() & set(still) and set(rates) - stopped.keys()
    for record in stopped.values():
        rows = RunFolder(records.path(record["key"])).rows()
        assert record["epochs"] == len(rows) < 9 and record["test"] is None
        assert record["reason"].startswith("by ASHA after epoch ")
    (chosen,) = swept.plan.chosen(group, records)
    assert chosen.values["lr"] in rates
    for key in chosen.finals:  # never stopped
        assert records[key]["status"] == "finished" and records[key]["test"] is not None
        assert records[key]["epochs"] == 9
    assert not (out / "ray").exists()
    capsys.readouterr()
    assert main(["table", str(out)]) == 0
    assert "runs stopped early by asha" in capsys.readouterr().out
    assert main(command) == 1  # nothing is left, and no cluster is begun for it
