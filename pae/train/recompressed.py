"""Whether images were encoded once more on their way: what their headers say.

The copies of VTAB-1k that go round as image files were written by Pillow with its defaults: JPEG
of quality 75, colours at half the resolution, of whatever had come. On the sets that were lossless
this costs accuracy (CIFAR-100 by some ten points), and a table must say so. No pixel is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pae.train.images import opened
from pae.train.stored import Item

JPEG75, JPEG, ORIGINAL, LOSSLESS = "jpeg75", "jpeg", "jpeg-original", "lossless"
SAMPLES = 3  # files of each list that are looked at
# how the tables of quality 75 begin, in rows from the top left
_LUMINANCE = [8, 6, 5, 8, 12, 20, 26, 31]
_CHROMINANCE = [9, 9, 12, 24, 50]
_HALVED = 2  # Pillow's number for 4:2:0


def is_default_jpeg(path: Path) -> bool:
    """Whether the file is what Pillow writes when nobody asks for anything.

    Raises:
        ValueError: it is no image.
    """
    with opened(path) as image:
        return _is_default(image)


def _is_default(image: Any) -> bool:
    from PIL import JpegImagePlugin

    tables = getattr(image, "quantization", {})
    info = dict(image.info)
    bare = (
        info.pop("jfif_version", None) == (1, 1)
        and info.pop("jfif_unit", None) == 0
        and info.pop("jfif_density", None) == (1, 1)
        and info.pop("jfif", None) is not None
        and not info
    )
    if image.format != "JPEG" or not bare or list(tables.get(0, ())[:8]) != _LUMINANCE:
        return False
    if len(image.getbands()) == 1:  # grey: there is no colour to halve
        return True
    chrominance = list(tables.get(1, ())[: len(_CHROMINANCE)])
    return chrominance == _CHROMINANCE and JpegImagePlugin.get_sampling(image) == _HALVED


def verdict(lists: Sequence[Sequence[Item]], lossless: bool | None) -> str:
    """What became of the pixels on their way: one of the words above.

    Args:
        lists: the files of each split.
        lossless: whether the originals of this set are without loss; None where that is not known.
    Raises:
        ValueError: a file that was looked at is no image.
    """
    default, jpeg = [], False
    for files in lists:
        stride = max(1, len(files) // SAMPLES)
        for path in list(files)[::stride][:SAMPLES]:
            with opened(path) as image:
                jpeg |= image.format == "JPEG"
                default.append(_is_default(image))
    named = any(path.suffix.lower() in (".jpg", ".jpeg") for files in lists for path in files)
    if default and all(default):
        return JPEG75
    if lossless and (jpeg or named):
        return JPEG
    return ORIGINAL if jpeg else LOSSLESS


def warning(found: str, lossless: bool | None) -> str | None:
    """What to say of a verdict; None where there is nothing to say."""
    if found == JPEG75 and lossless is not False:
        how = "its originals are lossless" if lossless else "an export with Pillow's defaults"
        return (
            f"the images were encoded as JPEG of quality 75 ({how}); results are below those on "
            "the original pixels, and pixels: jpeg75 goes into the record"
        )
    if found == JPEG75:
        return (
            "the images were encoded once more as JPEG of quality 75; results are not those of the "
            "original files, and pixels: jpeg75 goes into the record"
        )
    if found == JPEG:
        return (
            "images of a set without loss are stored as JPEG; results are below those on the "
            "original pixels, and pixels: jpeg goes into the record"
        )
    return None
