"""The kernels of `csrc/` as a CPU library, on the execution model of `csrc/host/`.

    with host_library.emulated("koopman_fwd.cu"):
        ...  # pae_kernels.koopman.cuda runs on CPU tensors

Objects are compiled with g++ and kept in `build/host/`, under the hash of what they depend on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest

from pae_kernels import cpu, native
from tests.processes import ROOT, run

SOURCES = ROOT / "csrc"
sys.path.insert(0, str(SOURCES))

import cpu_build  # noqa: E402

CACHE = ROOT / "build" / "host"

FLAGS = (
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-DPAE_EMULATED"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered"),
)

# An access past the end of a tensor, a misaligned vector, an index outside its array or an overflow
# ends the process. Of a fiber's stack nothing is known.
SANITIZERS = (
    *("-O1", "-fsanitize=address,alignment,bounds,signed-integer-overflow"),
    *("-fno-sanitize-recover=all", "--param=asan-stack=0", "--param=asan-globals=0"),
)
# Null pointers and pointers past their object end the process by the address sanitizer already, at
# their access; asked for twice they are two fifths of the time that compiling takes.
CPU_SANITIZERS = (
    *("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fno-sanitize=float-divide-by-zero,null,pointer-overflow,object-size",
)
if os.environ.get("PAE_HOST_SANITIZERS") == "1":
    FLAGS += SANITIZERS

# orders in which the threads of a block run: a missing barrier changes some result
ORDERS = (0, 1, 7)


def sanitizing_environment() -> dict[str, str]:
    """For a Python process whose emulated libraries are built with sanitizers."""
    # The runtime comes first in the process. It looks up what C++ throws with as it starts, so that
    # the C++ library must be there too: not every extension module of Python brings it.
    preloaded = [_runtime(name) for name in ("libasan.so", "libstdc++.so.6")]
    return {
        "LD_PRELOAD": ":".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter never frees all it has
        "PAE_HOST_SANITIZERS": "1",
    }


def _runtime(name: str) -> str:
    found = run([_compiler(), f"-print-file-name={name}"]).stdout.strip()
    if not Path(found).is_file():  # the compiler gives the name back
        pytest.skip(f"{name} is not installed")
    return found


@lru_cache
def _compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    return compiler


def _key(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:20]


def _compile(command: list[str], target: Path) -> None:
    """Runs a compiler whose output file appears all at once, or not at all."""
    unfinished = target.with_suffix(f".{os.getpid()}.tmp")
    run([*command, "-o", str(unfinished)], env={"LD_PRELOAD": None})
    unfinished.replace(target)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No other process compiles meanwhile: what two need is compiled once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _object(source: Path, headers: bytes) -> Path:
    target = CACHE / f"{source.stem}-{_key(source.read_bytes(), headers)}.o"
    if not target.is_file():
        language = ["-x", "c++"]
        _compile([_compiler(), *FLAGS, f"-I{SOURCES}", *language, "-c", str(source)], target)
    return target


@lru_cache
def library(*sources: str | Path) -> native.Library:
    """The emulated library of these files (all of `csrc/` without any), always with library.cu.

    Args:
        sources: names in `csrc/`, or paths of other files.
    """
    names = sources or sorted(path.name for path in SOURCES.glob("*.cu"))
    files = [SOURCES / name for name in dict.fromkeys(("library.cu", *names))]
    files.append(SOURCES / "host" / "emulation.cpp")
    headers = sorted(p for p in SOURCES.rglob("*") if p.suffix in (".h", ".cuh"))
    version = run([_compiler(), "--version"]).stdout.encode()
    depends = b"".join((version, repr(FLAGS).encode(), *(p.read_bytes() for p in headers)))
    with _alone(), ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda file: _object(file, depends), files))
        exports = SOURCES / "exports.map"
        key = _key(*(o.name.encode() for o in objects), exports.read_bytes())
        target = CACHE / f"pae-{key}.so"
        if not target.is_file():
            link = ["-shared", f"-Wl,--version-script={exports}", *map(str, objects)]
            _compile([_compiler(), *FLAGS, *link], target)
    return native.Library(target)


@lru_cache
def cpu_library() -> native.Library:
    """The kernels for CPUs: the package's library where it was made of these very sources, else one
    compiled from them; with sanitizers where these are asked for.
    """
    sanitized = os.environ.get("PAE_HOST_SANITIZERS") == "1"
    made_of = cpu_build.sources_digest()
    if not sanitized and cpu.build_record().get("sources") == made_of and not cpu.unavailable():
        return cpu.load(cpu.PATH)
    extra = CPU_SANITIZERS if sanitized else ()
    version = run([_compiler(), "--version"]).stdout.encode()
    with _alone():
        target = CACHE / f"cpu-{_key(version, repr(extra).encode(), made_of.encode())}.so"
        if not target.is_file():
            unfinished = target.with_suffix(f".{os.getpid()}.tmp")
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("LD_PRELOAD", raising=False)
                cpu_build.compile_library([_compiler()], unfinished, extra)
            unfinished.replace(target)
    return cpu.load(target)


@contextlib.contextmanager
def emulated(*sources: str | Path, order: int = 0) -> Iterator[native.Library]:
    """The emulated library of `sources` as the one that `native.call` uses, on CPU tensors.

    Args:
        order: of the threads of a block: 0 ascending, 1 descending (blocks too), else a seed.
    """
    found = library(*sources)
    found.handle.pae_emulation_set_order(order)
    try:
        with native.using(found):
            yield found
    finally:
        found.handle.pae_emulation_set_order(0)
