"""Tasks of a protocol, read from the folders that people have and checked against what is known.

A root is a folder of tasks: ``<root>/<task>/`` or, as some copies have it,
``<root>/<group>/<task>/``, each task under any of its names. Classes are those of the protocol, not
those that a list happens to name; numbers of images that differ from the published lists are said.
VTAB-1k is also read from the sets of TensorFlow Datasets that it was cut from.
Few-shot tasks are read from NOAH's lists (``annotations/train_meta.list.num_shot_4.seed_0``), from
CoOp's ``split_zhou_*.json``, or from any other layout, of which as many images a class are drawn.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pae.files import write_atomically
from pae.protocols.tasks import PROTOCOLS, Protocol
from pae.protocols.tasks import Task as Known
from pae.train import hf_data, tfds, vtab_tfds
from pae.train.data import Task, from_layout
from pae.train.layouts import (
    Layout,
    Listed,
    find_images,
    look_at_pixels,
    read_data,
    read_layout,
    say,
)
from pae.train.listing import entries, is_folder, locate, read_list, shown
from pae.train.stored import Columns

if TYPE_CHECKING:
    from pae.train.options import Options

ANNOTATIONS, CLASSES = "annotations", "classes.txt"  # where lists lie; what their numbers mean
_DRAWN_FOR_VAL = 4  # at most, per class: a few-shot task does not tune on thousands of images
_MARKS = ("train800.txt", "train800val200.txt", "train.json", "annotations", "train", "training")


def read_task(options: Options, sizes: Mapping[str, int | None], seed: int) -> Task:
    """The task that options with a protocol name.

    Args:
        options: with `protocol` and `data`; `protocol_task`, `shots`, `draw`.
        sizes: `train_size` and `val_size`, as for `read_folder`.
        seed: of cuts.
    Raises:
        ValueError: no such task or folder, lists that do not belong together, labels that the task
            does not have; and as for `read_folder`.
    """
    assert options.protocol is not None and options.data is not None
    protocol = PROTOCOLS[options.protocol]
    columns = Columns(options.image_column, options.label_column)
    if hf_data.is_hf(options.data):
        return _of_table(options, protocol, columns, sizes, seed)
    known, folder = find(protocol, Path(os.path.expanduser(options.data)), options.protocol_task)
    if options.protocol == "few-shot":
        assert options.shots is not None
        layout = few_shot(known, folder, options.shots, options.draw)
        task = from_layout(known.name, layout)
        return replace(task, name=f"{known.name}-{options.shots}shot")
    version = tfds.locate(folder) if known.cut else None
    if version is None:
        layout = read_layout(folder, columns)
    elif any(columns):
        raise ValueError(
            f"--protocol-task {known.name} says itself what is image and label; no column"
        )
    else:
        vtab_tfds.check_version(known, version)
        layout = vtab_tfds.read(known, version)
        pixels = look_at_pixels(folder, layout.splits, known.lossless)
        layout = layout._replace(pixels=pixels)
    _check(known, shown(folder), layout)
    if protocol.name == "fgvc":
        layout = layout._replace(pixels=look_at_pixels(folder, layout.splits, False))
    return from_layout(known.name, _with_all_classes(known, layout), **sizes, seed=seed)


def _of_table(
    options: Options,
    protocol: Protocol,
    columns: Columns,
    sizes: Mapping[str, int | None],
    seed: int,
) -> Task:
    """A task whose images are a set of Hugging Face: its splits are the protocol's."""
    assert options.data is not None
    name, layout = read_data(options.data, columns)
    chosen = options.protocol_task
    known = protocol.lookup(name) if chosen is None else protocol.find(chosen)
    if known is None:
        raise ValueError(
            f"--data {shown(options.data)}: its name is no task of {protocol.title}; say which "
            "with --protocol-task"
        )
    where = f"--data {shown(options.data)}"
    _check(known, where, layout)
    if protocol.name == "few-shot":
        assert options.shots is not None
        layout = _few_of(known, where, layout, options.shots, options.draw)
        name = f"{known.name}-{options.shots}shot"
        return replace(from_layout(known.name, layout), name=name)
    for split, count in zip(("train", "val"), known.counts or ()):
        found = layout.splits.get(split)
        if protocol.name == "vtab1k" and (found is None or len(found.paths) != count):
            have = 0 if found is None else len(found.paths)
            say(f"{where}: {have} images of {split}, VTAB-1k has {count}")
    if "test" not in layout.splits:
        raise ValueError(f"{where}: missing split test")
    pixels = look_at_pixels(where, layout.splits, known.lossless if known.cut else False)
    found_task = _with_all_classes(known, layout._replace(pixels=pixels))
    return from_layout(known.name, found_task, **sizes, seed=seed)


def find(protocol: Protocol, root: Path, name: str | None = None) -> tuple[Known, Path]:
    """A task of a protocol and its folder.

    Args:
        protocol: whose task it is.
        root: the folder of the task, or one that holds the protocol's tasks.
        name: of the task; by default what the folder is called.
    Raises:
        ValueError: there is none; the message lists those that are there.
    """
    if not root.is_dir():
        raise ValueError(f"--data {shown(root)}: no such folder")
    if name is None:
        known = protocol.lookup(root.resolve().name)
        if known is None:
            there = ", ".join(listed(protocol, root)) or "none is here"
            raise ValueError(
                f"--data {shown(root)}: its name is no task of {protocol.title}; say which with "
                f"--protocol-task ({there})"
            )
        return known, root
    known = protocol.find(name)
    folders = listed(protocol, root)
    if known.name in folders:
        return known, folders[known.name]
    if protocol.lookup(root.resolve().name) in (known, None) and _is_task(root):
        return known, root
    there = ", ".join(folders) or "none of its tasks"
    names = ", ".join(dict.fromkeys(known.names()))
    raise ValueError(f"--data {shown(root)}: no folder of {known.name} ({names}); found {there}")


def listed(protocol: Protocol, root: Path) -> dict[str, Path]:
    """{task: its folder} of those that a root holds, in the protocol's order."""
    found: dict[str, Path] = {}
    folders = [Path(entry.path) for entry in entries(root) if is_folder(entry)]
    groups = [f for f in folders if f.name.lower() in _groups(protocol)]
    inside = [Path(e.path) for folder in groups for e in entries(folder) if is_folder(e)]
    for folder in [*folders, *inside]:
        known = protocol.lookup(folder.name)
        if known is None or not _is_task(folder):
            continue
        if known.name in found:
            raise ValueError(
                f"{shown(found[known.name])} and {shown(folder)} are both {known.name}; move one "
                "away"
            )
        found[known.name] = folder
    for task in protocol.tasks:  # of TensorFlow Datasets, which know one set for several tasks
        own = root / task.tfds
        if task.tfds and task.name not in found and own.is_dir() and tfds.locate(own):
            found[task.name] = own
    return {task.name: found[task.name] for task in protocol.tasks if task.name in found}


def _groups(protocol: Protocol) -> set[str]:
    return {group.lower() for group in protocol.groups()} | {"specialised"}


def _is_task(folder: Path) -> bool:
    if tfds.locate(folder) is not None:
        return True
    names = {entry.name.lower() for entry in entries(folder)}
    return bool(names & set(_MARKS)) or any(name.startswith("split_zhou_") for name in names)


def _check(known: Known, where: str, layout: Layout) -> None:
    """Raises ValueError where labels are not those of the task; says where counts are others."""
    highest = max(label for split in layout.splits.values() for label in split.labels)
    if highest >= known.classes:
        raise ValueError(
            f"{where}: label {highest}, and {known.name} has {known.classes} classes; is "
            "it another task?"
        )
    counts = {"test": known.test}
    if known.counts is not None:
        counts |= {"train": known.counts[0], "val": known.counts[1]}
    for split, expected in counts.items():
        found = layout.splits.get(split)
        # VTAB's own counts of lists are said by the layout
        if found and expected and len(found.paths) != expected and known.counts != (800, 200):
            say(f"{where}: {len(found.paths)} {split} images, published are {expected}")
        elif found and split == "test" and expected and len(found.paths) < 0.9 * expected:
            say(f"{where}: {len(found.paths)} test images, published are {expected}")
    test = layout.splits.get("test")
    if test and (lacking := known.classes - len(set(test.labels))):
        say(f"{where}: the test images lack {lacking} of {known.classes} classes")


def _with_all_classes(known: Known, layout: Layout) -> Layout:
    """The layout with as many classes as the task has, whatever its lists name."""
    missing = range(len(layout.classes), known.classes)
    numbered = all(name.isdigit() for name in layout.classes)
    names = [str(number) if numbered else f"class {number}" for number in missing]
    return layout._replace(classes=[*layout.classes, *names])


# ---- few-shot


def few_shot(known: Known, folder: Path, shots: int, draw: int, anew: bool = False) -> Layout:
    """`shots` training images a class, at most as many of 4 for validation, all test images: from
    the lists in ``annotations/`` where there are some (or, if `anew`, this one), else drawn.

    Raises:
        ValueError: as `read_task`.
    """
    annotations = folder / ANNOTATIONS
    own = annotations / list_name("train", shots, draw)
    if own.is_file():
        layout = _noah(known, folder, own)
    else:
        coop = sorted(folder.glob("split_zhou_*.json"))
        if annotations.is_dir() and not coop and not anew:
            there = sorted(p.name for p in annotations.glob("train_meta.list.*"))
            raise ValueError(
                f"{shown(own)}: no such list; found {', '.join(there[:20]) or 'none'}; give "
                "another --shots or --draw"
            )
        layout = _coop(folder, coop[0]) if coop else read_layout(folder)
    layout = _few_of(known, shown(folder), layout, shots, draw, listed=own.is_file())
    return layout._replace(pixels=look_at_pixels(folder, layout.splits, False))


def _few_of(
    known: Known, where: str, layout: Layout, shots: int, draw: int, listed: bool = False
) -> Layout:
    """The draw from all images of a layout; `listed` training images are one already."""
    pool = layout.splits["train"]
    drawn = pool if listed else _drawn(pool, shots, draw)
    highest = max(label for split in layout.splits.values() for label in split.labels)
    if highest >= known.classes:
        raise ValueError(f"{where}: label {highest}, and {known.name} has {known.classes} classes")
    splits = {**layout.splits, "train": drawn}
    if "test" not in splits:
        raise ValueError(f"{where}: missing split test")
    if "val" in splits:
        splits["val"] = _drawn(splits["val"], min(shots, _DRAWN_FOR_VAL), draw)
    else:
        taken = set(drawn.keys)
        left = [i for i, key in enumerate(pool.keys) if key not in taken]
        if not left:
            raise ValueError(
                f"{where}: {shots} images of each class are all there are, none is left for "
                "validation; add a val split"
            )
        splits["val"] = _drawn(pool.subset(left), min(shots, _DRAWN_FOR_VAL), draw)
    return _with_all_classes(known, layout._replace(splits=splits))


def list_name(split: str, shots: int, draw: int) -> str:
    """What NOAH calls the list of a draw."""
    return f"{split}_meta.list.num_shot_{shots}.seed_{draw}"


def write_draws(known: Known, folder: Path, shots: Iterable[int], draws: Iterable[int]) -> int:
    """Writes the images that few-shot runs train, validate and test on as lists of file names, in
    NOAH's form and place: below ``annotations/`` of the task's folder, from where they are read.

    Args:
        known: the task.
        folder: its own.
        shots, draws: of which there are to be lists.
    Returns:
        How many files are new; lists that are there stay, as they are what is read.
    Raises:
        ValueError: the images are no files, or as `read_task`.
        OSError: the folder cannot be written.
    """
    base = _base(known, folder)
    texts: dict[str, str] = {}
    for number, draw in ((number, draw) for number in shots for draw in draws):
        layout = few_shot(known, folder, number, draw, anew=True)
        texts[CLASSES] = "".join(f"{name}\n" for name in layout.classes)
        texts["test_meta.list"] = _list(folder, base, layout.splits["test"])
        for split in ("val", "train"):  # the last one is looked for first
            texts[list_name(split, number, draw)] = _list(folder, base, layout.splits[split])
    new = {name: text for name, text in texts.items() if not (folder / ANNOTATIONS / name).exists()}
    (folder / ANNOTATIONS).mkdir(exist_ok=True)
    for name, text in new.items():
        content = text.encode()
        write_atomically(folder / ANNOTATIONS / name, partial(Path.write_bytes, data=content))
    return len(new)


def _list(folder: Path, base: Path, images: Listed) -> str:
    lines = []
    for path, label in zip(images.paths, images.labels, strict=True):
        if not isinstance(path, Path):
            raise ValueError(
                f"{shown(folder)}: {shown(path)} is no file of its own, so no list can name it"
            )
        name = Path(os.path.relpath(path, base)).as_posix()
        if "\n" in name or "\r" in name or name != name.strip():
            raise ValueError(f"{shown(path)}: a name that no list can hold; rename the file")
        lines.append(f"{name} {label}\n")
    return "".join(lines)


def _drawn(images: Listed, shots: int, draw: int) -> Listed:
    """`shots` images of each class, or all where it has fewer: a function of paths and `draw`."""
    members: dict[int, list[int]] = {}
    for i, label in enumerate(images.labels):
        members.setdefault(label, []).append(i)
    chosen: list[int] = []
    for label in sorted(members):
        own = sorted(members[label], key=lambda i: str(images.paths[i]))
        stream = random.Random(f"{draw}/{label}")
        chosen += own if len(own) <= shots else stream.sample(own, shots)
    chosen.sort()
    return images.subset(chosen)


def _base(known: Known, folder: Path) -> Path:
    """What the lists of a task are relative to."""
    base = folder / known.images if known.images else folder
    return base if base.is_dir() else folder


def _noah(known: Known, folder: Path, train: Path) -> Layout:
    base = _base(known, folder)
    val = train.parent / train.name.replace("train_", "val_", 1)  # of this draw, as pae writes it
    names = {"train": train, "val": val if val.is_file() else train.parent / "val_meta.list"}
    names["test"] = train.parent / "test_meta.list"
    splits = {}
    for split, file in names.items():
        if split == "test" or file.is_file():
            splits[split] = _once(file, find_images(file, base, *read_list(file)))
    highest = max(label for split in splits.values() for label in split.labels)
    classes = [str(number) for number in range(highest + 1)]
    named = train.parent / CLASSES
    if named.is_file():
        classes = named.read_text("utf-8").splitlines()
        if len(classes) <= highest:
            raise ValueError(f"{shown(named)}: {len(classes)} names, and there is label {highest}")
    return Layout(classes, splits)


def _once(file: Path, images: Listed) -> Listed:
    """Without lines that stand there twice, as in one of the published lists."""
    first = {key: i for i, key in reversed(list(enumerate(images.keys)))}
    kept = sorted(first.values())
    if len(kept) == len(images.keys):
        return images
    say(f"{shown(file)}: {len(images.keys) - len(kept)} lines stand there twice; each counts once")
    return images.subset(kept)


def _coop(folder: Path, file: Path) -> Layout:
    """CoOp's splits: ``{"train": [[path, label, class name], ...], "val": ..., "test": ...}``."""
    try:
        table = json.loads(file.read_bytes())
        rows = {split: table[split] for split in ("train", "val", "test")}
        names: dict[int, str] = {}
        for name, label, title in (row for split in rows.values() for row in split):
            if not isinstance(name, str) or type(label) is not int or label < 0:
                raise ValueError(f"{[name, label, title]}")
            names[label] = str(title)
    except OSError as error:
        raise ValueError(f"{shown(file)}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{shown(file)}: expected train, val and test, each a list of [path, label, class name]"
            f" ({type(error).__name__}: {str(error)[:80]})"
        ) from None
    bases = [folder, *(Path(e.path) for e in entries(folder) if is_folder(e))]
    base = next((b for b in bases if locate(b, rows["train"][0][0])), folder)
    splits = {
        split: find_images(file, base, [row[0] for row in each], [row[1] for row in each])
        for split, each in rows.items()
    }
    return Layout([names.get(n, str(n)) for n in range(max(names) + 1)], splits)
