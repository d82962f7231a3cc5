"""Would G runs of VPT-deep on the same images be faster packed into one pass? Measured once.

Packed: every image G times, each copy with the prompts of its run (a prompt set each, picked by a
group index) and its head; one forward, one backward. Beside it G passes, one a run. Both give the
same gradients, which is checked before the first time is taken. `python -m bench.studies.packed`
prints milliseconds of process time on one thread, as medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pae
from pae.prompts.base import BackboneShape

# (model, side in pixels, images of a run's batch)
CASES = (("vit_small_patch14_dinov2", 56, 16), ("vit_base_patch16_224", 224, 4))


class PackedVPT(pae.prompts.VPTDeep):
    """The prompts of `runs` runs: image b has those of run b // (B / runs)."""

    def __init__(self, num_tokens: int, runs: int) -> None:
        super().__init__(num_tokens)
        self.runs = runs

    def bind(self, shape: BackboneShape) -> None:
        super().bind(shape)
        self.sets = nn.Parameter(torch.stack([self.tokens.detach()] * self.runs, 1))
        self.register_parameter("tokens", None)

    def block_prompts(self, index: int, x: Tensor) -> Tensor:
        return self.sets[index]

    def all_prompts(self, x: Tensor) -> list[Tensor | None]:
        return [*self.sets]

    def group_index(self, x: Tensor) -> Tensor:
        return torch.arange(self.runs).repeat_interleave(len(x) // self.runs)


def measure(name: str, size: int, batch: int, runs: int, tokens: int, rounds: int) -> list[float]:
    """Milliseconds of (G passes, the packed one)."""
    torch.manual_seed(0)
    vit = timm.create_model(name, img_size=size, num_classes=0)
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % 10
    each = [pae.PromptedViT(vit, pae.prompts.VPTDeep(tokens), num_classes=10) for _ in range(runs)]
    packed = pae.PromptedViT(vit, PackedVPT(tokens, runs), num_classes=10)
    heads = nn.Parameter(torch.stack([m.head.weight.detach() for m in each]))
    packed.head = nn.Identity()
    with torch.no_grad():
        packed.prompts.sets.copy_(torch.stack([m.prompts.tokens for m in each], 1))

    def alone() -> None:
        for model in each:
            model.zero_grad()
            F.cross_entropy(pae.fast_forward(model, images), labels).backward()

    def together() -> None:
        packed.zero_grad()
        heads.grad = None
        features = pae.fast_forward(packed, images.repeat(runs, 1, 1, 1))
        logits = features.unflatten(0, (runs, batch)) @ heads.mT  # biases are 0
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(runs), reduction="sum")
        (loss / batch).backward()

    ways: tuple[Callable[[], None], ...] = (alone, together)
    for way in ways:
        way()
    found = packed.prompts.sets.grad
    expected = torch.stack([m.prompts.tokens.grad for m in each], 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    seconds: dict[Callable[[], None], list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            began = time.process_time()
            way()
            seconds[way].append(time.process_time() - began)
    return [1000 * statistics.median(seconds[way]) for way in ways]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for case in CASES:
        for runs in (2, 4):
            alone, packed = measure(*case, runs, given.tokens, given.rounds)
            print(
                f"{case[0]} {case[1]} px, batch {case[2]}, {runs} runs: {alone:.0f} ms in "
                f"{runs} passes, {packed:.0f} ms packed, ratio {packed / alone:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
