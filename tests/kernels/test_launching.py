"""A launch that was made before: what reaches the driver is what Triton's own way hands it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from pae_kernels import launching
from pae_kernels.attention import triton as attention
from pae_kernels.launching import Launcher, power_of_2, programs
from pae_kernels.pointwise import triton as pointwise

GPU = torch.device("cuda", 0)
BF16, FP32 = torch.bfloat16, torch.float32


class Driver:
    """Compiles for sm_90 and keeps what it shall launch."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda *_: (1, 2, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source, metadata):
        return lambda *given: self.launches.append((source.fn.fn.__name__, metadata.hash, *given))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 77


@pytest.fixture
def driver(monkeypatch):
    """In its place, with launchers that have launched nothing."""
    fake = Driver()
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernels = []
    for module in (pointwise, attention):
        for name, launcher in list(vars(module).items()):
            if isinstance(launcher, Launcher):
                again = Launcher(launcher.kernel)
                kernels.append(launcher.kernel)
                on_gpu = lambda count, device, *rest, again=again: again(count, GPU, *rest)
                monkeypatch.setattr(module, name, on_gpu)
    yield fake
    for kernel in kernels:
        for compiled, *_ in kernel.device_caches.values():
            for code in compiled.values():
                code.module = None  # no driver is asked to unload it
        kernel.device_caches.clear()
    triton.runtime.driver.set_active(before)


def addresses(launch: tuple) -> list:
    """Tensors as the numbers that a driver makes of them, without what hooks are told."""
    given = [v for v in launch if type(v).__name__ not in ("LazyDict", "HookChain")]
    return [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in given]


def both_ways(driver: Driver, work) -> list:
    """`work` twice, which allocates nothing: the same kernels with the same arguments."""
    work()
    first = [addresses(launch) for launch in driver.launches]
    driver.launches.clear()
    work()
    second = [addresses(launch) for launch in driver.launches]
    assert first == second
    # Triton's own way hands tensors on
    assert not any(isinstance(v, torch.Tensor) for launch in driver.launches for v in launch)
    return second


def norm(rows: int = 32, width: int = 64, dtype=BF16, offset: int = 0) -> tuple:
    """Arguments of the norm's kernel, its first rows `offset` entries behind an aligned address."""
    x, y = (torch.zeros(rows * width + 8)[offset : offset + rows * width] for _ in range(2))
    d, xhat = (torch.zeros(rows * width, dtype=dtype) for _ in range(2))
    constants = {"HAS_DELTA": True, **pointwise._rows_launch(width)}
    return (rows, GPU, (x, d, y, xhat, torch.zeros(rows), rows, 1e-6), constants)


def test_the_driver_is_given_the_same(driver):
    launch, given = pointwise._norm_forward, norm()
    (only,) = both_ways(driver, lambda: launch(*given))
    assert only[2:6] == [32, 1, 1, 77]  # programs and stream
    # every argument of the kernel, constants too
    assert len(only) == len(pointwise.layer_norm_fwd_kernel.arg_names) + len(only[:8])


def test_attention_is_given_the_same(driver, monkeypatch):
    """With what it allocates kept, so that addresses are the same twice."""
    qkv = torch.zeros(4, 65, 3, 2, 64, dtype=BF16)
    kv = torch.zeros(1, 5, 2, 2, 64, dtype=BF16)
    kept: dict = {}

    def empty(*size, **options):
        return kept.setdefault((size, str(options)), torch.zeros(*size, **options))

    monkeypatch.setattr(attention.torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *size: empty(*size, dtype=t.dtype))
    out, lse = torch.zeros(4, 65, 128, dtype=BF16), torch.zeros(4, 2, 65)
    d_out = torch.zeros_like(out)

    def step():
        attention.forward(qkv, kv, None, 1.0, False, None)
        attention.backward(d_out, qkv, kv, None, 1.0, False, None, out, lse, True)

    names = [launch[0] for launch in both_ways(driver, step)]
    assert names == ["prompt_attention_fwd_kernel", "prompt_attention_bwd_kernel"]


@pytest.mark.parametrize(
    "other",
    [{"rows": 33}, {"rows": 1}, {"dtype": torch.float16}, {"width": 128}, {"offset": 4}],
    ids=str,
)
def test_other_code_is_found_for_what_differs(driver, other):
    """Rows that are no multiple of 16, or one; a dtype; a constant; an alignment that is kept."""
    launch = pointwise._norm_forward
    for given in (norm(), norm(**other), norm(), norm(**other)):
        launch(*given)
    code = [found[1] for found in driver.launches]
    assert code[:2] == code[2:]
    assert (code[0] != code[1]) == (other != {"offset": 4})  # 16 bytes further: aligned as before


def test_an_odd_address_takes_tritons_own_way(driver):
    launch = pointwise._norm_forward
    for given in (norm(), norm(offset=1), norm(offset=1), norm()):
        launch(*given)
    code = [found[1] for found in driver.launches]
    assert code[1] == code[2] != code[0] == code[3]
    tensors = [any(isinstance(v, torch.Tensor) for v in found) for found in driver.launches]
    assert tensors == [True, True, True, False]


def test_sizes_beyond_32_bits_take_tritons_own_way(driver):
    launch, (count, device, given, constants) = pointwise._norm_forward, norm()
    for rows in (32, 2**31, 2**31, 32):
        launch(count, device, (*given[:5], rows, *given[6:]), constants)
    code = [found[1] for found in driver.launches]
    assert code[1] == code[2] != code[0] == code[3]


def test_another_device_is_made_the_current_one(driver, monkeypatch):
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", Device)
    launcher = Launcher(pointwise.layer_norm_fwd_kernel)
    count, _, given, constants = norm()
    other = torch.device("cuda", 1)
    launcher(count, other, given, constants)
    assert entered == [other, None] and len(driver.launches) == 1
    launcher(count, GPU, given, constants)  # its own entry: code belongs to a device
    assert len(entered) == 2 and len(launcher._compiled) == 2


def test_host_time_of_a_launch(driver):
    """The best of several rounds each, in turn; three quarters where it was measured."""
    launcher = Launcher(pointwise.layer_norm_fwd_kernel)
    count, _, given, constants = norm()
    ways = {
        "own": lambda: launcher.kernel[(count,)](*given, **constants),
        "ours": lambda: launcher(count, GPU, given, constants),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(10):
        for name, launch in ways.items():
            launch()
            before = time.process_time()
            for _ in range(100):
                launch()
            best[name] = min(best[name], time.process_time() - before)
    assert best["ours"] < best["own"], best


def test_small_numbers():
    assert [programs(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [power_of_2(n) for n in range(10)] == [1, 1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert launching._LEAST == 2**31
