"""`koopman_losses` in CUDA C++: allocates, fills the structs of `csrc/pae.h`, calls. The kernels
and their cost are in `csrc/koopman.cuh`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpus, native
from . import spectral, tiles

_SIZES = {
    **dict.fromkeys(("layerwise", "code", "gauge"), native.INT32),
    **dict.fromkeys(("runs", "blocks", "prompts", "width", "k"), native.INT64),
}
_INPUTS = dict.fromkeys(("prompts_in", "lift", "K", "L"), native.POINTER)
_SAVED = dict.fromkeys(
    ("states", "predicted", "images", "pull", "radial", "spin", "left", "right", "statistics"),
    native.POINTER,
)
_GRADIENTS = dict.fromkeys(("d_prompts", "d_lift", "d_K", "d_L"), native.POINTER)

_Forward = native.params(
    "koopman_fwd",
    **_SIZES,
    **_INPUTS,
    consistency=native.POINTER,
    lyapunov=native.POINTER,
    **_SAVED,
    workspace=native.POINTER,
    workspace_floats=native.INT64,
    tile=native.INT32,
    square_tile=native.INT32,
    squarings=native.INT32,
    settled=native.FLOAT32,
    settled_first=native.FLOAT32,
    eps=native.FLOAT32,
)
_Backward = native.params(
    "koopman_bwd",
    **_SIZES,
    d_consistency=native.POINTER,
    d_lyapunov=native.POINTER,
    **_INPUTS,
    **_SAVED,
    **_GRADIENTS,
    **dict.fromkeys(("d_states", "d_points"), native.POINTER),
    tile=native.INT32,
    input_tile=native.INT32,
)


def _sizes(prompts: Tensor, lift: Tensor, K: Tensor, formulation: str, eps: float | None) -> dict:
    runs, blocks, count, width = prompts.shape
    return {
        "layerwise": K.dim() == 4,
        "code": formulation == "code",
        "gauge": eps is not None,
        "runs": runs,
        "blocks": blocks,
        "prompts": count,
        "width": width,
        "k": lift.shape[1],
    }


def forward(
    prompts: Tensor, lift: Tensor, K: Tensor, L: Tensor, formulation: str, eps: float | None
) -> tuple[Tensor, ...]:
    """Same contract as the reference's."""
    prompts, lift, K, L = (t.contiguous() for t in (prompts, lift, K, L))
    sizes = _sizes(prompts, lift, K, formulation, eps)
    runs, blocks, count, k = (sizes[name] for name in ("runs", "blocks", "prompts", "k"))
    pairs, code = max(blocks - 1, 0), sizes["code"]
    groups = pairs if sizes["layerwise"] else 1
    new = prompts.new_empty
    made = new if code and pairs else prompts.new_zeros  # without V's norm these are 0
    saved = {
        "states": new(runs, blocks, count, k),
        "predicted": new(runs, pairs, count, k),
        "images": new(runs, pairs, 2 * count, k),
        "pull": new(runs, pairs, 2 * count),
        "radial": new(runs, pairs, 2 * count),
        "spin": made(runs, groups, 2),
        "left": made(runs, groups, k),
        "right": made(runs, groups, k),
        "statistics": new(0) if eps is None else new(runs, blocks, count, 2),
    }
    if not pairs:
        nothing = prompts.new_zeros(2, runs)
        saved["states"].zero_(), saved["statistics"].zero_()
        return nothing[0].clone(), nothing[1], *saved.values()

    tile = tiles.product(runs * blocks * count, k)
    square = tiles.square(k, runs * groups, gpus.of(prompts.device).multiprocessors)
    consistency, lyapunov = new(runs), new(runs)
    params = _Forward(
        **sizes,
        prompts_in=prompts,
        lift=lift,
        K=K,
        L=L,
        consistency=consistency,
        lyapunov=lyapunov,
        **saved,
        tile=tile,
        square_tile=square,
        squarings=spectral.SQUARINGS,
        settled=spectral.SETTLED,
        settled_first=spectral.SETTLED_FIRST,
        eps=eps or 0.0,
    )
    native.call("pae_koopman_workspace", params, prompts.device)
    workspace = new(params.workspace_floats)
    params.workspace = workspace.data_ptr()
    native.call("pae_koopman_fwd", params, prompts.device)
    return consistency, lyapunov, *saved.values()


def backward(
    d_consistency: Tensor,
    d_lyapunov: Tensor,
    prompts: Tensor,
    lift: Tensor,
    K: Tensor,
    L: Tensor,
    formulation: str,
    eps: float | None,
    *saved: Tensor,
) -> tuple[Tensor, ...]:
    """Same contract as the reference's."""
    sizes = _sizes(prompts, lift, K, formulation, eps)
    inputs = [t.contiguous() for t in (prompts, lift, K, L)]
    if sizes["blocks"] < 2:
        return tuple(torch.zeros_like(t) for t in inputs)
    gradients = [torch.empty_like(t) for t in inputs]
    kept = dict(zip(_SAVED, saved, strict=True))
    d_states, d_points = torch.empty_like(kept["states"]), torch.empty_like(kept["images"])
    d_consistency, d_lyapunov = d_consistency.contiguous(), d_lyapunov.contiguous()
    params = _Backward(
        **sizes,
        d_consistency=d_consistency,
        d_lyapunov=d_lyapunov,
        **dict(zip(_INPUTS, inputs)),
        **kept,
        **dict(zip(_GRADIENTS, gradients)),
        d_states=d_states,
        d_points=d_points,
        tile=tiles.product(sizes["runs"] * sizes["blocks"] * sizes["prompts"], sizes["k"]),
        input_tile=tiles.gradient(sum(g.numel() for g in gradients)),
    )
    native.call("pae_koopman_bwd", params, prompts.device)
    return tuple(gradients)
