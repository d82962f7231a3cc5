"""Koopman prediction error and Lyapunov energy of prompt states, all pairs of blocks at once."""

from .op import koopman_losses

__all__ = ["koopman_losses"]
