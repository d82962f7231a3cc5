"""The library of kernels for CPUs: how it is built, loaded and chosen, on every instruction set.

What the kernels compute is tested beside each op.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil

import pytest
import torch
from torch import Tensor

from pae_kernels import cpu, native
from pae_kernels.attention import cpu as attention
from pae_kernels.attention import reference as attention_reference
from pae_kernels.koopman import cpu as koopman
from pae_kernels.pointwise import ACTIVATIONS, reference
from pae_kernels.pointwise import cpu as pointwise
from tests.errors import error
from tests.kernels import host_library
from tests.kernels.executions import BF16, FP32, FP64, sanitized
from tests.processes import ROOT, run

cpu_build = host_library.cpu_build


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("PAE_CPU", "CXX", "PAE_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def library():
    return host_library.cpu_library()


# ---- building


def a_program(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'kernels.cpp:1: error: no such type' >&2; exit 1", "error: no such type"),
        ("exit 3", "ended with status 3, without a word"),
        ("kill -9 $$", "was ended by signal 9"),
    ],
)
def test_a_compiler_that_fails(monkeypatch, tmp_path, capsys, script, said):
    compiler = a_program(tmp_path / "c++", script)
    monkeypatch.setenv("CXX", str(compiler))
    outcome = cpu_build.install(tmp_path / "package")
    assert outcome.library is None
    assert outcome.record["reason"].startswith(f"{compiler} failed: ")
    assert said in outcome.record["reason"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"pae: no CPU kernels: {outcome.record['reason']}"
    record = json.loads((tmp_path / "package" / "_cpu_build.json").read_text())
    assert record == outcome.record
    monkeypatch.setenv("PAE_CPU", "require")
    with pytest.raises(SystemExit, match=r"PAE_CPU=require: .* failed: "):
        cpu_build.install(tmp_path / "package")


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler was found" in cpu_build.build(tmp_path / "x.so").record["reason"]
    monkeypatch.setenv("CXX", "absent-c++ -m64")
    assert "absent-c++" in cpu_build.build(tmp_path / "x.so").record["reason"]


def test_values_that_mean_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PAE_CPU", "yes")
    with pytest.raises(SystemExit, match="PAE_CPU must be auto, require or off, got 'yes'"):
        cpu_build.build(tmp_path / "x.so")
    monkeypatch.setenv("PAE_CPU", "off")
    assert "PAE_CPU was off" in cpu_build.build(tmp_path / "x.so").record["reason"]


def test_the_library_that_was_built_is_the_one_that_is_loaded(monkeypatch, tmp_path, library):
    outcome = cpu_build.Outcome(library.path, {"compiler": "c++", "isas": ["portable"]})
    cpu_build.place(outcome, tmp_path, cpu_build.LIBRARY, cpu_build.RECORD)
    monkeypatch.setattr(cpu, "PATH", tmp_path / "_cpu.so")
    monkeypatch.setattr(cpu, "BUILD", tmp_path / "_cpu_build.json")

    def own():
        cpu._own.cache_clear()
        return cpu._own()

    try:
        assert isinstance(own(), native.Library)
        assert cpu.describe().startswith(f"{tmp_path}/_cpu.so, ")
        content = (tmp_path / "_cpu.so").read_bytes()
        (tmp_path / "_cpu.so").unlink()  # it is loaded: another file takes its name
        (tmp_path / "_cpu.so").write_bytes(content[: len(content) // 2])
        assert "is damaged, or was built apart from its record" in own()
        assert cpu.describe() == f"none: {own()}"
        (tmp_path / "_cpu.so").unlink()
        assert "_cpu.so is missing" in own()
        (tmp_path / "_cpu_build.json").write_text("{")
        assert "cannot be read" in own()
        (tmp_path / "_cpu_build.json").write_text("[]")
        assert "is damaged or of another version" in own()
        (tmp_path / "_cpu_build.json").unlink()
        assert "where a C++ compiler is found" in own()
        with pytest.raises(RuntimeError, match="where a C\\+\\+ compiler is found"):
            pointwise.layer_norm(torch.ones(2, 4), 1e-6, FP32)
    finally:
        cpu._own.cache_clear()


def test_another_library_is_refused():
    other = host_library.library("library.cu").path
    with pytest.raises(RuntimeError, match="has no function pae_cpu_isa"):
        cpu.load(other)


def test_the_library_shows_the_interface_and_needs_no_runtime(library):
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    header = (ROOT / "csrc" / "cpu" / "cpu.h").read_text()
    declared = set(re.findall(r"^PAE_API [^(]*?\b(pae_\w+)\(", header, re.M))
    listed = run(["nm", "-D", "--defined-only", library.path]).stdout
    assert set(re.findall(r" T (\w+)$", listed, re.M)) - {"_init", "_fini"} == declared
    # one pool of threads in a process: that of the OpenMP runtime which PyTorch brings
    needed = run(["nm", "-D", "--undefined-only", library.path]).stdout
    assert not re.search(r"GOMP|omp_|kmpc|pthread_create", needed)


def test_calls_that_mean_nothing(library):
    with cpu.using(library):
        right = {"rows": 1, "width": 4, "x": torch.ones(4), "xhat": torch.ones(4)}
        for change, said in (({"width": 0}, "width > 0"), ({"x_type": 1}, "is_float")):
            given = pointwise._NormForward(**{**right, **change})
            with pytest.raises(RuntimeError, match=f"pae_cpu_norm_fwd: not .*{said}"):
                cpu.call("pae_cpu_norm_fwd", given)
        given = pointwise._NormForward(**right)
        given.struct_size -= 8
        with pytest.raises(RuntimeError, match="the struct has another size"):
            cpu.call("pae_cpu_norm_fwd", given)
        with pytest.raises(RuntimeError, match=r"not .*kind"):
            cpu.call("pae_cpu_activation_fwd", pointwise._ActivationForward(kind=9))


# ---- instruction sets


def runs_here(isa):
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    needed = {"portable": [], "avx2": ["avx2"], "avx512": ["avx512_f", "avx512_bw"]}
    needed["avx512_bf16"] = [*needed["avx512"], "avx512_bf16"]
    return all(flags.get(flag) for flag in needed[isa])


@pytest.fixture(params=sorted(cpu_build.ISAS))
def isa(request, monkeypatch, tmp_path, library):
    """One after the other in this process: a copy of the library chooses when it is first asked."""
    if not runs_here(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    copy = tmp_path / "copy.so"
    shutil.copy(library.path, copy)
    monkeypatch.setenv("PAE_CPU_ISA", request.param)
    with cpu.using(cpu.load(copy)) as loaded:
        assert loaded.handle.pae_cpu_isa().decode() == request.param
        assert f", {request.param}, " in cpu.describe()
        yield request.param


def rows(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("width", [1, 3, 4, 7, 16, sanitized(31), sanitized(100), 768])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_every_instruction_set(isa, width, dtype):
    x, delta, d = (rows(5, width, dtype=dtype, seed=seed) for seed in range(3))
    limit = {FP32: 1e-6, BF16: 4e-3}[dtype]
    y, xhat, rstd = pointwise.add_layer_norm(x, delta, 1e-5, dtype)
    expected = reference.add_layer_norm(x, delta, 1e-5, dtype)
    assert torch.equal(y, expected[0])
    exact = reference.layer_norm(y.double(), 1e-5, FP64)
    # the mean of one entry is itself, but for the last bit
    assert width == 1 or error(xhat, exact[0]) < limit
    assert width == 1 or error(rstd, exact[1]) < 1e-6
    got = pointwise.layer_norm_backward(d, xhat, rstd, x, FP32, BF16)
    wide = (t.double() for t in (d, xhat, rstd, x))
    exact = reference.layer_norm_backward(*wide, FP64, None)[0]
    assert error(got[0], exact) < 2e-6 and error(got[1], exact) < 4e-3
    for kind in ACTIVATIONS:
        value, code = pointwise.activation_coded(x, kind)
        assert error(value, ACTIVATIONS[kind](x.double())) < limit
        assert torch.equal(value, pointwise.activation(x, kind))
        exact = reference.activation_backward(d.double(), x.double(), kind)
        assert error(pointwise.activation_backward(d, x, kind), exact) < limit
        off = code.int() - reference.activation_coded(x.float(), kind)[1].int()
        assert off.abs().max() <= 1
        from_code = pointwise.activation_backward(d, code, kind)
        assert error(from_code, reference.activation_backward(d, code, kind)) < limit


@pytest.mark.parametrize("width", [1, 7, 16, 24, sanitized(48), 64, 80, 128])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_attention_on_every_instruction_set(isa, dtype, width):
    """Every number of rows of a tile, and of vectors in it: 23 rows, 19 to 128 keys."""
    for tokens, prompts, causal in (
        *((23, 20, False), (1, 18, False), (59, 69, False), (110, 5, False)),
        *((24, 0, True), (59, 6, True)),
    ):
        qkv = rows(2, tokens, 3, 2, width, dtype=dtype)
        kv, d_out = rows(1, prompts, 2, 2, width, dtype=dtype, seed=1), rows(2, tokens, 2 * width)
        bias = rows(1, prompts, seed=3)
        bias[:, 1::4] = -torch.inf
        d_out = d_out.to(dtype)
        out, lse = attention.forward(qkv, kv, None, 0.3, False, bias, None, None, causal)
        given = d_out, qkv, kv, None, 0.3, False, bias, None, None, out, lse
        leaves = qkv.double().requires_grad_(), kv.double().requires_grad_()
        options = None, 0.3, False, bias, None, None, causal
        exact, exact_lse = attention_reference.prompt_attention(*leaves, *options)
        exact_grads = torch.autograd.grad(exact, leaves, d_out.double())
        limit = {FP32: 2e-6, BF16: 5e-3}[dtype]
        assert error(out, exact) < limit and error(lse, exact_lse) < 1e-6
        for need_qkv in (True, False):
            grads = attention.backward(*given, need_qkv, causal)
            assert prompts == 0 or error(grads[1], exact_grads[1]) < limit
            assert not need_qkv or error(grads[0], exact_grads[0]) < limit
            assert not grads[1][:, 1::4].any()


def test_attention_where_rows_are_not_finite(isa):
    """NaN and infinities go where the formula sends them, and nowhere else."""
    qkv, kv = rows(3, 9, 3, 2, 16), rows(3, 4, 2, 2, 16, seed=1)
    qkv[0, 3, 0, 1, 5], qkv[0, 4, 0, 0, 2] = torch.nan, torch.inf  # one row's logits
    qkv[1, 2, 1, 0, 3], kv[1, 1, 1, 1, 0] = torch.nan, -torch.inf  # one key, one value
    kv[2, 0, 0, 1] = torch.inf
    d_out = rows(3, 9, 32, seed=2)
    leaves = qkv.double().requires_grad_(), kv.double().requires_grad_()
    exact = attention_reference.prompt_attention(*leaves, None, 0.3, False, None)
    exact_grads = torch.autograd.grad(exact[0], leaves, d_out.double())
    out, lse = attention.forward(qkv, kv, None, 0.3, False, None)
    grads = attention.backward(d_out, qkv, kv, None, 0.3, False, None, None, None, out, lse, True)
    for got, expected in zip((out, lse, *grads), (*exact, *exact_grads), strict=True):
        same = torch.isfinite(got) == torch.isfinite(expected)
        assert same.all(), (~same).nonzero()
        finite = torch.isfinite(got)
        assert error(got[finite], expected[finite].to(got)) < 2e-6
    assert out[0, 5:].isfinite().all() and not out[0, 3, 16:].isfinite().any()


@pytest.mark.parametrize("width", [1, 5, 16, sanitized(43), 100])
def test_eigenvectors_on_every_instruction_set(isa, width):
    M = rows(3, width, width)
    M = M + M.mT
    vectors, values, residuals, sizes, taken = koopman.lanczos(M)
    exact = torch.linalg.eigvalsh(M.double())
    norms = exact.abs().amax(1)
    assert ((values - exact[:, -1]).abs() <= 1e-6 * norms).all()
    assert (residuals <= 2e-6 * norms).all() and (taken <= width).all()
    assert (sizes <= norms * (1 + 1e-6)).all() and (sizes >= norms / 3).all()
    off = torch.einsum("bij,bj->bi", M.double(), vectors.double()) - vectors * exact[:, -1:]
    assert (off.norm(dim=1) <= 2e-6 * norms).all()


def test_what_is_not_finite(isa):
    for dtype in (FP32, BF16):
        u = torch.tensor([torch.nan, torch.inf, -torch.inf] * 7, dtype=dtype)
        for kind in ACTIVATIONS:
            y = pointwise.activation(u, kind)
            assert y[::3].isnan().all() and (y[1::3] == torch.inf).all()
        y, xhat, _ = pointwise.add_layer_norm(u[:9][None], u[:9][None], 1e-6, dtype)
        assert torch.equal(y.isnan(), u[:9][None].isnan()) and xhat.isnan().all()


def test_rounding_to_bf16_is_that_of_pytorch(isa):
    """To nearest even, on ties too; what is below the smallest normal number is not asked for."""
    bits = torch.arange(0x00800000, 0x7F800000, 0x00012345 // 7, dtype=torch.int64)
    ties = torch.arange(0x0080, 0x7F80, dtype=torch.int64) * 65536 + 0x8000
    x = torch.cat([bits, ties]).to(torch.int32).view(FP32)
    x = torch.cat([x, -x])[None]
    one, zero = torch.ones(1, 1), torch.zeros_like(x)
    _, copy = pointwise.layer_norm_backward(zero, zero, one, x, FP32, BF16)
    assert torch.equal(copy, x.to(BF16))


def test_an_unknown_instruction_set_is_not_obeyed(monkeypatch, tmp_path, library):
    copy = tmp_path / "copy.so"
    shutil.copy(library.path, copy)
    monkeypatch.setenv("PAE_CPU_ISA", "avx9")
    assert cpu.load(copy).handle.pae_cpu_isa() == _default(tmp_path, monkeypatch, library)


def _default(tmp_path, monkeypatch, library):
    monkeypatch.delenv("PAE_CPU_ISA")
    copy = tmp_path / "default.so"
    shutil.copy(library.path, copy)
    return cpu.load(copy).handle.pae_cpu_isa()


# ---- threads


def test_the_pool_is_that_of_pytorch(library):
    """Its OpenMP runtime is found where it lies; nothing else in the process makes threads, though
    those of earlier tests may end.
    """
    if "OpenMP" not in torch.__config__.parallel_info().partition("backend:")[2]:
        pytest.skip("PyTorch runs its threads otherwise")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.randn(1 << 20).sum()  # its threads start now
        tasks = lambda: {*os.listdir("/proc/self/task")}
        started = tasks()
        with cpu.using(library):
            x = rows(4000, 768)
            for _ in range(20):
                pointwise.layer_norm(x, 1e-6, FP32)
        assert tasks() <= started
    finally:
        torch.set_num_threads(before)


def test_without_a_pool_there_is_one_thread(library):
    handle = library.handle
    x = rows(1000, 768)
    with cpu.using(library):
        expected = pointwise.layer_norm(x, 1e-6, FP32)
        handle.pae_cpu_set_parallel(None)
        try:
            alone = pointwise.layer_norm(x, 1e-6, FP32)
        finally:
            handle.pae_cpu_set_parallel(ctypes.c_void_p(cpu._shared_pool()))
    assert all(torch.equal(a, b) for a, b in zip(alone, expected, strict=True))


# ---- attention


def test_attention_is_the_same_bits_at_any_number_of_threads(library):
    """Also where gradients of prompts are added up over several images in turn."""
    qkv, kv, d_out = rows(90, 9, 3, 6, 16), rows(1, 5, 2, 6, 16, seed=1), rows(90, 9, 96, seed=2)
    before = torch.get_num_threads()
    found = []
    try:
        with cpu.using(library):
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                out, lse = attention.forward(qkv, kv, None, 0.3, False, None)
                given = d_out, qkv, kv, None, 0.3, False, None, None, None, out, lse
                found.append((out, lse, *attention.backward(*given, True)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_a_group_that_there_is_not(library):
    qkv, kv = rows(2, 3, 3, 1, 4), rows(3, 2, 2, 1, 4, seed=1)
    with cpu.using(library):
        for wrong in (3, -1):
            group = torch.tensor([0, wrong])
            with pytest.raises(RuntimeError, match=rf"group\[1\] is {wrong}: there are 3 sets"):
                attention.forward(qkv, kv, group, 1.0, False, None)


def test_tiles_of_a_processor_leave_the_fused_forward(monkeypatch, library):
    """With AMX, PyTorch's fused attention in bf16 is the fastest there is: it is what runs."""
    calls = []
    forward = attention_reference.forward
    monkeypatch.setattr(attention_reference, "forward", lambda *a: calls.append(a) or forward(*a))
    expected = {(True, BF16): 1}
    for tiles in (True, False):
        for dtype in (FP32, BF16):
            qkv, kv = rows(2, 9, 3, 2, 8, dtype=dtype), rows(1, 4, 2, 2, 8, dtype=dtype, seed=1)
            monkeypatch.setattr(attention, "_multiplies_tiles", lambda tiles=tiles: tiles)
            with cpu.using(library):
                out, _ = attention.forward(qkv, kv, None, 1.0, False, None)
            exact = attention_reference.prompt_attention(
                qkv.double(), kv.double(), None, 1.0, False, None
            )[0]
            assert error(out, exact) < 1e-2
            assert len(calls) == expected.get((tiles, dtype), 0)
            calls.clear()
