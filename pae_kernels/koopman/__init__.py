"""Koopman prediction error and Lyapunov energy of lifted prompts, all pairs of blocks at once."""

from .op import koopman_losses, koopman_rollout, runs_on_device

__all__ = ["koopman_losses", "koopman_rollout", "runs_on_device"]
