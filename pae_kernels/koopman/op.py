"""The op `koopman_losses`: signature, checks, registration, autograd. Reads as every op does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from . import reference

backends.register("koopman_losses", backends.Version("reference", reference, backends.anywhere))

FORMULATIONS = ("code", "paper")


def koopman_losses(
    states: Tensor, K: Tensor, L: Tensor, formulation: str = "code"
) -> tuple[Tensor, Tensor]:
    """sum_j |z_j K - z_{j+1}|^2 and sum_j phi(V(z_j K) - V(z_j)), V(z) = |L z|^2 / sigma_max(L)^2.

    `reference` states both formulations in full.

    Args:
        states: (m + 1, P, k) prompt states of consecutive blocks, fp32 or fp64, P >= 1; m may be 0.
        K: Koopman operator, applied from the right: (k, k), or one per state (m + 1, k, k), the
            last one unused.
        L: Lyapunov factor of the same shape.
        formulation: "code" (mean error, normalised V of the predicted next state, softplus) or
            "paper" (summed error, V = tr(z L^T L z^T) of the actual next state, max(0, .)).

    Returns:
        consistency and lyapunov, unweighted scalars in the dtype of states.

    Gradients: states, K and L; analytic, once differentiable. Operators that belong to no pair get
        zeros. Where several singular values of L are the largest, one of them is differentiated.

    Numerics: sigma_max(L) is exact to rounding at every spectrum and scale. An L with NaN or
        infinity makes the Lyapunov term NaN and raises nothing.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.

    Source: PAE (arXiv 2601.20232), Eq. 6-11.
    """
    _check(states, K, L, formulation)
    if torch.compiler.is_compiling():
        return torch.ops.pae.koopman_losses_fwd(states, K, L, formulation)[:2]
    return _KoopmanLosses.apply(states, K, L, formulation)


def _check(states, K, L, formulation) -> None:
    if formulation not in FORMULATIONS:
        raise ValueError(f"formulation must be one of {FORMULATIONS}, got {formulation!r}")
    if states.dim() != 3 or 0 in states.shape[1:]:
        raise ValueError(f"states must be (blocks, P >= 1, k >= 1), got {_says(states)}")
    if states.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"states must be float32 or float64, got {_says(states)}")
    blocks, _, k = states.shape
    for name, operator in (("K", K), ("L", L)):
        if tuple(operator.shape) not in ((k, k), (blocks, k, k)):
            raise ValueError(
                f"{name} must be {(k, k)} or {(blocks, k, k)} for states {tuple(states.shape)}, "
                f"got {_says(operator)}"
            )
        if operator.dtype != states.dtype or operator.device != states.device:
            raise TypeError(f"{name} must be like states ({_says(states)}), got {_says(operator)}")
    if K.dim() != L.dim():
        raise ValueError(f"K and L must have the same shape, got {_says(K)} and {_says(L)}")


def _says(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


_lib = torch.library.Library("pae", "FRAGMENT")
_SAVED = ("error", "points", "images", "norms", "values", "gain", "left", "right")
_saved = ", ".join(f"Tensor {name}" for name in _SAVED)
_lib.define(
    "koopman_losses_fwd(Tensor states, Tensor K, Tensor L, str formulation) -> "
    f"(Tensor consistency, Tensor lyapunov, {_saved})"
)
_lib.define(
    "koopman_losses_bwd(Tensor d_consistency, Tensor d_lyapunov, Tensor states, Tensor K, "
    f"Tensor L, str formulation, {_saved}) -> (Tensor d_states, Tensor d_K, Tensor d_L)"
)


# autocast would reach the products inside: the regulariser is never computed in half precision
def _forward(states, *rest):
    with torch.autocast(states.device.type, enabled=False):
        return backends.choose("koopman_losses", states.device).forward(states, *rest)


def _backward(d_consistency, *rest):
    device = d_consistency.device
    with torch.autocast(device.type, enabled=False):
        return backends.choose("koopman_losses", device).backward(d_consistency, *rest)


for _key in ("CPU", "CUDA"):
    _lib.impl("koopman_losses_fwd", _forward, _key)
    _lib.impl("koopman_losses_bwd", _backward, _key)


@torch.library.register_fake("pae::koopman_losses_fwd", lib=_lib)
def _(states, K, L, formulation):
    count, k = states.shape[1:]
    pairs = states[1:].shape[0]
    norms = pairs if K.dim() == 3 else 1
    return (
        states.new_empty(()),
        states.new_empty(()),
        states.new_empty(pairs, count, k),
        states.new_empty(pairs, 2 * count, k),
        states.new_empty(pairs, 2 * count, k),
        states.new_empty(pairs, 2 * count),
        states.new_empty(pairs, 2 * count),
        states.new_empty(norms),
        states.new_empty(norms, k),
        states.new_empty(norms, k),
    )


@torch.library.register_fake("pae::koopman_losses_bwd", lib=_lib)
def _(d_consistency, d_lyapunov, states, K, L, *rest):
    return states.new_empty(states.shape), K.new_empty(K.shape), L.new_empty(L.shape)


def _setup_context(ctx, inputs, output):
    states, K, L, ctx.formulation = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(states, K, L, *output[2:])


def _grads(ctx, d_consistency, d_lyapunov, *_):
    states, K, L, *saved = ctx.saved_tensors
    return *torch.ops.pae.koopman_losses_bwd(
        d_consistency, d_lyapunov, states, K, L, ctx.formulation, *saved
    ), None


torch.library.register_autograd(
    "pae::koopman_losses_fwd", _grads, setup_context=_setup_context, lib=_lib
)


class _KoopmanLosses(torch.autograd.Function):
    """Eager path: the same two ops with a third of `register_autograd`'s cost per call."""

    @staticmethod
    def forward(ctx, states, K, L, formulation):
        consistency, lyapunov, *saved = torch.ops.pae.koopman_losses_fwd(states, K, L, formulation)
        ctx.formulation = formulation
        ctx.save_for_backward(states, K, L, *saved)
        return consistency, lyapunov

    backward = staticmethod(once_differentiable(_grads))
