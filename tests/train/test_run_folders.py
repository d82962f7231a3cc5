"""Run folders that belong to one run: made once, held by one process, continued by the same run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import signal
import socket
import sys
import time

import pytest
import torch
from PIL import Image

from pae.checkpoint import TEMPORARY
from pae.errors import CheckpointError
from pae.files import signed
from pae.train import cli, compare, lock, loop, record, report, runfolder
from pae.train.cli import main
from pae.train.options import Options
from pae.train.runfolder import RunFolder
from tests.train.helpers import (
    BACKBONE_FLAGS,
    CPU_FLAGS,
    assert_same_run,
    ended,
    error_line,
    forked,
    save_shades,
)

RECIPE = ["--epochs", "2", "--batch-size", "16", "--num-tokens", "2"]
DEEP = ["--method", "vpt-deep"]


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("shades"), train=8, test=2)


@pytest.fixture
def flags(shades):
    return ["train", "--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, *RECIPE, "--quiet"]


@pytest.fixture(autouse=True)
def quicker(monkeypatch):
    """No pictures, and options that are right need no rehearsal."""
    monkeypatch.setattr(report, "plot_curves", lambda *_: None)
    monkeypatch.setattr(loop.methods, "rehearse", lambda options, given: None)


def interrupted(monkeypatch, arguments, updates=2, name=None):
    """Runs the command and stops it by SIGTERM after so many updates."""
    original = loop._Run._after_step

    def hook(self):
        original(self)
        if self.updates == updates and name in (None, self.name):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_after_step", hook)
        assert main(arguments) == cli.STOPPED


# ---- made once


def together(function, count=2):
    """What `function` prints in `count` processes that start at the same moment."""
    go, started = os.pipe(), []
    for _ in range(count):
        out = os.pipe()

        def work(out=out):
            os.close(go[1])
            os.read(go[0], 1)  # until the parent closes it
            os.write(out[1], function().encode())
            return 0

        started.append((forked(work), out))
    os.close(go[0])
    os.close(go[1])
    said = []
    for child, (end, mine) in started:
        os.close(mine)
        said.append(os.read(end, 10_000).decode())
        os.close(end)
        assert ended(child) == 0
    return said


def test_runs_started_together_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def start():
        folder = runfolder.new_folder(None, "shades")
        folder.config.write_text("{}")
        return folder.path.name

    names = [name for _ in range(20) for name in together(start)]
    assert sorted(names) == [f"shades-{number:03d}" for number in range(1, 41)]


def test_of_two_runs_with_one_output_one_is_refused(tmp_path):
    def start():
        try:
            folder = runfolder.new_folder(str(output), "shades")
        except ValueError as error:
            return str(error)
        folder.config.write_text("{}")
        folder.release()
        return "mine"

    for number in range(20):
        output = tmp_path / str(number) / "run"
        mine, refused = sorted(together(start), key="mine".__ne__)
        assert mine == "mine"
        assert "is in use by process" in refused or "is not empty; go on with" in refused
        assert os.listdir(output) == ["config.json"]


def test_refused_run_leaves_no_folder(flags, shades, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments, **options):
        raise ValueError("no such weights")

    monkeypatch.setattr(loop.methods, "build_method", refuse)  # after the folder is chosen
    for method in (DEEP, []):
        for output in ([], ["--output", "a/b/run"]):
            assert "no such weights" in error_line(capsys, [*flags, *method, *output])
    assert os.listdir() == []
    os.mkdir("mine")
    assert "no such weights" in error_line(capsys, [*flags, "--output", "mine"])
    assert os.listdir() == ["mine"] and os.listdir("mine") == []


def test_output_that_cannot_be(flags, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    line = error_line(capsys, [*flags, *DEEP, "--output", str(tmp_path / "file")])
    assert line.endswith("file is no folder; give another one")
    line = error_line(capsys, [*flags, *DEEP, "--output", str(tmp_path / "file" / "run")])
    assert line.endswith("cannot be written (Not a directory); give another one")

    def read_only(*arguments):
        raise OSError(errno.EROFS, "Read-only file system", str(arguments[0]))

    monkeypatch.setattr(os, "mkdir", read_only)
    monkeypatch.chdir(tmp_path)
    line = error_line(capsys, [*flags, *DEEP])
    assert "cannot be made here (Read-only file system); give a folder with --output" in line
    assert os.listdir() == ["file"]


def test_output_with_any_name(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HOME")
    folder = tmp_path / "my räksmörgås' 試 \N{HEAVY BLACK HEART}"
    interrupted(monkeypatch, [*flags, *DEEP, "--output", str(folder)])
    command = capsys.readouterr().err.partition("go on with: ")[2]
    assert main([*shlex.split(command)[1:], "--quiet"]) == 0
    assert RunFolder(folder).result() is not None


# ---- held by one process


@pytest.fixture(params=["flock", "none"])
def locks(request, monkeypatch):
    """File systems with locks and without."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    if request.param == "none":

        def refuse(*arguments):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)


def holder(folder, seconds=60, children=False):
    """A process that holds the folder; it is let go on once it does."""
    said = os.pipe()

    def work():
        hold = lock.Hold(folder)
        if children and os.fork() == 0:
            time.sleep(seconds)
            os._exit(0)
        os.write(said[1], b"held")
        time.sleep(seconds)
        hold.release()
        return 0

    child = forked(work)
    os.close(said[1])
    assert os.read(said[0], 4) == b"held"
    os.close(said[0])
    return child


def killed(child):
    os.kill(child.pid, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL


def test_second_process_is_refused_by_name_and_a_dead_one_is_no_obstacle(tmp_path, locks):
    child = holder(tmp_path)
    try:
        with pytest.raises(lock.InUse) as refused:
            lock.Hold(tmp_path)
        who = f"process {child.pid} on {socket.gethostname()}"
        assert str(refused.value) == f"{tmp_path} is in use by {who}; wait for it, or stop it"
    finally:
        killed(child)
    began = time.monotonic()
    lock.Hold(tmp_path).release()
    assert time.monotonic() - began < 5
    assert os.listdir(tmp_path) == []


def test_hold_ends_with_the_process_that_has_it_not_with_its_workers(tmp_path):
    killed(holder(tmp_path, seconds=3, children=True))  # the grandchild is still there
    began = time.monotonic()
    lock.Hold(tmp_path).release()
    assert time.monotonic() - began < 1


def test_lock_file_that_names_nobody_is_no_obstacle(tmp_path, locks):
    for name in lock.FILES:
        (tmp_path / name).write_bytes(b'["half-written')
    lock.Hold(tmp_path).release()
    child = holder(tmp_path)
    try:
        for name in lock.FILES:
            if (tmp_path / name).exists():
                (tmp_path / name).write_bytes(b"")  # a full disk
        with pytest.raises(lock.InUse, match=r"in use by (another process|process \d+)"):
            lock.Hold(tmp_path)
    finally:
        killed(child)


def test_run_that_is_running_is_not_gone_on_with(flags, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    arguments = [*flags, *DEEP, "--output", str(folder)]
    interrupted(monkeypatch, arguments)
    child = holder(folder)
    try:
        for more in (["train", "--resume", str(folder)], [*arguments, "--resume", "auto"]):
            line = error_line(capsys, more)
            assert f"{folder} is in use by process {child.pid} on" in line
    finally:
        killed(child)
    stale = folder / TEMPORARY.replace("*", ".state.pt.0123")
    stale.write_bytes(b"half")
    assert main(["train", "--resume", str(folder), "--quiet"]) == 0
    assert not stale.exists()


def test_part_of_a_comparison_is_held_too(flags, tmp_path, capsys, monkeypatch):
    folder, part = tmp_path / "run", tmp_path / "run" / "vpt-deep"
    monkeypatch.setattr(compare, "ENTRIES", compare.ENTRIES[:2])
    interrupted(monkeypatch, [*flags, "--output", str(folder)], name="VPT-deep")
    child = holder(part)
    try:
        line = error_line(capsys, ["train", "--resume", str(folder)])
        assert f"{part} is in use by process {child.pid} on" in line
    finally:
        killed(child)
    assert main(["train", "--resume", str(part), "--quiet"]) == 0
    assert main(["train", "--resume", str(folder), "--quiet"]) == 0
    names = [row["name"] for row in RunFolder(folder).results()]
    assert names == ["linear probe", "VPT-deep"]


# ---- gone on with by the same run


@pytest.fixture
def images(tmp_path):
    return save_shades(tmp_path / "images", train=8, test=2)


@pytest.fixture
def stopped(images, flags, tmp_path, monkeypatch):
    """The folder of a run that was stopped in its second epoch."""
    where = flags.index("--data") + 1
    flags[where] = str(images)
    folder = tmp_path / "run"
    interrupted(monkeypatch, [*flags, *DEEP, "--output", str(folder)], updates=3)
    return folder


def rename(old, new):
    def change(images, folder, monkeypatch):
        for split in ("train", "test"):
            (images / split / old).rename(images / split / new)

    return change


def permute(images, folder, monkeypatch):
    for old, new in (("dark", "a"), ("light", "dark"), ("a", "light")):
        rename(old, new)(images, folder, monkeypatch)


def another_image(images, folder, monkeypatch):
    (images / "train" / "dark" / "00.png").rename(images / "train" / "dark" / "20.png")


def one_more_image(images, folder, monkeypatch):
    Image.new("RGB", (40, 40)).save(images / "test" / "dark" / "x.png")


def another_class(images, folder, monkeypatch):
    for split in ("train", "test"):
        (images / split / "bright").mkdir()
        Image.new("RGB", (40, 40)).save(images / split / "bright" / "x.png")


def edit(**settings):
    def change(images, folder, monkeypatch):
        config = json.loads((folder / "config.json").read_text())
        config["settings"].update(settings)
        config.pop("digest")  # whoever edits it is told so, and takes this line away
        (folder / "config.json").write_text(json.dumps(config))

    return change


def other_weights(images, folder, monkeypatch):
    original = loop.methods.build_method

    def changed(*arguments, **options):
        module = original(*arguments, **options)
        with torch.no_grad():  # on the meta device too
            module.backbone.blocks[3].mlp.fc1.weight += 0.1
        return module

    monkeypatch.setattr(loop.methods, "build_method", changed)


@pytest.mark.parametrize(
    "change, message",
    [
        (permute, "test split: other files or labels"),
        (rename("dark", "black"), "class 0 was 'dark', is 'black'"),
        (another_class, "3 classes, now 4"),
        (another_image, "train split: other files or labels"),
        (one_more_image, "test split: 6 images, now 7"),
        (other_weights, "other weights in the backbone test_vit"),
        (edit(lr=0.02), "lr 0.01, now 0.02"),
        (edit(epochs=9), "epochs 2, now 9"),
        (edit(seed=5, img_size=48), "img_size 32, now 48; seed 0, now 5"),
        (edit(img_size=48), "images of side 32, now 48"),
        (edit(model="test_vit2"), "backbone test_vit.r160_in1k, now test_vit2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_run_is_not_gone_on_with(stopped, images, capsys, monkeypatch, change, message):
    before = (stopped / "state.pt").read_bytes()
    change(images, stopped, monkeypatch)
    line = error_line(capsys, ["train", "--resume", str(stopped)])
    assert f"{stopped} cannot go on, for it was another run: " in line and message in line
    assert (stopped / "state.pt").read_bytes() == before


def test_what_may_change_while_a_run_is_stopped(stopped, images, flags, tmp_path, capsys):
    moved = tmp_path / "moved"
    images.rename(moved)
    line = error_line(capsys, ["train", "--resume", str(stopped)])
    assert str(images) in line and line.endswith("no such folder")
    more = ["--data", str(moved), "--workers", "0", "--save-every-steps", "1"]
    assert main(["train", "--resume", str(stopped), *more, "--quiet"]) == 0
    assert not capsys.readouterr().err
    assert main([*flags[:2], str(moved), *flags[3:], *DEEP, "--output", str(tmp_path / "w")]) == 0
    assert_same_run(stopped, tmp_path / "w")


def written_by_an_older_version(folder, **settings):
    """Makes a stopped run one whose version had other defaults."""
    run = RunFolder(folder)
    state = run.read_state()
    state["record"]["settings"].update(settings)
    run.write_state(state)
    config = json.loads(run.config.read_text())
    config["settings"].update(settings)
    config.pop("digest")
    run.config.write_text(json.dumps(signed(config)))


# of what the run has no use for, or that means what it means today
FORMER = {
    **{"head": "pup", "head_channels": 7, "poly_power": 0.9, "kld_dim": 8, "draw": 3},
    **{"dropout": 0.0, "head_weight_decay": 1e-4, "split_seed": 0},
}


@pytest.mark.parametrize("auto", [False, True])
def test_former_defaults_of_what_a_run_does_not_use_do_not_stop_it(
    stopped, flags, tmp_path, capsys, auto
):
    written_by_an_older_version(stopped, **FORMER)
    on = [*flags, *DEEP, "--output", str(stopped), "--resume", "auto"]
    assert main(on if auto else ["train", "--resume", str(stopped), "--quiet"]) == 0
    assert not [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert main([*flags, *DEEP, "--output", str(tmp_path / "whole")]) == 0
    assert_same_run(stopped, tmp_path / "whole")


@pytest.mark.parametrize(
    "now, was, said",
    [
        ({}, {"dropout": 0.1}, ["dropout 0.1, now unset"]),
        ({"dropout": 0.2}, {"dropout": None}, ["dropout unset, now 0.2"]),
        ({}, {"split_seed": 1}, ["split_seed 1, now unset"]),
        ({"seed": 1}, {"seed": 0}, ["seed 0, now 1"]),
        ({"scheduler": "poly"}, {"poly_power": 0.9}, ["poly_power 0.9, now 0.1"]),
        ({"kld": True}, {"kld_dim": 8}, ["kld_dim 8, now 256"]),
        ({"task": "segmentation"}, {"head": "pup"}, ['head "pup", now "linear"']),
        ({"task": "clip"}, {"template": "{}."}, ['template "{}.", now unset']),
        ({"protocol": "few-shot", "shots": 4}, {"draw": 2}, ["draw 2, now 0"]),
        ({"method": "full"}, {"drop_path": 0.1}, ["drop_path 0.1, now 0.0"]),
        ({"method": "linear"}, {"drop_path": 0.1, "num_tokens": 3, "template": "{}."}, []),
        ({"method": "compare"}, {"mpa_window": 8}, ["mpa_window 8, now 16"]),
    ],
)
def test_settings_differ_in_what_a_run_uses(now, was, said):
    now = {**vars(Options()), "method": "vpt-deep", "weight_decay": 0.1, **now}
    assert list(record.changed_settings({**now, **was}, now)) == said


def test_older_states_and_other_libraries_cost_a_warning(stopped, capsys):
    folder = RunFolder(stopped)
    state = folder.read_state()
    state["record"]["versions"]["torch"] = "2.0"
    state["record"]["settings"]["device"] = "cuda"
    folder.write_state(state)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Run, "train", stop)
        loop_on(folder)
    warning = f"{stopped}: device cuda, now cpu; torch 2.0, now {torch.__version__}: the numbers"
    assert warning in " ".join(capsys.readouterr().err.split())
    del state["record"]
    folder.write_state(state)
    assert main(["train", "--resume", str(stopped), "--quiet"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {stopped}: an older pae wrote the state")


def stop(*arguments):
    raise KeyboardInterrupt


def loop_on(folder):
    options = folder.read_config()
    reporter = report.Reporter(quiet=True)
    accelerator = loop.make_accelerator(options)
    loop.train(options, loop.load_task(options), folder, accelerator, reporter, resume="last")


def test_run_on_a_gpu_is_not_gone_on_with_elsewhere_in_silence(stopped, capsys):
    edit(device="cuda")(None, stopped, None)
    line = error_line(capsys, ["train", "--resume", str(stopped)])
    assert line.endswith(
        "the run was on a GPU, and none is usable here; --device cpu goes on without"
    )
    assert main(["train", "--resume", str(stopped), "--device", "cpu", "--quiet"]) == 0


def test_parts_of_a_comparison_have_the_same_images(flags, images, tmp_path, capsys, monkeypatch):
    where = flags.index("--data") + 1
    flags[where] = str(images)
    folder = tmp_path / "run"
    monkeypatch.setattr(compare, "ENTRIES", compare.ENTRIES[:2])
    interrupted(monkeypatch, [*flags, "--output", str(folder)], updates=1, name="VPT-deep")
    for left in (folder / "vpt-deep").iterdir():
        left.unlink()  # as if it had been stopped before it began
    one_more_image(images, folder, monkeypatch)
    line = error_line(capsys, ["train", "--resume", str(folder)])
    assert (
        "vpt-deep cannot be compared with the runs beside it: test split: 6 images, now 7" in line
    )


def test_what_is_gone_is_named_before_the_training(stopped, flags, tmp_path, capsys):
    best = stopped / "best.safetensors"
    best.rename(tmp_path / "best")
    line = error_line(capsys, ["train", "--resume", str(stopped)])
    assert f"{best} is gone, the best checkpoint so far (epoch 1); put it back" in line
    for state in stopped.glob("state*"):
        state.unlink()
    assert main(["train", "--resume", str(stopped), "--quiet"]) == 0
    warning = f"warning: {stopped} holds no state yet: the run begins from its first step"
    assert capsys.readouterr().err.splitlines() == [warning]
    assert main([*flags, *DEEP, "--output", str(tmp_path / "whole")]) == 0
    assert_same_run(stopped, tmp_path / "whole")


# ---- requeued jobs


def test_auto_begins_goes_on_and_ends(flags, tmp_path, capsys, monkeypatch):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    arguments = [*flags, *DEEP, "--output", str(folder), "--resume", "auto"]
    interrupted(monkeypatch, arguments, updates=1)
    interrupted(monkeypatch, arguments, updates=3)
    assert main([*arguments, "--workers", "0"]) == 0
    assert main([*flags, *DEEP, "--output", str(whole)]) == 0
    assert_same_run(folder, whole)
    capsys.readouterr()
    monkeypatch.setattr(loop, "load_task", None)  # finished: nothing is loaded
    monkeypatch.setattr(loop, "make_accelerator", None)
    for more in (arguments, ["train", "--resume", str(folder), "--quiet"]):
        assert main(more) == 0
        out, err = capsys.readouterr()
        assert "vpt-deep" in out and "val acc" in out and not err


def test_auto_is_for_the_same_run(flags, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    auto = ["--resume", "auto"]
    assert "--resume auto needs --output FOLDER" in error_line(capsys, [*flags, *auto])
    arguments = [*flags, *DEEP, *auto, "--output", str(folder)]
    assert "--previous-state needs --resume FOLDER" in error_line(
        capsys, [*arguments, "--previous-state"]
    )
    interrupted(monkeypatch, arguments)
    for more, what in ((["--lr", "0.5"], "lr 0.01, now 0.5"), (["--kld"], "kld false, now true")):
        line = error_line(capsys, [*arguments, *more])
        assert f"--resume auto: {folder} holds another run: {what}; give its options, or" in line
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note.txt").write_text("mine")
    line = error_line(capsys, [*arguments[:-1], str(tmp_path / "other")])
    assert "other is not empty" in line


def test_auto_goes_back_where_the_last_state_is_damaged(flags, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    arguments = [*flags, *DEEP, "--output", str(folder), "--resume", "auto"]
    interrupted(monkeypatch, arguments, updates=3)
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:-100])
    capsys.readouterr()
    assert main(arguments) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "state.pt is half-written or damaged: going on from the one before it" in line
    assert main([*flags, *DEEP, "--output", str(tmp_path / "whole")]) == 0
    assert_same_run(folder, tmp_path / "whole")


# ---- what does not end a run


def test_picture_or_terminal_that_fails_does_not_end_a_run(flags, tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no font\nfound")

    monkeypatch.setattr(report, "plot_curves", broken)
    assert main([*flags, *DEEP, "--output", str(tmp_path / "run")]) == 0
    warning = f"warning: {tmp_path / 'run' / 'curves.png'} could not be drawn: no font found"
    assert capsys.readouterr().err.splitlines() == [warning]

    class HungUp:
        encoding = "ascii"

        def write(self, text):
            text.encode("ascii")  # what is not of the terminal is written in another way
            raise OSError(errno.EIO, "Input/output error")

        flush = isatty = lambda self: False

    monkeypatch.setattr(sys, "stderr", HungUp())
    report.Reporter().say("\N{HEAVY BLACK HEART}")
    report.Reporter().warn("\N{HEAVY BLACK HEART}")
    monkeypatch.setattr(sys, "stdout", HungUp())
    names = ("name", "trained_parameters", "val_accuracy", "test_accuracy", "seconds")
    row = dict(zip(names, ("\N{HEAVY BLACK HEART}", 1, 0.5, None, 1.0), strict=True))
    report.Reporter().table("\N{HEAVY BLACK HEART}", [row])


def test_comparison_whose_first_method_an_older_pae_finished(tmp_path, capsys):
    """It did not count passes; the table and the file have room for those of the others."""
    old = {"name": "linear probe", "trained_parameters": 9, "val_accuracy": 0.5}
    old |= {"test_accuracy": None, "seconds": 1.0}
    new = {**old, "name": "VPT-deep", "passes": 12345, "mpa_passes": 3, "mpa_seconds": 2.25}
    folder = RunFolder(tmp_path)
    folder.write_comparison([old, new])
    first, second = (tmp_path / "results.csv").read_text().splitlines()[1:]
    assert first.endswith("1.0,,,") and second.endswith("12345,3,2.25")
    report.Reporter().table("a task", folder.results())
    printed = capsys.readouterr().out
    assert "12,345" in printed and "2.2" in printed and max(map(len, printed.splitlines())) <= 80


def test_results_of_an_older_pae_are_read_with_a_warning(tmp_path, capsys):
    """They were a bare list. Also under --quiet, which is about progress."""
    row = {"name": "a probe", "trained_parameters": 9, "val_accuracy": 0.5, "seconds": 1.0}
    folder = RunFolder(tmp_path)
    folder.write_config(Options(method="compare").resolved(), task={"name": "birds"})
    folder.write_comparison([row | {"test_accuracy": None}])
    assert main(["train", "--resume", str(tmp_path), "--quiet"]) == 0
    said = capsys.readouterr()
    assert "warning" not in said.err and "a probe" in said.out
    path = tmp_path / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text())["results"]))
    assert main(["train", "--resume", str(tmp_path), "--quiet"]) == 0
    said = capsys.readouterr()
    assert "a probe" in said.out
    assert said.err == (
        f"warning: {path} was written by an earlier version, without a digest, so damage may go "
        "unseen; delete it: going on writes it again\n"
    )
    for damaged in ("[1]", '{"digest": "x", "results": []}', '{"results": [], "more": 1}', "{}"):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"results\.json cannot be read: "):
            folder.results()


def test_disk_that_is_full_is_named_and_the_run_kept(flags, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    original, count = RunFolder.write_state, []

    def full(self, state):
        count.append(1)
        if len(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.state))
        original(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_state", full)
        line = error_line(capsys, [*flags, *DEEP, "--output", str(folder)])
    assert (
        f"No space left on device: '{folder / 'state.pt'}'; what was saved before is kept" in line
    )
    assert line.endswith(f"go on with: pae train --resume {folder}")
    assert main(["train", "--resume", str(folder), "--quiet"]) == 0


def test_curves_share_their_axes_and_mark_what_was_kept():
    def rows(epochs, images):
        accuracies = [0.5, 0.9, 0.7][:epochs]
        return [
            {"epoch": i + 1, "images": (i + 1) * images, "train_loss": 1.0 / (i + 1)}
            | {"val_accuracy": accuracies[i], "seconds": 2.0 * i}
            for i in range(epochs)
        ]

    runs = {"a probe": rows(2, 8), "VPT": rows(3, 40)}
    results = {"VPT": {"best_epoch": 2, "test_accuracy": 0.8}}
    loss, images, seconds = report.draw_curves(runs, results).axes
    labels = [axes.get_xlabel() for axes in (loss, images, seconds)]
    assert labels == ["training images seen"] * 2 + ["seconds, validation included"]
    assert all(axes.get_title(loc="left") for axes in (loss, images, seconds))
    found = {
        line.get_marker(): tuple(map(float, line.get_xydata()[0]))
        for line in images.lines
        if line.get_marker() != "."
    }
    assert found == {"o": (80, 0.9), "*": (80, 0.8)}
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["a probe", "VPT"]
    marks = [text.get_text() for text in images.get_legend().get_texts()]
    assert marks == ["kept epoch", "its test accuracy"]
    untested = report.draw_curves(runs, {"VPT": {"best_epoch": 2, "test_accuracy": None}}).axes[1]
    assert [text.get_text() for text in untested.get_legend().get_texts()] == ["kept epoch"]
    for row in runs["VPT"]:
        del row["images"]  # an older pae
        row["val_accuracy"] = None  # all images were trained on
    assert report.draw_curves(runs, results).axes[0].get_xlabel() == "epoch"
