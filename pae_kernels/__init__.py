"""Kernels for prompt tuning: tensors in, tensors out. Knows nothing of models, prompts or
training.
"""

from .attention import class_attention, prompt_attention
from .koopman import koopman_losses, koopman_rollout

__all__ = ["class_attention", "koopman_losses", "koopman_rollout", "prompt_attention"]
