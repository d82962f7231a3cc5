"""Several benchmark runs of one machine and commit as one JSON file.

python -m bench.merge whole.json part1.json part2.json [--gate tests=passed ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .compare import differences

SAME = ("device", "threads", "clock", "fp32 products", "torch", "commit")


def merge(runs: list[dict], gates: dict[str, str]) -> dict:
    """The first run with the rows of all, and what became of every step (`gates`).

    Raises:
        ValueError: no run, or runs of different machines, settings or commits.
    """
    if not runs:
        raise ValueError("runs must be at least one, got none")
    machines = [run["machine_info"]["summary"] for run in runs]
    summary: dict[str, object] = {}
    for other in machines:
        if differ := differences(machines[0], other, SAME):
            raise ValueError(f"runs differ in {'; '.join(differ)}")
        summary = other | summary  # ceilings that only a later run needed
    rows = [row for run in runs for row in run["benchmarks"]]
    measured = {row["group"] for row in rows}
    reasons = {group: why for run in runs for group, why in run["left_out"]["groups"].items()}
    left_out = {
        "groups": {group: why for group, why in reasons.items() if group not in measured},
        "providers": [row for run in runs for row in run["left_out"]["providers"]],
    }
    machine = runs[0]["machine_info"] | {"summary": summary | gates}
    return runs[0] | {"machine_info": machine, "benchmarks": rows, "left_out": left_out}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("whole", type=Path)
    parser.add_argument("parts", type=Path, nargs="*")
    parser.add_argument("--gate", action="append", default=[], metavar="STEP=OUTCOME")
    options = parser.parse_args(arguments)
    runs = [json.loads(part.read_text()) for part in options.parts]
    gates = dict(gate.split("=", 1) for gate in options.gate)
    options.whole.write_text(json.dumps(merge(runs, gates)) + "\n")


if __name__ == "__main__":
    main()
