"""Prompt-concatenated attention."""

from .op import class_attention, prompt_attention

__all__ = ["class_attention", "prompt_attention"]
