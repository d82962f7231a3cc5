"""Logits with P zero prompts in place, forward only.

In deep prompting P zero rows are P equal keys, and those are one key with + log P. A zero row is
normalised to zero, so its key and value are the folded biases. On the CPU that key never stands
among the others: attention runs over the image rows alone, and the key's share enters afterwards,

    softmax([e; s]) [v_p; V] = o + sigmoid(e - lse) (v_p - o),  o = softmax(s) V, lse = log sum e^s,

with e = q . k_p + log P, which is linear in the normalised rows: H thin columns. So no key or value
is copied to stand beside the prompt's, and no mask is read. Nothing is kept; sums and activations
happen in place; the last block forms no key or value of any row (`pae.engine`).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pae_kernels import pointwise

from .. import engine
from ..model import PromptedViT
from ..plan import BlockPlan, FrozenPlan
from ..sequence import cut_rows, insert_rows

# rows of all forwards of one size that pay for laying the weights out for it; measured: some 3000
_WORTH_PACKING = 4096

_IN_PLACE = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda u: torch.ops.aten.gelu_(u, approximate="tanh"),
    "silu": torch.ops.aten.silu_,
    "relu": torch.ops.aten.relu_,
}


class ZeroPromptForward:
    """The frozen blocks of a model with `count` zero prompts in each, then its head.

    Prompts that live on between the blocks (VPT-shallow) are zero rows at first and real ones then:
    they run as rows. The backbone's weights must not change while this lives.

    Args:
        model: a PromptedViT.
        count: P, at least 1.
        dtype: of the products; the residual stream keeps the backbone's.
    """

    def __init__(self, model: PromptedViT, count: int, dtype: torch.dtype) -> None:
        self._model, self._plan = model, model.plan(dtype)
        self._entering, self._prompts, log_count = count, None, None
        if not model.prompts.enters_sequence:
            zero = torch.zeros_like(self._plan.w_qkv[0, :1])[None]
            log_count = torch.full((1, 1), math.log(count), dtype=torch.float64, device=zero.device)
            wide = torch.promote_types(dtype, torch.float32)
            self._prompts = engine.BlockPrompts(zero, None, log_count.to(wide))
            self._entering = 0
        self._blocks = [_Block(block, log_count) for block in self._plan.blocks[:-1]]

    def expect(self, rows: int, times: int) -> None:
        """Says that forwards of `rows` rows (images times tokens) come `times` times.

        On a CPU the weights may then be laid out for them, a second copy of the backbone.
        """
        rows = rows if rows * times >= _WORTH_PACKING else 0
        for block in self._blocks:
            block.lay_out(rows)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of embedded rows (B, N, D), which are overwritten."""
        view = self._model.view
        at, class_only = view.num_prefix_tokens, view.reads_class_only
        if self._entering:
            x = insert_rows(x, x.new_zeros(self._entering, x.shape[-1]), at)
        x, delta = x.contiguous(), None
        for block in self._blocks:
            if block.plan.q_norm is None and block.plan.k_norm is None:
                x, delta = block(x, delta)
            else:
                x = self._walk(block.plan, x, class_only=False)
        x = x if delta is None else x.add_(delta)
        x = self._walk(self._plan.blocks[-1], x, class_only)
        if self._entering and not class_only:
            x = cut_rows(x, at, self._entering)
        return self._model.head(view.readout(x))

    def _walk(self, block: BlockPlan, x: Tensor, class_only: bool) -> Tensor:
        plan: FrozenPlan = replace(self._plan, blocks=[block])
        return engine.walk(plan, x, [self._prompts], None, class_only, "keep")


class _Block:
    """A block without per-head norms: (x, delta) to (x, delta), where x is overwritten.

    delta is what the product before has yet to add to x, or None when it has. It has when both
    dtypes agree and are wide, so that x can be the product's accumulator.

    Args:
        log_count: (1, 1) fp64, log P; None without a prompt key.
    """

    def __init__(self, plan: BlockPlan, log_count: Tensor | None) -> None:
        self.plan = plan
        self._rows, self._laid_out = 0, {}
        own, heads, width = plan.num_heads * plan.head_width, plan.num_heads, plan.head_width
        self._has_key = log_count is not None
        self._kv = plan.b_kv.view(1, 1, 2, heads, width)[:, : int(self._has_key)]
        self._log_count = None
        if log_count is None:
            return
        self._log_count = log_count.to(torch.promote_types(plan.w_qkv.dtype, torch.float32))
        k = plan.b_kv[:own].double().view(heads, width)
        w_q = plan.w_qkv[:own].double().view(heads, width, -1)
        b_q = plan.b_qkv[:own].double().view(heads, width)
        self._w_logit = torch.einsum("hd,hdk->hk", k, w_q).to(plan.w_qkv)
        self._b_logit = ((k * b_q).sum(1) + log_count[0]).to(plan.w_qkv)

    def lay_out(self, rows: int) -> None:
        """Weights in MKL's own order for products of `rows` rows, where there is such an order.

        Measured: 6 to 10 % less time than products that read the weights as they lie.
        """
        if rows == self._rows:
            return
        self._rows, self._laid_out = rows, {}
        if rows and _mkl_can_pack(self.plan.w_qkv):
            for name in ("w_qkv", "w_proj", "w_fc1", "w_fc2"):
                weight = getattr(self.plan, name)
                self._laid_out[name] = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)

    def __call__(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
        plan = self.plan
        x, rows = self._sum_and_norm(x, delta, plan.eps1)
        x, delta = self._add(x, self._attention(rows), "proj")
        x, rows = self._sum_and_norm(x, delta, plan.eps2)
        hidden = self._product(rows, "fc1")
        activation = _IN_PLACE.get(plan.activation)
        if activation is None:
            hidden = pointwise.activation(hidden, plan.activation)[0]
        else:
            activation(hidden)
        return self._add(x, hidden, "fc2")

    def _sum_and_norm(self, x: Tensor, delta: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        dtype = self.plan.w_qkv.dtype
        if delta is None:
            return x, pointwise.layer_norm(x, eps, dtype)[0]
        return pointwise.add_layer_norm(x, delta, eps, dtype)[:2]

    def _attention(self, rows: Tensor) -> Tensor:
        plan = self.plan
        qkv = self._product(rows, "qkv")
        qkv = qkv.view(*rows.shape[:2], 3, plan.num_heads, plan.head_width)
        if not _has_flash_with_lse(rows):
            return torch.ops.pae.prompt_attention_fwd(
                qkv, self._kv, None, 1.0, False, self._log_count
            )[0]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=1.0)
        out = out.transpose(1, 2)  # (B, N, H, d), as it lies in memory
        if self._has_key:
            logit = F.linear(rows, self._w_logit, self._b_logit)  # (B, N, H)
            share = torch.sigmoid(logit - lse.transpose(1, 2)).to(out.dtype)
            out = out.lerp_(self._kv[0, 0, 1], share[..., None])
        return out.flatten(2)

    def _add(self, x: Tensor, rows: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
        """x + rows W^T + b, or the two apart."""
        if x.dtype != rows.dtype or x.dtype.itemsize < 4:
            return x, self._product(rows, name)
        if self._fits(rows, name):
            return x.add_(self._product(rows, name)), None
        weight, bias = getattr(self.plan, f"w_{name}"), getattr(self.plan, f"b_{name}")
        x.add_(bias).view(-1, x.shape[-1]).addmm_(rows.flatten(0, 1), weight.t())
        return x, None

    def _product(self, rows: Tensor, name: str) -> Tensor:
        weight, bias = getattr(self.plan, f"w_{name}"), getattr(self.plan, f"b_{name}")
        if not self._fits(rows, name):
            return F.linear(rows, weight, bias)
        laid_out = self._laid_out[f"w_{name}"]
        return torch.ops.mkl._mkl_linear(rows, laid_out, weight, bias, self._rows)

    def _fits(self, rows: Tensor, name: str) -> bool:
        return f"w_{name}" in self._laid_out and rows.shape[:2].numel() == self._rows


def _has_flash_with_lse(rows: Tensor) -> bool:
    """Whether PyTorch's fused attention for this device hands out lse at no cost; where it does not
    run, the op of `pae_kernels` takes the key with its log multiplicity.
    """
    return rows.device.type == "cpu"


def _mkl_can_pack(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
