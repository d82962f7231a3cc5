"""What every test in Triton's interpreter needs. Run by `test_triton_interpreter.py`, in a process
of its own: kernels are interpreted when TRITON_INTERPRET is set as they are imported.
"""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor

if triton.__version__.startswith("3.6."):
    # NumPy 2.4 no longer turns arrays of one entry into numbers, which 3.6 does for loop bounds
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor, scope):
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_with_index


@pytest.fixture(autouse=True)
def _triton_on_poisoned_memory(monkeypatch, poisoned_memory):
    """Every op runs its Triton version; entries that a kernel leaves out are NaN."""
    monkeypatch.setenv("PAE_BACKEND", "triton")


def as_exact_as(got: Tensor, plain: Tensor, exact: Tensor, times: float = 2) -> None:
    """`got` is at most `times` as far from fp64 as PyTorch's plain way in the same precision.

    Entries are of order 1, and each may be off by a few steps of fp32, in which kernels compute:
    gradients that cancel to 0 are where PyTorch happens to be exact.
    """
    assert got.shape == plain.shape == exact.shape
    assert got.dtype == plain.dtype and exact.dtype == torch.float64
    assert torch.isfinite(got).all()
    far = lambda t: (t.double() - exact).norm().item()
    allowed = times * far(plain) + 1e-6 * exact.numel() ** 0.5
    assert far(got) <= allowed, f"{far(got):.2e} from fp64, plain PyTorch {far(plain):.2e}"
