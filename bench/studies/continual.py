"""Forgetting: Fashion-MNIST as five tasks of two classes, one after another, a head each.

    python -m bench.studies.continual run --output FOLDER [--seeds 0 1 2] [--arms ARM ...]
    python -m bench.studies.continual report --output FOLDER

Four prompts in every block, started in U(-1, 1), as NSP2 published it; learned in sequence with
nothing against forgetting, in the null space as the paper writes it, and as its code has it. The
recipe is the published one but for its size: images of 56 pixels, 64 a task (32 of a class) in
batches of 16, and six epochs once through them, where the published runs have ten epochs ten times
through all images in batches of 256; the rate falls at half and at eight tenths of the epochs there
too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from timm.data import resolve_data_config
from torch import Tensor

import pae
from bench.studies import runs
from bench.table import table_of
from pae.methods.continual import ClassTask, learn_tasks
from pae.methods.nsp2 import NullSpace
from pae.train import embedded, pixels
from pae.train.data import Images

ARMS: dict[str, dict[str, Any] | None] = {
    "in sequence": None,
    "NSP2": {"eta": 0.97},
    "NSP2 as released": {"eta": 0.97, "official": True, "accumulate": "batches"},
}
TASKS, BATCH, SIZE, PROMPTS = 5, 16, 56, 4
SIZES = {"epochs": 6, "train_size": 64, "test_size": 80}  # images of a task
JSON = "continual.json"


class Shuffled:
    """Batches of a split, in another order each time they are gone through."""

    def __init__(self, pipeline: pixels.Pipeline, seed: int) -> None:
        self.pipeline, self.seed, self.epoch = pipeline, seed, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        return self.pipeline.batches(
            pixels.epoch_batches(len(self.pipeline), BATCH, self.seed, self.epoch)
        )


def learn(arm: str, seed: int, epochs: int, train_size: int, test_size: int) -> dict[str, Any]:
    """Accuracies after each task; the classes come in an order that the seed draws."""
    whole = embedded.load_task("fashion-mnist")
    set_seed(seed)
    backbone = embedded.load_backbone(SIZE)
    config = resolve_data_config({}, model=backbone)
    model = pae.PromptedViT(backbone, pae.prompts.VPTDeep(PROMPTS), num_classes=len(whole.classes))
    torch.nn.init.uniform_(model.prompts.tokens, -1, 1)
    transform, _ = pixels.make_transform("none", False, SIZE, config["interpolation"])

    def batches(images: Images, classes: list[int], size: int) -> Shuffled:
        rows = [i for i, label in enumerate(images.labels) if label in classes][:size]
        split = pixels.PixelSplit(images.subset(rows), transform)
        return Shuffled(pixels.Pipeline(split, config["mean"], config["std"], "cpu"), seed)

    order = np.random.default_rng(seed).permutation(len(whole.classes)).tolist()
    tasks = [
        ClassTask(c, batches(whole.train, c, train_size), batches(whole.test, c, test_size))
        for c in np.array_split(order, TASKS)
        for c in [c.tolist()]
    ]
    kwargs = ARMS[arm]
    space = None if kwargs is None else NullSpace(model, **kwargs)
    milestones = epochs // 2, round(0.8 * epochs)
    began = time.process_time()
    result = learn_tasks(model, tasks, space, epochs=epochs, milestones=milestones)
    return {
        "accuracy": result.accuracy,
        "last": result.last,
        "forgetting": result.forgetting,
        "seconds": time.process_time() - began,
    }


def run(arguments: argparse.Namespace) -> None:
    """Every arm and seed whose file is not there yet."""
    for seed in arguments.seeds:
        for arm in arguments.arms:
            path = arguments.output / f"{arm.replace(' ', '-')}-{seed}.json"
            if path.is_file():
                continue
            record = {"arm": arm, "seed": seed, **SIZES, **learn(arm, seed, **SIZES)}
            runs.write_json(path, record)
            print(f"{arm} seed {seed}: {record['last']:.3f}", flush=True)


def report(arguments: argparse.Namespace) -> None:
    """Write the numbers of all finished runs."""
    found = [json.loads(p.read_text()) for p in sorted(arguments.output.glob("*.json"))]
    if not found:
        raise SystemExit(f"--output {arguments.output}: no finished run there")
    runs.write_json(arguments.to / JSON, sorted(found, key=lambda r: (r["seed"], r["arm"])))
    print(table(found))


def table(found: list[dict]) -> str:
    """One row an arm: accuracy over all classes after the last task, forgetting, what it cost."""
    lines = []
    for arm in ARMS:
        records = sorted((r for r in found if r["arm"] == arm), key=lambda r: r["seed"])
        if records:
            lasts, lost = ([r[k] for r in records] for k in ("last", "forgetting"))
            lines.append(
                {
                    "prompts": arm,
                    "accuracy after five tasks": f"{statistics.mean(lasts):.3f}",
                    "every seed": ", ".join(f"{x:.3f}" for x in lasts),
                    "forgetting": f"{statistics.mean(lost):.3f}",
                    "of every seed": ", ".join(f"{x:.3f}" for x in lost),
                    "process seconds": f"{statistics.mean(r['seconds'] for r in records):.0f}",
                }
            )
    return table_of(lines)


def blocks(found: list[dict]) -> dict[str, str]:
    """What docs/training.md shows."""
    of = {arm: {r["seed"]: r for r in found if r["arm"] == arm} for arm in ARMS}
    plain, *protected = ARMS
    verdicts = []
    for arm in protected:
        both = sorted(of[plain].keys() & of[arm].keys())
        changes = {
            name: [of[arm][seed][name] - of[plain][seed][name] for seed in both]
            for name in ("last", "forgetting")
        }
        if both:
            said = [f"{statistics.mean(v):+.3f} {name}" for name, v in changes.items()]
            verdicts.append(f"{arm} {' and '.join(said)} ({len(both)} seeds)")
    first = found[0]
    setting = (
        f"Fashion-MNIST at {SIZE} px in {TASKS} tasks of two classes, in an order that the seed "
        f"draws; {first['train_size']} training and {first['test_size']} test images a task, "
        f"{first['epochs']} epochs, {PROMPTS} prompts in every block of the embedded backbone"
    )
    return {
        "continual setting": setting,
        "continual table": table(found),
        "continual verdict": f"Beside {plain}, over the seeds that both have: "
        + "; ".join(verdicts).replace("last", "accuracy").replace("(1 seeds)", "(1 seed)")
        + ".",
    }


def options(name: str, command: argparse.ArgumentParser) -> None:
    if name == "run":
        command.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)


if __name__ == "__main__":
    runs.main("continual", {"run": run, "report": report}, options)
