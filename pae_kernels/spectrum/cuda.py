"""`shortcut_tokens` and `shortcut_pool` in CUDA C++: allocates, fills the structs of `csrc/pae.h`,
calls. The kernels and their cost are in `csrc/spectrum.cu`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from . import reference

_Tokens = native.params(
    "shortcut_tokens",
    dtype=native.INT32,
    **dict.fromkeys(("count", "batch", "channels", "height", "width"), native.INT64),
    **dict.fromkeys(("window", "patch_height", "patch_width", "dim"), native.INT64),
    spectrum=native.POINTER,
    **{f"stride_{axis}": native.INT64 for axis in "bcuv"},
    **dict.fromkeys(("origins", "weight", "shift"), native.POINTER),
    shift_stride=native.INT64,
    **dict.fromkeys(("strips", "taps"), native.POINTER),
    **dict.fromkeys(("lines", "lines_padded"), native.INT64),
    **dict.fromkeys(("depth_padded", "channels_padded"), native.INT64),
    out=native.POINTER,
)
_Pool = native.params(
    "shortcut_pool",
    **dict.fromkeys(("dtype", "vectors", "reserved"), native.INT32),
    **dict.fromkeys(("count", "batch", "tokens_per_image", "dim"), native.INT64),
    tokens=native.POINTER,
    **{f"stride_{axis}": native.INT64 for axis in "sbn"},
    rows=native.POINTER,
    parts=native.INT64,
    **dict.fromkeys(("exponents", "energies", "sums", "out"), native.POINTER),
)

_LINES, _DEPTH, _CHANNELS = 32, 16, 64  # tiles of the last kernel, which scratch is padded to
_POOLED = 64  # tokens of a part
_WIDEST_POOLED = 2048  # a token stays in the registers of a warp


def shortcut_tokens(
    spectrum: Tensor,
    origins: Tensor,
    window: int,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Same contract as the reference's, for complex64."""
    batch, channels, height, width = spectrum.shape
    dim, _, ph, pw = weight.shape
    count, lines, inner = len(origins), batch * (height // ph), channels * ph
    out = spectrum.new_empty((count, batch, height // ph * (width // pw), dim), dtype=dtype)
    if out.numel() == 0:
        return out

    up = lambda size, tile: -(-size // tile) * tile
    padded = up(lines, _LINES), up(inner, _DEPTH), up(dim, _CHANNELS)
    factor = dtype if dtype == torch.bfloat16 else torch.float32
    scratch = torch.empty if padded == (lines, inner, dim) else torch.zeros
    strips = scratch((count, window, 2, *padded[:2]), dtype=factor, device=out.device)
    taps = scratch((count, window, 2, *padded[1:]), dtype=factor, device=out.device)

    columns = torch.empty((pw, channels, ph, dim), dtype=torch.float32, device=out.device)
    columns.copy_(weight.permute(3, 1, 2, 0))
    added = [t.to(torch.float32) for t in (bias, rows) if t is not None]
    shift = _aligned(sum(added[1:], added[0])) if added else None
    values, origins = torch.view_as_real(spectrum.resolve_conj()), origins.contiguous()
    params = _Tokens(
        dtype=native.DTYPES[dtype],
        count=count,
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        window=window,
        patch_height=ph,
        patch_width=pw,
        dim=dim,
        spectrum=values,
        **native.strides("bcuv", values),
        origins=origins,
        weight=columns,
        shift=shift,
        shift_stride=dim if rows is not None else 0,
        strips=strips,
        taps=taps,
        lines=lines,
        lines_padded=padded[0],
        depth_padded=padded[1],
        channels_padded=padded[2],
        out=out,
    )
    native.call("pae_shortcut_tokens", params, out.device)
    return out


def shortcut_pool(tokens: Tensor, rows: Tensor | None = None) -> Tensor:
    """Same contract as the reference's, up to fp32; rows of more than 2048 channels are its own."""
    count, batch, per_image, dim = tokens.shape
    if dim > _WIDEST_POOLED:
        return reference.shortcut_pool(tokens, rows)
    out = tokens.new_empty(count, dim)
    if out.numel() == 0:
        return out
    tokens = tokens if tokens.stride(3) == 1 else tokens.contiguous()
    rows = None if rows is None else rows.to(torch.float32).contiguous()
    parts = -(-batch * per_image // _POOLED)
    exponents = tokens.new_empty(count, parts, dtype=torch.int32)
    energies = tokens.new_empty(count, parts, dtype=torch.float32)
    sums = tokens.new_empty(count, parts, dim, dtype=torch.float32)
    aligned = tokens.data_ptr() % (4 * tokens.element_size()) == 0
    params = _Pool(
        dtype=native.DTYPES[tokens.dtype],
        vectors=aligned and all(size % 4 == 0 for size in (*tokens.stride()[:3], dim)),
        count=count,
        batch=batch,
        tokens_per_image=per_image,
        dim=dim,
        tokens=tokens,
        **native.strides("sbn", tokens),
        rows=rows,
        parts=parts,
        exponents=exponents,
        energies=energies,
        sums=sums,
        out=out,
    )
    native.call("pae_shortcut_pool", params, tokens.device)
    return out


def _aligned(t: Tensor) -> Tensor:
    """`t` in one piece that starts at a multiple of 16 bytes, as fresh memory does."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()
