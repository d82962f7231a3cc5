"""`python -m bench` measures with the suite, and writes a report of what passed alone."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys

import pytest

from bench import __main__ as bench_main


def test_on_a_cpu():
    command = bench_main.command(["--quick", "-k", "kld"], on_gpu=False)
    assert command[1:5] == ["-m", "pytest", "bench/", "--benchmark-only"]
    assert command[-3:] == ["--quick", "-k", "kld"]
    (target,) = (part for part in command if part.startswith("--benchmark-json="))
    assert target.endswith("bench/results/cpu.json")


def test_on_a_gpu():
    assert bench_main.command(["--full"], on_gpu=True)[1:] == [
        str(bench_main.ROOT / "bench" / "gpu.sh"),
        *("--seconds", "10800"),
    ]
    with pytest.raises(SystemExit, match="--rounds"):
        bench_main.command(["--rounds"], on_gpu=True)


@pytest.mark.parametrize("code", [0, 1])
def test_report_of_what_passed_alone(monkeypatch, code):
    called = []
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, code))
    monkeypatch.setattr(bench_main.report, "main", lambda arguments: called.append(1) or 0)
    assert bench_main.main() == code
    assert len(called) == (code == 0)


def imported(module, tree):
    """Names of the modules of bench that this one imports, inside of functions too."""
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def test_no_import_circle():
    """A package's own module is left out: it is imported with each of its modules."""
    root = bench_main.ROOT
    modules = {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in sorted((root / "bench").rglob("*.py"))
        if path.name != "__init__.py"
    }
    graph = {
        name: {*imported(name, ast.parse(path.read_text()))} & modules.keys() - {name}
        for name, path in modules.items()
    }
    assert "bench.results" in graph["bench.pages"] and "bench.runner" in graph["bench.bench_kld"]
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
