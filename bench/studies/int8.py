"""Would products in int8 make a step faster, and what would they cost? Answered: docs/int8.md.

What measured it, with kernels of its own and their tests, is `bench/studies/int8.py` as it stands
in commit 8e685c4. Its numbers are bench/results/science/int8.json; this file shows them.
"""

from __future__ import annotations

from bench.table import table_of

# columns of the tables; errors are norm-relative
FORMATS = {
    "ms": ".1f",
    "times fp32": ".2f",
    "error": ".1e",
    "error of logits": ".1e",
    "of the prompts' gradient": ".1e",
    "its cosine": ".5f",
    "its length": ".4f",
}


def blocks(numbers: dict) -> dict[str, str]:
    facts = numbers["facts"]
    ((name, task),) = facts["tasks"].items()
    setting = (
        f"{numbers['processor']}, torch {numbers['torch']}, one thread, process time, medians over "
        f"{' or '.join(map(str, sorted({*numbers['rounds'].values()})))} interleaved rounds. "
        f"Accuracy: {name}, {task['train']} training, "
        f"{task['val']} validation and {task['test']} test images, {facts['model']} at "
        f"{facts['img_size']} px, {facts['num_tokens']} prompts per block, "
        f"{facts['epochs']} epochs."
    )
    accuracy = [
        {
            "products": name.replace("-", " "),
            "test accuracy": f"{row['test']['mean']:.3f}",
            "every seed": ", ".join(f"{t:.3f}" for t in row["tests"]),
            "minus that of fp32": f"{row['over fp32']['mean']:+.3f}",
        }
        for name, row in numbers["accuracy"].items()
    ]
    gains = sorted(1 / found["int8 both"]["times fp32"] for found in numbers["steps"].values())
    return {
        "int8 gain": " to ".join(dict.fromkeys(f"{g:.1f}x" for g in (gains[0], gains[-1]))),
        "int8 setting": setting,
        "int8 products": _table(numbers["products"]),
        "int8 steps": _table(numbers["steps"]),
        "int8 accuracy": table_of(accuracy),
    }


def _table(cases: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = []
    for case, found in cases.items():
        columns = list(found["fp32"])
        for name, row in found.items():
            cells = {c: f"{row[c]:{FORMATS[c]}}" if c in row else "" for c in columns}
            lines.append({"shape": case if name == "fp32" else "", "": name, **cells})
    return table_of(lines)
