"""What all rows share: wrong values never get a time, and a row that cannot run says why."""

from __future__ import annotations

import os

import pytest
import torch

from bench import rows
from bench.runner import Runnable, Settings, Unavailable
from pae_kernels import cpu

EXPECTED = {"out": torch.tensor([3.0, 4.0]).double(), "d_x": torch.ones(4).double()}
LIMITS = {"out": 1e-3, torch.float32: 1e-2}  # of d_x by its dtype


def test_errors_become_columns():
    got = [torch.tensor([3.0, 4.001]), torch.full((4,), 1.005)]
    columns = rows.checked(got, EXPECTED, LIMITS)
    assert columns["value_error"] == pytest.approx(0.001 / 5, rel=1e-3)
    assert columns["gradient_error"] == pytest.approx(0.005, rel=1e-3)


@pytest.mark.parametrize(
    ("out", "gradient", "said"),
    [(4.01, 1.0, "out is off by"), (4.0, 1.02, "d_x is off by"), (4.0, torch.nan, "d_x is off")],
)
def test_a_result_beyond_its_limit_is_refused(out, gradient, said):
    with pytest.raises(AssertionError, match=said):
        rows.checked([torch.tensor([3.0, out]), torch.full((4,), gradient)], EXPECTED, LIMITS)


def test_a_missing_result_is_refused():
    with pytest.raises(ValueError, match="zip"):
        rows.checked([torch.tensor([3.0, 4.0])], EXPECTED, LIMITS)


def test_no_prompts_have_no_gradient_to_be_wrong():
    assert rows.errors([torch.zeros(0)], {"d_prompts": torch.zeros(0)}) == {"d_prompts": 0.0}


def test_nothing_is_as_wrong_as_nothing():
    """The gradient of what the loss does not reach is zero; any other is refused."""
    zero = {"d_x": torch.zeros(2)}
    assert rows.errors([torch.zeros(2)], zero) == {"d_x": 0.0}
    with pytest.raises(AssertionError, match="d_x is off by inf"):
        rows.checked([torch.ones(2)], zero, {"d_x": 1.0})


def test_a_version_is_forced_around_the_work_alone(monkeypatch):
    monkeypatch.setenv("PAE_BACKEND", "auto")
    work = rows.in_version(
        "reference", "koopman_losses", torch.zeros(1), lambda: os.environ["PAE_BACKEND"]
    )
    assert work() == "reference" and os.environ["PAE_BACKEND"] == "auto"
    with pytest.raises(Unavailable, match="cuda cannot run koopman_losses on cpu"):
        rows.in_version("cuda", "koopman_losses", torch.zeros(1, dtype=torch.float64), work)


def test_our_rows_are_the_versions_of_a_cpu(monkeypatch):
    """Work and check of a row run in its version; one that cannot run says why."""
    monkeypatch.setenv("PAE_BACKEND", "auto")
    seen = []
    start = lambda shared: Runnable(
        lambda: seen.append(os.environ["PAE_BACKEND"]), lambda: {os.environ["PAE_BACKEND"]: 1.0}
    )
    settings = Settings("smoke", 1, None, None, torch.device("cpu"), "process")
    made = rows.ours_in_versions("pointwise", settings, lambda shared: torch.zeros(1), start)
    assert [p.name for p in made] == ["pae, CPU", "pae, reference"]
    ready = made[1].start(None)
    ready.work()
    assert ready.check() == {"reference": 1.0} and seen == ["reference"]
    assert os.environ["PAE_BACKEND"] == "auto"
    monkeypatch.setattr(cpu, "unavailable", lambda: "no library")
    with pytest.raises(Unavailable, match="cannot run pointwise on cpu: cpu: no library"):
        made[0].start(None)


def test_what_stops_a_peer_is_the_reason_of_its_row():
    def refuse():
        raise RuntimeError("no kernel for this shape\nand a long trace")

    with pytest.raises(Unavailable, match=r"refused: RuntimeError: no kernel for this shape$"):
        rows.attempt("refused", refuse)


@pytest.mark.parametrize(
    ("size", "in_quick", "in_default", "in_neither"),
    [
        ("quick", "", "runs without --quick", "runs with --full"),
        ("default", "", "", "runs with --full"),
        ("full", "", "", ""),
    ],
)
def test_sizes_of_a_run_nest(size, in_quick, in_default, in_neither):
    settings = Settings(size, 1, None, None, torch.device("cpu"), "process")
    assert settings.why_not_size(True, True) == in_quick
    assert settings.why_not_size(False, True) == in_default
    assert settings.why_not_size(False, False) == in_neither
