"""From a file of `pae train`, or of `PromptedViT.save`, to a model that takes images.

A checkpoint says how its backbone is built, how images become its input, and what its classes are
called. What an older one does not say is taken from the config.json of its run, where that lies
beside it, and else asked for by the name of an option.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

import pae
from pae import clip_file
from pae.backbones import named
from pae.choices import LEGACY
from pae.errors import CheckpointError, UnsupportedBackbone, one_line
from pae.files import from_json
from pae.serving import Served
from pae.tensorfile import read_tensors, require_digest
from pae.train import methods, pixels, towers
from pae.train.clips import is_clip, read_frames
from pae.train.declared import near
from pae.train.images import Ranges, decode
from pae.train.listing import shown, some
from pae.train.options import Options
from pae.train.resize import LegacyBilinear
from pae.train.runfolder import RunFolder
from pae.train.scores import score_of

Loaded: TypeAlias = (
    "pae.PromptedViT | pae.PromptedSegmenter | pae.PromptedCLIP | methods.FullFineTuning"
)
WHICH = ("best", "last")

# ---- which file


@dataclass(frozen=True)
class Place:
    """A checkpoint, and the run that it is of, if that is known; `note` says what was chosen."""

    file: Path
    run: RunFolder | None
    note: str | None = None


def find(run: str | Path, which: str = "best") -> Place:
    """The checkpoint that `run` names: a file, the folder of a run, or that of a comparison or of a
    sweep of one task, of which the run with the best validation accuracy is taken.

    Raises:
        ValueError: there is none.
    """
    path = Path(os.path.expanduser(run))
    if path.is_file():
        beside = RunFolder(path.parent)
        return Place(path, beside if beside.config.is_file() else None)
    if not path.exists():
        raise ValueError(f"{shown(run)}: no such file or folder")
    if not path.is_dir():
        raise ValueError(f"{shown(run)}: no file of a model, and no folder of a run")
    folder = RunFolder(path)
    file = getattr(folder, which)
    if file.is_file():
        return Place(file, folder if folder.config.is_file() else None)
    if (path / "sweep.json").is_file():
        return _of_sweep(path, which)
    runs = [RunFolder(inner) for inner in sorted(path.iterdir()) if inner.is_dir()]
    done = [(r, result) for r in runs if getattr(r, which).is_file() and (result := r.result())]
    if not done:
        advice = "give a run's folder"
        if folder.config.is_file():
            advice = "the run has not come to it, or it was moved; give the file itself"
        raise ValueError(f"{shown(run)}: holds no {which}.safetensors; {advice}")
    if len(done) > 1 and any(score_of(result) is None for _, result in done):
        raise ValueError(
            f"{shown(run)}: holds {len(done)} runs, not all with validation; give one: "
            f"{some([r.path.name for r, _ in done])}"
        )
    best, result = max(done, key=lambda pair: score_of(pair[1]) or 0.0)
    note = None
    if len(done) > 1:
        note = (
            f"{path} holds {len(done)} runs: taking {best.path.name}, the best on validation "
            f"images ({score_of(result):.3f})"
        )
    return Place(getattr(best, which), best, note)


def _of_sweep(path: Path, which: str) -> Place:
    """The run of a sweep with the best validation accuracy, if the sweep is of one task."""
    from pae.sweep.records import FINISHED, Records

    records, best = Records(path), dict[str, Any]()
    for record in records.values():
        task, score = record["task"], record["val"]
        there = getattr(RunFolder(records.path(record["key"])), which).is_file()
        if record["status"] == FINISHED and there and score is not None:
            best[task] = max(best.get(task, record), record, key=lambda r: r["val"])
    places = {task: records.path(record["key"]) for task, record in best.items()}
    if len(best) != 1:
        what = f"a sweep of {len(best)} tasks" if best else "a sweep without a validated run"
        each = "".join(f"; the best of {task} is {place}" for task, place in places.items())
        raise ValueError(f"{shown(path)}: {what}; give one of its runs, SWEEP/runs/KEY{each}")
    (place,), (record,) = places.values(), best.values()
    note = (
        f"{path} is a sweep: taking {place.name} ({record['method']}), the best on validation "
        f"images ({record['val']:.3f})"
    )
    run = RunFolder(place)
    return Place(getattr(run, which), run, note)


# ---- from the file to a model


def load(
    path: str | Path,
    backbone: nn.Module | str | None = None,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    img_size: int | None = None,
    norm: str | None = None,
    augment: str | None = None,
    classes: Sequence[str] | None = None,
) -> Loaded:
    """A trained model that takes images, in eval mode: `model(model.transform(image)[None])`.

    The file says which backbone it was trained on, and that is built again: from timm, the hub,
    transformers, open_clip, or the embedded weights. Its fingerprint is compared. All else that is
    given here is for what an older file does not say, and wins over what a file says.

    Args:
        path: a checkpoint, or the folder of a run, whose best one is taken.
        backbone: a module to put it on, or the name of one: timm's, hf-hub:NAME, local-dir:FOLDER,
            hf:NAME (of transformers), open_clip:ARCHITECTURE/TAG.
        weights: the file of weights that the backbone was given, where it had one.
        device: where the model goes.
        img_size: side of the images in pixels. norm, augment: as of `pae train`: normalisation, and
            which crop evaluation takes.
        classes: their names, in the order of the logits; of a file of two towers any names, which
            are then told apart, whatever it was trained on.
    Returns:
        A `PromptedViT`; a `PromptedSegmenter` where the file has its heads; a `PromptedCLIP` of two
        towers; or, of a run that
        trained all weights, a module with the same face. All have `classes` (names, or None),
        `task`, and `transform` (None where the file does not say how): an image of PIL, a path, or
        a uint8 array to the tensor (C, H, W) that evaluation in training made of it.
    Raises:
        CheckpointError: an unreadable or damaged file, or another backbone.
        ValueError: the backbone, or what else is missing, cannot be told or had.
    """
    place = find(path)
    state, texts, vouched = read_tensors(place.file)
    try:
        description = from_json(texts["pae"])
        whole = str(description["format"]).startswith(methods.WHOLE_FORMATS)
        two = description["format"] == clip_file.FORMAT
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"checkpoint {place.file} was not written by pae") from None
    if whole:
        require_digest(place.file, vouched, former=methods.is_former(description["format"]))
        task, found = _task_of(place.file, description.get("task")), None
    elif two:
        _, description, task = clip_file.read(place.file)
        found = None
        _refuse_of_towers(place.file, backbone, weights, img_size)
    else:
        found = pae.read_checkpoint(place.file)
        task = found.task
    task = pae.TaskInfo() if task is None else task
    built = None
    if isinstance(backbone, nn.Module):
        built, recipe = backbone, None
    else:
        recipe = _recipe(place, task, found, description, backbone, weights, img_size)
    if whole:
        model: Loaded = _whole(place, recipe, built, state, task)
    elif two:
        assert recipe is not None
        model = towers.load(place.file, recipe, classes)
    else:
        assert found is not None
        built = _backbone(recipe, found.num_classes) if built is None else built
        kind: Any = pae.PromptedViT if found.dense is None else pae.PromptedSegmenter
        model = kind.from_file(place.file, built)
    task = _completed(place, model, task, norm, augment, classes)
    if recipe is not None and task.backbone is None:
        task = replace(task, backbone=methods.portable(recipe))
    model.task = task
    if None not in (task.input_size, task.mean, task.std, task.interpolation, task.crop_mode):
        frames = frames_of(model)
        model.transform = Transform(task) if frames is None else ClipTransform(task, frames)
    model.eval().requires_grad_(False)
    return model.to(device)


def _refuse_of_towers(
    path: Path, backbone: Any, weights: str | Path | None, img_size: int | None
) -> None:
    """Raise ValueError for what a model of two towers cannot be given."""
    if isinstance(backbone, nn.Module):
        raise ValueError(
            f"backbone: {path} is of two towers, whose texts need their tokenizer: give the "
            "model's name, or build pae.prompted_clip and load the file into it"
        )
    if weights is not None:
        raise ValueError(f"weights: not for {path}, whose two towers have those of the model")
    if img_size is not None:
        raise ValueError(f"img_size: not for {path}, whose two towers take their own size")


def _task_of(path: Path, record: Any) -> pae.TaskInfo | None:
    try:
        return pae.TaskInfo.read(record)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {one_line(error)}") from error


def _run_options(place: Place) -> Options | None:
    """Of the run that the file lies in."""
    return None if place.run is None else place.run.read_config()


def _recipe(
    place: Place,
    task: pae.TaskInfo,
    found: pae.Checkpoint | None,
    description: dict[str, Any],
    backbone: str | None,
    weights: str | Path | None,
    img_size: int | None,
) -> dict[str, Any]:
    """How the backbone is built: what is given here, then what the run says, whose folder knows
    where files lie, then what the file says.

    Raises:
        ValueError: nothing says it.
    """
    options = _run_options(place)
    recipe = dict(task.backbone or {})
    if options is not None:
        told = {**methods.recipe(options), "weights": options.weights, "model": options.model}
        recipe = {**recipe, **told}
    if not recipe and found is not None:
        recipe = _known_name(found, description)
    if backbone is not None:
        recipe["model"] = backbone
    if weights is not None:
        recipe = {**recipe, "weights": str(weights), "pretrained": True}
    if img_size is not None:
        recipe["img_size"] = img_size
    if "model" not in recipe:
        raise ValueError(
            f"{place.file} does not say how its backbone ({_called(description)}) is built: give "
            "its name (--model NAME)"
        )
    file = recipe.get("weights")
    if file is not None and not Path(file).is_file():
        raise ValueError(
            f"{place.file} was trained on the weights of {file}, which is not here: give the file "
            "(--weights FILE)"
        )
    source, _, folder = recipe["model"].partition(":")
    if source == "local-dir" and not Path(folder).is_dir():
        raise ValueError(
            f"{place.file} was trained on {recipe['model']}, which is not here: give its folder "
            "(--model local-dir:FOLDER)"
        )
    return recipe


def _called(description: dict[str, Any]) -> Any:
    """The backbone, as its description has it."""
    towers = description.get("towers")
    return towers["image"]["backbone"] if towers else description.get("backbone")


def _known_name(found: pae.Checkpoint, description: dict[str, Any]) -> dict[str, Any]:
    """Of a file whose task does not say: what its backbone is called, where that says it."""
    import timm

    source = description.get("source")
    if isinstance(source, str):
        return {"model": source, "class": found.backbone.partition(".")[0]}
    architecture, _, tag = found.backbone.partition(".")
    if not tag or not timm.is_model(architecture):
        return {}
    size = found.image_size
    square = size is not None and size[0] == size[1]
    return {"model": found.backbone, **({"img_size": size[0]} if size and square else {})}


_OF_OPTIONS = ("model", "weights", "pretrained", "img_size", "pool")


def _backbone(recipe: dict[str, Any] | None, num_classes: int) -> nn.Module:
    assert recipe is not None
    if named.is_named(recipe["model"]) and "class" in recipe:  # of a model that a script had built
        return named.load_named(recipe["model"], kind=recipe["class"])
    if unknown := sorted(recipe.keys() - {*_OF_OPTIONS, "seed", "class"}):
        raise ValueError(f"a later pae wrote how the backbone is built: {some(unknown)} is unknown")
    options = Options(**{name: recipe[name] for name in _OF_OPTIONS if name in recipe})
    with torch.random.fork_rng():
        torch.manual_seed(recipe.get("seed", 0))  # random weights are drawn as they were
        return methods.build_backbone(options, num_classes)


def _whole(
    place: Place,
    recipe: dict[str, Any] | None,
    built: nn.Module | None,
    state: dict[str, Tensor],
    task: pae.TaskInfo,
) -> methods.FullFineTuning:
    """A model all of whose weights are in the file."""
    head = next((t for n, t in state.items() if n in methods.HEADS), None)
    count = len(task.classes or ()) or (0 if head is None else len(head))
    if built is None:
        own = {k: v for k, v in (recipe or {}).items() if k not in ("weights", "seed")}
        if own["model"] not in _WITH_WEIGHTS:
            own["pretrained"] = False
        built = _backbone(own, count)
    model = methods.FullFineTuning(built, count)
    model.load(place.file)
    return model


_WITH_WEIGHTS = (methods.embedded.WEIGHTS_NAME,)  # which brings its own, so it takes no option


def _completed(
    place: Place,
    model: Loaded,
    task: pae.TaskInfo,
    norm: str | None,
    augment: str | None,
    classes: Sequence[str] | None,
) -> pae.TaskInfo:
    """The task, with what was given, and with what its run says where the file says nothing.

    Raises:
        ValueError: classes that are not as many as the logits.
    """
    options = _run_options(place) if None in (task.mean, task.crop_mode, task.classes) else None
    if classes is None and task.classes is None and place.run is not None:
        classes = place.run.facts().get("task", {}).get("classes")
    if classes is not None:
        task = replace(task, classes=tuple(classes))
    count = model.num_classes
    if task.classes is not None and count and len(task.classes) != count:
        raise ValueError(f"classes: expected {count} names, got {len(task.classes)}")
    if options is not None:
        norm = options.norm if norm is None and task.mean is None else norm
        augment = options.augment if augment is None and task.crop_mode is None else augment
    changes: dict[str, Any] = {}
    if norm is not None or augment is not None:
        config = methods.data_config(model.backbone)
        if task.input_size is None:
            changes["input_size"] = (3, *config["input_size"])
        if task.interpolation is None:
            changes["interpolation"] = config["interpolation"]
        if norm is not None:
            mean, std = pixels.normalisation(norm, config)
            changes |= {"mean": tuple(mean), "std": tuple(std)}
        if augment is not None:
            changes |= pixels.evaluation_crop(augment, config)
    return replace(task, **changes) if changes else task


def require(place: Place, model: Loaded, *what: str) -> None:
    """Refuse a file that does not say what a command needs.

    Args:
        what: of "transform" and "classes".
    Raises:
        ValueError: in one line, naming the options.
    """
    if "transform" in what and model.transform is None:
        raise ValueError(
            f"{place.file} does not say how images become its input: give --norm and --augment as "
            "in training (--norm model --augment none are the defaults of pae train)"
        )
    if "classes" in what and model.classes is None:
        raise ValueError(
            f"{place.file} does not say its {model.num_classes} classes: give --classes FILE, a "
            "name a line in the order of the logits"
        )


class Transform:
    """An image as `pae train` shows it to the model when it evaluates.

    Args:
        task: its `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode` and the
            white of images of more than 8 bits are read.
    """

    def __init__(self, task: pae.TaskInfo) -> None:
        from timm.data import create_transform

        known = task.transform()
        mean, std = known.pop("mean"), known.pop("std")
        self.ranges = Ranges(task.integer_white, task.real_white)
        self.geometry: Any
        if known["interpolation"] == LEGACY:  # in float32, as in training
            self.geometry = LegacyBilinear(known["input_size"][1:])
        else:  # in uint8, as in training: rounding is the same, bit for bit
            self.geometry = create_transform(**known, use_prefetcher=True)
        self.scale, self.shift = pixels.scale_and_shift(mean, std)

    def pixels(self, image: Any) -> Tensor:
        """(C, H, W) on the scale 0 .. 255, uint8 but for "tf1-bilinear", of an image of PIL, a path
        or a uint8 array (H, W) or (H, W, 3).

        Raises:
            ValueError: it is unreadable; in one line.
        """
        decoded = decode(image, self.ranges)
        try:
            return self.geometry(decoded)
        except (MemoryError, OSError, ValueError) as error:
            raise ValueError(
                f"{decoded.width} x {decoded.height} pixels cannot be resized and cut: "
                f"{one_line(error)}"
            ) from None

    def normalised(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) float32 of what `pixels` gives, on its device."""
        device = pixels.device
        return pixels.float() * self.scale.to(device) + self.shift.to(device)

    def __call__(self, image: Any) -> Tensor:
        return self.normalised(self.pixels(image)[None])[0]


class ClipTransform(Transform):
    """The same of a clip, the path of a `.npy` file or an array (T, H, W, 3) or (T, H, W) in uint8,
    of which `frames` are taken, evenly spaced.
    """

    def __init__(self, task: pae.TaskInfo, frames: int) -> None:
        super().__init__(task)
        self.frames = frames

    def pixels(self, image: Any) -> Tensor:
        """(frames, C, H, W) uint8."""
        shown = super().pixels
        return torch.stack([shown(frame) for frame in read_frames(image, self.frames)])


def describe(place: Place) -> dict[str, Any]:
    """What a checkpoint holds, as plain values; no backbone is needed.

    Raises:
        CheckpointError: unreadable, damaged, or not one of ours.
    """
    state, texts, _ = read_tensors(place.file)
    try:
        description = from_json(texts["pae"])
        kind = str(description["format"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"checkpoint {place.file} was not written by pae") from None
    table: dict[str, Any] = {"file": str(place.file), "format": kind}
    table["bytes"] = place.file.stat().st_size
    table["parameters"] = sum(tensor.numel() for tensor in state.values())
    if kind.startswith(methods.WHOLE_FORMATS):
        task = _task_of(place.file, description.get("task"))
        table |= {"method": "full fine-tuning", "backbone": description.get("backbone")}
    elif kind == clip_file.FORMAT:
        table |= towers.describe(place.file)
        task = table.pop("task")
    else:
        found = pae.read_checkpoint(place.file)
        task = found.task
        size = found.image_size
        table |= {
            "prompts": found.prompts["name"],
            "arguments": found.prompts["config"],
            "kld": found.kld,
            "backbone": found.backbone,
            "fingerprint": found.fingerprint,
            "image size": None if size is None else " x ".join(map(str, size)),
            "pool": found.pool,
            "train_backbone": list(found.train_backbone),
            "logits": found.num_classes,
            "heads": found.dense,
            "versions": found.versions,
            "further texts": found.extra,
        }
    if task is not None:
        record = {name: v for name, v in task.record().items() if v is not None}
        table["classes"] = record.pop("classes", None)
        table["built by"] = record.pop("backbone", None)
        table["images"] = record
    result = None if place.run is None else place.run.result()
    if result is not None:
        table["result"] = result
    return table


# ---- which images


def frames_of(model: Loaded) -> int | None:
    """Of the clips that a model reads; None of one that reads images."""
    return None if model.view is None else model.view.frames


def expand(names: Iterable[str], of_clips: bool = False) -> tuple[list[Path], int]:
    """The image files that are named: files, folders with all below them, and patterns (which a
    shell may have left as they are). No file twice.

    Args:
        of_clips: of folders the `.npy` files are taken.

    Returns:
        The files, in order, and how many files of folders have no suffix of an image.
    Raises:
        ValueError: a name that leads nowhere, or no image at all.
    """
    import glob

    files: dict[str, Path] = {}
    others = 0
    names = list(names)
    for name in names:
        path = Path(os.path.expanduser(name))
        if path.is_dir():
            found, more = _below(path, of_clips)
            others += more
        elif path.exists():
            found = [path]
        else:
            found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            inside = [p for p in found if p.is_dir()]
            found = [p for p in found if not p.is_dir()]
            for folder in inside if not found else ():
                more_files, more = _below(folder, of_clips)
                found, others = found + more_files, others + more
            if not found:
                raise ValueError(f"{shown(name)}: no such file, folder or pattern of files")
        for file in found:
            files.setdefault(os.path.realpath(file), file)
    if not files:
        what = "clip (.npy)" if of_clips else "image"
        raise ValueError(f"{some([str(name) for name in names])}: no {what} in it")
    return list(files.values()), others


def _below(folder: Path, of_clips: bool) -> tuple[list[Path], int]:
    from pae.train.listing import is_hidden, is_image

    found: list[Path] = []
    seen: set[str] = set()
    others = 0

    def unread(error: OSError) -> None:
        raise ValueError(f"{shown(error.filename)}: cannot be read ({error.strerror})") from None

    for root, folders, files in os.walk(folder, followlinks=True, onerror=unread):
        key = os.path.realpath(root)
        if key in seen:  # a link back
            folders.clear()
            continue
        seen.add(key)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(files):
            if is_hidden(name):
                continue
            if is_clip(name) if of_clips else is_image(name):
                found.append(Path(root, name))
            else:
                others += 1
    return found, others


# ---- predictions


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image: `probabilities` (classes,), on the CPU; or `error`, why it
    could not be read.
    """

    item: Any
    probabilities: Tensor | None
    error: str | None = None


def predictions(
    model: Loaded,
    items: Sequence[Any],
    *,
    batch_size: int = 32,
    workers: int = 2,
    on_image: Callable[[], object] = lambda: None,
) -> Iterator[Prediction]:
    """One `Prediction` per item, in order; images are decoded ahead by threads.

    Args:
        model: of `load`, with a transform.
        items: paths, images of PIL, or uint8 arrays.
        batch_size: images per forward.
        workers: threads.
        on_image: called after every image.
    """
    transform = cast(Transform, model.transform)
    engine = engine_of(model)
    device = next(model.parameters()).device

    @torch.inference_mode()
    def answered(batch: list[tuple[Any, Tensor | ValueError]]) -> list[Prediction]:
        read = [found for _, found in batch if isinstance(found, Tensor)]
        rows: Iterator[Tensor] = iter(())
        if read:
            images = transform.normalised(torch.stack(read).to(device))
            rows = iter(model(images, engine=engine).float().softmax(1).cpu())
        return [
            Prediction(item, next(rows))
            if isinstance(found, Tensor)
            else Prediction(item, None, _without_name(item, found))
            for item, found in batch
        ]

    waiting: list[tuple[Any, Tensor | ValueError]] = []
    for item, found in ahead(partial(_attempt, transform.pixels), items, workers, 4 * batch_size):
        waiting.append((item, found))
        on_image()
        if len(waiting) == batch_size:
            yield from answered(waiting)
            waiting = []
    yield from answered(waiting)


def engine_of(model: Loaded) -> str:
    """The fast one where it takes the backbone."""
    if isinstance(model, methods.FullFineTuning):
        return "fast"
    try:
        for part in (model.vision, model.text) if isinstance(model, pae.PromptedCLIP) else (model,):
            part.plan()
    except UnsupportedBackbone:
        return "reference"
    return "fast"


def _attempt(function: Callable[[Any], Tensor], item: Any) -> Tensor | ValueError:
    try:
        return function(item)
    except ValueError as error:
        return error


def _without_name(item: Any, error: ValueError) -> str:
    said = str(error)
    for what in ("unreadable image ", "unreadable clip ", "clip ", ""):
        said = said.removeprefix(f"{what}{item}: ")
    return said


def ahead(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, count: int
) -> Iterator[tuple[Any, Any]]:
    """(item, what `function` gives) in order, at most `count` of them ahead of who asks."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        left = iter(items)
        futures = deque((item, pool.submit(function, item)) for item in islice(left, count))
        try:
            while futures:
                item, future = futures.popleft()
                futures.extend((i, pool.submit(function, i)) for i in islice(left, 1))
                yield item, future.result()
        finally:
            for _, future in futures:  # whoever stopped asking does not wait for the rest
                future.cancel()


def top(probabilities: Tensor, classes: Sequence[str], count: int) -> list[tuple[str, float]]:
    """The `count` most probable classes, with their probabilities, best first."""
    values, indices = probabilities.topk(min(count, len(probabilities)))
    return [(classes[i], v) for v, i in zip(values.tolist(), indices.tolist())]


def read_classes(given: str) -> list[str]:
    """--classes: a file with a name a line, or names with commas between.

    Raises:
        ValueError: an empty name, or a name twice.
    """
    path = Path(os.path.expanduser(given))
    names = (
        path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else given.split(",")
    )
    while names and not names[-1].strip():
        names.pop()
    names = [name.strip() for name in names]
    if not names or "" in names or len(set(names)) < len(names):
        raise ValueError(f"--classes {shown(given)}: expected a file, or names, each once")
    return names


def match(classes: Sequence[str], names: Sequence[str], where: str) -> list[int]:
    """For every name of a folder's classes its number among the model's; Unicode may write them in
    two ways.

    Raises:
        ValueError: one is not among them.
    """
    from pae.train.layouts import same

    number = {name: i for i, name in enumerate(classes)}
    composed = {same(name): i for name, i in number.items()}
    for name in names:
        if name not in number and same(name) not in composed:
            raise ValueError(
                f"{where}: class {name!r} is none of the model's {len(classes)}"
                f"{near(name, number) or f' ({some(list(classes))})'}"
            )
    return [number[name] if name in number else composed[same(name)] for name in names]


# ---- many tasks


def serve_many(
    models: Sequence[pae.PromptedViT | str | Path],
    backbone: nn.Module | str | None = None,
    **options: Any,
) -> Served:
    """Many tasks on one backbone, images of all of them in one batch: `served(images, tasks)`.

    The same logits as one model per task, from one pass of the backbone over the batch.

    Args:
        models: per task a `PromptedViT`, a checkpoint, or a run's folder. Checkpoints share one
            backbone, that of the first, or `backbone`.
        backbone, options: as of `pae.load`, for the checkpoints.

    Returns:
        A `pae.serving.Served`.

    Raises:
        CheckpointError, ValueError: as `pae.load`; and as `Served`, naming the task, where prompts
            cannot be shared.
    """
    loaded: list[pae.PromptedViT] = []
    for number, item in enumerate(models):
        if not isinstance(item, (str, Path)):
            loaded.append(item)
            continue
        model = load(item, backbone, **options)
        if not isinstance(model, pae.PromptedViT):
            what = "two towers" if isinstance(model, pae.PromptedCLIP) else "a whole model"
            raise ValueError(f"task {number}: {item} holds {what}, and shares no backbone")
        backbone = model.backbone  # the others go onto the same one
        loaded.append(model)
    return Served(loaded)
