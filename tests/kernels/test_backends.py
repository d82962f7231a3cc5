"""Which version of an op runs, and what is said when it cannot."""

from __future__ import annotations

import sys

import pytest
import torch

from pae_kernels import attention, backends, pointwise  # noqa: F401  (importing registers)
from tests.processes import run


def test_the_reference_runs_on_a_cpu(monkeypatch):
    monkeypatch.delenv("PAE_BACKEND", raising=False)
    for op in ("prompt_attention", "pointwise"):
        assert backends.choose(op, "cpu").__name__.endswith("reference")


def test_a_forced_version_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setenv("PAE_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="PAE_BACKEND=triton cannot run pointwise on cpu: trit"):
        backends.choose("pointwise", "cpu")
    monkeypatch.setenv("PAE_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="pointwise has no such version, only"):
        backends.choose("pointwise", "cpu")


def test_an_unknown_version_is_named(monkeypatch):
    monkeypatch.setenv("PAE_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"PAE_BACKEND must be auto or one of .* got 'fast'"):
        backends.choose("pointwise", "cpu")


def test_kernels_say_what_they_need(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a GPU" in backends.with_triton("cpu", torch.float32)
    assert "float64" in backends.with_triton("cuda", torch.float64)
    assert backends.with_triton("cuda", torch.bfloat16) is None


def test_table_is_printed():
    done = run([sys.executable, "-m", "pae_kernels"])
    for op in ("prompt_attention", "pointwise", "koopman", "shortcut"):
        assert op in done.stdout
    assert "reference" in done.stdout
