"""Prompt Condensation: the ranking, what is kept, and what is left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import pae
from pae.prompts import ProVPT, VPTDeep, VPTShallow
from tests import tiny


def made(prompts=4, feature="plain", dtype=torch.float64):
    return tiny.prompted(feature, prompts, dtype)


def task(model, size=6):
    x = tiny.images(model.backbone, size)
    return x, torch.arange(size) % 5


def ranked(model, data, score):
    """By hand, through the reference engine: [(score, block, place), ...], best first."""
    model.eval()
    totals = {}
    for x, y in data:
        rows = [r.detach().requires_grad_() for r in model.prompts.raw_prompts()]
        model.prompts.block_prompts = lambda i, x, rows=rows: rows[i] if len(rows[i]) else None
        F.cross_entropy(model(x), y).backward()
        del model.prompts.block_prompts
        for block, r in enumerate(rows):
            for k in range(len(r)):
                terms = r.grad[k] * r[k].detach()
                value = terms.abs().sum() if score == "elementwise" else terms.sum().abs()
                totals[block, k] = totals.get((block, k), 0.0) + len(x) * value.item()
    model.train()
    return sorted(((v, *at) for at, v in totals.items()), reverse=True)


@pytest.mark.parametrize("score", ["elementwise", "taylor"])
@pytest.mark.parametrize("counts", [4, [5, 0, 7]], ids=str)
def test_the_best_prompts_of_all_blocks_stay(score, counts):
    model = made(VPTDeep(counts, dropout=0.5))
    with torch.no_grad():
        model.prompts.tokens *= 1e-3  # near the norm's eps, so that both scores are no noise
    x, y = task(model)
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    order = ranked(model, data, score)
    for keep, number in ((0.3, 4), (0.5, 6), (1.0, 12), (0.001, 1)):
        small = pae.condense(model, data, keep=keep, score=score)
        chosen = sorted(at for _, *at in order[:number])
        before = model.prompts.raw_prompts()
        for block, rows in enumerate(small.prompts.raw_prompts()):
            expected = [before[b][k] for b, k in chosen if b == block]
            assert rows.tolist() == [e.tolist() for e in expected]
        assert sum(small.prompts.prompt_counts) == number


def test_the_condensed_model_is_a_model():
    model = made(VPTDeep(5, dropout=0.2, dropout_scope="sample"))
    small = pae.condense(model, *task(model), keep=0.4)
    assert small.backbone is model.backbone and small.kld is None
    assert small.training and (small.prompts.dropout, small.prompts.dropout_scope) == (
        0.2,
        "sample",
    )
    assert small.head is not model.head
    assert torch.equal(small.head.weight, model.head.weight)
    tiny.assert_engines_agree(small, tiny.images(model.backbone))
    tiny.assert_engines_agree(model, tiny.images(model.backbone))
    again = pae.condense(small, *task(model), keep=0.5)
    assert sum(again.prompts.prompt_counts) == 3
    assert not pae.condense(model.eval(), *task(model)).training


def test_all_prompts_kept_give_the_same_logits():
    model = made(VPTDeep([3, 0, 2])).eval()
    x, y = task(model)
    assert torch.equal(pae.condense(model, x, y, keep=1)(x), model(x))


def test_prompts_that_do_nothing_go_first():
    """Copies of what the norm makes of nothing beside prompts that were trained on the task."""
    model = made(6)
    x, y = task(model, 20)
    optimizer = torch.optim.Adam(model.prompts.parameters(), 0.05)
    for _ in range(15):
        loss = F.cross_entropy(pae.fast_forward(model, x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        model.prompts.tokens[:, ::2] = 0
    small = pae.condense(model, x, y, keep=0.5)
    assert small.prompts.prompt_counts == [3, 3, 3]
    for rows, old in zip(small.prompts.raw_prompts(), model.prompts.raw_prompts()):
        assert torch.equal(rows, old[1::2])


def test_a_loader_and_nothing_else_changes():
    model = made(VPTDeep(4, dropout=0.5))
    x, y = task(model)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    stream = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        small = pae.condense(model, loader)
    assert torch.equal(torch.get_rng_state(), stream) and model.training
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in (small.prompts.tokens, *small.head.parameters()))


def test_a_head_that_is_no_linear_layer(tmp_path):
    model = made()
    model.head = torch.nn.Sequential(torch.nn.Linear(32, 8, dtype=torch.float64), torch.nn.ReLU())
    x, y = task(model)
    small = pae.condense(model, x, y, keep=1)
    assert torch.equal(small.eval()(x), model.eval()(x))


def test_checkpoint_of_a_condensed_model(tmp_path):
    model = made(dtype=torch.float32)
    x, y = task(model)
    small = pae.condense(model, x, y).eval()
    small.save(tmp_path / "a")
    again = pae.PromptedViT.from_file(tmp_path / "a", tiny.backbone(dtype=torch.float32)).eval()
    assert again.prompts.prompt_counts == small.prompts.prompt_counts
    assert torch.equal(again(x), small(x))


def test_what_is_trained_of_the_backbone_is_each_models_own():
    vit = tiny.backbone()
    model = pae.PromptedViT(vit, VPTDeep(4), train_backbone="biases")
    x, y = tiny.images(vit), torch.tensor([0, 1, 2])
    small = pae.condense(model, x, y, 0.5)
    before = model(x)
    assert small.trained_backbone == model.trained_backbone
    with torch.no_grad():
        for name in small.trained_backbone:
            small.backbone.get_parameter(name).add_(1)
    assert torch.equal(model(x), before)
    assert all(vit.get_parameter(name).requires_grad for name in model.trained_backbone)


def refused(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bad_arguments():
    model = made()
    x, y = task(model)
    for keep in (0, -0.1, 1.1, True, "0.3", float("nan")):
        refused(
            ValueError,
            r"keep must be a number in \(0, 1\]",
            lambda k=keep: pae.condense(model, x, y, k),
        )
    refused(ValueError, "score must be one of", lambda: pae.condense(model, x, y, score="l1"))
    refused(ValueError, r"labels must be \(6,\) .* None", lambda: pae.condense(model, x))
    refused(ValueError, r"labels must be \(6,\) .* \(5,\)", lambda: pae.condense(model, x, y[:5]))
    refused(ValueError, "labels must be None", lambda: pae.condense(model, [(x, y)], y))
    refused(ValueError, "at least one batch", lambda: pae.condense(model, []))
    refused(TypeError, r"yield \(images, labels\)", lambda: pae.condense(model, [x]))
    refused(TypeError, "images must be a tensor or a loader", lambda: pae.condense(model, 3))
    refused(ValueError, "has no prompts", lambda: pae.condense(made(0), x, y))
    for other in (made(VPTShallow(2)), made(ProVPT(2))):
        refused(TypeError, "with VPTDeep prompts, got", lambda m=other: pae.condense(m, x, y))
    refused(TypeError, "got VisionTransformer", lambda: pae.condense(model.backbone, x, y))
