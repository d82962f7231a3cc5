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

import torch
from torch import Tensor, nn

import pae
from pae.mpa.losses import WindowLosses
from pae.mpa.ranks import Ranks
from pae.mpa.search import rank_all

from . import cost, shapes
from .peers import mpa as peers
from .peers.vpt import OfficialStyleVPT
from .runner import Group, Provider, Runnable, Settings, relative

OFFICIAL, TIMM = "official-style", "timm blocks"
LOSS_LIMIT, PROMPT_LIMIT = 1e-5, 1e-4  # norm-relative to the official-style values
BF16_LIMIT = 2e-2  # of a loss, which is some units
METHOD = {"window": 16, "stride": 8}
RANKED = {"cuda": 16, "cpu": 8}


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

    @property
    def vit(self) -> nn.Module:
        return self.model.backbone

    @property
    def count(self) -> int:
        return self.model.prompts.num_tokens

    def columns(self, error: float) -> dict[str, float]:
        """Of a row whose losses are off by `error`. Live: the forward without its patch embedding,
        which the few bins of a window can do without.
        """
        shape = cost.Shape.of(self.vit)
        embed = 2 * shape.patches * shape.patch_inputs * shape.width * len(self.images)
        forward = cost.flops(shape, self.count, len(self.images)).forward
        return {"value_error": error, "live_gflop": (forward - embed) / 1e9}

    def zeros(self) -> Tensor:
        return self.images.new_zeros(len(self.vit.blocks), self.count, self.vit.embed_dim)

    def released(self) -> Callable[[Tensor], Tensor]:
        """Logits as the released code computes them: concatenated prompts, explicit softmax."""
        return OfficialStyleVPT(self.vit, self.zeros(), self.model.head).eval()

    def timm(self) -> Callable[[Tensor], Tensor]:
        """The same with timm's blocks and their fused attention."""
        zeros, head = list(self.zeros()), self.model.head
        return lambda images: peers.prompted_logits(self.vit, head, images, zeros, deep=True)

    def rank(self, logits: Callable[[Tensor], Tensor]) -> Tensor:
        return peers.window_losses(logits, self.images, self.labels, self.origins, self.window)

    def prompts(self, origins: list[tuple[int, int]]) -> Tensor:
        prompts = peers.official_style_prompts(self.vit, self.images, origins, self.window)
        return torch.stack(prompts)

    def align(self, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Both phases of the released method."""
        best = self.rank(logits).argsort()[: self.count].tolist()
        return self.prompts([self.origins[i] for i in best])

    @torch.no_grad()
    def rank_ours(self, dtype: torch.dtype) -> Tensor:
        """Phase I of `mpa_init` on these windows alone."""
        losses = WindowLosses(
            self.model,
            torch.fft.fft2(self.images),
            self.labels,
            torch.tensor(self.origins),
            self.window,
            self.count,
            Ranks(False, self.images.device),
            [self.images.device],
            None,
            lambda done: None,
        )
        return rank_all(losses.in_dtype(dtype), len(self.origins), len(self.images)).losses

    def align_ours(self) -> pae.MPAResult:
        return pae.mpa_init(
            self.model, self.images, self.labels, self.window, self.stride, progress=False
        )


def open_batch(
    name: str,
    window: int,
    stride: int,
    prompts: int,
    batch: int,
    device: torch.device,
    ranked: int | None = None,
) -> Batch:
    """`ranked`: how many windows, spread over all; None takes every one."""
    vit = shapes.random_backbone(name, device)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(prompts)).eval()
    generator = torch.Generator().manual_seed(1)
    size = tuple(vit.patch_embed.img_size)
    images = torch.randn(batch, 3, *size, generator=generator).to(device)
    labels = torch.randint(model.num_classes, (batch,), generator=generator).to(device)
    origins = peers.windows_of(size, window, stride)
    if ranked is not None:
        chosen = torch.linspace(0, len(origins) - 1, ranked).round().int().tolist()
        origins = [origins[i] for i in chosen]
    shared = Batch(model, images, labels, window, stride, origins, torch.empty(0))
    shared.losses = shared.rank(shared.released()).cpu()
    return shared


# ---- phase I


def start_ranking(logits: Callable[[Batch], Callable[[Tensor], Tensor]]):
    def start(shared: Batch) -> Runnable:
        forward = logits(shared)

        def check() -> dict[str, float]:
            return shared.columns(_checked(shared.rank(forward), shared.losses, LOSS_LIMIT))

        return Runnable(lambda: shared.rank(forward), check, units=len(shared.origins))

    return start


def start_our_ranking(dtype: torch.dtype, limit: float):
    def start(shared: Batch) -> Runnable:
        def check() -> dict[str, float]:
            return shared.columns(_checked(shared.rank_ours(dtype), shared.losses, limit))

        return Runnable(
            lambda: shared.rank_ours(dtype),
            check,
            units=len(shared.origins),
            dtype="bf16" if dtype == torch.bfloat16 else "fp32",
        )

    return start


def _checked(losses: Tensor, expected: Tensor, limit: float) -> float:
    error = relative(losses.cpu(), expected)
    assert error <= limit, f"losses are off by {error:.1e}, more than {limit}"
    return error


# ---- both phases


def start_official(logits: Callable[[Batch], Callable[[Tensor], Tensor]]):
    def start(shared: Batch) -> Runnable:
        forward = logits(shared)

        def check() -> dict[str, float]:
            return shared.columns(_checked(shared.rank(forward), shared.losses, LOSS_LIMIT))

        return Runnable(lambda: shared.align(forward), check, units=len(shared.origins))

    return start


def start_ours(shared: Batch) -> Runnable:
    def check() -> dict[str, float]:
        found = shared.align_ours()
        # Windows of nearly equal loss may change places, so the prompts are compared window by
        # window, in our order.
        prompts = shared.prompts([shared.origins[i] for i in found.selected.tolist()])
        prompt = relative(shared.model.prompts.tokens, prompts)
        assert prompt <= PROMPT_LIMIT, f"prompts are off by {prompt:.1e}, more than {PROMPT_LIMIT}"
        return shared.columns(max(_checked(found.losses, shared.losses, LOSS_LIMIT), prompt))

    return Runnable(shared.align_ours, check, units=len(shared.origins))


def groups(settings: Settings) -> list[Group]:
    if settings.size == "smoke":
        tiny = (shapes.TINY, 8, 8, 5)
        return [whole(*tiny, 2, settings), ranking(*tiny, 2, settings, ranked=4)]
    full_only = "" if settings.size == "full" else "runs with --full"
    on_gpu = settings.device.type == "cuda"
    batch = settings.batch or (128 if on_gpu else 2)
    default = "" if settings.size in ("default", "full") else "runs without --quick"
    method = (METHOD["window"], METHOD["stride"], 50)
    few = (16, 32, 49) if on_gpu else (16, 104, 9)  # all windows of a coarse grid
    return [
        ranking(shapes.SMALL, *method, batch, settings, left_out=default),
        ranking(shapes.BASE, *method, batch, settings, left_out="" if on_gpu else full_only),
        whole(shapes.SMALL, *few, settings.batch or 1, settings, left_out=default),
        whole(shapes.BASE, *few, batch, settings, left_out=full_only),
    ]


def ranking(
    name: str,
    window: int,
    stride: int,
    prompts: int,
    batch: int,
    settings: Settings,
    ranked: int | None = None,
    left_out: str = "",
) -> Group:
    ranked = ranked or RANKED[settings.device.type]
    narrow = settings.device.type == "cuda" or settings.size in ("full", "smoke")
    slow = "" if narrow else "slow without bf16 arithmetic; runs with --full"
    return Group(
        name=f"mpa_ranking/{name}/window{window}/P{prompts}/B{batch}",
        open=lambda: open_batch(name, window, stride, prompts, batch, settings.device, ranked),
        providers=[
            Provider(OFFICIAL, start_ranking(Batch.released)),
            Provider(TIMM, start_ranking(Batch.timm)),
            Provider("pae fp32", start_our_ranking(torch.float32, LOSS_LIMIT)),
            Provider("pae bf16", start_our_ranking(torch.bfloat16, BF16_LIMIT), left_out=slow),
        ],
        baselines=(OFFICIAL, TIMM),
        rounds=3,
        unit="window",
        left_out=left_out,
    )


def whole(
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
        providers=[
            Provider(OFFICIAL, start_official(Batch.released)),
            Provider(TIMM, start_official(Batch.timm)),
            Provider("pae", start_ours),
        ],
        baselines=(OFFICIAL, TIMM),
        rounds=3,
        unit="window",
        left_out=left_out,
    )


def test_mpa(benchmark, replay):
    replay(benchmark)
