"""`koopman_losses` on CPUs: the products are BLAS's, as in the reference; the top singular vector
comes from Lanczos' method in C++ (`csrc/cpu/eigenvector.h`) instead of a decomposition.

Lanczos' method can miss the largest eigenvalue, and no residual shows that, so what it finds is
proven: a Cholesky factorisation of (value + a few roundings) I - M exists only if no eigenvalue is
larger. It costs a sixth of the decomposition. What is not proven is decomposed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import cpu, native
from . import reference, spectral

# 40 to 90 at every spectrum tried; a matrix that needs more is decomposed
STEPS = 160
# of the matrix' size; a result's own rounding is about 1.5 of it
_EPS = torch.finfo(torch.float32).eps
TOLERANCE, PROVEN, RESIDUAL = 2 * _EPS, 8 * _EPS, 32 * _EPS

_Eigenvector = native.params(
    "cpu_eigenvector",
    **dict.fromkeys(("threads", "steps"), native.INT32),
    tolerance=native.FLOAT32,
    **dict.fromkeys(("count", "width"), native.INT64),
    **dict.fromkeys(
        ("matrices", "start", "vectors", "values", "residuals", "sizes", "taken", "workspace"),
        native.POINTER,
    ),
)


def forward(
    prompts: Tensor, lift: Tensor, K: Tensor, L: Tensor, formulation: str, eps: float | None
) -> tuple[Tensor, ...]:
    """Same contract as the reference's."""
    return reference.forward(prompts, lift, K, L, formulation, eps, top_eigenvector)


backward = reference.backward


def top_eigenvector(M: Tensor) -> Tensor:
    """As `spectral.top_eigenvector`, for matrices that are finite."""
    v, values, residuals, sizes, _ = lanczos(M)
    proof = M.neg()
    proof.diagonal(dim1=1, dim2=2).add_((values + PROVEN * sizes)[:, None])
    unproven = torch.linalg.cholesky_ex(proof)[1] != 0
    # a matrix of zeros has no factor, and every vector is its own
    again = (unproven & (sizes > 0)) | ~(residuals <= RESIDUAL * sizes)
    if again.any():
        v[again] = spectral.top_eigenvector(M[again])
    return v


def lanczos(M: Tensor, steps: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What Lanczos' method makes of symmetric matrices (b, k, k) in fp32, in at most `steps`.

    Returns:
        unit vectors (b, k); (b,) each: their eigenvalues, the norms of their residuals, a size of
        each matrix that is at most its spectral norm and at least a third of it, and int32 steps.
    """
    count, k, _ = M.shape
    M, steps = M.contiguous(), min(STEPS if steps is None else steps, k)
    vectors, (values, residuals, sizes) = M.new_empty(count, k), M.new_empty(3, count)
    taken = torch.empty(count, dtype=torch.int32)
    workspace, start = M.new_empty(count, steps + 1, k), _start(k)
    params = _Eigenvector(
        steps=steps,
        tolerance=TOLERANCE,
        count=count,
        width=k,
        matrices=M,
        start=start,
        vectors=vectors,
        values=values,
        residuals=residuals,
        sizes=sizes,
        taken=taken,
        workspace=workspace,
    )
    cpu.call("pae_cpu_eigenvector", params)
    return vectors, values, residuals, sizes, taken


@lru_cache
def _start(k: int) -> Tensor:
    return spectral.start_vector(k, torch.device("cpu")).to(torch.float32)
