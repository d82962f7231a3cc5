"""The ops `token_mix` and `prompt_bottleneck`: signatures, checks, registration, autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from . import reference

for _op in ("token_mix", "prompt_bottleneck"):
    backends.register(
        _op,
        backends.Version("triton", f"{__package__}.triton", backends.with_triton),
        backends.Version("reference", reference, backends.anywhere),
    )


def token_mix(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """u = W xhat, xhat = (x - mean) / sqrt(var + eps) over the last axis: P mixtures of an image's
    normalised rows.

    Whatever is linear in the rows and the same for all channels is a product with such a W: a
    convolution over the grid (its Toeplitz matrix), a projection of the rows, one behind the other.
    Columns of zeros leave rows out (class and register tokens).

    Bytes: x twice (statistics, product) and u once; nothing of the size of x is written. Saved for
    the backward: x, which is an input, and two numbers per row.

    Args:
        x: (B, N, D) float.
        weight: (P, N) float, shared by the batch; may be wider than x.
        eps: added to the variance, exactly.

    Returns:
        (B, P, D) in the dtype of `weight`.

    Gradients: x and weight, once; the latter is summed over the batch in fp32 in a fixed order.
    Numerics: statistics in fp32 or wider, products with fp32 accumulation, exact for fp32 inputs.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.

    Source: VAPT (arXiv 2501.18936), its LayerNorm, convolution and token projection folded.
    """
    _check_float("x", x, "(B, N, D)", 3)
    _check_float("weight", weight, "(P, N)", 2)
    _check_shape("weight", weight, (weight.shape[0], x.shape[1]), x)
    if x.shape[-1] == 0:
        raise ValueError(f"x must have D >= 1, got {_says(x)}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps > 0:
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    args = (x, weight, float(eps))
    if torch.compiler.is_compiling():
        return torch.ops.pae.token_mix_fwd(*args)[0]
    return _TokenMix.apply(*args)


def prompt_bottleneck(
    u: Tensor,
    gain: Tensor,
    shift: Tensor,
    bias: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str = "relu",
    *,
    channel_mask: Tensor | None = None,
    hidden_mask: Tensor | None = None,
) -> Tensor:
    """g + (act(g down^T) * hidden_mask) up^T, where g = (u * gain + shift) * channel_mask + bias.

    What VAPT does to mixed tokens: LayerNorm's affine part as it looks behind the mixture
    (`shift[p, d]` is sum_n W[p, n] times LayerNorm's bias), channel dropout, the token projection's
    bias, and a bottleneck MLP around which g is added.

    Bytes: u once, the result once; the backward reads u and the gradient twice and writes one
    gradient. Saved: u.

    Args:
        u: (B, P, D) float.
        gain: (D,). shift: (P, D). bias: (P,).
        down: (r, D). up: (D, r). With r = 0 the result is g.
        activation: "relu", "gelu" (exact), "sigmoid" or "softmax" (over r).
        channel_mask: (B, D) factors that zero whole channels of an image, or None.
        hidden_mask: (B, P, r) factors behind the activation, or None.

    Returns:
        (B, P, D) in the dtype of u.

    Gradients: all but the masks, once; those of parameters are summed in fp32 in a fixed order.
    Numerics: fp32 or wider inside.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.

    Source: VAPT (arXiv 2501.18936); formulas of the released code.
    """
    _check_float("u", u, "(B, P, D)", 3)
    batch, count, width = u.shape
    _check_float("down", down, "(r, D)", 2)
    hidden = down.shape[0]
    for name, t, shape in (
        ("gain", gain, (width,)),
        ("shift", shift, (count, width)),
        ("bias", bias, (count,)),
        ("down", down, (hidden, width)),
        ("up", up, (width, hidden)),
        ("channel_mask", channel_mask, (batch, width)),
        ("hidden_mask", hidden_mask, (batch, count, hidden)),
    ):
        if t is None and name.endswith("mask"):
            continue
        _check_float(name, t, str(shape), len(shape))
        _check_shape(name, t, shape, u)
        if name.endswith("mask") and t.requires_grad:
            raise ValueError(f"{name} must not require a gradient: it gets none")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {sorted(reference.ACTIVATIONS)}, got {activation!r}"
        )
    args = (u, gain, shift, bias, down, up, activation, channel_mask, hidden_mask)
    if torch.compiler.is_compiling():
        return torch.ops.pae.prompt_bottleneck_fwd(*args)
    return _PromptBottleneck.apply(*args)


def _says(t) -> str:
    if not isinstance(t, Tensor):
        return type(t).__name__
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def _check_float(name: str, t, shape: str, dims: int) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name} must be a float tensor {shape}, got {_says(t)}")
    if t.dim() != dims:
        raise ValueError(f"{name} must be {shape}, got {_says(t)}")


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(t.shape) != shape or t.device != like.device:
        raise ValueError(f"{name} must be {shape} on {like.device}, got {_says(t)}")


_lib = torch.library.Library("pae", "FRAGMENT")
_lib.define("token_mix_fwd(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")
_lib.define(
    "token_mix_bwd(Tensor d_u, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool need_x) "
    "-> (Tensor, Tensor)"
)
_PARTS = (
    "Tensor u, Tensor gain, Tensor shift, Tensor bias, Tensor down, Tensor up, str activation, "
    "Tensor? channel_mask, Tensor? hidden_mask"
)
_lib.define(f"prompt_bottleneck_fwd({_PARTS}) -> Tensor")
_lib.define(
    f"prompt_bottleneck_bwd(Tensor d_out, {_PARTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _dense(args):
    """Tensors contiguous, so that outputs are, as the fakes below say."""
    return [a.contiguous() if isinstance(a, Tensor) else a for a in args]


def _widest(first, *rest) -> torch.dtype:
    dtype = first.dtype
    for t in rest:
        dtype = torch.promote_types(dtype, t.dtype) if isinstance(t, Tensor) else dtype
    return dtype


# autocast reaches into an op's implementation: products stay in the dtype that came in
def _mix(x, weight, eps):
    with torch.autocast(x.device.type, enabled=False):
        version = backends.choose("token_mix", x.device, _widest(x, weight))
        return version.token_mix(*_dense((x, weight, eps)))


def _mix_backward(d_u, x, weight, *rest):
    with torch.autocast(x.device.type, enabled=False):
        version = backends.choose("token_mix", x.device, _widest(x, weight))
        return version.token_mix_backward(*_dense((d_u, x, weight, *rest)))


def _bottleneck(u, *rest):
    with torch.autocast(u.device.type, enabled=False):
        version = backends.choose("prompt_bottleneck", u.device, _widest(u, *rest))
        return version.prompt_bottleneck(*_dense((u, *rest)))


def _bottleneck_backward(d_out, u, *rest):
    with torch.autocast(u.device.type, enabled=False):
        version = backends.choose("prompt_bottleneck", u.device, _widest(u, *rest))
        return version.prompt_bottleneck_backward(*_dense((d_out, u, *rest)))


for _key in ("CPU", "CUDA"):
    _lib.impl("token_mix_fwd", _mix, _key)
    _lib.impl("token_mix_bwd", _mix_backward, _key)
    _lib.impl("prompt_bottleneck_fwd", _bottleneck, _key)
    _lib.impl("prompt_bottleneck_bwd", _bottleneck_backward, _key)


@torch.library.register_fake("pae::token_mix_fwd", lib=_lib)
def _(x, weight, eps):
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    u = weight.new_empty(x.shape[0], weight.shape[0], x.shape[2])
    mean = x.new_empty(*x.shape[:2], 1, dtype=wide)
    return u, mean, torch.empty_like(mean)


@torch.library.register_fake("pae::token_mix_bwd", lib=_lib)
def _(d_u, x, weight, mean, rstd, need_x):
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape)


@torch.library.register_fake("pae::prompt_bottleneck_fwd", lib=_lib)
def _(u, gain, shift, bias, down, up, activation, channel_mask, hidden_mask):
    return u.new_empty(u.shape)


@torch.library.register_fake("pae::prompt_bottleneck_bwd", lib=_lib)
def _(d_out, u, gain, shift, bias, down, up, activation, channel_mask, hidden_mask):
    return tuple(t.new_empty(t.shape) for t in (u, gain, shift, bias, down, up))


def _save_mix(ctx, inputs, output):
    x, weight, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _mix_grads(ctx, d_u, *_):
    need_x = ctx.needs_input_grad[0]
    d_x, d_weight = torch.ops.pae.token_mix_bwd(d_u, *ctx.saved_tensors, need_x)
    return d_x if need_x else None, d_weight, None


def _save_bottleneck(ctx, inputs, output):
    *tensors, ctx.activation, channel_mask, hidden_mask = inputs
    ctx.save_for_backward(*tensors, channel_mask, hidden_mask)


def _bottleneck_grads(ctx, d_out):
    *tensors, channel_mask, hidden_mask = ctx.saved_tensors
    grads = torch.ops.pae.prompt_bottleneck_bwd(
        d_out, *tensors, ctx.activation, channel_mask, hidden_mask
    )
    return *grads, None, None, None


torch.library.register_autograd("pae::token_mix_fwd", _mix_grads, setup_context=_save_mix, lib=_lib)
torch.library.register_autograd(
    "pae::prompt_bottleneck_fwd", _bottleneck_grads, setup_context=_save_bottleneck, lib=_lib
)


class _TokenMix(torch.autograd.Function):
    """Eager path: the same two ops with a third of `register_autograd`'s cost per call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = torch.ops.pae.token_mix_fwd(*inputs)
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight, *output[1:])
        return output[0]

    backward = staticmethod(once_differentiable(_mix_grads))


class _PromptBottleneck(torch.autograd.Function):
    """Eager path, as above."""

    @staticmethod
    def forward(ctx, *inputs):
        output = torch.ops.pae.prompt_bottleneck_fwd(*inputs)
        _save_bottleneck(ctx, inputs, output)
        return output

    backward = staticmethod(once_differentiable(_bottleneck_grads))
