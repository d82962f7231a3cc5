"""Image files as they are meant: formats, depths, transparency, orientation, damage."""

from __future__ import annotations

from pae.train import images


def test_suffixes_are_those_that_pil_decodes():
    suffixes = images.image_suffixes()
    common = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".pgm"}
    assert common < suffixes and ".mpo" in suffixes
    assert not suffixes & {".h5", ".mpg", ".eps", ".ps", ".pdf", ".wmf", ".fits", ".svg", ".txt"}
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in suffixes)
