"""Kernels for prompt tuning: tensors in, tensors out. Knows nothing of models, prompts or
training.
"""

import sys

try:
    from . import flops, product  # noqa: F401  (its ops have formulas)
    from .adaptive import prompt_bottleneck, token_mix
    from .attention import class_attention, prompt_attention
    from .koopman import koopman_losses, koopman_rollout
    from .maps import enlarged_conv, pixel_loss
    from .spectrum import shortcut_images, shortcut_pool, shortcut_tokens

    flops.register_when_imported()
except (Exception, SystemExit):
    # `python -m pae_kernels` imports this first, and says itself what is wrong, e.g. with torch
    if "pae_kernels" not in sys.orig_argv:
        raise

__all__ = [
    "class_attention",
    "enlarged_conv",
    "koopman_losses",
    "koopman_rollout",
    "pixel_loss",
    "prompt_attention",
    "prompt_bottleneck",
    "shortcut_images",
    "shortcut_pool",
    "shortcut_tokens",
    "token_mix",
]
