"""The performance guard: counts of a step that no noise touches, against a committed file.

    python -m tests.guard             which counts differ from tests/costs.json; exit code 1 if any
    python -m tests.guard --update    write them down as they are now

`tests/bench/test_costs.py` runs the same check. Every count is better when smaller: bytes autograd
keeps, operations that PyTorch dispatches (one of pae's ops is one), memory that they hand out,
Triton kernels that are launched, floating-point operations. "Block" is what one more block adds to
a step, counted as the difference of two depths; "image" that of two batches.

What PyTorch itself dispatches for a line of Python may change with its version, so counts of
operations and allocations must be equal on the version that the file was written with, and
elsewhere within `ROOM` of it (2.11, 2.13 and 2.15 count alike). All others hold on every version.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import pae
from bench import cost, shapes
from bench.memory import SavedBytes, tensors_in
from pae.checkpoint import write_atomically
from pae.prompts import METHODS, PromptFamily, VPTDeep
from tests import counts

FILE = Path(__file__).parent / "costs.json"
ROOM = 0.05  # on another PyTorch: of counts that its dispatcher decides
ACCEPT = "python -m tests.guard --update"
VERSION = ".".join(torch.__version__.split(".")[:2])  # as far as the dispatcher's habits go

P, CLASSES, DEPTH, BATCH = 4, 10, 4, 2
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
WAYS = ("forward", "backward")
# small values of what families are made with
ARGUMENTS = {"num_tokens": P, "rank": P, "num_proxies": P, "num_classes": CLASSES}
ARGUMENTS |= {"fraction": 0.5, "num_kv": 3, "num_reinforced": 3}

Seen = TypeVar("Seen")


def small(family: type[PromptFamily]) -> PromptFamily:
    """One of this class, made with those of `ARGUMENTS` that it takes."""
    taken = inspect.signature(family).parameters
    return family(**{name: value for name, value in ARGUMENTS.items() if name in taken})


class Step:
    """A training step of `family` on a tiny ViT: forward, cross-entropy, penalty, backward."""

    def __init__(
        self,
        family: type[PromptFamily] = VPTDeep,
        depth: int = DEPTH,
        dtype: str = "fp32",
        kld: bool = False,
    ) -> None:
        torch.manual_seed(0)
        cpu = torch.device("cpu")
        vit = shapes.random_backbone(shapes.TINY, cpu, depth=depth, num_classes=CLASSES)
        self.model = pae.PromptedViT(vit, small(family), pae.KLD(16) if kld else None).train()
        self.images, self.labels = torch.randn(BATCH + 1, 3, 32, 32), torch.arange(BATCH + 1)
        self.dtype = DTYPES[dtype]
        self.plan = list(tensors_in(self.model.plan(self.dtype)))  # folded once, not in a step
        self.forward().backward()  # nor is what a process asks of its processor and PyTorch once

    def forward(self, batch: int = BATCH, memory: str = "keep") -> Tensor:
        """The loss of the first `batch` images, gradients of earlier steps forgotten."""
        self.model.zero_grad()
        labels = self.labels[:batch]
        self.model.prompts.see_labels(labels)
        with torch.autocast("cpu", self.dtype) if self.dtype else nullcontext():
            logits = pae.fast_forward(self.model, self.images[:batch], memory)
        return F.cross_entropy(logits.float(), labels) + self.model.penalty()

    def seen(self, counter: Callable[[], AbstractContextManager[Seen]]) -> tuple[Seen, Seen]:
        """What a context sees of the forward, and another of the backward."""
        with counter() as ahead:
            loss = self.forward()
        with counter() as back:
            loss.backward()
        return ahead, back

    def saved(self, batch: int = BATCH, memory: str = "keep") -> int:
        """Bytes of activations that the forward keeps for the backward."""
        model = self.model
        constants = [*model.parameters(), *model.buffers(), *self.plan, self.images, self.labels]
        with SavedBytes(constants) as kept:
            self.forward(batch, memory)
        return kept.activations

    def saved_by_image(self, memory: str = "keep") -> int:
        """What one more image in the batch adds to that."""
        return self.saved(BATCH + 1, memory) - self.saved(BATCH, memory)


def measure(*parts: str) -> dict[str, int]:
    """Name -> count of everything that is guarded, or of some of `PARTS`."""
    return {f"{part}/{name}": n for part in parts or PARTS for name, n in PARTS[part]()}


def _step() -> Iterator[tuple[str, int]]:
    """VPT-deep in both dtypes, and with KLD."""
    for name, dtype, kld in (
        ("fp32", "fp32", False),
        ("bf16", "bf16", False),
        ("fp32 with kld", "fp32", True),
    ):
        step, deeper = (Step(depth=depth, dtype=dtype, kld=kld) for depth in (DEPTH, DEPTH + 1))
        for way, work, more in zip(WAYS, step.seen(counts.Work), deeper.seen(counts.Work)):
            yield f"{name}/{way}/operations", work.ops.total()
            yield f"{name}/{way}/operations in a block", more.ops.total() - work.ops.total()
            yield f"{name}/{way}/tensors allocated", work.tensors
            yield f"{name}/{way}/bytes allocated", work.bytes
        for way, flops in zip(WAYS, step.seen(lambda: FlopCounterMode(display=False))):
            yield f"{name}/{way}/FLOPs", flops.get_total_flops()


def _memory() -> Iterator[tuple[str, int]]:
    """Bytes kept for the backward by VPT-deep."""
    for dtype in DTYPES:
        step, deeper = Step(dtype=dtype), Step(dtype=dtype, depth=DEPTH + 1)
        for memory in cost.MEMORY:
            image = step.saved_by_image(memory)
            block = deeper.saved_by_image(memory) - image
            yield f"{dtype}/{memory}/bytes of a step", step.saved(memory=memory)
            yield f"{dtype}/{memory}/bytes of an image", image
            yield f"{dtype}/{memory}/bytes of an image in a block", block


def _families() -> Iterator[tuple[str, int]]:
    """What one block of every family that pae ships adds to a step."""
    for family in METHODS.values():
        if family.__module__.startswith("pae."):
            name, step, deeper = family.__name__, Step(family), Step(family, DEPTH + 1)
            for way, work, more in zip(WAYS, step.seen(counts.Work), deeper.seen(counts.Work)):
                yield f"{name}/{way}/operations in a block", more.ops.total() - work.ops.total()
            block = deeper.saved_by_image() - step.saved_by_image()
            yield f"{name}/bytes of an image in a block", block


def _triton() -> Iterator[tuple[str, int]]:
    """Kernels of our own that a step in bf16 launches; nothing where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return
    for name, kld in {"step": False, "step with kld": True}.items():
        step, deeper = (Step(depth=depth, dtype="bf16", kld=kld) for depth in (DEPTH, DEPTH + 1))
        launched = (each.seen(counts.triton_launches) for each in (step, deeper))
        for way, kernels, more in zip(WAYS, *launched):
            yield f"{name}/{way}/kernels", kernels.total()
            yield f"{name}/{way}/kernels in a block", more.total() - kernels.total()


def _host() -> Iterator[tuple[str, int]]:
    """What the host does on a GPU (`host.py`); nothing where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return
    from tests import host

    yield from host.measure()


PARTS = {
    "step": _step,
    "memory": _memory,
    "family": _families,
    "triton": _triton,
    "host": _host,
}


def complaint(name: str, was: int | None, now: int | None, torch_version: str) -> str:
    """What is wrong with one count, in one line; nothing when all is well.

    Args:
        was, now: the committed and the measured count, None where there is none. A better count
            is a complaint too: what is not written down can be lost again.
        torch_version: that the committed one was counted with.
    """
    if was == now:
        return ""
    if was is None:
        return f"{name} is new ({now}). Write it down: {ACCEPT}"
    if now is None:
        return f"{name} is no longer counted (was {was}). Strike it out: {ACCEPT}"
    more = f"{name} is worse: {now}, was {was} ({now / max(was, 1) - 1:+.1%})"
    by_dispatcher = any(word in name for word in ("operations", "allocat", "views"))
    if by_dispatcher and torch_version != VERSION:
        more += f" on PyTorch {torch_version}. If it must be, there: {ACCEPT}"
        return "" if now <= was * (1 + ROOM) else more
    if now > was:
        return f"{more}. If it must be: {ACCEPT}"
    return f"{name} is better: {now}, was {was}. Keep it so: {ACCEPT}"


def read() -> tuple[str, dict[str, int]]:
    """PyTorch's version and the counts of the committed file."""
    file = json.loads(FILE.read_text())
    return file["torch"], file["counts"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.guard", description=__doc__)
    parser.add_argument("--update", action="store_true", help="accept the counts as they are")
    update = parser.parse_args(arguments).update
    found = measure()
    torch_version, committed = read() if FILE.exists() else (VERSION, {})
    names = dict.fromkeys([*committed, *found])
    said = [complaint(n, committed.get(n), found.get(n), torch_version) for n in names]
    said = [line for line in said if line]
    print("\n".join(said) or f"{len(found)} counts as committed")
    if update:
        text = json.dumps({"torch": VERSION, "counts": found}, indent=1) + "\n"
        write_atomically(FILE, lambda path: path.write_text(text))
    return int(bool(said) and not update)


if __name__ == "__main__":
    raise SystemExit(main())
