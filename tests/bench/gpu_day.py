"""Stages of `bench/gpu.sh` from end to end, each killed, on a CPU that stands for a GPU.

    pytest -n0 tests/bench/gpu_day.py     # a quarter of an hour; a part of PAE_LONG=1 tests/more.sh

Few tests in each step: the ordinary run has the bodies of all that need a GPU (`test_dry_run.py`),
and a day whose steps are of nothing (`test_gpu_day.py`). Every benchmark runs each of its groups,
on small inputs. What nvcc makes is left out, and torch.compile leaves functions as they are.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections import Counter

import pytest

from bench import gpu, lines
from bench.results import Run
from tests import processes
from tests.processes import ROOT

SCRIPT = ROOT / "bench" / "gpu.sh"
SITE = """
import sys
if "csrc/native_build.py" in sys.orig_argv:  # nvcc's part
    import os

    os._exit(0)
if sys.orig_argv[1] == "-m" and sys.orig_argv[2].startswith("bench."):
    import tests.cpu_as_gpu
    tests.cpu_as_gpu.small_benchmarks()
"""
SANITIZER = """#!/bin/sh
while [ "$1" != "{python}" ]; do shift; done
exec "$@"
"""


def stage(letter):
    return ["bash", SCRIPT, letter, "--seconds", "1500", "--slow", "9"]


@pytest.fixture
def day(tmp_path):
    """Environment of a day: tools of its own in front, files in a folder of its own."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sitecustomize.py").write_text(SITE)
    for name, text in (
        ("python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n'),
        ("compute-sanitizer", SANITIZER.format(python=sys.executable)),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "out").mkdir()
    return {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tools),
        "PYTEST_PLUGINS": "tests.cpu_as_gpu",
        "PAE_THIN": "1",
        "PAE_FEW": "5",
        "PAE_COMMIT": "abc",
        "OUT": str(tmp_path / "out"),
        "OMP_NUM_THREADS": "1",
        "PYTEST_CURRENT_TEST": None,
    }


def killed(command, day, path, kind, count):
    """The day, as soon as there are so many lines of a kind."""
    with processes.started(command, env=day) as process:
        end = time.monotonic() + 900
        while len(lines.read(path, kind)) < count and time.monotonic() < end:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    before = lines.read(path)
    time.sleep(1)
    assert lines.read(path) == before, "a program outlives the day"


def gone_on(letter, day, path):
    """The rest of a stage: its steps, of which none failed, and its run."""
    done = processes.run(stage(letter), env=day, timeout=1600)
    steps = {e["name"]: e["outcome"] for e in lines.read(path, "step")}
    assert steps.keys() == {s.name for s in gpu.steps() if s.stage == letter} | {gpu.LIBRARY}
    assert set(steps.values()) == {"passed"}, done.stdout
    tests = Counter(e["test"] for e in lines.read(path, "test") if e["outcome"] == "passed")
    assert set(tests.values()) <= {1}, "a test that had passed ran again"
    run = Run.of(json.loads(path.with_suffix(".json").read_text()))
    assert "cut short" not in run.machine and not any(row.failed for row in run.rows)
    assert "Predicted and measured" in path.with_suffix(".md").read_text()
    assert not [*path.parent.glob(".*")] and len([*path.parent.iterdir()]) <= 8
    return run, len(tests)


def kinds(run):
    """First words of the groups that have times."""
    return {row.group.split("/")[0] for row in run.rows if row.seconds}


def timed(run):
    """Rows that have times."""
    return {row.provider for row in run.rows if row.seconds}


def test_the_first_stage(day, tmp_path):
    """Killed once in its tests, once in its timings."""
    path = tmp_path / "out" / "stand-in-gpu-abc.jsonl"
    killed(stage("a"), day, path, "test", 3)
    with open(path, "a") as file:
        file.write('{"kind": "row", "gro')
    killed(stage("a"), day, path, "round", 1)
    cut = gpu.as_run(lines.read(path))  # with a torn line in the middle
    assert cut["benchmarks"]

    run, tests = gone_on("a", day, path)
    assert tests == 3 * 5
    assert len(lines.read(path, "ceilings")) == 1
    assert kinds(run) == {"attention", "step"}
    assert {"pae keep", "pae graphed", "official-style", "timm + SDPA"} <= timed(run)
    assert "===== ceilings: passed" in path.with_suffix(".log").read_text()


def test_the_second_stage(day, tmp_path):
    """Killed in its tests. All steps are called; all groups that a default run has are timed."""
    path = tmp_path / "out" / "stand-in-gpu-abc.jsonl"
    killed(stage("b"), day, path, "test", 3)
    run, tests = gone_on("b", day, path)
    # tests of kernels and of models; clocks, of which there are two
    assert tests >= 30
    assert kinds(run) == {
        *("step", "attention", "norm", "gelu", "coded gelu", "product", "kld"),
        *("mpa", "mpa_ranking"),
    }
    said = path.with_suffix(".log").read_text().split("\n===== ")
    for tool in ("memcheck", "racecheck", "initcheck"):
        (last,) = [text for text in said if text.startswith(f"sanitizer-{tool}: passed")][-1:]
        assert re.search(r"\b[1-9]\d* passed", last), last


def test_the_third_stage(day, tmp_path):
    """Killed in its timings: peers that are compiled, the search for tiles, all that is scaled."""
    path = tmp_path / "out" / "stand-in-gpu-abc.jsonl"
    killed(stage("c"), day, path, "round", 3)
    run, _ = gone_on("c", day, path)
    assert {"scaling", "filter", "tokens", "pooling"} <= kinds(run)
    assert {"timm + SDPA, compiled", "pae keep", "pae"} <= timed(run)
    log = path.with_suffix(".log").read_text()
    assert len(re.findall(r"^(?:FORWARD|WHOLE|SPLIT): .*; \d+ tiles, ", log, re.M)) >= 6
