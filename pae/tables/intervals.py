"""How sure a mean over a few runs is: Student's interval, Welch's for a difference, a bootstrap.

Seeds are few and their spread is not known beforehand, so the interval of a mean is Student's: for
three runs its half-width is 4.3 standard errors where that of a normal law would be 2.0. It says
how another seed would come out, not how another draw of test images would.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

LEVEL = 0.95  # of every interval
DRAWS = 10_000


def t_quantile(two_sided: float, freedom: int) -> float:
    """The t that a variable of Student's law stays within, in both directions, with probability
    `two_sided`.

    Raises:
        ValueError: `freedom` below 1, or a probability outside (0, 1).
    """
    if freedom < 1 or not 0 < two_sided < 1:
        raise ValueError(f"no quantile of {two_sided} with {freedom} degrees of freedom")
    low, high = 0.0, 1.0
    while _within(high, freedom) < two_sided:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if _within(middle, freedom) < two_sided else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| < t), by the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3
    and 26.7.4).
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def half_width(values: Sequence[float]) -> float | None:
    """Half of the interval of the mean; None of a single value, which says nothing of a spread."""
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return t_quantile(LEVEL, len(values) - 1) * error


Pair = tuple[Sequence[float], Sequence[float]]


def of_difference(pairs: Sequence[Pair], comparisons: int = 1) -> float | None:
    """Half of Welch's interval of a difference of two means, or of the mean of several such
    differences, one per task.

    Args:
        pairs: per task the runs of both; independent, and neither needs as many as the other.
        comparisons: how many such questions are asked at once; all intervals hold together with
            probability `LEVEL` (Bonferroni).
    Returns:
        None where one has a single run, or no spread is known.
    """
    sides = [values for pair in pairs for values in pair]
    if min(map(len, sides)) < 2:
        return None
    shares = [statistics.variance(values) / len(values) for values in sides]
    total = sum(shares)
    if total == 0:  # accuracies are whole numbers of images: equal ones do not prove certainty
        return None
    parts = [share**2 / (len(values) - 1) for share, values in zip(shares, sides, strict=True)]
    freedom = max(1, math.floor(total**2 / sum(parts)))  # down: rather too wide
    within = 1 - (1 - LEVEL) / comparisons
    return t_quantile(within, freedom) * math.sqrt(total) / len(pairs)


def differs(first: Sequence[float], second: Sequence[float], comparisons: int = 1) -> bool:
    """Whether the interval of the difference of two means excludes 0; False where there is none.

    Args:
        first, second, comparisons: as for `of_difference`.
    """
    half = of_difference([(first, second)], comparisons)
    return half is not None and abs(statistics.fmean(first) - statistics.fmean(second)) > half


def over_tasks(
    differences: Sequence[float], comparisons: int = 1, draws: int = DRAWS
) -> tuple[float, float]:
    """The percentile interval of the mean of one difference per task, tasks drawn with replacement.

    Args:
        differences: of two methods, a number per task.
        comparisons: as for `differs`.
        draws: samples; their random numbers are always the same.
    """
    draw = random.Random(0)
    means = sorted(
        statistics.fmean(draw.choices(differences, k=len(differences))) for _ in range(draws)
    )
    tail = (1 - LEVEL) / comparisons / 2
    last = len(means) - 1
    return means[math.floor(tail * last)], means[math.ceil((1 - tail) * last)]
