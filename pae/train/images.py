"""Image files as they are meant: one decoder, from any file that PIL reads to 8-bit RGB.

What is more than 8 bits deep is scaled, never clipped, by one range for a whole dataset: `survey`
finds it (and whatever no decoder can know from one file), `decode` uses it. Anything that is not
an image, or that could be meant in two ways, is a ValueError of one line that names the file.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from pae.train.stored import open_item

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

# What PIL recognises without being able to show it: containers and metadata (BUFR, GRIB, HDF5,
# IPTC, MPEG), programs for another program to run (EPS), formats of one system (WMF), and FITS,
# whose offset and scale PIL leaves out.
_NOT_SHOWN = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
# formats that PIL knows by name also where it was built without their library
_LIBRARIES = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}

# How files begin that are found among images and are none: (offset, bytes, what it is and the way
# out). Compared without regard to case.
_STRANGERS = (
    (0, b"<!doctype html", "it is a web page; download the image again"),
    (0, b"<html", "it is a web page; download the image again"),
    (0, b"<svg", "it is an SVG drawing; convert it to PNG"),
    (0, b"<?xml", "it is XML, such as an SVG drawing; convert it to PNG"),
    (0, b"version https://git-lfs", "it is a Git LFS pointer; run git lfs pull"),
    (0, b"%PDF", "it is a PDF; convert it to PNG"),
    (0, b"\x93NUMPY", "it is a NumPy array; convert it to PNG"),
    (0, b"II*\0", "it is a TIFF that PIL does not read, or damaged; save it as 8 or 16 bits"),
    (0, b"MM\0*", "it is a TIFF that PIL does not read, or damaged; save it as 8 or 16 bits"),
    (0, b"\x89PNG", "it begins as a PNG does, and is damaged; copy it again"),
    (0, b"\xff\xd8", "it begins as a JPEG does, and is damaged; copy it again"),
    (0, b"GIF8", "it begins as a GIF does, and is damaged; copy it again"),
    (4, b"ftyphei", "it is a HEIC photograph; convert it to JPEG"),
    (4, b"ftyphev", "it is a HEIC photograph; convert it to JPEG"),
    (4, b"ftypmif", "it is a HEIF photograph; convert it to JPEG"),
    (128, b"DICM", "it is a DICOM file; convert it to a 16-bit PNG"),
)

# EXIF's orientation -> the name of PIL's transposition that undoes it
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# tags of EXIF and TIFF
_BITS, _PHOTOMETRIC, _ORIENTATION, _PLANES, _SAMPLE_FORMAT = 258, 262, 274, 284, 339
_DEPTHS = (8, 10, 12, 14, 16)  # bits that detectors have, stored in 16


@dataclass(frozen=True)
class Ranges:
    """The values that are white in images of more than 8 bits, the same for a whole dataset.

    `integer` is 2 ** bits - 1, `real` 1.0 or 255.0; None where the dataset has no such image.
    """

    integer: int | None = None
    real: float | None = None


@lru_cache(maxsize=1)
def image_formats() -> tuple[str, ...]:
    """The formats, by PIL's names, that the installed PIL decodes and that have a suffix."""
    from PIL import Image, features

    Image.init()
    named = set(Image.registered_extensions().values()) & {*Image.OPEN, "MPO"} - _NOT_SHOWN
    return tuple(sorted(f for f in named if f not in _LIBRARIES or features.check(_LIBRARIES[f])))


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes, with their dots, of the files that the installed PIL decodes."""
    from PIL import Image

    formats = image_formats()
    return frozenset(
        suffix.lower()
        for suffix, format in Image.registered_extensions().items()
        if format in formats
    )


@contextlib.contextmanager
def opened(path: Any) -> Iterator[Image.Image]:
    """The image file at `path`, or a `Stored` one, its header read; what fails inside is blamed on
    the file.

    Raises:
        ValueError: the file is no image, or damaged.
    """
    from PIL import Image

    # MPO is a JPEG to begin with
    formats = [format for format in image_formats() if format != "MPO"]
    try:
        # by name, PIL would map an uncompressed TIFF into memory, and mix its rows if it is turned
        with open_item(path) as file, Image.open(file, formats=formats) as image:
            _check(image)
            yield image
    # PIL's decoders raise whatever damaged bytes lead them into: OSError, SyntaxError, ValueError,
    # struct.error, zlib.error, IndexError, MemoryError, DecompressionBombError, ...
    except Exception as error:
        raise ValueError(f"unreadable image {path}: {_reason(path, error)}") from None


def _check(image: Image.Image) -> None:
    """Refuses what the header shows that PIL would decode wrongly."""
    if 0 in image.size:
        raise ValueError(f"it is {image.width} x {image.height} pixels")
    if image.mode == "L" and _tag(image, _SAMPLE_FORMAT) == 2:
        raise ValueError("its values are signed, so that none is black; save it as unsigned 8 bits")
    if len(image.getbands()) > 1 and _tag(image, _BITS) == 16 and _tag(image, _PLANES) == 2:
        raise ValueError("PIL mixes up 16-bit colours in planes; save it pixel by pixel")
    if ";16" in _raw_mode(image) and isinstance(image.info.get("transparency"), tuple):
        raise ValueError("one of its 16-bit colours is transparent; save it with an alpha channel")


def _reason(path: Any, error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        with contextlib.suppress(OSError), open_item(path) as file:
            head = file.read(160)
            if not head:
                return "the file is empty"
            if not head.strip(b"\0"):
                return "it begins with zeros alone, as after a copy that was cut off"
            text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
            for offset, start, what in _STRANGERS:
                if (text if offset == 0 else head.lower()).startswith(start.lower(), offset):
                    return what
        return "PIL knows no such image; convert it to PNG or JPEG, or take it out"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = " ".join(str(error).split()).removeprefix(f"unreadable image {path}: ")
    if isinstance(error, Image.DecompressionBombError):
        return f"{message} Make it smaller, or take it out"
    if message and isinstance(error, (OSError, SyntaxError, ValueError)):
        return message
    return f"it is damaged ({type(error).__name__}{message and ': '}{message})"


def decode(item: Any, ranges: Ranges) -> Image.Image:
    """The image as a viewer shows it, in 8-bit RGB.

    Grey values of more than 8 bits are scaled by `ranges`, transparency lies on white, EXIF's
    orientation is undone, of several frames or pages the first is taken. Colours are converted by
    the profile of the file where they are printing inks (CMYK), otherwise taken as sRGB.

    Args:
        item: a path, a `Stored`, a uint8 array (H, W) or (H, W, 3), or an image that PIL has
            opened.
        ranges: what `survey` found in the dataset that the image belongs to.
    Raises:
        ValueError: the file is unreadable, or its values have no known meaning.
    """
    from PIL import Image

    if isinstance(item, np.ndarray):
        _check_array(item)
        return Image.fromarray(item).convert("RGB")
    if isinstance(item, Image.Image):
        _check(item)
        return _decoded(item, ranges)
    with opened(item) as image:
        return _decoded(image, ranges)


def _decoded(image: Image.Image, ranges: Ranges) -> Image.Image:
    from PIL import Image

    raw_mode, box = _raw_mode(image), (0, 0, *image.size)
    if raw_mode in ("L;2", "L;4") and "transparency" in image.info:
        # PIL scales the values of such a PNG, and leaves the transparent one as it is
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}[raw_mode]
    tile = cast(Any, image).tile if image.format == "GIF" else None
    if tile:  # a first frame may be smaller than the image
        box = tile[0][1]
    image.load()
    turn = _turn(image)
    image = _to_rgb(image, ranges)
    if box != (0, 0, *image.size):
        part, image = image.crop(box), Image.new("RGB", image.size, "white")
        image.paste(part, box)
    return image if turn is None else image.transpose(Image.Transpose[turn])


def _check_array(array: np.ndarray) -> None:
    bad_shape = array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or not array.size
    if bad_shape or array.dtype != np.uint8:
        raise ValueError(
            f"an image is an array of {array.dtype} {array.shape}, expected uint8 (H, W) or "
            "(H, W, 3)"
        )


def _turn(image: Image.Image) -> str | None:
    """The transposition that EXIF asks for; as viewers do, none where the data is damaged."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # as above
        return None


def _to_rgb(image: Image.Image, ranges: Ranges) -> Image.Image:
    from PIL import Image

    if _is_deep(image):
        values, declared = _deep_values(image)
        white = declared or (ranges.real if image.mode == "F" else ranges.integer)
        alpha = image.info.get("transparency")
        grey = Image.fromarray(_scaled(values, white, _is_inverted(image)))
        if alpha is not None:  # one value of a grey PNG is transparent
            grey.paste(255, mask=Image.fromarray((values == alpha).astype(np.uint8) * 255))
        return grey.convert("RGB")
    if image.mode == "La":  # premultiplied
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "CMYK" and "icc_profile" in image.info:
        from PIL import ImageCms

        # inks without their profile, or with one that is none, are mixed by PIL, as by viewers
        with contextlib.suppress(ImageCms.PyCMSError):
            inks, into = io.BytesIO(image.info["icc_profile"]), ImageCms.createProfile("sRGB")
            mixed = ImageCms.profileToProfile(image, inks, into, outputMode="RGB")
            return cast("Image.Image", mixed)
    return image.convert("RGB")


def _tag(image: Image.Image, number: int) -> Any:
    """The first value of a TIFF tag; None for other files."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value


def _raw_mode(image: Any) -> str:
    """How the file stores a pixel, by PIL's name; known before `load`, and of files alone."""
    tile = getattr(image, "tile", None)
    arguments = tile[0][3] if tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _is_inverted(image: Image.Image) -> bool:
    """TIFF's WhiteIsZero, which PIL undoes up to 8 bits."""
    return _tag(image, _PHOTOMETRIC) == 0


def _deep_values(image: Image.Image) -> tuple[np.ndarray, int | None]:
    """Grey values of more than 8 bits, and the white that the file itself declares."""
    values = np.asarray(image)
    if image.mode == "F" and not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    if values.min() < 0:
        raise ValueError(
            f"its values begin at {values.min()}, so that none is black; save it as 16 bits from 0"
        )
    if image.format == "PPM" and image.mode != "F":
        return values, 65535  # PIL has scaled by the file's own maximum
    return values, 4095 if _tag(image, _BITS) == 12 else None


def _scaled(values: np.ndarray, white: float | None, inverted: bool) -> np.ndarray:
    """0..white to 0..255, rounded."""
    if white is None:
        raise ValueError(
            f"its values are {values.min()} to {values.max()}, more than 8 bits, and those of the "
            "training images were not, so that nothing says which is white; save it as 8 bits"
        )
    if values.min() < 0 or values.max() > white:
        raise ValueError(
            f"its values are {values.min()} to {values.max()}, and those of the dataset were 0 to "
            f"{white}; was it changed meanwhile?"
        )
    if isinstance(white, int):
        scaled = _table(white)[values]
    else:
        scaled = np.rint(values * (255 / white)).astype(np.uint8)
    return 255 - scaled if inverted else scaled


@lru_cache(maxsize=4)
def _table(white: int) -> np.ndarray:
    """The 8-bit value of every integer from 0 to `white`, rounded."""
    return ((np.arange(white + 1) * 255 + white // 2) // white).astype(np.uint8)


@dataclass(frozen=True)
class _Look:
    """What `survey` sees in one file: notes, and for deep images their kind and largest value."""

    notes: tuple[str, ...] = ()
    kind: str = ""
    largest: float = 0.0


def survey(items: Sequence[Any], workers: int = 2) -> Ranges:
    """Looks at every image's header, and at the values of those of more than 8 bits.

    Integers get the smallest of 8, 10, 12, 14 and 16 bits that holds the largest value of all
    images (a file that declares its own maximum keeps that); reals are 0 to 1, or 0 to 255. One
    warning for each says so; others count images of several frames and of very many pixels.

    Args:
        items: paths or arrays, as for `decode`: all images of a dataset, over its splits.
        workers: threads.
    Raises:
        ValueError: a file is unreadable, or no range is known.
    """
    notes: dict[str, list[Any]] = defaultdict(list)
    deep: dict[str, list[tuple[float, Any]]] = defaultdict(list)
    for item, look in zip(items, map_images(_look, items, workers)):
        for note in look.notes:
            notes[note].append(item)
        if look.kind:
            deep[look.kind].append((look.largest, item))
    whites: dict[str, Any] = {}
    for kind, found in deep.items():
        largest, item = max(found, key=lambda pair: pair[0])
        white, note = _WHITES[kind](largest)
        if white is None:
            raise ValueError(f"unreadable image {item}: its largest value is {largest:g}, {note}")
        whites[kind] = white
        notes[note] = [item for _, item in found]
    for note, found_items in notes.items():
        some = f"{len(found_items)} of {len(items)} images, e.g. {found_items[0]}"
        warnings.warn(f"{note} ({some})", stacklevel=2)
    return Ranges(whites.get("integer"), whites.get("real"))


def _look(item: Any) -> _Look:
    from PIL import Image

    if isinstance(item, np.ndarray):
        _check_array(item)
        return _Look()
    with opened(item) as image:
        notes = []
        # a photograph with a preview or a depth map behind it (MPO) is one picture
        if getattr(image, "is_animated", False) and image.format != "MPO":
            notes.append("images of several frames or pages: the first is read")
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            notes.append(f"images of more than {Image.MAX_IMAGE_PIXELS:,} pixels: decoding is slow")
        if _is_deep(image):
            image.load()
            values, white = _deep_values(image)
            kind = "real" if image.mode == "F" else "integer"
            return _Look(tuple(notes), kind if white is None else "", float(values.max()))
        if ";16" in _raw_mode(image):
            image.load()
            bands = zip(image.getbands(), np.atleast_2d(image.getextrema()).tolist())
            largest = max(high for band, (_, high) in bands if band not in "Aa")
            return _Look(tuple(notes), "colour", largest)
        return _Look(tuple(notes))


def _integer_white(largest: float) -> tuple[int | None, str]:
    bits = next((bits for bits in _DEPTHS if largest < 1 << bits), None)
    if bits is None:
        return None, "and integers of more than 16 bits have no known white; save it as 16 bits"
    white = (1 << bits) - 1
    return white, f"grey images of more than 8 bits, up to {largest:.0f}: 0 is black, {white} white"


def _real_white(largest: float) -> tuple[float | None, str]:
    # between the two, no dataset is plainly one or the other
    white = 1.0 if largest <= 1 else 255.0 if 16 <= largest <= 255 else None
    if white is None:
        return None, "expected reals of 0 to 1, or of 0 to 255; save it as 8 or 16 bits"
    return white, f"grey images of real numbers, up to {largest:g}: 0 is black, {white:g} white"


def _colour_white(largest: float) -> tuple[int | None, str]:
    # PIL keeps the upper 8 of 16 bits, so that nothing is left to scale when they are empty
    if largest < 1 << 6:
        return None, "of 255: its 16 bits hold at most 14; save it as 8 bits per channel"
    return 255, "colour images of 16 bits per channel: the upper 8 are read"


_WHITES: dict[str, Callable[[float], tuple[Any, str]]] = {
    "integer": _integer_white,
    "real": _real_white,
    "colour": _colour_white,
}


def map_images(
    function: Callable[[Any], T], items: Sequence[Any], workers: int, chunk: int = 4096
) -> Iterator[T]:
    """`function` of every item, in order, by threads: PIL releases the interpreter's lock.

    Raises:
        ValueError: at the end, if any was raised: the first one, and how many more there were.
    """

    def attempt(item: Any) -> T | ValueError:
        try:
            return function(item)
        except ValueError as error:
            return error

    errors: list[ValueError] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in range(0, len(items), chunk):  # a future per item of a large set would be much
            for result in pool.map(attempt, items[start : start + chunk]):
                if isinstance(result, ValueError):
                    errors.append(result)
                else:
                    yield result
    if errors:
        more = f" (and {len(errors) - 1} more of {len(items)} images)" if len(errors) > 1 else ""
        raise ValueError(f"{errors[0]}{more}")
