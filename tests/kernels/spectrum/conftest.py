"""The fixture that enters an execution, on tiles for tiny inputs."""

from __future__ import annotations

import pytest

from tests.kernels.executions import INTERPRETING

if INTERPRETING:
    from pae_kernels.spectrum import triton as kernels


@pytest.fixture
def execution(execution, monkeypatch):
    """In the interpreter on narrow tiles: tiny widths make several, and do not wait for padding."""
    if execution.kind == "interpreter":
        monkeypatch.setitem(kernels._TOKENS, "BLOCK_D", 16)
        monkeypatch.setitem(kernels._TAPS, "BLOCK_D", 16)
        monkeypatch.setitem(kernels._STRIPS, "BLOCK_H", 16)
        monkeypatch.setitem(kernels._PARTS, "BLOCK_D", 16)
    return execution
