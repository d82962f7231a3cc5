"""The kinds of blocks beside plain ones in 16 bits: the fast engine is off no further than the
reference is, on average over draws.
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.errors import assert_not_worse
from tests.pae.test_timm_kinds import images, prompted
from tests.tiny import error, gradients

DRAWS = 16
MEASURED = ("logits", "prompts.tokens", "head.weight")
KINDS = {
    "rotation, gate and norms before the products": "eva02-b",
    "rotation per head, norms of queries and keys": "mixed with norms of heads",
    "RMSNorm": "sapiens2",
    "a bias, and the class row alone": "beit, one bias",
}


def errors(kind: str, autocast: bool) -> dict[str, torch.Tensor]:
    """{engine: (draws, 3)}: errors against fp64 of logits, prompt gradient and head gradient."""
    found = {engine: torch.zeros(DRAWS, len(MEASURED)) for engine in ("reference", "fast")}
    dtype = torch.float32 if autocast else torch.bfloat16
    model = prompted(kind)
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator))
                p.copy_(p.float())
        x = (images(model.backbone) + 0.1 * seed).float().double()
        truth, truth_grads = gradients(model, x, "reference")
        narrow = copy.deepcopy(model).to(dtype)
        for engine, row in found.items():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits, grads = gradients(narrow, x.to(dtype), engine)
            off = [error(grads[n], truth_grads[n]) for n in MEASURED[1:]]
            row[seed] = torch.tensor([error(logits, truth), *off])
    return found


ROTATED = [name for name in KINDS if name.startswith("rotation")]


@pytest.mark.parametrize(
    "kind, autocast", [*((name, True) for name in KINDS), *((name, False) for name in ROTATED)]
)
def test_as_good_as_the_reference(kind, autocast):
    found = errors(KINDS[kind], autocast)
    assert found["reference"].min() > 1e-5 and found["reference"].max() < 0.5  # it was 16 bits
    assert_not_worse(found["fast"], found["reference"], 1.2, MEASURED)
