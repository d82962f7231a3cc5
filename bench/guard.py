"""The performance guard: counts of a step that no noise touches, against a committed file.

    python -m bench.guard             which counts differ from tests/costs.json; exit code 1 if any
    python -m bench.guard --update    write them down as they are now

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
import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import pae

from . import cost, counts, shapes
from .memory import SavedBytes, tensors_in

FILE = Path(__file__).parents[1] / "tests" / "costs.json"
ROOM = 0.05  # on another PyTorch: of counts that its dispatcher decides
ACCEPT = "python -m bench.guard --update"

P, CLASSES, DEPTH, BATCH = 4, 10, 4, 2
CPU = torch.device("cpu")
DTYPES = {"fp32": None, "bf16": torch.bfloat16}

# one of each, for the engine's answers to what a family asks
FAMILIES: dict[str, Callable[[], pae.prompts.PromptFamily]] = {
    "VPTDeep": lambda: pae.prompts.VPTDeep(P),
    "VPTShallow": lambda: pae.prompts.VPTShallow(P),
    "BPTDeep": lambda: pae.prompts.BPTDeep(P, P),
    "BPTShallow": lambda: pae.prompts.BPTShallow(P, P),
    "VFPTDeep": lambda: pae.prompts.VFPTDeep(P, 0.5),
    "VFPTShallow": lambda: pae.prompts.VFPTShallow(P, 0.5),
    "IVPT": lambda: pae.prompts.IVPT(P, 3),
    "APT": lambda: pae.prompts.APT(P),
    "E2VPT": lambda: pae.prompts.E2VPT(P, 3),
    "DAVPT": lambda: pae.prompts.DAVPT(P, P, CLASSES),
    "LSPT": lambda: pae.prompts.LSPT(P),
    "ProVPT": lambda: pae.prompts.ProVPT(P),
    "VAPT": lambda: pae.prompts.VAPT(P),
}


class Step:
    """A training step of `family` on a tiny ViT: forward, cross-entropy, penalty, backward."""

    def __init__(
        self,
        family: Callable[[], pae.prompts.PromptFamily] = FAMILIES["VPTDeep"],
        depth: int = DEPTH,
        dtype: str = "fp32",
        kld: bool = False,
    ) -> None:
        torch.manual_seed(0)
        vit = shapes.random_backbone(shapes.TINY, CPU, depth=depth, num_classes=CLASSES)
        self.model = pae.PromptedViT(vit, family(), pae.KLD(16) if kld else None).train()
        self.images, self.labels = torch.randn(BATCH + 1, 3, 32, 32), torch.arange(BATCH + 1)
        self.dtype = DTYPES[dtype]
        self.plan = list(tensors_in(self.model.plan(self.dtype)))  # folded once, not in a step

    def forward(self, batch: int = BATCH, memory: str = "keep") -> Tensor:
        """The loss of the first `batch` images, gradients of earlier steps forgotten."""
        self.model.zero_grad()
        labels = self.labels[:batch]
        self.model.prompts.see_labels(labels)
        with torch.autocast("cpu", self.dtype) if self.dtype else nullcontext():
            logits = pae.fast_forward(self.model, self.images[:batch], memory)
        return F.cross_entropy(logits.float(), labels) + self.model.penalty()

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

    def work(self) -> tuple[counts.Work, counts.Work]:
        """Operations and allocations, forward and backward."""
        with counts.Work() as ahead:
            loss = self.forward()
        with counts.Work() as back:
            loss.backward()
        return ahead, back

    def flops(self) -> cost.Flops:
        """By PyTorch's counter."""
        with FlopCounterMode(display=False) as ahead:
            loss = self.forward()
        with FlopCounterMode(display=False) as back:
            loss.backward()
        return cost.Flops(ahead.get_total_flops(), back.get_total_flops())

    def launches(self) -> tuple[int, int]:
        """Triton kernels, forward and backward."""
        with counts.triton_launches() as seen:
            loss = self.forward()
            ahead = seen.total()
            loss.backward()
            return ahead, seen.total() - ahead


def measure(*parts: str) -> dict[str, int]:
    """Name -> count of everything that is guarded, or of some of `PARTS`."""
    found: dict[str, int] = {}
    for part in parts or PARTS:
        found |= {f"{part}/{name}": count for name, count in PARTS[part]()}
    return found


WAYS = ("forward", "backward")


def _step() -> Iterator[tuple[str, int]]:
    """VPT-deep in both dtypes, and with KLD."""
    for name, options in {
        "fp32": {},
        "bf16": {"dtype": "bf16"},
        "fp32 with kld": {"kld": True},
    }.items():
        step, deeper = Step(**options), Step(depth=DEPTH + 1, **options)
        for way, work, more in zip(WAYS, step.work(), deeper.work()):
            yield f"{name}/{way}/operations", work.ops.total()
            yield f"{name}/{way}/operations in a block", more.ops.total() - work.ops.total()
            yield f"{name}/{way}/tensors allocated", work.tensors
            yield f"{name}/{way}/bytes allocated", work.bytes
        flops = step.flops()
        yield f"{name}/forward/FLOPs", int(flops.forward)
        yield f"{name}/backward/FLOPs", int(flops.backward)


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
    """What one block of every family adds to a step."""
    for name, family in FAMILIES.items():
        step, deeper = Step(family), Step(family, DEPTH + 1)
        for way, work, more in zip(WAYS, step.work(), deeper.work()):
            yield f"{name}/{way}/operations in a block", more.ops.total() - work.ops.total()
        block = deeper.saved_by_image() - step.saved_by_image()
        yield f"{name}/bytes of an image in a block", block


def _triton() -> Iterator[tuple[str, int]]:
    """Kernels of our own that a step in bf16 launches; nothing where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return
    for name, kld in {"step": False, "step with kld": True}.items():
        kernels = Step(dtype="bf16", kld=kld).launches()
        deeper = Step(dtype="bf16", depth=DEPTH + 1, kld=kld).launches()
        for way, count, more in zip(WAYS, kernels, deeper):
            yield f"{name}/{way}/kernels", count
            yield f"{name}/{way}/kernels in a block", more - count


PARTS = {"step": _step, "memory": _memory, "family": _families, "triton": _triton}


def version() -> str:
    """Of PyTorch, as far as its dispatcher's habits go: "2.15"."""
    return ".".join(torch.__version__.split(".")[:2])


def by_dispatcher(name: str) -> bool:
    """Whether PyTorch's version has a say in this count."""
    return "operations" in name or "allocated" in name


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
    if by_dispatcher(name) and torch_version != version():
        if now <= was * (1 + ROOM):
            return ""
        return f"{more} on PyTorch {torch_version}. If it must be, there: {ACCEPT}"
    if now > was:
        return f"{more}. If it must be: {ACCEPT}"
    return f"{name} is better: {now}, was {was}. Keep it so: {ACCEPT}"


def read() -> tuple[str, dict[str, int]]:
    """PyTorch's version and the counts of the committed file."""
    file = json.loads(FILE.read_text())
    return file["torch"], file["counts"]


def write(found: dict[str, int]) -> None:
    """Replace the committed file, in whole."""
    text = json.dumps({"torch": version(), "counts": found}, indent=1) + "\n"
    new = FILE.with_suffix(".new")
    new.write_text(text)
    os.replace(new, FILE)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.guard", description=__doc__)
    parser.add_argument("--update", action="store_true", help="accept the counts as they are")
    update = parser.parse_args(arguments).update
    found = measure()
    torch_version, committed = read() if FILE.exists() else (version(), {})
    names = dict.fromkeys([*committed, *found])
    said = [complaint(n, committed.get(n), found.get(n), torch_version) for n in names]
    said = [line for line in said if line]
    print("\n".join(said) or f"{len(found)} counts as committed")
    if update:
        write(found)
    return int(bool(said) and not update)


if __name__ == "__main__":
    raise SystemExit(main())
