"""The fixture that enters an execution (`executions.py`)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernels import executions

if executions.INTERPRETING:
    import triton
    from triton.runtime import interpreter

    # the interpreter makes many objects of each number, nearly none of them garbage in cycles: by
    # Python's own threshold a fifth of the time goes into looking for that
    gc.set_threshold(100_000)

    # and every call of a device function turns triton.language into the interpreter's, which it is
    # already where its launch has done so: a quarter of the time
    _patch_lang, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    _turned: set[int] = set()  # ids of the modules' globals, in this launch

    def _patch_lang_once(fn: Any) -> Any:
        if id(fn.__globals__) in _turned:
            return interpreter._LangPatchScope()
        _turned.add(id(fn.__globals__))
        return _patch_lang(fn)

    def _launch_anew(self: Any, *given: Any, **named: Any) -> None:
        _turned.clear()
        _launch(self, *given, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = _patch_lang_once, _launch_anew

    if triton.__version__.startswith("3.6."):
        # NumPy 2.4 no longer turns arrays of one entry into numbers, which 3.6 does for loop bounds
        _patch = interpreter._patch_lang_tensor

        def _patch_with_index(tensor, scope):
            _patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = _patch_with_index


@pytest.fixture
def execution(request: pytest.FixtureRequest) -> Iterator[executions.Execution]:
    """The execution of this test, entered: the public op of the suite (its `OP`) runs that version.

    On the CPU an entry that a kernel leaves out is NaN.
    """
    chosen = request.param
    if chosen.kind in ("interpreter", "emulated"):
        request.getfixturevalue("poisoned_memory")
    with chosen.entered(request.module.OP):
        yield chosen
