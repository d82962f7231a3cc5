"""Logits with P zero prompts in place, forward only.

In deep prompting P zero rows are P equal keys, and those are one key with + log P. A zero row is
normalised to zero, so its key and value are the folded biases. On the CPU that key never stands
among the others: attention runs over the image rows alone, and the key's share enters afterwards,

    softmax([e; s]) [v_p; V] = o + sigmoid(e - lse) (v_p - o),  o = softmax(s) V, lse = log sum e^s,

with e = q . k_p + log P, which is linear in the normalised rows: H thin columns. So no key or value
is copied to stand beside the prompt's, and no mask is read. Nothing is kept; sums and activations
happen in place; the last block forms no key or value of any row (`pae.block`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pae_kernels.precision import exact_products

from .. import block as frozen
from ..engine import BlockPrompts, walk
from ..inference import InPlace
from ..model import PromptedViT
from ..plan import BlockPlan
from ..sequence import insert_rows, pooled_rows

# rows of all forwards of one size that pay for laying the weights out for it
_WORTH_PACKING = 4096


class ZeroPromptForward:
    """The frozen blocks of a model with `count` zero prompts in each, then its head.

    Prompts that live on between the blocks (VPT-shallow) are zero rows at first and real ones then:
    they run as rows, as do all in the last block when the readout pools them. The backbone's
    weights must not change while this lives.

    Args:
        model: a PromptedViT.
        count: P, at least 1.
        dtype: of the products; the residual stream keeps the backbone's.
        size: (H, W) of the images; the backbone's own when None.
    """

    def __init__(
        self,
        model: PromptedViT,
        count: int,
        dtype: torch.dtype,
        size: tuple[int, int] | None = None,
    ) -> None:
        self._model, self._plan = model, model.plan(dtype, size)
        self._entering, self._prompts, log_count = count, BlockPrompts(), None
        if not model.prompts.enters_sequence:
            zero = torch.zeros_like(self._plan.w_qkv[0, :1])[None]
            wide = torch.promote_types(dtype, torch.float32)
            log_count = torch.full((1, 1), math.log(count), dtype=torch.float64, device=zero.device)
            self._prompts = BlockPrompts(zero, log_multiplicity=log_count.to(wide))
            self._entering = 0
        joins = model.pool != "image" and not self._entering
        self._joining = count if joins else 0
        self._steps = [_Steps(block, log_count) for block in self._plan.blocks[:-1]]

    def expect(self, rows: int, times: int) -> None:
        """Says that forwards of `rows` rows (images times tokens) come `times` times.

        On a CPU the weights may then be laid out for them, a second copy of the backbone.
        """
        rows = rows if rows * times >= _WORTH_PACKING else 0
        for block, steps in zip(self._plan.blocks, self._steps):
            steps.lay_out(block, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of embedded rows (B, N, D), which are overwritten."""
        view = self._model.view
        at, class_only = view.num_prefix_tokens, self._plan.class_only
        if self._entering:
            x = insert_rows(x, x.new_zeros(self._entering, x.shape[-1]), at)
        stream = frozen.Stream(x.contiguous())
        for i, (block, steps) in enumerate(zip(self._plan.blocks, self._steps)):
            if block.keys_are_linear:
                stream = frozen.forward(block, stream, steps.keys, steps)
            else:
                stream = frozen.Stream(self._walk(i, stream.sum(), class_only=False))
        x, prompts = stream.sum(), self._prompts
        if self._joining:
            x = insert_rows(x, x.new_zeros(self._joining, x.shape[-1]), at)
            prompts = BlockPrompts()
        x = self._walk(len(self._steps), x, class_only, prompts)
        if not class_only:
            x = pooled_rows(x, at, self._entering + self._joining, self._model.pool)
        return self._model.head(view.readout(x))

    def _walk(
        self, i: int, x: Tensor, class_only: bool, prompts: BlockPrompts | None = None
    ) -> Tensor:
        prompts = self._prompts if prompts is None else prompts
        return walk(self._plan.only(i, i + 1), x, lambda _, stream: (stream, prompts), class_only)


class _Steps(InPlace):
    """A block whose keys are linear and with one prompt key.

    Args:
        log_count: (1, 1) fp64, log P; None without a prompt key.
    """

    def __init__(self, plan: BlockPlan, log_count: Tensor | None) -> None:
        super().__init__()
        self.keys = frozen.no_keys(plan)
        self._has_key = log_count is not None
        if log_count is None:
            return
        heads, width = plan.num_heads, plan.head_width
        wide = torch.promote_types(plan.w_qkv.dtype, torch.float32)
        kv = plan.b_kv.view(1, 1, 2, heads, width)
        self.keys = frozen.Keys(kv, None, log_count.to(wide))
        own = heads * width
        k = plan.b_kv[:own].double().view(heads, width)
        w_q = plan.w_qkv[:own].double().view(heads, width, -1)
        b_q = plan.b_qkv[:own].double().view(heads, width)
        self._w_logit = torch.einsum("hd,hdk->hk", k, w_q).to(plan.w_qkv)
        self._b_logit = ((k * b_q).sum(1) + log_count[0]).to(plan.w_qkv)

    def attention(
        self,
        xhat: Tensor,
        qkv: Tensor,
        keys: frozen.Keys,
        class_only: bool,
        bias: Tensor | None,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        if causal or not _has_flash_with_lse(xhat):
            return super().attention(xhat, qkv, keys, class_only, bias, causal)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        added = None if bias is None else bias[None].to(q.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=added, scale=1.0
        )
        out = out.transpose(1, 2)  # (B, N, H, d), as it lies in memory
        if self._has_key:
            with exact_products:
                logit = F.linear(xhat, self._w_logit, self._b_logit)  # (B, N, H)
            share = torch.sigmoid(logit - lse.transpose(1, 2)).to(out.dtype)
            out = out.lerp_(keys.kv[0, 0, 1], share[..., None])
        return out.flatten(2), lse


def _has_flash_with_lse(rows: Tensor) -> bool:
    """Whether PyTorch's fused attention for this device hands out lse at no cost; where it does not
    run, the op of `pae_kernels` takes the key with its log multiplicity.
    """
    return rows.device.type == "cpu"
