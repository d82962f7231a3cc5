"""The bilinear resize that TensorFlow 1 had, which VTAB's and VPT's pipelines go through.

`tf.image.resize` under `tensorflow.compat.v1` calls `resize_bilinear` without half-pixel centres
and without antialiasing: output pixel i reads position i * in / out of its row, between the two
pixels beside it, the last one repeated. Other libraries read (i + 0.5) * in / out - 0.5, so none of
their modes equals it: what a 32-pixel image shows at 224 is three pixels away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def legacy_bilinear(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W), any dtype, to float32 (C, *size) on the same scale of values, not rounded.

    Raises:
        ValueError: an image or a size of no pixels.
    """
    if min(image.shape[-2:]) < 1 or min(size) < 1:
        raise ValueError(f"{tuple(image.shape)} cannot be resized to {size}")
    found = image.float()
    for axis, out in ((2, size[1]), (1, size[0])):  # columns first, as TensorFlow's kernel
        length = found.shape[axis]
        # positions in float32, and the ratio too: this decides where they round to a pixel
        place = torch.arange(out, dtype=torch.float32) * torch.tensor(length / out)
        left = place.floor()
        weight = place - left
        first = left.long().clamp_(max=length - 1)
        second = (first + 1).clamp_(max=length - 1)
        low, high = found.index_select(axis, first), found.index_select(axis, second)
        found = low + (high - low) * (weight if axis == 2 else weight[:, None])
    return found


class LegacyBilinear:
    """A transform PIL -> float32 (3, H, W) on the scale 0 .. 255: squashed by `legacy_bilinear`.

    Args:
        size: (H, W).
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Any) -> Tensor:
        """Of an RGB image of PIL."""
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
        return legacy_bilinear(pixels, self.size).contiguous()
