"""VPT-deep and VPT-shallow as families: counts, initialisation, dropout, raw and set prompts."""

import re

import pytest
import torch

import pae
from pae.prompts import BackboneShape, PromptFamily, VPTDeep, VPTShallow, build
from tests.tiny import Given, backbone

SHAPE = BackboneShape(
    depth=3,
    width=32,
    num_heads=4,
    patch_size=(4, 8),
    in_chans=3,
    num_tokens=17,
    num_prefix_tokens=1,
    grid=(4, 4),
    head_width=8,
    has_class_token=True,
)
ROWS = torch.zeros(6, 17, 32)


def bound(family, shape=SHAPE):
    family.bind(shape)
    return family


def refused(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- parameters


@pytest.mark.parametrize(
    "num_tokens, counts, size",
    [
        (4, [4, 4, 4], (3, 4, 32)),
        (0, [0, 0, 0], (3, 0, 32)),
        ([4, 4, 4], [4, 4, 4], (3, 4, 32)),
        ((1, 0, 5), [1, 0, 5], (6, 32)),
        ([0, 0, 0], [0, 0, 0], (3, 0, 32)),
    ],
)
def test_deep_counts(num_tokens, counts, size):
    family = bound(VPTDeep(num_tokens))
    assert family.prompt_counts == counts
    assert family.tokens.shape == size
    assert isinstance(family.tokens, torch.nn.Parameter)
    assert [n for n, _ in family.named_parameters()] == ["tokens"]
    for i, count in enumerate(counts):
        rows = family.block_prompts(i, ROWS)
        assert (rows is None) == (count == 0)
        assert rows is None or rows.shape == (count, 32)


@pytest.mark.parametrize("count", [0, 4])
def test_shallow_counts(count):
    family = bound(VPTShallow(count))
    assert family.prompt_counts == [count, 0, 0]
    assert family.tokens.shape == (count, 32)
    rows = [family.block_prompts(i, ROWS) for i in range(3)]
    assert rows[1:] == [None, None]
    assert (rows[0] is None) == (count == 0)


def test_rows_of_a_block_are_that_blocks_tokens():
    for family in (bound(VPTDeep(4)), bound(VPTDeep([1, 0, 5]))):
        blocks = [p for p in family.raw_prompts() if len(p)]
        assert torch.equal(torch.cat(blocks), family.tokens.flatten(0, -2))
        for i, rows in enumerate(family.all_prompts(ROWS)):
            alone = family.block_prompts(i, ROWS)
            assert (rows is None) == (alone is None)
            assert rows is None or torch.equal(rows, alone)
            assert rows is None or torch.equal(rows, family.raw_prompts()[i])


def test_initialisation_is_uniform_with_the_bound_of_vpt():
    """v^2 = 6 / (C ph pw + D), for the patch the backbone really has."""
    for family in (VPTDeep(500), VPTDeep([400, 500, 600]), VPTShallow(1500)):
        torch.manual_seed(0)
        tokens = bound(family).tokens
        bound_ = (6 / (3 * 4 * 8 + 32)) ** 0.5
        assert tokens.abs().max() <= bound_
        assert tokens.abs().max() > 0.999 * bound_
        assert abs(tokens.std().item() / (bound_ / 3**0.5) - 1) < 0.01
        assert abs(tokens.mean().item()) < 0.01 * bound_
    vit_b = BackboneShape(12, 768, 12, (16, 16), 3, 197, 1, (14, 14), 64, True)
    assert bound(VPTDeep(50), vit_b).tokens.abs().max().item() == pytest.approx(0.0625, rel=1e-3)


def test_initialisation_follows_the_seed():
    torch.manual_seed(5)
    one = bound(VPTDeep(4)).tokens
    torch.manual_seed(5)
    assert torch.equal(bound(VPTDeep(4)).tokens, one)
    assert not torch.equal(bound(VPTDeep(4)).tokens, one)


# ---- dropout


def test_dropout_of_the_batch_and_of_each_sample():
    shared = bound(VPTDeep(50, dropout=0.25)).train()
    rows = shared.block_prompts(1, ROWS)
    assert rows.shape == (50, 32)
    own = bound(VPTDeep(50, dropout=0.25, dropout_scope="sample")).train()
    per_sample = own.block_prompts(1, ROWS)
    assert per_sample.shape == (6, 50, 32)
    assert not torch.equal(per_sample[0], per_sample[1])
    for family, dropped in ((shared, rows), (own, per_sample)):
        kept = dropped != 0
        assert abs(1 - kept.float().mean().item() - 0.25) < 0.05
        expected = family.tokens[1].expand_as(dropped) / 0.75
        torch.testing.assert_close(dropped[kept], expected[kept])
        assert family.eval().block_prompts(1, ROWS).shape == (50, 32)
        assert torch.equal(family.block_prompts(1, ROWS), family.tokens[1])


def test_dropout_draws_anew_for_every_block_and_step():
    family = bound(VPTDeep(20, dropout=0.5)).train()
    masks = [rows == 0 for _ in range(2) for rows in family.all_prompts(ROWS)]
    for i, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:i])


def test_raw_prompts_have_no_dropout_and_carry_gradients():
    for family in (VPTDeep(4, dropout=0.9), VPTDeep([1, 0, 5], dropout=0.9)):
        raw = bound(family).train().raw_prompts()
        assert torch.equal(torch.cat(raw), family.tokens.flatten(0, -2))
        sum((i + 1) * p.sum() for i, p in enumerate(raw)).backward()
        expected = torch.cat([torch.full_like(p, i + 1) for i, p in enumerate(raw)])
        assert torch.equal(family.tokens.grad.flatten(0, -2), expected)
    shallow = bound(VPTShallow(4, dropout=0.9)).train()
    assert shallow.raw_prompts()[0] is shallow.tokens
    assert shallow.raw_prompts()[1:] == [None, None]


# ---- set_prompts and config


@pytest.mark.parametrize("family", [VPTDeep(4), VPTDeep([1, 0, 5]), VPTShallow(4), VPTShallow(0)])
def test_set_prompts(family):
    bound(family)
    parameter = family.tokens
    new = [torch.randn(c, 32, dtype=torch.float64) for c in family.prompt_counts]
    family.set_prompts(new)
    assert (
        family.tokens is parameter and parameter.requires_grad and parameter.dtype == torch.float32
    )
    for got, wanted in zip(family.raw_prompts(), new, strict=True):
        assert got is None or torch.equal(got, wanted.float())


@pytest.mark.parametrize("family", [VPTDeep(0), VPTDeep([0, 2, 0]), VPTShallow(0), VPTShallow(2)])
def test_none_stands_for_no_prompts(family):
    bound(family)
    new = [torch.ones(c, 32) if c else None for c in family.prompt_counts]
    family.set_prompts(new)
    assert torch.equal(family.tokens, torch.ones_like(family.tokens))


@pytest.mark.parametrize("family", [VPTDeep, VPTShallow])
def test_set_prompts_that_do_not_fit(family):
    family = bound(family(4))
    good = [torch.zeros(c, 32) for c in family.prompt_counts]
    before = family.tokens.clone()
    refused(
        ValueError,
        "prompts must hold one entry per block, 3, got 2",
        lambda: family.set_prompts(good[:2]),
    )
    for wrong, got in (
        (torch.ones(4, 31), "(4, 31)"),
        (torch.ones(5, 32), "(5, 32)"),
        (None, None),
    ):
        message = re.escape(f"prompts[0] must have shape (4, 32), got {got}")
        refused(ValueError, message, lambda w=wrong: family.set_prompts([w, *good[1:]]))
    assert torch.equal(family.tokens, before)


FAMILIES = [
    VPTDeep(4, dropout=0.1),
    VPTDeep([1, 0, 5], 0.2, "sample"),
    VPTDeep((2, 2, 2)),
    VPTShallow(3, dropout=0.5, dropout_scope="sample"),
]


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_config_rebuilds_the_family(family):
    import json

    config = json.loads(json.dumps(family.config()))
    again = build(type(family).__name__, config)
    assert type(again) is type(family)
    assert again.config() == family.config()
    assert repr(again) == repr(family)
    twin = bound(again)
    assert twin.tokens.shape[-1] == 32


def test_unknown_family():
    refused(
        ValueError,
        r"name must be one of \['.*'VPTDeep', 'VPTShallow'\], got 'Deep'",
        lambda: build("Deep", {}),
    )


# ---- the base class


def test_what_a_family_need_not_answer():
    family = Given([2, 2, 2])
    assert not PromptFamily.enters_sequence and not PromptFamily.depends_on_input
    assert PromptFamily.group_index(family, ROWS) is None
    assert family.penalty() is None
    family.end_of_step()
    family.end_of_epoch()
    family.bind(SHAPE)
    assert [p.shape for p in family.all_prompts(ROWS)] == [(2, 32)] * 3


def test_what_a_family_must_answer():
    family = PromptFamily()
    questions = [
        lambda: family.bind(SHAPE),
        lambda: family.prompt_counts,
        lambda: family.block_prompts(0, ROWS),
        lambda: family.raw_prompts(),
        lambda: family.set_prompts([]),
        lambda: family.adjust_rows(1, ROWS),
        lambda: family.adjust_attended_rows(1, ROWS, ROWS),
        lambda: family.next_rows(1, ROWS, ROWS),
        lambda: family.observe(1, ROWS, ROWS),
    ]
    for ask in questions:
        with pytest.raises(NotImplementedError, match="PromptFamily does not answer"):
            ask()


def test_a_model_binds_with_the_backbones_sizes():
    seen = []

    class Spy(VPTDeep):
        def bind(self, shape):
            seen.append(shape)
            super().bind(shape)

    pae.PromptedViT(backbone("registers", patch_size=(4, 8), in_chans=1), Spy(2))
    assert seen == [
        BackboneShape(
            depth=3,
            width=32,
            num_heads=4,
            patch_size=(4, 8),
            in_chans=1,
            num_tokens=8 + 3,
            num_prefix_tokens=3,
            grid=(4, 2),
            head_width=8,
            has_class_token=True,
        )
    ]


# ---- arguments


@pytest.mark.parametrize("family", [VPTDeep, VPTShallow])
def test_bad_counts(family):
    refused(ValueError, "num_tokens must be at least 0, got -1", lambda: family(-1))
    for wrong in (2.0, "5", None, True):
        message = re.escape(f"num_tokens must be an integer, got {wrong!r}")
        refused(TypeError, message, lambda w=wrong: family(w))


def test_bad_counts_per_block():
    refused(ValueError, r"num_tokens\[1\] must be at least 0, got -2", lambda: VPTDeep([1, -2, 3]))
    refused(TypeError, r"num_tokens\[2\] must be an integer, got 3.5", lambda: VPTDeep([1, 2, 3.5]))
    refused(TypeError, "num_tokens must be an integer", lambda: VPTShallow([1, 2, 3]))
    for wrong in ([1, 2], [], [1] * 4):
        message = rf"num_tokens must be one integer or one per block \(3\), got {len(wrong)} values"
        refused(ValueError, message, lambda w=wrong: bound(VPTDeep(w)))


@pytest.mark.parametrize("family", [VPTDeep, VPTShallow])
def test_bad_dropout(family):
    for wrong in (-0.1, 1.0, 1.5, float("nan"), "0.1", None, True):
        message = re.escape(f"dropout must be a number in [0, 1), got {wrong!r}")
        refused(ValueError, message, lambda w=wrong: family(2, dropout=w))
    for wrong in ("image", None, 1):
        message = re.escape(f"dropout_scope must be one of ('batch', 'sample'), got {wrong!r}")
        refused(ValueError, message, lambda w=wrong: family(2, dropout_scope=w))


@pytest.mark.parametrize("family", [VPTDeep, VPTShallow])
def test_a_family_is_bound_once(family):
    family = bound(family(2))
    message = f"this {type(family).__name__} already belongs to a model; build a new one"
    refused(RuntimeError, message, lambda: family.bind(SHAPE))
