"""`memory="packed"`: the same values and gradients from weights that are packed once."""

import copy
from collections import Counter

import pytest
import torch

import pae
from pae.packs import FEWEST_ROWS, Packs, can_pack
from tests import tiny
from tests.tiny import FEATURES, assert_engines_agree, error, gradients, prompted

FP32 = torch.float32
HERE = can_pack(torch.zeros(1))  # elsewhere nothing is packed, and all else holds


def held(model):
    """How many packed weights each block holds."""
    return [len(packs) for packs in model.plan().packs]


@pytest.mark.parametrize("feature", FEATURES)
def test_packed_is_keep(feature):
    model = prompted(feature, dtype=FP32)
    x = tiny.images(model.backbone)
    want, want_grads = gradients(model, x, "fast", wrt_images=True)
    got, got_grads = gradients(model, x, "fast", "packed", wrt_images=True)
    assert error(got, want) < 2e-6
    for name, grad in want_grads.items():
        assert error(got_grads[name], grad) < 2e-5, name
    assert_engines_agree(model, x, memory="packed")


def test_what_is_packed_when():
    """Four products forward and as many backward, but none where no gradient goes, nor of the few
    rows of a last block whose class row is read.
    """
    model = prompted("avg", [2, 0, 3], FP32)
    x = tiny.images(model.backbone)
    assert held(model) == [0, 0, 0]
    pae.fast_forward(model, x)
    assert held(model) == [0, 0, 0]
    with torch.no_grad():
        pae.fast_forward(model, x, memory="packed")
    assert held(model) == [4 * HERE] * 3
    gradients(model, x, "fast", "packed")
    assert held(model) == [7 * HERE, 8 * HERE, 8 * HERE]
    model = prompted("plain", [2, 0, 3], FP32)
    gradients(model, x, "fast", "packed")
    assert held(model) == [7 * HERE, 8 * HERE, 0]


@pytest.mark.skipif(not HERE, reason="this PyTorch has no MKL")
def test_a_weight_is_packed_once_for_a_number_of_rows(monkeypatch):
    model = prompted("avg", dtype=FP32)
    images = tiny.images(model.backbone, 6)
    calls = Counter()
    for name in ("_mkl_reorder_linear_weight", "_mkl_linear"):
        op = getattr(torch.ops.mkl, name)
        count = lambda *given, name=name, op=op: calls.update([name]) or op(*given)
        monkeypatch.setattr(torch.ops.mkl, name, count)
    for number, packed in ((3, 23), (3, 0), (6, 23), (6, 0), (3, 23)):
        calls.clear()
        gradients(model, images[:number], "fast", "packed")
        # no gradient of the images: one product less than four each way in three blocks
        assert calls == Counter(_mkl_linear=23, _mkl_reorder_linear_weight=packed)
    assert held(model) == [7, 8, 8]  # one of each
    packs, block = model.plan().packs[1], model.plan().blocks[1]
    weights = sum(block.product(name)[0].nbytes for name in ("qkv", "proj", "fc1", "fc2"))
    assert packs.nbytes >= 2 * weights


def test_packed_weights_are_those_of_the_backbone():
    """Changed weights are packed again, a copy packs its own, and dropped plans hold none."""
    model = prompted("avg", dtype=FP32)
    x = tiny.images(model.backbone)
    gradients(model, x, "fast", "packed")
    with torch.no_grad():
        model.backbone.blocks[1].mlp.fc1.weight.mul_(1.5)
    assert_engines_agree(model, x, memory="packed")
    other = copy.deepcopy(model)
    assert sum(held(other)) == 0
    model.drop_plans()
    assert sum(held(model)) == 0


@pytest.mark.parametrize("rows, dtype", [(FEWEST_ROWS - 1, FP32), (64, torch.float64)])
def test_what_is_not_packed(rows, dtype):
    packs, weight = Packs(), torch.zeros(8, 16, dtype=dtype)
    assert not packs.fits(torch.zeros(rows, 16, dtype=dtype), weight)
    assert packs.fits(torch.zeros(FEWEST_ROWS, 16), weight.float()) == HERE


def test_nothing_to_pack_is_said(recwarn):
    model = prompted("avg")  # in fp64
    said = r"memory='packed' is 'keep' here: .* products are torch.float64 on cpu"
    with pytest.warns(UserWarning, match=said):
        pae.fast_forward(model, tiny.images(model.backbone), memory="packed")
    if HERE:
        model = prompted("avg", dtype=FP32)
        pae.fast_forward(model, tiny.images(model.backbone), memory="packed")
        assert not recwarn.list


def test_trained_vectors_beside_packed_weights():
    torch.manual_seed(0)
    vit = tiny.backbone("avg").float()
    trained = ["biases", "blocks.*.norm1.*"]
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(3), train_backbone=trained).train()
    assert_engines_agree(model, tiny.images(vit), memory="packed")


def test_under_compile():
    """Graphs read the weights as they lie."""
    model = prompted("avg", dtype=FP32)
    x = tiny.images(model.backbone)
    step = torch.compile(lambda x: pae.fast_forward(model, x, memory="packed"), backend="eager")
    assert error(step(x), pae.fast_forward(model, x)) < 2e-6
