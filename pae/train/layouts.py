"""The layouts that people keep labelled images in, read to class names and lists per split.

* ImageFolder: ``train/<class>/**``, optional ``val/`` and ``test/`` (or class folders alone, which
  count as ``train``);
* VTAB-1k as NOAH wrote it: ``train800.txt``, ``val200.txt``, ``test.txt``, lines ``path label``,
  and ``train800val200.txt``, the first two in one;
* FGVC as VPT reads it: ``train.json``, ``val.json``, ``test.json``, each ``{path: class id}``;
* TensorFlow Datasets (`pae.train.tfds`): ``dataset_info.json``, ``features.json``, TFRecords;
* tables of Hugging Face (`pae.train.hf_data`): no folder, but ``hf:NAME``.

Names of splits count in any case, with their synonyms; hidden parts of a path are left out. What is
left out beside them, and what looks odd but can be meant, is said in one warning each.
"""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from pae.protocols.tasks import VTAB
from pae.train import hf_data, recompressed, tfds
from pae.train.listing import (
    Found,
    Key,
    entries,
    is_folder,
    is_hidden,
    is_image,
    is_text,
    locate,
    read_list,
    read_table,
    shown,
    some,
    walk,
)
from pae.train.stored import Columns, Item

_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names}
TRAINVAL = "trainval"  # not one of three, but two of them once more
_VTAB_SPLIT_OF = {"train800": "train", "val200": "val", "test": "test"}
_VTAB_LISTS = {**_VTAB_SPLIT_OF, "train800val200": TRAINVAL}
_LIKE_A_SPLIT = re.compile(
    r"((images?|imgs?|data|dataset|set|seg)[-_ ]?)?"
    r"(train|training|val|valid|validation|test|testing|dev|eval)"
    r"([-_ ]?(set|data|images?|imgs?|split|[0-9]))*",
    re.IGNORECASE,
)
# folders of a data set's own making: the first are never classes, the others may be some
_NO_CLASSES = {"images", "imgs", "jpegimages", "annotations"}
_SELDOM_CLASSES = {
    *("image", "img", "annotation", "label", "labels", "mask", "masks", "segmentation"),
    *("segmentations", "bbox", "bboxes", "data", "dataset", "meta", "metadata"),
}
# labels are numbers of rows of the head: far more of them than classes seen is a slip of the pen
_FEW_CLASSES, _GAPS = 1000, 10
_EXPECTED = (
    "expected train/<class>/ folders for two or more classes, images/ with train800.txt "
    "(VTAB-1k), or train.json (FGVC)"
)


class Listed(NamedTuple):
    """The images of one split: files, class numbers, and what identifies each file."""

    paths: list[Item]
    labels: list[int]
    keys: list[Key]

    def subset(self, indices: Sequence[int]) -> Listed:
        """Those at `indices`, in that order."""
        return Listed(
            [self.paths[i] for i in indices],
            [self.labels[i] for i in indices],
            [self.keys[i] for i in indices],
        )


_Label = TypeVar("_Label", int, str)
_Table = tuple[list[str], list[_Label]]  # names and labels


class Layout(NamedTuple):
    """Class names, splits (of lists also `TRAINVAL`), and what became of the pixels where that was
    looked at.
    """

    classes: list[str]
    splits: dict[str, Listed]
    pixels: str | None = None


def read_data(data: str | Path, columns: Columns | None = None) -> tuple[str, Layout]:
    """What --data names, a folder or ``hf:NAME``: what it is called, its class names and splits.

    Raises:
        ValueError: as `read_layout`; no such folder.
    """
    given, columns = os.fspath(data), columns or Columns()
    if hf_data.is_hf(given):
        return hf_data.title(given), _read_hf(given, columns)
    root = folder_of(given)
    layout = read_layout(root, columns)
    place = root.resolve()
    return (place.parent if tfds.is_version(place) else place).name, layout


def folder_of(given: str) -> Path:
    """The folder that --data names.

    Raises:
        ValueError: there is none.
    """
    root = Path(os.path.expanduser(given))
    if root.is_file():
        raise ValueError(f"--data {shown(given)}: a file; unpack it and give its folder")
    if not os.path.isdir(root):
        raise ValueError(f"--data {shown(given)}: no such folder")
    return root


def read_layout(root: Path, columns: Columns | None = None) -> Layout:
    """Class names and splits of a data folder in any of the layouts above.

    Args:
        root: the folder.
        columns: which part of a row is what, of layouts that have rows.
    Raises:
        ValueError: none of the layouts, or something in one that cannot be meant; the message
            names the file or folder.
    """
    columns = columns or Columns()
    if (version := tfds.locate(root)) is not None:
        return _read_tfds(version, columns)
    if any(columns):
        option = "--image-column" if columns.image else "--label-column"
        raise ValueError(
            f"{option}: {shown(root)} has no columns; they are of --data hf:NAME, and of folders "
            "of TensorFlow Datasets"
        )
    files: list[str] = []
    folders: list[str] = []
    for entry in entries(root):
        (folders if is_folder(entry) else files).append(entry.name)
    lists = _one_per_split(root, files, ".txt", _VTAB_LISTS)
    tables = _one_per_split(root, files, ".json", _SPLIT_OF)
    splits = _one_per_split(root, folders, "", _SPLIT_OF)
    has_images = any(name.lower() in _NO_CLASSES for name in folders)
    if {"state.json", "dataset_dict.json"} & set(files):
        raise ValueError(f"{shown(root)}: tables of Hugging Face: give --data hf:{shown(root)}")
    if "train" in lists or (lists and has_images and not splits and "train" not in tables):
        layout = _read_vtab(root, lists)
    elif "train" in tables and ("test" in tables or "train" not in splits):
        layout = _read_fgvc(root, tables)
    else:
        layout = _read_image_folder(root, folders, splits)
        if splits:
            _warn_about_loose(root, sum(map(is_image, files)))
        if unread := [*lists.values(), *tables.values()]:
            say(f"{shown(root)}: {some(unread)} ignored: the folders say what is in which split")
    _warn_about_doubles(root, layout.splits)
    return layout


def _one_per_split(
    root: Path, names: Iterable[str], suffix: str, split_of: dict[str, str]
) -> dict[str, str]:
    """{split: name} for the names of splits among `names`."""
    found: dict[str, str] = {}
    for name in names:
        if not name.lower().endswith(suffix):
            continue
        split = split_of.get(name.lower().removesuffix(suffix))
        if split in found:
            raise ValueError(
                f"{shown(root)}: {found[split]} and {name} are both the {split} split; merge them "
                "or move one away"
            )
        if split is not None:
            found[split] = name
    return found


def say(text: str) -> None:
    """A warning of one line."""
    warnings.warn(text, stacklevel=2)


# ---- ImageFolder


def _read_image_folder(root: Path, folders: list[str], splits: dict[str, str]) -> Layout:
    if not splits:
        return _read_training(root)
    if "train" not in splits:
        raise ValueError(
            f"{shown(root)}: missing split train/ (found {', '.join(splits.values())})"
        )
    if ignored := [name for name in folders if name not in splits.values()]:
        like = [name for name in ignored if _LIKE_A_SPLIT.fullmatch(name)]
        hint = f"; a split is called train, val or test, not {like[0]}" if like else ""
        say(f"{shown(root)}: folders beside the splits ignored: {some(ignored)}{hint}")
    classes, found, _ = _read_training(root / splits["train"])
    for split in ("val", "test"):
        if split in splits:
            images = _read_held(root / splits[split], split, classes)
            if images is not None:
                found[split] = images
    return Layout(classes, found)


def _read_training(folder: Path) -> Layout:
    classes, loose = _class_folders(folder)
    _check_classes(folder, classes, loose)
    _warn_about_loose(folder, loose)
    return Layout(classes, {"train": read_classes(folder, classes)})


def _read_held(folder: Path, split: str, classes: Sequence[str]) -> Listed | None:
    """The val or test split; None for test images without labels."""
    names, loose = _class_folders(folder)
    inside = [name for name in names if name.lower() in _NO_CLASSES]
    if names == inside:  # no classes: `images` never is one
        loose += sum(len(walk(folder / name).paths) for name in names)
        if not loose:
            raise ValueError(f"{shown(folder)}: no images; fill the folder or remove it")
        if split != "test":
            raise ValueError(
                f"{shown(folder)}: {loose} images without class folders; expected "
                f"{folder.name}/<class>/, or no such folder: val is then cut from train"
            )
        say(f"{shown(folder)}: {loose} images without class folders; going on without a test")
        return None
    _warn_about_loose(folder, loose)
    return read_classes(folder, classes, every=False)


def read_classes(folder: Path, classes: Sequence[str], *, every: bool = True) -> Listed:
    """Images of ``folder/<class>/**``, classes and files in order.

    Args:
        folder: of one split.
        classes: names by number; the Unicode normal form does not matter.
        every: whether each class must have an image; else one class must.
    Raises:
        ValueError: a class without images, a class that is not among `classes`, or what `walk`
            raises.
    """
    folders: dict[str, str] = {}
    for name in _class_folders(folder)[0]:
        if same(name) in folders:
            raise ValueError(f"{shown(folder)}: two folders of one name in Unicode, {name!a}")
        folders[same(name)] = name
    _check_known(folder, folders, classes)
    all_of = Listed([], [], [])
    others: Counter[str] = Counter()
    repeats = 0
    for number, name in enumerate(classes):
        own = folders.get(same(name))
        found = walk(folder / own) if own is not None else None
        if every and not (found and found.paths):
            hint = _but(found.others) if found else ""
            raise ValueError(f"{shown(folder / name)}: class without images{hint}")
        if own is not None and found is not None:
            _check_inside(folder / own, found)
            all_of.paths.extend(found.paths)
            all_of.labels.extend([number] * len(found.paths))
            all_of.keys.extend(found.keys)
            others += found.others
            repeats += found.repeats
    if not all_of.paths:
        hint = _but(others)
        raise ValueError(f"{shown(folder)}: no images{hint}; fill the folder or remove it")
    if others:
        count = sum(others.values())
        say(f"{shown(folder)}: {count} files with other suffixes ignored ({_counted(others)})")
    if repeats:
        say(f"{shown(folder)}: {repeats} links to folders that were read already ignored")
    return all_of


def _class_folders(folder: Path) -> tuple[list[str], int]:
    """Names of the folders in `folder`, and how many images lie beside them."""
    names, loose = [], 0
    for entry in entries(folder):
        if is_folder(entry):
            names.append(entry.name)
        else:
            loose += is_image(entry.name)
    return names, loose


def _counted(suffixes: Counter[str]) -> str:
    parts = [f"{shown(suffix)} {count}" for suffix, count in suffixes.most_common(5)]
    return ", ".join(parts + ["..."] * (len(suffixes) > 5))


def _but(suffixes: Counter[str]) -> str:
    return f" (but {_counted(suffixes)})" if suffixes else ""


def _warn_about_loose(folder: Path, loose: int) -> None:
    if loose:
        say(f"{shown(folder)}: {loose} images outside the class folders ignored")


def _check_classes(folder: Path, classes: list[str], loose: int) -> None:
    """These folders are classes, and not the folders of another layout."""
    if not classes and loose:
        raise ValueError(
            f"{shown(folder)}: {loose} images without class folders; expected "
            f"{shown(folder)}/<class>/"
        )
    for name in classes:
        if not is_text(name):
            raise ValueError(f"{shown(folder / name)}: a name that is not UTF-8; rename the folder")
    if like := _folders_of_a_data_set(folder, classes):
        raise ValueError(
            f"{shown(folder)}: parts of a data set in place of classes: {some(like)}; expected "
            "train/<class>/, val/<class>/, test/<class>/: rename the folders, or give --data the "
            "one that holds the classes"
        )
    if len(classes) == 1:
        (name,) = classes
        inside, _ = _class_folders(folder / name)
        hint = f"; is the data set in --data {shown(folder / name)}?" if inside else ""
        raise ValueError(f"{shown(folder)}: one class alone, {name!r}; {_EXPECTED}{hint}")
    if not classes:
        raise ValueError(f"{shown(folder)}: not a dataset folder; {_EXPECTED}")
    cases = Counter(name.casefold() for name in classes)
    if alike := [name for name in classes if cases[name.casefold()] > 1]:
        say(f"{shown(folder)}: classes that differ in case alone: {some(alike)}")


def _check_inside(folder: Path, found: Found) -> None:
    """A class holds images, not splits of its own."""
    inside = found.inside
    if not inside or any(name.lower() not in _SPLIT_OF for name in inside):
        return
    if not any(path.parent == folder for path in found.paths):
        raise ValueError(
            f"{shown(folder)}: splits inside a class ({some(inside)}); expected classes inside "
            "the splits, train/<class>/"
        )


def _folders_of_a_data_set(folder: Path, classes: list[str]) -> list[str]:
    """Those of `classes` that look like splits, or like images beside their annotations."""
    lower = [name.lower() for name in classes]
    if lower and set(lower) <= _NO_CLASSES | _SELDOM_CLASSES:
        return classes
    like = [
        name for name in classes if _LIKE_A_SPLIT.fullmatch(name) or name.lower() in _NO_CLASSES
    ]
    if [name.lower() for name in like] == ["train"] and _class_folders(folder / like[0])[1]:
        return []  # a vehicle: CIFAR-100 and COCO have that class
    return like


def _check_known(folder: Path, folders: dict[str, str], classes: Sequence[str]) -> None:
    known = {same(name) for name in classes}
    unknown = [name for same, name in folders.items() if same not in known]
    if not unknown:
        return
    name = unknown[0]
    near = [known for known in classes if known.casefold() == name.casefold()]
    hint = f" (which have {near[0]!r})" if near else ""
    raise ValueError(f"{shown(folder)}: class {name!r} is not among the training classes{hint}")


def same(name: str) -> str:
    """macOS decomposes accents in the names of files; the class is the same one."""
    return unicodedata.normalize("NFC", name)


# ---- lists


def _read_vtab(root: Path, files: dict[str, str]) -> Layout:
    tables = {}
    for name, split in _VTAB_SPLIT_OF.items():
        if split not in files:
            raise ValueError(f"{shown(root)}: missing split {name}.txt")
        tables[split] = _visible(root, files[split], *read_list(root / files[split]))
    if TRAINVAL in files:
        tables[TRAINVAL] = _visible(root, files[TRAINVAL], *read_list(root / files[TRAINVAL]))
        _check_joined(root / files[TRAINVAL], *(tables[s][1] for s in (TRAINVAL, "train", "val")))
    seen = {label for _, labels in tables.values() for label in labels}
    highest = max(seen)
    if highest >= max(_FEW_CLASSES, _GAPS * len(seen)):
        split = next(split for split, (_, labels) in tables.items() if highest in labels)
        raise ValueError(
            f"{shown(root / files[split])}: label {highest} among {len(seen)} different ones; "
            "number the classes from 0 without large gaps"
        )
    splits = {
        split: find_images(root / files[split], root, names, labels)
        for split, (names, labels) in tables.items()
    }
    for split, expected in (("train", 800), ("val", 200)):
        if len(splits[split].paths) != expected:
            say(
                f"{shown(root / files[split])}: {len(splits[split].paths)} images, VTAB-1k has "
                f"{expected}"
            )
    known = VTAB.lookup(root.resolve().name)
    count = highest + 1
    if known is not None and count <= known.classes:
        count = known.classes  # a list that lacks the last class has a head for it all the same
    elif known is not None:
        say(
            f"{shown(root)}: label {highest}, and {known.name} of VTAB-1k has {known.classes} "
            "classes: read as another task"
        )
    pixels = look_at_pixels(root, splits, known.lossless if known else None)
    return Layout([str(number) for number in range(count)], splits, pixels)


def _check_joined(file: Path, both: list[int], train: list[int], val: list[int]) -> None:
    """The list of training and validation images is the two lists, in this order."""
    if both == [*train, *val]:
        return
    if len(both) != len(train) + len(val):
        found = f"{len(both)} images where the two lists have {len(train)} and {len(val)}"
    else:
        line = next(i for i, pair in enumerate(zip(both, [*train, *val])) if pair[0] != pair[1])
        found = f"line {line + 1} has label {both[line]}, expected {[*train, *val][line]}"
    raise ValueError(
        f"{shown(file)}: {found}; expected train800.txt and then val200.txt: are the lists of one "
        "source?"
    )


def look_at_pixels(
    root: Path | str, splits: dict[str, Listed], lossless: bool | None
) -> str | None:
    """What became of the images on their way, said where it matters; see `recompressed`."""
    try:
        found = recompressed.verdict([images.paths for images in splits.values()], lossless)
    except ValueError:
        return None  # whoever decodes it says so
    if (text := recompressed.warning(found, lossless)) is not None:
        say(f"{shown(root)}: {text}")
    return found


def _read_fgvc(root: Path, files: dict[str, str]) -> Layout:
    if "test" not in files:
        raise ValueError(f"{shown(root)}: missing split test.json")
    tables: dict[str, _Table[str]] = {}
    numbers = {}
    for split, file in files.items():
        names, ids, numbers[split] = read_table(root / file)
        tables[split] = _visible(root, file, names, ids)
    names, ids = tables["train"]
    # numbered over the training ids once: numbering per file would shift classes a split lacks
    classes = sorted(set(ids), key=int) if numbers["train"] else sorted(set(ids))
    number = {identity: i for i, identity in enumerate(classes)}
    for split, (_, own) in tables.items():
        if unknown := sorted(set(own) - set(classes)):
            first = shown(unknown[0][:80])
            raise ValueError(
                f"{shown(root / files[split])}: class {first} is not in {files['train']}"
            )
    bases = [root, *(root / e.name for e in entries(root) if e.name.lower() == "images")]
    base = next((b for b in bases if locate(b, names[0])), root)
    splits = {
        split: find_images(root / files[split], base, names, [number[i] for i in ids])
        for split, (names, ids) in tables.items()
    }
    return Layout(classes, splits)


def find_images(file: Path, base: Path, names: list[str], labels: list[int]) -> Listed:
    """The images that `file` lists, relative to `base`."""
    found = Listed([], labels, [])
    for name in names:
        place = locate(base, name)
        if place is None:
            raise ValueError(
                f"{shown(file)}: lists a file that is absent or unreadable: {shown(base / name)}"
            )
        found.paths.append(place[0])
        found.keys.append(place[1])
    return found


# ---- rows of tables and records


def _read_hf(data: str, columns: Columns) -> Layout:
    tables, image, label = hf_data.read(data, columns)
    called = splits_of(f"--data {shown(data)}", tables)
    found = {
        split: (
            hf_data.images(data, name, tables[name], image),
            hf_data.labels(data, tables[name], label),
        )
        for split, name in called.items()
    }
    names = hf_data.class_names(tables[called["train"]].features, label)
    if names is None:  # numbers or texts
        values = [value for _, own in found.values() for value in own if value != -1]
        texts = {value for value in values if isinstance(value, str)}
        if texts and any(not isinstance(value, str) for value in values):
            raise ValueError(f"--data {shown(data)}: column {label} mixes numbers and texts")
        if texts:
            names = sorted({value for value in found["train"][1] if value != -1})
            unknown = sorted(texts - set(names))
            if unknown:
                raise ValueError(
                    f"--data {shown(data)}: class {unknown[0]!r} is not in the training rows"
                )
            number = {name: i for i, name in enumerate(names)}
            found = {
                split: (items, [number.get(value, -1) for value in own])
                for split, (items, own) in found.items()
            }
        else:
            highest = max(values, default=0)
            if highest >= max(_FEW_CLASSES, _GAPS * len(set(values))):
                raise ValueError(
                    f"--data {shown(data)}: column {label} has {highest} among {len(set(values))} "
                    "different numbers; number the classes from 0, or give another --label-column"
                )
            names = [str(n) for n in range(highest + 1)]
    return of_rows(f"--data {shown(data)}", names, found)


def _read_tfds(folder: Path, columns: Columns) -> Layout:
    info = tfds.read_info(folder)
    image, label = tfds.columns_of(info, columns)
    found = {
        split: tfds_rows(info, name, image, label)
        for split, name in splits_of(shown(folder), info.shards).items()
    }
    return of_rows(shown(folder), tfds.class_names(info, label), found)


def tfds_rows(info: tfds.Info, split: str, image: str, label: str) -> tuple[list[Item], list[int]]:
    """The images of a split of TensorFlow Datasets, with their labels; -1 where there is none."""
    items: list[Item] = []
    labels: list[int] = []
    for place, example in tfds.records(info, split, [label]):
        values = example.get(label, [-1])
        if len(values) != 1 or type(values[0]) is not int:
            raise ValueError(f"{place}: {label} is {str(values)[:60]}, expected one class number")
        items.append(tfds.Record(place, image))
        labels.append(values[0])
    return items, labels


def splits_of(where: str, names: Iterable[str]) -> dict[str, str]:
    """{split: what it is called} of those that are known; says which are left out.

    Raises:
        ValueError: two are the same split, or none is for training.
    """
    names = list(names)
    found: dict[str, str] = {}
    for name in names:
        split = _SPLIT_OF.get(name.lower()) or _VTAB_LISTS.get(name.lower())
        if split is None:
            continue
        if split in found:
            raise ValueError(f"{where}: {found[split]} and {name} are both the {split} split")
        found[split] = name
    if "train" not in found:
        raise ValueError(f"{where}: missing split train (found {some(names)})")
    if left := [name for name in names if name not in found.values()]:
        say(f"{where}: splits left out: {some(left)}")
    return found


def of_rows(
    where: str, classes: list[str], found: Mapping[str, tuple[Sequence[Item], list[int]]]
) -> Layout:
    """The layout of splits whose images have class numbers, -1 where they have none.

    Raises:
        ValueError: a number that is no class, or none where there should be.
    """
    splits = {}
    for split, (items, labels) in found.items():
        lacking = labels.count(-1)
        if lacking == len(labels) and split == "test":
            say(f"{where}: {lacking} test images without labels; going on without a test")
            continue
        if not labels:
            raise ValueError(f"{where}: split {split} is empty")
        for number, label in enumerate(labels):
            if not 0 <= label < len(classes):
                what = "no label" if label == -1 else f"label {label}"
                raise ValueError(
                    f"{where}: {shown(items[number])} of split {split} has {what}, expected "
                    f"0..{len(classes) - 1}"
                )
        splits[split] = Listed(list(items), labels, [str(item) for item in items])
    return Layout(classes, splits)


def _visible(root: Path, file: str, names: list[str], labels: list[_Label]) -> _Table[_Label]:
    """Rows of a list without those of hidden files: these say nothing about classes either."""
    around = (f"{root}/", f"{root.absolute()}/")
    kept = [i for i, name in enumerate(names) if not _is_hidden_below(around, name)]
    if not kept:
        raise ValueError(f"{shown(root / file)}: lists no images that are not hidden")
    if hidden := len(names) - len(kept):
        say(f"{shown(root / file)}: {hidden} hidden files left out")
    return [names[i] for i in kept], [labels[i] for i in kept]


def _is_hidden_below(around: tuple[str, ...], name: str) -> bool:
    """Whether a listed path is hidden, not counting the folders `around` the data."""
    below = next((name[len(a) :] for a in around if name.startswith(a)), name)
    parts = below.replace("\\", "/").split("/")
    if os.path.isabs(below) or ".." in parts:  # elsewhere: where that lies is not asked
        parts = parts[-1:]
    return any(is_hidden(part) for part in parts if part != ".")


def _warn_about_doubles(root: Path, splits: dict[str, Listed]) -> None:
    """Says which files are there more than once, under any of their names."""
    label_of: dict[str, dict[Key, int]] = {}
    for split, images in splits.items():
        if split == TRAINVAL:  # published once more on purpose
            continue
        own = label_of[split] = dict(zip(images.keys, images.labels))
        if twice := len(images.keys) - len(own):
            say(f"{shown(root)}: split {split} has {twice} images twice")
        differing = [i for i, key in enumerate(images.keys) if images.labels[i] != own[key]]
        if differing:
            say(
                f"{shown(root)}: split {split} has {len(differing)} images with two labels, e.g. "
                f"{shown(images.paths[differing[0]])}"
            )
    for split, other in (("train", "val"), ("train", "test"), ("val", "test")):
        if split in label_of and other in label_of:
            both = len(label_of[split].keys() & label_of[other].keys())
            if both:
                say(f"{shown(root)}: {both} images of split {other} are in split {split} too")
