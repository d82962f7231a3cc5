"""A whole training step on Triton kernels, in the interpreter, beside the reference versions."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

import pae
from pae_kernels import backends


def build(depth: int = 3) -> pae.PromptedViT:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=depth, num_heads=2)
    return pae.PromptedViT(vit, pae.prompts.VPTDeep(3), num_classes=4)


@pytest.mark.parametrize("memory", ("keep", "recompute"))
def test_step_equals_the_reference(monkeypatch, memory):
    model = build()
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 3])

    def step(backend):
        monkeypatch.setenv("PAE_BACKEND", backend)
        for op in ("prompt_attention", "pointwise"):
            assert backends.choose(op, "cpu").__name__.endswith(backend)
        model.zero_grad()
        logits = pae.fast_forward(model, images, memory=memory)
        F.cross_entropy(logits, labels).backward()
        return logits.detach(), model.prompts.tokens.grad.clone()

    for got, expected in zip(step("triton"), step("reference"), strict=True):
        assert (got - expected).norm() < 1e-5 * expected.norm()


class Work(TorchDispatchMode):
    """Counts the ops that do something: views and allocations do not."""

    IDLE = ("view", "_unsafe_view", "detach", "empty")

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in self.IDLE:
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))


def test_what_one_more_block_adds_to_a_step():
    """Four products, attention and three pointwise passes each way; 16-bit rows, an fp32 stream."""

    def ops(depth: int) -> Counter[str]:
        model, images = build(depth), torch.randn(2, 3, 16, 16)
        model.plan(torch.float16)  # folded once, not in the step
        with torch.autocast("cpu", torch.float16):
            with Work() as forward:
                logits = pae.fast_forward(model, images)
            with Work() as backward:
                logits.float().sum().backward()
        return forward.ops, backward.ops

    (less, less_back), (more, more_back) = ops(3), ops(4)
    assert more - less == Counter(
        addmm=4, prompt_attention_fwd=1, add_layer_norm_fwd=2, activation_fwd=1
    )
    assert more_back - less_back == Counter(
        mm=4, prompt_attention_bwd=1, layer_norm_bwd=2, activation_bwd=1
    )
