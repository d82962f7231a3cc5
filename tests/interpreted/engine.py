"""A whole training step on Triton kernels, in the interpreter, beside the reference versions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import pae
from pae_kernels import backends


@pytest.mark.parametrize("memory", ("exact", "lowest"))
def test_step_equals_the_reference(monkeypatch, memory):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(3), num_classes=4)
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
