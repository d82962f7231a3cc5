"""The released implementations' numbers, through both engines, in fp32 and fp64.

tests/golden/README.md says what every file is and where the tolerances come from.
"""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import pae
from pae.methods.nsp2 import NullSpace
from tests.tiny import error

PRECISIONS = {"f32": torch.float32, "f64": torch.float64}

pytestmark = [
    pytest.mark.parametrize("engine", ["reference", "fast"]),
    pytest.mark.parametrize("precision", PRECISIONS),
]

# absolute for logits and losses, relative (L2) for gradients and parameters
VALUE = {"f32": 1e-5, "f64": 1e-9}
GRADIENT = {"f32": 1e-4, "f64": 1e-6}


@pytest.fixture
def setting(golden, tiny_vit):
    """setting(file, family, kld) -> (arrays, images, labels, model), all in one dtype."""

    def build(name, precision, family, kld=None, count=6, prefix=""):
        dtype = PRECISIONS[precision]
        arrays = {k: torch.as_tensor(v) for k, v in golden(name).items() if k != "meta_json"}
        model = pae.PromptedViT(tiny_vit(dtype), family, kld).train()
        with torch.no_grad():
            shallow = arrays[f"{prefix}prompt_shallow"].to(dtype)
            if isinstance(family, pae.prompts.VPTDeep):
                deep = arrays[f"{prefix}prompt_deep"].to(dtype)
                family.set_prompts([shallow, *deep])
            else:
                family.tokens.copy_(shallow)
            if kld is not None:
                kld.lift.weight.copy_(arrays[f"{prefix}koopman_in_weight"])
                kld.K.copy_(arrays[f"{prefix}K"])
                kld.L.copy_(arrays[f"{prefix}L"])
        data = golden("data")
        images = torch.as_tensor(data["images"][:count]).to(dtype)
        return arrays, images, torch.as_tensor(data["labels"][:count]), model

    return build


def close(got, expected, tolerance):
    return (got.detach().double() - expected.double()).abs().max() <= tolerance


def run(model, images, engine):
    return pae.fast_forward(model, images) if engine == "fast" else model(images)


def test_without_prompts(golden, tiny_vit, precision, engine):
    data = golden("data")
    model = pae.PromptedViT(tiny_vit(PRECISIONS[precision]), pae.prompts.VPTDeep(0))
    logits = run(model, torch.as_tensor(data["images"]).to(PRECISIONS[precision]), engine)
    assert close(logits, torch.as_tensor(data[f"noprompt/{precision}/logits"]), VALUE[precision])


@pytest.mark.parametrize("name", ["vpt_deep", "vpt_shallow"])
def test_vpt(setting, name, precision, engine):
    family = {"vpt_deep": pae.prompts.VPTDeep, "vpt_shallow": pae.prompts.VPTShallow}[name](5)
    arrays, images, labels, model = setting(name, precision, family)
    logits = run(model, images, engine)
    loss = F.cross_entropy(logits, labels) + model.penalty()
    loss.backward()
    assert close(logits, arrays[f"{precision}/logits"], VALUE[precision])
    assert close(loss, arrays[f"{precision}/loss"], VALUE[precision])
    grad = family.tokens.grad
    if name == "vpt_deep":
        expected = arrays[f"{precision}/grad_prompt_deep"]
        assert error(grad[1:], expected) <= GRADIENT[precision]
        grad = grad[0]
    for got, key in (
        (grad, "prompt_shallow"),
        (model.head.weight.grad, "head_weight"),
        (model.head.bias.grad, "head_bias"),
    ):
        assert error(got, arrays[f"{precision}/grad_{key}"]) <= GRADIENT[precision], key


POOL_NAMES = {"original": "all", "img_pool": "image", "prompt_pool": "prompts"}


@pytest.mark.parametrize("name", POOL_NAMES)
@pytest.mark.parametrize("mode", ["deep", "shallow"])
def test_pooled_rows(golden, tiny_vit, mode, name, precision, engine):
    """VPT on an MAE backbone: three sets of rows in the mean, then a norm of its own."""
    arrays, dtype = stored(golden, "mae_pool", precision)
    vit = pae.backbones.average_pooled(tiny_vit(dtype))
    vit.fc_norm.load_state_dict({k: arrays[f"fc_norm.{k}"] for k in ("weight", "bias")})
    family = (pae.prompts.VPTDeep if mode == "deep" else pae.prompts.VPTShallow)(5)
    model = pae.PromptedViT(vit, family, pool=POOL_NAMES[name]).train()
    family.set_prompts(
        [arrays["prompt_shallow"], *(arrays["prompt_deep"] if mode == "deep" else [None] * 3)]
    )
    vit.fc_norm.requires_grad_(True)  # frozen in the released code, and in ours
    data = golden("data")
    images = torch.as_tensor(data["images"][:6]).to(dtype)
    at = f"{mode}_{name}/{precision}/"
    features = model.features(images, engine)
    assert close(features, arrays[f"{at}features"], VALUE[precision])
    logits = model.head(features)
    loss = F.cross_entropy(logits, torch.as_tensor(data["labels"][:6]))
    loss.backward()
    assert close(logits, arrays[f"{at}logits"], VALUE[precision])
    assert close(loss, arrays[f"{at}loss"], VALUE[precision])
    grad = family.tokens.grad
    pairs = [
        (grad[0] if mode == "deep" else grad, "prompt_shallow"),
        (vit.fc_norm.weight.grad, "fc_norm_weight"),
        (vit.fc_norm.bias.grad, "fc_norm_bias"),
        (model.head.weight.grad, "head_weight"),
        (model.head.bias.grad, "head_bias"),
    ]
    if mode == "deep":
        pairs.append((grad[1:], "prompt_deep"))
    check_gradients(arrays, at, pairs, precision)


@pytest.mark.parametrize("name", ["vpt_deep", "vpt_shallow"])
def test_class_row_after_every_block(setting, name, precision, engine):
    """Not the logits alone: the class row of block i, read through a model of i + 1 blocks."""
    family = {"vpt_deep": pae.prompts.VPTDeep, "vpt_shallow": pae.prompts.VPTShallow}[name]
    for depth in range(1, 5):
        arrays, images, _, model = setting(name, precision, family(5))
        vit = model.backbone
        vit.blocks, vit.norm = vit.blocks[:depth], torch.nn.Identity()
        tokens = model.prompts.tokens.detach()
        shorter = family(5)
        short = pae.PromptedViT(vit, shorter, num_classes=1)
        short.head = torch.nn.Identity()
        with torch.no_grad():
            shorter.tokens.copy_(tokens[:depth] if name == "vpt_deep" else tokens)
        rows = arrays[f"{precision}/cls_after_block"][depth - 1]
        tolerance = max(VALUE[precision], 1e-6)  # stored as float32
        assert close(run(short, images, engine), rows, tolerance), depth


@pytest.mark.parametrize("state", ["", "init_"])
@pytest.mark.parametrize("mode", ["global", "layerwise"])
def test_kld(setting, mode, state, precision, engine):
    kld = pae.KLD(dim=32, mode=mode)
    name = f"pae_kld_{state}{mode}"
    arrays, images, labels, model = setting(name, precision, pae.prompts.VPTDeep(5), kld)
    logits = run(model, images, engine)
    consistency, lyapunov = kld.terms(model.prompts.raw_prompts())
    penalty = model.penalty()
    loss = F.cross_entropy(logits, labels)
    total = loss + penalty
    total.backward()
    for got, key in (
        (logits, "logits"),
        (loss, "ce"),
        (consistency, "koopman_loss"),
        (lyapunov, "lyapunov_loss"),
        (penalty, None),
        (total, "total"),
    ):
        expected = arrays[f"{precision}/koopman_loss"] + arrays[f"{precision}/lyapunov_loss"]
        expected = expected if key is None else arrays[f"{precision}/{key}"]
        scale = max(1.0, expected.abs().max().item()) if precision == "f32" else 1.0
        assert close(got, expected, VALUE[precision] * scale), key
    last = slice(None, -1) if mode == "layerwise" else slice(None)  # its last K, L: in no pair
    for got, key in (
        (model.prompts.tokens.grad[0], "prompt_shallow"),
        (model.prompts.tokens.grad[1:], "prompt_deep"),
        (kld.lift.weight.grad, "koopman_in_weight"),
        (kld.K.grad[last], "K"),
        (kld.L.grad[last], "L"),
    ):
        expected = arrays[f"{precision}/total_grad_{key}"]
        expected = expected[last] if key in "KL" else expected
        if state and key == "L":  # at K = L = I
            assert close(got, torch.zeros_like(got), 0)
            assert close(expected, torch.zeros_like(got), 0)
        else:
            assert error(got, expected) <= GRADIENT[precision], key
    if mode == "layerwise":
        assert close(kld.K.grad[-1], torch.zeros(32, 32), 0)
        assert close(kld.L.grad[-1], torch.zeros(32, 32), 0)


@pytest.mark.parametrize("group", ["global", "layerwise_wd", "init_state", "clip"])
def test_sgd_trace(setting, golden, group, precision, engine):
    """Ten steps of the released training loop: losses, norms before clipping, final parameters."""
    options = json.loads(str(golden("sgd_trace")["meta_json"]))["groups"][group]
    kld = pae.KLD(
        dim=32,
        mode=options["koopman_mode"],
        consistency_weight=options["koopman_weight"],
        lyapunov_weight=options["lyapunov_weight"],
    )
    arrays, images, labels, model = setting(
        "sgd_trace", precision, pae.prompts.VPTDeep(5), kld, 16, f"{group}/init_"
    )
    optimizer = torch.optim.SGD(
        model.parameter_groups(options["lr"], options["weight_decay"]), momentum=0.9
    )
    found = {k: [] for k in ("loss", "ce", "koopman_loss", "lyapunov_loss", "koopman_grad_norm")}
    logits = []
    for _ in range(10):
        logits.append(run(model, images, engine))
        consistency, lyapunov = kld.terms(model.prompts.raw_prompts())
        ce = F.cross_entropy(logits[-1], labels)
        loss = ce + model.penalty()
        optimizer.zero_grad()
        loss.backward()
        norm = kld.clip_gradients()
        optimizer.step()
        for key, value in zip(found, (loss, ce, consistency, lyapunov, norm), strict=True):
            found[key].append(value.item())

    for key, values in found.items():
        expected = arrays[f"{group}/{precision}/{key}"].double()
        difference = (torch.tensor(values, dtype=torch.float64) - expected).abs()
        if precision == "f64":
            assert difference.max() <= 1e-8 * max(1.0, expected.max()), key
        else:
            assert (difference <= 1e-4 * expected.abs()).all(), key
    if group == "clip":
        assert max(found["koopman_grad_norm"]) > 10  # else nothing was clipped
    tolerance = {"f32": 1e-4, "f64": 1e-7}[precision]
    assert error(logits[0], arrays[f"{group}/{precision}/logits_step0"]) <= tolerance
    assert error(logits[-1], arrays[f"{group}/{precision}/logits_last_step"]) <= tolerance
    last = slice(None, -1) if options["koopman_mode"] == "layerwise" else slice(None)
    for got, key in (
        (model.prompts.tokens[0], "prompt_shallow"),
        (model.prompts.tokens[1:], "prompt_deep"),
        (kld.lift.weight, "koopman_in_weight"),
        (kld.K[last], "K"),
        (kld.L[last], "L"),
        (model.head.weight, "head_weight"),
        (model.head.bias, "head_bias"),
    ):
        expected = arrays[f"{group}/f64/final_{key}"]
        assert error(got, expected[last] if key in "KL" else expected) <= tolerance, key


def stored(golden, name, precision):
    """The file's arrays, those of float type in the dtype of the run, and that dtype."""
    dtype = PRECISIONS[precision]
    arrays = {k: torch.as_tensor(v) for k, v in golden(name).items() if k != "meta_json"}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in arrays.items()}, dtype


def check_gradients(arrays, prefix, pairs, precision):
    """Every gradient beside `{prefix}grad_{key}`."""
    for got, key in pairs:
        assert error(got, arrays[f"{prefix}grad_{key}"]) <= GRADIENT[precision], (prefix, key)


@pytest.mark.parametrize(
    "case, kwargs, masked",
    [
        ("share_masks", {"masks": "learned"}, True),
        ("separate_masks", {"masks": "learned", "share_kv": False}, True),
        ("ones_masks", {"masks": "learned"}, False),
        ("share_nomasks", {}, False),
        ("rewound", {}, False),
    ],
)
def test_e2vpt(golden, tiny_vit, case, kwargs, masked, precision, engine):
    arrays, dtype = stored(golden, "e2vpt", precision)
    data, _ = stored(golden, "data", precision)
    family = pae.prompts.E2VPT(5, 4, **kwargs, pieces=8)
    if case == "rewound":  # the masks that pruning 40 % leaves, by the stored importance
        scores = [arrays[f"ones_masks/f64/grad_{m}_mask"] for m in ("token", "piece")]
        old = pae.prompts.E2VPT(5, 4, masks="learned", pieces=8)
        family = old.rewound(pae.prompts.E2VPTImportance(*scores), 0.4, 0.4)
    model = pae.PromptedViT(tiny_vit(dtype), family).train()
    with torch.no_grad():
        family.tokens.copy_(torch.cat([arrays["prompt_shallow"][None], arrays["prompt_deep"]]))
        family.keys_values.copy_(arrays["kv"][:, :, : 2 - family.share_kv])
        if masked:
            family.token_mask.copy_(arrays["token_mask"])
            family.piece_mask.copy_(arrays["piece_mask"])
    if case == "rewound":
        assert torch.equal(family.token_mask.to(dtype), arrays["rewound/token_mask"])
        assert torch.equal(family.piece_mask.to(dtype), arrays["rewound/piece_mask"])
    logits = run(model, data["images"][:6], engine)
    loss = F.cross_entropy(logits, data["labels"][:6])
    loss.backward()
    at = f"{case}/{precision}/"
    assert close(logits, arrays[f"{at}logits"], VALUE[precision])
    assert close(loss, arrays[f"{at}loss"], VALUE[precision])
    kv = arrays[f"{at}grad_kv"][:, :, : 2 - family.share_kv]
    assert error(family.keys_values.grad, kv) <= GRADIENT[precision]
    pairs = [
        (family.tokens.grad[0], "prompt_shallow"),
        (family.tokens.grad[1:], "prompt_deep"),
        (model.head.weight.grad, "head_weight"),
        (model.head.bias.grad, "head_bias"),
    ]
    if kwargs.get("masks"):
        pairs.append((family.piece_mask.grad, "piece_mask"))
        # LayerNorm undoes the length of a row up to its eps: what is left is of that order
        tolerance = {"f32": 0.1, "f64": 1e-8}[precision]
        assert error(family.token_mask.grad, arrays[f"{at}grad_token_mask"]) <= tolerance
    check_gradients(arrays, at, pairs, precision)


def test_e2vpt_pruning(golden, precision, engine):
    """How many tokens and pieces every published percentage drops, and which."""
    arrays, _ = stored(golden, "e2vpt", precision)
    for row, (tokens, pieces) in enumerate(arrays["counts/sizes"].tolist()):
        family = pae.prompts.E2VPT(tokens, 0, masks="learned", pieces=pieces)
        importance = pae.prompts.E2VPTImportance(torch.rand(tokens), torch.rand(tokens, pieces))
        for step, share in enumerate(range(10, 100, 10)):
            made = family.rewound(importance, share / 100, share / 100)
            token_mask, piece_mask = made._start_masks
            for mask, expected in (
                (token_mask, arrays["counts/tokens_pruned"][row, step]),
                (piece_mask[0], arrays["counts/pieces_pruned"][row, step]),
            ):
                assert expected in ((mask == 0).sum(), -1), (tokens, pieces, share)
    scores = [arrays[f"ones_masks/f64/grad_{m}_mask"] for m in ("token", "piece")]
    family = pae.prompts.E2VPT(5, 4, masks="learned", pieces=8)
    for name, steps in (("token", 9), ("piece", 7)):
        for step in range(steps):
            share = (step + 1) / 10
            masks = family.rewound(pae.prompts.E2VPTImportance(*scores), share, share)._start_masks
            expected = arrays[f"prune/{name}_masks"][step]
            assert torch.equal(masks[name == "piece"].to(expected), expected), (name, step)


@pytest.mark.parametrize("case", ["scales", "ones", "noscale"])
def test_apt(golden, case, precision, engine):
    """On images; the tubes of the file need a Conv3d stem."""
    arrays, dtype = stored(golden, "apt", precision)
    vit = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=4,
        num_heads=2,
        mlp_ratio=2,
        class_token=False,
        global_pool="avg",
        fc_norm=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        num_classes=10,
    ).to(dtype)
    weights = {k.removeprefix("timm/"): v for k, v in arrays.items() if k.startswith("timm/")}
    weights["pos_embed"] = arrays["image/timm/pos_embed"]
    vit.load_state_dict(weights)
    family = pae.prompts.APT(5)
    model = pae.PromptedViT(vit, family).train()
    with torch.no_grad():
        family.keys.copy_(arrays["keys"])
        family.values.copy_(arrays["values"])
        family.scales.copy_(arrays["scales"] if case == "scales" else torch.ones(4, 2, 5))
    logits = run(model, arrays["image/images"], engine)
    loss = F.cross_entropy(logits, arrays["labels"])
    loss.backward()
    at = f"image_{case}/{precision}/"
    assert close(logits, arrays[f"{at}logits"], VALUE[precision])
    assert close(loss, arrays[f"{at}loss"], VALUE[precision])
    pairs = [
        (family.keys.grad, "keys"),
        (family.values.grad, "values"),
        (model.head.weight.grad, "head_weight"),
        (model.head.bias.grad, "head_bias"),
    ]
    if case != "noscale":
        pairs.append((family.scales.grad, "scales"))
    check_gradients(arrays, at, pairs, precision)


def test_nsp2(golden, tiny_vit, precision, engine):
    """Sums over two batches, projections, and three projected steps of Adam."""
    arrays, dtype = stored(golden, "nsp2", precision)
    data, _ = stored(golden, "data", precision)
    images, labels = data["images"][:6], data["labels"][:6]
    family = pae.prompts.VPTDeep(5)
    model = pae.PromptedViT(tiny_vit(dtype), family).train()
    space = NullSpace(model, (0.97, 0.95), official=True, accumulate="batches")
    at = f"{precision}/"
    # what lies between: the sums are read at the prompts the steps start from, drift is measured
    # from others
    with torch.no_grad():
        family.tokens.copy_(arrays["prompts"])
    space.observe([images[:3], images[3:]])
    for got, key in zip((space.C1, space.C2, *space.projections()), NSP2_SUMS, strict=True):
        assert error(got, arrays[f"{at}{key}"]) <= GRADIENT[precision], key
    old = arrays["prompts_old"].double()
    space.means.copy_(old.mean(-1))
    space.deviations.copy_(old.std(-1, correction=0))
    optimizer = space.project(
        torch.optim.Adam([family.tokens], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=5e-5)
    )
    start = family.tokens.detach().clone()
    for step in range(3):
        logits = run(model, images, engine)
        ce, penalty = F.cross_entropy(logits / 28, labels), space.penalty()
        if step == 0:
            assert close(logits, arrays[f"{at}logits"], VALUE[precision])
        assert close(ce, arrays[f"{at}ce"][step], VALUE[precision])
        assert close(penalty, arrays[f"{at}penalty"][step], 10 * VALUE[precision])
        optimizer.zero_grad()
        (ce + penalty).backward()
        if step == 0:
            assert error(family.tokens.grad, arrays[f"{at}grad_prompts"]) <= GRADIENT[precision]
        optimizer.step()
        if step == 0:
            update = family.tokens.detach() - start
            assert error(update, arrays[f"{at}first_update"]) <= GRADIENT[precision]
    assert error(family.tokens, arrays[f"{at}prompts_after"]) <= GRADIENT[precision]


NSP2_SUMS = ("C1", "C2", "projection1", "projection2")
