"""Results as they come: one JSON line each in one file, so that a kill loses what was under way.

Loaded as a pytest plug-in (`-p bench.lines`, with the file in PAE_LINES) it writes a line for every
test that ends, and leaves out what the file says has passed. With PAE_PART=1/2 in one process and
2/2 in another they share the tests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .results import Row


def append(path: Path, kind: str, **entry: Any) -> None:
    """One line more, in one write: programs side by side do not tear each other's."""
    line = json.dumps({"kind": kind, **entry}) + "\n"
    with open(path, "ab+") as file:
        if file.tell() and not _ends(file):
            line = "\n" + line  # behind one that a kill has torn
        os.write(file.fileno(), line.encode())


def _ends(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read(path: Path, kind: str = "") -> list[dict[str, Any]]:
    """All entries of one kind, or of any; a line that a kill has torn is none."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and kind in ("", entry.get("kind")):
            found.append(entry)
    return found


# ---- rows of benchmarks: a line each when they are known, and one for every round of their group


class Watcher:
    """Hears of a group while it is measured (`runner.run_group`)."""

    def known(self, row: Row, rounds: int) -> None:
        """Its values are right and `rounds` are asked of it; or it has none, `row.reason`."""

    def measured(self, group: str, seconds: dict[str, float]) -> None:
        """One round more, by provider."""

    def failed(self, group: str) -> None:
        """No round of it counts."""


class Rows(Watcher):
    """Writes down what a session finds when it finds it, but for rows that fail: they run again."""

    def __init__(self, path: Path, began: str) -> None:
        self.path, self.began, self.session = path, began, f"{os.getpid()} {began}"

    def where(self, machine: dict[str, Any]) -> None:
        """The machine, as far as it is known by now."""
        append(self.path, "session", id=self.session, date=self.began, machine=machine)

    def known(self, row: Row, rounds: int) -> None:
        names = "group", "provider", "reason", "clock", "unit", "baselines", "columns"
        about = {name: getattr(row, name) for name in names}
        if not row.failed:
            append(self.path, "row", session=self.session, rounds=rounds, **about)

    def measured(self, group: str, seconds: dict[str, float]) -> None:
        append(self.path, "round", session=self.session, group=group, seconds=seconds)

    def failed(self, group: str) -> None:
        append(self.path, "failed", session=self.session, group=group)


def rows(entries: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """(session, group) -> its rows by provider, each with the seconds of its rounds so far."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for entry in entries:
        where = entry.get("session", ""), entry.get("group", "")
        if entry["kind"] == "row":
            found.setdefault(where, {})[entry["provider"]] = {**entry, "seconds": []}
        elif entry["kind"] == "round":
            for provider, row in found.get(where, {}).items():
                if provider in entry["seconds"]:
                    row["seconds"].append(entry["seconds"][provider])
        elif entry["kind"] == "failed":
            found.pop(where, None)
    return found


def is_whole(row: dict[str, Any]) -> bool:
    """All its rounds are there, or why it has none."""
    return bool(row["reason"]) or len(row["seconds"]) >= row["rounds"]


# ---- tests


def _file() -> Path | None:
    name = os.environ.get("PAE_LINES")
    return Path(name) if name else None


def pytest_collection_modifyitems(config, items):
    if (path := _file()) is None:
        return
    passed = {e["test"] for e in read(path, "test") if e["outcome"] == "passed"}
    part, parts = map(int, os.environ.get("PAE_PART", "1/1").split("/"))
    mine = [item for item in items[part - 1 :: parts] if item.nodeid not in passed]
    if gone := [item for item in items if item not in mine]:
        config.hook.pytest_deselected(items=gone)
        items[:] = mine
    first = [word for word in os.environ.get("PAE_FIRST", "").split(",") if word]
    items.sort(key=lambda item: next((i for i, w in enumerate(first) if w in item.name), 99))


def pytest_runtest_logreport(report):
    if (path := _file()) is None or (report.when != "call" and report.outcome == "passed"):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    said = crash.message.splitlines()[0] if crash and crash.message else ""
    entry = {"outcome": report.outcome, "seconds": round(report.duration, 3), "said": said[:300]}
    append(path, "test", test=report.nodeid, **entry)
