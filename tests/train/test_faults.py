"""Disks that fail and processes that die at any moment: a run that goes on then equals one that
nothing happened to, bit for bit.

An ordinary run has a dozen faults. With `PAE_FAULTS=100 PAE_KILLS=40 pytest -n0 -s
tests/train/test_faults.py` there are that many of each kind, drawn anew and printed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial

import pytest

from pae.checkpoint import TEMPORARY, write_atomically
from pae.train import methods, report
from pae.train.cli import main
from tests.train.faults import KILL, KILLED, Faults
from tests.train.helpers import (
    BACKBONE_FLAGS,
    CPU_FLAGS,
    assert_same_run,
    ended,
    forked,
    save_shades,
)

FAULTS = int(os.environ.get("PAE_FAULTS", "0"))
KILLS = int(os.environ.get("PAE_KILLS", "0"))
RECIPE = ["--epochs", "2", "--batch-size", "16", "--num-tokens", "2", "--lr", "0.01"]
RUNS = {
    "vpt-deep": ["--method", "vpt-deep", "--dropout", "0.2", "--save-every-steps", "1"],
    "pae": ["--method", "vpt-deep", "--kld", "--mpa", "--kld-dim", "8", "--mpa-window", "8"],
    "full": ["--method", "full", "--augment", "crop"],
    "pro-vpt": ["--method", "pro-vpt", "--method-args", "sweep=reuse", "--save-every-steps", "1"],
    "compare": ["--kld-dim", "8", "--mpa-window", "8", "--mpa-images", "4"],
}


@pytest.fixture(scope="module", autouse=True)
def quicker():
    """A picture is a file like others, and options that are right need no rehearsal."""

    def picture(path, *_):
        write_atomically(path, lambda file: file.write_bytes(b"a picture"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot_curves", picture)
        patch.setattr(methods, "rehearse", lambda options, given: None)
        yield


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("shades"), train=8, test=2)


@pytest.fixture(scope="module")
def command(shades):
    """command(name, folder) -> what begins that run or goes on with it."""
    machine = ["--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, "--quiet"]

    def get(name, folder):
        where = ["--resume", "auto", "--output", str(folder)]
        return ["train", *machine, *RECIPE, *RUNS[name], *where]

    return get


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """whole(name) -> the folder of that run without a fault, and how many calls it had."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            with Faults(folder) as faults:
                assert main(command(name, folder)) == 0
            made[name] = folder, faults.calls
        return made[name]

    return get


def suffer(arguments, folder, at, how):
    """Begins the run, or goes on with it, with a fault; whether the fault was reached."""
    if how == KILL:

        def work():
            with Faults(folder, at, KILL):
                return main(arguments)

        status = ended(forked(work))
        assert status in (KILLED, 0)
        return status == KILLED
    with Faults(folder, at, how) as faults:
        status = main(arguments)  # no exception gets out of it
    # a picture or a table of an epoch that cannot be written costs a warning
    assert status in ((0, 2) if faults.happened else (0,)), faults.calls[-1:]
    return faults.happened


# first and last call, and some of every kind between, by where they are in the run
ORDINARY = [(0.0, "ENOSPC"), (0.05, "EIO"), (0.3, "ENOSPC"), (0.45, "EIO"), (0.6, "ENOSPC")]
ORDINARY += [(0.8, "EIO"), (0.95, "ENOSPC"), (1.0, "EIO")]
ORDINARY += [(0.1, KILL), (0.4, KILL), (0.65, KILL), (0.9, KILL)]


@pytest.mark.parametrize("share, how", ORDINARY)
def test_a_run_survives_a_fault(command, whole, tmp_path, share, how):
    expected, calls = whole("vpt-deep")
    folder = tmp_path / "run"
    arguments = command("vpt-deep", folder)
    assert suffer(arguments, folder, round(share * (len(calls) - 1)), how)
    assert main(arguments) == 0
    assert_same_run(folder, expected)
    assert not list(folder.glob(TEMPORARY))


def same(name, folder, expected):
    parts = ["linear", "vpt-deep", "vpt-deep-pae"] if name == "compare" else ["."]
    for part in parts:
        assert_same_run(folder / part, expected / part)
    if name == "compare":
        assert (folder / "results.json").is_file() and (folder / "results.csv").is_file()


@pytest.fixture
def draw():
    seed = int(os.environ.get("PAE_SEED", random.SystemRandom().randrange(10**6)))
    print(f"\nPAE_SEED={seed}")
    return random.Random(seed)


if FAULTS:

    def test_any_faults(command, whole, tmp_path, draw):
        """Faults at any call of any kind of run, and again while it goes on."""
        happened = 0
        while happened < FAULTS:
            name = draw.choice([*RUNS, "vpt-deep", "vpt-deep"])
            expected, calls = whole(name)
            folder = tmp_path / str(happened) / "run"
            arguments = command(name, folder)
            more = True
            while more:
                at, how = draw.randrange(len(calls)), draw.choice(["ENOSPC", "EIO", KILL])
                reached = suffer(arguments, folder, at, how)
                happened += reached
                print(happened, name, calls[at], at, how, reached, flush=True)
                more = draw.random() < 0.4
            assert main(arguments) == 0
            same(name, folder, expected)


if KILLS:

    def test_any_kills(command, whole, tmp_path, draw):
        """SIGKILL at any moment of any kind of run, until it has come through."""
        kills, seconds = 0, {}
        while kills < KILLS:
            name = draw.choice(list(RUNS))
            expected, _ = whole(name)
            if name not in seconds:
                timed = command(name, tmp_path / f"{name}-timed")
                began = time.perf_counter()
                assert ended(forked(partial(main, timed))) == 0
                seconds[name] = time.perf_counter() - began
            folder = tmp_path / str(kills) / "run"
            arguments, status = command(name, folder), None
            while status != 0:
                child = forked(partial(main, arguments))
                time.sleep(draw.uniform(0, 1.1 * seconds[name]))
                os.kill(child.pid, signal.SIGKILL)
                status = ended(child)
                assert status in (0, -signal.SIGKILL)
                kills += status != 0
            print(kills, name, flush=True)
            same(name, folder, expected)
