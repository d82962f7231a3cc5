"""The whole commands: `pytest bench/`, and the GPU gate `bench/gpu.sh`."""

from __future__ import annotations

import getpass
import json
import platform
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

from bench import results, table  # noqa: E402
from pae_kernels import cpu  # noqa: E402
from tests import processes  # noqa: E402

GPU_SCRIPT = ROOT / "bench" / "gpu.sh"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_gpu_gate_is_clean_shell():
    processes.run(["shellcheck", GPU_SCRIPT])


def run_benchmarks(*arguments: str) -> str:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", *processes.WITHOUT_PLUGINS, *arguments]
    return processes.run(command, env={"OMP_NUM_THREADS": "1"}).stdout


def test_every_provider_runs_without_timing():
    """All but the compiler: it needs a C++ toolchain and a minute."""
    out = run_benchmarks("bench", "--benchmark-disable", "-k", "not compiled")
    skips = [line for line in out.splitlines() if line.startswith("SKIPPED")]
    # a GPU's kernels may refuse tiny fp32 inputs; on a CPU every row that can run must
    assert " passed" in out
    reasons = ("needs a GPU", cpu.unavailable() or "needs a GPU")
    assert torch.cuda.is_available() or all(line.endswith(reasons) for line in skips)


def test_a_group_reaches_table_and_json_without_naming_the_machine(tmp_path):
    path = tmp_path / "run.json"
    out = run_benchmarks(
        "bench/bench_kld.py",
        "--benchmark-only",
        "--quick",
        "--rounds=2",
        f"--benchmark-json={path}",
    )
    text = path.read_text()
    run = json.loads(text)
    rows = {bench["extra_info"]["provider"]: bench for bench in run["benchmarks"]}
    assert {"official-style", "batched, eigh", "pae"} <= set(rows)
    for row in rows.values():
        seconds = row["extra_info"]["process_seconds"]
        assert len(seconds) == 2 and row["stats"]["data"] == pytest.approx(seconds)
    for private in (platform.node(), str(ROOT), str(Path.home()), f'"{getpass.getuser()}"'):
        assert len(private) < 3 or private not in text

    machine = run["machine_info"]
    assert machine["clock_test"]["work_x2"] == pytest.approx(2, rel=0.1)
    assert machine["summary"]["clock test"].startswith("passed")
    assert {"fp32 product TFLOP/s", "copy GB/s"} <= set(machine["summary"])
    assert {"saved_mb", "peak_mb", "peak_tflops"} <= set(rows["pae"]["extra_info"]["columns"])

    printed = table.render(results.Run.of(run))
    assert "global, k = 256" in printed
    for line in printed.splitlines():
        assert line in out
