"""Declarations of the products with epilogues, and whether a block is to run them.

Nobody has yet measured them against cuBLAS and the pointwise pass behind it, so they run where
`PAE_EPILOGUE=triton` asks for them and nowhere else.
"""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import Tensor

from .. import backends, registration
from ..checks import describe
from ..pointwise import ACTIVATIONS
from . import reference

KEEP = ("hidden", "code", "nothing")
EPILOGUES = ("", "auto", "triton")  # words of PAE_EPILOGUE
_NARROW = (torch.bfloat16, torch.float16)


def _epilogue() -> str:
    """The word of `PAE_EPILOGUE`."""
    word = os.environ.get("PAE_EPILOGUE", "")
    if word not in EPILOGUES:
        raise ValueError(f"PAE_EPILOGUE must be auto or triton, got {word!r}")
    return word


def _with_epilogue(device_type: str, dtype: torch.dtype) -> str | None:
    """Predicate of the Triton kernels: they have tiles for the GPU, and somebody asks for them."""
    if reason := backends.with_triton_tiles(device_type, dtype):
        return reason
    try:
        asked = "triton" in (_epilogue(), backends.forced())
    except ValueError as error:
        return str(error)
    if asked:
        return None
    return "not measured against cuBLAS on this card; PAE_EPILOGUE=triton asks for it"


backends.register(
    "product",
    backends.Version("triton", f"{__package__}.triton", _with_epilogue),
    backends.Version("reference", reference, backends.anywhere),
)


def wanted(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a block runs its MLP's products with epilogues: in 16 bits on a GPU, where
    `PAE_EPILOGUE=triton` asks for it. Elsewhere that variable changes nothing.

    Raises:
        ValueError: the variable says something else than auto or triton.
        RuntimeError: the kernels cannot run on this GPU.
    """
    if device_type != "cuda" or dtype not in _NARROW or _epilogue() != "triton":
        return False
    if reason := backends.with_triton_tiles(device_type, dtype):
        raise RuntimeError(f"PAE_EPILOGUE=triton cannot run on this GPU: triton {reason}; unset it")
    return True


def product_activation(
    x: Tensor, weight: Tensor, bias: Tensor, kind: str, keep: str = "hidden"
) -> tuple[Tensor, Tensor | None]:
    """act(x W^T + b) in one pass, and of u = x W^T + b what a backward is to find.

    Args:
        x: (..., K) float.
        weight: (F, K) in the dtype of x; one whose last axis has a stride is copied.
        bias: (F,) in the dtype of x.
        kind: a key of `pointwise.ACTIVATIONS`.
        keep: "hidden" for u itself, "code" for act'(u) as one byte per entry (error at most 1/400),
            "nothing".

    Returns:
        act(u) (..., F) in the dtype of x; u in that dtype, or uint8, or None. The fused version
        rounds u where it is stored, and takes act and the code of the sum in fp32.

    Raises:
        ValueError: another kind or keep; shapes or dtypes that do not fit.

    Gradients: none recorded; `product_activation_backward` is what a backward needs.
    """
    _check_kind(kind)
    if keep not in KEEP:
        raise ValueError(f"keep must be one of {KEEP}, got {keep!r}")
    _check_factors("x", x, weight, 1)
    if bias.shape != weight.shape[:1] or bias.dtype != x.dtype:
        raise ValueError(
            f"bias must be ({weight.shape[0]},) in the dtype of x, {x.dtype}, got {describe(bias)}"
        )
    y, kept = _product_fwd(x, weight, bias, kind, keep)
    return y, None if keep == "nothing" else kept


def product_activation_backward(d: Tensor, weight: Tensor, kept: Tensor, kind: str) -> Tensor:
    """(d W) act'(u) in one pass: from the gradient behind the next product to that of u.

    Args:
        d: (..., K) float, gradient of the rows that W made of act(u).
        weight: (K, F) in the dtype of d; one whose last axis has a stride is copied.
        kept: (..., F): u in the dtype of d, or uint8, its coded derivative.
        kind: a key of `pointwise.ACTIVATIONS`.

    Returns:
        (..., F) in the dtype of d. The fused version rounds once, at the end.

    Raises:
        ValueError: another kind; shapes or dtypes that do not fit.
    """
    _check_kind(kind)
    _check_factors("d", d, weight, 0)
    fits = kept.shape == (*d.shape[:-1], weight.shape[1])
    if not fits or kept.dtype not in (d.dtype, torch.uint8):
        raise ValueError(
            f"kept must be {(*d.shape[:-1], weight.shape[1])} in uint8 or the dtype of d, "
            f"{d.dtype}, got {describe(kept)}"
        )
    return _product_bwd(d, weight, kept, kind)


def _check_kind(kind: str) -> None:
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind must be one of {sorted(ACTIVATIONS)}, got {kind!r}")


def _check_factors(name: str, x: Tensor, weight: Tensor, inner: int) -> None:
    fits = x.dim() > 0 and weight.dim() == 2 and weight.shape[inner] == x.shape[-1]
    if not fits or weight.dtype != x.dtype or not x.dtype.is_floating_point:
        wanted = "(F, K)" if inner else "(K, F)"
        raise ValueError(
            f"weight must be {wanted} for {name} (..., K), both of one float dtype, "
            f"got weight {describe(weight)} and {name} {describe(x)}"
        )


def _fake_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, kind: str, keep: str
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if keep == "nothing":
        return y, x.new_empty(0)
    return y, y.new_empty(y.shape, dtype=torch.uint8 if keep == "code" else y.dtype)


_op = partial(registration.op, versions="product", layout=registration.contiguous_rows)

_product_fwd = _op(
    "product_activation_fwd(Tensor x, Tensor weight, Tensor bias, str kind, str keep) "
    "-> (Tensor y, Tensor kept)",
    "product_activation",
    _fake_fwd,
)
_product_bwd = _op(
    "product_activation_bwd(Tensor d, Tensor weight, Tensor kept, str kind) -> Tensor",
    "product_activation_backward",
    lambda d, weight, kept, kind: d.new_empty((*d.shape[:-1], weight.shape[1])),
)
