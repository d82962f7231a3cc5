"""What works where packages are missing: one line says which, wherever it is noticed."""

from __future__ import annotations

import os
import sys

import pytest

from tests.processes import ROOT, run

# of what is not in Python itself, and takes long to import or may be missing
HEAVY = ("torch", "timm", "accelerate", "matplotlib", "rich", "safetensors", "PIL", "triton")


@pytest.fixture
def without(tmp_path):
    """without(names, *arguments) runs `pae` where these packages cannot be imported."""

    def command(names, *arguments):
        blocked = f"import sys; sys.modules.update(dict.fromkeys({tuple(names)}))"
        (tmp_path / "sitecustomize.py").write_text(blocked)
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        program = [sys.executable, "-m", "pae", *arguments]
        return run(program, env={"PYTHONPATH": path}, cwd=tmp_path, check=False)

    return command


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["analyse", "--help"]])
def test_what_answers_without_the_packages(without, arguments):
    done = without(HEAVY, *arguments)
    assert done.returncode == 0 and done.stderr == "" and "pae" in done.stdout


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        (["torch"], ["train", "--help"]),
        (["timm"], ["train", "--model", "test_vit", "--no-pretrained"]),
        (["torch"], ["analyse", "checkpoint.safetensors"]),
    ],
    ids=lambda value: value[0],
)
def test_a_missing_package_is_one_line(without, names, arguments):
    done = without(names, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("pae: error: ") and done.stderr.count("\n") == 1
    assert names[0] in done.stderr


def test_the_help_of_training_without_timm(without):
    assert "--method" in without(["timm", "triton"], "train", "--help").stdout
