"""A GPU that is not there: the CPU under the name `cuda`, with the rules of the real one.

    pytest -p tests.cpu_as_gpu ...        # every test body that needs a GPU runs, on a CPU

What it is for: a test or a benchmark that would fail on the day for a fault of its own fails here
first. Tensors know where they are: a tensor asked for on `cuda` is marked, what is computed from it
too. As on the real device it is an error to mix devices in one operation, to draw on one with the
generator of the other, to hand a marked tensor to NumPy, or to read a value on the host while a
graph is captured. A captured graph is the list of its operations; a replay does them again on the
same memory, so what Python decided at capture stays decided. Streams and events are in order, and
memory is counted by its storages.

The kernels of the GPU versions (`triton`, `cuda`) are the reference's here, under their names
(attention's are those made of PyTorch's fused one): what the kernels themselves compute is shown by
the interpreter and by the emulation, and what the compiler makes of them by the compile tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _python_dispatch
from torch.utils._pytree import tree_leaves

from tests.allocations import Memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
_FREE = ("copy_", "_to_copy")  # operations that may read one device and write the other
_INDEXED = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero")
_device = torch._C.TensorBase.device.__get__


MEMORY = Memory()


def is_on_gpu(t: Tensor) -> bool:
    return MEMORY.holds(t)


_TOLD = types.SimpleNamespace(moving=False)  # whether a tensor is being moved by its owner


class Device(_python_dispatch.TorchDispatchMode):
    """Carries the mark from operation to operation, and holds the device's rules."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list | None = None
        self.before: list[tuple[Tensor, Tensor]] = []  # written to in a capture, old values

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, unknown = dict(kwargs or {}), False
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = CPU
        if asked is not None and torch.device(asked).type == "cuda":
            here = True
        elif asked is None or (name == "_to_copy" and not _TOLD.moving):
            here = self._where(name, tensors)
        else:
            # autograd asks for zeros, and for another dtype, on the device that it was told: in a
            # backward such a tensor is where its neighbours are
            inside = torch._C._current_autograd_node() is not None
            here = inside and any(MEMORY.holds(t) for t in tensors)
            unknown = inside and not here
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        _check_generator(kwargs.get("generator"), here)
        if self.tape is not None and (name in _WAITS or self._crosses(name, tensors)):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if self.tape is not None and func._schema.is_mutable:
            for given, t in zip(func._schema.arguments, args, strict=False):
                if given.alias_info is not None and given.alias_info.is_write:
                    self.before.append((t.detach(), t.detach().clone()))
        if (stands_in := _OF_THE_GPU_ALONE.get(str(func))) is not None:
            out = stands_in(*args, **kwargs)
        elif func.namespace == "pae":
            tape, self.tape = self.tape, None
            most = MEMORY.most
            try:
                with self:  # what the op does inside is done on the device, too
                    out = func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
            finally:
                self.tape = tape
            MEMORY.sweep()  # a kernel allocates its results, not the tensors of a definition
            MEMORY.most = max(most, MEMORY.now)
        else:
            out = func(*args, **kwargs)
        if here or unknown:
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    MEMORY.take(t) if here else MEMORY.leave_open(t)
        if self.tape is not None and not func.is_view:
            self.tape.append((func, args, kwargs, out))
        return out

    def _where(self, name: str, tensors: list[Tensor]) -> bool:
        places = [MEMORY.holds(t) for t in tensors]
        if name in _FREE and MEMORY.is_open(tensors[0]):
            return any(places)
        if name in _FREE or name in _INDEXED:
            return bool(places) and places[0]
        if any(places):
            for t, marked in zip(tensors, places, strict=True):
                if not marked and t.dim() > 0 and t.numel() > 0 and not MEMORY.is_open(t):
                    raise RuntimeError(
                        f"{name}: expected all tensors to be on the same device, but found at "
                        f"least two devices, cuda:0 and cpu: a CPU tensor {tuple(t.shape)}"
                    )
        return any(places)

    def _crosses(self, name: str, tensors: list[Tensor]) -> bool:
        places = {MEMORY.holds(t) for t in tensors if not MEMORY.is_open(t)}
        return name in _FREE and (len(places) > 1 or _TOLD.moving)


DEVICE = Device()


# ---- operators of PyTorch that a CPU does not have


def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *_: Any,
    scale: float | None = None,
) -> tuple:  # fmt: skip
    assert dropout == 0.0
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=causal, scale=scale
    )
    unused = torch.zeros((), dtype=torch.int64)
    return out, lse, None, None, q.shape[2], k.shape[2], unused, unused, None


def _flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *given: Any,
    scale: float | None = None,
) -> tuple:  # fmt: skip
    *_, dropout, causal, _, _ = given  # behind both sides' offsets and lengths; a seed, its offset
    assert dropout == 0.0
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, out, lse.contiguous(), 0.0, causal, scale=scale
    )


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, wants_lse: bool, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None,
) -> tuple:  # fmt: skip
    assert bias is None and wants_lse
    out, lse, *_ = _flash(q, k, v, dropout, causal, scale=scale)
    unused = torch.zeros((), dtype=torch.int64)
    rows = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    return out, rows, unused, unused


def _efficient_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, out: Tensor, lse: Tensor,
    seed: Tensor, offset: Tensor, dropout: float, wanted: Any, causal: bool = False, *,
    scale: float | None = None,
) -> tuple:  # fmt: skip
    assert bias is None and lse.shape[-1] % 32 == 0, "its log-sum-exp has rows in tiles of 32"
    given = d_out, q, k, v, out, lse[..., : q.shape[2]], dropout, causal, seed, offset
    return *_flash_backward(*given, scale=scale), None


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.bmm(a.to(dtype), b.to(dtype))


_OF_THE_GPU_ALONE = {
    "aten._scaled_dot_product_flash_attention.default": _flash,
    "aten._scaled_dot_product_flash_attention_backward.default": _flash_backward,
    "aten._scaled_dot_product_efficient_attention.default": _efficient,
    "aten._scaled_dot_product_efficient_attention_backward.default": _efficient_backward,
    "aten.bmm.dtype": _wide_product,
}


# ---- graphs, streams, events


class Graph:
    """What `torch.cuda.CUDAGraph` is: operations on memory that stays."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.tape: list = []

    def replay(self) -> None:
        for func, args, kwargs, out in self.tape:
            given = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            with torch.no_grad():
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and id(old) not in given:
                        old.copy_(new)

    def reset(self) -> None:
        self.tape = []

    def pool(self) -> tuple[int, int]:
        return 0, 0


class Stream:
    """All streams are one: work is done when it is asked for."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.cuda_stream, self.stream_id = CUDA, 0, 0

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream), other

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event), event

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Nothing is left to wait for."""

    def query(self) -> bool:
        return True


class Event:
    """A moment on the host's clock."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timing, self.at = enable_timing, None

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        assert self.timing and other.timing and self.at is not None and other.at is not None
        return 1e3 * (other.at - self.at)

    def synchronize(self) -> None:
        """Nothing is left to wait for."""

    wait = query = synchronize


_STREAMS = threading.local()


def _current(device: Any = None) -> Stream:
    if not getattr(_STREAMS, "stack", None):
        _STREAMS.stack = [Stream()]
    return _STREAMS.stack[-1]


@contextlib.contextmanager
def _on_stream(stream: Stream | None) -> Iterator[None]:
    _current()
    _STREAMS.stack.append(stream or _current())
    try:
        yield
    finally:
        _STREAMS.stack.pop()


@contextlib.contextmanager
def _capture(graph: Graph, pool: Any = None, stream: Any = None, **_: Any) -> Iterator[None]:
    assert DEVICE.tape is None, "a capture inside a capture"
    DEVICE.tape = graph.tape
    try:
        with _on_stream(stream or Stream()):
            yield
    finally:
        DEVICE.tape = None
        for t, old in reversed(DEVICE.before):  # a capture does nothing
            t.copy_(old)
        DEVICE.before.clear()


class _OnDevice(contextlib.nullcontext):
    """`torch.cuda.device`: there is one."""

    def __init__(self, device: Any) -> None:
        super().__init__()
        assert torch.device("cuda" if device is None else device).type == "cuda", device


_PROPERTIES = types.SimpleNamespace(
    name="Stand-in GPU",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=2**16,
    total_memory=2**34,
    shared_memory_per_block_optin=227 * 1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    warp_size=32,
)


def _refuse_second(device: Any = None) -> Any:
    index = torch.device(device).index if isinstance(device, (str, torch.device)) else device
    if index not in (None, 0):
        raise AssertionError(f"invalid device id {index}")
    return _PROPERTIES


_CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "is_initialized": lambda: False,
    "_lazy_init": lambda: None,
    "init": lambda: None,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: _PROPERTIES.name,
    "get_device_properties": _refuse_second,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "current_stream": _current,
    "default_stream": _current,
    "stream": _on_stream,
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": Graph,
    "graph": _capture,
    "is_current_stream_capturing": lambda: DEVICE.tape is not None,
    "device": _OnDevice,
    "_sleep": lambda cycles: None,
    "memory_allocated": lambda device=None: MEMORY.swept(),
    "max_memory_allocated": lambda device=None: MEMORY.most,
    "reset_peak_memory_stats": lambda device=None: MEMORY.reset(),
    "mem_get_info": lambda device=None: (2**34, 2**34),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
    "is_bf16_supported": lambda *_, **__: True,
}


# ---- tensors


def _place(self: Tensor) -> torch.device:
    real = _device(self)
    return CUDA if real.type == "cpu" and MEMORY.holds(self) else real


def _as_told(self: Tensor, device: Any, *rest: Any, **options: Any) -> Tensor:
    """`self.to(device, ...)`: a copy where the device is another one, and only there."""
    wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if wanted.index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal: {wanted}")
    options.pop("non_blocking", None)
    rest = tuple(r for r in rest if not isinstance(r, bool) and r is not None)
    if "dtype" in options and options["dtype"] is None:
        del options["dtype"]
    moved = self
    if wanted.type != self.device.type:
        _TOLD.moving = True
        try:
            moved = torch.ops.aten._to_copy(self, device=wanted)
        finally:
            _TOLD.moving = False
    return _TO(moved, *rest, **options) if rest or options else moved


_TO = torch.Tensor.to
_NUMPY, _ARRAY = torch.Tensor.numpy, torch.Tensor.__array__


def _to(self: Tensor, *args: Any, **options: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        other, *rest = args
        return _as_told(self, other.device, other.dtype, *rest, **options)
    if args and (isinstance(args[0], (str, torch.device)) or type(args[0]) is int):
        return _as_told(self, *args, **options)
    if options.get("device") is not None:
        return _as_told(self, options.pop("device"), *args, **options)
    options.pop("device", None)
    if args and args[0] is None:
        args = args[1:]
    options.pop("non_blocking", None)
    args = tuple(a for a in args if not isinstance(a, bool))
    return _TO(self, *args, **options) if args or options else self


_MODULE_TO = torch.nn.Module.to


def _module_to(self: torch.nn.Module, *args: Any, **options: Any) -> torch.nn.Module:
    if args and isinstance(args[0], Tensor):  # whose device C++ would ask for
        return _MODULE_TO(self, args[0].device, args[0].dtype)
    return _MODULE_TO(self, *args, **options)


def _on_host_only(real: Any) -> Any:
    def checked(self: Tensor, *args: Any, **options: Any) -> Any:
        if MEMORY.holds(self):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
        return real(self, *args, **options)

    return checked


def _marking(real: Any) -> Any:
    """A constructor from Python values, which PyTorch does not show to a mode."""

    def made(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        if isinstance(data, Tensor) and device is None:
            device = data.device
        t = real(data, *args, **options)
        if device is not None and torch.device(device).type == "cuda":
            MEMORY.take(t)
        return t

    return made


def _new_tensor(self: Tensor, data: Any, **options: Any) -> Tensor:
    return torch.tensor(data, **{"dtype": self.dtype, "device": self.device} | options)


# ---- generators and autocast

_GENERATOR = torch.Generator
_GENERATORS: dict[int, torch.Generator] = {}  # those of the device, which stay: so do addresses


class Generator(_GENERATOR):
    """`torch.Generator` that may be the device's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = _GENERATOR()
        if torch.device(device).type == "cuda":
            _GENERATORS[made._cdata] = made
        return made


def _check_generator(generator: Any, here: bool) -> None:
    if generator is not None and (generator._cdata in _GENERATORS) != here:
        wanted, got = ("cuda", "cpu") if here else ("cpu", "cuda")
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{got}'")


_AUTOCAST = torch.autocast


class Autocast(_AUTOCAST):
    """Autocast on the device is that of the CPU."""

    def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **options)


def _of_kind(real: Any) -> Any:
    return lambda kind="cuda", *rest: real("cpu" if kind == "cuda" else kind, *rest)


# ---- versions


def _stands_in(op: str, version: Any) -> Any:
    """The same version on the device. It has modules of its own, so whoever takes the reference's
    functions away does not take its; attention is made as kernels do it, with sums in fp32.
    """
    package = version.module.rpartition(".")[0]
    definition = "sdpa" if op == "prompt_attention" else "reference"
    spec = importlib.util.find_spec(f"{package}.{definition}")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__name__ = version.module
    if op == "koopman_losses":  # its kernels work on copies of what is strided
        for name in ("forward", "backward"):
            setattr(module, name, _on_copies(getattr(module, name)))

    def unavailable(kind: str, dtype: torch.dtype) -> str | None:
        if dtype == torch.float64:
            return f"computes in fp32 at most, not {dtype}"
        return None if kind == "cuda" else "needs a GPU"

    return replace(version, module=module, unavailable=unavailable)


def _on_copies(real: Any) -> Any:
    return lambda *given: real(*(t.contiguous() if isinstance(t, Tensor) else t for t in given))


def install() -> None:
    """From here on `torch.cuda` is the stand-in, in this process and until it ends."""
    for name, value in _CUDA.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.device = property(_place)
    torch.Tensor.is_cuda = property(MEMORY.holds)
    torch.Tensor.get_device = lambda self: 0 if MEMORY.holds(self) else -1
    torch.Tensor.to = _to
    torch.Tensor.cuda = lambda self, device=None, **_: _as_told(self, device or "cuda")
    torch.Tensor.cpu = lambda self, **_: _as_told(self, "cpu")
    torch.nn.Module.to = _module_to
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.Tensor.numpy, torch.Tensor.__array__ = _on_host_only(_NUMPY), _on_host_only(_ARRAY)
    torch.Tensor.new_tensor = _new_tensor
    torch.tensor, torch.as_tensor = _marking(torch.tensor), _marking(torch.as_tensor)
    torch.Generator = Generator
    torch.autocast = torch.amp.autocast = Autocast
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled"):
        setattr(torch, name, _of_kind(getattr(torch, name)))
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        setattr(torch.optim.Optimizer, name, lambda self: None)
    torch.compile = lambda function=None, **_: function

    from pae_kernels import adaptive, attention, backends, koopman, pointwise, spectrum  # noqa: F401

    for op, versions in backends.registered().items():
        backends.register(
            op, *(_stands_in(op, v) if v.name in ("triton", "cuda") else v for v in versions)
        )
    DEVICE.__enter__()

    start = threading.Thread.run

    def run(self: threading.Thread) -> None:
        with DEVICE:
            start(self)

    threading.Thread.run = run


# ---- sizes, as a plug-in of pytest

SMALLER = {"RUNS": 3, "WIDTH": 64}  # constants of a test module
COMPILED = ("test_native.py", "compiles_without")  # what nvcc or Inductor must compile first


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list) -> None:
    """With PAE_THIN one case of every test, for each version that a GPU runs; with PAE_FEW of so
    many tests, among those that -k and -m will choose.
    """
    seen: dict[tuple[str, str], Any] = {}
    for item in items:
        for name in SMALLER.keys() & vars(item.module).keys():
            setattr(item.module, name, SMALLER[name])
        version = re.search(r"gpu-\w+", item.nodeid)
        name = item.nodeid.partition("[")[0], version[0] if version else ""
        if name not in seen or ("gpu" in item.nodeid and "gpu" not in seen[name].nodeid):
            seen[name] = item
    if not os.environ.get("PAE_THIN") or any("replay" in i.fixturenames for i in items):
        return
    chosen = list(seen.values())
    if few := os.environ.get("PAE_FEW"):  # -k and -m choose later
        words, mark = config.option.keyword.split(" or "), config.option.markexpr
        chosen = [
            i
            for i in chosen
            if any(word in i.nodeid for word in words)
            and not any(name in i.nodeid for name in COMPILED)
            and (not mark or i.get_closest_marker(mark))
        ][: int(few)]
    config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
    items[:] = chosen


def small_benchmarks() -> None:
    """Groups keep their names, and open small inputs; a product and a copy take no time."""
    from bench import (
        bench_attention,
        bench_kld,
        bench_mpa,
        bench_pointwise,
        bench_product,
        bench_spectrum,
        bench_step,
        roofline,
        shapes,
    )

    def smaller(module: Any, name: str, change: Any) -> None:
        real = getattr(module, name)
        setattr(module, name, lambda *args, **options: real(*change(*args), **options))

    narrow = {"embed_dim": 64, "num_heads": 2}
    backbone = shapes.random_backbone

    def small(name: str, device: torch.device, seed: int = 0, **changes: Any) -> Any:
        if name != shapes.TINY:
            # what a step saves outweighs what one block works with from four blocks on
            changes = narrow | {"depth": 4 if name == shapes.SMALL else 2} | changes
        return backbone(name, device, seed, **changes)

    shapes.random_backbone = small
    attended = {"heads": 2, "head_width": 16, "tokens": 9, "prompts": 3, "batch": 2}
    smaller(bench_attention, "open_inputs", lambda s, *rest: (s._replace(**attended), *rest))
    for of_ops in (bench_pointwise, bench_product):
        smaller(of_ops, "open_inputs", lambda op, rows, width, *rest: (op, 8, 32, *rest))
    smaller(bench_step, "open_step", lambda case, *rest: (case._replace(batch=2), *rest))
    smaller(bench_kld, "open_regulariser", lambda dim, *rest: (8, *rest))
    smaller(bench_spectrum, "open_batch", lambda c, *rest: (replace(c, batch=2, dim=32), *rest))
    smaller(
        bench_mpa,
        "open_batch",
        lambda case, device, ranked=None: ((*case[:3], 3, 2), device, ranked and 2),
    )
    bench_kld.DEPTH, bench_kld.WIDTH, bench_kld.PROMPTS = 4, 16, 3
    roofline.SIDE, roofline.COPIED = {"cuda": 64, "cpu": 64}, {"cuda": 2**16, "cpu": 2**16}


def pytest_configure(config: Any) -> None:
    """Few repetitions, and small benchmarks."""
    from bench import clock
    from tests.kernels import executions

    executions.EXECUTIONS = tuple(
        replace(e, repeats=2) if e.kind == "gpu" else e for e in executions.EXECUTIONS
    )
    small_benchmarks()
    clock.check = lambda device, reading: {"work_x2": 2.0, "agreement": 1.0, "finest_us": 1.0}
    if hasattr(config.option, "rounds"):
        config.option.rounds = config.option.rounds or 2


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
install()
