"""Text towers of CLIP and SigLIP: open_clip's `CLIP`, `CustomTextCLIP` and `TextTransformer`,
transformers' `CLIPModel`, `CLIPTextModelWithProjection`, `SiglipModel` and `SiglipTextModel`.

A tower is pre-norm blocks of the same form as an image's, on token and position embeddings. In CLIP
a row sees none behind it, and the features are read at the row of the end token; SigLIP's rows see
each other, and its features are read at the last row, padding or not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pae_kernels.checks import describe

from ..errors import UnsupportedBackbone
from . import hf_image, open_clip
from .hf_image import nothing_more
from .view import (
    BlocksView,
    BlockWeights,
    Bypass,
    Geometry,
    behind_attention,
    evaluating,
    heads_of,
    is_near,
    plainly,
)


@dataclass(frozen=True)
class TextShape:
    """The sizes of a text tower.

    Attributes:
        depth: number of blocks. width: of a row, D. num_heads, head_width: of attention.
        num_tokens: rows that a text is padded to, N. vocabulary: number of tokens.
        feature_width: of the features, E.
    """

    depth: int
    width: int
    num_heads: int
    head_width: int
    num_tokens: int
    vocabulary: int
    feature_width: int
    widths: tuple[int, ...] = ()

    @property
    def block_widths(self) -> tuple[int, ...]:
        """Width of each block."""
        return (self.width,) * self.depth


class TextView(BlocksView):
    """The face of a text tower.

    Attributes:
        module: the tower and nothing else; its parameters are the model's own.
        shape: its sizes.
        causal: whether a row sees none behind it.
        starts: tokens that every text begins with, before anything else may stand.
        end: id of the token that ends a text; None where the last row is read whatever it is.
        first_end: whether a text ends at its first `end`; else at its highest id, which `end` is.
    """

    module: nn.Module
    shape: TextShape
    num_prefix_tokens = 0
    reads_class_only = False
    causal: bool
    end: int | None
    first_end: bool
    _mask: tuple[Any, Tensor] | None = None

    def __init__(self, module: nn.Module, causal: bool, end: int | None, first_end: bool) -> None:
        self.module, self.causal, self.end, self.first_end = module, causal, end, first_end
        self.starts = 0 if end is None else 1
        table, positions = self.table, self.positions
        heads = self.read_block(0).num_heads
        self.shape = TextShape(
            depth=len(self.blocks),
            width=table.embedding_dim,
            num_heads=heads,
            head_width=table.embedding_dim // heads,
            num_tokens=len(positions),
            vocabulary=table.num_embeddings,
            feature_width=0,
        )
        with plainly(self.like.device):
            features = self.readout(self.like.new_zeros(1, self.shape.width)).shape[-1]
        self.shape = TextShape(**{**vars(self.shape), "feature_width": features})
        self._geometry = [Geometry(causal=causal)] * self.shape.depth

    # ---- where the parts are

    @property
    @abstractmethod
    def table(self) -> nn.Embedding:
        """Rows of tokens."""

    @property
    @abstractmethod
    def positions(self) -> Tensor:
        """(N, D)."""

    @property
    @abstractmethod
    def readers(self) -> list[nn.Module | Tensor | None]:
        """What the readout is made of."""

    @abstractmethod
    def readout(self, rows: Tensor) -> Tensor:
        """Rows (C, D) at the ends of texts, behind the last block, to features (C, E)."""

    # ---- what every tower does

    @property
    def readout_parts(self) -> list[Any]:
        return list(self.readers)

    def tokens(self, token_ids: Tensor) -> Tensor:
        """(C, n, D): the rows of tokens, no position added yet."""
        return self.table(token_ids).to(self.like.dtype)

    def place(self, rows: Tensor, start: int = 0) -> Tensor:
        """Rows (C, n, D), which stand at `start`, with their positions added."""
        return rows + self.positions[start : start + rows.shape[1]].to(rows.dtype)

    def embed(self, token_ids: Tensor) -> Tensor:
        """What enters the first block, (C, n, D), of token ids (C, n)."""
        return self.place(self.tokens(token_ids))

    def eot(self, token_ids: Tensor) -> Tensor:
        """(C,) int64: the row that each text is read at."""
        if self.end is None:
            return token_ids.new_full(token_ids.shape[:1], token_ids.shape[1] - 1)
        if self.first_end:
            return token_ids.eq(self.end).int().argmax(dim=-1)
        return token_ids.argmax(dim=-1)

    def run_block(self, index: int, x: Tensor, bypass: Bypass | None = None) -> Tensor:
        """The block's own forward on rows (C, n, D); its formula with `bypass`, what becomes of
        attention's rows.

        Raises:
            UnsupportedBackbone: as `BackboneView.run_block`.
        """
        if bypass is not None:
            self.require_formula(index)
            return self.formula(self.read_block(index), x, self._geometry[index], bypass)
        made = self.blocks[index](x, **self.block_arguments(self._geometry[index], x.shape[1]))
        return made[0] if isinstance(made, tuple) else made

    def features(self, token_ids: Tensor) -> Tensor:
        """(C, E) of token ids (C, N), by the blocks' own forward."""
        return self.read_rows(self.embed(token_ids), self.eot(token_ids))

    def read_rows(self, x: Tensor, at: Tensor, bypasses: Sequence[Bypass] = ()) -> Tensor:
        """(C, E) of embedded rows (C, n, D), read at rows `at` (C,); `bypasses` as in
        `text.walk`.
        """
        for i in range(self.shape.depth):
            x = self.run_block(i, x, bypasses[i] if bypasses else None)
        return self.readout(x[torch.arange(len(x), device=x.device), at])

    def check_tokens(self, token_ids: Tensor) -> None:
        """Raise ValueError unless these are token ids (C, N) that this tower reads."""
        rows, most = self.shape.num_tokens, self.shape.vocabulary
        if (
            not isinstance(token_ids, Tensor)
            or token_ids.dim() != 2
            or token_ids.dtype != torch.int64
            or token_ids.shape[1] != rows
            or len(token_ids) == 0
        ):
            got = describe(token_ids) if isinstance(token_ids, Tensor) else type(token_ids).__name__
            raise ValueError(f"tokens must be int64 (classes, {rows}), got {got}")
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= most:
            raise ValueError(f"tokens must lie in [0, {most}), got {low} to {high}")
        if self.first_end and self.end is not None:
            ended = token_ids.eq(self.end).any(1).int()
            if not int(ended.min()):
                raise ValueError(f"tokens[{int(ended.argmin())}] has no end token, {self.end}")

    # ---- blocks and their formula

    def geometry(self, size: Any = None) -> list[Geometry]:
        return self._geometry

    def proof(self, index: int, rows: int) -> tuple[int, Geometry]:
        return rows, self._geometry[index]

    def formula(
        self,
        weights: BlockWeights,
        x: Tensor,
        geometry: Geometry,
        bypass: Bypass | None = None,
    ) -> Tensor:
        q, k, v = heads_of(weights, x)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=geometry.causal, scale=weights.scale
        )
        return behind_attention(weights, x, out.transpose(1, 2).flatten(2), bypass)

    def examine(self) -> None:
        """Prove all blocks, or leave in `unproved` why they run as they are."""
        self.unproved = None
        try:
            self.prove_blocks()
        except UnsupportedBackbone as error:
            self.unproved = str(error)

    def _additive_mask(self, rows: int) -> Tensor:
        """(rows, rows): 0, and -inf above the diagonal; made once."""
        like = self.like
        key = rows, like.device, like.dtype
        if self._mask is None or self._mask[0] != key:
            above = torch.ones(rows, rows, dtype=torch.bool, device=like.device).triu(1)
            self._mask = (
                key,
                torch.zeros_like(above, dtype=like.dtype).masked_fill(above, -torch.inf),
            )
        return self._mask[1]


class OpenClipText(TextView):
    """Of open_clip: a `TextTransformer`, or a `Tower` of the same parts."""

    @property
    def _tower(self) -> Any:
        return self.module

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self._tower.transformer.resblocks)

    def read_block(self, index: int) -> BlockWeights:
        return open_clip.View.read(self.blocks[index], f"text.blocks.{index}")

    @property
    def table(self) -> nn.Embedding:
        return self._tower.token_embedding

    @property
    def positions(self) -> Tensor:
        return self._tower.positional_embedding

    @property
    def readers(self) -> list[nn.Module | Tensor | None]:
        return [self._tower.ln_final, self._tower.text_projection]

    def block_arguments(self, geometry: Geometry, rows: int) -> dict[str, Any]:
        return {"attn_mask": self._additive_mask(rows)} if geometry.causal else {}

    def readout(self, rows: Tensor) -> Tensor:
        rows, projection = self._tower.ln_final(rows), self._tower.text_projection
        if projection is None:
            return rows
        return projection(rows) if isinstance(projection, nn.Module) else rows @ projection


class TransformersText(TextView):
    """Of transformers, versions 4 and 5: a `Tower` of `text_model` and, of CLIP, `projection`."""

    @property
    def _base(self) -> Any:
        tower: Any = self.module
        return tower.text_model

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self._base.encoder.layers)

    def read_block(self, index: int) -> BlockWeights:
        return hf_image.View.read(self.blocks[index], f"text.blocks.{index}")

    @property
    def table(self) -> nn.Embedding:
        return self._base.embeddings.token_embedding

    @property
    def positions(self) -> Tensor:
        return self._base.embeddings.position_embedding.weight

    @property
    def readers(self) -> list[nn.Module | Tensor | None]:
        return [self._base.final_layer_norm, self._projection]

    @property
    def _projection(self) -> nn.Module:
        tower: Any = self.module
        return self._base.head if hasattr(self._base, "head") else tower.projection

    def block_arguments(self, geometry: Geometry, rows: int) -> dict[str, Any]:
        given = nothing_more(self.blocks[0])
        if not geometry.causal:
            return given
        if (
            "causal_attention_mask" in given
        ):  # version 4, whose fused attention takes no other dtype
            given["causal_attention_mask"] = self._causal_mask(rows)
        elif self._base.config._attn_implementation == "eager":
            given["attention_mask"] = self._causal_mask(rows)
        else:
            given["is_causal"] = True
        return given

    def _causal_mask(self, rows: int) -> Tensor:
        mask = self._additive_mask(rows)
        return mask if self._base.config._attn_implementation == "eager" else mask.isfinite()

    def readout(self, rows: Tensor) -> Tensor:
        return self._projection(self._base.final_layer_norm(rows))


class Tower(nn.Module):
    """The text side of a model alone: its own modules and parameters, under one roof."""

    def __init__(self, **parts: nn.Module | nn.Parameter | None) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *_: Any) -> None:
        """Refuse: a view runs the parts."""
        raise NotImplementedError("a Tower holds parts; pae.backbones.clip_text.read_text reads it")


# ---- which models are read


def read_text(model: nn.Module | TextView) -> TextView:
    """View of the text tower of a CLIP or SigLIP model, proved by running: the model's own text
    features are those of the view, and its blocks are their formula.

    Args:
        model: of open_clip `CLIP`, `CustomTextCLIP` or `TextTransformer`; of transformers
            `CLIPModel`, `CLIPTextModelWithProjection`, `SiglipModel` or `SiglipTextModel`; or what
            this function returned.

    Raises:
        UnsupportedBackbone: naming the class, or the part that is not expressed.
    """
    if isinstance(model, TextView):
        return model
    library = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    if "open_clip" in library:
        view, own = _of_open_clip(model)
    elif "transformers" in library:
        view, own = _of_transformers(model)
    else:
        raise _no_tower(model)
    _prove_features(view, own, type(model).__name__)
    view.examine()
    return view


Features = Callable[[Tensor], Tensor]


def _no_tower(model: Any, more: str = "") -> UnsupportedBackbone:
    kind = type(model).__name__
    return UnsupportedBackbone(
        f"{kind} has no text tower that can be read{more}: expected CLIP, CustomTextCLIP or "
        "TextTransformer of open_clip, CLIPModel, CLIPTextModelWithProjection, SiglipModel or "
        "SiglipTextModel of transformers"
    )


def _of_open_clip(model: Any) -> tuple[TextView, Features]:
    own = model.encode_text if hasattr(model, "encode_text") else model
    text = getattr(model, "text", model)
    kind = type(text).__name__
    if not all(hasattr(text, n) for n in ("transformer", "token_embedding", "ln_final")):
        raise _no_tower(model, "" if text is model else f" ({kind})")
    if text is model and hasattr(model, "visual"):  # CLIP keeps the parts of its tower as its own
        names = ("transformer", "token_embedding", "positional_embedding", "ln_final")
        tower: Any = Tower(**{n: getattr(model, n) for n in (*names, "text_projection")})
        pool, end = model.text_pool_type, model.text_eos_id
    else:
        tower, pool, end = text, text.pool_type, text.eos_id
    if getattr(text, "cls_emb", None) is not None:
        raise UnsupportedBackbone(f"{kind}.cls_emb is set: its features are read at a class token")
    if getattr(text, "use_pad_mask", False):
        raise UnsupportedBackbone(f"{kind}.use_pad_mask is True: padding is masked, expected False")
    if pool not in ("argmax", "eos", "last"):
        raise UnsupportedBackbone(
            f"{kind} pools its text by {pool!r}, expected argmax, eos or last"
        )
    causal, last = text.attn_mask is not None, pool == "last"
    if not causal and not last:
        raise UnsupportedBackbone(
            f"{kind} has no causal mask and reads the row of the end token, expected the last row"
        )
    end = None if last else end if pool == "eos" else text.token_embedding.num_embeddings - 1
    return OpenClipText(tower, causal, end, pool == "eos"), own


def _of_transformers(model: Any) -> tuple[TextView, Features]:
    names = {kind.__name__ for kind in type(model).__mro__}
    known = {"CLIPModel", "CLIPTextModelWithProjection", "SiglipModel", "SiglipTextModel"} & names
    if not known:
        step = ": it has no projection" if "CLIPTextModel" in names else ""
        raise _no_tower(model, step)
    base = getattr(model, "text_model", model)  # SigLIP's text model of version 5 is it itself
    if "CLIPModel" in known or "CLIPTextModelWithProjection" in known:
        # in configurations of before, 2 stands for the highest id, as the model has it
        end, first_end = base.eos_token_id, base.eos_token_id != 2
        end = end if first_end else base.embeddings.token_embedding.num_embeddings - 1
        tower = Tower(text_model=base, projection=model.text_projection)
        view = TransformersText(tower, True, end, first_end)
    else:
        view = TransformersText(Tower(text_model=base), False, None, False)
    return view, partial(_transformers_features, model)


def _transformers_features(model: Any, token_ids: Tensor) -> Tensor:
    """As version 4 and 5 hand them on."""
    out = model.get_text_features(token_ids) if hasattr(model, "vision_model") else model(token_ids)
    if isinstance(out, Tensor):
        return out
    found = getattr(out, "text_embeds", None)
    return out.pooler_output if found is None else found


def _prove_features(view: TextView, own: Features, kind: str) -> None:
    """Raise unless the model's own text features are those of the view, on random texts that end at
    the first, a middle and the last row.
    """
    shape, like = view.shape, view.like
    generator = torch.Generator("cpu").manual_seed(0)
    size = 3, shape.num_tokens
    ids = torch.randint(0, shape.vocabulary, size, generator=generator, device="cpu")
    if view.end is not None:
        ends = [min(view.starts, size[1] - 1), size[1] // 2, size[1] - 1]
        ids[torch.arange(3), torch.tensor(ends)] = view.end
    ids = ids.to(like.device)
    with evaluating(view.module), plainly(like.device):
        try:
            expected, got = own(ids), view.features(ids)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise UnsupportedBackbone(f"text tower of {kind} cannot be run: {reason}") from error
        if got.shape != expected.shape or not is_near(got, expected):
            raise UnsupportedBackbone(
                f"text tower of {kind} is more than embedding, blocks, norm and projection: its "
                "own features of random texts are others"
            )
