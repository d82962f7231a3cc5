"""What the work needs at least, in operations and bytes, and what the machine was seen to do.

Counts are the same for every row of a group: of the work that no exact version can avoid, each
input read once and each output written once. Products are counted, 2 per multiply-add.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from . import timing

# products of B H N T d multiply-adds: q k and p v; then dv, dp, dq and dk
PRODUCTS = {"forward": 2, "backward": 4, "both": 6}
# tensors of B N D elements: q, k, v, out; then q, k, v, out, d_out read and dq, dk, dv written
PASSES = {"forward": 4, "backward": 8, "both": 12}


def attention_flops(
    kind: str, batch: int, tokens: int, prompts: int, width: int, causal: bool = False
) -> float:
    """Of image queries over prompt and image keys; `width` is D, all heads together."""
    seen = (tokens + 1) / 2 if causal else tokens
    return 2.0 * PRODUCTS[kind] * batch * tokens * (seen + prompts) * width


def attention_bytes(
    kind: str, batch: int, tokens: int, prompts: int, width: int, itemsize: int
) -> float:
    """Prompts shared by the batch; their keys and values once each way, their gradients once."""
    prompt_rows = 2 * prompts * width * {"forward": 1, "backward": 2, "both": 3}[kind]
    return float(itemsize * (PASSES[kind] * batch * tokens * width + prompt_rows))


def koopman_flops(depth: int, prompts: int, width: int, dim: int) -> float:
    """Of both terms of the regulariser and their gradients: the lift of all blocks but the first,
    K of all blocks in a pair, L of those and of what K makes of them; each thrice, as both factors
    have a gradient. Spectral norms are not in it: how many products they take is a choice.
    """
    lifted, pairs = (depth - 1) * prompts, (depth - 2) * prompts
    return 3 * 2.0 * (lifted * width * dim + 3 * pairs * dim * dim)


@lru_cache  # asking a processor takes a second
def _processor() -> dict[str, Any]:
    from cpuinfo import get_cpu_info  # comes with pytest-benchmark

    return get_cpu_info()


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor().get("brand_raw", platform.processor() or "unknown CPU")


def bf16_instructions() -> list[str]:
    """What the processor multiplies bf16 with; products are several times as fast with "amx_bf16",
    with "avx512_bf16" alone hardly faster than in fp32, if at all.
    """
    return [flag for flag in _processor().get("flags", ()) if "bf16" in flag]


# ---- ceilings: what is measured in the session itself, once, when a row first needs it

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDE = {"cuda": 8192, "cpu": 1024}  # of a square product
COPIED = {"cuda": 2**31, "cpu": 2**27}  # bytes: more than any cache; 128 MB on a CPU
RUNS, SECONDS = 10, 0.4  # of each, whichever ends first, but three at least

_measured: dict[tuple[str, torch.device, str], float] = {}


def product_tflops(dtype: str, device: torch.device, clock: str) -> float:
    """TFLOP/s of a large product of random matrices in `dtype`, a key of `DTYPES`."""
    return _once(f"{dtype} product TFLOP/s", device, clock, lambda: _product(dtype, device))


def copy_gbps(device: torch.device, clock: str) -> float:
    """GB/s, read and written, of a copy that no cache holds."""
    return _once("copy GB/s", device, clock, lambda: _copy(device))


def measured() -> dict[str, float]:
    """All ceilings measured so far, to three digits, by name."""
    return {name: float(f"{value:.3g}") for (name, _, _), value in sorted(_measured.items())}


Work = tuple[Callable[[], object], float]  # and the amount that one call does


def _product(dtype: str, device: torch.device) -> Work:
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * side**3 / 1e12


def _copy(device: torch.device) -> Work:
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * source.nbytes / 1e9


def _once(name: str, device: torch.device, clock: str, prepare: Callable[[], Work]) -> float:
    key = name, device, clock
    if key not in _measured:
        work, amount = prepare()
        for _ in range(3 if device.type == "cuda" else 1):  # pages, plans and clocks come up
            work()
        seconds: list[float] = []
        end = time.monotonic() + SECONDS
        while len(seconds) < 3 or (len(seconds) < RUNS and time.monotonic() < end):
            seconds.append(timing.measure(work, device).seconds(clock))
        _measured[key] = amount / sorted(seconds)[len(seconds) // 2]
    return _measured[key]
