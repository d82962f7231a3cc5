"""Products of fp32 that stay fp32, whatever the flags of the process allow.

`torch.set_float32_matmul_precision("high")` lets PyTorch round the factors of fp32 products: to
TF32 on a GPU, "medium" also to bf16 on some CPUs. That is a choice for the products of a model. It
is none where fp32 was chosen because 16 bits do not suffice: logits, sums over a batch, losses,
statistics, proofs. Every op runs inside `exact_products` (`registration.py`), what is done once may
run inside it too; a product of a step elsewhere is `exact_matmul`, whose gradients are exact as
well. The user's choice are the linear layers of the backbone and the head, and what makes prompts
of parameters (BPT, iVPT, LSPT, PRO-VPT's networks): they are layers of a model like any other.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .checks import transform

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
    """a @ b of matrices, or of batches of them that broadcast, inside `exact_products`. In a
    compiled graph, which no flag reaches, it is an op.

    Gradients: products of the same kind, as often as wanted.
    """
    if torch.compiler.is_compiling():
        return torch.ops.pae.exact_matmul(a, b)
    recorded = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if recorded and transform() is None:
        return _ExactMatmul.apply(a, b)
    with exact_products:
        return a @ b


def gradients(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of `exact_matmul`, from `save_factors` and the gradient of its result."""
    a, b = ctx.saved_tensors
    d_a, d_b = ctx.needs_input_grad
    return (
        exact_matmul(d, b.mT).sum_to_size(a.shape) if d_a else None,
        exact_matmul(a.mT, d).sum_to_size(b.shape) if d_b else None,
    )


def save_factors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


class _ExactMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with exact_products:
            return a @ b

    backward = staticmethod(gradients)
