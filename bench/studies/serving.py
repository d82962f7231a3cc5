"""Many tasks in one batch (`pae.serve_many`) beside switching among models of one task each.

Switching has its best form: all models share one backbone object, images are sorted by task, and
each task present in the batch is one `pae.fast_forward` on its images. "even" batches have as many
images of every task, which is best for switching; in "drawn" ones each image's task is drawn. The
served batch is never sorted. Both give the same logits, which is checked before anything is timed.
Process time, one thread, in turns; a cell is one process, whose rounds are added to those that the
file has of it.

    python -m bench.studies.serving --batch 64 --prompts 50 [--drawn] [--seconds 60]
        [--model vit_small_patch16_224] [--output bench/results/serving.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import timm
import torch
from torch import Tensor

import pae
from pae.files import write_atomically

TASKS, CLASSES = 8, 100


def models(name: str, prompts: int) -> list[pae.PromptedViT]:
    """`TASKS` tasks on one backbone, with random weights: times do not depend on them."""
    torch.manual_seed(0)
    vit = timm.create_model(name, pretrained=False)
    made = []
    for _ in range(TASKS):
        model = pae.PromptedViT(vit, pae.prompts.VPTDeep(prompts), num_classes=CLASSES).eval()
        torch.nn.init.normal_(model.prompts.tokens)
        made.append(model)
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
def measured(name: str, prompts: int, batch: int, drawn: bool, seconds: float) -> dict:
    """Seconds of both in as many rounds as fit, at least three."""
    made = models(name, prompts)
    served = pae.serve_many(made)
    images, tasks = torch.randn(batch, 3, 224, 224), tasks_of(batch, drawn)
    one, many = switching(made, images, tasks), served(images, tasks)
    off = float((many - one).norm() / one.norm())
    assert off < 2e-6, off
    spent: dict[str, list[float]] = {"switching": [], "served": []}
    calls = {
        "switching": lambda: switching(made, images, tasks),
        "served": lambda: served(images, tasks),
    }
    end = time.perf_counter() + seconds
    while len(spent["served"]) < 3 or time.perf_counter() < end:
        for kind, call in calls.items():
            began = time.process_time()
            call()
            spent[kind].append(time.process_time() - began)
    cell = {"model": name, "batch": batch, "tasks": "drawn" if drawn else "even"}
    times = {f"{kind}_s": [round(s, 4) for s in times] for kind, times in spent.items()}
    return {**cell, "prompts": prompts, "off": off, **times}


def summary(row: dict) -> dict:
    """Medians over rounds of both and of their ratio, which is above 1 where serving is faster."""
    ratios = sorted(a / b for a, b in zip(row["switching_s"], row["served_s"]))
    return {
        **{f"{kind}_s": statistics.median(row[f"{kind}_s"]) for kind in ("switching", "served")},
        **{"rounds": len(ratios), "ratio": statistics.median(ratios)},
        **{"least": ratios[0], "most": ratios[-1]},
    }


def table(record: dict) -> str:
    """The rows of a file as Markdown, in the order of the file."""
    names = "images", "tasks", "prompts", "switching, s", "served, s", "ratio", "range", "rounds"
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in record["rows"]:
        found = summary(row)
        cells = [str(row[key]) for key in ("batch", "tasks", "prompts")]
        cells += [
            f"{found['switching_s']:.2f}",
            f"{found['served_s']:.2f}",
            f"{found['ratio']:.2f}x",
        ]
        cells += [f"{found['least']:.2f} to {found['most']:.2f}", str(found["rounds"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--drawn", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    row = measured(given.model, given.prompts, given.batch, given.drawn, given.seconds)
    print(summary(row), flush=True)
    if given.output is None:
        return
    from cpuinfo import get_cpu_info  # comes with pytest-benchmark

    rows = json.loads(given.output.read_text())["rows"] if given.output.is_file() else []
    cell = ("model", "batch", "tasks", "prompts")
    for old in [old for old in rows if all(old[key] == row[key] for key in cell)]:
        row |= {key: old[key] + row[key] for key in ("switching_s", "served_s")}
        rows.remove(old)
    rows.append(row)
    record = {
        "what": f"{TASKS} tasks, 224 pixels, fp32, {CLASSES} classes each, one thread",
        "machine": get_cpu_info()["brand_raw"],
        "versions": {"torch": str(torch.__version__), "pae": pae.__version__},
        "rows": sorted(rows, key=lambda r: [r["model"], r["batch"], r["tasks"] == "drawn"]),
    }
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(given.output, lambda file: file.write_text(text))


if __name__ == "__main__":
    main()
