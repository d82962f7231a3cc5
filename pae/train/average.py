"""An exponential moving average of what is trained; a frozen backbone costs nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


class Average:
    """The average a <- d a + (1 - d) p of every parameter p, moved once per update.

    Its decay d is min(`decay`, (1 + n) / (10 + n)) at update n = 1, 2, ...: a short run would keep
    its first values otherwise (0.9999 forgets half of them in 6931 updates).

    Args:
        parameters: what is averaged; they may change in place, and not be replaced.
        decay: in (0, 1).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Moves the average after update `number`, which counts from 1."""
        decay = min(self.decay, (1 + number) / (10 + number))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The parameters hold the average inside the block, and exactly their own values again
        after it.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, parameter in zip(self.values, self.parameters, strict=True):
            kept = parameter.clone()
            parameter.copy_(value)
            value.copy_(kept)
