"""Frequency-shortcut statistics: windowed images, their patch tokens, energy-weighted pooling."""

from .op import shortcut_images, shortcut_pool, shortcut_tokens

__all__ = ["shortcut_images", "shortcut_pool", "shortcut_tokens"]
