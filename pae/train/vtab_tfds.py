"""VTAB-1k from the sets of TensorFlow Datasets that it was made of: its 1000 images, its labels.

Images are taken by their place in the set, so that they are those of the papers where the set has
the version that they had; the classes of structured tasks are computed from the annotations.

Source: VTAB's task_adaptation (data/*.py), one rule a set.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pae.protocols.tasks import CUTS, Task
from pae.train import tfds
from pae.train.layouts import Layout, of_rows, say
from pae.train.listing import shown
from pae.train.stored import Item


class _Rule(NamedTuple):
    """Which features the class comes from, and how."""

    keys: tuple[str, ...]
    label: Callable[[tfds.Example], Any]
    binary: bool = False


def _first(key: str) -> _Rule:
    return _Rule((key,), lambda example: _one(example, key))


def _one(example: tfds.Example, key: str) -> int:
    (value,) = example[key]
    return int(value)


def _count(example: tfds.Example) -> int:
    """Objects from 3 to 10."""
    return len(example["objects/pixel_coords"]) // 3 - 3


def _binned(distance: float, bounds: tuple[float, ...]) -> int:
    """The last bound that lies below."""
    return bisect_left(bounds, distance) - 1


def _closest_object(example: tfds.Example) -> int:
    depths = islice(example["objects/pixel_coords"], 2, None, 3)
    return _binned(min(depths), (0, 8, 8.5, 9, 9.5, 10, 100))


def _closest_vehicle(example: tfds.Example) -> int:
    """Cars, vans and trucks; the last class has none."""
    depths = islice(example.get("objects/location", []), 2, None, 3)
    kinds = example.get("objects/type", [])
    near = min((z for z, kind in zip(depths, kinds, strict=True) if kind < 3), default=1000.0)
    return _binned(near, (-100, 8, 20, 999))


def _orientation(example: tfds.Example) -> int:
    """40 angles in 16 bins of 3 and 2."""
    (ratio,) = struct.unpack("<f", struct.pack("<f", _one(example, "label_orientation") / 2.5))
    return math.floor(ratio)


_RULES = {
    "clevr_count": _Rule(("objects/pixel_coords",), _count),
    "clevr_distance": _Rule(("objects/pixel_coords",), _closest_object),
    "kitti_distance": _Rule(("objects/location", "objects/type"), _closest_vehicle),
    "dsprites_location": _Rule(
        ("label_x_position",), lambda example: _one(example, "label_x_position") // 2, True
    ),
    "dsprites_orientation": _Rule(("label_orientation",), _orientation, True),
    "smallnorb_azimuth": _first("label_azimuth"),
    "smallnorb_elevation": _first("label_elevation"),
}


def read(known: Task, folder: Path) -> Layout:
    """The images and classes of a task of VTAB-1k.

    Args:
        known: the task.
        folder: of one version of its set.
    Raises:
        ValueError: the set is another one, too small, damaged, or has not what the labels come
            from; in one line.
    """
    info = tfds.read_info(folder)
    name = known.tfds.partition("/")[0]
    if info.name != name:
        raise ValueError(f"{shown(folder)}: {info.name}, and {known.name} is made of {name}")
    sizes = {split: info.size(split) for split in info.shards}
    try:
        slices = CUTS[known.cut].slices(sizes)
    except KeyError as error:
        raise ValueError(f"{shown(folder)}: missing split {error.args[0]}") from None
    _check(folder, slices, sizes)
    rule = _RULES.get(known.name, _first("label"))
    found = {split: _rows(info, rule, *where) for split, where in slices.items()}
    names = [str(number) for number in range(known.classes)]
    if known.name not in _RULES and info.classes.get("label") == known.classes:
        names = tfds.class_names(info, "label")
    return of_rows(shown(folder), names, found)


def _check(folder: Path, slices: dict[str, tuple[str, int, int]], sizes: dict[str, int]) -> None:
    """The slices are there, and no image is in two of them."""
    for split, (name, start, stop) in slices.items():
        if not start < stop <= sizes[name]:
            raise ValueError(
                f"{shown(folder)}: {sizes[name]} images in {name}, and those of {split} are "
                f"{start} to {stop}"
            )
        for other, (same, first, last) in slices.items():
            if other != split and same == name and start < last and first < stop:
                raise ValueError(
                    f"{shown(folder)}: {sizes[name]} images in {name} are too few: those of "
                    f"{split} and {other} overlap"
                )


def _rows(
    info: tfds.Info, rule: _Rule, name: str, start: int, stop: int
) -> tuple[list[Item], list[int]]:
    items: list[Item] = []
    labels: list[int] = []
    for place, example in tfds.records(info, name, rule.keys, start, stop):
        try:
            labels.append(rule.label(example))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{place}: no class from {', '.join(rule.keys)} ({type(error).__name__}); is it "
                "another version of the set?"
            ) from None
        items.append(tfds.Record(place, "image", rule.binary))
    return items, labels


def check_version(known: Task, folder: Path) -> None:
    """Says where the images may be others than the papers': their places count."""
    if folder.name != known.version:
        say(
            f"{shown(folder)}: version {folder.name} of {known.tfds}, VPT ran {known.version}; "
            "others may hold their images in another order, and so other 1000 of them"
        )
