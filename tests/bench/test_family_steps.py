"""The cost of a step of every family: who takes part, what is written, what is shown."""

import json

import pytest

import pae
from bench.studies import family_steps
from bench.studies.family_steps import GROUPS


def test_every_family_takes_part_once_as_it_comes():
    plain = [a.method for g in ("deep", "live") for a in GROUPS[g].values() if not a.model]
    plain = [method for method in plain if method in pae.prompts.METHODS]
    own = [n for g in ("deep", "live") for n in GROUPS[g] if n in pae.prompts.METHODS]
    assert sorted(own) == sorted(pae.prompts.METHODS) and set(plain) == set(own)
    assert [next(iter(arms)) for arms in GROUPS.values()] == [
        "vpt-deep",
        "vpt-shallow",
        'pool="image"',
    ]


def measure(monkeypatch, folder, *line):
    sizes = ["--model", "tiny", "--num-tokens", "3", "--rounds", "1", "--to", str(folder)]
    monkeypatch.setattr("sys.argv", ["family_steps", *line, *sizes])
    family_steps.main()
    return json.loads((folder / family_steps.JSON).read_text())


def test_arms_are_measured_one_call_after_the_other(monkeypatch, tmp_path, capsys):
    plus = "da-vpt, da-vpt+, drop-path, engine reference"
    arms = ("pro-vpt", "vfpt, dropout per image", plus)
    found = measure(monkeypatch, tmp_path, "deep", "--arms", *arms)
    assert set(found["deep"]) == set(arms)
    before = found["deep"]["pro-vpt"]
    found = measure(monkeypatch, tmp_path, "pool")
    assert set(found["pool"]) == {'pool="all"', 'pool="prompts"'}
    assert found["deep"]["pro-vpt"] == before and len(before["ratios"]) == 1
    assert before["setting"]["num_tokens"] == 3 and before["ratios"][0] > 0
    shown = family_steps.blocks(found)
    assert "tiny, 3 prompts, batch 2, fp32, process time" in shown["family steps setting"]
    lines = shown["family steps table"].splitlines()
    assert len(lines) == 2 + 5 and lines[2].startswith("| pro-vpt | vpt-deep | ")
    with pytest.raises(SystemExit):
        measure(monkeypatch, tmp_path, "deep", "--arms", "no-such")
    assert "no such group or arm: no-such" in capsys.readouterr().err
