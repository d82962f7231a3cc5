"""The kernels for CPUs on a processor of another kind: compiled for aarch64, run by an emulator.

apt-get install g++-aarch64-linux-gnu qemu-user-static
"""

from __future__ import annotations

import shutil

import pytest
import torch

from pae_kernels.attention import reference as attention_reference
from pae_kernels.koopman.spectral import start_vector
from pae_kernels.pointwise import ACTIVATIONS, reference
from tests.errors import error
from tests.kernels import host_library
from tests.kernels.executions import BF16, FP32, FP64
from tests.processes import ROOT, run

ROWS, WIDTH = 5, 43  # no whole number of vectors
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def program(folder):
    """Everything in one program without shared libraries."""
    own = host_library.cpu_build
    target = folder / "foreign"
    flags = [*own.FLAGS, "-Wall", "-Wextra", "-DPAE_ISA=portable", f"-DROWS={ROWS}"]
    sources = [own.SOURCES / name for name in ("kernels.cpp", "library.cpp")]
    sources.append(ROOT / "tests" / "kernels" / "foreign.cpp")
    include = [f"-DWIDTH={WIDTH}", f"-I{own.SOURCES}", "-static", "-o", str(target)]
    run([COMPILER, *flags, *include, *map(str, sources)])
    return target


class Results:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, *shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        mine, self.data = self.data[:size], self.data[size:]
        return torch.frombuffer(bytearray(mine), dtype=dtype).view(shape)


def as_bytes(*tensors: torch.Tensor) -> bytes:
    return b"".join(bytes(t.contiguous().view(torch.uint8).flatten().tolist()) for t in tensors)


def test_every_function_on_aarch64(tmp_path):
    for tool in (COMPILER, EMULATOR or "qemu-aarch64-static"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    inputs = [normal(3, ROWS, WIDTH).to(dtype) for dtype in (FP32, BF16)]
    attended = [normal(1, ROWS, parts, 2, WIDTH) for parts in (3, 2)]
    d_out, M = normal(1, ROWS, 2 * WIDTH), normal(WIDTH, WIDTH)
    M = M + M.mT
    given = (*inputs, *attended, d_out, M, start_vector(WIDTH, "cpu").float())
    (tmp_path / "given").write_bytes(as_bytes(*given))
    files = tmp_path / "given", tmp_path / "results"
    shell = ["sh", "-c", '"$0" "$1" < "$2" > "$3"']
    run([*shell, EMULATOR, program(tmp_path), *files], timeout=300)
    results = Results(files[1].read_bytes())

    for (x, delta, d), dtype in zip(inputs, (FP32, BF16), strict=True):
        limit = {FP32: 1e-6, BF16: 4e-3}[dtype]
        take = lambda dtype=dtype: results.take(ROWS, WIDTH, dtype=dtype)
        y, xhat = take(), take()
        rstd, dx = results.take(ROWS, 1), take()
        assert torch.equal(y, x + delta)
        exact = reference.layer_norm(y.double(), 1e-5, FP64)
        assert error(xhat, exact[0]) < limit and error(rstd, exact[1]) < 1e-6
        wide = (t.double() for t in (d, xhat, rstd, x))
        assert error(dx, reference.layer_norm_backward(*wide, FP64, None)[0]) < limit
        for kind, act in ACTIVATIONS.items():
            value, slope, code = take(), take(), take(torch.uint8)
            assert error(value, act(x.double())) < limit, kind
            exact = reference.activation_backward(d.double(), x.double(), kind)
            assert error(slope, exact) < limit, kind
            off = code.int() - reference.activation_coded(x.float(), kind)[1].int()
            assert off.abs().max() <= 1, kind

    leaves = [t.double().requires_grad_() for t in attended]
    out, lse = attention_reference.prompt_attention(*leaves, None, 0.3, False, None)
    grads = torch.autograd.grad(out, leaves, d_out.double())
    for exact in (out, lse, *grads):
        assert error(results.take(*exact.shape), exact) < 2e-6
    vector, value, residual = results.take(WIDTH), results.take(1), results.take(1)
    exact = torch.linalg.eigvalsh(M.double())
    assert (value - exact[-1]).abs() <= 1e-6 * exact.abs().max()
    assert (M.double() @ vector.double() - exact[-1] * vector).norm() <= 2e-6 * exact.abs().max()
    assert residual <= 2e-6 * exact.abs().max()
    assert not results.data
