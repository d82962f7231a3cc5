"""Prompted attention as PyTorch offers it: prompt and image keys concatenated, then one call.

All take packed qkv (B, N, 3, H, d) and shared prompts (1, P, 2, H, d), and return (B, N, H d).
Autograd splits and reduces the gradients of the concatenation: that is part of what they cost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor], Tensor]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def concatenated(qkv: Tensor, kv_prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, N, d) queries and (B, H, P + N, d) keys and values."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    k_p, v_p = kv_prompt.expand(len(qkv), -1, -1, -1, -1).permute(2, 0, 3, 1, 4)
    return q, torch.cat([k_p, k], dim=2), torch.cat([v_p, v], dim=2)


def eager(qkv: Tensor, kv_prompt: Tensor) -> Tensor:
    """The softmax written out."""
    q, k, v = concatenated(qkv, kv_prompt)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def sdpa(backend: str | None = None) -> Attend:
    """scaled_dot_product_attention, pinned to one of `BACKENDS` or as PyTorch chooses."""

    def attend(qkv: Tensor, kv_prompt: Tensor) -> Tensor:
        q, k, v = concatenated(qkv, kv_prompt)
        if backend is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            with sdpa_kernel(BACKENDS[backend]):
                out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)

    return attend


def flash_attn() -> Attend:
    """The package of that name, where it is installed; it takes 16 bit alone."""
    from flash_attn import flash_attn_func

    def attend(qkv: Tensor, kv_prompt: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in concatenated(qkv, kv_prompt))
        return flash_attn_func(q, k, v).flatten(2)

    return attend


def flex() -> Attend:
    """FlexAttention without a mask, compiled as it is meant to be used."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(qkv: Tensor, kv_prompt: Tensor) -> Tensor:
        out = compiled(*concatenated(qkv, kv_prompt))
        return out.transpose(1, 2).flatten(2)

    return attend
