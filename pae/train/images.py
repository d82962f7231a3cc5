"""Image files: which suffixes count as images."""

from __future__ import annotations

from functools import lru_cache

# What PIL recognises without being able to show it: containers and metadata (BUFR, GRIB, HDF5,
# IPTC, MPEG), programs for another program to run (EPS), formats of one system (WMF), and FITS,
# whose offset and scale PIL leaves out.
_NOT_SHOWN = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
# formats that PIL knows by name also where it was built without their library
_LIBRARIES = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}


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
