"""What the work needs at least, in operations and bytes, and what the device was seen to do.

Counts are the same for every row of a group: of the work that no exact version can avoid, each
input read once and each output written once. Products are counted, 2 per multiply-add.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from . import timing

# products of B H N T d multiply-adds: q k and p v; then dv, dp, dq and dk
PRODUCTS = {"forward": 2, "backward": 4, "both": 6}
# tensors of B N D elements: q, k, v, out; then q, k, v, out, d_out read and dq, dk, dv written
PASSES = {"forward": 4, "backward": 8, "both": 12}


def attention_flops(kind: str, batch: int, tokens: int, prompts: int, width: int) -> float:
    """Of image queries over prompt and image keys; `width` is D, all heads together."""
    return 2.0 * PRODUCTS[kind] * batch * tokens * (tokens + prompts) * width


def attention_bytes(
    kind: str, batch: int, tokens: int, prompts: int, width: int, itemsize: int
) -> float:
    """Prompts shared by the batch; their keys and values once each way, their gradients once."""
    prompt_rows = 2 * prompts * width * {"forward": 1, "backward": 2, "both": 3}[kind]
    return float(itemsize * (PASSES[kind] * batch * tokens * width + prompt_rows))


def ceilings(device: torch.device) -> dict[str, float]:
    """Columns `peak_tflops` and `peak_gbps`: an 8192^3 bf16 product on random data, and a copy."""
    return dict(_ceilings(device))


@lru_cache
def _ceilings(device: torch.device) -> tuple[tuple[str, float], ...]:
    side = 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**29, device=device)  # 2 GB, far more than any cache
    target = torch.empty_like(source)
    out = torch.empty_like(a)
    works = {
        "peak_tflops": (lambda: torch.mm(a, b, out=out), 2.0 * side**3 / 1e12),
        "peak_gbps": (lambda: target.copy_(source), 2.0 * source.nbytes / 1e9),
    }
    found = []
    for name, (work, amount) in works.items():
        times = [timing.measure(work, device).device for _ in range(13)][3:]
        found.append((name, amount / sorted(times)[len(times) // 2]))
    return tuple(found)
