"""The pointwise ops: checks, registration. They live inside the engine's own autograd functions,
one op a direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from . import reference

backends.register(
    "pointwise",
    backends.Version("triton", f"{__package__}.triton", backends.with_triton),
    backends.Version("reference", reference, backends.anywhere),
)


def layer_norm(x: Tensor, eps: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(x - mean(x)) / sqrt(var(x) + eps) over the last axis; the affine part is folded into the
    next product.

    Args:
        x: (..., D) float.
        eps: added to the variance, exactly (near-zero prompt rows make it decide).
        dtype: of the normalised rows; that of x when None.

    Returns:
        xhat (..., D) in `dtype` and rstd (..., 1) in at least fp32, in which the statistics are
        taken.

    Gradients: none recorded; `layer_norm_backward` is the adjoint.
    """
    return torch.ops.pae.layer_norm_fwd(x, eps, dtype or x.dtype)


def add_layer_norm(
    x: Tensor, delta: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x + delta rounded to the dtype of x, and `layer_norm` of y, in one pass.

    Args:
        x: (..., D) float, the residual stream.
        delta: (..., D) float, what the last product adds to it; may be narrower.
        eps, dtype: as in `layer_norm`.

    Returns:
        y (..., D) in the dtype of x; xhat (..., D) in `dtype`; rstd (..., 1) in at least fp32.

    Gradients: none recorded; both x and delta get `layer_norm_backward`'s.
    """
    return torch.ops.pae.add_layer_norm_fwd(x, delta, eps, dtype or x.dtype)


def layer_norm_backward(
    d_xhat: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    residual: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    narrow: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """residual + rstd (d - mean(d) - xhat mean(d xhat)).

    Args:
        d_xhat, xhat: (..., D) gradient of the normalised rows, and the rows themselves.
        rstd: (..., 1) as returned by `layer_norm`.
        residual: (..., D) gradient that flows around the norm, added in the same pass.
        dtype: of the result; that of rstd when None.
        narrow: return a second copy in this dtype, for the product that reads it next.
    """
    dx, copy = torch.ops.pae.layer_norm_bwd(
        d_xhat, xhat, rstd, residual, dtype or rstd.dtype, narrow
    )
    return dx if narrow is None else (dx, copy)


def activation(u: Tensor, kind: str, code: bool = False) -> tuple[Tensor, Tensor | None]:
    """act(u), and with `code` its derivative as one byte per entry (error at most 1/400) instead of
    keeping u.

    Args:
        u: (..., F) float.
        kind: a key of `ACTIVATIONS`. Their derivatives all lie within
            [-0.13, 1.13], which one byte covers.

    Gradients: none recorded; `activation_backward` is the adjoint.
    """
    _check_kind(kind)
    if code:
        return torch.ops.pae.activation_coded_fwd(u, kind)
    return torch.ops.pae.activation_fwd(u, kind), None


def activation_backward(d: Tensor, u_or_code: Tensor, kind: str) -> Tensor:
    """d act'(u), from u itself or from its coded derivative (uint8)."""
    _check_kind(kind)
    return torch.ops.pae.activation_bwd(d, u_or_code, kind)


def _check_kind(kind: str) -> None:
    if kind not in reference.ACTIVATIONS:
        raise ValueError(f"kind must be one of {sorted(reference.ACTIVATIONS)}, got {kind!r}")


_lib = torch.library.Library("pae", "FRAGMENT")
_lib.define("layer_norm_fwd(Tensor x, float eps, ScalarType dtype) -> (Tensor, Tensor)")
_lib.define(
    "add_layer_norm_fwd(Tensor x, Tensor delta, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "layer_norm_bwd(Tensor d_xhat, Tensor xhat, Tensor rstd, Tensor? residual, ScalarType dtype, "
    "ScalarType? narrow) -> (Tensor, Tensor)"
)
_lib.define("activation_fwd(Tensor u, str kind) -> Tensor")
_lib.define("activation_coded_fwd(Tensor u, str kind) -> (Tensor, Tensor)")
_lib.define("activation_bwd(Tensor d, Tensor u_or_code, str kind) -> Tensor")


def _version(t: Tensor):
    return backends.choose("pointwise", t.device, t.dtype)


# inputs are made contiguous, so that outputs are, as the fakes below say


def _layer_norm_fwd(x, eps, dtype):
    return _version(x).layer_norm(x.contiguous(), eps, dtype)


def _add_layer_norm_fwd(x, delta, eps, dtype):
    return _version(x).add_layer_norm(x.contiguous(), delta.contiguous(), eps, dtype)


def _layer_norm_bwd(d_xhat, xhat, rstd, residual, dtype, narrow):
    residual = None if residual is None else residual.contiguous()
    rows = d_xhat.contiguous(), xhat.contiguous(), rstd.contiguous()
    return _version(rstd).layer_norm_backward(*rows, residual, dtype, narrow)


def _activation_fwd(u, kind):
    return _version(u).activation(u.contiguous(), kind)


def _activation_coded_fwd(u, kind):
    return _version(u).activation_coded(u.contiguous(), kind)


def _activation_bwd(d, u_or_code, kind):
    return _version(d).activation_backward(d.contiguous(), u_or_code.contiguous(), kind)


for _key in ("CPU", "CUDA"):
    _lib.impl("layer_norm_fwd", _layer_norm_fwd, _key)
    _lib.impl("add_layer_norm_fwd", _add_layer_norm_fwd, _key)
    _lib.impl("layer_norm_bwd", _layer_norm_bwd, _key)
    _lib.impl("activation_fwd", _activation_fwd, _key)
    _lib.impl("activation_coded_fwd", _activation_coded_fwd, _key)
    _lib.impl("activation_bwd", _activation_bwd, _key)


def _rstd_like(x):
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.register_fake("pae::layer_norm_fwd", lib=_lib)
def _(x, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype), _rstd_like(x)


@torch.library.register_fake("pae::add_layer_norm_fwd", lib=_lib)
def _(x, delta, eps, dtype):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), _rstd_like(x)


@torch.library.register_fake("pae::layer_norm_bwd", lib=_lib)
def _(d_xhat, xhat, rstd, residual, dtype, narrow):
    dx = d_xhat.new_empty(d_xhat.shape, dtype=dtype)
    return dx, rstd.new_empty(0) if narrow is None else torch.empty_like(dx, dtype=narrow)


@torch.library.register_fake("pae::activation_fwd", lib=_lib)
def _(u, kind):
    return u.new_empty(u.shape)


@torch.library.register_fake("pae::activation_coded_fwd", lib=_lib)
def _(u, kind):
    return u.new_empty(u.shape), u.new_empty(u.shape, dtype=torch.uint8)


@torch.library.register_fake("pae::activation_bwd", lib=_lib)
def _(d, u_or_code, kind):
    return d.new_empty(d.shape)
