"""The Koopman-Lyapunov regulariser: both terms and their gradients, once per training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import pae

from . import peers_kld
from .contest import Contestant, Group, Provider, Settings, Unavailable, relative

DEPTH, WIDTH, PROMPTS = 12, 768, 50
OFFICIAL, BATCHED = "official-style", "batched, eigh"
VALUE_LIMIT, GRADIENT_LIMIT = 1e-6, 1e-5  # of every fp32 row, norm-relative to fp64

Terms = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Regulariser:
    """What all providers share: bound KLD, prompts, and fp64 values of terms and gradients."""

    kld: pae.KLD
    prompts: Tensor
    expected: list[Tensor]

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
    shared = Regulariser(kld.to(device), prompts, [])
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in shared.leaves())
    shared.expected = run(peers_kld.official_style_terms, wide)
    return shared


def contestant(shared: Regulariser, terms: Terms) -> Contestant:
    def work() -> list[Tensor]:
        return run(terms, shared.leaves())

    def check() -> dict[str, float]:
        errors = [relative(got, want) for got, want in zip(work(), shared.expected)]
        value, gradient = max(errors[:2]), max(errors[2:])
        assert value <= VALUE_LIMIT, f"terms are off by {value:.1e}, more than {VALUE_LIMIT}"
        assert gradient <= GRADIENT_LIMIT, (
            f"gradients are off by {gradient:.1e}, more than {GRADIENT_LIMIT}"
        )
        return {"value_error": value, "gradient_error": gradient}

    return Contestant(work, check)


def start_compiled(shared: Regulariser) -> Contestant:
    torch._dynamo.reset()
    compiled = torch.compile(peers_kld.official_style_terms)
    try:
        run(compiled, shared.leaves())
    except Exception as error:  # whatever stops the compiler is no fault of the regulariser
        raise Unavailable.because("torch.compile", error) from error
    return contestant(shared, compiled)


def groups(settings: Settings) -> list[Group]:
    """All groups of this file; those outside the chosen size carry a reason."""
    if settings.size == "smoke":
        return [group(8, mode, settings) for mode in ("global", "layerwise")]
    cases = [(256, "global"), (1024, "global"), (256, "layerwise")]
    chosen = {"quick": cases[:1], "default": cases[:2], "full": cases}[settings.size]
    return [group(*case, settings, "" if case in chosen else "runs with --full") for case in cases]


def group(dim: int, mode: str, settings: Settings, left_out: str = "") -> Group:
    slow = settings.why_not_compile(settings.size == "smoke" and mode == "global")
    return Group(
        name=f"kld/{mode}/k{dim}/P{PROMPTS}",
        open=lambda: open_regulariser(dim, mode, settings.device),
        providers=[
            Provider(OFFICIAL, lambda shared: contestant(shared, peers_kld.official_style_terms)),
            Provider("official-style, compiled", start_compiled, left_out=slow),
            Provider(BATCHED, lambda shared: contestant(shared, peers_kld.batched_eigh_terms)),
            Provider(
                "pae",
                lambda shared: contestant(shared, lambda prompts, *_: shared.kld.terms(prompts)),
            ),
        ],
        baselines=(OFFICIAL, BATCHED),
        rounds=5 if dim > 512 else 25,
        unit="forward and backward",
        left_out=left_out,
    )


def test_kld(benchmark, replay):
    replay(benchmark)
