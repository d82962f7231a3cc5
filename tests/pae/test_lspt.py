"""LSPT: the recurrence spelled out, and that nothing leaks from one forward to the next."""

import pytest
import torch

import pae
from pae.prompts import LSPT
from tests import tiny
from tests.tiny import error


def prompted(*args, feature="plain", **kwargs):
    torch.manual_seed(0)
    return pae.PromptedViT(tiny.backbone(feature), LSPT(*args, **kwargs)).train()


@pytest.mark.parametrize("memory", ["replace", "add"])
@pytest.mark.parametrize("hidden", [None, 12])
@pytest.mark.parametrize("feature, prefix", [("plain", 1), ("registers", 3)])
def test_recurrence_by_hand(feature, prefix, hidden, memory):
    made = prompted(4, hidden, memory, feature=feature)
    vit, family = made.backbone, made.prompts
    images = tiny.images(vit)
    x = made.view.embed(images)
    rows = family.tokens.expand(3, -1, -1)
    h = c = torch.zeros(12, hidden or 32, dtype=torch.float64)
    w_ih, w_hh, b_ih, b_hh = (
        getattr(family.cell, n) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    for i, block in enumerate(vit.blocks):
        if i:
            coded = (rows + x[:, prefix:].mean(1, keepdim=True)).reshape(12, 32)
            gates = coded @ w_ih.T + b_ih + h @ w_hh.T + b_hh
            enter, forget, new, leave = gates.chunk(4, dim=1)
            c = forget.sigmoid() * c + enter.sigmoid() * new.tanh()
            h = leave.sigmoid() * c.tanh()
            out = (h if hidden is None else family.back(h)).view(3, 4, 32)
            rows = rows + out if memory == "add" else out
        both = block(torch.cat([x[:, :prefix], rows, x[:, prefix:]], dim=1))
        x = torch.cat([both[:, :prefix], both[:, prefix + 4 :]], dim=1)
        rows = both[:, prefix : prefix + 4]
    expected = made.head(made.view.readout(x))
    for engine in ("reference", "fast"):
        assert error(made(images, engine=engine), expected) < 1e-9


def test_forwards_are_independent():
    made = prompted(4)
    x = tiny.images(made.backbone)
    first = made(x)
    made(tiny.images(made.backbone, batch=2, seed=5))
    assert torch.equal(made(x), first)
    assert not made.prompts.this_forward  # no graph is kept alive


def test_an_interrupted_forward_leaves_no_state_behind():
    made = prompted(4)
    x = tiny.images(made.backbone)
    first = made(x)
    made.view.blocks[2].norm1.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(x)
    made.view.blocks[2].norm1._forward_pre_hooks.clear()
    assert torch.equal(made(x), first)


def test_parameters():
    own = {n: tuple(q.shape) for n, q in prompted(4, 12).prompts.named_parameters()}
    assert own == {
        "tokens": (4, 32),
        "cell.weight_ih": (48, 32),
        "cell.weight_hh": (48, 12),
        "cell.bias_ih": (48,),
        "cell.bias_hh": (48,),
        "back.weight": (32, 12),
        "back.bias": (32,),
    }
    assert prompted(4).prompts.back is None


@pytest.mark.parametrize(
    "kwargs, kind, message",
    [
        ({"hidden": 0}, ValueError, "hidden must be at least 1"),
        ({"hidden": 1.5}, TypeError, "hidden must be an integer or None"),
        ({"memory": "some"}, ValueError, "memory must be one of"),
    ],
)
def test_bad_arguments(kwargs, kind, message):
    with pytest.raises(kind, match=message):
        LSPT(4, **kwargs)


def test_mpa_says_why_not():
    made = prompted(2)
    with pytest.raises(ValueError, match="computes its prompts"):
        pae.mpa_init(made, tiny.images(made.backbone), torch.zeros(3, dtype=torch.int64), 4, 4)
