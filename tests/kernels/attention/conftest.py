"""The fixture that chooses a backward."""

from __future__ import annotations

import pytest

from tests.kernels.attention.cases import force


@pytest.fixture
def path(request, monkeypatch):
    """Which of the two backwards, on small tiles; None: what the table of tiles says."""
    if request.param is not None:
        force(monkeypatch, request.param)
    return request.param
