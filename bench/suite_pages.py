"""What README.md and docs/numbers.md say of the benchmark suite: blocks by name."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Sequence

from . import suite, suite_scaling, table
from .suite import Run
from .suite_tables import details, label, machine, markdown, ratio, ratio_table, ratios, rows_table
from .table import Row

UNMEASURED = "*Not measured yet.*"
STEP = "step/vit_base_patch16_224/"
OFFICIAL, SDPA, COMPILED = "official-style", "timm + SDPA", "timm + SDPA, compiled"
EXACT, LOW = "pae keep", "pae recompute8"

# ---- README


def cases(run: Run, step: str, dtype: str) -> dict[int, list[Row]]:
    """Measured groups of one backbone's step by the number of prompts, at the commonest batch."""
    found = []
    for group, rows in run.matching(step).items():
        prompts, of, batch = re.fullmatch(r"P(\d+)/(\w+)/B(\d+)", group[len(step) :]).groups()
        if of == dtype:
            found.append((int(prompts), int(batch), rows))
    batch = statistics.mode(b for _, b, _ in found) if found else 0
    return {p: rows for p, b, rows in sorted(found, key=lambda c: c[:2]) if b == batch}


def first_screen(run: Run | None, dtypes: Sequence[str], step: str = STEP) -> str:
    """The table of README.md: time and memory of a step, ours and what people run."""
    headings = {OFFICIAL: OFFICIAL, SDPA: SDPA, COMPILED: "torch.compile"}
    headings |= {EXACT: "pae", LOW: 'pae, `memory="recompute8"`'}
    by_dtype = {d: cases(run, step, d) for d in dtypes} if run else {}
    lines, everything = [], [rows for found in by_dtype.values() for rows in found.values()]
    names = [n for n in headings if any(n in suite.measured(rows) for rows in everything)]
    for dtype, found in by_dtype.items():
        for prompts, rows in found.items():
            lines.append([f"{_TYPES[dtype]}, {prompts} prompts: time", *ratios(rows, names)])
    counts = list(by_dtype.get(dtypes[0], ()))
    for prompts in dict.fromkeys(counts[:1] + counts[-1:]):
        rows = by_dtype[dtypes[0]][prompts]
        here = suite.measured(rows)
        cells = [_saved(here[n]) if n in here else "" for n in names]
        lines.append([f"{_TYPES[dtypes[0]]}, {prompts} prompts: saved, MB/image", *cells])
    if not lines:
        return UNMEASURED
    title = f"training step, {label(step)}, batch {batch_of(everything[0])}"
    return f"{markdown([[title, *(headings[n] for n in names)], *lines])}\n\n{machine(run)}"


_TYPES = {"fp32": "fp32", "bf16": "bf16 autocast"}


def _saved(row: Row) -> str:
    if "saved_mb_per_image" not in row.columns:
        return ""
    cell = f"{row.columns['saved_mb_per_image']:.1f}"
    return f"**{cell}**" if suite.is_ours(row) else cell


# end of a block's name -> group, the row that ours is compared with, ours
CLAIMS = {
    "kld 256": ("kld/global/k256/", OFFICIAL, "pae"),
    "kld 1024": ("kld/global/k1024/", OFFICIAL, "pae"),
    "mpa ranking": ("mpa_ranking/vit_small_patch16_224/", OFFICIAL, "pae fp32"),
    "mpa": ("mpa/vit_small_patch16_224/", OFFICIAL, "pae"),
    "filter": ("filter/224px/", OFFICIAL, "pae"),
    "step 50": (STEP + "P50/fp32/", OFFICIAL, EXACT),
    "step 100": (STEP + "P100/fp32/", OFFICIAL, EXACT),
}


def several_prompts(chosen: list[Run], dtype: str = "fp32") -> Run | None:
    """The run whose steps show best what prompts cost: at the most numbers of them."""
    counts = [len(cases(run, STEP, dtype)) for run in chosen]
    return chosen[counts.index(max(counts))] if max(counts, default=0) > 1 else None


def hero_caption(chosen: list[Run]) -> str:
    """What the first figure shows, and where it was measured."""
    run = several_prompts(chosen)
    if run is None:
        return UNMEASURED
    rows = next(iter(cases(run, STEP, "fp32").values()))
    others = (suite.first_with(chosen, group) for group, _, _ in CLAIMS.values())
    devices = dict.fromkeys(r.device for r in others if r is not None and r.device != run.device)
    on = f" (right: {', '.join(devices)})" if devices else ""
    return (
        f"A training step of VPT-deep on {label(STEP)}, fp32, batch {batch_of(rows)}; right, KLD "
        f"and MPA against the released formulation. {machine(run)[:-1]}{on}."
    )


def batch_of(rows: Sequence[Row]) -> int:
    return int(rows[0].group.rsplit("/B", 1)[1])


def speed(chosen: list[Run], claim: str) -> float | None:
    """How many times as long as ours the other row of `CLAIMS` takes; None if not measured."""
    group, other, ours = CLAIMS[claim]
    run = suite.first_with(chosen, group)
    here = suite.measured(next(iter(run.matching(group).values()))) if run else {}
    return suite.times(here[other], here[ours])[0] if {other, ours} <= set(here) else None


# ---- docs/numbers.md

# the sections of the page: prefixes of their groups
SECTIONS = {
    "step": ("step/",),
    "kld": ("kld/",),
    "mpa": ("mpa_ranking/", "mpa/"),
    "filter": ("filter/", "tokens/"),
    "pooling": ("pooling/",),
    "attention": ("attention/",),
    "pointwise": ("norm/", "gelu/", "coded gelu/"),
}
HEADINGS = {
    "step": "Training step",
    "kld": "Regulariser",
    "mpa": "Modal Pre-Alignment",
    "filter": "Filter, and patch embedding of filtered images",
    "pooling": "Pooling",
    "attention": "Attention",
    "pointwise": "Pointwise passes",
}


def section(run: Run | None, name: str) -> str:
    """Everything measured in one section, from one run."""
    if run is None:
        return UNMEASURED
    return f"{rows_table(run, SECTIONS[name])}\n\n{machine(run)}"


def shown(chosen: list[Run], name: str) -> Run | None:
    """The run that a section is made from."""
    return suite.first_with(chosen, *SECTIONS[name])


def other(chosen: list[Run]) -> str:
    """What the runs behind the shown ones add: another processor, or a case of this one."""
    parts = []
    for name, prefixes in SECTIONS.items():
        seen = set()
        for run in chosen:
            added = {
                g: r for g, r in run.matching(*prefixes).items() if (run.device, g) not in seen
            }
            seen |= {(run.device, group) for group in added}
            if added and run is not shown(chosen, name):
                parts.append(ratio_table(dataclasses.replace(run, groups=added), prefixes))
    return "\n\n".join(parts) or "None."


def compared(chosen: list[Run]) -> list[Run]:
    """Every table that is shown, as a run of its groups alone."""
    prefixes = [*SECTIONS.values(), (suite_scaling.PREFIX,)]
    runs = [(suite.first_with(chosen, *p), p) for p in prefixes]
    return [dataclasses.replace(run, groups=run.matching(*p)) for run, p in runs if run]


def losses(chosen: list[Run]) -> str:
    """Every row of ours that a peer beats, worst first: what runs by itself, then the rest."""
    everything = [(run, *pair) for run in chosen for pair in suite.pairs(run)]
    lost = [(run, loss) for run in chosen for loss in suite.lost(run)]
    devices = {run.device for run in chosen}

    def itself(run: Run, group: str, ours: Row) -> bool:
        return ours is suite.our_first(run.groups[group])

    parts = []
    for first, title in ((True, "What pae runs by itself"), (False, "Other versions of pae's")):
        pairs = [p for p in everything if itself(*p[:3]) == first]
        found = [(r, loss) for r, loss in lost if itself(r, loss.group, loss.ours) == first]
        if pairs:
            said = f"**{title}**: the peer is faster in {len(found)} of {len(pairs)} pairs."
            parts += [said, _lost(found, len(devices) > 1)] if found else [said]
    return "\n\n".join(parts) or UNMEASURED


def _lost(found: list[tuple[Run, suite.Loss]], name_device: bool) -> str:
    lines = [["case", "ours", "faster peer", "its time / ours", "memory, ours and its"]]
    lines[0] += ["on"] if name_device else []
    for run, loss in sorted(found, key=lambda pair: pair[1].ratio):
        lines.append(
            [
                _case(loss.group),
                loss.ours.provider,
                loss.peer.provider,
                ratio(loss.ratio) + ("" if loss.clear else ", within the spread"),
                _memory(loss),
                *([run.device] if name_device else []),
            ]
        )
    return markdown(lines)


def _case(group: str) -> str:
    kind = {"step": "step, ", "kld": "regulariser, "}.get(group.split("/")[0], "")
    return kind + label(group)


def _memory(loss: suite.Loss) -> str:
    for heading in ("saved MB/image", "saved MB", "peak MB"):
        values = [table.COLUMNS[heading](row) for row in (loss.ours, loss.peer)]
        if None not in values:
            return f"{values[0]} and {values[1]} {heading}"
    return ""


# ---- all blocks


def blocks(everything: list[Run]) -> dict[str, str]:
    cpu, gpu = suite.on_cpu(everything), suite.on_gpu(everything)
    first = {name: shown(cpu, name) for name in SECTIONS}
    scaled = suite.first_with(cpu, suite_scaling.PREFIX)
    made = {
        "suite step": first_screen(suite.first_with(cpu, STEP), ("fp32", "bf16")),
        "suite machine": details(cpu[0]) if cpu else UNMEASURED,
        "suite hero": hero_caption(cpu),
        "suite scaling": suite_scaling.section(scaled) if scaled else UNMEASURED,
        "suite cost model": suite_scaling.modelled(),
        "suite losses": losses(compared(cpu)),
        "suite other": other(cpu),
        "suite gpu": gpu_page(gpu),
        "suite gpu first screen": gpu_first_screen(gpu),
    }
    for name, run in first.items():
        made[f"suite section {name}"] = section(run, name)
    for claim in CLAIMS:
        value = speed(cpu, claim)
        made[f"suite claim {claim}"] = UNMEASURED if value is None else ratio(value)
    return made


def gpu_first_screen(gpu: list[Run]) -> str:
    if not gpu:
        return "No GPU figure is published yet."
    return "\n\n".join(first_screen(run, ("bf16",)) for run in gpu)


def gpu_page(gpu: list[Run]) -> str:
    """Every section of every GPU."""
    parts = []
    for run in gpu:
        parts += [f"### {run.device}", details(run)]
        if several_prompts([run], "bf16"):
            alt = "Time and saved memory of a training step by the number of prompts"
            parts.append(f"![{alt}](figures/{run.figure('step')}.svg)")
        for name, prefixes in SECTIONS.items():
            if run.matching(*prefixes):
                parts += [f"#### {HEADINGS[name]}", section(run, name)]
        if run.matching(suite_scaling.PREFIX):
            parts += ["#### Scaling", suite_scaling.section(run)]
        parts += ["#### Where we lose", losses([run])]
    return "\n\n".join(parts) or UNMEASURED
