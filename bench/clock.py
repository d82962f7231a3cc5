"""The check of the clock before any time is printed: known ratios of work must come out.

A clock that counts naps, starts late, ticks coarsely, reads in another unit or does not wait for
the device would give plausible tables that are wrong; here it stops the session instead.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from . import timing

Work = Callable[[], object]
Repeat = Callable[[int], Work]  # n -> work of n times the same

NAP = 0.02  # seconds
PIECE = 0.001  # seconds that the single work takes, about: less than a slice of the scheduler
ROUNDS, MOST = 15, 300  # of two works in turns: at first, and where neighbours make them unsteady
STEADY = 0.05  # share within which the middle ratio must be known before it is judged
ATTEMPTS = 10  # neighbours on a shared machine spoil some, a bad clock spoils all
RATIO = (1.8, 2.2)  # twice the work
AGREEMENT = (0.8, 1.25)  # a reading over what another clock says
FINEST = 1e-4  # the shortest time that must be told from none


class BadClock(Exception):
    """What the clock got wrong, in one line."""


def check(device: torch.device, clock: str) -> dict[str, float]:
    """Known work under `clock`, that of `timing.CLOCKS` whose readings will be printed.

    Returns:
        work_x2: reading of twice the work over that of the work. agreement: the reading of a
        stretch over that of a clock that `measure` has no part in. finest_us: the shortest reading
        above zero, in microseconds.

    Raises:
        BadClock: a finding is out of bounds in every one of `ATTEMPTS`.
    """
    with timing.one_stream(device):
        repeat = products(device)
        for _ in range(ATTEMPTS):
            try:
                return _findings(device, clock, repeat)
            except BadClock as error:
                reason = error
    raise BadClock(f"{clock} clock: {reason}")


def summary(found: dict[str, float]) -> str:
    """What the head of the table says of a clock that passed."""
    return (
        f"passed (twice the work takes {found['work_x2']:.2f}x, "
        f"finest reading {found['finest_us']:.1f} us)"
    )


def settled(a: Callable[[], float], b: Callable[[], float]) -> tuple[float, float]:
    """Seconds of `a`, and how many times as long `b` takes: the median over rounds of the ratio in
    a round, so that what slows both changes nothing. There are rounds until the 95 % interval of
    that median (1.57 interquartile ranges over the root of their number) is within `STEADY`.

    Raises:
        BadClock: `MOST` rounds do not settle it, or `a` takes no time.
    """
    seconds: list[float] = []
    ratios: list[float] = []
    while len(ratios) < MOST:
        for _ in range(ROUNDS):
            seconds.append(a())
            if not seconds[-1] > 0:
                raise BadClock(f"work of a millisecond or more took {seconds[-1]} s")
            ratios.append(b() / seconds[-1])
        low, middle, high = statistics.quantiles(ratios, n=4)
        if 1.57 * (high - low) / len(ratios) ** 0.5 <= STEADY * middle:
            return statistics.median(seconds), middle
    raise BadClock(f"the same two works took {low:.2f} to {high:.2f} times as long as each other")


def _findings(device: torch.device, clock: str, repeat: Repeat) -> dict[str, float]:
    def read(work: Work) -> float:
        return timing.measure(work, device).seconds(clock)

    nap = timing.measure(lambda: time.sleep(NAP), device)
    for seconds, wrong, kind in (
        (nap.wall, nap.wall < NAP, "wall"),
        (nap.process, nap.process > NAP / 4, "CPU"),
    ):
        if wrong:
            raise BadClock(
                f"a nap of {NAP * 1e3:.0f} ms took {seconds * 1e3:.3f} ms of {kind} time"
            )

    _, ratio = settled(lambda: read(repeat(1)), lambda: read(repeat(2)))
    if not RATIO[0] <= ratio <= RATIO[1]:
        raise BadClock(f"twice the work took {ratio:.2f} times as long, expected about 2")

    expected, agreement = settled(
        lambda: by_the_host(repeat(4), device, clock), lambda: read(repeat(4))
    )
    if not AGREEMENT[0] <= agreement <= AGREEMENT[1]:
        raise BadClock(
            f"{expected * 1e3:.1f} ms by another clock took {agreement:.2g} times as long"
        )

    # a coarse clock shows none below its tick, and one that counts itself none below its own time
    growing = [min(read(lambda n=2**n: sum(range(n))) for _ in range(3)) for n in range(12)]
    finest = min((seconds for seconds in growing if seconds > 0), default=float("inf"))
    if finest > FINEST:
        raise BadClock(
            f"the shortest reading is {finest * 1e6:.0f} us, expected less than {FINEST * 1e6:.0f}"
        )
    return {"work_x2": ratio, "agreement": agreement, "finest_us": finest * 1e6}


def products(device: torch.device) -> Repeat:
    """n times the same product, a piece of about `PIECE` seconds."""
    a = torch.randn([2048 if device.type == "cuda" else 192] * 2, device=device)
    out = torch.empty_like(a)

    def times(count: int) -> Work:
        def work() -> None:
            for _ in range(count):
                torch.mm(a, a, out=out)

        return work

    times(20)()  # threads and library code come up
    one = by_the_host(times(20), device, "wall") / 20
    per_piece = max(1, round(PIECE / one))
    return lambda n: times(n * per_piece)


def by_the_host(work: Work, device: torch.device, clock: str) -> float:
    """Seconds of `work` by a clock that `timing.measure` has no part in."""
    now = time.process_time if clock == "process" else time.perf_counter
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = now()
    work()
    wait()
    return now() - start
