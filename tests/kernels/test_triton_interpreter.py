"""Every Triton kernel in Triton's interpreter, without a GPU: the suites in `interpreted/`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SUITES = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize(
    "suite", ["adaptive", "attention", "pointwise", "engine", "koopman", "spectrum"]
)
def test_in_the_interpreter(suite):
    """In a process of its own, since kernels are interpreted or compiled as they were imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", SUITES / f"{suite}.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-2_000:]
    summary = run.stdout.splitlines()[-1]
    assert re.fullmatch(r"\d+ passed(, \d+ warnings?)? in .*", summary), summary  # nothing skipped
