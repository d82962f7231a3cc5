"""The benchmark suite in tables and sentences: blocks of README.md and docs/numbers.md."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Iterable, Sequence

from . import suite, table
from .suite import Run
from .table import Row

UNMEASURED = "*Not measured yet.*"
STEP = "step/vit_base_patch16_224/"
OFFICIAL, SDPA, COMPILED = "official-style", "timm + SDPA", "timm + SDPA, compiled"
EXACT, LOW = "pae exact", "pae low"

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


def details(run: Run | None) -> str:
    """All that the file says of machine and versions."""
    if run is None:
        return UNMEASURED
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


def race(run: Run, prefixes: Sequence[str], drop: Iterable[str] = ()) -> str:
    """One line per group: how many times as long as our first row every provider takes."""
    groups = run.matching(*prefixes)
    names = providers_of(groups.values())
    first = {base.provider for rows in groups.values() if (base := suite.our_first(rows))}
    lines = [["", *(f"**{n}**" if n in first else n for n in names), "ms"]]
    for group, rows in groups.items():
        base = suite.our_first(rows)
        ours = "" if base is None else milliseconds(suite.median(base))
        lines.append([label(group, drop), *_ratios(rows, names), ours])
    return f"{markdown(lines)}\n\nms: of the row that is 1x. {machine(run)}"


def _ratios(rows: Sequence[Row], names: Iterable[str]) -> list[str]:
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
        for (name, row), ratio_to_ours in zip(here.items(), _ratios(rows, here)):
            low, high = table.spread(row.seconds)
            lines.append(
                [
                    first,
                    f"**{name}**" if suite.is_ours(row) else name,
                    ratio_to_ours,
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
    headings |= {EXACT: "pae", LOW: 'pae, `memory="low"`'}
    by_dtype = {d: cases(run, step, d) for d in dtypes} if run else {}
    lines, everything = [], [rows for found in by_dtype.values() for rows in found.values()]
    names = [n for n in headings if any(n in suite.measured(rows) for rows in everything)]
    for dtype, found in by_dtype.items():
        for prompts, rows in found.items():
            lines.append([f"{_TYPES[dtype]}, {prompts} prompts: time", *_ratios(rows, names)])
    counts = list(by_dtype.get(dtypes[0], ()))
    for prompts in dict.fromkeys(counts[:1] + counts[-1:]):
        rows = by_dtype[dtypes[0]][prompts]
        here = suite.measured(rows)
        cells = [_saved(here[n]) if n in here else "" for n in names]
        lines.append([f"{_TYPES[dtypes[0]]}, {prompts} prompts: kept, MB/image", *cells])
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


# end of a block's name -> group, the row that ours is held against, ours
CLAIMS = {
    "kld 256": ("kld/global/k256/", OFFICIAL, "pae"),
    "kld 1024": ("kld/global/k1024/", OFFICIAL, "pae"),
    "mpa ranking": ("mpa_ranking/vit_small_patch16_224/", OFFICIAL, "pae fp32"),
    "mpa": ("mpa/vit_small_patch16_224/", OFFICIAL, "pae"),
    "filter": ("filter/224px/", OFFICIAL, "pae"),
    "step 50": (STEP + "P50/fp32/", OFFICIAL, EXACT),
    "step 100": (STEP + "P100/fp32/", OFFICIAL, EXACT),
}


def several_prompts(chosen: list[Run]) -> Run | None:
    """The run whose steps show what prompts cost."""
    return next((run for run in chosen if len(cases(run, STEP, "fp32")) > 1), None)


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
                parts.append(race(dataclasses.replace(run, groups=added), prefixes))
    return "\n\n".join(parts) or "None."


def axes_of(run: Run | None) -> dict[str, dict[str, list[Row]]]:
    """What is scaled -> value -> rows: groups `scaling/AXIS/VALUE` in the order measured."""
    found: dict[str, dict[str, list[Row]]] = {}
    for group, rows in (run.matching("scaling/") if run else {}).items():
        _, axis, value = group.split("/", 2)
        found.setdefault(axis, {})[value] = rows
    return found


def scaling(run: Run | None) -> str:
    """A figure and a table for everything that is scaled."""
    parts = []
    for axis in axes_of(run):
        parts += [
            f"### By {axis.replace('_', ' ')}",
            f"![Step time and kept memory by {axis}](figures/scaling_{axis}.svg)",
            race(run, (f"scaling/{axis}/",), drop=("scaling", axis)),
        ]
    return "\n\n".join(parts) or UNMEASURED


def losses(chosen: list[Run]) -> str:
    """Every row of ours that a peer beats, worst first."""
    pairs = sum(1 for run in chosen for _ in suite.duels(run))
    if not pairs:
        return UNMEASURED
    found = [(run, loss) for run in chosen for loss in suite.lost(run)]
    if not found:
        return f"Nowhere: in none of {pairs} pairs of ours and a peer is the peer faster."
    found.sort(key=lambda pair: pair[1].ratio)
    lines = [["case", "ours", "faster peer", "its time / ours", "memory, ours and its"]]
    devices = list(dict.fromkeys(run.device for run in chosen))
    if len(devices) > 1:
        lines[0].append("on")
    for run, loss in found:
        cells = [
            ("step, " if loss.group.startswith("step/") else "") + label(loss.group),
            loss.ours.provider,
            loss.peer.provider,
            ratio(loss.ratio) + ("" if loss.clear else ", within the spread"),
            _memory(loss),
        ]
        lines.append([*cells, run.device] if len(devices) > 1 else cells)
    said = f"In {len(found)} of {pairs} pairs of ours and a peer the peer is faster:"
    return f"{said}\n\n{markdown(lines)}"


def _memory(loss: suite.Loss) -> str:
    for heading in ("saved MB/image", "saved MB", "peak MB"):
        values = [table.COLUMNS[heading](row) for row in (loss.ours, loss.peer)]
        if None not in values:
            return f"{values[0]} and {values[1]} {heading}"
    return ""


def gates(run: Run) -> str:
    """What passed before the times were taken, on a GPU."""
    steps = {k: v for k, v in run.machine.items() if k.startswith(("build", "tests", "sanitizer"))}
    outcomes: dict[str, list[str]] = {}
    for step, outcome in steps.items():
        outcomes.setdefault(outcome, []).append(step)
    return "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in outcomes.items())


# ---- all blocks


def blocks(everything: list[Run]) -> dict[str, str]:
    cpu, gpu = suite.on_cpu(everything), suite.on_gpu(everything)
    first = {name: shown(cpu, name) for name in SECTIONS}
    made = {
        "suite step": first_screen(suite.first_with(cpu, STEP), ("fp32", "bf16")),
        "suite machine": details(cpu[0] if cpu else None),
        "suite hero": hero_caption(cpu),
        "suite scaling": scaling(suite.first_with(cpu, "scaling/")),
        "suite losses": losses(list({id(r): r for r in first.values() if r}.values())),
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
    if not gpu:
        return UNMEASURED
    parts = []
    for run in gpu:
        parts += [f"### {run.device}", machine(run), f"Before any time was taken: {gates(run)}."]
        for name, prefixes in SECTIONS.items():
            if run.matching(*prefixes):
                parts += [f"#### {HEADINGS[name]}", section(run, name)]
        parts += ["#### Where we lose", losses([run])]
    return "\n\n".join(parts)
