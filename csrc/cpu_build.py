"""Compiles csrc/cpu/ into one library with a C++ compiler. Needs nothing but Python's library.

    python csrc/cpu_build.py         # into pae_kernels/, as `pip install -e .` does

Environment:
    PAE_CPU     auto: built where a compiler works, else the install goes on without (default);
                require: an error where it does not; off: not built.
    CXX         the compiler; default: the first of c++, g++ and clang++ that works.

The kernels are compiled once for each instruction set and chosen at run time, so that the library
serves every processor of its architecture, and every version of Python and PyTorch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from native_build import (
    PACKAGE,
    PATIENCE_TO_COMPILE,
    ROOT,
    Outcome,
    Unbuildable,
    alone,
    first_error,
    jobs,
    place,
    run,
    say,
)

SOURCES = Path(__file__).resolve().parent / "cpu"
LIBRARY = "_cpu.so"
RECORD = "_cpu_build.json"

# Contracted products and sums are fused where the processor can; no other liberty is taken with
# floating point, and none of its flags or traps is read.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"),
)
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    "-mprefer-vector-width=512",
)
ISAS: dict[str, tuple[str, ...]] = {"portable": ()}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS |= {
        "avx2": ("-mavx2", "-mfma"),
        "avx512": _AVX512,
        "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    }


def demanded() -> str:
    """`PAE_CPU`: "auto", "require" or "off"."""
    value = os.environ.get("PAE_CPU") or "auto"
    if value not in ("auto", "require", "off"):
        raise SystemExit(f"PAE_CPU must be auto, require or off, got {value!r}")
    return value


def compilers() -> Iterator[list[str]]:
    """Commands that may compile C++, the preferred one first."""
    if named := os.environ.get("CXX"):
        yield shlex.split(named)
        return
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            yield [found]


def sources_digest() -> str:
    """SHA-256 of what the library is made of, and how: of this file too."""
    digest = hashlib.sha256()
    for path in (Path(__file__), *sorted(SOURCES.iterdir())):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def compile_library(compiler: Sequence[str], library: Path, extra: Sequence[str] = ()) -> None:
    """Compiles and links with `compiler`, all files at once.

    Args:
        extra: flags on top, as sanitizers have them.

    Raises:
        Unbuildable: a file does not compile; in the compiler's words.
        OSError: the compiler cannot be started, or a folder not be written.
    """
    with tempfile.TemporaryDirectory() as scratch:

        def ended(command: list[str]) -> None:
            status, said = run(command, PATIENCE_TO_COMPILE, cwd=scratch)
            if status != 0:
                raise Unbuildable(f"{compiler[0]} failed: {first_error(said, status)}")

        def compile_one(job: tuple[str, str, tuple[str, ...]]) -> str:
            source, name, flags = job
            command = [*compiler, *FLAGS, *flags, *extra, "-c", str(SOURCES / source), "-o", name]
            ended(command)
            return name

        tables = [
            ("kernels.cpp", f"{isa}.o", (f"-DPAE_ISA={isa}", *flags)) for isa, flags in ISAS.items()
        ]
        with ThreadPoolExecutor(jobs()) as pool:
            objects = list(pool.map(compile_one, [*tables, ("library.cpp", "library.o", ())]))
        ended([*compiler, *extra, "-shared", *objects, "-o", LIBRARY])
        shutil.copyfile(Path(scratch, LIBRARY), library)


def build(library: Path) -> Outcome:
    """Compiles `library` as the environment demands, and says in one line what came of it.

    Raises:
        SystemExit: a variable has a value that means nothing, or PAE_CPU=require and it failed.
    """
    demand, start = demanded(), time.monotonic()
    if demand == "off":
        return _without("PAE_CPU was off when this was installed")
    reasons = []
    for compiler in compilers():
        try:
            compile_library(compiler, library)
        except Exception as error:  # whatever it is, `auto` goes on without
            reasons.append(" ".join(f"{error}".split()) or type(error).__name__)
            continue
        say(f"CPU kernels for {', '.join(ISAS)}, {time.monotonic() - start:.0f} s")
        record = {"compiler": compiler[0], "isas": list(ISAS), "sources": sources_digest()}
        return Outcome(library, record)
    reason = "; ".join(reasons) or "no C++ compiler was found as CXX, c++, g++ or clang++"
    if demand == "require":
        raise SystemExit(f"PAE_CPU=require: {reason}")
    return _without(reason)


def _without(reason: str) -> Outcome:
    say(f"no CPU kernels: {reason}")
    return Outcome(None, {"reason": reason})


def install(folder: Path) -> Outcome:
    """`build`, and `place` into a package folder; what is there then.

    Raises:
        SystemExit: as `build` does; PAE_CPU=require, and the folder cannot take the library.
    """
    with tempfile.TemporaryDirectory() as scratch:
        outcome = build(Path(scratch, LIBRARY))
        try:
            place(outcome, folder, LIBRARY, RECORD)
        except OSError as error:
            if demanded() == "require":
                raise SystemExit(f"PAE_CPU=require: {error}") from None
            outcome = _without(str(error))
            place(outcome, folder, LIBRARY, RECORD)
    return outcome


if __name__ == "__main__":
    with alone(ROOT):
        install(PACKAGE)
