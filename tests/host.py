"""What the host does in a step on a GPU, counted on a stand-in (`stand_in.py`): the step lasts as
long as the longer one of this and of what the GPU does.

Steps of ViT-B in bf16 at 128 images, forward and backward, and MPA's ranking of one window. Counted
are launches of our kernels, each by its name; operations of PyTorch, inside of our ops too, that
launch something on a GPU; views; tensors that are allocated and nothing more; and waits, in which
the host asks for a value. `bench.predictions` makes microseconds of these counts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pae
from bench import shapes
from pae.mpa.forward import ZeroPromptForward
from pae.mpa.losses import FilteredBatch
from pae_kernels.launching import Launcher
from tests import fake_driver, guard, stand_in
from tests.counts import IDLE

ARCHITECTURE, GPU = 90, torch.device("cuda", 0)
BATCH, PROMPTS, DTYPE = 128, 50, torch.bfloat16
DEPTH = 3  # a first, a middle and a last block
STEPS: dict[str, tuple[Callable[[], Any], Callable[[], Any] | None, str]] = {
    "keep": (lambda: pae.prompts.VPTDeep(PROMPTS), None, "keep"),
    "recompute8": (lambda: pae.prompts.VPTDeep(PROMPTS), None, "recompute8"),
    "recompute": (lambda: pae.prompts.VPTDeep(PROMPTS), None, "recompute"),
    "keep with kld": (lambda: pae.prompts.VPTDeep(PROMPTS), lambda: pae.KLD(256), "keep"),
    "VAPT": (lambda: pae.prompts.VAPT(PROMPTS), None, "keep"),
}


def step(name: str, depth: int) -> dict[str, Counter[str]]:
    """Direction -> counts of one step of `STEPS`; a first one has folded and allocated before."""
    family, kld, memory = STEPS[name]
    operations: Counter[Any] = Counter()
    with stand_in.gpu(ARCHITECTURE, operations) as launches:
        model = _model(family(), kld and kld(), depth)
        images = torch.zeros(BATCH, 3, 224, 224, device=GPU)
        labels = torch.zeros(BATCH, dtype=torch.long, device=GPU)

        def loss() -> torch.Tensor:
            with torch.autocast("cuda", DTYPE):
                logits = pae.fast_forward(model, images, memory)
            return F.cross_entropy(logits.float(), labels) + model.penalty()

        loss().backward()
        seen = _Seen(operations, launches)
        found = loss()
        ahead = seen.since()
        found.backward()
        return {"forward": ahead, "backward": seen.since()}


def ranking(depth: int) -> dict[str, Counter[str]]:
    """Of one forward of MPA's search, one window on the whole batch."""
    operations: Counter[Any] = Counter()
    with stand_in.gpu(ARCHITECTURE, operations) as launches, torch.no_grad():
        model = _model(pae.prompts.VPTDeep(PROMPTS), None, depth)
        spectrum = torch.zeros(BATCH, 3, 224, 224, dtype=torch.complex64, device=GPU)
        origins = torch.zeros(4, 2, dtype=torch.long, device=GPU)
        labels = torch.zeros(BATCH, dtype=torch.long, device=GPU)
        batch, forward = (
            FilteredBatch(model, spectrum, origins, 16),
            ZeroPromptForward(model, PROMPTS, DTYPE),
        )
        for _ in range(2):
            seen = _Seen(operations, launches)
            logits = forward(batch.rows(torch.arange(1), torch.arange(BATCH)))
            F.cross_entropy(logits.float(), labels, reduction="none")
        return {"forward": seen.since()}


def _model(family: Any, kld: Any, depth: int) -> pae.PromptedViT:
    vit = shapes.random_backbone(shapes.BASE, GPU, depth=depth)
    return pae.PromptedViT(vit, family, kld).to(GPU).train()


class _Seen:
    """What is counted from one look to the next."""

    def __init__(self, operations: Counter[Any], launches: dict[stand_in.Launch, int]) -> None:
        self._operations, self._launches = operations, launches
        self._before = self._counts()

    def since(self) -> Counter[str]:
        before, self._before = self._before, self._counts()
        return self._before - before

    def _counts(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for launch, times in self._launches.items():
            found[f"launches of {launch.kernel.fn.__name__}"] += times
        for op, times in self._operations.items():
            if op.namespace != "prim":  # what a fake tensor is asked for, its device among it
                found[_kind(op)] += times
        return found


_WAITS = {"_local_scalar_dense", "equal", "allclose", "is_nonzero", "nonzero", "masked_select"}


def _kind(op: Any) -> str:
    name = op.overloadpacket.__name__
    if op.namespace == "pae":
        return "ops of pae"
    if name in _WAITS:
        return "waits"
    if "empty" in name:
        return "allocations"
    return "views" if op.is_view or name in IDLE else "operations"


def measure() -> Iterator[tuple[str, int]]:
    """For `python -m tests.guard`: of a step, and what one more middle block adds to it."""
    cases: dict[str, Callable[[int], dict[str, Counter[str]]]] = {
        name: lambda depth, name=name: step(name, depth) for name in STEPS
    }
    for name, count in {**cases, "ranking": ranking}.items():
        found, deeper = count(DEPTH), count(DEPTH + 1)
        for way, counts in found.items():
            for what in sorted({*counts, *deeper[way]}):
                yield f"{name}/{way}/{what}", counts[what]
                yield f"{name}/{way}/{what} in a block", deeper[way][what] - counts[what]


# ---- microseconds


def microseconds(rounds: int = 30) -> dict[str, float]:
    """What the host takes here for a launch of ours until the driver has it, for the same launch in
    Triton's own way, and for any other call, with the Python around it.

    A launch is the mean of those of a step with the regulariser. A call is that of a block in a
    tiny ViT whose kernels go to a driver that launches nothing: its time without that of its
    launches, by the calls in it. Tensors are so small that PyTorch's own kernels take about what
    their launch would (in fp32: a CPU's products in bf16 take longer to begin). Process time, the
    best of rounds in turn.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what no kernel writes is whatever memory held
    few, many = (guard.Step(depth=depth) for depth in (4, 12))
    regular = guard.Step(dtype="bf16", kld=True)
    with fake_driver.gpu(compiles=False) as driver:
        launches, calls = {}, {}
        for step in (few, many):
            step.forward().backward()
            driver.launches.clear()
            with _Calls() as counted:
                step.forward().backward()
            launches[step], calls[step] = len(driver.launches), counted.number
        ours, own, count = _launches_again(regular)
        best = _best(
            {
                "few": lambda: few.forward().backward(),
                "many": lambda: many.forward().backward(),
                "ours": ours,
                "own": own,
            },
            driver,
            rounds,
        )
    launch = best["ours"] / count
    rest = best["many"] - best["few"] - (launches[many] - launches[few]) * launch
    return {
        "launch": launch,
        "launch, Triton's own way": best["own"] / count,
        "call": rest / (calls[many] - calls[few]),
    }


def _best(
    ways: dict[str, Callable[[], object]], driver: fake_driver.Driver, rounds: int
) -> dict[str, float]:
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, work in ways.items():
            driver.launches.clear()
            before = time.process_time()
            work()
            best[name] = min(best[name], (time.process_time() - before) * 1e6)
    return best


def _launches_again(step: Any) -> tuple[Callable[[], None], Callable[[], None], int]:
    """What makes the launches of a step once more, with the same arguments and nothing else; the
    same in Triton's own way; and how many they are.
    """
    kept: list[tuple[Launcher, tuple]] = []
    launch = Launcher.__call__

    def keep(self: Launcher, *given: Any) -> None:
        kept.append((self, given))
        launch(self, *given)

    with mock.patch.object(Launcher, "__call__", keep):
        step.forward().backward()

    def ours() -> None:
        for launcher, given in kept:
            launcher(*given)

    def own() -> None:
        for launcher, (count, _, given, constants) in kept:
            grid = count if isinstance(count, tuple) else (count,)
            launcher.kernel[grid](*given, **constants)

    return ours, own, len(kept)


class _Calls(TorchDispatchMode):
    """How much is dispatched."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        if func.namespace == "pae":
            with self:  # what it does inside counts too
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs or {})
        return func(*args, **kwargs or {})


def main() -> None:
    for name, us in microseconds().items():
        print(f"{name} {us:.1f} us")


if __name__ == "__main__":
    main()
