"""timm's `Eva`: EVA, EVA02, DINOv3, Perception Encoder, and ViTs with rotary positions.

As `timm_vit`, with another block, and a stem that also gives the angles by which a block turns
queries and keys. A block takes them for the rows behind a prefix whose length it knows from its
construction; prompts behind that prefix get angles of zero, so that nothing of it is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedBackbone
from .reading import BlockReader
from .timm_blocks import attention, norms
from .timm_vit import TimmView
from .view import BlockWeights, Geometry, Linear, Product, Stacked


class EvaView(TimmView):
    """The face of a timm `Eva`, or of a module with the same attributes."""

    takes_more = True

    @property
    def _half(self) -> bool:
        return getattr(self._vit.blocks[0].attn, "rotate_half", False)

    def read_block(self, index: int) -> BlockWeights:
        rotation = "" if self._vit.rope is None else "half" if self._half else "pairs"
        return read_block(self.blocks[index], f"blocks.{index}", rotation, self._post)

    def embed(self, images: Tensor) -> Tensor:
        return self._placed(self._vit.patch_embed(images))

    def _placed(self, tokens: Tensor) -> Tensor:
        m = self._vit
        if m.patch_drop is not None and m.patch_drop.training:
            raise UnsupportedBackbone(
                "backbone.patch_drop is in training mode: which angles are left would differ from "
                "image to image; call backbone.eval()"
            )
        return m.norm_pre(m._pos_embed(tokens)[0])

    def embed_tokens(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        if self.image_size is None:  # timm then places positions on a grid
            tokens = tokens.unflatten(1, [s // p for s, p in zip(size, self.shape.patch_size)])
        return self._placed(self._vit.patch_embed.norm(tokens))

    @torch.no_grad()
    def geometry(self, size: tuple[int, int]) -> list[Geometry]:
        """Sines and cosines as the module gives them, in its dtype: the same list, while the module
        is the same.
        """
        rope = self._vit.rope
        if rope is None:
            return super().geometry(size)
        tensors = chain(rope.named_parameters("rope"), rope.named_buffers("rope"))
        return self._remembered(size, tensors, self._angles)

    def _angles(self, size: tuple[int, int]) -> list[Geometry]:
        m = self._vit
        if self.image_size is not None and hasattr(m.rope, "feat_shape"):
            made = m.rope.get_embed()
        else:
            made = m.rope.get_embed(shape=[-(-s // p) for s, p in zip(size, self.shape.patch_size)])
        # each value stands there twice, for the two entries that it turns
        both = torch.stack(made.chunk(2, dim=-1), dim=-3)
        both = both.chunk(2, dim=-1)[0] if self._half else both[..., ::2]
        if not getattr(m, "rope_mixed", False):
            return [Geometry(both)] * len(self.blocks)
        return [Geometry(own.transpose(0, 1)) for own in both]

    def block_arguments(self, geometry: Geometry, rows: int) -> dict[str, Any]:
        if geometry.rotation is None:
            return {}
        twice: Callable[[Tensor], Tensor] = lambda t: t.repeat_interleave(2, dim=-1)
        if self._half:
            twice = lambda t: torch.cat([t, t], dim=-1)
        sin, cos = map(twice, geometry.rotation)
        prompts = rows - self.num_prefix_tokens - sin.shape[-2]
        still = sin.new_zeros(*sin.shape[:-2], prompts, sin.shape[-1])
        sin, cos = torch.cat([still, sin], dim=-2), torch.cat([still + 1, cos], dim=-2)
        return {"rope": torch.cat([sin, cos], dim=-1)}


def read_block(block: nn.Module, name: str, rotation: str, post: bool) -> BlockWeights:
    """Neutral weights of an `EvaBlock`, or of a block of `Beit`; raises UnsupportedBackbone naming
    what does not fit.
    """
    read = BlockReader(block, name)
    read.tensor("attn.relative_position_bias_table")  # which is given beside the rows
    weights = BlockWeights(
        **norms(read, post),
        **attention(read, _queries_keys_values(read)),
        scale1=read.tensor("gamma_1"),
        scale2=read.tensor("gamma_2"),
        rotation=rotation,
        **read.mlp("mlp"),
    )
    read.close()
    return weights


def _queries_keys_values(read: BlockReader) -> Product:
    if read.has("attn.qkv"):
        packed = read.linear("attn.qkv")
        if not read.has("attn.q_bias"):
            return packed
        biases = [read.tensor(f"attn.{part}_bias") for part in "qkv"]
        return Stacked(tuple(map(Linear, packed.weight.chunk(3), biases)))
    q, k, v = (read.linear(f"attn.{part}_proj") for part in "qkv")
    if (groups := len(q.weight) // len(k.weight)) > 1:  # a head of keys serves several of queries
        k, v = (part.repeated(groups, read.get("attn.num_kv_heads")) for part in (k, v))
    return Stacked((q, k, v))
