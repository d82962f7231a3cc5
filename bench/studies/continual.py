"""Forgetting: Fashion-MNIST as five tasks of two classes, one after another, a head each.

    python -m bench.studies.continual run --output FOLDER [--seeds 0 1 2]
    python -m bench.studies.continual report --output FOLDER

Four prompts in every block, started in U(-1, 1), as NSP2 published it; learned in sequence without
protection ("sequential"), in the null space as released ("nsp2 released") and as the paper writes
it ("nsp2"). The recipe is the published one but for its size: images of 84 pixels, 160 a task, ten
epochs once through them.
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
TASKS, BATCH, SIZE, PROMPTS = 5, 16, 84, 4
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
    began = time.process_time()
    result = learn_tasks(
        model, tasks, None if kwargs is None else NullSpace(model, **kwargs), epochs=epochs
    )
    return {
        "accuracy": result.accuracy,
        "last": result.last,
        "forgetting": result.forgetting,
        "seconds": time.process_time() - began,
    }


def run(arguments: argparse.Namespace) -> None:
    """Every arm and seed whose file is not there yet."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    sizes = {"epochs": arguments.epochs, "train_size": 160, "test_size": 200}
    for seed in arguments.seeds:
        for arm in ARMS:
            path = arguments.output / f"{arm.replace(' ', '-')}-{seed}.json"
            if path.is_file():
                continue
            record = {"arm": arm, "seed": seed, **sizes, **learn(arm, seed, **sizes)}
            runs.write_json(path, record)
            print(f"{arm} seed {seed}: {record['last']:.3f}", flush=True)


def report(arguments: argparse.Namespace) -> None:
    """Write the numbers of all finished runs."""
    found = [json.loads(p.read_text()) for p in sorted(arguments.output.glob("*.json"))]
    if not found:
        raise SystemExit(f"--output {arguments.output}: no finished run there")
    runs.write_json(arguments.to / JSON, found)
    print(table(found))


def table(found: list[dict]) -> str:
    """One row an arm: accuracy over all classes after the last task, forgetting, what it cost."""
    lines = []
    for arm in ARMS:
        records = [r for r in found if r["arm"] == arm]
        if records:
            lasts = [r["last"] for r in records]
            lines.append(
                {
                    "prompts": arm,
                    "accuracy after five tasks": f"{statistics.mean(lasts):.3f}",
                    "every seed": ", ".join(f"{x:.3f}" for x in lasts),
                    "forgetting": f"{statistics.mean(r['forgetting'] for r in records):.3f}",
                    "process seconds": f"{statistics.mean(r['seconds'] for r in records):.0f}",
                }
            )
    return table_of(lines)


if __name__ == "__main__":
    runs.main("continual", {"run": run, "report": report}, lambda *_: None)
