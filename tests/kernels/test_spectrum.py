"""Frequency-shortcut statistics against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pae_kernels.spectrum import reference, shortcut_images, shortcut_pool, shortcut_tokens

OPS = torch.ops.pae


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


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=40, deadline=None)
@given(
    patch=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    patches=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    window=st.integers(1, 25),
    row=st.integers(0, 24),
    col=st.integers(0, 24),
    channels=st.integers(1, 3),
)
def test_tokens_equal_the_definition_at_every_size(patch, patches, window, row, col, channels):
    height, width = (p * n for p, n in zip(patch, patches))
    window = min(window, height, width)
    row, col = min(row, height - window), min(col, width - window)
    images = images_of(2, channels, height, width)
    weight, bias = stem_of(patch, channels)
    ours = tokens_of(images, torch.tensor([[row, col]]), window, weight, bias)
    expected = embedded(reference.band_pass(images, (row, col), window), weight, bias)
    torch.testing.assert_close(ours[0], expected, rtol=0, atol=1e-12)


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


@pytest.mark.parametrize("patch", [16, 14])
def test_tokens_in_float32_are_as_good_as_filter_and_convolution(patch):
    images = images_of(2, 3, 112, 112, torch.float32)
    origins = torch.tensor([(0, 0), (48, 48), (96, 13), (50, 0)])
    weight, bias = stem_of((patch, patch), dim=48, dtype=torch.float32)
    truth = tokens_of(images.double(), origins, 16, weight.double(), bias.double())
    ours = tokens_of(images, origins, 16, weight, bias)
    assert ours.dtype == torch.float32
    for got, exact, origin in zip(ours, truth, origins):
        plain = embedded(reference.band_pass(images, tuple(origin), 16), weight, bias)
        allowed = 2 * (plain - exact).norm() + 1e-7 * exact.norm()
        assert (got - exact).norm() <= allowed and (got - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_in_16_bits_are_as_good_as_the_reference(dtype):
    """Filter in fp32, round the images, convolve in 16 bits, add the positions."""
    images = images_of(2, 3, 32, 32, torch.float32)
    weight, bias = stem_of((8, 8), dim=48, dtype=dtype)
    rows = torch.randn(16, 48).to(dtype)
    origins = grid(8, 12, 32, 32)
    ours = tokens_of(images, origins, 8, weight, bias, rows=rows)
    assert ours.dtype == dtype
    for got, origin in zip(ours, origins):
        kept = reference.band_pass(images, tuple(origin), 8)
        exact = embedded(
            reference.band_pass(images.double(), tuple(origin), 8), weight.double(), bias.double()
        )
        exact = exact + rows.double()
        plain = embedded(kept.to(dtype), weight, bias) + rows
        assert (got - exact).norm() <= 2 * (plain - exact).norm()
    wide = tokens_of(images, origins, 8, weight, bias, rows=rows, dtype=torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide.to(dtype), ours)


def test_tokens_of_windows_that_tile_the_spectrum_sum_to_those_of_the_image():
    images, (weight, bias) = images_of(2, 3, 24, 40), stem_of((4, 5))
    parts = tokens_of(images, grid(8, 8, 24, 40), 8, weight, bias)
    assert len(parts) == 15
    whole = embedded(images, weight, bias)
    torch.testing.assert_close(parts.sum(0), whole + 14 * bias, rtol=0, atol=1e-12)


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


def test_tokens_accept_any_strides_no_windows_and_no_images():
    spectrum = torch.fft.fft2(images_of(3, 2, 12, 12)).permute(1, 0, 3, 2)
    weight, bias = stem_of((4, 3))
    strided = weight.mT.contiguous().mT
    assert not strided.is_contiguous()
    origins = torch.tensor([(1, 2), (4, 4)])
    expected = shortcut_tokens(spectrum.contiguous(), origins, 5, (12, 12), weight, bias)
    for s, o in ((spectrum, origins), (spectrum, origins.T.contiguous().T)):
        ours = shortcut_tokens(s, o, 5, (12, 12), strided, bias)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)
        assert ours.is_contiguous()
    none = shortcut_tokens(spectrum, origins[:0], 5, (12, 12), weight, bias)
    assert none.shape == (0, 2, 12, 5)
    assert shortcut_tokens(spectrum[:0], origins, 5, (12, 12), weight).shape == (2, 0, 12, 5)


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


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_pool_outlives_squares_beyond_the_range_of_float32(scale):
    tokens = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        shortcut_pool(tokens * scale) / scale, shortcut_pool(tokens), rtol=1e-5, atol=1e-6
    )


def test_pool_weights_are_a_convex_combination():
    tokens = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    tokens[..., 0] = 1.0
    torch.testing.assert_close(shortcut_pool(tokens)[:, 0], torch.ones(2, dtype=torch.float64))


def test_pool_does_not_depend_on_the_order_of_images_and_tokens():
    tokens = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    shuffled = tokens[:, torch.tensor([2, 0, 1])][:, :, torch.tensor([3, 1, 0, 2])]
    torch.testing.assert_close(shortcut_pool(shuffled), shortcut_pool(tokens))


def test_pool_of_no_energy_is_the_zero_row_beside_a_bright_window():
    tokens = torch.zeros(2, 3, 4, 5)
    tokens[1] = 1.0
    ours = shortcut_pool(tokens)
    assert torch.equal(ours[0], torch.zeros(5))
    torch.testing.assert_close(ours[1], torch.ones(5))


def test_pool_passes_nan_on_and_keeps_it_in_its_window():
    tokens = torch.ones(2, 3, 4, 5)
    tokens[0, 1, 2, 3] = float("nan")
    ours = shortcut_pool(tokens)
    assert ours[0].isnan().all() and not ours[1].isnan().any()


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


def test_ops_pass_opcheck():
    spectrum = torch.fft.fft2(images_of(2, 3, 12, 10, torch.float32))
    origins, wide = torch.tensor([[0, 0], [4, 5]]), spectrum.to(torch.complex128)
    torch.library.opcheck(OPS.shortcut_images_fwd, (spectrum, origins, 4))
    torch.library.opcheck(OPS.shortcut_images_fwd, (wide, grid(4, 3, 12, 10), 4))
    weight, bias = stem_of((4, 5), dtype=torch.float32)
    rows = torch.randn(6, 5)
    for args in (
        (spectrum, origins, 4, weight, bias, rows, torch.float32),
        (spectrum.mT.contiguous().mT, origins, 4, weight.bfloat16(), None, None, torch.bfloat16),
        (wide, origins[:0], 4, weight, bias, None, torch.float64),
    ):
        torch.library.opcheck(OPS.shortcut_tokens_fwd, args)
    for rows in (None, torch.randn(4, 5)):
        torch.library.opcheck(OPS.shortcut_pool_fwd, (torch.randn(2, 3, 4, 5), rows))
        torch.library.opcheck(OPS.shortcut_pool_fwd, (torch.randn(2, 3, 4, 5).bfloat16(), rows))


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
