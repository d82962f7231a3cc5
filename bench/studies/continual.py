"""Forgetting: Fashion-MNIST as five tasks of two classes, one after another, a head each. Answered,
as far as so few steps can: docs/training.md.

Four prompts in every block, started in U(-1, 1), as NSP2 published it; learned in sequence with
nothing against forgetting, in the null space as the paper writes it, and as its code has it. The
recipe is the published one but for its size: images of 56 pixels, 64 a task (32 of a class) in
batches of 16, and six epochs once through them, where the published runs have ten epochs ten times
through all images in batches of 256; the rate falls at half and at eight tenths of the epochs there
too. What ran it is `bench/studies/continual.py` as it stands in commit 8e685c4; its numbers are
bench/results/science/continual.json, and this file shows them.
"""

from __future__ import annotations

import statistics

from bench.table import table_of

ARMS = ("in sequence", "NSP2", "NSP2 as released")
TASKS, SIZE, PROMPTS = 5, 56, 4


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
