"""Compiles Triton kernels without a GPU, for every tile that ships, and reads their resources.

`python -m pae_kernels --compile` prints the table; tests assert on it. Only what the compiler
itself needs is used: Triton's bundled assembler, no driver.

A Triton module takes part by `shipped_launches(architecture)`, its kernels in the shapes that
matter with every tile of its table, and `variant_launches(architecture)`, a sample of what else a
kernel's compile-time switches can be.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from . import backends

ARCHITECTURES = (80, 90)

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


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, spilled bytes a thread, shared bytes; and
    how many tensor-core instructions and loads of single 16-bit entries its code has.
    """

    registers: int
    spilled: int
    shared: int
    tensor_core: int
    scalar_loads: int


def triton_modules() -> list[ModuleType]:
    """The Triton modules of all registered ops, each once."""
    versions = (v for versions in backends.registered().values() for v in versions)
    return list(dict.fromkeys(v.load() for v in versions if v.name == "triton"))


def table(architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[str]:
    """Lines of the table of all shipped launches, each as soon as it is compiled."""
    yield f"{'kernel and tile':<44}{'sm':>4}{'registers':>11}{'shared KB':>11}{'spilled B':>11}"
    for module in triton_modules():
        for architecture in architectures:
            for launch in module.shipped_launches(architecture):
                used = compile_launch(launch, architecture)
                yield (
                    f"{launch.label:<44}{architecture:>4}{used.registers:>11}"
                    f"{used.shared / 1024:>11.1f}{used.spilled:>11}"
                )


def compile_launch(launch: Launch, architecture: int) -> Resources:
    """Compile for sm_`architecture` and read registers, spills, shared memory, instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = {n: "constexpr" if n in launch.constants else launch.types[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in launch.aligned
    }
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, launch.constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, **OPTIONS},
    )
    usage = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Resources(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_core=len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        scalar_loads=len(re.findall(r"ld\.global\S*\.b16 ", ptx)),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
