"""Files that are whole or not there: writing in one step, and JSON that says when it is damaged.

Imports nothing but the standard library: the command line reads its options with it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import one_line

TEMPORARY = ".*.pae-tmp"  # a glob pattern: files that `write_atomically` is still filling
DIGEST = "digest"  # the name under which a table carries its own
_SHA256 = "sha256-"
_DEEPEST = 100  # tables and lists in one another


def write_atomically(
    path: str | Path, write: Callable[[Path], object], previous: Path | None = None
) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    A crash at any moment leaves the old file or the new one, never a part; with `previous`, the
    old one under one of its two names.

    Args:
        path: its folder is made when it is missing.
        write: called with the temporary file, which it makes.
        previous: the name that the file at `path` gets when the new one takes its place.

    Raises:
        OSError: naming `path`.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device, say: it would be replaced
        kind = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(kind, "no regular file; give another name", str(path))
    # only a part of a long name: what is added must not make it longer than a folder takes
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:12]}.pae-tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            if previous is not None and os.path.lexists(path):
                os.replace(path, previous)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # whatever came before says more
                temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path} cannot be written: {one_line(error)}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(path: str | Path, given: str | None, folder: bool = False) -> None:
    """Whether a file or folder can be made at `path`, before the work whose result it takes;
    nothing is made yet.

    Args:
        path: of what will be made.
        given: what --output said, if anything.
        folder: whether it is a folder.
    Raises:
        ValueError: it cannot.
    """
    try:
        path = Path(path).absolute()
        if path.exists() and not (path.is_dir() if folder else path.is_file()):
            raise OSError(errno.EINVAL, "no folder" if folder else "no regular file")
        above = path if path.is_dir() else next(p for p in path.parents if p.exists())
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        what = f"--output {given}" if given is not None else str(path)
        advice = "give another one" if given is not None else "give --output"
        raise ValueError(f"{what} cannot be written ({error.strerror}); {advice}") from error


def _sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the file system can (CIFS, FUSE cannot)."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:  # it may be written and not read; on Windows folders cannot be opened
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(opened)


def remove_temporaries(folder: str | Path) -> None:
    """Delete what processes that died have left of files in `folder`.

    Only for a folder in which nobody else writes at the moment.
    """
    for path in Path(folder).glob(TEMPORARY):
        path.unlink(missing_ok=True)


# ---- JSON


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as every reader of JSON takes it: NaN and infinity, which it does not have, as null.

    Raises:
        TypeError: something in it is no JSON value.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text; NaN and infinity, which others write, are read as they are meant.

    Raises:
        ValueError: it is no JSON in UTF-8, is nested too deeply, or gives a name twice.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_no_name_twice)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check_nesting(value)
    return value


def check_nesting(value: Any) -> None:
    """Raise ValueError where tables and lists are nested deeper than whoever walks them can go."""
    level = [value]
    for _ in range(_DEEPEST):
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [part for v in inner if isinstance(v, list) for part in v]
        if not level:
            return
    raise ValueError("nested too deeply")


def signed(table: dict[str, Any]) -> dict[str, Any]:
    """`table` with a digest of all of it; `check_signature` tells whether it is still the same."""
    return {DIGEST: _digest(table), **table}


def check_signature(table: dict[str, Any]) -> dict[str, Any]:
    """`table` without the digest that `signed` gave it; a table without one as it is.

    Raises:
        ValueError: it is not what was signed.
    """
    rest = {name: value for name, value in table.items() if name != DIGEST}
    # a digest whose name is damaged is one all the same
    lost = any(isinstance(value, str) and value.startswith(_SHA256) for value in rest.values())
    if lost or (DIGEST in table and table[DIGEST] != _digest(rest)):
        raise ValueError(
            f'it was damaged or changed after it was written; without its line "{DIGEST}" it is '
            "taken as it is"
        )
    return rest


def _digest(table: dict[str, Any]) -> str:
    """Of what `table` says, not of how it is laid out."""
    plain = json.dumps(_finite(table), sort_keys=True, separators=(",", ":"))
    return _SHA256 + hashlib.sha256(plain.encode()).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is given twice")
    return table
