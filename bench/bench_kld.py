"""The Koopman-Lyapunov regulariser: both terms and their gradients, once per training step.

On a GPU each compiled version has two rows: as the replay of a CUDA graph, which is how
`pae.graphed_step` runs it, and called from Python. The peers cannot be captured: their
decompositions wait for the host.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import pae
from pae_kernels import backends

from . import roofline
from .memory import SavedBytes
from .peers import kld as peers
from .runner import Group, Provider, Runnable, Settings, Unavailable, relative

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
    shared.expected = run(peers.official_style_terms, wide)
    return shared


def prepare(shared: Regulariser, terms: Terms, capture: bool = False) -> Runnable:
    def work() -> list[Tensor]:
        return run(terms, shared.leaves())

    def check() -> dict[str, float]:
        leaves = shared.leaves()
        with SavedBytes(leaves) as saved:
            got = work()
        errors = [relative(one, want) for one, want in zip(got, shared.expected)]
        value, gradient = max(errors[:2]), max(errors[2:])
        assert value <= VALUE_LIMIT, f"terms are off by {value:.1e}, more than {VALUE_LIMIT}"
        assert gradient <= GRADIENT_LIMIT, (
            f"gradients are off by {gradient:.1e}, more than {GRADIENT_LIMIT}"
        )
        return {
            "value_error": value,
            "gradient_error": gradient,
            "saved_mb": saved.activations / 1e6,
            "live_gflop": roofline.koopman_flops(DEPTH, PROMPTS, WIDTH, shared.kld.K.shape[-1])
            / 1e9,
            "floor_mb": 2 * sum(leaf.nbytes for leaf in leaves) / 1e6,
        }

    return Runnable(work, check, capture=capture)


@contextmanager
def forced(backend: str):
    before = os.environ.get("PAE_BACKEND")
    os.environ["PAE_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["PAE_BACKEND"]
        else:
            os.environ["PAE_BACKEND"] = before


def start_ours(shared: Regulariser, backend: str, capture: bool = False) -> Runnable:
    """Our terms in one version of the op."""
    device = shared.prompts.device
    with forced(backend):
        try:
            backends.choose("koopman_losses", device, shared.prompts.dtype)
        except RuntimeError as error:
            raise Unavailable(str(error)) from error

    def terms(prompts: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return shared.kld.terms(prompts)

    inner = prepare(shared, terms, capture)

    def work() -> list[Tensor]:
        with forced(backend):
            return inner.work()

    def check() -> dict[str, float]:
        with forced(backend):
            return inner.check()

    return Runnable(work, check, capture=capture)


def start_compiled(shared: Regulariser) -> Runnable:
    torch._dynamo.reset()
    compiled = torch.compile(peers.official_style_terms)
    try:
        run(compiled, shared.leaves())
    except Exception as error:  # whatever stops the compiler is no fault of the regulariser
        raise Unavailable.because("torch.compile", error) from error
    return prepare(shared, compiled)


def groups(settings: Settings) -> list[Group]:
    """All groups of this file; those outside the chosen size carry a reason."""
    if settings.size == "smoke":
        return [group(8, mode, settings) for mode in ("global", "layerwise")]
    cases = [(256, "global"), (1024, "global"), (256, "layerwise")]
    chosen = {"quick": cases[:1], "default": cases[:2], "full": cases}[settings.size]
    return [group(*case, settings, "" if case in chosen else "runs with --full") for case in cases]


def versions(device: torch.device) -> list[tuple[str, str, bool]]:
    """(row, version of the op, as a graph's replay) of all of ours."""
    if device.type == "cpu":
        return [("pae", "reference", False)]
    return [
        ("pae, CUDA graph", "cuda", True),
        ("pae, CUDA", "cuda", False),
        ("pae, Triton graph", "triton", True),
        ("pae, Triton", "triton", False),
        ("pae, reference", "reference", False),
    ]


def group(dim: int, mode: str, settings: Settings, left_out: str = "") -> Group:
    on_gpu = settings.device.type == "cuda"
    slow = settings.why_not_compile(settings.size == "smoke" and mode == "global")
    return Group(
        name=f"kld/{mode}/k{dim}/P{PROMPTS}",
        open=lambda: open_regulariser(dim, mode, settings.device),
        providers=[
            Provider(OFFICIAL, lambda shared: prepare(shared, peers.official_style_terms)),
            Provider("official-style, compiled", start_compiled, left_out=slow),
            Provider(BATCHED, lambda shared: prepare(shared, peers.batched_eigh_terms)),
            *(
                Provider(name, lambda shared, v=version, c=capture: start_ours(shared, v, c))
                for name, version, capture in versions(settings.device)
            ),
        ],
        baselines=(OFFICIAL, BATCHED),
        rounds=(5 if on_gpu else 3) if dim > 512 else 25 if on_gpu else 15,
        unit="forward and backward",
        left_out=left_out,
    )


def test_kld(benchmark, replay):
    replay(benchmark)
