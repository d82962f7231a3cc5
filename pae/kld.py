"""Koopman-Lyapunov discrepancy: the regulariser of PAE over the prompts of consecutive blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn

from pae_kernels.koopman import koopman_losses

from .choices import KLD_FORMULATIONS, KLD_GAUGES, KLD_MODES


class KLD(nn.Module):
    """alpha sum_j |z_j K - z_{j+1}|^2 + beta sum_j phi(V(z') - V(z_j)), z_j = p_j U, V of L^T L.

    The prompts p_1 .. p_{depth-1} of consecutive blocks are lifted to `dim` dimensions and pulled
    towards one linear evolution K that does not raise the energy V. Block 0 is in no pair, and
    nothing depends on the images.

    "code" is what the released training code computes: the error is a mean over prompts and
    dimensions; V(z) = |L z|^2 / (sigma_max(L)^2 + 1e-8), with rows longer than 1 scaled to length
    1, is taken of the *predicted* next state z' = z_j K; phi = 10 tanh(mean softplus / 10).

    "paper" is the text: the error is a sum of squared Frobenius norms; V(z) = tr(z L^T L z^T) is
    taken of the *actual* next state z' = z_{j+1}; phi = max(0, .). Reconstructed, because the text
    does not settle it: which blocks the sums cover (here the pairs of "code") and that
    nothing is divided by their number. At 20 prompts and dim 256 its consistency term is 5120 times
    that of "code" at the same weight, and V can be lowered by shrinking L.

    In mode "layerwise" the pair of blocks (j + 1, j + 2) has K[j] and L[j]. As in the released code
    there is one more K and L than pairs. The last slice of the stack is never read and its gradient
    is zero; it is not None, being part of one parameter, so an optimiser with weight decay shrinks
    this slice (the released code, with separate parameters, leaves it alone). No loss and
    no other parameter depends on it.

    Two cures, off by default because the released code has neither:

    - `gauge="layernorm"`. Deep prompts are seen only through a LayerNorm, so the length and the
      mean of a prompt row change nothing in the network, and yet shrinking all prompts lowers the
      error to 0. Lifting LayerNorm(p) instead, without affine, takes that way out.
    - `first_block=True`. The prompts of block 0 begin the evolution, as the text's sums over all
      layers may mean it: one pair more, and in mode "layerwise" one operator more.

    On a backbone with stages (Swin) the two blocks of a pair are of one stage: between stages
    widths differ, and what a prompt would be pulled towards is not defined. Each stage has a lift
    of its own; K and L are of lifted states, which all have `dim` entries, and stay as they are.

    It depends on parameters alone, so it may run beside the forward: `pae.graphed_step` puts it on
    a stream of its own inside the captured step. In a loop of one's own, on a GPU, compute
    `model.penalty()` under `torch.cuda.stream(side)` after `side.wait_stream(main)`, and let
    `main.wait_stream(side)` before its value is added to the loss; autograd runs its backward on
    the same side stream.

    Args:
        dim: k, width of the lifted states.
        mode: "global" (one K and L) or "layerwise".
        consistency_weight: alpha.
        lyapunov_weight: beta.
        formulation: "code" or "paper".
        gauge: "none" or "layernorm", what is done to prompts before the lift.
        gauge_eps: eps of that LayerNorm, timm's by default.
        first_block: whether block 0 takes part. It must then have as many prompts as the others.

    Attributes:
        lift: bias-free `nn.Linear(D, dim)`, the map U, in PyTorch's initialisation. None on a
            backbone with stages, which has `lifts` instead, one for each stage that has a pair.
        K, L: (dim, dim), or one per block that takes part: (depth - 1, dim, dim), with the first
            block (depth, dim, dim). Identity at first. None until `bind`, like lift.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.

    Source: PAE (arXiv 2601.20232), Sec. 2.3, Eq. 6-11.
    """

    lift: nn.Linear
    lifts: nn.ModuleList | None
    K: nn.Parameter
    L: nn.Parameter

    def __init__(
        self,
        dim: int = 256,
        mode: str = "global",
        consistency_weight: float = 0.5,
        lyapunov_weight: float = 0.2,
        formulation: str = "code",
        gauge: str = "none",
        gauge_eps: float = 1e-6,
        first_block: bool = False,
    ) -> None:
        super().__init__()
        self.dim = _check_size("dim", dim)
        self.mode = _check_choice("mode", mode, KLD_MODES)
        self.consistency_weight = _check_weight("consistency_weight", consistency_weight)
        self.lyapunov_weight = _check_weight("lyapunov_weight", lyapunov_weight)
        self.formulation = _check_choice("formulation", formulation, KLD_FORMULATIONS)
        self.gauge = _check_choice("gauge", gauge, KLD_GAUGES)
        self.gauge_eps = _check_weight("gauge_eps", gauge_eps)
        if not isinstance(first_block, bool):
            raise TypeError(f"first_block must be True or False, got {first_block!r}")
        self.first_block = first_block
        self.depth: int | None = None
        self._stages: list[range] = []
        self.register_module("lift", None)
        self.register_module("lifts", None)
        self.register_parameter("K", None)
        self.register_parameter("L", None)

    def bind(self, depth: int, width: int, widths: Sequence[int] = ()) -> None:
        """Allocate `lift`, `K` and `L` for a backbone of `depth` blocks of width `width`.

        Args:
            widths: of all blocks, where there are stages.

        Raises:
            ValueError: no two blocks that take part are of one stage.
        """
        if self.depth is not None:
            raise RuntimeError("this KLD already belongs to a model; build a new one")
        depth, width = _check_size("depth", depth), _check_size("width", width)
        lifted = [run for run in self.runs(depth, widths) if len(run) > 1]
        if widths and not lifted:
            raise ValueError(
                f"kld pairs blocks of one stage, and no two {self._taking_part} have one width, "
                f"got widths {tuple(widths)}: leave kld out (None)"
            )
        self.depth = depth
        if widths:
            self._stages = lifted
            lifts = [nn.Linear(widths[run[0]], self.dim, bias=False) for run in lifted]
            self.lifts = nn.ModuleList(lifts)
        else:
            self.lift = nn.Linear(width, self.dim, bias=False)
        identity = torch.eye(self.dim)
        if self.mode == "layerwise":
            identity = identity.repeat(depth - self._first, 1, 1)
        self.K = nn.Parameter(identity.clone())
        self.L = nn.Parameter(identity.clone())

    def runs(self, depth: int, widths: Sequence[int] = ()) -> list[range]:
        """Blocks that take part, by stages: a pair is two neighbours of one of them."""
        if not widths:
            return [range(self._first, depth)]
        blocks = range(self._first, depth)
        found = [list(run) for _, run in groupby(blocks, key=lambda i: widths[i])]
        return [range(run[0], run[-1] + 1) for run in found]

    def operators(self) -> tuple[Tensor, Tensor]:
        """K and L as `terms` reads them: (dim, dim), or one per block that takes part."""
        return self.K, self.L

    def terms(self, prompts: Tensor | Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """The weighted consistency and Lyapunov terms, two scalars to add to the training loss.

        Args:
            prompts: (depth, P, D), or `depth` tensors (P, D), block 0 first, without dropout.
                Without `first_block`, block 0 is not looked at: in a list it may have another P or
                be None.

        Returns:
            consistency, lyapunov: in fp32 or wider, whatever autocast says. Fewer than two blocks
            that take part are no pair: zeros, with gradients of zeros. A non-finite L makes the
            Lyapunov term NaN.

        Raises:
            RuntimeError: not bound.
            ValueError: the prompts do not fit, or their number differs between blocks.
        """
        K, L = self.operators()
        total: list[Tensor] = []
        for blocks, lift, rows in self._parts(prompts):
            dtype = torch.promote_types(torch.promote_types(rows.dtype, K.dtype), torch.float32)
            own = slice(blocks.start - self._first, blocks.stop - self._first)
            of_pairs = [t if t.dim() == 2 else t[own] for t in (K, L)]
            z, U, A, F = (t.to(dtype) for t in (rows, lift.weight, *of_pairs))
            terms = koopman_losses(z, U, A, F, self.formulation, self.gauge, self.gauge_eps)
            total = [a + b for a, b in zip(total, terms)] if total else list(terms)
        return self.consistency_weight * total[0], self.lyapunov_weight * total[1]

    def clip_gradients(self, max_norm: float = 10.0) -> Tensor:
        """Scale the gradients of lift, K and L together by min(1, max_norm / (norm + 1e-6)).

        Returns:
            Their joint L2 norm before clipping.
        """
        return nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    def config(self) -> dict:
        """Constructor arguments as plain JSON values."""
        return {
            "dim": self.dim,
            "mode": self.mode,
            "consistency_weight": self.consistency_weight,
            "lyapunov_weight": self.lyapunov_weight,
            "formulation": self.formulation,
            "gauge": self.gauge,
            "gauge_eps": self.gauge_eps,
            "first_block": self.first_block,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())

    @property
    def _first(self) -> int:
        """Number of the first block that takes part."""
        return 0 if self.first_block else 1

    @property
    def _taking_part(self) -> str:
        return "blocks" if self.first_block else "blocks but the first"

    def _parts(
        self, prompts: Tensor | Sequence[Tensor | None]
    ) -> Iterator[tuple[range, nn.Linear, Tensor]]:
        """Of each stage the blocks that take part, their lift, and their prompts (blocks, P, D)."""
        if self.depth is None:
            raise RuntimeError(
                "KLD is not bound: call bind(depth, width) or give it to PromptedViT"
            )
        if not isinstance(prompts, (Tensor, Sequence)):
            raise TypeError(f"prompts must be a tensor or a list of tensors, got {prompts!r}")
        if len(prompts) != self.depth:
            raise ValueError(f"prompts must hold {self.depth} blocks, got {len(prompts)}")
        if self.lifts is not None:
            for blocks, own in zip(self._stages, self.lifts):
                where, lift = f"blocks {blocks.start} to {blocks.stop - 1}", cast(nn.Linear, own)
                yield blocks, lift, self._stacked(prompts, blocks, lift, where, "")
        else:
            but = "" if self.first_block else " but the first"
            blocks = range(self._first, self.depth)
            yield blocks, self.lift, self._stacked(prompts, blocks, self.lift, "every block", but)

    @staticmethod
    def _stacked(
        prompts: Tensor | Sequence[Tensor | None],
        blocks: range,
        lift: nn.Linear,
        where: str,
        but: str,
    ) -> Tensor:
        width, rows = lift.in_features, prompts[blocks.start : blocks.stop]
        shapes = [None if p is None else tuple(p.shape) for p in rows]
        if any(s is None or len(s) != 2 or s[0] == 0 or s[1] != width for s in shapes):
            raise ValueError(f"prompts must be (P >= 1, {width}) in {where}, got {shapes}")
        if len(set(shapes)) > 1:
            raise ValueError(f"prompts must have the same P in {where}{but}, got {shapes}")
        if isinstance(rows, Tensor):
            return rows
        given = [p for p in rows if p is not None]
        return torch.stack(given) if given else lift.weight.new_empty(0, 1, width)


def _check_size(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value


def _check_weight(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return float(value)
