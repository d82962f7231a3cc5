"""DA-VPT: the proxy-anchor loss spelled out, the map of classes, what a step needs."""

import math
import multiprocessing

import pytest
import torch

import pae
from pae.prompts import DAVPT
from pae.prompts.da_vpt import cosine_kmeans
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


# ---- the map


LOOK_OF = torch.tensor([2, 0, 2, 1, 0])  # five classes of images, three looks


def looks(count=20, seed=3):
    """Images and labels: `count` of them, classes in turn."""
    torch.manual_seed(seed)
    shown = 3 * torch.randn(3, 3, 16, 16, dtype=torch.float64)
    labels = torch.arange(count) % 5
    noise = torch.randn(count, 3, 16, 16, dtype=torch.float64)
    return shown[LOOK_OF[labels]] + 0.1 * noise, labels


def same_groups(class_map):
    alike = class_map[:, None] == class_map[None]
    return torch.equal(alike, LOOK_OF[:, None] == LOOK_OF[None])


def trained(made, images, labels, engine="fast"):
    """A training forward, as far as the family is concerned."""
    made.prompts.see_labels(labels)
    made(images, engine=engine)
    return made.penalty()


def test_the_first_map_is_of_the_bare_backbone_and_few_images():
    made = prompted(2, 3, 5, seed=2)
    images, labels = looks(60)  # 12 of each class
    seen = []
    hook = made.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    made.prompts.remap(made, [(images[:40], labels[:40]), (images[40:], labels[40:]), None])
    hook.remove()
    assert same_groups(made.prompts.class_map)
    assert seen == [40, 10]  # and then every class has its ten; the third batch is not drawn
    assert made.training and made.head.out_features == 5
    backbone = made.backbone(images[:50])
    means = torch.stack([backbone[labels[:50] == c].mean(0) for c in range(5)])
    points = torch.nn.functional.layer_norm(means, (32,))
    for j, centroid in enumerate(made.prompts.centroids):
        mean = points[made.prompts.class_map == j].mean(0)
        torch.testing.assert_close(centroid, mean)


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_later_maps_are_of_the_training_forwards(engine):
    made = prompted(2, 3, 5, remap_from=1, seed=2)
    family, (images, labels) = made.prompts, looks()
    shown = []
    made.head.register_forward_pre_hook(lambda module, args: shown.append(args[0].detach()))
    family.remap(made, [(images, labels)])
    first, centroids = family.class_map.clone(), family.centroids.clone()
    mixed = labels.roll(1)  # had they been counted, another map
    trained(made, images, mixed, engine)
    family.remap(made, None)  # epoch 0 lies before remap_from
    assert torch.equal(family.class_map, first) and torch.equal(family.centroids, centroids)
    shown.clear()
    made.eval()(images[:3])
    made.train()
    made(images[:3], engine=engine)  # no penalty is asked, so it was no step
    shown.clear()
    for part in (slice(0, 8), slice(8, 20)):
        trained(made, images[part], mixed[part], engine)
    family.remap(made, None)
    assert not torch.equal(family.class_map, first)
    features = torch.cat(shown)
    means = torch.stack([features[mixed == c].mean(0) for c in range(5)])
    points = torch.nn.functional.layer_norm(means, (32,))
    assigned, expected = cosine_kmeans(points, centroids)
    assert torch.equal(family.class_map, assigned)
    torch.testing.assert_close(family.centroids, expected)
    family.remap(made, None)  # an epoch without a step: nothing to learn from
    assert torch.equal(family.class_map, assigned)


def test_remap_from_zero_counts_the_first_epoch():
    made = prompted(2, 3, 5, remap_from=0, seed=2)
    images, labels = looks()
    made.prompts.remap(made, [(images, labels)])
    first = made.prompts.centroids.clone()
    trained(made, images, labels)
    made.prompts.remap(made, None)
    assert not torch.equal(made.prompts.centroids, first)


def test_a_class_without_images_gets_some_prompt():
    """Which one depends on the seed alone; the head is left as it was."""
    found = set()
    for seed in range(12):
        maps = []
        for _ in range(2):
            made = prompted(2, 3, 5, seed=seed)
            head = made.head
            made.prompts.remap(made, [(tiny.images(made.backbone), torch.tensor([1, 1, 3]))])
            assert made.head is head
            maps.append(made.prompts.class_map)
        class_map, again = maps
        assert torch.equal(class_map, again) and class_map[1] != class_map[3]
        assert class_map.min() >= 0 and class_map.max() < 3
        found.add(tuple(class_map[[0, 2, 4]].tolist()))
    assert len(found) > 4
    made = prompted(2, 3, 5)
    with pytest.raises(ValueError, match="at least one image"):
        made.prompts.remap(made, [])


def test_one_prompt_for_all_is_no_map():
    made = prompted(2, 3, 5)
    family, same = made.prompts, torch.randn(1, 32).double()
    before = family.class_map.clone()
    family.centroids[0] = same  # the others are further away
    family.centroids[1:] = -same + 0.1 * torch.randn(2, 32)
    kept = family.centroids.clone()
    family._cluster(same.expand(5, 32), torch.ones(5, 1))
    assert torch.equal(family.class_map, before) and torch.equal(family.centroids, kept)


def test_fewer_classes_than_proxies():
    """One proxy per class, for good; or spare ones, on request, as KLD wants them."""
    made = prompted(4, 4, 2, [2])
    assert made.prompts.prompt_counts == [4, 4, 2]
    made.prompts.remap(made, None)
    assert made.prompts.class_map.tolist() == [0, 1]
    assert made.prompts.config()["num_proxies"] == 4
    with pytest.raises(ValueError, match=r"same number of prompts .* got \[4, 4, 2\]"):
        pae.PromptedViT(tiny.backbone(), DAVPT(4, 4, 2, [2]), pae.KLD(dim=4))
    spare = DAVPT(4, 4, 2, [2], spare_proxies=True)
    pae.PromptedViT(tiny.backbone(), spare, pae.KLD(dim=4))
    assert spare.prompt_counts == [4, 4, 4] and spare.class_map.tolist() == [0, 1]


def test_kmeans_leaves_what_is_empty():
    points = torch.tensor([[2.0, 0.0], [4.0, 1.0], [0.0, 3.0]])
    start = torch.tensor([[1.0, 0.0], [-1.0, -1.0], [0.0, 0.0], [0.0, 1.0]])
    assigned, centroids = cosine_kmeans(points, start)
    assert assigned.tolist() == [0, 0, 3]
    assert centroids.tolist() == [[3.0, 0.5], [-1.0, -1.0], [0.0, 0.0], [0.0, 3.0]]


def test_what_an_epoch_has_gathered_is_kept():
    """Stopped in the middle of it, or not: the same map."""
    images, labels = looks()
    mixed = labels.roll(1)
    whole, cut, other = (prompted(2, 3, 5, remap_from=0) for _ in range(3))
    for made in (whole, cut):
        made.prompts.remap(made, [(images, labels)])
        trained(made, images[:8], mixed[:8])
    other.load_state_dict(cut.state_dict())
    other.prompts.load_rank_state(cut.prompts.rank_state())
    for made in (whole, other):
        trained(made, images[8:], mixed[8:])
        made.prompts.remap(made, None)
    assert torch.equal(whole.prompts.class_map, other.prompts.class_map)
    assert torch.equal(whole.prompts.centroids, other.prompts.centroids)
    # a state of before there were sums: the map is there, and is kept until there is another
    fresh = prompted(2, 3, 5)
    fresh.load_state_dict(whole.state_dict())
    fresh.prompts.load_rank_state({})
    fresh.prompts.remap(fresh, None)
    assert torch.equal(fresh.prompts.class_map, whole.prompts.class_map)


def test_processes_together_map_what_one_does(tmp_path):
    """Real ones: each gives its share, all get the same; ten images per class in all."""
    images, labels = looks(60)
    alone, looked_at = prompted(2, 3, 5, remap_from=0), [*range(25), *range(30, 55)]
    alone.prompts.remap(alone, [(images[looked_at], labels[looked_at])])
    first = alone.prompts.centroids.clone()
    trained(alone, images, labels.roll(1))
    alone.prompts.remap(alone, None)
    assert not torch.equal(alone.prompts.centroids, first)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.starmap(_process, [(str(tmp_path / "store"), rank) for rank in range(2)])
    for early, centroids, class_map in found:
        assert error(torch.tensor(early).double(), first) < 1e-6
        assert error(torch.tensor(centroids).double(), alone.prompts.centroids) < 1e-6
        assert class_map == alone.prompts.class_map.tolist()


def _process(store, rank):
    images, labels = looks(60)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    try:
        made = prompted(2, 3, 5, remap_from=0)
        wrapped = torch.nn.parallel.DistributedDataParallel(made)
        mine = slice(30 * rank, 30 * rank + 30)  # six of each class, of which five are looked at
        made.prompts.remap(made, [(images[mine], labels[mine])])
        images, labels = images[mine], labels.roll(1)[mine]
        early = made.prompts.centroids.tolist()
        for part in (slice(0, 12), slice(12, 30)):  # DDP sends the buffers of rank 0 round
            made.prompts.see_labels(labels[part])
            (wrapped(images[part], engine="fast").sum() + made.penalty()).backward()
        made.prompts.remap(made, None)
        return early, made.prompts.centroids.tolist(), made.prompts.class_map.tolist()
    finally:
        torch.distributed.destroy_process_group()


def test_start_is_xavier_by_group():
    made = prompted(40, 50, 50, proxy_blocks=[0], init_divisor=8.0)
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


def test_files_of_another_make_are_refused_by_name(tmp_path):
    """As those of before: more proxies than classes, and a norm without weights."""
    prompted(2, 4, 2, spare_proxies=True).save(tmp_path / "spare")
    message = r"prompts\.centroids is \(4, 32\) in the file, \(2, 32\) in the model"
    with pytest.raises(pae.CheckpointError, match=message):
        prompted(2, 4, 2).load(tmp_path / "spare")
    prompted().save(tmp_path / "none")
    message = "trained with DAVPT's norm 'none', and this model has 'layer'"
    with pytest.raises(pae.CheckpointError, match=message):
        prompted(norm="layer").load(tmp_path / "none")


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_proxies": 0}, "num_proxies and num_classes must be at least 1"),
        ({"proxy_blocks": [3]}, r"proxy_blocks must be distinct indices in \[0, 3\)"),
        ({"proxy_blocks": [1, 1]}, "proxy_blocks must be distinct"),
        ({"proxy_blocks": []}, "proxy_blocks must be distinct"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"init_divisor": 0}, "init_divisor must be above 0"),
        ({"class_feature": "key"}, "class_feature must be one of"),
        ({"remap_from": -1}, "remap_from must be at least 0"),
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_step_gathers_what_it_is_given():
    """Not the example batch; the labels of each step, not those of the capture."""
    made = prompted(2, 3, 5, remap_from=0).float().cuda()
    images, labels = (t[:5].cuda() for t in looks())
    images = images.float()
    made.prompts.remap(made, [(images, labels)])
    step = pae.graphed_step(made, images, labels)
    assert not made.prompts._sums.any()
    step(images, labels.flip(0))
    gathered = made.prompts._sums.clone()
    made.prompts._sums.zero_()
    trained(made, images, labels.flip(0))
    assert error(gathered, made.prompts._sums) < 1e-5


def test_a_penalty_of_another_forward_is_refused():
    model = prompted()
    x, labels = tiny.images(model.backbone), torch.tensor([0, 1, 2])
    model.prompts.see_labels(labels)
    model(x)
    model.eval()(x)  # in between
    tiny.refused(ValueError, "what they belong to is gone", model.train().penalty)
    model.prompts.see_labels(labels)
    with torch.no_grad():
        model(x)
    tiny.refused(RuntimeError, "which ran without a graph", model.penalty)
    model.prompts.see_labels(labels)
    with torch.no_grad():
        model(x)
        assert model.penalty() > 0
    assert model.penalty() == 0  # it is used up
