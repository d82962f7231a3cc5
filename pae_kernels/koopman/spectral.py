"""The largest singular value and its vectors, exact at every spectrum, in two ways.

`top_singular_triple` decomposes, or takes the vector from a kernel for CPUs (`cpu.py`); both read
flags on the host. `top_by_squaring` needs products alone and decides on the device: what the
kernels for GPUs do, written in PyTorch so that it can be read and tested beside the decomposition.

Both split the identity off first. With s the mean of the diagonal and E = L - s I,
    M = L^T L - s^2 I = E^T E + s (E + E^T)
has the eigenvectors of L^T L but rounds relative to its own spread instead of s^2: training
starts at L = I, and for its first steps the singular values lie closer together than fp32 resolves
around 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

INVERSE_ITERATIONS = 3  # two reach rounding at every spectrum tried, the third is the margin

# After q squarings eigenvalues count by their 2^q-th power: what is still mixed lies within
# ln(k) / 2^q of the top, relative to the spread of M, and sigma averages over it. 24 leave less
# than 2e-7 at k = 1024; spectra without such clusters settle after 8 to 13.
SQUARINGS = 24
# A step moves the projector by less than this: settled. What the next step would still tell apart
# doubles with every step, so early steps must be stricter; the floor is rounding.
SETTLED, SETTLED_FIRST = 1e-4, 1e-8


def split_identity(L: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L / unit, unit, s and E of every matrix (b, k, k), E of L / unit.

    unit is a power of two, so that squares neither over- nor underflow and no entry is rounded; 1
    for a matrix of zeros. A matrix that is not finite counts as zeros and has unit NaN.
    """
    largest = L.abs().flatten(1).amax(dim=1)
    finite = largest.isfinite()
    unit = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent - 1)
    unit = torch.where(largest == 0, 1, unit)
    A = torch.where(finite[:, None, None], L / unit[:, None, None], 0)
    s = A.diagonal(dim1=1, dim2=2).mean(dim=1)
    E = A.clone()
    E.diagonal(dim1=1, dim2=2).sub_(s[:, None])
    return A, torch.where(finite, unit, torch.nan), s, E


def top_singular_triple(
    L: Tensor, eigenvector: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value of each matrix, and unit vectors with L right = sigma left.

    Args:
        L: (b, k, k) in fp32 or fp64, of any scale.
        eigenvector: another version of `top_eigenvector`, None for that.

    Returns:
        sigma (b,), left (b, k), right (b, k), exact to rounding at every spectrum; where several
        singular values are the largest, one vector of their space. Never raises: what has no
        answer, such as a matrix that is not finite, gives NaN.
    """
    A, unit, s, E = split_identity(L)
    M = torch.baddbmm(E * s[:, None, None], E.mT, A)
    try:
        right = (eigenvector or top_eigenvector)(M)
    except torch.linalg.LinAlgError:  # not known to happen to a finite symmetric matrix
        right = torch.full_like(L[..., 0], torch.nan)
    return _triple(A, unit, right)


def is_scaled_identity(L: Tensor) -> Tensor:
    """Whether each matrix is s I: (b,) bool. There all singular values are equal.

    Training starts at L = I and stays there while no energy changes. No vector is the top one: the
    derivative of sigma is spread evenly over all of them, as autograd does with the ties of a
    decomposition, and is L / (k sigma).
    """
    _, _, _, E = split_identity(L)
    return E.square().sum(dim=(1, 2)) < SMALLEST_SPREAD


def _triple(A: Tensor, unit: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left = (A @ right[..., None])[..., 0]
    stretch = torch.linalg.vector_norm(left, dim=1)
    left = left / stretch.clamp(min=torch.finfo(A.dtype).tiny)[:, None]
    return stretch * unit, left, right


def top_eigenvector(M: Tensor) -> Tensor:
    """Unit eigenvectors (b, k) of the largest eigenvalues of symmetric matrices (b, k, k).

    Inverse iteration at the top eigenvalue costs two thirds of a decomposition with all vectors and
    leaves a smaller residual, because M itself is factorised. It takes the same time at every
    spectrum. A residual above rounding falls back to the decomposition.
    """
    eigenvalues = torch.linalg.eigvalsh(M)
    rounding = torch.finfo(M.dtype).eps * eigenvalues.abs().amax(dim=1, keepdim=True)
    shifted = M.clone()
    shifted.diagonal(dim1=1, dim2=2).sub_(eigenvalues[:, -1:])
    factors, order = _factorised(shifted)  # singular to rounding, as it should be

    v = start_vector(M.shape[1], M.device).to(M.dtype)[:, None].repeat(len(M), 1, 1)
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


def _factorised(M: Tensor) -> tuple[Tensor, Tensor]:
    """LU factors and pivots. On a CPU one matrix after the other: PyTorch shares a batch among its
    threads, and oneMKL's factorisation, called by two of them at a time, may never end.
    """
    if M.device.type != "cpu" or len(M) < 2:
        return torch.linalg.lu_factor_ex(M)[:2]
    each = [torch.linalg.lu_factor_ex(m) for m in M]
    return torch.stack([e[0] for e in each]), torch.stack([e[1] for e in each])


def start_vector(k: int, device: torch.device) -> Tensor:
    """(k,) in fp64, orthogonal to nothing in particular: of low discrepancy in [0.5, 1.5)."""
    index = torch.arange(1, k + 1, device=device, dtype=torch.float64)
    return 0.5 + index * 0.6180339887498949 % 1


def top_by_squaring(L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`top_singular_triple` by products alone: no decomposition, no value read on the host.

    X = M + c I is positive semi-definite for c = s^2, and for every c >= |M|; the smaller of s^2
    and |M^2|_F^(1/2) is taken, which keeps the wanted end of the spectrum apart from the rest.
    X is squared and divided by its trace until it is the projector onto the top eigenvectors, all
    of which a column of it mixes; that of the largest diagonal entry has length >= k^-1/2.

    No start vector: the result is a function of L alone, whatever happened in earlier steps, and a
    warm start would not end the squaring sooner.

    Args, Returns: as `top_singular_triple`; sigma within 1e-6, relative, at every spectrum.
    """
    A, unit, s, E = split_identity(L)
    count = len(L)
    M = E.mT @ E + s[:, None, None] * (E + E.mT)
    F = M.square().sum(dim=(1, 2))
    flat = F < SMALLEST_SPREAD  # a multiple of the identity
    F = torch.where(flat, 1, F).sqrt()
    M = torch.where(flat[:, None, None], 0, M / F[:, None, None])
    square = M @ M
    c = torch.minimum(square.square().sum(dim=(1, 2)) ** 0.25, s * s / F)
    c = torch.where(flat, 1, c)[:, None]
    X = square + 2 * c[..., None] * M
    X.diagonal(dim1=1, dim2=2).add_(c * c)
    # of the right size; the next division makes the trace 1
    X = X / X.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    settled = torch.zeros(count, dtype=torch.bool, device=L.device)
    for q in range(2, SQUARINGS + 1):
        following = X @ X / X.square().sum(dim=(1, 2))[:, None, None]
        change = (following - X).square().sum(dim=(1, 2)) / following.square().sum(dim=(1, 2))
        X = torch.where(settled[:, None, None], X, following)
        settled = settled | (change <= settled_below(q) ** 2)
    best = X.diagonal(dim1=1, dim2=2).argmax(dim=1)
    right = X[torch.arange(count, device=L.device), best]
    return _triple(A, unit, right / torch.linalg.vector_norm(right, dim=1, keepdim=True))


SMALLEST_SPREAD = 1e-30  # squares below this have left fp32's range: E is far below rounding


def settled_below(q: int) -> float:
    """Relative change of the projector in squaring q below which it counts as settled."""
    return min(SETTLED, SETTLED_FIRST * 2**q)
