"""The parts of a published recipe: each changes what it says, by numbers, and survives a stop."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from pae.train import loop, methods
from pae.train.options import Options
from pae.train.runfolder import RunFolder
from tests.train.helpers import BACKBONE_FLAGS, assert_same_run, numbers, save_shades
from tests.train.test_options import nothing_loaded, refusal
from tests.train.test_train_loop import Stop, run, settings, stop_after


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("shades"))  # 29 for training: 4 steps of 8


def with_options(**changes):
    """A run that has its options, and nothing else."""
    bare = object.__new__(loop._Run)
    bare.options = Options(**changes)
    return bare


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


# ---- loss, decay, clips


def test_smoothing_spreads_a_share_of_the_target():
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    logs = [value - math.log(math.exp(2) + 1 + math.exp(-1)) for value in (2.0, 0.0, -1.0)]
    smooth = -(0.7 * logs[1] + 0.3 * sum(logs) / 3)
    found = with_options(label_smoothing=0.3)._criterion(logits, torch.tensor([1]))
    assert float(found) == pytest.approx(smooth)
    assert float(with_options()._criterion(logits, torch.tensor([1]))) == pytest.approx(-logs[1])


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


# ---- together

EVERYTHING = {
    "scheduler": "vpt",
    "warmup_epochs": 1,
    "head_weight_decay": 0.5,
    "clip_norm": 0.1,
    "label_smoothing": 0.1,
    "ema": 0.6,
    "dropout": 0.2,
    "save_every_steps": 1,
}


@pytest.fixture(scope="module")
def whole(shades, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(shades, folder, **EVERYTHING)
    return folder


@pytest.mark.parametrize("updates", [4, 7, 12])
def test_all_of_them_together_go_on_bit_for_bit(shades, tmp_path, monkeypatch, whole, updates):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, updates)
        run(shades, tmp_path, **EVERYTHING)
    torch.rand(3)
    run(shades, tmp_path, resume="last", **EVERYTHING)
    assert_same_run(tmp_path, whole)
    cut, uncut = (RunFolder(folder).read_state()["average"] for folder in (tmp_path, whole))
    assert all(map(torch.equal, cut, uncut))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "clip_norm = 1\nclip_value = 2",
            "mine: clip_norm = 1.0 and mine: clip_value = 2.0 exclude",
        ),
        ("clip_norm = 0", "mine: clip_norm = 0: expected a number above 0"),
        ("ema = 1", "mine: ema = 1: expected a number between 0 and 1"),
        ("method = 'pro-vpt'\nema = 0.9", "mine: ema = 0.9: pro-vpt moves prompts between blocks"),
        (
            "method = 'linear'\nhead_weight_decay = 1",
            "mine: head_weight_decay = 1.0 needs a --method",
        ),
        ("scheduler = 'vpt'\nepochs = 1\nwarmup_epochs = 1", 'mine: scheduler = "vpt": a warm-up'),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_is_loaded(line, message):
    with nothing_loaded() as folder:
        (folder / "mine").write_text(line if "method =" in line else f"{line}\nmethod = 'vpt-deep'")
        assert message in refusal("--config", "mine", *BACKBONE_FLAGS)
