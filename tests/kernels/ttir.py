"""Every Triton kernel in bf16, on the CPU: what Triton compiles it to is executed, operation by
operation, and watched.

    python3.12 -m venv ENV
    ENV/bin/pip install ttsem==0.1.0 torch==2.14.0 triton==3.8.0 -e ".[test]"
    ENV/bin/python -m pytest -q tests/kernels/ttir.py

`ttsem` runs the TTIR of every launch. An access outside of the tensors that a launch was given, two
programs that touch one entry and a result that is undefined are errors at the kernel's line; memory
that nobody wrote is NaN. Triton's own interpreter multiplies bf16 wrongly, and sees none of that.
Part of `PAE_LONG=1 tests/more.sh`, where the environment is named by PAE_TTIR: seconds a launch.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor
from ttsem import sanitize

from pae_kernels import ahead_of_time, backends
from pae_kernels.koopman import koopman_losses
from pae_kernels.pointwise import reference as pointwise
from pae_kernels.product import triton as by_triton
from pae_kernels.spectrum import reference as spectrum
from pae_kernels.spectrum import shortcut_pool
from tests.kernels import test_adaptive as adaptive
from tests.kernels import test_pointwise as rows
from tests.kernels import test_product as products
from tests.kernels.attention import cases as attention
from tests.kernels.executions import BF16, FP32, Execution
from tests.kernels.koopman import cases as losses
from tests.kernels.spectrum import cases as tokens

CPU = torch.device("cpu")
TTIR = Execution("ttir", "triton", CPU, (BF16, FP32))
launched: set[str] = set()


def write_back(record, execution, real=sanitize._write_back):
    """Also what is stored by descriptors, whose tensors ttsem 0.1.0 leaves as they were."""
    bound = {
        name: value.base if isinstance(value, TensorDescriptor) else value
        for name, value in record.bound.items()
    }
    real(replace(record, bound=bound), execution)


@pytest.fixture(scope="module", autouse=True)
def executed():
    """Every launch of this module is."""
    from triton.runtime.jit import JITFunction

    patch = pytest.MonkeyPatch()
    patch.setenv("PAE_BACKEND", "triton")
    patch.setattr(backends, "_interpreted", lambda: True)  # Triton on tensors of the CPU
    patch.setattr(sanitize, "_write_back", write_back)
    with sanitize.session(cc=90, cuda_is_cpu=False) as state:
        run = JITFunction.run

        def counted(self, *args, **kwargs):
            launched.add(self.__name__)
            return run(self, *args, **kwargs)

        patch.setattr(JITFunction, "run", counted)
        yield state
        patch.undo()
    assert state.races_unchecked == 0


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory):
    """Where nobody wrote, there is NaN."""


def randn(*size: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- attention


def in_one_buffer(*tensors: Tensor) -> list[Tensor]:
    """Copies in one allocation: the kernels reach all keys from one pointer."""
    sizes = [math.ceil(t.numel() / 64) * 64 for t in tensors]
    buffer = torch.zeros(sum(sizes), dtype=tensors[0].dtype)
    parts = [part[: t.numel()].view(t.shape) for part, t in zip(buffer.split(sizes), tensors)]
    return [part.copy_(t) for part, t in zip(parts, tensors)]


@pytest.mark.parametrize("backward", ["whole", "split"])
@pytest.mark.parametrize(
    ("sets", "multiplicity", "windows", "causal"),
    [(1, False, None, False), (2, True, None, False), (1, False, 3, False), (1, False, None, True)],
)
def test_attention(monkeypatch, backward, sets, multiplicity, windows, causal):
    attention.force(monkeypatch, backward, images=2)
    sizes = {"batch": 3, "tokens": 19, "prompts": 5, "heads": 2, "width": 16}
    qkv, kv = in_one_buffer(*attention.inputs(**sizes, sets=sets, dtype=BF16))
    options = {"group": torch.tensor([1, 0, 1])} if sets > 1 else {}
    if multiplicity:
        options["log_multiplicity"] = randn(sets, 5, dtype=FP32)
    if windows:
        options |= attention.places(19, 2, windows)
    attention.check(TTIR, qkv, kv, causal=causal, **options)


def test_attention_on_tiles_that_ship():
    qkv, kv = in_one_buffer(
        *attention.inputs(batch=1, tokens=70, prompts=5, heads=1, width=64, dtype=BF16)
    )
    attention.check(TTIR, qkv, kv)


def test_attention_of_the_class_row_and_prompt_gradient_alone():
    qkv, kv = in_one_buffer(*attention.inputs(tokens=19, prompts=5, width=16, dtype=BF16))
    attention.check(TTIR, qkv, kv, queries="class")


# ---- pointwise


@pytest.mark.parametrize("stream", [FP32, BF16])
def test_norms(stream):
    x, delta = randn(5, 72, dtype=stream), randn(5, 72, seed=1)
    module = backends.choose("pointwise", CPU, BF16)
    y, xhat, rstd = module.add_layer_norm(x, delta, 1e-6, BF16)
    plain = pointwise.add_layer_norm(x, delta, 1e-6, BF16)
    exact = pointwise.add_layer_norm(y.double(), torch.zeros_like(y).double(), 1e-6, torch.float64)
    assert torch.equal(y, plain[0])
    TTIR.assert_as_exact(xhat, plain[1], exact[1], "xhat")
    TTIR.assert_as_exact(rstd, plain[2], exact[2], "rstd")
    d, dy = randn(5, 72, seed=2), randn(5, 72, dtype=stream, seed=3)
    got = module.layer_norm_backward(d, xhat, rstd, dy, stream, BF16)
    given = d, xhat, rstd, dy
    theirs = pointwise.layer_norm_backward(*given, stream, BF16)
    exact = pointwise.layer_norm_backward(
        *(t.double() for t in given), torch.float64, torch.float64
    )
    for name, a, b, c in zip(("dx", "copy"), got, theirs, exact):
        TTIR.assert_as_exact(a, b, c, name)


@pytest.mark.parametrize("kind", sorted(pointwise.ACTIVATIONS))
def test_activations(kind):
    u, d = 3 * randn(3, 77), randn(3, 77, seed=1)
    module = backends.choose("pointwise", CPU, BF16)
    exact = pointwise.activation(u.double(), kind)
    TTIR.assert_as_exact(module.activation(u, kind), pointwise.activation(u, kind), exact)
    slope = pointwise.activation_backward(d.double(), u.double(), kind)
    theirs = pointwise.activation_backward(d, u, kind)
    TTIR.assert_as_exact(module.activation_backward(d, u, kind), theirs, slope)
    y, code = module.activation_coded(u, kind)
    assert torch.equal(y, module.activation(u, kind))
    coded = pointwise.activation_coded(u.double(), kind)[1]
    assert (code.int() - coded.int()).abs().max() <= 1
    theirs = pointwise.activation_backward(d, code, kind)
    exact = pointwise.activation_backward(d.double(), code, kind)
    TTIR.assert_as_exact(module.activation_backward(d, code, kind), theirs, exact)


def test_rms_norm():
    rows.test_rms_norm(TTIR, 33, FP32, BF16)


def test_gates():
    rows.test_gates(TTIR, 41, BF16)


@pytest.mark.parametrize("per_head", [False, True])
def test_rotations(per_head):
    rows.test_rotations(TTIR, 3, 5, BF16, per_head)


# ---- products with a pointwise pass behind them


@pytest.mark.parametrize(("tma", "shape"), [(True, (70, 32, 144)), (False, (70, 33, 144))])
def test_products(monkeypatch, tma, shape):
    """Tiles that go over every edge, as descriptors and as pointers."""
    monkeypatch.setattr(by_triton, "_has_tma", lambda device: tma)
    products.assert_values(TTIR, *products.drawn(*shape, BF16), "gelu")


# ---- adaptive


def test_token_mix():
    x, weight = randn(2, 19, 40), randn(5, 19, seed=1) / 19**0.5
    d_out = randn(2, 5, 40, seed=2)
    adaptive.check(TTIR, adaptive.token_mix, adaptive.mixed, [x, weight], d_out)


@pytest.mark.parametrize("activation", adaptive.ACTIVATIONS)
def test_bottleneck(activation):
    tensors, masks = adaptive.parts(2, 5, 24, 3, dtype=BF16)
    d_out = randn(2, 5, 24, seed=7) / 7
    adaptive.check(
        TTIR,
        lambda *t: adaptive.prompt_bottleneck(*t, activation, **masks),
        adaptive.plain_bottleneck(activation, **masks),
        tensors,
        d_out,
    )


# ---- koopman, fp32 alone


@pytest.mark.parametrize("mode", losses.MODES)
@pytest.mark.parametrize(("formulation", "gauge"), [("code", "layernorm"), ("paper", "none")])
def test_koopman(mode, formulation, gauge):
    inputs = losses.problem(mode, 3, 5, 18, FP32, runs=2, width=21)
    got = losses.values_and_gradients(koopman_losses, inputs, formulation, gauge)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = losses.values_and_gradients(losses.definition, wide, formulation, gauge)
    losses.close(got, expected, 1e-3)


# ---- spectrum


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_tokens_of_windows(dtype):
    problem = tokens.stem_problem((18, 20), (6, 5), batch=1, dim=8, dtype=dtype)
    tokens.check(TTIR, *problem, [(3, 5), (14, 16)], 4)


def test_pool():
    tokens, rows = randn(2, 2, 42, 70), randn(42, 70, seed=1)
    exact = spectrum.shortcut_pool(tokens.double(), rows.double())
    TTIR.assert_as_exact(shortcut_pool(tokens, rows), spectrum.shortcut_pool(tokens, rows), exact)


# ---- all of them


def test_every_kernel_was_executed():
    import triton

    kernels = {
        name
        for module in ahead_of_time.triton_modules()
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.jit.JITFunction) and name.endswith("_kernel")
    }
    assert not kernels - launched, sorted(kernels - launched)
