"""What tiles and numbers of programs are chosen by: the GPU that a tensor lies on."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class GPU(NamedTuple):
    """Major compute capability, and multiprocessors."""

    major: int
    multiprocessors: int

    @property
    def large(self) -> bool:
        """Whether a multiprocessor has 227 KB of shared memory: sm_90 and sm_100, not sm_120."""
        return self.major in (9, 10)


@lru_cache
def of(device: torch.device) -> GPU:
    """The GPU that is this device; where there is none to ask, the size of one of sm_90."""
    if device.type != "cuda":
        return GPU(9, 132)
    properties = torch.cuda.get_device_properties(device)
    return GPU(properties.major, properties.multi_processor_count)
