"""The ops `token_mix` and `prompt_bottleneck`: signatures, checks, declarations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, registration
from ..checks import describe
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

    Gradients: x and weight; further ones are those of `reference`. The latter is summed over the
    batch in fp32 in a fixed order.
    Numerics: statistics in fp32 or wider, products with fp32 accumulation, exact for fp32 inputs.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.

    Source: VAPT (arXiv 2501.18936), its LayerNorm, convolution and token projection folded.
    """
    _float("x", x, "(B, N, D)", 3)
    _float("weight", weight, "(P, N)", 2)
    _check_shape("weight", weight, (weight.shape[0], x.shape[1]), x)
    if x.shape[-1] == 0:
        raise ValueError(f"x must have D >= 1, got {describe(x)}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps > 0:
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    return _token_mix(x, weight, float(eps))


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

    Gradients: all but the masks; further ones are those of `reference`. Those of parameters are
    summed in fp32 in a fixed order.
    Numerics: fp32 or wider inside.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.

    Source: VAPT (arXiv 2501.18936); formulas of the released code.
    """
    _float("u", u, "(B, P, D)", 3)
    batch, count, width = u.shape
    _float("down", down, "(r, D)", 2)
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
        t = _float(name, t, str(shape), len(shape))
        _check_shape(name, t, shape, u)
        if name.endswith("mask") and t.requires_grad:
            raise ValueError(f"{name} must not require a gradient: it gets none")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {sorted(reference.ACTIVATIONS)}, got {activation!r}"
        )
    return _prompt_bottleneck(u, gain, shift, bias, down, up, activation, channel_mask, hidden_mask)


def _float(name: str, t: Any, shape: str, dims: int) -> Tensor:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name} must be a float tensor {shape}, got {describe(t)}")
    if t.dim() != dims:
        raise ValueError(f"{name} must be {shape}, got {describe(t)}")
    return t


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(t.shape) != shape or t.device != like.device:
        raise ValueError(f"{name} must be {shape} on {like.device}, got {describe(t)}")


def _mixed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    u = weight.new_empty(x.shape[0], weight.shape[0], x.shape[2])
    wide = torch.promote_types(registration.widest(x, weight), torch.float32)
    mean, rstd = (x.new_empty(*x.shape[:2], 1, dtype=wide) for _ in range(2))
    return u, mean, rstd


_token_mix = registration.differentiable(
    "token_mix",
    "(Tensor x, Tensor weight, float eps) -> (Tensor u, Tensor mean, Tensor rstd)",
    "(Tensor d_u, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool need_x) "
    "-> (Tensor d_x, Tensor d_weight)",
    run=("token_mix", "token_mix_backward"),
    fake=_mixed,
    definition=lambda *given: reference.token_mix(*given)[0],
    returned=1,
    dtype=registration.widest,
)
_PARTS = (
    "Tensor u, Tensor gain, Tensor shift, Tensor bias, Tensor down, Tensor up, str activation, "
    "Tensor? channel_mask, Tensor? hidden_mask"
)
_prompt_bottleneck = registration.differentiable(
    "prompt_bottleneck",
    f"({_PARTS}) -> (Tensor out)",
    f"(Tensor d_out, {_PARTS}) -> (Tensor d_u, Tensor d_gain, Tensor d_shift, Tensor d_bias, "
    "Tensor d_down, Tensor d_up)",
    run=("prompt_bottleneck", "prompt_bottleneck_backward"),
    fake=lambda u, *_: u.new_empty(u.shape),
    definition=reference.prompt_bottleneck,
    dtype=registration.widest,
)
