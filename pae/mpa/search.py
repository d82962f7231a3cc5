"""Which windows have the smallest loss: all measured in full, or dropped once they cannot win.

Both searches ask for the losses they need through `Losses`, and know nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# losses (s, b) on the CPU of windows (s,) int64 seen through images (b,) int64
Losses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Halving:
    """Successive halving: every window sees a few images, those that may still win see twice as
    many, and so on; the last ones see all.

    The batch is what windows are ranked on, so its first n images, taken in an order that is random
    within each class and keeps the classes' shares, are a stratified sample of a finite population.
    After each stage a window is dropped when at least P others are better by more than the error of
    the difference: Student's t with n - classes degrees of freedom times the standard error of the
    paired difference, classes as strata, with the finite-population correction.

    What it may miss: a window of the exact selection is dropped only when a window outside of it
    looks surely better. There are P (S - P) such pairs and at most `stages` stages, and the
    quantile of t is taken at risk / (P (S - P) stages). So the selection is the exact one with
    probability at least 1 - risk over the order of the images, if differences of two windows'
    losses are normal within a class. They are not quite; with few images of a stage in each class
    that matters most. The union over pairs, on the other hand, is far from tight.

    Attributes:
        risk: probability allowed of another selection than the exact one, in (0, 1).
        first: images of the first stage, at least 4.
        growth: factor from stage to stage, above 1.
        seed: of the order of the images.
    """

    risk: float = 0.05
    first: int = 8
    growth: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.risk < 1:
            raise ValueError(f"Halving.risk must be a number in (0, 1), got {self.risk!r}")
        if type(self.first) is not int or self.first < 4:
            raise ValueError(f"Halving.first must be an integer of at least 4, got {self.first!r}")
        if not self.growth > 1:
            raise ValueError(f"Halving.growth must be above 1, got {self.growth!r}")

    def stages(self, images: int) -> list[int]:
        """Images seen by the end of each stage; the last one is all of them."""
        sizes, size = [], self.first
        while size < images:
            sizes.append(size)
            size = math.ceil(size * self.growth)
        return [*sizes, images]


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a search found out about S windows.

    Attributes:
        losses: (S,) mean loss over the batch; estimated where a window did not see all of it.
        images_seen: (S,) int64, images that each window was measured on.
        complete: windows that saw all images, best first, equal ones in their own order.
    """

    losses: Tensor
    images_seen: Tensor
    complete: Tensor


def rank_all(losses_of: Losses, windows: int, images: int) -> Ranking:
    """Every window on every image."""
    table = losses_of(torch.arange(windows), torch.arange(images))
    check_finite(table)
    losses = table.mean(dim=1)
    return Ranking(losses, torch.full((windows,), images), losses.sort(stable=True).indices)


def rank_by_halving(
    losses_of: Losses, windows: int, labels: Tensor, count: int, how: Halving
) -> Ranking:
    """The windows that may be among the `count` best, on ever more images; see `Halving`.

    Args:
        labels: (B,) int64, on the CPU.
    """
    order, sizes = _balanced_order(labels, how.seed), how.stages(len(labels))
    pairs = max(1, count * (windows - count))
    risk = how.risk / (pairs * max(1, len(sizes) - 1))
    seen = torch.zeros(windows, dtype=torch.int64)
    alive, done, table = torch.arange(windows), 0, None
    for size in sizes:
        images = order[done:size]
        part = losses_of(alive, images)
        check_finite(part)
        if table is None:
            table = part.new_zeros(windows, len(labels))
        table[alive[:, None], images] = part
        seen[alive], done = size, size
        if size < len(labels):
            sample = order[:size]
            alive = alive[_may_win(table[alive][:, sample], sample, labels, count, risk)]
    losses = table.mean(dim=1)
    for size in sizes[:-1]:
        rows, sample = (seen == size).nonzero()[:, 0], order[:size]
        means, _, _ = _stratified(table[rows][:, sample], sample, labels)
        losses[rows] = means.to(losses.dtype)
    return Ranking(losses, seen, alive[losses[alive].sort(stable=True).indices])


def _may_win(losses: Tensor, sample: Tensor, labels: Tensor, count: int, risk: float) -> Tensor:
    """(s,) bool: fewer than `count` others are surely better than this window.

    Args:
        losses: (s, n) of the surviving windows on the images `sample` (n,) of the batch.
        risk: probability that one comparison of two windows may err.
    """
    # what all windows share on an image cancels in every difference; without it less rounds away
    losses = losses.double()
    means, residuals, freedom = _stratified(losses - losses.mean(dim=0), sample, labels)
    if freedom < 1:
        return torch.ones(len(losses), dtype=torch.bool)
    error = torch.cdist(residuals, residuals, compute_mode="donot_use_mm_for_euclid_dist")
    surely_better = means[:, None] - means > student_quantile(risk, freedom) * error
    return surely_better.sum(dim=1) < count


def _stratified(losses: Tensor, sample: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Estimates of the whole batch's mean losses from those on a sample of it, classes as strata.

    Classes with fewer than two images in the sample form one stratum together.

    Returns:
        means (s,) fp64; residuals (s, n) fp64, scaled so that the standard error of the difference
        of two windows' means is the distance of their rows; degrees of freedom.
    """
    losses, batch = losses.double(), len(labels)
    drawn = torch.bincount(labels[sample], minlength=int(labels.max()) + 1)
    stratum = torch.where(drawn[labels] >= 2, labels, -1)  # (B,)
    if (stratum == -1).any() and (stratum[sample] == -1).sum() < 2:
        stratum = torch.zeros_like(labels)  # too few of the rare classes to speak for them
    means, residuals, freedom = losses.new_zeros(len(losses)), torch.zeros_like(losses), 0
    for name in stratum.unique():
        here, size = stratum[sample] == name, int((stratum == name).sum())
        n = int(here.sum())
        part = losses[:, here]
        mean = part.mean(dim=1)
        means += size / batch * mean
        scale = size / batch * math.sqrt((1 - n / size) / (n * (n - 1)))
        residuals[:, here] = (part - mean[:, None]) * scale
        freedom += n - 1
    return means, residuals, freedom


def _balanced_order(labels: Tensor, seed: int) -> Tensor:
    """(B,) images in an order that is random within each class; every start has the classes' shares
    to within one image of each.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    place = torch.empty(len(labels), dtype=torch.float64)
    for name in labels.unique():
        members = shuffled[labels[shuffled] == name]
        offset = torch.rand((), dtype=torch.float64, generator=generator)
        place[members] = (torch.arange(len(members)) + offset) / len(members)
    return place.sort(stable=True).indices


def student_quantile(risk: float, freedom: int) -> float:
    """t with P(T > t) = risk for Student's t with `freedom` degrees of freedom, 0 < risk < 1/2."""
    low, high = 0.0, 1.0
    while _student_tail(high, freedom) > risk:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_tail(middle, freedom) > risk else (low, middle)
    return high


def _student_tail(t: float, freedom: int) -> float:
    """P(T > t) for t >= 0: the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd, square = freedom % 2, math.cos(angle) ** 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= square * (k - 1) / k
    central = math.sin(angle) * total
    if odd:
        central = 2 / math.pi * (angle + central)
    return (1 - central) / 2


def check_finite(losses: Tensor) -> None:
    bad = int((~losses.isfinite().all(dim=1)).sum())
    if bad:
        raise ValueError(f"model gives no finite loss for {bad} of {len(losses)} windows of images")
