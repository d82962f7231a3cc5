"""E2VPT: masks, their ranking, rewinding, removal, and what it reduces to."""

import copy

import pytest
import torch
import torch.nn.functional as F

import pae
from pae.prompts import E2VPT, E2VPTImportance, VPTDeep, e2vpt_importance
from tests import tiny
from tests.tiny import error, gradients


def prompted(*args, **kwargs):
    torch.manual_seed(0)
    return pae.PromptedViT(tiny.backbone(), E2VPT(*args, **kwargs)).train()


def test_no_masks_and_no_keys_is_vpt_deep():
    made = prompted(4, 0)
    plain = pae.PromptedViT(tiny.backbone(), VPTDeep(4)).train()
    with torch.no_grad():
        plain.prompts.tokens.copy_(made.prompts.tokens)
    x = tiny.images(made.backbone)
    for engine in ("reference", "fast"):
        got, got_grads = gradients(made, x, engine)
        expected, expected_grads = gradients(plain, x, engine)
        assert torch.equal(got, expected)
        assert torch.equal(got_grads["prompts.tokens"], expected_grads["prompts.tokens"])


def test_masks_of_ones_change_nothing():
    x = tiny.images(tiny.backbone())
    outs = [prompted(4, 2, masks=m, pieces=8)(x) for m in ("none", "learned", "fixed")]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_pieces_are_strided_channels():
    made = prompted(4, 0, masks="learned", pieces=8)
    with torch.no_grad():
        made.prompts.token_mask.copy_(torch.tensor([1.0, 0.5, 2.0, 1.0]))
        made.prompts.piece_mask[1, 3] = 0
    rows, tokens = made.prompts.raw_prompts()[2], made.prompts.tokens[2]
    expected = tokens * torch.tensor([1.0, 0.5, 2.0, 1.0])[:, None]
    expected[1, 3::8] = 0
    assert error(rows, expected) < 1e-12


def test_shared_and_separate_keys():
    x = tiny.images(tiny.backbone())
    shared = prompted(2, 3).prompts
    kv = shared.head_keys_values(1, x)
    assert kv.shape == (3, 2, 4, 8) and torch.equal(kv[:, 0], kv[:, 1])
    apart = prompted(2, 3, share_kv=False).prompts
    kv = apart.head_keys_values(1, x)
    assert torch.equal(kv, apart.keys_values[1]) and not torch.equal(kv[:, 0], kv[:, 1])
    bound = (6 / (3 * 8)) ** 0.5
    assert apart.keys_values.abs().max() <= bound
    assert abs(apart.keys_values.std() / bound - 3**-0.5) < 0.05


def test_importance_is_the_mean_gradient():
    made = prompted(4, 2, masks="learned", pieces=8).eval()
    batches = [(tiny.images(made.backbone, seed=s), torch.tensor([0, 1, 2])) for s in range(3)]
    got = e2vpt_importance(made, batches)
    masks = [made.prompts.token_mask, made.prompts.piece_mask]
    step = 1e-5
    for mask, scores in zip(masks, (got.tokens, got.pieces), strict=True):
        flat = mask.data.view(-1)
        for i in (0, len(flat) - 1):
            losses = []
            for sign in (1, -1):
                flat[i] += sign * step
                with torch.no_grad():
                    values = [F.cross_entropy(made(x), y) for x, y in batches]
                losses.append(torch.stack(values).mean())
                flat[i] -= sign * step
            expected = (losses[0] - losses[1]) / (2 * step)
            assert abs(scores.view(-1)[i] - expected) < 1e-8
    assert all(p.grad is None for p in made.parameters())
    sizes = e2vpt_importance(made, batches, absolute=True)
    assert torch.equal(sizes.tokens, got.tokens.abs())


def test_importance_draws_no_dropout_and_leaves_the_flags():
    made = prompted(4, 2, masks="learned", pieces=8, dropout=0.5, kv_dropout=0.5)
    made.head.eval()
    flags = [m.training for m in made.modules()]
    batches = [(tiny.images(made.backbone), torch.tensor([0, 1, 2]))]
    first, second = (e2vpt_importance(made, batches) for _ in range(2))
    assert torch.equal(first.pieces, second.pieces) and first.pieces.any()
    assert [m.training for m in made.modules()] == flags
    with pytest.raises(TypeError):
        e2vpt_importance(made, [None])
    assert [m.training for m in made.modules()] == flags


def importance(tokens, pieces=None):
    tokens = torch.tensor(tokens)
    pieces = torch.arange(8.0).expand(len(tokens), 8) if pieces is None else pieces
    return E2VPTImportance(tokens, pieces)


@pytest.mark.parametrize("pruned", ["zero", "remove"])
def test_rewinding(pruned):
    old = prompted(4, 2, masks="learned", pieces=8, dropout=0.1)
    family = old.prompts.rewound(importance([3.0, -1.0, 2.0, 0.5]), 0.5, 0.5, pruned)
    made = pae.PromptedViT(tiny.backbone(), family).train()
    assert family.token_mask.tolist() == [1, 0, 1, 0]
    assert family.piece_mask[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert not torch.equal(family.tokens, old.prompts.tokens)
    assert {n for n, _ in family.named_parameters()} == {"tokens", "keys_values"}
    assert family.config() == {**old.prompts.config(), "masks": "fixed", "pruned": pruned}
    rows = family.raw_prompts()[1]
    assert family.prompt_counts == [len(rows)] * 3
    if pruned == "remove":
        assert error(rows[:, 4:8], family.tokens[1][[0, 2], 4:8]) < 1e-12
        assert not rows[:, :4].any()
    else:
        assert not rows[[1, 3]].any() and len(rows) == 4
    tiny.assert_engines_agree(made, tiny.images(made.backbone))


def test_pruning_keeps_a_token_and_four_pieces():
    old = prompted(4, 2, masks="learned", pieces=8)
    family = old.prompts.rewound(importance([0.0] * 4), 0.99, 0.99)
    pae.PromptedViT(tiny.backbone(), family)
    assert family.token_mask.sum() == 1
    assert (family.piece_mask.sum(1) == 4).all()


def test_zero_rows_keep_their_share_of_the_softmax():
    """Zeroed and removed tokens are two functions, as documented."""
    old = prompted(4, 0, masks="learned", pieces=8)
    x = tiny.images(old.backbone)
    outs = {}
    for pruned in ("zero", "remove"):
        torch.manual_seed(1)
        family = old.prompts.rewound(importance([3.0, -1.0, 2.0, 0.5]), 0.5, 0.0, pruned)
        outs[pruned] = pae.PromptedViT(tiny.backbone(), family)(x)
    assert error(outs["zero"], outs["remove"]) > 1e-3


@pytest.mark.parametrize("pruned", ["zero", "remove"])
def test_rewound_masks_survive_a_checkpoint(pruned, tmp_path):
    old = prompted(4, 2, masks="learned", pieces=8)
    family = old.prompts.rewound(importance([3.0, -1.0, 2.0, 0.5]), 0.25, 0.5, pruned)
    made = pae.PromptedViT(tiny.backbone(), family, pae.KLD(dim=6)).eval()
    made.save(tmp_path / "a.safetensors")
    again = pae.PromptedViT.from_file(tmp_path / "a.safetensors", tiny.backbone()).eval()
    x = tiny.images(made.backbone)
    assert torch.equal(again(x), made(x))
    assert again.prompts.prompt_counts == made.prompts.prompt_counts


def test_masked_prompts_cannot_be_set():
    made = prompted(4, 2, masks="learned", pieces=8)
    with torch.no_grad():
        made.prompts.token_mask[0] = 0
    with pytest.raises(ValueError, match="cannot be set where a mask is 0"):
        made.prompts.set_prompts([torch.zeros(4, 32)] * 3)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"masks": "some"}, "masks must be one of"),
        ({"pruned": "some"}, "pruned must be one of"),
        ({"masks": "learned", "pieces": 7}, "pieces must divide the width 32, got 7"),
        ({"num_tokens": 0, "masks": "learned"}, "num_tokens must be at least 1 for masks"),
        ({"kv_dropout": 1.0}, "kv_dropout must be"),
        ({"num_kv": -1}, "num_kv must be at least 0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        prompted(**{"num_tokens": 4, **kwargs})


def test_importance_of_the_wrong_model():
    batches = [(tiny.images(tiny.backbone()), torch.tensor([0, 1, 2]))]
    with pytest.raises(TypeError, match=r"model.prompts must be E2VPT, got VPTDeep"):
        e2vpt_importance(tiny.prompted(), batches)
    with pytest.raises(ValueError, match="masks='learned', got 'none'"):
        e2vpt_importance(prompted(2), batches)
    with pytest.raises(ValueError, match="at least one batch"):
        e2vpt_importance(prompted(2, masks="learned", pieces=8), [])
    with pytest.raises(ValueError, match="4 tokens and 8 pieces"):
        prompted(4, masks="learned", pieces=8).prompts.rewound(importance([0.0] * 3), 0.5, 0.5)


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("before", [torch.inference_mode, torch.no_grad])
def test_training_after_evaluation_with_tokens_removed(before, engine):
    """What evaluation knows of the masks is nothing that autograd refuses."""
    old = prompted(4, 2, masks="learned", pieces=8)
    family = old.prompts.rewound(importance([3.0, -1.0, 2.0, 0.5]), 0.5, 0.5, "remove")
    made = pae.PromptedViT(tiny.backbone(), family)
    x = tiny.images(made.backbone)
    with before():
        made.eval()(x, engine=engine)
    logits, grads = gradients(made.train(), x, engine)
    expected, expected_grads = gradients(copy.deepcopy(made), x, "reference")
    assert error(logits, expected) < 1e-9
    assert error(grads["prompts.tokens"], expected_grads["prompts.tokens"]) < 1e-9


def test_masks_made_in_inference_mode_are_read_as_they_are():
    old = prompted(4, 2, masks="learned", pieces=8)
    family = old.prompts.rewound(importance([3.0, -1.0, 2.0, 0.5]), 0.5, 0.5, "remove")
    with torch.inference_mode():
        made = pae.PromptedViT(tiny.backbone(), family)
        assert family.prompt_counts == [2] * 3
        family.token_mask[1] = 1
        assert family.prompt_counts == [3] * 3
        assert made(tiny.images(made.backbone)).isfinite().all()
