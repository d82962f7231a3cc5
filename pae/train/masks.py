"""Images with masks: a class number per pixel, read from folders, and both transformed alike.

    FOLDER/images/{train,val,test}/NAME.jpg      or images/{training,validation}, as ADE20K has it
    FOLDER/masks/{train,val,test}/NAME.png       or annotations/ or labels/
    FOLDER/classes.txt                           a name a line; ADE20K: objectInfo150.txt

A mask is an image of one channel, or of a palette, as large as its image; 255 is no class.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pae.dense import IGNORED
from pae.train import pixels
from pae.train.data import Images, Task
from pae.train.images import Ranges, decode, map_images, opened
from pae.train.listing import read_lines, shown, some, walk

SPLITS = {"train": ("train", "training"), "val": ("val", "validation"), "test": ("test", "testing")}
MASKS = ("masks", "annotations", "labels")
_NAMES = "classes.txt"
_ADE = "objectInfo150.txt"
_MODES = ("1", "L", "P", "I;16", "I")  # of an image of class numbers


@dataclass(frozen=True)
class Masked(Images):
    """Images whose `labels` are masks: paths, or uint8 arrays (H, W)."""

    def subset(self, indices: Any) -> Masked:
        indices = list(indices)
        return Masked([self.items[i] for i in indices], [self.labels[i] for i in indices])


def read_folder(
    root: str | Path,
    *,
    train_size: int | None,
    val_size: int | None,
    test_size: int | None,
    seed: int,
    workers: int,
) -> Task:
    """The task in a folder; arguments as of `pae.train.data.read_folder`.

    Raises:
        ValueError: no such folder, a split or a mask that is missing, a mask of another size.
    """
    base = Path(os.path.expanduser(root))
    classes, splits = read_classes(base), read_splits(base, workers)
    if "train" not in splits:
        raise ValueError(
            f"--data {shown(root)}: no folder images/train or images/training; masks lie in "
            f"{' or '.join(MASKS)} beside images/"
        )
    return make_task(
        base.resolve().name,
        classes,
        *(splits["train"], splits.get("val"), splits.get("test")),
        train_size=train_size,
        val_size=val_size,
        test_size=test_size,
        seed=seed,
    )


def read_splits(base: Path, workers: int) -> dict[str, Masked]:
    """The splits of a folder, each image beside its mask, whose headers were compared.

    Raises:
        ValueError: a mask that is missing, or of another size than its image.
    """
    splits = {}
    for name, folders in SPLITS.items():
        found = [folder for folder in folders if (base / "images" / folder).is_dir()]
        if found:
            splits[name] = _pairs(base, found[0])
    for images in splits.values():
        for _ in map_images(_compared, list(zip(images.items, images.labels)), workers):
            pass
    return splits


def make_task(
    name: str,
    classes: Sequence[str],
    train: Masked,
    val: Masked | None,
    test: Masked | None,
    *,
    train_size: int | None,
    val_size: int | None,
    test_size: int | None,
    seed: int,
) -> Task:
    """A `Task` whose validation images are cut from `train` where it comes without its own: a fifth
    unless `val_size` says otherwise.

    Raises:
        ValueError: there are not as many images.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator).tolist()
    if val is None:
        count = max(1, len(train) // 5) if val_size is None else val_size
        if count >= len(train):
            raise ValueError(
                f"{shown(name)}: {len(train)} images with masks, and {count} for validation leave "
                "none for training; use a smaller --val-size"
            )
        val, order = train.subset(sorted(order[:count])), order[count:]
    elif val_size is not None:
        warnings.warn(f"{shown(name)}: has its own val split, --val-size is ignored", stacklevel=2)
    if train_size is not None:
        if train_size > len(order):
            raise ValueError(
                f"--train-size {train_size}: {shown(name)} has {len(order)} images to train on"
            )
        order = order[:train_size]
    if test_size is not None:
        if test is None or test_size > len(test):
            have = 0 if test is None else len(test)
            raise ValueError(f"--test-size {test_size}: {shown(name)} has {have} test images")
        fixed = torch.Generator().manual_seed(0)
        test = test.subset(sorted(torch.randperm(len(test), generator=fixed)[:test_size].tolist()))
    return Task(name, tuple(classes), train.subset(sorted(order)), val, test)


def read_classes(base: Path) -> list[str]:
    """Names of the classes in a folder.

    Raises:
        ValueError: no folder, no file of names, or a name that is empty or there twice.
    """
    if not base.is_dir():
        raise ValueError(f"--data {shown(base)}: no such folder")
    path = base / _NAMES
    if path.is_file():
        names = [line.strip() for line in read_lines(path)]
    elif (base / _ADE).is_file():
        path = base / _ADE
        names = [line.split("\t")[-1].strip() for line in read_lines(path)[1:]]
    else:
        raise ValueError(f"{shown(base)}: no {_NAMES}, which names the classes, one a line")
    while names and not names[-1]:
        names.pop()
    if len(names) < 2 or "" in names or len(set(names)) < len(names):
        raise ValueError(f"{shown(path)}: expected at least two names of classes, each once")
    if len(names) > IGNORED:
        raise ValueError(f"{shown(path)}: {len(names)} classes; masks of 8 bits have {IGNORED}")
    return names


def _pairs(base: Path, split: str) -> Masked:
    """Images of a split, and their masks by name.

    Raises:
        ValueError: an image without a mask, or no image.
    """
    images = base / "images" / split
    folders = [base / name / split for name in MASKS if (base / name / split).is_dir()]
    if not folders:
        tried = ", ".join(f"{name}/{split}" for name in MASKS)
        raise ValueError(f"{shown(base)}: no folder of masks for images/{split} ({tried})")
    paths = walk(images).paths
    if not paths:
        raise ValueError(f"{shown(images)}: no images")
    names = [path.relative_to(images).with_suffix(".png") for path in paths]
    masks = [folders[0] / name for name in names]
    missing = [str(path) for path, mask in zip(paths, masks) if not mask.is_file()]
    if missing:
        first = masks[[str(p) for p in paths].index(missing[0])]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"{shown(missing[0])}: has no mask, expected {shown(first)}{more}")
    if len(set(names)) < len(names):
        twice = next(str(name) for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(images)}: two images have the mask {twice}; rename one")
    return Masked(paths, list[Any](masks))


def _compared(pair: tuple[Path, Path]) -> None:
    """Raise unless the headers of image and mask say one size, and the mask has one channel."""
    image, mask = pair
    with opened(image) as read:
        size, turned = read.size, read.getexif().get(0x0112, 1) > 4
    if turned:
        size = size[1], size[0]
    with opened(mask) as read:
        own, mode = read.size, read.mode
    _check_mode(mask, mode)
    if own != size:
        raise ValueError(
            f"mask {mask}: {own[0]} x {own[1]} pixels, and its image has {size[0]} x {size[1]}"
        )


def _check_mode(mask: Any, mode: str) -> None:
    if mode not in _MODES:
        raise ValueError(
            f"mask {mask}: expected class numbers in one channel or a palette, got colours ({mode})"
        )


def read_mask(item: Any, classes: int, reduce_zero: bool = False) -> Image.Image:
    """A mask in mode "L": class numbers, 255 where there is none.

    Args:
        item: a path, or a uint8 array (H, W).
        classes: how many there are.
        reduce_zero: the file counts from 1, and 0 is no class (ADE20K).
    Raises:
        ValueError: colours, or a number that is no class; naming the file.
    """
    if isinstance(item, np.ndarray):
        numbers = item.astype(np.int64)
    else:
        with opened(item) as image:
            _check_mode(item, image.mode)
            numbers = np.asarray(image).astype(np.int64)
    if reduce_zero:
        numbers = np.where((numbers == 0) | (numbers == IGNORED), IGNORED, numbers - 1)
    wrong = numbers[(numbers != IGNORED) & ((numbers < 0) | (numbers >= classes))]
    if wrong.size:
        name = "of an array" if isinstance(item, np.ndarray) else item
        value = int(wrong[0]) + (1 if reduce_zero else 0)
        hint = "" if reduce_zero else "; of files that count from 1 --reduce-zero-label takes 1 off"
        raise ValueError(
            f"mask {name}: holds {value}, expected class numbers below "
            f"{classes + (1 if reduce_zero else 0)}, or {IGNORED}{hint}"
        )
    return Image.fromarray(numbers.astype(np.uint8))


# ---- both transformed alike


class Joint(NamedTuple):
    """A transform of an image and its mask to S x S pixels.

    Attributes:
        side: S. resize: of an image, squashed, as evaluation shows it, to a uint8 tensor.
        interpolation: PIL's number. fill: the colour beyond an image's border.
    """

    side: int
    resize: pixels.Transform
    interpolation: int
    fill: tuple[int, ...]

    def squashed(self, image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
        """Both, whatever their shape: images smoothly, masks by the nearest pixel."""
        small = mask.resize((self.side, self.side), Image.Resampling.NEAREST)
        return self.resize(image), torch.from_numpy(np.array(small))

    def drawn(
        self, image: Image.Image, mask: Image.Image, stream: random.Random
    ) -> tuple[Tensor, Tensor]:
        """The short side enlarged to 0.5 to 2 times S, a random square of S, half of them mirrored;
        one in which a class has more than 3/4 of the pixels is drawn again, up to ten times. Beyond
        the border stands the mean colour, and no class.

        Source: mmsegmentation's pipeline for ADE20K, without its change of colours.
        """
        scale = self.side * stream.uniform(0.5, 2.0) / min(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling(self.interpolation))
        mask = mask.resize(size, Image.Resampling.NEAREST)
        spare = [max(0, n - self.side) for n in size]
        for _ in range(10):
            left, top = (stream.randint(0, n) for n in spare)
            box = (left, top, left + self.side, top + self.side)
            cut = np.array(_cropped(mask, box, IGNORED))
            counts = np.bincount(cut[cut != IGNORED], minlength=1)
            if np.count_nonzero(counts) > 1 and counts.max() < 0.75 * counts.sum():
                break
        shown = np.array(_cropped(image, box, self.fill))
        if stream.random() < 0.5:
            shown, cut = shown[:, ::-1], cut[:, ::-1]
        colours = torch.from_numpy(np.ascontiguousarray(shown)).permute(2, 0, 1)
        return colours, torch.from_numpy(np.ascontiguousarray(cut))


def _cropped(image: Image.Image, box: tuple[int, int, int, int], fill: Any) -> Image.Image:
    found = Image.new(image.mode, (box[2] - box[0], box[3] - box[1]), fill)
    found.paste(image, (-box[0], -box[1]))
    return found


class MaskedSplit(Dataset):
    """Images and masks of one split, with the face of `pixels.PixelSplit`: index lists in,
    ((B, 3, S, S), (B, S, S)) in uint8 out.

    Args:
        images: with masks.
        joint: the transform; random in training with `is_random`, by (seed, epoch, image).
        classes, reduce_zero: as of `read_mask`.
    Raises:
        ValueError: an image or a mask that cannot be used; where nothing is random, at once.
    """

    def __init__(
        self,
        images: Images,
        joint: Joint,
        classes: int,
        *,
        is_random: bool,
        seed: int,
        workers: int,
        ranges: Ranges,
        reduce_zero: bool = False,
        cache_bytes: int | None = None,
    ) -> None:
        self.images, self.joint, self.is_random, self.seed = images, joint, is_random, seed
        self.epoch, self.ranges = 0, ranges
        self.mask_of = partial(read_mask, classes=classes, reduce_zero=reduce_zero)
        self.pixels: Tensor | None = None
        self.masks: Tensor | None = None
        room = pixels.CACHE_BYTES if cache_bytes is None else cache_bytes
        if not is_random and len(images) * 4 * joint.side**2 <= room:
            shape = (len(images), joint.side, joint.side)
            shown = torch.empty((shape[0], 3, *shape[1:]), dtype=torch.uint8)
            self.masks = torch.empty(shape, dtype=torch.uint8)
            for i, pair in enumerate(map_images(self._pair, range(len(images)), workers)):
                shown[i], self.masks[i] = pair
            self.pixels = shown

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        if self.pixels is not None and self.masks is not None:
            return self.pixels[indices], self.masks[indices]
        pairs = [self._pair(int(i)) for i in indices]
        shown, masks = zip(*pairs)
        return torch.stack(shown), torch.stack(masks)

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        image = decode(self.images.items[index], self.ranges)
        mask = self.mask_of(self.images.labels[index])
        if image.size != mask.size:
            raise ValueError(
                f"mask {some([str(self.images.labels[index])])}: {mask.width} x {mask.height} "
                f"pixels, and its image has {image.width} x {image.height}"
            )
        if not self.is_random:
            return self.joint.squashed(image, mask)
        stream = random.Random(hash((self.seed, self.epoch, index)))
        return self.joint.drawn(image, mask, stream)
