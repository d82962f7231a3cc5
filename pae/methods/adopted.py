"""A running script of VPT's or PAE's released code on the fast engine: `adopt` shares what the
script's own model trains.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import released
from ..errors import UnsupportedBackbone
from ..kld import KLD
from ..model import PromptedViT
from ..prompts.base import BackboneShape, PromptFamily, check_choice, check_prompts
from ..prompts.vpt import DROPOUT_SCOPES


def adopt(
    model: nn.Module,
    kld: KLD | None = None,
    dropout_scope: str | None = None,
    pool: str | None = None,
) -> PromptedViT:
    """A `PromptedViT` that shares prompts, head and Koopman parameters with a prompted model of the
    layout of VPT's and PAE's released code, built by anybody's copy of it.

    The script goes on with `model`: its optimiser, its checkpoints, `model.train()` and
    `model.eval()`, which switch the prompts' dropout and the head here too. Only the forward
    becomes `pae.fast_forward(adopted, images)`. With the same random state the prompts' dropout
    draws the same masks. Parameters that the script replaces, rather than writes into, are no
    longer shared: adopt the model again then.

    Args:
        model: what holds `transformer.prompt_embeddings` (1, P, r), for deep prompts
            `deep_prompt_embeddings` (depth - 1, P, r), `prompt_proj` and `prompt_dropout`, with
            the backbone in `transformer.encoder.layer`; below `enc` in the wrapper with a head. Or,
            as with MAE's and MoCo's backbones, what holds the same prompts beside `patch_embed`,
            `cls_token`, `pos_embed`, `blocks` and `norm` (MoCo) or `fc_norm` (MAE). Its backbone is
            put into eval mode, where it stays, and frozen.
        kld: PAE's regulariser with the weights and the mode of the script, not yet part of a model:
            its parameters are then `K_layers`, `L_layers` (or `K_global`, `L_global`) and
            `koopman_in` of `model`, and `adopted.penalty()` is what PAE adds to the loss.
        dropout_scope: "sample" as in VPT, "batch" as in PAE; None: by whether the model has
            Koopman parameters, as PAE's have.
        pool: which rows an average-pooled backbone (MAE) reads, as in `PromptedViT`. None: those
            that the model's `VIT_POOL_TYPE` says ("original", "img_pool" or "prompt_pool"), and
            "all", its default, where the model does not say it.

    Raises:
        TypeError: `model` is no module.
        UnsupportedBackbone: it has another layout, naming what is missing.
        ValueError: an unknown scope or pool; Koopman parameters of another size or mode than
            `kld`'s.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inner, by_itself = released.transformer(model), False
    if inner is None:
        inner = released.self_supervised(model)
        by_itself = inner is not None
    if inner is None or not isinstance(getattr(inner, "prompt_embeddings", None), nn.Parameter):
        missing = "transformer.encoder.layer" if inner is None else "transformer.prompt_embeddings"
        raise UnsupportedBackbone(
            f"{type(model).__name__} has no {missing}, which a prompted model of the released VPT "
            "code has; pae.PromptedViT takes backbones, and pae.load_official reads its files"
        )
    koopman = hasattr(inner, "koopman_in")
    if kld is not None:
        kld = _SharedKLD(kld, inner)
    elif koopman:
        warnings.warn(
            "the model has Koopman parameters and kld is None: penalty() is 0; give "
            "kld=pae.KLD(...) with the script's weights to share them",
            stacklevel=2,
        )
    if dropout_scope is None:
        dropout_scope = "batch" if koopman else "sample"
    check_choice("dropout_scope", dropout_scope, DROPOUT_SCOPES)
    deep = getattr(inner, "deep_prompt_embeddings", None)
    family = (_Shallow if deep is None else _Deep)(inner, dropout_scope)
    outer: Any = model
    heads = (getattr(part, "head", None) for part in (outer, getattr(outer, "enc", None)))
    head = next((h for h in heads if h is not None and not isinstance(h, nn.Identity)), None)
    if head is None:
        raise UnsupportedBackbone(f"{type(model).__name__} has no head: give the model that has it")
    if not by_itself:
        return PromptedViT(_Backbone(inner, head), family, kld, pool=pool or "image")
    backbone = released.SelfSupervised(inner, head)
    if pool is None:
        pool = _pool(inner) if backbone.averages else "image"
    return PromptedViT(backbone, family, kld, pool=pool)


# VPT's names of the rows that an average-pooled backbone reads
_POOLS = {"original": "all", "img_pool": "image", "prompt_pool": "prompts"}


def _pool(inner: Any) -> str:
    """What its `VIT_POOL_TYPE` says, in lower case or not, of the model or of its prompts."""
    for holder in (inner, getattr(inner, "prompt_config", None)):
        for name in ("VIT_POOL_TYPE", "vit_pool_type"):
            if (found := getattr(holder, name, None)) is not None:
                check_choice("VIT_POOL_TYPE of the model", found, _POOLS)
                return _POOLS[found]
    return _POOLS["original"]


class _Backbone(nn.Module):
    """The frozen parts of such a model, without what it trains; the head until it is taken."""

    def __init__(self, inner: Any, head: nn.Module) -> None:
        super().__init__()
        self.embeddings, self.encoder, self.head = inner.embeddings, inner.encoder, head


class _Deep(PromptFamily):
    """The prompts of such a model: block 0's and the others' are two parameters, which stay so.

    Attributes:
        first, rest: (1, P, r), and (depth - 1, P, r) or None. project: r to D. drop: its dropout.
    """

    first: nn.Parameter
    rest: nn.Parameter | None
    project: nn.Module
    drop: nn.Module

    def __init__(self, inner: Any, dropout_scope: str) -> None:
        super().__init__()
        self.dropout_scope = dropout_scope
        self.first, self.rest = (
            inner.prompt_embeddings,
            getattr(inner, "deep_prompt_embeddings", None),
        )
        self.project = getattr(inner, "prompt_proj", None) or nn.Identity()
        self.drop = inner.prompt_dropout

    def config(self) -> dict[str, Any]:
        raise TypeError(
            "an adopted model is saved by what it belongs to: torch.save(model.state_dict(), ...), "
            "which pae.load_official reads into a PromptedViT of its own"
        )

    def bind(self, shape: BackboneShape) -> None:
        count = 0 if self.rest is None else len(self.rest)
        if self.rest is not None and count != shape.depth - 1:
            raise UnsupportedBackbone(
                f"deep_prompt_embeddings has prompts for {count} blocks, expected "
                f"{shape.depth - 1} behind the first"
            )

    @property
    def prompt_counts(self) -> list[int]:
        return [self.first.shape[1]] * self.shape.depth

    def _rows(self, index: int) -> Tensor:
        own = self.first[0] if index == 0 or self.rest is None else self.rest[index - 1]
        return self.project(own)

    def _dropped(self, rows: Tensor, x: Tensor) -> Tensor:
        if self.dropout_scope == "sample" and self.drop.training:
            rows = rows.expand(len(x), -1, -1)
        return self.drop(rows)

    def raw_prompts(self) -> list[Tensor | None]:
        return [self._rows(i) if n else None for i, n in enumerate(self.prompt_counts)]

    def block_prompts(self, index: int, x: Tensor) -> Tensor | None:
        return self._dropped(self._rows(index), x) if self.prompt_counts[index] else None

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        width = self.first.shape[-1]
        if not isinstance(self.project, nn.Identity):
            raise ValueError("prompts that go through prompt_proj cannot be set to given rows")
        check_prompts("prompts", prompts, self.prompt_counts, width)
        rows = [p for p in prompts if p is not None]
        with torch.no_grad():
            self.first.copy_(rows[0][None])
            if self.rest is not None and len(self.rest):
                self.rest.copy_(torch.stack(rows[1:]))


class _Shallow(_Deep):
    """The same without prompts of later blocks: the first ones run through all of them."""

    enters_sequence = True

    @property
    def prompt_counts(self) -> list[int]:
        return [self.first.shape[1]] + [0] * (self.shape.depth - 1)


class _SharedKLD(KLD):
    """`like` with the parameters of PAE's model, of which layerwise ones are lists."""

    def __init__(self, like: KLD, inner: Any) -> None:
        super().__init__(**like.config())
        if like.depth is not None:
            raise ValueError("kld already belongs to a model; build a new one")
        names = ("K_global", "L_global") if self.mode == "global" else ("K_layers", "L_layers")
        missing = [n for n in ("koopman_in", *names) if not hasattr(inner, n)]
        if missing:
            raise ValueError(
                f"kld (mode {self.mode!r}) needs the model's {missing[0]}, which it does not have"
            )
        self._given = inner.koopman_in, *(getattr(inner, name) for name in names)

    def bind(self, depth: int, width: int, widths: Sequence[int] = ()) -> None:
        lift, K, L = self._given
        stacked = self.mode == "layerwise"
        counts = {len(K), len(L)} if stacked else set()
        sizes = {tuple(t.shape) for t in ([*K, *L] if stacked else [K, L])}
        expected = (self.dim, self.dim), (self.dim, width), depth - self._first
        if sizes != {expected[0]} or lift.weight.shape != expected[1] or counts - {expected[2]}:
            raise ValueError(
                f"kld expects {expected[2]} operators {expected[0]} and a lift {expected[1]}, got "
                f"{sorted(counts) or 1} of {sorted(sizes)} and {tuple(lift.weight.shape)}"
            )
        self.depth, self.lift = depth, lift
        if stacked:
            self.K_layers, self.L_layers = nn.ParameterList(K), nn.ParameterList(L)
        else:
            self.K, self.L = K, L

    def operators(self) -> tuple[Tensor, Tensor]:
        if self.mode == "global":
            return super().operators()
        # as in PAE's code the last of each list is in no pair, and has no gradient
        K, L = ([*list(each)[:-1], each[-1].detach()] for each in (self.K_layers, self.L_layers))
        return torch.stack(K), torch.stack(L)
