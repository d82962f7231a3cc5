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
    parser.add_argument(
        "--write-draws",
        action="store_true",
        help="few-shot: write the images of every draw as lists of file names, annotations/ in "
        "each task's folder, from where they are read; then --methods may be left out",
    )
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
    if arguments.write_draws:
        _write_draws(arguments, folder)
        if arguments.methods is None:
            return 0
    if arguments.methods is None:
        raise ValueError("pae protocol needs --methods, whose runs the file lists")
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


def _write_draws(arguments: argparse.Namespace, root: Path) -> None:
    from pae.protocols.spec import chosen_tasks
    from pae.protocols.tasks import DRAWS, PROTOCOLS, SHOTS
    from pae.train.protocols import ANNOTATIONS, write_draws

    if arguments.protocol != "few-shot":
        raise ValueError(f"--write-draws is of protocol few-shot, not {arguments.protocol}")
    known = PROTOCOLS["few-shot"]
    for name, folder in chosen_tasks(known, root, arguments.tasks).items():
        new = write_draws(known.find(name), folder, arguments.shots or SHOTS, DRAWS)
        print(f"{folder / ANNOTATIONS}: {new} new files")
