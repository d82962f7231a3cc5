"""shortcut_images against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pae_kernels.spectrum import reference, shortcut_images
from tests.kernels.spectrum.cases import filtered, grid, images_of
from tests.properties import examples


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
