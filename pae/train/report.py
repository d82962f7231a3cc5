"""What the user sees: a progress bar, one line per epoch, a table, and a picture of the curves."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from pae.files import write_atomically
from pae.train.scores import NAMES, metric_of, score_of

Advance = Callable[..., None]  # (steps=1, text=None): moves a progress bar


class Reporter:
    """Messages and progress on stderr, results on stdout; silent on all but the main process.

    Args:
        active: whether this process speaks at all.
        quiet: only results and warnings, no progress.
    """

    def __init__(self, active: bool = True, quiet: bool = False) -> None:
        from rich.console import Console

        self.active = active
        self.quiet = quiet
        self._console = Console(file=cast(Any, _Stream("stderr")), highlight=False)

    def say(self, text: str) -> None:
        """One line to stderr."""
        if self.active and not self.quiet:
            self._console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line to stderr, also where only results are wanted."""
        if self.active:
            self._console.print(f"warning: {text}", markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def warnings(self) -> Iterator[None]:
        """Where Python's warnings are `warn`'s: for the reader of a terminal, not of our code."""
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: self.warn(str(message))
            # PIL's do not name their file; `images.survey` says what they are about, and names it
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield

    def curves(
        self,
        path: Path,
        runs: Mapping[str, list[dict[str, Any]]],
        results: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> None:
        """`plot_curves`, but a picture that cannot be drawn costs a warning, not the run."""
        try:
            plot_curves(path, runs, results)
        except Exception as error:  # matplotlib raises whatever its parts raise
            reason = " ".join(str(error).split()) or type(error).__name__
            self.warn(f"{path} could not be drawn: {reason}")

    @contextlib.contextmanager
    def progress(self, text: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A bar of `total` steps; yields a function (advance=1, text=None)."""
        # a bar drawn into a file or a pipe is noise
        shown = self._console.is_terminal or _in_notebook(self._console)
        if not (self.active and not self.quiet and shown):
            yield lambda advance=1, text=None: None
            return
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(text, total=total, completed=done)
            yield lambda advance=1, text=None: bar.update(task, advance=advance, description=text)

    def table(self, title: str, results: list[dict[str, Any]]) -> None:
        """Prints one row per result to stdout: what came out, and what it cost.

        Args:
            title: above the table.
            results: dicts with "name", "trained_parameters", "val_accuracy" and "test_accuracy" (or
                None; or the task's own score in their place), "seconds", and "passes",
                "mpa_passes", "mpa_seconds" (an older pae wrote none).
        """
        if not self.active:
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left", caption=_COSTS, caption_justify="left")
        table.add_column("method")
        # short enough for a terminal of 80 columns
        metric = metric_of(results[0])
        short = {"accuracy": "acc", "mean_iou": "mIoU"}.get(metric, metric)
        heads = (f"val {short}", f"test {short}", "trained", "passes", "seconds", "MPA s")
        for name in heads:
            table.add_column(name, justify="right")
        for result in results:
            for name, accuracy in zero_shot(result):
                table.add_row(name, "-", shown(accuracy), "0", "-", "-", "-")
            test, passes = score_of(result, "test"), result.get("passes")
            table.add_row(
                result["name"],
                shown(score_of(result)),
                shown(test),
                f"{result['trained_parameters']:,}",
                "-" if passes is None else f"{passes:,}",
                f"{result['seconds']:.1f}",
                f"{result['mpa_seconds']:.1f}" if result.get("mpa_passes") else "-",
            )
            for name, key in NEW_CLASSES.items():
                if key in result:
                    table.add_row(f"  {name}", "-", shown(result[key]), "", "-", "-", "-")
        Console(file=cast(Any, _Stream("stdout")), highlight=False).print(table)


# entries of a result of base-to-new evaluation
NEW_CLASSES = {"new classes": "new_accuracy", "harmonic mean": "harmonic_mean"}


def zero_shot(result: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Rows of what the model does without prompts, where a result has it: names and accuracies."""
    rows = [("zero-shot", "zero_shot_accuracy")]
    rows += [(f"  {name}", f"zero_shot_{key}") for name, key in NEW_CLASSES.items()]
    return [(name, result[key]) for name, key in rows if key in result]


_COSTS = (
    "trained: parameters. passes: images through the backbone, a training image twice, forward and "
    "backward (thrice where weights learn). seconds: on this machine, loading, validation, test "
    "and MPA included"
)


def shown(accuracy: float | None) -> str:
    """For people; a dash where there were no images to measure it by."""
    return "-" if accuracy is None else f"{accuracy:.3f}"


def _in_notebook(console: Any) -> bool:
    """Whether rich can move a bar in a notebook, which needs ipywidgets."""
    return console.is_jupyter and find_spec("ipywidgets") is not None


class _Stream:
    """sys.stderr or sys.stdout as it is now, for a run that does not end because nobody listens."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(sys, self._name), attribute)

    def write(self, text: str) -> int:
        """Writes what the encoding has; nothing where a terminal hung up or a disk is full."""
        encoding = self.encoding or "utf-8"
        with contextlib.suppress(OSError, ValueError):
            getattr(sys, self._name).write(
                text.encode(encoding, "backslashreplace").decode(encoding)
            )
        return len(text)

    def flush(self) -> None:
        """As `write`."""
        with contextlib.suppress(OSError, ValueError):
            getattr(sys, self._name).flush()


def plot_curves(
    path: Path,
    runs: Mapping[str, list[dict[str, Any]]],
    results: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
    """Writes `draw_curves` as a PNG, atomically."""
    figure = draw_curves(runs, results)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def draw_curves(
    runs: Mapping[str, list[dict[str, Any]]], results: Mapping[str, Mapping[str, Any]]
) -> Any:
    """Training loss and validation accuracy (or the task's own score), a line per run, over axes
    that mean the same for all of them: training images seen, and seconds. A matplotlib `Figure`.

    A ring is the epoch that was kept, a star what it reached on test images.

    Args:
        runs: {name: rows of metrics}; rows carry "epoch", "train_loss", "val_accuracy" (or None),
            "seconds", and "images" (an older pae wrote none: then epochs are the axis).
        results: {name: what `loop.train` returned}, of runs that have finished.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global pyplot state
    counted = all("images" in row for rows in runs.values() for row in rows)
    seen, axis = ("images", "training images seen") if counted else ("epoch", "epoch")
    metric = next((metric_of(row) for rows in runs.values() for row in rows), "accuracy")
    score, measure = f"val_{metric}", NAMES.get(metric, metric)
    panels = (
        (seen, "train_loss", axis, "training loss"),
        (seen, score, axis, f"validation {measure}"),
        ("seconds", score, "seconds, validation included", f"validation {measure}"),
    )
    for axes, (x, y, below, title) in zip(figure.subplots(1, 3), panels):
        for number, (name, rows) in enumerate(runs.items()):
            colour = f"C{number}"
            rows = [row for row in rows if row[y] is not None]
            places = [row[x] for row in rows]
            axes.plot(places, [row[y] for row in rows], color=colour, marker=".", label=name)
            result = results.get(name, {})
            kept = [row for row in rows if row["epoch"] == result.get("best_epoch")]
            if y == score:
                style = {"color": colour, "markeredgecolor": "black", "linestyle": "none"}
                for row in kept:
                    axes.plot(row[x], row[y], marker="o", markersize=9, fillstyle="none", **style)
                test = result.get(f"test_{metric}")
                if test is not None and rows:
                    place = kept[0][x] if kept else places[-1]
                    axes.plot(place, test, marker="*", markersize=11, **style)
        axes.set_xlabel(below)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlim(left=0)
        axes.ticklabel_format(axis="x", style="plain")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    first, second, _ = figure.axes
    if len(runs) > 1 or results:
        first.legend(frameon=False)
    if results:
        grey: dict[str, Any] = {"color": "grey", "markeredgecolor": "black", "linestyle": "none"}
        ring: dict[str, Any] = {
            "marker": "o",
            "markersize": 9,
            "fillstyle": "none",
            "label": "kept epoch",
        }
        star: dict[str, Any] = {"marker": "*", "markersize": 11, "label": f"its test {measure}"}
        tested = any(result.get(f"test_{metric}") is not None for result in results.values())
        marks = [Line2D([], [], **mark, **grey) for mark in (ring, star)[: 1 + tested]]
        second.legend(handles=marks, frameon=False, loc="lower right")
    return figure
