"""What the numbers of a run depend on, kept beside them, so that nothing else goes on in its place.

A record is plain JSON: the settings, the classes, per split the number of images and a digest of
their names and labels, the side of the images, the backbone with the fingerprint of its weights,
and the versions. A state carries it, and config.json shows it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from pae.checkpoint import backbone_name, fingerprint
from pae.train.data import Images, Task
from pae.train.options import Options, in_use, renamed
from pae.train.stored import Stored
from pae.version import __version__

Record = dict[str, Any]

# options that may differ when a run goes on: where things lie, and how fast they are worked on
CHANGEABLE = ("data", "weights", "device", "workers", "save_every_steps")
# options that the machine chooses where nobody gives them, so that a run that goes on keeps its own
CHOSEN = ("amp", "mpa_images", "mpa_precision")


def describe(options: Options, task: Task, backbone: nn.Module, image_size: int) -> Record:
    """The record of a run.

    Args:
        options: resolved.
        task: its images.
        backbone: before it is trained.
        image_size: the side in pixels.
    """
    import timm

    splits = {"train": task.train, "val": task.val, "test": task.test}
    return {
        "settings": dataclasses.asdict(options),
        "classes": list(task.classes),
        "splits": {
            name: None if images is None else _split(images, options.data)
            for name, images in splits.items()
        },
        "image_size": image_size,
        "backbone": {"name": backbone_name(backbone), "fingerprint": fingerprint(backbone)},
        "versions": {
            "pae": __version__,
            "torch": str(torch.__version__),  # its own type is no plain data
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }


def differences(was: Record, now: Record, settings: bool = True) -> list[str]:
    """What makes `now` another run than `was`, in words; of settings those not in `CHANGEABLE`.

    Args:
        was, now: of `describe`.
        settings: compare the settings too.
    """
    found = list(changed_settings(was["settings"], now["settings"])) if settings else []
    found += _classes(was["classes"], now["classes"])
    for name, split in now["splits"].items():
        before = was["splits"][name]
        if before != split:
            left, right = (0 if s is None else s["images"] for s in (before, split))
            how = f"{left} images, now {right}" if left != right else "other files or labels"
            found.append(f"{name} split: {how}")
    if was["image_size"] != now["image_size"]:
        found.append(f"images of side {was['image_size']}, now {now['image_size']}")
    if was["backbone"] != now["backbone"]:
        before, after = was["backbone"], now["backbone"]
        if before["name"] == after["name"]:
            found.append(f"other weights in the backbone {after['name']}")
        else:
            found.append(f"backbone {before['name']}, now {after['name']}")
    return found


def drift(was: Record, now: Record) -> list[str]:
    """What makes the same run round differently, in words: the device, the libraries."""
    found = []
    left, right = was["settings"]["device"], now["settings"]["device"]
    if left != right:
        found.append(f"device {left}, now {right}")
    for name in ("torch", "timm"):
        before, after = was["versions"].get(name), now["versions"][name]
        if before != after:
            found.append(f"{name} {before}, now {after}")
    return found


def changed_settings(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """In words, what differs between two tables of resolved options, of those that both runs have a
    use for; where one has no such option, it is of another version, and nothing is said.
    """
    was = dict(renamed(was))
    before, after = in_use(was), in_use(now)
    for name in after:
        if name not in before or name in CHANGEABLE:
            continue
        # a None that stands for another option's value is said of that one
        if before[name] != after[name] and was[name] != now[name]:
            yield f"{name} {_shown(was[name])}, now {_shown(now[name])}"


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)


def _classes(was: list[str], now: list[str]) -> list[str]:
    if len(was) != len(now):
        return [f"{len(was)} classes, now {len(now)}"]
    for number, (before, after) in enumerate(zip(was, now, strict=True)):
        if before != after:
            return [f"class {number} was {before!r}, is {after!r}"]
    return []


def _split(images: Images, root: str | None) -> Record:
    """Number and digest of a split; a folder may be moved, so files count by their place in it.

    Of the first image of every class, and of a thousand more, the size in bytes counts too: it
    tells when files of the same names are others, without a look at every one of them.
    """
    digest = hashlib.sha256()
    inside = None if root is None else os.path.join(root, "")
    stride, seen = max(1, len(images) // 1000), set()
    for number, (item, label) in enumerate(zip(images.items, images.labels, strict=True)):
        masked = isinstance(label, (str, os.PathLike, np.ndarray))
        size_counts = number % stride == 0 or (not masked and label not in seen)
        _add(digest, item, inside, size_counts)
        if masked:
            digest.update(b"\0")
            _add(digest, label, inside, size_counts)
            digest.update(b"\n")
        else:
            seen.add(label)
            digest.update(f"\0{label}\n".encode())
    return {"images": len(images), "digest": digest.hexdigest()}


def _add(digest: Any, item: Any, inside: str | None, size_counts: bool) -> None:
    """An image or a mask: pixels, or the place of a file and, where that counts, its size."""
    if isinstance(item, np.ndarray):
        digest.update(f"{item.dtype}{item.shape}".encode())
        digest.update(np.ascontiguousarray(item).data)
        return
    if isinstance(item, Stored):  # of a table whose name says little: the bytes count
        digest.update(str(item).encode())
        if size_counts:
            digest.update(hashlib.sha256(item.read()).digest())
        return
    path = os.fspath(item)
    digest.update(os.fsencode(path.removeprefix(inside) if inside else path))
    if size_counts:
        with contextlib.suppress(OSError):  # whoever reads it will say so
            digest.update(f"\0{os.path.getsize(path)}".encode())
