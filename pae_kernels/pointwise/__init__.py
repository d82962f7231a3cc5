"""The element-wise and row-wise pieces of a frozen block: LayerNorm without affine, and
activations.
"""

from .op import (
    activation,
    activation_,
    activation_backward,
    add_layer_norm,
    layer_norm,
    layer_norm_backward,
)
from .reference import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "activation",
    "activation_",
    "activation_backward",
    "add_layer_norm",
    "layer_norm",
    "layer_norm_backward",
]
