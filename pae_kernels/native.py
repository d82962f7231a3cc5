"""Finds, loads and checks the library compiled from `csrc/`, and calls it.

`csrc/pae.h` is the interface. An op's `cuda.py` declares the struct of each of its functions,

    Forward = native.params("koopman_fwd", states=native.POINTER, blocks=native.INT64)

and calls with one, in which a tensor stands for its address:

    native.call("pae_koopman_fwd", Forward(states=states, blocks=13), states.device)

The library is loaded at first use. It knows neither Python nor torch, so it serves every version.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI_VERSION = 2

POINTER, INT32, INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
FLOAT32 = ctypes.c_float

# element types as csrc/pae.h numbers them
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# where setup.py puts the library, and what it says about how it was built or why it was not
PATH = Path(__file__).with_name("_native.so")
BUILD = Path(__file__).with_name("_native_build.json")
SOURCES = Path(__file__).parent.parent / "csrc"
_AGAIN = "install the package again"

_STRUCTS: dict[str, type[ctypes.Structure]] = {}
_loaded: Library | None = None
_failure: str | None = None


def params(noun: str, **fields: type) -> type[ctypes.Structure]:
    """ctypes twin of `pae_<noun>_params`; `struct_size` is put in front and filled by itself.

    It is made of values by name. A tensor stands for its address and has to outlive the call;
    without a value a field is 0, a pointer null.

    Raises:
        RuntimeError: the library is loaded and its struct has another size.
    """

    def __init__(self: ctypes.Structure, **values: Any) -> None:
        values = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in values.items()}
        ctypes.Structure.__init__(self, ctypes.sizeof(self), **values)

    struct = type(
        f"pae_{noun}_params",
        (ctypes.Structure,),
        {"_fields_": [("struct_size", ctypes.c_uint32), *fields.items()], "__init__": __init__},
    )
    if _loaded is not None and (reason := _loaded.mismatch(noun, struct)):
        raise RuntimeError(reason)
    _STRUCTS[noun] = struct
    return struct


def strides(axes: str, t: Tensor) -> dict[str, int]:
    """`stride_<axis>` of the first axes of `t`, as fields of a struct."""
    return {f"stride_{axis}": stride for axis, stride in zip(axes, t.stride())}


class Library:
    """A compiled library, checked against this package.

    Args:
        path: the shared object.
        needs: functions that tell it from other libraries.
        abi: the version of its interface that this package was written for.

    Raises:
        OSError: it cannot be loaded.
        RuntimeError: it was built from other sources than this package, or is another library.
    """

    def __init__(
        self, path: Path | str, needs: tuple[str, ...] = ("pae_probe",), abi: int = ABI_VERSION
    ) -> None:
        self.path = Path(path)
        self.handle = ctypes.CDLL(str(path))
        self.emulated = hasattr(self.handle, "pae_emulation_set_order")
        self._functions: dict[str, Any] = {}
        for name in ("pae_abi_version", "pae_last_error", *needs):
            self._symbol(name)
        version = self.handle.pae_abi_version()
        if version != abi:
            raise RuntimeError(
                f"{self.path} has interface {version}, this package expects {abi}: "
                "install the package again"
            )
        for noun, struct in _STRUCTS.items():
            if reason := self.mismatch(noun, struct):
                raise RuntimeError(reason)
        self.handle.pae_last_error.restype = ctypes.c_char_p

    def mismatch(self, noun: str, struct: type[ctypes.Structure]) -> str | None:
        """Why `struct` is not the library's `pae_<noun>_params`, or None."""
        sizeof = getattr(self.handle, f"pae_sizeof_{noun}_params", None)
        if sizeof is None:
            return None  # built from some of the files only; a call will say that it is missing
        if sizeof() == ctypes.sizeof(struct):
            return None
        return (
            f"pae_{noun}_params has {sizeof()} bytes in {self.path} and {ctypes.sizeof(struct)} "
            "in this package: install the package again"
        )

    def _symbol(self, name: str) -> Any:
        try:
            return getattr(self.handle, name)
        except AttributeError:
            raise RuntimeError(
                f"{self.path} has no function {name}: install the package again"
            ) from None

    def status(self, name: str, params: ctypes.Structure, stream: int | None) -> int:
        """Calls `name` on the current device; 0, or the status whose words are `last_error()`.

        Raises:
            RuntimeError: the library has no such function.
        """
        function = self._functions.get(name)
        if function is None:
            function = self._symbol(name)
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
            self._functions[name] = function
        return function(ctypes.byref(params), stream)

    def last_error(self) -> str:
        """The last failure of a call on this thread."""
        return self.handle.pae_last_error().decode()


_Probe = params(
    "probe",
    toolkit_version=INT32,
    driver_version=INT32,
    capability=INT32,
    code_version=INT32,
    multiprocessors=INT32,
)


def build_record() -> dict:
    """What setup.py wrote down: `reason` when it built nothing, else `nvcc`, `architectures`,
    `sha256` of the library; a `reason` too when the record cannot be read.
    """
    missing = "not built; `pip install -e .` builds it where nvcc is found"
    return read_record(BUILD, missing, nvcc=str, architectures=list)


def read_record(path: Path, missing: str, **fields: type) -> dict:
    """The record of a build, or one with the `reason` why there is none.

    Args:
        missing: the reason where there is no file.
        fields: what a record of success holds besides `sha256`.
    """
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return {"reason": missing}
    except NotADirectoryError:
        archive = next(above for above in path.parents if above.is_file())
        return {"reason": f"{archive} is an archive, and libraries are loaded from folders only"}
    except (OSError, ValueError, RecursionError) as error:
        return {"reason": f"{path} cannot be read ({error}): {_AGAIN}"}
    if isinstance(record, dict):
        if isinstance(record.get("reason"), str):
            return record
        held = {name: record.get(name) for name in ("sha256", *fields)}
        lists = [value for value in held.values() if isinstance(value, list)]
        right = all(
            isinstance(held[name], kind) for name, kind in {"sha256": str, **fields}.items()
        )
        if right and all(isinstance(word, str) for words in lists for word in words):
            return record
    return {"reason": f"{path} is damaged or of another version of pae: {_AGAIN}"}


def library() -> Library:
    """The library in use, loaded at first need.

    It is the very file that the record tells of: a damaged one would end the process, not the call.

    Raises:
        RuntimeError: there is none that can be used; says why.
    """
    global _loaded, _failure
    if _loaded is None:
        if _failure is None:
            try:
                _loaded = Library(recorded(PATH, build_record()))
                return _loaded
            except (OSError, RuntimeError) as error:
                _failure = str(error)
        raise RuntimeError(_failure)
    return _loaded


def recorded(path: Path, record: dict) -> Path:
    """`path`, when it is the very file that the record tells of.

    Raises:
        RuntimeError: it is not; says why.
    """
    if "reason" in record:
        raise RuntimeError(record["reason"])
    if not path.is_file():
        raise RuntimeError(f"{path} is missing: {_AGAIN}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != record["sha256"]:
        raise RuntimeError(f"{path} is damaged, or was built apart from its record: {_AGAIN}")
    return path


def describe() -> str:
    """The library in one line: what it was built for and whether it runs here, or why not."""
    record = build_record()
    if "reason" in record:
        return f"none: {record['reason']}"
    said = f"{PATH} for {' '.join(record['architectures'])}, nvcc {record['nvcc']}"
    if note := record.get("note"):
        said += f" ({note})"
    if newer := changed_since_built():
        said += f", older than csrc/{newer}: {_AGAIN}"
    if reason := unavailable():
        said += f"; cannot run here: {reason}"
    return said


def changed_since_built() -> str | None:
    """A source that is newer than the library, where both are: in an editable install."""
    if not PATH.is_file():
        return None
    built = PATH.stat().st_mtime
    files = [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh"), *SOURCES.glob("*.h")]
    return next((file.name for file in sorted(files) if file.stat().st_mtime > built), None)


@contextlib.contextmanager
def using(other: Library) -> Iterator[Library]:
    """`other` instead of the package's own library, as tests do with an emulated one."""
    global _loaded
    before, _loaded = _loaded, other
    try:
        yield other
    finally:
        _loaded = before


def emulated() -> bool:
    """Whether the library in use runs on the CPU; see `csrc/host/`."""
    return _loaded is not None and _loaded.emulated


def unavailable() -> str | None:
    """Why the library cannot run on the current device, in CUDA's words where they are; or None."""
    try:
        found = library()
    except RuntimeError as error:
        return str(error)
    index = torch._C._cuda_getDevice() if torch.cuda.is_initialized() else None
    return None if found.emulated else _refusal(found, index)


@lru_cache
def _refusal(found: Library, device: int | None) -> str | None:
    probe = _Probe()
    if found.status("pae_probe", probe, None) == 0:
        return None
    reason = found.last_error()
    if "NoKernelImage" in reason:
        built = " ".join(build_record().get("architectures", ()))
        return f"no code for this device, sm_{probe.capability}: built for {built}"
    if "InsufficientDriver" in reason:
        if probe.driver_version == 0:
            return f"no NVIDIA driver here ({reason})"
        return (
            f"the driver serves CUDA {_version(probe.driver_version)}, the library was built with "
            f"{_version(probe.toolkit_version)} ({reason})"
        )
    return reason


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def call(name: str, params: ctypes.Structure, device: torch.device) -> None:
    """Calls a function of the library on the device that its tensors live on.

    Work goes to the current stream of `device`, whatever the current device is.

    Raises:
        RuntimeError: there is no library, or the call failed; in the library's words.
    """
    found = _loaded or library()
    if device.type == "cuda":
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        if device.index == torch._C._cuda_getDevice():
            status = found.status(name, params, stream)
        else:
            with torch.cuda.device(device):
                status = found.status(name, params, stream)
    elif found.emulated:
        status = found.status(name, params, None)
    else:
        raise RuntimeError(f"{name} runs on a GPU, not on device {device}")
    if status != 0:
        raise RuntimeError(found.last_error())
