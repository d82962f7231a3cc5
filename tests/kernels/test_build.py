"""How the kernels get compiled: what is asked for, which nvcc is found, what a wheel holds.

And what the compiler says of every kernel that ships.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))

import native_build  # noqa: E402

from pae_kernels import native  # noqa: E402
from tests.processes import run  # noqa: E402

KNOWN = ("75", "80", "86", "89", "90", "100", "120")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("PAE_CUDA", "PAE_CUDA_ARCHS", "MAX_JOBS", "CUDA_HOME", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PAE_CPU", "off")  # the kernels for CPUs have tests of their own


def toolkit():
    """The compiler of this machine."""
    try:
        return native_build.find_toolkit()
    except native_build.Unbuildable as error:
        pytest.skip(str(error))


# ---- what is asked for


def test_architectures_are_the_shipped_ones_that_nvcc_knows():
    assert native_build.architectures(KNOWN) == ("80", "86", "89", "90", "100", "120")
    assert native_build.architectures(KNOWN[:5]) == ("80", "86", "89", "90")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("90", ("90",)),
        ("90;80", ("80", "90")),
        ("8.0, 9.0 12.0", ("80", "90", "120")),
        ("sm_100;sm_90;90", ("90", "100")),
    ],
)
def test_chosen_architectures(monkeypatch, text, chosen):
    monkeypatch.setenv("PAE_CUDA_ARCHS", text)
    assert native_build.architectures(KNOWN) == chosen


@pytest.mark.parametrize(
    ("text", "bad"), [("75", "75"), ("90;hopper", "hopper"), ("91", "91"), ("9", "9")]
)
def test_architectures_that_mean_nothing(monkeypatch, text, bad):
    monkeypatch.setenv("PAE_CUDA_ARCHS", text)
    expected = f"of 80 86 89 90 100 120, as in \"80;90\", got '{bad}' in '{text}'"
    with pytest.raises(SystemExit, match=re.escape(expected)):
        native_build.architectures(KNOWN)


def test_code_for_every_architecture_and_one_intermediate():
    assert native_build.code_flags(("80", "86", "90")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_no_kernel_asks_for_its_architecture():
    """`code_flags` lets several share what one of them was compiled to."""
    files = [*(ROOT / "csrc").glob("*.cu"), *(ROOT / "csrc").glob("*.cuh")]
    assert not [file.name for file in files if "__CUDA_ARCH__" in file.read_text()]


def test_values_that_mean_nothing(monkeypatch):
    monkeypatch.setenv("PAE_CUDA", "yes")
    with pytest.raises(SystemExit, match="PAE_CUDA must be auto, require or off, got 'yes'"):
        native_build.build()
    for value in ("0", "many", "-1"):
        monkeypatch.setenv("MAX_JOBS", value)
        with pytest.raises(SystemExit, match="MAX_JOBS must be a positive number"):
            native_build.jobs()
    monkeypatch.setenv("MAX_JOBS", "3")
    assert native_build.jobs() == 3


# ---- nvcc


def a_program(path, script="exit 1"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_nvcc_is_looked_for_in_order(monkeypatch, tmp_path):
    home, path, system = (
        a_program(tmp_path / where / "bin" / "nvcc") for where in ("home", "path", "system")
    )
    site = tmp_path / "site"
    whole = a_program(site / "nvidia" / "cu13" / "bin" / "nvcc")
    parted = a_program(site / "nvidia" / "cuda_nvcc" / "bin" / "nvcc")
    for folder in ("cu13/include", "cuda_nvcc/include", "cuda_runtime/include", "cuda_runtime/lib"):
        (site / "nvidia" / folder).mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setattr(native_build.sysconfig, "get_path", lambda name: str(site))
    monkeypatch.setattr(sys, "path", [])
    found = list(native_build.candidates(system.parents[1]))
    assert [nvcc for nvcc, _ in found] == [home, path, system, whole, parted]
    flags = dict(found)
    assert flags[home] == flags[path] == flags[system] == ()
    assert flags[whole] == (f"-I{site}/nvidia/cu13/include",)
    assert flags[parted] == (
        f"-I{site}/nvidia/cuda_nvcc/include",
        f"-I{site}/nvidia/cuda_runtime/include",
        f"-L{site}/nvidia/cuda_runtime/lib",
    )


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo release 11.8, V11.8.89", "is version 11.8, 12.4 is needed"),
        ("echo hello", "does not say its version"),
        ("echo cannot run >&2; exit 3", "cannot run"),
        ("exit 3", "ended with status 3, without a word"),
        ("kill -SEGV $$", "was ended by signal 11, without a word"),
        (r"printf '\377\376 caf\351\n'; exit 1", "\ufffd\ufffd caf\ufffd"),
        ("sleep 1000 & wait", "nvcc did not end in 1 s"),
        (
            "case $1 in --version) echo release 13.0, ;; --list-gpu-code) echo sm_80 ;; *) echo x;"
            ' echo "a.h:1: fatal error: nv/target: No such file"; exit 1 ;; esac',
            "a.h:1: fatal error: nv/target: No such file",
        ),
    ],
)
def test_why_a_compiler_cannot_be_used(monkeypatch, tmp_path, script, reason):
    monkeypatch.setattr(native_build, "OBJECTS", tmp_path)
    monkeypatch.setattr(native_build, "PATIENCE_TO_ASK", 1)
    nvcc = a_program(tmp_path / "nvcc", script)
    with pytest.raises(native_build.Unbuildable, match=re.escape(reason)):
        native_build.inspect(nvcc)
    monkeypatch.setattr(native_build, "candidates", lambda: [(nvcc, ()), (tmp_path / "no", ())])
    outcome = native_build.build()
    assert outcome.library is None and outcome.record == {"reason": f"{nvcc}: {reason}"}


def test_a_compiler_is_tried_once(monkeypatch, tmp_path):
    monkeypatch.setattr(native_build, "OBJECTS", tmp_path / "objects")
    count = f"[ $1 = --version ] || echo x >> {tmp_path}/calls"
    script = f"{count}; echo release 12.9, sm_80 sm_120 sm_90"
    nvcc = a_program(tmp_path / "nvcc", script)
    first = native_build.inspect(nvcc)
    assert (first.version, first.known) == ("12.9", ("80", "90", "120"))
    calls = (tmp_path / "calls").read_text()
    assert native_build.inspect(nvcc) == first
    assert (tmp_path / "calls").read_text() == calls
    os.utime(nvcc, (0, 0))
    native_build.inspect(nvcc)
    assert (tmp_path / "calls").read_text() != calls


# its last argument is what it makes
WORKING = """
echo release 12.9, sm_80
for last; do :; done
case $last in -*) ;; *) : > "$last" ;; esac"""


def test_a_wrong_cuda_home_is_named(monkeypatch, tmp_path, capsys):
    nvcc = a_program(tmp_path / "bin" / "nvcc", WORKING)
    monkeypatch.setattr(native_build, "OBJECTS", tmp_path / "objects")
    monkeypatch.setattr(native_build, "compile_library", lambda plan: nvcc)
    monkeypatch.setenv("PATH", f"{nvcc.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    note = f"CUDA_HOME=/nowhere has no bin/nvcc: {nvcc} took its place"
    assert native_build.build().record["note"] == note
    assert f"pae: {note}\n" in capsys.readouterr().out
    old = a_program(tmp_path / "old" / "bin" / "nvcc", "echo release 11.8,")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    note = f"{old}: is version 11.8, 12.4 is needed: {nvcc} took its place"
    assert native_build.build().record["note"] == note
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "note" not in native_build.build().record
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    monkeypatch.setattr(native_build.candidates, "__defaults__", (tmp_path / "no",))
    monkeypatch.setattr(native_build.sysconfig, "get_path", lambda name: None)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(native_build.Unbuildable, match=r"^CUDA_HOME=/nowhere has no bin/nvcc$"):
        native_build.find_toolkit()


def test_letters_that_the_terminal_does_not_have(monkeypatch, capsys):
    class Ascii(io.StringIO):
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Ascii())
    native_build.say("caf\u00e9 \udcff")
    assert sys.stdout.getvalue() == "pae: caf\\xe9 \\udcff\n"


@pytest.mark.parametrize("broken", ["build folder", "package folder", "anything else"])
def test_auto_goes_on_without(monkeypatch, tmp_path, capsys, broken):
    """With a build folder that is not to be used, no room for the library, or a defect of ours."""
    nvcc = a_program(tmp_path / "nvcc", WORKING)
    monkeypatch.setattr(native_build, "candidates", lambda: [(nvcc, ())])
    monkeypatch.setattr(native_build, "OBJECTS", tmp_path / "objects")
    package = tmp_path / "package"
    package.mkdir()
    (package / native_build.LIBRARY).write_text("of other sources")
    write = native_build.write

    def no_room(path, content):
        if path.name == native_build.LIBRARY:
            path.with_name("partly").write_text("")
            raise OSError(28, "No space left on device")
        write(path, content)

    if broken == "build folder":
        (tmp_path / "objects").write_text("in the way")
        said = f"{tmp_path}/objects cannot be used ([Errno 20] Not a directory"
    elif broken == "package folder":
        monkeypatch.setattr(native_build, "compile_library", lambda plan: nvcc)
        monkeypatch.setattr(native_build, "write", no_room)
        said = "No space left on device"
    else:
        monkeypatch.setattr(native_build, "compile_library", lambda plan: 1 / 0)
        said = "ZeroDivisionError: division by zero"
    outcome = native_build.install(package)
    assert outcome.library is None and said in outcome.record["reason"]
    assert f"pae: no CUDA kernels: {outcome.record['reason']}\n" in capsys.readouterr().out
    assert json.loads((package / native_build.RECORD).read_text()) == outcome.record
    assert not (package / native_build.LIBRARY).exists()
    monkeypatch.setenv("PAE_CUDA", "require")
    with pytest.raises(SystemExit) as refused:
        native_build.install(package)
    assert str(refused.value).startswith("PAE_CUDA=require: ") and said in str(refused.value)


def test_a_write_that_fails_leaves_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        native_build.write(tmp_path / "file", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "ninja",
    ["exit 1", "kill -9 $$", "[ $1 = --version ] && echo 1.11 || { echo broken; exit 3; }"],
)
def test_a_broken_ninja_is_done_without(monkeypatch, tmp_path, ninja):
    path = a_program(tmp_path / "scripts" / "ninja", ninja)
    monkeypatch.setattr(native_build.sysconfig, "get_path", lambda name: str(path.parent))
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    monkeypatch.setattr(native_build, "OBJECTS", tmp_path / "objects")
    nvcc = a_program(tmp_path / "nvcc", WORKING)
    plan = native_build.Plan(native_build.Toolkit(nvcc, "12.9", ("80",)), ("80",))
    assert native_build.compile_library(plan).is_file()
    assert all(plan.object(source).is_file() for source in plan.sources)


def test_without_a_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(native_build, "candidates", lambda: [(tmp_path / "nvcc", ())])
    outcome = native_build.build()
    said = capsys.readouterr().out
    assert said.startswith("pae: no CUDA kernels: nvcc was not found") and said.count("\n") == 1
    # an old library would be one of other sources
    (tmp_path / native_build.LIBRARY).write_text("old")
    native_build.place(outcome, tmp_path)
    assert not (tmp_path / native_build.LIBRARY).exists()
    monkeypatch.setattr(native, "PATH", tmp_path / native_build.LIBRARY)
    monkeypatch.setattr(native, "BUILD", tmp_path / native_build.RECORD)
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "_failure", None)
    assert native.describe().startswith("none: nvcc was not found in CUDA_HOME, on PATH")
    assert native.unavailable().startswith("nvcc was not found")
    monkeypatch.setenv("PAE_CUDA", "require")
    with pytest.raises(SystemExit, match="PAE_CUDA=require: nvcc was not found"):
        native_build.build()


# ---- packages


def version_of_setuptools():
    """It is not imported: up to Python 3.11 that fails in a process that has looked for pip."""
    try:
        return metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        pytest.skip("setuptools is not installed")


def build_wheel(tree, folder, **environment):
    """`pip wheel` of a source tree with the setuptools of this environment."""
    if int((version := version_of_setuptools()).split(".")[0]) < 77:
        pytest.skip(f"setuptools {version} is older than 77")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run([*command, "-q", "-w", folder, tree], env=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture
def tree(tmp_path):
    """The sources, with one kernel file: compiling the others proves nothing more here."""
    target = tmp_path / "tree"
    for name in ("pae", "pae_kernels", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "_native*", "_cpu*", "*.cu")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    shutil.copy(ROOT / "csrc" / "library.cu", target / "csrc")
    return target


def tags(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/WHEEL"))
        text = archive.read(name).decode()
        return re.findall(r"^Tag: (.*)$", text, re.M), archive.namelist()


def test_a_wheel_with_the_library_serves_every_python_of_its_platform(tree, tmp_path):
    toolkit()
    wheel = build_wheel(tree, tmp_path / "wheel", PAE_CUDA="require", PAE_CUDA_ARCHS="80")
    (tag,), names = tags(wheel)
    assert re.fullmatch(r"py3-none-linux_\w+", tag) and wheel.name.endswith(f"-{tag}.whl")
    assert "pae_kernels/_native.so" in names
    assert not [name for name in names if name.startswith(("csrc", "tests", "bench"))]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "out")
    folder = tmp_path / "out" / "pae_kernels"
    record = json.loads((folder / "_native_build.json").read_text())
    assert record["architectures"] == ["sm_80", "compute_80"]
    assert ctypes.CDLL(str(folder / "_native.so")).pae_abi_version() == native.ABI_VERSION
    assert not (tree / "pae_kernels" / "_native.so").exists()  # that of an editable install


def counting(tree, calls):
    """A stand-in for the build in `tree` that writes a line whenever it compiles."""
    source = tree / "csrc" / "native_build.py"
    stand_in = f"""
def compile_library(plan):
    with open({str(calls)!r}, "a") as file:
        file.write("compiled\\n")
    return Path({str(source)!r})


def find_toolkit():
    return Toolkit(Path("nvcc"), "13.0", ("80",))


if __name__"""
    source.write_text(source.read_text().replace("\nif __name__", stand_in))


def test_a_source_archive_is_whole(tmp_path):
    """With the tests and all that they read; `tests/matrix.sh` runs them from one."""
    version_of_setuptools()
    (tmp_path / "egg").mkdir()
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path / "egg"]
    run([*command, "sdist", "-d", tmp_path])
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("bench", "csrc", "docs", "pae", "pae_kernels", "tests")
    there = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    there += [file for file in ROOT.glob("*.*") if file.is_file()]
    made = re.compile(r"__pycache__|/_(native|cpu)[._]|\.(log|whl)$|\.egg-info|/\.")
    expected = {str(file.relative_to(ROOT)) for file in there}
    expected = {name for name in expected if not made.search(f"/{name}")}
    assert {"tests/conftest.py", "pae/configs/vpt-deep.toml", "mkdocs.yml", "setup.py"} <= expected
    assert not expected - found, sorted(expected - found)
    assert not [name for name in found if re.search(r"/_(native|cpu)[._].*(so|json)$", name)]


HOOKS = """
import sys, setuptools.build_meta as hooks
getattr(hooks, sys.argv[1])(*sys.argv[2:])
"""


def test_kernels_are_compiled_in_the_build_step_alone_and_once(tree, tmp_path):
    counting(tree, tmp_path / "calls")

    def hook(*arguments):
        (tmp_path / "calls").write_text("")
        done = run([sys.executable, "-c", HOOKS, *arguments], cwd=tree)
        said = [line for line in done.stdout.splitlines() if line.startswith("pae: ")]
        lines = [line for line in said if "CPU kernels" not in line]
        return (tmp_path / "calls").read_text().count("compiled"), lines

    for number, asks in enumerate(
        ("prepare_metadata_for_build_wheel", "prepare_metadata_for_build_editable", "build_sdist")
    ):
        (tmp_path / str(number)).mkdir()
        assert hook(asks, str(tmp_path / str(number))) == (0, []), asks
    assert hook("get_requires_for_build_wheel") == (0, [])
    for builds in ("build_wheel", "build_editable"):
        (tmp_path / builds).mkdir()
        count, lines = hook(builds, str(tmp_path / builds))
        assert count == 1 and len(lines) == 2, (builds, lines)
        assert lines[0].startswith("pae: compiling CUDA kernels for sm_80 compute_80, nvcc 13.0: ")
        assert re.fullmatch(r"pae: CUDA kernels for .*, nvcc 13.0, \d+ s", lines[1])
    (wheel,) = (tmp_path / "build_wheel").glob("*.whl")
    (tag,), names = tags(wheel)
    assert re.fullmatch(r"py3-none-linux_\w+", tag) and "pae_kernels/_native.so" in names


def test_two_installs_from_one_checkout_at_once(tree, tmp_path):
    counting(tree, tmp_path / "calls")
    source = tree / "csrc" / "native_build.py"
    # without turns, both would be here at the same time
    inside = f"""
    import time
    marker = Path({str(tmp_path / "inside")!r})
    marker.mkdir()
    time.sleep(0.5)
    marker.rmdir()
    with open("""
    source.write_text(source.read_text().replace("\n    with open(", inside, 1))
    with ThreadPoolExecutor(2) as pool:
        command = [sys.executable, "-c", HOOKS, "build_wheel"]
        both = [pool.submit(run, [*command, str(tmp_path / f"{i}")], cwd=tree) for i in range(2)]
        for each in both:
            each.result()
    first, second = (next((tmp_path / f"{i}").glob("*.whl")).read_bytes() for i in range(2))
    assert (tmp_path / "calls").read_text() == "compiled\ncompiled\n"
    assert len(first) == len(second)


def test_a_wheel_without_the_library_serves_all(tree, tmp_path):
    wheel = build_wheel(tree, tmp_path / "wheel", PAE_CUDA="off")
    (tag,), names = tags(wheel)
    assert tag == "py3-none-any"
    assert not [name for name in names if name.endswith(".so")]
    assert {"pae_kernels/_native_build.json", "pae_kernels/_cpu_build.json"} <= set(names)
    # `pae train --config vpt-deep` finds the published settings in it by name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "out")
    code = "from pae.train.options import find_config; print(find_config('vpt-deep'))"
    command = [sys.executable, "-c", code]
    done = run(command, env={"PYTHONPATH": str(tmp_path / "out")}, cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / "out" / "pae" / "configs" / "vpt-deep.toml")


def test_building_needs_neither_torch_nor_the_package():
    code = (
        "import sys; sys.modules.update(torch=None, pae=None, pae_kernels=None)\n"
        "sys.path.insert(0, 'csrc'); import native_build; print(native_build.SHIPPED)"
    )
    done = run([sys.executable, "-S", "-c", code])
    assert done.stdout.strip() == str(native_build.SHIPPED)


@pytest.mark.parametrize("with_ninja", [True, False], ids=["ninja", "plain"])
def test_compiling_twice(monkeypatch, tmp_path, with_ninja):
    """Blanks and `$` in paths; with ninja nothing is done again until a header changes."""
    found = toolkit()
    if not with_ninja:
        monkeypatch.setattr(native_build, "find_ninja", lambda: None)
    elif native_build.find_ninja() is None:
        pytest.skip("ninja is not installed")
    tmp_path = tmp_path / "a $HOME of its own"
    sources = tmp_path / "the sources"
    shutil.copytree(ROOT / "csrc", sources, ignore=shutil.ignore_patterns("*.cu", "host"))
    shutil.copy(ROOT / "csrc" / "library.cu", sources)
    monkeypatch.setattr(native_build, "SOURCES", sources)
    monkeypatch.setattr(native_build, "OBJECTS", tmp_path / "the objects")
    plan = native_build.Plan(found, ("80",))
    library = native_build.compile_library(plan)
    assert ctypes.CDLL(str(library)).pae_abi_version() == native.ABI_VERSION
    assert "Used" in plan.log(sources / "library.cu").read_text()
    if with_ninja:
        before = library.stat().st_mtime_ns
        native_build.compile_library(plan)
        assert library.stat().st_mtime_ns == before
        header = sources / "pae.h"
        header.write_text(header.read_text().replace("PAE_ABI_VERSION ", "PAE_ABI_VERSION 7"))
        native_build.compile_library(plan)
        assert library.stat().st_mtime_ns > before
    (sources / "library.cu").write_text("int x = nothing;\n")
    with pytest.raises(native_build.Unbuildable, match=r"failed: .*nothing"):
        native_build.compile_library(plan)


# ---- what ships


@pytest.fixture(scope="module")
def shipped():
    """The whole library for every architecture; an install has compiled it before."""
    found = toolkit()
    plan = native_build.Plan(found, tuple(a for a in native_build.SHIPPED if a in found.known))
    native_build.compile_library(plan)
    return plan


def resources(log):
    """(kernel, architecture) -> registers and spilled bytes, as ptxas tells."""
    said, kernel = {}, None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'", line):
            kernel = match.groups()
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(match[1]) + int(match[2])
        elif (match := re.search(r"Used (\d+) registers", line)) and kernel is not None:
            said[kernel] = int(match[1]), spilled
            kernel = None
    return said


def test_every_kernel_of_every_architecture_keeps_its_values_in_registers(shipped):
    spills = []
    for source in shipped.sources:
        used = resources(shipped.log(source).read_text())
        kernels = {kernel for kernel, _ in used}
        assert kernels, f"{source.name} has no kernel"
        # in namespace pae: the sanitizers of bench/gpu.sh find them by that name
        assert all(kernel.startswith("_ZN3pae") for kernel in kernels), kernels
        assert set(used) == {(kernel, arch) for kernel in kernels for arch in shipped.archs}
        for (kernel, arch), (registers, spilled) in sorted(used.items()):
            said = (
                f"{source.name} sm_{arch} {kernel}: {registers} registers, {spilled} bytes spilled"
            )
            print(said)
            spills += [said] * (spilled > 0)
    assert not spills, "\n".join(spills)


def test_the_library_shows_the_interface_and_nothing_else(shipped):
    header = (ROOT / "csrc" / "pae.h").read_text()
    declared = set(re.findall(r"^PAE_API [\w *]+\b(pae_\w+)\(", header, re.M))
    assert "pae_probe" in declared
    listed = run(["nm", "-D", "--defined-only", shipped.library]).stdout
    assert {line.split()[-1] for line in listed.splitlines()} == declared


def test_the_library_depends_on_no_cuda_library(shipped):
    said = run(["readelf", "-d", shipped.library]).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", said)
    system = ("libc.", "libm.", "libstdc++.", "libgcc_s.", "ld-linux", "libdl.", "librt.", "libpth")
    assert needed and all(name.startswith(system) for name in needed), needed


def test_without_a_driver_a_call_says_so(shipped):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    library = native.Library(shipped.library)
    probe = native._Probe()
    assert library.status("pae_probe", probe, None) == 2
    assert "cudaError" in library.last_error()
    with native.using(library):
        assert "cudaError" in native.unavailable()
        with pytest.raises(RuntimeError, match="pae_probe runs on a GPU, not on device cpu"):
            native.call("pae_probe", probe, torch.device("cpu"))
