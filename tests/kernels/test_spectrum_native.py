"""The kernels of csrc/spectrum.cu on the CPU, under the emulation of CUDA's execution model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pae_kernels import backends, native
from pae_kernels.spectrum import cuda, reference, shortcut_pool, shortcut_tokens
from tests.kernels import host_library
from tests.kernels.test_spectrum import embedded, images_of, stem_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch, poisoned_memory):
    """Every op runs its CUDA version; entries that a kernel leaves out are NaN."""
    monkeypatch.setenv("PAE_BACKEND", "cuda")
    with host_library.emulated("spectrum.cu") as found:
        yield found


def near(got, plain, exact):
    """At most twice as far from fp64 as the reference in the same precision, and a step of fp32 for
    every entry, which are of order 1.
    """
    assert got.dtype == plain.dtype and got.shape == exact.shape and got.isfinite().all()
    far = lambda t: (t.double() - exact).norm().item()
    assert far(got) <= 2 * far(plain) + 1e-6 * exact.numel() ** 0.5, (far(got), far(plain))


def check(size, patch, window, origins, *, batch=2, channels=3, dim=8, dtype=torch.float32, **has):
    """Tokens of the kernels beside reference and definition; returns them."""
    images = images_of(batch, channels, *size, torch.float32)
    weight, bias = stem_of(patch, channels, dim, dtype)
    bias = bias if has.get("bias", True) else None
    count = size[0] // patch[0] * (size[1] // patch[1])
    rows = torch.randn(count, dim).to(dtype) if has.get("rows", True) else None
    got = shortcut_tokens(torch.fft.fft2(images), origins, window, size, weight, bias, rows=rows)
    wide = [t if t is None else t.double() for t in (weight, bias, rows)]
    for tokens, origin in zip(got, origins, strict=True):
        kept = reference.band_pass(images, tuple(origin), window)
        exact = reference.band_pass(images.double(), tuple(origin), window)
        plain = embedded(kept.to(dtype), weight, bias) + (0 if rows is None else rows)
        near(tokens, plain, embedded(exact, *wide[:2]) + (0 if rows is None else wide[2]))
    return got


# ---- tokens

# (size, patch, window): an even and an odd number of patches a row, more than 8 and 16 of them;
# one bin, an odd number, all of them; a depth of more than one stage
SHAPES = [
    ((24, 24), (6, 6), 8),
    ((15, 21), (5, 3), 7),
    ((12, 40), (6, 2), 1),
    ((9, 33), (3, 3), 3),
    ((10, 18), (10, 9), 10),
    ((20, 18), (20, 18), 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    size, patch, window = shape
    last = (size[0] - window, size[1] - window)
    check(size, patch, window, torch.tensor([(0, 0), last]), dtype=dtype, batch=1)


def test_windows_of_more_than_16_bins():
    check((18, 20), (6, 5), 17, torch.tensor([(1, 3)]), batch=1, dtype=torch.bfloat16)


@pytest.mark.sanitize
@pytest.mark.parametrize("dim", [1, 66, 80])
def test_widths(dim):
    check((8, 12), (4, 4), 4, torch.tensor([(3, 5)]), dim=dim, dtype=torch.bfloat16)


@pytest.mark.sanitize
def test_several_tiles_of_lines():
    check((24, 8), (2, 4), 2, torch.tensor([(3, 5), (11, 0)]), batch=3, dtype=torch.bfloat16)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    patch=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    patches=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    window=st.integers(1, 6),
    at=st.tuples(st.integers(0, 19), st.integers(0, 19)),
    batch=st.integers(1, 3),
    channels=st.integers(1, 3),
    dim=st.integers(1, 9),
    bias=st.booleans(),
    rows=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(patch, patches, window, at, **others):
    size = tuple(p * n for p, n in zip(patch, patches, strict=True))
    window = min(window, *size)
    origin = [min(a, side - window) for a, side in zip(at, size, strict=True)]
    check(size, patch, window, torch.tensor([origin]), **others)


@pytest.mark.parametrize("order", host_library.ORDERS)
def test_the_order_of_threads_does_not_matter(_emulated, order):
    """A missing barrier between copies, products and phases would change some bit."""
    args = ((12, 16), (4, 4), 5, torch.tensor([(3, 5)]))
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        expected = check(*args, dtype=dtype)
        _emulated.handle.pae_emulation_set_order(order)
        torch.manual_seed(0)
        assert torch.equal(check(*args, dtype=dtype), expected)


def test_fp32_products_are_not_tf32():
    """Inputs that TF32 cannot hold: its own error would be 3e-4."""
    images = images_of(2, 3, 16, 16, torch.float32)
    weight, _ = stem_of((8, 8), dim=16, dtype=torch.float32)
    spectrum, origins = torch.fft.fft2(images), torch.tensor([(4, 3)])
    got = shortcut_tokens(spectrum, origins, 8, (16, 16), weight)[0].double()
    exact = embedded(reference.band_pass(images.double(), (4, 3), 8), weight.double())
    assert (got - exact).norm() < 4e-7 * exact.norm()


def test_a_real_stem():
    check((224, 224), (16, 16), 2, torch.tensor([(111, 200)]), batch=1, dtype=torch.bfloat16)


def test_strides_and_nothing():
    spectrum = torch.fft.fft2(images_of(3, 2, 12, 12, torch.float32)).permute(1, 0, 3, 2)
    weight, bias = (t.float() for t in stem_of((4, 3)))
    origins = torch.tensor([(1, 2), (4, 4)])
    expected = shortcut_tokens(spectrum.contiguous(), origins, 5, (12, 12), weight, bias)
    strided = weight.mT.contiguous().mT, torch.stack([bias, bias], 1)[:, 0]
    apart = origins.repeat_interleave(2, 0)[::2]
    assert torch.equal(shortcut_tokens(spectrum, apart, 5, (12, 12), *strided), expected)
    conjugate = spectrum.conj().resolve_conj().conj()
    assert torch.equal(shortcut_tokens(conjugate, origins, 5, (12, 12), weight, bias), expected)
    none = shortcut_tokens(spectrum, origins[:0], 5, (12, 12), weight, bias)
    assert none.shape == (0, 2, 12, 5)
    assert shortcut_tokens(spectrum[:0], origins, 5, (12, 12), weight).shape == (2, 0, 12, 5)


# ---- pooling


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 50, 40), (2, 2, 31, 129), (1, 1, 9, 1300)])
def test_pooling(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(*shape, generator=generator).to(dtype)
    tokens[0] *= 1e-3
    for rows in (None, torch.randn(*shape[2:], generator=generator).to(dtype)):
        exact = reference.shortcut_pool(tokens.double(), rows if rows is None else rows.double())
        near(shortcut_pool(tokens, rows), reference.shortcut_pool(tokens, rows), exact)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-15, 1e15, 1e30, 1e37])
def test_pooling_at_any_scale(scale):
    tokens = torch.randn(2, 3, 40, 5, generator=torch.Generator().manual_seed(2))
    exact = reference.shortcut_pool((tokens * scale).double())
    step = 1e-6 if scale > 1e-38 else 1e-3  # steps of numbers below the normal ones
    torch.testing.assert_close(
        shortcut_pool(tokens * scale).double() / scale, exact / scale, rtol=step, atol=step
    )


def test_pooling_of_tokens_that_grow_by_powers():
    """Every token rescales what came before; only the last ones count in the end."""
    tokens = torch.ones(1, 1, 200, 3)
    tokens *= 2.0 ** torch.linspace(-120, 120, 200).round()[:, None]
    for t in (tokens, tokens.flip(2)):
        exact = reference.shortcut_pool(t.double())
        torch.testing.assert_close(shortcut_pool(t).double(), exact, rtol=1e-6, atol=0)


def test_pooling_of_no_energy_nan_and_infinity():
    tokens = torch.ones(4, 3, 40, 5)
    tokens[0] = 0
    tokens[1, 1, 2, 3] = torch.nan
    tokens[2, 2, 39, 4] = torch.inf
    got = shortcut_pool(tokens)
    assert not got[0].any() and got[1].isnan().all() and got[2].isnan().all()
    assert torch.equal(got[3], torch.ones(5))


@pytest.mark.sanitize
def test_pooling_reads_tokens_as_they_lie(_emulated):
    whole = torch.randn(2, 3, 45, 8)
    moved = torch.cat([torch.zeros(1), whole.flatten()])[1:].view(whole.shape)
    views = (whole[:, :, 5:], whole.transpose(0, 1), whole[..., :6], moved)
    for t in (*views, whole[:, :, :40].mT.contiguous().mT):
        expected = shortcut_pool(t.contiguous())
        for order in host_library.ORDERS:
            _emulated.handle.pae_emulation_set_order(order)
            assert torch.equal(shortcut_pool(t), expected)
    assert shortcut_pool(whole[:0]).shape == (0, 8)


def test_rows_too_wide_for_a_warp_are_pooled_all_the_same():
    tokens = torch.randn(1, 1, 2, 2052)
    assert torch.equal(shortcut_pool(tokens), reference.shortcut_pool(tokens))


# ---- the interface


def test_bad_parameters_are_refused():
    params = cuda._Tokens(height=8, width=8, patch_height=3, patch_width=4)
    with pytest.raises(RuntimeError, match="pae_shortcut_tokens: patches of 3 x 4 do not tile"):
        native.call("pae_shortcut_tokens", params, torch.device("cpu"))
    sizes = {"height": 8, "width": 8, "patch_height": 4, "patch_width": 4, "batch": 1, "lines": 2}
    for change, message in (
        ({"lines_padded": 2}, "lines_padded is 2, expected whole tiles of 32"),
        ({"lines_padded": 32, "channels": 1, "depth_padded": 8}, "depth_padded is 8"),
        (
            {"lines_padded": 32, "channels": 1, "depth_padded": 16, "dim": 65, "window": 1}
            | {"channels_padded": 64},
            "channels_padded is 64",
        ),
        (
            {"lines_padded": 32, "channels": 1, "depth_padded": 16, "dim": 8, "window": 9}
            | {"channels_padded": 64},
            "window is 9",
        ),
        (
            {"lines_padded": 32, "channels": 1, "depth_padded": 16, "dim": 8, "window": 1}
            | {"channels_padded": 64, "dtype": 9},
            "dtype is 9",
        ),
    ):
        with pytest.raises(RuntimeError, match=f"pae_shortcut_tokens: {message}"):
            native.call("pae_shortcut_tokens", cuda._Tokens(**sizes, **change), torch.device("cpu"))
    for change, message in (({"dim": 2049}, "dim is 2049"), ({"dim": 1, "parts": 2}, "parts is 2")):
        params = cuda._Pool(batch=1, tokens_per_image=3, **change)
        with pytest.raises(RuntimeError, match=f"pae_shortcut_pool: {message}"):
            native.call("pae_shortcut_pool", params, torch.device("cpu"))


def test_the_kernels_run(monkeypatch):
    """The public ops reach them; what is wider than fp32 goes to the reference."""
    monkeypatch.setattr(reference, "shortcut_tokens", None)
    monkeypatch.setattr(reference, "shortcut_pool", None)
    check((8, 8), (4, 4), 2, torch.tensor([(2, 2)])[:0])
    assert shortcut_pool(torch.ones(1, 1, 1, 1)) == 1
    monkeypatch.delenv("PAE_BACKEND")  # preferred also when nobody asks for it
    for op in ("shortcut_tokens", "shortcut_pool"):
        assert backends.choose(op, "cpu", torch.float16) is cuda
        assert backends.choose(op, "cpu", torch.float64) is reference
