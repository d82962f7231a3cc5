"""Whole training steps on Triton kernels, beside the same steps on the reference versions."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

import pae
from pae_kernels import backends
from tests.kernels.executions import FP16, each

OP = "prompt_attention"  # with the others on the versions of the same name
OPS = "prompt_attention", "pointwise", "token_mix", "prompt_bottleneck"
TRITON = ("interpreter", "gpu")


def build(family, patch=8, depth=3):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=patch, embed_dim=32, depth=depth, num_heads=2)
    return pae.PromptedViT(vit, family, num_classes=4).train()


def assert_as_the_reference(execution, monkeypatch, step):
    def on(backend):
        monkeypatch.setenv("PAE_BACKEND", backend)
        for op in OPS:
            assert backends.choose(op, execution.device).__name__.endswith(backend)
        return step()

    limit = execution.pick(interpreter=1e-5, gpu=1e-4)
    for got, expected in zip(on("triton"), on("reference"), strict=True):
        assert (got - expected).norm() < limit * expected.norm()


@each(OP, "memory", interpreter=["keep", "recompute"], gpu=["keep", "recompute8", "recompute"])
def test_step_equals_the_reference(execution, monkeypatch, memory):
    model = build(pae.prompts.VPTDeep(3)).to(execution.device)
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 3])
    images, labels = images.to(execution.device), labels.to(execution.device)

    def step():
        model.zero_grad()
        logits = pae.fast_forward(model, images, memory=memory)
        F.cross_entropy(logits, labels).backward()
        return logits.detach(), model.prompts.tokens.grad.clone()

    assert_as_the_reference(execution, monkeypatch, step)


@each(OP, on=TRITON)
def test_adaptive_step_equals_the_reference(execution, monkeypatch):
    """VAPT through the engine: every kernel of a step, and the means that a regulariser sees."""
    family = pae.prompts.VAPT(3, hidden=4, channel_dropout=0.2, hidden_dropout=0.2)
    model = build(family, patch=4, depth=2).to(execution.device)
    with torch.no_grad():
        for p in family.parameters():
            p.add_(0.3 * torch.randn_like(p))
    images = torch.randn(2, 3, 16, 16).to(execution.device)

    def step():
        model.zero_grad()
        torch.manual_seed(3)  # dropout
        logits = pae.fast_forward(model, images)
        seen = sum(rows.square().sum() for rows in family.raw_prompts())
        (logits.square().sum() + seen).backward()
        return logits.detach(), *(p.grad.clone() for p in family.parameters())

    assert_as_the_reference(execution, monkeypatch, step)


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


@each(OP, on=["interpreter"])
def test_what_one_more_block_adds_to_a_step(execution):
    """Four products, attention and three pointwise passes each way; 16-bit rows, an fp32 stream.

    One product more, of the prompts' keys and values: on a CPU, unlike on a GPU, each block has
    its own in 16 bits.
    """

    def ops(depth):
        model, images = build(pae.prompts.VPTDeep(3), depth=depth), torch.randn(2, 3, 16, 16)
        model.plan(FP16)  # folded once, not in the step
        with torch.autocast("cpu", FP16):
            with Work() as forward:
                logits = pae.fast_forward(model, images)
            with Work() as backward:
                logits.float().sum().backward()
        return forward.ops, backward.ops

    (less, less_back), (more, more_back) = ops(3), ops(4)
    assert more - less == Counter(
        addmm=4 + 1, prompt_attention_fwd=1, add_layer_norm_fwd=2, activation_fwd=1
    )
    assert more_back - less_back == Counter(
        mm=4 + 1, prompt_attention_bwd=1, layer_norm_bwd=2, activation_bwd=1
    )
