"""Enlarged maps in plain PyTorch, channels last."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BILINEAR: dict[str, Any] = {"mode": "bilinear", "align_corners": False}


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def enlarged_conv(x: Tensor, weight: Tensor, scale: int) -> Tensor:
    """The 3 x 3 convolution of x, enlarged."""
    large = F.interpolate(_channels_first(x), scale_factor=scale, **_BILINEAR)
    return _channels_last(F.conv2d(large, weight, padding=1))


def enlarged_conv_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, scale: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; empty where none is needed."""
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    with torch.enable_grad():
        y = enlarged_conv(x, weight, scale)
    wanted = [t for t, need in ((x, need_x), (weight, need_weight)) if need]
    found = iter(torch.autograd.grad(y, wanted, d_y) if wanted else ())
    d_x, d_weight = (
        next(found) if need else t.new_empty(0) for t, need in ((x, need_x), (weight, need_weight))
    )
    return d_x, d_weight


def pixel_loss(logits: Tensor, masks: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """The summed loss, and log sum exp of every pixel's logits."""
    large = _at_size_of(masks, logits)
    lse = large.logsumexp(1)
    known = (masks >= 0) & (masks < logits.shape[-1])
    own = large.gather(1, masks.where(known, masks.new_zeros(()))[:, None])[:, 0]
    loss = (lse - own).masked_fill(~known, torch.nan).masked_fill(masks == ignored, 0.0)
    return loss.sum(), lse


def pixel_loss_backward(
    d_loss: Tensor, logits: Tensor, masks: Tensor, lse: Tensor, ignored: int
) -> Tensor:
    """The gradient of the logits."""
    logits = logits.detach().requires_grad_()
    with torch.enable_grad():
        large = _at_size_of(masks, logits)
    d = (large.detach() - lse[:, None]).exp()
    known = (masks >= 0) & (masks < logits.shape[-1])
    at = masks.where(known, masks.new_zeros(()))[:, None]
    d.scatter_add_(1, at, -known[:, None].to(d.dtype))
    d *= (d_loss * (masks != ignored))[:, None]
    return torch.autograd.grad(large, logits, d)[0].contiguous()


def _at_size_of(masks: Tensor, logits: Tensor) -> Tensor:
    size = [int(n) for n in masks.shape[-2:]]
    return F.interpolate(_channels_first(logits), size=size, **_BILINEAR)
