"""Image sets of Hugging Face `datasets`: ``hf:NAME`` of the hub, ``hf:FOLDER`` on a disk.

A folder is one that `save_to_disk` wrote, or one of Parquet files. The image and the label are
found by their types, and named by options where these do not tell. Images stay encoded in the
table's file until they are decoded, as those of a folder do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pae.errors import one_line
from pae.train.listing import shown, some
from pae.train.stored import Columns, Stored

PREFIX = "hf:"
_NEEDS = 'the package datasets: pip install "pae[data]"'


class Row(Stored):
    """The image in a row of a table."""

    def __init__(self, table: Any, column: str, number: int, name: str) -> None:
        self.table, self.column, self.number, self.name = table, column, number, name

    def __str__(self) -> str:
        return f"{self.name}[{self.number}]"

    def read(self) -> bytes:
        """As `Stored.read`."""
        try:
            found = self.table[self.number][self.column]
            if found is not None and found["bytes"] is not None:
                return bytes(found["bytes"])
            if found is not None and found["path"] is not None:
                return Path(found["path"]).read_bytes()
        except (OSError, KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"unreadable image {self}: {one_line(error)}") from None
        raise ValueError(f"unreadable image {self}: the row has none; filter such rows out")


def is_hf(data: str) -> bool:
    """Whether --data names such a set."""
    return data.startswith(PREFIX)


def absolute(data: str) -> str:
    """The same set, whatever folder the process is in; a set of the hub as it stands."""
    folder = os.path.expanduser(data.removeprefix(PREFIX))
    return PREFIX + os.path.abspath(folder) if os.path.isdir(folder) else data


def title(data: str) -> str:
    """What the set is called: the last part of its name."""
    return data.removeprefix(PREFIX).rstrip("/").rpartition("/")[2].partition(":")[0] or "data"


def read(data: str, columns: Columns) -> tuple[dict[str, Any], str, str]:
    """The tables of a set by the names of their splits, and the columns of image and label.

    Args:
        data: ``hf:OWNER/NAME``, with ``:CONFIG`` where it has several; or ``hf:FOLDER``.
        columns: names, where types do not tell.
    Raises:
        ValueError: the package is missing, the set cannot be had, or its columns are not told
            apart; in one line.
    """
    tables = _tables(data)
    features = next(iter(tables.values())).features
    image = _column(data, features, columns.image, "image", ("Image",))
    label = _column(data, features, columns.label, "label", ("ClassLabel",))
    for name, table in tables.items():
        if lacking := [column for column in (image, label) if column not in table.features]:
            raise ValueError(f"--data {shown(data)}: split {name} has no column {lacking[0]}")
    return tables, image, label


def _tables(data: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"--data {shown(data)} needs {_NEEDS}") from None
    name = data.removeprefix(PREFIX)
    folder = os.path.expanduser(name)
    try:
        if os.path.isdir(folder):
            inside = os.listdir(folder)
            written = "dataset_dict.json" in inside or "state.json" in inside
            found = datasets.load_from_disk(folder) if written else datasets.load_dataset(folder)
        else:
            name, _, config = name.partition(":")
            found = datasets.load_dataset(name, config or None)
    except Exception as error:  # of any library that it reads and asks with
        raise ValueError(f"--data {shown(data)}: {one_line(error)[:300]}") from None
    if not isinstance(found, Mapping):
        found = {"train": found}
    if not found or not all(isinstance(table, datasets.Dataset) for table in found.values()):
        raise ValueError(f"--data {shown(data)}: holds no tables")
    return dict(found)


def _column(
    data: str, features: Mapping[str, Any], given: str | None, what: str, kinds: tuple[str, ...]
) -> str:
    """The one column of a type, or the one that was named."""
    option = f"--{what}-column"
    if given is not None:
        if given not in features:
            raise ValueError(
                f"{option} {given}: {shown(data)} has no such column; expected one of "
                f"{', '.join(features)}"
            )
        if what == "image" and type(features[given]).__name__ not in kinds:
            raise ValueError(
                f"{option} {given}: a column of {type(features[given]).__name__}, expected images"
            )
        return given
    found = [name for name, feature in features.items() if type(feature).__name__ in kinds]
    if len(found) != 1:
        candidates = found or list(features)
        count = f"{len(found)} columns are" if found else "no column is"
        raise ValueError(
            f"--data {shown(data)}: {count} of type {kinds[0]}; say which is the {what} with "
            f"{option} ({some(candidates)})"
        )
    return found[0]


def labels(data: str, table: Any, column: str) -> list[Any]:
    """The labels of a table: numbers or texts as they stand, -1 where there is none."""
    found = list(table.select_columns([column])[:][column])
    for number, value in enumerate(found):
        if value is None:
            found[number] = -1
        elif type(value) not in (int, str):
            raise ValueError(
                f"--data {shown(data)}: column {column} has {type(value).__name__} in row "
                f"{number}, expected class numbers or names; give another --label-column"
            )
    return found


def images(data: str, split: str, table: Any, column: str) -> list[Row]:
    """The images of a table, still encoded."""
    import datasets

    encoded = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    name = f"{title(data)}/{split}"
    return [Row(encoded, column, number, name) for number in range(len(encoded))]


def class_names(features: Mapping[str, Any], column: str) -> list[str] | None:
    """Of a column of classes; None of numbers and texts."""
    names = getattr(features[column], "names", None)
    return None if names is None else [str(name) for name in names]
