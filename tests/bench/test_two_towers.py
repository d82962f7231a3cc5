"""The cost of a step of two towers: what is measured, written and shown."""

import json

import pytest

from bench.studies import two_towers

pytest.importorskip("transformers", reason="pip install pae[hf]")
pytest.importorskip("open_clip", reason="pip install pae[clip]")


def test_arms_are_measured_and_shown(monkeypatch, tmp_path):
    line = ["two_towers", "--size", "tiny", "--batch", "2", "--rounds", "1", "--to", str(tmp_path)]
    monkeypatch.setattr("sys.argv", line)
    two_towers.main()
    found = json.loads((tmp_path / two_towers.JSON).read_text())
    pairs = {type(two_towers.pair_of(g)).__name__ for g in two_towers.GROUPS}
    assert pairs == {"DAPT", "CoOp", "UPT", "ApproximatedPair"}
    for group in two_towers.GROUPS:
        assert set(found[group]) == set(two_towers.ARMS)
        assert all(
            len(arm["ratios"]) == 1 and arm["our_seconds"] > 0 for arm in found[group].values()
        )
    # 77 rows of each class; the longest text; 16 shared rows and what is left of each text
    rows = found["rows"]
    assert rows["textbook"] == 7700 and rows["cut"] == 2600 and 16 + 400 < rows["fast"] < 600
    setting = found["setting"]
    assert (setting["size"], setting["clock"]) == ("tiny", "process")
    assert {found[g][arm]["batch"] for g in two_towers.GROUPS for arm in two_towers.ARMS} == {2}
    lines = two_towers.table(found).splitlines()
    assert [tuple(c.strip() for c in row.split("|")[1:3]) for row in lines[2:]] == [
        (group, "-" if group == "text" else "2")
        for group in two_towers.GROUPS
        for _ in two_towers.ARMS
    ]


def test_other_gradients_are_no_measurement(monkeypatch, tmp_path):
    own = two_towers.works

    def wrong(*given):
        arms = own(*given)
        right = arms["fast"]
        return {**arms, "fast": lambda: [1.01 * g for g in right()]}

    monkeypatch.setattr(two_towers, "works", wrong)
    line = ["two_towers", "text", "--size", "tiny", "--rounds", "1", "--to", str(tmp_path)]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(AssertionError, match="d_0 is off by"):
        two_towers.main()
