"""The element-wise and row-wise pieces of a frozen block: norms without affine, activations, gates
and rotations.
"""

from .op import (
    activation,
    activation_,
    activation_backward,
    add_layer_norm,
    gated,
    gated_backward,
    gated_norm,
    gated_norm_backward,
    layer_norm,
    layer_norm_backward,
    rotate_,
)
from .reference import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "activation",
    "activation_",
    "activation_backward",
    "add_layer_norm",
    "gated",
    "gated_backward",
    "gated_norm",
    "gated_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rotate_",
]
