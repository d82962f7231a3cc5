"""fast_forward: walks a FrozenPlan block by block and skips what prompt tuning throws away.

What the reference computes and this does not:

- prompt queries, prompt outputs and their MLP: deep prompts are cut off before the next block;
- prompt keys and values per image: shared prompts get theirs once, all blocks in one product;
- in the last block, when only the class row is read, every other row. No key or value of any row is
  formed there: W_k moves into the one query, W_v behind the weighted sum;
- gradients below the first prompted block, gradients of frozen weights, and what only they need.

The residual stream and its gradient keep the dtype of the embedding; products run in the plan's
dtype; norms and softmax in at least fp32. Each block is one autograd.Function; what it saves is
listed at `_FrozenBlock`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pae_kernels import pointwise
from pae_kernels.attention import class_attention
from pae_kernels.attention.reference import sum_groups, take_groups

from .plan import BlockPlan, FrozenPlan, HeadNorm
from .prompts import PromptFamily
from .sequence import between_blocks, cut_rows, insert_rows, touches_rows

MEMORY_MODES = ("keep", "recompute8", "recompute")


def fast_forward(model: nn.Module, images: Tensor, memory: str = "keep") -> Tensor:
    """model(images), in value and in every gradient, without the work that is thrown away.

    Args:
        model: a `PromptedViT`, or a wrapper around one that forwards calls
            (DistributedDataParallel, torch.compile).
        images: (B, C, H, W) float, normalised as the backbone wants it.
        memory: what a middle block keeps for the backward, per image, with S = N D elements:
            "keep": 10 S. No extra work.
            "recompute8": 3 S and 8-bit derivatives of the activation (4 S bytes). q, k, v are
            computed again, one eighth more product work; approximate: prompt gradients are off by
            about 3e-3 in fp32 and by nothing visible in bf16.
            "recompute": 3 S. q, k, v and the MLP's hidden rows are computed again, a third more
            product work; exact.

    Returns:
        logits (B, classes).

    Raises:
        TypeError: `model` holds no PromptedViT.
        ValueError: images of a wrong shape, size or dtype; an unknown memory mode.
    """
    from .model import PromptedViT

    inner = model
    while not isinstance(inner, PromptedViT):
        wrapped = getattr(inner, "module", getattr(inner, "_orig_mod", None))
        if not isinstance(wrapped, nn.Module):
            raise TypeError(f"model must be a PromptedViT or wrap one, got {type(model).__name__}")
        inner = wrapped
    return model(images, engine="fast", memory=memory)


def run(model, images: Tensor, memory: str) -> Tensor:
    """The fast engine behind `PromptedViT.forward`; same contract as `fast_forward`."""
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory must be one of {MEMORY_MODES}, got {memory!r}")
    view, family = model.view, model.prompts
    plan = model.plan()
    with nullcontext() if images.requires_grad else torch.no_grad():
        x = view.embed(images)

    entered = 0
    with torch.autocast(x.device.type, enabled=False):
        if family.enters_sequence:
            rows = family.block_prompts(0, x)
            if rows is not None:
                x, entered = insert_rows(x, rows, view.num_prefix_tokens), rows.shape[-2]
            prompts = [None] * len(plan.blocks)
        elif family.depends_on_input:
            prompts = None
        else:
            group = family.group_index(x)
            if type(family).head_keys_values is PromptFamily.head_keys_values:
                prompts = [_block_prompts(p, group, None) for p in family.all_prompts(x)]
            else:  # block by block like the reference, so that dropout draws in the same order
                prompts = [
                    _block_prompts(family.block_prompts(i, x), group, family.head_keys_values(i, x))
                    for i in range(len(plan.blocks))
                ]
        x = walk(plan, x, prompts, family, view.reads_class_only, memory, view, entered)
    if entered and not view.reads_class_only:
        x = cut_rows(x, view.num_prefix_tokens, entered)
    return model.head(view.readout(x))


class BlockPrompts(NamedTuple):
    """Prompts of one block: rows (G, P, D) or None, group (B,) or None, log_multiplicity (G, P) or
    None, and keys and values in head space (1 or B, P', 2, H, d) or None.
    """

    rows: Tensor | None
    group: Tensor | None = None
    log_multiplicity: Tensor | None = None
    head_kv: Tensor | None = None


def _block_prompts(
    rows: Tensor | None, group: Tensor | None, head_kv: Tensor | None
) -> BlockPrompts | None:
    if rows is None and head_kv is None:
        return None
    if rows is not None and rows.dim() == 2:
        rows = rows[None]
    if head_kv is not None and head_kv.dim() == 4:
        head_kv = head_kv[None]
    return BlockPrompts(rows, None if rows is None else group, None, head_kv)


def walk(
    plan: FrozenPlan,
    x: Tensor,
    prompts: list[BlockPrompts | None] | None,
    family,
    class_only: bool,
    memory: str,
    view=None,
    entered: int = 0,
) -> Tensor:
    """Run all blocks of `plan` on x (B, N, D).

    Args:
        prompts: per block, or None to ask `family` block by block (prompts that depend on the
            rows).
        family: asked between blocks, see `between_blocks`; None has nothing to say there.
        class_only: return the class row alone, (B, 1, D), and compute nothing else in the last
            block.
        view: of the backbone; needed with a family.
        entered: live prompt rows in x.
    """
    x = x.contiguous()  # a stem without prefix tokens hands over transposed rows
    delta = None  # what the last block's product still has to add to x, see `_sums_apart`
    last = len(plan.blocks) - 1
    ready = (
        {}
        if prompts is None
        else _keys_values_at_once(plan, prompts, last if class_only else last + 1)
    )
    attention = None
    for i, block in enumerate(plan.blocks):
        if prompts is None or touches_rows(family, i):
            x, delta = _sum(x, delta), None
        if touches_rows(family, i):
            query = partial(_class_query, block, view.blocks[i].attn.scale)
            x = between_blocks(
                family, i, x, view.num_prefix_tokens, entered, attention, query
            ).contiguous()
        if prompts is not None:
            given = prompts[i]
        else:
            rows, head_kv = family.block_prompts(i, x), family.head_keys_values(i, x)
            given = _block_prompts(rows, family.group_index(x), head_kv)
        rows, group, log_multiplicity, head_kv = given or BlockPrompts(None)
        if rows is None:
            rows = x.new_empty(1, 0, x.shape[-1])
        absorbs = block.q_norm is None and block.k_norm is None and head_kv is None
        if class_only and i == last and absorbs:
            normed = _normalise(rows, block.eps1, plan.dtype)
            return _ClassBlock.apply(x, delta, normed, group, log_multiplicity, block)
        kv = (
            ready[i]
            if i in ready
            else _keys_values(_normalise(rows, block.eps1, plan.dtype), block)
        )
        if head_kv is not None:
            kv = _with_head_kv(kv, head_kv.to(plan.dtype), group, len(x))
            group = None
        wants_attention = i < last and family is not None and family.reads_class_attention
        x, delta, attention = _FrozenBlock.apply(
            x,
            delta,
            kv,
            group,
            log_multiplicity,
            block,
            memory,
            class_only and i == last,
            wants_attention,
        )
    return _sum(x, delta)


def _with_head_kv(kv: Tensor, head_kv: Tensor, group: Tensor | None, batch: int) -> Tensor:
    """Prompt keys and values (G, P, 2, H, d) with those in head space behind them: G is 1 or B."""
    if group is not None:
        kv = kv[group]
    sets = max(len(kv), len(head_kv))
    return torch.cat([kv.expand(sets, *kv.shape[1:]), head_kv.expand(sets, *head_kv.shape[1:])], 1)


def _class_query(block: BlockPlan, scale: float, x: Tensor) -> Tensor:
    """(B, H d): the class row's query before any per-head norm, the logit scale taken out again."""
    own = block.num_heads * block.head_width
    q = F.linear(
        _normalise(x[:, 0], block.eps1, block.w_qkv.dtype), block.w_qkv[:own], block.b_qkv[:own]
    )
    return q / scale if block.q_norm is None else q


def _sum(x: Tensor, delta: Tensor | None) -> Tensor:
    return x if delta is None else (x + delta).to(x.dtype)


def _normalise(rows: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm without affine, in at least fp32 and with the exact eps: rows may be near zero."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return F.layer_norm(wide, wide.shape[-1:], eps=eps).to(dtype)


def _keys_values(normed: Tensor, block: BlockPlan) -> Tensor:
    """Prompt keys and values (G, P, 2, H, d) of normalised prompt rows (G, P, D)."""
    kv = F.linear(normed, block.w_kv, block.b_kv)
    kv = kv.view(*normed.shape[:2], 2, block.num_heads, block.head_width)
    if block.k_norm is None:
        return kv
    n = block.k_norm
    k = F.layer_norm(kv[:, :, 0], n.weight.shape, n.weight, n.bias, n.eps)
    return torch.stack([k, kv[:, :, 1]], dim=2)


def _keys_values_at_once(
    plan: FrozenPlan, prompts: list[BlockPrompts | None], blocks: int
) -> dict[int, Tensor]:
    """Keys and values of the first `blocks` blocks from one LayerNorm and one batched product.

    They do when all those blocks have shared prompts of one shape and one eps, and keys are not
    normalised per head.
    """
    used, first = prompts[:blocks], plan.blocks[0]
    if blocks < 2 or any(p is None or p.rows is None or len(p.rows) != 1 for p in used):
        return {}
    if len({p.rows.shape for p in used}) > 1:
        return {}
    if any(b.eps1 != first.eps1 or b.k_norm is not None for b in plan.blocks[:blocks]):
        return {}
    if used[0].rows.shape[1] == 0:
        return {}
    normed = _normalise(torch.cat([p.rows for p in used]), first.eps1, plan.dtype)
    own = first.num_heads * first.head_width
    weight, bias = plan.w_qkv[:blocks, own:], plan.b_qkv[:blocks, None, own:]
    kv = torch.baddbmm(bias, normed, weight.transpose(1, 2))
    return dict(enumerate(kv.view(blocks, 1, -1, 2, first.num_heads, first.head_width).unbind(0)))


class _FrozenBlock(torch.autograd.Function):
    """One frozen block: x + delta (B, N, D), kv (G, P, 2, H, d) -> (y, delta') of the same shape,
    and the class row's attention on the image rows (B, H, N) where it is asked for, else None.

    delta is what the product before has yet to add, or None when it has (`_sums_apart`); the first
    norm adds it in its own pass. Its gradient is that of x, in the dtype the product before reads.
    With `class_only` the outputs are (B, 1, D).

    Saved, in elements of one image (S = N D), unless only kv needs a gradient (then xhat1, k and v
    are not): xhat1 S, qkv 3S, out S, xhat2 S, hidden 4S or its coded derivative (4S bytes);
    statistics and lse are small.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        delta,
        kv,
        group,
        log_multiplicity,
        block: BlockPlan,
        memory: str,
        class_only: bool,
        wants_attention: bool,
    ):
        need_x = ctx.needs_input_grad[0]
        x, xhat1, rstd1 = _sum_and_norm(x, delta, block.eps1, block.w_qkv.dtype)
        qkv, head_stats = _project(xhat1, block)
        out, lse = torch.ops.pae.prompt_attention_fwd(
            qkv, kv, group, 1.0, class_only, log_multiplicity
        )
        attention = None
        if wants_attention:
            attention = class_attention(
                qkv, kv, lse, group, scale=1.0, log_multiplicity=log_multiplicity
            )[..., kv.shape[1] :]
            ctx.mark_non_differentiable(attention)
        y, rows, mlp = _second_half(x[:, :1] if class_only else x, out, block, memory)

        if not need_x:
            xhat1 = rstd1 = None
            qkv = qkv[:, :, :1].contiguous()  # the prompt columns' gradient reads queries only
            head_stats = None
        elif memory != "keep":
            qkv = head_stats = None
        ctx.save_for_backward(
            xhat1, rstd1, qkv, kv, group, log_multiplicity, out, lse, *mlp, *(head_stats or ())
        )
        ctx.block, ctx.memory, ctx.class_only = block, memory, class_only
        return y, rows, attention

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_rows, _):
        block, need_x = ctx.block, ctx.needs_input_grad[0]
        saved = ctx.saved_tensors
        xhat1, rstd1, qkv, kv, group, log_multiplicity, out, lse = saved[:8]
        head_stats = saved[11:]
        with torch.autocast(dy.device.type, enabled=False):
            dy, d_out = _second_half_backward(dy, d_rows, saved[8:11], block, ctx.memory)
            if qkv is None:
                qkv, head_stats = _project(xhat1, block)
            d_qkv, d_kv = torch.ops.pae.prompt_attention_bwd(
                d_out, qkv, kv, group, 1.0, ctx.class_only, log_multiplicity, out, lse, need_x
            )
            if not need_x:
                return None, None, d_kv, None, None, None, None, None, None
            if head_stats:
                _head_norms_backward_(d_qkv, head_stats, block)
            d_xhat = d_qkv.flatten(2) @ block.w_qkv
            if ctx.class_only:
                dy = F.pad(dy, (0, 0, 0, xhat1.shape[1] - 1))
            dx, d_delta = _norm_backward(d_xhat, xhat1, rstd1, dy)
        d_delta = d_delta if ctx.needs_input_grad[1] else None
        return dx, d_delta, d_kv, None, None, None, None, None, None


class _ClassBlock(torch.autograd.Function):
    """The last block when only the class row is read: x + delta, normed (G, P, D) -> (B, 1, D).

    With one query a row's key is never needed: q.(W_k x_j + b_k) = (W_k^T q).x_j + const, and the
    constant drops out of the softmax; values are projected after the weighted sum. So no key or
    value of any row is formed, prompts included. These thin products run in at least fp32. Saved:
    xhat S, and what belongs to one row.
    """

    @staticmethod
    def forward(ctx, x, delta, normed, group, log_multiplicity, block: BlockPlan):
        batch, heads, d = x.shape[0], block.num_heads, block.head_width
        w_q, w_k, w_v = block.w_qkv.view(3, heads, d, -1).unbind(0)
        b_q, _, b_v = block.b_qkv.view(3, heads * d).unbind(0)
        dtype = w_q.dtype
        x, xhat, rstd = _sum_and_norm(x, delta, block.eps1, dtype)
        wide = rstd.dtype
        q = F.linear(xhat[:, 0], w_q.flatten(0, 1), b_q)
        qk = _per_head(q.view(batch, heads, d), w_k).to(wide)  # (B, H, D)

        prompts = take_groups(normed, group, batch).to(wide)
        scores = torch.cat(
            [qk @ prompts.transpose(1, 2), qk @ xhat.to(wide).transpose(1, 2)], dim=2
        )
        count = normed.shape[1]
        if log_multiplicity is not None:
            scores[..., :count] += take_groups(log_multiplicity, group, batch)[:, None].to(wide)
        probs = scores.softmax(dim=-1)  # (B, H, P + N)
        mixed = probs[..., :count] @ prompts + probs[..., count:] @ xhat.to(wide)  # (B, H, D)
        out = _per_head(mixed.to(dtype), w_v.transpose(1, 2)).flatten(1) + b_v
        y, rows, mlp = _second_half(x[:, :1], out[:, None], block, "keep")
        ctx.save_for_backward(xhat, rstd, normed, group, probs, qk, *mlp)
        ctx.block = block
        return _sum(y, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        block = ctx.block
        xhat, rstd, normed, group, probs, qk, *mlp = ctx.saved_tensors
        batch, heads, d = len(xhat), block.num_heads, block.head_width
        w_q, w_k, w_v = block.w_qkv.view(3, heads, d, -1).unbind(0)
        dtype, wide, count = w_q.dtype, rstd.dtype, normed.shape[1]
        with torch.autocast(dy.device.type, enabled=False):
            dy, d_out = _second_half_backward(dy, dy.to(dtype), mlp, block, "keep")
            d_out = d_out.view(batch, heads, d)
            d_mixed = _per_head(d_out, w_v).to(wide)  # (B, H, D)
            prompts, rows = take_groups(normed, group, batch).to(wide), xhat.to(wide)
            d_probs = torch.cat(
                [d_mixed @ prompts.transpose(1, 2), d_mixed @ rows.transpose(1, 2)], dim=2
            )
            d_scores = probs * (d_probs - (probs * d_probs).sum(-1, keepdim=True))
            # a key row is read twice, by the scores (through qk) and by the weighted sum (through
            # d_mixed)
            reads = torch.cat([probs, d_scores], dim=1).transpose(1, 2)  # (B, P + N, 2H)
            sources = torch.cat([d_mixed, qk], dim=1)  # (B, 2H, D)
            d_normed = None
            if ctx.needs_input_grad[2]:
                d_normed = sum_groups(reads[:, :count] @ sources, group, len(normed)).to(
                    normed.dtype
                )
            if not ctx.needs_input_grad[0]:
                return None, None, d_normed, None, None, None
            d_xhat = reads[:, count:] @ sources
            d_qk = (d_scores[..., :count] @ prompts + d_scores[..., count:] @ rows).to(dtype)
            d_q = _per_head(d_qk, w_k.transpose(1, 2)).flatten(1)
            d_xhat[:, 0] += d_q @ w_q.flatten(0, 1)
            dy = F.pad(dy, (0, 0, 0, xhat.shape[1] - 1))
            dx, d_delta = _norm_backward(d_xhat, xhat, rstd, dy)
        d_delta = d_delta if ctx.needs_input_grad[1] else None
        return dx, d_delta, d_normed, None, None, None


def _per_head(rows: Tensor, weight: Tensor) -> Tensor:
    """(B, H, a) times (H, a, b) per head -> (B, H, b)."""
    return torch.bmm(rows.transpose(0, 1), weight).transpose(0, 1)


def _project(xhat: Tensor, block: BlockPlan) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Packed (B, N, 3, H, d) of normalised rows, and what the per-head norms' backward needs."""
    qkv = F.linear(xhat, block.w_qkv, block.b_qkv)
    qkv = qkv.view(*xhat.shape[:2], 3, block.num_heads, block.head_width)
    if block.q_norm is None and block.k_norm is None:
        return qkv, None
    stats = ()
    for slot, norm in enumerate((block.q_norm, block.k_norm)):
        if norm is not None:
            hat, rstd = pointwise.layer_norm(qkv[:, :, slot], norm.eps)
            qkv[:, :, slot] = torch.addcmul(norm.bias, hat, norm.weight)
            stats += (hat, rstd)
    return qkv, stats


def _head_norms_backward_(d_qkv: Tensor, stats: tuple[Tensor, ...], block: BlockPlan) -> None:
    """In place: gradients of normalised queries and keys to those of the product's output."""
    stats = list(stats)
    for slot, norm in enumerate((block.q_norm, block.k_norm)):
        if isinstance(norm, HeadNorm):
            hat, rstd = stats.pop(0), stats.pop(0)
            d_qkv[:, :, slot] = pointwise.layer_norm_backward(
                d_qkv[:, :, slot] * norm.weight, hat, rstd
            )


def _sums_apart(x: Tensor, rows: Tensor) -> bool:
    """Whether a product's rows are added to the residual stream by the norm behind it.

    They are when the dtypes differ, and in 16 bits, where a product that accumulates on x + b
    rounds x twice. Otherwise x + b is the product's accumulator, and the sum costs no pass.
    """
    return x.dtype != rows.dtype or x.dtype.itemsize < 4


def _sum_and_norm(
    x: Tensor, delta: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta, its normalised rows in `dtype`, 1/std."""
    if delta is None:
        return x, *pointwise.layer_norm(x, eps, dtype)
    return pointwise.add_layer_norm(x, delta, eps, dtype)


def _norm_backward(d_xhat: Tensor, xhat: Tensor, rstd: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the stream before a norm, dy's included: in dy's dtype, and in the product's."""
    if dy.dtype == xhat.dtype:
        dx = pointwise.layer_norm_backward(d_xhat, xhat, rstd, dy, dtype=dy.dtype)
        return dx, dx
    return pointwise.layer_norm_backward(d_xhat, xhat, rstd, dy, dtype=dy.dtype, narrow=xhat.dtype)


def _second_half(
    x: Tensor, out: Tensor, block: BlockPlan, memory: str
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """From attention's output to the block's: projection, second norm, MLP.

    Returns:
        The residual stream; the rows that fc2 has yet to add to it, or None when it has; and for
        the backward (xhat, rstd, hidden or its coded derivative or None).
    """
    if apart := _sums_apart(x, out):
        rows = F.linear(out, block.w_proj, block.b_proj)
        y, xhat, rstd = pointwise.add_layer_norm(x, rows, block.eps2, block.w_fc1.dtype)
    else:
        y = x + block.b_proj
        _add_product_(y, out, block.w_proj)
        xhat, rstd = pointwise.layer_norm(y, block.eps2, block.w_fc1.dtype)
    hidden = F.linear(xhat, block.w_fc1, block.b_fc1)
    rows, code = pointwise.activation(hidden, block.activation, code=memory == "recompute8")
    kept = {"keep": hidden, "recompute8": code, "recompute": None}[memory]
    if apart:
        return y, F.linear(rows, block.w_fc2, block.b_fc2), (xhat, rstd, kept)
    _add_product_(y.add_(block.b_fc2), rows, block.w_fc2)
    return y, None, (xhat, rstd, kept)


def _add_product_(y: Tensor, rows: Tensor, weight: Tensor) -> None:
    """y += rows weight^T in place. By `out=`: PyTorch's FLOP counter does not know `addmm_`."""
    flat = y.view(-1, y.shape[-1])
    torch.addmm(flat, rows.flatten(0, -2), weight.t(), out=flat)


def _second_half_backward(
    dy: Tensor, d_rows: Tensor | None, saved, block: BlockPlan, memory: str
) -> tuple[Tensor, Tensor]:
    """Gradients of the residual stream before the second norm, and of attention's output.

    d_rows is the gradient of fc2's rows, which is dy in the product's dtype; None when it is dy.
    """
    xhat, rstd, kept = saved
    if memory == "recompute":
        kept = F.linear(xhat, block.w_fc1, block.b_fc1)
    d = (dy if d_rows is None else d_rows) @ block.w_fc2
    d = pointwise.activation_backward(d, kept, block.activation) @ block.w_fc1
    dy, narrow = _norm_backward(d, xhat, rstd, dy)
    return dy, narrow @ block.w_proj
