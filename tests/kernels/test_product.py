"""Products with the pointwise pass behind them: values, bits, layouts, who runs them and where."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.library import opcheck

import pae
from pae_kernels import backends, product
from pae_kernels.pointwise import ACTIVATIONS, reference
from tests.kernels.executions import BF16, FP16, FP32, FP64, each

OP = "product"
KINDS = sorted(ACTIVATIONS)
KERNELS = ("interpreter", "gpu")
SHAPES = [(1, 1, 1), (5, 33, 20), (70, 24, 136), (130, 40, 72)]  # rows, K, F
LARGE = [*SHAPES, (25216, 768, 3072), (128, 768, 3072), (197, 384, 1536)]


def drawn(rows, inner, columns, dtype):
    generator = torch.Generator().manual_seed(rows)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=FP64).to(dtype)
    return draw(rows, inner), draw(columns, inner) / inner**0.5, draw(columns)


def forward(x, weight, bias, kind, keep="code"):
    return product.product_activation(x, weight, bias, kind, keep)


def assert_values(execution, x, weight, bias, kind):
    """Forward and backward as exact as PyTorch's plain way."""
    u = F.linear(x.double(), weight.double(), bias.double())
    plain = F.linear(x, weight, bias)
    y, hidden = forward(x, weight, bias, kind, "hidden")
    execution.assert_as_exact(y, ACTIVATIONS[kind](plain), ACTIVATIONS[kind](u), "y")
    execution.assert_as_exact(hidden, plain, u, "hidden")
    coded, code = forward(x, weight, bias, kind)
    alone, nothing = forward(x, weight, bias, kind, "nothing")
    assert torch.equal(coded, y) and torch.equal(alone, y) and nothing is None
    slope = reference.activation_backward(torch.ones_like(u), u, kind)
    assert code.dtype == torch.uint8 and code.shape == y.shape
    close = torch.finfo(x.dtype).eps * 8 + 1 / 400
    off = ((code.double() - 27) / 200 - slope).abs()
    if kind == "relu":  # a jump: where the sum is near 0, either side is right
        off = off.where(u.abs() > 1e-2, 0.0)
    assert not off.numel() or off.max() <= close

    d, w = y.detach().roll(1, -1), weight  # (rows, F) times (F, K), kept (rows, K)
    kept = x
    got = product.product_activation_backward(d, w, kept, kind)
    exact = reference.activation_backward(d.double() @ w.double(), kept.double(), kind)
    execution.assert_as_exact(
        got, reference.activation_backward(d @ w, kept, kind), exact, "from u"
    )
    byte = reference.activation_coded(kept, kind)[1]
    got = product.product_activation_backward(d, w, byte, kind)
    exact = (d.double() @ w.double()) * (byte.double() - 27) / 200
    execution.assert_as_exact(
        got, reference.activation_backward(d @ w, byte, kind), exact, "from the code"
    )


@each(
    OP,
    "shape, dtype",
    reference=[(s, dtype) for s in SHAPES for dtype in (FP64, FP32, BF16)],
    interpreter=[(s, dtype) for s in SHAPES for dtype in (FP32, FP16)],
    gpu=[(s, dtype) for s in LARGE for dtype in (BF16, FP16, FP32)],
)
def test_values(execution, shape, dtype):
    assert_values(execution, *execution.moved(*drawn(*shape, dtype)), "gelu")


# their formulas are those of the pointwise kernels, whose suite interprets all of them
@each(OP, "kind", reference=KINDS, interpreter=["relu", "silu"], gpu=KINDS)
def test_activations(execution, kind):
    dtype = execution.pick(gpu=BF16, other=FP32)
    assert_values(execution, *execution.moved(*drawn(40, 24, 48, dtype)), kind)


@each(OP, on=KERNELS)
def test_tiles_that_are_described(execution, monkeypatch):
    """By TMA, whose descriptors the interpreter knows; and where rows begin anywhere, not."""
    if execution.kind == "interpreter":
        from pae_kernels.product import triton

        monkeypatch.setattr(triton, "_has_tma", lambda device: True)
        seen = []
        fits = triton._fits_tma
        monkeypatch.setattr(triton, "_fits_tma", lambda t: seen.append(fits(t)) or seen[-1])
    for shape, ours in (((70, 32, 144), True), ((70, 33, 144), False)):
        if execution.kind == "interpreter":
            seen.clear()
        dtype = execution.pick(gpu=BF16, other=FP16)
        assert_values(execution, *execution.moved(*drawn(*shape, dtype)), "gelu")
        assert execution.kind != "interpreter" or all(seen) == ours


def test_rows_of_either_kind_after_each_other(monkeypatch):
    """What a launch knows of the one before: odd rows by pointers, then others by descriptors."""
    pytest.importorskip("triton")
    from tests import stand_in

    monkeypatch.setenv("PAE_EPILOGUE", "triton")
    with stand_in.gpu(90) as launches:
        for inner in (33, 64, 33):
            x, weight, bias = (t.cuda() for t in drawn(40, inner, 48, BF16))
            y, _ = forward(x, weight, bias, "gelu", "hidden")
            product.product_activation_backward(y, weight, x, "gelu")
    ways = [dict(launch.constants)["TMA"] for launch in launches]
    assert ways == [False, False, True, True] and set(launches.values()) == {2, 1}


@each(OP)
def test_layouts(execution):
    """Rows of a larger weight, one that is transposed, rows of an image, none at all."""
    dtype = execution.pick(gpu=BF16, other=FP32)
    x, weight, bias = execution.moved(*drawn(12, 24, 40, dtype))
    expected = forward(x, weight, bias, "gelu")
    wide = torch.cat([weight, weight + 1], 1)[:, :24]
    turned = weight.t().contiguous().t()
    for w in (wide, turned):
        for got, wanted in zip(forward(x, w, bias, "gelu"), expected):
            assert torch.equal(got, wanted)
    for got, wanted in zip(forward(x.view(3, 4, 24), weight, bias, "gelu"), expected):
        assert torch.equal(got, wanted.view(3, 4, 40))
    y, code = forward(x[:0], weight, bias, "gelu")
    assert y.shape == code.shape == (0, 40)
    y, _ = forward(x[:, :0], weight[:, :0], bias, "gelu")
    torch.testing.assert_close(y, F.gelu(bias).expand(12, 40))
    d = expected[0]
    for w in (wide, turned):
        got = product.product_activation_backward(d, w, x, "gelu")
        assert torch.equal(got, product.product_activation_backward(d, weight, x, "gelu"))
    assert product.product_activation_backward(d[:0], weight, x[:0], "gelu").shape == (0, 24)


@each(OP)
def test_the_same_bits_every_time(execution):
    dtype = execution.pick(gpu=BF16, other=FP32)
    x, weight, bias = execution.moved(*drawn(140, 48, 144, dtype))
    first = None
    for _ in execution.runs():
        y, code = forward(x, weight, bias, "gelu")
        found = y, code, product.product_activation_backward(y, weight, x, "gelu")
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first))


# ---- who runs them


def test_nobody_runs_them_unasked(monkeypatch):
    monkeypatch.delenv("PAE_BACKEND", raising=False)
    monkeypatch.delenv("PAE_EPILOGUE", raising=False)
    monkeypatch.setattr(backends, "with_triton_tiles", lambda device_type, dtype: None)
    assert backends.choose(OP, "cuda", BF16).__name__.endswith("reference")
    (version, _) = backends.registered()[OP]
    assert version.unavailable("cuda", BF16).startswith("not measured against cuBLAS on this card")
    assert not product.wanted("cuda", BF16)
    monkeypatch.setenv("PAE_EPILOGUE", "triton")
    assert version.unavailable("cuda", BF16) is None
    assert product.wanted("cuda", BF16) and product.wanted("cuda", FP16)
    assert not product.wanted("cuda", FP32) and not product.wanted("cpu", BF16)
    monkeypatch.setattr(backends, "with_triton_tiles", lambda *_: "has no tiles for it")
    with pytest.raises(RuntimeError, match=r"PAE_EPILOGUE=triton cannot run .* no tiles for it"):
        product.wanted("cuda", BF16)
    monkeypatch.setenv("PAE_EPILOGUE", "cutlass")
    with pytest.raises(ValueError, match="PAE_EPILOGUE must be auto or triton, got 'cutlass'"):
        product.wanted("cuda", BF16)
    assert product.wanted("cpu", BF16) is False


@each(
    OP, "memory", reference=["keep", "recompute8", "recompute"], interpreter=["keep", "recompute8"]
)
def test_in_a_block(execution, monkeypatch, memory):
    """A step through them is the step without them, to the bit where PyTorch makes the products."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(3), num_classes=4).train()
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 3])
    calls = []

    def step(asked):
        monkeypatch.setattr(product, "wanted", lambda *_: calls.append(asked) or asked)
        model.zero_grad()
        logits = pae.fast_forward(model, images, memory=memory)
        F.cross_entropy(logits, labels).backward()
        return logits.detach(), model.prompts.tokens.grad.clone()

    for got, wanted in zip(step(True), step(False)):
        if execution.kind == "reference":
            assert torch.equal(got, wanted)
        else:
            assert (got - wanted).norm() < 1e-5 * wanted.norm()
    assert calls.count(True) == calls.count(False) == 6


# ---- what they refuse, and what PyTorch knows of them


def test_refusals():
    x, weight, bias = drawn(3, 4, 5, FP32)
    with pytest.raises(ValueError, match=r"weight must be \(F, K\) for x .* got weight \(4, 5\)"):
        forward(x, weight.t(), bias, "gelu")
    with pytest.raises(ValueError, match="both of one float dtype"):
        forward(x.bfloat16(), weight, bias, "gelu")
    with pytest.raises(ValueError, match=r"bias must be \(5,\)"):
        forward(x, weight, bias[:4], "gelu")
    with pytest.raises(ValueError, match="kind must be one of"):
        forward(x, weight, bias, "mish")
    with pytest.raises(ValueError, match="keep must be one of"):
        forward(x, weight, bias, "gelu", "all")
    with pytest.raises(ValueError, match=r"kept must be \(3, 4\)"):
        product.product_activation_backward(torch.ones(3, 5), weight, x.double(), "gelu")


@pytest.mark.parametrize("keep", product.op.KEEP)
def test_declarations(keep):
    x, weight, bias = drawn(3, 4, 5, FP32)
    opcheck(torch.ops.pae.product_activation_fwd.default, (x, weight, bias, "gelu", keep))
    opcheck(torch.ops.pae.product_activation_bwd.default, (torch.ones(3, 5), weight, x, "gelu"))
