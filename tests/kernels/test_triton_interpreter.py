"""Every Triton kernel in Triton's interpreter, without a GPU: the execution `interpreter` of each
suite.
"""

import re
import sys
from pathlib import Path

import pytest

from tests.processes import run

pytest.importorskip("triton")
HERE = Path(__file__).parent
SUITES = {  # a file, or a folder of them
    place.stem.removeprefix("test_"): place
    for file in sorted(HERE.rglob("test_*.py"))
    if "\n@each(" in file.read_text()
    for place in [file if file.parent == HERE else file.parent]
}


def test_every_op_takes_part():
    assert {"adaptive", "attention", "koopman", "pointwise", "spectrum", "steps"} <= SUITES.keys()


LONG = ("attention", "koopman", "spectrum")
RUNS = {name: [name] for name in LONG} | {"others": [name for name in SUITES if name not in LONG]}


@pytest.mark.parametrize("run_", RUNS)
def test_in_the_interpreter(run_):
    """In processes of their own, since kernels are interpreted or compiled as they were imported;
    in few, since each has all to import.
    """
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = run(
        [*pytest_command, "-k", "interpreter", *(SUITES[name] for name in RUNS[run_])],
        env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        timeout=1800,
    )
    summary = done.stdout.splitlines()[-1]
    few = r"\d+ passed(, \d+ deselected)?(, \d+ warnings?)? in .*"  # nothing skipped
    assert re.fullmatch(few, summary), summary
