"""Programs that tests start: what they said is shown when they die."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TAIL = 6000  # characters of each stream that a failure shows
# options of a pytest that needs neither: the second takes a second to import
WITHOUT_PLUGINS = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")


def run(
    command: Sequence[str | os.PathLike],
    *,
    env: Mapping[str, str | None] | None = None,
    cwd: str | os.PathLike | None = None,
    timeout: float = 600,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run `command` at the root of the repository, or in `cwd`; its output is captured as text.

    `env` is added to this process's environment; None takes a variable away. What is started is
    no worker of pytest-xdist, though this process may be one. Whoever hangs is
    killed after `timeout` seconds, with all it started. AssertionError with the command, how it
    ended and the end of what it said: after a timeout, and for another status than 0 unless
    `check` is False.
    """
    process = _start(command, env, cwd)
    ending = None
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        ending = f"was killed after {timeout:g} s"
    finally:
        if process.poll() is None or ending:
            os.killpg(process.pid, signal.SIGKILL)
    if ending:
        out, err = process.communicate()
    elif check and process.returncode:
        ending = how_it_ended(process.returncode)
    if ending:
        said = "".join(f"\n--- {name}\n{_tail(text)}" for name, text in _named(out, err))
        raise AssertionError(f"{_shown(command)} {ending}{said}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextlib.contextmanager
def started(
    command: Sequence[str | os.PathLike], *, env: Mapping[str, str | None] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The same program while it runs; what is left of it and of all it started is killed after."""
    process = _start(command, env, None)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _start(
    command: Sequence[str | os.PathLike],
    env: Mapping[str, str | None] | None,
    cwd: str | os.PathLike | None,
) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTEST_XDIST_WORKER": None, **(env or {})}
    return subprocess.Popen(
        command,
        env={name: value for name, value in environment.items() if value is not None},
        cwd=ROOT if cwd is None else cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def how_it_ended(status: int) -> str:
    """In words: "ended with status 2", or the signal that ended it."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _shown(command: Sequence[str | os.PathLike]) -> str:
    words = [os.fspath(word) for word in command]
    return " ".join(word if len(word) <= 200 else f"{word[:200]!r}..." for word in words)


def _named(out: str, err: str) -> list[tuple[str, str]]:
    return [("standard output", out), ("standard error", err)]


def _tail(text: str) -> str:
    text = text.rstrip()
    if not text:
        return "(nothing)"
    return text if len(text) <= TAIL else f"... {text[-TAIL:]}"
