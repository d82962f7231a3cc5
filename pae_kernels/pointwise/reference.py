"""LayerNorm and RMSNorm without affine, activations, gates and rotations of vision transformers, in
plain PyTorch.

Frozen weights have no gradient and the affine part is folded into the next product, so LayerNorm's
backward needs only the normalised rows (which are that product's input and kept anyway) and 1/std.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _quick_gelu(u: Tensor) -> Tensor:
    return u * torch.sigmoid(1.702 * u)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
}

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda u: torch.ops.aten.gelu_(u, approximate="tanh"),
    "quick_gelu": lambda u: u.mul_(torch.sigmoid(1.702 * u)),
    "silu": torch.ops.aten.silu_,
    "relu": torch.ops.aten.relu_,
}

# 8-bit storage of an activation's derivative. GELU's lies in [-0.130, 1.130]; code = 200 g + 27 is
# exact at 0 and 1, where most entries are, and is off by at most 1/400 elsewhere.
_CODE_SCALE, _CODE_ZERO = 200.0, 27.0


def layer_norm(
    x: Tensor, eps: float, dtype: torch.dtype, rms: bool = False
) -> tuple[Tensor, Tensor]:
    """(x - mean) / std over the last axis in `dtype`, and 1/std (..., 1); statistics in at least
    fp32. With `rms`, the mean counts as 0.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if rms:
        rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        return (wide * rstd).to(dtype), rstd
    xhat, _, rstd = torch.native_layer_norm(wide, wide.shape[-1:], None, None, eps)
    return xhat.to(dtype), rstd


def add_layer_norm(
    x: Tensor, delta: Tensor, eps: float, dtype: torch.dtype, rms: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta in the dtype of x, and `layer_norm` of it."""
    y = (x + delta).to(x.dtype)
    return y, *layer_norm(y, eps, dtype, rms)


def layer_norm_backward(
    d_xhat: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
    narrow: torch.dtype | None,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """residual + rstd (d - mean(d) - xhat mean(d xhat)) in `dtype`, and in `narrow` if given."""
    wide = rstd.dtype
    d, xhat = d_xhat.to(wide), xhat.to(wide)
    if rms:
        d = d - xhat * (d * xhat).mean(-1, keepdim=True)
    else:
        # PyTorch's own kernel on rows that are already normalised: mean 0, rstd 1; the true rstd
        # multiplies after
        zero, one = torch.zeros_like(rstd), torch.ones_like(rstd)
        d, _, _ = torch.ops.aten.native_layer_norm_backward(
            d, xhat, xhat.shape[-1:], zero, one, None, None, [True, False, False]
        )
    dx = d * rstd if residual is None else torch.addcmul(residual.to(wide), d, rstd)
    copy = dx.new_empty(0) if narrow is None else dx.to(narrow, copy=True)
    return dx.to(dtype), copy


def activation(u: Tensor, kind: str) -> Tensor:
    """act(u) in the dtype of u."""
    return ACTIVATIONS[kind](u)


def activation_(u: Tensor, kind: str) -> Tensor:
    """act(u) in place of u."""
    return _IN_PLACE[kind](u)


def activation_backward(d: Tensor, kept: Tensor, kind: str) -> Tensor:
    """d act'(u) from u, or from the bytes of `activation_coded`, in the dtype of d."""
    if kept.dtype == torch.uint8:
        g = kept.to(torch.promote_types(d.dtype, torch.float32))
        return g.sub_(_CODE_ZERO).mul_(1.0 / _CODE_SCALE).mul_(d).to(d.dtype)
    if kind == "gelu":
        return torch.ops.aten.gelu_backward(d, kept)
    if kind == "gelu_tanh":
        return torch.ops.aten.gelu_backward(d, kept, approximate="tanh")
    if kind == "silu":
        return torch.ops.aten.silu_backward(d, kept)
    if kind == "relu":
        return torch.ops.aten.threshold_backward(d, kept, 0)
    s = torch.sigmoid(1.702 * kept)
    return d * (s + 1.702 * kept * s * (1 - s))


def activation_coded(u: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """act(u), and act'(u) as one byte per entry."""
    slope = activation_backward(torch.ones_like(u), u, kind)
    slope = slope.to(torch.promote_types(u.dtype, torch.float32))
    code = slope.mul_(_CODE_SCALE).add_(_CODE_ZERO).round_().clamp_(0, 255)
    return activation(u, kind), code.to(torch.uint8)


def gated(u: Tensor, kind: str) -> Tensor:
    """act(gate) up of (gate, up) = u."""
    gate, up = u.chunk(2, dim=-1)
    return activation(gate, kind) * up


def gated_backward(d: Tensor, u: Tensor, kind: str) -> Tensor:
    """(d up act'(gate), d act(gate)) of (gate, up) = u, in the dtype of d."""
    gate, up = u.chunk(2, dim=-1)
    wide = torch.promote_types(d.dtype, torch.float32)
    d_gate = activation_backward(d.to(wide) * up.to(wide), gate.to(wide), kind)
    return torch.cat([d_gate, d.to(wide) * activation(gate.to(wide), kind)], dim=-1).to(d.dtype)


def gated_norm(u: Tensor, kind: str, eps: float, rms: bool = False) -> Tensor:
    """The rows that `layer_norm` gives of `gated`'s, in their dtype."""
    return layer_norm(gated(u, kind), eps, u.dtype, rms)[0]


def gated_norm_backward(d: Tensor, u: Tensor, kind: str, eps: float, rms: bool = False) -> Tensor:
    """The gradient of u, both formed again."""
    xhat, rstd = layer_norm(gated(u, kind), eps, u.dtype, rms)
    d, _ = layer_norm_backward(d, xhat, rstd, None, d.dtype, None, rms)
    return gated_backward(d, u, kind)


def rotate_(qkv: Tensor, rotation: Tensor, back: bool) -> None:
    """In place: (a, b) to (a cos - b sin, b cos + a sin) of the halves of queries and keys, or of
    the only part.
    """
    sin, cos = rotation
    if sin.dim() == 3:  # (H, n, d/2) to (n, 1, H, d/2)
        sin, cos = sin.transpose(0, 1)[:, None], cos.transpose(0, 1)[:, None]
    else:
        sin, cos = sin[:, None, None], cos[:, None, None]
    sin = -sin if back else sin
    rows = qkv[:, qkv.shape[1] - len(sin) :, :2]
    a, b = rows.to(sin.dtype).chunk(2, dim=-1)
    rows.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
