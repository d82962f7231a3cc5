"""Two products of a frozen MLP, each with the pointwise pass behind it as its epilogue."""

from .op import product_activation, product_activation_backward, wanted

__all__ = ["product_activation", "product_activation_backward", "wanted"]
