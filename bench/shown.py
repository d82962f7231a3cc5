"""What pages and figures show of the results: names of providers, sections, cases, scaled sizes."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass

from .results import Row, Run, first_with, measured

STEP = "step/vit_base_patch16_224/"
SCALING = "scaling/"
OFFICIAL, SDPA, COMPILED = "official-style", "timm + SDPA", "timm + SDPA, compiled"
NARROW = ", bf16 weights"  # of a peer whose frozen linears are stored in bf16
EXACT, LOW = "pae keep", "pae recompute8"

# sections of docs/numbers.md: heading, and prefixes of their groups
SECTIONS = {
    "step": ("Training step, fp32", ("step/*/fp32/",)),
    "bf16": ("Training step, bf16", ("step/*/bf16/",)),
    "backbones": ("Other backbones", ("swin/", "rotated/")),
    "dense": ("Segmentation", ("dense/",)),
    "kld": ("Regulariser", ("kld/",)),
    "mpa": ("Modal Pre-Alignment", ("mpa_ranking/", "mpa/")),
    "filter": ("Filter, and patch embedding of filtered images", ("filter/", "tokens/")),
    "pooling": ("Pooling", ("pooling/",)),
    "attention": ("Attention", ("attention/",)),
    "pointwise": ("Pointwise passes", ("norm/", "gelu/", "coded gelu/")),
}

# what PAE adds to a step -> the groups that measure it, and which row there is ours
PARTS = {
    "regulariser, k = 256": ("kld/global/k256/", "pae"),
    "regulariser, k = 1024": ("kld/global/k1024/", "pae"),
    "filter of MPA": ("filter/224px/", "pae"),
    "ranking of MPA": ("mpa_ranking/vit_small_patch16_224/", "pae fp32"),
    "whole MPA": ("mpa/vit_small_patch16_224/", "pae"),
}


def cases(run: Run, dtype: str, step: str = STEP) -> dict[float, list[Row]]:
    """Measured groups of one backbone's step by the number of prompts, at the commonest batch."""
    found = []
    for group, rows in run.matching(step).items():
        prompts, of, batch = group.removeprefix(step).split("/")
        if of == dtype:
            found.append((int(prompts[1:]), int(batch[1:]), rows))
    batch = statistics.mode(b for _, b, _ in found) if found else 0
    return {p: rows for p, b, rows in sorted(found, key=lambda c: c[:2]) if b == batch}


def batch_of(rows: list[Row]) -> int:
    return int(rows[0].group.rsplit("/B", 1)[1])


def several_prompts(chosen: list[Run], dtype: str = "fp32") -> Run | None:
    """The run whose steps show best what prompts cost: at the most numbers of them."""
    best = max(chosen, key=lambda run: len(cases(run, dtype)), default=None)
    return best if best and len(cases(best, dtype)) > 1 else None


def speeds(chosen: list[Run]) -> dict[str, tuple[Run, float]]:
    """Of every measured part of `PARTS`: the run, how many times as long official-style takes."""
    found = {}
    for words, (group, ours) in PARTS.items():
        run = first_with(chosen, group)
        here = measured(next(iter(run.matching(group).values()))) if run else {}
        if run and {OFFICIAL, ours} <= set(here):
            found[words] = run, here[OFFICIAL].times(here[ours])[0]
    return found


# ---- sizes of a step, one changed at a time

_TITLES = {
    "prompts": "prompts per block",
    "batch": "images per step",
    "image": "image size in pixels",
    "depth": "number of blocks",
}
_SIZES = {
    "width": "width {:.0f}",
    "depth": "{:.0f} blocks",
    "rows": "{:.0f} rows",
    "prompts": "{:.0f} prompts",
    "images": "batch {:.0f}",
}


@dataclass(frozen=True)
class Axis:
    """One size of a step that is changed while all others stay: groups `scaling/NAME/VALUE`."""

    name: str
    groups: dict[str, list[Row]]

    @property
    def title(self) -> str:
        return _TITLES.get(self.name, self.name)

    def by_place(self) -> dict[float, list[Row]]:
        """Groups by where they stand on the axis; models at equal distances."""
        places: list[float] = [*map(float, range(len(self.groups)))]
        if self.name != "model":
            places = [float(re.sub(r"\D", "", group.split("/")[2])) for group in self.groups]
        along = zip(places, self.groups.values(), strict=True)
        return dict(sorted(along, key=lambda pair: pair[0]))

    def fixed(self) -> str:
        """The sizes that stay."""
        columns = [row.columns for rows in self.groups.values() for row in rows if row.seconds]
        sizes = {name: {c[name] for c in columns if name in c} for name in _SIZES}
        return ", ".join(_SIZES[name].format(*v) for name, v in sizes.items() if len(v) == 1)


def axes_of(run: Run) -> list[Axis]:
    """Everything that is scaled, in the order measured."""
    found: dict[str, dict[str, list[Row]]] = {}
    for group, rows in run.matching(SCALING).items():
        found.setdefault(group.split("/")[1], {})[group] = rows
    return [Axis(name, groups) for name, groups in found.items()]
