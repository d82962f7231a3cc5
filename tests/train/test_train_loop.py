"""The training loop: it learns, both engines draw the same curve, and nothing short of a lost disk
loses more than the current interval.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
from functools import partial

import pytest
import timm
import torch

import pae
from pae.train import loop, methods, pixels
from pae.train import state as state_file
from pae.train.cli import main
from pae.train.options import Options
from pae.train.report import Reporter
from pae.train.runfolder import RunFolder
from tests import processes
from tests.train.helpers import (
    BACKBONE,
    BACKBONE_FLAGS,
    CPU_FLAGS,
    assert_same_run,
    numbers,
    save_shades,
)

RECIPE = {"method": "vpt-deep", "epochs": 3, "batch_size": 8, "lr": 0.01, "num_tokens": 2}
PAE = {"kld": True, "kld_dim": 8, "mpa": True, "mpa_window": 8, "mpa_images": 6}


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("shades"))


def settings(shades, **changes):
    machine = {"amp": "no", "device": "cpu", "workers": 1}
    values = {"dataset": None, "data": str(shades), **BACKBONE, **machine, **RECIPE, **changes}
    return Options(**values).resolved()


def run(shades, folder, resume=None, **changes):
    chosen = settings(shades, **changes)
    accelerator = loop.make_accelerator(chosen)
    task = loop.load_task(chosen)
    return loop.train(
        chosen, task, RunFolder(folder), accelerator, Reporter(quiet=True), resume=resume
    )


# ---- learning


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "vpt-deep"},
        {"method": "vpt-deep", **PAE},
        {"method": "vpt-shallow", "mpa": True, "mpa_window": 8},
        {"method": "linear", "epochs": 20},
        {"method": "full", "lr": 1e-3},
    ],
    ids=["vpt-deep", "pae", "vpt-shallow", "linear", "full"],
)
def test_every_method_learns_and_leaves_a_complete_folder(shades, tmp_path, changes):
    result = run(shades, tmp_path, **changes)
    assert result["val_accuracy"] > 0.6 and result["test_accuracy"] > 0.6  # a third by chance
    rows, stored, _ = numbers(tmp_path)
    assert len(rows) == settings(shades, **changes).epochs
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert max(row["val_accuracy"] for row in rows) == stored["val_accuracy"]
    assert rows[stored["best_epoch"] - 1]["val_accuracy"] == stored["val_accuracy"]
    table = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(table) == len(rows) + 1 and table[0].startswith("epoch,images,train_loss")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["task"]["classes"] == ["dark", "light", "middle"]
    assert not list(tmp_path.glob(".*"))  # no temporary file


def test_trained_parameters_are_counted_per_method(shades):
    width, depth, classes = 64, 6, 3
    head = width * classes + classes
    expected = {
        ("linear", False): head,
        ("vpt-deep", False): depth * 2 * width + head,
        ("vpt-deep", True): depth * 2 * width + head + width * 8 + 2 * 8 * 8,
        ("vpt-shallow", False): 2 * width + head,
    }
    for (method, kld), count in expected.items():
        chosen = settings(shades, method=method, kld=kld, kld_dim=8)
        assert methods.trained_parameters(methods.build_method(chosen, classes)) == count


def test_saved_checkpoint_is_a_pae_model_that_repeats_the_test_accuracy(shades, tmp_path):
    chosen = settings(shades, method="vpt-deep")
    result = run(shades, tmp_path, method="vpt-deep", norm="imagenet")
    backbone = methods.build_backbone(_seeded_like(chosen), 3)
    model = pae.PromptedViT.from_file(tmp_path / "best.safetensors", backbone).eval()
    task = loop.load_task(chosen)
    assert model.task.classes == task.classes
    assert (model.task.input_size, model.task.crop_mode) == ((3, 32, 32), "squash")
    assert model.task.mean == timm.data.constants.IMAGENET_DEFAULT_MEAN
    transform, _ = pixels.make_transform("none", False, 32, "bicubic")
    data = pixels.PixelSplit(task.test, transform)
    mean, std = pixels.normalisation("imagenet", {"mean": None, "std": None})
    ((images, labels),) = pixels.Pipeline(data, mean, std, "cpu").batches([torch.arange(15)])
    hits = (pae.fast_forward(model, images).argmax(1) == labels).float().mean().item()
    assert hits == pytest.approx(result["test_accuracy"])


def _seeded_like(chosen):
    from accelerate.utils import set_seed

    set_seed(chosen.seed)  # the random backbone of a run is drawn from its seed
    return chosen


def test_linear_probe_sees_the_features_of_the_frozen_backbone(shades):
    probe = methods.build_method(settings(shades, method="linear"), 3)
    images = torch.randn(2, 3, 32, 32)
    logits = probe(probe.features(images))
    torch.testing.assert_close(logits, probe.frozen(images))
    assert [name for name, _ in probe.named_parameters()] == ["head.weight", "head.bias"]


def test_engines_draw_the_same_curve(shades, tmp_path, monkeypatch):
    curves, used = [], []
    fast = pae.engine.run
    monkeypatch.setattr(pae.engine, "run", lambda *a: (used.append(engine), fast(*a))[1])
    for engine in ("fast", "reference"):
        run(shades, tmp_path / engine, method="vpt-deep", engine=engine, **PAE)
        rows, _, _ = numbers(tmp_path / engine)
        curves.append([(row["train_loss"], row["val_loss"]) for row in rows])
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-3, atol=0)
    assert used == ["fast"] * (3 * (4 + 1) + 2)  # batches of three epochs, and of the test


def test_regulariser_gradients_are_clipped_every_step(shades, tmp_path, monkeypatch):
    calls = []
    original = pae.KLD.clip_gradients

    def clip(self, *args):
        norm = original(self, *args)
        after = torch.cat([p.grad.flatten() for p in self.parameters()]).norm()
        calls.append((float(norm), float(after)))

    monkeypatch.setattr(pae.KLD, "clip_gradients", clip)
    run(shades, tmp_path, method="vpt-deep", epochs=1, kld=True, kld_dim=8, kld_consistency=1e5)
    assert len(calls) == 4  # 29 training images in batches of 8
    assert all(before > 11 and after <= 10.001 for before, after in calls)


def test_loss_that_is_not_finite_stops_the_run(shades, tmp_path):
    with pytest.raises(
        ArithmeticError, match=r"training loss of epoch \d is (nan|inf) in step.*--lr"
    ):
        run(shades, tmp_path, method="vpt-deep", lr=1e30, optimizer="sgd")


@pytest.mark.parametrize(
    "updates, message",
    [
        (5, r"training loss of epoch 2 is nan in step 2 of the epoch; try a lower --lr than 0\.01"),
        (8, r"validation loss of epoch 2 is nan; try a lower --lr than 0\.01"),
    ],
)
def test_run_stops_at_the_first_number_that_is_none(
    shades, tmp_path, monkeypatch, updates, message
):
    original, done = loop._Run._after_step, []

    def hook(self):
        original(self)
        done.append(self.updates)
        if self.updates == updates:
            with torch.no_grad():
                self.module.prompts.tokens.fill_(float("nan"))

    monkeypatch.setattr(loop._Run, "_after_step", hook)
    with pytest.raises(ArithmeticError, match=message + rf"; {tmp_path} keeps epoch 1$"):
        run(shades, tmp_path)
    assert done[-1] <= updates + 1  # no step after the one that showed it
    assert RunFolder(tmp_path).read_state()["epoch"] == 1
    assert len(RunFolder(tmp_path).rows()) == 1
    assert "NaN" not in (tmp_path / "metrics.json").read_text()


def test_penalty_that_is_not_finite_is_named(shades, tmp_path, monkeypatch):
    monkeypatch.setattr(
        pae.PromptedViT, "penalty", lambda self: self.prompts.tokens.sum() * float("inf")
    )
    with pytest.raises(
        ArithmeticError, match=r"penalty beside the loss of epoch 1 is -?inf in step 1 of"
    ):
        run(shades, tmp_path)


class OnGPU:
    """Stands for an accelerator with a GPU: what matters is how often it is waited for."""

    device = torch.device("cuda")

    def __init__(self, processes=1, others=(0.0, 0.0)):
        self.num_processes, self.others = processes, torch.tensor(others)

    def reduce(self, flags, how):
        return flags + self.others


def looking(accelerator, updates=0, step=0, signal_seen=False):
    """A run between two steps, with nothing but what `_look` asks for."""
    run = object.__new__(loop._Run)
    run.accelerator, run.updates, run.step, run.epoch = accelerator, updates, step, 1
    run.losses, run.signals = [], loop._Signals()
    run.signals.seen = signal_seen
    run.options = Options(lr=0.5, amp="fp16")
    run.folder = RunFolder("somewhere")
    return run


def test_gpu_is_asked_now_and_then_and_the_step_is_named(monkeypatch):
    asked = []
    original = loop._Run._not_finite
    monkeypatch.setattr(
        loop._Run, "_not_finite", lambda s: (asked.append(s.updates), original(s))[1]
    )
    run, fine, zero = looking(OnGPU()), torch.tensor(1.0), torch.tensor(0.0)
    for _ in range(40):
        run.step, run.updates = run.step + 1, run.updates + 1
        run.losses.append((torch.tensor(float("nan")) if run.step in (37, 38) else fine, zero))
        run._look(at_once=False)
    assert asked == [16, 32]
    with pytest.raises(ArithmeticError, match=r"epoch 2 is nan in step 37 .*--amp bf16 or no; som"):
        run._look(at_once=True)
    run = looking(OnGPU(), updates=3, signal_seen=True)
    with pytest.raises(loop._Asked):  # a signal alone costs no waiting
        run._look(at_once=False)


def test_all_processes_stop_alike(monkeypatch):
    monkeypatch.setattr(torch, "tensor", partial(_on_cpu, torch.tensor))
    for others, error in (((1.0, 0.0), loop._Asked), ((0.0, 1.0), ArithmeticError)):
        looking(OnGPU(2, others), updates=3)._look(at_once=False)
        with pytest.raises(error):
            looking(OnGPU(2, others), updates=16)._look(at_once=False)
    looking(OnGPU(2), updates=16)._look(at_once=False)


def _on_cpu(tensor, values, device=None):
    return tensor(values)


def test_unknown_optimizer_is_named(shades, tmp_path):
    with pytest.raises(ValueError, match=r"--optimizer nosuch"):
        run(shades, tmp_path, optimizer="nosuch")


def test_learning_rate_warms_up_and_decays_to_zero(shades, tmp_path):
    run(shades, tmp_path, method="vpt-deep", epochs=4, warmup_epochs=2)
    rates = [row["lr"] for row in numbers(tmp_path)[0]]
    # the row of an epoch holds the rate that its successor begins with
    assert rates[0] == pytest.approx(0.005) and rates[1] == pytest.approx(0.005)
    assert rates[1] > rates[2] > rates[3] == 0


# ---- stopping and going on


class Stop(BaseException):
    """Stands for the end of the process: nothing below the test may catch it."""


def stop_after(monkeypatch, updates):
    original = loop._Run._after_step

    def hook(self):
        original(self)
        if self.updates == updates:
            raise Stop

    monkeypatch.setattr(loop._Run, "_after_step", hook)


# an epoch has four steps: the first step, the end of an epoch, between two saves, the last step
@pytest.mark.parametrize(
    "changes, updates",
    [
        ({"method": "vpt-deep", "dropout": 0.2, **PAE, "save_every_steps": 1}, 1),
        ({"method": "vpt-deep", "dropout": 0.2, **PAE, "save_every_steps": 1}, 6),
        ({"method": "vpt-deep", "dropout": 0.2, **PAE, "save_every_steps": 1}, 12),
        ({"method": "vpt-deep", "dropout": 0.2, "augment": "timm", "save_every_steps": 3}, 4),
        ({"method": "vpt-deep", "dropout": 0.2, "augment": "timm", "save_every_steps": 3}, 8),
        ({"method": "linear"}, 6),
        ({"method": "full", "lr": 1e-3, "optimizer": "sgd"}, 4),
        ({"method": "full", "lr": 1e-3, "optimizer": "sgd"}, 6),
    ],
    ids=lambda value: value if isinstance(value, int) else "-".join(map(str, value.values()))[:24],
)
def test_stopped_run_goes_on_bit_for_bit(shades, tmp_path, monkeypatch, whole, changes, updates):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, updates)
        run(shades, tmp_path / "cut", **changes)
    torch.rand(11)  # a new process has its own random state
    run(shades, tmp_path / "cut", resume="last", **changes)
    assert_same_run(tmp_path / "cut", whole(**changes))


@pytest.fixture(scope="module")
def whole(shades, tmp_path_factory):
    """The folder of the uninterrupted run with these settings, made once."""
    made = {}

    def get(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            run(shades, made[key], **changes)
        return made[key]

    return get


def test_only_the_current_interval_is_repeated(shades, tmp_path, monkeypatch):
    done = []
    original = loop._Run._after_step
    monkeypatch.setattr(loop._Run, "_after_step", lambda self: (original(self), done.append(1)))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 7)
        run(shades, tmp_path, save_every_steps=2)
    assert len(done) == 7
    done.clear()
    run(shades, tmp_path, resume="last", save_every_steps=2)
    assert len(done) == 12 - 6  # the seventh again, for it was not saved


KILLER = """
import os, signal, sys
from pae.train import loop, state
from pae.train.cli import main

def die():
    os.kill(os.getpid(), signal.SIGKILL)

where, number = sys.argv[1], int(sys.argv[2])
if where == "step":
    after_step = loop._Run._after_step
    def hook(self):
        after_step(self)
        if self.updates == number:
            die()
    loop._Run._after_step = hook
else:
    write, count = state.write_atomically, 0
    def half(path, writer, *more):
        def write_half(file):
            writer(file)
            os.truncate(file, os.path.getsize(file) // 2)
            die()
        global count
        count += os.path.basename(path) == where
        write(path, write_half if count == number else writer, *more)
    state.write_atomically = half
main(sys.argv[3:])
"""


@pytest.mark.parametrize("where, number", [("step", 6), ("state.pt", 2)])
def test_sigkill_loses_nothing_but_the_current_interval(shades, tmp_path, whole, where, number):
    folder = tmp_path / "run"
    flags = ["train", "--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, "--method", "vpt-deep"]
    flags += ["--epochs", "3", "--batch-size", "8", "--lr", "0.01", "--num-tokens", "2"]
    flags += ["--dropout", "0.2", "--output", str(folder), "--quiet"]
    code = [sys.executable, "-c", KILLER, where, str(number), *flags]
    done = one_thread(code, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert RunFolder(folder).result() is None
    assert RunFolder(folder).read_state()["epoch"] == 1  # the last complete interval is there
    assert main(["train", "--resume", str(folder), "--quiet"]) == 0
    assert_same_run(folder, whole(method="vpt-deep", dropout=0.2))


def one_thread(command, **options):
    """Run `command` with as many threads as the tests themselves: more would round differently."""
    return processes.run(command, env={"OMP_NUM_THREADS": str(torch.get_num_threads())}, **options)


def signalled(monkeypatch, updates, *numbers):
    """Sends `numbers` to this process after so many updates."""
    original = loop._Run._after_step

    def hook(self):
        original(self)
        if self.updates == updates:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(loop._Run, "_after_step", hook)


@pytest.mark.parametrize("name", loop.SIGNALS)
def test_signal_saves_in_the_middle_of_an_epoch(shades, tmp_path, monkeypatch, whole, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(loop.Interrupted):
        signalled(patch, 6, number)
        run(shades, tmp_path, method="vpt-deep", dropout=0.2)
    assert signal.getsignal(number) is before
    state = RunFolder(tmp_path).read_state()
    assert (state["epoch"], state["step"], state["updates"]) == (1, 2, 6)
    if name == "SIGINT":
        run(shades, tmp_path, resume="last", method="vpt-deep", dropout=0.2)
        assert_same_run(tmp_path, whole(method="vpt-deep", dropout=0.2))


def test_second_interrupt_does_not_wait(shades, tmp_path, monkeypatch):
    signalled(monkeypatch, 6, signal.SIGTERM, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(shades, tmp_path)
    assert RunFolder(tmp_path).read_state()["epoch"] == 1  # that of the epoch before


def test_ignored_signal_stays_ignored(shades, tmp_path, monkeypatch):
    """nohup, and a shell's background jobs."""
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signalled(monkeypatch, 6, signal.SIGHUP)
        run(shades, tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert RunFolder(tmp_path).result() is not None


def test_validation_does_not_keep_a_signal_waiting(shades, tmp_path, monkeypatch, whole):
    """The steps of the epoch are kept, and validated when the run goes on."""
    original = loop._Run._evaluate
    with monkeypatch.context() as patch, pytest.raises(loop.Interrupted):
        patch.setattr(
            loop._Run,
            "_evaluate",
            lambda self, data: (self.signals.note(signal.SIGTERM, None), original(self, data))[1],
        )
        run(shades, tmp_path, method="vpt-deep", dropout=0.2)
    state = RunFolder(tmp_path).read_state()
    assert (state["epoch"], state["step"]) == (0, 4)
    run(shades, tmp_path, resume="last", method="vpt-deep", dropout=0.2)
    assert_same_run(tmp_path, whole(method="vpt-deep", dropout=0.2))


def test_signal_to_all_processes_of_a_job_saves(shades, tmp_path, monkeypatch, whole):
    changes = {"method": "vpt-deep", "dropout": 0.2, "augment": "crop"}
    expected, original = whole(**changes), loop._Run._after_step

    def hook(self):
        original(self)
        if self.updates == 6:
            (worker,) = multiprocessing.active_children()
            for process in (worker.pid, os.getpid()):
                os.kill(process, signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(loop.Interrupted):
        patch.setattr(loop._Run, "_after_step", hook)
        run(shades, tmp_path, **changes)
    assert RunFolder(tmp_path).read_state()["updates"] == 6
    assert not multiprocessing.active_children()
    run(shades, tmp_path, resume="last", **changes)
    assert_same_run(tmp_path, expected)


def test_workers_that_a_signal_ended_are_no_error(shades, tmp_path, monkeypatch, whole):
    """A batch system signals all processes of a job; ours may hear of it last."""
    original = pixels.Pipeline.batches

    def broken(self, index_lists, epoch=0):
        for number, batch in enumerate(original(self, index_lists, epoch)):
            if epoch == 1 and number == 2:
                threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")
            yield batch

    with monkeypatch.context() as patch, pytest.raises(loop.Interrupted):
        patch.setattr(pixels.Pipeline, "batches", broken)
        run(shades, tmp_path, method="vpt-deep", dropout=0.2)
    assert RunFolder(tmp_path).read_state()["updates"] == 6
    run(shades, tmp_path, resume="last", method="vpt-deep", dropout=0.2)
    assert_same_run(tmp_path, whole(method="vpt-deep", dropout=0.2))
    monkeypatch.setattr(loop.time, "sleep", lambda seconds: None)
    assert not loop._Signals().explain(RuntimeError("DataLoader worker (pid 7) exited"))
    assert not loop._Signals().explain(RuntimeError("of our own"))


def test_finished_run_is_not_run_again(shades, whole, monkeypatch):
    folder = whole(method="vpt-deep", dropout=0.2)
    monkeypatch.setattr(loop, "_Run", None)
    result = run(shades, folder, resume="last", method="vpt-deep", dropout=0.2)
    assert result == RunFolder(folder).result()


@pytest.fixture
def stopped(shades, tmp_path, monkeypatch):
    """A run stopped in its third epoch, with two saved states."""
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 10)
        run(shades, tmp_path, method="vpt-deep", dropout=0.2)
    return RunFolder(tmp_path)


@pytest.mark.parametrize("damage", ["half", "flip", "empty"])
def test_damaged_state_is_named_and_the_one_before_serves(stopped, shades, whole, damage):
    data = bytearray(stopped.state.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    stopped.state.write_bytes(data[: {"half": len(data) // 2, "flip": None, "empty": 0}[damage]])
    with pytest.raises(pae.CheckpointError, match=r"state\.pt is half-written or damaged; --prev"):
        run(shades, stopped.path, resume="last", method="vpt-deep", dropout=0.2)
    run(shades, stopped.path, resume="previous", method="vpt-deep", dropout=0.2)
    assert_same_run(stopped.path, whole(method="vpt-deep", dropout=0.2))


def test_state_of_another_model_is_refused(stopped, shades, capsys):
    with pytest.raises(pae.CheckpointError, match=r"another run: num_tokens 2, now 5; put it back"):
        run(shades, stopped.path, resume="last", method="vpt-deep", dropout=0.2, num_tokens=5)
    state = stopped.read_state()
    del state["record"]  # as older versions wrote it
    stopped.write_state(state)
    with pytest.raises(pae.CheckpointError, match=r"prompts\.tokens is .* in the file"):
        run(shades, stopped.path, resume="last", method="vpt-deep", dropout=0.2, num_tokens=5)
    assert capsys.readouterr().err.count("warning: ") == 1


@pytest.mark.parametrize("part", ["streams", "best", "optimizer", "module"])
def test_state_of_another_version_is_refused(stopped, shades, part):
    state = stopped.read_state()
    del state[part]
    stopped.write_state(state)
    with pytest.raises(pae.CheckpointError, match=rf"state\.pt is not what .*KeyError: '{part}'"):
        run(shades, stopped.path, resume="last", method="vpt-deep", dropout=0.2)


def test_damaged_best_checkpoint_is_named(stopped, shades, monkeypatch):
    finish = loop._Run._finish

    def damaged(self):
        stopped.best.write_bytes(stopped.best.read_bytes()[:100])
        return finish(self)

    monkeypatch.setattr(loop._Run, "_finish", damaged)
    with pytest.raises(pae.CheckpointError, match=r"best\.safetensors"):
        run(shades, stopped.path, resume="last", method="vpt-deep", dropout=0.2)


def test_full_checkpoint_of_another_model_is_refused(shades, tmp_path):
    run(shades, tmp_path, method="full", epochs=1)
    module = methods.build_method(settings(shades, method="full"), 7)
    with pytest.raises(pae.CheckpointError, match=r"cls_token is None in the file|in the model"):
        module.load(tmp_path / "best.safetensors")
    (tmp_path / "best.safetensors").write_bytes(b"short")
    with pytest.raises(pae.CheckpointError, match=r"cannot be read"):
        module.load(tmp_path / "best.safetensors")


def test_a_failing_write_leaves_the_state_before_it(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write_state({"epoch": 1})
    folder.write_state({"epoch": 2})

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(state_file, "write_atomically", full_disk)
    with pytest.raises(OSError, match=r"no space left"):
        folder.write_state({"epoch": 3})
    assert folder.read_state()["epoch"] == 2


# ---- alignment


def test_options_of_the_alignment_reach_it(shades, tmp_path, monkeypatch, capsys):
    seen = {}

    def stop(model, images, labels, **options):
        seen.update(options, images=len(images))
        raise ValueError("seen enough")

    monkeypatch.setattr(pae, "mpa_init", stop)
    flags = ["train", "--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, "--method", "vpt-deep"]
    flags += ["--mpa", "--mpa-images", "5", "--mpa-window", "8", "--mpa-stride", "4"]
    flags += ["--mpa-head", "linear_probe", "--mpa-search", "halving", "--mpa-precision", "bf16"]
    assert main([*flags, "--output", str(tmp_path / "run")]) == 2
    assert "seen enough" in capsys.readouterr().err
    del seen["progress"]
    assert seen == {
        "images": 5,
        "window": 8,
        "stride": 4,
        "head": "linear_probe",
        "search": "halving",
        "precision": "bf16",
        "devices": "ranks",
    }


# ---- several processes


def test_two_processes_draw_the_curve_of_one(shades, tmp_path):
    flags = ["train", "--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, "--method", "vpt-deep"]
    flags += ["--kld", "--kld-dim", "8", "--mpa", "--mpa-window", "8", "--mpa-images", "6"]
    flags += ["--epochs", "2", "--batch-size", "7", "--num-tokens", "2", "--quiet"]
    assert main([*flags, "--output", str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "pae"]
    two = [*launcher, *flags, "--output", str(tmp_path / "two")]
    one_thread(two)
    one, two = (numbers(tmp_path / name) for name in ("one", "two"))
    for left, right in zip(one[0], two[0], strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2


RANKS = """
import os, sys
import accelerate.utils, timm.data, timm.optim, timm.scheduler, rich.table  # once, for both
import torch, torch.multiprocessing as mp
from pae.train import loop, report
from pae.train.cli import main

def work(rank, port, folder, flags):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    assert main([*flags, "--output", folder + "/whole"]) == 0
    after_step = loop._Run._after_step

    class Stop(BaseException):
        pass

    def hook(self):
        after_step(self)
        if self.updates == 6:
            raise Stop

    loop._Run._after_step = hook
    try:
        main([*flags, "--output", folder + "/cut"])
    except Stop:
        loop._Run._after_step = after_step
    torch.rand(rank + 5)
    assert main(["train", "--resume", folder + "/cut", "--quiet"]) == 0
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    report.plot_curves = lambda *_: None
    mp.start_processes(work, (*sys.argv[1:3], sys.argv[3:]), nprocs=2, start_method="fork")
"""


def test_two_processes_go_on_bit_for_bit(shades, tmp_path):
    """PRO-VPT sums the scores of its prompts over an epoch, in each process those of its images."""
    flags = ["train", "--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, "--method", "pro-vpt"]
    flags += ["--method-args", "sweep=reuse", "--dropout", "0.2", "--epochs", "3", "--quiet"]
    flags += ["--batch-size", "8", "--num-tokens", "2", "--lr", "0.01", "--save-every-steps", "1"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    one_thread([sys.executable, "-c", RANKS, str(port), str(tmp_path), *flags])
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    cut, whole = (RunFolder(tmp_path / name).read_state() for name in ("cut", "whole"))
    assert int(whole["module"]["prompts.epoch"]) == 3  # two decisions, the first after the stop
    for name, tensor in whole["module"].items():  # the policy's memory of both among them
        assert torch.equal(cut["module"][name], tensor), name
    for mine, expected in zip(cut["streams"], whole["streams"], strict=True):
        assert torch.equal(mine["cpu"], expected["cpu"])
        assert torch.equal(mine["prompts"]["score_sum"], expected["prompts"]["score_sum"])
    sums = [stream["prompts"]["score_sum"] for stream in whole["streams"]]
    assert not torch.equal(*sums)  # the processes differ, or nothing is shown here
