"""A process that dies in a test is not silent."""

from __future__ import annotations

import re
import sys
import time
from types import SimpleNamespace

import pytest

from tests import conftest, processes

SAY = "import os, sys, time; print('to out', flush=True); print('to err', file=sys.stderr); "


def python(code, **options):
    return processes.run([sys.executable, "-c", SAY + "sys.stderr.flush(); " + code], **options)


def test_output_is_text_and_the_environment_is_added_to(monkeypatch):
    monkeypatch.setenv("PAE_TEST_KEPT", "kept")
    monkeypatch.setenv("PAE_TEST_TAKEN", "taken")
    names = "'PAE_TEST_KEPT', 'PAE_TEST_TAKEN', 'PAE_TEST_NEW'"
    done = python(
        f"print(*map(os.environ.get, ({names})), os.getcwd())",
        env={"PAE_TEST_TAKEN": None, "PAE_TEST_NEW": "new"},
    )
    assert done.stdout == f"to out\nkept None new {processes.ROOT}\n"
    assert (done.stderr, done.returncode) == ("to err\n", 0)


@pytest.mark.parametrize(
    "code, ending",
    [
        ("sys.exit(3)", "ended with status 3"),
        ("os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
        ("os.abort()", "was ended by SIGABRT"),
        ("time.sleep(60)", "was killed after 1 s"),
    ],
)
def test_a_death_shows_what_was_said(code, ending):
    timeout = 1 if "sleep" in code else 60
    with pytest.raises(AssertionError) as caught:
        python(code, timeout=timeout)
    text = str(caught.value)
    assert ending in text and sys.executable in text
    assert "--- standard output\nto out" in text and "--- standard error\nto err" in text


def test_the_end_is_shown_of_one_who_says_much():
    with pytest.raises(AssertionError) as caught:
        python("print('ear' + 'ly', 'x' * 100000, 'la' + 'te'); sys.exit(1)")
    text = str(caught.value)
    assert "late" in text and "early" not in text and len(text) < 3 * processes.TAIL


def test_whoever_checks_by_himself_is_told_the_status():
    assert python("sys.exit(3)", check=False).returncode == 3


def test_what_is_started_is_no_worker(monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert "gw0" not in python("print(os.environ.get('PYTEST_XDIST_WORKER'))").stdout


def options(arguments=("tests",), numprocesses=None, **changes):
    """What `conftest` reads of a command line."""
    known = {"collectonly": False, "usepdb": False, "benchmark_only": False}
    option = SimpleNamespace(**known, numprocesses=numprocesses, **{"maxprocesses": None})
    vars(option).update(changes)
    return SimpleNamespace(option=option, args=list(arguments))


def test_one_process_per_core_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    plain = options()
    conftest.pytest_cmdline_main(plain)
    assert plain.option.numprocesses == "auto" and plain.option.maxprocesses > 1
    one = ("tests/test_layers.py::test_public_names",)
    for config in (
        options(numprocesses=0),
        options(numprocesses=3),
        options(one),
        options(usepdb=True),
        options(collectonly=True),
        options(benchmark_only=True),
    ):
        before = config.option.numprocesses
        conftest.pytest_cmdline_main(config)
        assert config.option.numprocesses == before


def test_pytest_started_by_a_test_stays_in_one_process():
    config = options()
    conftest.pytest_cmdline_main(config)
    assert config.option.numprocesses is None


def test_pytest_without_the_plug_in_stays_in_one_process(monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    config = options()
    del config.option.numprocesses
    conftest.pytest_cmdline_main(config)
    assert not hasattr(config.option, "numprocesses")


def test_every_test_starts_processes_by_the_helper():
    direct = re.compile(r"\bsubprocess\.(run|Popen|call|check_\w+)\(|\bos\.system\(")
    tests = processes.ROOT / "tests"
    found = [
        f"{file.relative_to(tests)}:{number}"
        for file in sorted(tests.rglob("*.py"))
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if direct.search(line) and "import subprocess" not in line
    ]
    assert [place.partition(":")[0] for place in found] == ["processes.py"], found


def test_files_named_for_the_order_exist():
    tests = processes.ROOT / "tests"
    assert [
        name for name in (*conftest.APART, *conftest.FIRST) if not (tests / name).exists()
    ] == []


def test_a_timeout_ends_the_children_too():
    child = "import subprocess; subprocess.run(['sleep', '30'])"  # it holds the pipes open
    start = time.monotonic()
    with pytest.raises(AssertionError, match="killed after 1 s"):
        python(child, timeout=1)
    assert time.monotonic() - start < 20
