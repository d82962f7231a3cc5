"""Image files as they are meant: formats, depths, transparency, orientation, damage."""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pae.train.images import Ranges, decode, image_suffixes, survey
from tests.properties import examples

COLOURS = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
GREYS = COLOURS[..., 0]
NOTHING_DEEP = Ranges()


def save(path, array, mode=None, **options):
    """An image file of `array`; returns its path."""
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def decoded(path, ranges=None):
    """The file as an array, by the ranges of a dataset of this file alone."""
    ranges = survey([path]) if ranges is None else ranges
    image = decode(path, ranges)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, 2)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path, array, colour_type, depth, *chunks, width=None):
    """A PNG by hand, of what PIL does not write; `array` is (H, W) or (H, W, channels), or packed
    bytes of rows of `width`.
    """
    height, columns = array.shape[:2]
    width = width or columns
    rows = array.astype(">u2" if depth == 16 else "u1").reshape(height, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(data))]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))
    return path


def tiff(path, array, *, big=False, tags=()):
    """An uncompressed grey TIFF by hand, of what PIL does not write; `tags` are (number, value)."""
    order = ">" if big else "<"
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    height, width = array.shape
    fields = {256: width, 257: height, 258: array.dtype.itemsize * 8, 259: 1, 262: 1, 277: 1}
    fields |= {273: 8, 278: height, 279: len(data), **dict(tags)}
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, fields[tag]) for tag in sorted(fields)]
    start = struct.pack(f"{order}2sHI", b"MM" if big else b"II", 42, 8 + len(data))
    end = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    path.write_bytes(start + data + end)
    return path


# ---- which files


def test_suffixes_are_those_that_pil_decodes():
    suffixes = image_suffixes()
    common = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".pgm"}
    assert common < suffixes and ".mpo" in suffixes
    assert not suffixes & {".h5", ".mpg", ".eps", ".ps", ".pdf", ".wmf", ".fits", ".svg", ".txt"}
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in suffixes)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".tga", ".webp", ".jfif"])
def test_eight_bits_are_what_pil_converts_them_to(tmp_path, suffix, recwarn):
    options = {"lossless": True} if suffix == ".webp" else {}
    for name, array in (("colour", COLOURS), ("grey", GREYS)):
        path = save(tmp_path / f"{name}{suffix}", array, **options)
        with Image.open(path) as image:
            assert np.array_equal(decoded(path), np.asarray(image.convert("RGB")))
        if suffix != ".jfif":
            assert np.array_equal(decoded(path), array if array.ndim == 3 else grey(array))
    assert not recwarn.list


def test_suffix_does_not_matter_to_what_a_file_is(tmp_path):
    path = save(tmp_path / "x.jpg", COLOURS, format="PNG")
    assert np.array_equal(decoded(path), COLOURS)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "the file is empty"),
        (bytes(3000), "it begins with zeros alone"),
        (b"<!DOCTYPE HTML><html>404</html>", "web page"),
        (b"\xef\xbb\xbf\n <html>", "web page"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"%PDF-1.7\n", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PIL knows no such image"),
        (bytes(128) + b"DICM" + bytes(99), "DICOM"),
        (b"once upon a time", "PIL knows no such image"),
    ],
)
def test_what_is_no_image_is_named_with_what_it_is(tmp_path, content, reason):
    path = tmp_path / "scan 1.jpg"
    path.write_bytes(content)
    for function in (lambda: survey([path]), lambda: decode(path, NOTHING_DEEP)):
        with pytest.raises(ValueError, match=reason) as caught:
            function()
        message = str(caught.value)
        assert message.startswith(f"unreadable image {path}: ") and "\n" not in message
        assert message.count("scan 1.jpg") == 1 and len(message) < len(str(path)) + 150


def test_absent_files_are_counted_and_the_first_is_named(tmp_path):
    good = save(tmp_path / "good.png", COLOURS)
    with pytest.raises(ValueError, match=r"gone1.png: No such file .* \(and 1 more of 3 images\)$"):
        survey([tmp_path / "gone1.png", good, tmp_path / "gone2.png"])


def test_decompression_bombs_are_named(tmp_path, monkeypatch):
    path = save(tmp_path / "large.png", np.zeros((40, 50), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # PIL refuses above twice as many
    with pytest.raises(ValueError, match=r"large.png: Image size \(2000 pixels\).*Make it smaller"):
        survey([path])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1900)
    with pytest.warns(UserWarning) as said:
        survey([path])
    lines = [str(w.message) for w in said if w.category is UserWarning]
    assert lines == [
        f"images of more than 1,900 pixels: decoding is slow (1 of 1 images, e.g. {path})"
    ]


# ---- depth


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("form", ["png", "tif", "handmade.tif", "signed.tif", "long.tif"])
@pytest.mark.parametrize("bits", [16, 12, 8])
def test_deep_greys_are_scaled_by_the_bits_that_the_dataset_uses(tmp_path, form, big, bits):
    values = np.linspace(0, 2**bits - 1, 35).round().astype(np.uint16).reshape(7, 5)
    dark = values // 16  # another image of the set, which takes the same range
    if form == "signed.tif" and bits == 16:
        values //= 2
    paths = []
    for i, array in enumerate((values, dark)):
        path = tmp_path / f"{i}.{form}"
        if form == "png":
            png(path, array, 0, 16)
        elif form == "tif":
            save(path, array.astype(">u2" if big else "<u2"), compression="tiff_lzw")
        elif form == "handmade.tif":
            tiff(path, array, big=big)
        else:
            kind = np.int16 if form == "signed.tif" else np.int32
            tiff(path, array.astype(kind), big=big, tags=[(339, 2)])
        paths.append(path)
    with pytest.warns(UserWarning, match=rf"0 is black, {2**bits - 1} white \(2 of 2 images, e.g."):
        ranges = survey(paths)
    for array, path in zip((values, dark), paths):
        expected = np.floor(array / (2**bits - 1) * 255 + 0.5)
        assert np.array_equal(decoded(path, ranges), grey(expected))


def test_sixteen_bits_are_divided_by_257(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = save(tmp_path / "all.png", values)
    with pytest.warns(UserWarning, match=r"up to 65535: 0 is black, 65535 white"):
        assert np.array_equal(decoded(path), grey(np.rint(values / 257)))


def test_white_is_zero_is_undone_at_every_depth(tmp_path):
    shallow = tiff(tmp_path / "8.tif", GREYS, tags=[(262, 0)])
    deep = tiff(tmp_path / "16.tif", GREYS.astype(np.uint16) * 257, tags=[(262, 0)])
    assert np.array_equal(decoded(shallow), grey(255 - GREYS))
    ranges = Ranges(integer=65535)
    assert np.array_equal(decoded(deep, ranges), grey(255 - GREYS))


def test_a_declared_maximum_is_kept(tmp_path):
    pgm = tmp_path / "12.pgm"
    pgm.write_bytes(b"P5 3 1 4095\n" + np.array([0, 1000, 4095], ">u2").tobytes())
    assert np.array_equal(decoded(pgm)[0, :, 0], [0, 62, 255])
    packed = tiff(
        tmp_path / "12.tif", np.array([[0, 0x01, 0x00]], np.uint8), tags=[(256, 2), (258, 12)]
    )
    assert np.array_equal(decoded(packed)[0, :, 0], [0, 16])  # 256 of 4095


@pytest.mark.parametrize("top, white", [(0.9, 1.0), (1.0, 1.0), (200.0, 255.0)])
def test_reals_are_0_to_1_or_0_to_255(tmp_path, top, white):
    values = np.linspace(0, top, 35, dtype=np.float32).reshape(7, 5)
    path = save(tmp_path / "x.tif", values)
    with pytest.warns(UserWarning, match=rf"real numbers, .*{white:g} white"):
        assert np.array_equal(decoded(path), grey(np.rint(values * (255 / white))))


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.array([[0.0, 3.5]], np.float32), "largest value is 3.5, expected reals of 0 to 1"),
        (np.array([[0.0, 70000]], np.float32), "expected reals"),
        (np.array([[-0.5, 1]], np.float32), "its values begin at -0.5"),
        (np.array([[0.0, np.nan]], np.float32), "NaN"),
        (np.array([[0, 70000]], np.int32), "integers of more than 16 bits have no known white"),
        (np.array([[-1000, 3000]], np.int32), "its values begin at -1000"),
    ],
)
def test_values_without_a_known_meaning_are_refused(tmp_path, array, reason):
    path = save(tmp_path / "scan.tif", array)
    with pytest.raises(ValueError, match=rf"scan.tif: .*{reason}"):
        survey([path])


def test_signed_bytes_are_refused(tmp_path):
    path = tiff(tmp_path / "signed.tif", GREYS, tags=[(339, 2)])
    with pytest.raises(ValueError, match=r"signed.tif: its values are signed"):
        survey([path])


def test_colours_of_sixteen_bits_in_planes_are_refused(tmp_path):
    planes = COLOURS.transpose(2, 0, 1).reshape(-1, 5).astype(np.uint16) * 257
    path = tiff(tmp_path / "planes.tif", planes, tags=[(257, 7), (262, 2), (277, 3), (284, 2)])
    content = bytearray(path.read_bytes())  # offsets and sizes of three strips, bits of three bands
    triples = [[16] * 3, [8, 78, 148], [70] * 3]
    for tag, values in zip((258, 273, 279), triples):
        place = content.index(struct.pack("<HHI", tag, 4, 1), 218)
        content[place + 4 : place + 12] = struct.pack("<II", 3, len(content))
        content += struct.pack("<3I", *values)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"planes.tif: PIL mixes up 16-bit colours in planes"):
        survey([path])


def test_image_beyond_the_range_of_its_dataset_is_refused(tmp_path):
    path = save(tmp_path / "new.png", np.full((2, 2), 5000, np.uint16))
    with pytest.raises(ValueError, match=r"new.png: .*5000 to 5000.*0 to 4095; was it changed"):
        decode(path, Ranges(integer=4095))


@pytest.mark.parametrize("channels, colour_type", [(3, 2), (4, 6), (2, 4)])
def test_colours_of_sixteen_bits_keep_the_upper_eight(tmp_path, channels, colour_type):
    array = np.random.default_rng(1).integers(0, 65536, (7, 5, channels)).astype(np.uint16)
    if channels != 3:
        array[..., -1] = 65535
    path = png(tmp_path / "x.png", array, colour_type, 16)
    with pytest.warns(UserWarning, match="colour images of 16 bits per channel: the upper 8"):
        got = decoded(path)
    expected = array[..., :3] >> 8 if channels != 2 else grey(array[..., 0] >> 8)
    assert np.array_equal(got, expected)
    path = png(tmp_path / "12.png", np.minimum(array, 4095), colour_type, 16)
    with pytest.raises(ValueError, match=r"12.png: .*save it as 8 bits per channel"):
        survey([path])


# ---- colours and transparency


def test_transparency_lies_on_white(tmp_path):
    alpha = np.linspace(0, 255, 35).astype(np.uint8).reshape(7, 5)
    share = alpha[..., None] / 255
    rgba = save(tmp_path / "rgba.png", np.dstack([COLOURS, alpha]))
    expected = COLOURS * share + 255 * (1 - share)
    assert np.abs(decoded(rgba) - expected).max() <= 1
    la = save(tmp_path / "la.png", np.dstack([GREYS, alpha]))
    assert np.abs(decoded(la) - (grey(GREYS) * share + 255 * (1 - share))).max() <= 1
    opaque = save(tmp_path / "opaque.png", np.dstack([COLOURS, np.full_like(alpha, 255)]))
    assert np.array_equal(decoded(opaque), COLOURS)


def test_one_transparent_colour_lies_on_white(tmp_path):
    for name, array, key in (("rgb", COLOURS, tuple(COLOURS[2, 3].tolist())), ("l", GREYS, 9)):
        array = array.copy()
        array[2, 3] = key
        path = save(tmp_path / f"{name}.png", array, transparency=key)
        expected = array if array.ndim == 3 else grey(array)
        expected = np.where((expected == np.array(key)).all(2, keepdims=True), 255, expected)
        assert np.array_equal(decoded(path), expected)
    deep = GREYS.astype(np.uint16) * 257
    trns = chunk(b"tRNS", struct.pack(">H", int(deep[0, 0])))
    path = png(tmp_path / "16.png", deep, 0, 16, trns)
    got = decoded(path, Ranges(integer=65535))
    assert np.array_equal(got, grey(np.where(GREYS[0, 0] == GREYS, 255, GREYS)))
    trns = chunk(b"tRNS", struct.pack(">HHH", 40000, 0, 0))
    path = png(tmp_path / "rgb16.png", COLOURS.astype(np.uint16) * 257, 2, 16, trns)
    with pytest.raises(ValueError, match=r"rgb16.png: one of its 16-bit colours is transparent"):
        survey([path])


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_transparent_grey_is_found_at_every_depth(tmp_path, depth):
    top = 2**depth - 1
    values = np.arange(32).reshape(4, 8) * 5 % (top + 1)
    bits = "".join(f"{v:0{depth}b}" for v in values.flat)
    packed = np.frombuffer(int(bits, 2).to_bytes(len(bits) // 8, "big"), np.uint8)
    for key in {0, 1, top}:
        trns = chunk(b"tRNS", struct.pack(">H", key))
        path = png(tmp_path / "x.png", packed.reshape(4, -1), 0, depth, trns, width=8)
        expected = np.where(values == key, 255, values * (255 // top))
        assert np.array_equal(decoded(path, NOTHING_DEEP), grey(expected))


def test_a_frame_smaller_than_its_image_lies_on_white(tmp_path):
    frame = Image.new("P", (2, 2), 1)
    frame.putpalette([0, 0, 255, 255, 0, 0])
    frame.save(tmp_path / "x.gif")
    data = bytearray((tmp_path / "x.gif").read_bytes())
    place = data.index(b"\x2c" + struct.pack("<HHHH", 0, 0, 2, 2))
    data[6:10], data[place + 1 : place + 5] = struct.pack("<HH", 6, 6), struct.pack("<HH", 2, 3)
    (tmp_path / "x.gif").write_bytes(data)
    expected = np.full((6, 6, 3), 255)
    expected[3:5, 2:4] = 255, 0, 0
    assert np.array_equal(decoded(tmp_path / "x.gif"), expected)


def test_palettes_and_bits_are_looked_up(tmp_path):
    indices = np.arange(35, dtype=np.uint8).reshape(7, 5) % 4
    palette = np.array([[255, 0, 0], [0, 128, 0], [0, 0, 64], [9, 9, 9]], np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(palette.tobytes())
    for name in ("x.png", "x.gif", "x.tif", "x.bmp"):
        image.save(tmp_path / name)
        assert np.array_equal(decoded(tmp_path / name), palette[indices])
    for name, transparency in (
        ("one.png", 1),
        ("all.png", bytes([255, 0, 255, 255])),
        ("x.gif", 1),
    ):
        image.save(tmp_path / name, transparency=transparency)
        expected = np.where(indices[..., None] == 1, 255, palette[indices])
        assert np.array_equal(decoded(tmp_path / name), expected)
    bits = save(tmp_path / "bits.png", GREYS > 99)
    assert np.array_equal(decoded(bits), grey((GREYS > 99) * 255))
    for name in ("bits.tif", "bits.pbm"):
        path = save(tmp_path / name, GREYS > 99)
        assert np.array_equal(decoded(path), grey((GREYS > 99) * 255))


@pytest.mark.parametrize("name", ["x.tif", "x.jpg"])
def test_inks_become_the_colours_that_they_print(tmp_path, name):
    flat = np.zeros((16, 16, 3), np.uint8) + np.array([200, 40, 90], np.uint8)
    path = save(tmp_path / name, flat, "CMYK")
    assert np.abs(decoded(path).astype(int) - flat).max() <= 4
    path = save(tmp_path / f"bad-profile-{name}", flat, "CMYK", icc_profile=b"no profile")
    assert np.abs(decoded(path).astype(int) - flat).max() <= 4


def ink_profile():
    """The smallest profile of inks: a table of CIE Lab over the 16 corners of CMYK."""
    corners = np.array(list(np.ndindex(2, 2, 2, 2)))
    c, m, y, k = corners.T
    light = (1 - k) * (255 - 85 * (c + m + y))
    table = np.stack([light, 128 + 40 * (m - c), 128 + 40 * (y - c)], 1).astype(np.uint8).tobytes()
    ramp = bytes(range(256))
    unit = struct.pack(">9i", *(np.eye(3, dtype=int) << 16).flat)
    lut = b"mft1" + bytes([0, 0, 0, 0, 4, 3, 2, 0]) + unit + ramp * 4 + table + ramp * 3
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(lut))
    names = b"lcms\x02\x40\0\0prtrCMYKLab " + bytes(12) + b"acsp"
    white = struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    rest = (names.ljust(64, b"\0") + white).ljust(124, b"\0") + tags + lut
    return struct.pack(">I", 4 + len(rest)) + rest


@pytest.mark.parametrize("name", ["x.tif", "x.jpg"])
def test_inks_are_mixed_by_their_profile(tmp_path, name):
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    cyan.save(tmp_path / name, icc_profile=ink_profile())
    lab = np.array([170 / 255 * 100, -40, -40])  # what the table has for cyan alone
    got = decoded(tmp_path / name)[3, 3].astype(float)
    assert np.abs(got - lab_to_srgb(lab)).max() <= 4
    assert np.abs(got - [0, 255, 255]).max() > 20  # without the profile


def lab_to_srgb(lab):
    """By CIE's formulas, from the white point D50."""
    y = (lab[0] + 16) / 116
    ratios = np.array([y + lab[1] / 500, y, y - lab[2] / 200])
    ratios = np.where(ratios > 6 / 29, ratios**3, (ratios - 4 / 29) * 108 / 841)
    to_linear = np.array(
        [[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]]
    )
    linear = (to_linear @ (ratios * [0.9642, 1, 0.8249])).clip(0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def test_lab_becomes_rgb(tmp_path):
    flat = np.zeros((6, 6, 3), np.uint8) + np.array([200, 40, 90], np.uint8)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(flat), srgb, lab, outputMode="LAB")
    image.save(tmp_path / "lab.tif")
    assert np.abs(decoded(tmp_path / "lab.tif").astype(int) - flat).max() <= 4


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif"])
def test_first_of_several_frames_is_read_and_that_is_said(tmp_path, name):
    frames = [Image.fromarray(np.full((6, 6, 3), level, np.uint8)) for level in (40, 90, 160)]
    options = {"lossless": True} if name == "x.webp" else {}
    path = tmp_path / name
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(UserWarning, match=r"several frames or pages: the first .*1 of 1 images"):
        assert np.array_equal(decoded(path), np.full((6, 6, 3), 40))


# ---- orientation


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif", "deep.png", "p.png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone(tmp_path, name, orientation):
    upright = np.zeros((24, 16), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = 255, 180, 90
    turns = {  # what a camera held so stores
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }
    stored = np.ascontiguousarray(turns[orientation])
    image = Image.fromarray(stored.astype(np.uint16) * 257 if name == "deep.png" else stored)
    if name == "p.png":
        image = image.convert("P")
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / name, exif=exif, **({"lossless": True} if name == "x.webp" else {}))
    got = decoded(tmp_path / name, Ranges(integer=65535)).astype(int)
    assert got.shape == (24, 16, 3)
    assert np.abs(got - grey(upright)).max() <= 3


def test_damaged_exif_leaves_an_image_as_it_is_stored(tmp_path):
    path = save(tmp_path / "x.png", COLOURS, exif=b"Exif\0\0XX*\0garbage")
    assert np.array_equal(decoded(path), COLOURS)


# ---- arrays


def test_arrays_are_uint8_and_grey_or_colour():
    assert np.array_equal(decoded(GREYS), grey(GREYS))
    assert np.array_equal(decoded(COLOURS), COLOURS)
    for array in (
        GREYS.astype(np.float32),
        GREYS.astype(np.uint16),
        COLOURS.transpose(2, 0, 1),
        COLOURS[..., :2],
        GREYS[0],
        GREYS[:0],
    ):
        shape = str(array.shape).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=rf"{array.dtype} {shape}, expected uint8 \(H, W\)"):
            survey([array])


# ---- damage


def example(suffix):
    """The bytes of a small image: each format in the form that holds most to be damaged."""
    data = io.BytesIO()
    frames = [Image.fromarray(np.roll(COLOURS, i, 0)) for i in range(2)]
    several = {"save_all": True, "append_images": frames[1:]}
    options = {"gif": several, "webp": several, "tiff": {"compression": "tiff_lzw"}}
    exif = Image.Exif()
    exif[274], exif[271] = 6, "maker"
    if suffix in ("jpeg", "png", "webp"):
        options[suffix] = {"exif": exif, **options.get(suffix, {})}
    frames[0].save(data, suffix, **options.get(suffix, {}))
    return data.getvalue()


@examples(80)
@given(data=st.data())
@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "tiff", "webp", "bmp"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_images_or_named(suffix, data):
    """`pytest --fresh` tries five times as many, and others."""
    content = bytearray(example(suffix))
    places = st.integers(0, len(content) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)):
        content[place] = value
    if data.draw(st.booleans()):
        del content[data.draw(places) :]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)  # a damaged width is no slow test
        path = Path(folder) / f"x.{suffix}"
        path.write_bytes(content)
        try:
            image = decode(path, survey([path]))
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"unreadable image {path}: ") and "\n" not in message
            event("refused")
        else:
            assert image.mode == "RGB" and min(image.size) > 0
            event("read")
