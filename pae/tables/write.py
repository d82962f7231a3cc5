"""A table as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable

from pae.tables.build import Cell, Row, Table

_COSTS: tuple[tuple[str, Callable[[Row], float | None], Callable[[float], str]], ...] = (
    ("trained parameters", lambda row: row.parameters, lambda value: _count(value)),
    ("without the head", lambda row: row.without_head, lambda value: _count(value)),
    ("seconds", lambda row: row.seconds, lambda value: f"{value:,.0f}"),
    ("memory, MB", lambda row: row.memory_mb, lambda value: f"{value:,.0f}"),
)


def _count(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 99_500 else f"{value / 1e3:.1f} k"


def _costs(table: Table) -> list[tuple[str, list[str]]]:
    """The columns of costs that any row has: (title, a text per row)."""
    found = []
    for title, ask, show in _COSTS:
        values = [ask(row) for row in table.rows]
        if any(value is not None for value in values):
            found.append((title, ["" if value is None else show(value) for value in values]))
    return found


def _titles(table: Table) -> list[str]:
    return [table.titles.get(column, column) for column in [*table.columns, *table.means]]


def _grid(table: Table, show: Callable[[Cell | None], str]) -> list[list[str]]:
    """One list of texts per row, costs included, its label apart."""
    costs = _costs(table)
    return [
        [show(row.cells.get(column)) for column in [*table.columns, *table.means]]
        + [texts[number] for _, texts in costs]
        for number, row in enumerate(table.rows)
    ]


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown, its title above and its notes below."""

    def show(cell: Cell | None) -> str:
        if cell is None:
            return "-"
        width = "" if cell.half_width is None else f" ± {cell.half_width:.1f}"
        text = f"{cell.mean:.1f}{width}{_few(table, cell)}"
        return f"**{text}**" if cell.bold else text

    titles = [_plain_markdown(title) for title in _titles(table)]
    header = ["method", *titles, *(title for title, _ in _costs(table))]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for row, texts in zip(table.rows, _grid(table, show), strict=True):
        lines.append(_line([_marked(row.label, row.marks), *texts]))
    notes = "\n".join(f"- {_plain_markdown(note)}" for note in table.notes)
    return f"**{_plain_markdown(table.title)}**\n\n" + "\n".join(lines) + f"\n\n{notes}\n"


def _few(table: Table, cell: Cell) -> str:
    """How many seeds a cell has, where others have more."""
    most = max(len(c.seeds) for row in table.rows for c in row.cells.values())
    return f" (n={len(cell.seeds)})" if cell.seeds and len(cell.seeds) < most else ""


def _marked(label: str, marks: list[str]) -> str:
    return _plain_markdown(label) + "".join(f"<sup>{mark}</sup>" for mark in marks)


def _line(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _plain_markdown(text: str) -> str:
    """A name as it is, in which nothing is emphasis, HTML or the end of a cell."""
    return re.sub(r"([\\*`<|])", r"\\\1", _plain(text))


def _plain(text: str) -> str:
    return " ".join(text.split())


_SPECIAL = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",  # other characters in TeX's own fonts
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
}


_PDFLATEX = 0x180  # from here on, most characters need another LaTeX than that
_WIDE = 8  # columns that a text of one column has room for


def _tex(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in _plain(text))


def _guarded(text: str) -> str:
    r"""For the start of a row: \\ before it would take [ and * as its own."""
    return f"{{}}{text}" if text.startswith(("[", "*")) else text


def latex(table: Table) -> str:
    r"""A floating table for LaTeX with package booktabs, its notes in the caption. A wide one is
    over both columns of a page, if it has two, and set as small as their width asks.
    """

    def show(cell: Cell | None) -> str:
        if cell is None:
            return "--"
        width = "" if cell.half_width is None else rf" {{\scriptsize$\pm${cell.half_width:.1f}}}"
        text = f"{cell.mean:.1f}"
        return (rf"\textbf{{{text}}}" if cell.bold else text) + width + _few(table, cell)

    costs = _costs(table)
    titles = ["method", *_titles(table), *(title for title, _ in costs)]
    slanted = [_tex(titles[0]), *(rf"\rotatebox{{90}}{{{_tex(title)}}}" for title in titles[1:])]
    wide = len(titles) > _WIDE
    float_ = "table*" if wide else "table"
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        rf"\begin{{{float_}}}",
        r"\centering",
        rf"\caption{{{_tex(table.title)}. {_tex(' '.join(table.notes))}}}",
        *([r"\resizebox{\textwidth}{!}{%"] if wide else []),
        rf"\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}",
        r"\toprule",
        f"{' & '.join(slanted)} \\\\",
        r"\midrule",
    ]
    grid, began = _grid(table, show), False
    for row, texts in zip(table.rows, grid, strict=True):
        if row.published and not began:
            began = True
            lines.append(r"\midrule")
        label = _guarded(_tex(row.label)) + "".join(rf"$^{{{_tex(mark)}}}$" for mark in row.marks)
        lines.append(f"{' & '.join([label, *texts[: len(texts) - len(costs)]])}"
                     + "".join(f" & {_tex(t)}" for t in texts[len(texts) - len(costs):])
                     + r" \\")  # fmt: skip
    end = r"\end{tabular}}" if wide else r"\end{tabular}"
    text = "\n".join([*lines, r"\bottomrule", end, rf"\end{{{float_}}}"]) + "\n"
    if foreign := sorted({c for c in text if ord(c) >= _PDFLATEX}):
        text = f"% lualatex or xelatex, with a font that has {' '.join(foreign)}\n{text}"
    return text


_CSV = (
    *("method", "column", "kind", "mean", "half_width", "sd", "n", "seeds", "bold", "source"),
    *("trained_parameters", "without_head", "seconds", "memory_mb"),
)


def long_csv(table: Table) -> str:
    """One line per row and column: mean, half-width, standard deviation, seeds, best or not."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for row in table.rows:
        for column in [*table.columns, *table.means]:
            cell = row.cells.get(column)
            if cell is None:
                continue
            several = len(cell.values) > 1
            writer.writerow(
                [
                    row.label,
                    column,
                    "mean" if column in table.means else "task",
                    round(cell.mean, 4),
                    "" if cell.half_width is None else round(cell.half_width, 4),
                    round(statistics.stdev(cell.values), 4) if several else "",
                    len(cell.seeds) or "",
                    " ".join(map(str, cell.seeds)),
                    "yes" if cell.bold else "",
                    cell.source or "",
                    *(
                        "" if value is None else round(value, 3)
                        for value in (row.parameters, row.without_head, row.seconds, row.memory_mb)
                    ),
                ]
            )
    return text.getvalue()


FORMATS: dict[str, Callable[[Table], str]] = {
    "markdown": markdown,
    "csv": long_csv,
    "latex": latex,
}
