"""Prompt-concatenated attention on CPUs: `csrc/cpu/attention.h`, in fp32 and bf16.

Queries, keys and values are read where the packed product and the prompts lie, and gradients are
written where the next product reads them: nothing is concatenated, expanded or packed by PyTorch.
All products and sums are fp32. In bf16 gradients are taken of whole rows of the softmax and not of
`out`, whose rounding would be most of the error.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import cpu, native
from . import reference

PARTS = 256  # sums over the batch are begun in about so many heads of images

_Attention = native.params(
    "cpu_attention",
    **dict.fromkeys(("threads", "type"), native.INT32),
    scale=native.FLOAT32,
    **dict.fromkeys(("batch", "tokens", "rows", "prompts", "heads", "sets", "width"), native.INT64),
    **dict.fromkeys(("qkv_image", "qkv_row", "qkv_part", "qkv_head"), native.INT64),
    **dict.fromkeys(("kv_set", "kv_row", "kv_part", "kv_head"), native.INT64),
    **dict.fromkeys(("qkv", "kv", "group", "log_m", "out", "lse"), native.POINTER),
    **dict.fromkeys(("bias", "mask"), native.POINTER),
    **dict.fromkeys(("bias_head", "windows"), native.INT64),
    **dict.fromkeys(("images", "d_out_image", "d_out_row"), native.INT64),
    **dict.fromkeys(("d_out", "d_qkv", "d_kv"), native.POINTER),
    **dict.fromkeys(("causal", "reserved"), native.INT32),
)


@lru_cache
def _multiplies_tiles() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def forward(
    qkv: Tensor,
    kv_prompt: Tensor,
    group: Tensor | None,
    scale: float,
    class_only: bool,
    log_multiplicity: Tensor | None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's."""
    # with AMX PyTorch's fused attention multiplies bf16 by tiles, several times as fast as fp32
    plain = not class_only and bias is None and mask is None
    tiles = qkv.dtype == torch.bfloat16 and plain and _multiplies_tiles()
    if tiles or not qkv.numel():
        return reference.forward(
            qkv, kv_prompt, group, scale, class_only, log_multiplicity, bias, mask, causal
        )
    n = reference.Sizes.of(qkv, kv_prompt, class_only)
    out = torch.empty(n.batch, n.rows, n.heads * n.width, dtype=qkv.dtype)
    lse = torch.empty(n.batch, n.heads, n.rows, dtype=torch.float32)
    given = qkv, kv_prompt, group, scale, log_multiplicity, bias, mask
    _call("fwd", n, *given, out, lse, causal=causal)
    return out, lse


def backward(
    d_out: Tensor,
    qkv: Tensor,
    kv_prompt: Tensor,
    group: Tensor | None,
    scale: float,
    class_only: bool,
    log_multiplicity: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    need_qkv: bool,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's. The same bits at any number of threads."""
    if not qkv.numel():
        return reference.backward(
            *(d_out, qkv, kv_prompt, group, scale, class_only, log_multiplicity, bias, mask),
            *(out, lse, need_qkv, causal),
        )
    n = reference.Sizes.of(qkv, kv_prompt, class_only)
    d_qkv = torch.empty(qkv.shape if need_qkv else 0, dtype=qkv.dtype)
    if class_only and need_qkv:
        d_qkv[:, 1:, 0] = 0
    # one set for all images: the kernel adds up `images` of them, in turn
    images = max(1, n.batch * n.heads // PARTS) if group is None and n.sets == 1 else 1
    slots = -(-n.batch // images)
    d_kv = torch.empty(slots, n.prompts, 2, n.heads, n.width, dtype=torch.float32)
    _call(
        *("bwd", n, qkv, kv_prompt, group, scale, log_multiplicity, bias, mask, out, lse),
        images=images,
        causal=causal,
        d_out=d_out,
        d_out_image=d_out.stride(0),
        d_out_row=d_out.stride(1),
        d_qkv=d_qkv if need_qkv else None,
        d_kv=d_kv,
    )
    return d_qkv, reference.sum_groups(d_kv, group, n.sets).to(kv_prompt.dtype)


def _call(
    direction: str,
    n: reference.Sizes,
    qkv: Tensor,
    kv_prompt: Tensor,
    group: Tensor | None,
    scale: float,
    log_multiplicity: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    **more: Any,
) -> None:
    axes = ("qkv_image", "qkv_row", "qkv_part", "qkv_head")
    kv_axes = ("kv_set", "kv_row", "kv_part", "kv_head")
    # held until the call is over
    group = None if group is None else group.contiguous()
    log_m, bias, mask = (
        None if t is None else t.float().contiguous() for t in (log_multiplicity, bias, mask)
    )
    out, lse = out.contiguous(), lse.contiguous()
    params = _Attention(
        type=cpu.TYPES[qkv.dtype],
        scale=scale,
        **n._asdict(),
        **dict(zip(axes, qkv.stride())),
        **dict(zip(kv_axes, kv_prompt.stride())),
        **{"qkv": qkv, "kv": kv_prompt, "group": group, "log_m": log_m, "out": out, "lse": lse},
        **{"bias": bias, "mask": mask, "windows": 1 if mask is None else len(mask)},
        bias_head=0 if bias is None or len(bias) == 1 else n.tokens * n.tokens,
        **more,
    )
    cpu.call(f"pae_cpu_attention_{direction}", params)
