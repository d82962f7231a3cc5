"""What README.md and docs/numbers.md say of the benchmark suite: blocks by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache

from . import charts, cost, shapes, shown, table
from .results import Row, Run, first_with, measured, on_cpu, on_gpu, our_first, pairs, runs
from .shown import Axis
from .table import COLUMNS, label, machine, markdown, providers_of, ratio, ratios

UNMEASURED = "*Not measured yet.*"
PEAK = COLUMNS["peak MB"]
ALIKE = 1.01  # peaks are exact; so far apart they may be alignment


def blocks(numbers: dict[str, dict]) -> dict[str, str]:
    """Every block, by name, of the parsed files of bench/results by file name."""
    everything = runs(numbers)
    cpu, gpu = on_cpu(everything), on_gpu(everything)
    scaled = first_with(cpu, shown.SCALING)
    made = {
        "suite step": first_screen(first_with(cpu, shown.STEP), ("fp32", "bf16")),
        "suite machine": details(cpu[0]) if cpu else UNMEASURED,
        "suite hero": hero_caption(cpu),
        "suite scaling": scaling(scaled) if scaled else UNMEASURED,
        "suite cost model": cost_model(),
        "suite losses": slower_than_peers(compared(cpu)),
        "suite other": other(cpu),
        "suite gpu": gpu_page(gpu),
        "suite gpu first screen": "\n\n".join(first_screen(run, ("bf16",)) for run in gpu)
        or "No GPU figure is published yet.",
    }
    for name, (_, prefixes) in shown.SECTIONS.items():
        run = first_with(cpu, *prefixes)
        made[f"suite section {name}"] = (
            section(run, prefixes) if run else why_unmeasured(cpu, prefixes)
        )
    return made


def figures(numbers: dict[str, dict]) -> dict[str, Callable]:
    """The function that draws every figure, by name."""
    return charts.figures(runs(numbers))


# ---- README.md


def first_screen(run: Run | None, dtypes: Sequence[str]) -> str:
    """The table of README.md: time and memory of a step, ours and what people run."""
    headings = {
        shown.OFFICIAL: shown.OFFICIAL,
        shown.SDPA: shown.SDPA,
        **{name + shown.NARROW: name + shown.NARROW for name in (shown.OFFICIAL, shown.SDPA)},
        shown.COMPILED: "torch.compile",
        shown.EXACT: "pae",
        shown.LOW: 'pae, `memory="recompute8"`',
    }
    words = {"fp32": "fp32", "bf16": "bf16 autocast"}
    by_dtype = {dtype: shown.cases(run, dtype) for dtype in dtypes} if run else {}
    everything = [rows for found in by_dtype.values() for rows in found.values()]
    if run is None or not everything:
        return UNMEASURED
    names = [name for name in headings if any(name in measured(rows) for rows in everything)]
    title = f"training step, {label(shown.STEP)}, batch {shown.batch_of(everything[0])}"
    lines = [[title, *(headings[name] for name in names)]]
    for dtype, found in by_dtype.items():
        for prompts, rows in found.items():
            lines.append([f"{words[dtype]}, {prompts} prompts: time", *ratios(rows, names)])
    first = by_dtype[dtypes[0]]
    for prompts in dict.fromkeys([*first][:1] + [*first][-1:]):
        here = measured(first[prompts])
        cells = [_saved(here[name]) if name in here else "" for name in names]
        lines.append([f"{words[dtypes[0]]}, {prompts} prompts: saved, MB/image", *cells])
    return f"{markdown(lines)}\n\n{machine(run)}"


def _saved(row: Row) -> str:
    cell = COLUMNS["saved MB/image"](row) or ""
    return f"**{cell}**" if cell and row.is_ours else cell


def hero_caption(chosen: list[Run]) -> str:
    """What the first figure shows, and where it was measured."""
    run = shown.several_prompts(chosen)
    if run is None:
        return UNMEASURED
    batch = shown.batch_of(next(iter(shown.cases(run, "fp32").values())))
    others = dict.fromkeys(
        r.device for r, _ in shown.speeds(chosen).values() if r.device != run.device
    )
    on = f" (right: {', '.join(others)})" if others else ""
    return (
        f"A training step of VPT-deep on {label(shown.STEP)}, fp32, batch {batch}; right, KLD "
        f"and MPA against the released formulation. {machine(run)[:-1]}{on}."
    )


# ---- docs/numbers.md


def section(run: Run, prefixes: Sequence[str]) -> str:
    """Everything measured in one section, from one run."""
    return f"{table.rows_table(run.matching(*prefixes))}\n\n{machine(run)}"


def why_unmeasured(chosen: list[Run], prefixes: Sequence[str]) -> str:
    """Why no row of a section could run, where that is known."""
    rows = (row for run in chosen for rows in run.named(*prefixes).values() for row in rows)
    reasons = ", ".join(dict.fromkeys(row.reason for row in rows))
    return f"*Not measured: {reasons}.*" if reasons else UNMEASURED


def details(run: Run) -> str:
    """All that the file says of machine and versions."""
    return markdown([["", ""], *([key, str(value)] for key, value in run.machine.items())])


def other(chosen: list[Run]) -> str:
    """What the runs behind the shown ones add: another processor, or a case of this one."""
    parts = []
    for _, prefixes in shown.SECTIONS.values():
        seen: set[tuple[str, str]] = set()
        for run in chosen:
            groups = run.matching(*prefixes)
            added = {g: rows for g, rows in groups.items() if (run.device, g) not in seen}
            seen |= {(run.device, group) for group in added}
            if added and run is not first_with(chosen, *prefixes):
                parts.append(table.ratio_table(dataclasses.replace(run, groups=added), prefixes))
    return "\n\n".join(parts) or "None."


def compared(chosen: list[Run]) -> list[Run]:
    """Every table that is shown, as a run of its groups alone."""
    every = [prefixes for _, prefixes in shown.SECTIONS.values()] + [(shown.SCALING,)]
    first = [(first_with(chosen, *prefixes), prefixes) for prefixes in every]
    return [dataclasses.replace(r, groups=r.matching(*prefixes)) for r, prefixes in first if r]


def slower_than_peers(chosen: list[Run]) -> str:
    """Every row of ours that a peer beats, worst first: what runs by itself, then the rest."""
    everything = [(run, ours, peer) for run in chosen for ours, peer in pairs(run)]
    several = len({run.device for run in chosen}) > 1
    parts = []
    for default, title in ((True, "What pae runs by itself"), (False, "Other versions of pae's")):
        found = [p for p in everything if (p[1] is our_first(p[0].groups[p[1].group])) == default]
        lines = []
        for run, ours, peer in found:
            middle, _, high = peer.times(ours)
            if middle < 1:
                said = ratio(middle) + ("" if high < 1 else ", within the spread")
                line = [_case(ours), ours.provider, peer.provider, said]
                line += [_memory(ours, peer), *([run.device] if several else [])]
                lines.append((middle, line))
        if found:
            parts.append(f"**{title}**: the peer is faster in {len(lines)} of {len(found)} pairs.")
        if lines:
            head = ["case", "ours", "faster peer", "its time / ours", "memory, ours and its"]
            head += ["on"] if several else []
            parts.append(markdown([head, *(line for _, line in sorted(lines, key=lambda p: p[0]))]))
    return "\n\n".join(parts + larger_than_peers(chosen)) or UNMEASURED


def larger_than_peers(chosen: list[Run]) -> list[str]:
    """Every row of ours whose peak of memory is above a peer's, worst first; [] without peaks."""
    known = [p for run in chosen for p in pairs(run) if all("peak_mb" in r.columns for r in p)]
    larger: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for ours, peer in known:
        times = ours.columns["peak_mb"] / peer.columns["peak_mb"]
        if times > ALIKE:
            theirs = f"{peer.provider}: {PEAK(peer)} ({ratio(times)})"
            where = _case(ours), f"{ours.provider}: {PEAK(ours)}"
            larger.setdefault(where, []).append((times, theirs))
    found = [(sorted(peers, reverse=True), where) for where, peers in larger.items()]
    lines = [["case", "ours, MB", "peers with less, MB (ours / its)"]]
    for peers, where in sorted(found, reverse=True):
        lines.append([*where, "; ".join(said for _, said in peers)])
    count = sum(map(len, larger.values()))
    title = f"**Peak memory**: ours is higher in {count} of {len(known)} pairs."
    return [title, *([markdown(lines)] if found else [])] if known else []


def _case(row: Row) -> str:
    kind = {"step": "step, ", "kld": "regulariser, "}.get(row.group.split("/")[0], "")
    return kind + label(row.group)


def _memory(ours: Row, peer: Row) -> str:
    for heading in ("saved MB/image", "saved MB", "peak MB"):
        values = [COLUMNS[heading](row) for row in (ours, peer)]
        if None not in values:
            return f"{values[0]} and {values[1]} {heading}"
    return ""


def gpu_page(gpu: list[Run]) -> str:
    """Every section of every GPU."""
    parts = []
    for run in gpu:
        parts += [f"### {run.device}", details(run)]
        if shown.several_prompts([run], "bf16"):
            alt = "Time and saved memory of a training step by the number of prompts"
            parts.append(f"![{alt}](figures/{run.figure('step')}.svg)")
        for heading, prefixes in shown.SECTIONS.values():
            if run.matching(*prefixes):
                parts += [f"#### {heading}", section(run, prefixes)]
        if run.matching(shown.SCALING):
            parts += ["#### Scaling", scaling(run)]
        parts += ["#### Where we lose", slower_than_peers([run])]
    return "\n\n".join(parts) or UNMEASURED


# ---- one size changed at a time, and the cost model


def scaling(run: Run) -> str:
    """A figure and a table for everything that is scaled."""
    parts = []
    for axis in shown.axes_of(run):
        alt = f"Step time and saved memory by {axis.title}, measured and modelled"
        figure = run.figure(f"scaling_{axis.name}")
        parts += [f"**By {axis.title}** ({axis.fixed()})", f"![{alt}](figures/{figure}.svg)"]
        parts.append(scaling_table(axis))
    return "\n\n".join([*parts, *model_error(run), machine(run)])


def scaling_table(axis: Axis) -> str:
    """Times relative to ours, in brackets what counted FLOPs alone would make them; saved MB."""
    names = providers_of(axis.groups.values())
    lines = [[axis.title, *names, *(f"saved: {name}" for name in names)]]
    for group, rows in axis.groups.items():
        here, base = measured(rows), our_first(rows)
        saved = [COLUMNS["saved MB/image"](here[n]) if n in here else "" for n in names]
        times = ratios(rows, names)
        for i, name in enumerate(names):
            if base is not None and name in here and here[name] is not base:
                flops = [row.columns.get("model_gflop") for row in (here[name], base)]
                times[i] += f" ({ratio(flops[0] / flops[1])})" if all(flops) else ""
        lines.append([label(group, ("scaling", axis.name)), *times, *(s or "" for s in saved)])
    return markdown(lines)


def model_error(run: Run) -> list[str]:
    """How far the cost model is from what was measured, where it says anything; [] nowhere."""
    names = ("model_saved_mb_per_image", "saved_mb_per_image")
    rows = [r.columns for r in run.rows if r.seconds and r.columns.keys() >= set(names)]
    if not rows:
        return []
    worst = max(abs(columns[names[0]] / columns[names[1]] - 1) for columns in rows)
    return [
        f"Bytes saved for backward, in {len(rows)} rows: the cost model is off by "
        f"{'less than 0.1%' if worst < 1e-3 else f'at most {worst:.1%}'} of what was measured."
    ]


@lru_cache
def cost_model(
    models: tuple[str, ...] = (shapes.SMALL, shapes.BASE, shapes.LARGE),
    prompts: tuple[int, ...] = (10, 50, 100, 200),
    batch: int = 64,
) -> str:
    """The cost model's step: FLOPs of ours as a share of official-style's, and MB saved."""
    ways = {"official": ("official", "keep"), "sdpa": ("sdpa", "keep")}
    ways |= {f"pae {memory}": ("pae", memory) for memory in cost.MEMORY}
    lines = [["", "FLOPs forward", "FLOPs of a step", *(f"saved: {way}" for way in ways)]]
    for model in models:
        shape = cost.Shape.named(model, num_classes=shapes.CLASSES)
        for count in prompts:
            ours, theirs = (cost.flops(shape, count, batch, m) for m in ("pae", "official"))
            shares = ours.forward / theirs.forward, ours.step / theirs.step
            saved = (cost.saved_bytes(shape, count, batch, *way) / batch for way in ways.values())
            cells = [*map(ratio, shares), *(f"{each / 1e6:.1f}" for each in saved)]
            lines.append([f"{label(model)}, {count} prompts", *cells])
    return markdown(lines)
