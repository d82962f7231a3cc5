"""Prompt-concatenated attention in bf16 on CPUs; in fp32, PyTorch's fused attention is the fastest
known and the reference leans on it already.

PyTorch's fused attention in bf16 converts tile by tile, as often as a tile is read. Here every row
is converted once, by the copy that puts prompts in front of images, and all products are fp32: with
heads 64 wide those of bf16 are no faster, unless the processor multiplies whole tiles (AMX). The
forward is then the fused one in fp32. The backward is a few whole products per head around a
softmax gradient in C++, chunk by chunk: as many heads as fill `CHUNK_BYTES` with their logits, so
that these stay in the second cache from the two products that make them to the three that use them;
`softmax_bwd` reads both once and writes both once, in place. Gradients are taken of whole rows of
the softmax and not of `out`, whose rounding to 16 bits would be most of the error.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import cpu, native
from . import reference

CHUNK_BYTES = 1 << 20

_SoftmaxBackward = native.params(
    "cpu_softmax_bwd",
    **dict.fromkeys(("threads", "out_type"), native.INT32),
    scale=native.FLOAT32,
    **dict.fromkeys(("rows", "width"), native.INT64),
    **dict.fromkeys(("logits", "d_probs", "lse", "probs", "d_logits"), native.POINTER),
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
) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's."""
    if qkv.dtype == torch.float32 or class_only or not qkv.numel() or _multiplies_tiles():
        return reference.forward(qkv, kv_prompt, group, scale, class_only, log_multiplicity)
    batch, tokens, _, heads, width = qkv.shape
    q, k, v = _rows(qkv, kv_prompt, group, slice(None))
    bias = _bias(log_multiplicity, group, batch, tokens)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=bias, scale=scale
    )
    rows = torch.empty(batch, tokens, heads, width, dtype=qkv.dtype)
    return rows.copy_(out.transpose(1, 2)).flatten(2), lse.contiguous()


def backward(
    d_out: Tensor,
    qkv: Tensor,
    kv_prompt: Tensor,
    group: Tensor | None,
    scale: float,
    class_only: bool,
    log_multiplicity: Tensor | None,
    out: Tensor,
    lse: Tensor,
    need_qkv: bool,
) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's."""
    if qkv.dtype == torch.float32 or class_only or not need_qkv or not qkv.numel():
        return reference.backward(
            *(d_out, qkv, kv_prompt, group, scale, class_only, log_multiplicity, out, lse),
            need_qkv,
        )
    batch, tokens, _, heads, width = qkv.shape
    prompts = kv_prompt.shape[1]
    keys = prompts + tokens
    d_out = d_out.view(batch, tokens, heads, width).transpose(1, 2)
    bias = _bias(log_multiplicity, group, batch, tokens)
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    d_kv = torch.empty(batch, prompts, 2, heads, width, dtype=qkv.dtype)
    at_once = max(1, CHUNK_BYTES // (tokens * keys * lse.itemsize))  # heads
    images = max(1, at_once // heads)
    for i in range(0, batch, images):
        s = slice(i, i + images)
        q, k, v = (t.flatten(0, 1) for t in _rows(qkv, kv_prompt, group, s))
        d = _wide(d_out[s]).flatten(0, 1)
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for j in range(0, len(q), at_once):
            h = slice(j, j + at_once)
            logits = torch.bmm(q[h], k[h].mT)
            if scale != 1.0:
                logits.mul_(scale)
            if bias is not None:
                of_images = torch.arange(j, min(j + at_once, len(q))) // heads
                logits += bias[s].flatten(0, 2)[of_images][:, None]
            d_probs = torch.bmm(d[h], v[h].mT)
            _softmax_backward_(logits, d_probs, lse[s].flatten(0, 1)[h], scale)
            torch.bmm(logits.mT, d[h], out=d_v[h])
            torch.bmm(d_probs, k[h], out=d_q[h])
            torch.bmm(d_probs.mT, q[h], out=d_k[h])
        grads = (t.unflatten(0, (-1, heads)) for t in (d_q, d_k, d_v))
        reference._pack(grads, d_qkv[s], d_kv[s], prompts)
    d_kv = reference.sum_groups(d_kv, group, kv_prompt.shape[0]).to(kv_prompt.dtype)
    return d_qkv, d_kv


def _wide(rows: Tensor) -> Tensor:
    return torch.empty(rows.shape, dtype=torch.float32).copy_(rows)


def _rows(
    qkv: Tensor, kv_prompt: Tensor, group: Tensor | None, s: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (b, H, N, d), keys and values (b, H, P + N, d) of the images `s`, in fp32."""
    q, k, v = qkv[s].permute(2, 0, 3, 1, 4)
    prompts = reference.take_groups(kv_prompt, group, len(qkv))[s].permute(2, 0, 3, 1, 4)
    batch, heads, tokens, width = q.shape
    count = prompts.shape[3]
    both = []
    for first, rest in zip(prompts, (k, v)):
        rows = torch.empty(batch, heads, count + tokens, width, dtype=torch.float32)
        rows[:, :, :count], rows[:, :, count:] = first, rest
        both.append(rows)
    return _wide(q), both[0], both[1]


def _bias(
    log_multiplicity: Tensor | None, group: Tensor | None, batch: int, tokens: int
) -> Tensor | None:
    """What is added to the logits, (B, 1, 1, P + N) in fp32, or None."""
    if log_multiplicity is None:
        return None
    return reference._key_bias(log_multiplicity, group, batch, tokens).to(torch.float32)


def _softmax_backward_(logits: Tensor, d_probs: Tensor, lse: Tensor, scale: float) -> None:
    """In place: logits become probabilities, and their gradients those of the products behind the
    logits.
    """
    arrays = {"logits": logits, "d_probs": d_probs, "probs": logits, "d_logits": d_probs}
    sizes = {"rows": lse.numel(), "width": logits.shape[-1]}
    cpu.call("pae_cpu_softmax_bwd", _SoftmaxBackward(scale=scale, **sizes, **arrays, lse=lse))
