"""What only a GPU can show of the frequency-shortcut statistics: the Triton and CUDA kernels
against fp64, at the sizes of real stems, in graphs and on streams.

Rule: at most twice the error of filter and convolution in the same precision.
"""

from __future__ import annotations

import os

import pytest
import torch

from pae_kernels import backends
from pae_kernels.spectrum import reference, shortcut_pool, shortcut_tokens
from tests.kernels.test_spectrum import embedded, images_of, stem_of

# cuBLAS in deterministic mode, which the poison of uninitialised memory needs
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: kernels run compiled, not interpreted"
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]
GPU = torch.device("cuda")


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def version(request, monkeypatch):
    """Every op runs this version, on poisoned memory where a test asks for it."""
    predicate = {"triton": backends.with_triton, "cuda": backends.with_cuda}[request.param]
    if reason := predicate("cuda", torch.float32):
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setenv("PAE_BACKEND", request.param)
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield request.param
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value
    torch.cuda.synchronize()


def problem(size, patch, *, batch=4, dim=768, dtype=FP32, seed=0):
    """Images, weight, bias and rows of a stem, on the GPU."""
    images = images_of(batch, 3, *size, FP32, seed).to(GPU)
    weight, bias = (t.to(GPU, dtype) for t in stem_of(patch, 3, dim))
    generator = torch.Generator().manual_seed(seed)
    count = size[0] // patch[0] * (size[1] // patch[1])
    rows = torch.randn(count, dim, generator=generator).to(GPU, dtype)
    return images, weight / 16, bias, rows


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def assert_twice_at_most(images, weight, bias, rows, origins, window, **options):
    size = tuple(images.shape[-2:])
    got = shortcut_tokens(
        torch.fft.fft2(images), origins.to(GPU), window, size, weight, bias, rows=rows, **options
    )
    assert got.isfinite().all()
    for tokens, origin in zip(got, origins, strict=True):
        kept = reference.band_pass(images, tuple(origin), window)
        exact = reference.band_pass(images.double(), tuple(origin), window)
        plain = embedded(kept.to(weight.dtype), weight, bias) + rows
        exact = embedded(exact, weight.double(), bias.double()) + rows.double()
        limit = max(2 * error(plain, exact), 1e-6 if got.dtype == FP32 else 0.0)
        assert error(tokens, exact) <= limit, (tuple(origin), error(plain, exact))


def test_the_version_runs(version):
    for op in ("shortcut_tokens", "shortcut_pool"):
        assert backends.choose(op, GPU, BF16).__name__.endswith(f".{version}")


# size, patch, window, channels
STEMS = [
    ((224, 224), (16, 16), 16, 768),
    ((224, 224), (14, 14), 16, 384),
    ((224, 224), (32, 32), 16, 768),
    ((384, 384), (16, 16), 24, 192),
    ((240, 176), (16, 8), 33, 100),
    ((56, 56), (8, 8), 7, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stem", STEMS, ids=str)
def test_tokens_within_twice_the_reference_error(stem, dtype):
    size, patch, window, dim = stem
    height, width = size
    last = (height - window, width - window)
    middle = (height // 2 - window // 2, width // 2 - window // 2)
    origins = torch.tensor([(0, 0), middle, last, (height // 2, 3)])
    origins = origins.minimum(torch.tensor(last))
    assert_twice_at_most(*problem(size, patch, dim=dim, dtype=dtype), origins, window)


def test_tokens_of_a_natural_spectrum():
    """Amplitudes that fall as 1 / f: the faint windows are as exact as the bright ones."""
    images, *stem = problem((224, 224), (16, 16))
    f = torch.fft.fftfreq(224, 1 / 224, device=GPU)
    fall = 1 / (1 + (f[:, None] ** 2 + f**2).sqrt())
    images = torch.fft.ifft2(torch.fft.fft2(images) * fall).real
    origins = torch.tensor([(104, 104), (0, 0), (40, 176)])
    assert_twice_at_most(images, stem[0], torch.zeros_like(stem[1]), 0 * stem[2], origins, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 196, 768), (2, 5, 31, 130), (1, 2, 257, 1280)], ids=str)
def test_pooling_within_twice_the_reference_error(shape, dtype):
    tokens = torch.randn(*shape, device=GPU).to(dtype)
    tokens[0] *= 1e-3
    for rows in (None, torch.randn(*shape[2:], device=GPU).to(dtype)):
        exact = reference.shortcut_pool(tokens.double(), rows if rows is None else rows.double())
        limit = 2 * error(reference.shortcut_pool(tokens, rows), exact) + 5e-7
        assert error(shortcut_pool(tokens, rows), exact) <= limit


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_pooling_at_any_scale(scale):
    tokens = torch.randn(2, 3, 100, 64, device=GPU)
    exact = reference.shortcut_pool((tokens * scale).double())
    assert error(shortcut_pool(tokens * scale) / scale, exact / scale) < 1e-6


def test_pooling_of_no_energy_and_nan():
    tokens = torch.ones(3, 2, 70, 8, device=GPU)
    tokens[0], tokens[1, 1, 69, 3] = 0, torch.nan
    got = shortcut_pool(tokens)
    assert not got[0].any() and got[1].isnan().all()
    torch.testing.assert_close(got[2], torch.ones_like(got[2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_every_run(dtype, poisoned_memory):
    images, *stem, rows = problem((224, 224), (16, 16), dtype=dtype)
    spectrum = torch.fft.fft2(images)
    origins = torch.tensor([(0, 0), (104, 96), (208, 208)], device=GPU)

    def both():
        tokens = shortcut_tokens(spectrum, origins, 16, (224, 224), *stem, rows=rows)
        return tokens, shortcut_pool(tokens)

    first = both()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(both(), first, strict=True))
    alone = shortcut_tokens(spectrum, origins[1:2], 16, (224, 224), *stem, rows=rows)
    assert torch.equal(alone[0], first[0][1]) and torch.equal(shortcut_pool(alone)[0], first[1][1])


def test_graphs_follow_their_inputs():
    """Spectrum and window origins change between replays."""
    images, *stem, rows = problem((64, 64), (16, 16), dim=64, dtype=BF16)
    spectrum = torch.fft.fft2(images)
    origins = torch.tensor([(0, 0), (24, 20)], device=GPU)

    def work():
        tokens = shortcut_tokens(spectrum, origins, 8, (64, 64), *stem, rows=rows)
        return tokens, shortcut_pool(tokens)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = work()
        for seed, rows_of_windows in ((1, [(5, 7), (56, 1)]), (2, [(30, 30), (0, 56)])):
            spectrum.copy_(torch.fft.fft2(images_of(4, 3, 64, 64, FP32, seed).to(GPU)))
            origins.copy_(torch.tensor(rows_of_windows))
            graph.replay()
            stream.synchronize()
            for a, b in zip(captured, work(), strict=True):
                assert torch.equal(a, b)


def test_work_follows_the_current_stream():
    """Inputs that are still being made on another stream than the default one."""
    images, *stem, rows = problem((64, 64), (16, 16), dim=64)
    origins = torch.tensor([(24, 20)], device=GPU)
    spectrum = torch.fft.fft2(images)
    expected = shortcut_tokens(spectrum, origins, 8, (64, 64), *stem, rows=rows)
    torch.cuda.synchronize()
    stream, late = torch.cuda.Stream(), torch.zeros_like(spectrum)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(spectrum)
        tokens = shortcut_tokens(late, origins, 8, (64, 64), *stem, rows=rows)
        pooled = shortcut_pool(tokens)
    stream.synchronize()
    assert torch.equal(tokens, expected) and torch.equal(pooled, shortcut_pool(expected))


def test_memory_is_that_of_the_result_and_of_strips():
    """No image of full size, filtered or complex."""
    images, *stem, rows = problem((224, 224), (16, 16), batch=32, dtype=BF16)
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


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_gpu_small(dtype):
    """Odd sizes that pad every tile."""
    images, weight, bias, rows = problem((30, 21), (5, 3), batch=3, dim=70, dtype=dtype)
    origins = torch.tensor([(0, 3), (21, 12)])
    assert_twice_at_most(images, weight, bias, rows, origins, 9)
    tokens = torch.randn(2, 3, 42, 70, device=GPU).to(dtype)
    assert shortcut_pool(tokens, rows).isfinite().all()
