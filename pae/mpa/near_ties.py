"""The exact selection from rounded losses: windows near the boundary are measured again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .search import Losses, Ranking, check_finite

MARGIN = 2.0
_AT_LEAST = 8  # windows beyond the first P whose errors are looked at in any case


@dataclass(frozen=True, eq=False)
class NearTies:
    """What measuring again in full precision found.

    Attributes:
        rechecked: (R,) int64, windows measured in both precisions.
        dropped, added: (n,) int64, windows that rounding would have selected and does not, and
            those in their place; both empty when rounding changed nothing.
        error: (2,) smallest and largest difference (full minus rounded loss) on `rechecked`.
    """

    rechecked: Tensor
    dropped: Tensor
    added: Tensor
    error: Tensor


def confirm(
    ranking: Ranking, count: int, losses_of: Losses, images: int
) -> tuple[Ranking, NearTies]:
    """The first `count` windows as full precision orders them, and what that changed.

    The best windows by rounded losses are measured again; so is every other window whose rounded
    loss, shifted by the middle of the errors seen and lowered by `MARGIN` times half their range,
    could still be among the first `count`; until there is none left.

    Guarantee: the selection and its order are those of full precision, unless a window that was
    not measured again has an error outside of that range. All errors seen lie in its inner half.
    After a halving this concerns the windows that saw all images; the others were dropped by
    rounded losses.

    Args:
        losses_of: in full precision.
        images: in the batch.
    """
    rounded, everything = ranking.losses, torch.arange(images)
    order, beyond = ranking.complete, max(_AT_LEAST, count // 4)
    known = torch.zeros(len(rounded), dtype=torch.bool)
    losses, todo = rounded.clone(), order[: count + beyond]
    while len(todo):
        full = losses_of(todo, everything)
        check_finite(full)
        losses[todo], known[todo] = full.mean(dim=1), True
        errors = (losses - rounded)[known]
        middle, half = (errors.max() + errors.min()) / 2, (errors.max() - errors.min()) / 2
        boundary = losses[known].sort().values[count - 1]
        left = order[~known[order]]
        todo = left[rounded[left] + middle - MARGIN * half <= boundary]

    # stable: equal losses in the order of the windows
    measured = known.nonzero()[:, 0]
    best = measured[losses[measured].sort(stable=True).indices]
    now, before = set(best[:count].tolist()), set(order[:count].tolist())
    ties = NearTies(
        rechecked=measured,
        dropped=torch.tensor(sorted(before - now), dtype=torch.int64),
        added=torch.tensor(sorted(now - before), dtype=torch.int64),
        error=torch.stack([errors.min(), errors.max()]),
    )
    return Ranking(losses, ranking.images_seen, torch.cat([best, order[~known[order]]])), ties
