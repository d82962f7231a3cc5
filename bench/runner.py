"""What a benchmark group is, and how one is run: open, check every provider, time them in turns.

No time is taken of a provider whose values are wrong: `Runnable.check` runs first and doubles as
warm-up.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import roofline
from .lines import Watcher
from .memory import peak_bytes
from .results import Row
from .timing import Sample, captured, interleave, one_stream


@dataclass(frozen=True)
class Settings:
    """What the command line chose.

    Attributes:
        size: "quick", "default", "full", or "smoke" (each provider once, tiny, no times).
        rounds, batch: None leaves them to the group.
    """

    size: str
    threads: int
    rounds: int | None
    batch: int | None
    device: torch.device
    clock: str

    def why_not_compile(self, chosen: bool) -> str:
        """Why a row of torch.compile is left out; nothing if it runs, in `chosen` groups always."""
        return "" if chosen or self.size == "full" else "compiles for a minute; runs with --full"

    def why_not_cuda(self) -> str:
        """Why a row of CUDA kernels is left out; nothing if it runs."""
        return "" if self.on_gpu else "needs a GPU"

    def why_not_bf16(self) -> str:
        """Why bf16 rows are left out; nothing where they run: emulated they take minutes."""
        if self.on_gpu or self.size == "smoke" or roofline.bf16_instructions():
            return ""
        return "this processor has no bf16 instructions"

    def why_not_size(self, quick: bool, default: bool) -> str:
        """Why a group is left out that runs with --quick or by default if so said, else --full."""
        if self.size in ("full", "smoke") or (quick if self.size == "quick" else default):
            return ""
        return "runs without --quick" if default else "runs with --full"

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


class Unavailable(Exception):
    """A provider cannot run here; the message says why and becomes its row in the table."""

    @classmethod
    def because(cls, what: str, error: Exception) -> Unavailable:
        """`what` failed with `error`: its first line is reason enough."""
        lines = str(error).strip().splitlines() or ["no message"]
        return cls(f"{what}: {type(error).__name__}: {lines[0]}")


def relative(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`: the error that every row shows."""
    apart = (value.double() - expected.double()).norm()
    return (apart / expected.double().norm()).item() if apart else 0.0  # of two zeros, too


@dataclass(frozen=True)
class Runnable:
    """One provider, ready to run.

    Attributes:
        work: what is timed.
        check: raises AssertionError when the values are wrong; returns columns for the table (see
            `table.COLUMNS`).
        units: pieces of work in one `work()` (windows of MPA); times are divided by it.
        capture: on a GPU, time the replay of a CUDA graph of `work`, which returns its results.
        dtype: of its products, "fp32" or "bf16": which measured product its rate is a share of.
    """

    work: Callable[[], object]
    check: Callable[[], dict[str, float]]
    units: int = 1
    capture: bool = False
    dtype: str = "fp32"


@dataclass(frozen=True)
class Provider:
    """A row of the table: `start` makes it ready with what the group opened.

    left_out: a reason not to start it at all.
    """

    name: str
    start: Callable[[Any], Runnable]
    left_out: str = ""


@dataclass(frozen=True)
class Group:
    """Providers that do the same work, and what they share.

    Attributes:
        name: "step/vit_base_patch16_224/P50/fp32/B4".
        open: builds what the runnables share (weights, data, reference values).
        baselines: providers that the others are compared with, most important first.
        rounds: how often each is timed, unless the command line says otherwise.
        unit: what one measured time belongs to, e.g. "step".
        dtype: a "bf16" group's rows are left out where `Settings.why_not_bf16` has a reason.
        left_out: a reason not to run the group; its providers are then not listed.
    """

    name: str
    open: Callable[[], Any]
    providers: Sequence[Provider]
    baselines: Sequence[str]
    rounds: int
    unit: str
    left_out: str = ""
    dtype: str = "fp32"


def run_group(
    group: Group, names: set[str], settings: Settings, watcher: Watcher | None = None
) -> dict[str, Row]:
    """Check the providers in `names`, then time them in turns; their rows by name."""
    about = {"clock": settings.clock, "unit": group.unit, "baselines": group.baselines}
    missing = settings.why_not_bf16() if group.dtype == "bf16" else ""
    rows = {
        p.name: Row(group.name, p.name, reason=p.left_out or missing, **about)
        for p in group.providers
        if p.name in names
    }
    with one_stream(settings.device):
        _fill(rows, group, settings, watcher or Watcher())
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _fill(rows: dict[str, Row], group: Group, settings: Settings, watcher: Watcher) -> None:
    rounds = 1 if settings.size == "smoke" else settings.rounds or group.rounds
    works: dict[str, Callable[[], object]] = {}
    running = [p for p in group.providers if p.name in rows and not rows[p.name].reason]
    for row in rows.values():
        if row.reason:
            watcher.known(row, rounds)

    def after(round_: dict[str, Sample]) -> None:
        clock = settings.clock
        seconds = {n: s.seconds(clock) / rows[n].units for n, s in round_.items()}
        watcher.measured(group.name, seconds)

    try:
        shared = group.open() if running else None
        for provider in running:
            work = _start(provider, shared, rows[provider.name], settings)
            if work is not None:
                works[provider.name] = work
            watcher.known(rows[provider.name], rounds)
        for name, samples in interleave(works, rounds, settings.device, after).items():
            rows[name].samples = samples
            rows[name].seconds = rows[name].read(settings.clock)
    except Exception as error:  # no round is whole without everybody: nobody gets a time
        for provider in running:
            if not rows[provider.name].reason:
                _fail(rows[provider.name], error)
        watcher.failed(group.name)


def _fail(row: Row, error: Exception) -> None:
    row.error, row.reason = error, f"failed: {error}"


def _start(
    provider: Provider, shared: object, row: Row, settings: Settings
) -> Callable[[], object] | None:
    """What is timed of a provider whose values are right; None, and why in `row`, else."""
    try:
        runnable = provider.start(shared)
        row.columns, row.units = runnable.check(), runnable.units
        if settings.size != "smoke":
            row.columns = {**row.columns, **_measured(runnable, row.columns, settings)}
        if runnable.capture and settings.device.type == "cuda":
            return captured(runnable.work, settings.device)
        return runnable.work
    except Unavailable as reason:
        row.reason = str(reason)
    except torch.OutOfMemoryError:
        row.reason = "does not fit into the device's memory"
    except Exception as error:  # the row fails with it; the others are still timed
        _fail(row, error)
    return None


def _measured(
    runnable: Runnable, columns: dict[str, float], settings: Settings
) -> dict[str, float]:
    """Columns that the suite measures for every row, outside of its times."""
    device, clock, found = settings.device, settings.clock, {}
    if "peak_mb" not in columns:
        found["peak_mb"] = peak_bytes(runnable.work, device) / 1e6
    if "live_gflop" in columns:
        found["peak_tflops"] = roofline.product_tflops(runnable.dtype, device, clock)
    if "floor_mb" in columns:
        found["peak_gbps"] = roofline.copy_gbps(device, clock)
    return found
