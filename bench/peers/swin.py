"""What a user would run instead of pae on Swin: VPT-deep as its released code has it, written from
the method's text. The frozen weights are those of one timm model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OfficialStyleSwin(nn.Module):
    """VPT-deep: prompts in front of the rows of every block, copied to each of its windows, whose
    outputs for them are averaged; every row in the mean at the end.

    Args:
        swin: a timm SwinTransformer whose grids are multiples of its windows; shared, not copied.
        prompts: one (P, C_i) per block. head: linear layer. Both are copied.
        fused: the best form: attention by SDPA, and relative bias and shift mask, padded for the
            prompts and expanded to the batch, are a mask that is made once. Otherwise softmax and
            both additions are written out, and the padding is done in every step, as released.
    """

    def __init__(
        self, swin: nn.Module, prompts: list[Tensor], head: nn.Linear, fused: bool
    ) -> None:
        super().__init__()
        self.swin: Any = swin
        self.requires_grad_(False)
        self.fused = fused
        self.prompts = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in prompts)
        self.head = nn.Linear(head.in_features, head.out_features).to(head.weight)
        self.head.load_state_dict(head.state_dict())
        self.masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        swin, i = self.swin, 0
        x = swin.patch_embed(images)
        rows: Tensor | None = None
        for stage in swin.layers:
            x = stage.downsample(x)
            for block in stage.blocks:
                rows = torch.cat([self.prompts[i].expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
                rows = self._block(i, block, rows, x.shape[1:3])
                x = rows[:, self.prompts[i].shape[0] :].unflatten(1, x.shape[1:3])
                i += 1
        return self.head(swin.norm(rows).mean(1))

    def _block(self, i: int, block: Any, x: Tensor, grid: torch.Size) -> Tensor:
        batch, count, (high, wide) = len(x), len(self.prompts[i]), block.window_size
        hat = block.norm1(x)
        image = hat[:, count:].unflatten(1, grid)
        if any(block.shift_size):
            image = image.roll([-s for s in block.shift_size], (1, 2))
        cut = image.unflatten(2, (-1, wide)).unflatten(1, (-1, high)).transpose(2, 3)
        cut = cut.flatten(3, 4).flatten(1, 2)  # (B, W, n, C)
        prompts = hat[:, None, :count].expand(-1, cut.shape[1], -1, -1)
        both = torch.cat([prompts, cut], dim=2).flatten(0, 1)
        qkv = block.attn.qkv(both).unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.fused:
            added = self._mask(i, block, batch, count, q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        else:
            out = self._written_out(block, q, k, v, count)
        out = block.attn.proj(out.transpose(1, 2).flatten(2)).unflatten(0, (batch, -1))
        across = grid[1] // wide
        image = out[:, :, count:].unflatten(2, (high, wide)).unflatten(1, (-1, across))
        image = image.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(block.shift_size):
            image = image.roll(list(block.shift_size), (1, 2))
        x = x + torch.cat([out[:, :, :count].mean(1), image.flatten(1, 2)], dim=1)
        return x + block.mlp(block.norm2(x))

    def _written_out(self, block: Any, q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
        padding = (count, 0, count, 0)
        scores = q * block.attn.scale @ k.mT + F.pad(block.attn._get_rel_pos_bias(), padding)
        if block.attn_mask is not None:
            mask = F.pad(block.attn_mask, padding)[:, None]
            scores = (scores.unflatten(0, (-1, len(mask))) + mask).flatten(0, 1)
        return scores.softmax(dim=-1) @ v

    def _mask(self, i: int, block: Any, batch: int, count: int, dtype: torch.dtype) -> Tensor:
        if (i, batch, dtype) not in self.masks:
            added = block.attn._get_rel_pos_bias()
            if block.attn_mask is not None:
                added = added + block.attn_mask[:, None]
                added = added.repeat(batch, 1, 1, 1)
            self.masks[i, batch, dtype] = F.pad(added, (count, 0, count, 0)).to(dtype)
        return self.masks[i, batch, dtype]
