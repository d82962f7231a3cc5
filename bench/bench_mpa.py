"""Modal Pre-Alignment: ranking all windows and building the prompts, per window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pae

from . import peers_mpa, shapes
from .contest import Contestant, Group, Provider, Settings, relative

OFFICIAL = "official-style"
LOSS_LIMIT, PROMPT_LIMIT = 1e-5, 1e-4  # norm-relative to the official-style values


@dataclass
class Batch:
    """What all providers share: model, images, labels, windows, and what they should find."""

    model: pae.PromptedViT
    images: Tensor
    labels: Tensor
    window: int
    stride: int
    losses: Tensor
    origins: list[tuple[int, int]]

    @property
    def vit(self) -> nn.Module:
        return self.model.backbone

    def official(self) -> tuple[Tensor, list[Tensor]]:
        """Losses of all windows, and prompts of the best ones, one window at a time."""
        count = self.model.prompts.num_tokens
        losses, origins = peers_mpa.official_style_losses(
            self.vit, self.model.head, self.images, self.labels, count, self.window, self.stride
        )
        best = [origins[i] for i in losses.argsort()[:count].tolist()]
        return losses, peers_mpa.official_style_prompts(self.vit, self.images, best, self.window)

    def ours(self) -> pae.MPAResult:
        return pae.mpa_init(
            self.model, self.images, self.labels, self.window, self.stride, progress=False
        )


def open_batch(
    name: str, window: int, stride: int, prompts: int, batch: int, device: torch.device
) -> Batch:
    vit = shapes.random_backbone(name, device)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(prompts)).eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, *vit.patch_embed.img_size, generator=generator).to(device)
    labels = torch.randint(model.num_classes, (batch,), generator=generator).to(device)
    losses, origins = peers_mpa.official_style_losses(
        vit, model.head, images, labels, prompts, window, stride
    )
    return Batch(model, images, labels, window, stride, losses, origins)


def start_official(shared: Batch) -> Contestant:
    def check() -> dict[str, float]:
        return {"value_error": 0.0}  # the losses of `open_batch` are its own

    return Contestant(shared.official, check, units=len(shared.origins))


def start_ours(shared: Batch) -> Contestant:
    def check() -> dict[str, float]:
        found = shared.ours()
        # Windows of nearly equal loss may change places, so the prompts are compared window by
        # window, in our order.
        best = [shared.origins[i] for i in found.selected.tolist()]
        prompts = peers_mpa.official_style_prompts(shared.vit, shared.images, best, shared.window)
        loss = relative(found.losses, shared.losses.cpu())
        prompt = relative(shared.model.prompts.tokens, torch.stack(prompts))
        assert loss <= LOSS_LIMIT, f"losses are off by {loss:.1e}, more than {LOSS_LIMIT}"
        assert prompt <= PROMPT_LIMIT, f"prompts are off by {prompt:.1e}, more than {PROMPT_LIMIT}"
        return {"value_error": max(loss, prompt)}

    return Contestant(shared.ours, check, units=len(shared.origins))


def groups(settings: Settings) -> list[Group]:
    """Fewer windows than the 729 of the method (stride 8): the time of one hardly depends on it."""
    if settings.size == "smoke":
        return [group(shapes.TINY, 8, 8, 5, 2, settings)]
    cases = [
        (shapes.SMALL, 16, 32, 49, settings.batch or 1),
        (shapes.BASE, 16, 32, 49, settings.batch or 4),
    ]
    return [
        group(
            *case,
            settings,
            left_out=""
            if settings.size == "full" or (case[0] == shapes.SMALL and settings.size == "default")
            else "runs with --full",
        )
        for case in cases
    ]


def group(
    name: str,
    window: int,
    stride: int,
    prompts: int,
    batch: int,
    settings: Settings,
    left_out: str = "",
) -> Group:
    return Group(
        name=f"mpa/{name}/window{window}/stride{stride}/P{prompts}/B{batch}",
        open=lambda: open_batch(name, window, stride, prompts, batch, settings.device),
        providers=[Provider(OFFICIAL, start_official), Provider("pae", start_ours)],
        baselines=(OFFICIAL,),
        rounds=2,
        unit="window",
        left_out=left_out,
    )


def test_mpa(benchmark, replay):
    replay(benchmark)
