"""A disk that fails, or a process that dies, at the n-th call that changes something in a folder.

    with Faults(folder, at=7, how="ENOSPC") as faults:
        main([...])
    faults.calls  # ["mkdir run", "open .lock", ...], up to the one that failed

Counted are mkdir, rmdir, unlink, rename, replace, link, an open that may write, write, truncate,
fsync, and safetensors's own writing. A write that fails has written half.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
from pathlib import Path

import safetensors.torch

KILL = "kill"
KILLED = 77  # the status of a process that `how=KILL` ended
_truncate = os.truncate
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Faults:
    """Counts the calls below `folder`, and makes number `at` (from 0) fail or end the process.

    Args:
        folder: what lies elsewhere is left alone.
        at: None counts only.
        how: the name of an errno, or KILL.
    """

    def __init__(self, folder, at=None, how="ENOSPC"):
        self.folder, self.at, self.how = os.path.abspath(folder), at, how
        self.calls = []

    @property
    def happened(self):
        return self.at is not None and len(self.calls) > self.at

    def __enter__(self):
        self._restore = contextlib.ExitStack()
        for name in ("mkdir", "rmdir", "unlink", "remove", "truncate"):
            self._replace(os, name, self._on_path(name, getattr(os, name)))
        for name in ("rename", "replace", "link"):
            self._replace(os, name, self._on_path(name, getattr(os, name), which=1))
        for name in ("fsync", "ftruncate"):
            self._replace(os, name, self._on_file(name, getattr(os, name)))
        for name in ("write", "pwrite"):
            self._replace(os, name, self._write(name, getattr(os, name)))
        self._replace(os, "open", self._os_open(os.open))
        opener = self._open(builtins.open)
        self._replace(builtins, "open", opener)
        self._replace(io, "open", opener)
        save = safetensors.torch.save_file
        self._replace(safetensors.torch, "save_file", self._save_file(save))
        return self

    def __exit__(self, *exception):
        self._restore.close()

    def _replace(self, module, name, new):
        self._restore.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, new)

    def _inside(self, path):
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return False
        path = os.path.abspath(os.fspath(path))
        return path == self.folder or path.startswith(self.folder + os.sep)

    def _call(self, name, path, half=None):
        """Notes one call, and lets it fail if it is its turn; `half` is what has happened then."""
        if not self._inside(path):
            return
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        self.calls.append(f"{name} {Path(os.fspath(path)).name}")
        if len(self.calls) - 1 != self.at:
            return
        if half is not None:
            half()
        if self.how == KILL:
            os._exit(KILLED)
        number = getattr(errno, self.how)
        raise OSError(number, os.strerror(number), os.fspath(path))

    def _on_path(self, name, real, which=0):
        def call(*paths, **options):
            self._call(name, paths[which])
            return real(*paths, **options)

        return call

    def _on_file(self, name, real):
        def call(number, *rest):
            self._call(name, number)
            return real(number, *rest)

        return call

    def _write(self, name, real):
        def call(number, data, *rest):
            half = bytes(data)[: len(data) // 2]
            self._call(name, number, lambda: real(number, half, *rest))
            return real(number, data, *rest)

        return call

    def _os_open(self, real):
        def call(path, flags, *rest, **options):
            if flags & _WRITES:
                self._call("open", path)
            return real(path, flags, *rest, **options)

        return call

    def _open(self, real):
        def call(file, mode="r", *rest, **options):
            if not set(mode) & set("wax+") or not self._inside(file):
                return real(file, mode, *rest, **options)
            if not isinstance(file, int):
                self._call("open", file)
            return _Written(self, file, real(file, mode, *rest, **options))

        return call

    def _save_file(self, real):
        def call(tensors, path, *rest, **options):
            real(tensors, path, *rest, **options)
            size = os.path.getsize(path)
            self._call("write", path, lambda: _truncate(path, size // 2))

        return call


class _Written:
    """An open file whose writes count."""

    def __init__(self, faults, path, file):
        self._faults, self._path, self._file = faults, path, file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *exception):
        return self._file.__exit__(*exception)

    def write(self, data):
        def half():
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._faults._call("write", self._path, half)
        return self._file.write(data)
