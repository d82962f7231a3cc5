"""The executor on a Ray cluster: Ray says where and when, the records say what is done.

All runs that are known and missing are one experiment of Ray Tune, a trial each; chosen cells are
the next one. Nothing of Ray is gone on with: a trial that is started again, or a call after a kill,
finds the state in the run's folder, which all machines share. So its experiment folder is thrown
away, and nothing depends on it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pae.sweep import work
from pae.sweep.execute import Say, Watched, cpus
from pae.sweep.plan import Run
from pae.sweep.records import Records
from pae.sweep.shared import Shared
from pae.sweep.spec import Sweep
from pae.train import lock
from pae.train.scores import score_of

Report = Callable[[dict[str, Any]], None]
RETRIES = 3  # of a trial whose process died
_FOLDER = "ray"
_PAUSE = 5.0  # seconds before runs that others have are asked for again
_ADVICE = (
    'pae sweep --ray needs Ray, which is not installed: pip install "pae[sweep]"; --jobs N runs '
    "here without"
)


class Ended(NamedTuple):
    """A trial that has ended: its run's key, epochs that it told of, and why it failed, if so."""

    key: str
    epochs: int
    error: str | None


class Engine(Protocol):
    """What starts `trial` for every key, `at_once` at most, and again where its process dies."""

    at_once: int

    def fit(
        self, trial: Callable[..., None], keys: list[str], look: Callable[[], None], stops: bool
    ) -> list[Ended]:
        """Runs ``trial(key, report)`` for every key; calls `look` now and then; `stops` says
        whether those may be stopped early that are behind others of them.
        """


def run(sweep: Sweep, records: Records, engine: Engine, say: Say) -> None:
    """Runs what is left on an engine, until nothing is.

    Args:
        sweep: what to run.
        records: of its folder, which every machine sees under the same name.
        engine: Ray, or what stands in for it.
        say: told a line for every run that ends.
    """
    watched = Watched(sweep, records, say)
    while left := watched.left():
        for stops, wanted in _experiments(sweep, left):
            trial = partial(_trial, sweep=sweep, folder=records.folder, runs=wanted, tells=stops)
            ended = engine.fit(trial, list(wanted), lambda: watched.tell(engine.at_once), stops)
            records.refresh()
            for key, epochs, error in ended:
                if wanted[key].is_done(records):
                    continue
                if error is not None:
                    work.failed(sweep, records, wanted[key], error)
                elif stops and epochs:
                    reason = f"by ASHA after epoch {epochs}"
                    work.stopped(sweep, records, wanted[key], reason)
            watched.tell(engine.at_once)
        if all(not run.is_done(records) for run in left):
            time.sleep(_PAUSE)  # others have them all


def _experiments(sweep: Sweep, left: list[Run]) -> Iterator[tuple[bool, dict[str, Run]]]:
    """Runs that go on side by side, by key, and whether some of them may be stopped early: those
    of one grid, which alone can be compared. A run that is tested stands in for its training.
    """
    if sweep.asha is None:
        yield False, {run.key: run for run in left}
        return
    tested = {run.key: run for run in left if run.test}
    for group in dict.fromkeys((run.task, run.method) for run in left):
        grid = {r.key: r for r in left if (r.task, r.method) == group and r.key not in tested}
        if grid:
            yield True, grid
    if tested:
        yield False, tested


def _trial(
    key: str, report: Report, *, sweep: Sweep, folder: Path, runs: dict[str, Run], tells: bool
) -> None:
    """One run, wherever it is started; ends at once where another process has it."""

    def on_epoch(row: dict[str, Any]) -> None:
        if tells:
            report({"val": score_of(row), "epoch": row["epoch"]})

    with contextlib.suppress(lock.InUse):
        shared = Shared(int(os.environ.get("OMP_NUM_THREADS", "1")))
        work.do(sweep, Records(folder), runs[key], work.Quiet(quiet=True), shared, on_epoch)


# ---- Ray


class Ray:
    """Ray Tune as an `Engine`; `close` it.

    Args:
        address: "local" begins a cluster here, "auto" finds the one that is running, or HOST:PORT.
        sweep: what runs: the scheduler, and whether GPUs are wanted.
        folder: of the sweep, for what Ray wants to write.
        run_cpus, run_gpus: of a run; by default one CPU, and one GPU where the cluster has some and
            the spec does not say `device = "cpu"`.
    Raises:
        ImportError: Ray is not installed.
        ValueError: there is no such cluster, or it has less than a run takes.
    """

    def __init__(
        self,
        address: str,
        sweep: Sweep,
        folder: Path,
        run_cpus: int = 1,
        run_gpus: float | None = None,
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it calls home
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C is ours
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        try:
            import ray
            from ray import tune
        except ImportError as error:
            raise ImportError(_ADVICE) from error
        self.ray, self.tune = ray, tune
        self.sweep, self.folder = sweep, folder.resolve() / _FOLDER
        local = {"num_cpus": cpus(), "include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error", **local)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(f"--ray {address}: {error}") from error
        have = ray.cluster_resources()
        wants = any(options.device != "cpu" for options in sweep.options.values())
        gpus = float(bool(wants and have.get("GPU"))) if run_gpus is None else run_gpus
        self.resources = {"cpu": float(run_cpus), "gpu": gpus}
        self.at_once = sys.maxsize
        for name, each in self.resources.items():
            if each:
                self.at_once = min(self.at_once, int(have.get(name.upper(), 0) / each))
        if not self.at_once:
            self.close()
            raise ValueError(
                f"--ray {address}: a run takes {run_cpus} CPUs and {gpus:g} GPUs, and the cluster "
                f"has {have.get('CPU', 0):g} and {have.get('GPU', 0):g}"
            )

    def close(self) -> None:
        """Leaves the cluster; one that was begun here ends."""
        self.ray.shutdown()

    def fit(
        self, trial: Callable[..., None], keys: list[str], look: Callable[[], None], stops: bool
    ) -> list[Ended]:
        """See `Engine`."""
        tune = self.tune
        scheduler = None
        if stops and self.sweep.asha is not None:
            scheduler = tune.schedulers.ASHAScheduler(
                time_attr="epoch",
                metric="val",
                mode="max",
                max_t=10**6,  # a run ends by itself
                grace_period=self.sweep.asha["grace"],
                reduction_factor=self.sweep.asha["reduction"],
            )

        class Look(tune.Callback):  # type: ignore[name-defined]
            def on_step_end(self, iteration: int, trials: Any, **more: Any) -> None:
                look()

        threads = int(self.resources["cpu"])
        body = tune.with_parameters(_on_worker, trial=trial, threads=threads)
        with self._experiment() as name:
            grid = tune.Tuner(
                tune.with_resources(body, self.resources),
                param_space={"key": tune.grid_search(keys)},
                tune_config=tune.TuneConfig(scheduler=scheduler),
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=str(self.folder),
                    failure_config=tune.FailureConfig(max_failures=RETRIES),
                    callbacks=[Look()],
                    verbose=0,
                ),
            ).fit()
            return [
                Ended(
                    result.config["key"],
                    int((result.metrics or {}).get("epoch", 0)),
                    None
                    if result.error is None
                    else f"its process on the cluster ended {RETRIES + 1} times: "
                    f"{type(result.error).__name__}",
                )
                for result in grid
            ]

    @contextlib.contextmanager
    def _experiment(self) -> Iterator[str]:
        """The name of a new experiment, whose folder goes with it, as do those of dead calls."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.iterdir():
            with contextlib.suppress(OSError, lock.InUse):
                hold = lock.Hold(old)
                shutil.rmtree(old, ignore_errors=True)
                hold.release()
        mine = self.folder / uuid.uuid4().hex[:12]
        mine.mkdir()
        hold = lock.Hold(mine)
        try:
            yield mine.name
        finally:
            shutil.rmtree(mine, ignore_errors=True)
            hold.release()
            with contextlib.suppress(OSError):
                self.folder.rmdir()


def _on_worker(config: dict[str, Any], trial: Callable[..., None], threads: int) -> None:
    """What Ray calls: a trial in a process of the cluster."""
    import torch
    from ray import tune

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    trial(config["key"], tune.report)
