"""A GPU of shapes alone: code for one runs through without one, and its Triton launches are kept.

Tensors have shapes, strides, dtypes, alignments and a device, and nothing in them (PyTorch's fake
tensors). A number that is read out of one is 1, and every question whether values are right has the
answer yes; bytes are counted as an allocator would. Ops of our own run the version that a GPU would
run, not what says how their results look. A Triton launch goes as far as its specialisation,
through Triton's own code: which kernel, which types, what is divisible by 16, which constants and
options. Nothing is compiled or launched.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from pae import plan
from pae_kernels import ahead_of_time, backends, machine_code, native
from pae_kernels.machine_code import Resources
from pae_kernels.spectrum import op as spectrum
from tests.allocations import Memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@dataclass(frozen=True)
class Launch:
    """A launch as Triton specialises it: all that the machine code depends on.

    Attributes:
        kernel: the `triton.jit` function.
        types: (argument, Triton type) of what is known when it is launched.
        constants: (argument, value) of what is known at compile time, an argument that is 1 among
            them.
        aligned: arguments that are multiples of 16, addresses too.
        warps, stages: options of the compiler.
    """

    kernel: JITFunction
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int

    @classmethod
    def of(cls, launch: ahead_of_time.Launch) -> Launch:
        """What it launches, without what is expected of it."""
        types, constants = (tuple(given.items()) for given in (launch.types, launch.constants))
        return cls(launch.kernel, types, constants, launch.aligned, launch.warps, launch.stages)

    def binary(self, architecture: int) -> tuple[bytes, int, int, int]:
        """Its machine code, as `machine_code.read` takes it."""
        return ahead_of_time.binary(
            self.kernel, dict(self.types), dict(self.constants), self.aligned,
            self.warps, self.stages, architecture,
        )  # fmt: skip

    def compiled(self, architecture: int) -> Resources:
        """What its machine code takes."""
        return machine_code.read(*self.binary(architecture))


@contextlib.contextmanager
def gpu(architecture: int, operations: Counter[Any] | None = None) -> Iterator[dict[Launch, int]]:
    """The launches that the code below makes on a GPU of sm_`architecture`, each with how often.

    Args:
        operations: counts what PyTorch is asked for on the way, in our own ops too.
    """
    launches: dict[Launch, int] = {}

    def keep(launch: ahead_of_time.Launch) -> None:
        found = Launch.of(launch)
        launches[found] = launches.get(found, 0) + 1

    memory = Memory()
    with contextlib.ExitStack() as stack:
        for where, names in (
            (torch.cuda, _cuda(architecture) | _counted(memory)),
            (torch, _autocast() | _made() | {"Generator": _Generator}),
            (torch.Tensor, _moves()),
            (FakeTensor, _outside()),
            (torch.nn.Module, {"_apply": _apply}),
            # a copied tensor is of the same world. A copy of that would free in C++, twice, what
            # PyTorch refers to weakly there: what else copies such a reference is refused
            (FakeTensorMode, {"__deepcopy__": lambda mode, memo: mode}),
            (StorageWeakRef, {"__reduce_ex__": _refused("copies a weak reference to a storage")}),
            (native.Library, {"status": _refused("hands addresses to compiled code")}),
            (backends, {"on": lambda device: contextlib.nullcontext()}),
            (native, {"unavailable": lambda: "nothing compiled runs on a stand-in"}),
            (plan, {"_refuse": lambda name, module, may: None}),  # it folds plain tensors alone
            (spectrum, {"_readable": lambda t: False}),
        ):
            for name, value in names.items():
                new = not hasattr(where, name)
                stack.enter_context(mock.patch.object(where, name, value, create=new))
        stack.enter_context(mock.patch.dict(os.environ, {"PAE_BACKEND": "auto"}))
        stack.enter_context(ahead_of_time.recording(architecture, keep))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_OurOps(memory, operations))
        yield launches


# ---- tensors. To PyTorch's own code they lie on the CPU, since its autograd engine would ask a GPU
# for streams; everybody else sees a GPU.


class _OurOps(TorchDispatchMode):
    """What runs instead of an operation."""

    within = False  # PyTorch's own code

    def __init__(self, memory: Memory, operations: Counter[Any] | None) -> None:
        super().__init__()
        self.memory, self.operations = memory, operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.operations is not None:
            self.operations[func] += 1
        if func in _YES:
            return True
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        kwargs = {name: _here(value) for name, value in (kwargs or {}).items()}
        ours = func.namespace == "pae"
        before, _OurOps.within = _OurOps.within, not ours
        try:
            if ours:
                with self:
                    made = func._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
            else:
                made = func(*args, **kwargs)
        finally:
            _OurOps.within = before
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor):
                self.memory.take(t)
        return made


_ATEN = torch.ops.aten
_YES = (_ATEN.equal.default, _ATEN.allclose.default, _ATEN.is_nonzero.default)


def _here(value: Any) -> Any:
    if isinstance(value, str | torch.device) and str(value).startswith("cuda"):
        return CPU
    return value


def _refused(what: str) -> Callable:
    def refuse(self: Any, *given: Any, **named: Any) -> Any:
        names = [value for value in given if isinstance(value, str)]
        raise RuntimeError(" ".join([*names, what]) + ": nothing lies behind those of a stand-in")

    return refuse


def _outside() -> dict[str, Any]:
    inside = FakeTensor.device
    return {
        "device": property(lambda t: inside.__get__(t) if _OurOps.within else GPU),
        "data_ptr": lambda t: 2**20 + t.storage_offset() * t.element_size(),
    }


def _moves() -> dict[str, Any]:
    to = torch.Tensor.to

    def here(t: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        return to(t, *map(_here, given), **{name: _here(value) for name, value in named.items()})

    return {"to": here, "cuda": lambda t, *_, **__: t}


def _made() -> dict[str, Any]:
    """What moves numbers to a device before anybody could redirect it."""

    def here(make: Callable) -> Callable:
        return lambda *given, **named: make(*given, **{n: _here(v) for n, v in named.items()})

    return {name: here(getattr(torch, name)) for name in ("tensor", "as_tensor")}


_OWN_GENERATOR = torch.Generator


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return _OWN_GENERATOR(CPU)


def _apply(module: torch.nn.Module, change: Callable, recurse: bool = True) -> torch.nn.Module:
    """As PyTorch's, which refuses to change such parameters in place."""
    for child in module.children() if recurse else ():
        _apply(child, change)
    for name, old in module._parameters.items():
        if old is not None and (new := change(old.detach())).dtype != old.dtype:
            module._parameters[name] = torch.nn.Parameter(new, old.requires_grad)
    for name, old in module._buffers.items():
        module._buffers[name] = None if old is None else change(old)
    return module


def _autocast() -> dict[str, Any]:
    autocast, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    kind = lambda device_type: "cpu" if device_type == "cuda" else device_type
    return {
        "autocast": lambda device_type, *a, **k: autocast(kind(device_type), *a, **k),
        "is_autocast_enabled": lambda *given: enabled(*map(kind, given)),
        "get_autocast_dtype": lambda device_type: dtype(kind(device_type)),
    }


# ---- torch.cuda


def _cuda(architecture: int) -> dict[str, Any]:
    major, minor = divmod(architecture, 10)
    properties = SimpleNamespace(
        name=f"a stand-in for sm_{architecture}",
        major=major,
        minor=minor,
        multi_processor_count=ahead_of_time.MULTIPROCESSORS[architecture],
        total_memory=80 * 2**30,
    )
    nothing = lambda *_, **__: None
    alone = lambda *_, **__: contextlib.nullcontext()
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_name": lambda device=None: properties.name,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "is_current_stream_capturing": lambda: False,
        "Stream": _Stream,
        "current_stream": _Stream,
        "CUDAGraph": _Stream,
        **dict.fromkeys(("device", "stream", "graph"), alone),
        **dict.fromkeys(
            ("_lazy_init", "synchronize", "empty_cache", "set_rng_state", "manual_seed", "_sleep"),
            nothing,
        ),
        "manual_seed_all": nothing,
    }


def _counted(memory: Memory) -> dict[str, Any]:
    return {
        "memory_allocated": lambda device=None: memory.swept(),
        "max_memory_allocated": lambda device=None: memory.most,
        "reset_peak_memory_stats": lambda device=None: memory.reset(),
    }


class _Stream:
    """A stream, an event or a graph: whatever is asked of it, nothing happens."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None
