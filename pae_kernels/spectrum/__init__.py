"""Windowed inverse transforms and energy-weighted pooling of frequency-shortcut statistics."""

from .op import shortcut_images, shortcut_pool

__all__ = ["shortcut_images", "shortcut_pool"]
