"""Clips on a disk: `train/<class>/*.npy` with optional `val/` and `test/`, each file the frames of
one clip, (T, H, W, 3) or grey (T, H, W), in uint8.

No video is decoded here: frames are taken out once, by whatever library the videos need. Of a
longer clip the frames in the middle of as many equal parts as the model reads are taken, the same
ones in training and evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pae.train.data import Images, Task, make_task
from pae.train.images import Ranges, map_images
from pae.train.listing import entries, is_folder, shown

_SPLITS = ("train", "val", "test")
SUFFIX = ".npy"
_VIDEOS = {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
_WAY_OUT = (
    "pae decodes no video: np.save its frames, uint8 (T, H, W, 3), e.g. those of "
    "torchcodec.decoders.VideoDecoder(file, dimension_order='NHWC')"
)


def read_clips(
    root: str | Path,
    frames: int,
    *,
    train_size: int | None = None,
    val_size: int | None = None,
    seed: int = 0,
    workers: int = 2,
) -> Task:
    """The task in a folder of clips; the header of each is looked at.

    Args:
        root: the folder.
        frames: of a clip that the model reads.
        train_size, val_size, seed: as for `data.make_task`.
        workers: threads.

    Raises:
        ValueError: no such folder or layout, a file that is no clip of at least `frames` frames, a
            class without clips or one that the training clips lack; in one line that names it.
    """
    root = Path(os.path.expanduser(root))
    if not root.is_dir():
        raise ValueError(f"--data {shown(root)}: no such folder")
    names = {entry.name for entry in entries(root) if is_folder(entry)}
    if "train" not in names:
        raise ValueError(f"--data {shown(root)}: expected train/<class>/*.npy for a model of clips")
    classes = [entry.name for entry in entries(root / "train") if is_folder(entry)]
    splits = {split: _read(root / split, classes) for split in _SPLITS if split in names}
    every = [path for images in splits.values() for path in images.items]
    for _ in map_images(lambda path: _opened(path, frames), every, workers):
        pass
    task = make_task(
        root.resolve().name,
        classes,
        splits["train"],
        splits.get("val"),
        splits.get("test"),
        train_size=train_size,
        val_size=val_size,
        seed=seed,
    )
    return replace(task, ranges=Ranges())  # 8 bits have no other


def read_labelled(root: Path) -> tuple[list[str], dict[str, Images], bool]:
    """The clips of a folder that is not trained on, of its `train/`, `val/` and `test/`, or of
    class folders alone, as "train". Files are not opened.

    Returns:
        The names of all classes, the splits, and whether they are class folders alone.

    Raises:
        ValueError: as `read_clips`.
    """
    names = {entry.name for entry in entries(root) if is_folder(entry)}
    places = {split: root / split for split in _SPLITS if split in names}
    alone = not places
    places = places or {"train": root}
    folders = [entry for place in places.values() for entry in entries(place) if is_folder(entry)]
    classes = sorted({entry.name for entry in folders})
    if not classes:
        raise ValueError(f"--data {shown(root)}: expected <class>/*.npy for a model of clips")
    return classes, {split: _read(place, classes) for split, place in places.items()}, alone


def is_clip(name: str) -> bool:
    """Whether a file of that name may be one."""
    return name.lower().endswith(SUFFIX)


def _read(folder: Path, classes: Sequence[str]) -> Images:
    paths, labels = [], []
    for entry in entries(folder):
        if not is_folder(entry):
            raise ValueError(f"{shown(entry.path)}: expected folders of classes alone beside it")
        if entry.name not in classes:
            raise ValueError(f"{shown(entry.path)}: the training clips have no such class")
        own = [Path(inner.path) for inner in entries(entry.path)]
        for path in own:
            _refuse_others(path)
        if not own:
            raise ValueError(f"{shown(entry.path)}: class without clips")
        paths += own
        labels += [classes.index(entry.name)] * len(own)
    return Images(paths, labels)


def _refuse_others(path: Path) -> None:
    if path.suffix.lower() in _VIDEOS:
        raise ValueError(f"{shown(path)}: {_WAY_OUT}")
    if not is_clip(path.name):
        raise ValueError(f"{shown(path)}: expected .npy files of clips alone")


def _opened(item: Path | np.ndarray, frames: int) -> np.ndarray:
    """The array of a file, its values still on the disk; or an array, checked."""
    path = "of an array" if isinstance(item, np.ndarray) else item
    if not isinstance(item, np.ndarray):
        _refuse_others(Path(item))
    try:
        clip: Any = item
        if not isinstance(item, np.ndarray):
            clip = np.load(item, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"unreadable clip {shown(path)}: {first}") from None
    grey = isinstance(clip, np.ndarray) and clip.ndim == 3
    if (
        not isinstance(clip, np.ndarray)
        or clip.dtype != np.uint8
        or not (grey or (clip.ndim == 4 and clip.shape[3] == 3))
    ):
        what = f"{clip.dtype} {clip.shape}" if isinstance(clip, np.ndarray) else "no array"
        raise ValueError(f"clip {shown(path)}: {what}, expected uint8 (T, H, W, 3) or (T, H, W)")
    if len(clip) < frames or 0 in clip.shape:
        raise ValueError(f"clip {shown(path)}: {len(clip)} frames, and the model reads {frames}")
    return clip


def read_frames(item: Path | np.ndarray, frames: int) -> list[np.ndarray]:
    """As many frames of a clip, a file or an array, evenly spaced, each (H, W, 3) or (H, W).

    Raises:
        ValueError: as `read_clips`.
    """
    clip = _opened(item, frames)
    middles = (np.arange(frames) + 0.5) * (len(clip) / frames)
    return [np.array(clip[int(i)]) for i in middles]
