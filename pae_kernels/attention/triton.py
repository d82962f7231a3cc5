"""Prompt-concatenated attention in Triton.

The T = P + N keys of an image are one list whose first P entries lie in kv_prompt and the others in
qkv: a key tile picks its rows by one select on offsets, so that a tile may straddle the border and
at most one tile is part-full. At ViT-B, P = 50: 247 keys fill four tiles of 64 to 97 %; separate
loops over prompts and image rows would need five (77 %). Tiles are in `tiles.py`; what each takes,
`python -m pae_kernels --compile` prints. fp32 products are exact, never TF32.

Forward. One program makes one tile of BLOCK_M query rows (128 in 16 bits) of one (image, head);
grid B H tiles, tiles fastest, so that the programs that share keys run together and re-read them
from L2. Online softmax in base 2, fp32. HBM traffic: q, k, v once and out once, 4 S with S = B N D
elements. The class row alone: one program of 16 rows (15 of them idle) per (image, head), 2 S.

Backward, "whole": up to 256 rows of width up to 64 (ViT at 224: 197 rows). One program owns a whole
(image, head): Q, dO and the dQ accumulator stay on chip for all rows, key tiles of 64 rows stream
by once, and dK, dV of a tile are complete when it is left: q, k, v, o, dO read once, dq, dk, dv
written once, 8 S, the floor; five products, all of them wgmma on sm_90. Prompts shared by the
batch: a program takes `images` images of one head in turn and adds their gradients in its own fp32
slot, which stays in L2; the slots are summed once at the end, in a fixed order. No atomics
anywhere, bitwise the same from run to run. On sm_80 up to 128 rows, key tiles of 32.

Backward, "split": longer or wider. Query tiles make dq and rowsum(dO out), then key tiles make dk
and dv; 13 S, seven products, prompt gradients per image in fp32.

When qkv needs no gradient only the tiles that hold prompts are visited.

Causal rows: the forward and the two passes of the backward leave out the tiles that lie above the
diagonal, by the bounds of their loops, and compare places on the diagonal alone. The one-pass
backward, whose program holds all rows of a head, has none to leave out: at 77 rows it forms 128 x
128 pairs five times, 2 tiles, where the two passes would form 3 tiles of 64 x 64 seven times (5 %
more), and move 13 S instead of 8.

A bias (H, N, N) and a mask (W, N, N) are read where the logits are formed, in the dtype in which
they were given, entry by entry: rows of N entries behind P prompts start anywhere. Tables stay in
L2, where an image and head reads N^2 entries of each: at ViT-B in fp32 three times the bytes of its
keys and values. A turn of the forward's loop then has 1.9 times the instructions, of the backward's
1.6, on sm_90.

Rotary positions are a pass of their own (`pointwise.rotate_`). Turned where they are loaded, keys
and queries would cost the forward 31 % of its loop's instructions and the backward 15 %, with 56
instead of 32 bytes of spill (sm_90, 256 rows, both halves of a head as products of their own): by
instructions two thirds of what the two passes take to move their 308 MB at ViT-B and B = 128. The
difference is about 1.5 % of a block; it is not built.

Floor at ViT-B, B = 128, P = 50, bf16: forward 155 MB over the bandwidth of a large copy, or
26 GFLOP (rows padded to 256) over the rate of a large product; backward 310 MB and 64 GFLOP.

Tried and lost at compile time: selecting between two pointers (the alignment is lost, loads become
two bytes wide). In the whole backward, sm_90, 256 rows: key tiles of 32 (dK and dV, 32 rows high,
fall back to mma.sync, and there are twice as many tiles); dV before dP, or dK or dV before dQ (8 to
400 bytes of spill a thread, here 0 with Triton 3.9 and 16 with 3.6); storing dV before dP is formed
(56 to 120); 16 warps (200 to 300); two halves of 128 rows per key tile (400 to 3000); forming dK
and dV transposed (more registers).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gpus
from ..ahead_of_time import Launch
from ..launching import Launcher, power_of_2, programs
from . import tiles
from .reference import Sizes, sum_groups

LOG2E = tl.constexpr(1.4426950408889634)
SHARED, PER_IMAGE, INDEXED = 0, 1, 2
# Bits of PLACED, what places do to logits: 1 a bias, 2 a mask, 4 causal rows, without later keys
# One compiled kernel serves all sizes. The distance between two allocations is typed where it is
# declared: kernels chosen by its magnitude would be compiled at random, even during graph capture.
_SIZES = ("batch", "images", "rows", "tokens", "prompts", "bias_head", "windows")


@triton.jit
def _tile_of_head(rows, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """(image, head, tile) of this program. One grid axis: the others end at 65535 programs."""
    count = tl.cdiv(rows, BLOCK)
    i_head = tl.program_id(0) // count
    return (i_head // HEADS).to(tl.int64), i_head % HEADS, tl.program_id(0) % count


@triton.jit
def _prompt_set(group, i_b, GROUPING: tl.constexpr):
    """Index of the prompt set that image i_b reads."""
    if GROUPING == 0:
        return i_b * 0
    elif GROUPING == 1:
        return i_b
    else:
        return tl.load(group + i_b).to(tl.int64)


@triton.jit
def _load_keys(
    qkv, o_n, o_image, o_prompt, prompts, end, stride_n, stride_p,
    WIDTH: tl.constexpr, VEC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows o_n of the key (or value) list, (BLOCK_N, BLOCK_D); zeros from row `end` on.

    o_image and o_prompt are offsets from qkv's pointer, also to kv_prompt, which is another
    allocation: one base pointer keeps the alignment of all rows provable.
    """
    o_d = tl.arange(0, BLOCK_D)
    rows = tl.where(
        o_n < prompts,
        o_prompt + (o_n * stride_p).to(tl.int64),
        o_image + ((o_n - prompts) * stride_n).to(tl.int64),
    )
    mask = (o_n < end)[:, None] & (o_d < WIDTH)[None, :]
    return tl.load(qkv + tl.multiple_of(rows, VEC)[:, None] + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def _load_rows(
    base, o_m, rows, stride, WIDTH: tl.constexpr, VEC: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows o_m at `base`, (BLOCK_M, BLOCK_D); zeros from row `rows` on."""
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_m < rows)[:, None] & (o_d < WIDTH)[None, :]
    return tl.load(
        base + tl.multiple_of(o_m * stride, VEC)[:, None] + o_d[None, :], mask=mask, other=0.0
    )


@triton.jit
def _store_rows(base, o_m, mask, stride, x, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    mask = mask[:, None] & (o_d < WIDTH)[None, :]
    tl.store(base + (o_m * stride)[:, None] + o_d[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _end_of_keys(end_of_rows, prompts, total, PLACED: tl.constexpr):
    """Where the keys end that rows before `end_of_rows` see."""
    return tl.minimum(total, prompts + end_of_rows) if PLACED & 4 else total


@triton.jit
def _holds_later(start, BLOCK_N: tl.constexpr, first_row, prompts):
    """Whether a tile of keys from `start` on holds one that comes after row `first_row`."""
    return start + BLOCK_N > prompts + first_row + 1


@triton.jit
def _places(bias, mask, i_b, i_h, tokens, bias_head, windows):
    """Where what this head adds to logits lies, and what this window does."""
    return (
        bias + tl.cast(i_h, tl.int64) * bias_head,
        mask + (i_b % windows) * tokens * tokens,
    )


@triton.jit
def _in_units_of_log_2(
    s, o_m, o_n, rows, tokens, prompts, p_log_m, p_bias, p_mask, scale,
    WEIGHTED: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """scale s + what is added to logits, over log 2; s are products of queries and keys."""
    s = s * (scale * LOG2E)
    if WEIGHTED:
        log_m = tl.load(p_log_m + o_n, mask=o_n < prompts, other=0.0).to(tl.float32)
        s += (log_m * LOG2E)[None, :]
    if PLACED & 3:
        column = o_n - prompts
        inside = (o_m < rows)[:, None] & ((column >= 0) & (column < tokens))[None, :]
        places = o_m[:, None] * tokens + column[None, :]
        if PLACED & 1:
            s += tl.load(p_bias + places, mask=inside, other=0.0).to(tl.float32) * LOG2E
        if PLACED & 2:
            s += tl.load(p_mask + places, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return s


@triton.jit
def _without_later(s, o_m, o_n, prompts):
    """Logits of causal rows: -inf where an image row's key comes later. So it does wherever there
    is none, but in rows beyond the last.
    """
    return tl.where((o_n - prompts)[None, :] <= o_m[:, None], s, float("-inf"))


@triton.jit
def _weights(
    q, k, l, o_m, o_n, rows, tokens, prompts, p_log_m, p_bias, p_mask, scale, last,
    WEIGHTED: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Softmax weights from the log-sum-exp l of each row.

    Columns beyond the last key need no mask: their keys are zero, so they add nothing to dq, and
    their own gradients are not stored. The minimum keeps them finite, in the `last` tile; of causal
    rows, `last` are the tiles where some row has later keys.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    s = _in_units_of_log_2(
        s, o_m, o_n, rows, tokens, prompts, p_log_m, p_bias, p_mask, scale, WEIGHTED, PLACED
    )
    s -= l[:, None]
    if last:
        if PLACED & 4:
            s = _without_later(s, o_m, o_n, prompts)
        else:
            s = tl.minimum(s, 0.0)
    return tl.exp2(s)


@triton.jit
def _last(start, BLOCK_N: tl.constexpr, first_row, prompts, end, PLACED: tl.constexpr):
    """Whether `_weights` has keys to leave out of a tile of rows and one of keys."""
    if PLACED & 4:
        return _holds_later(start, BLOCK_N, first_row, prompts)
    else:
        return start + BLOCK_N > end


@triton.jit
def _exchange(
    q, do, l, row_dot, k, v, dq, dk, dv, o_m, o_n, rows, tokens, prompts,
    p_log_m, p_bias, p_mask, scale, last,
    NEED_DQ: tl.constexpr, WEIGHTED: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """What a tile of query rows and a tile of key rows add to each other's gradients."""
    p = _weights(
        q, k, l, o_m, o_n, rows, tokens, prompts, p_log_m, p_bias, p_mask, scale, last,
        WEIGHTED, PLACED,
    )  # fmt: skip
    # this order needs the fewest registers: p is the last to go
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = (p * (dp * scale - row_dot[:, None])).to(q.dtype)
    if NEED_DQ:
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision="ieee")
    dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
    return dq, dk, dv


@triton.jit
def _store_key_grads(
    p_image, p_slot, o_n, start, prompts, total, dk, dv, add,
    NEED_QKV: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Image rows of a key tile to d_qkv (.., 3, H, d); prompt rows to a slot (P, 2, H, d), fp32.

    p_image points at the dk of image row 0, p_slot at the dk of prompt 0, both of this head.
    """
    if NEED_QKV:
        # masked rather than skipped: Triton 3.6 fails to compile two branches here for sm_90
        m_image = (o_n >= prompts) & (o_n < total)
        stride = 3 * HEADS * WIDTH
        _store_rows(p_image, o_n - prompts, m_image, stride, dk, WIDTH, BLOCK_D)
        _store_rows(p_image + HEADS * WIDTH, o_n - prompts, m_image, stride, dv, WIDTH, BLOCK_D)
    if not NEED_QKV or start < prompts:
        stride = 2 * HEADS * WIDTH
        if add:
            vec: tl.constexpr = 4 if WIDTH % 4 == 0 else 1
            dk += _load_rows(p_slot, o_n, prompts, stride, WIDTH, vec, BLOCK_D)
            dv += _load_rows(p_slot + HEADS * WIDTH, o_n, prompts, stride, WIDTH, vec, BLOCK_D)
        _store_rows(p_slot, o_n, o_n < prompts, stride, dk, WIDTH, BLOCK_D)
        _store_rows(p_slot + HEADS * WIDTH, o_n, o_n < prompts, stride, dv, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def prompt_attention_fwd_kernel(
    qkv, group, log_m, bias, mask, out, lse,
    distance: tl.int64, rows, tokens, prompts, scale,
    stride_b, stride_n, stride_s, stride_h, stride_pg, stride_pp, stride_ps, stride_ph,
    bias_head, windows,
    FOLDED: tl.constexpr,
    GROUPING: tl.constexpr, WEIGHTED: tl.constexpr, PLACED: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_m = _tile_of_head(rows, HEADS, BLOCK_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    total = prompts + tokens
    end = _end_of_keys(i_m * BLOCK_M + BLOCK_M, prompts, total, PLACED)
    i_g = _prompt_set(group, i_b, GROUPING)
    o_image = tl.multiple_of(i_b * stride_b + i_h * stride_h, VEC)
    o_prompt = distance + i_g * stride_pg + i_h * stride_ph
    p_log_m = log_m + i_g * prompts
    p_bias, p_mask = _places(bias, mask, i_b, i_h, tokens, bias_head, windows)

    q = _load_rows(qkv + o_image, o_m, rows, stride_n, WIDTH, VEC, BLOCK_D)
    run_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    run_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # a positive factor may follow the maximum: exp2(s factor - max) is one instruction and exp2
    factor = scale * LOG2E if FOLDED else 1.0
    for start in range(0, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        k = _load_keys(
            qkv, o_n, o_image + stride_s, o_prompt, prompts, total, stride_n, stride_pp,
            WIDTH, VEC, BLOCK_D,
        )  # fmt: skip
        v = _load_keys(
            qkv, o_n, o_image + 2 * stride_s, o_prompt + stride_ps, prompts, total,
            stride_n, stride_pp, WIDTH, VEC, BLOCK_D,
        )  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not FOLDED:
            s = _in_units_of_log_2(
                s, o_m, o_n, rows, tokens, prompts, p_log_m, p_bias, p_mask, scale,
                WEIGHTED, PLACED,
            )  # fmt: skip
        if PLACED & 4:
            if _holds_later(start, BLOCK_N, i_m * BLOCK_M, prompts):  # on the diagonal alone
                s = _without_later(s, o_m, o_n, prompts)
        elif start + BLOCK_N > total:  # the last tile alone
            s = tl.where((o_n < total)[None, :], s, float("-inf"))
        new_max = tl.maximum(run_max, tl.max(s, 1) * factor)
        # a tile of masked keys alone has maximum -inf: its weights must be 0, not NaN
        masks: tl.constexpr = WEIGHTED or (PLACED & 3) != 0
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max) if masks else new_max
        p = tl.exp2(s * factor - finite_max[:, None])
        shrink = tl.exp2(run_max - finite_max)
        run_sum = run_sum * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        run_max = new_max
    acc = acc / run_sum[:, None]

    p_out = out + i_b * rows * HEADS * WIDTH + i_h * WIDTH
    _store_rows(p_out, o_m, o_m < rows, HEADS * WIDTH, acc, WIDTH, BLOCK_D)
    p_lse = lse + (i_b * HEADS + i_h) * rows
    tl.store(p_lse + o_m, (run_max + tl.log2(run_sum)) / LOG2E, mask=o_m < rows)


@triton.jit
def _load_query_side(
    qkv, d_out, out, lse, i_b, i_h, o_m, o_image, rows, scale, stride_n,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q, dO, log-sum-exp in units of log 2 (+inf beyond the last row: weight 0) and
    scale rowsum(dO out).
    """
    o_out = i_b * rows * HEADS * WIDTH + i_h * WIDTH
    do = _load_rows(d_out + o_out, o_m, rows, HEADS * WIDTH, WIDTH, VEC, BLOCK_D)
    o = _load_rows(out + o_out, o_m, rows, HEADS * WIDTH, WIDTH, VEC, BLOCK_D)
    row_dot = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1) * scale
    q = _load_rows(qkv + o_image, o_m, rows, stride_n, WIDTH, VEC, BLOCK_D)
    p_lse = lse + (i_b * HEADS + i_h) * rows
    l = tl.load(p_lse + o_m, mask=o_m < rows, other=float("inf")) * LOG2E
    return q, do, l, row_dot


@triton.jit(do_not_specialize=_SIZES)
def prompt_attention_bwd_kernel(
    d_out, qkv, group, log_m, bias, mask, out, lse, d_qkv, d_kv,
    distance: tl.int64, batch, images, rows, tokens, prompts, scale,
    stride_b, stride_n, stride_s, stride_h, stride_pg, stride_pp, stride_ps, stride_ph,
    bias_head, windows,
    NEED_QKV: tl.constexpr,
    GROUPING: tl.constexpr, WEIGHTED: tl.constexpr, PLACED: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All rows of one head, `images` images in turn; grid ceil(B / images) H, heads fastest."""
    i_h = tl.program_id(0) % HEADS
    i_c = tl.program_id(0) // HEADS
    o_m = tl.arange(0, BLOCK_M)
    total = prompts + tokens
    end = total if NEED_QKV else prompts
    first = i_c * images
    last = tl.minimum(first + images, batch) if GROUPING == 0 else first + 1
    # hoisted invariants of these loops would occupy registers all through the inner one
    for i in tl.range(first, last, disable_licm=True):
        i_b = tl.cast(i, tl.int64)
        i_g = _prompt_set(group, i_b, GROUPING)
        o_image = tl.multiple_of(i_b * stride_b + i_h * stride_h, VEC)
        o_prompt = distance + i_g * stride_pg + i_h * stride_ph
        p_log_m = log_m + i_g * prompts
        p_bias, p_mask = _places(bias, mask, i_b, i_h, tokens, bias_head, windows)
        p_grad = d_qkv + i_b * tokens * 3 * HEADS * WIDTH + i_h * WIDTH
        i_slot = tl.cast(i_c, tl.int64) if GROUPING == 0 else i_b
        p_slot = d_kv + i_slot * prompts * 2 * HEADS * WIDTH + i_h * WIDTH
        q, do, l, row_dot = _load_query_side(
            qkv, d_out, out, lse, i_b, i_h, o_m, o_image, rows, scale, stride_n,
            HEADS, WIDTH, VEC, BLOCK_D,
        )  # fmt: skip
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in tl.range(0, end, BLOCK_N, disable_licm=True):
            o_n = start + tl.arange(0, BLOCK_N)
            k = _load_keys(
                qkv, o_n, o_image + stride_s, o_prompt, prompts, end, stride_n, stride_pp,
                WIDTH, VEC, BLOCK_D,
            )  # fmt: skip
            v = _load_keys(
                qkv, o_n, o_image + 2 * stride_s, o_prompt + stride_ps, prompts, end,
                stride_n, stride_pp, WIDTH, VEC, BLOCK_D,
            )  # fmt: skip
            dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dq, dk, dv = _exchange(
                q, do, l, row_dot, k, v, dq, dk, dv, o_m, o_n, rows, tokens, prompts,
                p_log_m, p_bias, p_mask, scale, _last(start, BLOCK_N, 0, prompts, end, PLACED),
                NEED_QKV, WEIGHTED, PLACED,
            )  # fmt: skip
            _store_key_grads(
                p_grad + HEADS * WIDTH, p_slot, o_n, start, prompts, total, dk, dv,
                (GROUPING == 0) & (i > first), NEED_QKV, HEADS, WIDTH, BLOCK_D, BLOCK_N,
            )  # fmt: skip
        if NEED_QKV:
            _store_rows(p_grad, o_m, o_m < rows, 3 * HEADS * WIDTH, dq, WIDTH, BLOCK_D)
        if GROUPING == 0:
            tl.debug_barrier()  # the slot is read back by other threads than wrote it


@triton.jit(do_not_specialize=_SIZES)
def prompt_attention_bwd_dq_kernel(
    d_out, qkv, group, log_m, bias, mask, out, lse, d_qkv, row_dots,
    distance: tl.int64, rows, tokens, prompts, scale,
    stride_b, stride_n, stride_s, stride_h, stride_pg, stride_pp, stride_ps, stride_ph,
    bias_head, windows,
    NEED_QKV: tl.constexpr,
    GROUPING: tl.constexpr, WEIGHTED: tl.constexpr, PLACED: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """rowsum(dO out) and, when wanted, dq of one tile of query rows; grid B H tiles."""
    i_b, i_h, i_m = _tile_of_head(rows, HEADS, BLOCK_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    total = prompts + tokens
    end = _end_of_keys(i_m * BLOCK_M + BLOCK_M, prompts, total, PLACED)
    i_g = _prompt_set(group, i_b, GROUPING)
    o_image = tl.multiple_of(i_b * stride_b + i_h * stride_h, VEC)
    o_prompt = distance + i_g * stride_pg + i_h * stride_ph
    p_bias, p_mask = _places(bias, mask, i_b, i_h, tokens, bias_head, windows)
    q, do, l, row_dot = _load_query_side(
        qkv, d_out, out, lse, i_b, i_h, o_m, o_image, rows, scale, stride_n,
        HEADS, WIDTH, VEC, BLOCK_D,
    )  # fmt: skip
    tl.store(row_dots + (i_b * HEADS + i_h) * rows + o_m, row_dot, mask=o_m < rows)
    if NEED_QKV:
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, end, BLOCK_N):
            o_n = start + tl.arange(0, BLOCK_N)
            k = _load_keys(
                qkv, o_n, o_image + stride_s, o_prompt, prompts, total, stride_n, stride_pp,
                WIDTH, VEC, BLOCK_D,
            )  # fmt: skip
            v = _load_keys(
                qkv, o_n, o_image + 2 * stride_s, o_prompt + stride_ps, prompts, total,
                stride_n, stride_pp, WIDTH, VEC, BLOCK_D,
            )  # fmt: skip
            last = _last(start, BLOCK_N, i_m * BLOCK_M, prompts, total, PLACED)
            p = _weights(
                q, k, l, o_m, o_n, rows, tokens, prompts, log_m + i_g * prompts, p_bias, p_mask,
                scale, last, WEIGHTED, PLACED,
            )  # fmt: skip
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = (p * (dp * scale - row_dot[:, None])).to(k.dtype)
            dq = tl.dot(ds, k, dq, input_precision="ieee")
        p_grad = d_qkv + i_b * tokens * 3 * HEADS * WIDTH + i_h * WIDTH
        _store_rows(p_grad, o_m, o_m < rows, 3 * HEADS * WIDTH, dq, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def prompt_attention_bwd_dkv_kernel(
    d_out, qkv, group, log_m, bias, mask, lse, d_qkv, d_kv, row_dots,
    distance: tl.int64, rows, tokens, prompts, scale,
    stride_b, stride_n, stride_s, stride_h, stride_pg, stride_pp, stride_ps, stride_ph,
    bias_head, windows,
    NEED_QKV: tl.constexpr,
    GROUPING: tl.constexpr, WEIGHTED: tl.constexpr, PLACED: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of key rows, prompt rows per image; grid B H tiles."""
    total = prompts + tokens
    end = total if NEED_QKV else prompts
    i_b, i_h, i_n = _tile_of_head(end, HEADS, BLOCK_N)
    start = i_n * BLOCK_N
    o_n = start + tl.arange(0, BLOCK_N)
    i_g = _prompt_set(group, i_b, GROUPING)
    o_image = tl.multiple_of(i_b * stride_b + i_h * stride_h, VEC)
    o_prompt = distance + i_g * stride_pg + i_h * stride_ph
    p_bias, p_mask = _places(bias, mask, i_b, i_h, tokens, bias_head, windows)
    k = _load_keys(
        qkv, o_n, o_image + stride_s, o_prompt, prompts, end, stride_n, stride_pp,
        WIDTH, VEC, BLOCK_D,
    )  # fmt: skip
    v = _load_keys(
        qkv, o_n, o_image + 2 * stride_s, o_prompt + stride_ps, prompts, end,
        stride_n, stride_pp, WIDTH, VEC, BLOCK_D,
    )  # fmt: skip
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    p_row = (i_b * HEADS + i_h) * rows
    p_do = d_out + i_b * rows * HEADS * WIDTH + i_h * WIDTH
    first_row = tl.maximum(start - prompts, 0) // BLOCK_M * BLOCK_M if PLACED & 4 else 0
    for m in range(first_row, rows, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        q = _load_rows(qkv + o_image, o_m, rows, stride_n, WIDTH, VEC, BLOCK_D)
        do = _load_rows(p_do, o_m, rows, HEADS * WIDTH, WIDTH, VEC, BLOCK_D)
        l = tl.load(lse + p_row + o_m, mask=o_m < rows, other=float("inf")) * LOG2E
        row_dot = tl.load(row_dots + p_row + o_m, mask=o_m < rows, other=0.0)
        _, dk, dv = _exchange(
            q, do, l, row_dot, k, v, dk, dk, dv, o_m, o_n, rows, tokens, prompts,
            log_m + i_g * prompts, p_bias, p_mask, scale,
            _last(start, BLOCK_N, m, prompts, end, PLACED), False, WEIGHTED, PLACED,
        )  # fmt: skip
    p_grad = d_qkv + i_b * tokens * 3 * HEADS * WIDTH + i_h * WIDTH
    p_slot = d_kv + i_b * prompts * 2 * HEADS * WIDTH + i_h * WIDTH
    _store_key_grads(
        p_grad + HEADS * WIDTH, p_slot, o_n, start, prompts, total, dk, dv, False,
        NEED_QKV, HEADS, WIDTH, BLOCK_D, BLOCK_N,
    )  # fmt: skip


_forward = Launcher(prompt_attention_fwd_kernel)
_whole = Launcher(prompt_attention_bwd_kernel)
_queries = Launcher(prompt_attention_bwd_dq_kernel)
_keys = Launcher(prompt_attention_bwd_dkv_kernel)

_STRIDES = (
    *("stride_b", "stride_n", "stride_s", "stride_h"),
    *("stride_pg", "stride_pp", "stride_ps", "stride_ph"),
)


def _readable(t: Tensor) -> Tensor:
    """`t` with a unit innermost stride and, within an image, offsets that fit into 32 bits."""
    span = sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:]))
    return t if t.stride(-1) == 1 and span < 2**31 else t.contiguous()


class _Common(NamedTuple):
    """What all kernels are given beside sizes: where kv_prompt lies, from qkv on; strides; tensors
    that may be absent, qkv standing for them; and what is known at compile time.
    """

    distance: int
    strides: tuple[int, ...]
    read: tuple[Tensor, ...]
    constants: dict[str, Any]


def _common(
    n: Sizes,
    qkv: Tensor,
    kv_prompt: Tensor,
    group: Tensor | None,
    log_multiplicity: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> _Common:
    size, address = qkv.element_size(), qkv.data_ptr()
    distance = kv_prompt.data_ptr() - address
    strides = (*qkv.stride()[:4], *kv_prompt.stride()[:4])
    vec = 16 // size
    aligned = (distance | address) % 16 == 0
    whole_vectors = aligned and all(s % vec == 0 for s in (*strides, n.width))
    constants = {
        "GROUPING": SHARED if n.sets == 1 else PER_IMAGE if group is None else INDEXED,
        "WEIGHTED": log_multiplicity is not None,
        "PLACED": (bias is not None) + 2 * (mask is not None) + 4 * causal,
        "HEADS": n.heads,
        "WIDTH": n.width,
        "VEC": vec if whole_vectors else 1,
        "BLOCK_D": max(16, power_of_2(n.width)),
    }
    bias_head = 0 if bias is None or len(bias) == 1 else n.tokens * n.tokens
    strides = (*strides, bias_head, 1 if mask is None else len(mask))
    # of fp64, which is rounded as it is read, a tile would not fit into shared memory
    placed = (t if t is None or t.dtype != torch.float64 else t.float() for t in (bias, mask))
    read = tuple(qkv if t is None else t.contiguous() for t in (group, log_multiplicity, *placed))
    return _Common(distance // size, strides, read, constants)


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
    qkv, kv_prompt = _readable(qkv), _readable(kv_prompt)
    n = Sizes.of(qkv, kv_prompt, class_only)
    out = qkv.new_empty(n.batch, n.rows, n.heads * n.width)
    lse = torch.empty(n.batch, n.heads, n.rows, dtype=torch.float32, device=qkv.device)
    if out.numel() == 0:
        return out, lse
    tile = tiles.forward(qkv, n.rows)
    if bias is not None or mask is not None:
        tile = tiles.forward_with_places(tile, gpus.of(qkv.device).large)
    common = _common(n, qkv, kv_prompt, group, log_multiplicity, bias, mask, causal)
    added = log_multiplicity, bias, mask
    folded = {"FOLDED": all(t is None for t in added) and scale > 0}
    _forward(
        programs(n.rows, tile.block_m) * n.batch * n.heads,
        qkv.device,
        (qkv, *common.read, out, lse,
         common.distance, n.rows, n.tokens, n.prompts, scale, *common.strides),
        folded | common.constants | tile.launch(),
    )  # fmt: skip
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
    """Same contract as the reference's `backward`."""
    qkv, kv_prompt, d_out = _readable(qkv), _readable(kv_prompt), d_out.contiguous()
    n = Sizes.of(qkv, kv_prompt, class_only)
    fresh = torch.zeros if class_only else torch.empty  # queries that were not asked have none
    d_qkv = fresh(qkv.shape if need_qkv else 0, dtype=qkv.dtype, device=qkv.device)
    if n.batch == 0 or (n.prompts == 0 and not need_qkv):
        return d_qkv, torch.zeros_like(kv_prompt, memory_format=torch.contiguous_format)
    if not need_qkv:  # prompts, whose columns alone are formed, have no place
        bias, mask, causal = None, None, False
    common = _common(n, qkv, kv_prompt, group, log_multiplicity, bias, mask, causal)
    sizes = (n.rows, n.tokens, n.prompts, scale, *common.strides)
    constants = {"NEED_QKV": need_qkv} | common.constants
    read = (d_out, qkv, *common.read)

    def slots(count: int) -> Tensor:
        shape = count, n.prompts, 2, n.heads, n.width
        return torch.empty(shape, dtype=torch.float32, device=qkv.device)

    tile = tiles.backward_whole(qkv, n.rows)
    if tile is not None:
        tile = tiles.with_places(tile, bias is not None, mask is not None)
        images = tiles.images_per_program(qkv, tile) if n.sets == 1 else 1
        count = programs(n.batch, images)
        d_kv = slots(count)
        given = *read, out, lse, d_qkv, d_kv, common.distance, n.batch, images, *sizes
        _whole(n.heads * count, qkv.device, given, constants | tile.launch())
    else:
        d_kv, row_dots = slots(n.batch), torch.empty_like(lse)
        tile = tiles.backward_split(qkv, n.rows)
        heads = n.batch * n.heads
        constants |= tile.launch()
        given = *read, out, lse, d_qkv, row_dots, common.distance, *sizes
        _queries(programs(n.rows, tile.block_m) * heads, qkv.device, given, constants)
        keys = n.prompts + n.tokens if need_qkv else n.prompts
        given = *read, lse, d_qkv, d_kv, row_dots, common.distance, *sizes
        _keys(programs(keys, tile.block_n) * heads, qkv.device, given, constants)
    if n.sets == 1:
        return d_qkv, d_kv.sum(0, keepdim=True).to(kv_prompt.dtype)
    return d_qkv, sum_groups(d_kv, group, n.sets).to(kv_prompt.dtype)


def _launch(
    label: str, kernel, tile: tiles.Tile, dtype: str = "bf16", width: int = 64, **changes: Any
) -> Launch:
    """`kernel` as a ViT with 12 heads runs it; `changes` to its other compile-time constants."""
    types = {"group": "*i64", "scale": "fp32", "distance": "i64"}
    types |= dict.fromkeys(("qkv", "d_out", "out", "d_qkv"), f"*{dtype}")
    types |= dict.fromkeys(("log_m", "bias", "mask", "lse", "d_kv", "row_dots"), "*fp32")
    types |= dict.fromkeys((*_STRIDES, *_SIZES), "i32")
    constants = {
        "GROUPING": SHARED,
        "WEIGHTED": False,
        "PLACED": 0,
        "HEADS": 12,
        "WIDTH": width,
        "VEC": 4 if dtype == "fp32" else 8,
        "BLOCK_D": max(16, power_of_2(width)),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "NEED_QKV": True,
        "FOLDED": not (changes.get("WEIGHTED") or changes.get("PLACED", 0) % 4),
    } | changes
    odd = () if width % 16 == 0 else ("stride_h", "stride_ph")  # heads lie `width` entries apart
    return Launch(
        label=f"attention {label} {dtype} d={width} {tile.block_m}x{tile.block_n}",
        kernel=kernel,
        types=types,
        constants={n: v for n, v in constants.items() if n in kernel.arg_names},
        warps=tile.warps,
        stages=tile.stages,
        aligned=tuple(n for n in (*_STRIDES, "distance") if n not in odd),
        tensor_cores=dtype != "fp32",
        may_spill=dtype == "fp32" and width > 64 and kernel is prompt_attention_bwd_dq_kernel,
    )


_SPLIT = {"bwd dq": prompt_attention_bwd_dq_kernel, "bwd dkv": prompt_attention_bwd_dkv_kernel}


def shipped_launches(architecture: int) -> list[Launch]:
    """Every kernel with every tile that the table gives it on sm_`architecture`."""
    large = architecture >= 90

    def launches(name: str, kernel, table: dict) -> list[Launch]:
        return [
            _launch(name, kernel, tile, "bf16" if narrow else "fp32", width)
            for (narrow, width), tile in table.items()
        ]

    whole = [tile for (size, _), tile in tiles.WHOLE.items() if size == large]
    split = {tuple(key): tile for (size, *key), tile in tiles.SPLIT.items() if size == large}
    return [
        *launches("fwd", prompt_attention_fwd_kernel, tiles.FORWARD),
        *(_launch("bwd", prompt_attention_bwd_kernel, tile) for tile in whole),
        *(launch for n, f in _SPLIT.items() for launch in launches(n, f, split)),
    ]


def variant_launches(architecture: int) -> list[Launch]:
    """A sample of the switches: prompt sets, multiplicities, the class row, the prompts' gradient
    alone, padded head widths, fp16.
    """
    many: dict[str, Any] = {"GROUPING": INDEXED, "WEIGHTED": True}
    own: dict[str, Any] = {"GROUPING": PER_IMAGE}
    fwd, bwd, (dq, dkv) = (
        prompt_attention_fwd_kernel,
        prompt_attention_bwd_kernel,
        _SPLIT.values(),
    )
    large = architecture >= 90
    rows = tiles.WHOLE[large, 256 if large else 128]
    split, wide = (tiles.SPLIT[large, True, width] for width in (64, 128))
    placed = tiles.forward_with_places(tiles.FORWARD[True, 64], large)
    qkv = torch.empty(1, 197, 3, 12, 64, dtype=torch.bfloat16, device="meta")
    return [
        _launch("fwd grouped", fwd, tiles.FORWARD[True, 64], **many),
        _launch("fwd per image", fwd, tiles.FORWARD[True, 128], "fp16", 80, **own),
        _launch("fwd class row", fwd, tiles.forward(qkv, 1), WEIGHTED=True),
        _launch("fwd with bias", fwd, placed, PLACED=1),
        _launch("fwd with both", fwd, placed, PLACED=3, GROUPING=PER_IMAGE),
        _launch("fwd with mask", fwd, tiles.FORWARD[False, 64], "fp32", PLACED=3, **many),
        _launch("bwd grouped", bwd, rows, **many),
        _launch("bwd dq causal", dq, split, PLACED=4),
        _launch("bwd dkv causal", dkv, split, PLACED=4),
        _launch("bwd with bias", bwd, tiles.with_places(rows, True, False), PLACED=1),
        _launch("bwd with both", bwd, tiles.with_places(rows, True, True), PLACED=3),
        _launch("bwd dq with mask", dq, split, PLACED=3),
        _launch("bwd dkv with mask", dkv, split, PLACED=2),
        _launch("bwd per image", bwd, rows, "fp16", 48, **own),
        _launch("bwd of prompts", bwd, rows, NEED_QKV=False),
        _launch("bwd dq per image", dq, wide, width=72, **own),
        _launch("bwd dkv grouped", dkv, split, **many),
        _launch("bwd dkv of prompts", dkv, wide, width=80, NEED_QKV=False, **many),
    ]
