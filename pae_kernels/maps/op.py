"""The ops `enlarged_conv` and `pixel_loss`: signatures, checks, declarations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, cpu, registration
from ..checks import describe
from . import reference

MOST_SCALE = 16  # of csrc/cpu/cpu.h


def _with_cpu(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type == "cpu" and dtype != torch.float32:
        return f"computes in fp32, not {dtype}"
    return backends.with_cpu(device_type, dtype) or cpu.lacks("pae_cpu_enlarged_fwd")


for _op in ("enlarged_conv", "pixel_loss"):
    backends.register(
        _op,
        backends.Version("cpu", f"{__package__}.cpu", _with_cpu),
        backends.Version("reference", reference, backends.anywhere),
    )


def enlarged_conv(x: Tensor, weight: Tensor, scale: int) -> Tensor:
    """A 3 x 3 convolution, padded with zeros, of x enlarged bilinearly between the centres of
    pixels.

    Enlarging acts on pixels and a tap's matrix on channels, so they change places: the nine
    products are made at the small size, scale^2 times fewer multiplications, with the same result
    up to rounding. The enlarged x exists nowhere and is not kept for the backward. (In plain
    PyTorch, where `python -m pae_kernels` shows that version, both are as written.)

    Args:
        x: (B, h, w, C_in) float.
        weight: (C_out, C_in, 3, 3) of the dtype of x, as `nn.Conv2d` has it.
        scale: from 1 to 16.

    Returns:
        (B, scale h, scale w, C_out).

    Gradients: x and weight; further ones are those of `reference`. Saved: both.
    Numerics: products with fp32 accumulation, exact for fp32 inputs.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
    """
    _float("x", x, "(B, h, w, C_in)")
    _float("weight", weight, "(C_out, C_in, 3, 3)")
    shape = (weight.shape[0], x.shape[3], 3, 3)
    if tuple(weight.shape) != shape or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight must be {shape} of {x.dtype} on {x.device}, got {describe(weight)}"
        )
    if 0 in (*x.shape[1:], weight.shape[0]):
        raise ValueError(f"x and weight must have entries, got {describe(x)}, {describe(weight)}")
    if type(scale) is not int or not 1 <= scale <= MOST_SCALE:
        raise ValueError(f"scale must be an integer from 1 to {MOST_SCALE}, got {scale!r}")
    return _enlarged_conv(x, weight, scale)


def pixel_loss(logits: Tensor, masks: Tensor, ignored: int = 255) -> Tensor:
    """Cross-entropy of logits, enlarged bilinearly (between the centres of pixels) to the size of
    masks, summed over all pixels that have a class.

    Bytes: logits at the size of the masks, and their gradient, exist nowhere; kept for the backward
    is one number per pixel. (In plain PyTorch they do exist, and are made again in the backward.)

    Args:
        logits: (B, h, w, K) float. masks: (B, H, W) int64, numbers below K. A number that is no
            class makes the loss NaN.
        ignored: the number in masks whose pixels have no loss.

    Returns:
        () in the dtype of logits.

    Gradients: logits; further ones are those of `reference`.
    Numerics: fp32 or wider inside.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
    """
    _float("logits", logits, "(B, h, w, K)")
    if not isinstance(masks, Tensor) or masks.dtype != torch.int64:
        raise TypeError(f"masks must be an int64 tensor (B, H, W), got {describe(masks)}")
    fits = masks.dim() == 3 and masks.shape[0] == logits.shape[0]
    if not fits or masks.device != logits.device:
        raise ValueError(
            f"masks must be ({logits.shape[0]}, H, W) on {logits.device}, got {describe(masks)}"
        )
    if 0 in (*logits.shape[1:], *masks.shape[1:]):
        raise ValueError(
            f"logits and masks must have entries, got {describe(logits)}, {describe(masks)}"
        )
    if type(ignored) is not int or not -(2**31) <= ignored < 2**31:
        raise ValueError(f"ignored must be an integer of 32 bits, got {ignored!r}")
    return _pixel_loss(logits, masks, ignored)


def has_kernel(op: str, x: Tensor) -> bool:
    """Whether an op of this module has more than plain PyTorch for x, which then had better stay as
    it is: autograd would keep less, and `torch.compile` and autocast see what is in it.
    """
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if backends.forced() not in (None, "cpu"):
        return False
    return backends.choose(op, x.device, x.dtype) is not reference


def _float(name: str, t: Any, shape: str) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name} must be a float tensor {shape}, got {describe(t)}")
    if t.dim() != 4:
        raise ValueError(f"{name} must be {shape}, got {describe(t)}")


def _enlarged(x: Tensor, weight: Tensor, scale: int) -> Tensor:
    batch, rows, columns, _ = x.shape
    return x.new_empty(batch, scale * rows, scale * columns, weight.shape[0])


_enlarged_conv = registration.differentiable(
    "enlarged_conv",
    "(Tensor x, Tensor weight, int scale) -> (Tensor y)",
    "(Tensor d_y, Tensor x, Tensor weight, int scale, bool need_x, bool need_weight) "
    "-> (Tensor d_x, Tensor d_weight)",
    run=("enlarged_conv", "enlarged_conv_backward"),
    fake=_enlarged,
    definition=reference.enlarged_conv,
)
_pixel_loss = registration.differentiable(
    "pixel_loss",
    "(Tensor logits, Tensor masks, int ignored) -> (Tensor loss, Tensor lse)",
    "(Tensor d_loss, Tensor logits, Tensor masks, Tensor lse, int ignored) -> (Tensor d_logits)",
    run=("pixel_loss", "pixel_loss_backward"),
    fake=lambda logits, masks, ignored: (
        logits.new_empty(()),
        logits.new_empty(masks.shape),
    ),
    definition=lambda *given: reference.pixel_loss(*given)[0],
    returned=1,
)
