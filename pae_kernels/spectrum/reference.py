"""Frequency-shortcut statistics in plain PyTorch: the definition, and what runs without a kernel.

A window is a box of w x w bins of the centred spectrum (`torch.fft.fftshift`), named by its origin,
the row and column of its first bin. All else is dropped and the real part of the inverse transform
kept. A box need not be symmetric about frequency 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def band_pass(images: Tensor, origin: tuple[int, int], window: int) -> Tensor:
    """The definition of one window: transform, shift, mask, shift back, transform back, real part.

    Shares no line with `shortcut_images`, and so is its oracle.

    Args:
        images: (B, C, H, W), real.
        origin: first row and column of the window in the centred spectrum.
        window: side of the window in bins.

    Returns:
        (B, C, H, W), the dtype of `images`.
    """
    row, col = origin
    mask = torch.zeros(images.shape[-2:], dtype=images.dtype, device=images.device)
    mask[row : row + window, col : col + window] = 1
    centred = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    return torch.fft.ifft2(torch.fft.ifftshift(centred * mask, dim=(-2, -1))).real


def shortcut_images(spectrum: Tensor, origins: Tensor, window: int) -> Tensor:
    """Re(E_row^T X_box E_col) / (H W): the inverse transform of a box as two thin products.

    H x W values come from products of inner width w (rows, complex) and 2w (columns, real: only the
    real part is wanted, at half the work).

    Args:
        spectrum: (B, C, H, W) complex, as `torch.fft.fft2` lays it out.
        origins: (S, 2) int64, on the device of `spectrum`.
        window: w.

    Returns:
        (S, B, C, H, W) real.
    """
    batch, channels, height, width = spectrum.shape
    count, planes = origins.shape[0], batch * channels
    row_bins = _fft_bins(origins[:, 0], window, height)  # (S, w)
    col_bins = _fft_bins(origins[:, 1], window, width)  # (S, w)

    box = spectrum[..., row_bins[:, :, None], col_bins[:, None, :]]  # (B, C, S, w, w)
    box = box.permute(2, 3, 0, 1, 4).reshape(count, window, planes * window)  # (S, w, BC w)

    # rows: (S, H, w) @ (S, w, BC w); the factor 1 / HW rides on the small matrix
    row_waves = _waves(row_bins, height, spectrum.dtype) / (height * width)
    rows = torch.bmm(row_waves.transpose(1, 2), box).view(count, height, planes, window)
    # this copy is 2w / W of the output; it lets the second product write (S, B, C, H, W) directly
    rows = torch.view_as_real(rows.transpose(1, 2).contiguous())
    rows = rows.view(count, planes * height, 2 * window)

    # columns: Re(a e) = Re a cos - Im a sin, with (Re a, Im a) interleaved as they lie in memory
    col_waves = torch.view_as_real(_waves(col_bins, width, spectrum.dtype).conj().resolve_conj())
    col_waves = col_waves.transpose(2, 3).reshape(count, 2 * window, width)
    return torch.bmm(rows, col_waves).view(count, batch, channels, height, width)


def shortcut_pool(tokens: Tensor) -> Tensor:
    """sum_bn e_bn t_bn / sum_bn e_bn with e_bn = |t_bn|^2, per window; 0 where all energy is 0.

    Energies and weights are fp64, since a square leaves the range of fp32 early; the weighted sum
    is fp32 or wider.

    Args:
        tokens: (S, B, N, D).

    Returns:
        (S, D), the dtype of `tokens`.
    """
    rows = tokens.flatten(1, 2)  # (S, BN, D)
    energy = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).square()
    total = energy.sum(dim=1, keepdim=True)
    weight = energy / torch.where(total == 0, 1.0, total)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return torch.bmm(weight.to(wide).unsqueeze(1), rows.to(wide)).squeeze(1).to(tokens.dtype)


def _fft_bins(first: Tensor, window: int, size: int) -> Tensor:
    """(S,) first centred bins -> (S, w) unshifted bins; fftshift moves them by size // 2."""
    offset = torch.arange(window, device=first.device) - size // 2
    return (first[:, None] + offset).remainder(size)


def _waves(bins: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """exp(2 pi i bin x / size) for every bin and x: (S, w) -> (S, w, size)."""
    angle = torch.arange(size, dtype=torch.float64, device=bins.device) * (2 * math.pi / size)
    roots = torch.polar(torch.ones_like(angle), angle).to(dtype)
    # the phase is reduced in integers, so a high frequency is as exact as a low one
    turns = bins[:, :, None] * torch.arange(size, device=bins.device)
    return roots[turns.remainder(size)]
