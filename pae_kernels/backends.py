"""Which version of an op runs, and why: one place, one environment variable, one printable table.

An op registers its versions in order of preference. A version is a module with the functions that
the op needs, and a predicate that says why it cannot run on a device (None when it can).
`PAE_BACKEND` forces a version by name; a forced version that cannot run is an error, never a silent
fallback.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch

from . import cpu, native

BACKENDS = ("reference", "sdpa", "cpu", "triton", "cuda")
KNOWN = (8, 9, 10, 12)  # major compute capabilities that tiles were compiled for
_UP_TO_32_BITS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Version:
    """One implementation of an op.

    Attributes:
        name: one of `BACKENDS`.
        module: where its functions live; a name is imported when it is first chosen.
        unavailable: (device type, dtype) -> reason why it cannot run there, or None.
    """

    name: str
    module: ModuleType | str
    unavailable: Callable[[str, torch.dtype], str | None]

    def load(self) -> ModuleType:
        """The module."""
        if isinstance(self.module, str):
            return importlib.import_module(self.module)
        return self.module


_OPS: dict[str, list[Version]] = {}


def import_failure(name: str) -> str | None:
    """Why a package cannot be imported, whatever its import raises, in one line; or None."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return f"package {name} is not installed"
        reason: BaseException = error
    except (Exception, SystemExit) as error:
        reason = error
    else:
        return None
    return f"package {name} cannot be imported: {one_line(reason)}"


def one_line(error: BaseException) -> str:
    """An error in one line: its kind, and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


_triton_failure = lru_cache(partial(import_failure, "triton"))


def _interpreted() -> bool:
    return "TRITON_INTERPRET" in os.environ and os.environ["TRITON_INTERPRET"] == "1"


def anywhere(device_type: str, dtype: torch.dtype) -> str | None:
    """Predicate of a version that runs on every device, in every float dtype."""
    return None


def with_triton(device_type: str, dtype: torch.dtype) -> str | None:
    """Predicate of Triton kernels: a GPU (or the interpreter) and at most 32 bits."""
    if dtype not in _UP_TO_32_BITS:
        return f"computes in fp32 at most, not {dtype}"
    if device_type == "cpu" and not _interpreted():
        return "needs a GPU"
    if device_type not in ("cpu", "cuda"):
        return f"does not know device {device_type}"
    return _triton_failure()  # the import comes last: it takes a fifth of a second


def with_triton_tiles(device_type: str, dtype: torch.dtype) -> str | None:
    """Predicate of Triton kernels whose tiles are chosen for a GPU: those of `KNOWN` as well."""
    if reason := with_triton(device_type, dtype):
        return reason
    if device_type == "cpu":
        return None
    if torch.version.hip is not None:
        return "has tiles for NVIDIA's GPUs, this is one of AMD"
    major, minor = torch.cuda.get_device_capability()
    if major in KNOWN:
        return None
    return f"has tiles for sm_{KNOWN[0]}0 to sm_{KNOWN[-1]}0, this GPU is sm_{major}{minor}"


def with_sdpa(device_type: str, dtype: torch.dtype) -> str | None:
    """Predicate of what PyTorch's fused attention makes up: a GPU, or a CPU that is told to."""
    if device_type == "cpu":
        if forced() == "sdpa":
            return None
        return "runs on a CPU where PAE_BACKEND=sdpa asks for it, for tests"
    if device_type != "cuda":
        return f"does not know device {device_type}"
    return None if dtype in _UP_TO_32_BITS else f"computes in fp32 at most, not {dtype}"


def with_cuda(device_type: str, dtype: torch.dtype) -> str | None:
    """Predicate of compiled CUDA kernels: a library with code for this GPU, and at most 32 bits."""
    if dtype not in _UP_TO_32_BITS:
        return f"computes in fp32 at most, not {dtype}"
    if device_type not in ("cpu", "cuda"):
        return f"does not know device {device_type}"
    if device_type == "cpu" and not native.emulated():
        return "needs a GPU"
    return native.unavailable()


def with_cpu(device_type: str, dtype: torch.dtype) -> str | None:
    """Predicate of compiled CPU kernels: a library for this processor, fp32 or bf16."""
    if device_type != "cpu":
        return "runs on a CPU"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"computes in fp32 and bf16, not {dtype}"
    return cpu.unavailable()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launch Triton kernels on the tensors' device; they take the caller's current stream there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def register(op: str, *versions: Version) -> None:
    """Register the versions of `op`, the preferred one first; the last one must run anywhere."""
    _OPS[op] = list(versions)


def registered() -> dict[str, list[Version]]:
    """Op name -> its versions, the preferred one first."""
    return {op: list(versions) for op, versions in _OPS.items()}


def forced() -> str | None:
    """The version demanded by `PAE_BACKEND`, or None."""
    if "PAE_BACKEND" not in os.environ or (name := os.environ["PAE_BACKEND"]) in ("", "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"PAE_BACKEND must be auto or one of {BACKENDS}, got {name!r}")
    return name


def choose(op: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> ModuleType:
    """Module that runs `op` on tensors of `dtype` on `device`.

    Raises:
        RuntimeError: `PAE_BACKEND` names a version that this op does not have or that cannot run on
        `device`.
    """
    # asked at every call of an op: a device in words is taken apart without making one
    device_type = device.partition(":")[0] if isinstance(device, str) else device.type
    name = forced()
    asked = _OPS[op] if name is None else [v for v in _OPS[op] if v.name == name]
    for version in asked:
        if version.unavailable(device_type, dtype) is None:
            return version.load()
    what = "; ".join(f"{v.name}: {v.unavailable(device_type, dtype)}" for v in asked)
    what = what or f"{op} has no such version, only {[v.name for v in _OPS[op]]}"
    raise RuntimeError(f"PAE_BACKEND={name} cannot run {op} on {device_type}: {what}")


def table() -> list[tuple[str, str, str, str]]:
    """Rows (op, device type, chosen version, versions that cannot run and why).

    Raises nothing: where no version can be chosen it is "-".
    """
    rows = []
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for op, versions in sorted(_OPS.items()):
        for device in devices:
            reasons = {v.name: v.unavailable(device, torch.float32) for v in versions}
            why = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
            try:
                module = choose(op, device)
                chosen = next(v.name for v in versions if v.module in (module, module.__name__))
            except Exception as error:
                chosen, why = "-", [str(error)]
            rows.append((op, device, chosen, "; ".join(why)))
    return rows
