"""The fixture that enters an execution, on tiles for tiny inputs."""

from __future__ import annotations

import pytest

from tests.kernels.koopman.cases import use_tile


@pytest.fixture
def execution(execution, monkeypatch):
    """In the interpreter on tiles of 16 rows, so that tiny inputs make several of them."""
    if execution.kind == "interpreter":
        use_tile(monkeypatch, 16)
    return execution
