"""Compiles Triton kernels without a GPU, for every tile that ships, and reads their resources.

`python -m pae_kernels --compile` prints the table; tests assert on it. Only what the compiler
itself needs is used: Triton's bundled assembler, no driver.

A Triton module takes part by `shipped_launches(architecture)`, its kernels in the shapes that
matter with every tile of its table, and `variant_launches(architecture)`, a sample of what else a
kernel's compile-time switches can be.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from . import backends, gpus, machine_code
from .machine_code import Resources

ARCHITECTURES = (80, 90)
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}

# of every launch: a product and the sum behind it are one instruction, whatever Triton's default
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """One kernel as it is launched: what is constant at compile time, and types of the rest.

    Attributes:
        label: what this launch is for.
        kernel: a `triton.jit` function.
        types: argument name -> Triton type ("*bf16", "i32", "fp32", ...).
        constants: argument name -> compile-time value.
        warps, stages: as in the launch.
        aligned: integer arguments that are multiples of 16; pointers always are.
        tensor_cores: its products run there; those of fp32 entries must not, being TF32.
        may_spill: register spills are accepted; exact fp32 products, outside the tensor cores, are
            the case that needs it.
    """

    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, object]
    warps: int
    stages: int
    aligned: tuple[str, ...] = ()
    tensor_cores: bool = False
    may_spill: bool = False


def triton_modules() -> list[ModuleType]:
    """The Triton modules of all registered ops, each once."""
    versions = (v for versions in backends.registered().values() for v in versions)
    return list(dict.fromkeys(v.load() for v in versions if v.name == "triton"))


def table(architectures: tuple[int, ...] = ARCHITECTURES, words: str = "") -> Iterator[str]:
    """Lines of the table of all shipped launches, each as soon as it is compiled.

    Args:
        architectures: 80, 90 or 100 each.
        words: of the launches that are wanted, every word is part of their label.
    """
    yield f"{'kernel and tile':<44}{'sm':>4}{HEADING}"
    for module in triton_modules():
        for architecture in architectures:
            for launch in module.shipped_launches(architecture):
                if all(word in launch.label for word in words.split()):
                    used = compile_launch(launch, architecture)
                    yield f"{launch.label:<44}{architecture:>4}{row(used)}"


HEADING = (
    f"{'registers':>11}{'spilled B':>11}{'shared KB':>11}{'per SM':>8}{'instructions':>14}"
    f"{'products':>10}{'barriers':>10}{'conversions':>13}{'async':>7}  loads; loops"
)


def row(used: Resources) -> str:
    """The columns of `HEADING`; loads as number x bits."""
    loads = " ".join(f"{count}x{width}" for width, count in used.loads.items())
    loops = " ".join(map(str, used.loops))
    return (
        f"{used.registers:>11}{used.spilled:>11}{used.shared / 1024:>11.1f}{used.programs:>8}"
        f"{used.instructions:>14}{used.products:>10}{used.barriers:>10}{used.conversions:>13}"
        f"{used.asynchronous:>7}  {'; '.join(filter(None, (loads, loops)))}"
    )


def compile_launch(launch: Launch, architecture: int) -> Resources:
    """Compile for sm_`architecture`, and read what the binary takes."""
    known = launch.constants
    pointers = tuple(n for n, t in launch.types.items() if t.startswith("*") and n not in known)
    made = binary(
        launch.kernel, launch.types, launch.constants, pointers + launch.aligned,
        launch.warps, launch.stages, architecture,
    )  # fmt: skip
    return machine_code.read(*made)


def binary(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Collection[str],
    warps: int,
    stages: int,
    architecture: int,
) -> tuple[bytes, int, int, int]:
    """What `machine_code.read` is given; `aligned` are all arguments that are multiples of 16,
    pointers too.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned}
    compiled = triton.compile(
        ASTSource(kernel, signature, dict(constants), attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "num_stages": stages, **OPTIONS},
    )
    return compiled.asm["cubin"], compiled.metadata.shared, warps, architecture


# ---- what a call launches


@contextlib.contextmanager
def recording(architecture: int, keep: Callable[[Launch], None]) -> Iterator[None]:
    """Below, Triton launches on a GPU of sm_`architecture` that is not there: each goes as far as
    its specialisation, through Triton's own code (which types, what is divisible by 16, which
    constants and options), and is handed to `keep`; nothing is compiled. Tensors of the meta device
    will do.
    """
    import triton

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel = fn.jit_function
        names = kernel.arg_names
        (attributes,) = compile["configs"]
        keep(
            Launch(
                label="",
                kernel=kernel,
                types={n: kind for n, kind in compile["signature"].items() if kind != "constexpr"},
                constants={names[i]: value for (i,), value in compile["constants"].items()},
                aligned=tuple(names[i] for (i,), words in attributes.items() if words),
                warps=compile["num_warps"],
                stages=compile["num_stages"],
            )
        )
        return True  # Triton need do nothing more

    size = gpus.GPU(architecture // 10, MULTIPROCESSORS[architecture])
    driver = triton.runtime.driver
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook))
        stack.enter_context(mock.patch.object(gpus, "of", lambda device: size))
        stack.callback(_forget_drivers)
        stack.callback(setattr, driver, "_active", driver._active)
        driver.set_active(_Driver(architecture))
        _forget_drivers()
        yield


def recorded(label: str, architecture: int, call: Callable[[], object], **about: Any) -> Launch:
    """The only launch of `call`; `about` are further attributes of it."""
    found: list[Launch] = []
    with recording(architecture, found.append):
        call()
    (launch,) = found
    return replace(launch, label=label, **about)


def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """What such a call is given: sizes, and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


class _Driver:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _forget_drivers() -> None:
    """What kernels know of a driver that they have met."""
    from triton.runtime.jit import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith("pae_kernels."):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()
