"""The op `prompt_attention`: signature, checks, declaration. Reads top to bottom as every op does.
`class_attention` shows one row of its softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends, registration
from ..checks import describe
from . import reference

backends.register(
    "prompt_attention",
    backends.Version("triton", f"{__package__}.triton", backends.with_triton_tiles),
    backends.Version("cpu", f"{__package__}.cpu", backends.with_cpu),
    backends.Version("sdpa", f"{__package__}.sdpa", backends.with_sdpa),
    backends.Version("reference", reference, backends.anywhere),
)


def prompt_attention(
    qkv: Tensor,
    kv_prompt: Tensor,
    group: Tensor | None = None,
    *,
    scale: float | None = None,
    queries: str = "all",
    log_multiplicity: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q [k_p; k]^T + [log m; bias + mask]) [v_p; v]: image queries over prompt and
    image keys.

    Prompt keys may come from prompt tokens (LayerNorm and the frozen projection, as in VPT) or be
    learned in head space (E2VPT, APT): the op does not care. Their order does not matter either.

    Args:
        qkv: (B, N, 3, H, d), the packed product of the image rows, as it lies in memory.
        kv_prompt: (G, P, 2, H, d) prompt keys and values; P = 0 is plain attention. G = 1 is shared
            by the batch, G = B is per sample, any other G needs `group`.
        group: (B,) int32 or int64 in [0, G): which prompt set each sample reads.
        scale: factor of the logits; d ** -0.5 when None.
        queries: "all" rows, or "class": only row 0 asks (last block, class attention).
        log_multiplicity: (G, P) float, added to the prompt logits: log m stands for m equal
            prompts, -inf masks a prompt (prompt sets of different sizes in one batch).
        bias: (H or 1, N, N) float, added to the logits of image keys: a constant of the backbone
            (relative positions of BEiT or Swin).
        mask: (W, N, N) float, added as well, row by row of the batch in turn: sample b has entry
            b mod W (B is a multiple of W; the W windows of an image stand together). -inf masks a
            key; no row may be masked whole.
        causal: row i sees image rows 0 to i alone, as in CLIP's text tower, and all prompts.

    Returns:
        out (B, N, H d), or (B, 1, H d) for "class", in the dtype of qkv; and the log-sum-exp of
        each row's logits (B, H, N) or (B, H, 1) in fp32 or wider, not differentiable.

    Gradients: qkv and kv_prompt; further ones are those of `reference`. The latter is summed over
    the batch in fp32 in a fixed order (deterministic). None of log_multiplicity, and bias and mask
    may not ask for one.
    Numerics: softmax in fp32 or wider; products of fp32 inputs are exact fp32 in the kernels.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
    """
    _check(qkv, kv_prompt, group, queries, log_multiplicity, bias, mask)
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    group = None if group is None else group.long()
    return _prompt_attention(
        qkv, kv_prompt, group, scale, queries == "class", log_multiplicity, bias, mask, causal
    )


@torch.no_grad()
def class_attention(
    qkv: Tensor,
    kv_prompt: Tensor,
    lse: Tensor,
    group: Tensor | None = None,
    *,
    scale: float | None = None,
    log_multiplicity: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """exp(scale q_0 [k_p; k]^T + [log m; bias_0 + mask_0] - lse_0): how much the class row looks
    at every key.

    For rankings of image rows (iVPT) and for pictures: no map of all rows is ever formed.

    Args:
        qkv, kv_prompt, group, scale, log_multiplicity, bias, mask: as `prompt_attention` was given
            them.
        lse: (B, H, N) or (B, H, 1), as it returned it.

    Returns:
        (B, H, P + N), prompts first, in fp32 or wider; rows sum to 1. `[..., P:].mean(1)` is the
        mean over heads of the attention on image rows.

    Gradients: none; lse carries none either.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
    """
    _check(qkv, kv_prompt, group, "class", log_multiplicity, bias, mask)
    batch, tokens, _, heads, width = qkv.shape
    if tuple(lse.shape) not in ((batch, heads, tokens), (batch, heads, 1)):
        raise ValueError(
            f"lse must be ({batch}, {heads}, {tokens}) or ({batch}, {heads}, 1), "
            f"got {describe(lse)}"
        )
    scale = width**-0.5 if scale is None else float(scale)
    with torch.autocast(qkv.device.type, enabled=False):
        return reference.class_attention(
            qkv, kv_prompt, lse, group, scale, log_multiplicity, bias, mask
        )


def _check(
    qkv: Tensor,
    kv_prompt: Tensor,
    group: Tensor | None,
    queries: str,
    log_multiplicity: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be a float tensor (B, N, 3, H, d), got {describe(qkv)}")
    if qkv.shape[1] == 0:
        raise ValueError(f"qkv must have at least one row per image, got {describe(qkv)}")
    tail = tuple(qkv.shape[3:])
    if kv_prompt.dim() != 5 or kv_prompt.shape[2] != 2 or tuple(kv_prompt.shape[3:]) != tail:
        raise ValueError(
            f"kv_prompt must be (G, P, 2, {tail[0]}, {tail[1]}), got {describe(kv_prompt)}"
        )
    if kv_prompt.dtype != qkv.dtype or kv_prompt.device != qkv.device:
        raise TypeError(f"kv_prompt must be like qkv ({describe(qkv)}), got {describe(kv_prompt)}")
    indices = (torch.int32, torch.int64)
    if group is not None and (
        group.dtype not in indices or group.shape != qkv.shape[:1] or group.device != qkv.device
    ):
        raise ValueError(
            f"group must be int32 or int64 ({qkv.shape[0]},) on {qkv.device}, got {describe(group)}"
        )
    if queries not in ("all", "class"):
        raise ValueError(f"queries must be 'all' or 'class', got {queries!r}")
    sets, prompts = kv_prompt.shape[:2]
    if group is None and sets not in (1, qkv.shape[0]):
        raise ValueError(f"group is needed: kv_prompt has {sets} sets for {qkv.shape[0]} images")
    if log_multiplicity is not None and (
        tuple(log_multiplicity.shape) != (sets, prompts)
        or not log_multiplicity.is_floating_point()
        or log_multiplicity.device != qkv.device
    ):
        raise ValueError(
            f"log_multiplicity must be float ({sets}, {prompts}) on {qkv.device}, "
            f"got {describe(log_multiplicity)}"
        )
    batch, heads = len(qkv), qkv.shape[3]
    if bias is not None:
        _check_places("bias", bias, qkv, f"{heads} or 1", lambda count: count in (1, heads))
    if mask is not None:
        divides = lambda count: count > 0 and batch % count == 0
        _check_places("mask", mask, qkv, f"a divisor of {batch}", divides)


def _check_places(
    name: str, t: Tensor, qkv: Tensor, wanted: str, right: Callable[[int], bool]
) -> None:
    """Raise unless `t` is what is added to the logits of all places of an image."""
    rows = qkv.shape[1]
    if (
        t.dim() != 3
        or tuple(t.shape[1:]) != (rows, rows)
        or not right(len(t))
        or not t.is_floating_point()
        or t.device != qkv.device
    ):
        raise ValueError(
            f"{name} must be float ({wanted}, {rows}, {rows}) on {qkv.device}, got {describe(t)}"
        )
    if t.requires_grad:
        raise ValueError(f"{name} requires a gradient, and this op has none for it: detach it")


def _outputs(
    qkv: Tensor,
    kv_prompt: Tensor,
    group: Any,
    scale: float,
    class_only: bool,
    log_multiplicity: Any,
    bias: Any,
    mask: Any,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    n = reference.Sizes.of(qkv, kv_prompt, class_only)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return (
        qkv.new_empty(n.batch, n.rows, n.heads * n.width),
        qkv.new_empty(n.batch, n.heads, n.rows, dtype=wide),
    )


def _definition(*given: Any) -> tuple[Tensor, Tensor]:
    out, lse = reference.prompt_attention(*given)
    return out, lse.detach()


_prompt_attention = registration.differentiable(
    "prompt_attention",
    "(Tensor qkv, Tensor kv_prompt, Tensor? group, float scale, bool class_only, "
    "Tensor? log_multiplicity, Tensor? bias, Tensor? mask, bool causal=False) "
    "-> (Tensor out, Tensor lse)",
    "(Tensor d_out, Tensor qkv, Tensor kv_prompt, Tensor? group, float scale, bool class_only, "
    "Tensor? log_multiplicity, Tensor? bias, Tensor? mask, Tensor out, Tensor lse, bool need_qkv, "
    "bool causal=False) -> (Tensor d_qkv, Tensor d_kv_prompt)",
    run=("forward", "backward"),
    fake=_outputs,
    definition=_definition,
    layout=registration.contiguous_rows,  # PyTorch's CPU kernel reads out of bounds otherwise
)
