"""Frequency-shortcut statistics in every execution, against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pae_kernels import backends, native
from pae_kernels.spectrum import (
    cuda,
    reference,
    shortcut_images,
    shortcut_pool,
    shortcut_tokens,
)
from tests.errors import error
from tests.kernels.executions import (
    BF16,
    FP16,
    FP32,
    FP64,
    GPU,
    INTERPRETING,
    KERNELS,
    each,
    sanitized,
)
from tests.properties import examples

OP = "shortcut_tokens"  # and shortcut_pool, by the same versions
OPS = torch.ops.pae


@pytest.fixture
def execution(execution, monkeypatch):
    """In the interpreter on narrow tiles: tiny widths make several, and do not wait for padding."""
    if execution.kind == "interpreter":
        monkeypatch.setitem(kernels._TOKENS, "BLOCK_D", 16)
        monkeypatch.setitem(kernels._TAPS, "BLOCK_D", 16)
        monkeypatch.setitem(kernels._STRIPS, "BLOCK_H", 16)
        monkeypatch.setitem(kernels._PARTS, "BLOCK_D", 16)
    return execution


if INTERPRETING:
    import triton

    from pae_kernels.spectrum import triton as kernels
    from tests.kernels.waves import waves_kernel


def images_of(batch, channels, height, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, dtype=dtype, generator=generator)


def grid(window, stride, height, width):
    rows = range(0, height - window + 1, stride)
    cols = range(0, width - window + 1, stride)
    return torch.tensor([(r, c) for r in rows for c in cols])


def filtered(images, origins, window):
    return shortcut_images(torch.fft.fft2(images), origins, window, tuple(images.shape[-2:]))


def stem_of(patch, channels=3, dim=5, dtype=torch.float64, seed=1):
    """Weight and bias of a patch embedding."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)
    return draw(dim, channels, *patch).to(dtype), draw(dim).to(dtype)


def embedded(images, weight, bias=None):
    """The reference: a convolution whose stride is its patch, patches row by row."""
    return torch.nn.functional.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).mT


def tokens_of(images, origins, window, weight, bias=None, **options):
    spectrum, size = torch.fft.fft2(images), tuple(images.shape[-2:])
    return shortcut_tokens(spectrum, origins, window, size, weight, bias, **options)


def pooled_by_loop(tokens):
    """The definition, one token at a time."""
    result = torch.zeros(tokens.shape[0], tokens.shape[3], dtype=torch.float64)
    for s, window in enumerate(tokens.double()):
        rows = [row for image in window for row in image]
        total = sum(float(row @ row) for row in rows)
        for row in rows:
            result[s] += row * float(row @ row) / total
    return result


# ---- shortcut_images


@examples(40)
@given(
    height=st.integers(1, 21),
    width=st.integers(1, 21),
    window=st.integers(1, 21),
    row=st.integers(0, 20),
    col=st.integers(0, 20),
)
def test_images_equal_the_definition_at_every_size(height, width, window, row, col):
    window = min(window, height, width)
    row, col = min(row, height - window), min(col, width - window)
    images = images_of(2, 3, height, width)
    ours = filtered(images, torch.tensor([[row, col]]), window)
    torch.testing.assert_close(
        ours[0], reference.band_pass(images, (row, col), window), rtol=0, atol=1e-13
    )


def test_images_of_a_chunk_equal_each_window_alone():
    images = images_of(2, 3, 20, 33)
    origins = grid(8, 5, 20, 33)
    ours = filtered(images, origins, 8)
    assert ours.shape == (len(origins), 2, 3, 20, 33)
    for got, origin in zip(ours, origins):
        torch.testing.assert_close(
            got, reference.band_pass(images, tuple(origin), 8), rtol=0, atol=1e-13
        )


def test_images_in_float32_are_as_good_as_the_transform():
    """At most twice the error of the reference path in the same precision (FFT against FFT)."""
    images = images_of(4, 3, 112, 112, torch.float32)
    origins = torch.tensor([(0, 0), (48, 48), (96, 13), (50, 0)])
    truth = filtered(images.double(), origins, 16)
    ours = filtered(images, origins, 16)
    assert ours.dtype == torch.float32
    error = (ours - truth).abs().amax(dim=(1, 2, 3, 4))
    plain = torch.stack([reference.band_pass(images, tuple(o), 16) for o in origins])
    allowed = (plain - truth).abs().amax(dim=(1, 2, 3, 4))
    assert (error <= 2 * allowed + 1e-7).all(), (error, allowed)


@pytest.mark.parametrize(("height", "width", "window"), [(32, 32, 8), (24, 40, 8), (15, 10, 5)])
def test_windows_that_tile_the_spectrum_sum_to_the_image(height, width, window):
    images = images_of(2, 3, height, width)
    parts = filtered(images, grid(window, window, height, width), window)
    torch.testing.assert_close(parts.sum(0), images, rtol=0, atol=1e-13)


def test_the_window_at_frequency_zero_keeps_the_mean_and_the_others_lose_it():
    images = images_of(2, 3, 16, 18) + 3.0
    ours = filtered(images, torch.tensor([(8, 9), (4, 5), (0, 0)]), 4).mean(dim=(-2, -1))
    mean = images.mean(dim=(-2, -1))
    torch.testing.assert_close(ours[0], mean)  # first bin of the window is frequency 0
    torch.testing.assert_close(ours[1], torch.zeros_like(mean))  # ends one bin before it
    torch.testing.assert_close(ours[2], torch.zeros_like(mean))


def test_one_bin_gives_one_wave():
    images = images_of(1, 1, 12, 10)
    ours = filtered(images, torch.tensor([(6 + 2, 5 + 3)]), 1)[0, 0, 0]
    y, x = torch.arange(12.0).double()[:, None], torch.arange(10.0).double()
    coefficient = torch.fft.fft2(images)[0, 0, 2, 3] / 120
    angle = 2 * torch.pi * (2 * y / 12 + 3 * x / 10)
    expected = coefficient.real * angle.cos() - coefficient.imag * angle.sin()
    torch.testing.assert_close(ours, expected)


def test_images_accept_any_strides_and_no_windows():
    spectrum = torch.fft.fft2(images_of(3, 2, 12, 12)).permute(1, 0, 3, 2)
    origins = torch.tensor([(1, 2), (4, 4)])
    torch.testing.assert_close(
        shortcut_images(spectrum, origins, 5, (12, 12)),
        shortcut_images(spectrum.contiguous(), origins, 5, (12, 12)),
        rtol=0,
        atol=0,
    )
    assert shortcut_images(spectrum, origins[:0], 5, (12, 12)).shape == (0, 2, 3, 12, 12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"spectrum": torch.zeros(1, 3, 8, 8)}, TypeError, "spectrum must be complex64 or"),
        ({"spectrum": torch.zeros(3, 8, 8, dtype=torch.complex64)}, ValueError, "spectrum must be"),
        ({"spectrum": torch.fft.rfft2(torch.zeros(1, 3, 8, 8))}, ValueError, "the full fft2"),
        ({"size": (8, 6)}, ValueError, r"images of size \(8, 6\)"),
        ({"window": 0}, ValueError, "window must be an int from 1 to min.* = 8, got 0"),
        ({"window": 9}, ValueError, "window must be an int from 1 to min.* = 8, got 9"),
        ({"window": 2.0}, ValueError, "window must be an int .* got 2.0"),
        ({"window": True}, ValueError, "window must be an int .* got True"),
        ({"origins": [(0, 0)]}, TypeError, "origins must be an int64 tensor .* got list"),
        ({"origins": torch.zeros(2, 2)}, TypeError, "origins must be an int64 tensor .* float32"),
        ({"origins": torch.tensor([[0, 0, 0]])}, ValueError, r"origins must be \(S, 2\)"),
        ({"origins": torch.tensor([[0, 5]])}, ValueError, r"origins must lie in \[0, 4\] x \[0, 4"),
        ({"origins": torch.tensor([[-1, 0]])}, ValueError, r"got \[-1, 0\] to \[-1, 0\]"),
        (
            {"spectrum": torch.zeros(1, 3, 8, 8, dtype=torch.complex64, requires_grad=True)},
            ValueError,
            "spectrum requires a gradient, but shortcut statistics have none",
        ),
    ],
)
def test_images_refuse_bad_arguments(change, error, message):
    arguments = {
        "spectrum": torch.zeros(1, 3, 8, 8, dtype=torch.complex64),
        "origins": torch.tensor([[0, 0]]),
        "window": 4,
        "size": (8, 8),
    }
    shortcut_images(**arguments)
    with pytest.raises(error, match=message) as caught:
        shortcut_images(**{**arguments, **change})
    assert "\n" not in str(caught.value)


# ---- shortcut_tokens


def stem_problem(size, patch, *, batch=2, channels=3, dim=8, dtype=FP32, seed=0):
    """Images, weight, bias and rows of a stem; sums over large patches stay of order 1."""
    images = images_of(batch, channels, *size, torch.promote_types(dtype, FP32), seed)
    weight, bias = (t.to(dtype) for t in stem_of(patch, channels, dim))
    count = size[0] // patch[0] * (size[1] // patch[1])
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return images, weight / max(1, weight[0].numel() // 48), bias, rows


def check(execution, images, weight, bias, rows, origins, window):
    """Tokens of a version, beside the definition in the same precision and in fp64."""
    size = tuple(images.shape[-2:])
    images, weight, bias, rows = (
        t if t is None else t.to(execution.device) for t in (images, weight, bias, rows)
    )
    spectrum, places = torch.fft.fft2(images), torch.as_tensor(origins)
    got = shortcut_tokens(
        spectrum, places.to(execution.device), window, size, weight, bias, rows=rows
    )
    wide = [t if t is None else t.double() for t in (weight, bias, rows)]
    for tokens, origin in zip(got, places, strict=True):
        kept = reference.band_pass(images, tuple(origin), window).to(weight.dtype)
        plain = embedded(kept, weight, bias) + (0 if rows is None else rows)
        exact = embedded(reference.band_pass(images.double(), tuple(origin), window), *wide[:2])
        exact = exact + (0 if rows is None else wide[2])
        execution.assert_as_exact(tokens, plain, exact, f"window at {tuple(origin)}")
    return got


def corners(size, window):
    """The middle of the spectrum, an odd place, its first and its last corner."""
    last = [side - window for side in size]
    middle = [side // 2 - window // 2 for side in size]
    odd = [min(size[0] // 2, last[0]), min(3, last[1])]
    return [middle, odd, [0, 0], last]


# (size, patch, window): an even and an odd number of patches a row, more than 8 and 16 of them;
# windows of one bin, of an odd number, of all; sizes that fill no tile; more than one stage deep
SHAPES = [
    ((24, 24), (6, 6), 8),
    ((15, 21), (5, 3), 7),
    ((16, 20), (4, 5), 16),
    ((12, 40), (6, 2), 1),
    ((8, 36), (4, 2), 5),
    ((9, 33), (3, 3), 9),
    ((10, 18), (5, 9), 10),
    ((70, 14), (7, 7), 14),
]
EMULATED = [
    *(SHAPES[i] for i in (0, 1, 3)),
    ((9, 33), (3, 3), 3),
    ((10, 18), (10, 9), 10),
    ((20, 18), (20, 18), 2),
]
STEMS = [
    ((224, 224), (16, 16), 16, 768),
    ((224, 224), (14, 14), 16, 384),
    ((224, 224), (32, 32), 16, 768),
    ((384, 384), (16, 16), 24, 192),
    ((240, 176), (16, 8), 33, 100),
    ((56, 56), (8, 8), 7, 1),
]
REFERENCE = [
    *((*shape, 8) for shape in SHAPES),
    ((112, 112), (16, 16), 16, 48),
    ((112, 112), (14, 14), 16, 48),
    ((32, 32), (8, 8), 8, 48),
]


@each(
    OP,
    "size, patch, window, dim, dtype, windows",
    reference=[(*shape, dtype, 4) for shape in REFERENCE for dtype in (FP64, FP32, BF16, FP16)],
    interpreter=[
        *((*shape, 8, FP32, 2) for shape in SHAPES),
        ((20, 18), (10, 9), 18, 8, FP16, 1),  # more than 16 bins
        ((16, 16), (8, 4), 4, 1, FP32, 1),
        ((16, 16), (8, 4), 4, 35, FP32, 1),
        ((24, 24), (24, 12), 3, 8, FP32, 1),  # a large patch
    ],
    emulated=[
        *((*shape, 8, dtype, 2) for shape in EMULATED for dtype in (FP32, BF16, FP16)),
        ((18, 20), (6, 5), 17, 8, BF16, 1),
        *(sanitized((8, 12), (4, 4), 4, dim, BF16, 2) for dim in (1, 66, 80)),
        ((224, 224), (16, 16), 2, 8, BF16, 1),  # a real stem
    ],
    gpu=[
        *((*stem, dtype, 4) for stem in STEMS for dtype in (BF16, FP16, FP32)),
        *(sanitized((30, 21), (5, 3), 9, 70, dtype, 2) for dtype in (BF16, FP32)),
    ],
)
def test_tokens_equal_the_definition(execution, size, patch, window, dim, dtype, windows):
    batch = execution.pick(reference=2, interpreter=windows, emulated=1, gpu=4)
    problem = stem_problem(size, patch, batch=batch, dim=dim, dtype=dtype)
    check(execution, *problem, corners(size, window)[-windows:], window)


@each(OP, on=("reference", "interpreter", "emulated"))
def test_tokens_equal_the_definition_at_every_size(execution):
    largest = execution.pick(reference=25, interpreter=20, emulated=6)
    dtypes = execution.pick(interpreter=[FP32], other=execution.dtypes)

    @examples(execution.pick(reference=40, interpreter=6, emulated=10))
    @given(
        patch=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        patches=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        window=st.integers(1, largest),
        at=st.tuples(st.integers(0, 24), st.integers(0, 24)),
        batch=st.integers(1, 3),
        channels=st.integers(1, 3),
        dim=st.integers(1, 9),
        has=st.tuples(st.booleans(), st.booleans()),
        dtype=st.sampled_from(dtypes),
    )
    def any_size(patch, patches, window, at, has, **others):
        size = tuple(p * n for p, n in zip(patch, patches, strict=True))
        window = min(window, *size)
        origin = [min(a, side - window) for a, side in zip(at, size, strict=True)]
        images, weight, *rest = stem_problem(size, patch, **others)
        rest = [t if given else None for t, given in zip(rest, has, strict=True)]
        check(execution, images, weight, *rest, [origin], window)

    any_size()


@each(OP, "size", emulated=[sanitized((24, 8))])
def test_several_tiles_of_lines(execution, size):
    problem = stem_problem(size, (2, 4), batch=3, dtype=BF16)
    check(execution, *problem, [(3, 5), (11, 0)], 2)


@each(OP, on=["interpreter"])
def test_tiles_that_ship(execution, monkeypatch):
    monkeypatch.setitem(kernels._TOKENS, "BLOCK_D", 64)
    check(execution, *stem_problem((24, 20), (6, 5), dim=70), [(3, 5)], 4)


@each(OP, on=["gpu"])
def test_tokens_of_a_natural_spectrum(execution):
    """Amplitudes that fall as 1 / f: the faint windows are as exact as the bright ones."""
    images, weight, bias, rows = stem_problem((224, 224), (16, 16), batch=4, dim=768)
    f = torch.fft.fftfreq(224, 1 / 224)
    fall = 1 / (1 + (f[:, None] ** 2 + f**2).sqrt())
    images = torch.fft.ifft2(torch.fft.fft2(images) * fall).real
    origins = [(104, 104), (0, 0), (40, 176)]
    check(execution, images, weight, torch.zeros_like(bias), 0 * rows, origins, 16)


@each(OP, "size", interpreter=[1, 2, 3, 7, 16, 224, 1000])
def test_waves_are_exact_at_every_frequency(execution, size):
    out = torch.full((2, size), torch.nan)
    waves_kernel[(1,)](out, size, BLOCK=triton.next_power_of_2(size))
    angle = torch.arange(size, dtype=FP64) * (2 * math.pi / size)
    assert (out - torch.stack([angle.cos(), angle.sin()])).abs().max() < 1.2e-7


@each(OP, on=("reference", "emulated"))
def test_fp32_products_are_not_tf32(execution):
    """Inputs that TF32 cannot hold: its own error would be 3e-4."""
    images, (weight, _) = images_of(2, 3, 16, 16, FP32), stem_of((8, 8), dim=16, dtype=FP32)
    got = tokens_of(images, torch.tensor([(4, 3)]), 8, weight)[0]
    exact = embedded(reference.band_pass(images.double(), (4, 3), 8), weight.double())
    assert error(got, exact) < 4e-7


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_tokens_are_rounded_at_the_end(dtype):
    images, *stem, rows = stem_problem((32, 32), (8, 8), dim=48, dtype=dtype)
    origins = grid(8, 12, 32, 32)
    ours = tokens_of(images, origins, 8, *stem, rows=rows)
    wide = tokens_of(images, origins, 8, *stem, rows=rows, dtype=FP32)
    assert ours.dtype == dtype and wide.dtype == FP32 and torch.equal(wide.to(dtype), ours)


@each(OP)
def test_tokens_of_windows_that_tile_the_spectrum_sum_to_those_of_the_image(execution):
    dtype = execution.pick(reference=FP64, other=FP32)
    images, (weight, bias) = images_of(2, 3, 16, 24, dtype), stem_of((4, 4), dtype=dtype)
    images, weight, bias = execution.moved(images, weight, bias)
    parts = tokens_of(images, grid(8, 8, 16, 24).to(execution.device), 8, weight, bias)
    assert len(parts) == 6
    whole = embedded(images.double(), weight.double(), bias.double()) + 5 * bias.double()
    tolerance = execution.pick(reference=1e-12, other=1e-5)
    torch.testing.assert_close(parts.double().sum(0), whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("patch", "size", "window"), [((4, 6), (24, 36), 8), ((7, 7), (28, 28), 9)]
)
def test_tokens_of_a_chunk_equal_each_window_alone(patch, size, window):
    images, (weight, bias) = images_of(2, 3, *size), stem_of(patch)
    rows = torch.randn(size[0] // patch[0] * (size[1] // patch[1]), 5, dtype=torch.float64)
    origins = grid(window, 5, *size)
    ours = tokens_of(images, origins, window, weight, bias, rows=rows)
    for got, origin in zip(ours, origins):
        filtered_images = reference.band_pass(images, tuple(origin), window)
        expected = embedded(filtered_images, weight, bias) + rows
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_tokens_of_frequency_zero_are_the_mean_colour_everywhere():
    images, (weight, bias) = images_of(2, 3, 16, 24) + 3.0, stem_of((4, 4))
    ours = tokens_of(images, torch.tensor([(8, 12)]), 1, weight, bias)[0]
    mean = images.mean(dim=(-2, -1)) @ weight.sum(dim=(-2, -1)).T + bias
    torch.testing.assert_close(ours, mean[:, None].expand(-1, 24, -1))


def test_tokens_of_a_bin_and_its_mirror_image_are_equal():
    """Both hold the same half of one real wave."""
    images, (weight, _) = images_of(2, 3, 24, 24), stem_of((6, 4))
    origins = torch.tensor([(12 + 5, 12 - 7), (12 - 5, 12 + 7)])
    ours = tokens_of(images, origins, 1, weight)
    torch.testing.assert_close(ours[0], ours[1], rtol=0, atol=1e-13)


def test_tokens_of_one_bin_are_one_wave():
    images, (weight, _) = images_of(1, 1, 12, 20), stem_of((3, 5), 1, 2)
    ours = tokens_of(images, torch.tensor([(6 + 2, 10 + 3)]), 1, weight)[0, 0]
    y, x = torch.arange(12.0).double()[:, None], torch.arange(20.0).double()
    phase = torch.polar(torch.ones(12, 20).double(), 2 * torch.pi * (2 * y / 12 + 3 * x / 20))
    wave = (torch.fft.fft2(images)[0, 0, 2, 3] / 240 * phase).real
    torch.testing.assert_close(ours, embedded(wave[None, None], weight)[0])


@each(OP)
def test_tokens_accept_any_strides_no_windows_and_no_images(execution):
    dtype = execution.pick(reference=FP64, other=FP32)
    images, (weight, bias) = images_of(3, 2, 12, 12, dtype), stem_of((4, 3), dtype=dtype)
    images, weight, bias = execution.moved(images, weight, bias)
    spectrum = torch.fft.fft2(images).permute(1, 0, 3, 2)
    origins = torch.tensor([(1, 2), (4, 4)], device=execution.device)
    expected = shortcut_tokens(spectrum.contiguous(), origins, 5, (12, 12), weight, bias)
    strided = weight.mT.contiguous().mT, torch.stack([bias, bias], 1)[:, 0]
    assert not any(t.is_contiguous() for t in strided)
    conjugate = spectrum.conj().resolve_conj().conj()
    assert conjugate.is_conj()
    for s, o, stem in (
        (spectrum, origins, (weight, bias)),
        (spectrum, origins.repeat_interleave(2, 0)[::2], strided),
        (spectrum, origins.T.contiguous().T, strided),
        (conjugate, origins, (weight, bias)),
    ):
        ours = shortcut_tokens(s, o, 5, (12, 12), *stem)
        if execution.kind == "reference":
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)
        else:
            assert torch.equal(ours, expected)
        assert ours.is_contiguous()
    none = shortcut_tokens(spectrum, origins[:0], 5, (12, 12), weight, bias)
    assert none.shape == (0, 2, 12, 5)
    assert shortcut_tokens(spectrum[:0], origins, 5, (12, 12), weight).shape == (2, 0, 12, 5)


@each(OP, "dtype", interpreter=[FP32], emulated=[FP32, BF16], gpu=[BF16, FP16, FP32])
def test_the_same_bits_on_every_run_and_in_any_company(execution, dtype):
    size, patch, window = execution.pick(
        gpu=((224, 224), (16, 16), 16),
        interpreter=((8, 4), (4, 4), 3),
        emulated=((12, 16), (4, 4), 5),
    )
    dim = execution.pick(gpu=768, other=8)
    batch = execution.pick(interpreter=1, emulated=2, gpu=4)
    problem = stem_problem(size, patch, batch=batch, dim=dim, dtype=dtype)
    images, *stem, rows = execution.moved(*problem)
    spectrum = torch.fft.fft2(images)
    origins = torch.tensor(corners(size, window)[:2], device=execution.device)

    def both(places):
        tokens = shortcut_tokens(spectrum, places, window, size, *stem, rows=rows)
        return tokens, shortcut_pool(tokens)

    first = both(origins)
    assert all(t.isfinite().all() for t in first)
    for _ in execution.runs():
        assert all(torch.equal(a, b) for a, b in zip(both(origins), first, strict=True))
    for a, b in zip(both(origins[1:2]), first, strict=True):
        assert torch.equal(a[0], b[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"spectrum": torch.zeros(1, 3, 8, 8)}, TypeError, "spectrum must be complex64 or"),
        ({"window": 9}, ValueError, "window must be an int from 1 to min.* = 8, got 9"),
        ({"origins": torch.tensor([[0, 5]])}, ValueError, r"origins must lie in \[0, 4\] x \[0, 4"),
        ({"weight": None}, TypeError, "weight must be a float tensor .* got NoneType"),
        ({"weight": torch.zeros(5, 3, 4, 4).long()}, TypeError, "weight must be a float tensor"),
        ({"weight": torch.zeros(5, 2, 4, 4)}, ValueError, r"weight must be \(D, 3, ph, pw\)"),
        ({"weight": torch.zeros(5, 3, 4)}, ValueError, r"weight must be \(D, 3, ph, pw\)"),
        ({"weight": torch.zeros(5, 3, 4, 3)}, ValueError, "patches of 4 x 3: pad the images"),
        ({"weight": torch.zeros(5, 3, 4, 4, device="meta")}, ValueError, "on cpu, got .* meta"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \(5,\) on cpu, got \(4,\)"),
        ({"bias": torch.zeros(5).int()}, TypeError, r"bias must be a float tensor \(5,\) or None"),
        ({"rows": torch.zeros(5)}, ValueError, r"rows must be \(4, 5\) on cpu, got \(5,\)"),
        ({"rows": torch.zeros(4, 5, requires_grad=True)}, ValueError, "rows requires a gradient"),
        ({"bias": torch.zeros(5, requires_grad=True)}, ValueError, "bias requires a gradient"),
        (
            {"weight": torch.zeros(5, 3, 4, 4, requires_grad=True)},
            ValueError,
            "weight requires a gradient, but shortcut statistics have none",
        ),
        ({"dtype": torch.int32}, TypeError, "dtype must be a float type .* got torch.int32"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, "dtype must be a float type of 16 bits"),
        ({"dtype": "bf16"}, TypeError, "dtype must be a float type .* got 'bf16'"),
    ],
)
def test_tokens_refuse_bad_arguments(change, error, message):
    arguments = {
        "spectrum": torch.zeros(1, 3, 8, 8, dtype=torch.complex64),
        "origins": torch.tensor([[0, 0]]),
        "window": 4,
        "size": (8, 8),
        "weight": torch.zeros(5, 3, 4, 4),
        "bias": torch.zeros(5),
        "rows": torch.zeros(4, 5),
        "dtype": torch.bfloat16,
    }
    shortcut_tokens(**arguments)
    with pytest.raises(error, match=message) as caught:
        shortcut_tokens(**{**arguments, **change})
    assert "\n" not in str(caught.value)


# ---- shortcut_pool


@each(
    OP,
    "shape, dtype",
    reference=[((2, 3, 50, 40), dtype) for dtype in (FP64, FP32, BF16, FP16)],
    interpreter=itertools.product(
        [(1, 1, 1, 1), (2, 3, 50, 40), (3, 2, 31, 129), (1, 5, 40, 33)], [FP32, FP16]
    ),
    emulated=itertools.product(
        [(1, 1, 1, 1), (2, 3, 50, 40), (2, 2, 31, 129), (1, 1, 9, 1300)], [FP32, BF16, FP16]
    ),
    gpu=[
        *itertools.product(
            [(3, 8, 196, 768), (2, 5, 31, 130), (1, 2, 257, 1280)], [BF16, FP16, FP32]
        ),
        *(sanitized((2, 3, 42, 70), dtype) for dtype in (BF16, FP32)),
    ],
)
def test_pool_equals_the_definition(execution, shape, dtype):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(*shape, generator=generator).to(execution.device, dtype)
    tokens[0] *= 1e-3
    for rows in (None, torch.randn(*shape[2:], generator=generator).to(tokens)):
        exact = reference.shortcut_pool(tokens.double(), rows if rows is None else rows.double())
        plain = reference.shortcut_pool(tokens, rows)
        execution.assert_as_exact(shortcut_pool(tokens, rows), plain, exact)


@each(
    OP,
    "scale",
    reference=[1e-30, 1e30],
    gpu=[1e-30, 1e30],
    other=[1e-40, 1e-30, 1e-15, 1e15, 1e30, 1e37],
)
def test_pool_outlives_squares_beyond_the_range_of_float32(execution, scale):
    tokens = torch.randn(2, 3, 40, 5, generator=torch.Generator().manual_seed(2))
    tokens = tokens.to(execution.device) * scale
    exact = reference.shortcut_pool(tokens.double())
    step = 1e-6 if scale > 1e-38 else 1e-3  # steps of numbers below the normal ones
    torch.testing.assert_close(
        shortcut_pool(tokens).double() / scale, exact / scale, rtol=step, atol=step
    )


@each(OP)
def test_pool_of_tokens_that_grow_by_powers(execution):
    """Every tile rescales what came before; only the last tokens count in the end."""
    tokens = torch.ones(1, 1, 200, 3)
    tokens *= 2.0 ** torch.linspace(-120, 120, 200).round()[:, None]
    for t in execution.moved(tokens, tokens.flip(2)):
        exact = reference.shortcut_pool(t.double())
        torch.testing.assert_close(shortcut_pool(t).double(), exact, rtol=1e-6, atol=0)


@each(OP)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_pool_of_no_energy_nan_and_infinity_keeps_to_its_window(execution):
    count, width = execution.pick(gpu=(70, 8), other=(40, 5))
    tokens = torch.ones(4, 3, count, width, device=execution.device)
    tokens[0] = 0
    tokens[1, 1, 2, 3] = torch.nan
    tokens[2, 2, count - 1, 4] = torch.inf
    got = shortcut_pool(tokens)
    assert not got[0].any() and got[1].isnan().all() and got[2].isnan().all()
    torch.testing.assert_close(got[3], torch.ones_like(got[3]))


@pytest.mark.sanitize
@each(OP, on=("interpreter", "emulated"))
def test_pool_reads_tokens_as_they_lie(execution):
    whole = torch.randn(2, 3, 45, 8)
    moved = torch.cat([torch.zeros(1), whole.flatten()])[1:].view(whole.shape)
    views = (whole[:, :, 5:], whole.transpose(0, 1), whole[..., :6], moved)
    for t in (*views, whole[:, :, :40].mT.contiguous().mT):
        expected = shortcut_pool(t.contiguous())
        for _ in execution.runs():
            assert torch.equal(shortcut_pool(t), expected)
    assert shortcut_pool(whole[:0]).shape == (0, 8)


@each(OP, on=["emulated"])
def test_pool_of_rows_too_wide_for_a_warp_is_the_references(execution):
    tokens = torch.randn(1, 1, 2, 2052)
    assert torch.equal(shortcut_pool(tokens), reference.shortcut_pool(tokens))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)],
)
def test_pool_equals_the_loop(dtype, tolerance):
    tokens = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    tokens[1] *= 1e-3  # weights are per window: a faint one does not borrow from a strong one
    ours = shortcut_pool(tokens)
    assert ours.dtype == dtype
    expected = pooled_by_loop(tokens)
    scale = expected.abs().amax(dim=1, keepdim=True)
    assert ((ours - expected).abs() / scale).max() < tolerance


def test_pool_weights_are_a_convex_combination():
    tokens = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    tokens[..., 0] = 1.0
    torch.testing.assert_close(shortcut_pool(tokens)[:, 0], torch.ones(2, dtype=torch.float64))


def test_pool_does_not_depend_on_the_order_of_images_and_tokens():
    tokens = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    shuffled = tokens[:, torch.tensor([2, 0, 1])][:, :, torch.tensor([3, 1, 0, 2])]
    torch.testing.assert_close(shortcut_pool(shuffled), shortcut_pool(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_adds_rows_before_the_energies(dtype):
    tokens, rows = torch.randn(2, 3, 4, 5).to(dtype), torch.randn(4, 5).to(dtype)
    ours = shortcut_pool(tokens, rows)
    assert ours.dtype == dtype
    expected = pooled_by_loop(tokens.double() + rows.double())
    torch.testing.assert_close(ours, expected.to(dtype))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.zeros(5), ValueError, r"rows must be \(4, 5\) on cpu, got \(5,\)"),
        (torch.zeros(4, 5).int(), TypeError, r"rows must be a float tensor \(4, 5\) or None"),
        (torch.zeros(4, 5, requires_grad=True), ValueError, "rows requires a gradient"),
    ],
)
def test_pool_refuses_bad_rows(rows, error, message):
    with pytest.raises(error, match=message):
        shortcut_pool(torch.zeros(2, 3, 4, 5), rows)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 5, dtype=torch.int64), TypeError, "tokens must be a float tensor"),
        ([[1.0]], TypeError, "tokens must be a float tensor .* got list"),
        (torch.zeros(3, 4, 5), ValueError, r"tokens must be \(S, B, N, D\)"),
        (torch.zeros(2, 0, 4, 5), ValueError, "B, N >= 1"),
        (torch.zeros(1, 1, 1, 1, requires_grad=True), ValueError, "tokens requires a gradient"),
    ],
)
def test_pool_refuses_bad_arguments(tokens, error, message):
    with pytest.raises(error, match=message) as caught:
        shortcut_pool(tokens)
    assert "\n" not in str(caught.value)


# ---- golden vectors


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"), [("f64", torch.float64, 1e-6), ("f32", torch.float32, 1e-5)]
)
def test_pooled_tokens_are_the_released_prompts(kind, dtype, tolerance, golden, tiny_vit):
    """Phase II from the spectrum, without an image: the P prompts of the released code."""
    expected, vit = golden("pae_mpa"), tiny_vit(dtype)
    images = torch.from_numpy(golden("data")["images"]).to(dtype)
    origins = torch.from_numpy(expected["top_origins"])
    with torch.no_grad():
        stem, positions = vit.patch_embed.proj, vit.pos_embed[0, 1:]
        tokens = tokens_of(images, origins, 8, stem.weight, stem.bias)
        theirs = torch.from_numpy(expected[f"{kind}/prompt_shallow"])
        assert (shortcut_pool(tokens, positions) - theirs).norm() / theirs.norm() < tolerance
        tokens = tokens_of(images, origins[:1], 8, stem.weight, stem.bias, rows=positions)
    energy = torch.from_numpy(expected[f"{kind}/top0_token_energy"])
    torch.testing.assert_close(tokens[0].square().sum(-1), energy, rtol=3e-6, atol=0)


# ---- all three, as ops


@each(OP, on=("reference", "interpreter", "emulated"))
def test_ops_pass_opcheck(execution):
    quick = {"test_utils": ("test_schema", "test_faketensor")}
    tests = execution.pick(reference={}, other=quick)
    spectrum = torch.fft.fft2(images_of(2, 3, 12, 10, FP32))
    origins, (weight, bias) = torch.tensor([[0, 0], [4, 5]]), stem_of((4, 5), dtype=FP32)
    rows = torch.randn(6, 5)
    narrow = execution.pick(interpreter=FP16, other=BF16)
    tokens = [
        (spectrum, origins, 4, weight, bias, rows, FP32),
        (spectrum.mT.contiguous().mT, origins, 4, weight.to(narrow), None, None, narrow),
    ]
    if execution.kind == "reference":
        wide = spectrum.to(torch.complex128)
        tokens.append((wide, origins[:0], 4, weight, bias, None, FP64))
        torch.library.opcheck(OPS.shortcut_images_fwd, (spectrum, origins, 4))
        torch.library.opcheck(OPS.shortcut_images_fwd, (wide, grid(4, 3, 12, 10), 4))
    for args in tokens:
        torch.library.opcheck(OPS.shortcut_tokens_fwd, args, **tests)
    for rows in (None, torch.randn(4, 5)):
        for dtype in (FP32, narrow):
            pooled = torch.randn(2, 3, 4, 5).to(dtype), rows
            torch.library.opcheck(OPS.shortcut_pool_fwd, pooled, **tests)


def test_ops_are_one_graph_under_compile():
    weight, bias = stem_of((3, 5), dtype=torch.float64)
    rows = torch.randn(8, 5, dtype=torch.float64)

    def all_three(images, origins):
        spectrum = torch.fft.fft2(images)
        ours = shortcut_images(spectrum, origins, 4, (12, 10))
        tokens = shortcut_tokens(spectrum, origins, 4, (12, 10), weight, bias)
        return shortcut_pool(ours.flatten(2, 3)), shortcut_pool(tokens, rows)

    images, origins = images_of(2, 3, 12, 10), grid(4, 3, 12, 10)
    compiled = torch.compile(all_three, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, origins), all_three(images, origins))


def test_ops_ignore_autocast():
    images, origins = images_of(2, 3, 12, 12, torch.float32), grid(4, 4, 12, 12)
    weight, bias = stem_of((4, 4), dtype=torch.float32)
    expected = filtered(images, origins, 4), tokens_of(images, origins, 4, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = filtered(images, origins, 4), tokens_of(images, origins, 4, weight, bias)
        pooled = shortcut_pool(ours[0].flatten(2, 3))
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert torch.equal(pooled, shortcut_pool(expected[0].flatten(2, 3)))


def test_ops_fill_their_results(poisoned_memory):
    """What the kernels run on in every other test here."""
    images, (weight, bias) = images_of(2, 3, 12, 12), stem_of((4, 4))
    tokens = tokens_of(images, grid(4, 4, 12, 12), 4, weight, bias)
    assert tokens.isfinite().all() and shortcut_pool(tokens).isfinite().all()


def test_ops_say_that_they_have_no_gradient():
    spectrum = torch.fft.fft2(images_of(1, 3, 8, 8)).requires_grad_()
    origins, (weight, bias) = torch.tensor([[0, 0]]), stem_of((4, 4))
    tokens = torch.randn(1, 2, 3, 4, requires_grad=True)
    outputs = (
        OPS.shortcut_images_fwd(spectrum, origins, 4),
        OPS.shortcut_tokens_fwd(spectrum, origins, 4, weight, bias, None, torch.float64),
        OPS.shortcut_pool_fwd(tokens, None),
    )
    for output in outputs:
        with pytest.raises(RuntimeError, match="shortcut statistics have none"):
            output.sum().backward()
    with torch.no_grad():  # a statistic of something trainable is fine where no graph is wanted
        assert shortcut_pool(tokens).shape == (1, 4)


def test_references_are_differentiable():
    origins = torch.tensor([[0, 1], [3, 2]])
    spectrum = torch.fft.fft2(images_of(1, 1, 6, 5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: reference.shortcut_images(s, origins, 3), spectrum)
    weight, bias = (t.requires_grad_() for t in stem_of((3, 5), 1, 2))
    rows = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, *stem: reference.shortcut_tokens(s, origins, 3, *stem, torch.float64),
        (spectrum, weight, bias, rows),
    )
    tokens = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.shortcut_pool, tokens)
    assert torch.autograd.gradcheck(reference.shortcut_pool, (tokens, rows))


# ---- versions, and GPUs


@each(OP, on=KERNELS)
def test_the_kernels_run(execution, monkeypatch):
    """The public ops reach them; what is wider than fp32 goes to the reference."""
    for op in ("shortcut_tokens", "shortcut_pool"):
        assert backends.choose(op, execution.device, FP16).__name__.endswith(execution.version)
        monkeypatch.setattr(reference, op, None)
    problem = execution.moved(*stem_problem((8, 8), (4, 4)))
    assert len(check(execution, *problem, torch.zeros(0, 2, dtype=torch.int64), 2)) == 0
    assert shortcut_pool(torch.ones(1, 1, 1, 1, device=execution.device)) == 1
    monkeypatch.delenv("PAE_BACKEND")  # preferred also when nobody asks for it
    for op in ("shortcut_tokens", "shortcut_pool"):
        chosen = backends.choose(op, execution.device, FP16).__name__
        assert chosen.endswith(execution.version) or execution.kind == "gpu"
        assert backends.choose(op, execution.device, FP64) is reference


@each(OP, on=["emulated"])
def test_bad_parameters_are_refused(execution):
    cpu = torch.device("cpu")
    sizes = {"height": 8, "width": 8, "patch_height": 4, "patch_width": 4, "batch": 1, "lines": 2}
    good = {"lines_padded": 32, "channels": 1, "depth_padded": 16, "dim": 8, "window": 1}
    good |= {"channels_padded": 64}
    for change, message in (
        ({"patch_height": 3}, "patches of 3 x 4 do not tile"),
        ({"lines_padded": 2}, "lines_padded is 2, expected whole tiles of 32"),
        ({"depth_padded": 8}, "depth_padded is 8"),
        ({"dim": 65}, "channels_padded is 64"),
        ({"window": 9}, "window is 9"),
        ({"dtype": 9}, "dtype is 9"),
    ):
        with pytest.raises(RuntimeError, match=f"pae_shortcut_tokens: {message}"):
            native.call("pae_shortcut_tokens", cuda._Tokens(**(sizes | good | change)), cpu)
    for change, message in (({"dim": 2049}, "dim is 2049"), ({"dim": 1, "parts": 2}, "parts is 2")):
        params = cuda._Pool(batch=1, tokens_per_image=3, **change)
        with pytest.raises(RuntimeError, match=f"pae_shortcut_pool: {message}"):
            native.call("pae_shortcut_pool", params, cpu)


@each(OP, on=["gpu"])
def test_a_captured_graph_follows_its_inputs(execution):
    """Spectrum and window origins change between replays."""
    problem = stem_problem((64, 64), (16, 16), batch=4, dim=64, dtype=BF16)
    images, *stem, rows = execution.moved(*problem)
    spectrum = torch.fft.fft2(images)
    origins = torch.tensor([(0, 0), (24, 20)], device=GPU)

    def work():
        tokens = shortcut_tokens(spectrum, origins, 8, (64, 64), *stem, rows=rows)
        return tokens, shortcut_pool(tokens)

    graph, captured = execution.captured(work)
    for seed, places in ((1, [(5, 7), (56, 1)]), (2, [(30, 30), (0, 56)])):
        spectrum.copy_(torch.fft.fft2(images_of(4, 3, 64, 64, FP32, seed).to(GPU)))
        origins.copy_(torch.tensor(places))
        graph.replay()
        for a, b in zip(captured, work(), strict=True):
            assert torch.equal(a, b)


@each(OP, on=["gpu"])
def test_work_follows_the_callers_stream(execution):
    """Inputs that are still being made on another stream than the default one."""
    images, *stem, rows = execution.moved(*stem_problem((64, 64), (16, 16), batch=4, dim=64))
    origins = torch.tensor([(24, 20)], device=GPU)
    spectrum = torch.fft.fft2(images)
    run = lambda spectrum: shortcut_tokens(spectrum, origins, 8, (64, 64), *stem, rows=rows)
    expected = run(spectrum)
    with execution.late(spectrum) as (late,):
        tokens = run(late)
        pooled = shortcut_pool(tokens)
    assert torch.equal(tokens, expected) and torch.equal(pooled, shortcut_pool(expected))


@each(OP, on=["gpu"])
def test_memory_is_that_of_the_result_and_of_strips(execution):
    """No image of full size, filtered or complex."""
    problem = stem_problem((224, 224), (16, 16), batch=32, dim=768, dtype=BF16)
    images, *stem, rows = execution.moved(*problem)
    spectrum, origins = torch.fft.fft2(images), torch.tensor([(104, 104)] * 4, device=GPU)
    run = lambda: shortcut_tokens(spectrum, origins, 16, (224, 224), *stem, rows=rows)
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    torch.cuda.synchronize()
    beside = torch.cuda.max_memory_allocated() - before - out.nbytes
    strips = 4 * 32 * 3 * 224 * 16 * 2 * 2
    taps = 4 * 16 * 2 * 48 * 768 * 2
    assert beside < 1.2 * (strips + taps) + 8 * 2**20, f"{beside / 2**20:.0f} MB"
    assert beside < images.nbytes * 4
