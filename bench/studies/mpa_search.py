"""How often successive halving selects what the exact search does, and at what share of its work.

On a real task: features of every (window, image) pair are computed once; every seed then draws a
batch of the images, a head ("as_is": random, as at the start of training; "linear_probe": fitted to
the batch) and the order of the images, and both searches run on the losses that follow from them.
They are the searches of `pae.mpa`; only the forwards are looked up. "work" is the share of the
exact search's forwards; "loss gap" is how much higher the mean loss of the selection is, in
standard deviations of all windows' losses.

    python -m bench.studies.mpa_search --dataset pneumonia --images 96 --batch 64 --seeds 20

computes 169 x 96 forwards of the embedded ViT-S at 112 pixels: some minutes on one core.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pae
from pae.mpa import Halving, fit_probe
from pae.mpa.forward import ZeroPromptForward
from pae.mpa.losses import FilteredBatch
from pae.mpa.search import rank_all, rank_by_halving
from pae.train import embedded, loop, pixels
from pae.train.options import Options

HEADS = ("as_is", "linear_probe")


@dataclass(frozen=True)
class Features:
    """What a head reads: of (window, image) pairs (S, N, F), of the images themselves (N, F)."""

    filtered: Tensor
    whole: Tensor
    labels: Tensor


@torch.no_grad()
def compute(dataset: str, images: int, stride: int, prompts: int, window: int = 16) -> Features:
    """Features of the first training images under every window, with zero prompts in place."""
    settings = Options(dataset=dataset, workers=1, device="cpu", amp="no").resolved()
    task = loop.load_task(settings)
    vit = embedded.load_backbone(embedded.WEIGHTS_IMAGE_SIZE, len(task.classes))
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(prompts)).eval()
    model.head = nn.Identity()
    batch, labels = _first_images(task, vit, images)
    sides = [torch.arange(0, side - window + 1, stride) for side in batch.shape[-2:]]
    rows = FilteredBatch(model, torch.fft.fft2(batch), torch.cartesian_prod(*sides), window)
    forward = ZeroPromptForward(model, prompts, torch.float32)
    whole = torch.cat([forward(model.view.embed(part)) for part in batch.split(16)])
    windows = len(sides[0]) * len(sides[1])
    filtered = torch.empty(windows, *whole.shape)
    parts = torch.arange(len(batch)).split(24)
    forward.expect(len(parts[0]) * model.view.shape.num_tokens, windows * len(parts))
    for window_number in range(windows):
        for part in parts:
            filtered[window_number, part] = forward(rows.rows(torch.tensor([window_number]), part))
    return Features(filtered, whole, labels)


def _first_images(task, vit: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    from timm.data import resolve_data_config

    config = resolve_data_config({}, model=vit)
    mean_, std = pixels.normalisation("model", config)
    side = vit.patch_embed.img_size[0]
    transform, is_random = pixels.make_transform("none", True, side, config["interpolation"])
    split = pixels.PixelSplit(task.train, transform, is_random, 0, 1)
    pipeline = pixels.Pipeline(split, mean_, std, torch.device("cpu"), 1)
    order = torch.cat(pixels.epoch_batches(len(task.train), 16, 0, 0))[:count]
    ((images, labels),) = pipeline.batches([order])
    return images, labels


@torch.no_grad()
def losses_of_a_batch(
    features: Features, head: str, batch: int, seed: int
) -> tuple[Tensor, Tensor]:
    """(S, B) losses and (B,) labels of a random batch under a head, both from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(features.labels), generator=generator)[:batch]
    labels, classes = features.labels[chosen], int(features.labels.max()) + 1
    if head == "linear_probe":
        classifier = fit_probe(features.whole[chosen], labels, classes)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            classifier = nn.Linear(features.whole.shape[1], classes)
    logits = classifier(features.filtered[:, chosen]).flatten(0, 1)
    losses = F.cross_entropy(logits, labels.repeat(len(features.filtered)), reduction="none")
    return losses.view(-1, batch), labels


@dataclass(frozen=True)
class Comparison:
    """One seed: share of the exact search's forwards, share of its selection that was found, and
    how much worse the mean loss of the selection is, relative to the spread of all windows' losses.
    """

    work: float
    overlap: float
    gap: float


def compare(losses: Tensor, labels: Tensor, count: int, how: Halving) -> Comparison:
    def look_up(windows: Tensor, images: Tensor) -> Tensor:
        return losses[windows][:, images]

    exact = rank_all(look_up, *losses.shape)
    halved = rank_by_halving(look_up, len(losses), labels, count, how)
    best, found = exact.complete[:count], halved.complete[:count]
    worse = exact.losses[found].mean() - exact.losses[best].mean()
    return Comparison(
        work=int(halved.images_seen.sum()) / losses.numel(),
        overlap=len(set(best.tolist()) & set(found.tolist())) / count,
        gap=(worse / exact.losses.std()).item(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="pneumonia")
    parser.add_argument("--images", type=int, default=96, help="features of so many images")
    parser.add_argument("--batch", type=int, default=64, help="images that windows are ranked on")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--risk", type=float, default=Halving.risk)
    parser.add_argument("--first", type=int, default=Halving.first)
    parser.add_argument("--growth", type=float, default=Halving.growth)
    parser.add_argument("--keep", type=Path, help="file that keeps the features for the next call")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.keep and given.keep.is_file():
        features = Features(**torch.load(given.keep, weights_only=True))
    else:
        features = compute(given.dataset, given.images, given.stride, given.prompts)
        if given.keep:
            torch.save(vars(features), given.keep)
    windows = len(features.filtered)
    print(
        f"{given.dataset}: {given.prompts} of {windows} windows on {given.batch} of "
        f"{len(features.labels)} images, {given.seeds} seeds, risk {given.risk}, first "
        f"{given.first}, growth {given.growth}"
    )
    columns = ["head", "same selection", "overlap, mean / least", "work, mean / median / most"]
    print("| " + " | ".join([*columns, "loss gap, most"]) + " |")
    print("|---|---|---|---|---|")
    for head in HEADS:
        runs = []
        for seed in range(given.seeds):
            losses, labels = losses_of_a_batch(features, head, given.batch, seed)
            how = Halving(given.risk, given.first, given.growth, seed)
            runs.append(compare(losses, labels, given.prompts, how))
        same = sum(run.overlap == 1 for run in runs)
        print(
            f"| {head} | {same} of {len(runs)} "
            f"| {mean(r.overlap for r in runs):.3f} / {min(r.overlap for r in runs):.2f} "
            f"| {mean(r.work for r in runs):.3f} / {median(r.work for r in runs):.3f} / "
            f"{max(r.work for r in runs):.3f} | {max(r.gap for r in runs):.4f} |"
        )


if __name__ == "__main__":
    main()
