"""Options, the `replay` fixture that every benchmark uses, and the table at the end."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import collect_env

from . import clock, lines, roofline, table
from .results import DESCRIBED, Row, Run
from .runner import Group, Settings, run_group
from .timing import CLOCKS

CLOCK_FAILED = 6  # exit code of a session whose clock is wrong; pytest's own end at 5


@dataclass
class State:
    """What this session runs, and what came of it: rows by group and provider.

    Where the environment names a file of lines (PAE_LINES), rows and rounds go there as they come;
    `before` are the providers, by group, that it holds already with all their rounds.
    """

    settings: Settings
    started: float = field(default_factory=time.monotonic)
    began: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat())
    clock_test: dict[str, float] | None = None
    written: lines.Rows | None = None
    groups: dict[str, Group] = field(default_factory=dict)
    rows: dict[str, dict[str, Row]] = field(default_factory=dict)
    before: dict[str, set[str]] = field(default_factory=dict)

    def left_out(self) -> dict[str, str]:
        return {g.name: g.left_out for g in self.groups.values() if g.left_out}


STATE = pytest.StashKey[State]()


def pytest_addoption(parser):
    group = parser.getgroup("pae benchmarks")
    group.addoption("--quick", action="store_true", help="few groups: four minutes on 2 cores")
    group.addoption("--full", action="store_true", help="all groups, torch.compile too: an hour")
    group.addoption("--threads", type=int, default=1, help="CPU threads (default 1: steadiest)")
    group.addoption("--rounds", type=int, help="rounds of every group (default: the group's own)")
    group.addoption("--batch", type=int, help="images per step (default: the group's own)")
    group.addoption("--seconds", type=float, help="start no group when so many have passed")
    group.addoption("--device", help="cpu or cuda (default: cuda where there is one)")
    group.addoption("--clock", choices=CLOCKS, help="default: device on cuda, else process")


def pytest_sessionstart(session):
    config, option = session.config, session.config.getoption
    if option("quick") and option("full"):
        raise pytest.UsageError("--quick and --full exclude each other")
    for name in ("threads", "rounds", "batch"):
        if option(name) is not None and option(name) < 1:
            raise pytest.UsageError(f"--{name} must be at least 1, got {option(name)}")
    device = torch.device(option("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    reading = option("clock") or ("device" if on_gpu else "process")
    if reading == "device" and not on_gpu:
        raise pytest.UsageError("--clock device needs --device cuda")
    size = "full" if option("full") else "quick" if option("quick") else "default"
    size = "smoke" if config._benchmarksession.disabled else size
    numbers = option("threads"), option("rounds"), option("batch")
    state = config.stash[STATE] = State(Settings(size, *numbers, device, reading))
    if os.environ.get("PAE_LINES") and size != "smoke":
        path = Path(os.environ["PAE_LINES"])
        state.written = lines.Rows(path, state.began)
        for (_, group), rows in lines.rows(lines.read(path)).items():
            whole = {name for name, row in rows.items() if lines.is_whole(row)}
            state.before.setdefault(group, set()).update(whole)
    if on_gpu:
        torch.backends.cudnn.allow_tf32 = False  # the patch embedding of an fp32 reference
    torch.set_num_threads(option("threads"))
    # Inductor's cached CPU code keeps the thread count of the run that compiled it
    cache = Path(tempfile.gettempdir()) / f"pae_bench_inductor_{option('threads')}_threads"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    config._benchmarksession.quiet = True  # the table below says more in less
    gc.freeze()  # collections between groups need not look at what imports left
    if size != "smoke" and not option("collectonly"):
        try:
            state.clock_test = clock.check(device, reading)
        except clock.BadClock as error:
            pytest.exit(f"no time can be trusted here: {error}", CLOCK_FAILED)


def pytest_ignore_collect(collection_path, config):
    """Found on the way from a folder above, there are no options of ours: not asked for."""
    return None if STATE in config.stash else True


def pytest_generate_tests(metafunc):
    if "replay" not in metafunc.fixturenames:
        return
    state = metafunc.config.stash[STATE]
    groups = {g.name: g for g in metafunc.module.groups(state.settings)}
    state.groups.update(groups)
    pairs = [(g.name, p.name) for g in groups.values() if not g.left_out for p in g.providers]
    metafunc.parametrize(("group", "provider"), pairs, ids=[f"{g}:{p}" for g, p in pairs])


@pytest.fixture
def replay(request, group: str, provider: str) -> Callable:
    """Give `benchmark` the samples of this row; the first row of a group runs all of it.

    pytest-benchmark would time one row after the other, so a machine that slows down half-way
    would change the ratios.
    """
    state = request.config.stash[STATE]
    settings = state.settings
    if group not in state.rows:
        params = [getattr(item, "callspec", None) for item in request.session.items]
        names = {c.params["provider"] for c in params if c and c.params.get("group") == group}
        limit = request.config.getoption("--seconds")
        if limit is not None and time.monotonic() - state.started > limit:
            reason = f"no time left: {limit:.0f} seconds had passed"
            state.rows[group] = {name: Row(group, name, reason=reason) for name in names}
        elif names <= state.before.get(group, set()):
            state.rows[group] = {name: Row(group, name, reason="measured before") for name in names}
        else:
            here, written = state.groups[group], state.written
            if written:
                written.where(_machine(request.config))
            state.rows[group] = run_group(here, names, settings, written)
            if written:
                written.where(_machine(request.config))  # with the ceilings that it needed
    row = state.rows[group][provider]

    def record(benchmark) -> None:
        if row.error is not None:
            raise row.error
        if row.reason:
            pytest.skip(row.reason)
        benchmark.group = group
        benchmark.extra_info = {name: getattr(row, name) for name in DESCRIBED}
        benchmark.extra_info |= {f"{name}_seconds": row.read(name) for name in CLOCKS[1:]}
        if settings.size == "smoke":
            benchmark.pedantic(lambda: None)
        else:
            _show(benchmark, row.seconds, f"{settings.clock} time")

    return record


def _show(benchmark, seconds: Sequence[float], name: str) -> None:
    """Make `seconds` the rounds of `benchmark`: its timer moves on by one of them in each."""
    now, left = 0.0, iter(seconds)

    def advance() -> None:
        nonlocal now
        now += next(left)

    def timer() -> float:
        return now

    timer.__name__ = name  # what the JSON calls it
    benchmark._timer = timer
    benchmark.pedantic(advance, rounds=len(seconds), iterations=1)


def _machine(config) -> dict[str, Any]:
    """What a reader needs to judge the times; nothing that names the machine."""
    state = config.stash[STATE]
    settings = state.settings
    device = {"device": roofline.device_name(settings.device)}
    if settings.on_gpu:
        cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
        device |= {"driver": _driver(), "CUDA": cuda, "cuDNN": cudnn}
    else:
        device["device"] += f" ({torch.backends.cpu.get_cpu_capability()})"
        device["bf16 instructions"] = ", ".join(roofline.bf16_instructions()) or "none"
    tested = {"clock test": clock.summary(state.clock_test)} if state.clock_test else {}
    return {
        **device,
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "system": f"{platform.system()} {platform.machine()}",
        "shapes": "real" if settings.on_gpu else "small",
        "clock": settings.clock,
        **tested,
        "fp32 products": torch.get_float32_matmul_precision(),
        **roofline.measured(),
        "torch": torch.__version__,
        **{package: _version(package) for package in ("triton", "timm", "numpy")},
        "python": platform.python_version(),
        "commit": _commit(),
    }


@lru_cache
def _driver() -> str:
    return collect_env.get_nvidia_driver_version(collect_env.run) or "unknown"


def _version(package: str) -> str:
    found = importlib.metadata.distributions(name=package)
    return next((distribution.version for distribution in found), "none")


@lru_cache
def _commit() -> str:
    from pytest_benchmark.utils import get_commit_info

    info = get_commit_info()
    dirty = " and uncommitted changes" if info.get("dirty") else ""
    here = (info.get("id") or "unknown")[:12]
    return os.environ.get("PAE_COMMIT") or here + dirty  # a copy of the tree has no history


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info["summary"] = _machine(config)
    machine_info["clock_test"] = config.stash[STATE].clock_test


def pytest_benchmark_update_commit_info(config, commit_info):
    for name in set(commit_info) - {"id", "dirty", "time"}:
        del commit_info[name]


def pytest_benchmark_update_json(config, output_json):
    state = config.stash[STATE]
    reasons = [
        {"group": row.group, "provider": row.provider, "reason": row.reason}
        for rows in state.rows.values()
        for row in rows.values()
        if row.reason
    ]
    output_json["left_out"] = {"groups": state.left_out(), "providers": reasons}


def pytest_terminal_summary(terminalreporter, config):
    state = config.stash.get(STATE, None)
    if state is None or state.settings.size == "smoke" or not state.rows:
        return
    groups = {name: list(rows.values()) for name, rows in state.rows.items()}
    run = Run("", "", _machine(config), groups, state.left_out())
    terminalreporter.section("pae benchmarks")
    terminalreporter.write_line(table.render(run))
