"""Folders that TensorFlow Datasets wrote, read without TensorFlow.

What is read: ``dataset_info.json`` (splits and their shards), ``features.json`` (which feature is
an image, which a class), ``FEATURE.labels.txt`` (names of classes), and TFRecord files: frames of
length, CRC-32C, data, CRC-32C, the data a ``tf.train.Example``, which is a map of names to lists of
bytes, floats or integers. Both checksums are compared whenever a record is read. Compressed files
and other formats (ArrayRecord, Riegeli) are refused by name.

Sources: tensorflow/core/lib/io/record_writer.h (frames, the mask of checksums),
tensorflow/core/example/example.proto and feature.proto.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pae.errors import one_line
from pae.train.listing import entries, is_folder, shown, some
from pae.train.stored import Columns, Stored

INFO, FEATURES = "dataset_info.json", "features.json"
_NEEDS = 'reading TFRecord files needs the package google-crc32c: pip install "pae[data]"'
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_HEAD, _TAIL = 12, 4  # bytes around the data of a record: length and its checksum; its own checksum
_LONGEST = 1 << 30  # bytes of a record; a greater length is damage
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types

Example = dict[str, list[Any]]


class Info(NamedTuple):
    """What the folder says of itself.

    Attributes:
        folder: of one version.
        name: of the set.
        shards: {split: [(file, number of records)]}.
        images, classes: features of these types; of classes the number of them.
    """

    folder: Path
    name: str
    shards: dict[str, list[tuple[Path, int]]]
    images: list[str]
    classes: dict[str, int]

    def size(self, split: str) -> int:
        """Number of records."""
        return sum(count for _, count in self.shards[split])


class Record(Stored):
    """The image in a record. `binary` pixels are 0 and 1, and become black and white."""

    def __init__(self, place: Place, key: str, binary: bool = False) -> None:
        self.place, self.key, self.binary = place, key, binary

    def __str__(self) -> str:
        return str(self.place)

    @property
    def suffix(self) -> str:
        """None: what a shard's name ends in says nothing of the image."""
        return ""

    def read(self) -> bytes:
        """As `Stored.read`."""
        found = self.place.example([self.key]).get(self.key, [])
        if len(found) != 1 or not isinstance(found[0], bytes):
            raise ValueError(f"unreadable image {self}: it has no image {self.key}")
        return _black_and_white(self, found[0]) if self.binary else found[0]


class Place(NamedTuple):
    """Where a record lies: its number in a file, and the byte at which it begins."""

    file: Path
    number: int
    offset: int

    def __str__(self) -> str:
        return f"{self.file.name}[{self.number}]"

    def example(self, keys: Sequence[str]) -> Example:
        """Those of its features that have one of these names."""
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                return parse(_record(file, self), keys, self)
        except OSError as error:
            raise ValueError(f"{shown(self.file)}: cannot be read ({error.strerror})") from None


def locate(root: Path) -> Path | None:
    """The folder of one version: `root`, or the one below it that is called like a version.

    Raises:
        ValueError: there are several.
    """
    if (root / INFO).is_file() and (root / FEATURES).is_file():
        return root
    found = [
        Path(entry.path)
        for entry in entries(root)
        if _VERSION.fullmatch(entry.name) and is_folder(entry) and is_version(Path(entry.path))
    ]
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise ValueError(f"{shown(root)}: holds several versions ({names}); give the folder of one")
    return found[0] if found else None


def is_version(folder: Path) -> bool:
    """Whether it is the folder of one version, called like it, and not like the set."""
    return bool(_VERSION.fullmatch(folder.name)) and (folder / INFO).is_file()


# ---- the description


def read_info(folder: Path) -> Info:
    """What a folder says of itself.

    Raises:
        ValueError: something is missing, damaged, or of a format that is not read; in one line.
    """
    info, features = _json(folder / INFO), _json(folder / FEATURES)
    kind = info.get("fileFormat", "tfrecord")
    if kind != "tfrecord":
        raise ValueError(
            f"{shown(folder / INFO)}: fileFormat {kind!r}, expected tfrecord; prepare the set "
            'with file_format="tfrecord"'
        )
    try:
        name = str(info["name"])
        shards = {s["name"]: _shards(folder, name, s) for s in info["splits"]}
        kinds = dict(_kinds(features))
        images = [key for key, (kind, _) in kinds.items() if kind == "Image"]
        classes = {key: int(n or 0) for key, (kind, n) in kinds.items() if kind == "ClassLabel"}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, ValueError) and str(error).startswith(shown(folder)):
            raise
        raise ValueError(
            f"{shown(folder)}: {INFO} or {FEATURES} is not what tensorflow-datasets writes "
            f"({type(error).__name__}: {one_line(error)[:100]})"
        ) from None
    return Info(folder, name, shards, images, classes)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
        reason = "not an object"
    except OSError as error:
        reason = error.strerror or "cannot be read"
    except (ValueError, RecursionError) as error:
        reason = one_line(error)[:100]
    raise ValueError(f"{shown(path)}: expected JSON of tensorflow-datasets ({reason})")


def _shards(folder: Path, name: str, split: Mapping[str, Any]) -> list[tuple[Path, int]]:
    lengths = [int(length) for length in split["shardLengths"]]
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    found = []
    for number, length in enumerate(lengths):
        index, count = f"{number:05d}", f"{len(lengths):05d}"
        file = template.format(
            **{"DATASET": name, "SPLIT": split["name"], "FILEFORMAT": "tfrecord"},
            **{"SHARD_INDEX": index, "NUM_SHARDS": count, "SHARD_X_OF_Y": f"{index}-of-{count}"},
        )
        if "/" in file or "\\" in file or length < 0:
            raise ValueError(f"a shard {file!r} of {length} records")
        found.append((folder / file, length))
    return found


def _kinds(node: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, Any]]]:
    """(feature, (type, number of classes)) of the top level; older versions spell it otherwise."""
    inside = node.get("featuresDict", {}).get("features")
    if inside is None:
        inside = _content(node)
        inside = inside.get("features", inside)
    for key, feature in inside.items():
        kind = str(feature.get("pythonClassName") or feature["type"]).rpartition(".")[2]
        count = None
        if kind == "ClassLabel":
            of_class = feature.get("classLabel") or _content(feature)
            count = of_class.get("numClasses", of_class.get("num_classes"))
        yield key, (kind, count)


def _content(node: Mapping[str, Any]) -> Any:
    content = node["content"]
    return json.loads(content) if isinstance(content, str) else content


def class_names(info: Info, feature: str) -> list[str]:
    """Names of the classes of a feature, or their numbers where the folder does not say.

    Raises:
        ValueError: there are others than as many as the feature has.
    """
    path = info.folder / f"{feature}.labels.txt"
    count = info.classes[feature]
    if not path.is_file():
        return [str(number) for number in range(count)]
    try:
        names = [name.strip() for name in path.read_text("utf-8").split("\n") if name.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{shown(path)}: cannot be read ({one_line(error)[:100]})") from None
    if len(names) != count:
        raise ValueError(f"{shown(path)}: {len(names)} names, {feature} has {count} classes")
    return names


def columns_of(info: Info, columns: Columns) -> tuple[str, str]:
    """The features of image and label: by their types, or as named.

    Raises:
        ValueError: the types do not tell, or there is no such feature.
    """
    chosen = []
    for what, given, found in (
        ("image", columns.image, info.images),
        ("label", columns.label, list(info.classes)),
    ):
        if given is not None and given not in found:
            raise ValueError(
                f"--{what}-column {given}: {shown(info.folder)} has no such feature of type "
                f"{'Image' if what == 'image' else 'ClassLabel'}; expected one of {some(found)}"
            )
        if given is None and len(found) != 1:
            raise ValueError(
                f"{shown(info.folder)}: {len(found)} features are of the type of the {what}; say "
                f"which with --{what}-column ({some(found)})"
            )
        chosen.append(given if given is not None else found[0])
    return chosen[0], chosen[1]


# ---- records


def records(
    info: Info, split: str, keys: Sequence[str], start: int = 0, stop: int | None = None
) -> Iterator[tuple[Place, Example]]:
    """The records `start` to `stop` of a split, in their order, with some of their features.

    Raises:
        ValueError: a file is missing, damaged, or holds another number of records than it should.
    """
    before = 0
    stop = info.size(split) if stop is None else stop
    for file, count in info.shards[split]:
        first, last = max(0, start - before), min(count, stop - before)
        before += count
        if first >= last:
            continue
        try:
            with open(file, "rb") as opened:
                for number in range(last):
                    place = Place(file, number, opened.tell())
                    if number < first:
                        opened.seek(_length(opened, place) + _TAIL, io.SEEK_CUR)
                    else:
                        yield place, parse(_record(opened, place), keys, place)
                if last == count and opened.read(1):
                    raise ValueError(
                        f"{shown(file)}: holds more records than the {count} of {INFO}"
                    )
        except OSError as error:
            raise ValueError(f"{shown(file)}: cannot be read ({error.strerror})") from None


def _length(file: Any, place: Place) -> int:
    """Reads the head of a record."""
    head = file.read(_HEAD)
    if len(head) < _HEAD:
        raise ValueError(f"{shown(place.file)}: ends before record {place.number}; copy it again")
    length, check = struct.unpack("<QI", head)
    if checksum(head[:8]) != check or length > _LONGEST:
        raise ValueError(
            f"{shown(place.file)}: record {place.number} is damaged, or the file is compressed or "
            "no TFRecord; copy it again"
        )
    return int(length)


def _record(file: Any, place: Place) -> bytes:
    length = _length(file, place)
    data = file.read(length + _TAIL)
    if len(data) < length + _TAIL:
        raise ValueError(f"{shown(place.file)}: ends in record {place.number}; copy it again")
    content, check = data[:length], struct.unpack("<I", data[length:])[0]
    if checksum(content) != check:
        raise ValueError(f"{shown(place.file)}: record {place.number} is damaged; copy it again")
    return content


def checksum(data: bytes) -> int:
    """The masked CRC-32C of TFRecord files.

    Raises:
        ValueError: the package that computes it is missing.
    """
    try:
        import google_crc32c
    except ImportError:
        raise ValueError(_NEEDS) from None
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def parse(data: bytes, keys: Sequence[str], place: object) -> Example:
    """Some features of a serialised ``tf.train.Example``; those that it lacks are left out.

    Raises:
        ValueError: it is none, in one line that names `place`.
    """
    found: Example = {}
    try:
        for number, features in _fields(data):
            for inner, entry in _fields(features) if number == 1 else ():
                parts = dict(_fields(entry)) if inner == 1 else {}
                if (key := _bytes(parts.get(1, b"")).decode()) in keys:
                    found[key] = _values(_bytes(parts.get(2, b"")))
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise ValueError(f"{place}: not a tf.train.Example ({one_line(error)[:80]})") from None
    return found


def _values(feature: Any) -> list[Any]:
    """The list in a ``tf.train.Feature``: bytes (1), floats (2) or integers (3)."""
    values: list[Any] = []
    for kind, content in _fields(feature):
        for number, item in _fields(content):
            if number != 1:
                continue
            if kind == 1:
                values.append(_bytes(item))
            elif kind == 2:
                values += struct.unpack(f"<{len(item) // 4}f", item)
            elif isinstance(item, int):
                values.append(_signed(item))
            else:  # packed
                at = 0
                while at < len(item):
                    value, at = _varint(item, at)
                    values.append(_signed(value))
    return values


def _bytes(value: Any) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes were expected")
    return bytes(value)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a message: integers of varints, else bytes."""
    view, at = memoryview(data), 0
    while at < len(view):
        tag, at = _varint(view, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(view, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(view, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(view):
            raise ValueError("a field goes beyond its end")
        yield tag >> 3, view[at : at + size]
        at += size


def _varint(view: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _black_and_white(name: object, data: bytes) -> bytes:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            white = image.convert("L").point(lambda value: 255 if value else 0)
    except Exception as error:  # whatever PIL's decoders raise
        raise ValueError(f"unreadable image {name}: {one_line(error)[:100]}") from None
    out = io.BytesIO()
    white.save(out, "PNG", compress_level=1)
    return out.getvalue()
