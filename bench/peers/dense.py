"""What a user would run instead of pae for dense prediction: prompts before timm's own blocks,
whose attention is SDPA, and SETR-PUP, as mmsegmentation has it (written from the text) and in the
best order that plain PyTorch has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextbookSegmenter(nn.Module):
    """VPT-deep on a timm ViT, maps of some blocks, a decode head and auxiliary ones.

    Args:
        vit: shared, not copied.
        tokens: (depth, P, D), copied. out_blocks: ascending, of the auxiliary heads first.
        heads: `pae.SETRPUP`, one per block, shared.
        as_released: the last enlargement before the 1 x 1 convolution to the classes, and the loss
            of logits (B, classes, H, W). Otherwise behind it, where it is a quarter of the work or
            a sixteenth, and the loss of rows (B H W, classes), which PyTorch's CPU kernels read 2.5
            times as fast where channels lie last, as they do here.
    """

    def __init__(
        self,
        vit: nn.Module,
        tokens: Tensor,
        out_blocks: tuple[int, ...],
        heads: list[nn.Module],
        as_released: bool,
    ) -> None:
        super().__init__()
        self.as_released = as_released
        self.vit: Any = vit
        self.tokens = nn.Parameter(tokens.detach().clone())
        self.out_blocks, self.heads = out_blocks, nn.ModuleList(heads)

    def forward(self, images: Tensor) -> list[Tensor]:
        """What every head gives."""
        vit, count, prefix = self.vit, self.tokens.shape[1], self.vit.num_prefix_tokens
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        grid = vit.patch_embed.grid_size
        found = []
        for i, block in enumerate(vit.blocks):
            rows = self.tokens[i].expand(len(x), -1, -1)
            x = block(torch.cat([x[:, :prefix], rows, x[:, prefix:]], dim=1))
            x = torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)
            if i in self.out_blocks:
                maps = x[:, prefix:].transpose(1, 2).reshape(len(x), -1, *grid)
                found.append(self._head(self.heads[len(found)], maps))
        return found

    def _head(self, head: Any, maps: Tensor) -> Tensor:
        x = head.norm(maps.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(maps.shape)
        *parts, last = head.up_convs
        for part in parts:
            x = self._enlarged(part(x), head.scale)
        if self.as_released:
            return head.conv_seg(self._enlarged(last(x), head.scale))
        return self._enlarged(head.conv_seg(last(x)), head.scale)

    @staticmethod
    def _enlarged(x: Tensor, scale: int) -> Tensor:
        return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Cross-entropy: its sum over pixels of a class, divided by the number of all."""
        if not self.as_released:
            logits, masks = logits.permute(0, 2, 3, 1).flatten(0, 2), masks.flatten()
        total = F.cross_entropy(logits, masks, ignore_index=255, reduction="sum")
        return total / masks.numel()
