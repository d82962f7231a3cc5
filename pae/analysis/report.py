"""`pae analyse`: a checkpoint's Koopman analysis as figures and numbers in a folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..errors import CheckpointError, one_line
from ..files import to_json
from ..kld import KLD
from ..tensorfile import fitted
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
    numbers = to_json(_numbers(analysis), indent=1)  # an infinity is null
    checkpoint.write_atomically(folder / "koopman.json", lambda file: file.write_text(numbers))
    return [folder / name for name in (*_FIGURES, "koopman.json")]


def _parts(path: Path) -> tuple[KLD, Tensor]:
    """The regulariser and the prompts (depth, P, D) of a checkpoint."""
    found = checkpoint.read(path)
    if found.kld is None:
        raise CheckpointError(f"checkpoint {path} has no KLD to analyse")
    prompts = found.state.get("prompts.tokens")
    if prompts is None or prompts.dim() != 3:
        raise CheckpointError(
            f"checkpoint {path} holds prompts of {found.prompts['name']}, not (depth, P, D) "
            "tokens; build the model and call pae.analysis.analyse"
        )
    try:
        kld = KLD(**found.kld)
        kld.bind(len(prompts), prompts.shape[-1])
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} describes a KLD this version cannot build: {one_line(error)}"
        ) from error
    own = {f"kld.{name}": parameter for name, parameter in kld.named_parameters()}
    state = {name: tensor for name, tensor in found.state.items() if name.startswith("kld.")}
    state = fitted(path, state, own)
    kld.load_state_dict({name.removeprefix("kld."): tensor for name, tensor in state.items()})
    return kld, prompts


def _numbers(analysis: KoopmanAnalysis) -> dict:
    """Every field as plain lists; complex numbers as [real, imaginary]."""
    numbers = {}
    for name, value in vars(analysis).items():
        if isinstance(value, Tensor):
            value = (torch.view_as_real(value) if value.is_complex() else value).tolist()
        numbers[name] = value
    return numbers
