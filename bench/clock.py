"""The check of the clock before any time is printed: known ratios of work must come out.

A clock that counts naps, starts late, ticks coarsely, reads in another unit or does not wait for
the device would give plausible tables that are wrong; here it stops the session instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from . import timing
from .timing import Sample

Measure = Callable[[Callable[[], object]], Sample]
Repeat = Callable[[int], Callable[[], object]]  # n -> work of n times the same

NAP = 0.02  # seconds
PIECE = 0.001  # seconds that the single work takes, about: less than a slice of the scheduler
ROUNDS = 15
ATTEMPTS = 3  # a neighbour on a shared machine spoils one attempt, a bad clock spoils all
RATIO = (1.8, 2.2)  # twice the work
AGREEMENT = (0.9, 1.25)  # a reading over what another clock says
FINEST = 1e-4  # the shortest time that must be told from none


class BadClock(Exception):
    """What the clock got wrong, in one line."""


def check(
    device: torch.device,
    clock: str,
    measure: Measure | None = None,
    repeat: Repeat | None = None,
) -> dict[str, float]:
    """Known work under `clock`; what was found, by name.

    Args:
        clock: one of `timing.CLOCKS`, the one whose readings will be printed.
        measure: `timing.measure` on `device` unless given.
        repeat: the known work, about a millisecond for 1; `spins` for the device's clock, else
            `products`, unless given.

    Returns:
        nap_process_share: CPU time of a nap over its length. work_x2: reading of twice the work
        over that of the work. agreement: the reading of a stretch over that of a clock that
        `measure` has no part in. finest_us: the shortest reading above zero, in microseconds.

    Raises:
        BadClock: a finding is out of bounds in every one of `ATTEMPTS`.
    """
    with timing.one_stream(device):
        measure = measure or (lambda work: timing.measure(work, device))
        repeat = repeat or (spins(device) if clock == "device" else products())
        seconds = lambda work: measure(work).seconds(clock)
        for attempt in range(ATTEMPTS):
            try:
                return (
                    _nap(measure)
                    | _ratio(seconds, repeat)
                    | _agreement(seconds, *_reference(device, clock, repeat))
                    | _finest(seconds)
                )
            except BadClock as error:
                if attempt == ATTEMPTS - 1:
                    raise BadClock(f"{clock} clock: {error}") from None
    raise AssertionError("unreachable")


def summary(found: dict[str, float]) -> str:
    """What the head of the table says of a clock that passed."""
    return (
        f"passed (twice the work takes {found['work_x2']:.2f}x, "
        f"finest reading {found['finest_us']:.1f} us)"
    )


# ---- known work


def products() -> Repeat:
    """CPU work: n times the same product, a piece of about `PIECE` seconds."""
    a = torch.randn(192, 192)
    out = torch.empty_like(a)

    def times(count: int) -> Callable[[], object]:
        def work() -> None:
            for _ in range(count):
                torch.mm(a, a, out=out)

        return work

    times(20)()  # threads and library code come up
    start = time.process_time()
    times(20)()
    one = max((time.process_time() - start) / 20, 1e-7)
    per_piece = max(1, round(PIECE / one))
    return lambda n: times(n * per_piece)


def spins(device: torch.device) -> Repeat:
    """GPU work: a graph of n kernels that each spin for the same number of cycles."""
    cycles = round(PIECE * 1e9)  # about a gigahertz and more: a millisecond or less

    def work(count: int) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda._sleep(1)  # the kernel is loaded before the capture
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
            for _ in range(count):
                torch.cuda._sleep(cycles)
        return graph.replay

    return work


# ---- what must come out


def _nap(measure: Measure) -> dict[str, float]:
    sample = measure(lambda: time.sleep(NAP))
    if sample.wall < NAP:
        raise BadClock(f"a nap of {NAP * 1e3:.0f} ms took {sample.wall * 1e3:.3f} ms of wall time")
    if sample.process > NAP / 4:
        raise BadClock(
            f"a nap of {NAP * 1e3:.0f} ms took {sample.process * 1e3:.3f} ms of CPU time"
        )
    return {"nap_process_share": sample.process / NAP}


def _ratio(seconds: Callable[[Callable[[], object]], float], repeat: Repeat) -> dict[str, float]:
    """Minima of interleaved rounds: interruptions only ever add."""
    works = {n: repeat(n) for n in (1, 2)}
    readings: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for n, work in works.items():
            readings[n].append(seconds(work))
    once, twice = min(readings[1]), min(readings[2])
    if not once > 0:
        raise BadClock(f"work of a millisecond or more took {once} s")
    found = twice / once
    if not RATIO[0] <= found <= RATIO[1]:
        raise BadClock(f"twice the work took {found:.2f} times as long, expected about 2")
    return {"work_x2": found}


def _reference(
    device: torch.device, clock: str, repeat: Repeat
) -> tuple[Callable[[], object], float]:
    """Work, and the seconds it takes by a clock that `timing.measure` has no part in."""
    if clock != "device":
        now = time.process_time if clock == "process" else time.perf_counter

        def spin() -> None:
            end = now() + NAP
            while now() < end:
                pass

        return spin, NAP
    work, wait = repeat(4), torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def by_the_host() -> float:
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    return work, min(by_the_host() for _ in range(3))


def _agreement(
    seconds: Callable[[Callable[[], object]], float], work: Callable[[], object], expected: float
) -> dict[str, float]:
    reading = min(seconds(work) for _ in range(3))
    found = reading / expected
    if not AGREEMENT[0] <= found <= AGREEMENT[1]:
        raise BadClock(
            f"{expected * 1e3:.1f} ms by another clock took {reading * 1e3:.3f} ms, "
            f"{found:.2g} times as long"
        )
    return {"agreement": found}


def _finest(seconds: Callable[[Callable[[], object]], float]) -> dict[str, float]:
    """The shortest reading above zero of growing work: a coarse clock shows none below its tick,
    and one that counts itself none below its own time.
    """
    readings = [seconds(_count(2**n)) for n in range(12) for _ in range(3)]
    finest = min((reading for reading in readings if reading > 0), default=float("inf"))
    if finest > FINEST:
        raise BadClock(
            f"the shortest reading is {finest * 1e6:.0f} us, expected less than {FINEST * 1e6:.0f}"
        )
    return {"finest_us": finest * 1e6}


def _count(n: int) -> Callable[[], object]:
    return lambda: sum(range(n))
