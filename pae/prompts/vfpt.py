"""Visual Fourier prompt tuning: VPT whose first prompts pass a Fourier transform.

Of the P learned rows of a block the first F = floor(fraction P) become

    Re DFT2(X)[t, h] = sum_{s, c} X[s, c] cos(2 pi (t s / F + h c / D))

over rows and width, unnormalised; the others are used as they are. Initialisation, dropout (before
the transform) and everything else are VPT's; fraction 0 is VPT.

The map S = Re DFT2 is symmetric, and S S = n E with n = F D and E the mean of X and its mirror
image X[-t, -h]: so its backward is S again, half of the parameters reach nothing, and the
pseudo-inverse is S / n. Behind the frozen norm of deep prompts the factor n is invisible.

Where we differ from the released code, and why. With the prompt dropout of a batch
(`dropout_scope="batch"`) or without dropout there is one transform per step for all blocks instead
of one per image and block. It is real: half of the spectrum is computed (`rfftn`) and mirrored,
which is quicker than the complex transform and than products with cosine and sine matrices. The
linear maps that the paper's ablation puts in the transform's place are not offered.

Source: Zeng et al., "Visual Fourier Prompt Tuning", NeurIPS 2024 (arXiv 2411.01327).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import BackboneShape, check_count, check_prompts
from .registry import register
from .vpt import VPTDeep, VPTShallow

DIMENSIONS = {"all": (-2, -1), "hidden": (-1,), "sequence": (-2,)}
LOCATIONS = ("prepend", "append", "random", "addition")
BLOCKS: dict[str, Callable[[int], range]] = {
    "all": lambda depth: range(depth),
    "first_half": lambda depth: range(depth // 2),
    "second_half": lambda depth: range(depth // 2, depth),
    "odd": lambda depth: range(1, depth, 2),
}


class _Fourier:
    """What deep and shallow add to VPT: which rows are transformed, and where they go."""

    def _choose(self, fraction: float, dimension: str, location: str) -> None:
        number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
        if not number or not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction must be a number in [0, 1], got {fraction!r}")
        if dimension not in DIMENSIONS:
            raise ValueError(f"dimension must be one of {tuple(DIMENSIONS)}, got {dimension!r}")
        if location not in LOCATIONS:
            raise ValueError(f"location must be one of {LOCATIONS}, got {location!r}")
        if location == "random" and dimension == "sequence":
            raise ValueError(
                "dimension must be 'all' or 'hidden' with location 'random', which transforms rows "
                "one by one: along a single row 'sequence' changes nothing"
            )
        self.fraction, self.dimension, self.location = float(fraction), dimension, location
        self._fourier_counts: list[int] = []

    @property
    def _dims(self) -> tuple[int, ...]:
        return (-1,) if self.location == "random" else DIMENSIONS[self.dimension]

    def _count(self, rows: int) -> int:
        return math.floor(rows * self.fraction)

    def _with_transformed(self, counts: list[int]) -> list[int]:
        if self.location != "addition":
            return list(counts)
        return [a + b for a, b in zip(counts, self._fourier_counts)]

    def _mix(self, rows: Tensor, count: int, draw: bool = False) -> Tensor:
        """(..., P, D) learned rows to the effective ones, `count` of them transformed."""
        if count == 0:
            return rows
        if draw and self.location == "random":
            chosen = torch.rand(rows.shape[-2], device=rows.device).argsort() < count
            return torch.where(chosen[:, None], real_dft(rows, self._dims), rows)
        return self._place(real_dft(rows[..., :count, :], self._dims), rows, count)

    def _place(self, transformed: Tensor, rows: Tensor, count: int) -> Tensor:
        if self.location == "addition":
            return torch.cat([transformed, rows], dim=-2)
        parts = [transformed, rows[..., count:, :]]
        return torch.cat(parts[::-1] if self.location == "append" else parts, dim=-2)

    def _unmix(self, target: Tensor, count: int) -> Tensor:
        """(P, D) learned rows whose effective rows are nearest to `target`, by least squares."""
        if count == 0:
            return target
        target = target.to(torch.promote_types(target.dtype, torch.float32))
        at = len(target) - count if self.location == "append" else 0
        wanted = target[at : at + count]
        rest = torch.cat([target[:at], target[at + count :]])
        dims = self._dims
        n = math.prod(wanted.shape[dim] for dim in dims)
        back = real_dft(wanted, dims)
        if self.location != "addition":
            return torch.cat([back / n, rest])
        # rows and their transform are both wanted: |X - a|^2 + |S X - f|^2
        own = rest[:count]
        seen = real_dft(real_dft(own, dims), dims) / n  # E a, the part that S does not drop
        return torch.cat([own - seen + (seen + back) / (1 + n), rest[count:]])


@register("vfpt")
class VFPTDeep(_Fourier, VPTDeep):
    """VFPT-deep: VPT-deep with transformed prompts in every block, or in some.

    Args:
        num_tokens: learned prompts per block: one integer, or one per block (0 allowed).
        fraction: share of them that is transformed (the paper tunes it per task over 0, 0.2, 0.3,
            0.5, 0.7, 1; its example command takes 1).
        dimension: "all" transforms over rows and width, "hidden" over the width, "sequence" over
            the transformed rows.
        location: "prepend" puts the transformed rows before the others, "append" behind them;
            "random" draws F rows anew for every block and forward in training, transforms each
            alone and leaves it in place (evaluation and `raw_prompts` take the first F, so that
            they are the same every time, which in the released code they are not); "addition"
            keeps all P rows and puts the transformed first F before them, P + F prompts in all.
        blocks: where: "all", "first_half", "second_half", "odd" (blocks 1, 3, ..., counted from
            0), or a list of block indices, e.g. all but 0 for the released option of no transform
            in the first layer.
        dropout, dropout_scope: as in `VPTDeep`; the paper uses 0.1 per sample, which costs one
            transform per image.

    Attributes:
        tokens: the learned rows, as in `VPTDeep`.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.

    "addition" is a reconstruction as far as the order of its rows goes, which no attention sees.

    Source: see the module.
    """

    def __init__(
        self,
        num_tokens: int | Sequence[int],
        fraction: float = 1.0,
        dimension: str = "all",
        location: str = "prepend",
        blocks: str | Sequence[int] = "all",
        dropout: float = 0.0,
        dropout_scope: str = "batch",
    ) -> None:
        super().__init__(num_tokens, dropout, dropout_scope)
        self._choose(fraction, dimension, location)
        if isinstance(blocks, str):
            if blocks not in BLOCKS:
                raise ValueError(
                    f"blocks must be one of {tuple(BLOCKS)} or indices, got {blocks!r}"
                )
            self.blocks: str | list[int] = blocks
        else:
            self.blocks = [check_count(f"blocks[{i}]", b) for i, b in enumerate(blocks)]

    def bind(self, shape: BackboneShape) -> None:
        blocks = self.blocks
        where = set(BLOCKS[blocks](shape.depth) if isinstance(blocks, str) else blocks)
        if where and max(where) >= shape.depth:
            raise ValueError(f"blocks must lie below {shape.depth}, got {max(where)}")
        super().bind(shape)
        self._fourier_counts = [
            self._count(count) if i in where else 0 for i, count in enumerate(self._counts)
        ]

    @property
    def prompt_counts(self) -> list[int]:
        return self._with_transformed(self._counts)

    def raw_prompts(self) -> list[Tensor | None]:
        return [*self._mix_all(self._blocks())]

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        rows = super().block_prompts(index, x)
        return None if rows is None else self._mix(rows, self._fourier_counts[index], self.training)

    def all_prompts(self, x: Tensor) -> list[Tensor | None]:
        if self.location == "random" and self.training:  # dropout and draws take turns
            return [self.block_prompts(i, x) for i in range(len(self._counts))]
        mixed = self._mix_all([self._drop(rows, x) for rows in self._blocks()])
        return [rows if rows.shape[-2] else None for rows in mixed]

    def _mix_all(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Effective rows of every block; shared rows of one shape take one transform together."""
        chosen = [i for i, count in enumerate(self._fourier_counts) if count]
        shapes = {rows[i].shape for i in chosen}
        if len(shapes) != 1 or len(min(shapes)) > 2:
            return [self._mix(r, count) for r, count in zip(rows, self._fourier_counts)]
        count = self._fourier_counts[chosen[0]]
        stacked = torch.stack([rows[i][..., :count, :] for i in chosen])
        mixed = list(rows)
        for i, transformed in zip(chosen, real_dft(stacked, self._dims).unbind(0)):
            mixed[i] = self._place(transformed, rows[i], count)
        return mixed

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        """Learned rows whose effective prompts are nearest to one (P, D) tensor per block.

        Of the rows to be reached by a transform only the mirror-symmetric part exists: S X can be
        E f and nothing else. X = S f / n gives exactly that, at the smallest norm; what is missed
        is f - E f. Rows that are not transformed are set exactly. With "addition" the two demands
        on the first F rows are met in the least-squares sense.
        """
        check_prompts("prompts", prompts, self.prompt_counts, self.tokens.shape[-1])
        with torch.no_grad():
            learned = [
                None if p is None else self._unmix(p, count)
                for p, count in zip(prompts, self._fourier_counts)
            ]
        VPTDeep.set_prompts(self, learned)


@register("vfpt-shallow")
class VFPTShallow(_Fourier, VPTShallow):
    """VFPT-shallow: VPT-shallow whose first prompts are transformed before they join the sequence.

    Args:
        num_tokens, fraction, dimension, location, dropout, dropout_scope: as in `VFPTDeep`.

    Attributes:
        tokens: (P, D), the learned rows.

    Raises:
        ValueError, TypeError: as in `VFPTDeep`.
    """

    def __init__(
        self,
        num_tokens: int,
        fraction: float = 1.0,
        dimension: str = "all",
        location: str = "prepend",
        dropout: float = 0.0,
        dropout_scope: str = "batch",
    ) -> None:
        super().__init__(num_tokens, dropout, dropout_scope)
        self._choose(fraction, dimension, location)

    def bind(self, shape: BackboneShape) -> None:
        super().bind(shape)
        self._fourier_counts = [self._count(self.num_tokens)] + [0] * (shape.depth - 1)

    @property
    def prompt_counts(self) -> list[int]:
        return self._with_transformed(super().prompt_counts)

    def raw_prompts(self) -> list[Tensor | None]:
        none = [None] * (self.shape.depth - 1)
        return [self._mix(self.tokens, self._fourier_counts[0]), *none]

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        rows = super().block_prompts(index, x)
        return None if rows is None else self._mix(rows, self._fourier_counts[index], self.training)

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        """As in `VFPTDeep`, for block 0."""
        check_prompts("prompts", prompts, self.prompt_counts, self.tokens.shape[-1])
        if prompts[0] is not None:
            with torch.no_grad():
                self.tokens.copy_(self._unmix(prompts[0], self._fourier_counts[0]))


def real_dft(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Real part of the unnormalised DFT of x over `dims` (all negative, the last one halved).

    Symmetric: its gradient is the same transform of the gradient. At least fp32; the result has
    the dtype of x.
    """
    return _RealDFT.apply(x, dims)


class _RealDFT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.dims = dims
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        half = torch.fft.rfftn(wide, dim=dims).real
        # F[t, -h] = F[-t, h] for the half that was not computed
        tail = half.narrow(dims[-1], 1, (x.shape[dims[-1]] + 1) // 2 - 1).flip(dims[-1])
        for dim in dims[:-1]:
            first, others = tail.split([1, tail.shape[dim] - 1], dim)
            tail = torch.cat([first, others.flip(dim)], dim)
        result = torch.cat([half, tail], dims[-1])
        # PyTorch 2.11, compiling, loses the gradient of a result that `to` gives back as it was
        return result if result.dtype == x.dtype else result.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return real_dft(grad, ctx.dims), None
