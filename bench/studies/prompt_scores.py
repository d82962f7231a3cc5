"""What scores of prompts are worth, on real weights and images: PRO-VPT's two sweeps, and
Prompt Condensation's two scores beside leaving out one prompt at a time.

    python -m bench.studies.prompt_scores sweeps           # three minutes on one core
    python -m bench.studies.prompt_scores condensation     # five

The network and the X-rays come as `pae train` gets them (see `pae/train/embedded.py`), here at 56
pixels and few images: the question is which prompts are chosen, not how accurate the network is.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import pae
from pae.methods import condensation
from pae.prompts import ProVPT, VPTDeep
from pae.train import embedded

from . import runs

PIXELS, BATCH, CLASSES = 56, 32, 2


class Task:
    """Images and labels in memory, and models on one frozen backbone."""

    def __init__(self, images: int) -> None:
        self.backbone = embedded.load_backbone(PIXELS, CLASSES)
        task = embedded.load_task("pneumonia", train_size=images, val_size=BATCH)
        self.images, self.labels = runs.decoded(task.train, self.backbone, torch.arange(images))

    def model(self, prompts: VPTDeep) -> pae.PromptedViT:
        return pae.PromptedViT(self.backbone, prompts, num_classes=CLASSES).train()

    def batches(self, shuffled: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.labels)
        order = torch.randperm(count) if shuffled else torch.arange(count)
        yield from ((self.images[part], self.labels[part]) for part in order.split(BATCH))

    def losses(
        self, model: pae.PromptedViT, shuffled: bool = False
    ) -> Iterator[tuple[Tensor, int]]:
        for x, y in self.batches(shuffled):
            yield F.cross_entropy(pae.fast_forward(model, x), y), len(y)

    def train_epoch(self, model: pae.PromptedViT, optimizer: torch.optim.Optimizer) -> float:
        """The mean loss."""
        total = 0.0
        for loss, count in self.losses(model, shuffled=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.prompts.end_of_step()
            total += loss.item() * count
        return total / len(self.labels)

    @torch.no_grad()
    def loss(self, model: pae.PromptedViT) -> float:
        return sum(loss.item() * n for loss, n in self.losses(model.eval())) / len(self.labels)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = [v.flatten().argsort().argsort().double() for v in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def sweeps(task: Task, tokens: int, epochs: int, seed: int) -> None:
    """A run steered by "reuse"; before every epoch, what the extra pass would have chosen."""
    for rate in (2e-4, 2e-3):
        torch.manual_seed(seed)
        model = task.model(ProVPT(tokens, sweep="reuse", seed=seed))
        family, head = model.prompts, list(model.head.parameters())
        optimizer = torch.optim.Adam(model.parameter_groups(rate, 0.0))
        family.start_of_epoch(lambda: iter(()), head, None)
        last = task.train_epoch(model, optimizer)
        chosen, same, correlations, ratios = [], 0, [], []
        for _ in range(epochs - 1):
            extra = ProVPT(tokens)
            observer = task.model(extra)
            observer.head.load_state_dict(model.head.state_dict())
            observer.prompts.load_state_dict(family.state_dict())
            start = time.process_time()
            scores, _ = extra._measure(lambda m=observer: task.losses(m), head, None)
            between = time.process_time()
            family.start_of_epoch(lambda: iter(()), head, last)
            chosen.append(int(family.idleness.argmax()))
            same += int(scores.argmax()) == chosen[-1]
            correlations.append(rank_correlation(scores, family.idleness))
            last = task.train_epoch(model, optimizer)
            ratios.append((between - start) / (time.process_time() - between))
        again = sum(a == b for a, b in itertools.pairwise(chosen))
        print(
            f"lr {rate:g} seed {seed}: same choice in {same} of {epochs - 1} epochs, rank "
            f"correlation {median(correlations):+.2f}, reuse chose the last prompt again "
            f"{again} times, pass / epoch {median(ratios):.2f}, loss {last:.3f}",
            flush=True,
        )


def condensing(task: Task, tokens: int, epochs: int, seed: int) -> None:
    """Each score against the change of the loss when one prompt is left out, and the 30 % kept."""
    torch.manual_seed(seed)
    model = task.model(VPTDeep(tokens))
    optimizer = torch.optim.Adam(model.parameter_groups(5e-3, 0.0))
    for _ in range(epochs):
        task.train_epoch(model, optimizer)
    base, rows = task.loss(model), [r.detach() for r in model.prompts.raw_prompts()]

    def loss_with(kept: Tensor) -> float:
        family = VPTDeep(kept.sum(1).tolist())
        fewer = task.model(family)
        family.set_prompts([r[k] for r, k in zip(rows, kept)])
        fewer.head.load_state_dict(model.head.state_dict())
        return task.loss(fewer)

    change = torch.zeros(len(rows), tokens)
    for place in torch.cartesian_prod(*map(torch.arange, change.shape)).tolist():
        kept = torch.ones_like(change, dtype=torch.bool)
        kept[tuple(place)] = False
        change[tuple(place)] = abs(loss_with(kept) - base)
    drawn = torch.rand(len(rows), tokens).argsort() < round(0.3 * tokens)
    print(f"seed {seed}: loss {base:.3f}; with 30 % at random {loss_with(drawn):.3f}")
    for score in condensation.SCORES:
        values = condensation._scores(model.eval(), task.batches(), score)
        small = pae.condense(model, task.batches(), score=score)
        print(
            f"seed {seed} {score}: rank correlation with leaving out one "
            f"{rank_correlation(values, change):.2f}, loss with 30 % {task.loss(small):.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("sweeps", "condensation"))
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=8, help="prompts per block")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(args.images)
    for seed in range(args.seeds):
        (sweeps if args.what == "sweeps" else condensing)(task, args.tokens, args.epochs, seed)


if __name__ == "__main__":
    main()
