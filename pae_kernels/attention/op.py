"""The op `prompt_attention`: signature, checks, registration, autograd. Reads top to bottom as
every op does. `class_attention` shows one row of its softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from . import reference

backends.register(
    "prompt_attention",
    backends.Version("triton", f"{__package__}.triton", backends.with_triton),
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
) -> tuple[Tensor, Tensor]:
    """softmax(scale q [k_p; k]^T + [log m; 0]) [v_p; v]: image queries over prompt and image keys.

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

    Returns:
        out (B, N, H d), or (B, 1, H d) for "class", in the dtype of qkv; and the log-sum-exp of
        each row's logits (B, H, N) or (B, H, 1) in fp32 or wider, not differentiable.

    Gradients: qkv and kv_prompt, once; the latter is summed over the batch in fp32 in a fixed
    order (deterministic). None of log_multiplicity.
    Numerics: softmax in fp32 or wider; products of fp32 inputs are exact fp32 in the kernels.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
    """
    _check(qkv, kv_prompt, group, queries, log_multiplicity)
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    group = None if group is None else group.long()
    args = (qkv, kv_prompt, group, scale, queries == "class", log_multiplicity)
    if torch.compiler.is_compiling():
        return torch.ops.pae.prompt_attention_fwd(*args)
    return _PromptAttention.apply(*args)


@torch.no_grad()
def class_attention(
    qkv: Tensor,
    kv_prompt: Tensor,
    lse: Tensor,
    group: Tensor | None = None,
    *,
    scale: float | None = None,
    log_multiplicity: Tensor | None = None,
) -> Tensor:
    """exp(scale q_0 [k_p; k]^T + [log m; 0] - lse_0): how much the class row looks at every key.

    For rankings of image rows (iVPT) and for pictures: no map of all rows is ever formed.

    Args:
        qkv, kv_prompt, group, scale, log_multiplicity: as `prompt_attention` was given them.
        lse: (B, H, N) or (B, H, 1), as it returned it.

    Returns:
        (B, H, P + N), prompts first, in fp32 or wider; rows sum to 1. `[..., P:].mean(1)` is the
        mean over heads of the attention on image rows.

    Gradients: none; lse carries none either.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
    """
    _check(qkv, kv_prompt, group, "class", log_multiplicity)
    batch, tokens, _, heads, width = qkv.shape
    if tuple(lse.shape) not in ((batch, heads, tokens), (batch, heads, 1)):
        raise ValueError(
            f"lse must be ({batch}, {heads}, {tokens}) or ({batch}, {heads}, 1), got {_says(lse)}"
        )
    scale = width**-0.5 if scale is None else float(scale)
    with torch.autocast(qkv.device.type, enabled=False):
        return reference.class_attention(qkv, kv_prompt, lse, group, scale, log_multiplicity)


def _check(qkv, kv_prompt, group, queries, log_multiplicity) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be a float tensor (B, N, 3, H, d), got {_says(qkv)}")
    if qkv.shape[1] == 0:
        raise ValueError(f"qkv must have at least one row per image, got {_says(qkv)}")
    tail = tuple(qkv.shape[3:])
    if kv_prompt.dim() != 5 or kv_prompt.shape[2] != 2 or tuple(kv_prompt.shape[3:]) != tail:
        raise ValueError(
            f"kv_prompt must be (G, P, 2, {tail[0]}, {tail[1]}), got {_says(kv_prompt)}"
        )
    if kv_prompt.dtype != qkv.dtype or kv_prompt.device != qkv.device:
        raise TypeError(f"kv_prompt must be like qkv ({_says(qkv)}), got {_says(kv_prompt)}")
    indices = (torch.int32, torch.int64)
    if group is not None and (
        group.dtype not in indices or group.shape != qkv.shape[:1] or group.device != qkv.device
    ):
        raise ValueError(
            f"group must be int32 or int64 ({qkv.shape[0]},) on {qkv.device}, got {_says(group)}"
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
            f"got {_says(log_multiplicity)}"
        )


def _says(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


_lib = torch.library.Library("pae", "FRAGMENT")
_lib.define(
    "prompt_attention_fwd(Tensor qkv, Tensor kv_prompt, Tensor? group, float scale, "
    "bool class_only, Tensor? log_multiplicity) -> (Tensor, Tensor)"
)
_lib.define(
    "prompt_attention_bwd(Tensor d_out, Tensor qkv, Tensor kv_prompt, Tensor? group, float scale, "
    "bool class_only, Tensor? log_multiplicity, Tensor out, Tensor lse, bool need_qkv) "
    "-> (Tensor, Tensor)"
)


def _dense(t: Tensor) -> Tensor:
    """`t` with its last axis contiguous: what every version may rely on (PyTorch's CPU kernel reads
    out of bounds otherwise).
    """
    return t if t.stride(-1) == 1 else t.contiguous()


# autocast reaches into an op's implementation: products stay in the dtype that came in
def _forward(qkv, *rest):
    version = backends.choose("prompt_attention", qkv.device, qkv.dtype)
    with torch.autocast(qkv.device.type, enabled=False):
        return version.forward(_dense(qkv), *rest)


def _backward(d_out, qkv, *rest):
    version = backends.choose("prompt_attention", qkv.device, qkv.dtype)
    with torch.autocast(d_out.device.type, enabled=False):
        return version.backward(_dense(d_out), _dense(qkv), *rest)


for _key in ("CPU", "CUDA"):
    _lib.impl("prompt_attention_fwd", _forward, _key)
    _lib.impl("prompt_attention_bwd", _backward, _key)


@torch.library.register_fake("pae::prompt_attention_fwd", lib=_lib)
def _(qkv, kv_prompt, group, scale, class_only, log_multiplicity):
    batch, tokens, _, heads, width = qkv.shape
    rows = 1 if class_only else tokens
    lse = torch.promote_types(qkv.dtype, torch.float32)
    return (
        qkv.new_empty(batch, rows, heads * width),
        qkv.new_empty(batch, heads, rows, dtype=lse),
    )


@torch.library.register_fake("pae::prompt_attention_bwd", lib=_lib)
def _(d_out, qkv, kv_prompt, group, scale, class_only, log_multiplicity, out, lse, need_qkv):
    d_qkv = (
        torch.empty_like(qkv, memory_format=torch.contiguous_format)
        if need_qkv
        else qkv.new_empty(0)
    )
    return d_qkv, torch.empty_like(kv_prompt, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    qkv, kv_prompt, group, ctx.scale, ctx.class_only, log_multiplicity = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, kv_prompt, group, log_multiplicity, out, lse)


def _grads(ctx, d_out, _d_lse):
    qkv, kv_prompt, group, log_multiplicity, out, lse = ctx.saved_tensors
    need_qkv = ctx.needs_input_grad[0]
    d_qkv, d_kv = torch.ops.pae.prompt_attention_bwd(
        d_out,
        qkv,
        kv_prompt,
        group,
        ctx.scale,
        ctx.class_only,
        log_multiplicity,
        out,
        lse,
        need_qkv,
    )
    return d_qkv if need_qkv else None, d_kv, None, None, None, None


torch.library.register_autograd(
    "pae::prompt_attention_fwd", _grads, setup_context=_setup_context, lib=_lib
)


class _PromptAttention(torch.autograd.Function):
    """Eager path: the same two ops with a third of `register_autograd`'s cost per call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = torch.ops.pae.prompt_attention_fwd(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(once_differentiable(_grads))
