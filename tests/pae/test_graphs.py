"""CUDA-graph capture of a step: refused without a GPU, equal to eager steps with one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import pae
from pae import graphs
from pae_kernels.koopman import runs_on_device

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def test_without_a_gpu_it_is_an_error(tiny_vit):
    model = pae.PromptedViT(tiny_vit(), pae.prompts.VPTDeep(2))
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="images and model must be on one GPU, got cpu and cpu"):
        pae.graphed_step(model, images, labels)


def test_on_a_cpu_the_penalty_reads_on_the_host():
    assert not runs_on_device("cpu")


def test_the_penalty_is_captured_where_kernels_run(tiny_vit, monkeypatch):
    """Asked of the version that would run, in the dtype that KLD computes in."""
    asked = []

    def on_device(device, dtype):
        asked.append(dtype)
        return dtype == torch.float32

    monkeypatch.setattr(graphs, "runs_on_device", on_device)
    plain = pae.PromptedViT(tiny_vit(), pae.prompts.VPTDeep(2))
    assert graphs._penalty_on_device(plain) and not asked
    model = pae.PromptedViT(tiny_vit(), pae.prompts.VPTDeep(2), pae.KLD(8))
    assert graphs._penalty_on_device(model)
    assert graphs._penalty_on_device(model.to(torch.bfloat16))
    assert not graphs._penalty_on_device(model.to(torch.float64))
    assert asked == [torch.float32, torch.float32, torch.float64]


KLDS = {
    "none": lambda: None,
    "global": lambda: pae.KLD(16),
    "layerwise, gauge": lambda: pae.KLD(16, "layerwise", gauge="layernorm", first_block=True),
    "paper": lambda: pae.KLD(16, formulation="paper"),
}


@on_gpu
@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("kld", KLDS)
@pytest.mark.parametrize("inside", (True, False))
def test_replays_follow_the_inputs(tiny_vit, monkeypatch, autocast, kld, inside):
    """New images, labels and parameters reach a replay: values of eager steps, not of capture."""
    model = pae.PromptedViT(tiny_vit(), pae.prompts.VPTDeep(5), KLDS[kld]())
    model.cuda().train()
    if not inside:
        monkeypatch.setattr(graphs, "_penalty_on_device", lambda model: False)
    elif model.kld is not None:
        assert graphs._penalty_on_device(model)

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
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
    with pytest.raises(ValueError, match=r"images must be \(4, 3, 32, 32\)"):
        step(images[:2], labels[:2])
