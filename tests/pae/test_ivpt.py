"""iVPT: the mixture of neighbouring prompts, the reinforced rows, and what it reduces to."""

import pytest
import torch

import pae
from pae.prompts import IVPT, VPTDeep
from tests import tiny
from tests.tiny import error, gradients


def prompted(*args, feature="plain", **kwargs):
    torch.manual_seed(0)
    return pae.PromptedViT(tiny.backbone(feature), IVPT(*args, **kwargs)).train()


def test_nothing_mixed_and_nothing_added_is_vpt_deep():
    made = prompted(4, 3)
    plain = pae.PromptedViT(tiny.backbone(), VPTDeep(4)).train()
    with torch.no_grad():
        made.prompts.mix.zero_()
        made.prompts.mix_bias.zero_()
        plain.prompts.tokens.copy_(made.prompts.tokens)
    x = tiny.images(made.backbone)
    for engine in ("reference", "fast"):
        got, got_grads = gradients(made, x, engine)
        expected, expected_grads = gradients(plain, x, engine)
        assert torch.equal(got, expected)
        key = "head.weight"
        assert error(got_grads[key], expected_grads[key]) < 1e-12


def test_mixture_by_hand():
    made = prompted(4, 0)
    t, mix, bias = made.prompts.tokens, made.prompts.mix, made.prompts.mix_bias
    effective = made.prompts.raw_prompts()
    assert torch.equal(effective[0], t[0])
    for l in (1, 2):
        for j in range(4):
            row = t[l, j] + sum(mix[l - 1, j, i] * t[l - 1, i] for i in range(4)) + bias[l - 1, j]
            assert error(effective[l][j], row) < 1e-12
    assert torch.equal(made.prompts.block_prompts(2, tiny.images(made.backbone)), effective[2])


def rows_and_attention(prefix, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(3, 16 + prefix, 32, dtype=torch.float64)
    return x, torch.rand(3, 4, 16 + prefix, dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("feature, prefix", [("plain", 1), ("registers", 3)])
def test_reinforced_rows_by_hand(feature, prefix, reduction):
    made = prompted(4, 3, feature=feature, reduction=reduction)
    with torch.no_grad():
        made.prompts.added.normal_()
    x, attention = rows_and_attention(prefix)
    attention[..., :prefix] = 9  # the class token and registers are never chosen
    got = made.prompts.adjust_attended_rows(1, x, attention)
    for b in range(3):
        a = attention[b, :, prefix:]
        a = a.mean(0) if reduction == "mean" else a.max(0).values
        expected = x[b].clone()
        for j, row in enumerate(a.argsort(descending=True)[:3]):
            expected[prefix + row] += made.prompts.added[0, j]
        assert torch.equal(got[b], expected)


def test_gradient_of_the_added_rows_is_a_gather():
    made = prompted(4, 3)
    x, attention = rows_and_attention(1)
    weights = torch.randn_like(x)
    (made.prompts.adjust_attended_rows(2, x, attention) * weights).sum().backward()
    chosen = attention[..., 1:].mean(1).topk(3).indices + 1
    expected = sum(weights[b, chosen[b]] for b in range(3))
    assert error(made.prompts.added.grad[1], expected) < 1e-12
    assert not made.prompts.added.grad[0].any()


def test_shared_vector_and_all_rows():
    x, attention = rows_and_attention(1)
    shared = prompted(4, 3, match="shared")
    with torch.no_grad():
        shared.prompts.added.normal_()
    moved = shared.prompts.adjust_attended_rows(1, x, attention) - x
    touched = moved.abs().sum(-1) > 0
    assert (touched.sum(1) == 3).all()
    assert error(moved[touched], shared.prompts.added[0, 0].expand(9, -1)) < 1e-12
    every = prompted(4, reinforced="all")
    assert every.prompts.added.shape == (2, 16, 32)
    with torch.no_grad():
        every.prompts.added.normal_()
    moved = every.prompts.adjust_rows(1, x) - x
    assert error(moved[:, 1:], every.prompts.added[0].expand(3, -1, -1)) < 1e-12
    assert not moved[:, 0].any()


def test_the_most_attended_patch_is_reinforced():
    """Through the whole model: only rows that the previous block's class token looked at move."""
    made = prompted(4, 1)
    with torch.no_grad():
        made.prompts.added.normal_()
    seen = []
    adjust = made.prompts.adjust_attended_rows

    def spy(index, x, attention):
        out = adjust(index, x, attention)
        seen.append((attention, (out - x).abs().sum(-1) > 0))
        return out

    made.prompts.adjust_attended_rows = spy
    made(tiny.images(made.backbone), engine="fast")
    assert len(seen) == 2
    for attention, touched in seen:
        assert torch.equal(touched[:, 1:].double().argmax(1), attention.mean(1)[:, 1:].argmax(1))
        assert (touched.sum(1) == 1).all()


def test_parameter_count_and_start():
    made = prompted(5, 7)
    own = {n: tuple(q.shape) for n, q in made.prompts.named_parameters()}
    assert own == {
        "tokens": (3, 5, 32),
        "mix": (2, 5, 5),
        "mix_bias": (2, 5),
        "added": (2, 7, 32),
    }
    assert not made.prompts.added.any()
    assert made.prompts.mix.abs().max() <= 5**-0.5 and made.prompts.mix.std() > 0.1
    assert torch.equal(made.prompts.mix[0], made.prompts.mix[1])
    assert torch.equal(made.prompts.mix_bias[0], made.prompts.mix_bias[1])
    apart = prompted(5, mix_start="independent").prompts
    assert not torch.equal(apart.mix[0], apart.mix[1])
    assert not torch.equal(apart.mix_bias[0], apart.mix_bias[1])
    assert prompted(5, 0).prompts.added is None


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1"),
        ({"num_reinforced": -1}, "num_reinforced must be at least 0"),
        ({"reinforced": "some"}, "reinforced must be one of"),
        ({"reduction": "sum"}, "reduction must be one of"),
        ({"match": "none"}, "match must be one of"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        IVPT(**{"num_tokens": 4, **kwargs})


def test_more_reinforced_rows_than_patches():
    with pytest.raises(ValueError, match="num_reinforced must be at most the 16 patches"):
        prompted(4, 17)


def test_another_image_size_for_learned_rows_per_patch():
    made = prompted(4, feature="dynamic_size", reinforced="all")
    with pytest.raises(ValueError, match="images must have 16 patches"):
        made(tiny.images(made.backbone))
