"""CUDA-graph capture of a step: refused without a GPU, equal to eager steps with one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pae

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def test_without_a_gpu_it_is_an_error(tiny_vit):
    model = pae.PromptedViT(tiny_vit(), pae.prompts.VPTDeep(2))
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="images and model must be on one GPU, got cpu and cpu"):
        pae.graphed_step(model, images, labels)


@on_gpu
@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("kld", (False, True))
def test_replays_follow_the_inputs(tiny_vit, autocast, kld):
    """New images, labels and parameters reach a replay: values of eager steps, not of capture."""
    model = pae.PromptedViT(tiny_vit(), pae.prompts.VPTDeep(5), pae.KLD(16) if kld else None)
    model.cuda().train()

    def batch(seed):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(4, 3, 32, 32, generator=generator)
        return images.cuda(), torch.randint(0, 10, (4,), generator=generator).cuda()

    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        step = pae.graphed_step(model, *batch(0))
    for seed in range(1, 4):
        images, labels = batch(seed)
        loss, logits = step(images, labels)
        replayed = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            expected = pae.fast_forward(model, images)
            expected_loss = F.cross_entropy(expected, labels)
        (expected_loss + model.penalty()).backward()
        eager = [p.grad for p in model.parameters() if p.grad is not None]
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(replayed, eager)
        with torch.no_grad():
            model.prompts.tokens.add_(0.1)
    with pytest.raises(ValueError, match=r"images must be \(4, 3, 32, 32\)"):
        step(images[:2], labels[:2])
