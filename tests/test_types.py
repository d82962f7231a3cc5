"""Types: what pyproject.toml has mypy check, checked."""

from __future__ import annotations

import sys

from tests import processes


def test_no_errors():
    done = processes.run([sys.executable, "-m", "mypy"], check=False, timeout=600)
    assert done.stdout.startswith("Success") and done.returncode == 0, done.stdout + done.stderr
