"""How many examples a property test draws, and which: see `pytest --fresh` in conftest.py."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

FRESH = 5  # times the examples of an ordinary run


def examples(count: int, **options: Any) -> settings:
    """Decorator over `given`: `count` examples, the same in every ordinary run; fresh, and more of
    them, in a run that asks for it.
    """
    fixed = settings.default.derandomize
    return settings(max_examples=count if fixed else FRESH * count, **options)
