"""Which images, which labels: a task of three splits, and seeded cuts of its training images."""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pae.train.images import Ranges, survey
from pae.train.layouts import TRAINVAL, Layout, read_classes, read_data
from pae.train.listing import shown, some
from pae.train.stored import Columns


@dataclass(frozen=True)
class Images:
    """One split: `items` are image paths, `Stored` images, or an (N, H, W) uint8 array; `labels`
    are class numbers.

    Raises:
        ValueError: the two have different lengths.
    """

    items: Any
    labels: list[int]

    def __post_init__(self) -> None:
        if len(self.items) != len(self.labels):
            raise ValueError(f"{len(self.items)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Iterable[int]) -> Images:
        """The images at `indices`, in that order."""
        indices = list(indices)
        return Images([self.items[i] for i in indices], [self.labels[i] for i in indices])


@dataclass(frozen=True)
class Task:
    """A classification task: class names and three splits; `val` is None where its images are
    trained on, `test` where there is none.

    `ranges` is what `surveyed` finds, None before. `trainval` are the images of train and val as a
    list of their own has them, None without one. `pixels` is what became of the images on their way
    (`pae.train.recompressed`), None where nobody looked.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images | None
    test: Images | None
    ranges: Ranges | None = None
    trainval: Images | None = None
    pixels: str | None = None

    def joined(self) -> Task:
        """The task without validation images: they are trained on too, behind the others."""
        if self.val is None:
            return self
        both = self.trainval or Images(
            [*self.train.items, *self.val.items], [*self.train.labels, *self.val.labels]
        )
        return replace(self, train=both, val=None)

    def surveyed(self, workers: int) -> Task:
        """The task with the ranges of all its images, found by `images.survey` unless known.

        Raises:
            ValueError: see `images.survey`.
        """
        if self.ranges is not None:
            return self
        splits = [split for split in (self.train, self.val, self.test) if split]
        items = [item for split in splits for item in split.items]
        return replace(self, ranges=survey(items, workers))

    def with_fewer_tests(self, count: int) -> Task:
        """The task with `count` test images, which are always the same.

        Raises:
            ValueError: it has not as many.
        """
        have = len(self.test) if self.test else 0
        if self.test is None or have < count:
            raise ValueError(f"--test-size {count}: {shown(self.name)} has {have} test images")
        (chosen,) = stratified_cut(self.test.labels, [count], seed=0)
        return replace(self, test=self.test.subset(chosen))

    def sizes(self) -> dict[str, int]:
        """Number of images per split."""
        return {
            "train": len(self.train),
            "val": len(self.val) if self.val else 0,
            "test": len(self.test) if self.test else 0,
        }


def stratified_cut(
    labels: Sequence[int], sizes: Sequence[int], seed: int, *, cover: bool = False
) -> list[list[int]]:
    """Disjoint random index lists of exactly `sizes`, each with the class shares of `labels`.

    Every class is permuted once; each part takes its share of every class, rounded by largest
    remainder, so that the same seed always gives the same images. The time is linear in the number
    of images.

    Args:
        labels: class number per image.
        sizes: how many images each part takes.
        seed: seed of the permutations.
        cover: the first part takes an image of every class, also of those too rare for a share;
            the commonest classes give theirs up. Without such classes nothing changes.
    Returns:
        One sorted list of indices per entry of `sizes`.
    Raises:
        ValueError: a size is below 1, the sizes add up to more than there are images, or the first
            is too small for `cover`.
    """
    if min(sizes) < 1 or sum(sizes) > len(labels):
        raise ValueError(
            f"split sizes must be positive and add up to at most {len(labels)} images, got "
            + " + ".join(str(size) for size in sizes)
        )
    import torch

    generator = torch.Generator().manual_seed(seed)
    members: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    pools = {}
    for name in sorted(members):
        order = torch.randperm(len(members[name]), generator=generator).tolist()
        pools[name] = [members[name][i] for i in order]
    if cover and sizes[0] < len(pools):
        raise ValueError(f"{sizes[0]} images cannot cover {len(pools)} classes")
    parts: list[list[int]] = []
    for size in sizes:
        left = {name: len(pool) for name, pool in pools.items()}
        total = sum(left.values())
        shares = {name: size * n / total for name, n in left.items()}
        take = {name: int(share) for name, share in shares.items()}
        by_remainder = sorted(shares, key=lambda name: (take[name] - shares[name], name))
        for name in by_remainder[: size - sum(take.values())]:
            take[name] += 1
        if cover and not parts:
            _cover(take)
        part = [i for name, n in take.items() for i in pools[name][:n]]
        pools = {name: pool[take[name] :] for name, pool in pools.items()}
        parts.append(sorted(part))
    return parts


def _cover(take: dict[int, int]) -> None:
    """Gives every class that takes no image one of those that the commonest ones take."""
    largest = [(-n, name) for name, n in take.items() if n > 1]
    heapq.heapify(largest)
    for name in [name for name, n in take.items() if n == 0]:
        n, giver = largest[0]
        heapq.heapreplace(largest, (n + 1, giver))
        take[giver] -= 1
        take[name] = 1


def make_task(
    name: str,
    classes: Sequence[str],
    train: Images,
    val: Images | None,
    test: Images | None,
    *,
    train_size: int | None,
    val_size: int | None,
    seed: int,
) -> Task:
    """A `Task` whose validation images are cut from `train` when it comes without its own.

    Training images keep every class that `train` has; which classes a split lacks is said in a
    warning.

    Args:
        train_size: training images kept (a stratified choice), None for all.
        val_size: validation images cut from `train`, None for a fifth of it; used only without
            `val`.
        seed: seed of the cut.
    Raises:
        ValueError: labels outside the classes, images of one class alone, or sizes that the images
            do not have.
    """
    who = shown(name)
    _check_labels(who, classes, {"train": train, "val": val, "test": test})
    kinds = len(set(train.labels))
    if kinds < 2:
        only = f", {some([classes[train.labels[0]]])}" if kinds else ""
        raise ValueError(f"{who}: the training images have one class alone{only}; expected two")
    if val is None:
        if val_size is None and train_size is None:
            spare = len(train) - kinds  # images that no class needs for training
            if spare == 0:
                raise ValueError(
                    f"{who}: {len(train)} images of as many classes leave none for validation; "
                    "add images, or a val split"
                )
            val_size = max(1, min(len(train) // 5, spare))
        elif val_size is None:
            assert train_size is not None
            val_size = max(1, train_size // 4)
        if train_size is None:
            train_size = len(train) - val_size
        train, val = _cut(who, train, [train_size, val_size], seed)
    else:
        if val_size is not None:
            warnings.warn(f"{who}: has its own val split, --val-size is ignored", stacklevel=2)
        if train_size is not None:
            (train,) = _cut(who, train, [train_size], seed)
    for split, images in {"train": train, "val": val, "test": test}.items():
        if images is not None:
            _warn_about_lacking(who, classes, split, images)
    return Task(name, tuple(classes), train, val, test)


def _cut(who: str, images: Images, sizes: list[int], seed: int) -> list[Images]:
    if sum(sizes) > len(images):
        wanted = " + ".join(str(size) for size in sizes)
        raise ValueError(
            f"{who}: at most {len(images)} images are there, {wanted} are wanted; use a smaller "
            "--train-size or --val-size"
        )
    kinds = len(set(images.labels))
    if sizes[0] < kinds:
        raise ValueError(
            f"{who}: {max(sizes[0], 0)} training images cannot cover {kinds} classes; use a "
            "larger --train-size or a smaller --val-size"
        )
    return [images.subset(part) for part in stratified_cut(images.labels, sizes, seed, cover=True)]


def read_folder(
    root: str | Path,
    *,
    train_size: int | None = None,
    val_size: int | None = None,
    seed: int = 0,
    columns: Columns | None = None,
) -> Task:
    """Reads a dataset folder in any of the layouts of `pae.train.layouts`, or ``hf:NAME``.

    Raises:
        ValueError: no such folder, no known layout, a missing split, an empty class, a class that
            the training split lacks, a listed file that is absent.
    """
    name, layout = read_data(root, columns)
    return from_layout(name, layout, train_size=train_size, val_size=val_size, seed=seed)


def from_layout(
    name: str,
    layout: Layout,
    *,
    train_size: int | None = None,
    val_size: int | None = None,
    seed: int = 0,
) -> Task:
    """The task of a folder that was read; arguments as for `read_folder`.

    Raises:
        ValueError: as `make_task`.
    """
    images = {split: Images(found.paths, found.labels) for split, found in layout.splits.items()}
    task = make_task(
        name,
        layout.classes,
        images["train"],
        images.get("val"),
        images.get("test"),
        train_size=train_size,
        val_size=val_size,
        seed=seed,
    )
    whole = train_size is None and "val" in images
    return replace(task, trainval=images.get(TRAINVAL) if whole else None, pixels=layout.pixels)


def read_image_folder_split(folder: Path, classes: Sequence[str]) -> Images:
    """`Images` of ``folder/<class>/**``, files in sorted order; every class must have one."""
    found = read_classes(folder, classes)
    return Images(found.paths, found.labels)


def _check_labels(who: str, classes: Sequence[str], splits: Mapping[str, Images | None]) -> None:
    for split, images in splits.items():
        if images is None:
            continue
        for label in images.labels:
            if not 0 <= label < len(classes):
                raise ValueError(
                    f"{who}: split {split} has label {label}, expected 0..{len(classes) - 1}"
                )


def _warn_about_lacking(who: str, classes: Sequence[str], split: str, images: Images) -> None:
    lacking = sorted(set(range(len(classes))) - set(images.labels))
    if lacking:
        names = some([classes[number] for number in lacking[:6]])
        warnings.warn(
            f"{who}: split {split} has no images of {len(lacking)} of {len(classes)} classes: "
            f"{names}",
            stacklevel=3,
        )
