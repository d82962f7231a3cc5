"""Koopman and Lyapunov losses in plain PyTorch: the definition, and the pair that runs without a
kernel.

R independent runs lie packed in the first axis of everything. Prompts (R, J, P, D) of J consecutive
blocks are lifted to states z_j = g(p_j) lift^T of width k; g is the identity, or, with `eps`,
LayerNorm without affine, the form in which the network sees its prompts. J states make m = J - 1
pairs (z_j, z_{j+1}). Global operators K, L are (R, k, k); layerwise operators are stacked,
(R, J, k, k): pair j uses number j, the last one belongs to no pair. Both losses are sums over the
pairs of a run.

"code", the released training code of PAE, with y = z_j K:
    consistency = mean over P and k of (y - z_{j+1})^2
    c(x)        = x / max(|x| + 1e-8, 1), row by row
    V(x)        = |L c(x)|^2 / (sigma_max(L)^2 + 1e-8), row by row
    lyapunov    = 10 tanh(s / 10), s = mean over P of softplus(V(y) - V(z_j))

"paper", the equations of the text:
    consistency = |y - z_{j+1}|_F^2
    V(x)        = tr(x L^T L x^T) = |x L^T|_F^2
    lyapunov    = max(0, V(z_{j+1}) - V(z_j))

`koopman_losses` writes this down and leaves the gradient to autograd. `forward` and `backward`
compute the same with the analytic gradient, all pairs at once: no Q = L^T L is multiplied into the
states, and every distinct L has its spectral norm taken once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .spectral import is_scaled_identity, top_singular_triple

EPS = 1e-8
CEILING = 10.0


def koopman_losses(
    prompts: Tensor, lift: Tensor, K: Tensor, L: Tensor, formulation: str, eps: float | None
) -> tuple[Tensor, Tensor]:
    """The definition, with Q = L^T L spelled out: two losses (R,).

    Half precision is computed in fp32; a non-finite L raises.
    """
    if prompts.dtype in (torch.float16, torch.bfloat16):
        prompts, lift, K, L = prompts.float(), lift.float(), K.float(), L.float()
    K, L = (t[:, :-1] if t.dim() == 4 else t[:, None] for t in (K, L))
    if eps is not None:
        prompts = F.layer_norm(prompts, prompts.shape[-1:], eps=eps)
    states = prompts @ lift.mT[:, None]
    now, following = states[:, :-1], states[:, 1:]  # (R, m, P, k)
    predicted = now @ K
    squares = (predicted - following).square()
    Q = L.mT @ L

    if formulation == "paper":

        def energy(x: Tensor) -> Tensor:  # (R, m)
            return (x @ Q * x).sum(dim=(2, 3))

        rise = energy(following) - energy(now)
        return squares.sum(dim=(1, 2, 3)), rise.relu().sum(dim=1)

    Q = Q / (torch.linalg.matrix_norm(Q, ord=2)[..., None, None] + EPS)

    def row_energy(x: Tensor) -> Tensor:  # (R, m, P)
        x = x / (x.norm(dim=-1, keepdim=True) + EPS).clamp(min=1)
        return (x @ Q * x).sum(dim=-1)

    s = F.softplus(row_energy(predicted) - row_energy(now)).mean(dim=2)
    consistency = squares.mean(dim=(2, 3)).sum(dim=1)
    return consistency, (CEILING * torch.tanh(s / CEILING)).sum(dim=1)


def forward(
    prompts: Tensor,
    lift: Tensor,
    K: Tensor,
    L: Tensor,
    formulation: str,
    eps: float | None,
    eigenvector: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Both losses (R,), then what `backward` reads; `eigenvector` as in `top_singular_triple`.

    With G = 1 operator per run, or G = m for layerwise ones:
        states (R, J, P, k)
        predicted (R, m, P, k)
        images (R, m, 2P, k)  L x / unit of the arguments x of V: of each pair the later state, then
                              the earlier one; unit is a power of two of the size of L, 1 for
                              "paper"
        pull, radial (R, m, 2P)  d lyapunov / d x = pull (L^T images) - radial x
        spin (R, G, 2)        d lyapunov / d L = (pull images)^T x + spin_0 left right^T, or
                              + spin_0 spin_1 L where L is a multiple of the identity: spin_1 is
                              1 / (k sigma) there and 0 elsewhere
        left, right (R, G, k) top singular vectors; 0 where V is not normalised
        statistics (R, J, P, 2)  mean and 1 / std of the prompt rows; (0,) without LayerNorm
    """
    runs, blocks, count, width = prompts.shape
    pairs, k = max(blocks - 1, 0), lift.shape[1]
    groups = pairs if K.dim() == 4 else 1
    rows, statistics = _gauge(prompts, eps)
    states = (rows.reshape(runs, -1, width) @ lift.mT).reshape(runs, blocks, count, k)
    now, following = states[:, :-1], states[:, 1:]
    predicted = (_by_operator(now, K) @ _operators(K)).reshape(now.shape)

    points = torch.cat([predicted if formulation == "code" else following, now], dim=2)
    used = _operators(L)
    if formulation == "code":
        sigma, left, right = (
            t.reshape(runs, groups, *t.shape[1:]) for t in top_singular_triple(used, eigenvector)
        )
        sigma = sigma.clamp(min=torch.finfo(sigma.dtype).tiny)
        unit = _power_of_two(sigma)
        used = used / unit.reshape(-1, 1, 1)
    images = (_by_operator(points, L) @ used.mT).reshape(points.shape)
    squares = _row_squares(images)  # (R, m, 2P)
    if formulation == "code":
        norms = torch.linalg.vector_norm(points, dim=-1)
        lengths = (norms + EPS).clamp(min=1)
        # no sigma^2 and no division by sigma = 0: right wherever L z itself is finite
        gain = 1 / (sigma + EPS / sigma)
        weight = (gain / (sigma / unit))[..., None]
        values = squares * (weight * unit[..., None]) / lengths.square()
        rise = values[..., :count] - values[..., count:]
        s = F.softplus(rise).mean(dim=2, keepdim=True)
        saturated = torch.tanh(s / CEILING)
        lyapunov = CEILING * saturated.sum(dim=(1, 2))
        slope = (1 - saturated.square()) * torch.sigmoid(rise) / count
        slope = torch.cat([slope, -slope], dim=2)  # d lyapunov / d values
        pull = 2 * slope * weight / lengths.square()
        # c scales rows longer than 1: their gradient has no part along the row
        radial = torch.where(norms + EPS > 1, 2 * slope * values / (norms * lengths), 0)
        flow = (slope[..., :count] * rise).sum(dim=2)
        flow = flow if K.dim() == 4 else flow.sum(dim=1, keepdim=True)
        level = is_scaled_identity(_operators(L)).reshape(sigma.shape)
        spin = torch.stack([-2 * flow * gain, torch.where(level, 1 / (k * sigma), 0)], dim=2)
    else:
        rise = squares[..., :count].sum(dim=2) - squares[..., count:].sum(dim=2)
        lyapunov = rise.relu().sum(dim=1)
        slope = 2 * (rise > 0).to(rise.dtype)[..., None].expand(runs, pairs, count)
        pull = torch.cat([slope, -slope], dim=2)
        radial = torch.zeros_like(pull)
        spin, left = pull.new_zeros(runs, groups, 2), pull.new_zeros(runs, groups, k)
        right = torch.zeros_like(left)
    consistency = _row_squares(predicted - following).sum(dim=(1, 2)) * _share(formulation, now)
    saved = states, predicted, images, pull, radial, spin, left, right, statistics
    return consistency, lyapunov, *saved


def backward(
    d_consistency: Tensor,
    d_lyapunov: Tensor,
    prompts: Tensor,
    lift: Tensor,
    K: Tensor,
    L: Tensor,
    formulation: str,
    eps: float | None,
    states: Tensor,
    predicted: Tensor,
    images: Tensor,
    pull: Tensor,
    radial: Tensor,
    spin: Tensor,
    left: Tensor,
    right: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of prompts, lift, K and L; layerwise operators that belong to no pair get zeros.

    d_consistency and d_lyapunov are (R,). V's gradients for its argument and for L are both one
    product with the images; the spectral norm adds a rank-one term, or L itself. No product is
    larger than (2mP, k) by (k, k) or (JP, k) by (k, D).
    """
    runs, _, count, width = prompts.shape
    now, following = states[:, :-1], states[:, 1:]
    code = formulation == "code"
    d_lyapunov = d_lyapunov.reshape(runs, 1, 1, 1)

    points = torch.cat([predicted if code else following, now], dim=2)
    pulled = images * (d_lyapunov * pull[..., None])
    d_points = (_by_operator(pulled, L) @ _operators(L)).reshape(points.shape)
    d_points.addcmul_(points, d_lyapunov * radial[..., None], value=-1)
    later, earlier = pulled[:, :, :count], pulled[:, :, count:]
    # of a pair's two terms, by their differences: 0 exactly where the operators change nothing, as
    # at K = L = I, whatever the order of the sum; an optimiser such as Adam would magnify rounding
    d_L = _sum_outer(
        torch.cat([later, later + earlier], dim=2),
        torch.cat([points[:, :, :count] - now, now], dim=2),
        L,
    )
    twist = left[..., None] * right[..., None, :]  # (R, G, k, k)
    level = spin[..., 1:, None]
    twist = torch.where(level > 0, level * _operators(L).reshape(twist.shape), twist)
    twist *= d_lyapunov * spin[..., :1, None]
    (d_L[:, :-1] if L.dim() == 4 else d_L).add_(twist if L.dim() == 4 else twist[:, 0])
    d_later, d_now = d_points[:, :, :count], d_points[:, :, count:]

    d_error = 2 * _share(formulation, now) * d_consistency.reshape(runs, 1, 1, 1)
    d_error = (predicted - following) * d_error
    d_predicted = d_error + d_later if code else d_error
    d_states = states.new_empty(states.shape)
    d_states[:, :1] = 0
    torch.neg(d_error, out=d_states[:, 1:])
    if not code:
        d_states[:, 1:] += d_later
    d_states[:, :-1] += (_by_operator(d_predicted, K) @ _operators(K).mT).reshape(now.shape)
    d_states[:, :-1] += d_now
    d_K = _sum_outer(now, d_predicted, K)

    flat = d_states.reshape(runs, -1, d_states.shape[-1])
    d_prompts = (flat @ lift).reshape(prompts.shape)
    rows = prompts
    if eps is not None:
        rstd = statistics[..., 1:]
        rows = (prompts - statistics[..., :1]) * rstd
        along = (d_prompts * rows).mean(dim=-1, keepdim=True)
        d_prompts = d_prompts.sub_(d_prompts.mean(dim=-1, keepdim=True))
        d_prompts = d_prompts.addcmul_(rows, along, value=-1).mul_(rstd)
    return d_prompts, flat.mT @ rows.reshape(runs, -1, width), d_K, d_L


def _gauge(prompts: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """The rows that are lifted, and the statistics that normalised them."""
    if eps is None:
        return prompts, prompts.new_empty(0)
    mean = prompts.mean(dim=-1, keepdim=True)
    centred = prompts - mean
    rstd = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return centred.mul_(rstd), torch.cat([mean, rstd], dim=-1)


def _share(formulation: str, now: Tensor) -> float:
    """Weight of a squared error: "code" takes the mean over prompts and dimensions."""
    return 1 / (now.shape[-2] * now.shape[-1]) if formulation == "code" else 1.0


def _operators(stack: Tensor) -> Tensor:
    """All operators that a pair uses, (R G, k, k)."""
    return stack[:, :-1].flatten(0, 1) if stack.dim() == 4 else stack


def _by_operator(rows: Tensor, stack: Tensor) -> Tensor:
    """(R, m, r, k) as (R G, rows, k): all rows that meet the same operator."""
    return rows.flatten(0, 1) if stack.dim() == 4 else rows.flatten(1, 2)


def _row_squares(x: Tensor) -> Tensor:
    """Sum of squares of every row, without a temporary of the size of x."""
    return torch.linalg.vector_norm(x, dim=-1).square()


def _sum_outer(rows: Tensor, columns: Tensor, like: Tensor) -> Tensor:
    """rows^T columns of (R, m, r, k), per run, or per pair for stacked operators."""
    if like.dim() == 3:
        return rows.flatten(1, 2).mT @ columns.flatten(1, 2)
    out = like.new_empty(like.shape)
    torch.matmul(rows.mT, columns, out=out[:, :-1])
    out[:, -1:] = 0
    return out


def _power_of_two(x: Tensor) -> Tensor:
    """At most x and more than x / 2, so that no entry divided by it is rounded; 1 for NaN."""
    unit = torch.ldexp(torch.ones_like(x), x.frexp().exponent - 1)
    return torch.where(x.isfinite(), unit, 1)
