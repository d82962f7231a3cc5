"""What the suite of the frequency-shortcut statistics shares: problems and definitions."""

from __future__ import annotations

import torch

from pae_kernels.spectrum import reference, shortcut_images, shortcut_tokens
from tests.kernels.executions import FP32

OP = "shortcut_tokens"  # and shortcut_pool, by the same versions
OPS = torch.ops.pae


def images_of(batch, channels, height, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, dtype=dtype, generator=generator)


def grid(window, stride, height, width):
    rows = range(0, height - window + 1, stride)
    cols = range(0, width - window + 1, stride)
    return torch.tensor([(r, c) for r in rows for c in cols])


def filtered(images, origins, window):
    return shortcut_images(torch.fft.fft2(images), origins, window, tuple(images.shape[-2:]))


def stem_of(patch, channels=3, dim=5, dtype=torch.float64, seed=1):
    """Weight and bias of a patch embedding."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)
    return draw(dim, channels, *patch).to(dtype), draw(dim).to(dtype)


def embedded(images, weight, bias=None):
    """The reference: a convolution whose stride is its patch, patches row by row."""
    return torch.nn.functional.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).mT


def tokens_of(images, origins, window, weight, bias=None, **options):
    spectrum, size = torch.fft.fft2(images), tuple(images.shape[-2:])
    return shortcut_tokens(spectrum, origins, window, size, weight, bias, **options)


def pooled_by_loop(tokens):
    """The definition, one token at a time."""
    result = torch.zeros(tokens.shape[0], tokens.shape[3], dtype=torch.float64)
    for s, window in enumerate(tokens.double()):
        rows = [row for image in window for row in image]
        total = sum(float(row @ row) for row in rows)
        for row in rows:
            result[s] += row * float(row @ row) / total
    return result


def stem_problem(size, patch, *, batch=2, channels=3, dim=8, dtype=FP32, seed=0):
    """Images, weight, bias and rows of a stem; sums over large patches stay of order 1."""
    images = images_of(batch, channels, *size, torch.promote_types(dtype, FP32), seed)
    weight, bias = (t.to(dtype) for t in stem_of(patch, channels, dim))
    count = size[0] // patch[0] * (size[1] // patch[1])
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return images, weight / max(1, weight[0].numel() // 48), bias, rows


def check(execution, images, weight, bias, rows, origins, window):
    """Tokens of a version, beside the definition in the same precision and in fp64."""
    size = tuple(images.shape[-2:])
    images, weight, bias, rows = (
        t if t is None else t.to(execution.device) for t in (images, weight, bias, rows)
    )
    spectrum, places = torch.fft.fft2(images), torch.as_tensor(origins)
    got = shortcut_tokens(
        spectrum, places.to(execution.device), window, size, weight, bias, rows=rows
    )
    wide = [t if t is None else t.double() for t in (weight, bias, rows)]
    for tokens, origin in zip(got, places, strict=True):
        kept = reference.band_pass(images, tuple(origin), window).to(weight.dtype)
        plain = embedded(kept, weight, bias) + (0 if rows is None else rows)
        exact = embedded(reference.band_pass(images.double(), tuple(origin), window), *wide[:2])
        exact = exact + (0 if rows is None else wide[2])
        execution.assert_as_exact(tokens, plain, exact, f"window at {tuple(origin)}")
    return got


def corners(size, window):
    """The middle of the spectrum, an odd place, its first and its last corner."""
    last = [side - window for side in size]
    middle = [side // 2 - window // 2 for side in size]
    odd = [min(size[0] // 2, last[0]), min(3, last[1])]
    return [middle, odd, [0, 0], last]


# (size, patch, window): an even and an odd number of patches a row, more than 8 and 16 of them;
