"""Rows of results as Markdown: words for names, digits for numbers, tables.

python -m bench.table bench/results/cpu.json            all rows, a table per kind of work
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from .results import Row, Run, measured, our_first, spread

# ---- words and numbers

# what a group's name is made of, for a reader
_NAMES = {
    "vit_tiny_patch16_224": "ViT-Ti/16 224",
    "vit_small_patch14_dinov2": "ViT-S/14",
    "vit_small_patch16_224": "ViT-S/16 224",
    "vit_base_patch16_224": "ViT-B/16 224",
    "vit_large_patch16_224": "ViT-L/16 224",
    "swin_base_patch4_window7_224": "Swin-B",
    "vit_base_patch16_dinov3": "DINOv3-B/16 224",
    "eva02_base_patch14_224": "EVA02-B/14 224",
    "swin": "",
    "rotated": "",
    "kld": "",
    "step": "",
    "tokens": "filter and patch embedding",
    "pooling": "pooling of tokens",
    "mpa": "whole MPA",
    "mpa_ranking": "ranking alone",
}
_PARTS = {
    r"P(\d+)": "{} prompts",
    r"B(\d+)": "batch {}",
    r"N(\d+)": "{} tokens",
    r"k(\d+)": "k = {}",
    r"D(\d+)": "width {}",
    r"L(\d+)": "{} blocks",
    r"H(\d+)d(\d+)": "{} heads of {}",
    r"window(\d+)": "windows of {}",
    r"stride(\d+)": "stride {}",
    r"patch(\d+)": "patch {}",
}


def label(group: str, drop: Collection[str] = ()) -> str:
    """A group's name in words: `step/vit_base_patch16_224/P50` is "ViT-B/16 224, 50 prompts"."""
    words = []
    for part in group.split("/"):
        word = _NAMES.get(part, part.replace("_", " "))
        for pattern, form in _PARTS.items():
            if found := re.fullmatch(pattern, part):
                word = form.format(*found.groups())
                word = word.removesuffix("s") if found[1] == "1" else word
        if word and part not in drop:
            words.append(word)
    return ", ".join(words)


def digits(value: float) -> str:
    """Three, or all those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: float) -> str:
    """Three digits, two below 1: 1.42x, 21.4x, 0.89x."""
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def ratios(rows: Sequence[Row], names: Iterable[str]) -> list[str]:
    """How many times as long as the first of ours each provider takes; empty where unknown."""
    here, base = measured(rows), our_first(rows)

    def cell(name: str) -> str:
        if name not in here or base is None:
            return ""
        return "**1x**" if here[name] is base else ratio(here[name].times(base)[0])

    return [cell(name) for name in names]


def _cell(
    name: str, form: str = "", unit: float = 1.0, rate: bool = False, of: str = ""
) -> Callable[[Row], str | None]:
    """Column `name` in multiples of `unit`; per second if it is a `rate`, and then as a share of
    what the device was seen to do if that is column `of`.
    """

    def cell(row: Row) -> str | None:
        if name not in row.columns or (of and of not in row.columns):
            return None
        value = row.columns[name] / unit / (row.median if rate else 1)
        value /= row.columns[of] if of else 1
        return form.format(value) if form else digits(value)

    return cell


# heading -> cell of a row, None where it has none
COLUMNS = {
    "saved MB/image": _cell("saved_mb_per_image", "{:.1f}"),
    "saved MB": _cell("saved_mb", "{:.1f}"),
    "weight copies MB": _cell("weight_copies_mb", "{:.0f}"),
    "peak MB": _cell("peak_mb"),
    "images/s": _cell("images", "{:.1f}", rate=True),
    "live GFLOP/s": _cell("live_gflop", "{:.0f}", rate=True),
    "of product": _cell("live_gflop", "{:.0%}", 1e3, rate=True, of="peak_tflops"),
    "floor GB/s": _cell("floor_mb", unit=1e3, rate=True),
    "of copy": _cell("floor_mb", "{:.0%}", 1e3, rate=True, of="peak_gbps"),
    "value error": _cell("value_error", "{:.0e}"),
    "gradient error": _cell("gradient_error", "{:.0e}"),
}
RATES = ("images/s", "live GFLOP/s", "floor GB/s")  # pages show shares alone


# ---- tables


def markdown(lines: Sequence[Sequence[str]], aligned: bool = False) -> str:
    """The heading `lines[0]`, a rule, and the rows; `aligned` for a terminal."""
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*lines, strict=True)]
    rule = ["-" * max(3, width) for width in widths]
    padded = (
        [cell.ljust(width) for cell, width in zip(line, widths)]
        for line in (lines[0], rule, *lines[1:])
    )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in padded)


def table_of(rows: Sequence[Mapping[str, str]]) -> str:
    """`markdown` of rows whose keys, the same in all, are the headings."""
    return markdown([[*rows[0]], *([*row.values()] for row in rows)]) if rows else ""


def rows_table(
    groups: dict[str, list[Row]], hidden: Collection[str] = RATES, aligned: bool = False
) -> str:
    """One line per row: time, its ratio to our first row's, the columns that some row has and that
    are not `hidden`; then who could not run, and why.
    """
    everything = [row for rows in groups.values() for row in measured(rows).values()]
    extra = {
        heading: cell
        for heading, cell in COLUMNS.items()
        if heading not in hidden and any(cell(row) not in (None, "0") for row in everything)
    }
    lines = [["case", "version", "time", "ms", "p20-p80", *extra]]
    for group, rows in groups.items():
        here = measured(rows)
        for i, (name, row) in enumerate(here.items()):
            low, high = spread(row.seconds)
            lines.append(
                [
                    "" if i else label(group),
                    f"**{name}**" if row.is_ours else name,
                    *ratios(rows, [name]),
                    digits(row.median * 1e3),
                    f"{digits(low * 1e3)}-{digits(high * 1e3)}",
                    *(cell(row) or "" for cell in extra.values()),
                ]
            )
    return markdown(lines, aligned) + _left_out(groups)


def _left_out(groups: dict[str, list[Row]]) -> str:
    """A line per reason: who could not run."""
    reasons: dict[str, dict[str, None]] = {}
    for rows in groups.values():
        for row in rows:
            if not row.seconds:
                reasons.setdefault(row.reason, {})[row.provider] = None
    said = (f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return f"\n\nLeft out: {'; '.join(said)}." if reasons else ""


def providers_of(groups: Iterable[Iterable[Row]]) -> list[str]:
    """Providers with a time in some group, peers first, each in the order it was listed."""
    names = {row.provider: row.is_ours for rows in groups for row in rows if row.seconds}
    return sorted(names, key=names.__getitem__)


def ratio_table(run: Run, prefixes: Sequence[str]) -> str:
    """One line per group: how many times as long as our first row every provider takes."""
    groups = run.matching(*prefixes)
    names = providers_of(groups.values())
    first = {base.provider for rows in groups.values() if (base := our_first(rows))}
    lines = [["", *(f"**{n}**" if n in first else n for n in names), "ms"]]
    for group, rows in groups.items():
        base = our_first(rows)
        lines.append(
            [label(group), *ratios(rows, names), digits(base.median * 1e3) if base else ""]
        )
    return f"{markdown(lines)}\n\nms: of the row that is 1x. {machine(run)}"


def machine(run: Run) -> str:
    """One sentence that says where, how and at which commit."""
    clocks = dict.fromkeys(row.clock for row in run.rows if row.seconds)
    m = run.machine
    threads = "" if run.on_gpu else f"{m['threads']} thread{'s' * (m['threads'] > 1)}, "
    if bf16 := m.get("bf16 instructions"):
        amx = "" if "amx" in bf16 else " without AMX"
        narrow, wide = (m.get(f"{dtype} product TFLOP/s") for dtype in ("bf16", "fp32"))
        rate = f", a large product at {ratio(narrow / wide)} fp32's rate" if narrow and wide else ""
        threads = f"bf16 by {bf16}{amx}{rate}, {threads}"
    return (
        f"{m['device']}, {threads}{' and '.join(clocks)} time, medians over interleaved rounds; "
        f"torch {m['torch']}, commit {m['commit']}."
    )


def render(run: Run) -> str:
    """Everything of one run, for a terminal: a table per kind of work, then what was left out."""
    kinds = dict.fromkeys(group.split("/")[0] for group in run.groups)
    parts = [", ".join(f"{key} {value}" for key, value in run.machine.items())]
    for kind in kinds:
        groups = {g: rows for g, rows in run.groups.items() if g.split("/")[0] == kind}
        parts.append(f"**{kind}**\n\n{rows_table(groups, hidden=(), aligned=True)}")
    failed = [f"\n- {r.group}, {r.provider}: {r.reason}" for r in run.rows if r.failed]
    parts += [f"**Failed**:{''.join(failed)}"] if failed else []
    for reason in dict.fromkeys(run.left_out.values()):
        names = (f"\n- {name}" for name, why in run.left_out.items() if why == reason)
        parts.append(f"Left out ({reason}):{''.join(names)}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(render(Run.of(json.loads(Path(sys.argv[-1]).read_text()))), end="")
