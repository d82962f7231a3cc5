"""What the studies share: command lines, arms in turns, means and intervals over seeds, and how
they are shown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.timing import CLOCKS, interleave
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


def steps_command(
    study: str, groups: Mapping[str, Iterable[str]], own: Mapping[str, dict[str, Any]]
) -> argparse.Namespace:
    """`python -m bench.studies.STUDY [GROUP ...] [--arms ARM ...]` of a study that times arms of
    groups in turns; `own`: its further options.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.studies.{study}")
    add = parser.add_argument
    add("groups", nargs="*", metavar="GROUP", help=", ".join(groups))
    add("--arms", nargs="+", help="of these groups; the base always runs")
    add("--clock", default="process", choices=CLOCKS)
    add("--to", type=Path, default=RESULTS, help="folder of the numbers")
    add("--table", action="store_true", help="print what was measured, and measure nothing")
    for name, how in own.items():
        add(name, **how)
    arguments = parser.parse_args()
    unknown = {*arguments.groups} - {*groups}
    unknown |= {*(arguments.arms or ())} - {name for arms in groups.values() for name in arms}
    if unknown:
        parser.error(f"no such group or arm: {', '.join(sorted(unknown))}")
    return arguments


def in_turns(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: str,
    device: torch.device,
    seconds: float = math.inf,
    least: int = 1,
) -> dict[str, list[float]]:
    """By arm its seconds, round by round; none begins behind `seconds` but the `least` rounds."""
    ends, done = time.monotonic() + seconds, itertools.count(1)
    late = lambda _: next(done) >= least and time.monotonic() > ends
    found = interleave(works, rounds, device, late)
    return {name: [sample.seconds(clock) for sample in samples] for name, samples in found.items()}


def quotients(mine: Iterable[float], base: Iterable[float]) -> list[float]:
    """Round by round, to four digits."""
    return [short(a / b) for a, b in zip(mine, base)]


def spread(ratios: Sequence[float]) -> dict[str, str]:
    """Cells of a table: the median over rounds, and from where to where they go."""
    middle, (low, high) = statistics.median(ratios), (min(ratios), max(ratios))
    return {"ratio": f"{middle:.2f}x", "rounds": f"{low:.2f} to {high:.2f}"}


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


def read_json(path: Path) -> dict[str, Any]:
    """What an earlier call has written; {} of nothing."""
    return json.loads(path.read_text()) if path.is_file() else {}


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
