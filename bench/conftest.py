"""Options, the `replay` fixture that every benchmark uses, and the table at the end."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import timm
import torch

from . import clock, roofline, table
from .runner import Group, Outcome, Settings, run_group
from .timing import CLOCKS, Replay, default_clock

GROUPS = pytest.StashKey[dict[str, Group]]()
OUTCOMES = pytest.StashKey[dict[str, dict[str, Outcome]]]()
SETTINGS = pytest.StashKey[Settings]()
STARTED = pytest.StashKey[float]()
CLOCK_TEST = pytest.StashKey[dict[str, float]]()  # what the check of the clock found

CLOCK_FAILED = 6  # exit code of a session whose clock is wrong; pytest's own end at 5


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
    config = session.config
    option = config.getoption
    if option("quick") and option("full"):
        raise pytest.UsageError("--quick and --full exclude each other")
    for name in ("threads", "rounds", "batch"):
        if option(name) is not None and option(name) < 1:
            raise pytest.UsageError(f"--{name} must be at least 1, got {option(name)}")
    device = torch.device(option("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = "full" if option("full") else "quick" if option("quick") else "default"
    if config._benchmarksession.disabled:
        size = "smoke"
    reading = option("clock") or default_clock(device)
    if reading == "device" and device.type != "cuda":
        raise pytest.UsageError("--clock device needs --device cuda")
    config.stash[SETTINGS] = Settings(
        size, option("threads"), option("rounds"), option("batch"), device, reading
    )
    config.stash[GROUPS], config.stash[OUTCOMES] = {}, {}
    config.stash[STARTED] = time.monotonic()
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # the patch embedding of an fp32 reference
    torch.set_num_threads(option("threads"))
    # Inductor's cached CPU code keeps the thread count of the run that compiled it
    cache = Path(tempfile.gettempdir()) / f"pae_bench_inductor_{option('threads')}_threads"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    config._benchmarksession.quiet = True  # the table below says more in less
    if size != "smoke" and not option("collectonly"):
        try:
            config.stash[CLOCK_TEST] = clock.check(device, reading)
        except clock.BadClock as error:
            pytest.exit(f"no time can be trusted here: {error}", CLOCK_FAILED)


def pytest_ignore_collect(collection_path, config):
    """Found on the way from a folder above, there are no options of ours: not asked for."""
    return None if SETTINGS in config.stash else True


def pytest_generate_tests(metafunc):
    if "replay" not in metafunc.fixturenames:
        return
    groups = {g.name: g for g in metafunc.module.groups(metafunc.config.stash[SETTINGS])}
    metafunc.config.stash[GROUPS].update(groups)
    pairs = [(g.name, p.name) for g in groups.values() if not g.left_out for p in g.providers]
    metafunc.parametrize(("group", "provider"), pairs, ids=[f"{g}:{p}" for g, p in pairs])


@pytest.fixture
def replay(request, group, provider):
    """Give `benchmark` the samples of this row; the first row of a group runs all of it."""
    config = request.config
    settings, chosen = config.stash[SETTINGS], config.stash[GROUPS][group]
    outcomes = config.stash[OUTCOMES]
    if group not in outcomes:
        params = [getattr(item, "callspec", None) for item in request.session.items]
        names = {c.params["provider"] for c in params if c and c.params.get("group") == group}
        limit = config.getoption("--seconds")
        if limit is not None and time.monotonic() - config.stash[STARTED] > limit:
            reason = f"no time left: {limit:.0f} seconds had passed"
            outcomes[group] = {name: Outcome(reason=reason) for name in names}
        else:
            outcomes[group] = run_group(chosen, names, settings)
    outcome = outcomes[group][provider]

    def record(benchmark):
        if outcome.reason:
            pytest.skip(outcome.reason)
        if outcome.error is not None:
            raise outcome.error
        benchmark.group = group
        benchmark.extra_info = {
            "provider": provider,
            "clock": settings.clock,
            "unit": chosen.unit,
            "baselines": list(chosen.baselines),
            "columns": outcome.columns,
            "wall_seconds": [s.wall / outcome.units for s in outcome.samples],
            "process_seconds": [s.process / outcome.units for s in outcome.samples],
        }
        if settings.size == "smoke":
            benchmark.pedantic(lambda: None)
        else:
            seconds = [s.seconds(settings.clock) / outcome.units for s in outcome.samples]
            Replay(seconds, f"{settings.clock} time").record(benchmark)

    return record


def _machine(config) -> dict:
    """What a reader needs to judge the times; nothing that names the machine."""
    settings = config.stash[SETTINGS]
    on_gpu = settings.device.type == "cuda"
    if on_gpu:
        processor = torch.cuda.get_device_name(settings.device)
        device = {
            "driver": _driver(),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    else:
        processor = f"{_cpu_model()} ({torch.backends.cpu.get_cpu_capability()})"
        device = {}
    read = {"clock": settings.clock}
    if CLOCK_TEST in config.stash:
        read["clock test"] = clock.summary(config.stash[CLOCK_TEST])
    return {
        "device": processor,
        **device,
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "system": f"{platform.system()} {platform.machine()}",
        "shapes": "real" if on_gpu else "small",
        **read,
        "fp32 products": torch.get_float32_matmul_precision(),
        **roofline.measured(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": timm.__version__,
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _driver() -> str:
    """Version of the GPU's driver, as its own tool gives it."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return "unknown"
    ask = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer[0] if answer else "unknown"


def _cpu_model() -> str:
    from cpuinfo import get_cpu_info

    return get_cpu_info().get("brand_raw", platform.processor() or "unknown CPU")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    from pytest_benchmark.utils import get_commit_info

    if given := os.environ.get("PAE_COMMIT"):  # of a copy of the tree without its history
        return given
    info = get_commit_info()
    if not info.get("id") or info["id"] == "unknown":
        return "unknown"
    return info["id"][:12] + (" and uncommitted changes" if info.get("dirty") else "")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info["summary"] = _machine(config)
    machine_info["clock_test"] = config.stash.get(CLOCK_TEST, None)


def pytest_benchmark_update_commit_info(config, commit_info):
    for name in set(commit_info) - {"id", "dirty", "time"}:
        del commit_info[name]


def _left_out(config) -> dict:
    groups = config.stash[GROUPS]
    providers = [
        {"group": group, "provider": name, "reason": outcome.reason or f"failed: {outcome.error}"}
        for group, outcomes in config.stash[OUTCOMES].items()
        for name, outcome in outcomes.items()
        if outcome.reason or outcome.error
    ]
    return {
        "groups": {g.name: g.left_out for g in groups.values() if g.left_out},
        "providers": providers,
    }


def pytest_benchmark_update_json(config, output_json):
    output_json["left_out"] = _left_out(config)


def pytest_terminal_summary(terminalreporter, config):
    settings = config.stash.get(SETTINGS, None)
    if settings is None or settings.size == "smoke" or not config.stash[OUTCOMES]:
        return
    rows = []
    for name, outcomes in config.stash[OUTCOMES].items():
        group = config.stash[GROUPS][name]
        for provider, outcome in outcomes.items():
            seconds = [s.seconds(settings.clock) / outcome.units for s in outcome.samples]
            reason = outcome.reason or (f"failed: {outcome.error}" if outcome.error else "")
            rows.append(
                table.Row(
                    name,
                    provider,
                    seconds,
                    reason,
                    settings.clock,
                    group.unit,
                    group.baselines,
                    outcome.columns,
                )
            )
    terminalreporter.section("pae benchmarks")
    left_out = _left_out(config)["groups"]
    terminalreporter.write_line(table.render(rows, left_out, _machine(config)))
