"""The protocol of docs/science.md: a grid per arm, chosen on validation, then seeds; in pieces.

Learning rate and weight decay are chosen for every arm by itself: its grid runs from seed 0, the
cell with the best validation wins, and the other seeds run that cell; the winner's run is seed 0's.
Test images are never looked at for a choice. Every finished run is one small record, under a key
that is a hash of all that decides its numbers, so that a study goes on wherever it was stopped, by
as many processes as share its output, and a run that two studies have is done once.

What a run costs is counted in passes of one image through the backbone: one forward is 1. A
training step is 2 an image, as `pae train` counts: forward, and the backward to the prompts, which
has the same products, for no frozen weight has a gradient. Modal Pre-Alignment is a forward of
every image through every window; tokens of images (SPT) are one forward of every training image.
Validation, which all arms have alike, is not counted.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import pae
from pae.train import embedded, loop, pixels
from pae.train.data import Images, Task
from pae.train.lock import InUse
from pae.train.options import Options
from pae.train.report import Reporter
from pae.train.runfolder import RunFolder

from . import runs

STORES = ("convergence.json", "families.json")  # of committed records, in `runs.RESULTS`
# The optimiser is that of `pae train`: SGD, which is published with 0.25, blows up on this backbone
# and batch, at 0.25 and at 0.02 (training losses of 370 and 30 in the second epoch). As published:
# width and weights of the regulariser, dropout, warm-up, a rate per epoch that starts at 0, windows
# of 16 every 8 pixels, MPA on one batch. Published for CUB: 20 prompts, batch 128, 100 epochs.
RECIPE: dict[str, Any] = {
    "method": "vpt-deep",
    "num_tokens": 10,
    "dropout": 0.1,
    "optimizer": "adamw",
    "scheduler": "vpt",
    "epochs": 30,
    "warmup_epochs": 10,
    "batch_size": 16,
    "mpa_images": 16,
    "img_size": 56,
    "train_size": 160,
    "val_size": 100,
}
DEPTH, TEST_SIZE, VALIDATE = 6, 400, 2  # blocks of the backbone; images; every so many epochs
# four rates where the protocol has three: the arms' best ones lie far apart
LRS, DECAYS = (3e-3, 1e-2, 3e-2, 1e-1), (1e-4, 1e-1)
PASSES_OF_A_STEP = 2
SECONDS_PER_PASS = 0.005  # until a run has been measured


def scale() -> dict[str, int]:
    """What of the recipe is not an option of `pae train`."""
    return {"depth": DEPTH, "test_size": TEST_SIZE, "validate": VALIDATE}


class Arm(NamedTuple):
    """What pages call it, its colour's role, what it changes in the recipe, and its grid."""

    title: str
    colour: str
    changes: dict[str, Any]
    lrs: tuple[float, ...] = LRS
    decays: tuple[float, ...] = DECAYS


class Study(NamedTuple):
    """A file of `STORES`, image sets and arms by name, the baseline first; how many seeds."""

    store: str
    datasets: tuple[str, ...]
    arms: dict[str, Arm]
    seeds: int


@dataclass(frozen=True)
class Run:
    """One run: what decides its numbers beside `RECIPE`."""

    dataset: str
    changes: dict[str, Any]
    lr: float
    weight_decay: float
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """In the words of `Options`."""
        own = {"lr": self.lr, "weight_decay": self.weight_decay, "seed": self.seed}
        return {**RECIPE, **self.changes, "dataset": self.dataset, **own}

    @property
    def key(self) -> str:
        """A hash of all settings, in whatever order they were written."""
        text = json.dumps([self.settings(), scale()], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def passes(self) -> int:
        """All that it takes, validation and test included."""
        known = self.settings()
        windows = ((known["img_size"] - 16) // 8 + 1) ** 2 if known.get("mpa") else 0
        first = windows * known["mpa_images"] + known["train_size"] * bool(known.get("spt"))
        trained = known["epochs"] * known["train_size"] * PASSES_OF_A_STEP
        return first + trained + known["epochs"] // VALIDATE * known["val_size"] + TEST_SIZE


Found = dict[str, dict[str, Any]]  # finished runs: key -> record


class Piece(NamedTuple):
    """A part of a study: how many runs it has, and those of them that are known by now."""

    name: str
    count: int
    runs: list[Run]


def grid(dataset: str, arm: Arm) -> list[Run]:
    """The cells of an arm."""
    return [Run(dataset, arm.changes, lr, decay) for lr in arm.lrs for decay in arm.decays]


def best(record: dict[str, Any]) -> tuple[float, float]:
    """(accuracy, -loss) of the best validation; of a run that diverged, the worst there is."""
    return max(((a, -loss) for _, a, loss in record["val"]), default=(-1.0, 0.0))


def choice(cells: Iterable[Run], found: Found) -> Run | None:
    """The cell with the best validation, the first of equals; None while one has not been run."""
    cells = list(cells)
    if any(run.key not in found for run in cells):
        return None
    return max(cells, key=lambda run: best(found[run.key]))


def finals(dataset: str, arm: Arm, seeds: int, found: Found) -> list[Run]:
    """The chosen cell from every seed; nothing while it is not known."""
    chosen = choice(grid(dataset, arm), found)
    return [] if chosen is None else [replace(chosen, seed=seed) for seed in range(seeds)]


def pieces(study: Study, found: Found) -> Iterator[Piece]:
    """By value: a task's grids, its seeds (an early stop leaves whole seeds), the next task."""
    arms = study.arms.values()
    for dataset in study.datasets:
        cells = [run for arm in arms for run in grid(dataset, arm)]
        yield Piece(f"{dataset} grid", len(cells), cells)
        seeds = zip(*filter(None, (finals(dataset, a, study.seeds, found) for a in arms)))
        left = [run for one in list(seeds)[1:] for run in one]
        yield Piece(f"{dataset} seeds", len(arms) * (study.seeds - 1), left)


# ---- one run


class _Sparse(loop._Run):
    """Validates every `VALIDATE` epochs, and saves no state: a run that is killed begins again."""

    def _evaluate(self, data: Any) -> Any:
        if data is self.val_data and (self.epoch + 1) % VALIDATE:
            return {"loss": 0.0, "accuracy": -1.0}, self._no_sums()  # worse than any
        return super()._evaluate(data)

    def _save(self) -> None:
        pass


class _Silent(Reporter):
    """No curves either."""

    def curves(self, path: Path, runs: Any, results: Any = None) -> None:
        pass


def train(run: Run, output: Path) -> dict[str, Any] | None:
    """The record of a run; None if another process is at it, or has just done it."""
    folder = RunFolder(output / "work" / run.key)
    try:
        with folder.held():
            if _file(output, run).is_file():
                return None
            record = _record(run, folder, output)
            runs.write_json(_file(output, run), record, indent=None)
    except InUse:
        return None
    shutil.rmtree(folder.path, ignore_errors=True)
    return record


def _file(output: Path, run: Run) -> Path:
    return output / f"{run.key}.json"


def _record(run: Run, folder: RunFolder, output: Path) -> dict[str, Any]:
    began, settings = time.process_time(), {"model": backbone(output), **run.settings()}
    options = Options(**settings, device="cpu", amp="no", workers=0).resolved()
    sizes = options.train_size, options.val_size, options.img_size
    trace, task = runs.Trace(), _task(run.dataset, run.seed, *sizes)
    own = {k: v for k, v in run.settings().items() if RECIPE.get(k, ...) != v}
    record: dict[str, Any] = {"settings": own, "code": code(), "val": []}
    place = folder, loop.make_accelerator(options), _Silent(quiet=True)
    try:
        result = _Sparse(options, task, *place, None, None, None, trace).train()
    except ArithmeticError as error:
        return {**record, "diverged": str(error)}
    rows = [row for row in folder.rows() if row["val_accuracy"] >= 0]
    first = result["mpa_passes"] or len(task.train) * bool(options.spt)
    return {
        **record,
        "val": [[r["epoch"], r["val_accuracy"], runs.short(r["val_loss"])] for r in rows],
        "test": result["test_accuracy"],
        "first_passes": first,
        "parameters": result["trained_parameters"],
        "seconds": round(time.process_time() - began, 1),
        **turning(trace),
    }


def turning(trace: runs.Trace) -> dict[str, list[float]]:
    """How restless the prompts' gradient is, as means over the first third of the blocks, the
    middle and the last; nothing of prompts without a row per block. The regulariser's part is in
    it.

    swing: standard deviation over mean of the norm, over the steps; turns: share of steps whose
    gradient points against the step before.
    """
    if not trace.norms:
        return {}
    norm, cosine = torch.tensor(trace.norms), torch.tensor(trace.cosines)

    def thirds(values: Tensor) -> list[float]:
        third = len(values) // 3
        parts = values[:third], values[third:-third], values[-third:]
        return [runs.short(part.double().mean().item()) for part in parts]

    return {"swing": thirds(norm.std(0) / norm.mean(0)), "turns": thirds((cosine < 0).double().T)}


def backbone(output: Path) -> str:
    """The embedded backbone cut to its first `DEPTH` blocks, in timm's words."""
    if RECIPE.get("model"):
        return str(RECIPE["model"])
    folder, size = output / f"backbone-{DEPTH}-{RECIPE['img_size']}", RECIPE["img_size"]
    if not (folder / "config.json").is_file():
        whole = embedded.load_backbone(size)
        kept = {
            name: tensor.contiguous()
            for name, tensor in whole.state_dict().items()
            if not name.startswith("blocks.") or int(name.split(".")[1]) < DEPTH
        }
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "model.safetensors"
        runs.write_atomically(weights, lambda path: save_file(kept, path))
        names = ("mean", "std", "interpolation", "num_classes", "first_conv", "classifier")
        about = {
            "architecture": embedded.WEIGHTS_ARCHITECTURE,
            "model_args": {"depth": DEPTH, "img_size": size},
            "pretrained_cfg": {name: whole.pretrained_cfg[name] for name in names},
        }
        runs.write_json(folder / "config.json", about)
    return f"local-dir:{folder}"


@functools.lru_cache(maxsize=8)
def _task(dataset: str, seed: int, train_size: int, val_size: int, size: int) -> Task:
    """Decoded and made small once for all runs: a transform to the size that they have is none."""
    options = Options(dataset=dataset, train_size=train_size, val_size=val_size, seed=seed)
    task = runs.load_task(options, TEST_SIZE).surveyed(0)
    transform, _ = pixels.make_transform("none", False, size, "bicubic")

    def small(images: Images) -> Images:
        split = pixels.PixelSplit(images, transform, workers=0, ranges=task.ranges)
        decoded = split.pixels.permute(0, 2, 3, 1).numpy()
        return Images([np.ascontiguousarray(image) for image in decoded], images.labels)

    return replace(task, train=small(task.train), val=small(task.val), test=small(task.test))


@functools.lru_cache
def code() -> dict[str, str]:
    """Which code a run was made by: the last commit of the library, not of what measures it."""
    here = {"cwd": Path(pae.__file__).parents[1], "capture_output": True, "text": True}
    parts = ["--", "pae", "pae_kernels"]
    commit = subprocess.run(["git", "log", "-1", "--format=%h", *parts], **here).stdout.strip()
    if subprocess.run(["git", "status", "--porcelain", *parts], **here).stdout:
        commit += " and changes"
    return {"commit": commit, "pae": pae.__version__, "torch": str(torch.__version__)}


# ---- many runs


def records(output: Path | None, stores: Path = runs.RESULTS) -> Found:
    """All finished runs: the committed ones, and those of `output`, which win."""
    found: Found = {}
    for name in STORES:
        if (stores / name).is_file():
            found |= json.loads((stores / name).read_text())["runs"]
    files = sorted(output.glob("*.json")) if output is not None else ()
    return found | {file.stem: json.loads(file.read_text()) for file in files}


def run(study: Study, arguments: argparse.Namespace) -> None:
    """Trains what is left, piece by piece, until nothing is or the minutes are over."""
    output, longest = arguments.output, 0.0
    deadline = time.monotonic() + 60 * arguments.minutes
    while True:
        found = records(output, arguments.to)
        left = [r for p in wanted(study, found, arguments) for r in p.runs if r.key not in found]
        began, record = time.monotonic(), None
        for chosen in left:
            if began + longest > deadline:
                print(f"{len(left)} runs of these pieces are left", flush=True)
                return
            try:
                record = train(chosen, output)
            except loop.Interrupted:
                print("stopped; what was under way begins again", flush=True)
                return
            if record is not None:
                break
        if record is None:
            if not left:
                print("nothing is left to do", flush=True)
                return
            time.sleep(1)  # others are at all of them; then there may be more
            continue
        longest = max(longest, time.monotonic() - began)
        accuracy, test = best(record)[0], record.get("test", float("nan"))
        print(f"{chosen.key} {record['settings']}: val {accuracy:.3f}, test {test:.3f}", flush=True)


def wanted(study: Study, found: Found, arguments: argparse.Namespace) -> list[Piece]:
    """The pieces that `--piece` asks for, or all."""
    every = list(pieces(study, found))
    unknown = set(arguments.piece) - {piece.name for piece in every}
    if unknown:
        names = ", ".join(repr(piece.name) for piece in every)
        raise SystemExit(f"--piece {sorted(unknown)[0]!r}: expected any of {names}")
    return [piece for piece in every if not arguments.piece or piece.name in arguments.piece]


def plan(study: Study, arguments: argparse.Namespace) -> None:
    """Prints the pieces: runs, finished ones, and the core time that the others should take."""
    found = records(arguments.output, arguments.to)
    rate = pace(study, found)
    cells = [r for arm in study.arms.values() for r in grid(study.datasets[0], arm)]
    each, total = statistics.mean(r.passes() for r in cells) * rate / 60, 0.0
    print(f"{'piece':24} {'runs':>5} {'done':>5} {'core minutes left':>18}")
    for piece in wanted(study, found, arguments):
        done = sum(run.key in found for run in piece.runs)
        minutes = (piece.count - done) * each
        total += minutes
        print(f"{piece.name:24} {piece.count:5} {done:5} {minutes:18.0f}")
    print(f"{rate * 1000:.2f} ms a pass; {total / 60:.1f} core hours left")


def pace(study: Study, found: Found) -> float:
    """Seconds that a pass takes: the median over finished runs."""
    seen = [
        found[run.key]["seconds"] / run.passes()
        for piece in pieces(study, found)
        for run in piece.runs
        if "seconds" in found.get(run.key, ())
    ]
    return statistics.median(seen) if seen else SECONDS_PER_PASS


def store(study: Study, arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Writes the study's file: the records of its runs, one a line, and `more`."""
    found = records(arguments.output, arguments.to)
    mine = {r.key: found[r.key] for p in pieces(study, found) for r in p.runs if r.key in found}
    if foreign := len(found) - len(mine):
        print(f"{foreign} records belong to another study or to other settings")
    numbers = {"recipe": {**RECIPE, **scale()}, **more, "runs": mine}
    marks = {f"@{key}@": json.dumps(record) for key, record in mine.items()}
    text = json.dumps({**numbers, "runs": {key: f"@{key}@" for key in mine}}, indent=1)
    for mark, line in marks.items():
        text = text.replace(f'"{mark}"', line)
    path = arguments.to / study.store
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_atomically(path, lambda p: p.write_text(text + "\n"))
    return numbers


def main(study: Study, more: dict[str, Any], arguments: list[str] | None = None) -> None:
    """The command line: plan, run, report; and what a study has besides."""
    name = Path(study.store).stem
    parser = argparse.ArgumentParser(prog=f"python -m bench.studies.{name}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    commands = {"plan": functools.partial(plan, study), "run": functools.partial(run, study)}
    for word, work in {**commands, **more}.items():
        command = subparsers.add_parser(word)
        command.set_defaults(work=work)
        add = command.add_argument
        add("--output", type=Path, required=word == "run", help="folder of the runs")
        add("--to", type=Path, default=runs.RESULTS, help="folder of the committed numbers")
        if word in commands:
            add("--piece", nargs="+", default=[], help="of those that plan lists (default: all)")
        if word == "run":
            add("--minutes", type=float, default=60.0, help="start no run that would end later")
    given = parser.parse_args(arguments)
    given.work(given)
