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


def errors(
    kind: str, autocast: bool, exact: bool = False, powers: bool = False
) -> dict[str, torch.Tensor]:
    """{engine: (draws, 3)}: errors against fp64 of logits, prompt gradient and head gradient.

    exact: of weights that are numbers of 16 bits. powers: of norms whose scales are powers of two.
    """
    found = {engine: torch.zeros(DRAWS, len(MEASURED)) for engine in ("reference", "fast")}
    dtype = torch.float32 if autocast else torch.bfloat16
    model = prompted(kind)
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator))
                p.copy_(p.bfloat16() if exact else p.float())
                if powers and name.endswith("weight") and "norm" in name:
                    p.copy_(p.abs().log2().round().exp2() * p.sign())
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


def test_what_folding_rounds():
    """The one source of error of the fast engine's own. Under autocast the reference multiplies
    with weights of 16 bits as they are, once they are such numbers; W g, folded, is rounded then as
    all other weights are. With scales g that are powers of two nothing is rounded. With others the
    fast engine is off by what weights of 32 bits cost the reference; a product apart for g would be
    a pass over all rows.
    """
    kind = KINDS["rotation per head, norms of queries and keys"]
    exact, powers = errors(kind, True, exact=True), errors(kind, True, exact=True, powers=True)
    assert_not_worse(powers["fast"], powers["reference"], 1.2, MEASURED)
    assert_not_worse(exact["fast"], errors(kind, True)["reference"], 1.2, MEASURED)
