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


def shortcut_tokens(
    spectrum: Tensor,
    origins: Tensor,
    window: int,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Patch tokens of the images of `shortcut_images`, which never exist.

    A wave of column frequency v turns by exp(2 pi i v pw / W) from patch to patch and is otherwise
    the same in each, so the taps along a patch's rows can be transformed once for all patches:

        strips[v] (b i, c p) = sum_u X[b, c, u, v] exp(2 pi i u (i ph + p) / H) / HW
        taps[v]   (c p, d)   = sum_q weight[d, c, p, q] exp(2 pi i v q / W)
        tokens[b, (i, j), d] = bias[d] + Re sum_v exp(2 pi i v j pw / W) (strips[v] @ taps[v])

    At ViT-B/16 and w = 16 that is 38 million products an image instead of 120 for filter and
    convolution. Further transforming the taps along p, and summing over c before the rows, takes
    17; its products have inner widths of 6 and 32, move more memory, and took 1.3 to 1.6 times as
    long on a CPU.

    Args:
        spectrum, origins, window: as in `shortcut_images`.
        weight: (D, C, ph, pw). bias: (D,). rows: (N, D), added to every image's tokens.
        dtype: of the result.

    Returns:
        (S, B, N, D), patches row by row; sums in the real dtype of `spectrum`.
    """
    batch, _, height, width = spectrum.shape
    dim, _, *patch = weight.shape
    grid = height // patch[0], width // patch[1]
    real = spectrum.dtype.to_real()
    row_bins = _fft_bins(origins[:, 0], window, height)
    col_bins = _fft_bins(origins[:, 1], window, width)
    weight = weight.to(real).permute(3, 1, 2, 0).flatten(1)  # (pw, C ph D)
    shift = sum(t.to(real) for t in (bias, rows) if t is not None)  # 0, (D,) or (N, D)

    out = spectrum.new_empty((len(origins), batch, grid[0] * grid[1], dim), dtype=dtype)
    for s in range(len(origins)):  # one by one: the strips @ taps of a window fill the caches
        tokens = _tokens_of_one(spectrum, row_bins[s], col_bins[s], weight, patch)
        out[s] = tokens.view(out.shape[1:]) + shift
    return out


def _tokens_of_one(
    spectrum: Tensor, row_bins: Tensor, col_bins: Tensor, weight: Tensor, patch: list[int]
) -> Tensor:
    """(B nh, nw, D) tokens without bias of the window with these bins (w,)."""
    batch, channels, height, width = spectrum.shape
    window, inner = len(row_bins), channels * patch[0]
    grid, dim = (height // patch[0], width // patch[1]), weight.shape[1] // inner
    lines = batch * grid[0]  # rows of patches in all images

    box = spectrum[..., row_bins[:, None], col_bins].permute(2, 3, 0, 1)  # (u, v, B, C)
    row_waves = _waves(row_bins, height, spectrum.dtype) / (height * width)
    strips = row_waves.T @ box.reshape(window, window * batch * channels)
    strips = strips.view(*(grid[0], patch[0]), window, batch, channels).permute(2, 3, 0, 4, 1)
    strips = strips.reshape(window, lines, inner)  # (v, B nh, C ph)

    # a complex product as a real one: [[a, -b], [b, a]] @ [c; d] = [ac - bd; bc + ad]
    a, b = strips.real, strips.imag
    strips = torch.stack([torch.stack([a, -b], 2), torch.stack([b, a], 2)], 1)
    strips = strips.view(window, 2 * lines, 2 * inner)  # (v, 2 B nh, 2 C ph)
    col_waves = _waves(col_bins, width, spectrum.dtype)[:, : patch[1]]
    taps = torch.stack([col_waves.real, col_waves.imag], 1).flatten(0, 1) @ weight
    products = torch.bmm(strips, taps.view(window, 2 * inner, dim))  # (v, 2 B nh, D)

    # Re(e product) = cos Re - sin Im, for every patch j of a row of patches
    turns = _waves(col_bins, grid[1], spectrum.dtype)  # (v, nw)
    turns = torch.stack([turns.real, -turns.imag], 1).flatten(0, 1).T  # (nw, 2v)
    products = products.view(2 * window, lines, dim).transpose(0, 1)
    return torch.bmm(turns.expand(lines, -1, -1), products)


def shortcut_pool(tokens: Tensor, rows: Tensor | None = None) -> Tensor:
    """sum_bn e_bn t_bn / sum_bn e_bn with e_bn = |t_bn|^2, per window; 0 where all energy is 0.

    Everything is relative to a window's largest entry, since squares leave the range of fp32 early;
    in fp32 or wider, summed image by image first.

    Args:
        tokens: (S, B, N, D).
        rows: (N, D), added to every image's tokens first, in fp32 or wider.

    Returns:
        (S, D), the dtype of `tokens`.
    """
    moved = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    moved = moved if rows is None else moved + rows.to(moved.dtype)
    unit = moved.abs().amax(dim=(1, 2, 3), keepdim=True)
    unit = torch.where(unit == 0, 1.0, unit)
    moved = moved / unit
    energy = torch.linalg.vector_norm(moved, dim=-1).square()  # (S, B, N)
    total = energy.sum(dim=(1, 2), keepdim=True)
    weight = energy / torch.where(total == 0, 1.0, total)
    pooled = weight.unsqueeze(2) @ moved  # (S, B, 1, D)
    return (pooled.sum(dim=1) * unit.squeeze(1)).squeeze(1).to(tokens.dtype)


def _fft_bins(first: Tensor, window: int, size: int) -> Tensor:
    """(S,) first centred bins -> (S, w) unshifted bins; fftshift moves them by size // 2."""
    offset = torch.arange(window, device=first.device) - size // 2
    return (first[:, None] + offset).remainder(size)


def _waves(bins: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """exp(2 pi i bin x / size) for every bin and x: (...) -> (..., size)."""
    angle = torch.arange(size, dtype=torch.float64, device=bins.device) * (2 * math.pi / size)
    roots = torch.polar(torch.ones_like(angle), angle).to(dtype)
    # the phase is reduced in integers, so a high frequency is as exact as a low one
    turns = bins[..., None] * torch.arange(size, device=bins.device)
    return roots[turns.remainder(size)]
