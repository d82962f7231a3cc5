"""Tables of finished runs: which runs, which numbers, what is bold, what is said and refused."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import statistics

import pytest
from scipy import stats

from pae.protocols.tasks import FGVC, PROTOCOLS, SMALL, VTAB
from pae.sweep.plan import Cell, Group, Plan
from pae.sweep.records import Records
from pae.tables import command, intervals, published, write
from pae.tables.build import build
from pae.tables.collect import collect
from pae.train.cli import main
from tests.train.helpers import error_line
from tests.train.records import save_run

# VPT-deep as V-PETL Bench's README lists it
VPT_DEEP = (
    *(78.8, 90.8, 65.8, 98.0, 88.3, 78.1, 49.6, 81.8, 96.1, 83.4, 68.4),
    *(68.5, 60.0, 46.5, 72.8, 73.6, 47.9, 32.9, 37.8),
)


def table(folder, **options):
    return build(collect([folder]).runs, **options)


def cell(made, label, column):
    (row,) = [row for row in made.rows if row.label == label]
    return row.cells[column]


# ---- intervals


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30, 199])
@pytest.mark.parametrize("within", [0.5, 0.95, 0.99])
def test_quantiles_are_those_of_student(freedom, within):
    assert intervals.t_quantile(within, freedom) == pytest.approx(
        stats.t.ppf((1 + within) / 2, freedom), rel=1e-9
    )


def test_the_interval_of_a_mean():
    values = [71.5, 73.0, 72.1]
    low, high = stats.t.interval(0.95, 2, statistics.fmean(values), stats.sem(values))
    assert intervals.half_width(values) == pytest.approx((high - low) / 2)
    assert intervals.half_width([71.5]) is None
    for within, freedom in ((0.95, 0), (1.0, 3), (0.0, 3)):
        with pytest.raises(ValueError):
            intervals.t_quantile(within, freedom)


def test_a_difference_is_one_where_welch_says_so():
    """Freedom is rounded down, so that it never claims more than Welch's own test."""
    first, second = [80.0, 81.0, 82.0], [70.0, 75.0, 73.0, 71.0]
    own = stats.ttest_ind(first, second, equal_var=False)
    assert own.pvalue < 0.01 and intervals.differs(first, second)
    assert not intervals.differs(first, second, comparisons=10**6)
    near = [79.0, 80.5, 81.0]
    assert stats.ttest_ind(first, near, equal_var=False).pvalue > 0.05
    assert not intervals.differs(first, near)
    assert not intervals.differs([90.0], second)  # a single run has no spread,
    assert not intervals.differs([90.0, 90.0], [80.0, 80.0])  # nor have two that happen to agree


def test_the_interval_of_a_difference_over_tasks_is_welchs():
    pairs = [([80.0, 81.0, 82.0], [70.0, 75.0, 73.0, 71.0]), ([50.0, 53.0], [49.0, 50.0, 54.0])]
    parts = [statistics.variance(v) / len(v) for pair in pairs for v in pair]
    freedom = sum(parts) ** 2 / sum(
        p**2 / (len(v) - 1) for p, v in zip(parts, [v for pair in pairs for v in pair])
    )
    expected = stats.t.ppf(0.975, math.floor(freedom)) * math.sqrt(sum(parts)) / 2
    assert intervals.of_difference(pairs) == pytest.approx(expected, rel=1e-9)
    low, high = stats.ttest_ind(*pairs[0], equal_var=False).confidence_interval()
    assert (high - low) / 2 < intervals.of_difference(pairs[:1]) < (high - low) / 2 * 1.2
    assert intervals.of_difference([*pairs, ([50.0], [49.0, 50.0])]) is None


def test_the_bootstrap_over_tasks():
    assert intervals.over_tasks([1.0] * 6) == (1.0, 1.0)
    low, high = intervals.over_tasks([2.0, -1.0, 3.0, 0.5, 1.0, 2.5])
    assert low < 8 / 6 < high
    wider = intervals.over_tasks([2.0, -1.0, 3.0, 0.5, 1.0, 2.5], comparisons=5)
    assert wider[0] < low and wider[1] > high


# ---- which runs


def test_runs_are_found_wherever_they_lie(tmp_path):
    save_run(tmp_path / "one" / "x", 0.5)
    save_run(tmp_path / "two" / "deep" / "y", 0.6, seed=1)
    comparison = tmp_path / "both"
    for name, method in (("linear", "linear"), ("vpt-deep", "vpt-deep")):
        save_run(comparison / name, 0.7, name=f"the {name}", method=method)
    (comparison / "config.json").write_text("{}")
    save_run(tmp_path / "begun", 0.5, seed=2, finished=False)
    found = collect([tmp_path, tmp_path / "one"])  # one is given twice
    labels = ["the linear", "the vpt-deep", "vpt-deep", "vpt-deep"]
    assert sorted(run.label for run in found.runs) == labels
    assert found.unfinished == [tmp_path / "begun"]


def test_records_of_a_sweep_are_runs_too(tmp_path):
    folder = save_run(tmp_path / "run", 0.5)
    facts = json.loads((folder / "config.json").read_text())
    result = json.loads((folder / "metrics.json").read_text())["result"]
    facts.pop("digest")
    record = tmp_path / "records" / "0a1b.json"
    record.parent.mkdir()
    record.write_text(json.dumps({**facts, "result": result}))
    (record.parent / "notes.json").write_text("[1]")
    (run,) = collect([record]).runs
    assert collect([record.parent]).runs == [run]
    (other,) = collect([folder]).runs
    assert (run.label, run.task, run.accuracy("test")) == (other.label, other.task, 50.0)


def sweep(folder, select="two-stage", statuses=("finished",) * 2):
    """A sweep of two rates, of which the second is better on validation, and two seeds."""
    records = Records(folder)
    cells = []
    for lr, val in ((0.01, 0.7), (0.02, 0.8)):
        keys = tuple(f"{lr}-{seed}" for seed in (4, 5))
        cells.append(Cell({"lr": lr}, keys, keys))
        for key, seed, status in zip(keys, (4, 5), statuses):
            records.write(
                {
                    **{"key": key, "status": status, "reason": None, "task": "a", "seed": seed},
                    **{"method": "as written", "settings": {"lr": lr, "seed": seed, "epochs": 3}},
                    **{"images": {"train": 8, "val": 2, "test": 5}, "val": val, "test": val - 0.1},
                    **{"val_loss": 1.0, "val_last": val, "val_loss_last": 1.0, "parameters": 90},
                    **{"parameters_without_head": 60, "seconds": 2.0, "peak_memory_mb": 7.0},
                }
            )
    groups = (Group("a", "deep", tuple(cells)),)
    Plan("s", (4, 5), select, "best", groups).write(folder)
    return folder


def test_a_sweep_gives_its_chosen_runs(tmp_path):
    made = table(sweep(tmp_path / "s"))
    (row,) = made.rows
    assert row.label == "deep" and row.cells["a"].seeds == ("4", "5")
    assert row.cells["a"].mean == pytest.approx(70) and row.without_head == 60
    same = next(note for note in made.notes if note.startswith("The same for all"))
    assert "settings chosen by the best epoch's validation accuracy, seed 4" in same
    made = table(sweep(tmp_path / "all", select="none"))
    assert [row.label for row in made.rows] == ["deep (lr 0.01)", "deep (lr 0.02)"]
    made = table(tmp_path / "s" / "runs" / "0.01-4")
    assert made.rows[0].label == "as written"


def test_runs_that_diverged_are_told(tmp_path, capsys):
    folder = sweep(tmp_path / "s", statuses=("finished", "diverged"))
    assert main(["table", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "a, deep, seed 5: diverged" in err
    assert "Without a result (diverged, failed or stopped), runs: 1." in out
    failed = sweep(tmp_path / "f", select="none", statuses=("failed", "failed"))
    assert "failed, and no other was given" in error_line(capsys, ["table", str(failed)])


def test_what_is_no_run_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty: no run here" in error_line(capsys, ["table", str(tmp_path / "empty")])
    assert "nowhere: no run here" in error_line(capsys, ["table", str(tmp_path / "nowhere")])
    begun = save_run(tmp_path / "begun", 0.5, finished=False)
    assert "begun: the run is not finished" in error_line(capsys, ["table", str(begun)])
    damaged = save_run(tmp_path / "damaged", 0.5)
    text = (damaged / "metrics.json").read_text()
    (damaged / "metrics.json").write_text(text.replace("0.5", "0.9"))
    assert "damaged/metrics.json: it was damaged" in error_line(capsys, ["table", str(damaged)])


# ---- rows and columns


def test_means_over_seeds(tmp_path):
    for seed, accuracy in enumerate((0.70, 0.72, 0.74)):
        save_run(tmp_path / str(seed), accuracy, seed=seed)
    made = table(tmp_path)
    found = cell(made, "vpt-deep", "a")
    assert found.mean == pytest.approx(72) and found.seeds == ("0", "1", "2") and not found.bold
    assert found.half_width == pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-6)
    (row,) = made.rows
    assert (row.parameters, row.without_head, row.seconds) == (46_080, 41_080, 100)
    assert row.memory_mb == 1500 and made.means == []
    assert any("Student's 95 %" in note for note in made.notes)


def test_one_seed_has_no_interval_and_nothing_is_bold(tmp_path):
    save_run(tmp_path / "x", 0.9)
    save_run(tmp_path / "y", 0.5, method="bpt")
    made = table(tmp_path)
    assert [row.cells["a"].half_width for row in made.rows] == [None, None]
    assert not any(row.cells["a"].bold for row in made.rows)
    assert any(note.startswith("One seed each") for note in made.notes)


def test_bold_is_what_the_intervals_say(tmp_path):
    rows = {"bpt": (0.90, 0.91, 0.92), "vapt": (0.80, 0.81, 0.82), "linear": (0.60, 0.62, 0.61)}
    for method, found in rows.items():
        for seed, accuracy in enumerate(found):
            save_run(tmp_path / f"{method}{seed}", accuracy, method=method, seed=seed)
            near = accuracy if method == "bpt" else accuracy + 0.09 * (method == "vapt")
            save_run(tmp_path / f"b{method}{seed}", near, task="b", method=method, seed=seed)
    made = table(tmp_path)
    assert made.rows[0].label == "linear"
    bold = {row.label: [row.cells[task].bold for task in "ab"] for row in made.rows}
    assert bold == {"linear": [False] * 2, "vapt": [False] * 2, "bpt": [True, False]}


def test_settings_that_differ_within_a_cell_are_other_rows(tmp_path):
    save_run(tmp_path / "x", 0.5, lr=0.01)
    save_run(tmp_path / "y", 0.6, lr=0.02)
    save_run(tmp_path / "z", 0.7, lr=0.02, task="b")  # tuned for its task: no other row
    labels = [row.label for row in table(tmp_path).rows]
    assert labels == ["vpt-deep (lr 0.01)", "vpt-deep (lr 0.02)"]


def test_a_rate_that_was_tuned_per_task_is_one_row(tmp_path):
    save_run(tmp_path / "x", 0.5, lr=0.01)
    save_run(tmp_path / "z", 0.7, lr=0.02, task="b")
    (row,) = table(tmp_path).rows
    assert row.label == "vpt-deep" and row.cells["mean_tasks"].mean == pytest.approx(60)


def test_what_should_be_equal_and_is_not_is_told(tmp_path):
    save_run(tmp_path / "x", 0.5, epochs=50, method="linear")
    save_run(tmp_path / "y", 0.6)
    save_run(tmp_path / "z", 0.6, task="b", facts={"image_size": 112})
    save_run(tmp_path / "w", 0.6, task="b", method="linear", epochs=50, facts={"image_size": 112})
    notes = table(tmp_path).notes
    assert "Differs: epochs 50 (linear); 3 (vpt-deep)." in notes
    assert any("image size" in n and n.startswith("By task") and "112 (b)" in n for n in notes)
    (same,) = [note for note in notes if note.startswith("The same for all")]
    assert "backbone vit" in same and "epochs" not in same


def test_other_training_images_are_told(tmp_path):
    other = {s: {"images": 1, "digest": s} for s in ("train", "val")}
    kept = {"test": {"images": 1, "digest": "test of a"}}
    save_run(tmp_path / "x", 0.5)
    save_run(tmp_path / "y", 0.6, seed=1, facts={"splits": {**other, **kept}})
    assert "The seed also draws which images are trained on." in table(tmp_path).notes
    save_run(tmp_path / "z", 0.6, method="bpt", facts={"splits": {**other, **kept}})
    assert "Differs: rows were trained on other images of a." in table(tmp_path).notes


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    save_run(tmp_path / "t" / "x", 0.5)
    splits = {"test": {"images": 1, "digest": "others"}}
    save_run(tmp_path / "t" / "y", 0.6, seed=1, facts={"splits": splits})
    line = error_line(capsys, ["table", str(tmp_path / "t")])
    assert "other test images of a" in line and "/x and " in line and "/y" in line
    save_run(tmp_path / "w" / "x", 0.5)
    backbone = {"name": "vit", "fingerprint": "g"}
    save_run(tmp_path / "w" / "y", 0.6, seed=1, facts={"backbone": backbone})
    assert "other weights" in error_line(capsys, ["table", str(tmp_path / "w")])
    save_run(tmp_path / "s" / "x", 0.5)
    save_run(tmp_path / "s" / "y", 0.6)
    assert "two runs of vpt-deep on a with seed 0" in error_line(
        capsys, ["table", str(tmp_path / "s")]
    )
    save_run(tmp_path / "n", 0.5, result={"test_accuracy": None})
    asked = ["table", str(tmp_path / "n"), "--split", "test"]
    assert "give --split val" in error_line(capsys, asked)
    assert main(asked[:2]) == 0  # of a plain folder of images nothing is tested
    said = capsys.readouterr()
    assert "validation accuracy" in said.out and "49.0" in said.out
    assert "no run has test images" in said.err
    save_run(tmp_path / "tested", 0.5, method="linear")
    assert "give --split val" in error_line(capsys, [*asked[:2], str(tmp_path / "tested")])
    assert table(tmp_path / "n", split="val").rows[0].cells["a"].mean == pytest.approx(49)


def test_random_weights_are_drawn_by_the_seed_and_told(tmp_path, capsys):
    for seed in (0, 1):
        weights = {"backbone": {"name": "vit", "fingerprint": f"of seed {seed}"}}
        for method in ("linear", "vpt-deep"):
            more = {"seed": seed, "method": method, "pretrained": False, "facts": weights}
            save_run(tmp_path / f"{method}{seed}", 0.5, **more)
    (note,) = [note for note in table(tmp_path).notes if note.startswith("The same for all")]
    assert "weights random (pretrained off), others for every seed" in note
    other = {"backbone": {"name": "vit", "fingerprint": "another"}}
    save_run(tmp_path / "bpt0", 0.5, method="bpt", pretrained=False, facts=other)
    assert "other weights" in error_line(capsys, ["table", str(tmp_path)])


def test_a_table_needs_runs_wherever_they_stand(tmp_path, capsys):
    assert "needs RUNS, the folders" in error_line(capsys, ["table"])
    assert "needs RUNS, the folders" in error_line(capsys, ["table", "--published", "bpt"])
    (tmp_path / "x.safetensors").write_bytes(b"\xd0\x01")
    line = error_line(capsys, ["table", str(tmp_path / "x.safetensors")])
    assert "x.safetensors: no run here; expected a folder" in line
    save_run(tmp_path / "r", 0.5)
    line = error_line(capsys, ["table", "--published", str(tmp_path)])
    assert "numbers are known for the tasks of vtab1k" in line


# ---- means over tasks


def save_vtab(folder, accuracies, **options):
    for task, accuracy in zip(VTAB.tasks, accuracies, strict=True):
        save_run(folder / task.name, accuracy / 100, task=task.name, **options)


def test_both_means_of_vtab_by_their_names(tmp_path):
    save_vtab(tmp_path / "s0", VPT_DEEP)
    made = table(tmp_path)
    means = {column: round(cell(made, "vpt-deep", column).mean, 2) for column in made.means}
    assert means == {
        **{"natural": 78.49, "specialized": 82.42, "structured": 55.0},
        **{"mean_groups": 71.97, "mean_tasks": 69.43},
    }
    assert made.columns == [task.name for task in VTAB.tasks]
    assert made.titles["mean_groups"] == "mean of 3 groups"
    assert made.titles["mean_tasks"] == "mean of 19 tasks"
    assert not any("average" in title for title in made.titles.values())
    assert any("must not be mixed" in note for note in made.notes)


def test_means_are_over_seeds_first(tmp_path):
    for seed, more in enumerate((0.0, 1.0, -1.0)):
        save_vtab(tmp_path / str(seed), [a + more for a in VPT_DEEP], seed=seed)
    found = cell(table(tmp_path), "vpt-deep", "mean_groups")
    assert found.half_width == pytest.approx(intervals.half_width([0.0, 1.0, -1.0]))


def test_a_task_that_is_missing_takes_its_means_along(tmp_path):
    save_vtab(tmp_path / "s0", VPT_DEEP)
    save_vtab(tmp_path / "s1", VPT_DEEP, method="bpt")
    shutil.rmtree(tmp_path / "s1" / "svhn")
    made = table(tmp_path)
    (bpt,) = [row for row in made.rows if row.label == "bpt"]
    assert not {"natural", "mean_groups", "mean_tasks"} & bpt.cells.keys()
    assert bpt.cells["structured"].mean == pytest.approx(55.0)
    assert any("Not on all tasks" in note and "bpt" in note for note in made.notes)


def test_published_numbers_stand_below(tmp_path, capsys):
    settings = {"model": "vit_base_patch16_224.orig_in21k"}
    save_vtab(tmp_path / "r", [90.0] * 19, facts={"image_size": 224}, **settings)
    made = table(tmp_path / "r", beside=["vpt-deep", "convpass"])
    _, deep, convpass = made.rows
    assert [row.published for row in made.rows] == [False, True, True]
    assert deep.cells["cifar100"].mean == 78.8 and deep.cells["cifar100"].source == "vpetl"
    means = [deep.cells[c].mean for c in ("mean_groups", "mean_tasks")]
    assert means == [71.96, 69.43]  # as printed; from rounded tasks the first is 71.97
    assert convpass.cells["mean_groups"].mean == 76.56
    assert not any(cell.bold for row in made.rows for cell in row.cells.values())
    assert any("enter no comparison" in note for note in made.notes)
    assert any("github.com/synbol" in note for note in made.notes)
    assert main(["table", str(tmp_path / "r"), "--published", "--format", "latex"]) == 0
    assert capsys.readouterr().out.count("midrule") == 2
    line = error_line(capsys, ["table", str(tmp_path / "r"), "--published", "--split", "val"])
    assert "--published: numbers are known of test images" in line
    save_vtab(tmp_path / "x", [90.0] * 19, facts={"image_size": 224}, pretrained=False, **settings)
    line = error_line(capsys, ["table", str(tmp_path / "x"), "--published"])
    assert "--published: numbers are known of pretrained weights, not of random ones" in line
    for more, words in (
        ({"facts": {"image_size": 112}, **settings}, "orig_in21k at 112"),
        ({"facts": {"image_size": 224}, "model": "vit_base_patch16_224"}, "not for vit_base"),
    ):
        save_run(tmp_path / words, 0.5, task="svhn", **more)
        line = error_line(capsys, ["table", str(tmp_path / words), "--published"])
        assert "--published: numbers are known for vit_base" in line and words[-10:] in line
    save_run(tmp_path / "other", 0.5)
    assert "not for a" in error_line(capsys, ["table", str(tmp_path / "other"), "--published"])


def test_what_is_published_agrees_with_itself():
    """Means that a text prints are those of the numbers that it prints, to their rounding."""
    for benchmark, count in (("vtab1k", 19), ("fgvc", 5)):
        found = published.rows(benchmark, ("vit-b16", "sup-in21k"))
        assert len(found) >= 15
        protocol = PROTOCOLS[benchmark]
        for row in found:
            assert set(row.tasks) == {task.name for task in protocol.tasks}
            assert len(row.tasks) == count and row.source in published.sources()
            means = [statistics.fmean(row.tasks[t] for t in g) for g in protocol.groups().values()]
            computed = {"groups": statistics.fmean(means)}
            computed["tasks"] = computed["five"] = statistics.fmean(row.tasks.values())
            for kind, value in row.overall.items():
                assert value == pytest.approx(computed[kind], abs=0.05), (row.method, kind)
    with pytest.raises(ValueError, match="expected some of full, linear"):
        published.rows("vtab1k", ("vit-b16", "sup-in21k"), ["e2vpt"])


def test_shots_are_groups_and_draws_are_means(tmp_path):
    for name in ("food101", "pets", "cars", "flowers", "aircraft"):
        for draw in (0, 1, 2):
            settings = {"protocol": "few-shot", "data": "x", "shots": 4, "draw": draw}
            place = tmp_path / f"{name}{draw}"
            save_run(place, 0.5 + draw / 100, task=f"{name}-4shot", **settings)
    made = table(tmp_path)
    (row,) = made.rows
    assert made.columns[0] == "food101-4shot" and row.cells["cars-4shot"].seeds == (
        *("0:0", "1:0", "2:0"),
    )
    assert row.cells["mean_tasks"].mean == pytest.approx(51)


def test_gains_over_a_baseline(tmp_path, capsys):
    for number, gain in enumerate((1.0, 2.0, 3.0, 1.5, -0.5, 2.0)):
        save_run(tmp_path / f"x{number}", 0.5, task=f"t{number}")
        save_run(tmp_path / f"y{number}", 0.5 + gain / 100, task=f"t{number}", method="bpt")
    made = table(tmp_path, baseline="vpt-deep")
    (note,) = [note for note in made.notes if note.startswith("bpt beside vpt-deep")]
    assert "+1.5 points [" in note and "over 6 tasks, better on 5, worse on 1." in note
    assert cell(made, "bpt", "mean_tasks").bold  # the bootstrap over six tasks excludes 0
    line = error_line(capsys, ["table", str(tmp_path), "--baseline", "vapt"])
    assert "--baseline vapt: expected one of the rows, vpt-deep, bpt" in line


def test_gains_on_few_tasks_have_the_interval_of_their_seeds(tmp_path):
    for seed, (own, base) in enumerate(((0.52, 0.5), (0.53, 0.5), (0.525, 0.505))):
        save_run(tmp_path / f"x{seed}", base, task="t", seed=seed)
        save_run(tmp_path / f"y{seed}", own, task="t", seed=seed, method="bpt")
    save_run(tmp_path / "z", 0.6, task="t", method="vapt")
    notes = table(tmp_path, baseline="vpt-deep").notes
    half = intervals.of_difference([([52.0, 53.0, 52.5], [50.0, 50.0, 50.5])])
    assert f"bpt beside vpt-deep: +2.3 ± {half:.1f} points on t." in notes
    assert "vapt beside vpt-deep: +9.8 points on t." in notes  # one seed
    assert any("Welch's 95 % interval over seeds" in note for note in notes)
    assert not any("In brackets" in note for note in notes)


def test_protocols_agree_with_their_sources():
    assert [len(names) for names in VTAB.groups().values()] == [7, 4, 8]
    assert sum(task.classes for task in FGVC.tasks) == 200 + 555 + 102 + 120 + 196
    for alias, name in {
        "vtab-cifar(num_classes=100)": "cifar100",
        "CIFAR_100": "cifar100",
        "oxford_pet": "pets",
        "clevr-dist": "clevr_distance",
        "kitti": "kitti_distance",
        "smallnorb_evaluation": "smallnorb_elevation",
    }.items():
        assert VTAB.find(alias).name == name
    with pytest.raises(ValueError, match="expected one of cifar100"):
        VTAB.find("imagenet")
    assert tuple(PROTOCOLS) == command.PROTOCOLS and SMALL in PROTOCOLS.values()
    for protocol in PROTOCOLS.values():  # no two of its tasks go by one name
        for task in protocol.tasks:
            assert {protocol.find(name).name for name in task.names()} == {task.name}


# ---- formats


@pytest.fixture
def small(tmp_path):
    for seed, accuracy in enumerate((0.70, 0.72, 0.74)):
        save_run(tmp_path / "runs" / f"x{seed}", accuracy, seed=seed, name="A & B|c")
        save_run(tmp_path / "runs" / f"y{seed}", accuracy - 0.2, seed=seed, method="linear")
    save_run(tmp_path / "runs" / "z", 0.5, task="b", name="A & B|c")
    return tmp_path


def test_markdown(small, capsys):
    assert main(["table", str(small / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert lines[0].startswith("**a, b: ")
    assert len({len(row) for row in rows}) == 1 and rows[0][0] == "| method"
    assert rows[3][:3] == [r"| A & B\|c", "**72.0 ± 5.0**", "50.0 (n=1)"]
    assert rows[2][1:3] == ["52.0 ± 5.0", "-"]


def test_latex_and_csv(small, capsys):
    for suffix in ("tex", "csv", "md"):
        assert main(["table", str(small / "runs"), "--output", str(small / f"t.{suffix}")]) == 0
    latex = (small / "t.tex").read_text()
    assert r"A \& B\textbar{}c" in latex and r"\textbf{72.0} {\scriptsize$\pm$5.0}" in latex
    body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0]
    columns = latex.split(r"\begin{tabular}{")[1].split("}")[0]
    assert {line.count(" & ") for line in body.strip().splitlines()} == {len(columns) - 1}
    assert "lualatex" not in latex
    rows = list(csv.DictReader(io.StringIO((small / "t.csv").read_text())))
    (found,) = [row for row in rows if row["method"] == "A & B|c" and row["column"] == "a"]
    assert (found["mean"], found["n"], found["seeds"], found["bold"]) == (
        "72.0",
        "3",
        "0 1 2",
        "yes",
    )
    assert float(found["sd"]) == pytest.approx(2)
    capsys.readouterr()
    line = error_line(capsys, ["table", str(small / "runs"), "--output", str(small / "t.doc")])
    assert "expected a name that ends in .md, .csv, .tex" in line


def test_a_wide_table_fits_a_page_in_latex(tmp_path):
    for task in "abcdefgh":
        save_run(tmp_path / task, 0.5, name="linear", method="linear", task=task)
    text = write.latex(table(tmp_path))
    assert r"\begin{table*}" in text and r"\end{table*}" in text
    assert "\\resizebox{\\textwidth}{!}{%\n\\begin{tabular}{l" in text
    assert text.count("{") == text.count("}") and r"\end{tabular}}" in text


def test_names_that_a_format_would_take_for_its_own(tmp_path):
    names = ("[x] <b>_a_*`", "*star", "\u03b2 50% #1 {x} ~^\\ $m$")
    for name in names:
        save_run(tmp_path / name[-3:], 0.5, name=name, method="linear")
    made = table(tmp_path)
    text = write.latex(made)
    # behind the end of a row [ and * would be read as belonging to it
    assert "\n{}[x] " in text and "\n{}*star & " in text
    assert text.startswith("% lualatex or xelatex, with a font that has \u03b2\n% needs")
    assert r"50\% \#1 \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{} \$m\$" in text
    assert "| [x] \\<b>_a_\\*\\` | " in write.markdown(made)
