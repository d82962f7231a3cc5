"""Clips of moving squares, which prompts in a frozen model learn and no single frame tells.

A square of some colour wanders over noise, to the left or to the right, and what leaves on one side
comes in on the other. Its place in a frame has the same distribution in both classes, so that
whoever looks at one frame cannot do better than to guess. The backbone is a VideoMAE of three
blocks with random weights, of which nothing is trained but the norm behind the mean of its rows,
beside prompts and head.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pae
from pae.prompts import APT, PromptFamily, VPTDeep

FRAMES, SIDE = 16, 32
CLASSES = ("left", "right")
BATCH = 32

# family, and learning rate
ARMS: dict[str, tuple[Callable[[], PromptFamily], float]] = {
    "APT": (lambda: APT(16), 0.1),
    "VPT-deep": (lambda: VPTDeep(8), 0.02),
}


def draw(count: int, seed: int, still: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(count, FRAMES, SIDE, SIDE, 3) uint8 clips and their labels, half of each class.

    still: the first frame of each, again and again.
    """
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % 2)
    clips = random.integers(0, 40, (count, FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    for clip, label in zip(clips, labels):
        side, row = random.integers(8, 13), random.integers(0, SIDE - 12)
        start, step = random.integers(0, SIDE), (-2, 2)[label]
        colour = random.integers(160, 256, 3)
        for t, frame in enumerate(clip):
            frame[row : row + side, (start + t * step + np.arange(side)) % SIDE] = colour
    if still:
        clips = np.repeat(clips[:, :1], FRAMES, axis=1)
    return clips, labels


def tensors(clips: np.ndarray) -> Tensor:
    """(B, T, C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def backbone() -> nn.Module:
    """A VideoMAE of 32 tokens of width 48, whose random weights are as large as trained ones."""
    import transformers

    config = transformers.VideoMAEConfig(
        image_size=SIDE,
        patch_size=16,
        num_frames=FRAMES,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=len(CLASSES),
    )
    model = transformers.VideoMAEForVideoClassification(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(1.5 * torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5)
    return model


def accuracy(arm: str, steps: int, count: int = 512) -> float:
    """Share of `count` other clips that is told right after as many steps of AdamW."""
    family, lr = ARMS[arm]
    (clips, labels), (others, truth) = (draw(count, seed) for seed in (0, 1))
    torch.manual_seed(0)
    model = pae.PromptedViT(
        backbone(), family(), num_classes=len(CLASSES), train_backbone="fc_norm.*"
    )
    groups = model.train().parameter_groups(lr, 1e-5)
    optimizer = torch.optim.AdamW(groups)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
        chosen = torch.randint(count, (BATCH,), generator=generator)
        logits = model(tensors(clips[chosen.numpy()]))
        loss = F.cross_entropy(logits, torch.from_numpy(labels)[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        parts = np.array_split(np.arange(count), max(1, count // 64))
        told = torch.cat([model(tensors(others[i])).argmax(1) for i in parts])
    return (told.numpy() == truth).mean().item()
