"""Several benchmark runs of one machine and commit as one JSON file.

python -m bench.merge whole.json part1.json part2.json [--gate tests=passed ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SAME = ("device", "threads", "clock", "fp32 products", "torch", "commit")


def merge(runs: list[dict], gates: dict[str, str]) -> dict:
    """The first run with the rows of all, and what became of every step (`gates`).

    Raises:
        ValueError: no run, or runs of different machines, settings or commits.
    """
    if not runs:
        raise ValueError("runs must be at least one, got none")
    whole = {**runs[0], "benchmarks": [], "left_out": {"groups": {}, "providers": []}}
    summary = dict(runs[0]["machine_info"]["summary"])
    for run in runs:
        other = run["machine_info"]["summary"]
        for name in SAME:
            of_this, of_other = (s.get(name, "unknown") for s in (summary, other))
            if of_this != of_other:
                raise ValueError(f"runs differ in {name}: {of_this} and {of_other}")
        summary = other | summary  # ceilings that only a later run needed
        whole["benchmarks"] += run["benchmarks"]
        whole["left_out"]["groups"] |= run["left_out"]["groups"]
        whole["left_out"]["providers"] += run["left_out"]["providers"]
    measured = {bench["group"] for bench in whole["benchmarks"]}
    left_out = whole["left_out"]["groups"].items()
    whole["left_out"]["groups"] = {g: reason for g, reason in left_out if g not in measured}
    whole["machine_info"] = runs[0]["machine_info"] | {"summary": summary | gates}
    return whole


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
