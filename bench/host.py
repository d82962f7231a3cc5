"""What the host needs for a step on a GPU: what it does, as `tests/costs.json` counts, times what
each takes. It is the same for every batch, and a step without a graph lasts at least as long.

A launch of ours until the driver has it, and any other call with the Python around it, are what
`python -m tests.host` measures without a GPU, on one core of a server; the driver's part of a
launch is a guess. What PyTorch launches is within its calls.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

COSTS = Path(__file__).parents[1] / "tests" / "costs.json"  # written by tests/guard.py
LAUNCH_US, DRIVER_US, CALL_US = 8.9, 2.5, 11.4
COUNTED, DEPTH = 3, 12  # blocks of the steps in `COSTS`, and of ViT-B


@dataclass(frozen=True)
class Host:
    """What the host does in one step: launches of our kernels, other calls of PyTorch."""

    launches: int
    calls: int

    @classmethod
    def of(cls, step: str) -> Host:
        """A step of ViT-B, by its name there."""
        launches = calls = 0
        for name, count in json.loads(COSTS.read_text())["counts"].items():
            if name.startswith(f"host/{step}/"):
                times = DEPTH - COUNTED if name.endswith(" in a block") else 1
                if "/launches of " in name:
                    launches += times * count
                else:
                    calls += times * count
        return cls(launches, calls)

    @property
    def us(self) -> float:
        """Microseconds."""
        return self.launches * (LAUNCH_US + DRIVER_US) + self.calls * CALL_US


def steps() -> list[str]:
    """Names of all that are counted."""
    names = json.loads(COSTS.read_text())["counts"]
    return list(dict.fromkeys(name.split("/")[1] for name in names if name.startswith("host/")))
