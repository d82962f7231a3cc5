"""Rows of the benchmark suite as Markdown: words for names, digits for numbers, tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from . import suite, table
from .suite import Run
from .table import Row

# what a group's name is made of, for a reader
_NAMES = {
    "vit_tiny_patch16_224": "ViT-Ti/16 224",
    "vit_small_patch16_224": "ViT-S/16 224",
    "vit_base_patch16_224": "ViT-B/16 224",
    "vit_large_patch16_224": "ViT-L/16 224",
    "kld": "",
    "step": "",
    "filter": "filter",
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


def label(group: str, drop: Iterable[str] = ()) -> str:
    """A group's name in words: `step/vit_base_patch16_224/P50` is "ViT-B/16 224, 50 prompts"."""
    words = []
    for part in group.split("/"):
        if part in drop:
            continue
        word = _NAMES.get(part, part.replace("_", " "))
        for pattern, form in _PARTS.items():
            if found := re.fullmatch(pattern, part):
                word = form.format(*found.groups())
                word = word.removesuffix("s") if found[1] == "1" else word
        if word:
            words.append(word)
    return ", ".join(words)


def ratio(value: float) -> str:
    """Three digits, two below 1: 1.42x, 21.4x, 0.89x."""
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def machine(run: Run) -> str:
    """One sentence that says where, how and at which commit."""
    rows = [row for rows in run.groups.values() for row in rows if row.seconds]
    clocks = list(dict.fromkeys(row.clock for row in rows))
    m = run.machine
    threads = "" if run.on_gpu else f"{m['threads']} thread{'s' * (m['threads'] > 1)}, "
    return (
        f"{m['device']}, {threads}{' and '.join(clocks)} time, medians over interleaved rounds; "
        f"torch {m['torch']}, commit {m['commit']}."
    )


def details(run: Run) -> str:
    """All that the file says of machine and versions."""
    return markdown([["", ""], *([key, str(value)] for key, value in run.machine.items())])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    rows = [head, ["---"] * len(head), *rest]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def providers_of(groups: Iterable[Sequence[Row]]) -> list[str]:
    """Providers with a time in some group, peers first, each in the order it was listed."""
    names: dict[str, bool] = {}
    for rows in groups:
        for row in rows:
            if row.seconds:
                names.setdefault(row.provider, suite.is_ours(row))
    return sorted(names, key=names.get)


def ratio_table(run: Run, prefixes: Sequence[str], drop: Iterable[str] = ()) -> str:
    """One line per group: how many times as long as our first row every provider takes."""
    groups = run.matching(*prefixes)
    names = providers_of(groups.values())
    first = {base.provider for rows in groups.values() if (base := suite.our_first(rows))}
    lines = [["", *(f"**{n}**" if n in first else n for n in names), "ms"]]
    for group, rows in groups.items():
        base = suite.our_first(rows)
        ours = "" if base is None else milliseconds(suite.median(base))
        lines.append([label(group, drop), *ratios(rows, names), ours])
    return f"{markdown(lines)}\n\nms: of the row that is 1x. {machine(run)}"


def ratios(rows: Sequence[Row], names: Iterable[str]) -> list[str]:
    here, base = suite.measured(rows), suite.our_first(rows)
    cells = []
    for name in names:
        if name not in here or base is None:
            cells.append("")
        elif here[name] is base:
            cells.append("**1x**")
        else:
            cells.append(ratio(suite.times(here[name], base)[0]))
    return cells


def milliseconds(seconds: float) -> str:
    """In three digits, all those before the point at least."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# headings of `table.COLUMNS` that a page shows
_SHOWN = (
    "saved MB/image", "saved MB", "weight copies MB", "peak MB", "of product", "of copy",
    "value error", "gradient error",
)  # fmt: skip


def rows_table(run: Run, prefixes: Sequence[str]) -> str:
    """One line per row: time, its ratio to our first row's, memory, shares, errors; what is not
    there and why.
    """
    groups = run.matching(*prefixes)
    cell = {heading: table.COLUMNS[heading] for heading in _SHOWN}
    everything = [row for rows in groups.values() for row in rows if row.seconds]
    extra = [h for h in _SHOWN if any(cell[h](row) not in (None, "0") for row in everything)]
    lines = [["case", "version", "time", "ms", "p20-p80", *extra]]
    for group, rows in groups.items():
        first = label(group)
        here = suite.measured(rows)
        for (name, row), against_ours in zip(here.items(), ratios(rows, here)):
            low, high = table.spread(row.seconds)
            lines.append(
                [
                    first,
                    f"**{name}**" if suite.is_ours(row) else name,
                    against_ours,
                    milliseconds(suite.median(row)),
                    f"{milliseconds(low)}-{milliseconds(high)}",
                    *(cell[h](row) or "" for h in extra),
                ]
            )
            first = ""
    return markdown(lines) + _left_out(groups)


def _left_out(groups: dict[str, list[Row]]) -> str:
    """A line per reason: who could not run."""
    reasons: dict[str, dict[str, None]] = {}
    for rows in groups.values():
        for row in rows:
            if not row.seconds:
                reasons.setdefault(row.reason, {})[row.provider] = None
    said = (f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return f"\n\nLeft out: {'; '.join(said)}." if reasons else ""
