"""One process at a time in a folder.

A hold is a `flock` on ``FOLDER/.lock``: the kernel gives it back however the process ends, on local
disks and on network file systems that pass locks on (NFS does). The file's text names the holder,
for the message that others get.

Where a file system has no locks, a hold is the file ``FOLDER/.held``, which one process alone can
create and which it changes every few seconds. A process that finds one watches whether it still
changes: neither clocks nor process numbers, which differ between machines, are asked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
import weakref
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

FILES = (".lock", ".held")
_BUSY = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
BEAT = 5.0  # seconds between two changes of .held
ORPHANS = 15.0  # seconds in which what a killed process started notices that it is alone


class InUse(ValueError):
    """Another process holds the folder; the message says which."""


class Hold:
    """The hold of this process on `folder`, which must exist, until `release` or its end.

    Args:
        folder: the folder.
    Raises:
        InUse: another process has it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.fallback = (folder / name for name in FILES)
        self._file: int | None = None
        self._stop: threading.Event | None = None
        self._take()

    def release(self) -> None:
        """Let others in."""
        if self._stop is not None:
            self._stop.set()
            self.fallback.unlink(missing_ok=True)
            self._stop = None
        if self._file is not None:
            # the name goes while it is still locked; `_take` recognises a file without a name
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            self._close()

    def _take(self) -> None:
        named, deadline = time.monotonic() + 0.5, time.monotonic() + ORPHANS
        while True:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if fcntl is None:
                    raise OSError(errno.ENOSYS, "no flock")
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._close()
                if error.errno in _NO_LOCKS:
                    self.path.unlink(missing_ok=True)
                    self._take_without_locks()
                    return
                if error.errno not in _BUSY:
                    raise
                holder = _read(self.path)
                if holder["pid"] is None and time.monotonic() < named:
                    time.sleep(0.02)  # it has just come, and writes its name
                    continue
                if is_dead(holder) and time.monotonic() < deadline:
                    time.sleep(0.2)  # its children hold the lock until they notice
                    continue
                raise _in_use(self.path.parent, holder) from None
            if _same_file(self._file, self.path):
                break
            self._close()  # it was released, and its name taken away, in between
        _held.add(self)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, though it names nobody
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(_this_process()).encode(), 0)

    def _take_without_locks(self) -> None:
        me = {**_this_process(), "id": uuid.uuid4().hex, "beat": 0}
        while True:
            with contextlib.suppress(FileExistsError):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                with os.fdopen(os.open(self.fallback, flags, 0o666), "w") as file:
                    json.dump(me, file)
                break
            holder = _read(self.fallback)
            time.sleep(3 * BEAT)
            if _read(self.fallback) != holder:
                raise _in_use(self.fallback.parent, holder)
            aside = self.fallback.with_name(f".held.{me['id']}.pae-tmp")
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.fallback, aside)
                aside.unlink()
        self._stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(self._stop, me), daemon=True)
        beat.start()

    def _beat(self, stop: threading.Event, me: dict[str, Any]) -> None:
        while not stop.wait(BEAT):
            me["beat"] += 1
            with contextlib.suppress(OSError), open(self.fallback, "r+") as file:
                json.dump(me, file)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


_held: weakref.WeakSet[Hold] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked child: a worker that outlives its killed parent must not keep others out."""
    for hold in list(_held):
        hold._close()
        hold._stop = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _read(path: Path) -> dict[str, Any]:
    """Whom a lock file names: host and pid, None where it names nobody (yet)."""
    nobody = {"host": None, "pid": None}
    try:
        return {**nobody, **json.loads(path.read_bytes())}
    except (OSError, ValueError, TypeError):
        return nobody


def holder(folder: Path) -> dict[str, Any]:
    """Who works in `folder`, or died there: "host" and "pid", None where nobody is named."""
    for name in FILES:
        if (found := _read(folder / name))["pid"] is not None:
            break
    return found


def is_dead(holder: dict[str, Any]) -> bool:
    """Whether the process is known to be gone; of another machine, nothing is known."""
    pid = holder["pid"]
    if holder["host"] != socket.gethostname() or not isinstance(pid, int) or os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # somebody else's, and alive
    return False


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _in_use(folder: Path, holder: dict[str, Any]) -> InUse:
    who = "another process"
    if holder["pid"] is not None:
        who = f"process {holder['pid']} on {holder['host']}"
    return InUse(f"{folder} is in use by {who}; wait for it, or stop it")
