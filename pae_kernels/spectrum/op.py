"""The ops `shortcut_images`, `shortcut_tokens` and `shortcut_pool`: signatures, checks,
declarations.

All are statistics of what enters a frozen network: they have no gradient, and say so when asked.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends, registration
from ..checks import describe
from . import reference

_REFERENCE = backends.Version("reference", reference, backends.anywhere)
_TRITON = backends.Version("triton", f"{__package__}.triton", backends.with_triton)
_CUDA = backends.Version("cuda", f"{__package__}.cuda", backends.with_cuda)

backends.register("shortcut_images", _REFERENCE)
backends.register("shortcut_tokens", _CUDA, _TRITON, _REFERENCE)
backends.register("shortcut_pool", _CUDA, _TRITON, _REFERENCE)


def shortcut_images(
    spectrum: Tensor, origins: Tensor, window: int, size: tuple[int, int]
) -> Tensor:
    """x_s = Re F^-1(M_s F x): images that keep only the frequencies of window s, for several s.

    Bytes: the result is 4 S B C H W (float32), the workspace 2 w / W of that. The spectrum is read
    inside the windows only, so the number of windows asked for at a time decides the memory.

    Args:
        spectrum: (B, C, H, W) complex64 or complex128, `torch.fft.fft2(images)` as it is, with
            frequency 0 at index (0, 0).
        origins: (S, 2) int64, first row and column of each window in the *centred* spectrum, where
            frequency 0 is at (H // 2, W // 2). Values are checked, except inside a compiled or
            captured graph, which cannot read them.
        window: side w of the windows in bins, 1 <= w <= min(H, W).
        size: (H, W) of the images: what tells a full spectrum from the half one of `rfft2`.

    Returns:
        (S, B, C, H, W), float32 or float64 after the dtype of `spectrum`.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected; also when
            `spectrum` asks for a gradient.

    Numerics: phases exact to the dtype, autocast off inside.
    Source: PAE (arXiv 2601.20232), Eq. 2.
    """
    _check_spectrum(spectrum, window, size)
    _check_origins(origins, window, size)
    return _images(spectrum, origins.to(spectrum.device), window)


def shortcut_tokens(
    spectrum: Tensor,
    origins: Tensor,
    window: int,
    size: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """t_s = E(Re F^-1(M_s F x)) + rows: patch tokens of the filtered images, E the patch embedding.

    E is a convolution whose stride is its patch, as in every ViT's stem. No filtered image exists.
    Beside the result, kernels hold strips of 2 w / W of the images and 2 w taps of the weights per
    window; the reference also 2 w products per row of patches, of one window at a time.

    Args:
        spectrum, origins, window, size: as in `shortcut_images`.
        weight: (D, C, ph, pw) float, the convolution's, with H and W whole multiples of ph and pw.
            Images that a stem pads have to be padded before their transform.
        bias: (D,) float, or None.
        rows: (N, D) float added to every image's tokens (a position embedding), or None.
        dtype: of the result; that of `weight` when None.

    Returns:
        (S, B, N, D), N = H / ph * W / pw patches row by row, as `conv.flatten(2).mT` has them.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected; also when one
            of them asks for a gradient.

    Numerics: phases exact to fp32, sums in fp32 (fp64 with a complex128 spectrum), `bias` and
    `rows` added there, one rounding to `dtype`; autocast off inside. On a GPU bfloat16 results
    take their products from factors rounded to bfloat16, as the convolution would;
    all others from fp32 factors split into TF32 numbers.
    Source: PAE (arXiv 2601.20232), Eq. 2 and 3.
    """
    _check_spectrum(spectrum, window, size)
    _check_origins(origins, window, size)
    _check_embedding(spectrum, weight, bias, rows)
    dtype = weight.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"dtype must be a float type of 16 bits or more, got {dtype!r}")
    return _tokens(spectrum, origins.to(spectrum.device), window, weight, bias, rows, dtype)


def shortcut_pool(tokens: Tensor, rows: Tensor | None = None) -> Tensor:
    """p_s = sum e t / sum e, e = |t|^2: energy-weighted mean over images and tokens of window s.

    A window whose tokens are all zero has no weights; it pools to the zero row, as every choice of
    weights would. NaN and infinity pass through, as NaN.

    Args:
        tokens: (S, B, N, D), any float dtype, at least one token per window.
        rows: (N, D) float added to every image's tokens first, or None.

    Returns:
        (S, D), the dtype of `tokens`.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected; also when one
            of them asks for a gradient.

    Numerics: sums in fp32 or wider, at any scale that the tokens' own dtype holds; `rows` added in
    fp32 or wider. The same bits on every run.
    Source: PAE (arXiv 2601.20232), Eq. 3.
    """
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        raise TypeError(f"tokens must be a float tensor (S, B, N, D), got {describe(tokens)}")
    if tokens.dim() != 4 or 0 in tokens.shape[1:3]:
        raise ValueError(f"tokens must be (S, B, N, D) with B, N >= 1, got {describe(tokens)}")
    _refuse_gradient("tokens", tokens)
    _check_added("rows", rows, tuple(tokens.shape[2:]), tokens.device)
    return _pool(tokens, rows)


def _check_spectrum(spectrum: Tensor, window: int, size: tuple[int, int]) -> None:
    complex_types = (torch.complex64, torch.complex128)
    if not isinstance(spectrum, Tensor) or spectrum.dtype not in complex_types:
        raise TypeError(f"spectrum must be complex64 or complex128, got {describe(spectrum)}")
    if spectrum.dim() != 4 or tuple(spectrum.shape[2:]) != tuple(size):
        raise ValueError(
            f"spectrum must be the full fft2 (B, C, H, W) of images of size {tuple(size)}, "
            f"got {describe(spectrum)}"
        )
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= min(size):
        raise ValueError(f"window must be an int from 1 to min(H, W) = {min(size)}, got {window!r}")
    _refuse_gradient("spectrum", spectrum)


def _check_origins(origins: Tensor, window: int, size: tuple[int, int]) -> None:
    if not isinstance(origins, Tensor) or origins.dtype != torch.int64:
        raise TypeError(f"origins must be an int64 tensor (S, 2), got {describe(origins)}")
    if origins.dim() != 2 or origins.shape[1] != 2:
        raise ValueError(f"origins must be (S, 2), got {describe(origins)}")
    last = (size[0] - window, size[1] - window)
    if _readable(origins) and bool(((origins < 0) | (origins > origins.new_tensor(last))).any()):
        raise ValueError(
            f"origins must lie in [0, {last[0]}] x [0, {last[1]}] for a window of {window} in "
            f"{size[0]} x {size[1]}, got {origins.amin(0).tolist()} to {origins.amax(0).tolist()}"
        )


def _check_embedding(
    spectrum: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None
) -> None:
    channels, height, width = spectrum.shape[1:]
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight must be a float tensor (D, C, ph, pw), got {describe(weight)}")
    if weight.dim() != 4 or 0 in weight.shape or weight.shape[1] != channels:
        raise ValueError(f"weight must be (D, {channels}, ph, pw), got {describe(weight)}")
    ph, pw = weight.shape[2:]
    if height % ph or width % pw:
        raise ValueError(
            f"weight must have patches that tile {height} x {width} images, got patches of {ph} x "
            f"{pw}: pad the images before their transform"
        )
    _check_added("weight", weight, tuple(weight.shape), spectrum.device)
    _check_added("bias", bias, (weight.shape[0],), spectrum.device)
    tokens = (height // ph) * (width // pw)
    _check_added("rows", rows, (tokens, weight.shape[0]), spectrum.device)


def _check_added(name: str, t: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """`t` is a float tensor of `shape` on `device` without a gradient, or None."""
    if t is None:
        return
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name} must be a float tensor {shape} or None, got {describe(t)}")
    if tuple(t.shape) != shape or t.device != device:
        raise ValueError(f"{name} must be {shape} on {device}, got {describe(t)}")
    _refuse_gradient(name, t)


def _readable(t: Tensor) -> bool:
    """Whether values may be looked at: not in a trace, not while a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def _refuse_gradient(name: str, t: Tensor) -> None:
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but {_NO_GRADIENT}")


_NO_GRADIENT = "shortcut statistics have none: detach it or use torch.no_grad()"


def _token_types(spectrum: Tensor, *given: Any) -> torch.dtype:
    """The widest of what is computed and what is returned decides who can."""
    return torch.promote_types(spectrum.dtype.to_real(), given[-1])


def _embedded(
    spectrum: Tensor, origins: Tensor, window: int, weight: Tensor, bias: Any, rows: Any, dtype: Any
) -> Tensor:
    batch, _, height, width = spectrum.shape
    dim, _, ph, pw = weight.shape
    tokens = (height // ph) * (width // pw)
    return spectrum.new_empty((origins.shape[0], batch, tokens, dim), dtype=dtype)


_op = partial(registration.op, layout=None, no_gradient=_NO_GRADIENT)

_images = _op(
    "shortcut_images_fwd(Tensor spectrum, Tensor origins, int window) -> Tensor",
    "shortcut_images",
    lambda spectrum, origins, window: spectrum.new_empty(
        (origins.shape[0], *spectrum.shape), dtype=spectrum.dtype.to_real()
    ),
    versions="shortcut_images",
    dtype=lambda spectrum, *_: spectrum.dtype.to_real(),
)
_tokens = _op(
    "shortcut_tokens_fwd(Tensor spectrum, Tensor origins, int window, Tensor weight, Tensor? bias, "
    "Tensor? rows, ScalarType dtype) -> Tensor",
    "shortcut_tokens",
    _embedded,
    versions="shortcut_tokens",
    dtype=_token_types,
)
_pool = _op(
    "shortcut_pool_fwd(Tensor tokens, Tensor? rows) -> Tensor",
    "shortcut_pool",
    lambda tokens, rows: tokens.new_empty(tokens.shape[0], tokens.shape[3]),
    versions="shortcut_pool",
)
