"""Prompt-concatenated attention."""

from .op import prompt_attention

__all__ = ["prompt_attention"]
