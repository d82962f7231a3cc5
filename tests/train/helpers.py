"""What the tests of the training loop and of the command line share: three shades to tell apart."""

from __future__ import annotations

import json
import multiprocessing
import os

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from pae.train.cli import main

# timm's smallest vision transformer, on random weights: 6 blocks of width 64, 5 tokens at 32 px
BACKBONE = {"model": "test_vit", "pretrained": False, "img_size": 32}
BACKBONE_FLAGS = ["--model", "test_vit", "--no-pretrained", "--img-size", "32"]
CPU_FLAGS = ["--device", "cpu", "--amp", "no", "--workers", "1"]
# enough for a probe to tell dark from light
PROBE_FLAGS = ["--method", "linear", "--epochs", "40", "--lr", "0.1", "--quiet"]


def save_shades(root, train=12, test=5, size=(36, 40)):
    """An image folder of noisy dark, light and middle grey images; returns `root`."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name, level in (("dark", 60), ("light", 190), ("middle", 120)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noisy = np.clip(rng.normal(level, 50, (*size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(folder / f"{i:02d}.png")
    return root


def numbers(folder):
    """All measured numbers of a run, times and memory apart, and the tensors it left behind."""
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in metrics["epochs"]]
    result = {k: v for k, v in metrics["result"].items() if "seconds" not in k and k != "memory_mb"}
    tensors = {
        f"{file}/{name}": tensor
        for file in ("best", "last")
        for name, tensor in load_file(folder / f"{file}.safetensors").items()
    }
    return rows, result, tensors


def assert_same_run(left, right):
    (rows, result, tensors), (other_rows, other_result, other_tensors) = map(numbers, (left, right))
    assert rows == other_rows
    assert result == other_result
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name


def error_line(capsys, arguments):
    """The single line that `arguments` print on stderr while exiting with status 2."""
    try:
        status = main(arguments)
    except SystemExit as stop:  # argparse's own way out
        status = stop.code
    assert status == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in err and not out
    assert err.splitlines()[-1] == lines[0]
    return lines[0]


def forked(function):
    """A copy of this process that runs `function` and ends with what it returns."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(function()))
    process.start()
    return process


def ended(process):
    """The exit status of a copy; minus the number of the signal that ended it."""
    process.join()
    return process.exitcode
