"""Bilinear prompt tuning: the prompts of a block are a product of two thin factors.

    P_i = A_i B_i^T        A_i (P, r) coefficients, B_i (D, r) basis, r <= D

No bias, no activation, no dropout. Initialisation: A ~ N(0, 0.02^2), B Xavier uniform; or B from
`pae.whiten_init`, which makes the scores of the basis vectors uncorrelated over the queries of
real images.

The published variants, by rank and by which bases are trained:

    bilinear    rank < D, all bases trained           BPTDeep(100, 75)
    fWhiten     rank = D, whitened, none trained      BPTDeep(100, D, trained_bases=0)
    tWhiten     rank = D, whitened, all trained       BPTDeep(100, D)
    the released MAE and MoCo-v3 scripts              BPTDeep(50, 50, trained_bases=4)

Where we differ from the released code, and why. It expands A over the batch and multiplies every
image by B in a 1 x 1 convolution on a sqrt(P) x sqrt(P) grid, which fails unless P is a square (the
released deep scripts ask for 50); here any P is multiplied once per step, all blocks in one batched
product. Its whitening is scrambled, see `pae.whiten_init(official=True)`.

Source: "Attention to the Burstiness in Visual Prompt Tuning!" (arXiv 2506.22908).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import BackboneShape, PromptFamily, check_count, check_flag, check_prompts
from .registry import register


class _BPT(PromptFamily):
    """What deep and shallow share: `sets` pairs of factors, one per prompted block."""

    coefficients: nn.Parameter
    basis: nn.Parameter | None
    frozen_basis: Tensor | None
    whitened: Tensor
    training_arguments = ("trained_bases", "train_basis")  # which tensors there are says the rest

    def __init__(self, num_tokens: int, rank: int) -> None:
        super().__init__()
        self.num_tokens = _at_least_one("num_tokens", num_tokens)
        self.rank = _at_least_one("rank", rank)
        self.fit_errors: list[float] | None = None
        self.register_parameter("coefficients", None)
        self.register_parameter("basis", None)
        self.register_buffer("frozen_basis", None)
        self.register_buffer("whitened", torch.tensor(False))

    def _allocate(self, shape: BackboneShape, sets: int, trained: int) -> None:
        if self.rank > shape.width:
            raise ValueError(
                f"rank must be at most the backbone's width {shape.width}, got {self.rank}"
            )
        self.coefficients = nn.Parameter(torch.empty(sets, self.num_tokens, self.rank))
        nn.init.normal_(self.coefficients, std=0.02)
        bases = torch.empty(sets, shape.width, self.rank)
        for basis in bases:
            nn.init.xavier_uniform_(basis)
        if trained < sets:
            self.frozen_basis = bases[: sets - trained].clone()
        if trained > 0:
            self.basis = nn.Parameter(bases[sets - trained :].clone())

    @property
    def bases(self) -> Tensor:
        """(sets, D, r): all bases, the frozen ones first."""
        parts = [part for part in (self.frozen_basis, self.basis) if part is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _basis(self, index: int) -> Tensor:
        """`bases[index]`, alone."""
        frozen = 0 if self.frozen_basis is None else len(self.frozen_basis)
        part = self.frozen_basis if index < frozen else self.basis
        assert part is not None  # one of the two has it
        return part[index if index < frozen else index - frozen]

    def products(self) -> Tensor:
        """(sets, P, D): A_i B_i^T of every prompted block, in one batched product."""
        return torch.bmm(self.coefficients, self.bases.transpose(1, 2))

    @torch.no_grad()
    def set_bases(self, bases: Tensor, whitened: bool = True) -> None:
        """Overwrite all bases, trained and frozen ones.

        Args:
            bases: (sets, D, r), one per prompted block.
            whitened: these bases are to be kept when `set_prompts` is called later.

        Raises:
            ValueError: on another shape.
        """
        expected = (len(self.coefficients), self.shape.width, self.rank)
        if tuple(bases.shape) != expected:
            raise ValueError(f"bases must have shape {expected}, got {tuple(bases.shape)}")
        frozen = 0 if self.frozen_basis is None else len(self.frozen_basis)
        if self.frozen_basis is not None:
            self.frozen_basis.copy_(bases[:frozen])
        if self.basis is not None:
            self.basis.copy_(bases[frozen:])
        self.whitened.fill_(whitened)

    @torch.no_grad()
    def _fit(self, prompts: Sequence[Tensor | None]) -> None:
        """Best factors of one (P, D) target per set, in fp64 on the CPU; checked before."""
        frozen = 0 if self.frozen_basis is None else len(self.frozen_basis)
        whitened, bases, errors = bool(self.whitened), self.bases, []
        for i, rows in enumerate(prompts):
            assert rows is not None  # no set has 0 prompts
            target, basis = rows.detach().double().cpu(), bases[i].detach().double().cpu()
            if i < frozen or whitened or self.basis is None:
                coefficients = torch.linalg.lstsq(basis, target.T, driver="gelsd").solution.T
            else:
                coefficients, basis = _truncated_factors(target, basis)
                self.basis[i - frozen].copy_(basis)
            self.coefficients[i].copy_(coefficients)
            missed = (target - coefficients @ basis.T).norm() / target.norm().clamp_min(1e-300)
            errors.append(missed.item())
        self.fit_errors = errors


@register("bpt")
class BPTDeep(_BPT):
    """BPT-deep: block i reads A_i B_i^T as extra keys and values; their outputs are cut off.

    Args:
        num_tokens: prompts per block P (the paper's deep runs: 50; shallow: 100).
        rank: r, at most D; min(P, D) can represent any prompts (the paper: 50 deep, 25 to 75
            shallow).
        trained_bases: how many bases are trained, counted from the last block; None: all. The
            others keep their initial value. The released MAE and MoCo-v3 scripts train 4 of 12.

    Attributes:
        coefficients: (depth, P, r), always trained.
        basis: (trained_bases, D, r), the trained bases, or None. frozen_basis: (depth -
            trained_bases, D, r), the others, in block order before them, or None.
        whitened: () bool, the bases come from `pae.whiten_init`.
        fit_errors: |P_i - A_i B_i^T| / |P_i| per block of the last `set_prompts`, None before.

    Raises:
        ValueError, TypeError: on counts below 1 or no integers, a rank above the width, more
        trained bases than blocks.

    Source: see the module.
    """

    def __init__(self, num_tokens: int, rank: int = 50, trained_bases: int | None = None) -> None:
        super().__init__(num_tokens, rank)
        if trained_bases is not None:
            check_count("trained_bases", trained_bases)
        self.trained_bases = trained_bases

    def bind(self, shape: BackboneShape) -> None:
        trained = shape.depth if self.trained_bases is None else self.trained_bases
        if trained > shape.depth:
            raise ValueError(
                f"trained_bases must be at most the number of blocks {shape.depth}, got {trained}"
            )
        self._allocate(shape, shape.depth, trained)

    @property
    def prompt_counts(self) -> list[int]:
        return [self.num_tokens] * self.shape.depth

    def raw_prompts(self) -> list[Tensor | None]:
        return list(self.products().unbind(0))

    def all_prompts(self, x: Tensor) -> list[Tensor | None]:
        return self.raw_prompts()

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        return self.coefficients[index] @ self._basis(index).T

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        """Factors of the best fit to one (P, D) tensor per block; `fit_errors` says how good.

        A block whose basis is trained and was drawn at random gets both factors from the truncated
        SVD, sqrt(s) on each side: no product of rank r is nearer, and what is missed is
        sqrt(sum of s_k^2 over k > r). A frozen or whitened basis is kept and A solved for by least
        squares: what is missed is the part of the prompts outside the span of its columns, nothing
        at rank D.
        """
        check_prompts("prompts", prompts, self.prompt_counts, self.shape.width)
        self._fit(prompts)


@register("bpt-shallow")
class BPTShallow(_BPT):
    """BPT-shallow: the P rows of A B^T join the sequence before block 0 and run through all blocks.

    Args:
        num_tokens, rank: as in `BPTDeep`; the paper's rank here is 75 (of 100 prompts).
        train_basis: train B too (tWhiten, bilinear), or A alone (fWhiten).

    Attributes:
        coefficients: (1, P, r). basis or frozen_basis: (1, D, r), the other one None. whitened,
            fit_errors: as in `BPTDeep`.

    Raises:
        ValueError, TypeError: as in `BPTDeep`.
    """

    enters_sequence = True

    def __init__(self, num_tokens: int, rank: int = 75, train_basis: bool = True) -> None:
        super().__init__(num_tokens, rank)
        self.train_basis = check_flag("train_basis", train_basis)

    def bind(self, shape: BackboneShape) -> None:
        self._allocate(shape, 1, int(self.train_basis))

    @property
    def prompt_counts(self) -> list[int]:
        return [self.num_tokens] + [0] * (self.shape.depth - 1)

    def raw_prompts(self) -> list[Tensor | None]:
        return [self.products()[0], *[None] * (self.shape.depth - 1)]

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        return self.products()[0] if index == 0 else None

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        """As in `BPTDeep`, for block 0."""
        check_prompts("prompts", prompts, self.prompt_counts, self.shape.width)
        self._fit(prompts[:1])


def _truncated_factors(target: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """A (P, r), B (D, r) with A B^T the truncated SVD of `target` (P, D).

    Where r exceeds the number of singular values, the last columns of A are zero and those of B
    stay: with both at zero neither would ever get a gradient.
    """
    u, s, vh = torch.linalg.svd(target, full_matrices=False)
    rank = min(basis.shape[1], int((s > s[0] * 1e-12).sum()))
    coefficients, basis = target.new_zeros(len(target), basis.shape[1]), basis.clone()
    root = s[:rank].sqrt()
    coefficients[:, :rank] = u[:, :rank] * root
    basis[:, :rank] = vh[:rank].T * root
    return coefficients, basis


def _at_least_one(name: str, value: int) -> int:
    if check_count(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
