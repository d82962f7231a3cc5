"""The op `koopman_losses`: signature, checks, declaration. Reads as every op does."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backends, registration
from ..checks import describe
from . import reference

backends.register(
    "koopman_losses",
    backends.Version("cuda", f"{__package__}.cuda", backends.with_cuda),
    backends.Version("triton", f"{__package__}.triton", backends.with_triton),
    backends.Version("cpu", f"{__package__}.cpu", backends.with_cpu),
    backends.Version("reference", reference, backends.anywhere),
)

FORMULATIONS = ("code", "paper")
GAUGES = ("none", "layernorm")


def koopman_losses(
    prompts: Tensor,
    lift: Tensor,
    K: Tensor,
    L: Tensor,
    formulation: str = "code",
    gauge: str = "none",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """sum_j |z_j K - z_{j+1}|^2 and sum_j phi(V(z_j K) - V(z_j)), z_j = g(p_j) lift^T,
    V(z) = |L z|^2 / sigma_max(L)^2.

    `reference` states both formulations in full. Which blocks take part, and whether the first one
    does, is the caller's choice of what to stack.

    Args:
        prompts: (J, P, D) prompts of J consecutive blocks, fp32 or fp64, P >= 1; a J of 1 or 0 has
            no pair. With a leading axis of R packed runs, (R, J, P, D), everything else has it
            too, and nothing passes from one run to another.
        lift: (k, D), as the weight of a bias-free `nn.Linear(D, k)`.
        K: Koopman operator, applied from the right: (k, k), or one per block (J, k, k), the last
            one unused.
        L: Lyapunov factor of the same shape.
        formulation: "code" (mean error, normalised V of the predicted next state, softplus) or
            "paper" (summed error, V = tr(z L^T L z^T) of the actual next state, max(0, .)).
        gauge: "none" lifts the prompts as they are. "layernorm" lifts LayerNorm(prompts), without
            affine: a network with LayerNorm in front of its keys sees no more of a prompt than
            that, so neither loss can be lowered by shrinking prompts, which changes nothing else.
        eps: of the gauge's LayerNorm.

    Returns:
        consistency and lyapunov, unweighted, () or (R,), in the dtype of prompts.

    Gradients: prompts, lift, K and L; analytic. Further derivatives are those of `reference`.
        Operators that belong to no pair get zeros. Where several singular values of L are the
        largest, one of them is differentiated, once: there is no second derivative by L.

    Numerics: sigma_max(L) is exact to 1e-6, relative, at every spectrum and scale, to rounding on
        a CPU and in the reference. An L with NaN or infinity makes the Lyapunov term NaN and
        raises nothing. Products are exact fp32 whatever the flags for TF32 and autocast say.

    On a GPU in fp32 nothing waits for the device and nothing depends on earlier calls: it may be
    captured in a CUDA graph. The reference reads flags on the host (fp64 on a GPU).

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.

    Source: PAE (arXiv 2601.20232), Eq. 6-11.
    """
    _check(prompts, lift, K, L, formulation, gauge, eps)
    return _koopman_losses(
        prompts, lift, K, L, formulation, float(eps) if gauge == "layernorm" else None
    )


def runs_on_device(device: torch.device | str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether `koopman_losses` of such tensors reads nothing on the host, as a capture demands."""
    kind = torch.device(device).type
    return kind == "cuda" and backends.choose("koopman_losses", kind, dtype) is not reference


def koopman_rollout(z0: Tensor, K: Tensor, steps: int) -> Tensor:
    """z_t = z_0 K^t for t = 0 .. steps: what K alone predicts, for analysis and extrapolation.

    Args:
        z0: (..., P, k) states.
        K: (k, k), or (..., k, k) to go with the leading axes of z0.
        steps: at least 0.

    Returns:
        (steps + 1, ..., P, k), z0 first, in the dtype of z0.

    Gradients: z0 and K, by autograd, as often as wanted. One product a step: all states on the way
        are asked for, so K is not raised to powers.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an integer, got {steps!r}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if z0.dim() < 2:
        raise ValueError(f"z0 must be (..., P, k), got {describe(z0)}")
    k = z0.shape[-1]
    if K.dim() < 2 or tuple(K.shape) not in ((k, k), (*z0.shape[:-2], k, k)):
        raise ValueError(
            f"K must be {(k, k)} or {(*z0.shape[:-2], k, k)} for z0 {tuple(z0.shape)}, "
            f"got {describe(K)}"
        )
    if K.dtype != z0.dtype or K.device != z0.device:
        raise TypeError(f"K must be like z0 ({describe(z0)}), got {describe(K)}")
    states = [z0]
    for _ in range(steps):
        states.append(states[-1] @ K)
    return torch.stack(states)


def _check(
    prompts: Tensor, lift: Tensor, K: Tensor, L: Tensor, formulation: str, gauge: str, eps: Any
) -> None:
    if formulation not in FORMULATIONS:
        raise ValueError(f"formulation must be one of {FORMULATIONS}, got {formulation!r}")
    if gauge not in GAUGES:
        raise ValueError(f"gauge must be one of {GAUGES}, got {gauge!r}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps must be a number of at least 0, got {eps!r}")
    if prompts.dim() not in (3, 4) or 0 in prompts.shape[-2:] or 0 in prompts.shape[:-3]:
        raise ValueError(
            "prompts must be (J, P >= 1, D >= 1) or (R >= 1, J, P >= 1, D >= 1), "
            f"got {describe(prompts)}"
        )
    if prompts.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"prompts must be float32 or float64, got {describe(prompts)}")
    *runs, blocks, _, width = prompts.shape
    if 0 in lift.shape or lift.dim() < 2 or (*lift.shape[:-2], lift.shape[-1]) != (*runs, width):
        expected = ", ".join(map(str, (*runs, "k >= 1", width)))
        raise ValueError(
            f"lift must be ({expected}) for prompts {tuple(prompts.shape)}, got {describe(lift)}"
        )
    k = lift.shape[-2]
    for name, operator in (("K", K), ("L", L)):
        if tuple(operator.shape) not in ((*runs, k, k), (*runs, blocks, k, k)):
            raise ValueError(
                f"{name} must be {(*runs, k, k)} or {(*runs, blocks, k, k)} for prompts "
                f"{tuple(prompts.shape)} and lift {tuple(lift.shape)}, got {describe(operator)}"
            )
    if K.dim() != L.dim():
        raise ValueError(f"K and L must have the same shape, got {describe(K)} and {describe(L)}")
    for name, t in (("lift", lift), ("K", K), ("L", L)):
        if t.dtype != prompts.dtype or t.device != prompts.device:
            raise TypeError(f"{name} must be like prompts ({describe(prompts)}), got {describe(t)}")


def _forward(version: ModuleType, prompts: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Versions expect an axis of runs."""
    lift, K, L, formulation, eps = rest
    if prompts.dim() == 4:
        return version.forward(prompts, lift, K, L, formulation, eps)
    packed = (t[None] for t in (prompts, lift, K, L))
    consistency, lyapunov, *saved = version.forward(*packed, formulation, eps)
    return consistency.reshape(()), lyapunov.reshape(()), *saved


def _backward(version: ModuleType, *given: Any) -> tuple[Tensor, ...]:
    d_consistency, d_lyapunov, prompts, lift, K, L, *rest = given
    ends = d_consistency.reshape(-1), d_lyapunov.reshape(-1)
    if prompts.dim() == 4:
        return version.backward(*ends, prompts, lift, K, L, *rest)
    packed = (t[None] for t in (prompts, lift, K, L))
    return tuple(d[0] for d in version.backward(*ends, *packed, *rest))


def _outputs(
    prompts: Tensor, lift: Tensor, K: Tensor, L: Tensor, formulation: str, eps: float | None
) -> tuple[Tensor, ...]:
    *runs, blocks, count, _ = prompts.shape
    k = lift.shape[-2]
    packed = runs[0] if runs else 1
    pairs = prompts[1:].shape[0] if not runs else prompts[:, 1:].shape[1]
    groups = pairs if K.dim() == prompts.dim() else 1
    new = prompts.new_empty
    return (
        new(runs),
        new(runs),
        new(packed, blocks, count, k),
        new(packed, pairs, count, k),
        new(packed, pairs, 2 * count, k),
        new(packed, pairs, 2 * count),
        new(packed, pairs, 2 * count),
        new(packed, groups, 2),
        new(packed, groups, k),
        new(packed, groups, k),
        new(0) if eps is None else new(packed, blocks, count, 2),
    )


def _definition(prompts: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if prompts.dim() == 4:
        return reference.koopman_losses(prompts, *rest)
    operators, (formulation, eps) = rest[:3], rest[3:]
    lift, K, L = (t[None] for t in operators)
    consistency, lyapunov = reference.koopman_losses(prompts[None], lift, K, L, formulation, eps)
    return consistency[0], lyapunov[0]


_INPUTS = "Tensor prompts, Tensor lift, Tensor K, Tensor L, str formulation, float? eps"
_SAVED = (
    "Tensor states, Tensor predicted, Tensor images, Tensor pull, Tensor radial, Tensor spin, "
    "Tensor left, Tensor right, Tensor statistics"
)
_koopman_losses = registration.differentiable(
    "koopman_losses",
    f"({_INPUTS}) -> (Tensor consistency, Tensor lyapunov, {_SAVED})",
    f"(Tensor d_consistency, Tensor d_lyapunov, {_INPUTS}, {_SAVED}) "
    "-> (Tensor d_prompts, Tensor d_lift, Tensor d_K, Tensor d_L)",
    run=(_forward, _backward),
    fake=_outputs,
    definition=_definition,
    returned=2,
    layout=None,
)
