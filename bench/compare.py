"""Did it get faster? Two files of --benchmark-json, row by row.

python -m bench.compare A.json B.json [--threshold 0.05] [--force-ratios]

B / A below 1 is faster. A row is judged by its ratio to a baseline of its group, round by round
inside each run, where both runs have one: a machine that was slower on that day slowed both. Only
the baselines themselves, and rows without one, are judged by their times; those of baselines tell
of the machine and are no regression. Intervals are bootstraps over rounds, 95 %.

Exit code 0: no regression. 1: a row is slower by more than the threshold and its interval is above
1, or gives wrong values. 2: not comparable, or nothing in common.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .results import Row, Run
from .table import markdown

# what must be the same for two times to mean the same
IDENTITY = ("device", "cores", "threads", "fp32 products", "clocks")
# what may differ, as that may be the question; said in the head
CIRCUMSTANCES = ("commit", "torch", "triton", "timm", "numpy", "python", "driver", "CUDA", "cuDNN")
THRESHOLD = 0.05
DRAWS, INTERVAL = 4000, (2.5, 97.5)
FEWEST = 3  # rounds; an interval over fewer says nothing

FASTER, SLOWER, SAME = "faster", "slower", "same within noise"
FEW = "too few rounds"

Rows = dict[tuple[str, str], Row]  # by group and provider


class NotComparable(Exception):
    """Why two runs are not compared, one line per reason."""


@dataclass(frozen=True)
class Ratio:
    """B over A with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})"


@dataclass(frozen=True)
class Comparison:
    """One row of both runs.

    Attributes:
        verdict: `FASTER`, `SLOWER`, `SAME`, `FEW`, or why there is none.
        raw: of the times; None where there are none to compare.
        against: the baseline whose ratio judges, "" if the times do.
        relative: of the ratios to it.
        regression: counts for the exit code.
    """

    group: str
    provider: str
    verdict: str
    raw: Ratio | None = None
    against: str = ""
    relative: Ratio | None = None
    regression: bool = False


def bootstrap(a: npt.ArrayLike, b: npt.ArrayLike) -> Ratio:
    """Median of `b` over that of `a`, over rounds drawn with replacement."""
    random = np.random.default_rng(0)
    rounds = np.asarray(a), np.asarray(b)
    drawn = (r[random.integers(len(r), size=(DRAWS, len(r)))] for r in rounds)
    of_a, of_b = (np.median(each, axis=1) for each in drawn)
    low, high = np.percentile(of_b / of_a, INTERVAL)
    return Ratio(float(np.median(rounds[1]) / np.median(rounds[0])), float(low), float(high))


def identity(run: Run) -> dict[str, Any]:
    """The machine of a run, and the clocks of its rows."""
    return {**run.machine, "clocks": ", ".join(sorted({r.clock for r in run.rows if r.seconds}))}


def differences(a: dict[str, Any], b: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Lines "name: of A, of B" of the entries that are not the same; a missing one is unknown."""
    pairs = ((name, a.get(name, "unknown"), b.get(name, "unknown")) for name in names)
    return [f"{name}: {of_a} in A, {of_b} in B" for name, of_a, of_b in pairs if of_a != of_b]


def compare(
    a: Run, b: Run, threshold: float = THRESHOLD, force_ratios: bool = False
) -> list[Comparison]:
    """All rows of either run, in A's order, then B's own.

    Args:
        threshold: a row is a regression when it is slower by more than this share.
        force_ratios: compare runs of different machines by ratios to a baseline; their times never.

    Raises:
        NotComparable: the machines differ and `force_ratios` is not set, or no row is in both.
    """
    differ = differences(identity(a), identity(b), IDENTITY)
    if differ and not force_ratios:
        raise NotComparable("\n".join(differ))
    of_a, of_b = ({(r.group, r.provider): r for r in run.rows} for run in (a, b))
    found = [
        _compare(key, of_a, of_b, threshold, absolute=not differ)
        for key in dict.fromkeys([*of_a, *of_b])
        if any(key in rows and (rows[key].seconds or rows[key].failed) for rows in (of_a, of_b))
    ]
    if not any(c.raw or c.relative or c.regression for c in found):
        raise NotComparable("no row has a time in both runs")
    return found


def _compare(
    key: tuple[str, str], of_a: Rows, of_b: Rows, threshold: float, absolute: bool
) -> Comparison:
    a, b = (rows.get(key, Row(*key)) for rows in (of_a, of_b))
    if b.failed:
        return Comparison(*key, f"{b.reason} in B", regression=key in of_a and not a.failed)
    for missing, there in ((b, "A"), (a, "B")):
        if not missing.seconds:
            reason = f" ({missing.reason})" if missing.reason else ""
            return Comparison(*key, f"only in {there}{reason}")

    is_baseline = key[1] in (*a.baselines, *b.baselines)
    raw, relative, against = bootstrap(a.seconds, b.seconds) if absolute else None, None, ""
    for name in () if is_baseline else b.baselines:
        bases = [rows.get((key[0], name), Row(*key)).seconds for rows in (of_a, of_b)]
        if all(bases):
            relative = bootstrap(np.divide(a.seconds, bases[0]), np.divide(b.seconds, bases[1]))
            against = name
            break
    judged = relative or raw
    if judged is None:
        return Comparison(*key, "not compared: its time means nothing on another machine")
    verdict = FASTER if judged.high < 1 else SLOWER if judged.low > 1 else SAME
    if min(len(a.seconds), len(b.seconds)) < FEWEST:
        verdict = FEW
    regression = verdict == SLOWER and judged.value > 1 + threshold and not is_baseline
    return Comparison(*key, verdict, raw, against, relative, regression)


def overall(found: Sequence[Comparison], threshold: float = THRESHOLD) -> str:
    """One line: what the exit code says, and how many rows became what."""
    regressions = [f"{c.group} {c.provider}" for c in found if c.regression]
    counts = Counter(c.verdict if c.raw or c.relative else "not in both" for c in found)
    order = (FASTER, SLOWER, SAME, FEW, "not in both")
    text = ", ".join(f"{counts[word]} {word}" for word in order if counts[word])
    if not regressions:
        return f"No regression beyond {threshold:.0%}: {text}."
    names = "; ".join(regressions)
    return f"REGRESSION beyond {threshold:.0%} in {len(regressions)} rows: {names}. All: {text}."


def render(found: Sequence[Comparison]) -> str:
    lines = [["group", "provider", "verdict", "B / A to baseline", "baseline", "B / A of times"]]
    for c in found:
        verdict = c.verdict + (" (!)" if c.regression else "")
        ratios = str(c.relative or ""), c.against, str(c.raw or "")
        lines.append([c.group, c.provider, verdict, *ratios])
    return markdown(lines, aligned=True)


def main(arguments: list[str] | None = None) -> int:
    """The exit code; the comparison goes to stdout, a refusal to stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="share, default 0.05")
    parser.add_argument(
        "--force-ratios",
        action="store_true",
        help="compare different machines by ratios to a baseline inside each run",
    )
    options = parser.parse_args(arguments)
    if not options.threshold >= 0:
        parser.error(f"--threshold must be 0 or more, got {options.threshold}")
    try:
        a, b = _read(options.a), _read(options.b)
        found = compare(a, b, options.threshold, options.force_ratios)
    except NotComparable as reasons:
        print(f"not comparable:\n{reasons}", file=sys.stderr)
        return 2
    for line in differences(identity(a), identity(b), IDENTITY):
        print(f"NOT THE SAME MACHINE, ratios only: {line}")
    print(*differences(identity(a), identity(b), CIRCUMSTANCES), sep="\n")
    print(f"\n{render(found)}\n\n{overall(found, options.threshold)}")
    return int(any(c.regression for c in found))


def _read(path: Path) -> Run:
    try:
        return Run.of(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotComparable(f"{path}: no file of --benchmark-json: {error!r}") from error


if __name__ == "__main__":
    sys.exit(main())
