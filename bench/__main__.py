"""One command from a fresh machine to the report: measure, then write tables and figures.

    python -m bench [--quick | --full | other options of pytest bench/]

On a CPU: the suite into bench/results/cpu.json, then `python -m bench.report`. On a GPU the same
through bench/gpu.sh, which tests and compiles first.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from . import report, results

ROOT = Path(__file__).parents[1]


def command(options: list[str], on_gpu: bool) -> list[str]:
    """What is run to measure. Raises SystemExit for options that bench/gpu.sh does not take."""
    if not on_gpu:
        target = ROOT / report.RESULTS / results.CANONICAL
        pytest = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only"]
        return [*pytest, f"--benchmark-json={target}", *options]
    modes = {"--quick": ["a"], "--full": ["--seconds", "10800"]}
    if unknown := [option for option in options if option not in modes]:
        raise SystemExit(
            f"{unknown[0]}: on a GPU expected --quick, --full or nothing; "
            "pytest bench/ --benchmark-only takes the rest"
        )
    return [
        "bash",
        str(ROOT / "bench" / "gpu.sh"),
        *(word for option in options for word in modes[option]),
    ]


def main() -> int:
    options = sys.argv[1:]
    if {"-h", "--help"} & {*options}:
        print(__doc__.strip())
        return 0
    done = subprocess.run(command(options, torch.cuda.is_available()), cwd=ROOT)
    if done.returncode:
        return done.returncode  # no report of a run in which a row failed
    return report.main([])


if __name__ == "__main__":
    sys.exit(main())
