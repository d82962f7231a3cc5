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
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pae
from pae.mpa import Halving, fit_probe
from pae.mpa.forward import ZeroPromptForward
from pae.mpa.losses import FilteredBatch
from pae.mpa.search import rank_all, rank_by_halving
from pae.train import embedded, pixels

from . import runs


class Features(NamedTuple):
    """What a head reads: of (window, image) pairs (S, N, F), of the images themselves (N, F)."""

    filtered: Tensor
    whole: Tensor
    labels: Tensor


@torch.no_grad()
def compute(dataset: str, images: int, stride: int, prompts: int, window: int = 16) -> Features:
    """Features of the first training images under every window, with zero prompts in place."""
    task = embedded.load_task(dataset)
    vit = embedded.load_backbone(embedded.WEIGHTS_IMAGE_SIZE, len(task.classes))
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(prompts)).eval()
    model.head = nn.Identity()
    order = pixels.epoch_batches(len(task.train), images, 0, 0)[0]
    batch, labels = runs.decoded(task.train, vit, order)
    sides = [torch.arange(0, side - window + 1, stride) for side in batch.shape[-2:]]
    origins = torch.cartesian_prod(*sides)
    rows = FilteredBatch(model, torch.fft.fft2(batch), origins, window)
    forward = ZeroPromptForward(model, prompts, torch.float32)
    whole = torch.cat([forward(model.view.embed(part)) for part in batch.split(16)])
    filtered = torch.empty(len(origins), *whole.shape)
    parts = torch.arange(len(batch)).split(24)
    forward.expect(len(parts[0]) * model.view.shape.num_tokens, len(origins) * len(parts))
    for number in range(len(origins)):
        for part in parts:
            filtered[number, part] = forward(rows.rows(torch.tensor([number]), part))
    return Features(filtered, whole, labels)


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
        torch.manual_seed(seed)
        classifier = nn.Linear(features.whole.shape[1], classes)
    logits = classifier(features.filtered[:, chosen]).flatten(0, 1)
    losses = F.cross_entropy(logits, labels.repeat(len(features.filtered)), reduction="none")
    return losses.view(-1, batch), labels


def compare(losses: Tensor, labels: Tensor, count: int, how: Halving) -> tuple[float, float, float]:
    """Share of the exact search's forwards, share of its selection that was found, and how much
    worse the mean loss of the selection is, relative to the spread of all windows' losses.
    """

    def look_up(windows: Tensor, images: Tensor) -> Tensor:
        return losses[windows][:, images]

    exact = rank_all(look_up, *losses.shape)
    halved = rank_by_halving(look_up, len(losses), labels, count, how)
    best, found = exact.complete[:count], halved.complete[:count]
    worse = exact.losses[found].mean() - exact.losses[best].mean()
    overlap = len(set(best.tolist()) & set(found.tolist())) / count
    work = int(halved.images_seen.sum()) / losses.numel()
    return work, overlap, (worse / exact.losses.std()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", default="pneumonia")
    add("--images", type=int, default=96, help="features of so many images")
    add("--batch", type=int, default=64, help="images that windows are ranked on")
    add("--prompts", type=int, default=10)
    add("--stride", type=int, default=8)
    add("--seeds", type=int, default=20)
    add("--risk", type=float, default=Halving.risk)
    add("--first", type=int, default=Halving.first)
    add("--growth", type=float, default=Halving.growth)
    add("--keep", type=Path, help="file that keeps the features for the next call")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.keep and given.keep.is_file():
        features = Features(**torch.load(given.keep, weights_only=True))
    else:
        features = compute(given.dataset, given.images, given.stride, given.prompts)
        if given.keep:
            torch.save(features._asdict(), given.keep)
    print(
        f"{given.dataset}: {given.prompts} of {len(features.filtered)} windows on {given.batch} of "
        f"{len(features.labels)} images, {given.seeds} seeds, risk {given.risk}, first "
        f"{given.first}, growth {given.growth}"
    )
    lines = []
    for head in ("as_is", "linear_probe"):
        seen = []
        for seed in range(given.seeds):
            batch = losses_of_a_batch(features, head, given.batch, seed)
            how = Halving(given.risk, given.first, given.growth, seed)
            seen.append(compare(*batch, given.prompts, how))
        work, overlap, gap = zip(*seen)
        lines.append(
            [
                head,
                f"{overlap.count(1)} of {given.seeds}",
                f"{mean(overlap):.3f} / {min(overlap):.2f}",
                f"{mean(work):.3f} / {median(work):.3f} / {max(work):.3f}",
                f"{max(gap):.4f}",
            ]
        )
    columns = ["head", "same selection", "overlap, mean / least", "work, mean / median / most"]
    print(runs.table([*columns, "loss gap, most"], lines))


if __name__ == "__main__":
    main()
