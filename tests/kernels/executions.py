"""Where the assertions of an op run. Every op has one suite, parametrised by its executions.

    reference               the definition in plain PyTorch, on the CPU
    interpreter             the Triton kernels in Triton's interpreter, in a process of its own
                            (TRITON_INTERPRET=1 from the start; `test_interpreter.py` starts it)
    cpu                     the C++ kernels for CPUs
    emulated                the CUDA kernels as a CPU library, on the execution model of csrc/host
    sdpa                    attention made of PyTorch's fused one, by its CPU kernel
    gpu-triton, gpu-cuda    the kernels on a GPU
    gpu-sdpa                attention made of PyTorch's fused one there

Each has sizes of its own where what it shows or what it costs differs:

    @each(OP, "shape", reference=MANY, interpreter=SMALL, gpu=REAL)
    def test_shapes(execution, shape):
        ...  # the fixture `execution` has entered it: the public op runs that version

The names are in the ids of the tests, so that `-k interpreter` or `-k gpu` chooses an execution.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pae_kernels import backends, cpu, native
from tests.kernels import host_library

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# cuBLAS in deterministic mode, which the poison of uninitialised memory needs
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Execution:
    """One way to run an op.

    Attributes:
        kind: reference, interpreter, cpu, emulated or gpu.
        version: the word of PAE_BACKEND.
        device: of the tensors.
        dtypes: what it computes; the interpreter multiplies bf16 wrongly.
        repeats: runs that show a result which is not the same every time.
    """

    kind: str
    version: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    repeats: int = 2

    @property
    def name(self) -> str:
        return f"gpu-{self.version}" if self.kind == "gpu" else self.kind

    def pick(self, **by_kind: Any) -> Any:
        """The value for this kind of execution; `other` where it is not named."""
        return by_kind[self.kind] if self.kind in by_kind else by_kind["other"]

    def moved(self, *tensors: Tensor) -> list[Tensor]:
        """Leaves on this execution's device, which require what the given ones require."""
        return [t.detach().to(self.device).requires_grad_(t.requires_grad) for t in tensors]

    def runs(self) -> Iterator[int]:
        """Runs that must not change a bit. Emulated: one for each order of a block's threads, where
        a missing barrier changes some result.
        """
        if self.kind != "emulated":
            yield from range(self.repeats)
            return
        order = native.library().handle.pae_emulation_set_order
        try:
            for number in host_library.ORDERS:
                order(number)
                yield number
        finally:
            order(0)

    def assert_as_exact(
        self, got: Tensor, plain: Tensor, exact: Tensor, what: str = "", floor: float = 1e-6
    ) -> None:
        """`got` is at most twice as far from fp64 as PyTorch's plain way in the same precision.

        Sums in another order may be off by a few steps of what the version computes in, fp32 or
        fp64: by `floor` of the norm, and of entries of order 1 where they cancel. At the sizes of a
        GPU nothing cancels, and what is rounded to 16 bits is off by more than sums are.
        """
        assert got.shape == plain.shape == exact.shape, what
        assert got.dtype == plain.dtype and exact.dtype == FP64, what
        assert torch.isfinite(got).all(), what
        far = lambda t: (t.double() - exact).norm().item()
        if self.kind == "gpu":
            step = floor * exact.norm().item() + 1e-8 if got.dtype == FP32 else 0.0
            allowed = max(2 * far(plain), step)
        else:
            step = 1e-12 if got.dtype == FP64 else floor
            if got.dtype in (BF16, FP16) and exact.numel():
                # of a few numbers that are rounded to 16 bits the plain way may be lucky; of many
                # it is not
                step += torch.finfo(got.dtype).eps / exact.numel() ** 0.5
            allowed = 2 * far(plain) + step * max(exact.numel() ** 0.5, exact.norm().item())
        said = f"{what} {far(got):.2e} from fp64, plain PyTorch {far(plain):.2e}"
        assert far(got) <= allowed, said.strip()

    @contextlib.contextmanager
    def entered(self, op: str) -> Iterator[None]:
        """The public op runs this version; fp32 products of plain PyTorch are exact."""
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setenv("PAE_BACKEND", self.version)
            if self.kind == "emulated":
                stack.enter_context(host_library.emulated(*_sources(op)))
            if self.kind == "cpu":
                stack.enter_context(cpu.using(host_library.cpu_library()))
            if self.kind == "gpu":
                stack.enter_context(tf32(False))
                stack.callback(torch.cuda.synchronize)
                try:
                    backends.choose(op, self.device, FP32)
                except RuntimeError as error:  # the library is not compiled, or not for this GPU
                    pytest.skip(str(error))
            chosen = backends.choose(op, self.device, FP32)
            assert chosen.__name__.endswith(f".{self.version}")
            yield

    def captured(self, work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A CUDA graph of `work`, and the results that every replay overwrites."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                results = work()
        torch.cuda.current_stream().wait_stream(stream)
        return graph, results

    @contextlib.contextmanager
    def late(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """Another stream as the current one, and copies that it has yet to make, NaN until then."""
        copies = [torch.full_like(t, torch.nan) for t in tensors]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # tens of milliseconds
            for copy, t in zip(copies, tensors, strict=True):
                copy.copy_(t.detach())
            yield copies
        stream.synchronize()


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether PyTorch's own fp32 products may be of TF32."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = allowed
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


CPU, GPU = torch.device("cpu"), torch.device("cuda")
# not `sdpa`, which is nobody's first choice on a CPU
KERNELS = "interpreter", "emulated", "cpu", "gpu"
EXECUTIONS = (
    Execution("reference", "reference", CPU, (FP64, FP32, BF16, FP16)),
    Execution("interpreter", "triton", CPU, (FP32, FP16)),
    Execution("cpu", "cpu", CPU, (FP32, BF16)),
    Execution("emulated", "cuda", CPU, (FP32, BF16, FP16), len(host_library.ORDERS)),
    Execution("sdpa", "sdpa", CPU, (FP64, FP32, BF16)),
    Execution("gpu", "sdpa", GPU, (BF16, FP16, FP32), 20),
    Execution("gpu", "triton", GPU, (BF16, FP16, FP32), 100),
    Execution("gpu", "cuda", GPU, (BF16, FP16, FP32), 100),
)


def _sources(op: str) -> list[str]:
    """Files in csrc/ of an op's CUDA version, named after its package."""
    module = next(v for v in backends.registered()[op] if v.name == "cuda").load()
    package = module.__name__.split(".")[-2]
    return sorted(path.name for path in host_library.SOURCES.glob(f"{package}*.cu"))


def of(op: str) -> list[Execution]:
    """The executions of an op's versions: in the interpreter's process that one, elsewhere the
    others.
    """
    versions = {version.name for version in backends.registered()[op]}
    return [
        e for e in EXECUTIONS if e.version in versions and (e.kind == "interpreter") == INTERPRETING
    ]


def each(
    op: str,
    names: str = "",
    *,
    on: Sequence[str] = (),
    through: Sequence[str] = (),
    **cases: Any,
) -> Callable:
    """Parametrises a test by the executions of `op`, and by cases of each.

    Args:
        names: of what the cases hold, with commas between.
        on: kinds of execution, all by default: those that have cases.
        through: names of fixtures that get what the cases hold.
        cases: kind -> a list of cases; `other` for the kinds that are not named.
    """
    words = [name.strip() for name in names.split(",") if name.strip()]
    cases = {kind: list(chosen) for kind, chosen in cases.items()}
    parameters = []
    for execution in of(op):
        kind = execution.kind
        chosen = cases.get(kind, cases.get("other", [])) if words else [()]
        if on and kind not in on:
            continue
        for case in chosen:
            marks = [*getattr(case, "marks", ())]
            values = getattr(case, "values", case if len(words) != 1 else (case,))
            if kind == "gpu":
                reason = "needs a GPU: kernels run compiled, not interpreted"
                marks.append(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason))
            label = "-".join([execution.name, *map(_label, values)])
            parameters.append(pytest.param(execution, *values, marks=marks, id=label))
    if not parameters:  # a test of other executions than this process has: it does not exist here
        return lambda test: None
    fixtures = ["execution", *through]
    return pytest.mark.parametrize(("execution", *words), parameters, indirect=fixtures)


def sanitized(*case: Any) -> Any:
    """A case small enough for a sanitizer."""
    return pytest.param(*case, marks=pytest.mark.sanitize)


def _label(value: object) -> str:
    return getattr(value, "__name__", None) or str(value).removeprefix("torch.")


def grads_of(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], d_out: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A value, and the gradient of every tensor for one of the value's."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, d_out.to(out.dtype))


def in_three_ways(
    function: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    d_out: Tensor,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Value and every gradient: of a version, of plain PyTorch, and of that in fp64."""
    wide = [t.double() for t in tensors]
    found = [
        grads_of(f, of, d_out) for f, of in ((function, tensors), (plain, tensors), (plain, wide))
    ]
    return zip(*((value, *grads) for value, grads in found), strict=True)
