"""Enlarged maps of dense heads."""

from .op import enlarged_conv, has_kernel, pixel_loss

__all__ = ["enlarged_conv", "has_kernel", "pixel_loss"]
