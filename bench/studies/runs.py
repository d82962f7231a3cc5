"""What the studies share: command lines, means and intervals over seeds, and how they are shown."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pae.files import write_atomically

RESULTS = Path("bench/results/science")


def main(
    study: str,
    commands: Mapping[str, Callable[[argparse.Namespace], None]],
    options: Callable[[str, argparse.ArgumentParser], None],
    seeds: int = 3,
) -> None:
    """`python -m bench.studies.STUDY COMMAND --output FOLDER ...`; `options` adds the study's own
    to each command, by name.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.studies.{study}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, work in commands.items():
        command = subparsers.add_parser(name)
        command.set_defaults(work=work)
        add = command.add_argument
        add("--output", required=True, type=Path, help="folder of the runs")
        add("--seeds", nargs="+", type=int, default=list(range(seeds)))
        if name == "report":
            add("--to", type=Path, default=RESULTS, help="folder of the numbers")
        options(name, command)
    arguments = parser.parse_args()
    arguments.work(arguments)


# ---- from runs to numbers


def bootstrap(values: list[float], draws: int = 10000) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling seeds.

    With n seeds it is the spread of n numbers: honest about them, not about the seeds not run.
    """
    drawn = torch.tensor(values, dtype=torch.float64)
    return ends(drawn[resampled(len(drawn), draws)].mean(dim=1))


def resampled(seeds: int, draws: int = 10000) -> Tensor:
    """(draws, seeds) indices, with replacement, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(seeds, (draws, seeds), generator=generator)


def ends(drawn: Tensor) -> tuple[float, float]:
    """The 95 % percentile interval of what was drawn."""
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return low, high


def interval(values: list[float]) -> dict[str, float] | None:
    """Mean and bootstrap interval to four digits, and of how many; None of none."""
    if not values:
        return None
    found = {"mean": statistics.mean(values), **dict(zip(("low", "high"), bootstrap(values)))}
    return {**{name: short(value) for name, value in found.items()}, "seeds": len(values)}


def short(value: float) -> float:
    return float(f"{value:.4g}")


def paired(records: list[dict], baseline: list[dict], key: str = "test") -> dict | None:
    """The `interval` of the differences over the seeds that both have."""
    before = {r["seed"]: r[key] for r in baseline}
    return interval([r[key] - before[r["seed"]] for r in records if r["seed"] in before])


# ---- from numbers to files and text


def write_json(path: Path, value: object) -> None:
    """The folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1)
    write_atomically(path, lambda p: p.write_text(text + "\n"))


def shown(value: Mapping[str, float] | None, form: str) -> str:
    """A mean and its interval in the format `form`; nothing for None."""
    if value is None:
        return ""
    return f"{value['mean']:{form}} ({value['low']:{form}} to {value['high']:{form}})"
