"""`bench/gpu.sh`: what it runs, its lines, and how it goes on; all of it: `gpu_day.py`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from unittest import mock

import pytest
import torch

from bench import gpu, lines, merge, predictions, runner, shapes, timing
from bench.results import Run
from pae_kernels.koopman import spectral
from tests import processes
from tests.processes import ROOT

# ---- steps


def test_stages_fit_a_short_lease():
    """What runs beside each other counts once; the first stage is through within four minutes."""
    for stage, limit in (("a", 240), ("b", 540)):
        steps = [step for step in gpu.steps() if step.stage == stage]
        alone = sum(step.seconds for step in steps if not step.beside)
        together = max(s.seconds for s in steps if s.beside and s.name != gpu.LIBRARY)
        assert alone + together + gpu.SLACK <= limit, stage
    assert [*dict.fromkeys(step.stage for step in gpu.steps())] == [*gpu.STAGES]


def test_what_matters_most_comes_first():
    names = [step.name for step in gpu.steps() if step.stage == "a"]
    assert names == [
        *("ceilings", "build", "tests-attention", "tests-pointwise"),
        *("tests-engine 1/2", "tests-engine 2/2", "attention (a)", "step (a)"),
    ]
    for step in gpu.steps():
        if step.name.endswith((" (a)", " (b)")):
            assert any("not ompiled" in word for word in step.command), step.name


def test_every_gpu_test_is_in_a_step():
    """Whatever is skipped without a GPU, as an execution of a kernel or as a whole file."""
    words = {word for step in gpu.steps() for word in step.command}
    texts = {file: file.read_text() for file in (ROOT / "tests").rglob("test_*.py")}
    needs = re.compile(r"^@each\(|skipif\(\s*not torch\.cuda\.is_available", re.M)
    needing = [file for file, text in texts.items() if needs.search(text)]
    assert len(needing) >= 12
    for file in needing:
        assert {str(place.relative_to(ROOT)) for place in (file, file.parent)} & words, file
    for word in words:
        assert not word.endswith(".py") or (ROOT / word).is_file(), word


def test_what_it_does_not_know_is_refused_in_a_line(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["d"])
    assert "stages are a, b, c, got d" in capsys.readouterr().err
    run = processes.run([sys.executable, "-m", "bench.gpu", "a", "--list"])
    assert run.stdout.splitlines()[0].startswith("a ceilings (")
    if not torch.cuda.is_available():
        run = processes.run([sys.executable, "-m", "bench.gpu", "a"], check=False)
        assert run.returncode == 1 and run.stderr == "PyTorch sees no GPU here\n"


def test_a_call_that_names_no_stage_is_all_of_them(capsys):
    assert gpu.main(["--list"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == [step.stage for step in gpu.steps()]


def test_a_second_call_measures_the_ceilings_no_more(tmp_path, monkeypatch):
    day = mock.Mock(lines=tmp_path / "day.jsonl", failed=0)
    monkeypatch.setattr(gpu, "Day", lambda *_: day)
    monkeypatch.setattr(gpu, "stem_here", lambda _: tmp_path / "day")
    for measured in (False, True):
        assert gpu.main(["a"]) == 0
        (run,) = day.run.call_args.args
        assert [step.name == "ceilings" for step in run][:2] == [not measured, False]
        lines.append(day.lines, "ceilings", copy=1)


def test_stage_b_alone_compiles_what_it_tests(tmp_path, monkeypatch):
    day = mock.Mock(lines=tmp_path / "day.jsonl", failed=0)
    monkeypatch.setattr(gpu, "Day", lambda *_: day)
    monkeypatch.setattr(gpu, "stem_here", lambda _: tmp_path / "day")
    for stages, first in (["b"], gpu.LIBRARY), (["a", "b"], "ceilings"):
        gpu.main(stages)
        (run,) = day.run.call_args.args
        names = [step.name for step in run]
        assert names[0] == first and names.count(gpu.LIBRARY) == 1


def test_a_step_ends_with_the_lease(tmp_path, monkeypatch, capsys):
    """However much longer it might take; what the search for tiles said is shown."""
    day = gpu.Day(tmp_path / "day", gpu.SLACK + 20, slow=9)
    monkeypatch.setattr(gpu.subprocess, "Popen", mock.Mock())
    day._start(gpu.Step("c", "tune", 600, (sys.executable,)))
    ((*_, began, until),) = day.running
    assert 10 < until - began <= 20
    day._ended(gpu.Step("c", "tune", 600, ()), "passed", 1, "FORWARD: 3 tiles")
    assert "FORWARD: 3 tiles" in capsys.readouterr().out


def test_tests_that_were_all_skipped_have_failed(tmp_path):
    day, step = gpu.Day(tmp_path / "day", 60), gpu.Step("a", "tests", 9, (), tests=True)
    said = {(0, "3 skipped in 1s"): "failed", (0, "1 passed, 3 skipped in 1s"): "passed"}
    said |= {(1, "1 failed, 3 passed in 1s"): "failed", (5, "4 deselected in 1s"): "passed"}
    assert {given: day._outcome(step, *given) for given in said} == said


def test_lines_of_an_earlier_call_are_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("PAE_COMMIT", "abc")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    have = tmp_path / "nvidia-h100-80gb-hbm3-abc.jsonl"
    lines.append(have, "ceilings", copy=1)
    stem = gpu.stem_here(have)
    assert lines.read(stem.with_suffix(".jsonl")) == lines.read(have) and stem.parent.name == "out"
    lines.append(stem.with_suffix(".jsonl"), "ceilings", copy=2)
    gpu.stem_here(have)  # what the folder has is newer
    assert len(lines.read(stem.with_suffix(".jsonl"))) == 2
    with pytest.raises(SystemExit, match="another day's"):
        gpu.stem_here(have.rename(tmp_path / "other.jsonl"))


# ---- lines


def test_a_torn_line_is_lost_alone(tmp_path):
    path = tmp_path / "day.jsonl"
    assert lines.read(path) == []
    lines.append(path, "test", test="a")
    with open(path, "a") as file:
        file.write('{"kind": "test", "te')  # a kill in the middle
    assert [e["test"] for e in lines.read(path)] == ["a"]
    lines.append(path, "test", test="b")
    lines.append(path, "row", group="g")
    assert [e["test"] for e in lines.read(path, "test")] == ["a", "b"]
    assert len(lines.read(path)) == 3


def entries(session, group, *providers, seconds=(1.0, 1.0), rounds=0, device="GPU 9000"):
    machine = dict.fromkeys(merge.SAME, "x") | {"device": device, "CUDA": "13"}
    yield {"kind": "session", "id": session, "date": session, "machine": machine}
    for provider in providers:
        yield {
            "kind": "row", "session": session, "group": group, "provider": provider,
            "rounds": rounds or len(seconds), "reason": "" if seconds else "refused",
            "clock": "device", "unit": "step", "baselines": [], "columns": {},
        }  # fmt: skip
    for s in seconds:
        here = dict.fromkeys(providers, s)
        yield {"kind": "round", "session": session, "group": group, "seconds": here}


def test_lines_become_a_run_and_the_newest_rows_of_a_group_count():
    written = [
        *entries("1", "step/x", "pae keep", "official-style"),
        *entries("1", "kld/x", "pae"),
        *entries("2", "step/x", "pae keep", "compiled", seconds=(2.0, 2.0)),
        *entries("2", "mpa/x", "pae", seconds=()),
        {"kind": "step", "name": "tests-engine", "outcome": "out of time"},
        {"kind": "step", "name": "step (a)", "outcome": "passed"},
    ]
    run = Run.of(gpu.as_run(written))
    assert {name: [r.provider for r in rows] for name, rows in run.groups.items()} == {
        "kld/x": ["pae"],
        "step/x": ["pae keep", "compiled"],
        "mpa/x": ["pae"],
    }
    assert run.groups["step/x"][0].median == 2 and run.groups["mpa/x"][0].reason == "refused"
    assert run.machine["tests-engine"] == "out of time" and "step (a)" not in run.machine
    with pytest.raises(ValueError, match="device"):
        gpu.as_run([*written, *entries("3", "z", "pae", device="other")])
    with pytest.raises(ValueError, match="at least one"):
        gpu.as_run([])


def test_of_a_group_that_was_cut_short_its_rounds_count_until_it_is_whole():
    cut = [*entries("1", "step/x", "pae", "peer", seconds=(3.0, 4.0), rounds=9)]
    less = [*entries("2", "step/x", "pae", "peer", seconds=(5.0,), rounds=9)]
    begun = [*entries("2", "kld/x", "pae", seconds=(6.0,))][:-1]
    run = Run.of(gpu.as_run([*cut, *less, *begun]))
    assert [row.seconds for row in run.groups["step/x"]] == [[3.0, 4.0]] * 2
    assert [row.reason for row in run.groups["kld/x"]] == ["cut short"]
    assert run.machine["cut short"] == "step/x (2 of 9 rounds); kld/x (0 of 1 rounds)"
    whole = [*entries("3", "step/x", "pae", seconds=(7.0,))]
    run = Run.of(gpu.as_run([*cut, *whole, *less]))
    assert [row.seconds for row in run.rows] == [[7.0]] and "cut short" not in run.machine
    failed = {"kind": "failed", "session": "3", "group": "step/x"}
    run = Run.of(gpu.as_run([*cut, *whole, failed]))
    assert [row.seconds for row in run.rows] == [[3.0, 4.0]] * 2


@pytest.mark.parametrize(("end", "kept"), [(KeyboardInterrupt, [1.0, 1.0]), (ValueError, None)])
def test_a_group_that_ends_in_its_third_round(tmp_path, end, kept):
    """Killed, which nobody catches, it loses that round; where a row raised, no round counts."""
    start = lambda check: lambda shared: runner.Runnable(lambda: None, check)
    providers = [
        runner.Provider("pae", start(lambda: {"images": 2})),
        runner.Provider("peer", start(dict)),
        runner.Provider("compiled", start(dict), left_out="takes a minute"),
        runner.Provider("wrong", start(lambda: 1 / 0)),
    ]
    group = runner.Group("g", lambda: None, providers, ("peer",), rounds=9, unit="step")
    settings = runner.Settings("default", 1, None, None, torch.device("cpu"), "wall")
    written = lines.Rows(tmp_path / "day.jsonl", "now")
    written.where(dict.fromkeys(merge.SAME, "x"))
    samples = [timing.Sample(1.0, 1.0)] * 5
    with (
        mock.patch.object(timing, "measure", side_effect=[*samples, end("the third")]),
        mock.patch.object(runner, "_measured", lambda *given: {}),
        contextlib.suppress(KeyboardInterrupt),
    ):
        runner.run_group(group, {p.name for p in providers}, settings, written)
    if kept is None:
        assert not lines.rows(lines.read(written.path))
        return
    run = Run.of(gpu.as_run(lines.read(written.path)))
    assert {row.provider: (row.seconds, row.reason) for row in run.rows} == {
        "pae": (kept, ""),
        "peer": (kept, ""),
        "compiled": ((), "takes a minute"),
    }
    assert run.machine["cut short"] == "g (2 of 9 rounds)"


# ---- predictions


def test_committed_predictions_are_those_of_the_model():
    assert predictions.FILE.read_text() == predictions.text()


def test_no_prediction_is_below_its_floor_and_each_follows_its_card():
    """Twice the bandwidth and twice the products: half the floor."""
    h100 = predictions.CARDS["H100"]
    twice = replace(h100, copy_gbps=2 * h100.copy_gbps, bf16_tflops=2 * h100.bf16_tflops)
    for p in predictions.passes():
        assert p.expected_us(h100) > p.floor_us(h100) == pytest.approx(2 * p.floor_us(twice))


def test_squarings_after_the_last_one_are_counted():
    """More change nothing, one less does."""
    k = 256
    active = spectral.SQUARINGS - predictions.SETTLED[k]
    L = torch.eye(k) + 0.1 * torch.randn(1, k, k, generator=torch.Generator().manual_seed(0))

    def found(squarings):
        with mock.patch.object(spectral, "SQUARINGS", squarings):
            return torch.cat([t.flatten() for t in spectral.top_by_squaring(L)])

    assert torch.equal(found(active), found(spectral.SQUARINGS))
    assert not torch.equal(found(active - 1), found(active))


def test_every_triton_kernel_is_predicted():
    """By name: a kernel that is new must say what it will take."""
    known = [name for p in predictions.passes() for name in re.findall(r"[\w*/.]+", p.kernels)]
    sources = [*(ROOT / "pae_kernels").rglob("triton*.py")]
    named = {
        name
        for source in sources
        for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)
    }
    named |= {f"csrc/{file.name}" for file in (ROOT / "csrc").glob("*.cu")} - {"csrc/library.cu"}
    assert len(named) > 25
    assert not {n for n in named if not any(fnmatchcase(n, pattern) for pattern in known)}


def test_every_cuda_kernel_is_predicted_from_its_code():
    """But the one that probes a card, and LayerNorm's backward, which no benchmark has. How often a
    loop turns: at twice the sum a tile of a product issues its loop twice as often.
    """
    asked, of_cuda = set(), predictions.Code.of_cuda

    def keep(kernel, *given, **named):
        asked.add(kernel.split()[0])
        return of_cuda(kernel, *given, **named)

    with mock.patch.object(predictions.Code, "of_cuda", keep):
        found = {p.name: p for p in predictions.passes()}
    kernels = json.loads(predictions.CUDA.read_text())["kernels"]["sm_90"]
    assert {name.split()[0] for name in kernels} - asked == {"probe", "koopman_bwd_gauge"}
    for name, p in found.items():
        if p.kernels.startswith("csrc/"):
            assert p.grids and p.expected_us(predictions.CARDS["H100"]) > 3 * p.launches, name
    short, deep = (predictions._cuda_product("square", 64, 9, d, "false") for d in (1024, 2048))
    assert deep.turns == 2 * short.turns == 64 and short.code.loop > 512
    with pytest.raises(LookupError, match="must hold koopman_square 64 with 1 loops of 512"):
        of_cuda("koopman_square 64", 512)
    with pytest.raises(LookupError, match="tokens TwoBf16 bf16 true with 2 loops of 100"):
        of_cuda("tokens TwoBf16 bf16 true", 100, role=1)


def test_a_small_batch_waits_for_the_host():
    """Without a graph; below which batch, the documentation says too."""
    steps = {p.row: p.expected_us(predictions.CARDS["H100"]) for p in predictions.step()}
    of = lambda batch, row: steps[f"step/{shapes.BASE}/P50/bf16/B{batch}", row]
    host = predictions.Host.of("keep")
    assert of(16, "pae graphed") < of(16, "pae keep") == host.us < of(128, "pae keep")
    below = predictions.host_bound()["keep"]["H100 waits below batch"]
    assert 16 < below < 128
    page = (ROOT / "docs" / "training.md").read_text()
    assert f"an H100: {below} images" in page
    assert f"products: {predictions.host_bound()['VAPT']['H100 waits below batch']}." in page


def test_no_docstring_of_a_kernel_holds_on_one_card_alone():
    card = re.compile(r"\d (TB/s|GB/s|TFLOP/s)|\b(A|H|B)[12]00\b|\d us\b")
    for file in (ROOT / "pae_kernels").rglob("*.py"):
        if file.name != "machine_code.py":  # which says which cards an architecture is
            assert not card.search(file.read_text()), f"{file}: {card.search(file.read_text())[0]}"


def test_predicted_and_measured_stand_side_by_side():
    p = predictions.passes()[0]
    seconds = [p.expected_us(predictions.CARDS["H100"]) * 2e-6] * 3
    written = [*entries("1", p.row[0], p.row[1], seconds=seconds, device="NVIDIA H100")]
    run = Run.of(gpu.as_run(written))
    assert predictions.beside(run) == "No prediction: the run lacks a ceiling."
    run.machine.update({"copy GB/s": 3000.0, "bf16 product TFLOP/s": 798.0})
    line = next(line for line in predictions.beside(run).splitlines() if p.name in line)
    assert line.rstrip(" |").endswith("2.00x")
    _, floor, predicted, measured, _ = [cell.strip() for cell in line.strip("| ").split("|")]
    assert float(measured) == pytest.approx(2 * float(predicted), rel=0.02)
    assert float(floor) < float(predicted)


# ---- killed, and gone on with: steps of nothing

SPAN = """
import json, sys, time

begun = time.time()
time.sleep(0.4)
with open(sys.argv[1], "a") as file:
    file.write(json.dumps([sys.argv[2], begun, time.time()]) + chr(10))
"""


def test_what_is_timed_runs_alone(tmp_path):
    given = {"tests a": True, "tests b": True, "one (a)": False, "two (a)": False, "tests c": True}
    path = tmp_path / "spans"
    command = lambda name: (sys.executable, "-S", "-c", SPAN, str(path), name)
    day = gpu.Day(tmp_path / "day", 90)
    day.run([gpu.Step("a", name, 60, command(name), beside) for name, beside in given.items()])
    spans = {name: span for name, *span in map(json.loads, path.read_text().splitlines())}
    assert spans.keys() == given.keys() and not day.failed
    for name in ("one (a)", "two (a)"):
        begun, ended = spans[name]
        others = [span for other, span in spans.items() if other != name]
        assert all(end <= begun or start >= ended for start, end in others), name


TESTS = """
import os, time
import pytest

@pytest.mark.parametrize("case", ["quick", "other", "slow"])
def test_of_the_day(case):
    if case == "slow" and not os.path.exists("seen"):
        open("seen", "w").close()
        time.sleep(600)
"""
DAY = """
import sys
from pathlib import Path
from bench import gpu

python, out = sys.executable, Path(sys.argv[1])
row = f"from tests.bench import test_gpu_day as t; t.write_rows({str(out / 'day.jsonl')!r})"
sleeps = "[sys.executable, '-c', 'import time; time.sleep(77)']"
hangs = f"import subprocess, sys; subprocess.run({sleeps})"
tests = (*gpu.PYTEST, "-p", "bench.lines", "-p", "no:hypothesispytest", sys.argv[2])
gpu.ROOT, gpu.steps = out, lambda: iter([
    gpu.Step("a", "ceilings", 9, (python, "-c", "pass")),
    gpu.Step("a", "tests 1/2", 60, tests, tests=True, env=(("PAE_PART", "1/2"),)),
    gpu.Step("a", "tests 2/2", 60, tests, tests=True, env=(("PAE_PART", "2/2"),)),
    gpu.Step("a", "hangs", 2, (python, "-c", hangs)),
    gpu.Step("a", "rows (a)", 60, (python, "-c", row)),
])
gpu.stem_here = lambda have: out / "day"
sys.exit(gpu.main(["a"]))
"""


def write_rows(path: str) -> None:
    for entry in entries("1", "step/x", "pae keep"):
        lines.append(Path(path), **entry)


def test_a_day_that_is_killed_goes_on_where_it_was(tmp_path):
    """A line is lost to a kill and no more; what hangs is ended with all that it started."""
    (tmp_path / "test_day.py").write_text(TESTS)
    path = tmp_path / "day.jsonl"
    command = [sys.executable, "-c", DAY, tmp_path, tmp_path / "test_day.py"]
    env = {"PYTHONPATH": str(ROOT), "PAE_FIRST": "", "PYTEST_ADDOPTS": f"--rootdir={tmp_path}"}
    with processes.started(command, env=env) as process:
        wait_for(lambda: (tmp_path / "seen").exists(), process)
        assert [e["test"] for e in lines.read(path, "test")] == [
            "test_day.py::test_of_the_day[quick]"
        ]
        os.kill(process.pid, signal.SIGKILL)
    assert not still_running(str(tmp_path))
    with open(path, "a") as file:
        file.write('{"kind": "test", "test": "test_day.py::test_of')

    done = processes.run(command, env=env)
    assert not still_running("time.sleep(77)")
    tests = [(e["test"].partition("[")[2], e["outcome"]) for e in lines.read(path, "test")]
    assert tests == [(f"{case}]", "passed") for case in ("quick", "slow", "other")]
    steps = {e["name"]: e["outcome"] for e in lines.read(path, "step")}
    assert steps == dict.fromkeys(("ceilings", "tests 1/2", "tests 2/2", "rows (a)"), "passed") | {
        "hangs": "out of time"
    }, done.stdout
    run = Run.of(json.loads(path.with_suffix(".json").read_text()))
    assert [row.provider for row in run.rows] == ["pae keep"]
    assert run.machine["tests 2/2"] == "passed" and "No prediction" in done.stdout


def wait_for(true, process) -> None:
    end = time.monotonic() + 120
    while not true():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.1)


def still_running(word: str) -> list[str]:
    """Programs with this word in their command line, half a second after."""
    time.sleep(0.5)
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            said = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [said] if word in said and file.parent.name != str(os.getpid()) else []
    return found
