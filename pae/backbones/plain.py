"""What the readers of other libraries than timm share."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..prompts.base import BackboneShape
from .view import BackboneView, BlockWeights, added_to, evaluating, random_rows


class PlainView(BackboneView):
    """The face of a backbone with a convolution for a stem, and a readout of few parts.

    A subclass says where the parts are: `blocks`, `read`, `stem`, `place`, `readers`, `readout`.

    Attributes:
        pools: what the readout does with rows: "row" (it reads row 0 alone), "mean" (of the rows
            behind the prefix, and nothing else), or something else, in words.
        resizes: whether the stem takes images of every size that the patch divides.
    """

    pools: str
    resizes = False

    def _measure(
        self,
        patch: Any,
        size: Any,
        prefix: int,
        heads: int,
        width: int,
        frames: int | None = None,
    ) -> None:
        """Set `shape`; patch and image are one number or two, a tube three, of `frames`."""
        convolutions = (nn.Conv2d, nn.Conv3d)
        stem = next(part for part in self.stem.modules() if isinstance(part, convolutions))
        self._size, self.frames = _pair(size), frames
        self._patch = _pair(patch if frames is None else patch[1:])
        grid = tuple(s // p for s, p in zip(self._size, self._patch))
        if frames is not None:
            grid = (frames // patch[0], *grid)
        self._depth = 1 if frames is None else grid[0]  # of tubes
        self.num_prefix_tokens = prefix
        self.shape = BackboneShape(
            depth=len(self.blocks),
            width=width,
            num_heads=heads,
            patch_size=self._patch if frames is None else tuple(patch),
            in_chans=stem.in_channels,
            num_tokens=prefix + math.prod(grid),
            num_prefix_tokens=prefix,
            grid=grid,
            head_width=width // heads,
            has_class_token=prefix > 0,
        )

    # ---- blocks

    @staticmethod
    @abstractmethod
    def read(block: nn.Module, name: str) -> BlockWeights:
        """Neutral weights of one block; raises UnsupportedBackbone naming what does not fit."""

    def read_block(self, index: int) -> BlockWeights:
        return self.read(self.blocks[index], f"blocks.{index}")

    # ---- stem

    @property
    @abstractmethod
    def stem(self) -> nn.Module:
        """What makes patch tokens of images, (B, D, h, w); of clips (B, C, T, H, W)."""

    @abstractmethod
    def place(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """The rest of the stem: prefix tokens, positions, what stands before the first block."""

    @property
    def image_size(self) -> tuple[int, int] | None:
        return None if self.resizes else self._size

    @property
    def pads_images(self) -> bool:
        return False

    def num_rows(self, size: tuple[int, int]) -> int:
        rows, columns = (s // p for s, p in zip(size, self._patch))
        return self.num_prefix_tokens + self._depth * rows * columns

    def embed(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return self.place(self.patch_tokens(images), (height, width))

    def patch_tokens(self, images: Tensor) -> Tensor:
        return self.stem(images).flatten(2).transpose(1, 2)

    def patch_convolution(self, size: tuple[int, int]) -> nn.Conv2d | None:
        stem, patch = self.stem, self._patch
        conv = cast(nn.Conv2d, stem)
        plain = (
            type(stem) is nn.Conv2d
            and tuple(conv.kernel_size) == tuple(conv.stride) == patch
            and conv.padding in ((0, 0), "valid")
            and tuple(conv.dilation) == (1, 1)
            and conv.groups == 1
            and added_to(conv) is None
            and not any(s % p for s, p in zip(size, patch))
        )
        if not plain or self.like.device.type == "meta":
            return conv if plain else None
        images = random_rows(1, self.shape.in_chans, *size).to(self.like)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            rows, parts = self.embed(images), self.place(self.patch_tokens(images), size)
        return conv if _same(rows, parts) else None  # what else a stem does is told by its values

    def embed_tokens(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return self.place(tokens, size)

    # ---- readout

    @property
    @abstractmethod
    def readers(self) -> list[nn.Module]:
        """The modules between the last block and the head."""

    @property
    def feature_width(self) -> int:
        with torch.no_grad():
            return self.readout(self._rows(self.num_prefix_tokens + 1)).shape[-1]

    def _rows(self, count: int) -> Tensor:
        return random_rows(2, count, self.shape.width).to(self.like)

    @property
    def reads_class_only(self) -> bool:
        parts = self._reading()
        if self.pools != "row" or any(added_to(part) for part in parts):
            return False
        if self.like.device.type == "meta":
            return True
        rows = self._rows(3)
        with (
            evaluating(self.module),
            torch.no_grad(),
            torch.autocast(rows.device.type, enabled=False),
        ):
            return _same(self.readout(rows[:, :1]), self.readout(rows))

    def _reading(self) -> list[nn.Module]:
        return [part for reader in self.readers for part in reader.modules()]

    @property
    def pools_not(self) -> str | None:
        if self.pools == "mean":
            return None
        return "reads row 0 alone" if self.pools == "row" else self.pools

    @property
    def readout_parts(self) -> list[Any]:
        parts = self._reading()
        added = [added_to(part) is None for part in parts]
        return [self.pools, *parts, *(type(part).forward for part in parts), *added]


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)


def _same(a: Tensor, b: Tensor) -> bool:
    near = 8 * torch.finfo(a.dtype).eps
    return a.shape == b.shape and torch.allclose(a, b, near, near)
