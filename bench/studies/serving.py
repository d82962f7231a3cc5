"""Many tasks in one batch (`pae.serve_many`) beside switching among models of one task each.

Switching has its best form: all models share one backbone object and one folded copy of its
weights (by themselves each would fold its own), images are sorted by task, and
each task present in the batch is one `pae.fast_forward` on its images. "even" batches have as many
images of every task, which is best for switching; in "drawn" ones each image's task is drawn. The
served batch is never sorted. Both give the same logits, which is checked before anything is timed.
Process time, one thread, in turns; a cell is one process, whose rounds are added to those that the
file has of it.

    python -m bench.studies.serving --batch 64 --prompts 50 [--drawn] [--bf16] [--seconds 60]
        [--model vit_base_patch16_224] [--output bench/results/science/serving.json]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import timm
import torch
from torch import Tensor

import pae
from bench.roofline import device_name
from bench.rows import checked
from bench.studies import runs
from bench.table import table_of

TASKS, CLASSES = 8, 100
MOST = 10000  # rounds


def models(name: str, prompts: int) -> list[pae.PromptedViT]:
    """`TASKS` tasks on one backbone, with random weights: times do not depend on them."""
    torch.manual_seed(0)
    vit = timm.create_model(name, pretrained=False)
    made = []
    for _ in range(TASKS):
        model = pae.PromptedViT(vit, pae.prompts.VPTDeep(prompts), num_classes=CLASSES).eval()
        torch.nn.init.normal_(model.prompts.tokens)
        made.append(model)
    made[0].plan()
    for model in made[1:]:  # else each folds its own copy of the same weights
        model._plans = made[0]._plans
    return made


def switching(made: list[pae.PromptedViT], images: Tensor, tasks: Tensor) -> Tensor:
    """Task by task: sorting, a forward each, and back into the order of the batch."""
    order = tasks.argsort(stable=True)
    counts = tasks.bincount(minlength=len(made)).tolist()
    parts = images[order].split([count for count in counts if count])
    present = [model for model, count in zip(made, counts) if count]
    logits = torch.cat([pae.fast_forward(m, part) for m, part in zip(present, parts)])
    return torch.empty_like(logits).index_copy_(0, order, logits)


def tasks_of(batch: int, drawn: bool) -> Tensor:
    """(batch,) in no order: equally many of each task, or each image's drawn by itself."""
    generator = torch.Generator().manual_seed(1)
    if drawn:
        return torch.randint(TASKS, (batch,), generator=generator)
    return (torch.arange(batch) % TASKS)[torch.randperm(batch, generator=generator)]


@torch.no_grad()
def measured(name: str, prompts: int, batch: int, drawn: bool, bf16: bool, seconds: float) -> dict:
    """Seconds of both in as many rounds as fit, at least one. What both form once is formed on the
    first images, before the clock, and logits are compared.
    """
    made = models(name, prompts)
    served = pae.serve_many(made)
    images, tasks = torch.randn(batch, 3, 224, 224), tasks_of(batch, drawn)
    calls = {
        "switching": lambda: switching(made, images, tasks),
        "served": lambda: served(images, tasks),
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        switching(made, images[:TASKS], torch.arange(TASKS))
        served(images[:TASKS], torch.arange(TASKS))
        limit = {"logits": 2e-2 if bf16 else 2e-6}
        off = checked([calls["served"]()], {"logits": calls["switching"]()}, limit)["value_error"]
        spent = runs.in_turns(calls, MOST, "process", torch.device("cpu"), seconds)
    cell = {"model": name, "precision": "bf16" if bf16 else "fp32", "batch": batch}
    cell |= {"tasks": "drawn" if drawn else "even", "prompts": prompts}
    return {**cell, "off": off, **{f"{k}_s": [round(s, 4) for s in t] for k, t in spent.items()}}


def summary(row: dict) -> dict:
    """Medians over rounds of both and of their ratio, which is above 1 where serving is faster."""
    ratios = sorted(a / b for a, b in zip(row["switching_s"], row["served_s"]))
    return {
        **{f"{kind}_s": statistics.median(row[f"{kind}_s"]) for kind in ("switching", "served")},
        **{"rounds": len(ratios), "ratio": statistics.median(ratios)},
        **{"least": ratios[0], "most": ratios[-1]},
    }


_NAMES = {"vit_small_patch16_224": "ViT-S", "vit_base_patch16_224": "ViT-B"}


def table(record: dict) -> str:
    """The rows of a file as Markdown, in the order of the file."""
    lines = []
    for row in record["rows"]:
        found = summary(row)
        lines.append(
            {
                "model": f"{_NAMES[row['model']]}, {row['precision']}",
                "images": str(row["batch"]),
                "tasks": row["tasks"],
                "switching, s": f"{found['switching_s']:.2f}",
                "served, s": f"{found['served_s']:.2f}",
                "ratio": f"{found['ratio']:.2f}x",
                "range": f"{found['least']:.2f} to {found['most']:.2f}",
                "rounds": str(found["rounds"]),
            }
        )
    return table_of(lines) + "\n"


def _place(row: dict) -> list:
    sizes = list(_NAMES).index(row["model"]), row["precision"] == "bf16"
    return [*sizes, row["batch"], row["tasks"] == "drawn"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--drawn", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    row = measured(given.model, given.prompts, given.batch, given.drawn, given.bf16, given.seconds)
    print(summary(row), flush=True)
    if given.output is None:
        return
    rows = runs.read_json(given.output).get("rows", [])
    cell = ("model", "precision", "batch", "tasks", "prompts")
    for old in [old for old in rows if all(old[key] == row[key] for key in cell)]:
        row |= {key: old[key] + row[key] for key in ("switching_s", "served_s")}
        rows.remove(old)
    rows.append(row)
    record = {
        "what": f"{TASKS} tasks, 224 pixels, {CLASSES} classes each, one thread",
        "machine": device_name(torch.device("cpu")),
        "versions": {"torch": str(torch.__version__), "pae": pae.__version__},
        "rows": sorted(rows, key=_place),
    }
    runs.write_json(given.output, record)


if __name__ == "__main__":
    main()
