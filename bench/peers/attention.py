"""Prompted attention as PyTorch offers it: prompt and image keys concatenated, then one call; and
`apart`, one call for image keys and products for prompts.

All take packed qkv (B, N, 3, H, d) and shared prompts (1, P, 2, H, d), and return (B, N, H d).
Autograd splits and reduces the gradients of the concatenation: that is part of what they cost.
`causal`: rows see those before them; without prompts, as what PyTorch offers is square.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pae_kernels.attention import sdpa as apart_kernels

Attend = Callable[[Tensor, Tensor], Tensor]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attend_by(kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """`kernel` maps queries (B, H, N, d), keys and values (B, H, P + N, d) to (B, H, N, d)."""

    def attend(qkv: Tensor, kv_prompt: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if kv_prompt.shape[1]:
            k_p, v_p = kv_prompt.expand(len(qkv), -1, -1, -1, -1).permute(2, 0, 3, 1, 4)
            k, v = torch.cat([k_p, k], dim=2), torch.cat([v_p, v], dim=2)
        out = kernel(q, k, v)
        return out.transpose(1, 2).flatten(2)

    return attend


@attend_by
def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The softmax written out."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


@attend_by
def eager_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with a mask, as CLIP's text tower is written."""
    later = torch.full((q.shape[2], k.shape[2]), -torch.inf, device=q.device).triu(1)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + later.to(q)).softmax(dim=-1) @ v


def sdpa(backend: str | None = None, causal: bool = False) -> Attend:
    """scaled_dot_product_attention, pinned to one of `BACKENDS` or as PyTorch chooses."""
    attention = functools.partial(F.scaled_dot_product_attention, is_causal=causal)
    if backend is None:
        return attend_by(attention)

    def pinned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return attention(q, k, v)

    return attend_by(pinned)


class _Apart(torch.autograd.Function):
    """Image keys by SDPA's operators, prompts by products, one softmax by their log-sum-exps."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, kv_prompt: Tensor, causal: bool) -> Tensor:
        given = qkv, kv_prompt, None, qkv.shape[-1] ** -0.5, False, None, None, None
        out, lse = apart_kernels.forward(*given, causal)
        ctx.save_for_backward(qkv, kv_prompt, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        qkv, kv_prompt, out, lse = ctx.saved_tensors
        given = qkv, kv_prompt, None, qkv.shape[-1] ** -0.5, False, None, None, None
        # in whatever order PyTorch's kernels add, which is their fastest
        return *apart_kernels.gradients(d_out, *given, out, lse, True, ctx.causal), None


def apart(causal: bool = False) -> Attend:
    """Without a concatenation: the strongest way known to do it by PyTorch's kernels."""
    return lambda qkv, kv_prompt: _Apart.apply(qkv, kv_prompt, causal)


def flash_attn(causal: bool = False) -> Attend:
    """The package of that name, where it is installed; it takes 16 bit alone, and rows first."""
    from flash_attn import flash_attn_func

    def rows_first(*qkv: Tensor) -> Tensor:
        rows = (t.transpose(1, 2) for t in qkv)
        return flash_attn_func(*rows, causal=causal).transpose(1, 2)

    return attend_by(rows_first)


def flex() -> Attend:
    """FlexAttention without a mask, compiled as it is meant to be used."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    return attend_by(torch.compile(flex_attention, dynamic=False))
