"""The operators K and the prompts that they move: spectra, modes, energies, angles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kld import KLD

# Amplitudes lose log10(condition) of fp64's 16 digits. From here on modes are so nearly parallel
# that their energies, though correct, cancel; an orthonormal basis says more.
MAX_CONDITION = 1e8
EPS = 1e-8  # of the regulariser's own divisions


@dataclass(frozen=True, eq=False)
class KoopmanAnalysis:
    """Of R operators K (k, k) and m pairs of neighbouring blocks; fp64 tensors on the CPU.

    States are rows, z_j = p_j U (P, k), and move by z -> z K. So the modes are left eigenvectors of
    unit length, w_i K = lambda_i w_i. R = 1 in mode "global", R = m in mode "layerwise".

    Attributes:
        mode, formulation: of the KLD.
        blocks: numbers of the m + 1 blocks that take part.
        eigenvalues: (R, k) complex, by falling modulus; column i belongs to mode i.
        singular_values: (R, k), falling.
        departure: (R,) Henrici's departure from normality, sqrt(1 - sum |lambda|^2 / |K|_F^2):
            0 for normal K, towards 1 for nilpotent K.
        condition: (R,) 2-norm condition number of the matrix of modes: 1 for normal K, inf (or
            above 1e15) for defective K.
        basis: per operator "modes", or "orthonormal" where `condition` exceeds 1e8: amplitudes are
            then taken in the orthonormal basis whose first i rows span the first i modes (Schur
            vectors), and their squares sum to the energy of the states.
        energies: (m, k) mean over prompts of |a_i|^2, where z_j = sum a_i w_i are the states that
            enter pair j, in the modes of its own operator.
        state_energies: (m,) mean over prompts of |z_j|^2. Equal to energies.sum(1) for normal K or
            an orthonormal basis; modes that are not orthogonal overlap.
        lyapunov_now, lyapunov_predicted, lyapunov_next: (m, P) V(z_j), V(z_j K), V(z_{j+1}) of each
            prompt, with the V of pair j: for "code" normalised, in [0, 1]; for "paper" |L z|^2,
            whose sum over prompts is the text's tr(z Q z^T).
        prompt_angles: (m, min(P, k)) principal angles in radians, rising, between the spans of z_j
            and z_{j+1}; NaN beyond the smaller rank.
        operator_angles: (R - 1, rank) those between the `rank` directions that K_j and K_{j+1}
            stretch most (left singular vectors). Arbitrary where `singular_values` tie at `rank`,
            as at the start of training, when every K is the identity.
    """

    mode: str
    formulation: str
    blocks: tuple[int, ...]
    eigenvalues: Tensor
    singular_values: Tensor
    departure: Tensor
    condition: Tensor
    basis: tuple[str, ...]
    energies: Tensor
    state_energies: Tensor
    lyapunov_now: Tensor
    lyapunov_predicted: Tensor
    lyapunov_next: Tensor
    prompt_angles: Tensor
    operator_angles: Tensor

    @property
    def spectral_radius(self) -> Tensor:
        """(R,) largest modulus of an eigenvalue: above 1, repeated application grows."""
        return self.eigenvalues[:, 0].abs()

    @property
    def energy_shares(self) -> Tensor:
        """(m, k) energies divided by their sum over the modes."""
        return self.energies / self.energies.sum(1, keepdim=True).clamp(min=1e-300)


@torch.no_grad()
def analyse(
    kld: KLD, prompts: Tensor | Sequence[Tensor | None], rank: int | None = None
) -> KoopmanAnalysis:
    """Spectra of K, energies of the prompts in its modes, the walk of V, principal angles.

    Multiplying the states by the unit right eigenvectors of K, instead of solving for the
    amplitudes, gives a_i (w_i v_i): too small by the eigenvalue's condition number, equal for
    normal K only.

    Args:
        kld: of a model; its lift, gauge and operators are used as training uses them.
        prompts: (depth, P, D), or `depth` tensors (P, D): `model.prompts.raw_prompts()`.
        rank: directions of the operators that are compared; min(8, k) when None.

    Raises:
        RuntimeError: kld is not bound.
        ValueError: the prompts do not fit kld, fewer than two blocks take part, rank is out of
            range, or a tensor is not finite.
    """
    if kld.lifts is not None:
        raise ValueError(
            "kld must have one lift for all blocks, and on a backbone with stages it has "
            f"{len(kld.lifts)}, which give no one walk of states"
        )
    [(_, lift, own)] = kld._parts(prompts)
    rows = own.detach().cpu().double()
    pairs = len(rows) - 1
    if pairs < 1:
        raise ValueError(f"prompts must have two blocks that take part in kld, got {len(rows)}")
    rank = min(8, kld.dim) if rank is None else rank
    if not 1 <= rank <= kld.dim:
        raise ValueError(f"rank must be in [1, {kld.dim}], got {rank}")
    K, L = (t.detach().cpu().double() for t in kld.operators())
    K, L = (t[:pairs] if t.dim() == 3 else t[None] for t in (K, L))
    for name, tensor in (("prompts", rows), ("kld.K", K), ("kld.L", L)):
        if not tensor.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or inf")
    if kld.gauge == "layernorm":
        rows = F.layer_norm(rows, rows.shape[-1:], eps=kld.gauge_eps)
    states = rows @ lift.weight.detach().cpu().double().mT  # (m + 1, P, k)

    eigenvalues, modes = _modes(K)
    condition, departure = _condition(modes), _departure(K, eigenvalues)
    illness = condition > MAX_CONDITION
    basis = modes.clone()
    basis[illness] = _orthonormal(modes[illness])
    now, after = states[:-1], states[1:]
    amplitudes = torch.linalg.solve(basis.mT, now.mT.to(basis.dtype)).mT  # a W = z
    left, singular_values, _ = torch.linalg.svd(K)
    value = _lyapunov(L, kld.formulation)
    depth = len(prompts)
    return KoopmanAnalysis(
        mode=kld.mode,
        formulation=kld.formulation,
        blocks=tuple(range(depth - len(rows), depth)),
        eigenvalues=eigenvalues,
        singular_values=singular_values,
        departure=departure,
        condition=condition,
        basis=tuple("orthonormal" if ill else "modes" for ill in illness.tolist()),
        energies=amplitudes.abs().square().mean(1),
        state_energies=now.square().sum(2).mean(1),
        lyapunov_now=value(now),
        lyapunov_predicted=value(now @ K),
        lyapunov_next=value(after),
        prompt_angles=principal_angles(now, after),
        operator_angles=principal_angles(left[:-1, :, :rank].mT, left[1:, :, :rank].mT),
    )


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between the spans of the rows of a (..., p, k) and of b (..., q, k), real.

    Returns:
        (..., min(p, q, k)) radians in [0, pi / 2], rising; NaN beyond the smaller rank. Accurate
        to rounding for small angles too: those come from sines.

    Source: Bjorck and Golub, "Numerical methods for computing angles between linear subspaces",
    Math. Comp. 27 (1973).
    """
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"b must be like a {tuple(a.shape)} but for rows, got {tuple(b.shape)}")
    count = min(a.shape[-2:] + b.shape[-2:])
    batch = a.shape[:-2]
    pairs = zip(a.double().reshape(-1, *a.shape[-2:]), b.double().reshape(-1, *b.shape[-2:]))
    found = [F.pad(t, (0, count - len(t)), value=math.nan) for t in (_angles(*p) for p in pairs)]
    empty = torch.empty(0, count, dtype=torch.float64)
    return (torch.stack(found) if found else empty).reshape(*batch, count)


def _angles(a: Tensor, b: Tensor) -> Tensor:
    a, b = sorted((_span(a), _span(b)), key=len)
    cosines = torch.linalg.svdvals(b @ a.mT)  # falling: angles rise
    sines = torch.linalg.svdvals(a - a @ b.mT @ b).flip(0)[: len(a)]
    return torch.where(
        cosines.square() < 0.5, cosines.clamp(max=1).acos(), sines.clamp(max=1).asin()
    )


def _span(rows: Tensor) -> Tensor:
    """Orthonormal rows with the same span, as many as the numerical rank."""
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    floor = sizes.max() * max(rows.shape) * torch.finfo(rows.dtype).eps
    return directions[sizes > floor]


def _modes(K: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (R, k) by falling modulus and unit left eigenvectors as rows (R, k, k)."""
    eigenvalues, columns = torch.linalg.eig(K.mT)
    order = eigenvalues.abs().sort(dim=1, descending=True, stable=True).indices  # pairs stay pairs
    rows = columns.mT.gather(1, order[..., None].expand_as(columns))
    return eigenvalues.gather(1, order), rows


def _condition(modes: Tensor) -> Tensor:
    sizes = torch.linalg.svdvals(modes)
    return sizes[:, 0] / sizes[:, -1]


def _departure(K: Tensor, eigenvalues: Tensor) -> Tensor:
    whole = K.square().sum((1, 2)).clamp(min=1e-300)
    return (1 - eigenvalues.abs().square().sum(1) / whole).clamp(min=0).sqrt()


def _orthonormal(modes: Tensor) -> Tensor:
    """Orthonormal rows, the first i of which span the first i modes."""
    return torch.linalg.qr(modes.mT).Q.mT


def _lyapunov(L: Tensor, formulation: str) -> Callable[[Tensor], Tensor]:
    """V as the regulariser takes it, per prompt: states (m, P, k) -> (m, P)."""
    if formulation == "paper":
        return lambda z: (z @ L.mT).square().sum(-1)
    scale = torch.linalg.matrix_norm(L, ord=2).square()[:, None] + EPS

    def value(z: Tensor) -> Tensor:
        clipped = z / (z.norm(dim=-1, keepdim=True) + EPS).clamp(min=1)
        return (clipped @ L.mT).square().sum(-1) / scale

    return value
