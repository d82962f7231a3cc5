"""What nvcc made of csrc/ is no worse than `tests/cuda_code.json`: `python -m tests.gate_cuda`."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("triton")

from pae_kernels import native
from tests import gate_cuda


def test_the_library_is_within_its_budgets():
    record = native.build_record()
    if "reason" in record:
        pytest.skip(f"no compiled CUDA kernels to look at: {record['reason']}")
    now = {"sm_90": gate_cuda.of_library(native.PATH, 90)}
    assert len(now["sm_90"]) > 40
    said = list(gate_cuda.complaints(now, record["nvcc"]))
    assert not said, "\n".join(said)


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN3pae47_GLOBAL__N__4b_14_koopman_fwd_cu_3882c47721koopman_square_kernelILi16ELb1EEEv"
         "NS0_8SpectralEi", "koopman_square 16 true"),
        ("_ZN3pae44_GLOBAL__N__133d5b26_11_spectrum_cu_cabcb7e613tokens_kernelINS0_7TwoBf16E13__nv_"
         "bfloat16Lb0EEEv26pae_shortcut_tokens_params", "tokens TwoBf16 bf16 false"),
        ("_ZN3pae44_GLOBAL__N__133d5b26_11_spectrum_cu_cabcb7e611pool_kernelIfLi10EEEv24pae_"
         "shortcut_pool_params", "pool fp32 10"),
        ("_ZN3pae47_GLOBAL__N__4b6022d7_14_koopman_fwd_cu_3882c47721koopman_finish_kernelENS0_"
         "7ForwardE", "koopman_finish"),
    ],
)  # fmt: skip
def test_a_kernel_is_named_by_its_template(symbol, name):
    assert gate_cuda.name_of(symbol) == name
    with pytest.raises(ValueError, match="no kernel's symbol"):
        gate_cuda.name_of(symbol.replace("_kernel", "_function"))


@pytest.mark.parametrize("column", gate_cuda.COLUMNS)
def test_every_figure_is_guarded(column):
    """Twice as much of it, or none where less is worse, and one more byte that spills."""
    nvcc, rows = gate_cuda.read()
    tokens, at = "tokens TwoBf16 bf16 true", gate_cuda.COLUMNS.index(column)
    worse = copy.deepcopy({"sm_90": rows["sm_90"]})
    figures = worse["sm_90"][tokens]["figures"]
    figures[at] = 0 if column in ("products", "asynchronous") else 2 * figures[at] + 1
    for version in (nvcc, "99.0"):
        (said,) = gate_cuda.complaints(worse, version)
        assert said.startswith(f"csrc: {tokens}, sm_90: {column} {figures[at]}, was ")
        assert not list(gate_cuda.complaints({"sm_90": rows["sm_90"]}, version))


def test_a_kernel_that_is_new_or_gone_is_named():
    nvcc, rows = gate_cuda.read()
    kernels = dict(rows["sm_90"])
    kernels["new 16"] = kernels.pop("probe")
    said = list(gate_cuda.complaints({"sm_90": kernels}, nvcc))
    assert [line.partition(". ")[0] for line in said] == [
        "csrc: new 16, sm_90 has no budget",
        "csrc: probe, sm_90 is no longer compiled",
    ]
