"""Runs into rows and columns, and what must be said below them.

A row is a method, a column a task. Runs of one method and task differ in their seed alone: whatever
else differs between them becomes part of the method's name. What should be the same over the rows
(images, backbone, size, epochs, ...) is compared: other test images or other weights under one name
are refused, everything else is said in the caption.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pae.protocols.tasks import PROTOCOLS, Protocol, few_shot, protocol_of
from pae.tables import intervals, published
from pae.tables.collect import Run

ENOUGH_TASKS = 5  # for a bootstrap over tasks
_FIRST = ("full", "linear")  # rows that stand above the others, as in papers


@dataclass
class Cell:
    """A mean over runs, in per cent, and what it is a mean of.

    `source` marks a number that somebody published.
    """

    values: tuple[float, ...]
    seeds: tuple[str, ...] = ()
    half_width: float | None = None
    bold: bool = False
    source: str | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


@dataclass
class Row:
    """One method; `cells` by column."""

    label: str
    cells: dict[str, Cell] = field(default_factory=dict)
    parameters: float | None = None  # trained, a mean over tasks
    without_head: float | None = None
    seconds: float | None = None  # of a run, a mean
    memory_mb: float | None = None  # the largest of its runs
    marks: list[str] = field(default_factory=list)
    published: bool = False


@dataclass
class Table:
    """Columns in order, rows, and notes for below.

    `means` are the columns that are means over tasks; `titles` what columns are called.
    """

    title: str
    columns: list[str]
    rows: list[Row]
    notes: list[str]
    means: list[str]
    titles: dict[str, str]


RANDOM = "random (pretrained off), others for every seed"

# (what it is called, how to ask a run): equal in all rows of a comparison that means something
_EQUAL: tuple[tuple[str, Callable[[Run], Any]], ...] = (
    ("backbone", lambda run: (run.facts.get("backbone") or {}).get("name")
     or run.settings.get("model")),
    ("weights", lambda run: RANDOM if run.settings.get("pretrained") is False else None),
    ("image size", lambda run: run.facts.get("image_size") or run.settings.get("img_size")),
    ("training images", lambda run: (run.facts.get("task") or {}).get("train")),
    ("validation images", lambda run: (run.facts.get("task") or {}).get("val")),
    ("trained on", lambda run: run.settings.get("train_on")),
    ("epochs", lambda run: run.settings.get("epochs")),
    ("batch size", lambda run: run.settings.get("batch_size")),
    ("augmentation", lambda run: run.settings.get("augment")),
    ("normalisation", lambda run: run.settings.get("norm")),
    ("resize", lambda run: run.settings.get("interpolation")),
    ("pixels", lambda run: run.facts.get("pixels")),
    ("test of the", lambda run: run.result.get("tested")),
    ("settings chosen by the", lambda run: run.facts.get("chosen")),
    ("runs stopped early by", lambda run: run.facts.get("scheduler")),
    ("pae", lambda run: (run.facts.get("versions") or {}).get("pae")),
)  # fmt: skip


def build(
    runs: Sequence[Run],
    *,
    split: str = "test",
    baseline: str | None = None,
    protocol: str | None = None,
    failed: Sequence[str] = (),
    missing: Sequence[str] = (),
    beside: Sequence[str] | None = None,
) -> Table:
    """The table of `runs`.

    Args:
        runs: finished ones, at least one.
        split: whose accuracy, "test" or "val".
        baseline: the label of the row that the others are compared with, task by task.
        protocol: whose groups the tasks are averaged in; by default found by their names.
        failed: runs that diverged or failed, in words, which a reader must know of.
        missing: what is still to come, in words; then this is no result yet.
        beside: methods whose published numbers stand below the rows, all with (); None for none.
    Raises:
        ValueError: runs that cannot stand in one table; the message names two of them.
    """
    names = _names(runs)
    cells: dict[tuple[str, str], list[Run]] = {}
    for run, name in zip(runs, names, strict=True):
        cells.setdefault((name, run.task), []).append(run)
    tasks, chosen = _order({run.task for run in runs}, protocol)
    for (name, task), found in cells.items():
        _check_seeds(name, task, found)
    for task in tasks:
        _check_column(task, [run for (_, t), found in cells.items() if t == task for run in found])
    order = sorted(dict.fromkeys(names), key=lambda name: not name.startswith(_FIRST))
    rows = [_row(name, tasks, cells, split) for name in order]
    for task in tasks:
        _embolden(rows, task)
    if beside is not None and split != "test":
        raise ValueError("--published: numbers are known of test images, and this is of validation")
    foreign = [] if beside is None else _published(runs, chosen, tasks, beside)
    rows += [row for row, _ in foreign]
    columns, titles = list(tasks), dict[str, str]()
    means = _add_means(rows, tasks, chosen, titles)
    for row, reported in foreign:
        for column, value in reported.items():  # as printed: ours come from rounded tasks
            if column in row.cells:
                row.cells[column] = Cell((value,), source=row.cells[column].source)
    notes = _notes(runs, [r for r in rows if not r.published], names, tasks, means, titles, split)
    notes += _about_published([row for row in rows if row.published])
    if failed:
        notes.append(f"Without a result (diverged, failed or stopped), runs: {len(failed)}.")
    if missing:
        notes.append(f"Not finished; still to come: {'; '.join(missing)}.")
    if baseline is not None:
        notes += _beside(rows, tasks, baseline)
    title = chosen.title if chosen else ", ".join(tasks[:6]) + (", ..." if len(tasks) > 6 else "")
    what = "test accuracy" if split == "test" else "validation accuracy, which choices were made by"
    return Table(f"{title}: {what}, %", columns, rows, notes, means, titles)


# ---- rows


def _names(runs: Sequence[Run]) -> list[str]:
    """What each run's method is called: its label, and the settings that differ within a cell."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        cells.setdefault((run.label, run.task), []).append(run.method_settings())
    differing: dict[str, set[str]] = {}
    for (label, _), found in cells.items():
        options = {name for settings in found for name in settings}
        own = {o for o in options if len({_text(s.get(o)) for s in found}) > 1}
        differing.setdefault(label, set()).update(own)
    names = []
    for run in runs:
        settings = run.method_settings()
        more = [f"{o} {_text(settings.get(o))}" for o in sorted(differing[run.label])]
        names.append(f"{run.label} ({', '.join(more)})" if more else run.label)
    return names


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _row(
    name: str, tasks: Sequence[str], cells: Mapping[tuple[str, str], list[Run]], split: str
) -> Row:
    row = Row(name)
    found: list[Run] = []
    for task in tasks:
        runs = sorted(cells.get((name, task), []), key=lambda run: run.order)
        if runs:
            values = tuple(run.accuracy(split) for run in runs)
            seeds = tuple(run.seed for run in runs)
            row.cells[task] = Cell(values, seeds, intervals.half_width(values))
            found += runs
    trained = [run.result.get("trained_parameters") for run in found]
    heads = [run.result.get("head_parameters") for run in found]
    row.parameters = _mean(trained)
    if None not in heads:
        row.without_head = _mean([a - b for a, b in zip(trained, heads) if a is not None])
    row.seconds = _mean([run.result.get("seconds") for run in found])
    memory = [value for run in found if (value := run.result.get("memory_mb")) is not None]
    row.memory_mb = max(memory) if len(memory) == len(found) else None
    return row


def _mean(values: Iterable[Any]) -> float | None:
    values = list(values)
    return None if not values or None in values else statistics.fmean(values)


def _check_seeds(name: str, task: str, runs: list[Run]) -> None:
    by_seed: dict[tuple[Any, Any], Run] = {}
    for run in runs:
        seeds = (run.seed, run.settings.get("split_seed"))
        if seeds in by_seed:
            raise ValueError(
                f"{by_seed[seeds].path} and {run.path}: two runs of {name} on {task} with seed "
                f"{run.seed}; leave one out"
            )
        by_seed[seeds] = run


def _check_column(task: str, runs: list[Run]) -> None:
    """Raises ValueError where the runs of a task cannot be compared at all."""
    first = runs[0]
    for run in runs[1:]:
        for what, ask in (
            ("test images", lambda run: run.digest("test")),
            ("classes", lambda run: (run.facts.get("task") or {}).get("classes")),
        ):
            was, now = ask(first), ask(run)
            if was is not None and now is not None and was != now:
                raise ValueError(
                    f"{first.path} and {run.path}: other {what} of {task}; make a table of each"
                )
        drawn = [r.settings.get("pretrained") is False for r in (first, run)]
        if all(drawn) and first.settings.get("seed") != run.settings.get("seed"):
            continue  # by the seed: the caption says so
        was, now = (r.facts.get("backbone") or {} for r in (first, run))
        if was.get("name") == now.get("name") and was.get("fingerprint") != now.get("fingerprint"):
            raise ValueError(
                f"{first.path} and {run.path}: other weights of the backbone {now.get('name')}; "
                "make a table of each"
            )


def _embolden(rows: Sequence[Row], column: str) -> None:
    """Marks the best of a column where its interval against every other row excludes 0."""
    there = [row.cells[column] for row in rows if column in row.cells and not row.published]
    if len(there) < 2:
        return
    best = max(there, key=lambda cell: cell.mean)
    others = [cell for cell in there if cell is not best]
    best.bold = all(intervals.differs(best.values, c.values, len(others)) for c in others)


# ---- what others published


def _published(
    runs: Sequence[Run], protocol: Protocol | None, tasks: Sequence[str], methods: Sequence[str]
) -> list[tuple[Row, dict[str, float]]]:
    """Rows of the same benchmark and backbone, and the overall means that their texts print.

    Raises:
        ValueError: there are none for such runs; the message says what is another.
    """
    name = None if protocol is None else protocol.name
    if name not in ("vtab1k", "fgvc"):
        raise ValueError(
            f"--published: numbers are known for the tasks of vtab1k and fgvc, not for {tasks[0]}"
        )
    models = {(run.settings.get("model"), run.facts.get("image_size")) for run in runs}
    found = {published.setting(str(model), size) for model, size in models}
    where = found.pop() if len(found) == 1 else None
    if any(run.settings.get("pretrained") is False for run in runs):
        raise ValueError("--published: numbers are known of pretrained weights, not of random ones")
    if where is None:
        raise ValueError(
            "--published: numbers are known for vit_base_patch16_224.orig_in21k at 224 pixels, not "
            f"for {', '.join(f'{model} at {size}' for model, size in sorted(models, key=str))}"
        )
    rows = []
    for each in published.rows(name, where, methods or None):
        row = Row(f"{each.label} (published)", published=True, marks=[each.source])
        row.cells = {
            t: Cell((each.tasks[t],), source=each.source) for t in tasks if t in each.tasks
        }
        kinds = {"groups": "mean_groups", "tasks": "mean_tasks", "five": "mean_tasks"}
        rows.append((row, {kinds[kind]: value for kind, value in each.overall.items()}))
    return rows


def _about_published(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    names = dict.fromkeys(mark for row in rows for mark in row.marks)
    listed = [f"{name}: {': '.join(published.sources()[name])}" for name in names]
    return [
        "Published rows enter no comparison: their pixels, normalisation and way of choosing are "
        "not those of the others, and mostly not stated.",
        *listed,
    ]


# ---- means over tasks


def _order(tasks: set[str], protocol: str | None) -> tuple[list[str], Protocol | None]:
    shots = few_shot(tasks)
    chosen = PROTOCOLS[protocol] if protocol and not shots else shots or protocol_of(tasks)
    if chosen is None:
        return sorted(tasks), None
    known = [task.name for task in chosen.tasks]
    if foreign := sorted(tasks - set(known)):
        raise ValueError(f"{foreign[0]}: no task of {chosen.name}; leave its runs out")
    return [name for name in known if name in tasks], chosen


def mean_columns(protocol: Protocol | None, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """{column: tasks it is the mean of}, groups first, without the mean of groups."""
    if protocol is None:
        return {"mean_tasks": tuple(tasks)} if len(tasks) > 1 else {}
    groups = protocol.groups()
    found = groups if len(groups) > 1 else {}
    return {**found, "mean_tasks": tuple(task.name for task in protocol.tasks)}


def mean_titles(protocol: Protocol | None, tasks: Sequence[str]) -> dict[str, str]:
    """What the columns of means are called: never "average" alone, for there are two."""
    count = len(protocol.tasks) if protocol else len(tasks)
    titles = {"mean_tasks": f"mean of {count} tasks"}
    if protocol is not None and len(protocol.groups()) > 1:
        groups = protocol.groups()
        titles["mean_groups"] = f"mean of {len(groups)} groups"
        titles.update({name: f"{name} ({len(own)})" for name, own in groups.items()})
    return titles


def _add_means(
    rows: Sequence[Row], tasks: Sequence[str], protocol: Protocol | None, titles: dict[str, str]
) -> list[str]:
    """Adds the means over tasks to every row that has all of them; returns their columns."""
    wanted = mean_columns(protocol, tasks)
    if protocol is not None and len(wanted["mean_tasks"]) < 2:
        return []
    titles.update(mean_titles(protocol, tasks))
    grouped = {c: names for c, names in wanted.items() if c != "mean_tasks"}
    added = []
    for column, names in wanted.items():
        for row in rows:
            if cell := _mean_cell([row.cells.get(name) for name in names]):
                row.cells[column] = cell
        if any(column in row.cells for row in rows):
            added.append(column)
            _embolden_mean(rows, column, names)
    if grouped:
        for row in rows:
            if cell := _mean_cell([row.cells.get(group) for group in grouped]):
                row.cells["mean_groups"] = cell
        if any("mean_groups" in row.cells for row in rows):
            added.insert(len(added) - 1, "mean_groups")
            _embolden_mean(rows, "mean_groups", wanted["mean_tasks"], list(grouped.values()))
    return added


def _mean_cell(cells: Sequence[Cell | None]) -> Cell | None:
    """The mean of cells: a mean per seed first where all have the same seeds."""
    there = [cell for cell in cells if cell is not None]
    if not there or len(there) < len(cells):
        return None
    source = there[0].source
    if len({cell.seeds for cell in there}) == 1:
        values = tuple(statistics.fmean(each) for each in zip(*(cell.values for cell in there)))
        return Cell(values, there[0].seeds, intervals.half_width(values), source=source)
    return Cell((statistics.fmean(cell.mean for cell in there),))


def _embolden_mean(
    rows: Sequence[Row],
    column: str,
    tasks: Sequence[str],
    groups: Sequence[Sequence[str]] | None = None,
) -> None:
    """Marks the best mean where the bootstrap over tasks against every other row excludes 0.

    In a mean of groups a task counts by its share of it.
    """
    if len(tasks) < ENOUGH_TASKS:
        return
    there = [row for row in rows if column in row.cells and not row.published]
    if len(there) < 2:
        return
    best = max(there, key=lambda row: row.cells[column].mean)
    weight = dict.fromkeys(tasks, 1.0)
    for group in groups or ():
        weight.update(dict.fromkeys(group, len(tasks) / (len(groups or ()) * len(group))))
    for row in there:
        if row is not best:
            gaps = [weight[t] * (best.cells[t].mean - row.cells[t].mean) for t in tasks]
            if intervals.over_tasks(gaps, len(there) - 1)[0] <= 0:
                return
    best.cells[column].bold = True


def _beside(rows: Sequence[Row], tasks: Sequence[str], baseline: str) -> list[str]:
    """One note per row: its mean gain over the baseline's row, and how many tasks it won."""
    base = next((row for row in rows if row.label == baseline), None)
    if base is None:
        known = ", ".join(row.label for row in rows)
        raise ValueError(f"--baseline {baseline}: expected one of the rows, {known}")
    notes, many, few = list[str](), False, False
    for row in rows:
        both = [t for t in tasks if t in row.cells and t in base.cells]
        if row is base or row.published or not both:
            continue
        gaps = [row.cells[t].mean - base.cells[t].mean for t in both]
        won, lost = (sum(1 for gap in gaps if sign * gap > 0) for sign in (1, -1))
        text = f"{row.label} beside {baseline}: {statistics.fmean(gaps):+.1f}"
        if len(gaps) >= ENOUGH_TASKS:
            low, high = intervals.over_tasks(gaps)
            text += f" points [{low:+.1f}, {high:+.1f}]"
            many = True
        else:
            pairs = [(row.cells[t].values, base.cells[t].values) for t in both]
            half = intervals.of_difference(pairs)
            text += " points" if half is None else f" ± {half:.1f} points"
            few |= half is not None
        if len(both) == 1:
            notes.append(f"{text} on {both[0]}.")
        else:
            notes.append(f"{text} over {len(both)} tasks, better on {won}, worse on {lost}.")
    if many:
        notes.append(
            "In brackets: 95 % interval of the mean difference, bootstrap over tasks, "
            f"{intervals.DRAWS:,} draws."
        )
    if few:
        notes.append(
            f"± of a difference over fewer than {ENOUGH_TASKS} tasks: half of Welch's 95 % "
            "interval over seeds; other tasks may differ by more."
        )
    return notes


# ---- notes


def _notes(
    runs: Sequence[Run],
    rows: Sequence[Row],
    names: Sequence[str],
    tasks: Sequence[str],
    means: Sequence[str],
    titles: Mapping[str, str],
    split: str,
) -> list[str]:
    notes = [_about_seeds(rows, tasks)]
    if len(rows) > 1:
        notes.append(_about_bold(rows, means))
    same, told = _compared(runs, names, [row.label for row in rows], tasks)
    if same:
        notes.append(f"The same for all: {', '.join(same)}.")
    notes += told
    if split == "test":
        notes += _about_selection(runs)
    notes += _about_splits(runs, names, tasks)
    if lacking := [row.label for row in rows if any(t not in row.cells for t in tasks)]:
        notes.append(f"Not on all tasks, so without means over them: {', '.join(lacking)}.")
    if "mean_groups" in means:
        notes.append(
            f"Two overall means that must not be mixed: {titles['mean_groups']} and "
            f"{titles['mean_tasks']}."
        )
    devices = sorted({str(run.facts.get("device")) for run in runs if run.facts.get("device")})
    if all(row.seconds is None and row.memory_mb is None for row in rows):
        return notes
    if len(devices) > 1:
        notes.append(f"Times and memory are of several machines: {'; '.join(devices)}.")
    elif devices:
        notes.append(f"Times and memory: {devices[0]}.")
    return notes


def _about_seeds(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    seeds = {row.cells[t].seeds for row in rows for t in tasks if t in row.cells}
    most = max(len(each) for each in seeds)
    if most == 1:
        return "One seed each: no interval can be given, and no difference is shown as one."
    listed = ", ".join(dict.fromkeys(s for each in seeds for s in each))
    same = f"Mean over seeds {listed}" if len(seeds) == 1 else f"Means over seeds among {listed}"
    return (
        f"{same}; ± is half of Student's 95 % interval of the mean over seeds (test images are "
        "fixed, and their own sampling error is not in it)"
        + (", none with one seed." if 1 in map(len, seeds) else ".")
    )


def _about_bold(rows: Sequence[Row], means: Sequence[str]) -> str:
    text = (
        "Bold: the best, where Welch's 95 % intervals of its differences to all other rows exclude "
        "0 together (Bonferroni)"
    )
    return text + ("; of means, bootstrap intervals over tasks." if means else ".")


def _compared(
    runs: Sequence[Run], names: Sequence[str], labels: list[str], tasks: Sequence[str]
) -> tuple[list[str], list[str]]:
    """(what is the same for all runs, one sentence for each thing that is not)."""
    same, told = [], []
    for what, ask in _EQUAL:
        by_cell: dict[str, dict[tuple[str, str], None]] = {}
        for run, name in zip(runs, names, strict=True):
            value = ask(run)
            if value is not None:
                by_cell.setdefault(_text(value), {})[name, run.task] = None
        if len(by_cell) == 1:
            same.append(f"{what} {next(iter(by_cell))}")
        if len(by_cell) < 2:
            continue
        of_tasks = {v: {task for _, task in cells} for v, cells in by_cell.items()}
        by_task = sum(map(len, of_tasks.values())) == len(set().union(*of_tasks.values()))
        order = list(tasks) if by_task else labels
        members = {
            value: sorted({cell[by_task] for cell in cells}, key=order.index)
            for value, cells in by_cell.items()
        }
        listed = "; ".join(
            f"{value} ({', '.join(own)})"
            for value, own in sorted(members.items(), key=lambda item: order.index(item[1][0]))
        )
        told.append(f"{'By task' if by_task else 'Differs'}: {what} {listed}.")
    return same, told


def _about_selection(runs: Sequence[Run]) -> list[str]:
    tested = {run.result.get("tested") for run in runs}
    if tested == {None}:
        return ["Tested: the epoch with the best validation accuracy."]
    return []


def _about_splits(runs: Sequence[Run], names: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """Whether rows, and seeds, were trained on the same images."""
    per_row: list[str] = []
    per_seed = False
    for task in tasks:
        own = [(n, run) for n, run in zip(names, runs) if run.task == task and run.digest("train")]
        by_seed: dict[str, set[str | None]] = {}
        for _, run in own:
            by_seed.setdefault(run.seed, set()).add(run.digest("train"))
        if any(len(found) > 1 for found in by_seed.values()):
            per_row.append(task)
        per_seed |= len({run.digest("train") for _, run in own}) > 1
    notes = []
    if per_row:
        notes.append(f"Differs: rows were trained on other images of {', '.join(per_row)}.")
    elif per_seed:
        notes.append("The seed also draws which images are trained on.")
    return notes
