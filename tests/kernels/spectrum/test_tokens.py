"""shortcut_tokens in every execution, against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pae_kernels.spectrum import reference, shortcut_pool, shortcut_tokens
from tests.errors import error
from tests.kernels.executions import BF16, FP16, FP32, FP64, INTERPRETING, each, sanitized
from tests.kernels.spectrum.cases import (
    OP,
    check,
    corners,
    embedded,
    grid,
    images_of,
    stem_of,
    stem_problem,
    tokens_of,
)
from tests.properties import examples

if INTERPRETING:
    from pae_kernels.spectrum import triton as kernels

if INTERPRETING:
    import triton

    from tests.kernels.waves import waves_kernel


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
        *((*shape, 8, FP32, 2 - i % 2) for i, shape in enumerate(SHAPES)),
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
    check(execution, *stem_problem((12, 20), (6, 5), batch=1, dim=70), [(3, 5)], 4)


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
    batch = execution.pick(interpreter=1, other=2)
    images, (weight, bias) = images_of(batch, 3, 16, 24, dtype), stem_of((4, 4), dtype=dtype)
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
