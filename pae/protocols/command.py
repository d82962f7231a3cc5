"""``pae protocol NAME FOLDER``: the sweep of a protocol, as a file for ``pae sweep``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_HELP = """\
Writes the sweep of a protocol for the tasks in a folder: the published grid, the choice by
validation images, the final runs. How many runs that is stands on stderr.

  pae protocol vtab1k VTAB-1K/ --methods linear vpt-deep --model vit_base_patch16_224.orig_in21k \\
      --output vtab.toml
  pae sweep vtab.toml
  pae table sweeps/vtab
"""


def add(commands: Any) -> None:
    """The sub-command, among those of ``pae``."""
    parser = commands.add_parser(
        "protocol",
        help="the sweep of VTAB-1k, FGVC or few-shot, as a file",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, debug=False)
    parser.add_argument("protocol", choices=("vtab1k", "fgvc", "few-shot"))
    parser.add_argument("folder", metavar="FOLDER", help="that holds a folder for each task")
    parser.add_argument(
        "--methods",
        nargs="+",
        required=True,
        metavar="NAME",
        help="words of pae train --method, or names of published settings",
    )
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="default: all that are there")
    parser.add_argument("--shots", nargs="+", type=int, metavar="N", help="default: 1 2 4 8 16")
    parser.add_argument(
        "--grid",
        choices=("full", "coarse", "fixed"),
        default="full",
        help="as published (default; few-shot tunes nothing); 3 rates x 2 decays; one setting",
    )
    parser.add_argument("--model", metavar="NAME", help="of pae train")
    parser.add_argument("--output", metavar="FILE", help="where to write it; default: printed")


def run(arguments: argparse.Namespace) -> int:
    """Prints or writes the spec."""
    from pae.files import write_atomically
    from pae.protocols.spec import write_spec
    from pae.protocols.tasks import SHOTS

    options = {} if arguments.model is None else {"model": arguments.model}
    folder = Path(arguments.folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{arguments.folder}: no such folder")
    text, said = write_spec(
        arguments.protocol,
        folder,
        arguments.methods,
        grid=arguments.grid,
        tasks=arguments.tasks,
        shots=arguments.shots or SHOTS,
        options=options,
    )
    for line in said:
        print(f"pae: {line}", file=sys.stderr)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        output = Path(arguments.output).expanduser()
        write_atomically(output, lambda file: file.write_text(text, encoding="utf-8"))
        print(output)
    return 0
