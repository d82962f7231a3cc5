"""The check of the clock passes on a good clock and names what is wrong with a bad one."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

from bench import clock, timing  # noqa: E402
from bench.timing import Sample  # noqa: E402
from tests import processes  # noqa: E402

CPU = torch.device("cpu")


def distorted(change):
    """`timing.measure`, whose samples went through `change`."""
    return lambda work: change(timing.measure(work, CPU))


def test_the_clock_that_is_used_passes():
    found = clock.check(CPU, "process")
    assert found["work_x2"] == pytest.approx(2, rel=0.1)
    assert found["agreement"] == pytest.approx(1, rel=0.25)
    assert found["nap_process_share"] < 0.25
    assert found["finest_us"] < 100
    assert clock.summary(found).startswith("passed (twice the work takes ")


BAD = {
    "counts naps": (lambda s: Sample(s.wall, s.wall), "a nap of 20 ms took .* of CPU time"),
    "skips naps": (lambda s: Sample(s.process, s.process), "a nap of 20 ms took .* of wall time"),
    "stands still": (lambda s: Sample(s.wall, 0.0), "took 0.0 s"),
    "does not wait": (lambda s: Sample(s.wall, min(s.process, 2e-5)), "twice the work took 1.00"),
    "adds half a millisecond": (lambda s: Sample(s.wall, s.process + 5e-4), "twice the work|short"),
    "ticks in 10 ms": (lambda s: Sample(s.wall, s.process // 0.01 * 0.01), "took 0.0 s|twice"),
    "reads double": (lambda s: Sample(s.wall, 2 * s.process), "by another clock took"),
    "is squared": (lambda s: Sample(s.wall, s.process**2), "twice the work took"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_clock_is_named(name):
    change, reason = BAD[name]
    with pytest.raises(clock.BadClock, match=f"^process clock: .*({reason})") as raised:
        clock.check(CPU, "process", distorted(change))
    assert "\n" not in str(raised.value)


def naps(count: int):
    return lambda: time.sleep(0.005 * count)


def test_a_clock_of_a_device_is_compared_with_the_host():
    """A device that naps: its time is wall time, unless nobody waits for it."""
    good = distorted(lambda s: Sample(s.wall, s.process, s.wall))
    assert clock.check(CPU, "device", good, naps)["agreement"] == pytest.approx(1, rel=0.25)
    launches = distorted(lambda s: Sample(s.wall, s.process, s.process))
    with pytest.raises(clock.BadClock, match=r"^device clock: "):
        clock.check(CPU, "device", launches, naps)
    wrong_unit = distorted(lambda s: Sample(s.wall, s.process, 1e3 * s.wall))
    with pytest.raises(clock.BadClock, match="times as long"):
        clock.check(CPU, "device", wrong_unit, naps)


def test_one_disturbed_attempt_is_tried_again():
    calls = []

    def disturbed_once(sample):
        calls.append(sample)
        return Sample(sample.wall, sample.wall) if len(calls) == 1 else sample

    assert clock.check(CPU, "process", distorted(disturbed_once))["work_x2"] > 1.8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_clock_proves_itself():
    found = clock.check(torch.device("cuda"), "device")
    assert found["work_x2"] == pytest.approx(2, rel=0.1)


BREAK_THE_CLOCK = """
import sys, pytest
from bench import timing
good = timing.measure
def measure(work, device):
    sample = good(work, device)
    return timing.Sample(sample.wall, sample.wall)
timing.measure = measure
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_a_session_with_a_bad_clock_fails_before_any_benchmark():
    pytest.importorskip("pytest_benchmark")
    run = processes.run(
        [sys.executable, "-c", BREAK_THE_CLOCK, "-q", "-p", "no:cacheprovider"]
        + ["bench/bench_kld.py", "--benchmark-only", "--quick", "--device=cpu"],
        env={"OMP_NUM_THREADS": "1"},
        check=False,
    )
    said = run.stdout + run.stderr
    assert run.returncode == 6, said
    assert "no time can be trusted here: process clock: a nap of 20 ms took" in said
    assert "provider" not in said and "passed" not in said
