"""MPA on a GPU: forwards by the 2x rule, the selection of the CPU's fp64, bf16 with its check."""

import pytest
import torch

import pae
from pae.mpa.forward import ZeroPromptForward
from tests import tiny
from tests.errors import error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WINDOWS = {"window": 6, "stride": 2, "progress": False}  # 36 windows in 16 x 16


def model_and_batch(dtype, device="cuda", family=pae.prompts.VPTDeep, images=24):
    model = tiny.prompted("plain", family(3), dtype).to(device).eval()
    with torch.no_grad():
        for p in model.prompts.parameters():
            p.zero_()
    batch = tiny.images(model.backbone, images)
    return model, batch.to(device), torch.arange(images, device=device) % 5


@pytest.mark.parametrize("family", [pae.prompts.VPTDeep, pae.prompts.VPTShallow])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_zero_prompts(family, dtype):
    truth, images, _ = model_and_batch(torch.float64, "cpu", family)
    expected = truth(images)
    model, images, _ = model_and_batch(torch.float32, "cuda", family)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        plain = model(images)
    got = ZeroPromptForward(model, 3, dtype)(model.view.embed(images))
    assert error(got.cpu(), expected) < 2 * error(plain.cpu(), expected) + 1e-6


@pytest.mark.parametrize("precision", ["exact", "bf16"])
@pytest.mark.parametrize("search", ["exact", "halving"])
@pytest.mark.parametrize("devices", [None, ["cuda:0", "cpu"], "ranks"])
def test_selection_is_that_of_the_cpu_in_fp64(precision, search, devices):
    truth, images, labels = model_and_batch(torch.float64, "cpu")
    expected = pae.mpa_init(truth, images, labels, **WINDOWS)
    ordered = expected.losses.sort().values
    assert (ordered[1:5] - ordered[:4]).min() > 1e-5  # so the selection cannot hang on rounding
    model, images, labels = model_and_batch(torch.float32)
    options = {"precision": precision, "search": search, "devices": devices}
    result = pae.mpa_init(model, images, labels, **WINDOWS, **options)
    assert result.selected.tolist() == expected.selected.tolist()
    assert error(result.losses[result.selected], expected.losses[expected.selected]) < 1e-5
    assert error(model.prompts.tokens.cpu(), truth.prompts.tokens) < 1e-4


def test_two_runs_agree_bit_for_bit():
    runs = []
    for _ in range(2):
        model, images, labels = model_and_batch(torch.float32)
        result = pae.mpa_init(model, images, labels, **WINDOWS, precision="bf16")
        runs.append((result.losses, result.selected, model.prompts.tokens.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
