"""The commands after training: ``pae predict``, ``evaluate``, ``export`` and ``info``.

Options are declared here without torch, so that --help and a typing error cost nothing; what works
is in `using`, `evaluation` and `export`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pae import choices
from pae.files import check_writable
from pae.train.declared import add_arguments, from_arguments, option
from pae.train.options import DEVICES

if TYPE_CHECKING:
    import pae
    from pae.train.report import Reporter
    from pae.train.using import Loaded, Place

UNREAD = 1  # exit status: done, but some images could not be read
FORMATS = ("onnx", "torch-export")
WHICH = ("best", "last")

_model = partial(option, "model (what an older file does not say itself)")
_work = partial(option, "machine")
_images = partial(option, "images")
_out = partial(option, "result")


@dataclass(frozen=True)
class Use:
    """What every command takes that runs a model."""

    checkpoint: str = _model("best", "which file of a run's folder", choices=WHICH)
    model: str | None = _model(
        None,
        "the backbone: a timm name, hf-hub:NAME, local-dir:FOLDER, hf:NAME, open_clip:NAME/TAG",
        metavar="NAME",
        unset="as the file says",
    )
    weights: str | None = _model(
        None, "its file of weights, if it had one", metavar="FILE", unset="as the file says"
    )
    img_size: int | None = _model(
        None, "side of its images", low=1, high=16_384, unset="as the file says"
    )
    norm: str | None = _model(
        None, "normalisation", choices=choices.NORMS, unset="as the file says"
    )
    augment: str | None = _model(
        None, "the crop of its evaluation", choices=choices.AUGMENTS, unset="as the file says"
    )
    classes: str | None = _model(
        None,
        "a file with the name of a class a line, or names with commas; of two towers any names, "
        "which are told apart",
        metavar="NAMES",
        unset="as the file says",
    )
    device: str = _work("auto", "auto: the GPU if there is one", choices=DEVICES)
    batch_size: int = _work(32, "images per forward", low=1, high=10**6)
    workers: int = _work(2, "decoding threads", low=0, high=1024)
    quiet: bool = _work(False, "print the result only", negated=False)
    debug: bool = _work(False, "show tracebacks", negated=False)


@dataclass(frozen=True)
class Predict:
    """Of ``pae predict`` alone."""

    output: str | None = _out(
        None,
        "a CSV file: image, then class and probability of the --top best, then why an image could "
        "not be read; - is the standard output. Of a segmenter a folder, of masks and pictures",
        metavar="FILE",
        unset="lines for people",
    )
    top: int = _out(3, "how many classes per image", low=1, high=10**6)


@dataclass(frozen=True)
class Evaluate:
    """Of ``pae evaluate`` alone."""

    data: str | None = _images(None, "a folder, in any layout of pae train", metavar="FOLDER")
    image_column: str | None = _images(
        None, "of hf:NAME or TensorFlow Datasets: the column of the images", metavar="NAME"
    )
    label_column: str | None = _images(
        None, "of hf:NAME or TensorFlow Datasets: the column of the classes", metavar="NAME"
    )
    split: str | None = _images(
        None,
        "which of its splits",
        choices=("train", "val", "test"),
        unset="test, else val; all of class folders alone",
    )
    reduce_zero_label: bool = _images(
        False, "masks count from 1, and 0 is no class (as its run had it)", negated=False
    )
    output: str | None = _out(
        None,
        "a folder: evaluation.json, per_class.csv, confusion.csv, confusion.png, predictions.csv",
        metavar="FOLDER",
        unset="evaluation-DATA-SPLIT beside the checkpoint",
    )


@dataclass(frozen=True)
class Export:
    """Of ``pae export`` alone."""

    format: str = _out("onnx", "of the file", choices=FORMATS)
    output: str | None = _out(
        None, "the file", metavar="FILE", unset="beside the checkpoint, .onnx or .pt2"
    )


def add(commands: Any) -> None:
    """Adds the commands to the parser's."""
    run = "a run's folder, or a checkpoint"
    predict = commands.add_parser(
        "predict",
        usage="pae predict RUN IMAGES... [options]",
        help="what a trained model takes images for",
        description="Exit status 1: done, but some of the images could not be read.",
    )
    predict.add_argument("place", metavar="RUN", help=run)
    predict.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="files, folders (with all below), patterns; of a model of clips .npy files",
    )
    _finish(predict, _predict, Predict)
    evaluate = commands.add_parser(
        "evaluate",
        usage="pae evaluate RUN --data FOLDER [options]",
        help="accuracy, per class, and who is taken for whom, on labelled images",
        description="Exit status 1: done, but some of the images could not be read.",
    )
    evaluate.add_argument("place", metavar="RUN", help=run)
    _finish(evaluate, _evaluate, Evaluate)
    export = commands.add_parser(
        "export",
        usage="pae export RUN --format onnx|torch-export [options]",
        help="one file for other runtimes, checked on real images",
        description="From normalised images (B, C, H, W) to logits, with a free batch size.",
    )
    export.add_argument("place", metavar="RUN", help=run)
    export.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="IMAGES",
        help="files, folders, patterns: what it is checked on (default: images of the run)",
    )
    _finish(export, _export, Export)
    info = commands.add_parser("info", help="what a checkpoint holds, and what it was trained for")
    info.add_argument("place", metavar="FILE", help="a checkpoint, or a run's folder")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(run=_info, debug=False)


def _finish(parser: argparse.ArgumentParser, run: Any, own: type) -> None:
    parser.set_defaults(run=run, debug=False)
    add_arguments(parser, own, Use)


def _opened(arguments: argparse.Namespace, *needs: str) -> tuple[Use, Place, Loaded, Reporter]:
    """The model that the arguments name; `needs` as `using.require`."""
    use = Use(**from_arguments(Use, arguments))
    from pae.train import using
    from pae.train.options import resolve_device
    from pae.train.report import Reporter

    reporter = Reporter(True, use.quiet)
    place = using.find(arguments.place, use.checkpoint)
    if place.note:
        reporter.say(place.note)
    model = using.load(
        place.file,
        use.model,
        weights=use.weights,
        device=resolve_device(use.device),
        img_size=use.img_size,
        norm=use.norm,
        augment=use.augment,
        classes=None if use.classes is None else using.read_classes(use.classes),
    )
    using.require(place, model, *needs)
    return use, place, model, reporter


def _predict(arguments: argparse.Namespace) -> int:
    own = Predict(**from_arguments(Predict, arguments))
    import pae
    from pae.train import using
    from pae.train.evaluation import as_csv

    use, _, model, reporter = _opened(arguments, "transform", "classes")
    if isinstance(model, pae.PromptedSegmenter):
        return _segment(arguments.images, own, use, model, reporter)
    if own.output not in (None, "-"):
        check_writable(os.path.expanduser(str(own.output)), own.output)
    of_clips = using.frames_of(model) is not None
    files, others = using.expand(arguments.images, of_clips)
    if others:
        what = "other than .npy" if of_clips else "without a suffix of an image"
        reporter.say(f"{others} files {what} are left out")
    classes = model.classes or ()
    rows: list[dict[str, Any]] = []
    unread = 0
    with (
        reporter.warnings(),
        reporter.progress("predicting", len(files)) as advance,
    ):
        how = {"batch_size": use.batch_size, "workers": use.workers, "on_image": advance}
        for said in using.predictions(model, files, **how):  # type: ignore[arg-type]
            row: dict[str, Any] = {"image": str(said.item)}
            best: list[tuple[str, float]] = []
            if said.probabilities is None:
                unread += 1
                reporter.warn(f"{said.item} could not be read: {said.error}")
            else:
                best = using.top(said.probabilities, classes, own.top)
            for i in range(min(own.top, len(classes))):
                name, value = (best[i][0], f"{best[i][1]:.6f}") if best else (None, None)
                row |= {f"class_{i + 1}": name, f"probability_{i + 1}": value}
            row["error"] = said.error
            rows.append(row)
            if own.output is None and best:
                named = ", ".join(f"{name} {value:.3f}" for name, value in best)
                print(f"{said.item}: {named}", flush=True)
    if own.output == "-":
        print(as_csv(rows), end="")
    elif own.output is not None:
        from pae.train.runfolder import write_bytes

        write_bytes(os.path.expanduser(own.output), as_csv(rows).encode())
        reporter.say(f"{len(files) - unread} predictions: {own.output}")
    if unread:
        reporter.warn(f"{unread} of {len(files)} images could not be read")
    return UNREAD if unread else 0


def _segment(
    names: list[str], own: Predict, use: Use, model: pae.PromptedSegmenter, reporter: Reporter
) -> int:
    """``pae predict`` of a model of pixels: masks and pictures of them in a folder."""
    from pae.train import segmenting, using

    files, others = using.expand(names, False)
    if others:
        reporter.say(f"{others} files without a suffix of an image are left out")
    folder = None
    if own.output is not None:
        if own.output == "-" or os.path.isfile(own.output):
            raise ValueError(f"--output {own.output}: expected a folder, for a mask per image")
        folder = Path(os.path.expanduser(own.output))
        folder.mkdir(parents=True, exist_ok=True)
    stems, classes, unread = segmenting.stems(files), model.classes or (), 0
    with reporter.warnings(), reporter.progress("segmenting", len(files)) as advance:
        how: Any = {"batch_size": use.batch_size, "workers": use.workers, "on_image": advance}
        for stem, said in zip(stems, segmenting.segment(model, files, **how), strict=True):
            if said.classes is None:
                unread += 1
                reporter.warn(f"{said.item} could not be read: {said.error}")
            elif folder is None:
                print(f"{said.item}: {segmenting.shares(said, classes, own.top)}", flush=True)
            else:
                segmenting.write_pictures(folder, stem, said, len(classes))
    if folder is not None:
        reporter.say(f"{len(files) - unread} masks, and as many pictures: {folder}")
    if unread:
        reporter.warn(f"{unread} of {len(files)} images could not be read")
    return UNREAD if unread else 0


def _evaluate(arguments: argparse.Namespace) -> int:
    own = Evaluate(**from_arguments(Evaluate, arguments))
    if own.data is None:
        raise ValueError("pae evaluate needs --data FOLDER, the labelled images")
    import pae
    from pae.train import hf_data
    from pae.train.evaluation import evaluate, read_labelled
    from pae.train.stored import Columns
    from pae.train.using import frames_of

    use, place, model, reporter = _opened(arguments, "transform", "classes")
    if isinstance(model, pae.PromptedSegmenter):
        return _evaluate_masks(own, use, place, model, reporter)
    if own.reduce_zero_label:
        raise ValueError("--reduce-zero-label is of masks, and the model has a class per image")
    columns = Columns(own.image_column, own.label_column)
    with reporter.warnings():
        known, of_clips = model.classes or (), frames_of(model) is not None
        naming = _naming(use, place) if isinstance(model, pae.PromptedCLIP) else None
        images, split = read_labelled(own.data, known, own.split, of_clips, columns, naming)
        hf = hf_data.is_hf(own.data)
        data = hf_data.absolute(own.data) if hf else os.path.abspath(os.path.expanduser(own.data))
        called = hf_data.title(own.data) if hf else Path(data).name
        folder = _folder_of(own, place, called, split)
        with reporter.progress(f"evaluating on {split}", len(images)) as advance:
            how = {"batch_size": use.batch_size, "workers": use.workers, "on_image": advance}
            found = evaluate(model, images, **how)  # type: ignore[arg-type]
    facts = {"checkpoint": str(place.file), "data": data, "split": split}
    found.write(folder, **facts)
    for item, error in found.unread:
        reporter.warn(f"{item} could not be read: {error}")
    if split == "train":
        reporter.warn("these are training images: the model may have seen them")
    worst = sorted(
        (row for row in found.per_class() if row["accuracy"] is not None),
        key=lambda row: row["accuracy"],
    )
    for row in worst[:5]:
        reporter.say(
            f"{row['class']}: {row['correct']} of {row['images']} ({row['low']:.3f} to "
            f"{row['high']:.3f})"
        )
    if len(worst) > 5:
        reporter.say(f"(the five hardest of {len(worst)} classes; all in per_class.csv)")
    print(f"{split}: {found.summary()}")
    reporter.say(f"written: {folder}")
    return UNREAD if found.unread else 0


def _folder_of(own: Evaluate, place: Place, called: str, split: str) -> Path:
    """Where an evaluation is written."""
    default = place.file.parent / f"evaluation-{called}-{split}"
    folder = default if own.output is None else Path(os.path.expanduser(own.output))
    check_writable(folder, own.output, folder=True)
    return folder


def _naming(use: Use, place: Place) -> Any:
    """How the classes of a folder are found among the names of a model of two towers."""
    from pae.train import towers

    given = use.classes is not None
    listed = place.run is not None and place.run.read_config().class_names is not None
    return partial(towers.names_of, given=given, listed=given or listed)


def _evaluate_masks(
    own: Evaluate, use: Use, place: Place, model: pae.PromptedSegmenter, reporter: Reporter
) -> int:
    """``pae evaluate`` of a model of pixels."""
    from pae.train import segmenting

    assert own.data is not None
    images, split = segmenting.read_labelled(own.data, model.classes or (), own.split, use.workers)
    data = os.path.abspath(os.path.expanduser(own.data))
    folder = _folder_of(own, place, Path(data).name, split)
    reduce_zero = own.reduce_zero_label
    if not reduce_zero and place.run is not None:
        reduce_zero = place.run.read_config().reduce_zero_label
    with (
        reporter.warnings(),
        reporter.progress(f"evaluating on {split}", len(images)) as advance,
    ):
        how: Any = {"batch_size": use.batch_size, "workers": use.workers, "on_image": advance}
        found = segmenting.evaluate(model, images, reduce_zero=reduce_zero, **how)
    folder.mkdir(parents=True, exist_ok=True)
    found.write(folder, checkpoint=str(place.file), data=data, split=split)
    for item, error in found.unread:
        reporter.warn(f"{item} could not be read: {error}")
    if split == "train":
        reporter.warn("these are training images: the model may have seen them")
    for row in found.per_class()[:20]:
        iou = "-" if row["iou"] is None else f"{row['iou']:.3f}"
        reporter.say(f"{row['class']}: IoU {iou}")
    print(f"{split}: {found.summary()}")
    reporter.say(f"written: {folder}")
    return UNREAD if found.unread else 0


_CHECKED = 8  # images


def _export(arguments: argparse.Namespace) -> int:
    own = Export(**from_arguments(Export, arguments))
    arguments.device = "cpu"  # where the file is compared
    import torch

    from pae.train import using
    from pae.train.export import FORMATS as suffixes
    from pae.train.export import export

    _, place, model, _ = _opened(arguments, "transform")
    default = place.file.with_suffix(suffixes[own.format])
    path = default if own.output is None else Path(os.path.expanduser(own.output))
    check_writable(path, own.output)
    if arguments.images:
        items: list[Any] = list(
            using.expand(arguments.images, using.frames_of(model) is not None)[0]
        )
    else:
        items = _own_images(place)
    if len(items) == 1:
        items = items * 2
    images = torch.stack([model.transform(item) for item in items[:_CHECKED]])  # type: ignore[misc]
    worst = export(model, images, path, own.format)
    print(f"{path}: logits of {len(images)} images differ by at most {worst:.1e} of the largest")
    return 0


def _own_images(place: Place) -> list[Any]:
    """Some of the run's validation or test images, where it says where they lie."""
    from pae.train import hf_data
    from pae.train.loop import load_task

    if place.run is None:
        raise ValueError(f"{place.file}: no run beside it; give --images, real ones to compare on")
    options = place.run.read_config()
    away = options.data is not None and not os.path.isdir(options.data)
    if away and not hf_data.is_hf(str(options.data)):
        raise ValueError(f"{options.data} is gone, the run's images; give --images to compare on")
    task = load_task(options)
    split = task.val or task.test or task.train
    step = max(1, len(split) // _CHECKED)
    return [split.items[i] for i in range(0, len(split), step)]


def _info(arguments: argparse.Namespace) -> int:
    from pae.files import to_json
    from pae.train.using import describe, find

    place = find(arguments.place)
    table = describe(place)
    if arguments.json:
        print(to_json(table, indent=2))
        return 0
    for name, text in _lines(table):
        print(f"{name:16} {text}")
    return 0


def _lines(table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in table.items():
        if value is None or value == {} or value == []:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k}={v}" for k, v in value.items())
        elif isinstance(value, list):
            more = f", ... ({len(value)})" if len(value) > 12 else ""
            value = ", ".join(map(str, value[:12])) + more
        yield name, str(value)
