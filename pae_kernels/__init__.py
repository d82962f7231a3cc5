"""Kernels for prompt tuning: tensors in, tensors out. Knows nothing of models, prompts or
training.
"""

from .attention import prompt_attention

__all__ = ["prompt_attention"]
