"""The cost model of a VPT-deep step: floating-point operations, bytes kept, bytes moved.

Three ways to run the same step on a frozen ViT with a class-token head (B images of N rows, T = N +
P, D wide, F hidden, L blocks, H heads; s = 2 D^2 is one row through a D x D matrix):

"official"  prompts concatenated, attention written out: T rows through everything.
"sdpa"      the same with fused attention, whose backward forms the scores again.
"pae"       `pae.fast_forward` in one of its memory modes.

Products are counted, 2 per multiply-add, whatever runs them; norms, softmax and activations are
not: the rule of `torch.utils.flop_counter`, whose counts `tests/bench/test_costs.py` compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch

from pae.choices import POOLS

METHODS = ("official", "sdpa", "pae")
MEMORY = ("keep", "recompute8", "recompute")
STREAM = 4  # bytes of an entry of the residual stream and of every statistic: fp32


@dataclass(frozen=True)
class Shape:
    """Sizes of a frozen ViT: L `depth`, D `width`, F `hidden`, H `heads`, N `rows` (class token
    included), of which `patches` come from `patch_inputs` numbers each, and the head's `classes`.
    """

    depth: int
    width: int
    hidden: int
    heads: int
    rows: int
    patches: int
    patch_inputs: int
    classes: int

    def __post_init__(self) -> None:
        if self.depth < 2:  # the first block and the last one have formulas of their own
            raise ValueError(f"depth must be at least 2, got {self.depth}")

    @classmethod
    def of(cls, vit: Any, classes: int | None = None) -> Shape:
        """Sizes of a timm VisionTransformer; `classes` where its head was taken away."""
        block, embed = vit.blocks[0], vit.patch_embed
        return cls(
            depth=len(vit.blocks),
            width=vit.embed_dim,
            hidden=block.mlp.fc1.out_features,
            heads=block.attn.num_heads,
            rows=embed.num_patches + vit.num_prefix_tokens,
            patches=embed.num_patches,
            patch_inputs=embed.proj.weight[0].numel(),
            classes=vit.num_classes if classes is None else classes,
        )

    @classmethod
    def named(cls, name: str, **options: Any) -> Shape:
        """Sizes of `timm.create_model(name, **options)`, of which no weight is allocated."""
        with torch.device("meta"):
            return cls.of(timm.create_model(name, **options))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one step on a whole batch."""

    forward: float
    backward: float

    @property
    def step(self) -> float:
        """Both directions."""
        return self.forward + self.backward


def flops(
    shape: Shape,
    prompts: int,
    batch: int,
    method: str = "pae",
    memory: str = "keep",
    pool: str | None = None,
) -> Flops:
    """What `method` executes, recomputation included.

    Per image, forward and backward (gradients of activations only: weights are frozen):

                   official                         sdpa                  pae
    middle block   T (4 s + 4 D F) + 4 T^2 D        as official           N (4 s + 4 D F) + 4 N T D
      backward     T (4 s + 4 D F) + 8 T^2 D        10 T^2 D              the same + 10 N T D
    first block    as a middle one                  as a middle one       as a middle one
      backward     as a middle one                  as a middle one       N (s + 4 D F) + 8 N P D
    last block     as a middle one                  as a middle one       4 s + 4 D F + 4 H T D
      backward     as a middle one                  as a middle one       4 s + 4 D F + 8 H T D

    Patch embedding 2 (N - 1) c D forward; head 2 D classes forward and twice that backward. Once a
    batch, pae's prompt keys and values: 2 P s (L - 1) each way. Memory "recompute8" forms q, k and
    v of the L - 2 middle blocks again, 3 N s each; "recompute" also the hidden rows of L - 1
    blocks, 2 N D F each. The 10 and the 8 of attention's backward hold the scores again (2).

    With `pool` the backbone averages rows, as `PromptedViT(..., pool=...)` says, and pae's last
    block is a middle one: of N rows for "image", which costs 2 P s more each way for its prompts'
    keys and values, else of T.

    Raises:
        ValueError: unknown method, memory mode or pool; a pool for another method than pae.
    """
    _check(method, memory, pool)
    L, D, N, T = shape.depth, shape.width, shape.rows, shape.rows + prompts
    square, mlp = 2 * D * D, 4 * D * shape.hidden
    embed = 2 * shape.patches * shape.patch_inputs * D
    head = 2 * D * shape.classes
    if method != "pae":
        linear, attention = T * (4 * square + mlp), T * T * D
        products_back = 8 if method == "official" else 10
        forward = embed + L * (linear + 4 * attention) + head
        backward = L * (linear + products_back * attention) + 2 * head
        return Flops(batch * forward, batch * backward)

    row = 4 * square + mlp  # one row through a block, and through its last one's absorbed products
    last = {None: 0, "image": N}.get(pool, T)  # rows of the last block, as far as it is whole
    middle = (L - 2) * N + last  # rows of all blocks that are
    class_keys = shape.heads * T * D  # one query a head, of full width
    only = (0, 0) if pool else (row + 4 * class_keys, row + 8 * class_keys)
    forward = embed + (N + middle) * (row + 4 * T * D) + only[0] + head
    backward = (
        2 * head
        + only[1]
        + middle * (row + 10 * T * D)
        + (N * (square + mlp) + 8 * N * prompts * D)
    )
    if memory != "keep":
        backward += middle * 3 * square
    if memory == "recompute":
        backward += (N + middle) * mlp / 2
    keys_values = (L if pool == "image" else L - 1) * prompts * 2 * square
    return Flops(batch * forward + keys_values, batch * backward + keys_values)


def saved_bytes(
    shape: Shape,
    prompts: int,
    batch: int,
    method: str = "pae",
    memory: str = "keep",
    itemsize: int = 4,
    device: str = "cpu",
    pool: str | None = None,
) -> float:
    """Bytes that one step keeps from forward to backward, for the whole batch.

    Each storage once, without parameters, folded weights and autocast's copies of weights: what
    `bench.memory.SavedBytes` measures. With e = `itemsize`, per image and block, statistics (fp32:
    two numbers a normalised row, one in pae; a log-sum-exp a head and row) left out here:

    official   8 T D of the residual stream, e (3 T D + H T^2 + T F); on a GPU in 16 bits softmax
               runs in fp32 and keeps its own copy, 4 H T^2 more
    sdpa       8 T D of the residual stream, e (4 T D + T F)
    pae        middle, first, last block: e (6 N D + N F), e (3 N D + N F), e N D + 4 H T
               "recompute8" has one byte for every hidden entry and keeps no q, k, v: e 3 N D + N F
               in middle and first blocks; "recompute" keeps neither: e 3 N D

    All keep the rows of the final norm and what the head and the loss read. With `pool` the last
    block keeps what a middle one does, of N rows or of T, and the norm is that of the mean.

    Raises:
        ValueError: as in `flops`.
    """
    _check(method, memory, pool)
    L, D, F, H = shape.depth, shape.width, shape.hidden, shape.heads
    e, N, T, narrow = itemsize, shape.rows, shape.rows + prompts, itemsize < STREAM
    loss = STREAM * shape.classes + 8  # log-probabilities and an int64 label
    if method != "pae":
        norms = 2 * (STREAM * T * D + 2 * STREAM * T)
        if method == "official":
            attention = e * (3 * T * D + H * T * T)
            attention += STREAM * H * T * T if narrow and device == "cuda" else 0
        else:
            attention = e * 4 * T * D + STREAM * H * T
        last = T if method == "official" else N  # rows of the final norm
        readout = STREAM * last * (D + 2) + (e * D if narrow else STREAM * last * D)
        return float(batch * (L * (norms + attention + e * T * F) + readout + loss) + STREAM)

    kept = {"keep": e * F, "recompute8": F, "recompute": 0}[memory]
    first = e * 3 * D + kept + STREAM * (1 + H)  # the second norm's statistics; log-sum-exp
    middle = first + STREAM + (e * 3 * D if memory == "keep" else 0)
    first, middle, last = N * first, N * middle, (N if pool == "image" else T) * middle
    if pool is None:
        last = e * N * D + STREAM * (N + H * T + H * D) + e * (D + F) + STREAM
    readout = STREAM * (D + 2) + e * D
    # once a batch: rows and statistics of the prompts' norm, keys and values, the last block's rows
    shared = (L - 1) * prompts * D * 2 * e + e * prompts * D + 2 * STREAM * L * prompts
    alone = L - 1  # blocks whose prompts are keys and values alone
    if pool is not None:
        alone = L if pool == "image" else L - 1
        shared = alone * prompts * (D * 2 * e + 2 * STREAM)
    if alone > 1:  # the rows of several blocks are normalised as one copy
        shared += alone * prompts * D * STREAM
    return float(batch * (first + (L - 2) * middle + last + readout + loss) + STREAM + shared)


def live_step_flops(shape: Shape, prompts: int, batch: int) -> float:
    """Floating-point operations that reach the logits or a trained gradient, the same for every
    row of a table: those of `flops` for pae without the scores that a backward forms again.
    """
    N, T, D = shape.rows, shape.rows + prompts, shape.width
    again = (shape.depth - 2) * 2 * N * T * D + 2 * N * prompts * D
    return flops(shape, prompts, batch).step - batch * again


def live_step_bytes(shape: Shape, prompts: int, batch: int, itemsize: int) -> float:
    """Bytes of the same step where every product, attention, norm and activation is one pass that
    reads its inputs once and writes its output once.

    The residual stream is fp32, all else `itemsize` bytes; a norm also adds what the product before
    it leaves for the stream. Epilogues that swallow a pass would go below this.
    """
    depth, D, F = shape.depth, shape.width, shape.hidden
    e, narrow = itemsize, itemsize if itemsize < STREAM else 0
    norm = 2 * (STREAM + e) * D
    norm_back = (2 * e + 2 * STREAM + narrow) * D
    mlp = 2 * e * (D + F)  # both products; 2 e F more for the activation, 3 e F for its gradient
    forward = 2 * norm + e * (4 * D + 4 * D + 2 * D) + mlp + 2 * e * F
    half_back = mlp + 3 * e * F + norm_back + 2 * e * D
    backward = half_back + e * (8 * D + 4 * D) + norm_back
    first_back = half_back + 3 * e * D  # attention: q, out and the gradient of out
    last = norm + 2 * e * D + 3 * e * D + norm_back  # scores, mixture; their gradients
    rows = (depth - 1) * forward + (depth - 2) * backward + first_back + last
    weights = e * (4 * D * D + 2 * D * F) * 2 * depth
    prompt_rows = e * 2 * prompts * D * 3 * depth
    image = 4 * shape.patches * shape.patch_inputs + 4 * shape.patches * D
    return float(batch * (shape.rows * rows + image) + weights + prompt_rows)


def _check(method: str, memory: str, pool: str | None = None) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {MEMORY}, got {memory!r}")
    if pool is not None and (pool not in POOLS or method != "pae"):
        raise ValueError(f"pool must be one of {POOLS} of method 'pae', got {pool!r} of {method!r}")
