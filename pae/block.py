"""A frozen block, forward and backward, on the folded weights of a `BlockPlan`.

The one home of its formula. Its forward is two halves,

    attention_half   rows -> normalised rows -> queries, keys, values -> attention's output
    mlp_half         projection, second norm, fc1, activation or gate, fc2, both sums

each of which also returns what a backward needs of it. `FrozenBlock` and `ClassBlock` are the two
autograd Functions over them; `forward` keeps nothing. Where a family changes what the projection
gives (`attention_bypass`), they stop behind it, and `MLPBlock` is the rest. How products, sums,
activation and attention are run is a `Steps`, which a caller that needs no gradient may replace.

Weights have no gradient; what of the backbone is trained are vectors (`BlockPlan.trained`), whose
gradients are sums over all rows of what the backward forms anyway.

The residual stream and its gradient keep the dtype of the embedding; products run in the plan's
dtype; norms and softmax in at least fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pae_kernels import pointwise, product
from pae_kernels.attention import class_attention, windows
from pae_kernels.attention.reference import sum_groups, take_groups
from pae_kernels.precision import exact_matmul

from .backbones.windows import Windows
from .plan import BlockPlan, HeadNorm, PlainNorm

MEMORY_MODES = ("keep", "recompute8", "recompute", "packed")
_KEPT = {"keep": "hidden", "recompute8": "code", "recompute": "nothing"}  # of fc1's rows


class Stream(NamedTuple):
    """The residual stream between two blocks.

    Attributes:
        rows: (B, N, D).
        pending: what the product before has yet to add to them, or None when it has; the next
            norm adds it in its own pass (`_adds_apart`).
        attention: (B, H, N) of the block before, of the class row on the image rows, where it was
            asked for. Without gradient.
    """

    rows: Tensor
    pending: Tensor | None = None
    attention: Tensor | None = None

    def sum(self) -> Tensor:
        """(B, N, D), nothing pending."""
        return _sum(self.rows, self.pending)


class Keys(NamedTuple):
    """Prompt keys and values of a block.

    Attributes:
        kv: (G, P, 2, H, d).
        group: (B,) int64, which of G sets each sample has, or None.
        log_multiplicity: (G, P), log of how often each key stands there, or None.
    """

    kv: Tensor
    group: Tensor | None = None
    log_multiplicity: Tensor | None = None


class Steps:
    """How the steps of a block's forward are run: here so that a backward may follow.

    Attributes:
        overwrites: whether the rows of the stream that comes in may be written to.
    """

    overwrites: bool = False

    def product(self, rows: Tensor, block: BlockPlan, name: str) -> Tensor:
        """rows W^T + b of "qkv", "proj", "fc1" or "fc2"."""
        weight, bias = block.product(name)
        if block.packs is not None and block.packs.fits(rows, weight):
            return block.packs.linear(rows, name, weight, bias)
        return _linear(rows, weight, bias)

    def add(
        self, x: Tensor, rows: Tensor, block: BlockPlan, name: str, overwrite: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x and rows W^T + b, apart or as (their sum, None); `overwrite`: x may be written to."""
        weight, bias = block.product(name)
        packed = block.packs is not None and block.packs.fits(rows, weight)
        if packed or _adds_apart(x, rows):
            return x, self.product(rows, block, name)
        # PyTorch 2.11, compiling, loses the gradient of a Function's result that an operation gave
        # back as it came
        overwrite = overwrite and not torch.compiler.is_compiling()
        y = x.add_(bias) if overwrite else x + bias
        # by `out=`, because PyTorch's FLOP counter does not know `addmm_`
        flat = y.view(-1, y.shape[-1])
        torch.addmm(flat, rows.flatten(0, -2), weight.t(), out=flat)
        return y, None

    def activation(self, hidden: Tensor, kind: str, code: bool) -> tuple[Tensor, Tensor | None]:
        """act(hidden), and with `code` its derivative in 8 bits."""
        return pointwise.activation(hidden, kind, code=code)

    def hidden(self, xhat: Tensor, block: BlockPlan, memory: str) -> tuple[Tensor, Tensor | None]:
        """What fc2 reads, of normalised rows, and what the memory mode keeps of fc1's.

        Eight bits of a derivative are not enough for the backward of a gate or of a norm: there
        "recompute8" is "recompute".
        """
        plain = not block.gated and block.norm_hidden is None
        if plain and product.wanted(xhat.device.type, xhat.dtype):
            return product.product_activation(
                xhat, *block.product("fc1"), block.activation, _KEPT[memory]
            )
        hidden, code = self.product(xhat, block, "fc1"), None
        kept = hidden if memory == "keep" else None
        norm = block.norm_hidden
        if block.gated and norm is not None:
            return pointwise.gated_norm(hidden, block.activation, *norm), kept
        if block.gated:
            return pointwise.gated(hidden, block.activation), kept
        coded = plain and memory == "recompute8"
        rows, code = self.activation(hidden, block.activation, coded)
        if norm is not None:
            rows, _ = _norm(rows, norm)
        return rows, kept if code is None else code

    def attention(
        self,
        xhat: Tensor,
        qkv: Tensor,
        keys: Keys,
        class_only: bool,
        bias: Tensor | None,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(B, N or 1, H d) and log-sum-exp (B, H, N or 1) of attention over prompts and rows, with
        `bias` (H or 1, N, N) added to the logits of rows; causal: over none behind each.
        """
        return torch.ops.pae.prompt_attention_fwd(
            qkv, keys.kv, keys.group, 1.0, class_only, keys.log_multiplicity, bias, None, causal
        )


AS_A_BACKWARD_NEEDS = Steps()


class AttentionKept(NamedTuple):
    """What `attention_half` knows: normalised rows and 1/std, packed q, k, v, log-sum-exp, and the
    same two of the per-head norms.
    """

    xhat: Tensor
    rstd: Tensor
    qkv: Tensor
    lse: Tensor
    head_norms: HeadNorms


class HeadNorms(NamedTuple):
    """Normalised queries and keys before their affine, and 1/std; None where there is no norm."""

    q_hat: Tensor | None = None
    q_rstd: Tensor | None = None
    k_hat: Tensor | None = None
    k_rstd: Tensor | None = None


class MLPKept(NamedTuple):
    """What `mlp_half` knows: normalised rows, 1/std (none in a parallel block, whose rows are those
    of `AttentionKept`), and of the hidden rows what the memory mode keeps: themselves, the
    activation's derivative in 8 bits, or None; and the same two of norms behind the products.
    """

    xhat: Tensor
    rstd: Tensor
    hidden: Tensor | None
    hat1: Tensor | None = None
    rstd1: Tensor | None = None
    hat2: Tensor | None = None
    rstd2: Tensor | None = None


NO_MLP = MLPKept(cast(Any, None), cast(Any, None), None)


def attention_half(
    block: BlockPlan,
    stream: Stream,
    keys: Keys,
    class_only: bool = False,
    steps: Steps = AS_A_BACKWARD_NEEDS,
) -> tuple[Tensor, Tensor, AttentionKept]:
    """The stream's rows (B, N, D), attention's output (B, N, H d), and what was on the way.

    With `class_only`, the rows of the class token alone: N is 1 in both.
    """
    x, xhat, rstd = _sum_and_norm(stream.rows, stream.pending, block.norm1, block.w_qkv.dtype)
    qkv, head_norms = project(block, xhat, steps)
    if block.windows is None:
        bias = _placed(block, x)
        out, lse = steps.attention(xhat, qkv, keys, class_only, bias, block.causal)
    else:
        out, lse = windows.forward(qkv, keys.kv, keys.group, *_cut(block.windows))
    kept = AttentionKept(xhat, rstd, qkv, lse, head_norms)
    return x[:, :1] if class_only else x, out, kept


def mlp_half(
    block: BlockPlan,
    x: Tensor,
    out: Tensor,
    memory: str = "keep",
    steps: Steps = AS_A_BACKWARD_NEEDS,
    entered: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, MLPKept]:
    """From attention's output to the block's: rows, what is pending, and what was on the way.

    Args:
        entered: the normalised rows that `attention_half` made, or the class's alone; read where
            the block is parallel.
    """
    out, _ = _before_proj(block, out)
    x, pending, post1 = _add(steps, x, out, block, "proj", block.post1, steps.overwrites)
    return _mlp(block, x, pending, post1, memory, steps, entered)


def _mlp(
    block: BlockPlan,
    x: Tensor,
    pending: Tensor | None,
    post1: tuple[Tensor | None, Tensor | None],
    memory: str,
    steps: Steps,
    entered: Tensor | None,
) -> tuple[Tensor, Tensor | None, MLPKept]:
    """`mlp_half` behind the projection, whose rows are pending; post1 is what their norm knows."""
    if block.parallel:
        assert entered is not None
        y, xhat, rstd = _sum(x, pending), entered, entered.new_empty(0)
    else:
        y, xhat, rstd = _sum_and_norm(x, pending, block.norm2, block.w_fc1.dtype)
    rows, hidden = steps.hidden(_before_fc1(block, xhat)[0], block, memory)
    y, pending, post2 = _add(steps, y, rows, block, "fc2", block.post2, True)
    return y, pending, MLPKept(xhat, rstd, hidden, *post1, *post2)


def _add(
    steps: Steps,
    x: Tensor,
    rows: Tensor,
    block: BlockPlan,
    name: str,
    post: HeadNorm | None,
    overwrite: bool,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, Tensor | None]]:
    """As `Steps.add`, with what a norm of the product's rows knows: normalised rows and 1/std."""
    if post is None:
        return *steps.add(x, rows, block, name, overwrite), (None, None)
    return x, *_behind(post, steps.product(rows, block, name))


def _behind(
    post: HeadNorm | None, rows: Tensor
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """A product's rows behind their norm, and what that knows."""
    if post is None:
        return rows, (None, None)
    hat, rstd = _norm(rows, post.plain)
    return torch.addcmul(post.bias, hat, post.weight), (hat, rstd)


def _up_to_proj(
    block: BlockPlan, x: Tensor, xhat: Tensor, out: Tensor, given: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a Function that stops there hands on: the stream's rows, the normalised rows, and what
    the projection gives. `given`: the rows that it was called with, which it does not hand back as
    they came; None where x and xhat are one row of each image.
    """
    y = AS_A_BACKWARD_NEEDS.product(_before_proj(block, out)[0], block, "proj")
    if given is None:
        return x.clone(), xhat.clone(), y
    return x.clone() if x is given else x, xhat, y


def _read_twice(block: BlockPlan, xhat: Tensor, class_only: bool) -> Tensor | None:
    """What attention's rows are to the MLP of a parallel block."""
    if not block.parallel:
        return None
    return xhat[:, :1].contiguous() if class_only else xhat


def _before_proj(block: BlockPlan, out: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """What w_proj reads of attention's output; the rows that a norm behind it gives, and 1/std."""
    if block.norm_out is None:
        return out, None
    if block.difference is not None:
        a, b = out.unflatten(-1, (block.num_heads // 4, 2, -1)).unbind(-2)
        out = a - block.difference.to(b.dtype) * b
    hat, rstd = _norm(out, block.norm_out)
    return hat if block.difference is None else hat.flatten(-2), (hat, rstd)


def _before_proj_backward(block: BlockPlan, d: Tensor, out: Tensor | None) -> Tensor:
    """The gradient of attention's output, `out`, which is read where a norm stands behind it."""
    if block.norm_out is None or out is None:
        return d
    _, known = _before_proj(block, out)
    assert known is not None
    d = _plain_norm_backward(block.norm_out, d.view(known[0].shape), *known)
    if block.difference is None:
        return d
    return torch.stack([d, -block.difference.to(d.dtype) * d], dim=-2).flatten(-3)


def _before_fc1(block: BlockPlan, xhat: Tensor) -> tuple[Tensor, Tensor | None]:
    """What fc1 reads of the rows that the second norm gives, or the only one of a parallel block;
    1/std of a third norm behind it.
    """
    if block.affine2 is None:
        return scaled(xhat, block.gain1 if block.parallel else block.gain2), None
    affine = block.affine2
    return _norm(torch.addcmul(affine.bias, xhat, affine.weight), affine.plain)


def forward(
    block: BlockPlan, stream: Stream, keys: Keys | None = None, steps: Steps = AS_A_BACKWARD_NEEDS
) -> Stream:
    """The forward alone, nothing kept; without `keys` there are no prompts."""
    keys = no_keys(block) if keys is None else keys
    x, out, kept = attention_half(block, stream, keys, steps=steps)
    return Stream(*mlp_half(block, x, out, "recompute", steps, kept.xhat)[:2])


# ---- rows to queries, keys and values


def normalise(rows: Tensor, norm: PlainNorm | None, dtype: torch.dtype) -> Tensor:
    """Prompt rows, normalised without affine, in at least fp32 and with the exact eps: they may be
    near zero.
    """
    if norm is None:
        return rows.to(dtype)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    function = F.rms_norm if norm.rms else F.layer_norm
    return function(wide, wide.shape[-1:], eps=norm.eps).to(dtype)


def _placed(block: BlockPlan, rows: Tensor) -> Tensor | None:
    """(H or 1, N, N), what places of rows (B, N, ...) add to the logits."""
    return None if block.bias is None else block.bias.bias_of(rows.shape[1])


def _cut(w: Windows) -> tuple[Tensor, Tensor | None, int, bool]:
    """What attention in windows is given of them."""
    return cast(Tensor, w.bias), w.mask, w.count, w.mixes


def _of_heads(rows: Tensor, norm: HeadNorm) -> Tensor:
    """Queries or keys (..., d), normalised per head."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    exact = normalise(rows, norm.plain, wide)
    return torch.addcmul(norm.bias.to(wide), exact, norm.weight.to(wide)).to(rows.dtype)


def project(
    block: BlockPlan, xhat: Tensor, steps: Steps = AS_A_BACKWARD_NEEDS
) -> tuple[Tensor, HeadNorms]:
    """Packed (B, N, 3, H, d) of normalised rows, per-head norms and rotation done."""
    qkv = steps.product(scaled(xhat, block.gain1), block, "qkv")
    qkv = qkv.view(*xhat.shape[:2], 3, block.num_heads, block.head_width)
    norms, stats = (block.q_norm, block.k_norm), HeadNorms()
    if norms != (None, None):
        found: list[Tensor | None] = []
        for slot, norm in enumerate(norms):
            rows, *known = _placed_heads(qkv[:, :, slot], norm, block.rotation)
            qkv[:, :, slot] = rows
            found += known
        stats = HeadNorms(*found)
    elif block.rotation is not None:
        pointwise.rotate_(qkv, block.rotation)
    if block.padding is not None:
        qkv[:, block.padding] = cast(Tensor, block.fill).view(qkv.shape[2:])
    return qkv, stats


def _placed_heads(
    rows: Tensor, norm: HeadNorm | None, rotation: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Queries or keys (B, N, H, d), normalised per head and rotated, in at least fp32 where there
    is a norm: they are rounded once. In their dtype the rows before the affine, and 1/std.
    """
    hat = rstd = None
    if norm is not None:
        wide = torch.promote_types(rows.dtype, torch.float32)
        exact, rstd = pointwise.layer_norm(rows, norm.plain.eps, wide, norm.plain.rms)
        hat = exact.to(rows.dtype)
        rows = torch.addcmul(norm.bias.to(wide), exact, norm.weight.to(wide))
    if rotation is not None:
        rows = rows.contiguous()
        pointwise.rotate_(rows[:, :, None], rotation)
    return rows, hat, rstd


def keys_values(block: BlockPlan, normed: Tensor) -> Tensor:
    """Prompt keys and values (G, P, 2, H, d) of normalised prompt rows (G, P, D)."""
    kv = F.linear(scaled(normed, block.gain1), block.w_kv, block.b_kv)
    kv = kv.view(*normed.shape[:2], 2, block.num_heads, block.head_width)
    if block.k_norm is None:
        return kv
    return torch.stack([_of_heads(kv[:, :, 0], block.k_norm), kv[:, :, 1]], dim=2)


def no_keys(block: BlockPlan) -> Keys:
    """Of a block without prompts."""
    return Keys(block.b_kv.view(1, 1, 2, block.num_heads, block.head_width)[:, :0])


def queries(block: BlockPlan, x: Tensor) -> Tensor:
    """(B, N, H, d): queries of rows x (B, N, D), per-head norm and rotation done, scaled as the
    logits are.
    """
    if block.rotation is not None:
        return project(block, normalise(x, block.norm1, block.w_qkv.dtype))[0][:, :, 0]
    q = _query_product(block, x).unflatten(-1, (block.num_heads, block.head_width))
    return q if block.q_norm is None else _of_heads(q, block.q_norm)


def class_query(block: BlockPlan, x: Tensor) -> Tensor:
    """(B, H d): the query of row 0 of x (B, N, D) before any per-head norm, the logit scale taken
    out again.
    """
    q = _query_product(block, x[:, 0])
    if block.order is not None:
        q = q.unflatten(-1, (block.num_heads, -1))[..., block.order.argsort()].flatten(-2)
    return q / block.scale if block.q_norm is None else q


def given_keys(block: BlockPlan, head_kv: Tensor) -> Tensor:
    """Keys and values in head space (G, P, 2, H, d), the keys' entries as the block has them."""
    if block.order is None:
        return head_kv
    k, v = head_kv.unbind(2)
    return torch.stack([k[..., block.order], v], dim=2)


def _query_product(block: BlockPlan, x: Tensor) -> Tensor:
    own = block.num_heads * block.head_width
    xhat = scaled(normalise(x, block.norm1, block.w_qkv.dtype), block.gain1)
    return F.linear(xhat, block.w_qkv[:own], block.b_qkv[:own])


# ---- with a backward


# whether a gradient stands for several: `torch.autograd.grad(is_grads_batched=True)`
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse `create_graph=True` where it is asked for.

    PyTorch's decorator of this name raises only where the second backward comes by the node that it
    leaves; `torch.autograd.grad` takes the ways that lead to its inputs, and this is none.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *d_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fast_forward has no second derivatives (create_graph=True): use "
                'engine="reference", under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), as '
                "PyTorch's fused attention has none either"
            )
        compiling = torch.compiler.is_compiling()
        if not compiling and any(_is_batched(d) for d in d_outputs if d is not None):
            raise RuntimeError(
                "fast_forward has no backward of several gradients at once (is_grads_batched=True, "
                'vectorize=True): use engine="reference", or ask for one after the other'
            )
        return backward(ctx, *d_outputs)

    return once


Own = TypeVar("Own", bound=tuple)


def _saved(kind: type[Own], tensors: tuple[Tensor, ...]) -> tuple[Own, MLPKept]:
    """What a forward keeps of its own, and behind it what `mlp_half` left."""
    made: Any = kind
    own = len(made._fields)
    return made(*tensors[:own]), MLPKept(*tensors[own:])


class _Kept(NamedTuple):
    """What a `FrozenBlock` keeps before its MLP; None where the backward reads nothing, or computes
    it again.

    In elements of one image (S = N D): xhat1 S, qkv 3 S, out S, xhat2 S, hidden 4 S or its coded
    derivative (4 S bytes); 1/std and log-sum-exp are small. Where only kv needs a gradient of what
    stands before attention, xhat1, keys and values of the rows are not kept.
    """

    kv: Tensor
    group: Tensor | None
    log_multiplicity: Tensor | None
    xhat1: Tensor | None
    rstd1: Tensor | None
    qkv: Tensor | None
    q_hat: Tensor | None
    q_rstd: Tensor | None
    k_hat: Tensor | None
    k_rstd: Tensor | None
    out: Tensor
    lse: Tensor


class FrozenBlock(torch.autograd.Function):
    """One frozen block: x + pending (B, N, D), kv (G, P, 2, H, d) -> the fields of a `Stream`.

    The gradient of `pending` is that of x, in the dtype that the product before reads. With
    `class_only` the outputs are (B, 1, D). `trained` are `block.vectors()`, given apart for their
    gradients. With `stops` it is the part before `MLPBlock`, and gives (x + pending, normalised
    rows, what the projection gives, attention).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pending: Tensor | None,
        kv: Tensor,
        group: Tensor | None,
        log_multiplicity: Tensor | None,
        block: BlockPlan,
        memory: str,
        class_only: bool,
        wants_attention: bool,
        stops: bool = False,
        *trained: Tensor,
    ) -> tuple[Tensor | None, ...]:
        keys, given = Keys(kv, group, log_multiplicity), x
        x, out, first = attention_half(block, Stream(x, pending), keys, class_only)
        xhat, rstd, qkv, head_norms = first.xhat, first.rstd, first.qkv, first.head_norms
        attention = None
        if wants_attention:
            options = {"log_multiplicity": log_multiplicity, "bias": _placed(block, qkv)}
            attention = class_attention(qkv, kv, first.lse, group, scale=1.0, **options)
            attention = attention[..., kv.shape[1] :]
            ctx.mark_non_differentiable(attention)
        made: tuple[Tensor | None, ...]
        second = NO_MLP
        if stops:
            first_rows = (x, xhat[:, :1], out) if class_only else (x, xhat, out, given)
            made = *_up_to_proj(block, *first_rows), attention
        else:
            entered = _read_twice(block, xhat, class_only)
            y, rows, second = mlp_half(block, x, out, memory, AS_A_BACKWARD_NEEDS, entered)
            made = y, rows, attention

        need_x = ctx.needs_input_grad[0]
        need_qkv = need_x or not _BEFORE_ATTENTION.isdisjoint(block.trained)
        if block.parallel and not need_x and not block.trained:
            second = second._replace(xhat=cast(Any, None), hidden=None)  # prompts reach the other
        again = need_qkv and memory != "keep"
        need_xhat = need_x or again or "gain1" in block.trained
        if not need_qkv:
            qkv = qkv[:, :, :1].contiguous()  # the prompt columns' gradient reads queries only
        ctx.save_for_backward(
            *_Kept(
                *keys,
                xhat if need_xhat else None,
                rstd if need_x else None,
                None if again else qkv,
                *(head_norms if need_qkv and not again else HeadNorms()),
                out,
                first.lse,
            ),
            *second,
        )
        ctx.block, ctx.class_only, ctx.need_qkv, ctx.stops = block, class_only, need_qkv, stops
        return made

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy: Tensor, *d_others: Any) -> tuple[Tensor | None, ...]:
        block, sums = ctx.block, _Sums(ctx.block)
        kept, second = _saved(_Kept, ctx.saved_tensors)
        qkv, head_norms = kept.qkv, HeadNorms(kept.q_hat, kept.q_rstd, kept.k_hat, kept.k_rstd)
        with torch.autocast(dy.device.type, enabled=False):
            d_first = d_entered = None
            if ctx.stops:
                d_entered, d_proj, _ = d_others
                d_out = _proj_backward(block, d_proj, d_proj, kept.out, sums)
            else:
                d_rows, _ = d_others
                dy, d_out, d_first = _mlp_half_backward(block, dy, d_rows, kept.out, second, sums)
            if qkv is None:
                qkv, head_norms = project(block, cast(Tensor, kept.xhat1))
            known = kept.out, kept.lse, ctx.need_qkv
            if block.windows is None:
                d_qkv, d_kv = torch.ops.pae.prompt_attention_bwd(
                    *(d_out, qkv, kept.kv, kept.group, 1.0, ctx.class_only),
                    *(kept.log_multiplicity, _placed(block, qkv), None, *known, block.causal),
                )
            else:
                given = qkv, kept.kv, kept.group, *_cut(block.windows)
                d_qkv, d_kv = windows.backward(d_out, *given, *known)
            dx = d_pending = None
            if ctx.need_qkv:
                if block.padding is not None:
                    sums.over_rows("fill", d_qkv[:, block.padding].flatten(2))
                    d_qkv[:, block.padding] = 0
                if block.rotation is not None:
                    pointwise.rotate_(d_qkv, block.rotation, back=True)
                _head_norms_backward_(block, d_qkv, head_norms, sums)
                d_qkv = d_qkv.flatten(2)
                sums.over_rows("b_qkv", d_qkv)
            if kept.rstd1 is not None or "gain1" in block.trained:
                xhat = cast(Tensor, kept.xhat1)
                d_xhat = _back(d_qkv, block, "qkv")
                if d_first is not None:
                    d_xhat[:, : d_first.shape[1]] += d_first
                d_xhat = sums.behind_gain("gain1", block.gain1, d_xhat, xhat)
                if d_entered is not None:
                    d_xhat[:, : d_entered.shape[1]] += d_entered
                if kept.rstd1 is not None:
                    if ctx.class_only:
                        dy = F.pad(dy, (0, 0, 0, xhat.shape[1] - 1))
                    dx, d_pending = _norm_backward(block.norm1, d_xhat, xhat, kept.rstd1, dy)
        d_pending = d_pending if ctx.needs_input_grad[1] else None
        return dx, d_pending, d_kv, *(None,) * 7, *sums.found()


class MLPBlock(torch.autograd.Function):
    """A block behind its projection: x, the stream's rows (B, N, D), and y, what is added to them
    -> rows and pending of a `Stream`. `entered`: the normalised rows that `FrozenBlock` gave, which
    a parallel block reads; None elsewhere.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        entered: Tensor | None,
        block: BlockPlan,
        memory: str,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        pending, post1 = _behind(block.post1, y)
        given = block, x, pending, post1, memory, AS_A_BACKWARD_NEEDS, entered
        rows, left, kept = _mlp(*given)
        ctx.save_for_backward(*kept)
        ctx.block = block
        return rows, left

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy: Tensor, d_rows: Tensor | None) -> tuple[Tensor | None, ...]:
        block, sums, kept = ctx.block, _Sums(ctx.block), MLPKept(*ctx.saved_tensors)
        with torch.autocast(dy.device.type, enabled=False):
            dx, narrow, d_entered = _up_to_mlp_backward(block, dy, d_rows, kept, sums)
            _, d_y = _post_backward(block, "post1", dx, narrow, kept.hat1, kept.rstd1, sums)
            if d_entered is not None:
                d_entered = sums.behind_gain("gain1", block.gain1, d_entered, kept.xhat)
        return dx, d_y, d_entered, None, None, *sums.found()


class _ClassKept(NamedTuple):
    """What a `ClassBlock` keeps before its MLP: xhat1 S elements of an image, all others belong to
    one row.

    `qk` comes before gain1; `mixed`, the weighted sum of rows, is kept for it alone, attention's
    output for a norm behind it.
    """

    normed: Tensor
    group: Tensor | None
    row: Tensor | None
    xhat1: Tensor
    rstd1: Tensor
    probs: Tensor
    qk: Tensor
    mixed: Tensor | None
    out: Tensor | None


class ClassBlock(torch.autograd.Function):
    """The last block when only the class row is read: x + pending, normalised prompt rows (G, P, D)
    -> (B, 1, D). With `row` (B,) int64 it is that row of each sequence, which in a causal block
    sees none behind it; not in a parallel one.

    With one query a row's key is never needed: q.(W_k x_j + b_k) = (W_k^T q).x_j + const, and the
    constant drops out of the softmax; values are projected after the weighted sum. So no key or
    value of any row is formed, prompts included; of a bias of places row 0 is read. These thin
    products run in at least fp32, never TF32. Only for blocks that neither rotate nor normalise
    queries and keys per head (`BlockPlan.absorbs_keys`): each row would have a W_k of its own.
    `trained` and `stops` as in `FrozenBlock`, without attention: a trained gain scales the two thin
    sides, (B, H, D), and no rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pending: Tensor | None,
        normed: Tensor,
        group: Tensor | None,
        log_multiplicity: Tensor | None,
        row: Tensor | None,
        block: BlockPlan,
        stops: bool = False,
        *trained: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        batch, heads, d = x.shape[0], block.num_heads, block.head_width
        w_q, w_k, w_v = block.w_qkv.view(3, heads, d, -1).unbind(0)
        b_q, _, b_v = block.b_qkv.view(3, heads * d).unbind(0)
        dtype = w_q.dtype
        x, xhat, rstd = _sum_and_norm(x, pending, block.norm1, dtype)
        wide = rstd.dtype
        asking = xhat[:, 0] if row is None else _rows_at(xhat, row)
        q = F.linear(scaled(asking, block.gain1), w_q.flatten(0, 1), b_q)
        own = _per_head(q.view(batch, heads, d), w_k).to(wide)  # (B, H, D)
        qk = scaled(own, block.gain1)

        prompts = take_groups(normed, group, batch).to(wide)
        parts = prompts, xhat.to(wide)
        scores = torch.cat([exact_matmul(qk, keys.transpose(1, 2)) for keys in parts], dim=2)
        count = normed.shape[1]
        if log_multiplicity is not None:
            scores[..., :count] += take_groups(log_multiplicity, group, batch)[:, None].to(wide)
        bias = _placed(block, xhat)
        if bias is not None:
            scores[..., count:] += bias[:, 0].to(wide)
        if row is not None and block.causal:
            behind = torch.arange(xhat.shape[1], device=row.device) > row[:, None]
            scores[..., count:].masked_fill_(behind[:, None], -torch.inf)
        probs = scores.softmax(dim=-1)  # (B, H, P + N)
        mixed = _of_parts(probs, *parts)  # (B, H, D)
        read = scaled(mixed, block.gain1).to(dtype)
        out = (_per_head(read, w_v.transpose(1, 2)).flatten(1) + b_v)[:, None]
        made, second = _of_class_row(block, x, xhat, out, stops, row)
        kept = mixed if "gain1" in block.trained else None, out if block.norm_out else None
        ctx.save_for_backward(normed, group, row, xhat, rstd, probs, own, *kept, *second)
        ctx.block = block
        return made

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy: Tensor, *d_others: Tensor) -> tuple[Tensor | None, ...]:
        block, sums = ctx.block, _Sums(ctx.block)
        kept, second = _saved(_ClassKept, ctx.saved_tensors)
        xhat, normed, group, probs = kept.xhat1, kept.normed, kept.group, kept.probs
        batch, heads, d = len(xhat), block.num_heads, block.head_width
        w_q, w_k, w_v = block.w_qkv.view(3, heads, d, -1).unbind(0)
        dtype, wide, count = w_q.dtype, kept.rstd1.dtype, normed.shape[1]
        with torch.autocast(dy.device.type, enabled=False):
            given = block, dy, d_others, kept.out, second, dtype, sums
            dy, d_out, d_beside, d_entered = _of_class_row_backward(*given)
            d_out = d_out.view(batch, heads, d)
            d_mixed = _per_head(d_out, w_v).to(wide)  # (B, H, D)
            d_mixed = sums.behind_gain("gain1", block.gain1, d_mixed, kept.mixed)
            qk = scaled(kept.qk, block.gain1)
            prompts, rows = take_groups(normed, group, batch).to(wide), xhat.to(wide)
            d_probs = torch.cat(
                [exact_matmul(d_mixed, keys.transpose(1, 2)) for keys in (prompts, rows)], dim=2
            )
            d_scores = probs * (d_probs - (probs * d_probs).sum(-1, keepdim=True))
            # a key row is read twice, by the scores (through qk) and by the weighted sum (through
            # d_mixed)
            reads = torch.cat([probs, d_scores], dim=1).transpose(1, 2)  # (B, P + N, 2H)
            sources = torch.cat([d_mixed, qk], dim=1)  # (B, 2H, D)
            d_normed = None
            if ctx.needs_input_grad[2]:
                d_normed = exact_matmul(reads[:, :count], sources)
                d_normed = sum_groups(d_normed, group, len(normed)).to(normed.dtype)
            need_x = ctx.needs_input_grad[0]
            if not need_x and _BEFORE_ATTENTION.isdisjoint(block.trained):
                return None, None, d_normed, *(None,) * 5, *sums.found()
            d_qk = _of_parts(d_scores, prompts, rows)
            d_qk = sums.behind_gain("gain1", block.gain1, d_qk, kept.qk).to(dtype)
            d_q = _per_head(d_qk, w_k.transpose(1, 2)).flatten(1)
            d_v = d_out.flatten(1)  # a key's bias moves all logits of a query alike: no gradient
            sums.over_rows("b_qkv", torch.cat([d_q, torch.zeros_like(d_q), d_v], dim=1))
            d_first = (d_q @ w_q.flatten(0, 1))[:, None]
            d_first = d_first if d_beside is None else d_first + d_beside
            first = xhat[:, :1] if kept.row is None else _rows_at(xhat, kept.row)[:, None]
            d_first = sums.behind_gain("gain1", block.gain1, d_first, first)
            d_first = d_first if d_entered is None else d_first + d_entered
            dx = d_pending = None
            if need_x:
                d_xhat = exact_matmul(reads[:, count:], sources)
                if kept.row is None:
                    d_xhat[:, :1] += d_first
                    dy = F.pad(dy, (0, 0, 0, xhat.shape[1] - 1))
                else:
                    at = torch.arange(batch, device=dy.device), kept.row
                    d_xhat[at] += d_first[:, 0]
                    dy = torch.zeros_like(d_xhat, dtype=dy.dtype).index_put_(at, dy[:, 0])
                dx, d_pending = _norm_backward(block.norm1, d_xhat, xhat, kept.rstd1, dy)
        d_pending = d_pending if ctx.needs_input_grad[1] else None
        return dx, d_pending, d_normed, *(None,) * 5, *sums.found()


def _rows_at(rows: Tensor, at: Tensor) -> Tensor:
    """(B, D): rows `at` (B,) of (B, N, D)."""
    return rows[torch.arange(len(rows), device=at.device), at]


class _KeyedKept(NamedTuple):
    """What a `KeyedClassBlock` keeps before its MLP: xhat1 S elements of an image, and in memory
    mode "keep" keys S, twice where they are normalised; all others belong to one row.
    """

    kv: Tensor
    group: Tensor | None
    xhat1: Tensor
    rstd1: Tensor
    probs: Tensor
    q: Tensor
    q_hat: Tensor | None
    q_rstd: Tensor | None
    k: Tensor | None
    k_hat: Tensor | None
    k_rstd: Tensor | None
    out: Tensor | None


class KeyedClassBlock(torch.autograd.Function):
    """`ClassBlock` where each row's key has a rotation or a norm of its own: x + pending,
    kv (G, P, 2, H, d) -> (B, 1, D).

    The keys of all rows are formed, the query of one; values are projected after the weighted sum
    as there, out = W_v (sum p_j x_j) + b_v sum p_j, beside those of the prompts. Of 12 N D^2 that
    queries, keys and values of the block cost forward and backward, 4 are left. Only for blocks
    without trained vectors. `stops` as in `ClassBlock`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pending: Tensor | None,
        kv: Tensor,
        group: Tensor | None,
        log_multiplicity: Tensor | None,
        block: BlockPlan,
        memory: str,
        stops: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        batch, count = len(x), kv.shape[1]
        w_q, _, w_v, b_q, _, b_v = _parts_of_heads(block)
        x, xhat, rstd = _sum_and_norm(x, pending, block.norm1, w_q.dtype)
        wide = rstd.dtype
        q = F.linear(xhat[:, 0], w_q.flatten(0, 1), b_q.flatten()).view(batch, *b_q.shape)
        q, *of_q = _placed_heads(q, block.q_norm, None)  # the class row stands before rotated ones
        k, *of_k = _keys_alone(block, xhat)
        k_p, v_p = take_groups(kv, group, batch).to(wide).unbind(2)
        scores = torch.cat([_along_width(keys, q.to(wide)) for keys in (k_p, k.to(wide))], dim=2)
        if log_multiplicity is not None:
            scores[..., :count] += take_groups(log_multiplicity, group, batch)[:, None].to(wide)
        bias = _placed(block, xhat)
        if bias is not None:
            scores[..., count:] += bias[:, 0].to(wide)
        probs = scores.softmax(dim=-1)  # (B, H, P + N)
        of_prompts, of_rows = probs[..., :count], probs[..., count:]
        mixed = exact_matmul(of_rows, xhat.to(wide))  # (B, H, D)
        out = _per_head(mixed.to(w_v.dtype), w_v.transpose(1, 2)).to(wide)
        out += of_rows.sum(-1, keepdim=True) * b_v + _along_rows(of_prompts, v_p)
        out = out.to(w_v.dtype).reshape(batch, 1, -1)
        made, second = _of_class_row(block, x, xhat, out, stops)
        keys = [k, *of_k] if memory == "keep" else [None] * 3
        kept = xhat, rstd, probs, q, *of_q, *keys, out if block.norm_out else None
        ctx.save_for_backward(kv, group, *kept, *second)
        ctx.block = block
        return made

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy: Tensor, *d_others: Tensor) -> tuple[Tensor | None, ...]:
        block, sums = ctx.block, _Sums(ctx.block)
        kept, second = _saved(_KeyedKept, ctx.saved_tensors)
        kv, group, xhat, probs = kept.kv, kept.group, kept.xhat1, kept.probs
        batch, count, wide = len(xhat), kv.shape[1], kept.rstd1.dtype
        w_q, w_k, w_v, _, _, b_v = _parts_of_heads(block)
        dtype = w_q.dtype
        with torch.autocast(dy.device.type, enabled=False):
            given = block, dy, d_others, kept.out, second, dtype, sums
            dy, d_out, *d_first = _of_class_row_backward(*given)
            d_out = d_out.view(batch, *b_v.shape)
            d_mixed = _per_head(d_out, w_v).to(wide)  # (B, H, D)
            d_out, q = d_out.to(wide), kept.q.to(wide)
            k_p, v_p = take_groups(kv, group, batch).to(wide).unbind(2)
            of_rows = exact_matmul(d_mixed, xhat.to(wide).transpose(1, 2))
            of_rows += (d_out * b_v).sum(-1, keepdim=True)
            d_probs = torch.cat([_along_width(v_p, d_out), of_rows], dim=2)
            d_scores = probs * (d_probs - (probs * d_probs).sum(-1, keepdim=True))
            d_kv = None
            if ctx.needs_input_grad[2]:
                pairs = (d_scores, q), (probs, d_out)
                both = [w[..., :count].transpose(1, 2)[..., None] * of[:, None] for w, of in pairs]
                d_kv = sum_groups(torch.stack(both, dim=2), group, len(kv)).to(kv.dtype)
            if not ctx.needs_input_grad[0]:
                return None, None, d_kv, *(None,) * 5
            k, k_hat, k_rstd = kept.k, kept.k_hat, kept.k_rstd
            if k is None:
                k, k_hat, k_rstd = _keys_alone(block, xhat)
            d_rows = d_scores[..., count:]
            d_q = _along_rows(d_rows, k.to(wide)) + _along_rows(d_scores[..., :count], k_p)
            d_q = _of_heads_backward(block.q_norm, d_q, kept.q_hat, kept.q_rstd).to(dtype)
            d_k = (d_rows.transpose(1, 2)[..., None] * q[:, None]).contiguous()
            if block.rotation is not None:
                pointwise.rotate_(d_k[:, :, None], block.rotation, back=True)
            d_k = _of_heads_backward(block.k_norm, d_k, k_hat, k_rstd).to(dtype)
            d_xhat = (d_k.flatten(2) @ w_k.flatten(0, 1)).to(wide)
            d_xhat += exact_matmul(probs[..., count:].transpose(1, 2), d_mixed)
            d_xhat[:, 0] += d_q.flatten(1) @ w_q.flatten(0, 1)
            for d in d_first:
                if d is not None:
                    d_xhat[:, :1] += d
            dy = F.pad(dy, (0, 0, 0, xhat.shape[1] - 1))
            dx, d_pending = _norm_backward(block.norm1, d_xhat, xhat, kept.rstd1, dy)
        return dx, d_pending if ctx.needs_input_grad[1] else None, d_kv, *(None,) * 5


def _of_class_row(
    block: BlockPlan,
    x: Tensor,
    xhat: Tensor,
    out: Tensor,
    stops: bool,
    row: Tensor | None = None,
) -> tuple[Tensor | tuple[Tensor, ...], MLPKept]:
    """What a Function of one row, 0 or `row` (B,), gives of attention's output (B, 1, H d) for it:
    the block's row (B, 1, D), or all three of `_up_to_proj`; and what `mlp_half` knows.
    """
    x, xhat = (r[:, :1] if row is None else _rows_at(r, row)[:, None] for r in (x, xhat))
    if stops:
        return _up_to_proj(block, x, xhat, out), NO_MLP
    entered = _read_twice(block, xhat, class_only=True)
    y, rows, kept = mlp_half(block, x, out, "keep", AS_A_BACKWARD_NEEDS, entered)
    return _sum(y, rows), kept


def _of_class_row_backward(
    block: BlockPlan,
    dy: Tensor,
    d_others: tuple[Tensor, ...],
    out: Tensor | None,
    kept: MLPKept,
    dtype: torch.dtype,
    sums: _Sums,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `_mlp_half_backward`, and that of the normalised row where it was given."""
    if d_others:
        d_entered, d_proj = d_others
        return dy, _proj_backward(block, d_proj, d_proj, out, sums), None, d_entered
    return *_mlp_half_backward(block, dy, dy.to(dtype), out, kept, sums), None


def _parts_of_heads(block: BlockPlan) -> tuple[Tensor, ...]:
    """Weights (H, d, D) and biases (H, d) of queries, keys and values."""
    heads, width = block.num_heads, block.head_width
    weights = block.w_qkv.view(3, heads, width, -1)
    return *weights.unbind(0), *block.b_qkv.view(3, heads, width).unbind(0)


def _keys_alone(block: BlockPlan, xhat: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Keys (B, N, H, d) of normalised rows, norm and rotation done; what the norm knows."""
    own = block.num_heads * block.head_width
    k = _linear(xhat, block.w_qkv[own : 2 * own], block.b_qkv[own : 2 * own])
    k = k.view(*xhat.shape[:2], block.num_heads, -1)
    k, hat, rstd = _placed_heads(k, block.k_norm, block.rotation)
    return k.to(xhat.dtype), hat, rstd


def _of_heads_backward(
    norm: HeadNorm | None, d: Tensor, hat: Tensor | None, rstd: Tensor | None
) -> Tensor:
    """The gradient of what a norm per head was given, in the dtype of its normalised rows."""
    if norm is None or hat is None or rstd is None:
        return d
    d_hat = d.to(rstd.dtype) * norm.weight
    made = pointwise.layer_norm_backward(d_hat, hat, rstd, dtype=hat.dtype, rms=norm.plain.rms)
    return cast(Tensor, made)


def _along_width(rows: Tensor, one: Tensor) -> Tensor:
    """(B, H, n): rows (B, n, H, d) times one (B, H, d)."""
    return (rows * one[:, None]).sum(-1).transpose(1, 2)


def _along_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """(B, H, d): rows (B, n, H, d) with weights (B, H, n)."""
    return (weights.transpose(1, 2)[..., None] * rows).sum(1)


# whose gradient needs that of queries, keys and values
_BEFORE_ATTENTION = frozenset(
    ("gain1", "b_qkv", "q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")
)


class _Sums:
    """Gradients of the trained vectors of a block, summed as its backward goes.

    On a CPU sums over rows are products with a row of ones, three to nine times as fast as `sum`.
    """

    def __init__(self, block: BlockPlan) -> None:
        self._names = block.trained
        self._sums: dict[str, Tensor] = {}

    def over_rows(self, name: str, d: Tensor) -> None:
        """Of a bias that was added to all rows, whose gradient is d (B, N, ..., n)."""
        if name in self._names:
            rows = d.flatten(0, -2)
            if rows.device.type == "cpu":
                total = exact_matmul(rows.new_ones(1, len(rows)), rows)[0]
            else:
                total = rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def over_products(self, name: str, d: Tensor, xhat: Tensor | None) -> None:
        """Of a gain, where d is the gradient of gain * xhat."""
        if name in self._names and xhat is not None:
            self.over_rows(name, d.to(torch.promote_types(d.dtype, torch.float32)) * xhat)

    def over_affine(self, name: str, d: Tensor, xhat: Tensor) -> None:
        """Of a `HeadNorm`, where d is the gradient of weight * xhat + bias."""
        self.over_rows(f"{name}.bias", d)
        self.over_products(f"{name}.weight", d, xhat)

    def behind_gain(self, name: str, gain: Tensor | None, d: Tensor, xhat: Tensor | None) -> Tensor:
        """The gradient of xhat: d, that of gain * xhat, is written to."""
        self.over_products(name, d, xhat)
        return d if gain is None else d.mul_(gain)

    def found(self) -> list[Tensor | None]:
        """In the order of `BlockPlan.trained`."""
        return [self._sums.get(name) for name in self._names]


def _mlp_half_backward(
    block: BlockPlan,
    dy: Tensor,
    d_rows: Tensor | None,
    out: Tensor | None,
    kept: MLPKept,
    sums: _Sums,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the residual stream before the second norm, of attention's output, and of what
    fc1 reads in a parallel block, before its gain.

    d_rows is the gradient of fc2's rows, which is dy in the product's dtype; None when it is dy.
    out, attention's output, is read where a norm stands behind it. The norms inside are computed
    again: a pass each, where kept rows would be S or 4 S elements.
    """
    dy, narrow, beside = _up_to_mlp_backward(block, dy, d_rows, kept, sums)
    d_added, narrow = _post_backward(block, "post1", dy, narrow, kept.hat1, kept.rstd1, sums)
    return dy, _proj_backward(block, d_added, narrow, out, sums), beside


def _up_to_mlp_backward(
    block: BlockPlan, dy: Tensor, d_rows: Tensor | None, kept: MLPKept, sums: _Sums
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the residual stream before the second norm, of what was added to it there, in
    the product's dtype, and of what fc1 reads in a parallel block, before its gain.
    """
    d = dy if d_rows is None else d_rows
    if block.parallel:
        return dy, d, None if kept.xhat is None else _mlp_backward(block, dy, d, kept, sums)
    d = sums.behind_gain("gain2", block.gain2, _mlp_backward(block, dy, d, kept, sums), kept.xhat)
    return *_norm_backward(block.norm2, d, kept.xhat, kept.rstd, dy), None


def _proj_backward(
    block: BlockPlan, d_added: Tensor, narrow: Tensor, out: Tensor | None, sums: _Sums
) -> Tensor:
    """The gradient of attention's output, of that of the projection's rows: exact, and in the
    product's dtype.
    """
    sums.over_rows("b_proj", d_added)
    return _before_proj_backward(block, _back(narrow, block, "proj"), out)


def _mlp_backward(block: BlockPlan, dy: Tensor, d: Tensor, kept: MLPKept, sums: _Sums) -> Tensor:
    """The gradient of what fc1 reads, before its gain; dy and d as in `_post_backward`."""
    hidden = kept.hidden
    again = rstd = None
    if hidden is None or block.affine2 is not None:
        again, rstd = _before_fc1(block, kept.xhat)
    if hidden is None:
        hidden = AS_A_BACKWARD_NEEDS.product(cast(Tensor, again), block, "fc1")
    d_added, d = _post_backward(block, "post2", dy, d, kept.hat2, kept.rstd2, sums)
    sums.over_rows("b_fc2", d_added)
    kind, norm = block.activation, block.norm_hidden
    if norm is None and not block.gated and product.wanted(d.device.type, d.dtype):
        d = product.product_activation_backward(d, block.w_fc2, hidden, kind)
    else:
        d = _back(d, block, "fc2")
        if block.gated and norm is not None:
            d = pointwise.gated_norm_backward(d, hidden, kind, *norm)
        elif block.gated:
            d = pointwise.gated_backward(d, hidden, kind)
        else:
            if norm is not None:
                rows, _ = pointwise.activation(hidden, kind)
                d = _plain_norm_backward(norm, d, *_norm(rows, norm))
            d = pointwise.activation_backward(d, hidden, kind)
    sums.over_rows("b_fc1", d)
    d = _back(d, block, "fc1")
    if block.affine2 is not None and again is not None and rstd is not None:
        d = _plain_norm_backward(block.affine2.plain, d, again, rstd)
        sums.over_affine("affine2", d, kept.xhat)
        d = d.mul_(block.affine2.weight)
    return d


def _post_backward(
    block: BlockPlan,
    name: str,
    dy: Tensor,
    d: Tensor,
    hat: Tensor | None,
    rstd: Tensor | None,
    sums: _Sums,
) -> tuple[Tensor, Tensor]:
    """The gradient of a product's rows, exact and in the product's dtype: dy and d, those of what
    is added to the stream, go back through a norm between both.
    """
    post: HeadNorm | None = getattr(block, name)
    if post is None or hat is None or rstd is None:
        return dy, d
    sums.over_affine(name, d, hat)
    d = _plain_norm_backward(post.plain, d * post.weight, hat, rstd)
    return d, d


def _head_norms_backward_(block: BlockPlan, d_qkv: Tensor, kept: HeadNorms, sums: _Sums) -> None:
    """In place: gradients of normalised queries and keys to those of the product's output."""
    parts = (
        ("q_norm", block.q_norm, kept.q_hat, kept.q_rstd),
        ("k_norm", block.k_norm, kept.k_hat, kept.k_rstd),
    )
    for slot, (name, norm, hat, rstd) in enumerate(parts):
        if norm is not None and hat is not None and rstd is not None:
            d = d_qkv[:, :, slot]
            sums.over_affine(name, d, hat)
            d_qkv[:, :, slot] = _of_heads_backward(norm, d, hat, rstd)


def _norm_backward(
    norm: PlainNorm | None, d_xhat: Tensor, xhat: Tensor, rstd: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the stream before a norm, dy's included: in dy's dtype, and in the product's."""
    if norm is None:
        dx = dy + d_xhat.to(dy.dtype)
        return dx, dx.to(xhat.dtype)
    narrow = None if dy.dtype == xhat.dtype else xhat.dtype
    made = pointwise.layer_norm_backward(
        d_xhat, xhat, rstd, dy, dtype=dy.dtype, narrow=narrow, rms=norm.rms
    )
    return (made, made) if isinstance(made, Tensor) else made


def _plain_norm_backward(norm: PlainNorm, d_xhat: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of what a norm inside of a block was given, in the dtype of d_xhat."""
    dx = pointwise.layer_norm_backward(d_xhat, xhat, rstd, dtype=d_xhat.dtype, rms=norm.rms)
    return cast(Tensor, dx)


# ---- sums, norms, heads


def scaled(rows: Tensor, gain: Tensor | None) -> Tensor:
    """gain * rows in the dtype of rows, rounded once."""
    if gain is None:
        return rows
    if rows.dtype == gain.dtype or torch.is_grad_enabled():
        return (gain * rows).to(rows.dtype)
    return torch.mul(rows, gain, out=torch.empty_like(rows))


def _adds_apart(x: Tensor, rows: Tensor) -> bool:
    """Whether a product's rows are added to the residual stream by the norm behind it.

    They are when the dtypes differ, and in 16 bits, where a product that accumulates on x + b
    rounds x twice. Otherwise x + b is the product's accumulator, and the sum costs no pass.
    """
    return x.dtype != rows.dtype or x.dtype.itemsize < 4


def _sum(x: Tensor, pending: Tensor | None) -> Tensor:
    if pending is None:
        return x
    y = x + pending
    return y if y.dtype == x.dtype else y.to(x.dtype)  # as in `Steps.add`: never back as it came


def _sum_and_norm(
    x: Tensor, pending: Tensor | None, norm: PlainNorm | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x + pending, its normalised rows in `dtype`, 1/std."""
    if norm is None:  # a copy: the sum may be written to
        y = _sum(x, pending)
        return (
            y,
            y.to(dtype, copy=True),
            y.new_empty(0, dtype=torch.promote_types(y.dtype, torch.float32)),
        )
    if pending is None:
        return x, *pointwise.layer_norm(x, norm.eps, dtype, norm.rms)
    return pointwise.add_layer_norm(x, pending, norm.eps, dtype, norm.rms)


def _norm(rows: Tensor, norm: PlainNorm) -> tuple[Tensor, Tensor]:
    """Normalised rows in their dtype, 1/std."""
    return pointwise.layer_norm(rows, norm.eps, rms=norm.rms)


# of oneDNN's product in PyTorch, which is nobody's promise: another schema is another op
_FUSED = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, "
    "str? algorithm) -> Tensor Y"
)


@functools.cache
def _fuses_bias() -> bool:
    """Whether this PyTorch has the op of `_linear`, and this processor what it needs."""
    op = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if op is None or str(op.default._schema) != _FUSED or not torch.backends.mkldnn.is_available():
        return False
    on_x86 = "AVX" in torch.backends.cpu.get_cpu_capability()  # elsewhere nobody has measured it
    return on_x86 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """rows W^T + b, without a gradient.

    In bf16 on a CPU, `F.linear` copies b to every row of the result, and the product reads it back
    to add to it: one pass more than with b in the product. W packed in oneDNN's own order on top is
    not worth its memory: forward and backward want one each.
    """
    if (
        (rows.dtype == weight.dtype == bias.dtype == torch.bfloat16)
        and rows.device.type == "cpu"
        and not torch.compiler.is_compiling()  # Inductor has a choice of its own
        and torch.backends.mkldnn.enabled
        and _fuses_bias()
    ):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return F.linear(rows, weight, bias)


def _back(d: Tensor, block: BlockPlan, name: str) -> Tensor:
    """d W, the gradient of what "qkv", "proj", "fc1" or "fc2" reads."""
    weight, _ = block.product(name)
    if block.packs is not None and block.packs.fits(d, weight):
        return block.packs.linear(d, f"{name}, backward", weight.t())
    return d @ weight


def _of_parts(weights: Tensor, prompts: Tensor, rows: Tensor) -> Tensor:
    """(B, H, P + N) weights times prompts (B, P, D) and rows (B, N, D), without joining them."""
    count = prompts.shape[1]
    return exact_matmul(weights[..., :count], prompts) + exact_matmul(weights[..., count:], rows)


def _per_head(rows: Tensor, weight: Tensor) -> Tensor:
    """(B, H, a) times (H, a, b) per head -> (B, H, b)."""
    return torch.bmm(rows.transpose(0, 1), weight).transpose(0, 1)
