"""Files of weights that others wrote: told by their first bytes, read without running their code.

What comes back is what the file holds, nested as it is there; to find a model's weights in it is
the business of `pae.backbones.weights` and `pae.methods.official`.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import CheckpointError
from .tensorfile import DIGEST, read_tensors

# Packages whose objects stand beside the weights in published files: settings, counters, histories.
# Their names are read, their code is not: an empty dict stands for each object.
_BESIDE_WEIGHTS = {
    *("addict", "argparse", "collections", "datetime", "easydict", "fvcore", "hydra", "lightning"),
    *("lightning_fabric", "lightning_utilities", "ml_collections", "mmcv", "mmengine", "numpy"),
    *("omegaconf", "pathlib", "pytorch_lightning", "typing", "yacs"),
}


def read_weights_file(path: str | Path, values: bool = True) -> Mapping[str, Any] | None:
    """Contents of a .safetensors, .npz or torch file, whatever its suffix.

    Args:
        path: of the file.
        values: False looks at names and shapes only; the values of the tensors are then neither
            read nor checked.

    Returns:
        A mapping as the file nests it. Tensors are on the CPU, those of an .npz on the meta device
        if not `values`. Objects that are neither tensors, arrays, numbers nor containers of these
        are empty dicts. None if not `values` and the format (torch's before 1.6) tells names only
        together with them.

    Raises:
        CheckpointError: no such file, a folder, an empty or damaged file, another format, or
            objects whose code would have to run to read them; one line that names the file.
    """
    path = Path(path)
    try:
        if not path.is_file():  # a pipe would be waited for
            raise CheckpointError(
                f"weights {path}: {'not a file' if path.exists() else 'no such file'}"
            )
        with path.open("rb") as file:
            return _read(path, file.read(128), values)
    except CheckpointError:
        raise
    # every reader raises whatever its parts raise on damaged input; the user needs the file's name
    except Exception as error:
        raise CheckpointError(
            f"weights {path} cannot be read, it is damaged or of an unknown format: "
            f"{first_line(error)}"
        ) from error


def as_tensor(value: object) -> Tensor | None:
    """`value` as a tensor if it is one, or a numeric array; None for anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.itemsize <= 8:
        native = value.astype(value.dtype.newbyteorder("="), order="C", copy=False)
        return torch.as_tensor(native)
    return None


def _read(path: Path, start: bytes, values: bool) -> Mapping[str, Any] | None:
    if not start:
        raise CheckpointError(f"weights {path}: the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"weights {path}: a git-lfs pointer, not the weights themselves; git lfs pull fetches "
            "them"
        )
    if start.lstrip().startswith(b"<"):
        raise CheckpointError(f"weights {path}: a web page, not weights; download the file again")
    if start.startswith(b"PK"):
        return _read_zip(path, values)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        from safetensors.torch import load_file

        # written by pae, the file vouches for its values; others are mapped, not read
        return read_tensors(path)[0] if values and _has_digest(path) else load_file(path)
    if start[:1] == b"\x80":
        return _read_torch(path, in_place=False) if values else None
    raise CheckpointError(
        f"weights {path}: expected a .safetensors, .npz or torch file, got one that begins with "
        f"{start[:8]!r}"
    )


def _has_digest(path: Path) -> bool:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return DIGEST.encode() in file.read(length)


def _read_zip(path: Path, values: bool) -> Mapping[str, Any]:
    """Of a torch file or an .npz, which are zip archives both."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        pickled = any(name.endswith("/data.pkl") for name in names)
        if any(name.endswith("/constants.pkl") for name in names):
            raise CheckpointError(
                f"weights {path}: a TorchScript program; save its weights alone: "
                "torch.save(torch.jit.load(FILE).state_dict(), ...)"
            )
        if not pickled and not all(name.endswith(".npy") for name in names):
            raise CheckpointError(f"weights {path}: a zip archive of other things than weights")
        # torch itself does not look at the checksums; it can also be told to write none, all 0
        checked = values and any(member.CRC for member in members)
        if checked and (damaged := archive.testzip()):
            raise CheckpointError(f"weights {path}: damaged, the checksum of {damaged!r} is wrong")
        if not pickled and not values:
            return {name.removesuffix(".npy"): _outline(archive, name) for name in names}
    if pickled:
        return _read_torch(path, in_place=True)
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _outline(archive: zipfile.ZipFile, name: str) -> Tensor:
    """Shape and type of an array in an .npz, as a tensor on the meta device."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return torch.empty(shape, dtype=torch.as_tensor(np.empty(0, dtype)).dtype, device="meta")


def _read_torch(path: Path, in_place: bool) -> Mapping[str, Any]:
    """What `torch.save` wrote, by its unpickler that runs no code of the file."""
    foreign = ["argparse.Namespace"]
    if in_place:  # a zip archive: it can be mapped, and asked which objects it holds
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    strange = [name for name in foreign if name.partition(".")[0] not in _BESIDE_WEIGHTS]
    stand_ins: list[Any] = [(_STAND_INS.get(name, _Emptied), name) for name in foreign]
    content = None
    if not strange:
        try:
            with torch.serialization.safe_globals(stand_ins):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=in_place)
        except pickle.UnpicklingError as error:
            # torch's text advises to run the code; the name of what would run is in it
            strange = re.findall(r"GLOBAL (\S+)", str(error))
            if not strange:
                raise
    if strange:
        raise CheckpointError(
            f"weights {path}: it holds objects besides tensors, whose code would have to run: "
            f"{listed(sorted(strange), 3)}; save its state dict alone"
        )
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"weights {path}: expected a state dict, got {type(content).__name__}"
        )
    return _decoded(content)


class _Emptied:
    """Stands for every class of `_BESIDE_WEIGHTS`: an OrderedDict is what torch lets be filled."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return OrderedDict()


class _Parts:
    """Stands for the makers of arrays of numpy, and keeps what they were given."""

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def array(self) -> np.ndarray | None:
        """The array, if it is one of floating point numbers."""
        if not (isinstance(self.state, tuple) and len(self.state) == 5):
            return None
        _, shape, dtype, by_columns, raw = self.state
        if not (isinstance(dtype, _Parts) and dtype.args and isinstance(dtype.state, tuple)):
            return None
        code, order = dtype.args[0], dtype.state[1]
        if code not in ("f2", "f4", "f8") or order != "<" or not isinstance(raw, bytes):
            return None
        return np.frombuffer(raw, code).reshape(shape, order="F" if by_columns else "C").copy()


_STAND_INS: dict[str, type] = {
    f"{module}.{name}": _Parts
    for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("ndarray", "dtype", "_reconstruct", "scalar")
}


def _decoded(content: Any) -> Any:
    """`content` with the arrays of numpy in it as arrays."""
    if isinstance(content, Mapping):
        return {key: _decoded(value) for key, value in content.items()}
    return content.array() if isinstance(content, _Parts) else content


def first_line(error: BaseException) -> str:
    """The first line of what `error` says; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def listed(names: Iterable[object], most: int) -> str:
    """The first names, on one line also if the file is damaged, and how many more there are."""
    shown = [str(name) if str(name).isprintable() else repr(str(name)) for name in names]
    rest = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + rest
