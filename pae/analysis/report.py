"""`pae analyse`: a checkpoint's Koopman analysis as figures and numbers in a folder."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..errors import CheckpointError
from ..kld import KLD
from .figures import draw_eigenvalues, draw_energies, draw_lyapunov
from .koopman import KoopmanAnalysis, analyse

_FIGURES = {
    "eigenvalues.png": draw_eigenvalues,
    "energies.png": draw_energies,
    "lyapunov.png": draw_lyapunov,
}


def write_report(path: str | Path, folder: str | Path | None = None) -> list[Path]:
    """Write eigenvalues.png, energies.png, lyapunov.png and koopman.json for a checkpoint.

    Args:
        path: a file that `PromptedViT.save` wrote, with KLD; the backbone is not needed.
        folder: made if missing; None: beside the checkpoint, with its name and "-analysis".

    Returns:
        the files, each written whole or not at all.

    Raises:
        CheckpointError: unreadable, without KLD, or of a family without one tensor of tokens (build
            the model and call `analyse` on it).
    """
    path = Path(path)
    folder = path.with_name(f"{path.stem}-analysis") if folder is None else Path(folder)
    analysis = analyse(*_parts(path))
    for name, draw in _FIGURES.items():
        checkpoint.write_atomically(folder / name, partial(draw(analysis).savefig, format="png"))
    numbers = json.dumps(_numbers(analysis), indent=1)
    checkpoint.write_atomically(folder / "koopman.json", lambda file: file.write_text(numbers))
    return [folder / name for name in (*_FIGURES, "koopman.json")]


def _parts(path: Path) -> tuple[KLD, Tensor]:
    """The regulariser and the prompts (depth, P, D) of a checkpoint."""
    state, meta = checkpoint.read(path)
    if meta["kld"] is None:
        raise CheckpointError(f"checkpoint {path} has no KLD to analyse")
    prompts = state.get("prompts.tokens")
    if prompts is None or prompts.dim() != 3:
        raise CheckpointError(
            f"checkpoint {path} holds prompts of {meta['prompts']['name']}, not (depth, P, D) "
            "tokens; build the model and call pae.analysis.analyse"
        )
    kld = KLD(**meta["kld"])
    kld.bind(len(prompts), prompts.shape[-1])
    names = dict(kld.named_parameters())
    kld.load_state_dict({name: state[f"kld.{name}"] for name in names})
    return kld, prompts


def _numbers(analysis: KoopmanAnalysis) -> dict:
    """Every field as plain lists; complex numbers as [real, imaginary], infinities as null."""
    numbers = {}
    for name, value in vars(analysis).items():
        if isinstance(value, Tensor):
            value = torch.view_as_real(value) if value.is_complex() else value
            value = _finite(value.tolist())
        numbers[name] = value
    return numbers


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value if math.isfinite(value) else None
