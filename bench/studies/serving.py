"""Many tasks in one batch (`pae.serve_many`) beside switching among models of one task each.

Switching has its best form: all models share one backbone object, images are sorted by task, and
each task present in the batch is one `pae.fast_forward` on its images. Both give the same logits,
which is checked before anything is timed. Process time, one thread, in turns.

    python -m bench.studies.serving [--seconds 60] [--output bench/results/serving.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import timm
import torch
from torch import Tensor

import pae
from pae.files import write_atomically

TASKS, CLASSES = 8, 100
PROMPTS = (10, 50)
BATCHES = (8, 64)


def models(prompts: int) -> list[pae.PromptedViT]:
    """`TASKS` tasks on one ViT-B/16, with random weights: times do not depend on them."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", pretrained=False)
    made = []
    for _ in range(TASKS):
        model = pae.PromptedViT(vit, pae.prompts.VPTDeep(prompts), num_classes=CLASSES).eval()
        torch.nn.init.normal_(model.prompts.tokens)
        made.append(model)
    return made


def switching(made: list[pae.PromptedViT], images: Tensor, tasks: list[int]) -> Tensor:
    """Task by task; `tasks` are sorted, so that each has a slice."""
    parts = []
    for task in sorted(set(tasks)):
        first = tasks.index(task)
        parts.append(pae.fast_forward(made[task], images[first : first + tasks.count(task)]))
    return torch.cat(parts)


@torch.inference_mode()
def measured(prompts: int, batch: int, seconds: float) -> dict:
    """Median seconds of both, over as many rounds as fit, at least three."""
    made = models(prompts)
    served = pae.serve_many(made)
    images, tasks = torch.randn(batch, 3, 224, 224), sorted(i % TASKS for i in range(batch))
    one, many = switching(made, images, tasks), served(images, tasks)
    off = float((many - one).norm() / one.norm())
    assert off < 1e-6, off
    spent: dict[str, list[float]] = {"switching": [], "served": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(spent["served"]) < 3:
        for name, call in (
            ("switching", lambda: switching(made, images, tasks)),
            ("served", lambda: served(images, tasks)),
        ):
            began = time.process_time()
            call()
            spent[name].append(time.process_time() - began)
    found = {f"{name}_s": round(statistics.median(times), 4) for name, times in spent.items()}
    found["ratio"] = round(found["switching_s"] / found["served_s"], 3)
    return {"prompts": prompts, "batch": batch, "rounds": len(spent["served"]), "off": off, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="in all")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(p, b) for b in BATCHES for p in PROMPTS]
    share = arguments.seconds / sum(b for _, b in cells)
    rows = []
    for prompts, batch in cells:
        rows.append(measured(prompts, batch, share * batch))
        print(rows[-1], flush=True)
    if arguments.output:
        table = {
            "what": f"{TASKS} tasks, ViT-B/16 224, fp32, {CLASSES} classes each, one thread",
            "machine": platform.processor() or platform.machine(),
            "versions": {"torch": str(torch.__version__), "pae": pae.__version__},
            "rows": rows,
        }
        text = json.dumps(table, indent=1) + "\n"
        write_atomically(arguments.output, lambda file: file.write_text(text))


if __name__ == "__main__":
    main()
