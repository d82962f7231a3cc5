"""What a step does, counted instead of timed: the same numbers on every run and a busy machine."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.memory import tensors_in

IDLE = {
    *("view", "_unsafe_view", "detach", "alias", "lift_fresh", "reshape", "promote_types"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


class Work(TorchDispatchMode):
    """Counts what PyTorch dispatches in the context; one of pae's ops is one operation.

    Attributes:
        ops: name -> calls of what computes or moves something; views and allocations do not.
        tensors, bytes: memory that operations handed out as fresh results. What a kernel needs for
            itself is not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.tensors = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if not func.is_view and name not in IDLE:
            self.ops[name] += 1
        given = {_storage(t) for t in tensors_in([*args, kwargs])}
        result = func(*args, **kwargs)
        for t in tensors_in(result):
            if _storage(t) not in given:
                given.add(_storage(t))
                self.tensors += t.untyped_storage().nbytes() > 0
                self.bytes += t.untyped_storage().nbytes()
        return result


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class _Recorded:
    """Stands in for a Triton kernel: a launch is counted and nothing runs."""

    def __init__(self, kernel: Any, launches: Counter[str]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self

    def __call__(self, *args: object, **kwargs: object) -> None:
        self._launches[self._kernel.fn.__name__] += 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


@contextmanager
def triton_launches() -> Iterator[Counter[str]]:
    """Kernel name -> launches of what runs in the context on CPU tensors, as a GPU would see them.

    Launching code runs, kernels do not: values are whatever memory held. Needs Triton, no GPU.
    """
    from triton.runtime.jit import JITFunction

    from pae_kernels import backends
    from pae_kernels.launching import Launcher

    launches: Counter[str] = Counter()
    for versions in backends.registered().values():
        for version in versions:
            if version.name == "triton":
                version.load()
    with patch.dict(os.environ, PAE_BACKEND="triton", TRITON_INTERPRET="1"):
        found = [
            (module, name, value)
            for path, module in list(sys.modules.items())
            if path.startswith("pae_kernels.")
            for name, value in vars(module).items()
        ]
        replaced = [place for place in found if isinstance(place[2], JITFunction)]
        replaced += [(v, "kernel", v.kernel) for *_, v in found if isinstance(v, Launcher)]
        for owner, name, kernel in replaced:
            setattr(owner, name, _Recorded(kernel, launches))
        try:
            yield launches
        finally:
            for owner, name, kernel in replaced:
                setattr(owner, name, kernel)
