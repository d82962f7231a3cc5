"""Which version of an op runs, and what is said when it cannot."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import pae_kernels.__main__
from pae_kernels import attention, backends, cpu, native, pointwise  # noqa: F401  (importing registers)
from tests.processes import ROOT, run

PACKAGE = Path(backends.__file__).parent


def test_what_runs_on_a_cpu(monkeypatch):
    """The C++ kernels in fp32 and bf16, where they are built; else the reference."""
    monkeypatch.delenv("PAE_BACKEND", raising=False)
    chosen = lambda dtype: {
        backends.choose(op, "cpu", dtype).__name__.rpartition(".")[2]
        for op in ("prompt_attention", "pointwise")
    }
    assert chosen(torch.float64) == chosen(torch.float16) == {"reference"}
    monkeypatch.setattr(cpu, "_own", lambda: "not built")
    assert chosen(torch.float32) == {"reference"}
    monkeypatch.setattr(cpu, "unavailable", lambda: None)
    assert chosen(torch.float32) == chosen(torch.bfloat16) == {"cpu"}


def test_a_forced_version_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setenv("PAE_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="PAE_BACKEND=triton cannot run pointwise on cpu: trit"):
        backends.choose("pointwise", "cpu")
    monkeypatch.setenv("PAE_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="pointwise has no such version, only"):
        backends.choose("pointwise", "cpu")


def test_an_unknown_version_is_named(monkeypatch):
    monkeypatch.setenv("PAE_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"PAE_BACKEND must be auto or one of .* got 'fast'"):
        backends.choose("pointwise", "cpu")


def test_kernels_say_what_they_need(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a GPU" in backends.with_triton("cpu", torch.float32)
    assert "float64" in backends.with_triton("cuda", torch.float64)
    assert backends.with_triton("cuda", torch.bfloat16) is None


@pytest.mark.parametrize(
    ("capability", "hip", "version", "reason"),
    [
        ((9, 0), None, "triton", None),
        ((8, 6), None, "triton", None),
        ((7, 5), None, "sdpa", "has tiles for sm_80 to sm_120, this GPU is sm_75"),
        ((13, 0), None, "sdpa", "has tiles for sm_80 to sm_120, this GPU is sm_130"),
        ((9, 4), "6.4", "sdpa", "has tiles for NVIDIA's GPUs, this is one of AMD"),
    ],
)
def test_attention_on_gpus_that_tiles_are_not_for(monkeypatch, capability, hip, version, reason):
    monkeypatch.delenv("PAE_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    chosen = lambda dtype: backends.choose("prompt_attention", "cuda", dtype).__name__
    assert chosen(torch.bfloat16).endswith(f".{version}")
    assert chosen(torch.float64).endswith(".reference")
    assert backends.with_triton_tiles("cuda", torch.bfloat16) == reason
    # asked for by name alone on a CPU
    assert "PAE_BACKEND=sdpa" in backends.with_sdpa("cpu", torch.float32)
    monkeypatch.setenv("PAE_BACKEND", "sdpa")
    assert backends.choose("prompt_attention", "cpu").__name__.endswith(".sdpa")


# ---- the diagnostic


def diagnose(*arguments, cwd=None, status=0, **environment):
    """What `python -m pae_kernels` prints, which has no traceback whatever is wrong."""
    done = run(
        [sys.executable, "-m", "pae_kernels", *arguments], env=environment, cwd=cwd, check=False
    )
    assert done.stderr == "" and done.returncode == status, done.stderr
    return done.stdout


def test_table_is_printed():
    said = diagnose()
    for op in ("prompt_attention", "pointwise", "koopman", "shortcut"):
        assert op in said
    assert "reference" in said
    assert said.startswith(f"pae_kernels in {PACKAGE}\n")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("raise ModuleNotFoundError(name='triton')", "package triton is not installed"),
        (
            "raise OSError('libtriton.so: too short\\nto load')",
            "package triton cannot be imported: OSError: libtriton.so: too short to load",
        ),
        ("raise SystemExit('no')", "package triton cannot be imported: SystemExit: no"),
        ("import absent", "package triton cannot be imported: ModuleNotFoundError: No module name"),
    ],
)
def test_triton_absent_or_broken(monkeypatch, tmp_path, module, said):
    (tmp_path / "triton.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    assert backends.import_failure("triton").startswith(said)
    monkeypatch.setattr(backends, "_triton_failure", lambda: said)
    monkeypatch.delenv("PAE_BACKEND", raising=False)
    # a GPU's tensors go to the reference, which says nothing of Triton; demanded, it is an error
    assert backends.choose("pointwise", "cuda").__name__.endswith("reference")
    monkeypatch.setenv("PAE_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=f"cannot run pointwise on cuda: triton: {said[:30]}"):
        backends.choose("pointwise", "cuda")


def test_the_package_and_its_diagnostic_without_triton(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['triton'] = None")
    code = """
import pae, pae_kernels.__main__, timm, torch
pae_kernels.__main__.main([])
vit = timm.create_model("test_vit", img_size=32, num_classes=3)
model = pae.PromptedViT(vit, pae.prompts.VPTDeep(num_tokens=2), kld=pae.KLD(dim=4))
x = torch.randn(2, 3, 32, 32)
loss = pae.fast_forward(model, x).square().sum() + model.penalty()
loss.backward()
print("trained")
"""
    done = run([sys.executable, "-c", code], env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert "\npackage triton is not installed\n" in done.stdout
    assert re.search(r"^prompt_attention +cpu +(cpu|reference)", done.stdout, re.M)
    assert done.stdout.endswith("\ntrained\n")


def test_the_diagnostic_without_pytorch(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudnn.so.9: cannot open')")
    said = diagnose(status=1, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert said.endswith("\npae_kernels cannot be imported: OSError: libcudnn.so.9: cannot open\n")


def test_the_diagnostic_from_an_archive_that_hides_an_install(tmp_path):
    """Of this package in the folder `site`, once as pip leaves it and once editable."""
    archive = tmp_path / "pae.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for source in [*PACKAGE.rglob("*.py"), ROOT / "pae" / "version.py"]:
            file.write(source, source.relative_to(ROOT))
    site, checkout = tmp_path / "site", tmp_path / "the checkout"
    for root in (site, checkout):
        (root / "pae_kernels").mkdir(parents=True)
    for name, text in (("pae-1", "null"), ("pae-2", editable(checkout))):
        (site / f"{name}.dist-info").mkdir()
        (site / f"{name}.dist-info" / "METADATA").write_text("Name: pae\nVersion: 1\n")
        if text != "null":
            (site / f"{name}.dist-info" / "direct_url.json").write_text(text)
    said = diagnose(cwd=tmp_path, PYTHONPATH=f"{archive}{os.pathsep}{site}")
    assert said.startswith(f"pae_kernels in {archive}/pae_kernels\n")
    for root in (site, checkout):
        assert f"it hides the package installed in {root / 'pae_kernels'}: it comes first" in said
    assert f"none: {archive} is an archive, and libraries are loaded from folders only" in said


def editable(root):
    return json.dumps({"url": root.as_uri(), "dir_info": {"editable": True}})


def test_the_diagnostic_names_an_unknown_version(monkeypatch, capsys):
    monkeypatch.setenv("PAE_BACKEND", "fast")
    assert pae_kernels.__main__.main([]) == 0
    said = capsys.readouterr().out
    assert "PAE_BACKEND must be auto or one of" in said and "got 'fast'; every op refuses" in said
    assert re.search(r"^pointwise +cpu +(cpu|reference)", said, re.M)


def test_what_goes_wrong_in_between_is_one_line(monkeypatch, capsys):
    def broken():
        raise RuntimeError("something\nelse")

    monkeypatch.setattr(native, "describe", broken)
    assert pae_kernels.__main__.main([]) == 1
    said = capsys.readouterr().out
    assert "\nRuntimeError: something else\n" in said and "\nop  " in said


# ---- a library that cannot be used


@pytest.fixture
def place(monkeypatch, tmp_path):
    """place(library, record) puts both where the package looks for them."""

    def put(library, record):
        for name, content in ((native.PATH.name, library), (native.BUILD.name, record)):
            if content is not None:
                content = content.encode() if isinstance(content, str) else content
                (tmp_path / name).write_bytes(content)
            monkeypatch.setattr(
                native, "PATH" if name == native.PATH.name else "BUILD", tmp_path / name
            )
        monkeypatch.setattr(native, "_loaded", None)
        monkeypatch.setattr(native, "_failure", None)
        return tmp_path

    return put


def record(library, **others):
    digest = hashlib.sha256(library).hexdigest()
    return json.dumps({"nvcc": "13.0", "architectures": ["sm_80"], "sha256": digest, **others})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"reason": 5}', '{"nvcc": "13.0"}', "[" * 100_000, b"\xff\xfe"]
    + [record(b"", architectures=[80]), record(b"", nvcc=13.0), record(b"", sha256=None)],
    ids=range(11),
)
def test_a_damaged_record(place, text):
    folder = place(b"", text)
    said = native.describe()
    assert said.startswith(f"none: {folder / native.BUILD.name} ") and "\n" not in said
    assert said.endswith("install the package again")
    assert native.unavailable() == said.removeprefix("none: ")


def test_a_truncated_library_is_not_loaded(place, tiny_library):
    """Mapped and read past its end, it would end the process with SIGBUS."""
    whole = tiny_library("int x[100000] = {1};").read_bytes()
    folder = place(whole[: len(whole) // 3], record(whole))
    said = f"{folder / native.PATH.name} is damaged, or was built apart from its record: install"
    assert native.unavailable().startswith(said)
    assert f"; cannot run here: {said}" in native.describe()
    (folder / native.PATH.name).unlink()
    assert native.unavailable().startswith(said)  # tried once
    place(None, None)
    assert native.unavailable() == f"{native.PATH} is missing: install the package again"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("int other() { return 0; }", "has no function pae_abi_version: install the package again"),
        (
            "int pae_abi_version() { return 77; } char* pae_last_error() { return 0; }"
            " int pae_probe() { return 0; }",
            f"has interface 77, this package expects {native.ABI_VERSION}: install the package",
        ),
        (b"no library" * 100, "invalid ELF header"),
    ],
)
def test_another_library(place, tiny_library, source, said):
    content = source if isinstance(source, bytes) else tiny_library(source).read_bytes()
    folder = place(content, record(content))
    assert said in native.unavailable() and str(folder) in native.unavailable()
    assert native.describe().endswith(native.unavailable())
    with pytest.raises(RuntimeError, match=said):
        native.call("pae_probe", native._Probe(), torch.device("cuda"))


@pytest.fixture
def tiny_library(tmp_path):
    """tiny_library(C source) -> path of a shared object."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")

    def build(source):
        (tmp_path / "tiny.c").write_text(source)
        run(["gcc", "-shared", "-fPIC", tmp_path / "tiny.c", "-o", tmp_path / "tiny.so"])
        return tmp_path / "tiny.so"

    return build
