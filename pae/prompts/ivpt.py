"""iVPT: each block's prompts also mix in the previous block's, and image rows that the class token
looks at are reinforced.

Source: Zhou, Chen, Huang, "iVPT: Improving Task-relevant Information Sharing in Visual Prompt
Tuning by Cross-layer Dynamic Connection" (arXiv 2404.05207); in its journal version SVPT.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import BackboneShape, check_choice, check_count, check_prompts
from .registry import register
from .vpt import _VPT

REDUCTIONS = ("mean", "max")
REINFORCED = ("topk", "all")
MATCHES = ("rank", "shared")
MIX_STARTS = ("copied", "independent")


@register("ivpt")
class IVPT(_VPT):
    """P~_l = P_l + M_l P_{l-1} + c_l 1^T, and image rows += E_l, both for l = 1 .. depth - 1.

    Cross-layer dynamic connection with dynamic aggregation: M_l (P, P) and c_l (P,) act on the
    token axis. P_{l-1} is the previous block's parameter, not its mixture: the connection is one
    hop. Block 0 has plain prompts.

    Attentive reinforcement: the k image rows with the largest class attention in block l - 1 get
    the k learned rows E_l added at the input of block l, the j-th most attended one row j. The
    choice has no gradient. Registers and the class token are never chosen.

    Reconstructed, because the paper's equations are not public: connection, aggregation and the
    place of E_l follow the authors' published segmentation modules, which add E_l to *all* patches
    (`reinforced="all"`); choosing by class attention follows the paper's captions. So are options:
    the reduction over heads, and whether the j-th row has its own vector. In those modules dropout
    is drawn anew for each use of P_l; here too.

    Args:
        num_tokens: P, the same in all blocks, at least 1.
        num_reinforced: k; 0 leaves the image rows alone (and costs nothing).
        reinforced: "topk" by class attention, or "all": one learned row per patch, whose number is
            then that of the backbone's default image size; `num_reinforced` is not used.
        reduction: over heads, "mean" or "max"; decides the order alone.
        match: "rank": the j-th most attended row gets vector j; "shared": all get the same.
        mix_start: "copied": M_l and c_l start the same in all blocks, as in the authors' modules;
            "independent": each is drawn for itself.
        dropout, dropout_scope: as in `VPTDeep`.

    Attributes:
        tokens: (depth, P, D), VPT's uniform initialisation.
        mix: (depth - 1, P, P) and mix_bias (depth - 1, P): M_l and c_l for l = 1 ..., in the
            initialisation of `nn.Linear`.
        added: (depth - 1, k, D), zeros at first; k = 1 for "shared", the patches for "all".

    mix_bias moves whole rows by a constant, which the frozen LayerNorm takes out again: it has a
    gradient through KLD alone.

    With mix, mix_bias and added at zero this is VPT-deep exactly. The gradient of `added` is a
    gather and a sum in a fixed order.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected; also from
            `PromptedViT` when the backbone has no class token.
    """

    mix: nn.Parameter
    mix_bias: nn.Parameter
    added: nn.Parameter
    training_arguments = (*_VPT.training_arguments, "mix_start")

    def __init__(
        self,
        num_tokens: int,
        num_reinforced: int = 10,
        reinforced: str = "topk",
        reduction: str = "mean",
        match: str = "rank",
        mix_start: str = "copied",
        dropout: float = 0.0,
        dropout_scope: str = "batch",
    ) -> None:
        super().__init__(dropout, dropout_scope)
        self.num_tokens = check_count("num_tokens", num_tokens)
        if num_tokens == 0:
            raise ValueError("num_tokens must be at least 1, got 0")
        self.num_reinforced = check_count("num_reinforced", num_reinforced)
        self.reinforced = check_choice("reinforced", reinforced, REINFORCED)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self.match = check_choice("match", match, MATCHES)
        self.mix_start = check_choice("mix_start", mix_start, MIX_STARTS)
        self.adjusts_rows = reinforced == "all"
        self.reads_class_attention = reinforced == "topk" and num_reinforced > 0
        for name in ("mix", "mix_bias", "added"):
            self.register_parameter(name, None)

    def bind(self, shape: BackboneShape) -> None:
        pairs, count = shape.depth - 1, self.num_tokens
        patches = shape.num_tokens - shape.num_prefix_tokens
        if self.reads_class_attention and self.num_reinforced > patches:
            raise ValueError(
                f"num_reinforced must be at most the {patches} patches of an image, got "
                f"{self.num_reinforced}"
            )
        self._allocate(shape, shape.depth, count)
        bound = count**-0.5
        drawn = 1 if self.mix_start == "copied" else pairs
        mix = torch.empty(drawn, count, count).uniform_(-bound, bound)
        bias = torch.empty(drawn, count).uniform_(-bound, bound)
        self.mix = nn.Parameter(mix.expand(pairs, -1, -1).clone())
        self.mix_bias = nn.Parameter(bias.expand(pairs, -1).clone())
        if self.adjusts_rows or self.reads_class_attention:
            rows = patches if self.reinforced == "all" else self.num_reinforced
            rows = 1 if self.match == "shared" else rows
            self.added = nn.Parameter(torch.zeros(pairs, rows, shape.width))

    @property
    def prompt_counts(self) -> list[int]:
        return [self.num_tokens] * len(self.tokens)

    def raw_prompts(self) -> list[Tensor | None]:
        """P~ of every block, without dropout."""
        mixed = self._mixed(self.tokens[1:], self.mix, self.tokens[:-1], self.mix_bias)
        return [self.tokens[0], *mixed.unbind(0)]

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        own = self._drop(self.tokens[index], x)
        if index == 0:
            return own
        before = self._drop(self.tokens[index - 1], x)
        return self._mixed(own, self.mix[index - 1], before, self.mix_bias[index - 1])

    def all_prompts(self, x: Tensor) -> list[Tensor | None]:
        if self.training and self.dropout > 0:
            return super().all_prompts(x)
        return self.raw_prompts()

    @staticmethod
    def _mixed(own: Tensor, mix: Tensor, before: Tensor, bias: Tensor) -> Tensor:
        return own + (mix @ before + bias[..., None])

    def adjust_rows(self, index: int, x: Tensor) -> Tensor:
        added, prefix = self.added[index - 1].to(x.dtype), self.shape.num_prefix_tokens
        patches = x.shape[1] - prefix
        if len(added) not in (1, patches):
            raise ValueError(
                f"images must have {len(added)} patches, one per learned row, got {patches}"
            )
        return torch.cat([x[:, :prefix], x[:, prefix:] + added], dim=1)

    def adjust_attended_rows(self, index: int, x: Tensor, class_attention: Tensor) -> Tensor:
        added, prefix = self.added[index - 1].to(x.dtype), self.shape.num_prefix_tokens
        patches = class_attention[..., prefix:]
        ranking = patches.mean(1) if self.reduction == "mean" else patches.amax(1)
        chosen = ranking.topk(self.num_reinforced).indices + prefix  # (B, k), distinct
        rows = added.expand(len(x), self.num_reinforced, -1)
        return x.scatter_add(1, chosen[..., None].expand_as(rows), rows)

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        """Make these the effective prompts P~: P_l = given_l - M_l P_{l-1} - c_l in block order."""
        check_prompts("prompts", prompts, self.prompt_counts, self.tokens.shape[-1])
        with torch.no_grad():
            for l, rows in enumerate(prompts):
                assert rows is not None  # checked: every block has prompts
                rows = rows.to(self.tokens)
                if l > 0:
                    shared = self.mix[l - 1] @ self.tokens[l - 1] + self.mix_bias[l - 1][:, None]
                    rows = rows - shared
                self.tokens[l].copy_(rows)
