"""koopman_losses' CUDA kernels on the emulated execution model, against the definition in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from pae_kernels import backends, native
from pae_kernels.koopman import cuda, koopman_losses, spectral, tiles
from tests.kernels import host_library
from tests.kernels.test_koopman import SPECTRA, close, definition, problem, values_and_gradients

SOURCES = "koopman_fwd.cu", "koopman_bwd.cu"


@pytest.fixture(autouse=True)
def emulated(monkeypatch, poisoned_memory):
    """Every op runs its CUDA version; entries that a kernel leaves out are NaN."""
    with host_library.emulated(*SOURCES):
        monkeypatch.setenv("PAE_BACKEND", "cuda")
        assert backends.choose("koopman_losses", "cpu") is cuda
        yield


def use_tile(monkeypatch, tile):
    for name in ("product", "gradient", "square"):
        monkeypatch.setattr(tiles, name, lambda *_: tile)


def check(inputs, *options) -> list[torch.Tensor]:
    """Losses and gradients of the kernels, at most twice as far from fp64 as plain fp32 PyTorch."""
    got = values_and_gradients(koopman_losses, inputs, *options)
    plain = values_and_gradients(definition, inputs, *options)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = values_and_gradients(definition, wide, *options)
    for a, b, c in zip(got, plain, exact, strict=True):
        assert a.shape == c.shape and a.isfinite().all()
        far = lambda t, c=c: (t.double() - c).norm().item()
        allowed = 2 * far(b) + 1e-6 * (c.numel() ** 0.5 + c.norm().item())
        assert far(a) <= allowed, f"{far(a):.1e} from fp64, plain PyTorch {far(b):.1e}"
    return got


@pytest.mark.parametrize("tile", tiles.TILES)
@pytest.mark.parametrize("runs", [None, 3])
@pytest.mark.parametrize("mode", ["global", "layerwise"])
@pytest.mark.parametrize("formulation", ["code", "paper"])
@pytest.mark.parametrize("gauge", ["none", "layernorm"])
def test_losses_and_gradients(monkeypatch, tile, runs, mode, formulation, gauge):
    """Several tiles in every direction where they are small; none of them full."""
    use_tile(monkeypatch, tile)
    inputs = problem(mode, 4, 7, 18, torch.float32, runs=runs, width=37)
    check(inputs, formulation, gauge, 1e-3)


@pytest.mark.parametrize("tile", tiles.TILES)
@pytest.mark.parametrize("k", [2, 16, pytest.param(33, marks=pytest.mark.sanitize), 64, 100])
def test_widths_around_the_tiles(monkeypatch, tile, k):
    use_tile(monkeypatch, tile)
    check(problem("global", 3, 5, k, torch.float32, width=k))


@pytest.mark.sanitize
@pytest.mark.parametrize("mode", ["global", "layerwise"])
@pytest.mark.parametrize("formulation", ["code", "paper"])
def test_one_pair_of_single_rows(mode, formulation):
    check(problem(mode, 2, 1, 1, torch.float32, width=1), formulation)


def test_more_pairs_than_warps():
    check(problem("global", 19, 2, 4, torch.float32))
    check(problem("layerwise", 19, 2, 4, torch.float32))


def test_the_tiles_of_the_table():
    check(problem("global", 12, 5, 40, torch.float32, width=70))


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("mode", ["global", "layerwise"])
def test_no_pair(mode, blocks):
    inputs = problem(mode, blocks=blocks, dtype=torch.float32)
    for result in values_and_gradients(koopman_losses, inputs, "code", "layernorm"):
        assert not result.any()


@pytest.mark.parametrize("formulation", ["code", "paper"])
def test_strides_do_not_matter(formulation):
    inputs = problem(dtype=torch.float32, runs=2)
    strided = [t.detach().mT.contiguous().mT.requires_grad_() for t in inputs]
    one, other = (values_and_gradients(koopman_losses, t, formulation) for t in (inputs, strided))
    assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.sanitize
def test_packed_runs_are_the_runs_bit_by_bit(monkeypatch):
    use_tile(monkeypatch, 16)  # a table by the total size may choose other tiles for fewer runs
    inputs = problem(runs=3, dtype=torch.float32)
    together = koopman_losses(*inputs, gauge="layernorm")
    for r in range(3):
        alone = koopman_losses(*(t[r] for t in inputs), gauge="layernorm")
        assert all(torch.equal(a[r], b) for a, b in zip(together, alone))


@pytest.mark.sanitize
def test_no_order_of_threads_changes_a_bit():
    inputs = problem("layerwise", 4, 5, 20, torch.float32, width=40)
    expected = None
    for order in host_library.ORDERS:
        with host_library.emulated(*SOURCES, order=order):
            results = values_and_gradients(koopman_losses, inputs, "code", "layernorm")
        expected = expected or results
        assert all(torch.equal(a, b) for a, b in zip(results, expected))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_L_gives_nan_and_spoils_no_other_run(bad):
    inputs = problem(dtype=torch.float32, runs=2)
    with torch.no_grad():
        inputs[3][1, 2, 3] = bad
    consistency, lyapunov, *gradients = values_and_gradients(koopman_losses, inputs)
    assert consistency.isfinite().all() and lyapunov[1].isnan()
    assert lyapunov[0].isfinite() and all(g[0].isfinite().all() for g in gradients)
    assert gradients[3][1].isnan().any()


def top(L):
    """sigma, left and right of every matrix (b, k, k), as the forward saves them."""
    count, k, _ = L.shape
    prompts, lift = torch.zeros(count, 2, 1, 1), torch.ones(count, k, 1)
    _, _, *saved = cuda.forward(prompts, lift, torch.zeros_like(L), L, "code", None)
    left, right = saved[6][:, 0].double(), saved[7][:, 0].double()
    return torch.einsum("bi,bij,bj->b", left, L.double(), right), left, right


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-37, 1e18, 1e36])
def test_the_spectral_norm_is_exact_at_every_spectrum_and_scale(monkeypatch, tile, scale):
    use_tile(monkeypatch, tile)
    for name, make in SPECTRA.items():
        L = make()[None] * scale
        exact = torch.linalg.svdvals(L[0].double())[0]
        sigma, left, right = top(L)
        assert (sigma[0] - exact).abs() <= 1e-6 * exact, name
        assert (right[0].norm() - 1).abs() < 1e-6, name
        gap = (L[0].double() @ right[0] - sigma[0] * left[0]).norm()
        assert gap <= 1e-6 * exact, name


@pytest.mark.parametrize("distance", [1e-7, 1e-5, 1e-3, 1e-1])
def test_top_vector_next_to_the_identity(distance):
    L = torch.eye(64) + distance * torch.randn(2, 64, 64)
    exact = torch.linalg.svd(L.double())[2][:, 0]
    _, _, right = top(L)
    angle = (right - exact * (right * exact).sum(1, keepdim=True)).norm(dim=1)
    assert angle.max() <= 1e-5
    _, _, readable = spectral.top_by_squaring(L)
    close([right * (right * readable).sum(1, keepdim=True).sign()], [readable], 1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e18, 1e30])
def test_losses_at_any_scale_of_L(scale):
    *others, L = problem(dtype=torch.float32)
    inputs = [*others, (L.detach() * scale).requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = values_and_gradients(definition, exact)
    results = values_and_gradients(koopman_losses, inputs)
    close(results[:5], expected[:5], 1e-5)
    unit = expected[5].abs().max()
    close([results[5].double() / unit], [expected[5] / unit], 1e-5)


def test_fp64_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"cuda: computes in fp32 at most, not torch.float64"):
        koopman_losses(*problem())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": 1}, "an empty size, or no pair of blocks"),
        ({"k": 10_000}, "a size beyond what the kernels count with"),
        ({"tile": 48}, "tiles are 48 and 16, expected 16, 32 or 64"),
        ({"squarings": 1}, "squarings is 1, expected 3 to 64"),
        ({"workspace_floats": 5}, "workspace has 5 floats, expected "),
        ({"struct_size": 8}, "struct_size is 8, expected "),
    ],
)
def test_the_library_checks_what_would_lead_it_astray(change, message):
    fields = {"runs": 1, "blocks": 3, "prompts": 2, "width": 4, "k": 8, "code": 1, "squarings": 24}
    fields |= {"tile": 16, "square_tile": 16}
    params = cuda._Forward(**fields)
    for name, value in change.items():
        setattr(params, name, value)
    with pytest.raises(RuntimeError, match=message):
        native.call("pae_koopman_fwd", params, torch.device("cpu"))
