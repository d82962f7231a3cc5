"""The compile gate: what a step launches, compiled as it is launched, is no worse than its budget.

`python -m tests.gate` guards what benchmarks launch too, and every launch on all architectures.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from pae_kernels import machine_code, native  # noqa: E402
from pae_kernels.pointwise import triton as pointwise  # noqa: E402
from tests import gate, launches, stand_in  # noqa: E402

LONG = bool(os.environ.get("PAE_LONG"))  # tests/more.sh
# sm_90 whole; of the others what compiles in a moment, and in the long run attention too
ROOMS = ["attention", "pointwise", "koopman", "adaptive"]
CASES = [(90, room) for room in ROOMS]
CASES += [(arch, room) for arch in (80, 100) for room in ("pointwise", *["attention"] * LONG)]
# one product each way: those take ten seconds to compile
CASES += [(90, "product")]
PRODUCTS = ("KEEP=1", "CODED=False")
GELU = "activation_fwd bf16,u8 KIND=gelu CODED=True"


@lru_cache
def of_steps(architecture):
    return gate.named(launches.of_steps(architecture, main=architecture != 90))


def complaints(name, launch, architecture):
    figures = gate.Figures.of(launch.compiled(architecture), launch)
    said = gate.faults(name, figures, architecture)
    return [*said, *gate.complaints(name, figures, gate.budget(gate.read(), launch), architecture)]


@pytest.mark.parametrize(("architecture", "room"), CASES)
def test_a_step_is_within_its_budget(architecture, room):
    said, seen = [], 0
    for name, launch in of_steps(architecture).items():
        left_out = room == "product" and not {*PRODUCTS} & {*name.split()}
        if gate.room_of(launch) == room and (architecture == 90 or gate.is_main(name, launch)):
            seen += 1
            said += [] if left_out else complaints(name, launch, architecture)
    assert seen >= 5, f"{seen} launches"
    assert not said, "\n".join(said)


def test_gelu_forms_its_polynomial_once():
    """On every Triton; in two layouts it would be formed twice, once for the 8-bit derivative."""
    launch = of_steps(90)[GELU]
    assert gate.Figures.of(launch.compiled(90), launch).per_entry <= 28


def test_binaries_that_are_printed_together_are_those_printed_apart():
    """In each the goals of jumps are counted from its own beginning."""
    norm = next(launch for name, launch in of_steps(90).items() if name.startswith("layer_norm_b"))
    codes = [machine_code.code_of(la.binary(90)[0]) for la in (norm, of_steps(90)[GELU], norm)]
    together = list(machine_code.listings(codes, 90))
    apart = [text for code in codes for text in machine_code.listings([code], 90)]
    shown = [[vars(machine_code.Code(text)) for text in texts] for texts in (together, apart)]
    assert shown[0] == shown[1]
    assert together[2] != apart[2]  # addresses in front of the lines are those of the whole


# ---- planted faults


@triton.jit
def activation_fwd_kernel(
    u, y, code, count, KIND: tl.constexpr, CODED: tl.constexpr, BLOCK: tl.constexpr
):
    """The kernel of that name, which reads its argument again for the derivative."""
    at = pointwise._entries(BLOCK)
    mask = at < count
    value, _ = pointwise._act(tl.load(u + at, mask=mask, other=0.0).to(tl.float32), KIND)
    again = tl.load(u + at, mask=mask, other=0.0, volatile=True).to(tl.float32)
    _, slope = pointwise._act(again, KIND)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)
    rounded = slope * 160.0 + (40.0 + 12582912.0)
    tl.store(code + at, rounded.to(tl.int32, bitcast=True).to(tl.uint8), mask=mask)


def test_a_polynomial_that_is_formed_twice_is_found():
    launch = replace(of_steps(90)[GELU], kernel=activation_fwd_kernel)
    found = gate.Figures.of(launch.compiled(90), launch)
    assert found.per_entry > 28
    for line in (gate.LINE, "99.0"):
        said = list(gate.complaints(GELU, found, gate.read()[GELU], 90, line))
        assert any(": instructions " in complaint for complaint in said), said


def test_alignment_that_is_lost_is_found():
    """As after a view that begins at an odd entry, or pointers that are selected."""
    launch = replace(of_steps(90)[GELU], aligned=())
    assert "has no budget" in complaints(GELU, launch, 90)[0]  # another kind of launch
    found = gate.Figures.of(launch.compiled(90), launch)
    said = list(gate.complaints(GELU, found, gate.read()[GELU], 90))
    assert any(": narrow " in complaint for complaint in said), said


ATTENTION = (
    "attention_bwd bf16,fp32,bf16,fp32 NEED_QKV=True GROUPING=1 WEIGHTED=False PLACED=0 HEADS=12"
)
ATTENTION += " WIDTH=64 VEC=8"


def test_registers_that_spill_are_found():
    """Twice the rows per warp."""
    launch = replace(of_steps(90)[ATTENTION], warps=4)
    said = complaints(ATTENTION, launch, 90)
    assert any(": spilled " in complaint for complaint in said), said


def product(words, architecture=90):
    """A product with its epilogue as a step launches it: its name, and it."""
    found = of_steps(architecture).items()
    return next((n, v) for n, v in found if {*words.split()} <= {*n.split()})


if LONG:

    def test_a_tile_that_spills_is_found():
        """Half as many warps hold 256 sums each."""
        name, launch = product("product_activation_fwd KEEP=2")
        said = complaints(name, replace(launch, warps=4), 90)
        assert any(": spilled " in complaint for complaint in said), said

    def test_products_that_leave_wgmma_are_found():
        """What is compiled for an older GPU has none."""
        name, _ = product("product_activation_bwd CODED=True")
        _, older = product("product_activation_bwd CODED=True", 80)
        found = gate.Figures.of(older.compiled(80), older)
        said = list(gate.complaints(name, found, gate.read()[name], 90))
        assert any(": wide 0" in complaint for complaint in said), said

    def test_an_epilogue_that_is_there_twice_is_found():
        """Once more for a sum of nothing, which nobody has ruled out."""
        name, launch = product("product_activation_fwd KEEP=1")
        kernel = triton.JITFunction(launch.kernel.fn)
        kernel._unsafe_update_src(launch.kernel.src.replace("tl.assume(inner > 0)", "pass"))
        assert kernel.src != launch.kernel.src
        said = complaints(name, replace(launch, kernel=kernel), 90)
        assert any(": functions " in complaint for complaint in said), said


def test_no_launch_is_lost_to_its_name():
    """Of those that differ in a tile, or in what is a multiple of 16, each has a name."""
    first = stand_in.Launch(activation_fwd_kernel, (("n", "i32"),), (("BLOCK", 8),), ("n",), 4, 3)
    found = {first, replace(first, aligned=()), replace(first, constants=(("BLOCK", 16),))}
    assert {*gate.named(found).values()} == found


@pytest.mark.parametrize("column", gate.GUARDED)
def test_every_figure_is_guarded(column):
    """By one more, or less, of what has room for none; by twice as much of the others."""
    budget = gate.Figures(**dict.fromkeys(gate.COLUMNS, 100))
    kinds = {"3.8 sm_90": budget, "3.6 sm_90": replace(budget, instructions=120)}
    for line, share in (("3.8", 1.1), ("99.0", 2.0)):
        worse = 0 if column in gate.FEWER else int(100 * share)
        said = list(gate.complaints("x", replace(budget, **{column: worse}), kinds, 90, line))
        assert len(said) == 1 and f": {column} {worse}, " in said[0], said
        assert not list(gate.complaints("x", budget, kinds, 90, line))
    assert list(gate.complaints("x", budget, kinds, 80)) == [
        f"x, sm_80 has no budget. Write one down: {gate.ACCEPT}"
    ]


def test_what_no_budget_excuses():
    good = gate.Figures(**dict.fromkeys(gate.COLUMNS, 0))
    good = replace(good, programs=1)
    say = lambda name, **changes: list(gate.faults(name, replace(good, **changes), 90))
    assert not say("attention_fwd bf16,fp32 WIDTH=64")
    assert "no program fits" in say("attention_fwd bf16,fp32", programs=0)[0]
    assert "TF32" in say("attention_fwd fp32", tf32=4)[0]
    assert not say("shortcut_tokens fp32 PRECISION=tf32x3", tf32=4)
    assert "spills 200 bytes" in say("attention_fwd bf16,fp32", spilled=200)[0]
    assert not say("attention_bwd_dq fp32", spilled=200)


def test_the_worst_of_what_tests_launch_is_guarded():
    """Of two launches of one kernel: each bound is that of the worse one."""
    good = gate.Figures(**dict.fromkeys(gate.COLUMNS, 100))
    other = replace(good, spilled=8, instructions=150, wide=40)
    worst = gate.worst([("k bf16 A=1", good), ("k bf16 A=2", other), ("k fp32 A=1", good)])
    assert [*worst] == ["tests: k bf16", "tests: k fp32"]
    bound = worst["tests: k bf16"]
    assert (bound.spilled, bound.instructions, bound.wide) == (100, 150, 40)
    budgets = {name: {"3.8 sm_90": figures} for name, figures in worst.items()}
    assert not list(gate.of_tests(worst, budgets, 90, "3.8"))
    for column, value in (("spilled", 110), ("wide", 39), ("instructions", 160), ("narrow", 101)):
        spoilt = worst | {"tests: k bf16": replace(bound, **{column: value})}
        (said,) = gate.of_tests(spoilt, budgets, 90, "3.8")
        assert f"tests: k bf16, sm_90: {column} {value}, " in said
    (said,) = gate.of_tests(worst | {"tests: new": good}, budgets, 90, "3.8")
    assert "tests: new, sm_90 has no budget" in said
    assert not list(gate.of_tests(worst, budgets, 80, "3.8"))  # a room that is not guarded there


def test_the_command_guards_what_tests_launch(tmp_path, monkeypatch, capsys):
    """Nothing is guarded before there are budgets; then what is worse, new or gone is an error."""
    gelu = of_steps(90)[GELU]
    norm = next(la for name, la in of_steps(90).items() if name.startswith("layer_norm_fwd"))
    monkeypatch.setattr(gate, "FILE", tmp_path / "budgets.json")

    def run(*options, found):
        monkeypatch.setattr(launches, "of_tests", lambda architecture: dict.fromkeys(found, 1))
        code = gate.main(["--tests", "--arch", "90", "--jobs", "1", *options])
        return code, capsys.readouterr().out

    name = "tests: activation_fwd bf16,u8"
    assert f"without budgets on sm_90, by rules alone: {name}" in run(found=[gelu])[1]
    assert run("--update", found=[gelu])[0] == 0 and [*gate.read()] == [name]
    assert run(found=[gelu]) == (
        0, f"Triton {triton.__version__}\nsm_90, pointwise: 1 launches\n"
        "1 launches within their budgets\n",
    )  # fmt: skip
    code, said = run("--room", "pointwise", "koopman", found=[gelu, replace(gelu, aligned=())])
    assert code == 1 and f"{name}, sm_90: narrow " in said
    code, said = run(found=[norm])
    assert code == 1 and f"{name}, sm_90 is no longer launched" in said
    assert "has no budget" not in said  # a room without any is held to rules alone
    assert run("--update", found=[norm])[0] == 0 and name not in gate.read()
    with pytest.raises(SystemExit):
        run("--update", "gelu", found=[gelu])
    assert "name them by --room" in capsys.readouterr().err


def test_a_stand_in_refuses_what_would_read_its_addresses():
    """A model is copied within its world; what copies that, or hands it to compiled code, ends."""
    with stand_in.gpu(90):
        linear = torch.nn.Linear(4, 4)
        again = copy.deepcopy(linear)
        assert again.weight.fake_mode is linear.weight.fake_mode
        weak = StorageWeakRef(linear.weight.untyped_storage())
        with pytest.raises(RuntimeError, match="copies a weak reference to a storage: nothing"):
            copy.deepcopy(weak)
        with pytest.raises(
            RuntimeError, match="pae_gelu hands addresses to compiled code: nothing"
        ):
            native.Library.status(None, "pae_gelu", None, None)
    assert copy.deepcopy(torch.nn.Linear(4, 4)).weight.shape == (4, 4)


def test_another_triton_has_room_for_other_code_of_the_same_kind():
    budget = gate.Figures(**dict.fromkeys(gate.COLUMNS, 100))
    other = replace(budget, instructions=125, spilled=160, programs=70, barriers=120, wide=3)
    assert not list(gate.complaints("x", other, {"3.8 sm_90": budget}, 90, "99.0"))
    assert len(list(gate.complaints("x", other, {"3.8 sm_90": budget}, 90, "3.8"))) == 5


def test_the_file_can_be_read_and_written(tmp_path, monkeypatch):
    budgets = gate.read()
    assert len(budgets) > 50 and {"3.8 sm_80", "3.8 sm_90", "3.8 sm_100"} <= budgets[GELU].keys()
    monkeypatch.setattr(gate, "FILE", tmp_path / "budgets.json")
    assert gate.read() == {}
    gate.write(budgets)
    assert gate.read() == budgets
    assert json.loads(gate.FILE.read_text())["columns"] == list(gate.COLUMNS)
