"""SPT initialisation: which tokens are drawn from, that the draw is uniform, that nothing else
changes.
"""

import builtins

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pae
from pae.methods.spt import _pool, _Reservoir
from pae.prompts import VPTDeep, VPTShallow
from tests import tiny


def made(prompts=4, feature="plain"):
    return tiny.prompted(feature, prompts)


def all_tokens(model, x):
    """Literally: patch embedding without position, then the input of every later block."""
    vit = model.backbone
    grid = vit.patch_embed(x)
    tokens, rows = [grid.flatten(1, -2)], vit.norm_pre(vit._pos_embed(grid))
    for block in vit.blocks[:-1]:
        rows = block(rows)
        tokens.append(rows[:, vit.num_prefix_tokens :])
    return [t.detach() for t in tokens]


def found(rows, pool):
    """Index in `pool` (M, D) of every row, each there exactly once."""
    same = (rows.detach()[:, None] - pool[None]).abs().amax(-1) < 1e-12
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


@pytest.mark.parametrize("feature", ["plain", "registers", "dynamic_size", "avg_no_class_token"])
def test_random_tokens_of_every_blocks_input(feature):
    model = made([4, 0, 6], feature)
    x = tiny.images(model.backbone, 5)
    pae.spt_init(model, x)
    for i, (rows, pool) in enumerate(zip(model.prompts.raw_prompts(), all_tokens(model, x))):
        at = found(rows, pool.flatten(0, 1))
        assert len(set(at.tolist())) == (4, 0, 6)[i]  # without replacement
    first = model.prompts.tokens.detach().clone()
    pae.spt_init(model, x, seed=1)
    assert not torch.equal(model.prompts.tokens, first)
    pae.spt_init(model, x, seed=0)
    assert torch.equal(model.prompts.tokens, first)


def test_shallow_prompts_are_patch_tokens():
    model = made(VPTShallow(6))
    x = tiny.images(model.backbone, 3)
    pae.spt_init(model, x)
    found(model.prompts.tokens, all_tokens(model, x)[0].flatten(0, 1))


@pytest.mark.parametrize("method", ["random", "mean_pooling", "max_pooling", "kmeans"])
def test_the_cut_into_batches_does_not_matter(method):
    if method == "kmeans":
        pytest.importorskip("sklearn")
    model = made(3)
    x = tiny.images(model.backbone, 9)
    given = [x, [x[:1], x[1:8], x[8:]]]
    given.append(DataLoader(TensorDataset(x, torch.arange(9)), batch_size=4))
    results = []
    for images in given:
        pae.spt_init(model, images, method, sample=20)
        results.append(model.prompts.tokens.detach().clone())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count, runs", [(6, 6), (17, 16), (40, 16), (4, 4), (2, 1), (1, 1)])
@pytest.mark.parametrize("method", ["mean_pooling", "max_pooling"])
def test_pooled_runs_of_neighbours(method, count, runs):
    """16 patches: runs of 16 // (P - 1), and a shorter one of what is left."""
    model = made([count, 0, count])
    x = tiny.images(model.backbone, 3 if runs * 3 >= count else 50)
    pae.spt_init(model, x, method)
    tokens = all_tokens(model, x)
    size = {6: 3, 17: 1, 40: 1, 4: 5, 2: 16, 1: 16}[count]
    for block in (0, 2):
        pool = []
        for image in tokens[block]:
            for start in range(0, 16, size):
                run = image[start : start + size]
                pool.append(run.mean(0) if method == "mean_pooling" else run.max(0).values)
        assert len(pool) == runs * len(x)
        rows = model.prompts.raw_prompts()[block]
        assert len(set(found(rows, torch.stack(pool)).tolist())) == count


class Noise:
    """A generator whose largest numbers are the smallest of the stored ones, in the file's order:
    window by window, images side by side."""

    def __init__(self, noise, images):
        self.noise, self.images = noise, images

    def random(self, count):
        order = torch.arange(count).view(-1, self.images).t().reshape(-1)
        return (1 - self.noise[:count].double())[order].numpy()


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("method", ["random", "mean_pooling", "max_pooling"])
def test_released_runs_and_draw(golden, monkeypatch, method, precision):
    """Stored numbers of the released code, its noise included; see tests/golden/README.md."""
    arrays = {k: torch.as_tensor(v) for k, v in golden("spt_init").items() if k != "meta_json"}
    blocks = arrays["tokens"].to({"f32": torch.float32, "f64": torch.float64}[precision])
    noise = Noise(arrays["noise"], blocks.shape[1])
    cases = [k.split("/")[0] for k in arrays if k.startswith(method) and "prompts" in k]
    assert len(set(cases)) == (8 if method == "random" else 10)
    for case in set(cases):
        count = int(case.split("_")[-1])
        for block, tokens in enumerate(blocks):
            if method == "random":
                noise.random = lambda n: (1 - noise.noise[:n].double()).numpy()
                rows = tokens
            else:
                rows = _pool(tokens, count, method, official=True)
                expected = arrays[f"{case}/{precision}/pooled"]
                if block == 0:
                    assert (rows.transpose(0, 1) - expected).abs().max() <= 1e-6
            reservoir = _Reservoir(count, (0,))
            reservoir.random = noise
            reservoir.add(rows.flatten(0, 1))
            drawn = arrays[f"{case}/{precision}/prompts"][block]
            assert (reservoir.rows - drawn).abs().max() <= 1e-6, (case, block)


@pytest.mark.parametrize("method", ["mean_pooling", "max_pooling"])
def test_released_runs_of_a_model(method):
    model = made([6, 0, 4])  # 16 patches: 5 runs of 3 and the last token; 3 runs of 5 and one
    x = tiny.images(model.backbone, 4)
    pae.spt_init(model, x, method, official=True)
    for block, size in ((0, 3), (2, 5)):
        tokens = all_tokens(model, x)[block]
        runs = [tokens[:, i : i + size] for i in range(0, 15, size)] + [tokens[:, 15:]]
        pooled = [r.mean(1) if method == "mean_pooling" else r.amax(1) for r in runs]
        found(model.prompts.raw_prompts()[block], torch.cat(pooled))
    pae.spt_init(made(5), x, method, official=True)  # nothing is left: the whole image
    for other in (made(1), made(18)):
        message = "official=True needs 2 to 17 prompts per block, .* got (1|18)$"
        refused(ValueError, message, lambda m=other: pae.spt_init(m, x, method, official=True))
    refused(ValueError, "official=True is for", lambda: pae.spt_init(model, x, official=True))


def test_kmeans_centres():
    cluster = pytest.importorskip("sklearn.cluster")
    model = made([3, 3, 0])
    x = tiny.images(model.backbone, 4)
    pae.spt_init(model, x, "kmeans", sample=64)  # all of them
    for rows, tokens in zip(model.prompts.raw_prompts()[:2], all_tokens(model, x)):
        points = tokens.flatten(0, 1)
        fit = cluster.KMeans(3, init=rows.detach().numpy(), n_init=1).fit(points.numpy())
        # these centres are a fixed point of Lloyd's algorithm on all tokens
        torch.testing.assert_close(torch.from_numpy(fit.cluster_centers_), rows.detach())
    pae.spt_init(model, x, "kmeans", sample=3)  # three points are their own centres
    for rows, tokens in zip(model.prompts.raw_prompts()[:2], all_tokens(model, x)):
        found(rows, tokens.flatten(0, 1))


def test_without_scikit_learn(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'pae\[clustering\]'"):
        pae.spt_init(made(), iter([]), "kmeans")


def test_the_draw_is_uniform_without_replacement():
    """Every one of 12 rows, in every chunk, is among 4 with probability 1/3."""
    hits, firsts = torch.zeros(12), torch.zeros(12)
    rows = torch.arange(12.0)[:, None]
    for seed in range(1000):
        reservoir = _Reservoir(4, (seed,))
        for part in rows.split([1, 6, 5]):
            reservoir.add(part)
        drawn = reservoir.rows[:, 0].long()
        assert reservoir.seen == 12 and len(set(drawn.tolist())) == 4
        hits[drawn] += 1
        firsts[drawn[0]] += 1
    assert (hits / 1000 - 1 / 3).abs().max() < 5 * (2 / 9 / 1000) ** 0.5
    assert (firsts / 1000 - 1 / 12).abs().max() < 5 * (11 / 144 / 1000) ** 0.5


def test_candidates_alone_are_kept():
    reservoir = _Reservoir(4, (0,))
    for _ in range(5):
        reservoir.add(torch.randn(1000, 8))
        assert reservoir.rows.shape == (4, 8) and reservoir.keys.shape == (4,)
        assert reservoir.rows.untyped_storage().nbytes() == 4 * 8 * 4


def test_nothing_else_changes():
    model = made(VPTDeep(3, dropout=0.5))
    model.head.eval()
    x = tiny.images(model.backbone, 6)
    loader = DataLoader(TensorDataset(x), batch_size=2, shuffle=True)
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    stream, tokens = torch.get_rng_state(), model.prompts.tokens
    with torch.autocast("cpu", torch.bfloat16):
        pae.spt_init(model, loader)
    assert torch.equal(torch.get_rng_state(), stream)
    assert [m.training for m in model.modules()] == flags
    assert model.prompts.tokens is tokens and tokens.grad is None and tokens.requires_grad
    changed = [n for n, p in model.state_dict().items() if not torch.equal(p, before[n])]
    assert changed == ["prompts.tokens"]
    for rows, pool in zip(model.prompts.raw_prompts(), all_tokens(model, x)):
        found(rows, pool.flatten(0, 1))  # in full precision


def refused(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bad_arguments():
    model = made()
    x = tiny.images(model.backbone)
    refused(ValueError, "method must be one of", lambda: pae.spt_init(model, x, "mean"))
    refused(ValueError, "sample must be an integer", lambda: pae.spt_init(model, x, sample=0))
    refused(ValueError, "seed must be an integer", lambda: pae.spt_init(model, x, seed=-1))
    refused(TypeError, "images must be a tensor or a loader", lambda: pae.spt_init(model, 3))
    refused(TypeError, "images must yield tensors", lambda: pae.spt_init(model, [("a",)]))
    refused(ValueError, "images", lambda: pae.spt_init(model, x[:, :1]))
    refused(ValueError, "at least 4 tokens .* block 0, got 0", lambda: pae.spt_init(model, []))
    refused(ValueError, "at least 40 tokens", lambda: pae.spt_init(made(40), x[:2]))
    refused(ValueError, "has no prompts", lambda: pae.spt_init(made(0), x))
    refused(TypeError, "must be a PromptedViT", lambda: pae.spt_init(model.backbone, x))
    family = tiny.FromRows([2, 2, 2])
    refused(ValueError, "FromRows. computes its prompts", lambda: pae.spt_init(made(family), x))


def test_a_sample_smaller_than_the_prompts():
    pytest.importorskip("sklearn")
    model = made()
    x = tiny.images(model.backbone)
    refused(ValueError, "sample must be at least 4", lambda: pae.spt_init(model, x, "kmeans", 3))
