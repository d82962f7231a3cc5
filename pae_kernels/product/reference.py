"""A product by PyTorch and the pointwise pass behind it: what a block runs without epilogues."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pointwise.reference import activation, activation_backward, activation_coded


def product_activation(
    x: Tensor, weight: Tensor, bias: Tensor, kind: str, keep: str
) -> tuple[Tensor, Tensor]:
    """act(x W^T + b), and of x W^T + b what `keep` says."""
    hidden = F.linear(x, weight, bias)
    if keep == "code":
        return activation_coded(hidden, kind)
    y = activation(hidden, kind)
    return y, hidden if keep == "hidden" else x.new_empty(0)


def product_activation_backward(d: Tensor, weight: Tensor, kept: Tensor, kind: str) -> Tensor:
    """(d W) act'(u), from u or from its coded derivative."""
    return activation_backward(torch.matmul(d, weight), kept, kind)
