"""The command line: the default comparison, going on, and one line for everything that is wrong."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import signal
import sys

import pytest

import pae
from pae.train import compare, embedded, loop
from pae.train.cli import main
from pae.train.options import Options
from pae.train.runfolder import RunFolder
from tests import processes
from tests.train.helpers import BACKBONE_FLAGS, CPU_FLAGS, error_line, save_shades

RECIPE = ["--epochs", "2", "--batch-size", "16", "--num-tokens", "2"]
# a comparison has both; a single run says whether it has
PAE_RECIPE = ["--kld-dim", "8", "--mpa-window", "8", "--mpa-images", "4"]


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("shades"))


@pytest.fixture
def flags(shades):
    return ["train", "--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, *RECIPE]


@pytest.fixture(scope="module")
def compared(shades, tmp_path_factory):
    """A comparison that nobody disturbs, and what it printed."""
    folder, out = tmp_path_factory.mktemp("compared") / "run", io.StringIO()
    flags = ["train", "--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, *RECIPE, *PAE_RECIPE]
    with contextlib.redirect_stdout(out):
        assert main([*flags, "--output", str(folder)]) == 0
    return folder, out.getvalue()


def test_default_is_a_comparison_of_three_methods(compared):
    folder, table = compared
    for word in ("linear probe", "VPT-deep", "VPT-deep + PAE", "trained", "test acc"):
        assert word in table
    with open(folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["linear probe", "VPT-deep", "VPT-deep + PAE"]
    assert RunFolder(folder).results()[0]["test_accuracy"] > 0.6
    assert (folder / "curves.png").stat().st_size > 1000
    shared = ["dataset", "data", "model", "img_size", "seed", "norm", "engine", "amp", "device"]
    runs = {n: RunFolder(folder / n).read_config() for n, _, _ in compare.ENTRIES}
    first = runs["linear"]
    for settings in runs.values():
        assert [getattr(settings, k) for k in shared] == [getattr(first, k) for k in shared]
    assert runs["vpt-deep-pae"].kld and runs["vpt-deep-pae"].mpa and not runs["vpt-deep"].kld
    assert runs["vpt-deep"].epochs == 2 and runs["linear"].epochs > 2


def test_recipe_options_reach_the_prompt_runs_of_a_comparison_alone():
    settings = Options(lr=0.5, optimizer="sgd", device="cpu", amp="no").resolved()
    (_, _, probe), (_, _, deep), (_, _, both) = compare.entries(settings)
    assert deep.lr == both.lr == 0.5 and deep.optimizer == "sgd"
    assert probe == Options(method="linear", device="cpu", amp="no").resolved()


def test_no_argument_means_digits_on_the_embedded_backbone():
    options = Options().resolved()
    assert (options.dataset, options.model) == ("digits", "dinov2-s14-derived")
    assert options.is_comparison
    digits = embedded.DATASETS["digits"]
    assert options.img_size == digits.image_size and options.epochs == digits.recipe["epochs"]
    assert embedded.WEIGHTS_IMAGE_SIZE == 112


def test_what_an_image_set_prefers_yields_to_what_is_asked_for():
    digits = embedded.DATASETS["digits"]
    other = Options(dataset="pneumonia").resolved()
    assert other.img_size is None and other.epochs == 3
    asked = Options(img_size=84, epochs=2).resolved()
    assert (asked.img_size, asked.epochs) == (84, 2)
    alone = Options(method="vpt-deep").resolved()  # the recipe is the comparison's
    assert (alone.img_size, alone.epochs) == (digits.image_size, 10)
    assert Options(model="vit_tiny_patch16_224").resolved().img_size is None
    assert Options(data=".").resolved().img_size is None


def test_table_says_what_each_method_cost(compared):
    """36 training images, of which 7 validate; 15 test; 16 windows at 32 pixels see 4 images."""
    folder, out = compared
    printed = " ".join(out.split())
    for word in ("passes", "seconds", "MPA s", "forward and backward"):
        assert word in printed
    probe, deep, both = RunFolder(folder).results()
    assert probe["passes"] == 29 + 7 + 15
    assert deep["passes"] == 2 * (2 * 29 + 7) + 15
    assert both["passes"] == deep["passes"] + both["mpa_passes"]
    assert both["mpa_passes"] == 16 * 4 and 0 < both["mpa_seconds"] < both["seconds"]
    assert probe["mpa_passes"] == deep["mpa_passes"] == 0
    assert f"{both['passes']}" in printed


def test_interrupted_comparison_says_how_to_go_on_and_does(
    flags, compared, tmp_path, capsys, monkeypatch
):
    original = loop._Run._after_step

    def hook(self):
        original(self)
        if self.name == "VPT-deep" and self.updates == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_after_step", hook)
        assert main([*flags, *PAE_RECIPE, "--output", str(folder)]) == 130
    assert f"pae train --resume {folder}" in capsys.readouterr().err
    probe = (folder / "linear" / "metrics.json").read_bytes()
    assert main(["train", "--resume", str(folder), "--quiet"]) == 0
    assert (folder / "linear" / "metrics.json").read_bytes() == probe  # not run again

    def measured(root):
        rows = RunFolder(root).results()
        costs = ("seconds", "mpa_seconds", "memory_mb")
        return [{k: v for k, v in row.items() if k not in costs} for row in rows]

    assert measured(folder) == measured(compared[0])


def test_runs_without_output_are_numbered(flags, shades, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main([*flags, "--method", "linear", "--quiet"]) == 0
    assert sorted(os.listdir("runs")) == [f"{shades.name}-001", f"{shades.name}-002"]


def test_help_reads_well_and_states_licences(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("--engine", "--resume", "CC-BY-NC-SA-4.0", "CC0", "no clinical warranty", "--kld"):
        assert word in text
    assert "%(" not in text and max(map(len, text.splitlines())) < 160
    assert main([]) == 2  # no command: the overview


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--num-tokens", "-1"], "--num-tokens -1: expected an integer from 0 to 100000"),
        (["--num-tokens", "many"], "--num-tokens many: expected an integer"),
        (["--epochs", "0"], "--epochs 0: expected an integer from 1 to"),
        (["--lr", "-0.1"], "--lr -0.1: expected a number above 0"),
        (["--lr", "nan"], "--lr nan: expected a number above 0"),
        (["--dropout", "1"], "--dropout 1: expected a number in [0, 1)"),
        (["--engine", "warp"], "--engine warp: expected one of fast, reference"),
        (["--method", "lora"], "--method lora: expected one of compare, linear, full, vpt-deep"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["--dataset", "mnist"], "and --dataset mnist exclude each other"),
        (["--method", "linear", "--kld"], "--kld needs a --method with prompts"),
        (["--method", "vpt-shallow", "--kld"], "block 0 alone"),
        (
            ["--method", "vpt-deep", "--mpa", "--num-tokens", "0"],
            "--num-tokens 0: expected at least 1 with --mpa",
        ),
        (["--kld"], "--kld needs a --method"),
        (["--method", "vpt-deep", "--no-mpa", "--kld-dim", "8"], "--kld-dim 8 needs --kld"),
        (["--method", "vpt-deep", "--kld", "--mpa-head", "as_is"], "--mpa-head as_is needs --mpa"),
        (
            ["--method", "vpt-deep", "--mpa", "--mpa-window", "8", "--num-tokens", "99"],
            "--num-tokens 99: 99 prompts, but --mpa-window 8 and",
        ),
        (["--method", "vpt-deep", "--model", "vit_smal_patch16_224"], "did you mean vit_small"),
        (["--method", "vpt-deep", "--model", "swinv2_tiny_window8_256"], "Swin"),
        (["--method", "vpt-deep", "--weights", "gone.npz"], "gone.npz: no such file"),
        (["--train-size", "5000"], "at most 36 images"),
        (["--amp", "fp16"], "--amp fp16: a GPU is needed"),
        (["--previous-state"], "--previous-state needs --resume"),
        (["--method", "vpt-deep", "--optimizer", "nosuch"], "--optimizer nosuch"),
    ],
)
def test_bad_arguments_cost_one_line(flags, tmp_path, capsys, extra, message):
    if "--weights" in extra:
        flags = [f for f in flags if f != "--no-pretrained"]
    arguments = [*flags, "--output", str(tmp_path / "run"), "--quiet", *extra]
    assert message in error_line(capsys, arguments)
    assert not (tmp_path / "run").exists()


def test_bad_data_costs_one_line(flags, shades, tmp_path, capsys):
    where = flags.index("--data") + 1
    flags[where] = str(tmp_path / "gone")
    assert "gone: no such folder" in error_line(capsys, [*flags, "--quiet"])
    broken = save_shades(tmp_path / "broken", train=2)
    (broken / "train" / "dark" / "00.png").write_text("no image")
    flags[where] = str(broken)
    line = error_line(capsys, [*flags, "--output", str(tmp_path / "r"), "--quiet"])
    assert "unreadable image" in line and "00.png" in line


def test_run_folders_are_not_overwritten(flags, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    line = error_line(capsys, [*flags, "--output", str(tmp_path)])
    assert f"--output {tmp_path} is not empty; go on with --resume" in line


def test_resume_takes_everything_from_the_folder(tmp_path, capsys):
    assert "no run here" in error_line(capsys, ["train", "--resume", str(tmp_path)])
    line = error_line(capsys, ["train", "--resume", str(tmp_path), "--lr", "1"])
    assert f"takes its options from {tmp_path}; leave out --lr" in line
    (tmp_path / "config.json").write_text('{"settings": {"lr":')
    assert "config.json cannot be read" in error_line(capsys, ["train", "--resume", str(tmp_path)])


def test_defects_keep_their_traceback_and_debug_shows_all(flags, monkeypatch):
    def defect(settings):
        raise KeyError("a defect of ours")

    monkeypatch.setattr(loop, "load_task", defect)
    with pytest.raises(KeyError):
        main(flags)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"--num-tokens"):
        main([*flags, "--num-tokens", "-1", "--debug"])


def test_module_and_what_it_waits_for():
    """`python -m pae` works, and does not wait for torch to show its help or to refuse a word."""
    for line in (["--help"], ["predict", "--help"], ["train", "--lr", "x"], ["train", "--lt", "1"]):
        script = (
            "import sys; from pae.train.cli import main\n"
            f"try: status = main({line})\n"
            "except SystemExit as stop: status = stop.code\n"
            "sys.exit(str({'torch', 'timm', 'triton'} & set(sys.modules) or status))"
        )
        done = processes.run([sys.executable, "-c", script], check=False)
        assert done.stderr.splitlines()[-1] == ("0" if "--help" in line else "2")
    done = processes.run([sys.executable, "-m", "pae", "--version"])
    assert done.stdout.strip() == f"pae {pae.__version__}"
