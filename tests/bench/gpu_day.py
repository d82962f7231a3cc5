"""Stage a of `bench/gpu.sh` from end to end, killed twice, on a CPU that stands for a GPU.

    pytest -n0 tests/bench/gpu_day.py     # three minutes; a part of PAE_LONG=1 tests/more.sh

Few tests in each step: the ordinary run has the bodies of all that need a GPU (`test_dry_run.py`),
and a day whose steps are of nothing (`test_gpu_day.py`).
"""

from __future__ import annotations

import json
import os
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
if any(word.startswith("bench.") for word in sys.orig_argv):
    import tests.cpu_as_gpu
    tests.cpu_as_gpu.small_ceilings()
"""
SANITIZER = """#!/bin/sh
while [ "$1" != "{python}" ]; do shift; done
exec "$@"
"""


COMMAND = ["bash", SCRIPT, "a", "--seconds", "550", "--slow", "9"]


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


def killed(day, path, kind, count):
    """The day, as soon as there are so many lines of a kind."""
    with processes.started(COMMAND, env=day) as process:
        end = time.monotonic() + 300
        while len(lines.read(path, kind)) < count and time.monotonic() < end:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    before = lines.read(path)
    time.sleep(1)
    assert lines.read(path) == before, "a program outlives the day"


def test_a_day_that_is_killed_goes_on_where_it_was(day, tmp_path):
    """Once in its tests, once in its timings."""
    path = tmp_path / "out" / "stand-in-gpu-abc.jsonl"
    killed(day, path, "test", 3)
    with open(path, "a") as file:
        file.write('{"kind": "row", "gro')
    killed(day, path, "round", 1)
    cut = gpu.as_run(lines.read(path))  # with a torn line in the middle
    assert cut["benchmarks"]

    done = processes.run(COMMAND, env=day)
    tests = Counter(e["test"] for e in lines.read(path, "test") if e["outcome"] == "passed")
    assert len(tests) == 3 * 5 and set(tests.values()) == {1}
    assert len(lines.read(path, "ceilings")) == 1
    steps = {e["name"]: e["outcome"] for e in lines.read(path, "step")}
    assert set(steps.values()) == {"passed"}, done.stdout
    run = Run.of(json.loads(path.with_suffix(".json").read_text()))
    assert "cut short" not in run.machine
    measured = {row.group.split("/")[0] for row in run.rows if row.seconds}
    assert measured == {"attention", "step"} and not any(row.failed for row in run.rows)
    assert {"pae keep", "pae graphed", "official-style", "timm + SDPA"} <= {
        row.provider for row in run.rows if row.seconds
    }
    page = path.with_suffix(".md").read_text()
    assert (
        "Predicted and measured" in page
        and "===== ceilings: passed" in path.with_suffix(".log").read_text()
    )
    assert not [*path.parent.glob(".*")] and len([*path.parent.iterdir()]) <= 8
