"""The parts of a published recipe: each changes what it says, by numbers, and survives a stop."""

from __future__ import annotations

import math
import random
import socket
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pae.train import loop, methods, pixels
from pae.train.options import Options
from pae.train.runfolder import RunFolder
from pae.train.tasks import kind_of
from tests.train.helpers import BACKBONE_FLAGS, CPU_FLAGS, assert_same_run, numbers, save_shades
from tests.train.test_options import nothing_loaded, refusal
from tests.train.test_train_loop import RANKS, Stop, one_thread, run, settings, stop_after


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("shades"))  # 29 for training: 4 steps of 8


def classify(**changes):
    """The task of these options."""
    return kind_of(Options(**changes))


def note(monkeypatch, name, before=None, after=None):
    """Calls `before` and `after` with the run around its method `name`."""
    original = getattr(loop._Run, name)

    def noted(self, *arguments):
        if before is not None:
            before(self)
        original(self, *arguments)
        if after is not None:
            after(self)

    monkeypatch.setattr(loop._Run, name, noted)


# ---- VPT's schedule


def test_the_rate_of_vpt_holds_for_an_epoch_and_begins_at_nothing(shades, tmp_path, monkeypatch):
    rates = []
    note(monkeypatch, "_train_step", lambda run: rates.append(run.optimizer.param_groups[0]["lr"]))
    run(shades, tmp_path, scheduler="vpt", epochs=4, warmup_epochs=2)
    by_epoch = [0.0, 0.005, 0.01, 0.005]  # 0 / 2, 1 / 2, then (1 + cos(pi e / 2)) / 2
    assert rates == pytest.approx([rate for rate in by_epoch for _ in range(4)])
    assert [row["lr"] for row in numbers(tmp_path)[0]] == pytest.approx([*by_epoch[1:], 0.0])


def test_the_rates_of_a_hundred_epochs_are_vpts():
    parameters = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (2.0, 0.5), strict=True)]
    optimizer = torch.optim.SGD(groups)
    chosen = Options(scheduler="vpt", epochs=100, warmup_epochs=10)
    schedule = loop._make_scheduler(chosen, optimizer, 7)
    for epoch in range(100):
        schedule.step_update(7 * epoch + 3)  # steps inside an epoch change nothing
        rates = [group["lr"] for group in optimizer.param_groups]
        factor = epoch / 10 if epoch < 10 else 0.5 * (1 + math.cos(math.pi * (epoch - 10) / 90))
        assert rates == pytest.approx([2 * factor, 0.5 * factor], abs=1e-12)
        schedule.step(epoch + 1)


@pytest.mark.parametrize("scheduler", ["cosine", "step", "poly"])
def test_a_constant_warm_up(scheduler):
    """CoOp's: then the schedule is that of a rising one."""
    rates = {}
    for constant in (1e-5, None):
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.02, 2.0)]
        optimizer = torch.optim.SGD(groups)
        chosen = Options(scheduler=scheduler, epochs=10, warmup_epochs=1, warmup_lr=constant)
        schedule = loop._make_scheduler(chosen, optimizer, 4)
        found = rates[constant] = []
        for update in range(40):
            schedule.step_update(update)
            schedule.step(update // 4)
            found.append([group["lr"] for group in optimizer.param_groups])
    assert rates[1e-5][:4] == [[1e-5, 1e-5]] * 4
    assert rates[1e-5][4:] == rates[None][4:] and rates[None][1] == [0.005, 0.5]
    assert rates[None][4][1] > 1.5


# ---- loss, decay, clips


def test_smoothing_spreads_a_share_of_the_target():
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    logs = [value - math.log(math.exp(2) + 1 + math.exp(-1)) for value in (2.0, 0.0, -1.0)]
    smooth = -(0.7 * logs[1] + 0.3 * sum(logs) / 3)
    given = None, logits, torch.tensor([1])
    assert float(classify(label_smoothing=0.3).loss(*given)) == pytest.approx(smooth)
    assert float(classify().loss(*given)) == pytest.approx(-logs[1])


def test_smoothing_is_of_the_training_loss_alone(shades, tmp_path):
    still = {"epochs": 1, "optimizer": "sgd", "lr": 1e-12}
    run(shades, tmp_path / "plain", **still)
    run(shades, tmp_path / "smooth", **still, label_smoothing=0.9)
    ((plain,), *_), ((smooth,), *_) = numbers(tmp_path / "plain"), numbers(tmp_path / "smooth")
    assert smooth["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-6)
    assert abs(smooth["train_loss"] - plain["train_loss"]) > 1e-3


def test_the_head_has_a_decay_of_its_own(shades):
    chosen = settings(shades, kld=True, kld_dim=8, weight_decay=0.25, head_weight_decay=3)
    groups = methods.parameter_groups(methods.build_method(chosen, 3), chosen)
    decays = {group["name"]: group["weight_decay"] for group in groups}
    assert decays == {"prompts": 0.25, "kld": 0.25, "head": 3.0, "head_bias": 0.0}
    without = settings(shades, weight_decay=0.25)
    groups = methods.parameter_groups(methods.build_method(without, 3), without)
    assert [group["weight_decay"] for group in groups] == [0.25, 0.25, 0.0]


def gradients(run):
    return torch.cat([p.grad.flatten() for p in run.trained])


@pytest.mark.parametrize("clip", [{"clip_norm": 0.05}, {"clip_norm": 1e9}, {"clip_value": 0.003}])
def test_gradients_are_clipped_together_in_every_step(shades, tmp_path, monkeypatch, clip):
    before, after = [], []
    note(
        monkeypatch,
        "_clip",
        lambda r: before.append(gradients(r)),
        lambda r: after.append(gradients(r)),
    )
    run(shades, tmp_path, epochs=1, **clip)
    assert len(before) == len(after) == 4
    for raw, clipped in zip(before, after, strict=True):
        if "clip_norm" in clip:
            expected = raw * min(1.0, clip["clip_norm"] / float(raw.norm()))
        else:
            expected = raw.clamp(-0.003, 0.003)
            assert not torch.equal(expected, raw)
        torch.testing.assert_close(clipped, expected, rtol=1e-4, atol=0)
    if clip == {"clip_norm": 0.05}:
        assert all(float(raw.norm()) > 0.06 for raw in before)


# ---- the average


def test_the_average_is_what_is_validated_saved_and_tested(shades, tmp_path, monkeypatch):
    values, seen = [], []

    def value(run):
        return run.module.prompts.tokens.detach().clone()

    note(monkeypatch, "_train_step", lambda r: values.append(value(r)) if not values else None)
    note(monkeypatch, "_after_step", after=lambda r: values.append(value(r)))
    original = loop._Run._evaluate
    monkeypatch.setattr(
        loop._Run, "_evaluate", lambda s, data: (seen.append(value(s)), original(s, data))[1]
    )
    run(shades, tmp_path, epochs=1, ema=0.4)
    expected = values[0]
    for update, current in enumerate(values[1:], 1):
        decay = (2 / 11, 3 / 12, 4 / 13, 5 / 14)[update - 1]
        expected = decay * expected + (1 - decay) * current
    state = RunFolder(tmp_path).read_state()
    assert torch.equal(state["module"]["prompts.tokens"], values[-1])  # what goes on is no average
    files = [
        load_file(tmp_path / f"{name}.safetensors")["prompts.tokens"] for name in ("best", "last")
    ]
    for found in (*files, *seen):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert len(seen) == 2 and not torch.equal(files[0], values[-1])


def test_the_decay_of_the_average_ends_at_what_was_asked():
    weight = torch.nn.Parameter(torch.zeros(1))
    average = loop.Average([weight], 0.5)
    with torch.no_grad():
        weight.fill_(1.0)
    for update, expected in ((100, 0.5), (101, 0.75), (102, 0.875)):
        average.update(update)
        assert float(average.values[0]) == expected
    with average.used():
        assert weight.item() == 0.875
    assert weight.item() == 1.0 and float(average.values[0]) == 0.875


# ---- batches, pictures, what the backbone drops


def test_batches_have_as_many_images_of_each_class():
    labels = torch.tensor([0] * 7 + [1] * 3 + [2] * 6 + [3] * 1 + [4] * 5)  # 22: 6 batches of 4
    batches = pixels.balanced_batches(labels, 4, 2, seed=3, epoch=1)
    assert len(batches) == 6
    drawn = {label: [] for label in range(5)}
    for batch in batches:
        kinds, counts = labels[batch].unique(return_counts=True)
        assert counts.tolist() == [2, 2]
        for label in kinds.tolist():
            drawn[label].append(batch[labels[batch] == label].tolist())
    turns = [len(pairs) for pairs in drawn.values()]
    assert sum(turns) == 12 and max(turns) - min(turns) <= 1
    assert all(len(set(pair)) == 2 for label in (0, 1, 2, 4) for pair in drawn[label])
    assert all(pair == [16, 16] for pair in drawn[3])  # there is one
    first = [index for pair in drawn[2] for index in pair]
    assert len(set(first[:6])) == min(6, len(first))  # none again before the others
    again = pixels.balanced_batches(labels, 4, 2, seed=3, epoch=1)
    assert all(map(torch.equal, batches, again))
    other = pixels.balanced_batches(labels, 4, 2, seed=3, epoch=2)
    assert not all(map(torch.equal, batches, other))


def test_no_image_is_beside_itself_where_a_turn_ends():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    for seed in range(20):
        for batch in pixels.balanced_batches(labels, 2, 2, seed, 0):
            assert len(set(batch.tolist())) == 2


def test_an_epoch_of_balanced_batches_is_counted_as_drawn(shades, tmp_path, monkeypatch):
    drawn = []
    original = loop._Run._train_step

    def noted(self, inputs, labels, weight):
        drawn.append(labels.bincount(minlength=3).tolist())
        original(self, inputs, labels, weight)

    monkeypatch.setattr(loop._Run, "_train_step", noted)
    result = run(shades, tmp_path, epochs=1, batch_size=6, per_class=2, lr=1e-12, optimizer="sgd")
    assert drawn == [[2, 2, 2]] * 5  # 29 images, 7 for validation among 36; 5 batches of 6
    (row,) = numbers(tmp_path)[0]
    assert row["train_accuracy"] * 30 == pytest.approx(round(row["train_accuracy"] * 30))
    assert result["passes"] == 2 * 30 + 7 + 15


def test_rand_augment_is_drawn_from_seed_epoch_and_image(shades, tmp_path):
    images = loop.load_task(settings(shades)).train
    for augment in ("none", "crop", "timm"):
        plain = pixels.make_transform(augment, True, 32, "bicubic")[0]
        transform, is_random = pixels.make_transform(
            augment, True, 32, "bicubic", None, "rand-m9-n3-p1-mstd0.5"
        )
        assert is_random
        split = pixels.PixelSplit(images, transform, is_random, seed=1, workers=1)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        first, _ = split.__getitems__(torch.arange(6))
        assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[2])
        assert np.random.get_state()[1].tolist() == before[1]
        np.random.rand(5)
        assert torch.equal(split.__getitems__(torch.arange(6))[0], first)
        split.epoch = 1
        assert not torch.equal(split.__getitems__(torch.arange(6))[0], first)
        assert first.dtype == torch.uint8 and first.shape == (6, 3, 32, 32)
        without = pixels.PixelSplit(images, plain, augment != "none", seed=1, workers=1)
        assert not torch.equal(without.__getitems__(torch.arange(6))[0], first)
    assert not pixels.make_transform("none", False, 32, "bicubic", None, "rand-m9")[1]


def test_the_backbone_drops_in_training_alone(shades):
    chosen = settings(shades, engine="reference", drop_path=0.5, backbone_dropout=0.25)
    module = methods.build_method(chosen, 3)
    images = torch.randn(8, 3, 32, 32)
    plain = methods.build_method(settings(shades), 3)
    assert {type(p).__name__ for p in plain.backbone.modules()}.isdisjoint({"DropPath"})
    plain.load_state_dict(module.state_dict())
    rates = [block.drop_path1.drop_prob for block in module.backbone.blocks[1:]]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])  # 0 in the first block
    assert module.backbone.pos_drop.p == module.backbone.blocks[0].mlp.drop1.p == 0.25
    methods.start_training(module, chosen)
    torch.manual_seed(0)
    first = module(images)
    assert not torch.equal(module(images), first)
    torch.manual_seed(0)
    assert torch.equal(module(images), first)
    torch.testing.assert_close(module.eval()(images), plain.eval()(images))
    assert not any(part.training for part in module.backbone.modules())


def test_a_run_trains_with_what_the_backbone_drops(shades, tmp_path, monkeypatch):
    modes = []
    note(monkeypatch, "_train_step", lambda r: modes.append(r.module.backbone.pos_drop.training))
    run(shades, tmp_path, epochs=1, engine="reference", backbone_dropout=0.25)
    assert modes == [True] * 4


# ---- together

EVERYTHING = {
    "epochs": 2,  # of 5 steps
    "scheduler": "vpt",
    "warmup_epochs": 1,
    "head_weight_decay": 0.5,
    "clip_norm": 0.1,
    "label_smoothing": 0.1,
    "ema": 0.6,
    "engine": "reference",
    "drop_path": 0.2,
    "backbone_dropout": 0.1,
    "batch_size": 6,
    "per_class": 2,
    "augment": "crop",
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "dropout": 0.2,
    "save_every_steps": 3,  # a run that stops at the seventh goes on from the sixth
}


@pytest.fixture(scope="module")
def whole(shades, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(shades, folder, **EVERYTHING)
    return folder


def test_all_of_them_together_go_on_bit_for_bit(shades, tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 7)
        run(shades, tmp_path, **EVERYTHING)
    torch.rand(3)
    run(shades, tmp_path, resume="last", **EVERYTHING)
    assert_same_run(tmp_path, whole)
    cut, uncut = (RunFolder(folder).read_state()["average"] for folder in (tmp_path, whole))
    assert all(map(torch.equal, cut, uncut))


def test_two_processes_with_all_of_them_go_on_bit_for_bit(shades, tmp_path):
    flags = ["train", "--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, "--method", "vpt-deep"]
    flags += ["--num-tokens", "2", "--lr", "0.01", "--quiet"]
    for name, value in EVERYTHING.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    one_thread([sys.executable, "-c", RANKS, str(port), str(tmp_path), *flags])
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    averages = [RunFolder(tmp_path / name).read_state()["average"] for name in ("cut", "whole")]
    assert all(map(torch.equal, *averages))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "clip_norm = 1\nclip_value = 2",
            "mine: clip_norm = 1.0 and mine: clip_value = 2.0 exclude",
        ),
        (
            "warmup_lr = 1e-5\nwarmup_epochs = 0",
            "mine: warmup_lr = 1e-05 needs --warmup-epochs above",
        ),
        ("warmup_lr = 1e-5\nscheduler = 'vpt'", "and --scheduler cosine, step or poly"),
        ("clip_norm = 0", "mine: clip_norm = 0: expected a number above 0"),
        ("ema = 1", "mine: ema = 1: expected a number between 0 and 1"),
        ("method = 'pro-vpt'\nema = 0.9", "mine: ema = 0.9: pro-vpt moves prompts between blocks"),
        (
            "method = 'linear'\nhead_weight_decay = 1",
            "mine: head_weight_decay = 1.0 needs a --method",
        ),
        (
            "drop_path = 0.1",
            "mine: drop_path = 0.1 needs --engine reference: the fast one has folded",
        ),
        ("backbone_dropout = 0.1", "mine: backbone_dropout = 0.1 needs --engine reference"),
        ("method = 'compare'\ndrop_path = 0.1", "mine: drop_path = 0.1 needs --engine reference"),
        ("method = 'linear'\ndrop_path = 0.1", "mine: drop_path = 0.1 is drawn anew in every step"),
        ("method = 'linear'\nrand_augment = 'rand'", 'mine: rand_augment = "rand" is drawn anew'),
        ("rand_augment = 'rand-x3'", 'mine: rand_augment = "rand-x3": expected rand, then any'),
        ("rand_augment = 'rand-tnosuch'", 'mine: rand_augment = "rand-tnosuch": expected'),
        (
            "per_class = 3\nbatch_size = 16",
            "mine: per_class = 3: expected a divisor of the batch size",
        ),
        ("scheduler = 'vpt'\nepochs = 1\nwarmup_epochs = 1", 'mine: scheduler = "vpt": a warm-up'),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_is_loaded(line, message):
    with nothing_loaded() as folder:
        (folder / "mine").write_text(line if "method =" in line else f"{line}\nmethod = 'vpt-deep'")
        assert message in refusal("--config", "mine", *BACKBONE_FLAGS)


def test_a_batch_of_more_classes_than_there_are_is_refused(shades, tmp_path):
    with pytest.raises(
        ValueError, match=r"a batch of 8 takes 4 classes, and the images have 3; use"
    ):
        run(shades, tmp_path, per_class=2)
    assert not list(tmp_path.glob("config.json"))
