"""Products of fp32 that stay fp32, whatever the flags of the process allow.

`torch.set_float32_matmul_precision("high")` lets PyTorch round the factors of fp32 products: to
TF32 on a GPU, "medium" also to bf16 on some CPUs. That is a choice for the products of a model. It
is none where fp32 was chosen because 16 bits do not suffice: logits, sums over a batch, losses.
Every op runs inside `exact_products` (`registration.py`); a product elsewhere is `exact_matmul`.
"""

from __future__ import annotations

import threading
from types import TracebackType

import torch
from torch import Tensor

_BACKENDS = "cuda", "mkldnn"
_REDUCED = "tf32", "bf16"
_get, _put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter


class _ExactProducts:
    """A context for any thread at any depth. The flags belong to the process: the first to come in
    sets them, the last to go out restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._legacy: str | None = None
        self._before: dict[str, str] = {}

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0 and reduced():
                self._set()
            self._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._before:
                self._restore()

    def _set(self) -> None:
        self._before = {name: _get(name, "matmul") for name in _BACKENDS}
        try:
            self._legacy = torch.get_float32_matmul_precision()
        except RuntimeError:  # set by the newer flags of each backend alone
            self._legacy = None
        else:
            torch.set_float32_matmul_precision("highest")
        for name in _BACKENDS:
            _put(name, "matmul", "ieee")

    def _restore(self) -> None:
        if self._legacy is not None:
            torch.set_float32_matmul_precision(self._legacy)
        for name, value in self._before.items():
            _put(name, "matmul", "none")
            if _get(name, "matmul") != value:  # it was not what all of them inherit
                _put(name, "matmul", value)
        self._before = {}


exact_products = _ExactProducts()


def reduced() -> bool:
    """Whether PyTorch may round the factors of fp32 products now."""
    return _get("cuda", "matmul") in _REDUCED or _get("mkldnn", "matmul") in _REDUCED


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b inside `exact_products`. In a compiled graph, which no flag reaches, it is an op.

    Gradients: PyTorch's, outside of `exact_products`; none in a compiled graph.
    """
    if torch.compiler.is_compiling():
        return torch.ops.pae.exact_matmul(a, b)
    with exact_products:
        return a @ b
