"""DA-VPT: the released prompts, penalty, class means and k-means.

tests/golden/README.md says what the file is and where the tolerances come from.
"""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import pae
from pae.prompts import DAVPT
from pae.prompts.da_vpt import cosine_kmeans
from tests.pae.test_golden import GRADIENT, VALUE, check_gradients, close, run, stored
from tests.tiny import error

PRECISIONS = pytest.mark.parametrize("precision", ["f32", "f64"])
ENGINES = pytest.mark.parametrize("engine", ["reference", "fast"])

SETTINGS = {"num_tokens": 3, "num_proxies": 5, "num_classes": 10}
SETTINGS |= {"patch_weight": 0.05, "class_weight": 0.07, "remap_from": 0}


def made(arrays, vit, pool="image", **options):
    family = DAVPT(**SETTINGS, **options)
    model = pae.PromptedViT(vit, family, pool=pool).train()
    with torch.no_grad():
        family.tokens.copy_(
            torch.cat([arrays[f"{group}_tokens"].flatten(0, 1) for group in ("other", "proxy")])
        )
        if family.prompt_norm is not None:
            family.prompt_norm.weight.copy_(arrays["vpt_norm.weight"])
            family.prompt_norm.bias.copy_(arrays["vpt_norm.bias"])
    return model


def groups(grad):
    """Gradients of the two groups as the file has them: (2, 5, D) and (2, 3, D)."""
    return grad[6:].view(2, 5, -1), grad[:6].view(2, 3, -1)


@pytest.mark.parametrize(
    "norm, classes, feature",
    [
        ("none", "modulo", "query"),
        ("none", "kmeans_like", "query"),
        ("none", "two_prompts", "query"),
        ("l2", "kmeans_like", "query"),
        ("layer", "kmeans_like", "query"),
        ("none", "cls_raw", "row"),
    ],
)
@ENGINES
@PRECISIONS
def test_step(golden, tiny_vit, norm, classes, feature, engine, precision):
    arrays, dtype = stored(golden, "da_vpt", precision)
    data, _ = stored(golden, "data", precision)
    images, labels = data["images"][:6], data["labels"][:6]
    model = made(arrays, tiny_vit(dtype), norm=norm, class_feature=feature)
    family, at = model.prompts, f"{norm}_{classes}/{precision}/"
    used = "kmeans_like" if classes == "cls_raw" else classes
    family.class_map.copy_(arrays[f"map/{used}"])
    terms = []
    anchor = family._proxy_anchor
    family._proxy_anchor = lambda *given: terms.append(anchor(*given)) or terms[-1]

    family.see_labels(labels)
    logits = run(model, images, engine)
    penalty = model.penalty()
    wanted = [family.tokens, *model.head.parameters()]
    if norm == "layer":
        wanted += family.prompt_norm.parameters()
    loss = F.cross_entropy(logits, labels) + penalty
    of_penalty = torch.autograd.grad(penalty, family.tokens, retain_graph=True)[0]
    tokens, weight, bias, *of_norm = torch.autograd.grad(loss, wanted)

    assert close(logits, arrays[f"{at}logits"], VALUE[precision])
    for got, key in (
        (penalty, "penalty"),
        (loss, "loss"),
        (torch.stack(terms[::2]), "patch_loss"),
        (torch.stack(terms[1::2]), "class_loss"),
    ):
        expected = arrays[f"{at}{key}"]
        scale = max(1.0, expected.abs().max().item()) if precision == "f32" else 1.0
        assert close(got, expected, VALUE[precision] * scale), key
    pairs = zip(
        groups(tokens) + groups(of_penalty),
        ("proxy", "other", "penalty_proxy", "penalty_other"),
        strict=True,
    )
    check_gradients(arrays, at, [*pairs, (weight, "head_weight"), (bias, "head_bias")], precision)
    check_gradients(arrays, at, zip(of_norm, ("norm_weight", "norm_bias")), precision)


@pytest.mark.parametrize("name, pool", [("mae_all", "all"), ("mae_img", "image")])
@ENGINES
@PRECISIONS
def test_averaged_readout(golden, name, pool, precision, engine):
    """The final norm ahead of the mean, as the released MAE runs have it."""
    arrays, dtype = stored(golden, "da_vpt", precision)
    data, _ = stored(golden, "data", precision)
    weights, _ = stored(golden, "backbone", precision)
    vit = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=2,
        global_pool="avg",
        fc_norm=False,
        num_classes=10,
    ).to(dtype)
    vit.load_state_dict(
        {k.removeprefix("timm/"): v for k, v in weights.items() if k.startswith("timm/")}
    )
    logits = run(made(arrays, vit, pool), data["images"][:6], engine)
    assert close(logits, arrays[f"{name}/{precision}/logits"], VALUE[precision])


@ENGINES
@PRECISIONS
def test_class_means_of_training_forwards(golden, tiny_vit, precision, engine):
    arrays, dtype = stored(golden, "da_vpt", precision)
    data, _ = stored(golden, "data", precision)
    model = made(arrays, tiny_vit(dtype))
    model.prompts.remap(model, [(data["images"], data["labels"])])
    for x, y in zip(data["images"][:6].split(3), data["labels"][:6].split(3)):
        model.prompts.see_labels(y)
        run(model, x, engine)
        model.penalty()
    sums = model.prompts._sums
    means = sums[:, :-1] / sums[:, -1:].clamp(min=1)
    assert error(means, arrays[f"class_means/{precision}/after_two_batches"]) <= GRADIENT[precision]


@pytest.mark.parametrize("norm", ["none", "l2", "layer"])
@PRECISIONS
def test_kmeans(golden, norm, precision):
    """By angle to plain means; the family does it with layer-normed ones, in fp64."""
    arrays, _ = stored(golden, "da_vpt", precision)
    means = arrays["kmeans/class_means"]
    present = means.abs().sum(1) > 0
    change = {
        "none": lambda x: x,
        "l2": lambda x: F.normalize(x, dim=1),
        "layer": lambda x: F.layer_norm(x, x.shape[1:]),
    }[norm]
    points = change(means[present])
    start = points[arrays["kmeans/start_index"]]
    assigned, centroids = cosine_kmeans(points, start)
    found = torch.full((12,), -1).masked_scatter(present, assigned)
    assert torch.equal(found, arrays[f"kmeans/{norm}/map"])
    expected = arrays[f"kmeans/{norm}/{precision}/centroids"]
    assert error(centroids, expected) <= GRADIENT[precision]
    if norm == "layer":
        family = DAVPT(2, 4, 12)
        shape = pae.prompts.BackboneShape(4, 64, 4, (8, 8), 3, 17, 1, (4, 4), 16, True)
        family.bind(shape)
        family.centroids.copy_(start)
        counts = present[:, None].double() * 3
        family._cluster(means.double() * 3, counts)
        assert torch.equal(family.class_map[present], assigned)
        assert family.class_map.min() >= 0 and family.class_map.max() < 4
        assert error(family.centroids, expected) <= GRADIENT["f32"]
