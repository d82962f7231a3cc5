"""``pae sweep``: many runs from one file. Imports no more than the parser needs."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pae.sweep.plan import Run
    from pae.sweep.records import Records
    from pae.sweep.spec import Sweep

SOME_FAILED = 1  # exit status: everything has a record, and some say why nothing came out
TOO_EARLY = 3  # of --index: the runs that choose its cell have not all ended
_HELP = """\
Trains every run that a file asks for: grids and draws over any option of pae train, seeds, tasks,
methods. What has been done is known from one record a run; a second call does what is missing.

  pae sweep lrs.toml --dry-run            how many runs, and which
  pae sweep lrs.toml                      all of them, one after the other, in sweeps/lrs
  pae sweep lrs.toml --jobs 4             four at a time
  pae sweep lrs.toml --status             how far it is, and what failed
  pae sweep lrs.toml --list               the runs as plain lines, numbered, for a job array
  pae sweep lrs.toml --index 17           run 17 of them
  pae sweep lrs.toml --ray auto           on a Ray cluster (pip install "pae[sweep]")
  pae table sweeps/lrs                    the table
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command, among the others."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sweep",
        usage="pae sweep SPEC [options]",
        help="many runs from one file: grids, draws, seeds, tasks, methods",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("spec", metavar="SPEC", help="a TOML file; docs/sweeps.md says what it holds")
    add("--output", metavar="FOLDER", help="folder of the sweep (default: sweeps/<name of SPEC>)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the runs, and start none")
    what.add_argument("--status", action="store_true", help="print how far it is")
    what.add_argument("--list", action="store_true", help="print number, key and what is known")
    what.add_argument("--index", metavar="N", help="only run N, or N-M, as --list numbers them")
    what.add_argument("--jobs", metavar="N", help="runs at a time, a process each (default: 1)")
    what.add_argument("--ray", metavar="ADDRESS", help="on a Ray cluster: local, auto, HOST:PORT")
    what.add_argument("--worker", metavar="N", help=argparse.SUPPRESS)  # of --jobs
    add("--run-cpus", metavar="N", help="with --ray: CPUs of a run (default: 1)")
    add("--run-gpus", metavar="X", help="with --ray: GPUs of a run (default: 1 if there are some)")
    add("--retry", action="store_true", help="start again what diverged, failed or was stopped")
    add("--quiet", action="store_true", help="print no progress")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("pae sweep starts its own processes: leave accelerate launch out")
    from pae.sweep import progress
    from pae.sweep.records import BULKY, Records
    from pae.sweep.spec import read_spec, rehearse

    def tell(count: int) -> None:
        if not arguments.quiet:
            print(f"{arguments.spec}: {count} runs so far", file=sys.stderr, flush=True)

    sweep = read_spec(arguments.spec, tell)
    folder = Path(arguments.output or Path("sweeps") / sweep.plan.name).expanduser()
    records = Records(folder, BULKY)
    if arguments.status:
        print("\n".join(progress.report(sweep.plan, records)))
        return 0
    if arguments.list:
        return _list(sweep, records)
    if arguments.dry_run:
        rehearse(sweep)
        return _dry_run(sweep, records)
    return _work(sweep, records, arguments)


def _work(sweep: Sweep, records: Records, arguments: argparse.Namespace) -> int:
    from pae.files import check_writable
    from pae.sweep import execute, progress, spec, work
    from pae.sweep.records import FINISHED
    from pae.train import loop

    def say(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr, flush=True)

    def count(name: str) -> int:
        value = getattr(arguments, name)
        if not re.fullmatch(r"[1-9]\d{0,4}", value):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {value}: expected an integer of at least 1")
        return int(value)

    if sweep.asha is not None and arguments.ray is None:
        raise ValueError(f"{sweep.path}: [asha] needs --ray ADDRESS, whose scheduler it is")
    for name in ("run_cpus", "run_gpus"):
        if getattr(arguments, name) is not None and arguments.ray is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --ray ADDRESS")
    run_cpus = 1 if arguments.run_cpus is None else count("run_cpus")
    run_gpus = None
    if arguments.run_gpus is not None:
        if not re.fullmatch(r"\d{1,3}(\.\d+)?", arguments.run_gpus):
            raise ValueError(f"--run-gpus {arguments.run_gpus}: expected a number of at least 0")
        run_gpus = float(arguments.run_gpus)
    reporter = work.Quiet(arguments.quiet)
    worker = arguments.worker is not None
    jobs = count("jobs") if arguments.jobs is not None else 1
    with reporter.warnings(), loop.handled(loop.interrupt):
        numbered = None
        if arguments.index is not None:
            numbered = _numbered(sweep, records, arguments.index)
            if numbered is None:
                return TOO_EARLY
        if not worker:
            check_writable(records.folder, arguments.output, folder=True)
            spec.rehearse(sweep, None if numbered is None else {run.key for run in numbered})
            sweep.plan.write(records.folder)
            wanted = list(sweep.plan.runs(records)) if numbered is None else numbered
            if arguments.retry:
                again = sum(work.retry(records, run.key) for run in wanted)
                say(f"{again} runs start again")
            say(progress.announcement(sweep.plan))
            for note in sweep.notes:
                say(note)
            if foreign := sum(key not in sweep.options for key in records):
                what = progress.plural("record", foreign)
                say(
                    f"{records.folder}: {foreign} {what} of settings that {sweep.path.name} does "
                    "not ask for: left alone, and in no table of it"
                )
            say(f"{progress.progress(sweep.plan, records).line(jobs)}; {records.folder}")
        try:
            if arguments.ray is not None:
                from pae.sweep import on_ray

                place = sweep, records.folder, run_cpus, run_gpus
                with contextlib.closing(on_ray.Ray(arguments.ray, *place)) as engine:
                    on_ray.run(sweep, records, engine, say)
            elif worker:
                execute.worker(sweep, records, reporter, count("worker"), sys.stdin.fileno())
            elif jobs > 1:
                command = [sys.executable, "-m", "pae", "sweep", arguments.spec, "--quiet"]
                command += ["--output", str(records.folder), "--worker"]
                execute.processes(sweep, records, jobs, command, say)
            else:
                execute.serial(sweep, records, reporter, say, numbered)
        except (loop.Interrupted, KeyboardInterrupt):
            if not worker:
                left = progress.progress(sweep.plan, records)
                say(f"pae: interrupted; {left.line(jobs)}; the same command goes on")
            return 130
    if worker:
        return 0
    records.refresh()
    wanted = list(sweep.plan.runs(records)) if numbered is None else numbered
    wanted = list({run.key: run for run in wanted}.values())
    failed = [run for run in wanted if records[run.key]["status"] != FINISHED]
    for run in failed:
        print(f"{run}: {progress.outcome(records[run.key])}", file=sys.stderr)
    if numbered is None:
        print(f"{records.folder}: {len(wanted) - len(failed)} of {len(wanted)} runs finished")
    return SOME_FAILED if failed else 0


def _numbers(sweep: Sweep) -> tuple[list[Run], list[tuple[int, int]]]:
    """The runs of the grid, and the places (group, seed) of those of the chosen cells, in order.

    These are all there can be, so a number means the same whatever has been done.
    """
    plan = sweep.plan
    grid = [run for group in plan.groups for run in plan.grid(group)]
    finals = []
    for number, group in enumerate(plan.groups):
        cells = len(group.cells) if plan.select == "none" else 1
        finals += [(number, place) for place in range(cells * len(plan.seeds))]
    return grid, finals


def _numbered(sweep: Sweep, records: Records, text: str) -> list[Run] | None:
    """The runs that --index names; None, and a line, if they are not known yet."""
    grid, finals = _numbers(sweep)
    total = len(grid) + len(finals)
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not first <= last < total:
        raise ValueError(f"--index {text}: expected N or N-M within 0..{total - 1}, as --list says")
    runs = grid[first : last + 1]
    for number in range(max(first, len(grid)), last + 1):
        group, place = finals[number - len(grid)]
        chosen = sweep.plan.finals(sweep.plan.groups[group], records)
        if chosen is None:
            where = sweep.plan.groups[group]
            open_ = sum(run.key not in records for run in sweep.plan.grid(where))
            why = f"{open_} runs of its grid have no record yet" if open_ else "none has finished"
            print(
                f"pae: run {number} is of the cell that is chosen for {where.task}, "
                f"{where.method}, and {why}",
                file=sys.stderr,
            )
            return None
        runs.append(chosen[place])
    return runs


def _list(sweep: Sweep, records: Records) -> int:
    grid, finals = _numbers(sweep)
    if grid:
        print(f"# 0-{len(grid) - 1}: the grid")
    for number, run in enumerate(grid):
        print(f"{number}\t{run.key}\t{_state(run, records)}\t{run}")
    if grid:
        print(f"# {len(grid)}-{len(grid) + len(finals) - 1}: the chosen cells, after the grid")
    for number, (group, place) in enumerate(finals, len(grid)):
        known = sweep.plan.finals(sweep.plan.groups[group], records)
        where = sweep.plan.groups[group]
        if known is None:
            seed = sweep.plan.seeds[place % len(sweep.plan.seeds)]
            print(f"{number}\t-\topen\t{where.task}, {where.method}, chosen cell, seed {seed}")
        else:
            run = known[place]
            print(f"{number}\t{run.key}\t{_state(run, records)}\t{run}")
    return 0


def _state(run: Run, records: Records) -> str:
    return records[run.key]["status"] if run.is_done(records) else "missing"


def _dry_run(sweep: Sweep, records: Records) -> int:
    from pae.sweep import progress

    print(progress.announcement(sweep.plan))
    for note in sweep.notes:
        print(note)
    for run in sweep.plan.runs(records):
        print(f"{run.key}  {_state(run, records):8}  {run}{', test' if run.test else ''}")
    open_ = [g for g in sweep.plan.groups if sweep.plan.finals(g, records) is None]
    for group in open_:
        print(f"{'-' * 12}  open      {group.task}, {group.method}, the chosen cell, test")
    print(progress.progress(sweep.plan, records).line())
    return 0
