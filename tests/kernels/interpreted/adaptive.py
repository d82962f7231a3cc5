"""The kernels of adaptive prompts in Triton's interpreter, beside PyTorch and fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import pae
from pae_kernels import backends
from pae_kernels.adaptive import prompt_bottleneck, reference, token_mix, triton
from tests.kernels.interpreted.conftest import as_exact_as
from tests.kernels.test_adaptive import grads_of, mixed, parts, randn

FP32, FP16 = torch.float32, torch.float16


def assert_as_exact(function, plain, tensors, d_out):
    """Value and every gradient, at most twice as far from fp64 as PyTorch in the same precision."""
    exact = grads_of(plain, [t.double() for t in tensors], d_out)
    theirs = grads_of(plain, tensors, d_out)
    got = grads_of(function, tensors, d_out)
    as_exact_as(got[0], theirs[0], exact[0])
    for a, b, c in zip(got[1], theirs[1], exact[1], strict=True):
        as_exact_as(a, b, c)


# batch, rows, width, prompts: part-full tiles in every direction, several tiles of each
SIZES = [(2, 70, 150, 70), (3, 17, 64, 5), (1, 1, 1, 1), (2, 33, 40, 16)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_mix(size, dtype):
    batch, rows, width, prompts = size
    x, weight = randn(batch, rows, width), randn(prompts, rows, seed=1) / rows**0.5
    d_u = randn(batch, prompts, width, seed=2)
    if width == 1:  # no variance: the result is the row minus itself
        d_u = d_u * 0
    assert_as_exact(token_mix, mixed, [x.to(dtype), weight.to(dtype)], d_u.to(dtype))


def test_mix_of_narrow_rows_with_a_wide_weight():
    x, weight = randn(2, 20, 48, dtype=FP16), randn(5, 20, seed=1).float() / 20**0.5
    d_u = randn(2, 5, 48, seed=2).float()
    got = grads_of(token_mix, (x, weight), d_u)
    exact = grads_of(mixed, (x.double(), weight.double()), d_u.double())
    assert got[0].dtype == FP32 and [g.dtype for g in got[1]] == [FP16, FP32]
    plain = grads_of(mixed, (x, weight.half()), d_u.half())
    for a, b, c in zip((got[0], *got[1]), (plain[0], *plain[1]), (exact[0], *exact[1])):
        as_exact_as(a, b.to(a.dtype), c)


@pytest.mark.parametrize("scale", [0.0, 1e-6])
def test_mix_of_near_zero_rows_obeys_eps(scale):
    x, weight = scale * randn(2, 9, 32).float(), randn(3, 9, seed=1).float()
    d_u = randn(2, 3, 32, seed=2).float()
    got = grads_of(token_mix, (x, weight), d_u)
    exact = grads_of(mixed, (x.double(), weight.double()), d_u.double())
    for a, c in zip((got[0], *got[1]), (exact[0], *exact[1]), strict=True):
        torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5 * (1 + c.abs().max().item()))


def test_mix_without_the_rows_gradient():
    x, weight = randn(2, 20, 48).float(), randn(5, 20, seed=1).float()
    _, mean, rstd = reference.token_mix(x, weight, 1e-5)
    args = randn(2, 5, 48, seed=2).float(), x, weight, mean, rstd
    none, d_weight = triton.token_mix_backward(*args, False)
    assert none.numel() == 0 and none.dtype == FP32
    assert torch.equal(d_weight, triton.token_mix_backward(*args, True)[1])


def bottleneck_in_pytorch(activation, masks):
    def plain(u, gain, shift, bias, down, up):
        g = u * gain + shift
        if masks:
            g = g * masks["channel_mask"].to(u)[:, None]
        g = g + bias[:, None]
        z = reference.ACTIVATIONS[activation](F.linear(g, down))
        return g + F.linear(z * masks["hidden_mask"].to(u) if masks else z, up)

    return plain


# batch (more than there are slots, and not a multiple), prompts, width, units
BOTTLENECKS = [
    ((17, 3, 20, 2), "relu", True),
    ((2, 18, 70, 3), "gelu", False),
    ((3, 17, 33, 20), "softmax", True),
    ((1, 1, 1, 1), "sigmoid", True),
    ((2, 4, 24, 0), "relu", True),
]


@pytest.mark.parametrize(("size", "activation", "masked"), BOTTLENECKS, ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_bottleneck(size, activation, masked, dtype):
    tensors, masks = parts(*size, masks=masked, dtype=dtype)
    if size[3]:
        tensors[4] = tensors[4] / size[2] ** 0.5
    # sums over images and channels stay of order 1
    d_out = (randn(*size[:3], seed=7) / (size[0] * size[2]) ** 0.5).to(dtype)
    assert_as_exact(
        lambda *t: prompt_bottleneck(*t, activation, **masks),
        bottleneck_in_pytorch(activation, masks),
        tensors,
        d_out,
    )


def test_bottleneck_of_many_units_is_the_references():
    tensors, masks = parts(2, 3, 8, 65, dtype=FP32)
    d_out, masks = randn(2, 3, 8, seed=7).float(), tuple(masks.values())
    args = *tensors, "gelu", *masks
    assert torch.equal(triton.prompt_bottleneck(*args), reference.prompt_bottleneck(*args))
    for a, b in zip(
        triton.prompt_bottleneck_backward(d_out, *args),
        reference.prompt_bottleneck_backward(d_out, *args),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_zeros_stay_exact_zeros():
    (u, gain, shift, bias, down, up), masks = parts(dtype=FP32)
    zeros = u * 0, gain, shift * 0, bias * 0, down, up
    assert not prompt_bottleneck(*zeros, "relu", **masks).any()
    assert not token_mix(randn(2, 20, 48).float(), torch.zeros(5, 20)).any()


def test_nothing_to_do():
    for size in ((0, 5, 8), (2, 0, 8)):
        x, weight = torch.zeros(size), torch.zeros(3, size[1])
        u, (d_x, d_weight) = grads_of(token_mix, (x, weight), torch.zeros(size[0], 3, 8))
        assert u.shape == (size[0], 3, 8) and not u.any()
        assert d_x.shape == size and d_weight.shape == weight.shape and not d_weight.any()
    tensors, masks = parts(batch=0, dtype=FP32)
    out, grads = grads_of(
        lambda *t: prompt_bottleneck(*t, "relu", **masks), tensors, torch.zeros(0, 4, 6)
    )
    assert out.shape == (0, 4, 6) and not any(g.any() for g in grads)


def test_the_kernels_run(monkeypatch):
    """The public ops reach them, and the reference is not asked."""
    for op in ("token_mix", "prompt_bottleneck"):
        assert backends.choose(op, "cpu") is triton
        for name in (op, f"{op}_backward"):
            monkeypatch.setattr(reference, name, None)
    test_bitwise_the_same_from_run_to_run()


def test_bitwise_the_same_from_run_to_run():
    (_, *tensors), masks = parts(3, 5, 40, 4, dtype=FP32)
    tensors = [randn(3, 20, 40).float(), randn(5, 20, seed=1).float(), *tensors]
    d_out = randn(3, 5, 40, seed=7).float()

    def both(x, weight, *rest):
        return prompt_bottleneck(token_mix(x, weight), *rest, "relu", **masks)

    first, second = (grads_of(both, tensors, d_out) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.isfinite(first[0]).all()
    for a, b in zip(first[1], second[1], strict=True):
        assert torch.equal(a, b) and torch.isfinite(a).all()


def test_step_equals_the_reference(monkeypatch):
    """VAPT through the engine: every kernel of a step, and the means that a regulariser sees."""
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    family = pae.prompts.VAPT(3, hidden=4, channel_dropout=0.2, hidden_dropout=0.2)
    model = pae.PromptedViT(vit, family, num_classes=4).train()
    with torch.no_grad():
        for p in family.parameters():
            p.add_(0.3 * torch.randn_like(p))
    images = torch.randn(2, 3, 16, 16)

    def step(backend):
        monkeypatch.setenv("PAE_BACKEND", backend)
        model.zero_grad()
        torch.manual_seed(3)  # dropout
        logits = pae.fast_forward(model, images)
        seen = sum(rows.square().sum() for rows in family.raw_prompts())
        (logits.square().sum() + seen).backward()
        return logits.detach(), *(p.grad.clone() for p in family.parameters())

    for got, expected in zip(step("triton"), step("reference"), strict=True):
        assert (got - expected).norm() < 1e-5 * expected.norm()
