"""Bytes that autograd keeps between forward and backward, and the most that a step needs."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


class SavedBytes:
    """Context that counts what the forward inside it saves for backward.

    Every storage counts once, whole, however many views of it are saved. Parameters, buffers and
    other constants (`frozen`) do not count: they are there anyway. Copies of frozen matrices in a
    narrower type, which autocast makes in every step, are counted apart.

    Attributes:
        activations: bytes of everything else.
        weight_copies: bytes of narrower copies of frozen matrices. They are known by their shape,
            so no product of batch and tokens should equal a weight's number of rows.
    """

    def __init__(self, frozen: Iterable[Tensor]) -> None:
        frozen = list(frozen)
        self._seen = {t.untyped_storage().data_ptr() for t in frozen}
        self._matrices = {(t.dtype, tuple(t.shape)) for t in frozen if t.dim() == 2}
        self._alive: list[torch.UntypedStorage] = []  # an address must not be used again meanwhile
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved)
        self.activations = 0
        self.weight_copies = 0

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
        self._alive.clear()

    def _pack(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(storage)
            if self._is_weight_copy(saved):
                self.weight_copies += storage.nbytes()
            else:
                self.activations += storage.nbytes()
        return saved

    def _is_weight_copy(self, saved: Tensor) -> bool:
        shape = tuple(saved.shape)
        return any(
            dtype.itemsize > saved.dtype.itemsize and matrix in (shape, shape[::-1])
            for dtype, matrix in self._matrices
        )


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that PyTorch's allocator of `device` had handed out at one time during `run`, beyond
    what it had before. Scratch memory of libraries below PyTorch is not in it.
    """
    if device.type == "cpu":
        return _peak_on_cpu(run)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(run: Callable[[], object]) -> int:
    """The CPU's allocator keeps no maximum, but the profiler sees each of its calls: those of
    compiled code and of the inside of an operator too, which a dispatch mode would miss.
    """
    gc.collect()  # garbage of others must not be freed, and counted, meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # negative when memory is given back
        most = max(most, now)
    return most


def own_bytes(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> int:
    """Bytes of the storages of `tensors`, each once, without those that `others` share."""
    seen = {t.untyped_storage().data_ptr() for t in others}
    total = 0
    for t in tensors:
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in nested dataclasses, lists, tuples and dicts, e.g. in a folded plan."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from tensors_in(getattr(value, f.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
