"""The record of a run: one JSON file, ``SWEEP/runs/KEY/record.json``, written in one step.

A run is done when its record says so. The record says what was asked (`settings`), what came out,
what it cost, and by which code; or in one line why nothing came out. Its fields are described in
docs/sweeps.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pae.errors import CheckpointError
from pae.files import check_signature, from_json, signed, to_json, write_atomically

Record = dict[str, Any]

FINISHED, DIVERGED, FAILED, STOPPED = "finished", "diverged", "failed", "stopped"
STATUS = (FINISHED, DIVERGED, FAILED, STOPPED)
FILE = "record.json"
RUNS = "runs"
BULKY = ("settings", "versions", "backbone")  # what takes most of a record's memory
_NEEDED = ("key", "status", "reason", "settings", "images", "val", "test")


def key_of(settings: Mapping[str, Any]) -> str:
    """A hash of settings, in whatever order they were written: 12 hexadecimal digits."""
    text = to_json(_sorted({"format": 1, **settings}))
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return [_sorted(part) for part in value] if isinstance(value, (list, tuple)) else value


class Records(Mapping[str, Record]):
    """The records of the sweep in `folder`, by key. A file that was read is not read again before
    `refresh`, which looks for new ones.

    Args:
        folder: of the sweep.
        without: fields that nobody will ask for, so that many records take little memory.
    Raises:
        CheckpointError: a record is damaged, when it is asked for.
    """

    def __init__(self, folder: Path, without: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.without = without
        self._seen: dict[str, tuple[Any, Record]] = {}
        self._fresh: set[str] = set()  # seen, and looked at since `refresh`
        self._keys: set[str] = set()
        self.refresh()

    def path(self, key: str) -> Path:
        """The folder of a run."""
        return self.folder / RUNS / key

    def refresh(self) -> None:
        """Looks which runs have a record by now."""
        # by names: a path for each takes longer than the look at it
        runs = os.path.join(self.folder, RUNS)
        try:
            keys = os.listdir(runs)
        except (FileNotFoundError, NotADirectoryError):
            keys = []
        self._keys = {key for key in keys if os.path.lexists(os.path.join(runs, key, FILE))}
        self._fresh.clear()

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __getitem__(self, key: str) -> Record:
        if key not in self._keys:
            raise KeyError(key)
        if key in self._fresh:
            return self._seen[key][1]
        try:
            stat = os.stat(os.path.join(self.folder, RUNS, key, FILE))
        except FileNotFoundError:
            self._keys.discard(key)  # taken away since
            raise KeyError(key) from None
        mark = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if key not in self._seen or self._seen[key][0] != mark:
            record = _read(self.path(key) / FILE)
            self._seen[key] = mark, {n: v for n, v in record.items() if n not in self.without}
        self._fresh.add(key)
        return self._seen[key][1]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._keys))

    def __len__(self) -> int:
        return len(self._keys)

    def write(self, record: Record) -> None:
        """Writes a record into the folder of its run."""
        text = to_json(signed(record), indent=1) + "\n"
        path = self.path(record["key"]) / FILE
        write_atomically(path, lambda file: file.write_text(text, "utf-8"))
        self._keys.add(record["key"])
        self._fresh.discard(record["key"])

    def remove(self, key: str) -> None:
        """Takes a record away, so that its run is wanted again."""
        (self.path(key) / FILE).unlink(missing_ok=True)
        self._keys.discard(key)


def _read(path: Path) -> Record:
    try:
        record = check_signature(from_json(path.read_bytes()))
        lacking = [name for name in _NEEDED if name not in record]
        if lacking or record["status"] not in STATUS:
            raise ValueError(f"it is no record of a run (no {', '.join(lacking) or 'status'})")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; delete it: the sweep tells from the run's files"
        ) from error
    return record
