"""The training loop around PAE as the papers' code works, end to end: files in, accuracies out.

Nothing here uses the packages of this repository. Facts of the released code that this keeps:

- plain fp32, eager; prompts are concatenated in front of the image rows and travel through every
  block, where their outputs are thrown away;
- the regulariser is part of the network: every forward computes it pair by pair, each pair with a
  spectral norm of its own, also in evaluation and in every forward of Modal Pre-Alignment, where
  nobody reads it;
- Modal Pre-Alignment sees one window at a time: a new FFT of the batch, a full-size inverse FFT,
  the whole network on that image with all prompts at zero;
- the loss is looked at on the host after every step;
- validation and test split are evaluated after every epoch.

Choices of this repository, because the two loops must draw the same curve: data cut, order of the
images, first head and first prompts, recipe and its optimiser are handed in; images are resized
without augmentation; a torch DataLoader with worker processes decodes them from their files
whenever they are needed, as `torchvision` examples do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from .kld import official_style_terms
from .mpa import official_style_prompts, window_losses, windows_of
from .vpt import OfficialStyleVPT


class OfficialStylePAE(nn.Module):
    """VPT-deep with the regulariser inside the network.

    Args:
        vit, prompts, head: as in `OfficialStyleVPT`.
        lift: (k, D). K, L: (k, k), or (depth - 1, k, k). All three are copied.
        weights: of the consistency and the Lyapunov term.

    Attributes:
        penalty: both terms of the last forward, weighted; to be added to the training loss.
    """

    def __init__(
        self,
        vit: nn.Module,
        prompts: Tensor,
        head: nn.Linear,
        lift: Tensor,
        K: Tensor,
        L: Tensor,
        weights: tuple[float, float],
    ) -> None:
        super().__init__()
        self.vpt = OfficialStyleVPT(vit, prompts, head)
        self.lift, self.K, self.L = (nn.Parameter(t.detach().clone()) for t in (lift, K, L))
        self.weights = weights
        self.penalty = prompts.new_zeros(())

    def forward(self, images: Tensor) -> Tensor:
        terms = official_style_terms(self.vpt.prompts, self.lift, self.K, self.L, *self.weights)
        self.penalty = terms[0] + terms[1]
        return self.vpt(images)

    def koopman_parameters(self) -> list[nn.Parameter]:
        return [self.lift, self.K, self.L]


class ImageFiles(Dataset):
    """Images decoded from their files, resized to S x S, normalised: (3, S, S), label.

    Raises:
        ValueError: the images are no files.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[int],
        size: int,
        interpolation: str,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if not all(isinstance(file, (str, Path)) for file in files):
            raise ValueError(f"files must be paths of images, got {type(files[0]).__name__}")
        self.files, self.labels = files, labels
        self.transform = transforms.Compose(
            [
                transforms.Resize((size, size), transforms.InterpolationMode(interpolation)),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


def load(
    data: Dataset, batches: Sequence[Tensor], workers: int, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, S, S) and labels (B,) of every list of indices."""
    loader = DataLoader(data, batch_sampler=[b.tolist() for b in batches], num_workers=workers)
    for images, labels in loader:
        yield images.to(device), labels.to(device)


@torch.no_grad()
def align(
    model: OfficialStylePAE,
    vit: nn.Module,
    images: Tensor,
    labels: Tensor,
    window: int,
    stride: int,
) -> list[int]:
    """Sets the prompts to those of the windows of smallest loss; returns the windows, best first.

    Args:
        vit: the network without prompts, through whose blocks the first block's prompts travel.
    """
    prompts = model.vpt.prompts
    origins = windows_of(tuple(images.shape[-2:]), window, stride)
    prompts.zero_()
    losses = window_losses(model.eval(), images, labels, origins, window)
    picks = losses.sort(stable=True).indices[: prompts.shape[1]].tolist()
    rows = official_style_prompts(vit, images, [origins[i] for i in picks], window)
    prompts.copy_(torch.stack(rows))
    return picks


def train_epoch(
    model: OfficialStylePAE,
    batches: Iterator[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    after_step: Callable[[], None],
) -> float:
    """One pass with the regulariser's gradients clipped to norm 10; the mean cross-entropy."""
    model.train()
    total, count = 0.0, 0
    for images, labels in batches:
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        objective = loss + model.penalty
        if not math.isfinite(objective.item()):
            raise ArithmeticError(f"the loss is {objective.item()}")
        optimizer.zero_grad()
        objective.backward()
        nn.utils.clip_grad_norm_(model.koopman_parameters(), 10.0)
        optimizer.step()
        after_step()
        total, count = total + loss.item() * len(labels), count + len(labels)
    return total / count


@torch.no_grad()
def evaluate(
    model: OfficialStylePAE, batches: Iterator[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """(mean cross-entropy, accuracy), through the same forward as training."""
    model.eval()
    total, hits, count = 0.0, 0, 0
    for images, labels in batches:
        logits = model(images)
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        hits += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return total / count, hits / count
