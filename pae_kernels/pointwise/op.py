"""The pointwise ops: checks, declarations. They live inside the engine's own autograd functions,
one op a direction.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import backends, registration
from ..checks import describe
from . import reference

backends.register(
    "pointwise",
    backends.Version("triton", f"{__package__}.triton", backends.with_triton),
    backends.Version("cpu", f"{__package__}.cpu", backends.with_cpu),
    backends.Version("reference", reference, backends.anywhere),
)


def layer_norm(
    x: Tensor, eps: float, dtype: torch.dtype | None = None, rms: bool = False
) -> tuple[Tensor, Tensor]:
    """(x - mean(x)) / sqrt(var(x) + eps) over the last axis; the affine part is folded into the
    next product.

    Args:
        x: (..., D) float.
        eps: added to the variance, exactly (near-zero prompt rows make it decide).
        dtype: of the normalised rows; that of x when None.
        rms: x / sqrt(mean(x^2) + eps) instead: RMSNorm.

    Returns:
        xhat (..., D) in `dtype` and rstd (..., 1) in at least fp32, in which the statistics are
        taken.

    Gradients: none recorded; `layer_norm_backward` is the adjoint.
    """
    return _layer_norm_fwd(x, eps, dtype or x.dtype, rms)


def add_layer_norm(
    x: Tensor, delta: Tensor, eps: float, dtype: torch.dtype | None = None, rms: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x + delta rounded to the dtype of x, and `layer_norm` of y, in one pass.

    Args:
        x: (..., D) float, the residual stream.
        delta: (..., D) float, what the last product adds to it; may be narrower.
        eps, dtype, rms: as in `layer_norm`.

    Returns:
        y (..., D) in the dtype of x; xhat (..., D) in `dtype`; rstd (..., 1) in at least fp32.

    Gradients: none recorded; both x and delta get `layer_norm_backward`'s.
    """
    return _add_layer_norm_fwd(x, delta, eps, dtype or x.dtype, rms)


def layer_norm_backward(
    d_xhat: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    residual: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    narrow: torch.dtype | None = None,
    rms: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """residual + rstd (d - mean(d) - xhat mean(d xhat)), without mean(d) when `rms`.

    Args:
        d_xhat, xhat: (..., D) gradient of the normalised rows, and the rows themselves.
        rstd: (..., 1) as returned by `layer_norm`.
        residual: (..., D) gradient that flows around the norm, added in the same pass.
        dtype: of the result; that of rstd when None.
        narrow: return a second copy in this dtype, for the product that reads it next.
    """
    dx, copy = _layer_norm_bwd(d_xhat, xhat, rstd, residual, dtype or rstd.dtype, narrow, rms)
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
        return _activation_coded_fwd(u, kind)
    return _activation_fwd(u, kind), None


def activation_(u: Tensor, kind: str) -> Tensor:
    """act(u) in place of u, which comes back: for forwards that keep nothing, outside a graph.

    Args:
        u: (..., F) float, without a gradient.
        kind: a key of `ACTIVATIONS`.

    Raises:
        ValueError: another kind; u requires a gradient while one is recorded.
    """
    _check_kind(kind)
    if u.requires_grad and torch.is_grad_enabled():
        raise ValueError("u requires a gradient, but activation_ has none: use torch.no_grad()")
    version = backends.choose("pointwise", u.device, u.dtype)
    if u.is_contiguous() and hasattr(version, "activation_"):
        return version.activation_(u, kind)
    return reference.activation_(u, kind)


def activation_backward(d: Tensor, u_or_code: Tensor, kind: str) -> Tensor:
    """d act'(u), from u itself or from its coded derivative (uint8)."""
    _check_kind(kind)
    return _activation_bwd(d, u_or_code, kind)


def gated(u: Tensor, kind: str) -> Tensor:
    """act(gate) up, where u (..., 2 F) holds gates and ups side by side: (..., F) in its dtype.

    Args:
        u: (..., 2 F) float.
        kind: a key of `ACTIVATIONS`.

    Raises:
        ValueError: another kind; an odd width.

    Gradients: none recorded; `gated_backward` is the adjoint.
    """
    _check_gates(u, kind)
    return _gated_fwd(u, kind)


def gated_backward(d: Tensor, u: Tensor, kind: str) -> Tensor:
    """Gradient of u (..., 2 F), of d (..., F) and u as `gated` was given it, in the dtype of d."""
    _check_gates_of(d, u, kind)
    return _gated_bwd(d, u, kind)


def gated_norm(u: Tensor, kind: str, eps: float, rms: bool = False) -> Tensor:
    """The normalised rows (..., F) of `gated`'s, in their dtype: a norm inside of a gated MLP,
    whose affine part is folded into the next product.

    Args:
        u, kind: as in `gated`.
        eps, rms: as in `layer_norm`.

    Raises:
        ValueError: as `gated`.

    Gradients: none recorded; `gated_norm_backward` is the adjoint.
    """
    _check_gates(u, kind)
    return _gated_norm_fwd(u, kind, eps, rms)


def gated_norm_backward(d: Tensor, u: Tensor, kind: str, eps: float, rms: bool = False) -> Tensor:
    """Gradient of u (..., 2 F), of d (..., F) and what `gated_norm` was given, in the dtype of d.

    Gated rows and their statistics are formed again, which reads less than they would take.
    """
    _check_gates_of(d, u, kind)
    return _gated_norm_bwd(d, u, kind, eps, rms)


def _check_gates(u: Tensor, kind: str) -> None:
    _check_kind(kind)
    if u.dim() == 0 or u.shape[-1] % 2:
        raise ValueError(f"u must be (..., 2 F), gates and ups, got {describe(u)}")


def _check_gates_of(d: Tensor, u: Tensor, kind: str) -> None:
    _check_kind(kind)
    if u.shape != (*d.shape[:-1], 2 * d.shape[-1]) or u.dtype != d.dtype:
        raise ValueError(f"u must be {(*d.shape[:-1], 2 * d.shape[-1])} like d, got {describe(u)}")


def rotate_(qkv: Tensor, rotation: Tensor, back: bool = False) -> Tensor:
    """Turn queries and keys of the last n rows by angles, in place of qkv, which comes back; of one
    part, what it is.

    Entries i and i + d/2 of a head are a pair: (a, b) to (a cos - b sin, b cos + a sin).

    Args:
        qkv: (B, N, 3 or 1, H, d) float, contiguous, d even.
        rotation: (2, n, d/2) or (2, H, n, d/2), sine and cosine in at least fp32, n <= N.
        back: by minus the angles, which undoes it and is its adjoint.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    heads, width = qkv.shape[-2:]
    fits = rotation.dim() in (3, 4) and rotation.shape[-1] * 2 == width
    fits = fits and rotation.shape[0] == 2 and rotation.shape[1:-2] in ((), (heads,))
    if not fits or rotation.shape[-2] > qkv.shape[1] or rotation.dtype.itemsize < 4:
        raise ValueError(
            f"rotation must be (2, n, {width / 2:g}) or (2, {heads}, n, {width / 2:g}) in at least "
            f"fp32 with n <= {qkv.shape[1]}, got {describe(rotation)}"
        )
    if not qkv.is_contiguous():
        raise ValueError("qkv must be contiguous to be turned in place")
    _rotate(qkv, rotation, back)
    return qkv


def _check_kind(kind: str) -> None:
    if kind not in reference.ACTIVATIONS:
        raise ValueError(f"kind must be one of {sorted(reference.ACTIVATIONS)}, got {kind!r}")


def _rstd_of(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


_op = partial(registration.op, versions="pointwise", dtype=registration.rarest, products=False)

_layer_norm_fwd = _op(
    "layer_norm_fwd(Tensor x, float eps, ScalarType dtype, bool rms) -> (Tensor xhat, Tensor rstd)",
    "layer_norm",
    lambda x, eps, dtype, rms: (_like(x, dtype), _rstd_of(x)),
)
_add_layer_norm_fwd = _op(
    "add_layer_norm_fwd(Tensor x, Tensor delta, float eps, ScalarType dtype, bool rms) "
    "-> (Tensor y, Tensor xhat, Tensor rstd)",
    "add_layer_norm",
    lambda x, delta, eps, dtype, rms: (_like(x), _like(x, dtype), _rstd_of(x)),
)
_layer_norm_bwd = _op(
    "layer_norm_bwd(Tensor d_xhat, Tensor xhat, Tensor rstd, Tensor? residual, ScalarType dtype, "
    "ScalarType? narrow, bool rms) -> (Tensor dx, Tensor copy)",
    "layer_norm_backward",
    lambda d_xhat, xhat, rstd, residual, dtype, narrow, rms: (
        _like(d_xhat, dtype),
        rstd.new_empty(0) if narrow is None else _like(d_xhat, narrow),
    ),
)
_activation_fwd = _op(
    "activation_fwd(Tensor u, str kind) -> Tensor", "activation", lambda u, kind: _like(u)
)
_activation_coded_fwd = _op(
    "activation_coded_fwd(Tensor u, str kind) -> (Tensor y, Tensor code)",
    "activation_coded",
    lambda u, kind: (_like(u), _like(u, torch.uint8)),
)
_activation_bwd = _op(
    "activation_bwd(Tensor d, Tensor u_or_code, str kind) -> Tensor",
    "activation_backward",
    lambda d, u_or_code, kind: _like(d),
)
_gated_fwd = _op(
    "gated_fwd(Tensor u, str kind) -> Tensor",
    "gated",
    lambda u, kind: u.new_empty((*u.shape[:-1], u.shape[-1] // 2)),
)
_gated_bwd = _op(
    "gated_bwd(Tensor d, Tensor u, str kind) -> Tensor",
    "gated_backward",
    lambda d, u, kind: _like(u),
)
_gated_norm_fwd = _op(
    "gated_norm_fwd(Tensor u, str kind, float eps, bool rms) -> Tensor",
    "gated_norm",
    lambda u, kind, eps, rms: u.new_empty((*u.shape[:-1], u.shape[-1] // 2)),
)
_gated_norm_bwd = _op(
    "gated_norm_bwd(Tensor d, Tensor u, str kind, float eps, bool rms) -> Tensor",
    "gated_norm_backward",
    lambda d, u, kind, eps, rms: _like(u),
)
_rotate = _op(
    "rotate_(Tensor(a!) qkv, Tensor rotation, bool back) -> ()",
    "rotate_",
    lambda qkv, rotation, back: None,
    layout=None,
)
