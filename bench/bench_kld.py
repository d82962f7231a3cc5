"""The Koopman-Lyapunov regulariser: both terms and their gradients, once per training step.

On a GPU each compiled version has two rows: as the replay of a CUDA graph, which is how
`pae.graphed_step` runs it, and called from Python. The peers cannot be captured: their
decompositions wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import pae

from . import roofline
from .memory import SavedBytes
from .peers import kld as peers
from .rows import checked, compiled, in_version
from .runner import Group, Provider, Runnable, Settings
from .shown import OFFICIAL

DEPTH, WIDTH, PROMPTS = 12, 768, 50
BATCHED = "batched, eigh"
RESULTS = ("consistency", "lyapunov", "d_prompts", "d_lift", "d_K", "d_L")
# of every fp32 row, norm-relative to fp64
LIMITS = {name: 1e-5 if name.startswith("d_") else 1e-6 for name in RESULTS}

Terms = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Regulariser:
    """What all providers share: bound KLD, prompts, and fp64 values of terms and gradients."""

    kld: pae.KLD
    prompts: Tensor
    expected: dict[str, Tensor] = field(default_factory=dict)

    def leaves(self) -> tuple[Tensor, ...]:
        return self.prompts, self.kld.lift.weight, self.kld.K, self.kld.L


def run(terms: Terms, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """[consistency, lyapunov, and the gradient of their sum for every leaf]."""
    for leaf in leaves:
        leaf.grad = None
    consistency, lyapunov = terms(*leaves)
    (consistency + lyapunov).backward()
    return [consistency.detach(), lyapunov.detach(), *(leaf.grad for leaf in leaves)]


def open_regulariser(dim: int, mode: str, device: torch.device) -> Regulariser:
    """Operators some way into training: K = I + 0.05 n, L = I + 0.1 n, spectra not degenerate."""
    generator = torch.Generator().manual_seed(0)
    kld = pae.KLD(dim=dim, mode=mode)
    kld.bind(DEPTH, WIDTH)
    with torch.no_grad():
        for operator, spread in ((kld.K, 0.05), (kld.L, 0.1)):
            operator.add_(torch.randn(operator.shape, generator=generator), alpha=spread)
        lift = torch.randn(kld.lift.weight.shape, generator=generator)
        kld.lift.weight.copy_(lift / WIDTH**0.5)
    prompts = torch.randn(DEPTH, PROMPTS, WIDTH, generator=generator).to(device).requires_grad_()
    shared = Regulariser(kld.to(device), prompts)
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in shared.leaves())
    shared.expected = dict(zip(RESULTS, run(peers.official_style_terms, wide)))
    return shared


def prepare(terms: Terms | None, version: str, capture: bool, shared: Regulariser) -> Runnable:
    """`terms`, or ours with None; with a `version` of the op where it is named."""
    leaves = shared.leaves()
    work = partial(run, terms or (lambda prompts, *_: shared.kld.terms(prompts)), leaves)
    if version:
        work = in_version(version, "koopman_losses", shared.prompts, work)
    flops = roofline.koopman_flops(DEPTH, PROMPTS, WIDTH, shared.kld.K.shape[-1])

    def check() -> dict[str, float]:
        with SavedBytes(leaves) as saved:
            got = work()
        return checked(got, shared.expected, LIMITS) | {
            "saved_mb": saved.activations / 1e6,
            "live_gflop": flops / 1e9,
            "floor_mb": 2 * sum(leaf.nbytes for leaf in leaves) / 1e6,
        }

    return Runnable(work, check, capture=capture)


def start_compiled(shared: Regulariser) -> Runnable:
    terms = compiled(peers.official_style_terms, lambda terms: run(terms, shared.leaves()))
    return prepare(terms, "", False, shared)


# row -> version of the op, "" for what would run, and whether it is a graph's replay
ON_CPU = {"pae": ("", False)}
ON_GPU = {
    "pae, CUDA graph": ("cuda", True),
    "pae, CUDA": ("cuda", False),
    "pae, Triton graph": ("triton", True),
    "pae, Triton": ("triton", False),
    "pae, reference": ("reference", False),
}


def groups(settings: Settings) -> list[Group]:
    """All groups of this file; those outside the chosen size carry a reason."""
    if settings.size == "smoke":
        return [group(8, mode, settings) for mode in ("global", "layerwise")]
    return [
        group(256, "global", settings),
        group(1024, "global", settings, settings.why_not_size(False, True)),
        group(256, "layerwise", settings, settings.why_not_size(False, False)),
    ]


def group(dim: int, mode: str, settings: Settings, left_out: str = "") -> Group:
    slow = settings.why_not_compile(settings.size == "smoke" and mode == "global")
    ours = ON_GPU if settings.on_gpu else ON_CPU
    return Group(
        name=f"kld/{mode}/k{dim}/P{PROMPTS}",
        open=lambda: open_regulariser(dim, mode, settings.device),
        providers=[
            Provider(OFFICIAL, partial(prepare, peers.official_style_terms, "", False)),
            Provider(f"{OFFICIAL}, compiled", start_compiled, left_out=slow),
            Provider(BATCHED, partial(prepare, peers.batched_eigh_terms, "", False)),
            *(Provider(name, partial(prepare, None, *how)) for name, how in ours.items()),
        ],
        baselines=(OFFICIAL, BATCHED),
        rounds=(3, 15, 5, 25)[2 * settings.on_gpu + (dim <= 512)],
        unit="forward and backward",
        left_out=left_out,
    )


def test_kld(benchmark, replay):
    replay(benchmark)
