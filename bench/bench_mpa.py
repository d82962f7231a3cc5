"""Modal Pre-Alignment: ranking windows, and both phases at once; times are per window.

The ranking groups measure 16 (on a CPU 8) of the 729 windows that the method has at 224 pixels,
spread over the spectrum. The time of a window hardly depends on which it is, so 729 times theirs is
the time of the ranking (an extrapolation); what is done once (transform, laid out weights) is in
the few and weighs more there. A bf16 row is the ranking alone: `mpa_init` then measures the best P
windows and near-ties again in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import pae
from pae.mpa.losses import WindowLosses
from pae.mpa.ranks import Ranks
from pae.mpa.search import rank_all

from . import cost, shapes
from .peers import mpa as peers
from .peers.vpt import OfficialStyleVPT
from .rows import checked, row
from .runner import Group, Provider, Runnable, Settings
from .shown import OFFICIAL

TIMM = "timm blocks"
# norm-relative to the official-style values; a loss is some units
LIMITS = {"losses": 1e-5, "bf16 losses": 2e-2, "prompts": 1e-4}
RANKED = {"cuda": 16, "cpu": 8}

Logits = Callable[[Tensor], Tensor]
Case = tuple[str, int, int, int, int]  # backbone, window, stride, prompts, batch


@dataclass
class Batch:
    """What all providers share: model, images, labels, windows, and the losses they should find."""

    model: pae.PromptedViT
    images: Tensor
    labels: Tensor
    window: int
    stride: int
    origins: list[tuple[int, int]]
    losses: Tensor

    def columns(self) -> dict[str, float]:
        """Live: the forward without its patch embedding, which the few bins of a window can do
        without.
        """
        shape, batch = cost.Shape.of(self.model.backbone), len(self.images)
        embed = 2 * shape.patches * shape.patch_inputs * shape.width * batch
        forward = cost.flops(shape, self.model.prompts.num_tokens, batch).forward
        return {"live_gflop": (forward - embed) / 1e9}

    def zeros(self) -> Tensor:
        vit, count = self.model.backbone, self.model.prompts.num_tokens
        return self.images.new_zeros(len(vit.blocks), count, vit.embed_dim)

    def rank(self, logits: Logits) -> Tensor:
        """Phase I, a window at a time."""
        return peers.window_losses(logits, self.images, self.labels, self.origins, self.window)

    def prompts(self, windows: list[int]) -> Tensor:
        """Phase II from the best windows."""
        origins = [self.origins[i] for i in windows]
        vit = self.model.backbone
        return torch.stack(peers.official_style_prompts(vit, self.images, origins, self.window))

    @torch.no_grad()
    def rank_ours(self, dtype: torch.dtype) -> Tensor:
        """Phase I of `mpa_init` on these windows alone."""
        device = self.images.device
        losses = WindowLosses(
            self.model,
            torch.fft.fft2(self.images),
            self.labels,
            torch.tensor(self.origins),
            self.window,
            self.model.prompts.num_tokens,
            Ranks(False, device),
            [device],
            None,
            lambda done: None,
        )
        return rank_all(losses.in_dtype(dtype), len(self.origins), len(self.images)).losses


def released(shared: Batch) -> Logits:
    """Logits as the released code computes them: concatenated prompts, explicit softmax."""
    return OfficialStyleVPT(shared.model.backbone, shared.zeros(), shared.model.head).eval()


def in_timm(shared: Batch) -> Logits:
    """The same with timm's blocks and their fused attention."""
    vit, head, zeros = shared.model.backbone, shared.model.head, list(shared.zeros())
    return lambda images: peers.prompted_logits(vit, head, images, zeros, deep=True)


def open_batch(case: Case, device: torch.device, ranked: int | None = None) -> Batch:
    """`ranked`: how many windows, spread over all; None takes every one."""
    name, window, stride, prompts, batch = case
    vit = shapes.random_backbone(name, device)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(prompts)).eval()
    generator = torch.Generator().manual_seed(1)
    images, labels = shapes.random_batch(vit, model.num_classes, batch, device, generator)
    origins = peers.windows_of(tuple(images.shape[-2:]), window, stride)
    if ranked is not None:
        chosen = torch.linspace(0, len(origins) - 1, ranked).round().int().tolist()
        origins = [origins[i] for i in chosen]
    shared = Batch(model, images, labels, window, stride, origins, torch.empty(0))
    shared.losses = shared.rank(released(shared))
    return shared


def start_ranking(how: Callable[[Batch], Logits] | torch.dtype, shared: Batch) -> Runnable:
    """A peer's logits, or ours in a dtype."""
    if isinstance(how, torch.dtype):
        work = partial(shared.rank_ours, how)
    else:
        work = partial(shared.rank, how(shared))
    narrow = how == torch.bfloat16
    return row(
        lambda: [work()],
        {"losses": shared.losses},
        {"losses": LIMITS["bf16 losses" if narrow else "losses"]},
        shared.columns(),
        units=len(shared.origins),
        dtype="bf16" if narrow else "fp32",
    )


def start_both(how: Callable[[Batch], Logits], shared: Batch) -> Runnable:
    """Both phases of the released method."""
    logits, count = how(shared), shared.model.prompts.num_tokens

    def check() -> dict[str, float]:
        found = checked([shared.rank(logits)], {"losses": shared.losses}, LIMITS)
        return found | shared.columns()

    def work() -> Tensor:
        return shared.prompts(shared.rank(logits).argsort()[:count].tolist())

    return Runnable(work, check, units=len(shared.origins))


def start_ours(shared: Batch) -> Runnable:
    def work() -> pae.MPAResult:
        where = shared.images, shared.labels, shared.window, shared.stride
        return pae.mpa_init(shared.model, *where, progress=False)

    def check() -> dict[str, float]:
        found = work()
        # windows of nearly equal loss may change places, so prompts are compared in our order
        prompts = shared.prompts(found.selected.tolist())
        expected = {"losses": shared.losses, "prompts": prompts}
        got = found.losses, shared.model.prompts.tokens.detach()
        return checked(got, expected, LIMITS) | shared.columns()

    return Runnable(work, check, units=len(shared.origins))


def groups(settings: Settings) -> list[Group]:
    """All groups of this file; those outside the chosen size carry a reason."""
    if settings.size == "smoke":
        tiny = (shapes.TINY, 8, 8, 5, 2)
        return [group("mpa", tiny, settings), group("mpa_ranking", tiny, settings, ranked=4)]
    on_gpu = settings.on_gpu
    batch, ranked = settings.batch or (128 if on_gpu else 2), RANKED[settings.device.type]
    few = (16, 32, 49) if on_gpu else (16, 104, 9)  # all windows of a coarse grid
    default, full = settings.why_not_size(False, True), settings.why_not_size(False, False)
    method = (16, 8, 50, batch)
    return [
        group("mpa_ranking", (shapes.SMALL, *method), settings, ranked, default),
        group("mpa_ranking", (shapes.BASE, *method), settings, ranked, "" if on_gpu else full),
        group("mpa", (shapes.SMALL, *few, settings.batch or 1), settings, left_out=default),
        group("mpa", (shapes.BASE, *few, batch), settings, left_out=full),
    ]


def group(
    kind: str,
    case: Case,
    settings: Settings,
    ranked: int | None = None,
    left_out: str = "",
) -> Group:
    name, window, stride, prompts, batch = case
    if kind == "mpa_ranking":
        start, grid = start_ranking, ""
        ours = [
            Provider("pae fp32", partial(start, torch.float32)),
            Provider("pae bf16", partial(start, torch.bfloat16), settings.why_not_bf16()),
        ]
    else:
        start, grid, ours = start_both, f"stride{stride}/", [Provider("pae", start_ours)]
    return Group(
        name=f"{kind}/{name}/window{window}/{grid}P{prompts}/B{batch}",
        open=lambda: open_batch(case, settings.device, ranked),
        providers=[
            Provider(OFFICIAL, partial(start, released)),
            Provider(TIMM, partial(start, in_timm)),
            *ours,
        ],
        baselines=(OFFICIAL, TIMM),
        rounds=3,
        unit="window",
        left_out=left_out,
    )


def test_mpa(benchmark, replay):
    replay(benchmark)
