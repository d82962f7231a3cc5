"""Which images, which labels: dataset folders in the layouts people have, and seeded cuts of them.

Layouts read by `read_folder`:

* ImageFolder: ``train/<class>/*``, optional ``val/`` and ``test/`` (or class folders alone, which
  count as ``train``);
* VTAB-1k as NOAH wrote it: ``images/`` with ``train800.txt``, ``val200.txt``, ``test.txt``, each
  line ``path label``;
* FGVC as VPT reads it: ``train.json``, ``val.json``, ``test.json``, each ``{path: class id}``.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pae.train.images import image_suffixes

_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_VTAB_FILES = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}


@dataclass(frozen=True)
class Images:
    """One split: `items` are image paths (or an (N, H, W) uint8 array), `labels` are class numbers.

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
        return Images([self.items[i] for i in indices], [self.labels[i] for i in indices])


@dataclass(frozen=True)
class Task:
    """A classification task: class names and three splits; `test` is None when there is none."""

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images
    test: Images | None

    def sizes(self) -> dict[str, int]:
        """Number of images per split."""
        return {
            "train": len(self.train),
            "val": len(self.val),
            "test": len(self.test) if self.test else 0,
        }


Splits = dict[str, Images]


def stratified_cut(labels: Sequence[int], sizes: Sequence[int], seed: int) -> list[list[int]]:
    """Disjoint random index lists of exactly `sizes`, each with the class shares of `labels`.

    Every class is permuted once; each part takes its share of every class, rounded by largest
    remainder, so that the same seed always gives the same images.

    Args:
        labels: class number per image.
        sizes: how many images each part takes.
        seed: seed of the permutations.
    Returns:
        One sorted list of indices per entry of `sizes`.
    Raises:
        ValueError: a size is below 1, or the sizes add up to more than there are images.
    """
    if min(sizes) < 1 or sum(sizes) > len(labels):
        raise ValueError(
            f"split sizes must be positive and add up to at most {len(labels)} images, got "
            + " + ".join(str(size) for size in sizes)
        )
    import torch

    generator = torch.Generator().manual_seed(seed)
    counts = Counter(labels)
    pools = {}
    for name in sorted(counts):
        members = [i for i, label in enumerate(labels) if label == name]
        order = torch.randperm(len(members), generator=generator).tolist()
        pools[name] = [members[i] for i in order]
    parts = []
    for size in sizes:
        left = {name: len(pool) for name, pool in pools.items()}
        shares = {name: size * n / sum(left.values()) for name, n in left.items()}
        take = {name: int(share) for name, share in shares.items()}
        by_remainder = sorted(shares, key=lambda name: (take[name] - shares[name], name))
        for name in by_remainder[: size - sum(take.values())]:
            take[name] += 1
        part = [i for name, n in take.items() for i in pools[name][:n]]
        pools = {name: pool[take[name] :] for name, pool in pools.items()}
        parts.append(sorted(part))
    return parts


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

    Args:
        train_size: training images kept (a stratified choice), None for all.
        val_size: validation images cut from `train`, None for a fifth of it; used only without
            `val`.
        seed: seed of the cut.
    """
    if val is None:
        if val_size is None:
            val_size = max(1, len(train) // 5) if train_size is None else max(1, train_size // 4)
        if train_size is None:
            train_size = len(train) - val_size
        kept, held = stratified_cut(train.labels, [train_size, val_size], seed)
        train, val = train.subset(kept), train.subset(held)
        _check_coverage(name, classes, train)
    elif train_size is not None:
        train = train.subset(stratified_cut(train.labels, [train_size], seed)[0])
        _check_coverage(name, classes, train)
    _check_labels(name, classes, {"train": train, "val": val, "test": test})
    return Task(name, tuple(classes), train, val, test)


def read_folder(
    root: str | Path, *, train_size: int | None = None, val_size: int | None = None, seed: int = 0
) -> Task:
    """Reads a dataset folder in any of the layouts above.

    Raises:
        ValueError: no such folder, no known layout, a missing split, an empty class, a class that
            the training split lacks, a listed file that is absent.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f"--data {root}: no such folder")
    if (root / "images").is_dir() and any((root / f).is_file() for f in _VTAB_FILES.values()):
        classes, splits = _read_vtab(root)
    elif (root / "train.json").is_file():
        classes, splits = _read_fgvc(root)
    else:
        classes, splits = _read_image_folder(root)
    return make_task(
        root.resolve().name,
        classes,
        splits["train"],
        splits.get("val"),
        splits.get("test"),
        train_size=train_size,
        val_size=val_size,
        seed=seed,
    )


def read_image_folder_split(folder: Path, classes: Sequence[str]) -> Images:
    """`Images` of ``folder/<class>/**``, files in sorted order; every class must have one."""
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if unknown := sorted(set(found) - set(classes)):
        raise ValueError(f"{folder}: class {unknown[0]!r} is not among the training classes")
    items, labels = [], []
    for number, name in enumerate(classes):
        files = []
        if name in found:
            files = [
                path
                for path in sorted((folder / name).rglob("*"))
                if path.suffix.lower() in image_suffixes() and not path.name.startswith(".")
            ]
        if not files:
            raise ValueError(f"{folder / name}: class without images")
        items += files
        labels += [number] * len(files)
    return Images(items, labels)


def _read_image_folder(root: Path) -> tuple[list[str], Splits]:
    folders = {}
    for split, names in _SPLIT_FOLDERS.items():
        for name in names:
            if (root / name).is_dir():
                folders[split] = root / name
                break
    if not folders:
        folders["train"] = root
    elif "train" not in folders:
        raise ValueError(f"{root}: missing split train/ (found {', '.join(sorted(folders))})")
    classes = sorted(
        entry.name
        for entry in folders["train"].iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if len(classes) < 2:
        raise ValueError(
            f"{root}: not a dataset folder; expected train/<class>/ folders for two or more "
            "classes, images/ with train800.txt (VTAB-1k), or train.json (FGVC)"
        )
    return classes, {
        split: read_image_folder_split(folder, classes) for split, folder in folders.items()
    }


def _read_vtab(root: Path) -> tuple[list[str], Splits]:
    splits = {}
    for split, name in _VTAB_FILES.items():
        listing = root / name
        if not listing.is_file():
            raise ValueError(f"{root}: missing split {name}")
        items, labels = [], []
        for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            path, _, label = line.strip().rpartition(" ")
            if not path or not label.isdigit():
                raise ValueError(f"{listing}:{number}: expected 'path label', got {line!r}")
            items.append(root / path)
            labels.append(int(label))
        splits[split] = Images(items, labels)
    _check_files(root, splits)
    for split, expected in (("train", 800), ("val", 200)):
        if len(splits[split]) != expected:
            warnings.warn(
                f"{root / _VTAB_FILES[split]}: {len(splits[split])} images, VTAB-1k has {expected}",
                stacklevel=2,
            )
    _warn_about_recompression(root, splits["train"].items[0])
    count = 1 + max(max(images.labels) for images in splits.values())
    return [str(number) for number in range(count)], splits


def _warn_about_recompression(root: Path, path: Path) -> None:
    """The circulating VTAB-1k archives re-encoded tiny images as JPEG, which costs accuracy."""
    from PIL import Image

    if path.suffix.lower() not in (".jpg", ".jpeg"):
        return
    with Image.open(path) as image:
        if max(image.size) <= 64:
            warnings.warn(
                f"{root}: {image.size[0]} x {image.size[1]} images stored as JPEG; results will "
                "be below those on the original pixels",
                stacklevel=2,
            )


def _read_fgvc(root: Path) -> tuple[list[str], Splits]:
    tables = {}
    for split in _SPLIT_FOLDERS:
        listing = root / f"{split}.json"
        if not listing.is_file():
            if split == "val":
                continue
            raise ValueError(f"{root}: missing split {listing.name}")
        try:
            table = json.loads(listing.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{listing}: not a JSON file ({error})") from None
        if not isinstance(table, dict) or not table:
            raise ValueError(f"{listing}: expected a non-empty object {{path: class id}}")
        tables[split] = table
    # numbered over the training ids once: numbering per file would shift classes a split lacks
    ids = sorted(set(tables["train"].values()))
    number = {identity: i for i, identity in enumerate(ids)}
    base = next(
        (
            b
            for b in (root, root / "images", root / "Images")
            if (b / next(iter(tables["train"]))).is_file()
        ),
        root,
    )
    splits = {}
    for split, table in tables.items():
        if unknown := set(table.values()) - set(ids):
            raise ValueError(f"{root / split}.json: class {min(unknown)} is not in train.json")
        splits[split] = Images([base / path for path in table], [number[v] for v in table.values()])
    _check_files(root, splits)
    return [str(identity) for identity in ids], splits


def _check_files(root: Path, splits: Splits) -> None:
    for split, images in splits.items():
        if not len(images):
            raise ValueError(f"{root}: split {split} is empty")
        for path in images.items:
            if not path.is_file():
                raise ValueError(f"{root}: split {split} lists a file that is absent: {path}")


def _check_labels(name: str, classes: Sequence[str], splits: Mapping[str, Images | None]) -> None:
    for split, images in splits.items():
        if images is None:
            continue
        for label in images.labels:
            if not 0 <= label < len(classes):
                raise ValueError(
                    f"{name}: split {split} has label {label}, expected 0..{len(classes) - 1}"
                )


def _check_coverage(name: str, classes: Sequence[str], train: Images) -> None:
    """Our own cuts must cover every class; VTAB's published train800 lists do not all do so."""
    if missing := sorted(set(range(len(classes))) - set(train.labels)):
        raise ValueError(
            f"{name}: {len(train)} training images leave none for class "
            f"{classes[missing[0]]!r}; use a larger --train-size"
        )
