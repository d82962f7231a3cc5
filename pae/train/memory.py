"""The most memory that a run took: what PyTorch allocated of a GPU, else the process in all."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import torch


class Peak:
    """Measures from its making on.

    On a CPU it is the resident memory of the whole process, libraries and kept images included;
    where the system cannot begin to count anew (all but Linux), from the start of the process.

    Args:
        device: the one that is trained on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def mb(self) -> float | None:
        """Megabytes (10^6 bytes), or None where nobody tells."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 1e6, 1)
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
            if found:
                return round(int(found[1]) * 1024 / 1e6, 1)
        try:
            import resource
        except ImportError:  # Windows
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
