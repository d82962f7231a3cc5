"""KLD as others would write it: plain PyTorch under autograd.

Nothing here uses the packages of this repository: the benchmarks time against it and the tests
check against it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def official_style_terms(
    prompts: Tensor,
    lift: Tensor,
    K: Tensor,
    L: Tensor,
    consistency_weight: float = 0.5,
    lyapunov_weight: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """The two weighted losses, arranged as in the released code: pair by pair, each with its own Q.

    Args:
        prompts: (depth, P, D); block 0 is in no pair.
        lift: (k, D).
        K: (k, k), or (depth - 1, k, k) with number j for the pair (block j + 1, block j + 2).
        L: as K.
    """
    consistency = prompts.new_zeros(())
    lyapunov = prompts.new_zeros(())
    for j in range(prompts.shape[0] - 2):
        K_j, L_j = (K[j], L[j]) if K.dim() == 3 else (K, L)
        now = F.linear(prompts[j + 1], lift)
        following = F.linear(prompts[j + 2], lift)
        predicted = now @ K_j
        consistency = consistency + consistency_weight * F.mse_loss(predicted, following)

        Q = L_j.T @ L_j
        Q = Q / (torch.linalg.matrix_norm(Q, 2) + 1e-8)
        rise = _row_energy(predicted, Q) - _row_energy(now, Q)
        lyapunov = lyapunov + lyapunov_weight * 10 * torch.tanh(F.softplus(rise).mean() / 10)
    return consistency, lyapunov


def _row_energy(z: Tensor, Q: Tensor) -> Tensor:
    """z Q z^T for every row, after rows longer than 1 were scaled to length 1; (P,)."""
    z = z / torch.clamp(z.norm(dim=-1, keepdim=True) + 1e-8, min=1.0)
    return (z @ Q * z).sum(dim=-1)


def batched_eigh_terms(
    prompts: Tensor,
    lift: Tensor,
    K: Tensor,
    L: Tensor,
    consistency_weight: float = 0.5,
    lyapunov_weight: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """The same losses over all pairs at once, one full eigen-decomposition per distinct L."""
    z = F.linear(prompts[1:], lift)
    now, following = z[:-1], z[1:]
    if K.dim() == 3:
        K, L = K[:-1], L[:-1]
    with torch.no_grad():
        top = torch.linalg.eigh(L.mT @ L).eigenvectors[..., -1:]
    sigma = torch.linalg.vector_norm(L @ top, dim=(-2, -1))

    def row_energy(x: Tensor) -> Tensor:
        x = x / (x.norm(dim=-1, keepdim=True) + 1e-8).clamp(min=1)
        return (x @ L.mT).square().sum(dim=-1) / (sigma.square() + 1e-8)[..., None]

    predicted = now @ K
    s = F.softplus(row_energy(predicted) - row_energy(now)).mean(dim=1)
    consistency = (predicted - following).square().mean(dim=(1, 2)).sum()
    return consistency_weight * consistency, lyapunov_weight * (10 * torch.tanh(s / 10)).sum()
