"""Prompt rows in a token sequence: where they go, and how they leave."""

from __future__ import annotations

import torch
from torch import Tensor


def insert_rows(x: Tensor, rows: Tensor, at: int) -> Tensor:
    """Put `rows` (P, D) or (B, P, D) into `x` (B, N, D) behind its first `at` rows."""
    rows = rows.to(x.dtype).expand(x.shape[0], -1, -1)
    return torch.cat([x[:, :at], rows, x[:, at:]], dim=1)


def cut_rows(x: Tensor, at: int, count: int) -> Tensor:
    """Remove `count` rows behind the first `at`: the inverse of `insert_rows`."""
    if count == 0:
        return x
    return torch.cat([x[:, :at], x[:, at + count :]], dim=1)
