"""Whether Modal Pre-Alignment in bf16 selects the windows that it selects in fp32, and its time.
Answered: docs/science.md.

Every cell aligned one model twice, as `pae train` does before its first step: same images, same
random head. "Rounded" is the selection by bf16 losses alone; "checked" is what `precision="bf16"`
returns, in which the windows near the boundary were measured again in fp32. What measured it is
`bench/studies/mpa_bf16.py` as it stands in commit 8e685c4; its numbers are
bench/results/science/mpa_bf16.json, and this file shows them. Losses are told in standard
deviations of all windows' losses: "error" is the largest of a rounded loss among those measured
twice, its common part apart (it moves no window past another); "gap" lies between the last window
selected and the first one left out.
"""

from __future__ import annotations

import statistics

from bench.table import table_of


def blocks(numbers: dict) -> dict[str, str]:
    return {"mpa bf16 setting": _setting(numbers), "mpa bf16 table": _table(numbers["cells"])}


def _setting(numbers: dict) -> str:
    facts, cell = numbers["facts"], numbers["cells"][0]
    return (
        f"{cell['prompts']} of {cell['windows']} windows, {facts['settings']['mpa_images']} images "
        f"at {facts['settings']['img_size']} px, fresh head. {facts['processor']} with "
        f"{' and '.join(facts['instructions']) or 'no bf16 instructions'}, where a bf16 product "
        f"runs at {facts['bf16_product_gain']:.2g}x the rate of an fp32 one; torch "
        f"{facts['torch']}, 1 thread, process time."
    )


def _table(cells: list[dict]) -> str:
    lines = []
    for dataset in dict.fromkeys(cell["dataset"] for cell in cells):
        mine = [cell for cell in cells if cell["dataset"] == dataset]
        over = {key: [cell[key] for cell in mine] for key in mine[0]}
        n = len(mine)
        ratio = statistics.median(c["seconds"]["bf16"] / c["seconds"]["exact"] for c in mine)
        lines.append(
            {
                "task": dataset,
                "seeds": str(n),
                "same windows, rounded": f"{sum(m == 0 for m in over['rounded_misses'])} of {n}",
                "most missed, rounded": f"{max(over['rounded_misses'])} of {mine[0]['prompts']}",
                "same windows, checked": f"{sum(m == 0 for m in over['checked_misses'])} of {n}",
                "same order, checked": f"{sum(over['same_order'])} of {n}",
                "error of a loss, most": f"{max(over['error']):.2g}",
                "gap at the boundary, least": f"{min(over['gap']):.2g}",
                "measured again, most": f"{max(over['rechecked'])} of {mine[0]['windows']}",
                "time, bf16 over fp32": f"{ratio:.2f}x",
            }
        )
    return table_of(lines)
