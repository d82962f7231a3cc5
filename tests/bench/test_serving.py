"""Serving many tasks beside switching: what is measured, and what the docs say of it."""

import json
from pathlib import Path

import torch

import pae
from bench.studies import serving
from tests import tiny

ROOT = Path(__file__).parents[2]


def test_the_table_in_the_docs_is_that_of_the_results():
    record = json.loads((ROOT / "bench" / "results" / "science" / "serving.json").read_text())
    assert serving.table(record) in (ROOT / "docs" / "after-training.md").read_text()
    cells = {(row["batch"], row["tasks"]) for row in record["rows"]}
    assert cells >= {(8, "even"), (64, "even"), (64, "drawn")}


def test_switching_is_one_forward_for_each_task_that_is_there():
    vit, made = tiny.backbone(dtype=torch.float32), []
    for number in range(3):
        torch.manual_seed(number)
        made.append(pae.PromptedViT(vit, pae.prompts.VPTDeep(2), num_classes=4).eval())
    images, tasks = tiny.images(vit, 5), torch.tensor([2, 0, 2, 0, 0])
    with torch.no_grad():
        got = serving.switching(made, images, tasks)
        alone = [made[t](image[None])[0] for t, image in zip(tasks.tolist(), images)]
    torch.testing.assert_close(got, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_tasks_and_medians():
    assert serving.tasks_of(64, False).bincount().tolist() == [8] * 8
    assert len(set(serving.tasks_of(64, True).bincount(minlength=8).tolist())) > 1
    row = {"switching_s": [2.0, 3.0, 4.0], "served_s": [1.0, 2.0, 1.0]}
    found = serving.summary(row)
    assert (found["ratio"], found["least"], found["most"]) == (2.0, 1.5, 4.0)
