"""Koopman and Lyapunov losses in plain PyTorch: the definition, and the pair that runs without a
kernel.

States z_0 .. z_m of shape (P, k) make m pairs (z_j, z_{j+1}). Global operators K, L are (k, k);
layerwise operators are stacked, (m + 1, k, k): pair j uses number j, the last one belongs to no
pair. Both losses are sums over pairs.

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

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-8
CEILING = 10.0
INVERSE_ITERATIONS = 3  # two reach rounding at every spectrum tried, the third is the margin


def koopman_losses(states: Tensor, K: Tensor, L: Tensor, formulation: str) -> tuple[Tensor, Tensor]:
    """The definition, with Q = L^T L spelled out.

    Half precision is computed in fp32; a non-finite L raises.
    """
    if states.dtype in (torch.float16, torch.bfloat16):
        states, K, L = states.float(), K.float(), L.float()
    if K.dim() == 3:
        K, L = K[:-1], L[:-1]
    now, following = states[:-1], states[1:]  # (m, P, k)
    predicted = now @ K
    squares = (predicted - following).square()
    Q = L.mT @ L

    if formulation == "paper":

        def energy(x: Tensor) -> Tensor:  # (m,)
            return (x @ Q * x).sum(dim=(1, 2))

        return squares.sum(), (energy(following) - energy(now)).relu().sum()

    Q = Q / (torch.linalg.matrix_norm(Q, ord=2)[..., None, None] + EPS)

    def row_energy(x: Tensor) -> Tensor:  # (m, P)
        x = x / (x.norm(dim=-1, keepdim=True) + EPS).clamp(min=1)
        return (x @ Q * x).sum(dim=-1)

    s = F.softplus(row_energy(predicted) - row_energy(now)).mean(dim=1)
    return squares.mean(dim=(1, 2)).sum(), (CEILING * torch.tanh(s / CEILING)).sum()


def forward(states: Tensor, K: Tensor, L: Tensor, formulation: str) -> tuple[Tensor, ...]:
    """Both losses, then what `backward` reads.

    With b = 1 for global operators and b = m for layerwise ones:
        error (m, P, k)     prediction minus next state
        points (m, 2P, k)   arguments of V: of each pair the later state, then the earlier one
        images (m, 2P, k)   L c(points), divided by sigma where V is normalised
        norms (m, 2P)       norms of the points; 0 where c is the identity
        values (m, 2P)      V
        gain (b,)           sigma / (sigma^2 + eps); 1 where V is not normalised
        left, right (b, k)  top singular vectors; 0 where V is not normalised
    """
    count, k = states.shape[1:]
    now, following = states[:-1], states[1:]
    if K.dim() == 3:
        K, L = K[:-1], L[:-1]

    predicted = now @ K
    if formulation == "code":
        points = torch.cat([predicted, now], dim=1)
        norms = torch.linalg.vector_norm(points, dim=-1)
        sigma, left, right = top_singular_triple(L.reshape(-1, k, k))
        # no sigma^2 and no division by sigma = 0: right wherever L z itself is finite
        sigma = sigma.clamp(min=torch.finfo(sigma.dtype).tiny)
        gain = 1 / (sigma + EPS / sigma)
        lengths = (norms + EPS).clamp(min=1)
        images = (points @ L.mT).div_((lengths * sigma[:, None])[..., None])
        values = _row_squares(images) * (sigma * gain)[:, None]
    else:
        points = torch.cat([following, now], dim=1)
        norms = points.new_zeros(points.shape[:2])
        images = points @ L.mT
        values = _row_squares(images)
        gain = L.new_ones(L.shape[0] if L.dim() == 3 else 1)
        left, right = gain.new_zeros(len(gain), k), gain.new_zeros(len(gain), k)

    error = predicted.sub_(following)
    consistency = _row_squares(error).sum()
    rise = values[:, :count] - values[:, count:]
    if formulation == "code":
        consistency = consistency / (count * k)
        lyapunov = CEILING * torch.tanh(F.softplus(rise).mean(dim=1) / CEILING)
    else:
        lyapunov = rise.sum(dim=1).relu()
    return consistency, lyapunov.sum(), error, points, images, norms, values, gain, left, right


def backward(
    d_consistency: Tensor,
    d_lyapunov: Tensor,
    states: Tensor,
    K: Tensor,
    L: Tensor,
    formulation: str,
    error: Tensor,
    points: Tensor,
    images: Tensor,
    norms: Tensor,
    values: Tensor,
    gain: Tensor,
    left: Tensor,
    right: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of states, K and L; layerwise operators that belong to no pair get zeros.

    V's gradients for its argument and for L are both one product with the images L c(x); the
    spectral norm adds the rank-one term of d sigma^2 = 2 sigma <left right^T, dL>. No product is
    larger than (2mP, k) by (k, k).
    """
    count, k = states.shape[1:]
    now = states[:-1]
    code = formulation == "code"
    layerwise = K.dim() == 3
    K_pairs, L_pairs = (K[:-1], L[:-1]) if layerwise else (K, L)

    rise = values[:, :count] - values[:, count:]
    if code:
        s = F.softplus(rise).mean(dim=1, keepdim=True)
        slope = (1 - torch.tanh(s / CEILING).square()) * torch.sigmoid(rise) / count
    else:
        slope = (rise.sum(dim=1, keepdim=True) > 0).to(rise.dtype).expand_as(rise)
    slope = d_lyapunov * torch.cat([slope, -slope], dim=1)  # d loss / d values

    # c scales rows longer than 1; the radial part of their gradient, 2 slope V, has no effect
    lengths = (norms + EPS).clamp(min=1)
    radial = torch.where(norms + EPS > 1, 2 * slope * values / (norms * lengths), 0)
    pull = images * (2 * slope * gain[:, None] / lengths)[..., None]
    d_points = (pull @ L_pairs).addcmul_(points, radial[..., None], value=-1)
    d_L = _sum_outer(pull, points, L)
    flow = (slope * values).sum(dim=1)
    flow = gain * (flow if layerwise else flow.sum(dim=0, keepdim=True))
    used = d_L[: len(flow)] if layerwise else d_L[None]
    used.baddbmm_((-2 * flow)[:, None, None] * left[..., None], right[:, None])
    d_later, d_now = d_points[:, :count], d_points[:, count:]

    d_states = states.new_empty(states.shape)
    d_states[:1] = 0
    d_following = d_states[1:]
    torch.mul(error, -2 * d_consistency / (count * k if code else 1), out=d_following)
    if code:
        d_predicted = d_later - d_following
    else:
        d_predicted = -d_following
        d_following += d_later
    d_states[:-1].add_(d_predicted @ K_pairs.mT).add_(d_now)
    return d_states, _sum_outer(now, d_predicted, K), d_L


def _row_squares(x: Tensor) -> Tensor:
    """Sum of squares of every row, without a temporary of the size of x."""
    return torch.linalg.vector_norm(x, dim=-1).square()


def _sum_outer(rows: Tensor, columns: Tensor, like: Tensor) -> Tensor:
    """rows^T columns of (m, r, k): summed over all pairs, or per pair for stacked operators."""
    if like.dim() == 2:
        return rows.flatten(0, 1).mT @ columns.flatten(0, 1)
    out = like.new_empty(like.shape)
    torch.bmm(rows.mT, columns, out=out[: len(rows)])
    out[len(rows) :] = 0
    return out


def top_singular_triple(L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value of each matrix, and unit vectors with L right = sigma left.

    The identity is split off first. With s the mean of the diagonal and E = L - s I,
        M = L^T L - s^2 I = E^T L + s E
    has the eigenvectors of L^T L but rounds relative to its own spread instead of s^2: training
    starts at L = I, and for its first steps the singular values lie closer together than fp32
    resolves around 1. Only the top eigenvector of M is computed.

    Args:
        L: (b, k, k) in fp32 or fp64, of any scale.

    Returns:
        sigma (b,), left (b, k), right (b, k), exact to rounding at every spectrum; where several
        singular values are the largest, one vector of their space. Never raises: what has no
        answer, such as a matrix that is not finite, gives NaN.
    """
    largest = L.abs().flatten(1).amax(dim=1)
    finite = largest.isfinite()
    # a power of two: squares neither over- nor underflow, and no entry is rounded
    unit = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent - 1)
    A = L / unit[:, None, None]
    if not finite.all():
        A = torch.where(finite[:, None, None], A, 0)
    s = A.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
    E = A.clone()
    E.diagonal(dim1=1, dim2=2).sub_(s)
    M = torch.baddbmm(E * s[..., None], E.mT, A)

    try:
        right = _top_eigenvector(M)
    except torch.linalg.LinAlgError:  # not known to happen to a finite symmetric matrix
        right = torch.full_like(L[..., 0], torch.nan)
    left = (A @ right[..., None])[..., 0]
    stretch = torch.linalg.vector_norm(left, dim=1)
    left = left / stretch.clamp(min=torch.finfo(L.dtype).tiny)[:, None]
    return torch.where(finite, stretch * unit, torch.nan), left, right


def _top_eigenvector(M: Tensor) -> Tensor:
    """Unit eigenvectors (b, k) of the largest eigenvalues of symmetric matrices (b, k, k).

    Inverse iteration at the top eigenvalue costs two thirds of a decomposition with all vectors and
    leaves a smaller residual, because M itself is factorised. It takes the same time at every
    spectrum. A residual above rounding falls back to the decomposition.
    """
    eigenvalues = torch.linalg.eigvalsh(M)
    rounding = torch.finfo(M.dtype).eps * eigenvalues.abs().amax(dim=1, keepdim=True)
    shifted = M.clone()
    shifted.diagonal(dim1=1, dim2=2).sub_(eigenvalues[:, -1:])
    factors, order, _ = torch.linalg.lu_factor_ex(shifted)  # singular to rounding, as it should be

    # a start that is orthogonal to nothing in particular: a low-discrepancy sequence in [0.5, 1.5)
    index = torch.arange(1, M.shape[1] + 1, device=M.device, dtype=torch.float64)
    start = 0.5 + index * 0.6180339887498949 % 1
    v = start.to(M.dtype)[:, None].repeat(len(M), 1, 1)
    for _ in range(INVERSE_ITERATIONS):
        v = torch.linalg.lu_solve(factors, order, v)
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)

    image = shifted @ v
    residual = torch.linalg.vector_norm(image - v * (v.mT @ image), dim=1)
    # below 10 at every spectrum tried; False for the NaN that an exactly singular matrix leaves
    exact = residual <= 32 * rounding
    v = v[..., 0]
    if not exact.all():
        v = torch.where(exact, v, torch.linalg.eigh(M).eigenvectors[..., -1])
    return v
