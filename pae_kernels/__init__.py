"""Kernels for prompt tuning: tensors in, tensors out. Knows nothing of models, prompts or
training.
"""

from .attention import class_attention, prompt_attention

__all__ = ["class_attention", "prompt_attention"]
