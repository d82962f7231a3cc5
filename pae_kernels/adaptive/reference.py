"""Prompts made of an image's rows, in plain PyTorch: the definition, and what runs without a
kernel.

`token_mix` is LayerNorm without affine and a product over rows. Its backward needs no gradient of
the normalised rows beyond the product W^T dU: with M = dU xhat^T (P x N), which is the gradient of
W before the sum over images, the two means in LayerNorm's backward are

    mean_d(W^T dU) = W^T mean_d(dU)      and      mean_d(W^T dU * xhat) = colsum(W * M) / D.

Sums and products run in at least fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda h: h.softmax(-1),
}


def token_mix(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """weight @ xhat per image, and the rows' mean and 1/std.

    Args:
        x: (B, N, D).
        weight: (P, N).
        eps: added to the variance.

    Returns:
        u (B, P, D) in the dtype of weight; mean and rstd (B, N, 1) in fp32 or wider.
    """
    wide = _wide(x, weight)
    xhat, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], None, None, eps)
    u = torch.bmm(weight.to(wide).expand(len(x), -1, -1), xhat)
    return u.to(weight.dtype), mean, rstd


def token_mix_backward(
    d_u: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, need_x: bool
) -> tuple[Tensor, Tensor]:
    """d_x (B, N, D) in the dtype of x (empty unless `need_x`) and d_weight (P, N)."""
    wide = rstd.dtype
    d, w = d_u.to(wide), weight.to(wide)
    centred = x.to(wide) - mean
    reads = torch.bmm(d, centred.transpose(1, 2)).mul_(rstd.transpose(1, 2))  # M (B, P, N)
    d_weight = reads.sum(0).to(weight.dtype)
    if not need_x:
        return x.new_empty(0), d_weight
    scaled = w * rstd.transpose(1, 2)  # (B, P, N): 1/std rides on the small matrix
    along = (scaled * reads).sum(1).unsqueeze(-1).mul_(rstd).div_(-x.shape[-1])
    across = (scaled * d.mean(-1, keepdim=True)).sum(1).unsqueeze(-1).neg_()
    d_x = torch.addcmul(across, centred, along, out=centred)
    return d_x.baddbmm_(scaled.transpose(1, 2), d).to(x.dtype), d_weight


def prompt_bottleneck(
    u: Tensor,
    gain: Tensor,
    shift: Tensor,
    bias: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    channel_mask: Tensor | None,
    hidden_mask: Tensor | None,
) -> Tensor:
    """g + (act(g down^T) * hidden_mask) up^T with g = (u gain + shift) * channel_mask + bias.

    Args:
        u: (B, P, D).
        gain: (D,). shift: (P, D). bias: (P,).
        down: (r, D). up: (D, r). r = 0 leaves g as it is.
        activation: a key of `ACTIVATIONS`.
        channel_mask: (B, D) or None. hidden_mask: (B, P, r) or None.

    Returns:
        (B, P, D) in the dtype of u.
    """
    wide = _wide(u)
    g, hidden = _inner(u, gain, shift, bias, down, channel_mask, wide)
    z = _drop(ACTIVATIONS[activation](hidden), hidden_mask)
    return torch.add(g, torch.matmul(z, up.to(wide).t())).to(u.dtype)


def prompt_bottleneck_backward(
    d_out: Tensor,
    u: Tensor,
    gain: Tensor,
    shift: Tensor,
    bias: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    channel_mask: Tensor | None,
    hidden_mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of u, gain, shift, bias, down and up; g and the hidden rows are formed again."""
    wide = _wide(u)
    g, hidden = _inner(u, gain, shift, bias, down, channel_mask, wide)
    z = ACTIVATIONS[activation](hidden)
    d = d_out.to(wide)
    d_hidden = _drop(torch.matmul(d, up.to(wide)), hidden_mask)
    d_hidden = _activation_backward(d_hidden, hidden, z, activation)
    d_up = torch.matmul(d.flatten(0, 1).t(), _drop(z, hidden_mask).flatten(0, 1))
    d_down = torch.matmul(d_hidden.flatten(0, 1).t(), g.flatten(0, 1))
    d_g = d + torch.matmul(d_hidden, down.to(wide))
    d_bias = d_g.sum((0, 2))
    if channel_mask is not None:
        d_g.mul_(channel_mask.to(wide).unsqueeze(1))
    d_gain = (d_g * u.to(wide)).sum((0, 1))
    d_shift = d_g.sum(0)
    grads = (d_g.mul_(gain.to(wide)), d_gain, d_shift, d_bias, d_down, d_up)
    return tuple(g.to(t.dtype) for g, t in zip(grads, (u, gain, shift, bias, down, up)))


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _inner(
    u: Tensor,
    gain: Tensor,
    shift: Tensor,
    bias: Tensor,
    down: Tensor,
    channel_mask: Tensor | None,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """g (B, P, D) and its hidden rows before the activation (B, P, r)."""
    g = torch.addcmul(shift.to(wide), u.to(wide), gain.to(wide))
    if channel_mask is not None:
        g.mul_(channel_mask.to(wide).unsqueeze(1))
    g.add_(bias.to(wide).unsqueeze(-1))
    return g, torch.matmul(g, down.to(wide).t())


def _drop(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows * mask.to(rows.dtype)


def _activation_backward(d: Tensor, h: Tensor, z: Tensor, kind: str) -> Tensor:
    """d act'(h), z = act(h)."""
    if kind == "relu":
        return torch.ops.aten.threshold_backward(d, h, 0)
    if kind == "gelu":
        return torch.ops.aten.gelu_backward(d, h)
    if kind == "sigmoid":
        return d * z * (1 - z)
    return z * (d - (d * z).sum(-1, keepdim=True))
