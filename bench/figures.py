"""How a figure of the evidence looks and how it is written. What is drawn is decided elsewhere.

`bench.report` calls every drawing function inside `style()`, so that no setting of the reader's
matplotlib gets in, and writes the result with `save`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pae.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by every eye, by what they stand for
COLOURS = {
    # ways to run a step
    "official": "#D55E00",
    "sdpa": "#E69F00",
    "compile": "#CC79A7",
    "pae": "#0072B2",
    "pae recompute8": "#56B4E9",
    "pae recompute": "#009E73",
    # arms of a study
    "plain": "#8A8A8A",
    "kld": "#E69F00",
    "mpa": "#009E73",
    "control": "#D55E00",
    # beside a measurement
    "model": "#333333",
}

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "pae",  # else every run gives other element names
    "svg.fonttype": "path",  # the same letters on a machine without the font
}
FORMATS = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's own defaults and the settings of this file, whatever the user has set."""
    from matplotlib import rc_context, rcParamsDefault

    defaults = {k: v for k, v in rcParamsDefault.items() if not k.startswith("backend")}
    with rc_context(defaults | _STYLE):
        yield


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A white figure of so many inches and its axes: light grid, no frame above and right.

    Returns:
        (Figure, Axes), or for several panels (Figure, array of Axes, shaped rows x columns as
        `Figure.subplots` shapes it). `options` go there, e.g. `sharey=True`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style():
        made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(made)
        axes = made.subplots(rows, columns, **options)
        for panel in made.axes:
            panel.grid(alpha=0.25, linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
    return made, axes


def save(drawn: Figure, path: str | Path, description: str = "") -> list[Path]:
    """Write `path`.svg and `path`.png, each in one step; the same figure gives the same bytes.

    Args:
        description: kept in the metadata of both, readable in the SVG's text.
    """
    written = []
    for suffix, metadata in FORMATS.items():
        target = Path(path).with_name(f"{Path(path).name}.{suffix}")
        options = {"format": suffix, "metadata": metadata | {"Description": description}}
        with style():
            write_atomically(target, lambda p, o=options: drawn.savefig(p, dpi=130, **o))
        written.append(target)
    return written
