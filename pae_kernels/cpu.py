"""The kernels of `csrc/cpu/`: finds, loads and checks their library, and calls it.

`csrc/cpu/cpu.h` is the interface. An op's `cpu.py` declares the struct of each function with
`native.params`, and calls with one:

    cpu.call("pae_cpu_norm_fwd", Forward(rows=197, width=768, x=x, ...))

One binary holds every instruction set and takes the widest that the processor runs. Work is shared
among as many threads as PyTorch uses, in the pool that PyTorch's OpenMP runtime keeps: the library
brings no runtime of its own, because two of them in one process each spin while the other computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from . import native

ABI_VERSION = 5

# where setup.py puts the library, and what it says about how it was built or why it was not
PATH = Path(__file__).with_name("_cpu.so")
BUILD = Path(__file__).with_name("_cpu_build.json")

# element types as csrc/cpu/cpu.h numbers them
TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.uint8: 3}

_used: native.Library | None = None


def build_record() -> dict:
    """What setup.py wrote down: `reason` when it built nothing, else `compiler`, `isas`."""
    missing = "not built; `pip install -e .` builds it where a C++ compiler is found"
    return native.read_record(BUILD, missing, compiler=str, isas=list)


def load(path: Path) -> native.Library:
    """The library in a file.

    Raises:
        OSError, RuntimeError: as `native.Library`.
    """
    library = native.Library(path, ("pae_cpu_isa", "pae_cpu_set_parallel"), ABI_VERSION)
    library.handle.pae_cpu_isa.restype = ctypes.c_char_p
    library.handle.pae_cpu_set_parallel.argtypes = [ctypes.c_void_p]
    library.handle.pae_cpu_set_parallel(_shared_pool())
    return library


@lru_cache
def _own() -> native.Library | str:
    """The package's own library, or why there is none that can be used."""
    try:
        return load(native.recorded(PATH, build_record()))
    except (OSError, RuntimeError) as error:
        return str(error)


def _found() -> native.Library | str:
    return _used or _own()


@contextlib.contextmanager
def using(other: native.Library) -> Iterator[native.Library]:
    """`other` instead of the package's own library, as tests do with a sanitized one."""
    global _used
    before, _used = _used, other
    try:
        yield other
    finally:
        _used = before


def unavailable() -> str | None:
    """Why the library cannot be used, or None."""
    found = _found()
    return found if isinstance(found, str) else None


def lacks(function: str) -> str | None:
    """Why `function` cannot be called in the library that is there, or None."""
    found = _found()
    if isinstance(found, str):
        return found
    if hasattr(found.handle, function):
        return None
    return f"{found.path.name} is older than {function}: install the package again"


def describe() -> str:
    """The library in one line: its instruction set and its threads, or why there is none."""
    found = _found()
    if isinstance(found, str):
        return f"none: {found}"
    isa = found.handle.pae_cpu_isa().decode()
    threads = "PyTorch's threads" if _shared_pool() else "one thread: no OpenMP runtime found"
    return f"{found.path}, {isa}, {threads}"


# A product of PyTorch and a norm of ours in turns, two threads, on two cores that others used too:
# with a second GNU runtime the median of 15 rounds took 1.10, 1.10 and 1.09 times as long as in the
# shared pool, the fastest round 0.98, 1.43 and 1.41 times.
@lru_cache
def _shared_pool() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that PyTorch loaded, None without one.

    GNU's runtime has it, and so have Intel's and LLVM's, for programs compiled by GCC.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    names = re.findall(r"(/\S*lib(?:gomp|iomp5|omp)\S*\.so\S*)$", maps, re.MULTILINE)
    for name in dict.fromkeys(names):
        try:
            function = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None


def call(name: str, params: Any) -> None:
    """Calls a function of the library.

    Raises:
        RuntimeError: there is no library, or the call failed; in the library's words.
    """
    found = _found()
    if isinstance(found, str):
        raise RuntimeError(found)
    params.threads = torch.get_num_threads()
    if found.status(name, params, None) != 0:
        raise RuntimeError(found.last_error())
