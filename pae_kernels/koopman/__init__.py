"""Koopman prediction error and Lyapunov energy of lifted prompts, all pairs of blocks at once."""

from .op import koopman_losses, koopman_rollout

__all__ = ["koopman_losses", "koopman_rollout"]
