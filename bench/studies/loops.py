"""The loops that `bench.studies.end_to_end` compares, each under a clock that knows its phases.

`run_ours` is `pae train`, `run_official` is `bench.peers.loop` from the same start. Both return
what a run leaves: "epochs", for each "train_loss", "val_loss", "val_accuracy" and "clock", what was
spent when it was validated; "test", the accuracy of the best epoch; "picks", the windows behind the
prompts, best first, and "prompts" (depth, P, D) that they gave; "total", what was spent in all; and
"rows" of an image, class token included, that enter block 0.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import set_seed
from matplotlib.backends import backend_agg  # noqa: F401  what the first plotted run would import
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from torch import Tensor

from bench.peers import loop as peer
from pae.train import loop, methods, pixels
from pae.train.options import Options
from pae.train.report import Reporter
from pae.train.runfolder import RunFolder

# rest: building the model, checkpoints
PHASES = ("loading", "alignment", "steps", "validation", "test", "rest")

T = TypeVar("T")


class Clock:
    """Seconds by phase, (process, wall); phases nest, and only the innermost one counts.

    Args:
        device: where the work runs; a GPU is waited for wherever a phase begins or ends.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._spent = {name: [0.0, 0.0] for name in PHASES}
        self._stack = ["rest"]
        self._since = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._book()
        self._stack.append(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def waiting(self, batches: Callable[..., Iterable[T]], *arguments: Any) -> Iterator[T]:
        """What `batches(*arguments)` yields; making it and waiting for each is "loading". Behind
        the last one data workers end, and their time counts.
        """
        with self.phase("loading"):
            items = iter(batches(*arguments))
        while True:
            with self.phase("loading"):
                item = next(items, None)
            if item is None:
                return
            yield item

    def read(self) -> dict[str, list[float]]:
        """Spent so far: phase -> [process, wall]."""
        self._book()
        return {name: [round(s, 4) for s in spent] for name, spent in self._spent.items()}

    def _book(self) -> None:
        now, spent = self._now(), self._spent[self._stack[-1]]
        for i in range(2):
            spent[i] += now[i] - self._since[i]
        self._since = now

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        # a worker's time is known once it has ended and was waited for
        used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used), time.perf_counter()


# ---- ours


class _Clocked(loop._Run):
    """`pae train`'s run with a clock around its parts."""

    def __init__(self, clock: Clock, settings: Options, task: Any, folder: RunFolder) -> None:
        self.clock, self.stamps, self.prompts = clock, [], None
        nothing = dict.fromkeys(("name", "resume", "on_start", "on_backward"))
        accelerator, reporter = loop.make_accelerator(settings), Reporter(quiet=True)
        super().__init__(settings, task, folder, accelerator, reporter, **nothing)

    def _data(self, task: Any) -> tuple:
        with self.clock.phase("loading"):
            train, val, test = super()._data(task)
        for data in (train, val):
            data.batches = partial(self.clock.waiting, data.batches)
        return train, val, test

    def _align(self) -> None:
        with self.clock.phase("alignment"):
            super()._align()
        self.prompts = self.module.prompts.tokens.detach().cpu().clone()

    def _train_epoch(self, *arguments: Any) -> None:
        with self.clock.phase("steps"):
            super()._train_epoch(*arguments)

    def _evaluate(self, data: Any) -> Any:
        with self.clock.phase("test" if data is self.test_data else "validation"):
            return super()._evaluate(data)

    def _finish_epoch(self) -> None:
        super()._finish_epoch()
        self.stamps.append(self.clock.read())


def run_ours(settings: Options, task: Any, folder: Path) -> dict[str, Any]:
    """`pae train` with these settings."""
    clock, kept = Clock(settings.device), RunFolder(folder)
    run = _Clocked(clock, settings, task, kept)
    result, total = run.train(), clock.read()
    for heavy in (kept.state, kept.previous_state):
        heavy.unlink(missing_ok=True)
    keys = ("train_loss", "val_loss", "val_accuracy")
    epochs = [
        {**{k: row[k] for k in keys}, "clock": stamp} for row, stamp in zip(run.rows, run.stamps)
    ]
    return {
        "epochs": epochs,
        "test": result["test_accuracy"],
        "picks": run.alignment.selected.tolist(),
        "prompts": run.prompts,
        "total": total,
        "rows": run.module.view.shape.num_tokens,
    }


# ---- the official-style one


def run_official(settings: Options, task: Any, folder: Path) -> dict[str, Any]:
    """The loop of `bench.peers.loop` from the same start; nothing is written to `folder`."""
    clock = Clock(settings.device)
    set_seed(settings.seed)
    start = methods.build_method(settings, len(task.classes)).to(settings.device)
    vit, kld = start.backbone, start.kld
    operators = kld.lift.weight, kld.K, kld.L
    weights = settings.kld_consistency, settings.kld_lyapunov
    model = peer.OfficialStylePAE(vit, start.prompts.tokens, start.head, *operators, weights)
    config, size = resolve_data_config({}, model=vit), vit.patch_embed.img_size[0]
    pixel = size, config["interpolation"], *pixels.normalisation(settings.norm, config)
    train, val, test = (
        peer.ImageFiles(split.items, split.labels, *pixel)
        for split in (task.train, task.val, task.test)
    )

    def batches(data: Any, lists: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return peer.load(data, lists, settings.workers, settings.device)

    def order(epoch: int) -> list[Tensor]:
        return pixels.epoch_batches(len(train), settings.batch_size, settings.seed, epoch)

    def all_of(data: Any) -> list[Tensor]:
        return pixels.sequential_batches(len(data), settings.batch_size)

    with clock.phase("alignment"):
        first = torch.cat(order(0))[: settings.mpa_images]
        ((images, labels),) = clock.waiting(batches, train, [first])
        grid = settings.mpa_window, settings.mpa_stride
        picks = peer.align(model, vit, images, labels, *grid)
    prompts = model.vpt.prompts.detach().cpu().clone()

    optimizer, after_step = _optimizer(model, settings, math.ceil(len(train) / settings.batch_size))
    epochs, best = [], (-1.0, 0.0, 0.0)
    for epoch in range(settings.epochs):
        with clock.phase("steps"):
            given = clock.waiting(batches, train, order(epoch))
            loss = peer.train_epoch(model, given, optimizer, after_step)
        with clock.phase("validation"):
            val_loss, accuracy = peer.evaluate(model, clock.waiting(batches, val, all_of(val)))
        stamp = clock.read()
        with clock.phase("test"):  # its loading too: time to accuracy has no part in it
            _, test_accuracy = peer.evaluate(model, batches(test, all_of(test)))
        row = {"train_loss": loss, "val_loss": val_loss, "val_accuracy": accuracy}
        epochs.append({**row, "clock": stamp})
        best = max(best, (accuracy, -val_loss, test_accuracy), key=lambda found: found[:2])
    found = {"epochs": epochs, "test": best[2], "picks": picks, "prompts": prompts}
    return {**found, "total": clock.read(), "rows": vit.pos_embed.shape[1]}


def _optimizer(
    model: peer.OfficialStylePAE, settings: Options, batches: int
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """The recipe of `pae train`: its optimiser, decay on all but the head's bias, its schedule."""
    head = model.vpt.head
    recipe = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    decayed = [model.vpt.prompts, *model.koopman_parameters(), head.weight]
    groups = [{"params": decayed, **recipe}, {"params": [head.bias], **recipe, "weight_decay": 0.0}]
    optimizer = create_optimizer_v2(groups, opt=settings.optimizer, momentum=0.9, **recipe)
    scheduler, updates = loop._make_scheduler(settings, optimizer, batches), iter(range(1, 1 << 60))

    def after_step() -> None:
        if scheduler is not None:
            scheduler.step_update(next(updates))

    return optimizer, after_step
