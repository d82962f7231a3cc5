"""The file of a training state: complete at every instant, believed only when it is whole."""

import errno
import os
import stat

import pytest
import torch

import pae
from pae import files
from pae.train.runfolder import RunFolder
from pae.train.state import read_state, write_state


def states(folder):
    """What the folder can go on from: the numbers of the last state and of the one before."""
    run = RunFolder(folder)
    last = run.read_state()
    previous = read_state(run.previous_state)["n"] if run.previous_state.exists() else None
    return None if last is None else last["n"], previous


class Crash(BaseException):
    """The process ends here; nothing catches it."""


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_crash_at_any_moment_leaves_a_complete_state(before, number, tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    for n in range(before):
        run.write_state({"n": n})
    calls = 0

    def crashing(real):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls > number:  # nothing that comes later happens either
                raise Crash
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, crashing(getattr(os, name)))
        with pytest.raises(Crash) if number < calls_of(before) else monkeypatch.context():
            run.write_state({"n": before})
    put_in_place = number >= calls_of(before) - 1  # only the folder was not on the disk yet
    last, _ = states(tmp_path)
    assert last == (before if put_in_place else before - 1 if before else None)
    run.write_state({"n": 9})
    assert states(tmp_path)[0] == 9
    assert not list(tmp_path.glob(files.TEMPORARY))


def calls_of(before):
    """fsync of the file, one rename or two, fsync of the folder."""
    return 3 if before == 0 else 4


def test_the_state_gone_back_to_stays_until_the_next_is_complete(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    for n in range(2):
        run.write_state({"n": n})
    run.state.write_bytes(b"damaged")
    assert run.read_state(previous=True)["n"] == 0
    replace = os.replace

    def look(*arguments):
        assert read_state(run.previous_state)["n"] == 0
        replace(*arguments)

    monkeypatch.setattr(os, "replace", look)
    run.write_state({"n": 7})
    assert states(tmp_path) == (7, 0)
    monkeypatch.undo()
    run.write_state({"n": 8})
    assert states(tmp_path) == (8, 7)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES])
def test_a_file_system_that_cannot_do_it(code, tmp_path, monkeypatch):
    """No hard links, no fsync of folders, or none that may be opened."""
    fsync, opened = os.fsync, os.open

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    def sync(file):
        refuse() if stat.S_ISDIR(os.fstat(file).st_mode) else fsync(file)

    def open_(path, *more, **others):
        refuse() if code == errno.EACCES and os.path.isdir(path) else None
        return opened(path, *more, **others)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "open", open_)
    if code != errno.EACCES:
        monkeypatch.setattr(os, "fsync", sync)
    for n in range(3):
        RunFolder(tmp_path).write_state({"n": n})
    assert states(tmp_path) == (2, 1)


def test_a_disk_that_fails_is_not_ignored(tmp_path, monkeypatch):
    fsync = os.fsync

    def sync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(file)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match=r"Input/output error: '.*state\.pt'"):
        RunFolder(tmp_path).write_state({"n": 1})


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_permissions_are_those_of_other_files(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_state(tmp_path / "state.pt", {}, None)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state.pt").stat().st_mode) == mode


def test_what_is_no_state_is_named(tmp_path):
    path = tmp_path / "state.pt"

    def refused(match):
        with pytest.raises(pae.CheckpointError, match=match) as caught:
            RunFolder(tmp_path).read_state()
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    for make in (os.mkfifo, os.mkdir, lambda p: os.symlink(p, p), lambda p: os.symlink("no", p)):
        make(path)
        refused("expected a state file, found none")
        path.rmdir() if path.is_dir() else path.unlink()
    torch.save({"n": 1}, path)
    refused("half-written or damaged")
    write_state(path, [1], None)  # whole, and something else
    refused("holds a list, not the state of a run")
    write_state(path, {"n": pae.KLD(8)}, None)
    refused("holds something else than the state of a run")
