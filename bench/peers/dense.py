"""What a user would run instead of pae for dense prediction: prompts before timm's own blocks,
whose attention is SDPA, and SETR-PUP as mmsegmentation has it, written from the text.
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
        heads: `pae.SETRPUP`, one per block, shared: their layers are run in the released order,
            where the last enlargement comes before the 1 x 1 convolution.
    """

    def __init__(
        self, vit: nn.Module, tokens: Tensor, out_blocks: tuple[int, ...], heads: list[nn.Module]
    ) -> None:
        super().__init__()
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

    @staticmethod
    def _head(head: Any, maps: Tensor) -> Tensor:
        x = head.norm(maps.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(maps.shape)
        for part in head.up_convs:
            x = F.interpolate(part(x), scale_factor=head.scale, mode="bilinear")
        return head.conv_seg(x)
