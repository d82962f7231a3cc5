"""LayerNorm without affine and the activations of vision transformers, in plain PyTorch.

Frozen weights have no gradient and the affine part is folded into the next product, so LayerNorm's
backward needs only the normalised rows (which are that product's input and kept anyway) and 1/std.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _quick_gelu(u: Tensor) -> Tensor:
    return u * torch.sigmoid(1.702 * u)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
}

# 8-bit storage of an activation's derivative. GELU's lies in [-0.130, 1.130]; code = 200 g + 27 is
# exact at 0 and 1, where most entries are, and is off by at most 1/400 elsewhere.
_CODE_SCALE, _CODE_ZERO = 200.0, 27.0


def layer_norm(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x - mean) / std over the last axis in `dtype`, and 1/std (..., 1); statistics in at least
    fp32.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    xhat, _, rstd = torch.native_layer_norm(wide, wide.shape[-1:], None, None, eps)
    return xhat.to(dtype), rstd


def layer_norm_backward(
    d_xhat: Tensor, xhat: Tensor, rstd: Tensor, residual: Tensor | None
) -> Tensor:
    """residual + rstd (d - mean(d) - xhat mean(d xhat)): gradient through the norm joined with the
    residual's.
    """
    wide = rstd.dtype
    d, xhat = d_xhat.to(wide), xhat.to(wide)
    # PyTorch's own kernel on rows that are already normalised: mean 0, rstd 1; the true rstd
    # multiplies after
    zero, one = torch.zeros_like(rstd), torch.ones_like(rstd)
    d, _, _ = torch.ops.aten.native_layer_norm_backward(
        d, xhat, xhat.shape[-1:], zero, one, None, None, [True, False, False]
    )
    return d * rstd if residual is None else torch.addcmul(residual.to(wide), d, rstd)


def activation(u: Tensor, kind: str) -> Tensor:
    """act(u) in the dtype of u."""
    return ACTIVATIONS[kind](u)


def derivative(u: Tensor, kind: str) -> Tensor:
    """act'(u) in the dtype of u."""
    return activation_backward(torch.ones_like(u), u, kind)


def activation_backward(d: Tensor, u: Tensor, kind: str) -> Tensor:
    """d act'(u)."""
    if kind == "gelu":
        return torch.ops.aten.gelu_backward(d, u)
    if kind == "gelu_tanh":
        return torch.ops.aten.gelu_backward(d, u, approximate="tanh")
    if kind == "silu":
        return torch.ops.aten.silu_backward(d, u)
    if kind == "relu":
        return torch.ops.aten.threshold_backward(d, u, 0)
    s = torch.sigmoid(1.702 * u)
    return d * (s + 1.702 * u * s * (1 - s))


def encode_derivative(u: Tensor, kind: str) -> Tensor:
    """act'(u) as one byte per entry."""
    g = derivative(u, kind).to(torch.promote_types(u.dtype, torch.float32))
    return g.mul_(_CODE_SCALE).add_(_CODE_ZERO).round_().clamp_(0, 255).to(torch.uint8)


def decode_backward(d: Tensor, code: Tensor) -> Tensor:
    """d times the decoded derivative, in the dtype of d."""
    g = code.to(d.dtype if d.dtype != torch.bfloat16 else torch.float32)
    return g.sub_(_CODE_ZERO).mul_(1.0 / _CODE_SCALE).mul_(d).to(d.dtype)
