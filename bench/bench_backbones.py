"""One training step of VPT-deep beside the plain ViT: forward, cross-entropy, backward to prompts
and head. On Swin every row is in the mean, as released; backbones with rotary positions (DINOv3,
EVA02) have their own readout.
"""

from __future__ import annotations

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

import pae
from pae.packs import can_pack

from . import shapes, steps
from .peers.swin import OfficialStyleSwin
from .runner import Group, Provider, Settings
from .steps import OFFICIAL, REFERENCE, Step, prepare

BASE, TINY = "swin_base_patch4_window7_224", "tiny_swin"
ROTATED = {"vit_base_patch16_dinov3": {"img_size": 224}, "eva02_base_patch14_224": {}}
FUSED = f"{OFFICIAL}, SDPA"


def backbone(name: str, device: torch.device) -> nn.Module:
    if name != TINY:
        return shapes.random_backbone(name, device, **ROTATED.get(name, {}))
    sizes = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)}
    return shapes.randomised(SwinTransformer(**sizes, window_size=4, num_classes=10)).to(device)


def swin(step: Step, fused: bool) -> OfficialStyleSwin:
    rows = [rows for rows in step.model.prompts.raw_prompts() if rows is not None]
    return OfficialStyleSwin(step.model.backbone, rows, step.model.head, fused)


def open_step(name: str, prompts: int, dtype: str, batch: int, device: torch.device) -> Step:
    module = backbone(name, device)
    pool = "image" if name in ROTATED else "all"
    model = pae.PromptedViT(module, pae.prompts.VPTDeep(prompts), pool=pool).train()
    generator = steps.random_prompts(model)
    step = Step(model, *shapes.random_batch(module, model.num_classes, batch, device, generator))
    first = model if name in ROTATED else swin(step, fused=False)
    return step.judge_by(lambda: step.first(first), dtype)


def group(
    name: str, prompts: int, dtype: str, batch: int, settings: Settings, left_out: str = ""
) -> Group:
    rotated = name in ROTATED
    peers = {OFFICIAL: lambda step: swin(step, False), FUSED: lambda step: swin(step, True)}
    peers = steps.peers({REFERENCE: lambda step: step.model} if rotated else peers, dtype)
    return Group(
        name=f"{'rotated' if rotated else 'swin'}/{name}/P{prompts}/{dtype}/B{batch}",
        open=lambda: open_step(name, prompts, dtype, batch, settings.device),
        providers=[
            *peers,
            *([] if rotated else [Provider("textbook", lambda s: prepare(s, s.model))]),
            *map(
                steps.ours, ("keep", "recompute", *(["packed"] if on_mkl(dtype, settings) else []))
            ),
        ],
        baselines=tuple(peer.name for peer in peers),
        rounds=20 if settings.on_gpu else 4,
        unit="step",
        left_out=left_out,
        dtype=dtype,
    )


def on_mkl(dtype: str, settings: Settings) -> bool:
    """Whether `memory="packed"` is another mode than "keep" there."""
    return dtype == "fp32" and can_pack(torch.empty(0, device=settings.device))


def groups(settings: Settings) -> list[Group]:
    """Swin-B, DINOv3-B and EVA02-B with 50 prompts; with --full Swin-B also with 10 and 100."""
    if settings.size == "smoke":
        return [group(TINY, 5, dtype, 2, settings) for dtype in ("fp32", "bf16")]
    batch = settings.batch or (64 if settings.on_gpu else 4)
    cases = [(name, 50) for name in (BASE, *ROTATED)] + [(BASE, count) for count in (10, 100)]
    dtypes = ("bf16",) if settings.on_gpu else ("fp32", "bf16")
    return [
        group(name, count, dtype, batch, settings, settings.why_not_size(False, count == 50))
        for name, count in cases
        for dtype in dtypes
    ]


def test_backbones(benchmark, replay):
    replay(benchmark)
