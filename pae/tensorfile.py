"""Named tensors and texts in a safetensors file that carries a digest of every byte of itself."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError, one_line
from .files import from_json, write_atomically

DIGEST = "pae.digest"  # among the texts: SHA-256 of the file, with zeros where the digest stands
_ZEROS = "0" * 64
_ENTRY = re.compile(rb'"pae\.digest":"([^"]*)"')  # a quote inside a text would be escaped
_LONGEST_HEADER = 100_000_000  # of the safetensors format


def write_tensors(path: str | Path, state: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write a file that `read_tensors` reads, in one step.

    Tensors of any device, also those that share memory, are stored as copies.

    Raises:
        ValueError: a tensor or a text that the format cannot hold; nothing is written.
        OSError: naming `path`.
    """
    from safetensors.torch import save

    for name, text in texts.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"{path}: metadata must be text, got {name!r}: {text!r}")
        if name == DIGEST:
            raise ValueError(f"{path}: the name {name!r} is taken by the digest of the file")
    try:
        copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()}
        content = bytearray(save(copies, {**texts, DIGEST: _ZEROS}))
    except Exception as error:  # of a dtype or a layout: whatever the format's library raises
        raise ValueError(f"{path}: the tensors cannot be stored: {one_line(error)}") from error
    found = _ENTRY.search(content)
    assert found is not None
    content[found.start(1) : found.end(1)] = hashlib.sha256(content).hexdigest().encode()
    write_atomically(path, lambda file: file.write_bytes(content))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """Tensors on the CPU, texts, and whether a digest vouches for both.

    A file without a digest was written by others, or by version 0.1 of pae.

    Raises:
        CheckpointError: missing, unreadable, no safetensors file, or damaged.
    """
    from safetensors.torch import load

    try:
        content, length = _read(Path(path))
        found = _ENTRY.search(content, 8, length)
        if found is not None:
            blank = hashlib.sha256(content[: found.start(1)])
            blank.update(_ZEROS.encode())
            blank.update(memoryview(content)[found.end(1) :])
            if found[1] != blank.hexdigest().encode():
                raise ValueError("it is half-written or damaged")
        state = load(content)
        texts = from_json(content[8:length]).get("__metadata__") or {}
    except Exception as error:  # a damaged file makes its parser raise whatever its parts raise
        raise CheckpointError(f"checkpoint {path} cannot be read: {one_line(error)}") from error
    return state, texts, found is not None


def require_digest(path: str | Path, vouched: bool, former: bool) -> None:
    """Warn of a file without a digest that version 0.1 wrote (`former`); refuse any other.

    Raises:
        CheckpointError: the digest was there, and is not any more.
    """
    if not vouched and not former:
        raise CheckpointError(f"checkpoint {path} cannot be read: its digest is missing")
    if not vouched:
        warnings.warn(
            f"checkpoint {path} was written by an earlier version, without a digest, so damage "
            "may go unseen; save it again to give it one",
            stacklevel=3,
        )


def _read(path: Path) -> tuple[bytes, int]:
    """The content of a file, and where its header ends; a file of any size that is something else
    is not read.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("it is no file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = 8 + int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size, _LONGEST_HEADER):
            raise ValueError("it is half-written, or no safetensors file")
        return start + file.read(), length


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fitted(
    path: str | Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`state` in the dtypes of `own`, the tensors of a model.

    Raises:
        CheckpointError: naming the first tensor that is missing or unknown, has another shape, a
            dtype that does not become the model's, or values that are not finite in it.
    """
    found = {}
    for name in sorted(own.keys() | state.keys()):
        have = tuple(own[name].shape) if name in own else None
        there = tuple(state[name].shape) if name in state else None
        if have != there:
            raise CheckpointError(
                f"checkpoint {path}: {name} is {there} in the file, {have} in the model"
            )
        tensor, dtype = state[name], own[name].dtype
        if tensor.dtype != dtype and not (tensor.dtype in _FLOATS and dtype in _FLOATS):
            raise CheckpointError(
                f"checkpoint {path}: {name} is {tensor.dtype} in the file, {dtype} in the model"
            )
        found[name] = tensor = tensor.to(dtype)
        if bad := not_finite(tensor):
            raise CheckpointError(
                f"checkpoint {path}: {name} holds NaN or infinity in {bad} of {tensor.numel()} "
                f"values as {dtype}"
            )
    return found


def not_finite(tensor: Tensor) -> int:
    """How many values of a tensor are NaN or infinite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    return int((~tensor.isfinite()).sum())
