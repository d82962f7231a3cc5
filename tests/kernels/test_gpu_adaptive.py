"""What only a GPU can show of adaptive prompts: their Triton kernels against fp64, and VAPT's step.

Rule: at most twice the error of plain PyTorch in the same precision. Marked `sanitize`: a small
call of every kernel, few enough for compute-sanitizer.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import pae
from pae_kernels import backends
from pae_kernels.adaptive import prompt_bottleneck, reference, token_mix
from tests.kernels.test_adaptive import grads_of, mixed, parts, randn
from tests.tiny import error

# cuBLAS in deterministic mode, which the poison of uninitialised memory needs
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: kernels run compiled, not interpreted"
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 in fp32, for PyTorch's side of the comparison."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value
    torch.cuda.synchronize()


def assert_twice_at_most(function, plain, tensors, d_out):
    """Value and every gradient."""
    exact = grads_of(plain, [t.double() for t in tensors], d_out)
    theirs = grads_of(plain, tensors, d_out)
    got = grads_of(function, tensors, d_out)
    pairs = zip((got[0], *got[1]), (theirs[0], *theirs[1]), (exact[0], *exact[1]), strict=True)
    for i, (a, b, true) in enumerate(pairs):
        floor = 2e-6 if a.dtype == FP32 else 0.0  # sums in another order
        assert error(a, true) <= max(2 * error(b, true), floor), i


def test_the_kernels_are_chosen():
    for op in ("token_mix", "prompt_bottleneck"):
        for dtype in DTYPES:
            assert backends.choose(op, GPU, dtype).__name__.endswith(".triton")
        assert backends.choose(op, GPU, torch.float64) is reference


# batch, rows, width, prompts
SIZES = [(4, 197, 768, 50), (3, 257, 1280, 100), (2, 50, 384, 5), (1, 577, 1024, 10), (5, 7, 33, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_mix(size, dtype):
    batch, rows, width, prompts = size
    x = 2 * randn(batch, rows, width).to(GPU, dtype) + 0.5
    weight = (randn(prompts, rows, seed=1) / rows**0.5).to(GPU, dtype)
    d_u = randn(batch, prompts, width, seed=2).to(GPU, dtype)
    assert_twice_at_most(token_mix, mixed, (x, weight), d_u)


def test_mix_of_near_zero_rows_obeys_eps():
    x, weight = (1e-6 * randn(2, 197, 768)).to(GPU, FP32), randn(50, 197, seed=1).to(GPU, FP32)
    assert_twice_at_most(token_mix, mixed, (x, weight), randn(2, 50, 768, seed=2).to(GPU, FP32))


def masked(activation, masks):
    def plain(u, gain, shift, bias, down, up):
        g = (u * gain + shift) * masks["channel_mask"].to(u)[:, None] + bias[:, None]
        z = reference.ACTIVATIONS[activation](F.linear(g, down))
        return g + F.linear(z * masks["hidden_mask"].to(u), up)

    return plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("size", [(33, 50, 768, 8), (4, 100, 1280, 3), (2, 5, 384, 64)], ids=str)
def test_bottleneck(size, activation, dtype):
    tensors, masks = parts(*size, dtype=dtype)
    tensors[4] = tensors[4] / size[2] ** 0.5
    masks = {name: mask.to(GPU) for name, mask in masks.items()}
    d_out = (randn(*size[:3], seed=7) / (size[0] * size[2]) ** 0.5).to(GPU, dtype)
    assert_twice_at_most(
        lambda *t: prompt_bottleneck(*t, activation, **masks),
        masked(activation, masks),
        [t.to(GPU) for t in tensors],
        d_out,
    )


def step_inputs(dtype=FP32):
    (_, *tensors), masks = parts(19, 50, 768, 8, dtype=dtype)
    tensors = [randn(19, 197, 768, dtype=dtype), randn(50, 197, seed=1, dtype=dtype), *tensors]
    masks = {name: mask.to(GPU) for name, mask in masks.items()}
    return [t.to(GPU) for t in tensors], masks, randn(19, 50, 768, seed=7).to(GPU, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_100_times(dtype, poisoned_memory):
    tensors, masks, d_out = step_inputs(dtype)

    def both(x, weight, *rest):
        return prompt_bottleneck(token_mix(x, weight), *rest, "relu", **masks)

    first = grads_of(both, tensors, d_out)
    assert all(t.isfinite().all() for t in (first[0], *first[1]))
    for _ in range(99):
        again = grads_of(both, tensors, d_out)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_small_calls_of_every_kernel(dtype):
    """Part-full tiles in every direction, more images than slots."""
    test_mix((2, 70, 72, 18), dtype)
    test_bottleneck((17, 18, 72, 3), "gelu", dtype)


# ---- VAPT's step


def vapt(kld=None):
    torch.manual_seed(0)
    vit = VisionTransformer(embed_dim=384, depth=4, num_heads=6, num_classes=10)
    family = pae.prompts.VAPT(50, channel_dropout=0.0, hidden_dropout=0.0)
    model = pae.PromptedViT(vit, family, kld)
    with torch.no_grad():
        for p in family.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(GPU).train()


def step(model, images, engine, autocast=False):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", BF16, enabled=autocast):
        logits = model(images, engine=engine)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits, torch.arange(len(images), device=GPU) % 10)
    (loss + model.penalty()).backward()
    grads = torch.cat([p.grad.flatten() for p in model.prompts.parameters()])
    return logits.detach(), grads


@pytest.mark.parametrize("autocast", [False, True])
def test_vapt_loses_no_more_than_the_reference(autocast):
    model = vapt()
    images = randn(8, 3, 224, 224).to(GPU, FP32)
    truth = step(copy.deepcopy(model).double(), images.double(), "reference")
    plain = step(model, images, "reference", autocast)
    got = step(model, images, "fast", autocast)
    for a, b, true in zip(got, plain, truth, strict=True):
        assert error(a, true) <= max(1.2 * error(b, true), 1e-5)


@pytest.mark.parametrize("with_kld", [False, True])
def test_vapt_step_in_a_graph_follows_its_inputs(with_kld):
    """The regulariser reads the prompts of this replay's images, not of the capture's."""
    model = vapt(pae.KLD(16) if with_kld else None)
    images, others = (randn(4, 3, 224, 224, seed=s).to(GPU, FP32) for s in (0, 1))
    labels = torch.arange(4, device=GPU)
    replay = pae.graphed_step(model, images, labels)
    for batch in (images, others, images):
        _, logits = replay(batch, labels)
        got = torch.cat([p.grad.flatten() for p in model.prompts.parameters()])
        expected, grads = step(copy.deepcopy(model), batch, "fast")
        assert error(logits, expected) < 1e-5 and error(got, grads) < 1e-4
