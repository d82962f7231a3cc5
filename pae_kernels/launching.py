"""Triton launches at the host cost of a launch: what was compiled is found again by a short key.

`kernel[grid](...)` binds every argument by name, asks each for its specialisation, makes a string
of all of them, checks globals, and its driver asks where every tensor lies. The key here is what
the machine code depends on, for arguments as our ops give them: constants, dtypes, and of whole
numbers whether they are 1 or multiples of 16. Whatever it does not cover (an address that is no
multiple of 16, sizes beyond 32 bits) takes Triton's own way. `triton.cdiv` and `next_power_of_2`
take as long as a launch outside of kernels, so they have substitutes.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from . import backends

_LEAST = 2**31  # that does not fit into 32 bits


def programs(count: int, each: int) -> int:
    """ceil(count / each); Triton's own `cdiv` takes microseconds outside of kernels."""
    return -(-count // each)


def power_of_2(least: int) -> int:
    """The smallest one that is at least this."""
    return 1 << max(least - 1, 0).bit_length()


class Launcher:
    """Launches one kernel, again and again.

    Args:
        kernel: a `triton.jit` function (an interpreted one is called as it is). Its arguments
            before the constants are given in their order, and those that are tensors, whole
            numbers or real numbers at the first launch are so at every one.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple, CompiledKernel] = {}
        self._pointers: list[int] | None = None  # where tensors lie among the arguments
        self._numbers: Callable[[tuple], tuple] = tuple  # whole numbers of 32 bits
        self._special: Callable[[tuple], tuple] = tuple  # those that code may depend on
        self._constants: Callable[[dict], tuple] = tuple

    def __call__(
        self,
        count: int | tuple[int, int],
        device: torch.device,
        given: tuple,
        constants: dict[str, Any],
    ) -> None:
        """`count` programs, or those of a grid of two axes, on the current stream of `device`;
        `constants` and options by name.
        """
        grid = (count, 1, 1) if isinstance(count, int) else (*count, 1)
        if device.type != "cuda":
            self.kernel[grid](*given, **constants)
        elif device.index == torch.cuda.current_device():
            self._launch(grid, device.index, given, constants)
        else:
            with backends.on(device):
                self._launch(grid, device.index, given, constants)

    def _launch(
        self, grid: tuple[int, int, int], device: int, given: tuple, constants: dict[str, Any]
    ) -> None:
        if self._pointers is None:
            self._pointers = self._learn(given)
        values, kinds, bits = list(given), [], 0
        for i in self._pointers:
            tensor = given[i]
            kinds.append(tensor.dtype)
            values[i] = address = tensor.data_ptr()  # of a number the driver is not asked
            bits |= address
        special = [2 if v == 1 else v & 15 == 0 for v in self._special(given)]
        key = device, *kinds, *special, *constants, *constants.values()
        numbers = self._numbers(given)
        usual = not bits & 15 and min(numbers) >= -_LEAST and max(numbers) < _LEAST
        if usual and key in self._compiled:
            stream = driver.active.get_current_stream(device)
            self._compiled[key][grid](*values, *self._constants(constants), stream=stream)
            return
        made = self.kernel[grid](*given, **constants)
        if usual and isinstance(made, CompiledKernel):
            self._compiled[key] = made

    def _learn(self, given: tuple) -> list[int]:
        parameters = self.kernel.params
        whole = [i for i, value in enumerate(given) if isinstance(value, int)]
        self._numbers = _take([i for i in whole if parameters[i].annotation_type != "i64"])
        self._special = _take([i for i in whole if not parameters[i].do_not_specialize])
        self._constants = _take([p.name for p in parameters if p.is_constexpr])
        return [i for i, value in enumerate(given) if isinstance(value, Tensor)]


def _take(places: list) -> Callable[[Any], tuple]:
    """What takes the entries at these places, in this order."""
    if len(places) > 1:  # fewer, and it would not return a tuple
        return itemgetter(*places)
    return lambda entries: tuple(entries[place] for place in places)
