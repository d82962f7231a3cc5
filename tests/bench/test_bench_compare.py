"""bench.compare on runs made up here: regressions, noise, drift, other machines, missing rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]

from bench import compare, results  # noqa: E402

MACHINE = {
    "device": "Some CPU (AVX2)",
    "cores": 2,
    "threads": 1,
    "fp32 products": "highest",
    "torch": "2.11",
    "commit": "aaa",
}


def a_run(rows, machine=None, baselines=("plain",), clock="process", left_out=(), rounds=9, seed=0):
    """`rows`: {(group, provider): seconds}, with 1 % of noise from round to round; a list of
    seconds is taken as it is.
    """
    random = np.random.default_rng(seed)

    def samples(seconds):
        if isinstance(seconds, list):
            return seconds
        return (seconds * np.exp(0.01 * random.standard_normal(rounds))).tolist()

    return {
        "machine_info": {"summary": MACHINE | (machine or {})},
        "benchmarks": [
            {
                "group": group,
                "stats": {"data": samples(seconds)},
                "extra_info": {
                    "provider": provider,
                    "clock": clock,
                    "unit": "step",
                    "baselines": list(baselines),
                    "columns": {},
                },
            }
            for (group, provider), seconds in rows.items()
        ],
        "left_out": {
            "groups": {},
            "providers": [dict(zip(("group", "provider", "reason"), row)) for row in left_out],
        },
    }


def compared(a, b, **options):
    return compare.compare(results.Run.of(a), results.Run.of(b), **options)


def by_provider(a, b, **options):
    return {c.provider: c for c in compared(a, b, **options)}


BEFORE = {("g", "plain"): 2.0, ("g", "pae"): 1.0, ("g", "pae recompute8"): 1.2}


def test_a_regression_is_found_and_an_improvement_too():
    after = {("g", "plain"): 2.0, ("g", "pae"): 1.2, ("g", "pae recompute8"): 0.9}
    found = by_provider(a_run(BEFORE), a_run(after, seed=1))
    assert found["pae"].verdict == compare.SLOWER and found["pae"].regression
    assert found["pae"].relative.value == pytest.approx(1.2, rel=0.03)
    assert found["pae"].against == "plain"
    assert (
        found["pae recompute8"].verdict == compare.FASTER and not found["pae recompute8"].regression
    )
    assert found["plain"].verdict == compare.SAME and found["plain"].relative is None
    line = compare.overall(list(found.values()))
    assert line.startswith("REGRESSION beyond 5% in 1 rows: g pae.")


def test_noise_is_no_regression():
    """Of 40 pairs of runs that differ by noise alone, whatever is called slower stays below the
    threshold.
    """
    verdicts = []
    for seed in range(40):
        found = by_provider(a_run(BEFORE, seed=seed), a_run(BEFORE, seed=1000 + seed))
        verdicts += [found["pae"].verdict, found["pae recompute8"].verdict]
        assert not any(c.regression for c in found.values())
    assert verdicts.count(compare.SAME) > 0.85 * len(verdicts)


def test_a_slower_machine_on_that_day_is_no_regression():
    """All rows 30 % slower, and drifting by a factor of 2 within the run."""
    drift = np.linspace(1, 2, 9)
    after = {key: (1.3 * seconds * drift).tolist() for key, seconds in BEFORE.items()}
    found = by_provider(a_run(BEFORE), a_run(after))
    assert found["pae"].verdict == compare.SAME
    assert found["pae"].raw.low > 1.2  # which the times alone would have called slower
    assert found["plain"].verdict == compare.SLOWER and not found["plain"].regression


def test_a_small_slowdown_is_said_but_passes_the_threshold():
    after = BEFORE | {("g", "pae"): 1.03}
    runs = a_run(BEFORE, rounds=50), a_run(after, rounds=50, seed=1)
    found = by_provider(*runs)["pae"]
    assert found.verdict == compare.SLOWER and not found.regression
    assert by_provider(*runs, threshold=0.01)["pae"].regression


def test_without_a_common_baseline_times_judge():
    a, b = (a_run({("g", "pae"): t}, baselines=("gone",), seed=t) for t in (1, 2))
    found = by_provider(a, b)["pae"]
    assert found.relative is None and found.raw.value == pytest.approx(2, rel=0.03)
    assert found.regression


def test_the_first_baseline_that_both_have_is_taken():
    rows = {("g", "official"): 4.0, **BEFORE}
    names = ("official", "plain")
    assert by_provider(*[a_run(rows, baselines=names)] * 2)["pae"].against == "official"
    pair = a_run(rows, baselines=names), a_run(BEFORE, baselines=names)
    assert by_provider(*pair)["pae"].against == "plain"


def test_two_rounds_are_too_few():
    found = by_provider(a_run(BEFORE, rounds=2), a_run({k: 2 * t for k, t in BEFORE.items()}))
    assert {c.verdict for c in found.values()} == {compare.FEW}
    assert not any(c.regression for c in found.values())


def test_missing_rows_say_why():
    before = {("g", "plain"): 2.0, ("g", "pae"): 1.0, ("g", "old"): 1.0, ("g", "peer"): 1.0}
    after = {("g", "plain"): 2.0, ("g", "new"): 1.0, ("h", "pae"): 1.0}
    wrong = ("g", "pae", "failed: gradients are off")
    left_out = [wrong, ("g", "peer", "not installed"), ("g", "never", "needs a GPU")]
    a = a_run(before, left_out=[("g", "never", "needs a GPU")])
    found = {(c.group, c.provider): c for c in compared(a, a_run(after, left_out=left_out))}
    verdicts = {key: c.verdict for key, c in found.items()}
    assert verdicts.pop(("g", "plain")) == compare.SAME
    assert verdicts == {
        ("g", "pae"): "failed: gradients are off in B",
        ("g", "old"): "only in A",
        ("g", "peer"): "only in A (not installed)",
        ("g", "new"): "only in B",
        ("h", "pae"): "only in B",
    }
    assert [key for key, c in found.items() if c.regression] == [("g", "pae")]


OTHERS = {
    "device": "Another CPU (AVX512)",
    "cores": 64,
    "threads": 2,
    "fp32 products": "high",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_machines_are_refused_by_the_field_that_differs(name):
    with pytest.raises(compare.NotComparable) as refused:
        compared(a_run(BEFORE), a_run(BEFORE, machine={name: OTHERS[name]}))
    assert str(refused.value) == f"{name}: {MACHINE[name]} in A, {OTHERS[name]} in B"


def test_other_clocks_and_unknown_machines_are_refused():
    with pytest.raises(compare.NotComparable, match=r"^clocks: process in A, wall in B$"):
        compared(a_run(BEFORE), a_run(BEFORE, clock="wall"))
    older = a_run(BEFORE)
    del older["machine_info"]["summary"]["fp32 products"]
    with pytest.raises(compare.NotComparable, match="fp32 products: unknown in A, highest in B"):
        compared(older, a_run(BEFORE))
    with pytest.raises(compare.NotComparable, match="no row has a time in both runs"):
        compared(a_run(BEFORE), a_run({("other", "pae"): 1.0}))


def test_forced_ratios_never_compare_times():
    after = {key: 10 * seconds for key, seconds in BEFORE.items()} | {("h", "pae"): 1.0}
    other = a_run(after, machine={"device": "Another CPU"}, seed=1)
    found = compared(a_run({**BEFORE, ("h", "pae"): 1.0}), other, force_ratios=True)
    assert all(c.raw is None for c in found)
    rows = {(c.group, c.provider): c for c in found}
    assert rows["g", "pae"].relative.value == pytest.approx(1, rel=0.03)
    for alone in (("g", "plain"), ("h", "pae")):
        assert rows[alone].verdict.startswith("not compared") and not rows[alone].regression


def test_the_command_and_its_exit_codes(tmp_path, capsys):
    def file(name, run):
        path = tmp_path / name
        path.write_text(json.dumps(run))
        return str(path)

    a, same = file("a.json", a_run(BEFORE)), file("b.json", a_run(BEFORE, {"commit": "bbb"}))
    slow = file("c.json", a_run(BEFORE | {("g", "pae"): 1.5}))
    other = file("d.json", a_run(BEFORE, {"device": "Another CPU"}))

    assert compare.main([a, same]) == 0
    out = capsys.readouterr().out
    assert "commit: aaa in A, bbb in B" in out
    assert out.rstrip().splitlines()[-1] == "No regression beyond 5%: 3 same within noise."

    assert compare.main([a, slow]) == 1
    out = capsys.readouterr().out
    assert "slower (!)" in out and "1.5" in out
    assert compare.main([a, slow, "--threshold", "0.8"]) == 0
    capsys.readouterr()

    assert compare.main([a, other]) == 2
    captured = capsys.readouterr()
    assert not captured.out and "device: Some CPU (AVX2) in A, Another CPU in B" in captured.err
    assert compare.main([a, other, "--force-ratios"]) == 0
    assert "NOT THE SAME MACHINE, ratios only: device:" in capsys.readouterr().out

    assert compare.main([a, str(tmp_path / "absent.json")]) == 2
    assert compare.main([a, file("e.json", {"benchmarks": []})]) == 2
    assert "no file of --benchmark-json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([a, a, "--threshold", "-1"])
