"""The compiled library: its interface, its loader, and the emulation its kernels are tested on.

What the kernels compute is tested beside each op.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from pae_kernels import backends, native
from tests.kernels import host_library
from tests.processes import run

sys.path.insert(0, str(host_library.SOURCES))

import native_build

CPU = torch.device("cpu")
SOURCE = Path(__file__).parent / "native" / "execution.cu"


@pytest.fixture(scope="module")
def library():
    return host_library.library(SOURCE)


@pytest.fixture(scope="module")
def Arrays():
    # not native.params: this struct is no part of the package's interface
    class Arrays(ctypes.Structure):
        _fields_ = [
            ("struct_size", ctypes.c_uint32),
            ("mode", native.INT32),
            ("n", native.INT64),
            ("source", native.POINTER),
            ("out", native.POINTER),
        ]

    return Arrays


@pytest.fixture(params=host_library.ORDERS, ids="order{}".format)
def emulated(request, Arrays, library):
    """emulated("pae_lanes", source, out, mode, n) in several orders of the threads."""

    def call(name, source=None, out=None, mode=0, n=0):
        with host_library.emulated(SOURCE, order=request.param):
            return invoke(Arrays, name, source, out, mode, n)

    return call


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The same file for the GPU that is here."""
    target = tmp_path_factory.mktemp("native") / "execution.so"
    architecture = "{}{}".format(*torch.cuda.get_device_capability())
    toolkit = native_build.find_toolkit()
    command = [toolkit.nvcc, *native_build.FLAGS, *native_build.LINK, *toolkit.flags]
    sources = [SOURCE, host_library.SOURCES / "library.cu"]
    flags = [f"-I{host_library.SOURCES}", *native_build.code_flags((architecture,))]
    run([*command, *flags, *sources, "-o", target])
    return native.Library(target)


PLACES = [*host_library.ORDERS, *(["gpu"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=PLACES, ids=lambda order: f"order-{order}")
def both(request, Arrays):
    """The same, and on a GPU where there is one: the emulation must agree with it."""

    def call(name, source=None, out=None, mode=0, n=0):
        if request.param != "gpu":
            with host_library.emulated(SOURCE, order=request.param):
                return invoke(Arrays, name, source, out, mode, n)
        with native.using(request.getfixturevalue("compiled")):
            source = None if source is None else source.cuda()
            return invoke(Arrays, name, source, out.cuda(), mode, n).cpu()

    return call


def invoke(Arrays, name, source, out, mode, n):
    pointers = [None if t is None else t.data_ptr() for t in (source, out)]
    device = CPU if out is None else out.device
    native.call(name, Arrays(ctypes.sizeof(Arrays), mode, n, *pointers), device)
    return out


# ---- execution


@pytest.mark.sanitize
@pytest.mark.parametrize("threads", [32, 256])
def test_reductions_reach_every_thread_with_the_same_bits(both, threads):
    x = torch.randn(1000)
    out = both("pae_reductions", x, torch.full((threads, 2), torch.nan), threads, len(x))
    assert out.unique(dim=0).shape == (1, 2)
    assert out[0, 0].item() == pytest.approx(x.double().sum().item(), abs=1e-4)
    assert out[0, 1] == x.max()


def test_a_maximum_keeps_nan(both):
    x = torch.randn(1000)
    x[777] = torch.nan
    assert both("pae_reductions", x, torch.zeros(256, 2), 256, len(x)).isnan().all()


@pytest.mark.sanitize
def test_shuffles_and_votes(both):
    x = torch.randperm(64, dtype=torch.int32)
    out = both("pae_lanes", x, torch.empty(64, 8, dtype=torch.int32), n=64)
    for t in range(64):
        warp, lane = x[t // 32 * 32 :][:32].tolist(), t % 32
        eight = lane // 8 * 8
        half = range(lane // 16 * 16, lane // 16 * 16 + 16)
        expected = [
            warp[lane ^ 5],
            warp[lane + 3] if lane + 3 < 32 else warp[lane],
            warp[lane - 3] if lane - 3 >= eight else warp[lane],
            warp[eight + 9 % 8],
            sum(1 << i for i, v in enumerate(warp) if v % 3 == 0),
            warp[lane ^ (1 if lane < 16 else 2)],
            int(7 in [warp[i] for i in half]),
            sum(warp[eight : eight + 8]),
        ]
        expected[4] -= (expected[4] >> 31) << 32
        assert out[t].tolist() == expected


@pytest.mark.sanitize
@pytest.mark.parametrize("n", [1, 16, 37])
def test_dynamic_shared_memory_grids_and_blocks(both, n):
    x = torch.randn(n, n)
    assert torch.equal(both("pae_transpose", x, torch.full((n, n), torch.nan), n=n), x.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_floats_are_those_of_pytorch(both, dtype):
    mode = (torch.float16, torch.bfloat16).index(dtype)
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = both("pae_convert", every, torch.empty(65536), 2 + mode, 65536)
    assert torch.equal(wide.nan_to_num(nan=12345.0), every.float().nan_to_num(nan=12345.0))
    # numbers everywhere, half-way cases, the largest and the smallest
    between = (wide[1:] + wide[:-1]) / 2
    x = torch.cat([torch.randn(20000) * 2.0 ** torch.randint(-40, 40, (20000,)), wide, between])
    x = torch.cat([x, x.nextafter(torch.tensor(torch.inf)), torch.tensor([65519.99, 65520.0])])
    narrow = both("pae_convert", x, torch.empty(len(x), dtype=dtype), mode, len(x))
    assert torch.equal(narrow.isnan(), x.isnan())
    keep = ~x.isnan()
    assert torch.equal(narrow[keep].view(torch.int16), x[keep].to(dtype).view(torch.int16))


# ---- mistakes that the emulation notices


def test_unwritten_shared_memory_is_nan(emulated):
    assert emulated("pae_mistake", None, torch.zeros(64), 0).isnan().all()


def test_a_missing_barrier_changes_the_result(emulated):
    out = emulated("pae_mistake", None, torch.zeros(64), 1)
    expected = torch.arange(64.0).roll(-1)
    assert not torch.equal(out, expected) and out.isnan().any()


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (2, r"thread \d waits at __syncthreads \(execution.cu:\d+\); 56 of 64 threads have"),
        (3, r"threads diverged: thread \d+ is at __syncthreads .* others wait at __syncthreads"),
        (4, r"thread \d+ waits at __shfl_xor_sync .* for lanes ffffffff; 32 of 64"),
        (5, r"lane \d+ of warp 0 reads lane \d+, which takes no part in __shfl_down_sync"),
        (6, r"shared memory written 0 bytes past an array of 256 bytes"),
    ],
)
def test_a_mistake_is_reported(emulated, mode, message):
    with pytest.raises(RuntimeError, match=rf"mistake: emulation: block \(0, 0, 0\): .*{message}"):
        emulated("pae_mistake", None, torch.zeros(64), mode)
    # and the next launch is not touched by it
    assert emulated("pae_mistake", None, torch.zeros(64), 0).isnan().all()


def test_launches_that_no_device_runs(emulated):
    with pytest.raises(RuntimeError, match=r"nothing: emulation: no device runs a block of \(1025"):
        emulated("pae_nothing", mode=1025)
    with pytest.raises(RuntimeError, match="101377 bytes of shared memory, more than 101376"):
        emulated("pae_nothing", mode=1, n=99 * 1024 + 1)
    emulated("pae_nothing", mode=1024, n=99 * 1024)


# ---- kernels under the sanitizers of the compiler


def sanitized(*command, check=True):
    command = [sys.executable, *map(str, command)]
    return run(command, env=host_library.sanitizing_environment(), timeout=900, check=check)


def test_kernels_stay_within_their_tensors():
    """All tests that are marked for it, of emulated kernels and of those for CPUs, in a process of
    its own.
    """
    files = sorted(Path(__file__).parent.rglob("test_*.py"))
    marked = re.compile(r"mark\.sanitize|sanitized\(")
    files = [file for file in files if marked.search(file.read_text())]
    few = "-m", "sanitize", "-k", "emulated or order or cpu", *files
    done = sanitized("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *few)
    assert re.search(r"^\d+ passed", done.stdout.splitlines()[-1]), done.stdout


TOO_SMALL = """
import torch
from pae_kernels import native
from tests.kernels import host_library
from tests.processes import run

source, out = torch.zeros(64), torch.zeros(63)
struct = native.params("arrays", mode=native.INT32, n=native.INT64, source=native.POINTER,
                       out=native.POINTER)
with host_library.emulated(host_library.ROOT / "tests/kernels/native/execution.cu"):
    params = struct(mode=32, n=64, source=source.data_ptr(), out=out.data_ptr())
    native.call("pae_reductions", params, torch.device("cpu"))
print("went on")
"""


def test_a_write_past_the_end_of_a_tensor_is_found():
    done = sanitized("-c", TOO_SMALL, check=False)
    assert done.returncode != 0 and "went on" not in done.stdout
    assert "heap-buffer-overflow" in done.stderr and "execution.cu" in done.stderr


# ---- the interface


def test_an_interface_version_and_its_twin(library):
    header = (host_library.SOURCES / "pae.h").read_text()
    assert int(re.search(r"#define PAE_ABI_VERSION (\d+)", header)[1]) == native.ABI_VERSION
    assert library.handle.pae_abi_version() == native.ABI_VERSION


def test_only_the_interface_is_visible(library):
    names = run(["nm", "-D", "--defined-only", library.path]).stdout
    symbols = [line.split()[-1] for line in names.splitlines()]
    assert "pae_probe" in symbols
    assert all(name.startswith("pae_") for name in symbols), symbols


def test_another_struct_is_refused(Arrays, library):
    params = Arrays(struct_size=8)
    with native.using(library):
        with pytest.raises(RuntimeError, match="pae_transpose: struct_size is 8, expected 32"):
            native.call("pae_transpose", params, CPU)
        params.struct_size, params.n = ctypes.sizeof(Arrays), 33
        with pytest.raises(RuntimeError, match="pae_lanes: n is 33, expected whole warps"):
            native.call("pae_lanes", params, CPU)
        with pytest.raises(RuntimeError, match=r"pae_arrays_params has 32 bytes in .* and 16 in"):
            native.params("arrays", n=native.INT64)


def test_every_struct_has_the_size_that_the_library_says():
    """With everything in it: a struct without its function, and one of another size, are found."""
    for file in Path(native.__file__).parent.glob("*/c*.py"):
        if file.stem in ("cuda", "cpu"):
            importlib.import_module(f"pae_kernels.{file.parent.name}.{file.stem}")
    libraries = {"pae.h": host_library.library(), "cpu/cpu.h": host_library.cpu_library()}
    declared = set()
    for header, whole in libraries.items():
        text = (host_library.SOURCES / header).read_text()
        nouns = re.findall(r"typedef struct pae_(\w+)_params", text)
        declared.update(nouns)
        for noun in nouns:
            assert hasattr(whole.handle, f"pae_sizeof_{noun}_params"), noun
            assert whole.mismatch(noun, native._STRUCTS[noun]) is None
    assert "probe" in declared and declared == set(native._STRUCTS)


# ---- choice


def test_the_predicate_says_why(monkeypatch, library):
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "_failure", "nvcc was not found")
    assert backends.with_cuda("cuda", torch.float32) == "nvcc was not found"
    assert backends.with_cuda("cpu", torch.float32) == "needs a GPU"
    assert "float64" in backends.with_cuda("cuda", torch.float64)
    assert "xpu" in backends.with_cuda("xpu", torch.float32)
    with pytest.raises(RuntimeError, match="nvcc was not found"):
        native.call("pae_probe", native._Probe(), CPU)
    with native.using(library):
        assert backends.with_cuda("cpu", torch.float32) is None
        assert native.unavailable() is None
