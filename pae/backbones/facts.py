"""What a backbone computes that none of its weights says: heads, activation, eps, which rows the
readout reads. Two backbones of the same weights and other facts are two functions; a file of
trained parts knows those that they were trained on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from .view import BackboneView, BlocksView, BlockWeights, Norm, added_to, evaluating, random_rows

ROWS = 4  # of the image, that the readout is shown behind the prefix
SHOWN = 8  # features of each of two images that are kept
NEAR = 0.1  # relative: 16 bits round less, and another readout of the same weights is further away


def facts_of(view: BlocksView, trained: Collection[str] = ()) -> dict[str, Any]:
    """As plain JSON values: "blocks", one entry per block, or a single one where all are alike, and
    of an image tower "readout", features of fixed rows. Without what cannot be known: blocks whose
    formula nobody can read, a readout that somebody watches or trains.

    Args:
        trained: names of the backbone's parameters that are.
    """
    found: dict[str, Any] = {}
    if view.unproved is None:
        blocks = [_of_block(view.read_block(i)) for i in range(len(view.blocks))]
        same = all(block == blocks[0] for block in blocks)
        found["blocks"] = blocks[:1] if same else blocks
    if isinstance(view, BackboneView) and (readout := _of_readout(view, trained)) is not None:
        found["readout"] = readout
    return found


def difference(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """The first fact in which both differ, in words: theirs, then one's own. What one of them does
    not say is no difference.
    """
    pairs = zip(theirs.get("blocks", ()), own.get("blocks", ()))
    if len(theirs.get("blocks", ())) == len(own.get("blocks", ())):
        for number, (a, b) in enumerate(pairs):
            for name in {**a, **b}:
                if a.get(name) != b.get(name):
                    where = f"of block {number} " if len(own["blocks"]) > 1 else ""
                    return (
                        f"{name} {where}{_said(a.get(name))}, and here it is {_said(b.get(name))}"
                    )
    elif theirs.get("blocks") and own.get("blocks"):
        return "blocks that are alike, and here they are not (or the other way round)"
    a, b = (torch.tensor(facts.get("readout", []), dtype=torch.float64) for facts in (theirs, own))
    if a.numel() and b.numel() and not (a.shape == b.shape and _near(a, b)):
        return "another readout of the last block's rows (global_pool, or the norm behind it)"
    return None


def are_facts(value: Any) -> bool:
    """Whether a file's are of the form that `difference` reads."""
    if not isinstance(value, dict):
        return False
    blocks, readout = value.get("blocks", []), value.get("readout", [])
    rows = isinstance(readout, list) and all(isinstance(row, list) for row in readout)
    numbers = rows and all(type(v) in (int, float) for row in readout for v in row)
    alike = rows and len({len(row) for row in readout}) <= 1
    return (
        isinstance(blocks, list) and all(isinstance(b, dict) for b in blocks) and numbers and alike
    )


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= NEAR * torch.maximum(a.norm(), b.norm()))


def _of_block(w: BlockWeights) -> dict[str, Any]:
    plain = {name: getattr(w, name) for name in ("num_heads", "activation", "rotation")}
    plain |= {"scale": float(w.scale), "gated": w.gated, "parallel": w.parallel}
    for field in fields(w):
        part = getattr(w, field.name)
        if isinstance(part, Norm):
            plain[f"{field.name} ({part.kind})"] = part.eps
    return plain


def _of_readout(view: BackboneView, trained: Collection[str]) -> list[list[float]] | None:
    """(2, SHOWN): of two images' rows, in three digits."""
    like, module = view.like, view.module
    parts = [part for part in view.readout_parts if isinstance(part, nn.Module)]
    watched = any(added_to(part) for whole in parts for part in whole.modules())
    blocks = {id(p) for block in view.blocks for p in block.parameters()}
    of_blocks = {name for name, p in module.named_parameters() if id(p) in blocks}
    if like.device.type == "meta" or watched or set(trained) - of_blocks:
        return None
    size = 2, view.num_prefix_tokens + ROWS, view.shape.block_widths[-1]
    rows = random_rows(*size).to(like)
    try:
        with evaluating(module), torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            features = view.readout(rows).flatten(1)[:, :SHOWN].double().cpu()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None  # it reads more than rows
    if not bool(features.isfinite().all()):
        return None
    return [[float(f"{value:.3g}") for value in row] for row in features.tolist()]
