"""The pointwise ops: checks, registration. They live inside the engine's own autograd functions,
one op a direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from . import reference

backends.register("pointwise", backends.Version("reference", reference, backends.anywhere))


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


def layer_norm_backward(
    d_xhat: Tensor, xhat: Tensor, rstd: Tensor, residual: Tensor | None = None
) -> Tensor:
    """residual + rstd (d - mean(d) - xhat mean(d xhat)), in the dtype of rstd.

    Args:
        d_xhat, xhat: (..., D) gradient of the normalised rows, and the rows themselves.
        rstd: (..., 1) as returned by `layer_norm`.
        residual: (..., D) gradient that flows around the norm, added in the same pass.
    """
    return torch.ops.pae.layer_norm_bwd(d_xhat, xhat, rstd, residual)


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
_lib.define("layer_norm_bwd(Tensor d_xhat, Tensor xhat, Tensor rstd, Tensor? residual) -> Tensor")
_lib.define("activation_fwd(Tensor u, str kind) -> Tensor")
_lib.define("activation_coded_fwd(Tensor u, str kind) -> (Tensor, Tensor)")
_lib.define("activation_bwd(Tensor d, Tensor u_or_code, str kind) -> Tensor")


def _version(t: Tensor):
    return backends.choose("pointwise", t.device)


def _layer_norm_fwd(x, eps, dtype):
    return _version(x).layer_norm(x, eps, dtype)


# outputs are contiguous, as the fakes below say, also where PyTorch would keep an input's layout


def _layer_norm_bwd(d_xhat, xhat, rstd, residual):
    return _version(d_xhat).layer_norm_backward(d_xhat, xhat, rstd, residual).contiguous()


def _activation_fwd(u, kind):
    return _version(u).activation(u.contiguous(), kind)


def _activation_coded_fwd(u, kind):
    version, u = _version(u), u.contiguous()
    return version.activation(u, kind), version.encode_derivative(u, kind)


def _activation_bwd(d, u_or_code, kind):
    d, u_or_code = d.contiguous(), u_or_code.contiguous()
    if u_or_code.dtype == torch.uint8:
        return _version(d).decode_backward(d, u_or_code)
    return _version(d).activation_backward(d, u_or_code, kind)


for _key in ("CPU", "CUDA"):
    _lib.impl("layer_norm_fwd", _layer_norm_fwd, _key)
    _lib.impl("layer_norm_bwd", _layer_norm_bwd, _key)
    _lib.impl("activation_fwd", _activation_fwd, _key)
    _lib.impl("activation_coded_fwd", _activation_coded_fwd, _key)
    _lib.impl("activation_bwd", _activation_bwd, _key)


@torch.library.register_fake("pae::layer_norm_fwd", lib=_lib)
def _(x, eps, dtype):
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape, dtype=dtype), rstd


@torch.library.register_fake("pae::layer_norm_bwd", lib=_lib)
def _(d_xhat, xhat, rstd, residual):
    return d_xhat.new_empty(d_xhat.shape, dtype=rstd.dtype)


@torch.library.register_fake("pae::activation_fwd", lib=_lib)
def _(u, kind):
    return u.new_empty(u.shape)


@torch.library.register_fake("pae::activation_coded_fwd", lib=_lib)
def _(u, kind):
    return u.new_empty(u.shape), u.new_empty(u.shape, dtype=torch.uint8)


@torch.library.register_fake("pae::activation_bwd", lib=_lib)
def _(d, u_or_code, kind):
    return d.new_empty(d.shape)
