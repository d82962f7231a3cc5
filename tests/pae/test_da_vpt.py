"""DA-VPT: the proxy-anchor loss spelled out, the map of classes, what a step needs."""

import math

import pytest
import torch

import pae
from pae.prompts import DAVPT
from tests import tiny
from tests.tiny import error


def prompted(*args, feature="plain", **kwargs):
    torch.manual_seed(0)
    if not args and "num_tokens" not in kwargs:
        args = (2, 4, 5)
    family = DAVPT(*args, **kwargs)
    return pae.PromptedViT(tiny.backbone(feature), family).train()


def anchor_by_hand(features, proxies, owner, kappa=5.0, alpha=32.0, delta=0.1):
    total = 0.0
    for j, proxy in enumerate(proxies):
        s = [kappa * float(f @ proxy / (f.norm() * proxy.norm())) for f in features]
        own = [a for a, o in zip(s, owner) if o == j]
        other = [a for a, o in zip(s, owner) if o != j]
        total += math.log(1 + sum(math.exp(-alpha * (a - delta)) for a in own))
        total += math.log(1 + sum(math.exp(alpha * (a + delta)) for a in other))
    return total / len(proxies)


@pytest.mark.parametrize("norm", ["none", "l2", "layer"])
@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("feature, prefix", [("plain", 1), ("registers", 3), ("qk_norm", 1)])
def test_penalty_by_hand(feature, prefix, engine, norm):
    made = prompted(feature=feature, norm=norm, patch_weight=0.7, class_weight=0.3)
    family, labels = made.prompts, torch.tensor([4, 0, 1])
    shown = {}
    observe = family.observe
    family.observe = lambda i, x, q: (shown.__setitem__(i, (x, q)), observe(i, x, q))
    family.see_labels(labels)
    made(tiny.images(made.backbone), engine=engine)
    got = made.penalty()
    owner = [family.class_map[l].item() for l in labels]
    assert owner == [0, 0, 1] and set(shown) == {1, 2}
    expected = 0.0
    for i, (x, _) in shown.items():
        block = made.backbone.blocks[i]
        query = block.attn.qkv(block.norm1(x[:, 0]))[:, :32]
        rows = family.raw_prompts()[i]
        patch = x[:, prefix:].mean(1)
        expected += 0.7 * anchor_by_hand(patch, rows, owner) / 2
        expected += 0.3 * anchor_by_hand(query, rows, owner) / 2
    assert abs(got.item() / expected - 1) < 1e-9


def test_gradient_reaches_proxies_and_earlier_prompts():
    """Against finite differences; the engines agree on it in test_protocol."""
    made = prompted()
    x, labels = tiny.images(made.backbone), torch.tensor([4, 0, 1])

    def loss():
        made.prompts.see_labels(labels)
        made(x, engine="fast")
        return made.penalty()

    loss().backward()
    grad, tokens = made.prompts.tokens.grad, made.prompts.tokens.data
    assert tokens.shape == (2 + 4 + 4, 32)
    torch.manual_seed(1)
    for rows in (slice(0, 2), slice(2, 6), slice(6, 10)):
        direction = torch.zeros_like(tokens)
        direction[rows] = torch.randn_like(tokens[rows])
        values = []
        for sign in (1, -1):
            tokens.add_(sign * 1e-6 * direction)
            values.append(loss().item())
            tokens.sub_(sign * 1e-6 * direction)
        slope = (values[0] - values[1]) / 2e-6
        assert abs(slope - (grad * direction).sum().item()) < 1e-4 * max(1, abs(slope))


def test_a_prompt_without_images_adds_nothing():
    made = prompted(0, 3, 3, proxy_blocks=[1])
    family = made.prompts
    rows, features = torch.randn(3, 32).double(), torch.randn(2, 32).double()
    all_own = family._proxy_anchor(features, rows[:1], torch.tensor([0, 0]))
    assert abs(all_own.item() / anchor_by_hand(features, rows[:1], [0, 0]) - 1) < 1e-9
    none = family._proxy_anchor(features, rows[:1], torch.tensor([1, 1]))
    assert abs(none.item() / anchor_by_hand(features, rows[:1], [1, 1]) - 1) < 1e-9


def test_large_similarities_stay_finite():
    made = prompted(kappa=500.0)
    made = made.float()
    made.prompts.see_labels(torch.tensor([4, 0, 1]))
    made(tiny.images(made.backbone), engine="fast")
    assert made.penalty().isfinite()


def test_labels_are_needed_and_used_up():
    made = prompted()
    x = tiny.images(made.backbone)
    made(x, engine="fast")
    with pytest.raises(ValueError, match="labels of the 3 images must be given"):
        made.penalty()
    made.prompts.see_labels(torch.tensor([0, 1]))
    made(x, engine="fast")
    with pytest.raises(ValueError, match="got 2"):
        made.penalty()
    made.prompts.see_labels(torch.tensor([0, 1, 2]))
    made(x, engine="fast")
    assert made.penalty() > 0
    assert made.penalty() == 0  # nothing seen since
    made.eval()
    made(x, engine="fast")
    made.train()
    assert made.penalty() == 0  # evaluation leaves nothing behind


def test_remap_groups_classes_that_look_alike():
    """Five classes of images, three looks: one prompt each."""
    made = prompted(2, 3, 5)
    torch.manual_seed(3)
    looks = 3 * torch.randn(3, 3, 16, 16, dtype=torch.float64)
    look_of = torch.tensor([2, 0, 2, 1, 0])
    labels = torch.arange(5).repeat(4)
    images = looks[look_of[labels]] + 0.1 * torch.randn(20, 3, 16, 16, dtype=torch.float64)
    made.prompts.remap(made, [(images[:8], labels[:8]), (images[8:], labels[8:])])
    got = made.prompts.class_map
    for a in range(5):
        for b in range(5):
            assert (got[a] == got[b]) == (look_of[a] == look_of[b])
    assert made.training
    assert torch.allclose(made.prompts.centroids.norm(dim=1), torch.ones(3).double())
    again = got.clone()
    made.prompts.remap(made, [(images, labels)])  # warm start: nothing is renumbered
    assert torch.equal(made.prompts.class_map, again)


def test_remap_keeps_classes_without_images_and_head():
    made = prompted(2, 3, 5)
    before, head = made.prompts.class_map.clone(), made.head
    x = tiny.images(made.backbone)
    made.prompts.remap(made, [(x, torch.tensor([1, 1, 3]))])
    assert torch.equal(made.prompts.class_map[[0, 2, 4]], before[[0, 2, 4]])
    assert made.prompts.class_map[1] != made.prompts.class_map[3]
    assert made.head is head
    with pytest.raises(ValueError, match="at least one image"):
        made.prompts.remap(made, [])


def test_start_is_xavier_by_group():
    made = prompted(40, 50, 5, proxy_blocks=[0], init_divisor=8.0)
    proxies, *others = made.prompts.raw_prompts()
    for rows, blocks in ((proxies, 1), (torch.cat(others), 2)):
        count = 50 if blocks == 1 else 40
        bound = (6 / ((count + blocks) * 32)) ** 0.5 / 8
        assert rows.abs().max() <= bound
        assert abs(rows.std() / bound - 3**-0.5) < 0.05


def test_the_map_is_part_of_the_checkpoint(tmp_path):
    made = prompted()
    made.prompts.class_map[2] = 3
    made.save(tmp_path / "a.safetensors")
    again = pae.PromptedViT.from_file(tmp_path / "a.safetensors", tiny.backbone())
    assert torch.equal(again.prompts.class_map, made.prompts.class_map)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_proxies": 0}, "num_proxies and num_classes must be at least 1"),
        ({"proxy_blocks": [3]}, r"proxy_blocks must be distinct indices in \[0, 3\)"),
        ({"proxy_blocks": [1, 1]}, "proxy_blocks must be distinct"),
        ({"proxy_blocks": []}, "proxy_blocks must be distinct"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"init_divisor": 0}, "init_divisor must be above 0"),
        ({"feature": "avg_no_class_token"}, "the backbone has none"),
        ({"feature": "head_width"}, "queries of width 24 with prompts of width 32"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        prompted(**{"num_tokens": 2, "num_proxies": 4, "num_classes": 5, **kwargs})


def test_prompts_under_a_norm_cannot_be_set():
    made = prompted(4, 4, 5, norm="l2")
    with pytest.raises(ValueError, match="under norm 'l2'"):
        made.prompts.set_prompts([torch.zeros(4, 32)] * 3)
    assert error(made.prompts.raw_prompts()[0].norm(dim=1), torch.ones(4).double()) < 1e-9


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 5, 1], r"labels must be in \[0, 5\), the num_classes of this DAVPT, got 5"),
        ([0, -1, 1], r"labels must be in \[0, 5\).*got -1"),
        ([0, 60_000_000, 1], "got 60000000"),
        ([0.0, 1.0, 2.0], r"labels must be integers \(B,\), got .*float32"),
        ([True, False, True], r"labels must be integers \(B,\), got .*bool"),
        ([[0], [1], [2]], r"labels must be integers \(B,\), got .*3, 1"),
    ],
    ids=str,
)
def test_labels_that_are_none(labels, message):
    made = prompted()
    with pytest.raises(ValueError, match=message):
        made.prompts.see_labels(torch.tensor(labels))
    with pytest.raises(ValueError, match=message):
        made.prompts.remap(made, [(tiny.images(made.backbone), torch.tensor(labels))])
    assert made.training


def test_remap_needs_a_label_per_image():
    made = prompted()
    with pytest.raises(ValueError, match="labels must be one per image, 3, got 2"):
        made.prompts.remap(made, [(tiny.images(made.backbone), torch.tensor([0, 1]))])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integers(dtype):
    """PyTorch reads bytes that index as a mask."""
    made, values = prompted(), []
    for labels in (torch.tensor([4, 0, 1]), torch.tensor([4, 0, 1], dtype=dtype)):
        made.prompts.see_labels(labels)
        made(tiny.images(made.backbone), engine="fast")
        values.append(made.penalty())
    assert torch.equal(*values)
