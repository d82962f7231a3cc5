"""Compiles csrc/*.cu into one library with nvcc. Needs nothing but Python's standard library.

    python csrc/native_build.py      # into pae_kernels/, as `pip install -e .` does

Environment:
    PAE_CUDA        auto: built where nvcc works, else the install goes on without, whatever
                    went wrong (default); require: an error where it does not; off: not built.
    PAE_CUDA_ARCHS  architectures, "90" or "80;90"; default: all shipped ones that nvcc knows.
    MAX_JOBS        compilers at a time; default: one per core.
    CUDA_HOME       where nvcc is looked for first; then PATH, /usr/local/cuda, the pip package. One
                    line says so where it has none that works.

Objects stay in build/native/ and ninja keeps them current; without ninja every file is compiled
again. The library has a C interface (pae.h) and the CUDA runtime inside, so it depends on no
version of Python, PyTorch or CUDA, only on the driver.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent
ROOT = SOURCES.parent
PACKAGE = ROOT / "pae_kernels"
OBJECTS = ROOT / "build" / "native"

EXPORTS = "exports.map"
LIBRARY = "_native.so"
RECORD = "_native_build.json"  # beside the library: how it was built, or why not

# Each with its own machine code; the last one also as PTX, for what comes after it. Code of sm_100
# runs on sm_103 too, that of sm_120 on sm_121.
SHIPPED = ("80", "86", "89", "90", "100", "120")
OLDEST_NVCC = (12, 4)

FLAGS = (
    *("-std=c++17", "-O3", "-Xptxas", "-v"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
)
LINK = ("-shared", "-cudart", "static")

# seconds after which a program is taken to hang; all kernels take minutes on a slow machine
PATIENCE_TO_ASK = 120
PATIENCE_TO_COMPILE = 2 * 3600


class Unbuildable(Exception):
    """Why there will be no library, in one line."""


# ---- what is wanted


def demanded() -> str:
    """`PAE_CUDA`: "auto", "require" or "off"."""
    value = os.environ.get("PAE_CUDA") or "auto"
    if value not in ("auto", "require", "off"):
        raise SystemExit(f"PAE_CUDA must be auto, require or off, got {value!r}")
    return value


def architectures(known: tuple[str, ...]) -> tuple[str, ...]:
    """`PAE_CUDA_ARCHS`, or the shipped ones, of those that nvcc knows; the oldest first."""
    text = os.environ.get("PAE_CUDA_ARCHS", "")
    words = [word for word in re.split(r"[;, ]+", text) if word]
    if not words:
        return tuple(arch for arch in SHIPPED if arch in known)
    chosen = [re.sub(r"^(sm_|compute_)?(\d+)\.?(\d)$", r"\2\3", word) for word in words]
    if bad := [word for word, arch in zip(words, chosen) if arch not in known or int(arch) < 80]:
        usable = " ".join(arch for arch in known if int(arch) >= 80)
        raise SystemExit(
            f'PAE_CUDA_ARCHS must be of {usable}, as in "80;90", got {bad[0]!r} in {text!r}'
        )
    return tuple(sorted(set(chosen), key=int))


def jobs() -> int:
    """`MAX_JOBS`, or one per core."""
    text = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not text.isdecimal() or int(text) < 1:
        raise SystemExit(f"MAX_JOBS must be a positive number, got {text!r}")
    return int(text)


def code_flags(chosen: tuple[str, ...]) -> list[str]:
    """nvcc's words for machine code of each architecture, and PTX of the newest.

    Those of one generation share the PTX of the oldest: making PTX takes longer than what follows,
    and no kernel asks which architecture it is compiled for.
    """
    oldest = {arch[:-1]: arch for arch in reversed(chosen)}
    flags = [f"-gencode=arch=compute_{oldest[arch[:-1]]},code=sm_{arch}" for arch in chosen]
    return [*flags, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


# ---- nvcc


@dataclass(frozen=True)
class Toolkit:
    """A compiler that works.

    Attributes:
        nvcc: its path.
        version: "13.0".
        known: architectures that it makes machine code for.
        flags: where it finds what lies outside its own folder.
        note: why it is not the one that `CUDA_HOME` names.
    """

    nvcc: Path
    version: str
    known: tuple[str, ...]
    flags: tuple[str, ...] = ()
    note: str = ""


def candidates(system: Path = Path("/usr/local/cuda")) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Every nvcc there is, the preferred one first, with the flags that it needs."""
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home) / "bin" / "nvcc", ()
    if found := shutil.which("nvcc"):
        yield Path(found), ()
    yield system / "bin" / "nvcc", ()
    # not sys.path alone: an isolated build does not see the environment it installs into
    sites = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    for site in dict.fromkeys(filter(None, sites)):
        for nvcc in sorted(Path(site, "nvidia").glob("cu*/bin/nvcc")):
            # one folder per toolkit (cu13), or one per component (cuda_nvcc, cuda_runtime, ...)
            parts = sorted(nvcc.parents[2].glob(f"{nvcc.parents[1].name.split('_')[0]}*"))
            include = [f"-I{p / 'include'}" for p in parts if (p / "include").is_dir()]
            library = [f"-L{p / 'lib'}" for p in parts if (p / "lib").is_dir()]
            yield nvcc, (*include, *library)


_PROBE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
__global__ void probe(float* x) { *x = __bfloat162float(__float2bfloat16_rn(*x)); }
extern "C" void launch(float* x) { probe<<<1, 1>>>(x); }
"""


def run(command: list[object], patience: float, **options: Any) -> tuple[int, str]:
    """Exit status (negative: the signal) and what a program said, in whatever letters.

    It is killed with all that it started when it takes longer than `patience`, or with this process
    told to stop.

    Raises:
        Unbuildable: it did not end in time.
        OSError: it cannot be started.
    """
    with subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        **options,
    ) as process:
        try:
            said, _ = process.communicate(timeout=patience)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                name = Path(str(command[0])).name
                raise Unbuildable(f"{name} did not end in {patience:g} s") from None
            raise
    return process.returncode, said


def _output(command: list[object], **options: Any) -> str:
    status, said = run(command, PATIENCE_TO_ASK, **options)
    if status != 0:
        raise Unbuildable(first_error(said, status))
    return said


def first_error(said: str, status: int) -> str:
    """The line that tells most."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [
        line for line in lines if re.search("error|fatal|not found|cannot|No (such|space)", line)
    ]
    if telling or lines:
        return (telling or lines)[0][:300]
    if status < 0:
        return f"was ended by signal {-status}, without a word"
    return f"ended with status {status}, without a word"


def inspect(nvcc: Path, flags: tuple[str, ...] = ()) -> Toolkit:
    """Tries a compiler on a file that needs what ours need, unless this very one has passed before.

    Raises:
        Unbuildable: it is too old, or cannot compile or link.
    """
    passed = OBJECTS / "toolkit.json"
    said = _output([nvcc, "--version"])
    key = [str(nvcc), nvcc.stat().st_mtime_ns, list(flags), said, _PROBE]
    with contextlib.suppress(OSError, ValueError, KeyError):
        before = json.loads(passed.read_text())
        if before["key"] == key:
            return Toolkit(nvcc, before["version"], tuple(before["known"]), flags)
    version = re.search(r"release (\d+)\.(\d+)", said)
    if version is None:
        raise Unbuildable("does not say its version")
    if (int(version[1]), int(version[2])) < OLDEST_NVCC:
        raise Unbuildable(
            f"is version {version[1]}.{version[2]}, {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} is needed"
        )
    known = tuple(re.findall(r"sm_(\d+)\b", _output([nvcc, "--list-gpu-code"])))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cu").write_text(_PROBE)
        _output(
            [nvcc, *FLAGS, *flags, *code_flags(("80",)), *LINK, "probe.cu", "-o", "probe.so"],
            cwd=folder,
        )
    toolkit = Toolkit(nvcc, f"{version[1]}.{version[2]}", tuple(sorted(known, key=int)), flags)
    tried = {"key": key, "version": toolkit.version, "known": toolkit.known}
    with contextlib.suppress(OSError):  # then it is tried again next time
        passed.parent.mkdir(parents=True, exist_ok=True)
        write(passed, json.dumps(tried).encode())
    return toolkit


def find_toolkit() -> Toolkit:
    """The first compiler that works.

    Raises:
        Unbuildable: none does; says why each one did not.
    """
    if not sys.platform.startswith("linux"):
        raise Unbuildable("CUDA kernels are built on Linux only")
    home = os.environ.get("CUDA_HOME")
    reasons = {}
    for nvcc, flags in candidates():
        if nvcc in reasons:
            continue
        wanted = bool(home) and nvcc.parents[1] == Path(home)
        if nvcc.is_file():
            try:
                found = inspect(nvcc, flags)
            except (Unbuildable, OSError) as error:
                reasons[nvcc] = f"{nvcc}: {error}"
            else:
                if not home or wanted:
                    return found
                return replace(found, note=f"{'; '.join(reasons.values())}: {nvcc} took its place")
        elif wanted:
            reasons[nvcc] = f"CUDA_HOME={home} has no bin/nvcc"
    raise Unbuildable(
        "; ".join(reasons.values())
        or "nvcc was not found in CUDA_HOME, on PATH, in /usr/local/cuda or as a pip package"
    )


# ---- compiling


@dataclass
class Plan:
    """What to compile with what: one object per file, one library."""

    toolkit: Toolkit
    archs: tuple[str, ...]
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = OBJECTS / "-".join(self.archs)

    @property
    def sources(self) -> list[Path]:
        return sorted(SOURCES.glob("*.cu"))

    @property
    def library(self) -> Path:
        return self.folder / LIBRARY

    def object(self, source: Path) -> Path:
        return self.folder / f"{source.stem}.o"

    def log(self, source: Path) -> Path:
        """What ptxas said of the file's kernels: registers, spills, shared memory."""
        return self.folder / f"{source.stem}.o.log"

    def relative(self, source: Path) -> str:
        """The source from the build folder: nvcc reads `$` in a path as a shell would."""
        return os.path.relpath(source, os.path.realpath(self.folder))

    def compile_command(self, source: str, target: str) -> list[str]:
        flags = [*FLAGS, *self.toolkit.flags, *code_flags(self.archs)]
        return [
            str(self.toolkit.nvcc),
            *flags,
            "-MD",
            "-MF",
            f"{target}.d",
            "-c",
            source,
            "-o",
            target,
        ]

    def link_command(self, objects: list[str], target: str) -> list[str]:
        # the map lies in the build folder: nvcc takes a path with spaces apart for the linker
        script = ["-Xlinker", f"--version-script={EXPORTS}"]
        flags = [*LINK, *self.toolkit.flags, *code_flags(self.archs), *script]
        return [str(self.toolkit.nvcc), *flags, *objects, "-o", target]


def _ninja_file(plan: Plan) -> str:
    def shell(words: list[str]) -> str:
        quoted = shlex.join(words).replace("$", "$$")
        return quoted.replace("IN_FILE", "$in").replace("OUT_FILE", "$out")

    def path(file: str) -> str:
        return re.sub(r"([$ :])", r"$\1", file)

    compiling = shell(plan.compile_command("IN_FILE", "OUT_FILE"))
    lines = [
        "rule compile",
        f"  command = {compiling} > $out.log 2>&1 || (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shell(plan.link_command(['IN_FILE'], 'OUT_FILE'))}",
    ]
    objects = []
    for source in plan.sources:
        objects.append(path(plan.object(source).name))
        lines.append(f"build {objects[-1]}: compile {path(plan.relative(source))}")
    lines.append(f"build {LIBRARY}: link {' '.join(objects)} | {EXPORTS}")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks; `path` is a file or a folder."""
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def find_ninja() -> str | None:
    """That of this environment first: builds by different versions do not know of each other."""
    own = str(Path(sysconfig.get_path("scripts"), "ninja"))
    for ninja in (own, shutil.which("ninja")):
        with contextlib.suppress(OSError, Unbuildable):
            if ninja is not None and re.match(r"\d+\.\d+", _output([ninja, "--version"])):
                return ninja
    return None


def compile_library(plan: Plan) -> Path:
    """Compiles what changed and links; the library in the build folder.

    Raises:
        Unbuildable: a file does not compile. The compiler's words are on stderr.
        OSError: the build folder cannot be written.
    """
    parallel = jobs()
    # nvcc compiles several architectures of a file at a time, for the files are few. Not in the
    # command, so that another number of jobs is no reason to compile again.
    append = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --threads {parallel}".strip()
    environment = {**os.environ, "NVCC_APPEND_FLAGS": append}
    plan.folder.mkdir(parents=True, exist_ok=True)
    with alone(plan.folder):
        shutil.copy2(SOURCES / EXPORTS, plan.folder)
        failure = None
        if ninja := find_ninja():
            failure = _compile_changed(plan, ninja, parallel, environment)
        if ninja is None or (failure is not None and "FAILED: " not in failure[1]):
            failure = _compile_all(plan, parallel, environment)  # ninja itself is what failed
    if failure is not None:
        status, said = failure
        print(said, file=sys.stderr)
        raise Unbuildable(f"{plan.toolkit.nvcc} failed: {first_error(said, status)}")
    return plan.library


Failure = tuple[int, str] | None  # exit status and words of what failed


def _compile_changed(plan: Plan, ninja: str, parallel: int, environment: dict[str, str]) -> Failure:
    (plan.folder / "build.ninja").write_bytes(os.fsencode(_ninja_file(plan)))
    command = [ninja, "-j", parallel, "--quiet"]
    status, said = run(command, PATIENCE_TO_COMPILE, cwd=plan.folder, env=environment)
    return (status, said) if status != 0 else None


def _compile_all(plan: Plan, parallel: int, environment: dict[str, str]) -> Failure:
    """Without ninja: every file."""

    def ended(command: list[str]) -> tuple[int, str]:
        return run(command, PATIENCE_TO_COMPILE, cwd=plan.folder, env=environment)

    def compile_one(source: Path) -> Failure:
        status, said = ended(plan.compile_command(plan.relative(source), plan.object(source).name))
        plan.log(source).write_text(said, encoding="utf-8")
        return (status, said) if status != 0 else None

    with ThreadPoolExecutor(parallel) as pool:
        failures = [failure for failure in pool.map(compile_one, plan.sources) if failure]
    if failures:
        return failures[0]
    objects = [plan.object(source).name for source in plan.sources]
    status, said = ended(plan.link_command(objects, plan.library.name))
    return (status, said) if status != 0 else None


# ---- the whole


@dataclass(frozen=True)
class Outcome:
    """A library and how it was made, or None and the reason."""

    library: Path | None
    record: dict


def build() -> Outcome:
    """Compiles as the environment demands; one line says that it starts, one what came of it.

    Raises:
        SystemExit: a variable has a value that means nothing, or PAE_CUDA=require and it failed.
    """
    start = time.monotonic()
    demand = demanded()
    if demand == "off":
        return _without("PAE_CUDA was off when this was installed")
    try:
        toolkit = find_toolkit()
        plan = Plan(toolkit, architectures(toolkit.known))
        if toolkit.note:
            say(toolkit.note)
        codes = [f"sm_{arch}" for arch in plan.archs] + [f"compute_{plan.archs[-1]}"]
        kernels = f"CUDA kernels for {' '.join(codes)}, nvcc {toolkit.version}"
        say(f"compiling {kernels}: minutes the first time; PAE_CUDA=off leaves them out")
        library = compile_library(plan)
    except Exception as error:  # whatever it is, `auto` goes on without
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"{OBJECTS} cannot be used ({error}); make room, or remove that folder"
        elif not isinstance(error, Unbuildable):
            reason = f"{type(error).__name__}: {error}"
        reason = " ".join(reason.split())
        if demand == "require":
            raise SystemExit(f"PAE_CUDA=require: {reason}") from None
        return _without(reason)
    say(f"{kernels}, {time.monotonic() - start:.0f} s")
    record = {"nvcc": toolkit.version, "architectures": codes, "flags": list(FLAGS)}
    return Outcome(library, {**record, "note": toolkit.note} if toolkit.note else record)


def _without(reason: str) -> Outcome:
    say(f"no CUDA kernels: {reason}")
    return Outcome(None, {"reason": reason})


def say(text: str) -> None:
    """One line on stdout, in whatever letters it takes; pip shows it with -v."""
    letters = sys.stdout.encoding or "ascii"
    line = f"pae: {text}".encode(letters, "backslashreplace").decode(letters)
    print(line, flush=True)


def place(
    outcome: Outcome, folder: Path, library_name: str = LIBRARY, record_name: str = RECORD
) -> None:
    """Puts the library and its record into a package folder; without one, takes an old one away.

    The record has the library's SHA-256: what is loaded is what was built.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = dict(outcome.record)
    if outcome.library is None:
        (folder / library_name).unlink(missing_ok=True)
    else:
        library = outcome.library.read_bytes()
        record["sha256"] = hashlib.sha256(library).hexdigest()
        write(folder / library_name, library)
    write(folder / record_name, (json.dumps(record, indent=1) + "\n").encode())


def write(path: Path, content: bytes) -> None:
    """Renamed into place: who has the old one mapped keeps it, and nobody sees a part of it."""
    copy = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        copy.write_bytes(content)
        copy.replace(path)
    except BaseException:
        copy.unlink(missing_ok=True)
        raise


def install(folder: Path) -> Outcome:
    """`build`, and `place` into a package folder; what is there then.

    Raises:
        SystemExit: as `build` does; PAE_CUDA=require, and the folder cannot take the library.
    """
    outcome = build()
    try:
        place(outcome, folder)
    except OSError as error:
        if demanded() == "require":
            raise SystemExit(f"PAE_CUDA=require: {error}") from None
        outcome = _without(str(error))
        place(outcome, folder)
    return outcome


if __name__ == "__main__":
    with alone(ROOT):
        install(PACKAGE)
