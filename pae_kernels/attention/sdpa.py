"""Prompt-concatenated attention from PyTorch's own fused attention, without a concatenation: for
GPUs that our kernels do not know, and as the strongest way to do it without a kernel.

Image queries look at image keys by `scaled_dot_product_attention`'s operators, which read q, k and
v as they lie in the packed product and return their log-sum-exp; and at prompts by one product per
head, in which shared prompts meet the rows of the whole batch. The two halves are one softmax by
their log-sum-exps:

    lse = log(e^lse_image + e^lse_prompt)
    out = e^(lse_image - lse) out_image + e^(logits - lse) values

The fused backward needs of a forward only `out` and `lse`, from which it forms probabilities again
and their row sums with the gradient; given those of the joint softmax, it returns exact dK and dV
of the image rows and their part of dQ. The part of the prompts is added in fp32, and their own
gradient is a product over all rows of the batch.

Flash attention, or the memory-efficient one, and not cuDNN: PyTorch refuses cuDNN's where the same
bits are asked for twice ("cuDNN SDPA is not deterministic"), as `backward` does, and cuDNN 9.25 and
9.26 are reported to return NaN in dK and dV for one query, the class row, of strongly negative lse.

With `bias` or `mask`, which flash attention does not take, the reference runs; and of causal rows
with a scale that is not positive, by which PyTorch multiplies the -inf of what comes later.

HBM traffic: the logits of prompts, B H N P in fp32, twice; out and dQ once more than the kernels.
On a GPU PyTorch's backward adds to dQ in any order; `backward` has it keep to one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import sum_groups, take_groups

_ATEN = torch.ops.aten


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
    """Same contract as the reference's `forward`."""
    if bias is not None or mask is not None or (causal and scale <= 0):
        return reference.forward(
            qkv, kv_prompt, group, scale, class_only, log_multiplicity, bias, mask, causal
        )
    q, k, v = _asked(qkv, class_only, causal)
    if qkv.numel() == 0:
        wide = torch.promote_types(qkv.dtype, torch.float32)
        return q.transpose(1, 2).flatten(2).clone(), q.new_empty(q.shape[:3], dtype=wide)
    out, lse = _fused(q, k, v, scale, causal)
    if kv_prompt.shape[1]:
        keys, values = _prompts(kv_prompt, group)
        logits = _logits(q, keys, scale, group, log_multiplicity)
        image, lse = lse, torch.logaddexp(lse, logits.logsumexp(-1))
        weights = logits.sub_(lse[..., None]).exp_().to(q.dtype)
        mixed = _by_prompts(weights, values)
        out = mixed.addcmul_((image - lse).exp_()[..., None], out.to(mixed.dtype)).to(q.dtype)
    return out.transpose(1, 2).flatten(2), lse.contiguous()


def backward(*given: Any) -> tuple[Tensor, Tensor]:
    """Same contract as the reference's `backward`."""
    if not given[0].is_cuda:
        return gradients(*given)
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return gradients(*given)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def gradients(
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
    """As `backward`, in whatever order PyTorch's kernels add."""
    if bias is not None or mask is not None or (causal and scale <= 0):
        return reference.backward(
            *(d_out, qkv, kv_prompt, group, scale, class_only, log_multiplicity, bias, mask),
            *(out, lse, need_qkv, causal),
        )
    q = _rows(qkv, 0)[:, :, :1] if class_only else _rows(qkv, 0)
    rows_first = lambda t: t.reshape(*t.shape[:2], *qkv.shape[3:]).transpose(1, 2)
    d_out, out = rows_first(d_out), rows_first(out)
    d_q, d_kv = None, torch.zeros_like(kv_prompt, memory_format=torch.contiguous_format)
    if kv_prompt.shape[1] and qkv.numel():
        keys, values = _prompts(kv_prompt, group)
        logits = _logits(q, keys, scale, group, log_multiplicity)
        weights = logits.sub_(lse[..., None]).exp_()
        d_v = _over_rows(weights.to(q.dtype), d_out, len(kv_prompt) == 1)
        row_dot = (d_out * out.to(lse.dtype)).sum(-1, keepdim=True)
        slope = _by_prompts(d_out, values.mT).sub_(row_dot).mul_(weights).mul_(scale).to(q.dtype)
        d_k = _over_rows(slope, q, len(kv_prompt) == 1)
        both = torch.stack([d_k, d_v]).permute(1, 3, 0, 2, 4)  # (G or B, P, 2, H, d)
        if len(kv_prompt) > 1:
            both = sum_groups(both, group, len(kv_prompt))
        d_kv = both.to(kv_prompt.dtype, memory_format=torch.contiguous_format)
        d_q = _by_prompts(slope, keys) if need_qkv else None
    if not need_qkv:
        return qkv.new_empty(0), d_kv
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if qkv.numel():
        _, k, v = _asked(qkv, class_only, causal)
        from_image, d_k, d_v = _fused_backward(d_out, q, k, v, out, lse, scale, causal)
        d_q = from_image if d_q is None else d_q.add_(from_image)
        for slot, d in enumerate((d_q, d_k, d_v)):
            d_qkv[:, : d.shape[2], slot] = d.transpose(1, 2)
            d_qkv[:, d.shape[2] :, slot] = 0  # queries that were not asked, keys that were not seen
    return d_qkv, d_kv


def _rows(qkv: Tensor, slot: int) -> Tensor:
    """Queries, keys or values (B, H, N, d); without gradient of qkv there are queries alone."""
    return qkv[:, :, slot].transpose(1, 2)


def _asked(qkv: Tensor, class_only: bool, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and the keys and values of the image rows that they may see."""
    q, k, v = (_rows(qkv, slot) for slot in range(3))
    if not class_only:
        return q, k, v
    return (q[:, :, :1], k[:, :, :1], v[:, :, :1]) if causal else (q[:, :, :1], k, v)


def _prompts(kv_prompt: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values (H, P, d) of shared prompts, or those of each image, (B, H, P, d)."""
    if len(kv_prompt) == 1:
        keys, values = kv_prompt[0].permute(1, 2, 0, 3)
    else:
        rows = kv_prompt if group is None else take_groups(kv_prompt, group, len(group))
        keys, values = rows.permute(2, 0, 3, 1, 4)
    return keys, values


def _logits(
    q: Tensor, keys: Tensor, scale: float, group: Tensor | None, log_multiplicity: Tensor | None
) -> Tensor:
    """(B, H, N, P) in at least fp32."""
    logits = _by_prompts(q, keys.mT).mul_(scale)
    if log_multiplicity is None:
        return logits
    bias = take_groups(log_multiplicity, group, len(q))
    return logits.add_(bias[:, None, None].to(logits.dtype))


def _by_prompts(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows (B, H, N, a) times (H, a, b), those of the whole batch at once, or (B, H, a, b)."""
    batch, heads, count, _ = rows.shape
    if matrix.dim() == 4:
        return _product(rows.flatten(0, 1), matrix.flatten(0, 1)).view(batch, heads, count, -1)
    found = _product(rows.transpose(0, 1).flatten(1, 2), matrix)
    return found.view(heads, batch, count, -1).transpose(0, 1)


def _over_rows(a: Tensor, b: Tensor, shared: bool) -> Tensor:
    """a^T b of (B, H, N, ..), summed over the rows of an image, or of the batch."""
    if shared:
        a, b = (t.transpose(0, 1).flatten(1, 2) for t in (a, b))
        return _product(a.mT, b)[None]
    return _product(a.flatten(0, 1).mT, b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b of matrices in a row, with sums and result in at least fp32."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.is_cuda and a.dtype != wide:
        return torch.bmm(a, b, out_dtype=wide)
    return torch.bmm(a.to(wide), b.to(wide))


# ---- PyTorch's operators: flash attention where it takes these, the memory-efficient one elsewhere


def _flash_takes(q: Tensor) -> bool:
    if q.element_size() != 2 or q.shape[-1] % 8 or q.shape[-1] > 256:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """(B, H, N, d) and log-sum-exp (B, H, N); as many keys as queries where it is causal."""
    if not q.is_cuda:
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=causal, scale=scale
        )
    elif _flash_takes(q):
        out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(
            q, k, v, is_causal=causal, scale=scale
        )
    else:
        out, lse, *_ = _ATEN._scaled_dot_product_efficient_attention(
            q, k, v, None, True, is_causal=causal, scale=scale
        )
    return out, lse[..., : q.shape[2]]


def _fused_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the part of a softmax that lies in these keys."""
    given = d_out, q, k, v
    if not q.is_cuda:
        return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, out, lse, 0.0, causal, scale=scale
        )
    no_dropout = [torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2)]
    if _flash_takes(q):
        lengths = None, None, q.shape[2], k.shape[2]
        return _ATEN._scaled_dot_product_flash_attention_backward(
            *given, out, lse, *lengths, 0.0, causal, *no_dropout, scale=scale
        )
    # its log-sum-exp has rows in whole tiles of 32; +inf is a row without weight
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    wanted = [True, True, True, False]
    return _ATEN._scaled_dot_product_efficient_attention_backward(
        *given, None, out, lse, *no_dropout, 0.0, wanted, is_causal=causal, scale=scale
    )[:3]
