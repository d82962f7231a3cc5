"""What only a GPU can show of koopman_losses: its versions on one, against fp64.

Marked `sanitize`: a small call of every kernel, few enough for compute-sanitizer.
"""

from __future__ import annotations

import math

import pytest
import torch

from pae_kernels import backends, koopman_losses
from pae_kernels.koopman import reference, runs_on_device, tiles
from tests.kernels.test_koopman import SPECTRA, close, definition, problem, values_and_gradients

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: kernels run compiled, not interpreted"
)

GPU = torch.device("cuda")


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def version(request, monkeypatch):
    """Every test runs every version that this machine can run."""
    monkeypatch.setenv("PAE_BACKEND", request.param)
    try:
        module = backends.choose("koopman_losses", GPU, torch.float32)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert module.__name__.endswith(request.param) and runs_on_device(GPU)
    yield module
    torch.cuda.synchronize()


def on_gpu(*args, **options):
    """The problem of the CPU tests, in fp32, on the GPU."""
    inputs = problem(*args, dtype=torch.float32, **options)
    return [t.detach().to(GPU).requires_grad_() for t in inputs]


def assert_twice_at_most(inputs, *options):
    """At most twice as far from fp64 as the definition in fp32."""
    got = values_and_gradients(koopman_losses, inputs, *options)
    plain = values_and_gradients(definition, inputs, *options)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = values_and_gradients(definition, wide, *options)
    names = ("consistency", "lyapunov", "d prompts", "d lift", "d K", "d L")
    for name, a, b, c in zip(names, got, plain, exact, strict=True):
        assert a.isfinite().all(), name
        scale = c.norm().item()
        far = lambda t, c=c: (t.double() - c).norm().item()
        limit = max(2 * far(b), 2e-6 * scale + 1e-8)  # sums in another order
        assert far(a) <= limit, f"{name}: {far(a) / scale:.1e} > {limit / scale:.1e}"


MODES = pytest.mark.parametrize("mode", ["global", "layerwise"])
FORMULATIONS = pytest.mark.parametrize("formulation", ["code", "paper"])
GAUGES = pytest.mark.parametrize("gauge", ["none", "layernorm"])

# blocks, prompts, width, k
SHAPES = [
    (11, 20, 768, 256),
    (12, 50, 768, 256),
    (11, 100, 768, 256),
    (23, 50, 1024, 1024),
    (3, 7, 33, 17),
]


@pytest.mark.parametrize(("blocks", "prompts", "width", "k"), SHAPES, ids=str)
def test_at_real_sizes(blocks, prompts, width, k):
    assert_twice_at_most(on_gpu("global", blocks, prompts, k, width=width))


@pytest.mark.parametrize("runs", [None, 4])
@MODES
@FORMULATIONS
@GAUGES
def test_every_switch(runs, mode, formulation, gauge):
    inputs = on_gpu(mode, 5, 20, 96, runs=runs, width=208)
    assert_twice_at_most(inputs, formulation, gauge, 1e-6)


@pytest.mark.parametrize(("tile", "k"), [(16, 64), (32, 1), (64, 40)])
def test_every_tile(monkeypatch, tile, k):
    """One size each: Triton compiles all kernels again for every tile and alignment."""
    for name in ("product", "gradient", "square"):
        monkeypatch.setattr(tiles, name, lambda *_: tile)
    assert_twice_at_most(on_gpu("layerwise", 4, 9, k, width=2 * k), "code", "layernorm", 1e-3)


def triple(version, L):
    """sigma, right of every matrix (b, k, k), as the forward leaves them."""
    count, k, _ = L.shape
    prompts, lift = torch.zeros(count, 2, 1, 1, device=GPU), torch.ones(count, k, 1, device=GPU)
    _, _, *saved = version.forward(prompts, lift, torch.zeros_like(L), L, "code", None)
    left, right = saved[6][:, 0].double(), saved[7][:, 0].double()
    return torch.einsum("bi,bij,bj->b", left, L.double(), right), right


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-37, 1e18, 1e36])
def test_the_spectral_norm_is_exact_at_every_spectrum_and_scale(version, scale):
    for name, make in SPECTRA.items():
        L = (make()[None] * scale).to(GPU)
        exact = torch.linalg.svdvals(L.cpu().double())[0, 0].item()
        sigma, right = triple(version, L)
        assert abs(sigma.item() - exact) <= 1e-6 * exact, name
        assert abs(right.norm().item() - 1) < 1e-6, name


@pytest.mark.parametrize("k", [64, 256, 1024])
@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2, 1e-1])
def test_the_spectral_norm_next_to_the_identity(version, k, distance):
    L = torch.eye(k) + distance * torch.randn(1, k, k)
    _, singular, vectors = torch.linalg.svd(L[0].double())
    sigma, right = triple(version, L.to(GPU))
    assert abs(sigma.item() / singular[0].item() - 1) <= 1e-6
    gap = (singular[0] - singular[1]).item() / distance / k**0.5  # of the spread of the spectrum
    angle = (1 - (right[0].cpu() @ vectors[0]) ** 2).clamp(min=0).sqrt().item()
    assert angle <= 1e-6 / gap + 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_L_gives_nan_and_spoils_no_other_run(bad):
    inputs = on_gpu(runs=2)
    with torch.no_grad():
        inputs[3][1, 2, 3] = bad
    consistency, lyapunov, *gradients = values_and_gradients(koopman_losses, inputs)
    assert consistency.isfinite().all() and lyapunov[1].isnan()
    assert lyapunov[0].isfinite() and all(g[0].isfinite().all() for g in gradients)


@MODES
@FORMULATIONS
def test_bitwise_the_same_fifty_times(mode, formulation):
    inputs = on_gpu(mode, 11, 50, 128, width=256)
    first = values_and_gradients(koopman_losses, inputs, formulation, "layernorm")
    for _ in range(50):
        again = values_and_gradients(koopman_losses, inputs, formulation, "layernorm")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@MODES
@FORMULATIONS
def test_a_captured_graph_follows_its_inputs(mode, formulation):
    """Values of eager calls on the new inputs, spectra that settle early or late among them."""
    inputs = on_gpu(mode, 6, 20, 64, width=96)

    def work():
        return values_and_gradients(koopman_losses, inputs, formulation, "layernorm")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = work()
    torch.cuda.current_stream().wait_stream(stream)
    identity = torch.eye(64, device=GPU)
    for seed, L in enumerate((None, identity, identity + 1e-6 * torch.randn_like(identity))):
        fresh = on_gpu(mode, 6, 20, 64, width=96, seed=seed + 1)
        with torch.no_grad():
            for t, new in zip(inputs, fresh):
                t.copy_(new)
            if L is not None:
                inputs[3].copy_(L.expand_as(inputs[3]))
        graph.replay()
        expected = work()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_another_stream():
    """Work follows the caller's stream: inputs are still being made when it is enqueued."""
    inputs = on_gpu("global", 11, 50, 128, width=256)
    expected = values_and_gradients(koopman_losses, inputs)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [(t.detach() + 0).requires_grad_() for t in inputs]
        results = values_and_gradients(koopman_losses, late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_flags_for_tf32_change_nothing():
    inputs = on_gpu("global", 11, 50, 128, width=256)
    expected = values_and_gradients(koopman_losses, inputs)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast("cuda", torch.bfloat16):
            results = values_and_gradients(koopman_losses, inputs)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_compiles_without_a_break():
    def loss(*inputs):
        consistency, lyapunov = koopman_losses(*inputs, "code", "layernorm")
        return consistency + 3 * lyapunov

    inputs = on_gpu()
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True)
    expected = loss(*inputs), *torch.autograd.grad(loss(*inputs), inputs)
    close((compiled(*inputs), *torch.autograd.grad(compiled(*inputs), inputs)), expected, 1e-6)


def test_fp64_runs_on_the_reference(monkeypatch):
    monkeypatch.delenv("PAE_BACKEND")
    assert backends.choose("koopman_losses", GPU, torch.float64) is reference
    inputs = [t.detach().double().requires_grad_() for t in on_gpu()]
    expected = values_and_gradients(definition, inputs)
    close(values_and_gradients(koopman_losses, inputs), expected, 1e-10)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("mode", "formulation", "gauge"),
    [("global", "code", "none"), ("layerwise", "paper", "layernorm")],
)
def test_every_kernel_once(mode, formulation, gauge):
    inputs = on_gpu(mode, 3, 5, 18, runs=2, width=37)
    results = values_and_gradients(koopman_losses, inputs, formulation, gauge)
    assert all(r.isfinite().all() for r in results)
