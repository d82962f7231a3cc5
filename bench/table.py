"""The table of a benchmark run, from the live session or from its JSON file.

python -m bench.table bench/results/cpu.json            one table per group
python -m bench.table --short bench/results/cpu.json    one line per group
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Row:
    """One provider of one group; `seconds` is empty when it was left out for `reason`."""

    group: str
    provider: str
    seconds: Sequence[float] = ()
    reason: str = ""
    clock: str = ""
    unit: str = ""
    baselines: Sequence[str] = ()
    columns: dict[str, float] = field(default_factory=dict)


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.{3 if value < 0.01 else 1}f}"


# heading -> cell of a row, or None where it has none
COLUMNS: dict[str, Callable[[Row], str | None]] = {
    "saved MB": lambda r: _column(r, "saved_mb", "{:.1f}"),
    "saved MB/image": lambda r: _column(r, "saved_mb_per_image", "{:.1f}"),
    "weight copies MB": lambda r: _column(r, "weight_copies_mb", "{:.0f}"),
    "peak MB": lambda r: _column(r, "peak_mb"),
    "images/s": lambda r: _rate(r, "images", "{:.1f}"),
    "live GFLOP/s": lambda r: None if r.clock == "device" else _rate(r, "live_gflop", "{:.0f}"),
    "live TFLOP/s": lambda r: (
        _rate(r, "live_gflop", "{:.0f}", 1e3) if r.clock == "device" else None
    ),
    "of product": lambda r: _share(r, "live_gflop", "peak_tflops", 1e3),
    "floor GB/s": lambda r: _rate(r, "floor_mb", "", 1e3),
    "of copy": lambda r: _share(r, "floor_mb", "peak_gbps", 1e3),
    "value error": lambda r: _column(r, "value_error", "{:.0e}"),
    "gradient error": lambda r: _column(r, "gradient_error", "{:.0e}"),
}


SHORT = ("images/s", "of product", "of copy", "peak MB")


def _column(row: Row, name: str, form: str = "") -> str | None:
    return _formed(form, row.columns[name]) if name in row.columns else None


def _formed(form: str, value: float) -> str:
    """In `form`, or in three digits, all those before the point at least."""
    return (form or ("{:.0f}" if value >= 100 else "{:.3g}")).format(value)


def _rate(row: Row, name: str, form: str, unit: float = 1.0) -> str | None:
    """Column `name` per second, in multiples of `unit`."""
    if name not in row.columns:
        return None
    return _formed(form, row.columns[name] / unit / statistics.median(row.seconds))


def _share(row: Row, name: str, ceiling: str, unit: float) -> str | None:
    """That rate as a share of what the device was seen to do, None without such a measurement."""
    if name not in row.columns or ceiling not in row.columns:
        return None
    rate = row.columns[name] / unit / statistics.median(row.seconds)
    return f"{rate / row.columns[ceiling]:.0%}"


def speedup(row: Row, baseline: Row) -> float:
    """How many times faster than `baseline`: median over rounds of the ratio within a round."""
    return statistics.median(b / a for a, b in zip(row.seconds, baseline.seconds))


def spread(seconds: Sequence[float]) -> tuple[float, float]:
    """20th and 80th percentile, linear between samples."""
    ordered = sorted(seconds)

    def at(quantile: float) -> float:
        place = quantile * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(0.2), at(0.8)


def render(rows: Sequence[Row], left_out_groups: dict[str, str], machine: dict) -> str:
    """Markdown: one table per group, then what was left out."""
    by_group: dict[str, list[Row]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    parts = [", ".join(f"{key} {value}" for key, value in machine.items())]
    parts += [_group_table(name, members) for name, members in by_group.items()]
    if left_out_groups:
        reasons = dict.fromkeys(left_out_groups.values())
        for name, reason in left_out_groups.items():
            reasons[reason] = f"{reasons[reason] or ''}\n- {name}"
        parts += [f"Left out ({reason}):{names}" for reason, names in reasons.items()]
    return "\n\n".join(parts) + "\n"


def render_short(rows: Sequence[Row], machine: dict) -> str:
    """One line per group: medians in milliseconds, and the rates of our own rows."""
    lines = [", ".join(f"{key} {value}" for key, value in machine.items())]
    by_group: dict[str, list[str]] = {}
    for row in rows:
        if row.seconds:
            text = f"{row.provider} {_milliseconds(statistics.median(row.seconds))}"
            if row.provider.startswith("pae"):
                rates = {h: COLUMNS[h](row) for h in SHORT}
                text += "".join(f", {v} {h}" for h, v in rates.items() if v is not None)
        elif row.reason.startswith("failed"):
            text = f"{row.provider} FAILED"
        else:
            continue
        by_group.setdefault(row.group, []).append(text)
    lines += [f"{name}: {' | '.join(texts)}" for name, texts in by_group.items()]
    return "\n".join(lines) + "\n"


def _group_table(name: str, rows: Sequence[Row]) -> str:
    measured = {row.provider: row for row in rows if row.seconds}
    first = next(iter(measured.values()), None)
    title = f"**{name}**"
    if first is None:
        return "\n".join([title, *(f"- {row.provider}: {row.reason}" for row in rows)])
    title += f": {first.clock} time per {first.unit}, {len(first.seconds)} interleaved rounds"
    compared = [b for b in first.baselines if b in measured]
    extra = {
        heading: cell
        for heading, cell in COLUMNS.items()
        if any(cell(row) is not None for row in measured.values())
    }
    table = [["provider", "median ms", "p20-p80 ms", *(f"x {b}" for b in compared), *extra]]
    for row in rows:
        if not row.seconds:
            table.append([row.provider, row.reason, *[""] * (len(table[0]) - 2)])
            continue
        low, high = spread(row.seconds)
        table.append(
            [
                row.provider,
                _milliseconds(statistics.median(row.seconds)),
                f"{_milliseconds(low)}-{_milliseconds(high)}",
                *(f"{speedup(row, measured[b]):.2f}" for b in compared),
                *(cell(row) or "" for cell in extra.values()),
            ]
        )
    return "\n".join([title, "", *aligned(table)])


def aligned(table: list[list[str]]) -> list[str]:
    """Lines of Markdown: the heading `table[0]`, a rule, and the rows."""
    # a reason may run long; it must not widen its column
    reasons = {i for i, line in enumerate(table) if line[2:] and not any(line[2:])}
    widths = [
        max(len(line[c]) for i, line in enumerate(table) if c == 0 or i not in reasons)
        for c in range(len(table[0]))
    ]
    table = [table[0], ["-" * w for w in widths], *table[1:]]
    return [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in table
    ]


def rows_from_json(run: dict) -> tuple[list[Row], dict[str, str], dict]:
    """Rows, left-out groups and machine of a file written by --benchmark-json."""
    rows = [
        Row(
            bench["group"],
            bench["extra_info"]["provider"],
            bench["stats"]["data"],
            clock=bench["extra_info"]["clock"],
            unit=bench["extra_info"]["unit"],
            baselines=bench["extra_info"]["baselines"],
            columns=bench["extra_info"]["columns"],
        )
        for bench in run["benchmarks"]
    ]
    rows += [Row(**entry) for entry in run["left_out"]["providers"]]
    return rows, run["left_out"]["groups"], run["machine_info"]["summary"]


if __name__ == "__main__":
    rows, left_out_groups, machine = rows_from_json(json.loads(Path(sys.argv[-1]).read_text()))
    short = sys.argv[1] == "--short"
    print(render_short(rows, machine) if short else render(rows, left_out_groups, machine), end="")
