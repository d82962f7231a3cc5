"""transformers' VideoMAE and ViViT: clips of (B, T, C, H, W) whose patches are tubes, all of which
attend to all others.

What divides attention into time and space (TimeSformer) has no such blocks, and is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .hf_image import Kind, View


class VideoView(View):
    """The face of a model that reads clips."""

    resizes = False  # ViViT's interpolation knows no time

    def __init__(self, module: nn.Module, kind: Kind) -> None:
        super().__init__(module, kind)
        if kind.head and self.reads == "mean" and getattr(module, "fc_norm", None) is None:
            self.reads, self.pools = "row", "reads its first tube alone"

    @staticmethod
    def _patch_size(config: Any) -> Any:
        if not isinstance(config.tubelet_size, int):
            return tuple(config.tubelet_size)  # ViViT's
        patch = config.patch_size
        return (config.tubelet_size, *((patch, patch) if isinstance(patch, int) else patch))

    def patch_tokens(self, images: Tensor) -> Tensor:
        return super().patch_tokens(images.transpose(1, 2))  # a Conv3d has channels first

    def place(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        positions = self.base.embeddings.position_embeddings  # a tensor beside the state: VideoMAE
        first = [token.expand(len(tokens), -1, -1) for token in self._first]
        return torch.cat([*first, tokens], dim=1) + positions.to(tokens)
