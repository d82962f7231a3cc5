"""The fast engine: walks a FrozenPlan block by block and skips what prompt tuning throws away.

What the reference computes and this does not:

- prompt queries, prompt outputs and their MLP: deep prompts are cut off before the next block;
- prompt keys and values per image: shared prompts get theirs once, all blocks in one product;
- prompt queries in the last block too, unless the readout pools prompt rows: there they run as rows
  of the sequence;
- in the last block, when only the class row is read, every other row. No value of any row is formed
  there, as W_v moves behind the weighted sum, and no key where W_k can move into the one query;
- gradients below the first block that is prompted or trained, gradients of frozen weights, and what
  only they need.

The block itself is in `block`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backbones import BackboneView
from .backbones.view import Bypass, Norm
from .block import (
    MEMORY_MODES,
    ClassBlock,
    FrozenBlock,
    KeyedClassBlock,
    MLPBlock,
    Stream,
    class_query,
    forward,
    given_keys,
    keys_values,
    normalise,
    scaled,
)
from .packs import can_pack
from .plan import BlockPlan, FrozenPlan
from .prompts import PromptFamily
from .prompts.contracts import check_rows, check_sets
from .sequence import (
    between_blocks,
    bypass_of,
    entering,
    insert_rows,
    pooled_rows,
    touches_rows,
)


class BlockPrompts(NamedTuple):
    """Prompts of one block, and what is asked of it.

    Attributes:
        rows: (G, P, D), or None.
        group: (B,) int64, which of G sets each sample has, or None.
        log_multiplicity: (G, P), log of how often each row stands there, or None.
        head_kv: keys and values in head space, (1 or B, P', 2, H, d), or None.
        kv: (G, P, 2, H, d), keys and values of `rows` where they are known already, or None.
        attention: whether the block hands on its class row's attention.
        bypass: (rows that attention reads, what it adds) -> what is added instead, or None.
    """

    rows: Tensor | None = None
    group: Tensor | None = None
    log_multiplicity: Tensor | None = None
    head_kv: Tensor | None = None
    kv: Tensor | None = None
    attention: bool = False
    bypass: Bypass | None = None


# before block i: the stream that enters it, changed or as it came, and the block's prompts
Enter = Callable[[int, Stream], tuple[Stream, BlockPrompts]]


def run(
    plan: FrozenPlan,
    view: BackboneView,
    family: PromptFamily,
    x: Tensor,
    memory: str,
    pool: str = "image",
) -> Tensor:
    """The rows that `view.readout` takes, of embedded rows x (B, N, D) and a family's prompts.

    Args:
        memory: see `pae.fast_forward`.
        pool: see `PromptedViT`.

    Raises:
        ValueError: an unknown memory mode.
    """
    joins = pool != "image" and not family.enters_sequence  # for the last block alone
    x, entered, _ = _prompted(plan, view, family, x, memory, plan.class_only, joins)
    return x if plan.class_only else pooled_rows(x, view.num_prefix_tokens, entered, pool)


def run_to(
    plan: FrozenPlan,
    view: BackboneView,
    family: PromptFamily,
    x: Tensor,
    memory: str,
    blocks: Sequence[int],
) -> list[Tensor]:
    """As `run`, but the outputs of these blocks (ascending), each (B, n, D) with prompts and prefix
    cut off; what stands behind the last of them is not run.
    """
    return _prompted(plan, view, family, x, memory, False, False, blocks)[2]


def _prompted(
    plan: FrozenPlan,
    view: BackboneView,
    family: PromptFamily,
    x: Tensor,
    memory: str,
    class_only: bool,
    joins: bool,
    blocks: Sequence[int] = (),
) -> tuple[Tensor, int, list[Tensor]]:
    """What leaves the last block, the prompt rows in it, and the image rows that leave `blocks`.

    Args:
        joins: prompts of the last block are rows of the sequence there.
    """
    plan, memory = kept_by(plan, memory)
    family.start_forward()
    at, last, found = view.num_prefix_tokens, len(plan.blocks) - 1, []
    end = blocks[-1] if blocks else last
    with torch.autocast(x.device.type, enabled=False):
        plan, entered = plan.now(), 0
        if family.enters_sequence:
            rows = family.block_prompts(0, x)
            if rows is not None:
                x, entered = insert_rows(x, entering(family, view, rows), at), rows.shape[-2]
        ask = answers(plan, family, x, last if class_only or joins else end + 1)

        def enter(i: int, stream: Stream) -> tuple[Stream, BlockPrompts]:
            nonlocal entered
            if i - 1 in blocks:  # summed once, for both who read it
                stream = stream._replace(rows=stream.sum(), pending=None)
                found.append(stream.rows[:, at + entered :])
            if touches_rows(family, i):
                query = partial(class_query, plan.blocks[i])
                rows = between_blocks(family, i, stream.sum(), at, entered, stream.attention, query)
                stream = Stream(rows.contiguous())
            elif family.depends_on_input:
                stream = Stream(stream.sum())
            prompts = ask(i, stream.rows)
            if joins and i == last and prompts.rows is not None:
                rows, group, entered = prompts.rows, prompts.group, prompts.rows.shape[-2]
                rows = rows if group is None else rows[group]
                stream = Stream(insert_rows(stream.sum(), rows, at))
                prompts = prompts._replace(rows=None, group=None)
            for bypass in bypass_of(family, i):
                prompts = prompts._replace(bypass=bypass)
            return stream, prompts

        x = walk(plan.only(0, end + 1) if blocks else plan, x, enter, class_only, memory)
        if blocks:
            found.append(x[:, at + entered :])
    return x, entered, found


def walk(
    plan: FrozenPlan, x: Tensor, enter: Enter, class_only: bool = False, memory: str = "keep"
) -> Tensor:
    """All blocks of `plan` on x (B, N, D).

    Args:
        enter: asked before every block, in order.
        class_only: return the class row alone, (B, 1, D), and compute nothing else in the last
            block.
    """
    stream = Stream(x.contiguous())  # a stem without prefix tokens hands over transposed rows
    for i, block in enumerate(plan.blocks):
        only = class_only and i == len(plan.blocks) - 1
        stream, prompts = enter(i, stream)
        x, pending, _ = stream
        rows, group, log_multiplicity, head_kv, kv, attention, bypass = prompts
        stops, trained = bypass is not None, block.vectors()
        made: Any
        given: tuple[Any, ...]
        rows = x.new_empty(1, 0, x.shape[-1]) if rows is None else rows
        if only and block.absorbs_keys and head_kv is None:
            normed = normalise(rows, block.norm1, plan.dtype)
            given = x, pending, normed, group, log_multiplicity, None, block, stops
            made = ClassBlock.apply(*given, *trained)
            return made if bypass is None else rest_of_block(block, bypass, "keep", *made).sum()
        if kv is None:
            kv = keys_values(block, normalise(rows, block.norm1, plan.dtype))
        if head_kv is not None:
            kv = _with_head_kv(kv, given_keys(block, head_kv).to(plan.dtype), group, len(x))
            group = None
        if only and not block.absorbs_keys and block.asks_apart(x.shape[1]):
            given = x, pending, kv, group, log_multiplicity, block, memory, stops
            made = KeyedClassBlock.apply(*given)
            return made if bypass is None else rest_of_block(block, bypass, "keep", *made).sum()
        given = x, pending, kv, group, log_multiplicity, block, memory, only, attention, stops
        made = FrozenBlock.apply(*given, *trained)
        stream = Stream(*made) if bypass is None else rest_of_block(block, bypass, memory, *made)
    return stream.sum()


def rest_of_block(
    block: BlockPlan,
    bypass: Bypass,
    memory: str,
    x: Tensor,
    xhat: Tensor,
    y: Tensor,
    attention: Tensor | None = None,
) -> Stream:
    """From what a Function of a block gives that stops behind the projection to the block's."""
    y, entered = bypass(_affine(xhat, block.given1), y), xhat if block.parallel else None
    given = x, y.contiguous(), entered, block, memory
    rows, pending = MLPBlock.apply(*given, *block.vectors())
    return Stream(rows, pending, attention)


def _affine(xhat: Tensor, norm: Norm | None) -> Tensor:
    """Normalised rows behind the norm's own affine part, in their dtype."""
    wide = torch.promote_types(xhat.dtype, torch.float32)
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    if weight is not None:
        weight = weight.to(wide)
        scaled = xhat * weight if bias is None else torch.addcmul(bias.to(wide), xhat, weight)
        return scaled.to(xhat.dtype)
    return xhat if bias is None else (xhat + bias.to(wide)).to(xhat.dtype)


@torch.no_grad()
def unprompted(plan: FrozenPlan, x: Tensor) -> Iterator[Tensor]:
    """The rows (B, N, D) that enter each block without prompts, x first, and those that leave the
    last: each is computed when it is asked for, and nothing is kept.
    """
    stream = Stream(x.contiguous())
    yield stream.rows
    for block in plan.blocks:
        stream = forward(block, stream)
        yield stream.sum()


def kept_by(plan: FrozenPlan, memory: str) -> tuple[FrozenPlan, str]:
    """The plan that a memory mode reads, and the mode of its blocks; a warning where there is
    nothing to pack.

    Raises:
        ValueError: an unknown one.
    """
    check_memory(memory)
    if memory != "packed":
        return plan, memory
    if torch.compiler.is_compiling():
        return plan, "keep"
    weight = plan.blocks[0].w_qkv
    if not can_pack(weight):
        warnings.warn(
            "memory='packed' is 'keep' here: weights are packed for fp32 on a CPU by a PyTorch "
            f"with MKL, and products are {weight.dtype} on {weight.device.type}",
            stacklevel=2,
        )
    return plan.packed(), "keep"


def check_memory(memory: str) -> None:
    """Raise ValueError unless it is a memory mode."""
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory must be one of {MEMORY_MODES}, got {memory!r}")


def answers(
    plan: FrozenPlan, family: PromptFamily, x: Tensor, blocks: int
) -> Callable[[int, Tensor], BlockPrompts]:
    """(i, rows that enter block i) -> its prompts, asked of `family` now where they depend on no
    rows; those of the first `blocks` blocks are read as keys and values alone.
    """
    count = len(plan.blocks)

    def prompts(
        i: int, rows: Tensor | None, group: Tensor | None, head_kv: Tensor | None
    ) -> BlockPrompts:
        group = None if rows is None else group
        check_sets(family, i, rows, group, head_kv, len(x))
        group = None if group is None else group.long()
        rows = rows[None] if rows is not None and rows.dim() == 2 else rows
        head_kv = head_kv[None] if head_kv is not None and head_kv.dim() == 4 else head_kv
        attention = family.reads_class_attention and i < count - 1
        return BlockPrompts(rows, group, None, head_kv, attention=attention)

    def ask(i: int, x: Tensor) -> BlockPrompts:
        rows, head_kv = family.block_prompts(i, x), family.head_keys_values(i, x)
        group = family.group_index(x)
        if rows is not None:
            check_rows(family, i, rows, group)
        return prompts(i, rows, group, head_kv)

    if family.enters_sequence:  # its rows are in the stream
        return lambda i, x: prompts(i, None, None, None)
    if family.depends_on_input:
        return ask
    if type(family).head_keys_values is PromptFamily.head_keys_values:
        group = family.group_index(x)
        known = [prompts(i, rows, group, None) for i, rows in enumerate(family.all_prompts(x))]
    else:  # block by block like the reference, so that dropout draws in the same order
        known = [ask(i, x) for i in range(count)]
    known = _with_keys_values(plan, known, blocks)
    return lambda i, x: known[i]


def _with_keys_values(
    plan: FrozenPlan, prompts: list[BlockPrompts], blocks: int
) -> list[BlockPrompts]:
    """With keys and values of the first `blocks` blocks, from one LayerNorm and, where that is not
    slower, one product.

    As they came unless all those blocks have shared prompts of one shape, one norm and one number
    of heads, and no keys that are normalised per head.
    """
    first = plan.blocks[0]
    rows = [p.rows for p in prompts[:blocks] if p.rows is not None and p.rows.numel()]
    if blocks < 2 or len(rows) < blocks or len(rows[0]) != 1:
        return prompts
    if len({r.shape for r in rows}) > 1:
        return prompts
    like = first.norm1, first.num_heads, None
    if any((b.norm1, b.num_heads, b.k_norm) != like for b in plan.blocks[:blocks]):
        return prompts
    normed = normalise(torch.cat(rows), first.norm1, plan.dtype)
    if normed.device.type == "cpu" and normed.dtype.itemsize < 4:
        # oneDNN's batched product would first copy all those weights, at the cost of 70 rows each
        pairs = zip(plan.blocks, normed.split(1))
        known = [p._replace(kv=keys_values(*pair)) for p, pair in zip(prompts, pairs)]
        return known + prompts[blocks:]
    own = first.num_heads * first.head_width
    if any(b.gain1 is not None for b in plan.blocks[:blocks]):
        normed = torch.stack([scaled(n, b.gain1) for n, b in zip(normed, plan.blocks)])
    weight, bias = plan.w_qkv[:blocks, own:], plan.b_qkv[:blocks, None, own:]
    kv = torch.baddbmm(bias, normed, weight.transpose(1, 2))
    kv = kv.view(blocks, 1, -1, 2, first.num_heads, first.head_width)
    known = [p._replace(kv=own_kv) for p, own_kv in zip(prompts, kv.unbind(0))]
    return known + prompts[blocks:]


def _with_head_kv(kv: Tensor, head_kv: Tensor, group: Tensor | None, batch: int) -> Tensor:
    """Prompt keys and values (G, P, 2, H, d) with those in head space behind them: G is 1 or B."""
    if group is not None:
        kv = kv[group]
    sets = max(len(kv), len(head_kv))
    return torch.cat([kv.expand(sets, *kv.shape[1:]), head_kv.expand(sets, *head_kv.shape[1:])], 1)
