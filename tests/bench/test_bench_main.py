"""`python -m bench` measures with the suite, and writes a report of what passed alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench import __main__ as bench_main


def test_on_a_cpu():
    command = bench_main.command(["--quick", "-k", "kld"], on_gpu=False)
    assert command[1:5] == ["-m", "pytest", "bench/", "--benchmark-only"]
    assert command[-3:] == ["--quick", "-k", "kld"]
    (target,) = (part for part in command if part.startswith("--benchmark-json="))
    assert target.endswith("bench/results/cpu.json")


def test_on_a_gpu():
    assert bench_main.command(["--full"], on_gpu=True)[1:] == [
        str(bench_main.ROOT / "bench" / "gpu.sh"),
        "full",
    ]
    with pytest.raises(SystemExit, match="--rounds"):
        bench_main.command(["--rounds"], on_gpu=True)


@pytest.mark.parametrize("code", [0, 1])
def test_report_of_what_passed_alone(monkeypatch, code):
    called = []
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, code))
    monkeypatch.setattr(bench_main.report, "main", lambda arguments: called.append(1) or 0)
    assert bench_main.main() == code
    assert len(called) == (code == 0)
