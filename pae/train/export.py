"""A trained model as one file for other runtimes: ONNX, or a program of torch.export.

What is exported is the reference forward, with a free batch size, from normalised images (B, C, H,
W) in fp32 to logits. The file is read back, run on real images, and compared before it is put in
its place.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pae
from pae.errors import one_line
from pae.files import to_json
from pae.train.using import Loaded

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
TOLERANCE = 1e-5  # of the largest logit, or of 1 where that is smaller


class _Logits(nn.Module):
    """The definition, with the one argument that a graph has."""

    def __init__(self, model: Loaded) -> None:
        super().__init__()
        # of two towers the image's, with its texts as numbers
        own = model.classifier() if isinstance(model, pae.PromptedCLIP) else model
        self.model: nn.Module = own

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        return self.model(images, engine="reference")


def export(model: Loaded, images: Tensor, path: str | Path, format: str) -> float:
    """Write `model` as `path`, and compare what the file gives with what the model does.

    Args:
        model: of `pae.load`, on the CPU, in fp32.
        images: (B, C, H, W), B >= 2, real ones: the file runs on all, and on the first alone.
        path: replaced when the new file is complete and right. Weights of more than 2 GB lie
            beside an ONNX file, as FILE.data.
        format: "onnx" (with onnxscript and onnxruntime, `pip install "pae[export]"`) or
            "torch-export" (`torch.export.load(path).module()`).
    Returns:
        The largest difference of a logit, over the largest logit (over 1 if that is smaller).
    Raises:
        ImportError: a package is missing.
        ValueError: the model cannot be traced; fewer than two images.
        ArithmeticError: the file gives other logits than the model.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if len(images) < 2:
        raise ValueError(
            f"images must be at least two, of which the first also alone, got {len(images)}"
        )
    if format == "onnx":
        _require_onnx()
    path = Path(os.path.expanduser(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        expected = model(images, engine="reference")
    family = type(getattr(model, "prompts", model.backbone)).__name__
    wrapped = _Logits(model).eval()
    try:
        with _quiet(), torch.no_grad():
            batch = {"images": {0: torch.export.Dim("batch", min=1)}}
            program = torch.export.export(wrapped, (images,), dynamic_shapes=batch)
    except Exception as error:  # tracing raises whatever it stumbles over
        raise ValueError(f"{family} cannot be exported: {one_line(error)[:300]}") from error
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch:
        file = Path(scratch, path.name)  # under its own name, which the file of weights has too
        try:
            run = _WRITERS[format](program, file, _about(model))
        except Exception as error:
            raise ValueError(
                f"{family} cannot be written as {format}: {one_line(error)[:300]}"
            ) from error
        found = []
        for part, want in ((images, expected), (images[:1], expected[:1])):
            size = max(1.0, float(want.abs().max()))
            found.append((run(part) - want).abs().max() / size)
        worst = float(torch.stack(found).max())  # NaN where one is
        if not worst <= TOLERANCE:
            raise ArithmeticError(
                f"{path} is not written: as {format}, {family} gives logits that differ by "
                f"{worst:.1e}, expected at most {TOLERANCE:.0e}"
            )
        for made in sorted(Path(scratch).iterdir(), key=lambda made: made == file):
            os.replace(made, path.parent / made.name)
    return worst


def _about(model: Loaded) -> str:
    task = model.task
    return to_json({} if task is None else task.record())


def _require_onnx() -> None:
    for name in ("onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            raise ImportError(f'--format onnx needs {name}: pip install "pae[export]"') from None


def _write_onnx(program: Any, file: Path, about: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    with _quiet():
        made = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
        assert made is not None
        made.model.metadata_props["pae"] = about
        made.save(str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_program(program: Any, file: Path, about: str) -> Callable[[Tensor], Tensor]:
    torch.export.save(program, str(file), extra_files={"pae.json": about})
    again = torch.export.load(str(file)).module()
    return lambda images: again(images).detach()


_WRITERS = {"onnx": _write_onnx, "torch-export": _write_program}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' warnings are about their own code."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
