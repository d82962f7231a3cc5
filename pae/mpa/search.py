"""Which windows have the smallest loss: all measured in full, or dropped when they cannot win.

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
    """Successive halving: all windows see a few images, those that may still win see more.

    After each stage the P windows that look best see all images. The P-th smallest of the losses
    known exactly is a boundary that no window of the exact selection exceeds. A window is dropped
    when even a lower bound of its loss does: its estimate, less Student's t with n - classes
    degrees of freedom times the standard error. The batch is what windows are ranked on, and images
    come in an order that is random within each class and keeps the classes' shares; so the first n
    are a stratified sample of a finite population, and estimate and error are those of one.

    What it may miss: a window of the exact selection is dropped only when its own bound fails.
    There are P such windows, each is tested after at most stages - 1 stages, and t is taken at
    risk / (P (stages - 1)). So the selection is the exact one with a probability of at least
    1 - risk over the order of the images, if the losses of a window are normal within each class.
    They are not quite; t is wide where the images of a stage are few, which helps.
    `bench/results/mpa_search.md` has what came out on real tasks.

    Attributes:
        risk: probability allowed of another selection than the exact one, in (0, 1).
        first: images of the first stage, at least 4.
        growth: factor from stage to stage, above 1.
        seed: of the order of the images.
    """

    risk: float = 0.05
    first: int = 6
    growth: float = 1.25
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
    sizes = how.stages(len(labels))
    known = _Known(
        losses_of, windows, labels, how, risk=how.risk / (count * max(1, len(sizes) - 1))
    )
    alive = torch.arange(windows)
    for size in sizes[:-1]:
        known.measure(alive, size)
        leaders = known.means.argsort(stable=True)[:count]
        known.measure(leaders[~known.whole[leaders]], len(labels))
        boundary = known.means[known.whole].sort().values[count - 1]
        # losses that differ by their own rounding are kept for the final comparison
        boundary += 4 * torch.finfo(known.table.dtype).eps * boundary.abs()
        in_doubt = ~known.whole[alive] & (known.means[alive] - known.errors[alive] <= boundary)
        alive = alive[in_doubt]
    known.measure(alive, len(labels))
    losses, whole = known.means.to(known.table.dtype), known.whole.nonzero()[:, 0]
    losses[whole] = known.table[whole].mean(dim=1)  # as the exact search rounds it
    return Ranking(losses, known.seen, whole[losses[whole].sort(stable=True).indices])


class _Known:
    """What halving has measured: losses, estimates, and how far a loss may lie below its estimate.

    Attributes:
        table: (S, B) losses, 0 where none was measured. seen: (S,) images measured, the first ones
            of the order. whole: (S,) bool, all of them.
        means, errors: (S,) fp64, estimated mean loss, and its distance from the lower bound.
    """

    def __init__(
        self, losses_of: Losses, windows: int, labels: Tensor, how: Halving, risk: float
    ) -> None:
        self._losses_of, self._labels, self._risk = losses_of, labels, risk
        self._order = _balanced_order(labels, how.seed)
        self._table: Tensor | None = None
        self.seen = torch.zeros(windows, dtype=torch.int64)
        self.means, self.errors = torch.zeros(2, windows, dtype=torch.float64)

    @property
    def whole(self) -> Tensor:
        return self.seen == len(self._labels)

    @property
    def table(self) -> Tensor:
        assert self._table is not None  # its dtype is that of the first losses
        return self._table

    def measure(self, windows: Tensor, images: int) -> None:
        """Windows that have seen equally many images see the order's first `images`."""
        if not len(windows):
            return
        new, sample = self._order[int(self.seen[windows[0]]) : images], self._order[:images]
        losses = self._losses_of(windows, new)
        check_finite(losses)
        if self._table is None:
            self._table = losses.new_zeros(len(self.seen), len(self._labels))
        self.table[windows[:, None], new], self.seen[windows] = losses, images
        means, variances, freedom = _stratified(
            self.table[windows][:, sample], sample, self._labels
        )
        # a whole batch is known; one image of each class says nothing of the others
        quantile = math.inf if freedom < 1 else student_quantile(self._risk, freedom)
        self.means[windows] = means
        self.errors[windows] = 0.0 if images == len(self._labels) else quantile * variances.sqrt()


def _stratified(losses: Tensor, sample: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Estimates of the whole batch's mean losses from those on a sample of it, classes as strata.

    Classes with fewer than two images in the sample form one stratum together.

    Returns:
        means (s,) and their variances (s,), fp64; degrees of freedom.
    """
    losses, batch = losses.double(), len(labels)
    drawn = torch.bincount(labels[sample], minlength=int(labels.max()) + 1)
    stratum = torch.where(drawn[labels] >= 2, labels, -1)  # (B,)
    if (stratum == -1).any() and (stratum[sample] == -1).sum() < 2:
        stratum = torch.zeros_like(labels)  # too few of the rare classes to speak for them
    means, variances, freedom = losses.new_zeros(len(losses)), losses.new_zeros(len(losses)), 0
    for name in stratum.unique():
        here, size = stratum[sample] == name, int((stratum == name).sum())
        n = int(here.sum())
        part, weight = losses[:, here], size / batch
        means += weight * part.mean(dim=1)
        if n < size:
            variances += weight**2 * (1 - n / size) / n * part.var(dim=1)
        freedom += n - 1
    return means, variances, freedom


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
