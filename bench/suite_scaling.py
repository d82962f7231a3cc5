"""The suite's scaling groups: what a step costs when one of its sizes is changed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from . import cost, shapes, suite, table
from .suite import Run
from .suite_tables import label, machine, markdown, providers_of, ratio, ratios
from .table import Row

PREFIX = "scaling/"


@dataclass(frozen=True)
class Axis:
    """One size of a step that is changed while all others stay: groups `scaling/NAME/VALUE`."""

    name: str
    groups: dict[str, list[Row]]

    @property
    def title(self) -> str:
        return _AXES.get(self.name, self.name)

    def place(self, group: str) -> float | None:
        """Where a group stands on the axis; None if its value is a name."""
        number = re.search(r"\d+", group.split("/")[2])
        return None if self.name == "model" or number is None else float(number[0])

    def fixed(self) -> str:
        """The sizes that stay."""
        sizes: dict[str, set[float]] = {}
        for row in self.rows():
            for name in _SIZES.keys() & row.columns.keys():
                sizes.setdefault(name, set()).add(row.columns[name])
        stay = ((_SIZES[n], *sizes[n]) for n in _SIZES if len(sizes.get(n, ())) == 1)
        return ", ".join(form.format(value) for form, value in stay)

    def rows(self) -> list[Row]:
        return [row for rows in self.groups.values() for row in rows if row.seconds]


_AXES = {
    "prompts": "prompts per block",
    "batch": "images per step",
    "image": "image size in pixels",
    "depth": "number of blocks",
    "model": "model",
}
_SIZES = {
    "width": "width {:.0f}",
    "depth": "{:.0f} blocks",
    "rows": "{:.0f} rows",
    "prompts": "{:.0f} prompts",
    "images": "batch {:.0f}",
}


def axes_of(run: Run) -> list[Axis]:
    """Everything that is scaled, in the order measured."""
    found: dict[str, dict[str, list[Row]]] = {}
    for group, rows in run.matching(PREFIX).items():
        found.setdefault(group.split("/")[1], {})[group] = rows
    return [Axis(name, groups) for name, groups in found.items()]


def section(run: Run) -> str:
    """A figure and a table for everything that is scaled."""
    parts = []
    for axis in axes_of(run):
        alt = f"Step time and saved memory by {axis.title}, measured and modelled"
        parts += [
            f"**By {axis.title}** ({axis.fixed()})",
            f"![{alt}](figures/{run.figure(f'scaling_{axis.name}')}.svg)",
            table_of(axis),
        ]
    return "\n\n".join([*parts, *model_error(run), machine(run)])


def table_of(axis: Axis) -> str:
    """Times relative to ours, in brackets what counted FLOPs alone would make them; saved MB."""
    names = providers_of(axis.groups.values())
    lines = [[axis.title, *names, *(f"saved: {name}" for name in names)]]
    for group, rows in axis.groups.items():
        here, base = suite.measured(rows), suite.our_first(rows)
        saved = [table.COLUMNS["saved MB/image"](here[n]) if n in here else "" for n in names]
        times = ratios(rows, names)
        for i, name in enumerate(names):
            if base is not None and name in here and here[name] is not base:
                flops = [row.columns.get("model_gflop") for row in (here[name], base)]
                times[i] += f" ({ratio(flops[0] / flops[1])})" if all(flops) else ""
        lines.append([label(group, ("scaling", axis.name)), *times, *(s or "" for s in saved)])
    return markdown(lines)


def model_error(run: Run) -> list[str]:
    """How far the cost model is from what was measured, where it says anything; [] nowhere."""
    pairs = [
        (row.columns["model_saved_mb_per_image"], row.columns["saved_mb_per_image"])
        for rows in run.groups.values()
        for row in rows
        if row.seconds and {"model_saved_mb_per_image", "saved_mb_per_image"} <= set(row.columns)
    ]
    if not pairs:
        return []
    worst = max(abs(model / seen - 1) for model, seen in pairs)
    return [
        f"Bytes saved for backward, in {len(pairs)} rows: the cost model is off by "
        f"{'less than 0.1%' if worst < 1e-3 else f'at most {worst:.1%}'} of what was measured."
    ]


@lru_cache
def modelled(
    models: tuple[str, ...] = (shapes.SMALL, shapes.BASE, shapes.LARGE),
    prompts: tuple[int, ...] = (10, 50, 100, 200),
    batch: int = 64,
) -> str:
    """The cost model's step: FLOPs of ours as a share of official-style's, and MB saved."""
    ways = {"official": ("official", "keep"), "sdpa": ("sdpa", "keep")}
    ways |= {f"pae {memory}": ("pae", memory) for memory in cost.MEMORY}
    head = ["", "FLOPs forward", "FLOPs of a step", *(f"saved: {way}" for way in ways)]
    lines = [head]
    for model in models:
        shape = cost.Shape.named(model, num_classes=shapes.CLASSES)
        for count in prompts:
            ours, theirs = (cost.flops(shape, count, batch, m) for m in ("pae", "official"))
            saved = (cost.saved_bytes(shape, count, batch, *way) / batch for way in ways.values())
            lines.append(
                [
                    f"{label(model)}, {count} prompts",
                    ratio(ours.forward / theirs.forward),
                    ratio(ours.step / theirs.step),
                    *(f"{each / 1e6:.1f}" for each in saved),
                ]
            )
    return markdown(lines)
