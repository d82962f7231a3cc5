"""The kernels of `csrc/cpu/`: finds, loads and checks their library, and calls it.

`csrc/cpu/cpu.h` is the interface. An op's `cpu.py` declares the struct of each of its functions with
`native.params`, and calls with one:

    cpu.call("pae_cpu_norm_fwd", Forward(rows=197, width=768, x=x, ...))

One binary holds every instruction set and takes the widest that the processor runs. Work is shared
among as many threads as PyTorch uses, in the pool that PyTorch's OpenMP runtime keeps: the library
brings no runtime of its own, because two of them in one process each spin while the other computes.
"""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from . import native

# where setup.py puts the library
PATH = Path(__file__).with_name("_cpu.so")

# element types as csrc/cpu/cpu.h numbers them
TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.uint8: 3}


@lru_cache
def _found() -> native.Library | str:
    """The library, or why there is none that can be used."""
    if not PATH.is_file():
        return native.build_record().get("cpu_reason", "not built; installing builds it with a C++ compiler")
    try:
        library = native.Library(PATH)
        library.handle.pae_cpu_isa.restype = ctypes.c_char_p
        library.handle.pae_cpu_set_parallel.argtypes = [ctypes.c_void_p]
        library.handle.pae_cpu_set_parallel(_shared_pool())
    except (OSError, RuntimeError, AttributeError) as error:
        return str(error)
    return library


def unavailable() -> str | None:
    """Why the library cannot be used, or None."""
    found = _found()
    return found if isinstance(found, str) else None


def describe() -> str:
    """The library in one line: its instruction set and its threads, or why there is none."""
    found = _found()
    if isinstance(found, str):
        return f"none: {found}"
    isa = found.handle.pae_cpu_isa().decode()
    threads = "PyTorch's threads" if _shared_pool() else "one thread: no OpenMP runtime found"
    return f"{PATH.name}, {isa}, {threads}"


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
