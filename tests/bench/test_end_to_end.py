"""End to end: the official-style loop draws our curve; pages show what was measured."""

from __future__ import annotations

import copy
import time

import pytest
import torch

from bench.peers import loop as peers_loop
from bench.studies import end_to_end, loops
from pae.train import loop, pixels
from pae.train.options import Options
from pae.train.report import Reporter
from pae.train.runfolder import RunFolder
from tests.tiny import backbone, images
from tests.train.helpers import BACKBONE, save_shades

TINY = {
    **BACKBONE,
    "dataset": None,
    "method": "vpt-deep",
    "amp": "no",
    "device": "cpu",
    "workers": 1,
    "epochs": 2,
    "batch_size": 8,
    "lr": 0.01,
    "num_tokens": 3,
    "kld": True,
    "kld_dim": 8,
    "mpa": True,
    "mpa_window": 8,
    "mpa_images": 6,
}


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("shades"))


def settings(shades, **changes):
    return Options(**{**TINY, "data": str(shades), **changes}).resolved()


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


# ---- the clock


def test_the_innermost_phase_counts():
    clock = loops.Clock()
    with clock.phase("steps"):
        spin(0.02)
        with clock.phase("loading"):
            spin(0.04)
        time.sleep(0.02)
    spent = clock.read()
    assert 0.035 < spent["loading"][0] < 0.055
    assert 0.015 < spent["steps"][0] < 0.035
    assert spent["steps"][1] > 0.038  # the wall clock runs while the process sleeps
    assert spent["validation"] == [0.0, 0.0]


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        spin(0.05)
        return torch.zeros(1), index


def test_time_of_data_workers_is_loading():
    clock = loops.Clock()
    index_lists = pixels.sequential_batches(4, 2)
    batches = clock.waiting(peers_loop.load, Slow(), index_lists, 2, "cpu")
    seen = [y.tolist() for _, y in batches]
    assert seen == [[0, 1], [2, 3]]
    assert clock.read()["loading"][0] >= 0.2


# ---- the loops


@pytest.fixture(scope="module")
def race(shades, tmp_path_factory):
    """Arm -> record and first prompts, of all loops on one tiny problem."""
    output, found = tmp_path_factory.mktemp("race"), {}
    for arm in end_to_end.ARMS:
        chosen = settings(shades, engine="reference" if arm == "reference" else "fast")
        task = loop.load_task(chosen)
        record = end_to_end.run_arm(arm, chosen, task, output / arm)
        found[arm] = record, torch.load(output / arm / "first_prompts.pt", weights_only=True)
    return found


@pytest.mark.parametrize("arm", ["official", "reference"])
def test_the_loops_draw_the_same_curve(race, arm):
    (ours, prompts), (other, other_prompts) = race["pae"], race[arm]
    apart = end_to_end.agree(ours, other, prompts, other_prompts)
    assert apart["prompts"] < 1e-6
    assert max(apart["train_loss"]) < 1e-5
    assert max(apart["val_accuracy"]) == 0
    assert other["test"] == ours["test"]
    # a curve that never moved would agree too
    losses = [row["train_loss"] for row in ours["epochs"]]
    assert len(losses) == 2 and losses[1] < 0.9 * losses[0]


def test_other_windows_or_losses_are_refused(race):
    (ours, prompts), (other, other_prompts) = race["pae"], copy.deepcopy(race["official"])
    other["epochs"][0]["train_loss"] *= 1 + 2 * end_to_end.LOSS_TOLERANCE
    with pytest.raises(end_to_end.Disagreement, match="first training loss"):
        end_to_end.agree(ours, other, prompts, other_prompts)
    other["picks"].reverse()
    with pytest.raises(end_to_end.Disagreement, match="windows"):
        end_to_end.agree(ours, other, prompts, other_prompts)


@pytest.mark.parametrize("arm", end_to_end.ARMS)
def test_every_phase_is_clocked_and_epochs_add_up(race, arm):
    record, _ = race[arm]
    for name in loops.PHASES:
        process, wall = record["total"][name]
        assert process > 0 and wall > 0, name
    stamps = [end_to_end.seconds(row["clock"], "process") for row in record["epochs"]]
    assert 0 < stamps[0] < stamps[1] < end_to_end.seconds(record["total"], "process")


def test_clocking_changes_nothing(race, shades, tmp_path):
    chosen = settings(shades)
    task, folder = loop.load_task(chosen), RunFolder(tmp_path)
    loop.train(chosen, task, folder, loop.make_accelerator(chosen), Reporter(quiet=True))
    clocked = race["pae"][0]["epochs"]
    assert [row["train_loss"] for row in folder.rows()] == [row["train_loss"] for row in clocked]


def test_the_official_loop_computes_the_regulariser_wherever_the_network_runs(shades, monkeypatch):
    calls = []
    terms = peers_loop.official_style_terms
    monkeypatch.setattr(peers_loop, "official_style_terms", lambda *a: calls.append(a) or terms(*a))
    chosen = settings(shades, epochs=1)
    task = loop.load_task(chosen)
    loops.run_official(chosen, task, None)
    windows = ((32 - 8) // 8 + 1) ** 2
    batches = sum(-(-n // 8) for n in task.sizes().values())
    assert len(calls) == windows + batches


def test_the_official_loop_sees_our_pixels(shades):
    chosen = settings(shades)
    task = loop.load_task(chosen)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    files = peers_loop.ImageFiles(task.val.items, task.val.labels, 32, "bicubic", mean, std)
    transform, _ = pixels.make_transform("none", False, 32, "bicubic")
    split = pixels.PixelSplit(task.val, transform)
    ours = pixels.Pipeline(split, mean, std, "cpu").batches([torch.arange(len(task.val))])
    ((images, labels),) = ours
    torch.testing.assert_close(torch.stack([x for x, _ in files]), images, rtol=0, atol=2e-6)
    assert [y for _, y in files] == labels.tolist()


def test_images_in_memory_are_refused():
    with pytest.raises(ValueError, match="files must be paths of images, got ndarray"):
        peers_loop.ImageFiles(torch.zeros(2, 4, 4).numpy(), [0, 1], 4, "bicubic", (0,), (1,))


def test_a_loss_that_is_not_finite_stops_the_official_loop():
    vit = backbone("layer_scale", torch.float32).eval()
    eye = torch.eye(4)
    model = peers_loop.OfficialStylePAE(
        vit, torch.zeros(3, 2, 32), vit.head, torch.full((4, 32), torch.nan), eye, eye, (0.5, 0.2)
    )
    optimizer = torch.optim.SGD(model.koopman_parameters(), 0.1)
    batches = [(images(vit), torch.tensor([0, 1, 2]))]
    with pytest.raises(ArithmeticError, match="nan"):
        peers_loop.train_epoch(model, iter(batches), optimizer, lambda: None)


# ---- what pages show


def spent(scale, epoch, tests=0.0):
    """Clock of an epoch: scale seconds per epoch of steps, the wall twice as slow."""
    parts = {
        "loading": 0.5,
        "alignment": 4 * scale,
        "steps": 2 * scale * epoch,
        "validation": scale * epoch,
        "test": tests,
        "rest": 0.5,
    }
    return {name: [s, 2 * s] for name, s in parts.items()}


def epoch_row(accuracy, clock):
    return {"train_loss": 1.0, "val_loss": 1.0, "val_accuracy": accuracy, "clock": clock}


def numbers(tokens=(10, 50), seeds=(0, 1)):
    """Made up: official takes exactly 3 (10 prompts) and 5 (50) times pae's seconds, less 1 s."""
    races = []
    for seed in seeds:
        for count in tokens:
            scales = {"official": 3 if count == 10 else 5, "reference": 2, "pae": 1}
            arms = {}
            for arm, scale in scales.items():
                accuracies = [0.5, 0.8, 0.9, 0.91]
                rows = [
                    {
                        "train_loss": 1.0,
                        "val_loss": 1.0,
                        "val_accuracy": a,
                        "clock": spent(scale, i),
                    }
                    for i, a in enumerate(accuracies, 1)
                ]
                arms[arm] = {"epochs": rows, "test": 0.9, "total": spent(scale, 4, 10.0 * scale)}
            apart = {"prompts": 2e-7, "train_loss": [3e-7, 1e-6, 4e-5, 2e-5]}
            apart["val_accuracy"] = [0.0, 0.0, 0.01, 0.0]
            races.append(
                {
                    "tokens": count,
                    "seed": seed,
                    "target": 0.8645,
                    "epoch": 3,
                    "agreement": {"official": apart, "reference": apart},
                    "arms": arms,
                }
            )
    facts = {
        "model": "some-vit",
        "img_size": 84,
        "rows": 37,
        "workers": 2,
        "device": "cpu",
        "epochs": 4,
        "batch_size": 16,
        "optimizer": "adamw",
        "lr": 0.01,
        "weight_decay": 1e-4,
        "scheduler": "cosine",
        "method": "vpt-deep",
        "kld_dim": 256,
        "kld_mode": "global",
        "mpa_images": 4,
        "mpa_window": 16,
        "mpa_stride": 8,
        "task": {"name": "pneumonia", "classes": 2, "train": 160, "val": 100, "test": 400},
        "machine": {
            "device": "Some CPU",
            "cores": 2,
            "threads": 1,
            "versions": {"torch": "2.15", "pae": "0", "timm": "1", "python": "3"},
        },
    }
    return {"facts": facts, "share": 0.95, "races": races}


def test_blocks_say_what_the_numbers_say():
    blocks = end_to_end.blocks(numbers())
    # three epochs: 4 + 6 + 3 times the scale, and 1 s
    assert blocks["end to end gain official 10"] == f"{40 / 14:.1f}x"
    assert blocks["end to end gain official 50"] == f"{66 / 14:.1f}x"
    rows = blocks["end to end table"].splitlines()
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 2 + 6
    assert rows[2].startswith("| 10 | official-style loop | 40.0 | 0.5 / 12.0 / 18.0 / 9.0 / 0.5 |")
    assert rows[4].endswith("| 14.0 | 0.5 / 4.0 / 6.0 / 3.0 / 0.5 | 1 | 28 s | 27 |")
    assert "4e-05" in blocks["end to end agreement"]
    assert "1 of 100 images" in blocks["end to end agreement"]
    assert "seeds 0, 1." in blocks["end to end setting"]
    assert "at 84 px (37 rows per image)" in blocks["end to end setting"]


def test_a_gain_that_differs_between_seeds_is_a_range():
    changed = numbers(tokens=(10,))
    for row in changed["races"][1]["arms"]["official"]["epochs"]:
        row["clock"]["steps"][0] *= 2
    # 40 s; the second seed takes 18 s more
    gain = end_to_end.blocks(changed)["end to end gain official 10"]
    assert gain == f"{40 / 14:.1f}x to {58 / 14:.1f}x"


def test_gpu_runs_are_compared_by_the_wall_clock():
    changed = numbers(tokens=(10,))
    changed["facts"]["device"] = "cuda"
    for race in changed["races"]:
        for row in race["arms"]["pae"]["epochs"]:
            row["clock"]["steps"][1] = 0.0
    assert end_to_end.blocks(changed)["end to end gain official 10"] == f"{80 / 16:.1f}x"


@pytest.mark.parametrize("tokens", [(10,), (10, 50)])
def test_figures_draw_every_loop_and_phase(tokens):
    made = numbers(tokens)
    curves = end_to_end.figures(made)["end_to_end_curves"]()
    assert len(curves.axes) == len(tokens)
    for panel in curves.axes:
        solid = [line for line in panel.lines if line.get_linestyle() == "-"]
        assert len(solid) == 3 * 2  # loops, seeds
        assert list(solid[0].get_xdata()) == sorted(solid[0].get_xdata())
    phases = end_to_end.figures(made)["end_to_end_phases"]()
    bars = [bar for bar in phases.axes[0].patches if bar.get_width() > 0]
    assert len(bars) == len(tokens) * 3 * len(loops.PHASES)
    widest = max(bar.get_x() + bar.get_width() for bar in bars)
    scale = 5 if 50 in tokens else 3
    assert widest == pytest.approx(0.5 + 0.5 + (4 + 8 + 4 + 10) * scale)


def test_first_epoch_at_an_accuracy():
    assert end_to_end.first_at([0.5, 0.94, 0.96, 1.0], 0.95) == 3
    assert end_to_end.first_at([1.0, 0.5], 0.475) == 1
    assert end_to_end.first_at([0.1, 0.2], 0.3) == 2  # never: as if at the end


def test_collect_reads_what_the_loops_wrote(race, tmp_path):

    def folder(arm):
        return end_to_end.place(tmp_path, "shades", arm, 3, 0)

    with pytest.raises(FileNotFoundError, match="no finished race"):
        end_to_end.collect("shades", [3], [0], tmp_path)
    for arm, (record, prompts) in race.items():
        end_to_end.runs.write_json(folder(arm) / "race.json", record)
        torch.save(prompts, folder(arm) / "first_prompts.pt")
    found = end_to_end.collect("shades", [3, 4], [0, 1], tmp_path)
    (only,) = found["races"]
    last = [record["epochs"][-1]["val_accuracy"] for record, _ in race.values()]
    assert only["target"] == 0.95 * min(last)
    assert found["facts"]["task"]["train"] == 29
    assert found["facts"]["rows"] == 1 + 4  # 32 px in patches of 16
    assert set(end_to_end.blocks(found)) >= {"end to end table", "end to end gain official 3"}
    changed = dict(race["reference"][0], machine={"device": "another"})
    end_to_end.runs.write_json(folder("reference") / "race.json", changed)
    with pytest.raises(end_to_end.Disagreement, match="another"):
        end_to_end.collect("shades", [3], [0], tmp_path)
