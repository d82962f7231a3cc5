"""A trained segmenter on images: masks as pictures, and how good they are at full size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import pae
from pae.dense import resized
from pae.files import signed, to_json, write_atomically
from pae.train import masks
from pae.train.evaluation import as_csv
from pae.train.images import decode
from pae.train.listing import shown
from pae.train.runfolder import write_bytes
from pae.train.tasks.segmentation import confusion, ious, mean_iou, pixel_accuracy
from pae.train.using import Transform, ahead, engine_of, match


class Segmented(NamedTuple):
    """One image: itself in RGB, and a class number per pixel of it, (H, W) uint8; or why not."""

    item: Any
    image: Image.Image | None
    classes: np.ndarray | None
    error: str | None = None


def segment(
    model: pae.PromptedSegmenter,
    items: Sequence[Any],
    *,
    batch_size: int = 8,
    workers: int = 2,
    on_image: Callable[[], object] = lambda: None,
) -> Iterator[Segmented]:
    """What the model makes of images, in order: logits are enlarged to each image's own size, and
    the largest is taken.

    Args:
        model: of `pae.load`, with a transform.
        items, batch_size, workers, on_image: as of `using.predictions`.
    """
    transform, engine = cast(Transform, model.transform), engine_of(model)

    def read(item: Any) -> tuple[Image.Image, Tensor] | ValueError:
        try:
            image = decode(item, transform.ranges)
            return image, transform.pixels(image)
        except ValueError as error:
            return error

    @torch.inference_mode()
    def answered(batch: list[tuple[Any, Any]]) -> Iterator[Segmented]:
        good = [found[1] for _, found in batch if not isinstance(found, ValueError)]
        rows: Iterator[Tensor] = iter(())
        if good:
            inputs = transform.normalised(torch.stack(good).to(model.device))
            rows = iter(model(inputs, engine=engine).float())
        for item, found in batch:
            if isinstance(found, ValueError):
                text = str(found).removeprefix(f"unreadable image {item}: ")
                yield Segmented(item, None, None, text)
                continue
            logits = resized(next(rows)[None], (found[0].height, found[0].width))[0]
            yield Segmented(item, found[0], logits.argmax(0).to(torch.uint8).cpu().numpy())

    waiting: list[tuple[Any, Any]] = []
    for item, found in ahead(read, items, workers, 4 * batch_size):
        waiting.append((item, found))
        on_image()
        if len(waiting) == batch_size:
            yield from answered(waiting)
            waiting = []
    yield from answered(waiting)


# ---- pictures


def palette(count: int) -> list[tuple[int, int, int]]:
    """A colour per class, black first: those of Pascal VOC."""
    found = []
    for number in range(count):
        colour, left = [0, 0, 0], number
        for bit in range(7, -1, -1):
            for channel in range(3):
                colour[channel] |= ((left >> channel) & 1) << bit
            left >>= 3
        found.append((colour[0], colour[1], colour[2]))
    return found


def write_pictures(folder: Path, stem: str, found: Segmented, classes: int) -> list[Path]:
    """STEM.png, class numbers with a palette, and STEM-overlay.png, its colours over the image."""
    assert found.image is not None and found.classes is not None
    colours = np.array(palette(classes), np.uint8)
    numbers = Image.fromarray(found.classes)
    numbers.putpalette(colours.flatten().tolist())
    over = Image.blend(found.image, Image.fromarray(colours[found.classes]), 0.5)
    paths = [folder / f"{stem}.png", folder / f"{stem}-overlay.png"]
    for path, picture in zip(paths, (numbers, over)):
        write_atomically(path, lambda file, p=picture: p.save(file, format="png"))  # type: ignore[misc]
    return paths


def stems(files: Sequence[Path]) -> list[str]:
    """What the pictures of images are called.

    Raises:
        ValueError: two images would have the same.
    """
    names = [Path(file).stem for file in files]
    for number, name in enumerate(names):
        if (first := names.index(name)) != number:
            raise ValueError(
                f"{shown(files[first])} and {shown(files[number])} have one name, and so would "
                "their masks; predict them one folder at a time"
            )
    return names


def shares(found: Segmented, classes: Sequence[str], count: int) -> str:
    """The classes with the most pixels of an image, in words."""
    assert found.classes is not None
    pixels = np.bincount(found.classes.flatten(), minlength=len(classes)) / found.classes.size
    best = [int(i) for i in np.argsort(-pixels, kind="stable")[:count] if pixels[i] > 0]
    return ", ".join(f"{classes[i]} {pixels[i]:.3f}" for i in best)


# ---- how good


@dataclass
class Evaluation:
    """What `evaluate` found.

    Attributes:
        classes: names, in the order of `confusion`.
        confusion: (classes, classes) int64: pixels of class i that were taken for class j.
        unread: (image, why) of those that could not be read.
        rows: per image: path, mean IoU of its own classes, pixel accuracy.
    """

    classes: Sequence[str]
    confusion: Tensor
    unread: list[tuple[Any, str]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def per_class(self) -> list[dict[str, Any]]:
        """A row per class: "class", "pixels", "iou" (None of a class that is nowhere)."""
        pixels = self.confusion.sum(1).tolist()
        return [
            {"class": name, "pixels": count, "iou": iou}
            for name, count, iou in zip(self.classes, pixels, ious(self.confusion))
        ]

    def summary(self) -> str:
        """One line."""
        unread = f"; {len(self.unread)} images could not be read" if self.unread else ""
        return (
            f"mean IoU {mean_iou(self.confusion):.4f}, pixel accuracy "
            f"{pixel_accuracy(self.confusion):.4f} ({len(self.rows)} images, "
            f"{int(self.confusion.sum()):,} pixels){unread}"
        )

    def write(self, folder: Path, **facts: Any) -> None:
        """evaluation.json, per_class.csv, confusion.csv and per_image.csv."""
        table = {
            **facts,
            "images": len(self.rows),
            "mean_iou": mean_iou(self.confusion),
            "pixel_accuracy": pixel_accuracy(self.confusion),
            "unread": [{"image": str(item), "error": error} for item, error in self.unread],
        }
        confused = [
            {"class": name, **dict(zip(self.classes, row.tolist()))}
            for name, row in zip(self.classes, self.confusion)
        ]
        files = {
            "per_class.csv": as_csv(self.per_class()),
            "confusion.csv": as_csv(confused),
            "per_image.csv": as_csv(self.rows),
            "evaluation.json": to_json(signed(table), indent=2) + "\n",
        }
        for name, text in files.items():
            write_bytes(folder / name, text.encode())


def evaluate(
    model: pae.PromptedSegmenter,
    images: masks.Masked,
    *,
    reduce_zero: bool = False,
    **how: Any,
) -> Evaluation:
    """What the model makes of images with masks, at the masks' own size; `how` as of `segment`.

    Raises:
        ValueError: a mask that cannot be used, naming it.
    """
    count = model.num_classes
    classes = model.classes or tuple(map(str, range(count)))
    found = Evaluation(classes, torch.zeros(count, count, dtype=torch.int64))
    mask_of = partial(masks.read_mask, classes=count, reduce_zero=reduce_zero)
    for said, label in zip(segment(model, list(images.items), **how), images.labels):
        if said.classes is None:
            found.unread.append((said.item, said.error or ""))
            continue
        truth = np.asarray(mask_of(label))
        if truth.shape != said.classes.shape:
            sizes = [f"{shape[1]} x {shape[0]}" for shape in (truth.shape, said.classes.shape)]
            raise ValueError(f"mask {label}: {sizes[0]} pixels, and its image has {sizes[1]}")
        taken, there = (torch.from_numpy(np.array(part)).long() for part in (said.classes, truth))
        own = confusion(taken, there, count)
        found.confusion += own
        row = {"image": str(said.item), "mean_iou": mean_iou(own)}
        found.rows.append({**row, "pixel_accuracy": pixel_accuracy(own)})
    return found


def read_labelled(
    folder: str, classes: Sequence[str], split: str | None, workers: int
) -> tuple[masks.Masked, str]:
    """The images of a folder with masks; of `split`, else test, else val.

    Raises:
        ValueError: as `masks.read_folder`; no such split; other classes than the model's.
    """
    base = Path(os.path.expanduser(folder))
    own = masks.read_classes(base)
    where = f"--data {shown(folder)}"
    if match(classes, own, where) != list(range(len(classes))):
        raise ValueError(f"{where}: the model's classes in another order, and masks hold numbers")
    splits = masks.read_splits(base, workers)
    name = split or next((name for name in ("test", "val") if name in splits), None)
    if name is None:
        raise ValueError(
            f"{where}: has neither a test nor a val split; --split train evaluates on its training "
            "images"
        )
    if name not in splits:
        raise ValueError(f"{where}: has no {name} split ({', '.join(splits)})")
    return splits[name], name
