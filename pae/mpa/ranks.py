"""The processes that share one search: one answer on all of them, from the first one's data."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """All ranks of the default process group, or this process alone.

    Args:
        shared: whether other ranks take part; every one of them has to make the same calls.
        device: where tensors travel, that of the model.
    """

    def __init__(self, shared: bool, device: torch.device) -> None:
        shared = shared and dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        self._device = device

    def from_first(self, t: Tensor) -> Tensor:
        """The first rank's `t`, of one shape and dtype on all of them, on the model's device."""
        if self.world == 1:
            return t
        t = t.detach().to(self._device, copy=True).contiguous()
        dist.broadcast(t, src=0)
        return t

    def sum(self, t: Tensor) -> Tensor:
        """The sum over all ranks, on the CPU; exact where only one of them has something to add."""
        if self.world == 1:
            return t
        t = t.to(self._device)
        dist.all_reduce(t)
        return t.cpu()

    def agree(self, what: list[float]) -> bool:
        """Whether these numbers are the same on all ranks, to 1e-9; the answer is."""
        mine = torch.tensor(what, dtype=torch.float64, device=self._device)
        extremes = torch.cat([mine, -mine])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        high, low = extremes.cpu().chunk(2)
        return bool((high + low <= 1e-9 * high.abs().clamp_min(1)).all())
