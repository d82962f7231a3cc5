"""A driver for Triton that launches nothing: what reaches it is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from pae_kernels import backends
from pae_kernels.launching import Launcher

GPU = torch.device("cuda", 0)


class Driver:
    """Compiles for sm_90 and keeps what it shall launch."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda *_: (1, 2, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *given: self.launches.append((source.fn.fn.__name__, metadata.hash, *given))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 77


class Uncompiled(CompiledKernel):
    """Takes part in a launch like one that is compiled."""

    def __init__(self, source: Any, target: GPUTarget, options: dict) -> None:
        self.src, self.name = source, source.fn.fn.__name__
        self.hash = f"{source.hash()} {options}"
        self.metadata = SimpleNamespace(hash=self.hash)
        self.module = self.function = self.packed_metadata = self._run = None

    def _init_handles(self) -> None:
        if self._run is None:
            self._run = triton.runtime.driver.active.launcher_cls(self.src, self.metadata)


@contextmanager
def gpu(compiles: bool, driver: Driver | None = None) -> Iterator[Driver]:
    """The library's kernels are launched as on a GPU, by launchers that have launched nothing.

    Args:
        compiles: whether there is code for them, too.
    """
    driver = Driver() if driver is None else driver
    for versions in backends.registered().values():
        for version in versions:
            if version.name == "triton":
                version.load()
    found = [
        (module, name, value)
        for path, module in list(sys.modules.items())
        if path.startswith("pae_kernels.")
        for name, value in list(vars(module).items())
        if isinstance(value, Launcher)
    ]
    before = triton.runtime.driver._active
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, PAE_BACKEND="triton", TRITON_INTERPRET="1"))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: 0))
        if not compiles:
            stack.enter_context(mock.patch.object(triton.compiler, "compile", Uncompiled))
        for module, name, launcher in found:
            stack.enter_context(mock.patch.object(module, name, _on_gpu(launcher.kernel)))
            stack.callback(_forget, launcher.kernel)
            _forget(launcher.kernel)
        stack.callback(triton.runtime.driver.set_active, before)
        triton.runtime.driver.set_active(driver)
        yield driver


def _on_gpu(kernel: Any) -> Callable[..., None]:
    launch = Launcher(kernel)
    return lambda count, device, given, constants: launch(count, GPU, given, constants)


def _forget(kernel: Any) -> None:
    for compiled, *_ in kernel.device_caches.values():
        for code in compiled.values():
            code.module = None  # no driver is asked to unload it
    kernel.device_caches.clear()
