"""E2VPT: prompts at the input and, in head space, at keys and values; both can be pruned.

Source: Han et al., "E^2VPT: An Effective and Efficient Approach for Visual Prompt Tuning" (ICCV
2023, arXiv 2307.13770).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import BackboneShape, check_choice, check_count, check_probability, check_prompts
from .registry import register
from .vpt import _VPT

MASKS = ("none", "learned", "fixed")
PRUNED = ("zero", "remove")
KEPT_PIECES = 4  # of every token, however many it has
INIT_FAN = 6.0  # Kaiming uniform, a = 0: bound sqrt(6 / fan_in)


@register("e2vpt")
class E2VPT(_VPT):
    """Block i reads prompts P_i * m * tile(g), and T' learned keys and values in head space.

    The keys and values pass neither norm nor projection. Token mask m (T,) and piece mask g (T, s)
    are shared by all blocks; piece j of a token is its channels j, j + s, j + 2 s, ...

    Pruning and rewinding, the published recipe: train with `masks="learned"`, rank masks by their
    gradients (`e2vpt_importance`), and start again from `rewound(...)`: fresh prompts of the same
    sizes under fixed binary masks. Masks are trained by the optimiser too, as in the released code,
    whose scheduler has a learning rate of 0 while it scores.

    A pruned token is a zero row in the released code: LayerNorm turns it into its shift, and it
    keeps its share of the softmax. `pruned="zero"` is that; `pruned="remove"` takes it out of the
    attention, another (and cheaper) function. Pruned pieces are zeros in both.

    Args:
        num_tokens: T per block; 0 for keys and values alone.
        num_kv: T', learned keys and values per block; 0 for none.
        share_kv: one tensor for keys and values (published default).
        dropout, dropout_scope: of the prompts, as in `VPTDeep` (the released code draws per
            sample).
        kv_dropout: of keys and values, drawn for each of the two, for the whole batch.
        masks: "none", "learned" (parameters, ones at first) or "fixed" (buffers).
        pieces: s; must divide D.
        pruned: "zero" or "remove"; acts on fixed masks.

    Attributes:
        tokens: (depth, T, D), VPT's uniform initialisation.
        keys_values: (depth, T', 1 or 2, H, d), uniform in +- sqrt(6 / (T' d)), as released. Absent
            when T' = 0.
        token_mask (T,), piece_mask (T, s): absent without masks.

    KLD and MPA act on the prompts at the input alone. Without masks, keys and values this is
    VPT-deep.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
    """

    keys_values: nn.Parameter | None
    token_mask: Tensor
    piece_mask: Tensor
    training_arguments = (*_VPT.training_arguments, "kv_dropout")

    def __init__(
        self,
        num_tokens: int,
        num_kv: int = 5,
        share_kv: bool = True,
        dropout: float = 0.0,
        dropout_scope: str = "batch",
        kv_dropout: float = 0.0,
        masks: str = "none",
        pieces: int = 16,
        pruned: str = "zero",
    ) -> None:
        super().__init__(dropout, dropout_scope)
        self.num_tokens = check_count("num_tokens", num_tokens)
        self.num_kv = check_count("num_kv", num_kv)
        if num_tokens == 0 and masks != "none":
            raise ValueError("num_tokens must be at least 1 for masks, got 0")
        self.share_kv = bool(share_kv)
        self.kv_dropout = check_probability("kv_dropout", kv_dropout)
        self.masks = check_choice("masks", masks, MASKS)
        self.pruned = check_choice("pruned", pruned, PRUNED)
        self.pieces = check_count("pieces", pieces)
        self.register_parameter("keys_values", None)
        self._start_masks: tuple[Tensor, Tensor] | None = None
        self._known_kept: tuple[tuple[int, int], Tensor, Tensor] | None = None

    def bind(self, shape: BackboneShape) -> None:
        if self.masks != "none" and (self.pieces == 0 or shape.width % self.pieces):
            raise ValueError(f"pieces must divide the width {shape.width}, got {self.pieces}")
        self._allocate(shape, shape.depth, self.num_tokens)
        if self.num_kv:
            size = (shape.depth, self.num_kv, 2 - self.share_kv, shape.num_heads, shape.head_width)
            bound = (INIT_FAN / (self.num_kv * shape.head_width)) ** 0.5
            self.keys_values = nn.Parameter(torch.empty(size).uniform_(-bound, bound))
        if self.masks != "none":
            token, piece = self._start_masks or (
                torch.ones(self.num_tokens),
                torch.ones(self.num_tokens, self.pieces),
            )
            if self.masks == "learned":
                self.token_mask, self.piece_mask = nn.Parameter(token), nn.Parameter(piece)
            else:
                self.register_buffer("token_mask", token)
                self.register_buffer("piece_mask", piece)

    @property
    def prompt_counts(self) -> list[int]:
        count = len(self._kept()) if self._removes() else self.num_tokens
        return [count] * len(self.tokens)

    def raw_prompts(self) -> list[Tensor | None]:
        """Masked prompts of every block, without dropout."""
        return list(self._masked().unbind(0))

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        rows = self._masked(index)
        return self._drop(rows, x) if len(rows) else None

    def head_keys_values(self, index: int, x: Tensor) -> Tensor | None:
        if self.keys_values is None:
            return None
        pair = self.keys_values[index]  # (T', 1 or 2, H, d)
        return F.dropout(pair.expand(-1, 2, -1, -1), self.kv_dropout, self.training)

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        """Make these the effective prompts: tokens = prompts / mask; refused where a mask is 0."""
        check_prompts("prompts", prompts, self.prompt_counts, self.tokens.shape[-1])
        mask = self._mask()
        if mask is not None and mask.eq(0).any():
            raise ValueError("prompts cannot be set where a mask is 0")
        if self.num_tokens:
            with torch.no_grad():
                wanted = torch.stack([p.to(self.tokens) for p in prompts if p is not None])
                self.tokens.copy_(wanted if mask is None else wanted / mask)

    def rewound(
        self,
        importance: E2VPTImportance,
        token_fraction: float,
        piece_fraction: float,
        pruned: str | None = None,
    ) -> E2VPT:
        """A fresh family of the same sizes whose fixed masks drop what matters least.

        Args:
            importance: of this family, from `e2vpt_importance`.
            token_fraction, piece_fraction: shares to drop, in [0, 1); what is no whole number is
                rounded down, as released. At least one token stays, and in each token 4 pieces.
            pruned: "zero" or "remove"; as in this family when None.

        Returns:
            an `E2VPT` that remembers its masks and belongs to no model yet.
        """
        tokens, pieces = importance.tokens, importance.pieces
        if tuple(tokens.shape) != (self.num_tokens,) or tuple(pieces.shape) != (
            self.num_tokens,
            self.pieces,
        ):
            raise ValueError(
                f"importance must be of {self.num_tokens} tokens and {self.pieces} pieces, got "
                f"{tuple(tokens.shape)} and {tuple(pieces.shape)}"
            )
        check_probability("token_fraction", token_fraction)
        check_probability("piece_fraction", piece_fraction)
        drop = min(_share(token_fraction, self.num_tokens), self.num_tokens - 1)
        token_mask = torch.ones(self.num_tokens)
        token_mask[tokens.argsort(stable=True)[:drop].cpu()] = 0
        drop = min(_share(piece_fraction, self.pieces), max(self.pieces - KEPT_PIECES, 0))
        piece_mask = torch.ones(self.num_tokens, self.pieces)
        piece_mask.scatter_(1, pieces.argsort(dim=1, stable=True)[:, :drop].cpu(), 0)
        made = E2VPT(
            **{**self.config(), "masks": "fixed", "pruned": pruned or self.pruned},
        )
        made._start_masks = token_mask, piece_mask
        return made

    def _removes(self) -> bool:
        return self.masks == "fixed" and self.pruned == "remove"

    def _kept(self) -> Tensor:
        """Indices of the tokens that stay; a mask on a GPU is read once, not every step."""
        mask = self.token_mask
        if mask.is_inference():  # nobody records its changes, so nothing is known of it
            return mask.nonzero()[:, 0]
        key = mask.data_ptr(), mask._version
        known = self._known_kept  # another thread may put its own there at any time
        if known is None or known[0] != key:
            # evaluation may be the first to ask, and training follows; the mask is held, so that
            # no later one lies at its address
            with torch.inference_mode(False):
                known = self._known_kept = key, mask.nonzero()[:, 0], mask.detach()
        return known[1]

    def _mask(self) -> Tensor | None:
        """(T, D): token mask times tiled piece mask, or None."""
        if self.masks == "none":
            return None
        tiles = self.tokens.shape[-1] // self.pieces
        return self.token_mask[:, None] * self.piece_mask.repeat(1, tiles)

    def _masked(self, index: int | slice = slice(None)) -> Tensor:
        tokens, mask = self.tokens[index], self._mask()
        if mask is None:
            return tokens
        if self._removes():
            kept = self._kept()
            return tokens.index_select(-2, kept) * mask[kept]
        return tokens * mask


def _share(fraction: float, count: int) -> int:
    """floor(fraction count); 0.29 of 100 is 29, although their product is a little less."""
    return int(fraction * count + 1e-9)


@dataclass(frozen=True, eq=False)
class E2VPTImportance:
    """Mean gradient of the loss by each mask entry: tokens (T,), pieces (T, s); small is idle."""

    tokens: Tensor
    pieces: Tensor


def e2vpt_importance(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    absolute: bool = False,
) -> E2VPTImportance:
    """Mean over batches of d loss / d mask, without any step and without dropout.

    The released code ranks the signed mean, although a large negative gradient means that growing
    the token would help; `absolute=True` ranks its size.

    Args:
        model: a `PromptedViT` over an `E2VPT` with `masks="learned"`; it is put into eval mode and
            back.
        batches: (images, labels), at least one.
        loss: of (logits, labels).

    Raises:
        TypeError, ValueError: another family, masks that are not learned, no batch.
    """
    family = model.prompts
    if not isinstance(family, E2VPT):
        raise TypeError(f"model.prompts must be E2VPT, got {type(family).__name__}")
    if family.masks != "learned":
        raise ValueError(f"model.prompts must have masks='learned', got {family.masks!r}")
    masks, count = (family.token_mask, family.piece_mask), 0
    sums = [torch.zeros_like(m) for m in masks]
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for images, labels in batches:
            value = loss(model(images, engine="fast"), labels)
            for total, grad in zip(sums, torch.autograd.grad(value, masks)):
                total += grad
            count += 1
    finally:
        for module, training in flags:
            module.training = training
    if count == 0:
        raise ValueError("batches must hold at least one batch, got none")
    tokens, pieces = (s / count for s in sums)
    return E2VPTImportance(*(t.abs() if absolute else t for t in (tokens, pieces)))
