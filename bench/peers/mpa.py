"""Modal Pre-Alignment as others would write it: a window, an FFT, a reference forward at a time.

Nothing here uses the packages of this repository, so the benchmarks time against it and the tests
check against it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def official_style_filter(images: Tensor, row: int, col: int, window: int) -> Tensor:
    """Images (B, C, H, W) that keep one box of their centred spectrum; a new FFT every time."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    mask = torch.zeros(images.shape[-2:], dtype=images.dtype, device=images.device)
    mask[row : row + window, col : col + window] = 1.0
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))).real


def stem(vit: nn.Module, images: Tensor) -> Tensor:
    """Rows (B, N, D) that enter the first block of a timm ViT, prefix tokens first."""
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))


def prompted_logits(
    vit: nn.Module, head: nn.Module, images: Tensor, prompts: list[Tensor], deep: bool
) -> Tensor:
    """Logits with prompts (P, D) concatenated behind the prefix tokens.

    Deep: one set per block, whose rows are cut off behind it. Shallow: one set, which stays.
    """
    x, at = stem(vit, images), vit.num_prefix_tokens
    count = prompts[0].shape[0]
    for i, block in enumerate(vit.blocks):
        if deep or i == 0:
            rows = prompts[i].expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :at], rows, x[:, at:]], dim=1)
        x = block(x)
        if deep or i == len(vit.blocks) - 1:
            x = torch.cat([x[:, :at], x[:, at + count :]], dim=1)
    return head(vit.forward_head(vit.norm(x), pre_logits=True))


def windows_of(size: tuple[int, int], window: int, stride: int) -> list[tuple[int, int]]:
    """First row and column of every window, row by row."""
    rows, cols = (range(0, side - window + 1, stride) for side in size)
    return [(row, col) for row in rows for col in cols]


@torch.no_grad()
def window_losses(
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    origins: list[tuple[int, int]],
    window: int,
) -> Tensor:
    """(S,) loss of the batch seen through each window, one at a time."""
    losses = []
    for row, col in origins:
        filtered = official_style_filter(images, row, col, window)
        losses.append(F.cross_entropy(logits(filtered), labels))
    return torch.stack(losses)


@torch.no_grad()
def official_style_prompts(
    vit: nn.Module,
    images: Tensor,
    origins: list[tuple[int, int]],
    window: int = 16,
    deep: bool = True,
) -> list[Tensor]:
    """Phase II: one prompt per window of `origins`; deep ones travel through the blocks."""
    rows = []
    for row, col in origins:
        filtered = official_style_filter(images, row, col, window)
        tokens = stem(vit, filtered)[:, vit.num_prefix_tokens :]
        energy = tokens.pow(2).sum(dim=-1, keepdim=True)
        rows.append((energy / energy.sum() * tokens).sum(dim=(0, 1)))
    prompts = [torch.stack(rows)]
    if deep:
        for block in vit.blocks[:-1]:
            prompts.append(block(prompts[-1][None])[0])
    return prompts
