"""The check of the clock passes on a good clock and names what is wrong with a bad one."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import clock
from bench.timing import Sample
from tests import processes

CPU = torch.device("cpu")


class Machine:
    """A machine whose time passes by what runs on it alone: the same findings on every run.

    Its `measure` reads its clocks as `timing.measure` does those of the real one, and sends every
    sample through `change`.
    """

    def __init__(self, monkeypatch, change=lambda sample: sample, neighbours=lambda: 1.0):
        self.wall = self.process = 0.0
        self.change, self.samples = change, 0
        self.neighbours = neighbours  # how many times as long they make a millisecond of work
        self.naps = False  # whether work is a device's, which takes the host no CPU time
        module = SimpleNamespace(
            sleep=self.sleep, perf_counter=lambda: self.wall, process_time=lambda: self.process
        )
        monkeypatch.setattr(clock, "time", module)
        monkeypatch.setattr(clock.timing, "measure", self.measure)
        monkeypatch.setattr(clock, "products", lambda device: self.repeat)

    def sleep(self, seconds):
        self.wall += seconds

    def work(self, seconds):
        self.wall += seconds
        self.process += 0.0 if self.naps else seconds

    def repeat(self, n):
        return lambda: [self.work(self.neighbours() * 1e-3) for _ in range(n)]

    def measure(self, work, device):
        wall, process = self.wall, self.process
        work()
        self.work(1e-6)  # its own time
        self.samples += 1
        return self.change(Sample(self.wall - wall, self.process - process))

    def check(self, name="process"):
        return clock.check(CPU, name)


def test_a_good_clock_passes(monkeypatch):
    found = Machine(monkeypatch).check()
    assert found["work_x2"] == pytest.approx(2, rel=0.01)
    assert found["agreement"] == pytest.approx(1, rel=0.01)
    assert clock.summary(found) == "passed (twice the work takes 2.00x, finest reading 1.0 us)"


def test_the_clock_that_is_used_passes():
    """On this machine, whatever else runs on it."""
    assert clock.RATIO[0] <= clock.check(CPU, "process")["work_x2"] <= clock.RATIO[1]


BAD = {
    "counts naps": (lambda s: Sample(s.wall, s.wall), "a nap of 20 ms took .* of CPU time"),
    "skips naps": (lambda s: Sample(s.process, s.process), "a nap of 20 ms took .* of wall time"),
    "stands still": (lambda s: Sample(s.wall, 0.0), "took 0.0 s"),
    "does not wait": (lambda s: Sample(s.wall, min(s.process, 2e-5)), "twice the work took 1.00"),
    "adds a tenth of a millisecond": (lambda s: Sample(s.wall, s.process + 1.1e-4), "shortest"),
    "adds half a millisecond": (lambda s: Sample(s.wall, s.process + 5e-4), "twice the work took"),
    "ticks in 10 ms": (lambda s: Sample(s.wall, s.process // 0.01 * 0.01), "took 0.0 s"),
    "reads double": (lambda s: Sample(s.wall, 2 * s.process), "by another clock took"),
    "is squared": (lambda s: Sample(s.wall, s.process**2), "twice the work took"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_clock_is_named(name, monkeypatch):
    change, reason = BAD[name]
    with pytest.raises(clock.BadClock, match=f"^process clock: .*({reason})") as raised:
        Machine(monkeypatch, change).check()
    assert "\n" not in str(raised.value)


def test_a_clock_of_a_device_is_compared_with_the_host(monkeypatch):
    """A device's time is wall time, unless nobody waits for it."""
    machine = Machine(monkeypatch, lambda s: Sample(s.wall, s.process, s.wall))
    machine.naps = True
    assert machine.check("device")["agreement"] == pytest.approx(1, rel=0.01)
    machine.change = lambda s: Sample(s.wall, s.process, 1e-6)
    with pytest.raises(clock.BadClock, match=r"^device clock: twice the work took 1.00"):
        machine.check("device")
    machine.change = lambda s: Sample(s.wall, s.process, 1e3 * s.wall)
    with pytest.raises(clock.BadClock, match=r"1e\+03 times as long"):
        machine.check("device")


def test_one_disturbed_attempt_is_tried_again(monkeypatch):
    machine = Machine(monkeypatch)
    machine.change = lambda s: Sample(s.wall, s.wall) if machine.samples == 1 else s
    assert machine.check()["work_x2"] > 1.8
    machine.change = lambda s: Sample(s.wall, s.wall)
    with pytest.raises(clock.BadClock):
        machine.check()


NEIGHBOURS = {  # of a random number
    "rarely still": lambda r: 1.0 if r < 0.05 else 1.2 + r / 2,
    "anything up to twice as slow": lambda r: 1 + r,
    "interruptions": lambda r: 1.0 if r < 0.95 else 5.0,
}


@pytest.mark.parametrize("name", NEIGHBOURS)
@pytest.mark.parametrize("seed", range(10))
def test_neighbours_hide_no_fault_and_are_none(name, seed, monkeypatch):
    """At the first attempt: how often is measured follows from how steady it is."""
    draw = random.Random(seed).random
    machine = Machine(monkeypatch, neighbours=lambda: NEIGHBOURS[name](draw()))
    monkeypatch.setattr(clock, "ATTEMPTS", 1)
    assert machine.check()["work_x2"] == pytest.approx(2, rel=0.1)
    for change in ("adds half a millisecond", "does not wait", "reads double", "is squared"):
        machine.change = BAD[change][0]
        with pytest.raises(clock.BadClock):
            machine.check()


def test_a_machine_too_unsteady_to_judge_by_is_refused(monkeypatch):
    draw = random.Random(0).random
    machine = Machine(monkeypatch, neighbours=lambda: 100 ** draw())
    with pytest.raises(clock.BadClock, match=r"the same two works took .* times as long"):
        machine.check()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_clock_passes_its_check():
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
    command = [sys.executable, "-c", BREAK_THE_CLOCK, "-q", *processes.WITHOUT_PLUGINS]
    command += ["bench/bench_kld.py", "--benchmark-only", "--quick", "--device=cpu"]
    run = processes.run(command, env={"OMP_NUM_THREADS": "1"}, check=False)
    said = run.stdout + run.stderr
    assert run.returncode == 6, said
    assert "no time can be trusted here: process clock: a nap of 20 ms took" in said
    assert "provider" not in said and "passed" not in said
