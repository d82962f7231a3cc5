"""One training step of VPT-deep on a segmenter: forward, the losses of SETR-PUP and its auxiliary
heads, backward to prompts and heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pae

from .memory import peak_bytes
from .peers.dense import TextbookSegmenter
from .rows import checked
from .runner import Group, Provider, Runnable, Settings
from .shapes import random_backbone

# the heads' operations in the best order that plain PyTorch has, and as mmsegmentation has them
BEST, RELEASED = "timm + SDPA", "timm + SDPA, as released"
# both engines give the same to 1e-14 in fp64; in fp32 rounding turns the sign of some of the many
# values that a ReLU reads, and either engine's gradients are then as far from fp64 as the other's:
# 2e-4 to 8e-4 of prompts in 4 blocks of width 192 at 512 px
LIMITS = {"loss": 1e-5, "d_prompts": 5e-3, "d_convolution": 5e-3}


class Case(NamedTuple):
    """Sizes of one group."""

    backbone: str
    image: int
    prompts: int
    classes: int
    channels: int
    batch: int


BASE = Case("vit_base_patch16_224", 512, 50, 150, 256, 1)
TINY = Case("test_vit", 64, 3, 4, 8, 2)


@dataclass
class Step:
    """What all providers share, and the loss and gradients of the peer's step."""

    model: pae.PromptedSegmenter
    images: Tensor
    masks: Tensor
    expected: dict[str, Tensor]

    def peer(self, as_released: bool) -> tuple[Callable[[], Tensor], Tensor]:
        """The loss of a step, and the prompts that it trains."""
        heads = [*self.model.heads.auxiliary, self.model.heads.decode]
        tokens: Any = self.model.prompts.tokens
        place = self.model.backbone, tokens, self.model.out_blocks
        peer = TextbookSegmenter(*place, heads, as_released)

        def loss() -> Tensor:
            *others, last = (peer.loss(logits, self.masks) for logits in peer(self.images))
            return last + 0.4 * torch.stack(others).sum()

        return loss, peer.tokens

    def run(self, loss_of: Callable[[], Tensor], tokens: Tensor) -> list[Tensor]:
        """One step: the loss, and two of the gradients."""
        for p in [tokens, *self.model.heads.parameters()]:
            p.grad = None
        loss = loss_of()
        loss.backward()
        convolution: Any = self.model.heads.decode
        found = tokens.grad, convolution.up_convs[0][0].conv.weight.grad
        return [loss, *(g for g in found if g is not None)]


def open_step(case: Case, device: torch.device) -> Step:
    vit = random_backbone(case.backbone, device, img_size=case.image)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(case.prompts), num_classes=1)
    depth, width = model.view.shape.depth, model.view.shape.width
    blocks = (depth // 3 - 1, depth // 2 - 1, 3 * depth // 4 - 1, depth - 1)
    torch.manual_seed(1)
    with torch.no_grad():
        model.prompts.tokens.normal_()
    heads = [pae.SETRPUP(width, case.classes, case.channels, 2, 4) for _ in range(3)]
    head = pae.SETRPUP(width, case.classes, case.channels)
    segmenter = pae.PromptedSegmenter(model, head, blocks, heads).train()
    images = torch.randn(case.batch, 3, case.image, case.image).to(device)
    masks = torch.randint(case.classes, (case.batch, case.image, case.image)).to(device)
    step = Step(segmenter, images, masks, {})
    step.expected = dict(zip(LIMITS, (t.detach().clone() for t in step.run(*step.peer(True)))))
    return step


def prepare(step: Step, engine: str) -> Runnable:
    """`engine`: of pae; or a peer's name."""
    if engine in (BEST, RELEASED):
        loss_of, tokens = step.peer(engine == RELEASED)
    else:
        loss_of = partial(step.model.loss, step.images, step.masks, engine)
        tokens = nn.Module.get_parameter(step.model, "model.prompts.tokens")
    work = partial(step.run, loss_of, tokens)

    def check() -> dict[str, float]:
        made: list[list[Tensor]] = []  # one step for both: it takes seconds
        peak = peak_bytes(lambda: made.append(work()), step.images.device)
        columns = checked(made[0], step.expected, LIMITS)
        return columns | {"peak_mb": peak / 1e6, "images": float(len(step.images))}

    return Runnable(work, check)


def group(case: Case, settings: Settings) -> Group:
    return Group(
        name=f"dense/{case.backbone}/{case.image}px/P{case.prompts}/fp32/B{case.batch}",
        open=lambda: open_step(case, settings.device),
        providers=[
            *(Provider(name, partial(prepare, engine=name)) for name in (BEST, RELEASED)),
            Provider("pae keep", partial(prepare, engine="fast")),
        ],
        baselines=(BEST, RELEASED),
        rounds=20 if settings.on_gpu else 4,
        unit="step",
        dtype="fp32",
    )


def groups(settings: Settings) -> list[Group]:
    """ViT-B at 512 pixels with 50 prompts, 150 classes as in ADE20K."""
    if settings.size == "smoke":
        return [group(TINY, settings)]
    batch = settings.batch or (16 if settings.on_gpu else 1)
    return [group(BASE._replace(batch=batch), settings)]


def test_dense(benchmark, replay):
    replay(benchmark)
