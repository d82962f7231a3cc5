"""The pointwise ops in C++ for CPUs: fills the structs of `csrc/cpu/cpu.h`, calls. The kernels and
what bounds them are in `csrc/cpu/kernels.cpp`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cpu, native
from .reference import ACTIVATIONS

_KINDS = {kind: number for number, kind in enumerate(ACTIVATIONS)}  # in the order of cpu.h

_NormForward = native.params(
    "cpu_norm_fwd",
    **dict.fromkeys(("threads", "x_type", "delta_type", "xhat_type"), native.INT32),
    eps=native.FLOAT32,
    **dict.fromkeys(("rms", "reserved"), native.INT32),
    **dict.fromkeys(("rows", "width"), native.INT64),
    **dict.fromkeys(("x", "delta", "y", "xhat", "rstd"), native.POINTER),
)
_NormBackward = native.params(
    "cpu_norm_bwd",
    **dict.fromkeys(
        ("threads", "d_type", "xhat_type", "residual_type", "dx_type", "copy_type", "rms"),
        native.INT32,
    ),
    **dict.fromkeys(("rows", "width"), native.INT64),
    **dict.fromkeys(("d", "xhat", "rstd", "residual", "dx", "copy"), native.POINTER),
)
_ActivationForward = native.params(
    "cpu_activation_fwd",
    **dict.fromkeys(("threads", "type", "kind"), native.INT32),
    count=native.INT64,
    **dict.fromkeys(("u", "y", "code"), native.POINTER),
)
_ActivationBackward = native.params(
    "cpu_activation_bwd",
    **dict.fromkeys(("threads", "type", "kept_type", "kind", "reserved"), native.INT32),
    count=native.INT64,
    **dict.fromkeys(("d", "kept", "du"), native.POINTER),
)


_Gated = native.params(
    "cpu_gated",
    **dict.fromkeys(("threads", "type", "kind"), native.INT32),
    **dict.fromkeys(("rows", "width"), native.INT64),
    **dict.fromkeys(("u", "d", "y"), native.POINTER),
)
_GatedNorm = native.params(
    "cpu_gated_norm",
    **dict.fromkeys(("threads", "type", "kind"), native.INT32),
    eps=native.FLOAT32,
    rms=native.INT32,
    **dict.fromkeys(("rows", "width"), native.INT64),
    **dict.fromkeys(("u", "d", "y"), native.POINTER),
)
_Rotate = native.params(
    "cpu_rotate",
    **dict.fromkeys(("threads", "type", "back"), native.INT32),
    **dict.fromkeys(("batch", "tokens", "count", "parts", "heads", "width"), native.INT64),
    table_head=native.INT64,
    **dict.fromkeys(("sin", "cos", "qkv"), native.POINTER),
)


def _rows(x: Tensor) -> dict[str, int]:
    width = x.shape[-1]
    return {"rows": x.numel() // max(width, 1), "width": width}


def _rstd_of(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def layer_norm(
    x: Tensor, eps: float, dtype: torch.dtype, rms: bool = False
) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's."""
    xhat, rstd = torch.empty_like(x, dtype=dtype), _rstd_of(x)
    if x.numel():
        types = {"x_type": cpu.TYPES[x.dtype], "xhat_type": cpu.TYPES[dtype], "rms": rms}
        given = _NormForward(**types, eps=eps, **_rows(x), x=x, xhat=xhat, rstd=rstd)
        cpu.call("pae_cpu_norm_fwd", given)
    return xhat, rstd


def add_layer_norm(
    x: Tensor, delta: Tensor, eps: float, dtype: torch.dtype, rms: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the reference's."""
    y, xhat, rstd = torch.empty_like(x), torch.empty_like(x, dtype=dtype), _rstd_of(x)
    if x.numel():
        types = {
            "x_type": cpu.TYPES[x.dtype],
            "delta_type": cpu.TYPES[delta.dtype],
            "xhat_type": cpu.TYPES[dtype],
            "rms": rms,
        }
        arrays = {"x": x, "delta": delta, "y": y, "xhat": xhat, "rstd": rstd}
        cpu.call("pae_cpu_norm_fwd", _NormForward(**types, eps=eps, **_rows(x), **arrays))
    return y, xhat, rstd


def layer_norm_backward(
    d_xhat: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
    narrow: torch.dtype | None,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's."""
    dx = torch.empty_like(d_xhat, dtype=dtype)
    copy = rstd.new_empty(0) if narrow is None else torch.empty_like(d_xhat, dtype=narrow)
    if dx.numel():
        types = {
            "d_type": cpu.TYPES[d_xhat.dtype],
            "xhat_type": cpu.TYPES[xhat.dtype],
            "residual_type": 0 if residual is None else cpu.TYPES[residual.dtype],
            "dx_type": cpu.TYPES[dtype],
            "copy_type": 0 if narrow is None else cpu.TYPES[narrow],
            "rms": rms,
        }
        arrays = {"d": d_xhat, "xhat": xhat, "rstd": rstd, "residual": residual, "dx": dx}
        arrays["copy"] = None if narrow is None else copy
        cpu.call("pae_cpu_norm_bwd", _NormBackward(**types, **_rows(dx), **arrays))
    return dx, copy


def activation(u: Tensor, kind: str) -> Tensor:
    """Same contract as the reference's."""
    return _activation(u, kind, torch.empty_like(u))


def activation_(u: Tensor, kind: str) -> Tensor:
    """Same contract as the reference's, for contiguous u."""
    return _activation(u, kind, u)


def _activation(u: Tensor, kind: str, y: Tensor) -> Tensor:
    how = {"type": cpu.TYPES[u.dtype], "kind": _KINDS[kind]}
    cpu.call("pae_cpu_activation_fwd", _ActivationForward(**how, count=u.numel(), u=u, y=y))
    return y


def activation_coded(u: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's."""
    y, code = torch.empty_like(u), torch.empty_like(u, dtype=torch.uint8)
    how = {"type": cpu.TYPES[u.dtype], "kind": _KINDS[kind]}
    given = _ActivationForward(**how, count=u.numel(), u=u, y=y, code=code)
    cpu.call("pae_cpu_activation_fwd", given)
    return y, code


def activation_backward(d: Tensor, kept: Tensor, kind: str) -> Tensor:
    """Same contract as the reference's."""
    du = torch.empty_like(d)
    how = {"type": cpu.TYPES[d.dtype], "kept_type": cpu.TYPES[kept.dtype], "kind": _KINDS[kind]}
    given = _ActivationBackward(**how, count=d.numel(), d=d, kept=kept, du=du)
    cpu.call("pae_cpu_activation_bwd", given)
    return du


def gated(u: Tensor, kind: str) -> Tensor:
    """Same contract as the reference's."""
    y = u.new_empty((*u.shape[:-1], u.shape[-1] // 2))
    return _gated(u, None, y, kind)


def gated_backward(d: Tensor, u: Tensor, kind: str) -> Tensor:
    """Same contract as the reference's."""
    return _gated(u, d, torch.empty_like(u), kind)


def _gated(u: Tensor, d: Tensor | None, y: Tensor, kind: str) -> Tensor:
    if u.numel():
        cpu.call("pae_cpu_gated", _Gated(**_gates(u, d, y, kind)))
    return y


def gated_norm(u: Tensor, kind: str, eps: float, rms: bool = False) -> Tensor:
    """Same contract as the reference's."""
    xhat = u.new_empty((*u.shape[:-1], u.shape[-1] // 2))
    return _gated_norm(u, None, xhat, kind, eps, rms)


def gated_norm_backward(d: Tensor, u: Tensor, kind: str, eps: float, rms: bool = False) -> Tensor:
    """Same contract as the reference's."""
    return _gated_norm(u, d, torch.empty_like(u), kind, eps, rms)


def _gated_norm(u: Tensor, d: Tensor | None, y: Tensor, kind: str, eps: float, rms: bool) -> Tensor:
    if u.numel():
        given = _GatedNorm(**_gates(u, d, y, kind), eps=eps, rms=rms)
        cpu.call("pae_cpu_gated_norm", given)
    return y


def _gates(u: Tensor, d: Tensor | None, y: Tensor, kind: str) -> dict[str, Any]:
    how = {"type": cpu.TYPES[u.dtype], "kind": _KINDS[kind], "width": u.shape[-1] // 2}
    return {**how, "rows": u.numel() // u.shape[-1], "u": u, "d": d, "y": y}


def rotate_(qkv: Tensor, rotation: Tensor, back: bool) -> None:
    """Same contract as the reference's."""
    batch, tokens, parts, heads, width = qkv.shape
    sin, cos = rotation.contiguous()
    count = sin.shape[-2]
    if batch and count:
        shape = {"batch": batch, "tokens": tokens, "count": count}
        shape |= {"parts": parts, "heads": heads, "width": width}
        how = {"type": cpu.TYPES[qkv.dtype], "back": back}
        table = count * width // 2 if sin.dim() == 3 else 0
        given = _Rotate(**how, **shape, table_head=table, sin=sin, cos=cos, qkv=qkv)
        cpu.call("pae_cpu_rotate", given)
