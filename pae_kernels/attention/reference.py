"""Prompt-concatenated attention in plain PyTorch: the definition, and the pair that runs without a
kernel.

`prompt_attention` is the mathematics, differentiable by autograd, any device and float dtype.
`forward` and `backward` compute the same without keeping the (N, P + N) attention matrix: they save
the log-sum-exp, as every fused version does. On the CPU they lean on PyTorch's own fused attention
where it applies.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import exact_matmul


class Sizes(NamedTuple):
    """Of one call: B, N, rows that ask (N, or 1), G, P, H, d."""

    batch: int
    tokens: int
    rows: int
    sets: int
    prompts: int
    heads: int
    width: int

    @classmethod
    def of(cls, qkv: Tensor, kv_prompt: Tensor, class_only: bool) -> Sizes:
        batch, tokens, _, heads, width = qkv.shape
        sets, prompts = kv_prompt.shape[:2]
        return cls(batch, tokens, 1 if class_only else tokens, sets, prompts, heads, width)


def take_groups(rows: Tensor, group: Tensor | None, batch: int) -> Tensor:
    """Per-sample view (B, ...) of per-group rows (G, ...): G = 1 is expanded, G = B taken as it
    is.
    """
    if group is not None:
        return rows[group]
    return rows.expand(batch, *rows.shape[1:])


def sum_groups(grad: Tensor, group: Tensor | None, groups: int) -> Tensor:
    """Adjoint of `take_groups`: (B, ...) summed to (G, ...) in at least fp32, in a fixed order."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    if group is not None:
        # a product with the one-hot matrix: deterministic on every device, unlike index_add
        hot = F.one_hot(group, groups).to(wide)
        return exact_matmul(hot.t(), grad.to(wide).flatten(1)).view(groups, *grad.shape[1:])
    if groups == 1:
        return grad.sum(0, keepdim=True, dtype=wide)
    return grad.to(wide)


def prompt_attention(
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
    """The definition: softmax(scale q [k_p; k]^T + [log m; bias + mask]) [v_p; v] for image
    queries, and its log-sum-exp.
    """
    batch = len(qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    k_p, v_p = take_groups(kv_prompt, group, batch).permute(2, 0, 3, 1, 4)
    q = q[:, :, :1] if class_only else q
    scores = scale * q @ torch.cat([k_p, k], dim=2).transpose(-1, -2)
    n = Sizes.of(qkv, kv_prompt, class_only)
    later = _later(qkv, class_only, causal)
    added = _added(n, group, log_multiplicity, bias, mask, later)
    if added is not None:
        scores = scores + added.to(scores.dtype)
    out = scores.softmax(dim=-1) @ torch.cat([v_p, v], dim=2)
    lse = scores.logsumexp(dim=-1)
    return out.transpose(1, 2).flatten(2), lse


def class_attention(
    qkv: Tensor,
    kv_prompt: Tensor,
    lse: Tensor,
    group: Tensor | None,
    scale: float,
    log_multiplicity: Tensor | None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Row 0 of the softmax that `prompt_attention` took, (B, H, P + N), from its log-sum-exp.

    In at least fp32: rounded logits would tie, and the ranking of the rows is what is asked for.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q = scale * qkv[:, 0, 0, :, None].to(wide)  # (B, H, 1, d)
    k = qkv[:, :, 1].transpose(1, 2).to(wide)
    k_p = take_groups(kv_prompt[:, :, 0].to(wide), group, len(qkv)).transpose(1, 2)
    scores = torch.cat([exact_matmul(q, keys.transpose(-1, -2)) for keys in (k_p, k)], dim=-1)
    added = _added(Sizes.of(qkv, kv_prompt, True), group, log_multiplicity, bias, mask)
    if added is not None:
        scores = scores + added.to(wide)
    return (scores - lse[:, :, :1, None].to(wide)).exp().squeeze(2)


def _added(
    n: Sizes,
    group: Tensor | None,
    log_multiplicity: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    later: Tensor | None = None,
) -> Tensor | None:
    """All that is added to the logits, (B or 1, H or 1, N or 1, P + N), or None: log multiplicity
    for prompts, bias and mask for image rows, and `later` for those that a causal row does not see.
    """
    parts = []
    if bias is not None:
        parts.append(F.pad(bias[None, :, : n.rows], (n.prompts, 0)))
    if mask is not None:
        each = mask[torch.arange(n.batch, device=mask.device) % len(mask), None, : n.rows]
        parts.append(F.pad(each, (n.prompts, 0)))
    if log_multiplicity is not None:
        per_key = take_groups(log_multiplicity, group, n.batch)
        parts.append(F.pad(per_key, (0, n.tokens))[:, None, None])
    if later is not None:
        parts.append(F.pad(later, (n.prompts, 0))[None, None])
    return functools.reduce(torch.add, parts) if parts else None


def _later(qkv: Tensor, class_only: bool, causal: bool) -> Tensor | None:
    """(N or 1, N), -inf where a row's key comes later in the sequence; None where all are seen."""
    if not causal:
        return None
    rows = 1 if class_only else qkv.shape[1]
    return torch.full((rows, qkv.shape[1]), -torch.inf, device=qkv.device).triu(1)


def _split(
    qkv: Tensor, kv_prompt: Tensor, group: Tensor | None, class_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, N, d) queries and (B, H, P + N, d) keys and values."""
    batch = qkv.shape[0]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if kv_prompt.shape[1]:
        k_p, v_p = take_groups(kv_prompt, group, batch).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([k_p, k], dim=2), torch.cat([v_p, v], dim=2)
    return (q[:, :, :1] if class_only else q), k, v


def _skips(n: Sizes, causal: bool, scale: float, *added: Tensor | None) -> bool:
    """Whether PyTorch's fused attention is causal by itself, and then leaves out what comes later:
    of square scores without a mask, and no negative scale, by which it multiplies its own -inf.
    """
    return causal and scale > 0 and n.prompts == 0 and all(t is None for t in added)


def _fused_on_cpu(qkv: Tensor, class_only: bool) -> bool:
    return qkv.device.type == "cpu" and qkv.numel() > 0 and not class_only


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
    """Output (B, N, H d) and log-sum-exp (B, H, N), fp32 or wider."""
    n = Sizes.of(qkv, kv_prompt, class_only)
    q, k, v = _split(qkv, kv_prompt, group, class_only)
    fused = _fused_on_cpu(qkv, class_only)
    skips = fused and _skips(n, causal, scale, log_multiplicity, bias, mask)
    later = _later(qkv, class_only, causal and not skips)
    added = _added(n, group, log_multiplicity, bias, mask, later)
    if fused:
        added = None if added is None else added.to(q.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=skips, attn_mask=added, scale=scale
        )
        return out.transpose(1, 2).reshape(n.batch, n.tokens, -1), lse.contiguous()
    scores = _scores(q, k, scale, added)
    lse = scores.logsumexp(dim=-1)
    out = scores.sub_(lse[..., None]).exp_() @ v.to(scores.dtype)
    return out.to(v.dtype).transpose(1, 2).flatten(2), lse


def _scores(q: Tensor, k: Tensor, scale: float, added: Tensor | None) -> Tensor:
    """Logits in at least fp32."""
    scores = _inner_products(q, k).mul_(scale)
    return scores if added is None else scores + added.to(scores.dtype)


def _inner_products(a: Tensor, b: Tensor) -> Tensor:
    """a b^T with sums and result in at least fp32.

    A 16-bit result is no choice: an error of a logit is a relative error of its probability, and
    the log-sum-exp that is subtracted was taken of logits that are not rounded.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide).transpose(-1, -2)


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
    """Gradients of qkv (empty unless `need_qkv`) and of kv_prompt (summed over each group's samples
    in fp32).
    """
    n = Sizes.of(qkv, kv_prompt, class_only)
    d_out = d_out.reshape(n.batch, n.rows, n.heads, n.width).transpose(1, 2)
    out = out.view(n.batch, n.rows, n.heads, n.width).transpose(1, 2)
    if not need_qkv:
        weighted = _added(n, group, log_multiplicity, None, None)
        d_kv = _prompt_columns(d_out, qkv, kv_prompt, group, scale, class_only, weighted, out, lse)
        return qkv.new_empty(0), sum_groups(d_kv, group, n.sets).to(kv_prompt.dtype)

    fused = _fused_on_cpu(qkv, class_only) and qkv.dtype in (torch.float32, torch.float64)
    skips = fused and _skips(n, causal, scale, log_multiplicity, bias, mask)
    later = _later(qkv, class_only, causal and not skips)
    added = _added(n, group, log_multiplicity, bias, mask, later)
    q, k, v = _split(qkv, kv_prompt, group, class_only)
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if class_only:
        d_qkv[:, 1:, 0] = 0
    d_kv = qkv.new_empty(n.batch, n.prompts, 2, n.heads, n.width)
    if fused:
        added = None if added is None else added.to(q.dtype)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, skips, attn_mask=added, scale=scale
        )
        _pack(grads, d_qkv, d_kv, n.prompts)
    else:
        # 16-bit: PyTorch's CPU kernel converts tile by tile, whole products of one image at a time
        # stay in the cache and need no conversion. On a GPU the whole batch goes at once.
        step = 1 if qkv.device.type == "cpu" else max(n.batch, 1)
        for i in range(0, n.batch, step):
            s = slice(i, i + step)
            mine = added if added is None or len(added) == 1 else added[s]
            grads = _explicit(d_out[s], q[s], k[s], v[s], scale, mine, lse[s])
            _pack(grads, d_qkv[s], d_kv[s], n.prompts)
    return d_qkv, sum_groups(d_kv, group, n.sets).to(kv_prompt.dtype)


def _explicit(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, added: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from recomputed probabilities; softmax and its gradient in fp32, products with
    them in the input dtype.

    The whole rows of the softmax are at hand, so its gradient is taken of them and not of `out`,
    whose rounding to 16 bits would be most of the error.
    """
    probs = _scores(q, k, scale, added).sub_(lse[..., None]).exp_()
    d_v = probs.to(v.dtype).transpose(-1, -2) @ d_out
    d_scores = torch._softmax_backward_data(_inner_products(d_out, v), probs, -1, probs.dtype)
    d_scores = d_scores.mul_(scale).to(q.dtype)
    return d_scores @ k, d_scores.transpose(-1, -2) @ q, d_v


def _pack(grads: Iterable[Tensor], d_qkv: Tensor, d_kv: Tensor, prompts: int) -> None:
    """Write (dq, dk, dv) of shape (B, H, rows, d) into the packed layouts."""
    d_q, d_k, d_v = (g.transpose(1, 2) for g in grads)
    d_qkv[:, : d_q.shape[1], 0] = d_q
    d_qkv[:, :, 1], d_qkv[:, :, 2] = d_k[:, prompts:], d_v[:, prompts:]
    d_kv[:, :, 0], d_kv[:, :, 1] = d_k[:, :prompts], d_v[:, :prompts]


def _prompt_columns(
    d_out: Tensor,
    qkv: Tensor,
    kv_prompt: Tensor,
    group: Tensor | None,
    scale: float,
    class_only: bool,
    weighted: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Tensor:
    """d_kv per sample (B, P, 2, H, d) from the prompt columns of the score matrix alone: image keys
    are not read.
    """
    q = qkv[:, :, 0].transpose(1, 2)
    q = q[:, :, :1] if class_only else q
    k_p, v_p = take_groups(kv_prompt, group, qkv.shape[0]).permute(2, 0, 3, 1, 4)
    weighted = None if weighted is None else weighted[..., : kv_prompt.shape[1]]
    wide = lse.dtype
    probs = _scores(q, k_p, scale, weighted).sub_(lse[..., None]).exp_()
    d_v = probs.to(d_out.dtype).transpose(-1, -2) @ d_out
    delta = (d_out * out).sum(-1, keepdim=True, dtype=wide)
    d_scores = _inner_products(d_out, v_p).sub_(delta).mul_(probs).mul_(scale)
    d_k = d_scores.to(q.dtype).transpose(-1, -2) @ q
    return torch.stack([d_k.transpose(1, 2), d_v.transpose(1, 2)], dim=2)
