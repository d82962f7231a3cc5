"""A launch that was made before: what reaches the driver is what Triton's own way hands it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

pytest.importorskip("triton")


import pae_kernels
from pae_kernels import launching
from pae_kernels.adaptive import triton as adaptive
from pae_kernels.attention import triton as attention
from pae_kernels.koopman import triton as koopman
from pae_kernels.koopman import triton_spectral
from pae_kernels.launching import Launcher, power_of_2, programs
from pae_kernels.pointwise import triton as pointwise
from pae_kernels.product import triton as product
from pae_kernels.spectrum import triton as spectrum
from tests import fake_driver
from tests.fake_driver import GPU, Driver

BF16, FP32 = torch.bfloat16, torch.float32
MODULES = attention, pointwise, product, koopman, triton_spectral, spectrum, adaptive


@pytest.fixture
def driver():
    with fake_driver.gpu(compiles=True) as driver:
        yield driver


@pytest.fixture
def quick():
    """For launches whose code nobody waits for."""
    with fake_driver.gpu(compiles=False) as driver:
        yield driver


def addresses(launch: tuple) -> list:
    """Tensors as the numbers that a driver makes of them, without what hooks are told."""
    given = [v for v in launch if type(v).__name__ not in ("LazyDict", "HookChain")]
    return [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in given]


class Again(TorchDispatchMode):
    """The first time it computes; the second time the same operations return the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple] = []
        self.at: int | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.is_view:
            return func(*args, **kwargs or {})
        if self.at is None:
            self.made.append((func, func(*args, **kwargs or {})))
            return self.made[-1][1]
        first, made = self.made[self.at]
        assert first is func
        self.at += 1
        return tree_map_only(torch.Tensor, torch.Tensor.detach, made)


def both_ways(driver: Driver, work) -> list:
    """`work` twice, with the same tensors: the same kernels with the same arguments."""
    again = Again()
    with again:
        work()
        first = [addresses(launch) for launch in driver.launches]
        driver.launches.clear()
        again.at = 0
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
    constants = {"HAS_DELTA": True, "RMS": False, **pointwise._rows_launch(width)}
    return (rows, GPU, (x, d, y, xhat, torch.zeros(rows), rows, 1e-6), constants)


def test_the_driver_is_given_the_same(driver):
    launch, given = pointwise._norm_forward, norm()
    (only,) = both_ways(driver, lambda: launch(*given))
    assert only[2:6] == [32, 1, 1, 77]  # programs and stream
    # every argument of the kernel, constants too
    assert len(only) == len(pointwise.layer_norm_fwd_kernel.arg_names) + len(only[:8])


def test_attention_is_given_the_same(quick):
    qkv = torch.zeros(4, 65, 3, 2, 64, dtype=BF16)
    kv = torch.zeros(1, 5, 2, 2, 64, dtype=BF16)
    out, lse = torch.zeros(4, 65, 128, dtype=BF16), torch.zeros(4, 2, 65)
    d_out = torch.zeros_like(out)
    given = None, 1.0, False, None, None, None

    def step():
        attention.forward(qkv, kv, *given)
        attention.backward(d_out, qkv, kv, *given, out, lse, True)

    names = [launch[0] for launch in both_ways(quick, step)]
    assert names == ["prompt_attention_fwd_kernel", "prompt_attention_bwd_kernel"]


def test_gates_and_rotations_are_given_the_same(quick):
    u, d = torch.zeros(6, 64, dtype=BF16), torch.zeros(6, 32, dtype=BF16)
    qkv, angles = torch.zeros(2, 5, 3, 2, 8, dtype=BF16), torch.zeros(2, 4, 4)

    def step():
        pointwise.gated(u, "silu")
        pointwise.gated_backward(d, u, "silu")
        pointwise.rotate_(qkv, angles, False)

    names = [launch[0] for launch in both_ways(quick, step)]
    assert names == ["gated_fwd_kernel", "gated_bwd_kernel", "rotate_kernel"]


def test_regulariser_is_given_the_same(quick):
    """Grids of two axes, numbers that are constants of another launch, code by their divisibility:
    one operator for all pairs and one for each, with and without a gauge.
    """
    blocks, prompts, width, k = 3, 5, 48, 32
    rows, lift = torch.zeros(2, blocks, prompts, width), torch.zeros(2, k, width)
    d = torch.zeros(2)

    def step():
        for operators, formulation, eps in (
            (torch.zeros(2, k, k), "code", None),
            (torch.zeros(2, blocks - 1, k, k), "code", 1e-6),
            (torch.zeros(2, k, k), "paper", None),
        ):
            given = rows, lift, operators, operators, formulation, eps
            koopman.backward(d, d, *given, *koopman.forward(*given)[2:])

    names = [launch[0] for launch in both_ways(quick, step)]
    assert len(names) == (32 + 6) + (32 + 7) + (5 + 6)


def test_windows_are_given_the_same(quick):
    origins, weight = torch.zeros(2, 2, dtype=torch.long), torch.zeros(64, 3, 16, 16)
    shapes = torch.zeros(4, 3, 64, 64, dtype=torch.complex64)

    def search():
        tokens = spectrum.shortcut_tokens(shapes, origins, 16, weight, None, None, BF16)
        spectrum.shortcut_pool(tokens)

    names = [launch[0] for launch in both_ways(quick, search)]
    assert names == [
        *("shortcut_strips_kernel", "shortcut_taps_kernel", "shortcut_tokens_kernel"),
        *("shortcut_pool_kernel", "shortcut_pool_sum_kernel"),
    ]


def test_prompts_of_images_are_given_the_same(quick):
    x, weight = torch.zeros(4, 65, 64, dtype=BF16), torch.zeros(5, 65)
    u, gain, shift = torch.zeros(4, 5, 64), torch.zeros(64), torch.zeros(5, 64)
    bias, down, up = torch.zeros(5), torch.zeros(8, 64), torch.zeros(64, 8)

    def step():
        mixed, *statistics = adaptive.token_mix(x, weight, 1e-6)
        adaptive.token_mix_backward(mixed, x, weight, *statistics, True)
        given = u, gain, shift, bias, down, up, "gelu", None, None
        adaptive.prompt_bottleneck_backward(adaptive.prompt_bottleneck(*given), *given)

    assert len(both_ways(quick, step)) == 6


def test_there_is_one_way_of_launching():
    """Each kernel of the library by a launcher, whose module is one of `MODULES`."""
    kernels = set()
    for path in Path(pae_kernels.__file__).parent.glob("*/triton*.py"):
        source = path.read_text()
        assert not re.search(r"_kernel\[", source), path  # Triton's own way
        kernels |= {*re.findall(r"^def (\w+_kernel)\(", source, re.M)}
    launched = {
        launcher.kernel.fn.__name__
        for module in MODULES
        for launcher in tree_leaves(list(vars(module).values()))
        if isinstance(launcher, Launcher)
    }
    assert launched == kernels


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
