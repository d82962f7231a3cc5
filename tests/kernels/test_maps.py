"""`enlarged_conv` and `pixel_loss` in every execution, against their definitions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.library import opcheck

from pae_kernels import backends, cpu
from pae_kernels.maps import cpu as version
from pae_kernels.maps import enlarged_conv, has_kernel, pixel_loss, reference
from tests.kernels.executions import BF16, FP32, FP64, each, grads_of, in_three_ways
from tests.tiny import refused

OP = "enlarged_conv"  # and pixel_loss, by the same versions
OPS = torch.ops.pae


def randn(*size, dtype=FP64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=FP64).to(dtype)


def check(execution, function, plain, tensors, d_out):
    """Value and every gradient of a version, beside plain PyTorch's and those in fp64."""
    for a, b, c in in_three_ways(function, plain, tensors, d_out):
        execution.assert_as_exact(a, b, c)


# ---- enlarged_conv


def conv(x, weight, scale):
    """The definition, by PyTorch's modules' names."""
    large = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=scale, mode="bilinear")
    return F.conv2d(large, weight, padding=1).permute(0, 2, 3, 1)


# batch, rows, columns, channels in and out, scale: parts of vectors, whole blocks of them, maps of
# one row, no images, every border beside every other
SIZES = [(2, 5, 7, 3, 6, 2), (1, 3, 4, 8, 70, 2), (2, 4, 3, 5, 33, 4), (1, 1, 1, 2, 17, 3)]
SIZES += [(1, 2, 1, 4, 5, 16), (3, 4, 4, 3, 9, 1), (0, 2, 2, 3, 4, 2), (1, 1, 9, 2, 128, 2)]


@each(OP, "size, dtype", reference=[(s, FP64) for s in SIZES], cpu=[(s, FP32) for s in SIZES])
def test_conv_equals_the_definition(execution, size, dtype):
    batch, rows, columns, width, out, scale = size
    x, weight = randn(batch, rows, columns, width), randn(out, width, 3, 3, seed=1)
    d_y = randn(batch, scale * rows, scale * columns, out, seed=2)
    with execution.entered(OP):
        check(
            execution,
            lambda x, w: enlarged_conv(x, w, scale),
            lambda x, w: conv(x, w, scale),
            (x.to(dtype), weight.to(dtype)),
            d_y.to(dtype),
        )


@each(OP, "needs", cpu=[(True, False), (False, True)], reference=[(True, False), (False, True)])
def test_a_gradient_that_nobody_needs(execution, needs):
    x, weight = randn(2, 3, 4, 5, dtype=FP32), randn(6, 5, 3, 3, dtype=FP32)
    with execution.entered(OP):
        both = grads_of(lambda x, w: enlarged_conv(x, w, 2), (x, weight), torch.ones(2, 6, 8, 6))
        leaves = [t.clone().requires_grad_(need) for t, need in zip((x, weight), needs)]
        enlarged_conv(*leaves, 2).sum().backward()
    for leaf, need, expected in zip(leaves, needs, both[1], strict=True):
        assert (leaf.grad is not None) == need
        assert not need or torch.equal(leaf.grad, expected)


# ---- pixel_loss


def loss_of(logits, masks, ignored=255):
    """The definition."""
    size = masks.shape[-2:]
    large = F.interpolate(logits.permute(0, 3, 1, 2), size=size, mode="bilinear")
    return F.cross_entropy(large, masks, ignore_index=ignored, reduction="sum")


def masks_of(*size, classes, ignored=255):
    masks = torch.randint(classes, size, generator=torch.Generator().manual_seed(3))
    masks[:, 0, ::2] = ignored
    return masks


# batch, rows, columns, classes, height, width: whole scales, none, smaller, as they are
MAPS = [(2, 4, 5, 3, 16, 20), (1, 4, 4, 150, 8, 8), (2, 3, 2, 17, 7, 9), (1, 6, 6, 20, 4, 5)]
MAPS += [(1, 1, 1, 2, 3, 3), (2, 5, 5, 16, 5, 5), (0, 2, 2, 3, 4, 4), (1, 9, 1, 33, 31, 2)]


@each(
    OP,
    "size, scale, dtype",
    reference=[(s, 1.0, FP64) for s in MAPS],
    cpu=[*((s, 1.0, FP32) for s in MAPS), (MAPS[1], 60.0, FP32), (MAPS[2], 1e-3, FP32)],
)
def test_loss_equals_the_definition(execution, size, scale, dtype):
    """Also where one class has all of the probability: exponentials from -200 on are nothing."""
    batch, rows, columns, classes, height, width = size
    logits = (scale * randn(batch, rows, columns, classes) - 200 * (scale > 1)).to(dtype)
    masks = masks_of(batch, height, width, classes=classes)
    with execution.entered(OP):
        check(
            execution,
            lambda x: pixel_loss(x, masks),
            lambda x: loss_of(x, masks),
            (logits,),
            torch.tensor(0.7),
        )


@each(OP, cpu=[()], reference=[()])
def test_numbers_that_are_no_class(execution):
    """NaN, so that nobody trains on, and nothing is read or written beside the array."""
    logits = randn(1, 2, 2, 4, dtype=FP32)
    with execution.entered(OP):
        for wrong in (4, -1, 254, (1 << 31) - 1):
            masks = torch.zeros(1, 4, 4, dtype=torch.int64)
            masks[0, 1, 2] = wrong
            assert pixel_loss(logits, masks).isnan()
            assert pixel_loss(logits, masks, wrong).isfinite()
        nobody = torch.full((1, 4, 4), 255)
        value, (d,) = grads_of(lambda x: pixel_loss(x, nobody), (logits,), torch.tensor(1.0))
        assert value == 0 and not d.any()
        logits[0, 0, 0, 0] = torch.nan
        assert pixel_loss(logits, torch.zeros(1, 4, 4, dtype=torch.int64)).isnan()


# ---- both


@each(OP, on=["cpu"])
def test_the_same_bits_for_any_number_of_threads(execution):
    """Large enough that threads share the work."""
    logits, masks = randn(2, 16, 16, 40, dtype=FP32), masks_of(2, 64, 64, classes=40)
    d_y, found, before = randn(2, 24, 24, 64, dtype=FP32), [], torch.get_num_threads()
    taps, size = torch.empty(144, 9 * 64), torch.Size((12, 12))
    try:
        with execution.entered(OP):
            for threads in (1, 3):
                torch.set_num_threads(threads)
                version._enlarged("bwd", taps, d_y[0], size, 2)
                y = torch.empty_like(d_y[0])
                version._enlarged("fwd", taps, y, size, 2)
                loss, d = grads_of(lambda x: pixel_loss(x, masks), (logits,), torch.tensor(1.0))
                found.append((taps.clone(), y, loss, *d))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@each(OP, on=["cpu", "reference"])
def test_every_entry_is_written(execution):
    """From memory that is NaN before."""
    x, weight = randn(2, 3, 4, 5, dtype=FP32), randn(6, 5, 3, 3, dtype=FP32)
    masks = masks_of(2, 6, 8, classes=5)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with execution.entered(OP):
            found = grads_of(
                lambda x, w: enlarged_conv(x, w, 2), (x, weight), torch.ones(2, 6, 8, 6)
            )
            again = grads_of(lambda x: pixel_loss(x, masks), (x,), torch.tensor(1.0))
    finally:
        torch.use_deterministic_algorithms(False)
    for value in (found[0], *found[1], again[0], *again[1]):
        assert torch.isfinite(value).all()


def test_gradcheck():
    x, weight = (t.requires_grad_() for t in (randn(2, 2, 3, 2), randn(3, 2, 3, 3, seed=1)))
    masks = masks_of(2, 4, 5, classes=2)
    for function, given in (
        (lambda x, w: enlarged_conv(x, w, 2), (x, weight)),
        (lambda x: pixel_loss(x, masks), (x,)),
    ):
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


def test_opcheck():
    x, weight = (
        t.requires_grad_() for t in (randn(2, 2, 3, 4, dtype=FP32), randn(3, 4, 3, 3, dtype=FP32))
    )
    masks = masks_of(2, 4, 5, classes=4)
    opcheck(OPS.enlarged_conv_fwd, (x, weight, 2))
    opcheck(OPS.pixel_loss_fwd, (x, masks, 255))
    d_y, needs = randn(2, 4, 6, 3, dtype=FP32), (True, True)
    opcheck(OPS.enlarged_conv_bwd, (d_y, x.detach(), weight.detach(), 2, *needs))
    loss, lse = OPS.pixel_loss_fwd(x.detach(), masks, 255)
    opcheck(OPS.pixel_loss_bwd, (torch.ones_like(loss), x.detach(), masks, lse, 255))


def test_where_there_is_a_kernel(monkeypatch):
    monkeypatch.delenv("PAE_BACKEND", raising=False)
    assert cpu.unavailable() or has_kernel(OP, torch.ones(1))
    for op in (OP, "pixel_loss"):
        assert not has_kernel(op, torch.ones(1, dtype=FP64))
        assert not has_kernel(op, torch.ones(1, dtype=BF16))
        assert not has_kernel(op, torch.ones(1, device="meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not has_kernel(op, torch.ones(1))
        with monkeypatch.context() as patch:
            patch.setenv("PAE_BACKEND", "reference")
            assert not has_kernel(op, torch.ones(1))
    monkeypatch.setattr(cpu, "lacks", lambda function: f"_cpu.so is older than {function}")
    assert not has_kernel(OP, torch.ones(1))
    assert backends.choose(OP, "cpu") is reference


def test_refusals():
    x, weight = torch.ones(1, 2, 2, 3), torch.ones(4, 3, 3, 3)
    masks = torch.zeros(1, 4, 4, dtype=torch.int64)
    refused(TypeError, "x must be a float tensor", lambda: enlarged_conv(x.long(), weight, 2))
    refused(ValueError, "weight must be (4, 3, 3, 3)", lambda: enlarged_conv(x, weight[:, :2], 2))
    refused(ValueError, "of torch.float32", lambda: enlarged_conv(x, weight.double(), 2))
    refused(ValueError, "must have entries", lambda: enlarged_conv(x[:, :0], weight, 2))
    for scale in (0, 17, 2.0, True):
        refused(ValueError, "scale must be an integer", lambda s=scale: enlarged_conv(x, weight, s))
    refused(ValueError, "logits must be (B, h, w, K)", lambda: pixel_loss(x[0], masks))
    refused(TypeError, "masks must be an int64", lambda: pixel_loss(x, masks.byte()))
    refused(ValueError, "masks must be (1, H, W)", lambda: pixel_loss(x, masks.expand(2, 4, 4)))
    refused(ValueError, "must have entries", lambda: pixel_loss(x, masks[:, :0]))
    refused(ValueError, "ignored must be", lambda: pixel_loss(x, masks, 1 << 31))
