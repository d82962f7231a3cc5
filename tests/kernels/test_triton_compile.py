"""Every shipped kernel and tile compiles for sm_80 and sm_90, without spills where it matters.

An op takes part by registering a Triton version: nothing is listed here. Products with epilogues
take ten seconds each: here they take part with PAE_LONG=1 (`tests/more.sh`), and in every run the
main ones for sm_90 by the compile gate.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from pae_kernels import (  # noqa: F401
    adaptive,
    ahead_of_time,
    attention,
    koopman,
    pointwise,
    product,
    spectrum,
)
from pae_kernels.attention import tiles
from pae_kernels.attention import triton as triton_attention
from pae_kernels.koopman import tiles as koopman_tiles
from pae_kernels.machine_code import LEAST_SHARED

MODULES = {m.__name__.split(".")[-2]: m for m in ahead_of_time.triton_modules()}

LONG = {"product"}
LONG_RUN = bool(os.environ.get("PAE_LONG"))
HERE = [name for name in MODULES if LONG_RUN or name not in LONG]

each_module = pytest.mark.parametrize("module", [MODULES[name] for name in HERE], ids=HERE)
# attention's take a while: for sm_80, whose steps the compile gate has, in the long run
VARIANTS = [
    (name, architecture)
    for name in HERE
    for architecture in ahead_of_time.ARCHITECTURES
    if LONG_RUN or (name, architecture) != ("attention", 80)
]
each_architecture = pytest.mark.parametrize("architecture", ahead_of_time.ARCHITECTURES)


def assert_good(launch, architecture, few=0):
    used = ahead_of_time.compile_launch(launch, architecture)
    assert 0 < used.registers <= 255 and used.programs, launch.label
    if architecture == 80:  # other GPUs with these tiles have less shared memory
        assert used.shared <= LEAST_SHARED, launch.label
    # never in fp32, where they would round to TF32
    assert (used.products > 0) == launch.tensor_cores, launch.label
    spills = f"{launch.label} spills {used.spilled} bytes"
    assert used.spilled <= few or launch.may_spill, spills
    # a load of one 16-bit entry: the alignment of its rows was lost, where they have one
    assert not used.loads.keys() & {16} or launch.label.endswith(" odd"), launch.label


def test_attention_and_pointwise_take_part():
    assert {"attention", "pointwise"} <= MODULES.keys()


def test_the_table_has_a_line_per_launch(monkeypatch):
    """What `python -m pae_kernels --compile` prints."""
    few = SimpleNamespace(
        shipped_launches=lambda arch: MODULES["pointwise"].shipped_launches(arch)[3:5]
    )
    monkeypatch.setattr(ahead_of_time, "triton_modules", lambda: [few])
    heading, *lines = ahead_of_time.table()
    assert heading.startswith("kernel and tile") and heading.endswith("loads; loops")
    assert [line[:48].rsplit(maxsplit=1) for line in lines] == [
        ["gelu fwd", "80"], ["gelu coded", "80"], ["gelu fwd", "90"], ["gelu coded", "90"]
    ]  # fmt: skip
    for line in lines:
        registers, spilled, shared, programs, instructions, *_ = line[48:].split()
        assert 16 <= int(registers) <= 255 and float(shared) <= 227 and spilled == "0"
        assert 1 <= int(programs) <= 8 and 100 < int(instructions) < 2000
        assert line.endswith("x128")  # loads of eight entries
    assert len(list(ahead_of_time.table((90,), "gelu coded"))) == 2


@each_architecture
@each_module
def test_shipped_tiles(module, architecture):
    import triton

    older = triton.__version__.startswith("3.6.")
    for launch in module.shipped_launches(architecture):
        if launch.may_spill and architecture != 80:
            continue  # all that is left to hold: it compiles, and fits into the smaller memory
        # the registers' worth of keys that arrive while the tile before is worked on
        few = (40 if older else 32) if launch.label == "attention bwd bf16 d=64 256x64" else 0
        assert_good(launch, architecture, few)


def test_attention_with_biases_fits_little_shared_memory():
    launches = triton_attention.variant_launches(80)
    placed = [launch for launch in launches if launch.label.startswith("attention fwd with ")]
    assert {launch.constants["PLACED"] for launch in placed} == {1, 3}
    for launch in placed:
        assert_good(launch, 80)


@pytest.mark.parametrize(("name", "architecture"), VARIANTS)
def test_variants(name, architecture):
    """Rarer switches may spill a few registers."""
    module = MODULES[name]
    for launch in module.variant_launches(architecture):
        assert_good(launch, architecture, few=64)


def test_what_may_spill():
    """Exact fp32 products alone, which run outside the tensor cores."""
    for module in MODULES.values():
        for launch in (*module.shipped_launches(90), *module.variant_launches(90)):
            assert "fp32" in launch.label or not launch.may_spill, launch.label


@each_architecture
def test_pointwise_kernels_keep_to_one_layout(architecture):
    """A pass through shared memory between two layouts doubles what a kernel issues, and where it
    lies before the formula, the formula is there twice. One warp sums a row without a barrier.
    """
    for launch in MODULES["pointwise"].shipped_launches(architecture):
        used = ahead_of_time.compile_launch(launch, architecture)
        assert used.shared == used.conversions == used.barriers == 0, launch.label
        if launch.label == "gelu coded":  # an exponential each for the value and the bell
            entries = launch.constants["BLOCK"] // (32 * launch.warps)
            assert used.functions == 2 * entries
            assert used.instructions <= 27 * entries


@each_architecture
def test_attention_copies_its_next_keys_meanwhile(architecture):
    """Programs of the one-pass backward take images in turn, as many programs as fit at a time."""
    for (large, _), tile in tiles.WHOLE.items():
        if large != (architecture >= 90):
            continue
        launch = triton_attention._launch("bwd", triton_attention.prompt_attention_bwd_kernel, tile)
        used = ahead_of_time.compile_launch(launch, architecture)
        assert used.programs >= tile.programs and used.asynchronous > 0, launch.label
    for launch in triton_attention.shipped_launches(architecture):
        if launch.label == "attention fwd bf16 d=64 128x64":
            assert ahead_of_time.compile_launch(launch, architecture).asynchronous > 0


def test_biases_and_masks_in_fp64_are_rounded_before_they_are_read():
    """Two of them in flight, 320 KB, would fit no multiprocessor's shared memory."""
    meta, bf16 = ahead_of_time.meta, torch.bfloat16
    given = meta(bf16, 2, 197, 3, 4, 64), meta(bf16, 1, 50, 2, 4, 64), None, 0.1, False, None
    placed = meta(torch.float64, 4, 197, 197), meta(torch.float64, 2, 197, 197)
    fwd = lambda: triton_attention.forward(*given, *placed)
    launch = ahead_of_time.recorded("", 90, fwd)
    assert launch.types["bias"] == launch.types["mask"] == "*fp32"
    assert tiles.with_places(tiles.WHOLE[True, 256], True, True).block_n == 32


def test_programs_that_take_images_in_turn_fill_the_gpu_once():
    """128 images of 12 heads on 132 multiprocessors, which a program of 256 rows fills alone."""
    qkv = torch.empty(128, 197, 3, 12, 64, dtype=torch.bfloat16, device="meta")
    for rows, tile in ((197, tiles.WHOLE[True, 256]), (64, tiles.WHOLE[True, 64])):
        assert tiles.backward_whole(qkv, rows) == tile
        images = tiles.images_per_program(qkv, tile)
        programs = -(-128 // images) * 12
        assert images == 12 // tile.programs
        assert 0.9 * 132 * tile.programs <= programs <= 132 * tile.programs
    one = torch.empty(1, 197, 3, 12, 64, dtype=torch.bfloat16, device="meta")
    assert tiles.images_per_program(one, tiles.WHOLE[True, 256]) == 1


def test_no_few_squares_come_behind_all_others():
    """At k = 1024 there are 136 tiles of 64: too many for 132 multiprocessors, not for 148. Of all
    pairs' operators at once there are enough.
    """
    chosen = lambda k, matrices, count: koopman_tiles.square(k, matrices, count)
    assert [chosen(1024, 1, count) for count in (108, 132, 148)] == [32, 32, 64]
    assert [chosen(256, matrices, 132) for matrices in (1, 11)] == [16, 64]
    assert chosen(1024, 11, 132) == 64


def test_products_go_the_way_that_the_gpu_and_the_rows_allow():
    """sm_90 and newer read tiles by descriptors; older GPUs and rows of odd sizes by pointers."""
    module = MODULES["product"]
    for architecture, way in ((80, "pointers"), (90, "tma"), (100, "tma")):
        launches = module.shipped_launches(architecture)
        assert [launch.label.split()[-1] for launch in launches] == [way] * 5
        odd = [v for v in module.variant_launches(architecture) if v.label.endswith(" odd")]
        assert [launch.label.split()[-2] for launch in odd] == ["pointers"] * 2


if "product" in HERE:

    @each_architecture
    def test_products_with_epilogues(architecture):
        """sm_90: wgmma alone, whose factors come by TMA; older GPUs copy theirs ahead. Each entry
        is worked on in one place: an exponential for the value, one for the derivative.
        """
        for launch in MODULES["product"].shipped_launches(architecture):
            used = ahead_of_time.compile_launch(launch, architecture)
            assert used.spilled == 0 and used.asynchronous > 0, launch.label
            assert used.wide == (used.products if architecture == 90 else 0), launch.label
            sides = launch.constants["BLOCK_M"] * launch.constants["BLOCK_N"]
            each = 0 if "coded" in launch.label else 2
            each = 1 if "hidden" in launch.label or "nothing" in launch.label else each
            assert used.functions - each * sides // (32 * launch.warps) <= 16, launch.label
