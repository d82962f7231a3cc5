"""The ops on maps in C++ for CPUs, in fp32. Products are BLAS's; what is made of them, and the
loss, is in `csrc/cpu/maps.h`, which says what bounds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu, native

_Enlarged = native.params(
    "cpu_enlarged",
    **dict.fromkeys(("threads", "scale", "reserved"), native.INT32),
    **dict.fromkeys(("images", "rows", "columns", "channels"), native.INT64),
    **dict.fromkeys(("taps", "map"), native.POINTER),
)
_PixelLoss = native.params(
    "cpu_pixel_loss",
    **dict.fromkeys(("threads", "ignored"), native.INT32),
    factor=native.FLOAT32,
    **dict.fromkeys(("images", "rows", "columns", "classes", "height", "width"), native.INT64),
    **dict.fromkeys(("logits", "masks", "lse", "losses", "d_logits"), native.POINTER),
)


def _taps_of(weight: Tensor) -> Tensor:
    """(9 C_out, C_in): a matrix per tap, row by row of the window."""
    return weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1])


def _enlarged(direction: str, taps: Tensor, image: Tensor, size: torch.Size, scale: int) -> None:
    """Of one image: (rows columns, 9 C) products, and (scale rows, scale columns, C)."""
    shape = {"images": 1, "rows": size[0], "columns": size[1], "channels": image.shape[-1]}
    given = _Enlarged(scale=scale, **shape, taps=taps, map=image)
    cpu.call(f"pae_cpu_enlarged_{direction}", given)


def enlarged_conv(x: Tensor, weight: Tensor, scale: int) -> Tensor:
    """Same contract as the reference's. An image at a time, whose nine small maps exist."""
    batch, rows, columns, width = x.shape
    y = x.new_empty(batch, scale * rows, scale * columns, weight.shape[0])
    taps = _taps_of(weight).T
    for image, own in zip(x, y):
        _enlarged("fwd", image.view(-1, width) @ taps, own, image.shape, scale)
    return y


def enlarged_conv_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, scale: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's; weights' gradients are summed image by image."""
    batch, rows, columns, width = x.shape
    taps = _taps_of(weight)
    d_x = torch.empty_like(x) if need_x else x.new_empty(0)
    d_taps = torch.zeros_like(taps)
    products = x.new_empty(rows * columns, len(taps))
    for i in range(batch):
        _enlarged("bwd", products, d_y[i], x.shape[1:], scale)
        if need_x:
            torch.mm(products, taps, out=d_x[i].view(-1, width))
        if need_weight:
            d_taps.addmm_(products.T, x[i].view(-1, width))
    if not need_weight:
        return d_x, weight.new_empty(0)
    d_weight = d_taps.view(3, 3, *weight.shape[:2]).permute(2, 3, 0, 1)
    return d_x, d_weight.contiguous()


def _loss_of(logits: Tensor, masks: Tensor, lse: Tensor, **more: object) -> _PixelLoss:  # type: ignore[valid-type]
    images, rows, columns, classes = logits.shape
    shape = {"images": images, "rows": rows, "columns": columns, "classes": classes}
    shape |= {"height": masks.shape[1], "width": masks.shape[2]}
    return _PixelLoss(**shape, logits=logits, masks=masks, lse=lse, **more)


def pixel_loss(logits: Tensor, masks: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's."""
    lse, losses = (logits.new_empty(shape) for shape in (masks.shape, masks.shape[:2]))
    given = _loss_of(logits, masks, lse, ignored=ignored, losses=losses)
    cpu.call("pae_cpu_pixel_loss_fwd", given)
    return losses.sum(), lse


def pixel_loss_backward(
    d_loss: Tensor, logits: Tensor, masks: Tensor, lse: Tensor, ignored: int
) -> Tensor:
    """Same contract as the reference's."""
    d_logits = torch.empty_like(logits)
    more = {"ignored": ignored, "factor": float(d_loss), "d_logits": d_logits}
    cpu.call("pae_cpu_pixel_loss_bwd", _loss_of(logits, masks, lse, **more))
    return d_logits
