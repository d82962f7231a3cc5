"""The tests that need a GPU, on a CPU that stands for one: none fails by its own fault then."""

import re
import sys

import pytest

from bench import gpu
from tests import stand_in
from tests.kernels.executions import EXECUTIONS
from tests.kernels.spectrum import test_op as spectrum
from tests.pae import test_gpu as engine
from tests.processes import run

# what needs a second GPU, or a compiler's code
NOT_HERE = "not another_gpu and not compiles_without"
# in few processes, since each has all to import
KERNELS = gpu.suites()[0]
BESIDE = ("koopman", "spectrum")
PARTS = {
    "models": (gpu.CAPTURED, "tests/pae/test_gpu.py", *gpu.GRAPHS),
    "kernels of a block": ("gpu", *(p for name, p in KERNELS.items() if name not in BESIDE)),
    "kernels beside it": ("gpu", *(KERNELS[name] for name in BESIDE)),
}


@pytest.mark.parametrize("part", PARTS)
def test_bodies_run(part):
    chosen, *rest = PARTS[part]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    command += ["-p", "tests.cpu_as_gpu", "-k", f"({chosen}) and {NOT_HERE}", *rest]
    done = run(command, env={"OMP_NUM_THREADS": "1", "PAE_THIN": "1"}, check=False)
    summary = done.stdout.splitlines()[-1]
    assert done.returncode == 0 and re.search(r"[1-9]\d* passed", summary), done.stdout[-6000:]
    assert "skipped" not in summary, done.stdout[-6000:]


def test_memory_by_what_the_launchers_allocate():
    """A CPU's versions have memory of their own, so that what the bodies above say of it says
    little. The GPU's are asked here, on tensors of shapes alone and as large as there.
    """
    pytest.importorskip("triton")
    there = next(e for e in EXECUTIONS if e.name == "gpu-triton")
    with stand_in.gpu(90):
        engine.test_engine_needs_less_memory_than_the_reference((engine.small_vit(), None))
        spectrum.test_memory_is_that_of_the_result_and_of_strips(there)
