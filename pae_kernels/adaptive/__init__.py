"""Prompts computed from the image: mixtures of normalised rows, and the bottleneck behind them."""

from .op import prompt_bottleneck, token_mix

__all__ = ["prompt_bottleneck", "token_mix"]
