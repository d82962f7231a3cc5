"""Images that lie in a larger file: rows of a table, records of an archive. Read when they are
decoded, as files are, and told apart by a name.
"""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple


class Columns(NamedTuple):
    """Which part of a row is the image and which the label; None where the types tell."""

    image: str | None = None
    label: str | None = None


class Stored(ABC):
    """One encoded image inside something larger. It can be pickled, and read by any thread."""

    @abstractmethod
    def __str__(self) -> str:
        """Where it lies: what messages call it, and what a record of the images knows it by."""

    @abstractmethod
    def read(self) -> bytes:
        """The bytes of an image file.

        Raises:
            ValueError: they are gone or damaged; in one line that names the image.
        """

    @property
    def suffix(self) -> str:
        """Of the name that it had as a file; "" where it had none."""
        return PurePosixPath(str(self)).suffix


Item = Path | Stored  # an image of a split, as files have it


def open_item(item: Any) -> IO[bytes]:
    """The image as a file: a `Stored`, or a path.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file: of a pipe, whoever reads it would wait.
    """
    if not isinstance(item, Stored) and not stat.S_ISREG(os.stat(item).st_mode):
        raise ValueError("no regular file")
    return io.BytesIO(item.read()) if isinstance(item, Stored) else open(item, "rb")
