"""timm's `PoolingVisionTransformer` (PiT): stages of plain blocks, and between two of them a
convolution that halves the grid of image rows and widens all rows.

Prompts stand behind the class row. Those that live on into the next stage are widened by the same
linear layer as that row. The stages run as they are: no plan has such a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedBackbone
from ..prompts.base import BackboneShape
from .view import BackboneView, BlockWeights, Geometry, run_as_it_is

REASON = "a convolution between its stages, which no plan has, changes grid and width of its rows"


class PitView(BackboneView):
    """The face of a timm `PoolingVisionTransformer`, whose rows are (B, N, C), class rows first."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        pit, name = self._pit, type(module).__name__
        if pit.global_pool != "token":
            raise UnsupportedBackbone(
                f"{name}.global_pool is {pit.global_pool!r}, expected 'token': there is no other "
                "readout"
            )
        if not all(len(stage.blocks) for stage in pit.transformers):
            raise UnsupportedBackbone(f"{name} has a stage without a block")
        blocks: list[Any] = self.blocks
        stem, attention = pit.patch_embed, blocks[0].attn
        self.num_prefix_tokens = pit.cls_token.shape[1]
        self.other_head = None if pit.head_dist is None else "head_dist"
        widths = tuple(len(block.norm1.weight) for block in blocks)
        rows, columns = stem.grid_size
        self.shape = BackboneShape(
            depth=len(blocks),
            width=widths[0],
            num_heads=attention.num_heads,
            patch_size=tuple(stem.patch_size),
            in_chans=stem.conv.in_channels,
            num_tokens=self.num_prefix_tokens + rows * columns,
            num_prefix_tokens=self.num_prefix_tokens,
            grid=(rows, columns),
            head_width=attention.proj.in_features // attention.num_heads,
            has_class_token=True,
            widths=widths,
        )

    @property
    def _pit(self) -> Any:
        return self.module

    @property
    def _stages(self) -> dict[int, Any]:
        """Each by its first block."""
        found, before = {}, 0
        for stage in self._pit.transformers:
            found[before] = stage
            before += len(stage.blocks)
        return found

    def examine(self) -> None:
        self.unproved = f"blocks cannot be folded: {REASON}"
        run_as_it_is(self)

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in self._pit.transformers for block in stage.blocks]

    @property
    def class_token(self) -> Tensor | None:
        return self._pit.cls_token

    @property
    def reads_class_only(self) -> bool:
        return False  # nobody asks: it is a plan's question

    @property
    def readout_parts(self) -> list[Any]:
        return []

    @property
    def pools_not(self) -> str | None:
        return "pools no rows (global_pool='token')"

    def own_output(self, images: Tensor) -> Tensor:
        if self.other_head is None:
            return super().own_output(images)
        m = self._pit  # one head for both, which reads the mean of their rows
        return m.head(m.forward_head(m.forward_features(images), pre_logits=True))

    def num_rows(self, size: tuple[int, int]) -> int:
        return self.shape.num_tokens

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self._pit.patch_embed.img_size
        return height, width

    @property
    def pads_images(self) -> bool:
        return False

    def read_block(self, index: int) -> BlockWeights:
        raise UnsupportedBackbone(f"{type(self.module).__name__}: {REASON}")

    def geometry(self, size: tuple[int, int]) -> list[Geometry]:
        found: list[Geometry] = []
        rows, columns = self.shape.grid[-2:]
        for i in range(self.shape.depth):
            if i and i in self._stages:
                conv = self._stages[i].pool.conv
                sides = zip((rows, columns), conv.kernel_size, conv.stride, conv.padding)
                rows, columns = (
                    (n + 2 * pad - kernel) // step + 1 for n, kernel, step, pad in sides
                )
            found.append(Geometry(grid=(rows, columns)))
        return found

    def enter(self, index: int, x: Tensor, geometry: Sequence[Geometry]) -> Tensor:
        if index == 0 or index not in self._stages:
            return x
        before, stage = geometry[index - 1], self._stages[index]
        rows, columns = before.grid
        others, image = x.tensor_split([x.shape[1] - rows * columns], dim=1)
        image, others = stage.pool(image.mT.unflatten(2, before.grid), others)
        return stage.norm(torch.cat([others, image.flatten(2).mT], dim=1))

    def embed(self, images: Tensor) -> Tensor:
        return self._placed(self._pit.patch_embed(images))

    def _placed(self, maps: Tensor) -> Tensor:
        m = self._pit
        x = m.pos_drop(maps + m.pos_embed).flatten(2).mT
        x = torch.cat([m.cls_token.expand(len(x), -1, -1), x], dim=1)
        return m.transformers[0].norm(x)

    def patch_tokens(self, images: Tensor) -> Tensor:
        return self._pit.patch_embed(images).flatten(2).mT

    def patch_convolution(self, size: tuple[int, int]) -> nn.Conv2d | None:
        return None  # its patches overlap

    def embed_tokens(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return self._placed(tokens.mT.unflatten(2, self.shape.grid))

    def readout(self, x: Tensor) -> Tensor:
        m = self._pit
        return m.forward_head(m.norm(x[:, : self.num_prefix_tokens]), pre_logits=True)
