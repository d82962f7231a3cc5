"""One clock for all benchmarks, and providers of a group timed in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch

from .memory import tensors_in

CLOCKS = ("device", "process", "wall")


@dataclass(frozen=True)
class Sample:
    """Seconds that one piece of work took.

    Attributes:
        wall: by the clock on the wall.
        process: of CPU time in this process, all threads. On a shared machine with one thread it
            is the steadiest of the three.
        device: between two events around the work on the current CUDA stream; None without CUDA.
    """

    wall: float
    process: float
    device: float | None = None

    def seconds(self, clock: str) -> float:
        """The reading of `clock`, one of `CLOCKS`."""
        value = getattr(self, clock)
        if value is None:
            raise ValueError(f"clock 'device' needs CUDA work, got a sample without it: {self}")
        return value


def measure(work: Callable[[], object], device: torch.device) -> Sample:
    """Run `work` once and time it, with the garbage collector off and the device idle before."""
    on_device = device.type == "cuda"
    if on_device:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        # nothing of the work's data is left in L2; and while this runs, the host launches ahead,
        # so that a graph's launch is not timed
        _three_caches(device).zero_()
    collecting = gc.isenabled()
    gc.disable()
    try:
        wall, process = time.perf_counter(), time.process_time()
        if on_device:
            start.record()
        work()
        if on_device:
            end.record()
            torch.cuda.synchronize(device)
        process, wall = time.process_time() - process, time.perf_counter() - wall
    finally:
        if collecting:
            gc.enable()
    return Sample(wall, process, start.elapsed_time(end) * 1e-3 if on_device else None)


@lru_cache
def _three_caches(device: torch.device) -> torch.Tensor:
    size = 3 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device)


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def one_stream(device: torch.device) -> AbstractContextManager:
    """Context in which all work of a group is prepared and run: a graph cannot be captured on the
    default stream, and a backward runs on the stream of its forward. Nothing without CUDA.
    """
    return torch.cuda.stream(_stream(device)) if device.type == "cuda" else nullcontext()


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work` as the replay of one CUDA graph: its kernels without Python and launches between.

    Args:
        work: returns the tensors it computes, all of them new ones. Called inside `one_stream`.

    Raises:
        RuntimeError: the work cannot be captured, or a replay does not compute its results.
    """
    for _ in range(3):  # compilers, plans and workspaces come before the capture
        work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        results = [t for t in tensors_in(work()) if t.is_floating_point()]
    for t in results:
        t.detach().fill_(torch.nan)
    graph.replay()
    if not results or any(t.isnan().any().item() for t in results):
        raise RuntimeError("a replay of the captured graph does not compute its results")
    return graph.replay


def interleave(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    after: Callable[[dict[str, Sample]], object] = lambda samples: None,
) -> dict[str, list[Sample]]:
    """Time every work once per round; round r starts with work number r, so all see every place.

    Args:
        after: is called with the samples of a round when it is whole; true ends it there.

    Returns:
        per name `rounds` samples, or fewer; entry r of all names belongs to the same stretch of
        time.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in works}
    names = list(works)
    gc.collect()
    for r in range(rounds):
        shift = r % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            samples[name].append(measure(works[name], device))
        if after({name: samples[name][-1] for name in names}):
            break
    return samples
