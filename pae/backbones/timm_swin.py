"""timm's `SwinTransformer`: stages of blocks that look into windows, with a merging of rows between
two stages.

A block attends to windows of image rows alone, so it cannot be called with prompts among them: its
formula runs instead (`apply_windowed`), which is proved beside the block. The mergings run as they
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedBackbone
from ..prompts.base import BackboneShape
from .reading import BlockReader
from .timm_blocks import attention, norms
from .view import (
    NO_GEOMETRY,
    BackboneView,
    BlockWeights,
    Bypass,
    Geometry,
    Merging,
    added_to,
    evaluating,
    plainly,
    random_rows,
)
from .windows import Windows, apply_windowed


class SwinView(BackboneView):
    """The face of a timm `SwinTransformer`, whose rows are (B, N, C), row by row of the grid."""

    num_prefix_tokens = 0
    head_name = "head.fc"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        swin: Any = module
        for attribute in ("patch_embed", "layers", "norm", "head", "global_pool", "num_features"):
            if not hasattr(module, attribute):
                raise UnsupportedBackbone(
                    f"{type(module).__name__} has no attribute {attribute!r}, which timm's "
                    "SwinTransformer has"
                )
        if swin.global_pool not in ("avg", "max", "avgmax"):
            raise UnsupportedBackbone(
                f"{type(module).__name__}.global_pool is {swin.global_pool!r}, expected 'avg', "
                "'max' or 'avgmax': prompts and windows have no other readout"
            )
        blocks: list[Any] = self.blocks
        stem = swin.patch_embed
        if 0 in self.mergings or not blocks:
            raise UnsupportedBackbone(
                f"{type(module).__name__}.layers must begin with a block, and not with a downsample"
            )
        for i, block in enumerate(blocks):
            if not hasattr(block, "shift_size") or not hasattr(block, "attn"):
                raise UnsupportedBackbone(
                    f"{self._names[i]} ({type(block).__name__}) is no block with windows of timm's "
                    "SwinTransformer"
                )
            if hasattr(block.attn, "logit_scale"):
                raise UnsupportedBackbone(
                    f"{type(module).__name__} compares rows by their cosine, which no formula here "
                    "has: use a Swin of the first version, as swin_tiny_patch4_window7_224"
                )
        widths = tuple(len(block.norm1.weight) for block in blocks)
        first = blocks[0].attn
        self.shape = BackboneShape(
            depth=len(blocks),
            width=widths[0],
            num_heads=first.num_heads,
            patch_size=tuple(stem.patch_size),
            in_chans=stem.proj.in_channels,
            num_tokens=stem.grid_size[0] * stem.grid_size[1],
            num_prefix_tokens=0,
            grid=tuple(stem.grid_size),
            head_width=first.proj.in_features // first.num_heads,
            has_class_token=False,
            widths=widths,
        )

    @property
    def _swin(self) -> Any:
        return self.module

    @property
    def _names(self) -> list[str]:
        stages = enumerate(self._swin.layers)
        return [f"layers.{s}.blocks.{i}" for s, stage in stages for i in range(len(stage.blocks))]

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in self._swin.layers for block in stage.blocks]

    @property
    def folded(self) -> dict[str, nn.Module]:
        parts = {f"the downsample before {self._names[i]}": m for i, m in self.mergings.items()}
        return dict(zip(self._names, self.blocks)) | parts

    @property
    def mergings(self) -> dict[int, nn.Module]:
        found, before = {}, 0
        for stage in self._swin.layers:
            if not isinstance(stage.downsample, nn.Identity):
                found[before] = stage.downsample
            before += len(stage.blocks)
        return found

    @property
    def reads_class_only(self) -> bool:
        return False

    @property
    def pools_not(self) -> str | None:
        return None

    @property
    def readout_parts(self) -> list[Any]:
        m, kind = self._swin, type(self._swin)
        parts = m.norm, m.head.global_pool
        calls = [of(p) for p in parts for of in (lambda p: type(p).forward, added_to)]
        return [*parts, *calls, kind.forward_head, vars(m).get("forward_head")]

    def num_rows(self, size: tuple[int, int]) -> int:
        rows, columns = self._grid(size)
        return rows * columns

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = (s // p for s, p in zip(size, self.shape.patch_size))
        return rows, columns

    @property
    def image_size(self) -> tuple[int, int] | None:
        if getattr(self.module, "dynamic_img_size", False):
            return None
        height, width = self._swin.patch_embed.img_size
        return height, width

    @property
    def pads_images(self) -> bool:
        return getattr(self._swin.patch_embed, "dynamic_img_pad", False)

    def read_block(self, index: int) -> BlockWeights:
        name = self._names[index]
        read = BlockReader(self.blocks[index], name)
        read.tensor("attn.relative_position_bias_table")  # which is given beside the rows
        weights = BlockWeights(
            **norms(read, False),
            **attention(read, read.linear("attn.qkv")),
            **read.mlp("mlp"),
        )
        read.close()
        return weights

    def read_merging(self, index: int) -> Merging:
        part = self.mergings[index]
        read = BlockReader(part, f"the downsample before {self._names[index]}")
        merging = Merging(read.norm("norm"), read.linear("reduction"))
        read.close()
        return merging

    def prove_blocks(self) -> None:
        super().prove_blocks()
        grids = self._grids(self.default_size)
        for i, part in self.mergings.items():
            grid, width = grids[i - 1], self.shape.widths[i - 1]
            rows = random_rows(2, grid[0] * grid[1], width).to(self.like)
            with evaluating(part), plainly(self.like.device):
                expected = part(rows.unflatten(1, grid)).flatten(1, 2)
                got = self.read_merging(i)(rows, grid)
            near = 100 * torch.finfo(got.dtype).eps
            same = got.shape == expected.shape
            if not same or not (got.is_meta or torch.allclose(got, expected, near, near)):
                raise UnsupportedBackbone(
                    f"the downsample before {self._names[i]} ({type(part).__name__}) computes "
                    "something else than norm and reduction of 2 x 2 rows"
                )

    def examine(self) -> None:
        """Blocks that are not proved have no textbook either: what there is to raise is raised."""
        self._examining = True  # before anybody has frozen anything
        try:
            self.prove_blocks()
        finally:
            self._examining = False

    def _grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """(rows, columns) of the grid in each block."""
        found, grid, mergings = [], self._grid(size), self.mergings
        for i in range(self.shape.depth):
            if i in mergings:
                grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
            found.append(grid)
        return found

    @torch.no_grad()
    def geometry(self, size: tuple[int, int]) -> list[Geometry]:
        """The same list, while neither a table nor a window changes."""
        named, blocks = self.module.named_parameters(), list[Any](self.blocks)
        tensors = [(n, t) for n, t in named if n.endswith("relative_position_bias_table")]
        cuts = tuple((*b.window_size, *b.shift_size) for b in blocks)
        return self._remembered((size, cuts), tensors, lambda _: self._windows(size))

    def _windows(self, size: tuple[int, int]) -> list[Geometry]:
        found: list[Geometry] = []
        blocks: list[Any] = self.blocks
        for part, grid in zip(blocks, self._grids(size)):
            window = tuple(part.window_size)
            padded = [-(-n // w) * w for n, w in zip(grid, window)]
            mask = part.get_attn_mask(part.norm1.weight.new_empty([1, *padded, 1]))
            found.append(
                Windows(
                    bias=part.attn._get_rel_pos_bias()[0].clone(),
                    grid=grid,
                    window=window,
                    shift=tuple(part.shift_size),
                    mask=mask,
                )
            )
        return found

    def proof(self, index: int, rows: int) -> tuple[int, Geometry]:
        geometry = self.geometry(self.default_size)[index]
        assert isinstance(geometry, Windows)
        return geometry.grid[0] * geometry.grid[1], geometry

    def as_given(self, rows: Tensor, geometry: Geometry) -> Tensor:
        assert isinstance(geometry, Windows)
        return rows.unflatten(1, geometry.grid)

    def formula(self, weights: BlockWeights, x: Tensor, geometry: Geometry) -> Tensor:
        assert isinstance(geometry, Windows)
        return apply_windowed(weights, x, geometry)

    def enter(self, index: int, x: Tensor, geometry: Sequence[Geometry]) -> Tensor:
        if index not in self.mergings:
            return x
        before = geometry[index - 1]
        assert isinstance(before, Windows)
        rows, columns = before.grid
        prompts, image = x.tensor_split([x.shape[1] - rows * columns], dim=1)
        part: Any = self.mergings[index]
        image = part(image.unflatten(1, before.grid)).flatten(1, 2)
        if prompts.shape[1] == 0:
            return image
        return torch.cat([part.reduction(part.norm(prompts.repeat(1, 1, 4))), image], dim=1)

    def run_block(
        self,
        index: int,
        x: Tensor,
        geometry: Geometry = NO_GEOMETRY,
        kv: Tensor | None = None,
        bypass: Bypass | None = None,
    ) -> Tensor:
        assert isinstance(geometry, Windows)
        block, grid = self.blocks[index], geometry.grid
        if x.shape[1] == grid[0] * grid[1]:
            return block(x.unflatten(1, grid)).flatten(1, 2)
        self.require_formula(index)
        return apply_windowed(self.read_block(index), x, geometry)

    def embed(self, images: Tensor) -> Tensor:
        return self._swin.patch_embed(images).flatten(1, 2)

    patch_tokens = embed

    def patch_convolution(self, size: tuple[int, int]) -> nn.Conv2d | None:
        return None

    def embed_tokens(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return self._swin.patch_embed.norm(tokens)

    def readout(self, x: Tensor) -> Tensor:
        m = self._swin
        return m.forward_head(m.norm(x)[:, :, None], pre_logits=True)
