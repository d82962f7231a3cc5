"""The face of Hugging Face's vision transformers, read by the names of their parts: those of
version 5 of transformers, and of version 4 where they differ.

The features are what the model's own forward hands on: `pooler_output` of a bare model (the class
row where that is None, a mean where there is no class token), `image_embeds`, or what a classifier
reads.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .plain import PlainView
from .reading import BlockReader
from .view import BlockWeights, Geometry, Linear, Stacked


@dataclass(frozen=True)
class Kind:
    """A class of models.

    Attributes:
        base: attribute that holds the transformer, where the class is not it itself.
        reads: what of the normed rows becomes the features: "row" (row 0), "mean" (of those behind
            the prefix), "both", "pooler", "projection" (of row 0), "attention"; "bare mean" is of
            rows that are not normed.
        head: attribute of the classifier.
    """

    base: str | None = None
    reads: str = "row"
    head: str | None = None


_POOLER = {"pooler": "pooler", "attention": "head"}  # the module that does it, in the transformer
_POOLS = {"mean": "mean", "bare mean": "mean", "both": "reads row 0 beside the mean of the others"}
_POOLS |= {"attention": "pools its rows by attention"}


class View(PlainView):
    """The face of a model that is one of its kind."""

    resizes = True

    def __init__(self, module: nn.Module, kind: Kind) -> None:
        self.module, self.kind, self.head_name = module, kind, kind.head
        base, embeddings = self.base, self.base.embeddings
        reads = self.kind.reads
        if reads in _POOLER and getattr(base, _POOLER[reads], None) is None:
            reads = "row" if reads == "pooler" else "mean"
        self.reads, self.pools = reads, _POOLS.get(reads, "row")
        takes = inspect.signature(embeddings.forward).parameters
        self._told = "interpolate_pos_encoding" in takes  # others place every size by themselves
        self._masks = hasattr(embeddings, "random_masking")  # MAE's, in evaluation too
        registers = getattr(embeddings, "register_tokens", None)
        prefix = len(self._first) + (0 if registers is None else registers.shape[1])
        config = base.config
        heads, width = config.num_attention_heads, config.hidden_size
        frames = getattr(config, "num_frames", None)
        self._measure(self._patch_size(config), config.image_size, prefix, heads, width, frames)

    @staticmethod
    def _patch_size(config: Any) -> Any:
        """One number, or two, or three of a tube."""
        return config.patch_size

    @property
    def base(self) -> Any:
        """The transformer itself."""
        inner: Any = self.module if self.kind.base is None else getattr(self.module, self.kind.base)
        return getattr(inner, "vision_model", inner)  # around the towers of version 4

    @property
    def blocks(self) -> list[nn.Module]:
        base = self.base
        for path in ("layers", "layer"):
            if hasattr(base, path):
                return list(getattr(base, path))
        encoder = base.encoder if hasattr(base, "encoder") else base.model
        return list(encoder.layer if hasattr(encoder, "layer") else encoder.layers)

    @torch.no_grad()
    def geometry(self, size: tuple[int, int]) -> list[Geometry]:
        """Of DINOv3: the same list, while the module is the same."""
        rope = getattr(self.base, "rope_embeddings", None)
        if rope is None:
            return super().geometry(size)
        tensors = ((f"rope_embeddings.{n}", t) for n, t in rope.named_buffers())
        return self._remembered(size, tensors, self._angles)

    def _angles(self, size: tuple[int, int]) -> list[Geometry]:
        cos, sin = self.base.rope_embeddings(self.like.new_empty(1, 1, *size))  # each angle twice
        rotation = torch.stack([sin, cos]).chunk(2, dim=-1)[0]
        return [Geometry(rotation)] * len(self.blocks)

    def block_arguments(self, geometry: Geometry, rows: int) -> dict[str, Any]:
        if geometry.rotation is not None:
            sin, cos = torch.cat([geometry.rotation] * 2, dim=-1)
            return {"position_embeddings": (cos, sin)}
        return nothing_more(self.blocks[0])

    @staticmethod
    def read(block: nn.Module, name: str) -> BlockWeights:
        read = BlockReader(block, name)

        def at(*paths: str) -> str:
            return next((path for path in paths if read.has(path)), paths[0])

        inner, attention = "attention.attention.", ("attention.", "self_attn.")
        each = []
        for short, long in (("q", "query"), ("k", "key"), ("v", "value")):
            own = read.linear(at(*(f"{a}{short}_proj" for a in attention), f"{inner}{long}"))
            beside = f"{inner}{short}_bias"  # of VideoMAE in version 4
            each.append(Linear(own.weight, read.tensor(beside)) if read.has(beside) else own)
        counts = [
            f"{a}{n}" for a in (*attention, inner) for n in ("num_attention_heads", "num_heads")
        ]
        num_heads = read.get(at(*counts))
        scale = at(*(f"{a}{n}" for a in (*attention, inner) for n in ("scaling", "scale")))
        factor = read.get(scale) if read.has(scale) else (len(each[0].weight) // num_heads) ** -0.5
        gated, packed = read.has("mlp.gate_proj"), read.has("mlp.weights_in")  # of version 4
        act = at(
            *("mlp.activation_fn", "mlp.act_fn", "mlp.activation"),
            "intermediate.intermediate_act_fn",
        )
        rotates = "position_embeddings" in inspect.signature(block.forward).parameters
        # which is given beside the rows
        read.whole(at("relative_position_bias", f"{inner}relative_position_bias"))
        up = read.linear(at("mlp.fc1", "mlp.up_proj", "mlp.weights_in", "intermediate.dense"))
        weights = BlockWeights(
            norm1=read.norm(at("layernorm_before", "norm1", "layer_norm1")),
            qkv=Stacked(tuple(each)),
            num_heads=num_heads,
            scale=factor,
            proj=read.linear(
                at("attention.o_proj", "self_attn.out_proj", "attention.output.dense")
            ),
            scale1=_scale(read, 1),
            norm2=read.norm(at("layernorm_after", "norm2", "layer_norm2")),
            gated=gated or packed,
            fc1=Stacked((read.linear("mlp.gate_proj"), up)) if gated else up,
            activation="silu" if packed else read.activation(act),
            fc2=read.linear(at("mlp.fc2", "mlp.down_proj", "mlp.weights_out", "output.dense")),
            scale2=_scale(read, 2),
            rotation="half" if rotates else "",
        )
        read.close()
        return weights

    # ---- stem

    @property
    def _first(self) -> list[Tensor]:
        """Class and distillation token, (1, 1, D) or (D,)."""
        names = ("cls_token", "class_embedding", "distillation_token")
        found = (getattr(self.base.embeddings, name, None) for name in names)
        return [token for token in found if token is not None]

    @property
    def class_token(self) -> Tensor | None:
        return self._first[0] if self._first else None

    @property
    def stem(self) -> Any:
        embeddings = self.base.embeddings
        if hasattr(embeddings, "patch_embedding"):
            return embeddings.patch_embedding
        patches = embeddings.patch_embeddings
        return getattr(patches, "projection", patches)

    def embed(self, images: Tensor) -> Tensor:
        if self._masks:
            return super().embed(images)
        told = self._told and tuple(images.shape[-2:]) != self._size
        embeddings = self.base.embeddings
        more = nothing_more(embeddings) | ({"interpolate_pos_encoding": True} if told else {})
        rows = embeddings(images, **more)
        return self._before(rows[0] if isinstance(rows, tuple) else rows)

    def place(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        embeddings = self.base.embeddings
        first = [t.view(1, 1, -1).expand(len(tokens), -1, -1) for t in self._first]
        rows = torch.cat([*first, tokens], dim=1)
        if self._told and size == self._size:
            table = getattr(embeddings, "position_embedding", None)  # CLIP's, an nn.Embedding
            rows = rows + (embeddings.position_embeddings if table is None else table.weight)
        elif (
            hasattr(embeddings, "interpolate_pos_encoding")
            and getattr(embeddings, "position_embeddings", ()) is not None  # None: of BEiT
        ):
            rows = rows + embeddings.interpolate_pos_encoding(rows, *size)
        registers = getattr(embeddings, "register_tokens", None)
        if registers is not None:
            registers = registers.expand(len(rows), -1, -1)
            rows = torch.cat([rows[:, :1], registers, rows[:, 1:]], dim=1)
        return self._before(rows)

    @property
    def stem_norm(self) -> nn.Module | None:
        return getattr(self.base, "pre_layrnorm", None)  # their spelling

    def _before(self, rows: Tensor) -> Tensor:
        return rows if self.stem_norm is None else self.stem_norm(rows)

    # ---- readout

    def own_output(self, images: Tensor) -> Tensor:
        if self._masks:  # its own forward is a part of pretraining
            rows = self.embed(images)
            for i in range(len(self.blocks)):
                rows = self.run_block(i, rows)
            return self.readout(rows)
        told = self._told and tuple(images.shape[-2:]) != self._size
        out = self.module(images, **({"interpolate_pos_encoding": True} if told else {}))
        for name in ("logits", "image_embeds", "pooler_output"):
            if (found := getattr(out, name, None)) is not None:
                return found
        at = self.num_prefix_tokens
        return out[0][:, 0] if self.reads == "row" else out[0][:, at:].mean(1)

    @property
    def _norm(self) -> Any:
        names = ("layernorm", "post_layernorm", "norm")
        found = next(getattr(self.base, name) for name in names if hasattr(self.base, name))
        return nn.Identity() if found is None else found

    @property
    def _mean_norm(self) -> nn.Module:
        """Of the mean of the rows."""
        return getattr(self.module, "fc_norm", None) or nn.Identity()

    @property
    def _pooler(self) -> Any:
        if self.reads == "projection":
            return getattr(self.module, "visual_projection")  # noqa: B009
        return getattr(self.base, _POOLER[self.reads]) if self.reads in _POOLER else None

    @property
    def readers(self) -> list[nn.Module]:
        found = [self._norm, self._pooler, self._mean_norm]
        return [part for part in found if part is not None and type(part) is not nn.Identity]

    def readout(self, x: Tensor) -> Tensor:
        at = self.num_prefix_tokens
        if self.reads == "bare mean":
            return x[:, at:].mean(1)
        x = self._norm(x)
        if self.reads in _POOLER:
            return self._pooler(x)
        if self.reads == "mean":
            return self._mean_norm(x[:, at:].mean(1))
        if self.reads == "both":
            return torch.cat([x[:, 0], x[:, at:].mean(1)], dim=1)
        return self._pooler(x[:, 0]) if self.reads == "projection" else x[:, 0]


def _scale(read: BlockReader, number: int) -> Tensor | None:
    """LayerScale, as a module, or as a parameter of the block (BEiT, where 1.0 stands for none)."""
    own = f"lambda_{number}"
    if read.has(own) and isinstance(read.get(own), Tensor):
        return read.tensor(own)
    name = f"layer_scale{number}"
    return read.layer_scale(name) if read.has(name) else None


def nothing_more(module: nn.Module) -> dict[str, Any]:
    """None for everything beside the first argument that its forward must be given."""
    _, *others = inspect.signature(module.forward).parameters.values()
    named = (p for p in others if p.kind is p.POSITIONAL_OR_KEYWORD)
    return {p.name: None for p in named if p.default is p.empty}
