"""What lies in a folder and what stands in a list file, before anybody asks which split it is.

Nothing here knows a layout: `entries` and `walk` look into folders, `read_list` and `read_table`
into files that people and scripts wrote. Whatever cannot be read is a ValueError of one line that
names the file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pae.train.images import image_suffixes

# what operating systems and servers leave in folders, beside all that starts with a dot
_HIDDEN = frozenset(
    {
        "$recycle.bin",
        "#recycle",
        "@eadir",
        "__macosx",
        "__pycache__",
        "desktop.ini",
        "icon\r",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
_LONGEST_SHOWN = 500  # characters of a name in a message
_LONGEST_LABEL = 18  # digits; more are no class number, and int() refuses thousands of them

Key = int | str  # what two names of one file have in common


@dataclass
class Found:
    """What `walk` saw: image files in sorted order, and what it did not take."""

    paths: list[Path] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)  # files by a suffix of no image
    repeats: int = 0  # links to folders that were read already
    inside: list[str] = field(default_factory=list)  # the folders directly below


def shown(name: object) -> str:
    """A path or a name for a message of one line: escaped where it holds more, cut where long."""
    text = str(name)
    text = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
    return text if text.isprintable() else repr(text)


def some(names: list[str], most: int = 5) -> str:
    """The first of `names`, quoted and cut where long, with dots for what is left out."""
    return ", ".join([repr(name[:80]) for name in names[:most]] + ["..."] * (len(names) > most))


def is_hidden(name: str) -> bool:
    """Whether this part of a path is hidden, or the litter of an operating system."""
    return name.startswith(".") or name.lower() in _HIDDEN


def is_image(name: str) -> bool:
    """Whether a file of this name is read as an image."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """What lies in `folder`, sorted by name, without its hidden parts.

    Raises:
        ValueError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            visible = [entry for entry in found if not is_hidden(entry.name)]
    except OSError as error:
        raise ValueError(f"{shown(folder)}: cannot be read ({error.strerror})") from None
    return sorted(visible, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or leads to one.

    Raises:
        ValueError: a link that leads nowhere. It may have been a class.
    """
    try:
        found = entry.is_dir()
        if not found and entry.is_symlink():
            os.stat(entry.path)
    except OSError as error:
        raise _unreachable(entry, error) from None
    return found


def walk(folder: Path) -> Found:
    """Every image below `folder`, through links too; each folder is read once.

    The order is that of the paths' parts, so that it does not depend on the file system.

    Raises:
        ValueError: a folder that cannot be read, a link that leads nowhere, an image file that is
            empty or no regular file.
    """
    found = Found()
    seen = {_folder_key(str(folder))}
    for above in folder.resolve().parents:
        # a link back there would bring other classes' images in
        with contextlib.suppress(ValueError):
            seen.add(_folder_key(str(above)))
    open_folders = [iter(entries(folder))]
    while open_folders:
        inner = _take_files(open_folders[-1], found)
        if inner is None:
            open_folders.pop()
            continue
        if len(open_folders) == 1:
            found.inside.append(inner.name)
        if (key := _folder_key(inner.path)) in seen:
            found.repeats += 1
        else:
            seen.add(key)
            open_folders.append(iter(entries(inner.path)))
    return found


def _take_files(left: Iterator[os.DirEntry[str]], found: Found) -> os.DirEntry[str] | None:
    """Adds the files up to the next folder, which is returned; None at the end."""
    for entry in left:
        if is_folder(entry):
            return entry
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix not in image_suffixes():
            found.others[suffix or "no suffix"] += 1
            continue
        try:
            # Windows fills in what identifies a file only where it is asked for by name
            status = entry.stat() if os.name == "posix" else os.stat(entry.path)
        except OSError as error:
            raise _unreachable(entry, error) from None
        found.keys.append(file_key(entry.path, status))
        found.paths.append(Path(entry.path))
    return None


def _unreachable(entry: os.DirEntry[str], error: OSError) -> ValueError:
    if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        target = shown(os.readlink(entry.path))
        return ValueError(
            f"{shown(entry.path)}: a broken link to {target}; mount what it leads to, or remove it"
        )
    return ValueError(f"{shown(entry.path)}: cannot be read ({error.strerror})")


def file_key(path: str, status: os.stat_result) -> Key:
    """What identifies the file behind any of its names.

    Raises:
        ValueError: it is empty, or no regular file.
    """
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{shown(path)}: not a regular file")
    if status.st_size == 0:
        raise ValueError(f"{shown(path)}: an empty file (0 bytes)")
    return _key(path, status)


def _folder_key(path: str) -> Key:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"{shown(path)}: cannot be read ({error.strerror})") from None
    return _key(path, status)


def _key(path: str, status: os.stat_result) -> Key:
    # some network file systems number nothing
    return status.st_dev << 64 | status.st_ino if status.st_ino else os.path.realpath(path)


def locate(base: Path, name: str) -> tuple[Path, Key] | None:
    """The file that a list calls `name`, and its key; None where there is none.

    Lists are written on other systems: backslashes and the other Unicode normal forms are tried
    where the name as it stands leads nowhere.

    Raises:
        ValueError: the file is empty, or no regular file.
    """
    forms = [name, name.replace("\\", "/")]
    if not name.isascii():
        forms += [unicodedata.normalize(kind, form) for kind in ("NFC", "NFD") for form in forms]
    for form in dict.fromkeys(forms):
        path = os.path.join(base, form)
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # the latter: a name that no file system has
            continue
        return Path(path), file_key(path, status)
    return None


# ---- list files


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{shown(path)}: cannot be read ({error.strerror})") from None
    if data.startswith(_BYTE_ORDER_MARKS):
        raise ValueError(f"{shown(path)}: text in UTF-16 or UTF-32; save it as UTF-8")
    if b"\0" in data:
        raise ValueError(f"{shown(path)}: not a text file (it holds zero bytes)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{shown(path)}: not text in UTF-8 (byte {data[error.start]:#04x} at {error.start}); "
            "save it as UTF-8"
        ) from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without their ends."""
    return re.split("\r\n|\r|\n", _read_text(path))


def read_list(path: Path) -> tuple[list[str], list[int]]:
    """Names and labels of a list file: one ``name label`` a line.

    Blanks, a tab, a comma or a semicolon separate the two; a name may hold blanks and may be
    quoted. A byte-order mark, CRLF and empty lines mean nothing.

    Raises:
        ValueError: the file or one of its lines is something else.
    """
    names, labels = [], []
    for number, line in enumerate(read_lines(path), 1):
        text = line.strip()
        if not text:
            continue
        found = re.search(r"[\s,;]([+-]?[0-9]+)$", text)
        name = text[: found.start()].rstrip() if found else ""
        name = name[:-1].rstrip() if name.endswith((",", ";")) else name
        if len(name) > 1 and name[0] == name[-1] == '"':
            name = name[1:-1].replace('""', '"')
        if found is None or not name:
            raise ValueError(f"{shown(path)}:{number}: expected 'path label', got {line[:80]!r}")
        if found[1].startswith("-") or len(found[1]) > _LONGEST_LABEL:
            raise ValueError(
                f"{shown(path)}:{number}: label {found[1][:40]}, expected a class number from 0"
            )
        names.append(name)
        labels.append(int(found[1]))
    if not names:
        raise ValueError(f"{shown(path)}: lists no images")
    return names, labels


class _Pairs(list):
    """A JSON object as it stands in the file, doubled keys and all."""


def read_table(path: Path) -> tuple[list[str], list[str], bool]:
    """Names and class ids of a JSON file ``{name: class id}``, the ids as text.

    Returns:
        The names, the ids, and whether all ids were numbers, which have another order than text.
    Raises:
        ValueError: no JSON, another shape, a doubled name, an id that is neither number nor text.
    """
    text = _read_text(path)
    try:
        table = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)}: not a JSON file ({error})") from None
    if not isinstance(table, _Pairs) or not table:
        raise ValueError(f"{shown(path)}: expected a non-empty object {{path: class id}}")
    counts = Counter(name for name, _ in table)
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{shown(path)}: {len(doubled)} names stand there twice: {some(doubled)}")
    ids = [_class_id(path, name, value) for name, value in table]
    return list(counts), ids, not any(isinstance(value, (str, bool)) for _, value in table)


def _class_id(path: Path, name: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) or (isinstance(value, str) and value.strip() and is_text(value)):
        return str(value)
    what = "a list or an object" if isinstance(value, list) else repr(value)[:80]
    raise ValueError(f"{shown(path)}: {name[:80]!r} has {what}, expected a class number or name")


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: a name from a disk or from JSON may not be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
