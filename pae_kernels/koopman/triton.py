"""`koopman_losses` in Triton, fp32, for machines without nvcc: the steps of `csrc/koopman.cuh`.

One program makes one square tile of an output, 16, 32 or 64 wide (`tiles`), over the whole depth of
the product; what stands before and behind the product is fused into it. `input_precision="ieee"`
everywhere: FMAs, no TF32. Reductions across programs are left as partial sums that the next launch
adds in a fixed order.

forward   lift (LayerNorm and row norms), scale, predict, split, images, 24 squarings, vector, pair,
          total: 32 launches, 5 for "paper"
backward  points, states, prompts, three outer products, LayerNorm's: 6 launches, 7 with the gauge

Where csrc/koopman.cuh lays independent steps side by side in one launch, here they follow each
other, and a tile's depth is not shared by groups of warps, so a squaring at k = 256 lasts about
twice as long. At 11 blocks x 50 prompts, D = 768, k = 256 latency decides, not bytes or products:
12 active squarings, 11 settled ones in a quarter of their time, and the other launches. Without a
graph the host's launches are what counts, several times as long: capture the step
(`pae.graphed_step`) or build the CUDA version.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ahead_of_time import MULTIPROCESSORS, OPTIONS, Launch
from ..launching import Launcher, power_of_2, programs
from . import tiles
from .triton_kernels import (
    COUNTS,
    koopman_bwd_gauge_kernel,
    koopman_bwd_lift_kernel,
    koopman_bwd_operators_kernel,
    koopman_bwd_points_kernel,
    koopman_bwd_prompts_kernel,
    koopman_bwd_states_kernel,
    koopman_image_kernel,
    koopman_lift_kernel,
    koopman_pair_kernel,
    koopman_predict_kernel,
    koopman_total_kernel,
)
from .triton_spectral import STEPS, product, spectral_launches, spectral_norm

_lift = Launcher(koopman_lift_kernel)
_predict = Launcher(koopman_predict_kernel)
_image = Launcher(koopman_image_kernel)
_pair = Launcher(koopman_pair_kernel)
_total = Launcher(koopman_total_kernel)
_points_backward = Launcher(koopman_bwd_points_kernel)
_states_backward = Launcher(koopman_bwd_states_kernel)
_prompts_backward = Launcher(koopman_bwd_prompts_kernel)
_lift_backward = Launcher(koopman_bwd_lift_kernel)
_operators_backward = Launcher(koopman_bwd_operators_kernel)
_gauge_backward = Launcher(koopman_bwd_gauge_kernel)


def _tiles(rows: int, columns: int, block: int) -> int:
    return programs(rows, block) * programs(columns, block)


def _gauge_rows(width: int) -> dict:
    """Rows of a program and its warps: 4096 padded entries."""
    wide = power_of_2(width)
    warps = {"num_warps": 4 if wide <= 4096 else 8}
    return {"BLOCK_D": wide, "ROWS": max(1, 4096 // wide), **warps, **OPTIONS}


class _Sizes:
    """Sizes of a call, as the kernels name them."""

    def __init__(self, prompts: Tensor, lift: Tensor, K: Tensor, formulation: str) -> None:
        self.runs, self.blocks, self.prompts, self.width = prompts.shape
        self.k, self.pairs = lift.shape[1], max(self.blocks - 1, 0)
        self.layerwise, self.code = K.dim() == 4, formulation == "code"
        self.groups = self.pairs if self.layerwise else 1
        self.stack = self.blocks if self.layerwise else 1
        self.rows = self.blocks * self.prompts  # of a run
        self.now_rows = (1 if self.layerwise else self.pairs) * self.prompts  # of an operator
        self.matrices = self.runs * self.groups
        self.share = 1 / (self.prompts * self.k) if self.code else 1.0
        self.block = tiles.product(self.runs * self.rows, self.k)


def forward(
    prompts: Tensor, lift: Tensor, K: Tensor, L: Tensor, formulation: str, eps: float | None
) -> tuple[Tensor, ...]:
    """Same contract as the reference's."""
    prompts, lift, K, L = (t.contiguous() for t in (prompts, lift, K, L))
    n = _Sizes(prompts, lift, K, formulation)
    new = prompts.new_empty
    made = new if n.code and n.pairs else prompts.new_zeros  # without V's norm these are 0
    states = new(n.runs, n.blocks, n.prompts, n.k)
    predicted = new(n.runs, n.pairs, n.prompts, n.k)
    images = new(n.runs, n.pairs, 2 * n.prompts, n.k)
    pull, radial = new(images.shape[:3]), new(images.shape[:3])
    spin, left, right = (
        made(n.runs, n.groups, tail) for tail in (2, n.k, n.k)
    )  # fmt: skip
    statistics = new(0) if eps is None else new(n.runs, n.blocks, n.prompts, 2)
    saved = states, predicted, images, pull, radial, spin, left, right, statistics
    if not n.pairs:
        states.zero_(), statistics.zero_()
        return prompts.new_zeros(n.runs), prompts.new_zeros(n.runs), *saved

    chunks = programs(n.k, n.block)
    state_squares = new(*states.shape[:3], chunks)
    predicted_squares = new(*predicted.shape[:3], chunks)
    image_squares = new(*images.shape[:3], chunks)
    error_tiles = _tiles(n.now_rows, n.k, n.block)
    errors = new(n.matrices, error_tiles)
    parts = new(n.runs, n.pairs, 2)
    consistency, lyapunov = new(n.runs), new(n.runs)
    image = scales = settled = statistics  # none is looked at in "paper"
    tiling, device = product(n.block), prompts.device
    with_code = {"CODE": n.code, **tiling}
    _lift(
        (_tiles(n.rows, n.k, n.block), n.runs),
        device,
        (prompts, lift, states, statistics, state_squares, n.rows, n.k, n.width, chunks,
         eps or 0.0),
        {"GAUGE": eps is not None, **tiling},
    )  # fmt: skip
    _predict(
        (error_tiles, n.matrices),
        device,
        (states, K, predicted, predicted_squares, errors, n.now_rows, n.k, n.prompts, n.pairs,
         n.blocks, n.groups, n.stack, chunks),
        tiling,
    )  # fmt: skip
    if n.code:
        image, scales, settled = spectral_norm(L, right, n.groups, n.stack)
    _image(
        (_tiles(2 * n.now_rows, n.k, n.block), n.matrices),
        device,
        (states, predicted, L, scales, images, image_squares, 2 * n.now_rows, n.k, n.prompts,
         n.pairs, n.blocks, n.groups, n.stack, chunks),
        with_code,
    )  # fmt: skip
    _pair(
        (n.pairs, n.runs),
        device,
        (state_squares, predicted_squares, image_squares, scales, image, settled,
         pull, radial, spin, left, parts, n.k, n.prompts, n.pairs, n.blocks, n.groups, chunks),
        {"STEPS": STEPS, "CODE": n.code, "BLOCK_P": power_of_2(n.prompts),
         "BLOCK_K": power_of_2(n.k), "num_warps": 4, **OPTIONS},
    )  # fmt: skip
    _total(
        n.runs,
        device,
        (parts, errors, consistency, lyapunov, spin, n.pairs, n.groups, n.groups * error_tiles,
         n.share),
        {"CODE": n.code, "BLOCK": 128, "num_warps": 4, **OPTIONS},
    )  # fmt: skip
    return consistency, lyapunov, *saved


def backward(
    d_consistency: Tensor,
    d_lyapunov: Tensor,
    prompts: Tensor,
    lift: Tensor,
    K: Tensor,
    L: Tensor,
    formulation: str,
    eps: float | None,
    states: Tensor,
    predicted: Tensor,
    images: Tensor,
    pull: Tensor,
    radial: Tensor,
    spin: Tensor,
    left: Tensor,
    right: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, ...]:
    """Same contract as the reference's."""
    prompts, lift, K, L = inputs = [t.contiguous() for t in (prompts, lift, K, L)]
    n = _Sizes(prompts, lift, K, formulation)
    if not n.pairs:
        return tuple(torch.zeros_like(t) for t in inputs)
    d_prompts, d_lift, d_K, d_L = (torch.empty_like(t) for t in inputs)
    d_states, d_points = torch.empty_like(states), torch.empty_like(images)
    d_rows = d_prompts if eps is None else torch.empty_like(prompts)
    d_consistency, d_lyapunov = d_consistency.contiguous(), d_lyapunov.contiguous()
    device, with_code = prompts.device, {"CODE": n.code, **product(n.block)}
    _points_backward(
        (_tiles(2 * n.now_rows, n.k, n.block), n.matrices),
        device,
        (d_consistency, d_lyapunov, states, predicted, images, pull, radial, L, d_points,
         2 * n.now_rows, n.k, n.prompts, n.pairs, n.blocks, n.groups, n.stack, n.share),
        with_code,
    )  # fmt: skip
    rows = n.prompts if n.layerwise else n.rows
    _states_backward(
        (_tiles(rows, n.k, n.block), n.runs * n.stack),
        device,
        (d_consistency, states, predicted, d_points, K, d_states, rows, n.k, n.prompts, n.pairs,
         n.blocks, n.stack, n.share),
        with_code,
    )  # fmt: skip
    tiling = product(tiles.gradient(d_prompts.numel()))
    given: tuple = d_states, lift, d_rows, n.rows, n.k, n.width
    _prompts_backward((_tiles(n.rows, n.width, tiling["BLOCK"]), n.runs), device, given, tiling)
    tiling = {"GAUGE": eps is not None, **product(tiles.gradient(d_lift.numel()))}
    given = d_states, prompts, statistics, d_lift, n.rows, n.k, n.width
    _lift_backward((_tiles(n.k, n.width, tiling["BLOCK"]), n.runs), device, given, tiling)
    tiling = {"CODE": n.code, **product(tiles.gradient(d_K.numel()))}
    grid = _tiles(n.k, n.k, tiling["BLOCK"]), n.runs * n.stack
    for of_L, rows in ((False, n.now_rows), (True, 2 * n.now_rows)):
        _operators_backward(
            grid,
            device,
            (d_consistency, d_lyapunov, states, predicted, images, pull, spin, left, right,
             L, d_points, d_K, d_L, rows, n.k, n.prompts, n.pairs, n.blocks, n.groups, n.stack,
             n.share),
            {"OF_L": of_L, **tiling},
        )  # fmt: skip
    if eps is not None:
        count, tile = n.runs * n.rows, _gauge_rows(n.width)
        given = prompts, statistics, d_rows, d_prompts, count, n.width
        _gauge_backward(programs(count, tile["ROWS"]), device, given, tile)
    return d_prompts, d_lift, d_K, d_L


# ---- ahead of time

_INTEGERS = (*COUNTS, "k", "width", "side", "count", "q")
_FLOATS = ("eps", "share", "below")


def _launch(label: str, kernel, aligned: tuple[str, ...], **options) -> Launch:
    """`kernel` with these compile-time constants, `num_warps` and `num_stages`."""
    constants = {name: v for name, v in options.items() if name in kernel.arg_names}
    types = {}
    for name in kernel.arg_names:
        kind = "i32" if name in _INTEGERS else "fp32" if name in _FLOATS else "*fp32"
        types[name] = "*i32" if name == "settled" else kind
    return Launch(
        f"{label} fp32",
        kernel,
        types,
        constants,
        options.get("num_warps", 4),
        options.get("num_stages", 3),
        tuple(name for name in aligned if name in kernel.arg_names),
    )


def _launches(k: int, width: int, count: int, block: int, square: int, code: bool, gauge: bool):
    """Every kernel of a forward and a backward of 11 blocks."""
    aligned = tuple(n for n, size in (("k", k), ("width", width)) if size % 16 == 0)
    tiled = {"CODE": code, "GAUGE": gauge, **product(block)}
    flat = {
        "CODE": code,
        "STEPS": STEPS,
        "BLOCK_P": power_of_2(count),
        "BLOCK_K": power_of_2(k),
    }
    name = f"k{k} {'code' if code else 'paper'}"
    made = [
        _launch(f"koopman {what} {name} {block}", kernel, aligned, **tiled)
        for what, kernel in (
            ("lift", koopman_lift_kernel),
            ("predict", koopman_predict_kernel),
            ("image", koopman_image_kernel),
            ("bwd points", koopman_bwd_points_kernel),
            ("bwd states", koopman_bwd_states_kernel),
        )
    ]
    for what, kernel, outputs, options in (
        ("prompts", koopman_bwd_prompts_kernel, 11 * count * width, {}),
        ("lift", koopman_bwd_lift_kernel, k * width, {}),
        ("K", koopman_bwd_operators_kernel, k * k, {"OF_L": False}),
        ("L", koopman_bwd_operators_kernel, k * k, {"OF_L": True}),
    ):
        side = tiles.gradient(outputs)
        options |= tiled | product(side)
        made.append(_launch(f"koopman bwd {what} {name} {side}", kernel, aligned, **options))
    made += [
        _launch(f"koopman pair {name}", koopman_pair_kernel, aligned, **flat),
        _launch(f"koopman total {name}", koopman_total_kernel, aligned, CODE=code, BLOCK=128),
    ]
    if gauge:
        made.append(
            _launch(
                f"koopman bwd gauge {name}", koopman_bwd_gauge_kernel, aligned, **_gauge_rows(width)
            )
        )
    if code:
        made += [
            _launch(f"koopman {what} k{k} {square}", kernel, aligned, **options)
            for what, kernel, options in spectral_launches(k, square)
        ]
    return made


def shipped_launches(architecture: int) -> list[Launch]:
    """The paper's setting at 50 prompts in ViT-B, in the tiles that it gets."""
    square = tiles.square(256, 1, MULTIPROCESSORS[architecture])
    return _launches(256, 768, 50, tiles.product(550, 256), square, True, False)


def variant_launches(architecture: int) -> list[Launch]:
    """The released code's default width, the gauge, "paper", and sizes that align nothing."""
    square = tiles.square(1024, 1, MULTIPROCESSORS[architecture])
    wide = _launches(1024, 768, 50, tiles.product(550, 1024), square, True, True)
    odd = _launches(33, 50, 7, 16, 16, False, True)
    rare = ("lift", "gauge", "split", "square", "vector")
    return [
        *(launch for launch in wide if any(word in launch.label for word in rare)),
        *(launch for launch in odd if not any(word in launch.label for word in rare)),
    ]
