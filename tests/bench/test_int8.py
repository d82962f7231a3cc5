"""The study of int8 products: it runs from training to tables, and what it reports is measured."""

from __future__ import annotations

import argparse

import pytest
import torch

from bench.bench_step import Case
from bench.studies import int8, runs
from pae import block as frozen
from pae.plan import PlainNorm
from pae.train import loop
from pae.train.data import read_folder
from tests.errors import error
from tests.train.helpers import BACKBONE, save_shades

CASE = Case("tiny", 3, "fp32", 4, image=32)
FORWARD, BOTH = int8.ARMS["int8 forward"][1], int8.ARMS["int8 both"][1]


class Exact(int8.Packed):
    """What oneDNN computes where the processor has dot products of 8 bits."""

    def __init__(self, weight):
        super().__init__(weight)
        self.multiples = coded(weight.float(), self.scales[:, None])

    def __call__(self, codes, scale, bias, dtype):
        rows = scale * (codes.double() - 128) @ self.multiples.T
        return (rows if bias is None else rows + bias).to(dtype)


@pytest.fixture(autouse=True, scope="module")
def processor():
    """Where the study would refuse to run, everything but oneDNN's product is tested."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cpu._is_vnni_supported():
            patch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
            patch.setattr(int8, "Packed", Exact)
        yield


def test_a_processor_without_dot_products_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    int8.kernels.cache_clear()
    with pytest.raises(SystemExit, match="VNNI"):
        int8.kernels()


def weight(rows, width, dtype=torch.float32, **options):
    wide = (torch.randn(rows, width) / width**0.5).to(dtype)
    options = {**BOTH, **options}
    return int8.Weight(wide, torch.randn(rows).to(dtype), **options)


def meant(w, x):
    """In fp64 what an int8 product is meant to be: codes times scales, of both."""
    even = 1 / (w.scale * w.inverse.double())
    multiples = coded(w.wide.float() * even.float(), w.forward.scales[:, None]) / even
    return coded(x, 1 / w.inverse) @ multiples.T + w.bias.double()


def coded(x, scale):
    """Each entry of x as its nearest multiple of `scale`."""
    return (x.double() / scale).round().clamp(-127, 127) * scale


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_their_codes(fused, dtype):
    w = weight(40, 52, dtype, fused=fused)
    x = torch.randn(3, 7, 52).to(dtype)
    limit = 1e-5 if dtype == torch.float32 else 5e-3
    got = w.rows(x)
    assert got.dtype == dtype
    assert error(got, meant(w, x)) < limit
    plain = torch.nn.functional.linear(x.double(), w.wide.double(), w.bias.double())
    assert 3e-3 < error(got, plain) < 3e-2  # the codes can be seen, and no more than they
    larger = 2 * x  # than the first batch, which the scales were taken from
    assert error(w.rows(larger), meant(w, larger)) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_has_a_scale_for_each_row(dtype):
    w = weight(40, 52, dtype)
    d = (torch.randn(2, 5, 40) * 10.0 ** torch.arange(-6, 4).view(2, 5, 1)).to(dtype)
    d[1, 2] = 0
    back = coded(w.wide, w.backward.scales)
    scales = d.double().abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    expected, got = coded(d, scales) @ back, d @ w
    for row, other in zip(got.flatten(0, 1), expected.flatten(0, 1)):
        assert torch.allclose(row.double(), other, rtol=0, atol=5e-3 * other.abs().max().item())
    assert error(got[0, 0], expected[0, 0]) < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize(
    "stream, dtype", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize("width", [64, 52])
@pytest.mark.parametrize("adds", [False, True])
def test_the_fused_norm_is_the_plain_one_and_its_codes(stream, dtype, width, adds):
    w = weight(40, width, getattr(torch, dtype))
    x = 3 * torch.randn(2, 9, width).to(getattr(torch, stream)) + 1
    pending = torch.randn(2, 9, width).to(w.dtype) if adds else None
    plain = int8.norm(x, pending, PlainNorm(1e-6), w)  # finds the scale
    assert w.known
    fused = int8.norm(x, pending, PlainNorm(1e-6), w)
    for name, ours, theirs in zip(("y", "xhat", "rstd"), fused, plain):
        assert error(ours, theirs) < 2 * torch.finfo(theirs.dtype).eps, name
    hat = torch.nn.functional.layer_norm(fused[0].double(), (width,), eps=1e-6)
    # entries between two codes may be rounded to either: by a few of these 936 all may be off
    assert error(fused[3], meant(w, hat)) < 5e-3


def test_the_fused_gelu_is_the_plain_one_and_its_codes():
    step = int8.open_step(CASE, int8.CPU)
    with int8.arm(FORWARD):
        block = step.model.plan(torch.float32).blocks[0]
    assert isinstance(block.w_fc2, int8.Weight)
    x, out = torch.randn(2, 2, 9, 64)
    first = int8.mlp_half(block, x, out)[1]
    assert block.w_fc2.known
    assert error(int8.mlp_half(block, x, out)[1], first) < 5e-3
    plain = frozen.mlp_half(step.model.plan(torch.float32).blocks[-1], x, out)
    assert len(plain) == 3  # the last block, of one row, has its own weights


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    return int8.steps(int8.open_step(CASE, int8.CPU), 1)


LIMIT = 0.08  # of four blocks in int8, each off by about 1 % a product


def test_errors_are_those_of_eight_bits(found):
    assert list(found) == list(int8.ARMS)
    assert found["fp32"]["error of logits"] < 1e-5
    for name in found:
        if "int8" in name:
            assert 5e-3 < found[name]["error of logits"] < LIMIT
            assert 5e-3 < found[name]["of the prompts' gradient"] < LIMIT
            assert 1 - LIMIT**2 < found[name]["its cosine"] < 1 - 1e-6
    one, each = (found[f"int8 forward{n}"]["error of logits"] for n in (", one scale", ""))
    assert one != each
    assert found["int8 both"]["error of logits"] == found["int8 forward"]["error of logits"]
    assert found["int8 both"]["its cosine"] != found["int8 forward"]["its cosine"]


@pytest.mark.parametrize(
    "part, column", [("forward", "error of logits"), ("backward", "of the prompts' gradient")]
)
def test_a_wrong_scale_shows(monkeypatch, part, column):
    plain = int8.Weight.__init__

    def wrong(self, *arguments, **options):
        plain(self, *arguments, **options)
        self.backward.scales *= 1.1 if part == "backward" else 1

    see = int8.Weight.see

    def wrongly_seen(self, rows):
        see(self, rows)
        self.forward.scales *= 1.1 if part == "forward" else 1

    monkeypatch.setattr(int8.Weight, "__init__", wrong)
    monkeypatch.setattr(int8.Weight, "see", wrongly_seen)
    step, arms = int8.open_step(CASE, int8.CPU), ("fp32", "int8 both")
    assert int8.steps(step, 1, arms)["int8 both"][column] > LIMIT


def test_from_training_to_tables(tmp_path, monkeypatch):
    folder = save_shades(tmp_path / "shades")
    monkeypatch.setattr(loop, "load_task", lambda settings: read_folder(folder, seed=settings.seed))
    small = {**BACKBONE, "epochs": 1, "batch_size": 6, "num_tokens": 2, "device": "cpu"}
    monkeypatch.setattr(runs, "sizes", lambda arguments: small)
    monkeypatch.setattr(int8, "CASES", {"tiny": CASE, "trained weights": "fashion-mnist"})
    monkeypatch.setattr(int8, "TASK", small | {"train_size": 20, "val_size": 6})
    given = argparse.Namespace(
        **{"output": tmp_path, "to": tmp_path / "to", "cases": list(int8.CASES), "rounds": 2},
        **{"dataset": "fashion-mnist", "arms": int8.TRAINED, "seeds": [0], "test_size": 6},
    )
    quantised, seen = int8.quantised, []
    monkeypatch.setattr(int8, "quantised", lambda *a, **k: seen.append(k) or quantised(*a, **k))
    int8.run(given)
    assert FORWARD in seen and BOTH in seen  # training took the plans in int8
    given.arms = list(int8.ARMS)
    int8.time(given)
    int8.report(given)
    blocks = int8.blocks(int8.json.loads((given.to / int8.JSON).read_text()))
    assert blocks["int8 accuracy"].count("\n") == 1 + len(int8.TRAINED)
    assert blocks["int8 steps"].count("\n") == 1 + 2 * len(int8.ARMS)
    assert "int8, codes there" in blocks["int8 products"]
    assert "6 test images" in blocks["int8 setting"]
