"""Executors: they start what has no record, in this process or in several here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch

from pae.sweep import progress, work
from pae.sweep.plan import Run
from pae.sweep.records import Records
from pae.sweep.shared import Shared
from pae.sweep.spec import Sweep
from pae.train import lock
from pae.train.report import Reporter

Say = Callable[[str], None]
_PAUSE = 1.0  # seconds between two looks at what others do


def serial(
    sweep: Sweep,
    records: Records,
    reporter: Reporter,
    say: Say,
    only: Iterable[Run] | None = None,
    workers: int | None = None,
) -> None:
    """Runs what is left, one after the other, until nothing is; beside any number of processes that
    do the same.

    Args:
        sweep: what to run.
        records: of its folder.
        reporter: what a run says.
        say: told a line for every run that ends here.
        only: these runs, in place of all.
        workers: threads or processes that decode, where the spec does not say.
    Raises:
        Interrupted, KeyboardInterrupt: a stop was asked for.
    """
    shared = Shared(workers)
    chosen = None if only is None else list(only)
    while True:
        records.refresh()
        left = False
        for run in sweep.plan.runs(records) if chosen is None else chosen:
            if run.is_done(records):
                continue
            left = True
            try:
                record = work.do(sweep, records, run, reporter, shared)
            except lock.InUse:
                continue
            if record is not None:
                now = progress.progress(sweep.plan, records)
                say(f"{run}: {progress.outcome(record)}; {now.line()}")
            break  # a choice may be known by now
        else:
            if not left:
                return
            time.sleep(_PAUSE)  # others are at all of them; then there may be more


def processes(sweep: Sweep, records: Records, jobs: int, command: Sequence[str], say: Say) -> None:
    """The same by several processes, each of them `serial`, which this one watches over.

    One that dies is started again, and its run goes on from its state; a run that two of them died
    of becomes a failed one. All of them stop when this process ends, however it ends.

    Args:
        sweep, records, say: as for `serial`.
        jobs: how many there are at a time.
        command: starts one of them; it must call `worker`.
    Raises:
        KeyboardInterrupt: a stop was asked for, of this process or of one of the others.
        RuntimeError: they end before they begin.
    """
    watched = Watched(sweep, records, say)
    deaths: Counter[str] = Counter()
    workers: list[subprocess.Popen[bytes]] = []
    threads = max(1, cpus() // jobs)
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **{name: str(threads) for name in variables}}

    def start() -> None:
        # in a session of its own: a Ctrl-C is for this process, which stops the others
        workers.append(
            subprocess.Popen(
                [*command, str(threads)],
                stdin=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        )

    try:
        for _ in range(min(jobs, len(watched.left()))):
            start()
        while workers:
            time.sleep(_PAUSE / 2)
            watched.tell(jobs)
            for process in list(workers):
                status = process.poll()
                if status is None:
                    continue
                workers.remove(process)
                if status == 0:
                    continue
                if status in (2, 130):  # it has said why; or it was asked to stop
                    raise KeyboardInterrupt if status == 130 else SystemExit(2)
                run = watched.held_by(process.pid)
                deaths[run.key if run else ""] += 1
                how = signal.Signals(-status).name if status < 0 else f"status {status}"
                if run is None and deaths[""] > jobs:
                    raise RuntimeError(f"the processes of --jobs end before they begin, by {how}")
                if run is not None and deaths[run.key] > 1:
                    memory = ": as a system does that runs out of memory" * (how == "SIGKILL")
                    reason = f"its process was ended by {how}, twice{memory}"
                    work.failed(sweep, records, run, reason)
                elif run is not None:
                    say(f"{run}: its process was ended by {how}; it goes on in another one")
                if watched.left():
                    start()
    finally:
        for process in workers:
            process.terminate()
        for process in workers:
            process.wait()
    watched.tell(jobs)


def worker(sweep: Sweep, records: Records, reporter: Reporter, threads: int, parent: int) -> None:
    """What a process of `processes` does.

    Args:
        sweep, records, reporter: as for `serial`.
        threads: that it may use.
        parent: the descriptor of a pipe that its parent holds open as long as it lives.
    Raises:
        Interrupted, KeyboardInterrupt: a stop was asked for, or the parent is gone.
    """
    torch.set_num_threads(threads)

    def follow() -> None:
        while os.read(parent, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    serial(sweep, records, reporter, lambda line: None, workers=threads)


class Watched:
    """The sweep, as a process sees it in which nothing runs."""

    def __init__(self, sweep: Sweep, records: Records, say: Say) -> None:
        self.sweep, self.records, self.say = sweep, records, say
        records.refresh()
        self.told = {(key, records[key]["test"] is None) for key in records}

    def left(self) -> list[Run]:
        self.records.refresh()
        return [r for r in self.sweep.plan.runs(self.records) if not r.is_done(self.records)]

    def tell(self, jobs: int) -> None:
        """A line for every run that has ended since the last time."""
        self.records.refresh()
        for run in self.sweep.plan.runs(self.records):
            record = self.records.get(run.key)
            if record is None or (run.key, record["test"] is None) in self.told:
                continue
            self.told.add((run.key, record["test"] is None))
            now = progress.progress(self.sweep.plan, self.records)
            self.say(f"{run}: {progress.outcome(record)}; {now.line(jobs)}")

    def held_by(self, pid: int) -> Run | None:
        """The run whose lock a process that has died held."""
        for run in self.left():
            holder = lock.holder(self.records.path(run.key))
            if holder["pid"] == pid and holder["host"] == socket.gethostname():
                return run
        return None


def cpus() -> int:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
