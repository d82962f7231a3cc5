"""What a benchmark group is, and how one is run: open, check every provider, time them in turns.

No time is taken of a provider whose values are wrong: `Runnable.check` runs first and doubles as
warm-up.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import roofline
from .memory import peak_bytes
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
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


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
        left_out: a reason not to run the group; its providers are then not listed.
    """

    name: str
    open: Callable[[], Any]
    providers: Sequence[Provider]
    baselines: Sequence[str]
    rounds: int
    unit: str
    left_out: str = ""


@dataclass
class Outcome:
    """What became of one provider: samples, or the reason why there are none."""

    samples: list[Sample] = field(default_factory=list)
    columns: dict[str, float] = field(default_factory=dict)
    units: int = 1
    reason: str = ""
    error: BaseException | None = None


def run_group(group: Group, names: set[str], settings: Settings) -> dict[str, Outcome]:
    """Check the providers in `names`, then time them in turns."""
    with one_stream(settings.device):
        outcomes = _run(group, names, settings)
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    return outcomes


def _run(group: Group, names: set[str], settings: Settings) -> dict[str, Outcome]:
    on_device = settings.device.type == "cuda"
    outcomes = {p.name: Outcome() for p in group.providers if p.name in names}
    works = {}
    try:
        shared = group.open()
    except Exception as error:  # every row fails with it, once; the other groups still run
        for outcome in outcomes.values():
            outcome.error = error
        return outcomes
    for provider in group.providers:
        if provider.name not in names:
            continue
        outcome = outcomes[provider.name]
        if provider.left_out:
            outcome.reason = provider.left_out
            continue
        try:
            runnable = provider.start(shared)
            outcome.columns = runnable.check()
            if settings.size != "smoke":
                measured = _measured(runnable, outcome.columns, settings)
                outcome.columns = outcome.columns | measured
            work = runnable.work
            if on_device and runnable.capture:
                work = captured(work, settings.device)
        except Unavailable as reason:
            outcome.reason = str(reason)
        except torch.OutOfMemoryError:
            outcome.reason = "does not fit into the device's memory"
        except Exception as error:  # the row fails with it; the others are still timed
            outcome.error = error
        else:
            outcome.units = runnable.units
            works[provider.name] = work
    rounds = 1 if settings.size == "smoke" else settings.rounds or group.rounds
    try:
        samples = interleave(works, rounds, settings.device)
    except Exception as error:  # no round is whole without it: nobody gets a time
        for name in works:
            outcomes[name].error = error
        return outcomes
    for name in works:
        outcomes[name].samples = samples[name]
    return outcomes


def _measured(
    runnable: Runnable, columns: dict[str, float], settings: Settings
) -> dict[str, float]:
    """Columns that the suite measures for every row, outside of its times."""
    device, found = settings.device, {}
    if "peak_mb" not in columns:
        found["peak_mb"] = peak_bytes(runnable.work, device) / 1e6
    if "live_gflop" in columns:
        found["peak_tflops"] = roofline.product_tflops(runnable.dtype, device, settings.clock)
    if "floor_mb" in columns:
        found["peak_gbps"] = roofline.copy_gbps(device, settings.clock)
    return found
