"""``pae table RUNS...``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

FORMATS = ("markdown", "csv", "latex")
_SUFFIXES = {".md": "markdown", ".csv": "csv", ".tex": "latex"}
PROTOCOLS = ("vtab1k", "fgvc", "few-shot", "small-vtab")

HELP = """\
A table of finished runs: a row per method, a column per task, means and 95 % intervals over seeds.

  pae table runs/                                everything finished below runs/, as Markdown
  pae table runs/ --output table.tex             LaTeX; .csv and .md likewise
  pae table runs/ --baseline vpt-deep            and what each row gains over that one
"""


def add(commands: Any) -> None:
    """The sub-command, among those of ``pae``."""
    parser = commands.add_parser(
        "table",
        help="means and intervals of finished runs, as Markdown, CSV or LaTeX",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, debug=False)
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUNS",
        help="run folders, folders with such below them, folders of a sweep, or its records",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="default: by the suffix of --output, else markdown"
    )
    parser.add_argument("--output", metavar="FILE", help="where to write it; default: printed")
    parser.add_argument(
        "--split", choices=("test", "val"), help="default: test; val where no run has test images"
    )
    parser.add_argument("--baseline", metavar="ROW", help="compare every row with this one")
    parser.add_argument(
        "--published",
        nargs="*",
        metavar="METHOD",
        help="published numbers below, of these methods or of all, where tasks and backbone are "
        "the same",
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="whose groups the tasks are averaged in; default: found by their names",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints or writes the table; what was left out is said on stderr."""
    from pae.files import check_writable, write_atomically
    from pae.tables import write
    from pae.tables.build import build
    from pae.tables.collect import collect

    output = None if arguments.output is None else Path(arguments.output).expanduser()
    kind = arguments.format or (_SUFFIXES.get(output.suffix.lower()) if output else "markdown")
    if kind is None:
        raise ValueError(
            f"--output {arguments.output}: expected a name that ends in {', '.join(_SUFFIXES)}, or "
            "--format"
        )
    runs, beside = arguments.runs, arguments.published
    if not runs and beside:  # --published RUNS: what lies there is no method
        runs = [name for name in beside if os.path.lexists(os.path.expanduser(name))]
        beside = [name for name in beside if name not in runs]
    if not runs:
        raise ValueError("pae table needs RUNS, the folders of finished runs")
    if output is not None:
        check_writable(output, arguments.output)
    found = collect(runs)
    if found.unfinished:
        first = found.unfinished[0]
        with contextlib.suppress(OSError):
            print(
                f"pae: {len(found.unfinished)} unfinished runs left out, e.g. {first}",
                file=sys.stderr,
            )
    for line in (*(f"not there yet: {text}" for text in found.missing), *found.failed):
        print(f"pae: {line}", file=sys.stderr)
    split = arguments.split
    if split is None:
        tested = any(run.result.get("test_accuracy") is not None for run in found.runs)
        split = "test" if tested else "val"
        if not tested:
            print("pae: no run has test images, so this is of validation images", file=sys.stderr)
    table = build(
        found.runs,
        split=split,
        baseline=arguments.baseline,
        protocol=arguments.protocol,
        failed=found.failed,
        missing=found.missing,
        beside=beside,
    )
    text = write.FORMATS[kind](table)
    if output is None:
        sys.stdout.write(text)
    else:
        write_atomically(output, lambda file: file.write_text(text, encoding="utf-8"))
        print(output)
    return 0
