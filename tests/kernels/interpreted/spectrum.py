"""The kernels of frequency-shortcut statistics against their definitions in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from pae_kernels import backends
from pae_kernels.spectrum import reference, shortcut_pool, shortcut_tokens
from pae_kernels.spectrum import triton as kernels
from tests.kernels.interpreted.conftest import as_exact_as
from tests.kernels.test_spectrum import embedded, grid, images_of, stem_of

DTYPES = [torch.float32, torch.float16]  # the interpreter multiplies bf16 wrongly
QUICK = ("test_schema", "test_faketensor")


@pytest.fixture(autouse=True, scope="module")
def narrow_tiles():
    """So that tiny widths make several tiles, and do not wait for padding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels._TOKENS, "BLOCK_D", 16)
        patch.setitem(kernels._TAPS, "BLOCK_D", 16)
        patch.setitem(kernels._STRIPS, "BLOCK_H", 16)
        patch.setitem(kernels._PARTS, "BLOCK_D", 16)
        yield


def check(size, patch, window, origins, *, batch=2, channels=3, dim=8, dtype=torch.float32, **has):
    """Tokens of the kernels beside reference and definition; returns them."""
    images = images_of(batch, channels, *size, torch.float32)
    weight, bias = stem_of(patch, channels, dim, dtype)
    bias = bias if has.get("bias", True) else None
    count = size[0] // patch[0] * (size[1] // patch[1])
    rows = torch.randn(count, dim).to(dtype) if has.get("rows", True) else None
    spectrum = torch.fft.fft2(images)
    got = shortcut_tokens(spectrum, origins, window, size, weight, bias, rows=rows)
    wide = [t if t is None else t.double() for t in (weight, bias, rows)]
    for tokens, origin in zip(got, origins, strict=True):
        kept = reference.band_pass(images, tuple(origin), window)
        exact = reference.band_pass(images.double(), tuple(origin), window)
        plain = embedded(kept.to(dtype), weight, bias) + (0 if rows is None else rows)
        exact = embedded(exact, *wide[:2]) + (0 if rows is None else wide[2])
        as_exact_as(tokens, plain, exact)
    return got


# ---- tokens

# (size, patch, window): an even and an odd number of patches a row, more than 8 and 16 of them;
# windows of one bin, of an odd number, of all; sizes that fill no tile
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    size, patch, window = shape
    last = (size[0] - window, size[1] - window)
    check(size, patch, window, torch.tensor([(0, 0), last]))


def test_results_in_16_bits_and_windows_of_more_than_16_bins():
    check((20, 18), (10, 9), 18, torch.tensor([(1, 0)]), batch=1, dtype=torch.float16)


@pytest.mark.parametrize("dim", [1, 35])
def test_widths(dim):
    check((16, 16), (8, 4), 4, torch.tensor([(6, 5)]), batch=1, dim=dim)


def test_a_large_patch():
    check((24, 24), (24, 12), 3, torch.tensor([(10, 11)]), batch=1)  # K = 72


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    patch=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    patches=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    window=st.integers(1, 20),
    at=st.tuples(st.integers(0, 19), st.integers(0, 19)),
    batch=st.integers(1, 3),
    channels=st.integers(1, 3),
    bias=st.booleans(),
    rows=st.booleans(),
)
def test_any_shape(patch, patches, window, at, **others):
    size = tuple(p * n for p, n in zip(patch, patches, strict=True))
    window = min(window, *size)
    origin = [min(a, side - window) for a, side in zip(at, size, strict=True)]
    check(size, patch, window, torch.tensor([origin]), **others)


def test_windows_that_tile_the_spectrum():
    images, (weight, bias) = images_of(2, 3, 16, 24, torch.float32), stem_of((4, 4))
    parts = shortcut_tokens(
        torch.fft.fft2(images), grid(8, 8, 16, 24), 8, (16, 24), weight.float(), bias.float()
    )
    whole = embedded(images.double(), weight, bias) + 5 * bias
    torch.testing.assert_close(parts.double().sum(0), whole, rtol=0, atol=1e-5)


@triton.jit
def waves_kernel(out, size, BLOCK: tl.constexpr):
    turns = tl.arange(0, BLOCK)
    cos, sin = kernels._wave(turns, size)
    tl.store(out + turns, cos, mask=turns < size)
    tl.store(out + size + turns, sin, mask=turns < size)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 224, 1000])
def test_waves_are_exact_at_every_frequency(size):
    out = torch.full((2, size), torch.nan)
    waves_kernel[(1,)](out, size, BLOCK=triton.next_power_of_2(size))
    angle = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size)
    assert (out - torch.stack([angle.cos(), angle.sin()])).abs().max() < 1.2e-7


def test_tiles_that_ship(monkeypatch):
    monkeypatch.setitem(kernels._TOKENS, "BLOCK_D", 64)
    check((24, 20), (6, 5), 4, torch.tensor([(3, 5)]), dim=70)


def test_strides_and_nothing():
    spectrum = torch.fft.fft2(images_of(3, 2, 12, 12, torch.float32)).permute(1, 0, 3, 2)
    weight, bias = (t.float() for t in stem_of((4, 3)))
    origins = torch.tensor([(1, 2), (4, 4)])
    expected = shortcut_tokens(spectrum.contiguous(), origins, 5, (12, 12), weight, bias)
    strided = weight.mT.contiguous().mT, torch.stack([bias, bias], 1)[:, 0]
    apart = origins.repeat_interleave(2, 0)[::2]
    assert torch.equal(shortcut_tokens(spectrum, apart, 5, (12, 12), *strided), expected)
    conjugate = spectrum.conj().resolve_conj().conj()
    assert conjugate.is_conj()
    assert torch.equal(shortcut_tokens(conjugate, origins, 5, (12, 12), weight, bias), expected)
    none = shortcut_tokens(spectrum, origins[:0], 5, (12, 12), weight, bias)
    assert none.shape == (0, 2, 12, 5)
    assert shortcut_tokens(spectrum[:0], origins, 5, (12, 12), weight).shape == (2, 0, 12, 5)


# ---- pooling


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 50, 40), (3, 2, 31, 129), (1, 5, 40, 33)])
def test_pooling(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(*shape, generator=generator).to(dtype)
    tokens[0] *= 1e-3
    for rows in (None, torch.randn(*shape[2:], generator=generator).to(dtype)):
        exact = reference.shortcut_pool(tokens.double(), rows if rows is None else rows.double())
        as_exact_as(shortcut_pool(tokens, rows), reference.shortcut_pool(tokens, rows), exact)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-15, 1e15, 1e30, 1e37])
def test_pooling_at_any_scale(scale):
    tokens = torch.randn(2, 3, 40, 5, generator=torch.Generator().manual_seed(2))
    exact = reference.shortcut_pool((tokens * scale).double())
    step = 1e-6 if scale > 1e-38 else 1e-3  # steps of numbers below the normal ones
    torch.testing.assert_close(
        shortcut_pool(tokens * scale).double() / scale, exact / scale, rtol=step, atol=step
    )


def test_pooling_of_tokens_that_grow_by_powers():
    """Every tile rescales what came before; only the last tokens count in the end."""
    tokens = torch.ones(1, 1, 200, 3)
    tokens *= 2.0 ** torch.linspace(-120, 120, 200).round()[:, None]
    for t in (tokens, tokens.flip(2)):
        exact = reference.shortcut_pool(t.double())
        torch.testing.assert_close(shortcut_pool(t).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_pooling_of_no_energy_nan_and_infinity():
    tokens = torch.ones(4, 3, 40, 5)
    tokens[0] = 0
    tokens[1, 1, 2, 3] = torch.nan
    tokens[2, 2, 39, 4] = torch.inf
    got = shortcut_pool(tokens)
    assert not got[0].any() and got[1].isnan().all() and got[2].isnan().all()
    assert torch.equal(got[3], torch.ones(5))


def test_pooling_reads_tokens_as_they_lie():
    whole = torch.randn(2, 3, 45, 8)
    for t in (whole[:, :, 5:], whole.transpose(0, 1), whole[:, :, :40].mT.contiguous().mT):
        assert torch.equal(shortcut_pool(t), shortcut_pool(t.contiguous()))
    assert shortcut_pool(whole[:0]).shape == (0, 8)


def test_a_window_has_the_same_bits_in_any_company():
    tokens = torch.randn(3, 2, 100, 16)
    together = shortcut_pool(tokens)
    for i in range(3):
        assert torch.equal(shortcut_pool(tokens[i : i + 1])[0], together[i])


# ---- as ops


def test_opcheck():
    spectrum = torch.fft.fft2(images_of(2, 3, 12, 10, torch.float32))
    origins, (weight, bias) = torch.tensor([[0, 0], [4, 5]]), stem_of((4, 5), dtype=torch.float32)
    for args in (
        (spectrum, origins, 4, weight, bias, torch.randn(6, 5), torch.float32),
        (spectrum, origins, 4, weight.half(), None, None, torch.float16),
    ):
        torch.library.opcheck(torch.ops.pae.shortcut_tokens_fwd, args, test_utils=QUICK)
    pooled = (torch.randn(2, 3, 4, 5).half(), torch.randn(4, 5))
    torch.library.opcheck(torch.ops.pae.shortcut_pool_fwd, pooled, test_utils=QUICK)


def test_the_kernels_run(monkeypatch):
    """The public ops reach them; what is wider than fp32 goes to the reference."""
    monkeypatch.setattr(reference, "shortcut_tokens", None)
    monkeypatch.setattr(reference, "shortcut_pool", None)
    check((8, 8), (4, 4), 4, torch.tensor([(2, 2)])[:0])
    assert shortcut_pool(torch.ones(1, 1, 1, 1)) == 1
    monkeypatch.delenv("PAE_BACKEND")  # preferred also when nobody asks for it
    for op in ("shortcut_tokens", "shortcut_pool"):
        assert backends.choose(op, "cpu", torch.float16) is kernels
        assert backends.choose(op, "cpu", torch.float64) is reference
