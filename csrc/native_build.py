"""Compiles csrc/*.cu into one library with nvcc. Needs nothing but Python's standard library.

    python csrc/native_build.py      # into pae_kernels/, as `pip install -e .` does

Environment:
    PAE_CUDA        auto: built where nvcc works, else the install goes on without (default);
                    require: an error where it does not; off: not built.
    PAE_CUDA_ARCHS  architectures, "90" or "80;90"; default: all shipped ones that nvcc knows.
    MAX_JOBS        compilers at a time; default: one per core.
    CUDA_HOME       where nvcc is looked for first; then PATH, /usr/local/cuda, the pip package.

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
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

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
    """

    nvcc: Path
    version: str
    known: tuple[str, ...]
    flags: tuple[str, ...] = ()


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


def _output(command: list[object], **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    said = done.stdout + done.stderr
    if done.returncode != 0:
        raise Unbuildable(_first_error(said))
    return said


def _first_error(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no message"]
    telling = [line for line in lines if re.search("error|fatal|not found|cannot|No such", line)]
    return (telling or lines)[0][:300]


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
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.write_text(json.dumps({"key": key, "version": toolkit.version, "known": toolkit.known}))
    return toolkit


def find_toolkit() -> Toolkit:
    """The first compiler that works.

    Raises:
        Unbuildable: none does; says why each one did not.
    """
    if not sys.platform.startswith("linux"):
        raise Unbuildable("CUDA kernels are built on Linux only")
    reasons = {}
    for nvcc, flags in candidates():
        if nvcc.is_file() and nvcc not in reasons:
            try:
                return inspect(nvcc, flags)
            except (Unbuildable, OSError) as error:
                reasons[nvcc] = f"{nvcc}: {error}"
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

    def path(file: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(file))

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
        objects.append(path(plan.object(source)))
        lines.append(f"build {objects[-1]}: compile {path(source)}")
    lines.append(f"build {path(plan.library)}: link {' '.join(objects)} | {EXPORTS}")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One build at a time in a folder."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_ninja() -> str | None:
    """That of this environment first: builds by different versions do not know of each other."""
    own = Path(sysconfig.get_path("scripts"), "ninja")
    return str(own) if own.is_file() else shutil.which("ninja")


def compile_library(plan: Plan) -> Path:
    """Compiles what changed and links; the library in the build folder.

    Raises:
        Unbuildable: a file does not compile. The compiler's words are on stderr.
    """
    parallel = jobs()
    # nvcc compiles several architectures of a file at a time, for the files are few. Not in the
    # command, so that another number of jobs is no reason to compile again.
    append = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --threads {parallel}".strip()
    environment = {**os.environ, "NVCC_APPEND_FLAGS": append}
    with _alone(plan.folder):
        shutil.copy2(SOURCES / EXPORTS, plan.folder)
        if ninja := find_ninja():
            file = plan.folder / "build.ninja"
            file.write_text(_ninja_file(plan))
            done = subprocess.run(
                [ninja, "-f", str(file), "-j", str(parallel), "--quiet"],
                cwd=plan.folder,
                env=environment,
                capture_output=True,
                text=True,
            )
            failures = [] if done.returncode == 0 else [done.stdout + done.stderr]
        else:
            failures = _compile_all(plan, parallel, environment)
    if failures:
        print(*failures, sep="\n", file=sys.stderr)
        raise Unbuildable(f"{plan.toolkit.nvcc} failed: {_first_error(''.join(failures))}")
    return plan.library


def _compile_all(plan: Plan, parallel: int, environment: dict[str, str]) -> list[str]:
    """Without ninja: every file. The output of what failed."""

    def run(command: list[str]) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=plan.folder, env=environment, capture_output=True, text=True
        )

    def compile_one(source: Path) -> str | None:
        done = run(plan.compile_command(str(source), str(plan.object(source))))
        plan.log(source).write_text(done.stdout + done.stderr)
        return None if done.returncode == 0 else done.stdout + done.stderr

    with ThreadPoolExecutor(parallel) as pool:
        failures = [said for said in pool.map(compile_one, plan.sources) if said is not None]
    if not failures:
        objects = [str(plan.object(source)) for source in plan.sources]
        done = run(plan.link_command(objects, str(plan.library)))
        failures = [] if done.returncode == 0 else [done.stdout + done.stderr]
    return failures


# ---- the whole


@dataclass(frozen=True)
class Outcome:
    """A library and how it was made, or None and the reason."""

    library: Path | None
    record: dict


def build() -> Outcome:
    """Compiles as the environment demands, and says in one line what came of it.

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
        library = compile_library(plan)
    except Unbuildable as error:
        if demand == "require":
            raise SystemExit(f"PAE_CUDA=require: {error}") from None
        return _without(str(error))
    codes = [f"sm_{arch}" for arch in plan.archs] + [f"compute_{plan.archs[-1]}"]
    seconds = time.monotonic() - start
    print(f"pae: CUDA kernels for {' '.join(codes)}, nvcc {toolkit.version}, {seconds:.0f} s")
    record = {"nvcc": toolkit.version, "architectures": codes, "flags": list(FLAGS)}
    return Outcome(library, record)


def _without(reason: str) -> Outcome:
    print(f"pae: no CUDA kernels: {reason}")
    return Outcome(None, {"reason": reason})


def place(outcome: Outcome, folder: Path) -> None:
    """Puts the library and its record into a package folder; without one, takes an old one away.

    The record has the library's SHA-256: what is loaded is what was built.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = dict(outcome.record)
    if outcome.library is None:
        (folder / LIBRARY).unlink(missing_ok=True)
    else:
        library = outcome.library.read_bytes()
        record["sha256"] = hashlib.sha256(library).hexdigest()
        _write(folder / LIBRARY, library)
    _write(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    """Renamed into place: who has the old one mapped keeps it, and nobody sees a part of it."""
    copy = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        copy.write_bytes(content)
        copy.replace(path)
    except BaseException:
        copy.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    place(build(), PACKAGE)
