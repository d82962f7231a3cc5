"""VAPT: released numbers, the literal formula, what it reduces to, what a regulariser sees."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pae
from pae.prompts import VAPT, VPTDeep
from tests import tiny
from tests.tiny import assert_engines_agree, error, gradients

PRECISIONS = {"f32": torch.float32, "f64": torch.float64}
WITHOUT_DROPOUT = {"channel_dropout": 0.0, "hidden_dropout": 0.0}
# switches of the golden group "variant"
VARIANT = {
    "kernel": 3,
    "padding": 1,
    "activation": "gelu",
    "static_blocks": 2,
    "kernel_per_channel": True,
    "share_bottleneck": False,
    "learn_scale": True,
}
OPTIONS = {
    "default": {},
    "variant": VARIANT,
    "no_kernel": {"kernel": 0},
    "kernel_of_one": {"kernel": 1, "kernel_per_channel": True},
    "kernel_as_large_as_the_grid": {"kernel": 4},
    "no_bottleneck": {"hidden": 0},
    "sigmoid": {"activation": "sigmoid", "hidden": 3},
    "softmax": {"activation": "softmax", "share_bottleneck": False},
    "all_blocks": {"static_blocks": 0},
    "last_block_alone": {"static_blocks": 2, "learn_scale": True},
}


def prompted(feature="plain", dtype=torch.float64, kld=None, trained=True, **options):
    """In training mode; `trained` moves every parameter off its initial value."""
    torch.manual_seed(0)
    family = VAPT(4, **{**WITHOUT_DROPOUT, **options})
    made = pae.PromptedViT(tiny.backbone(feature, dtype), family, kld).train()
    if trained:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in family.parameters():
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.add_(0.3 * noise.to(dtype))
    return made


def literal(family, index, x, channels=None, units=None):
    """The formula as published, step by step, with a convolution over maps; dropout as masks."""
    number = index - family.static_blocks
    mixer = family.mixers[number]
    pair = family.bottlenecks[0 if family.share_bottleneck else number]
    width = x.shape[-1]
    rows = F.layer_norm(x[:, mixer.prefix :], (width,), mixer.gain, mixer.offset, 1e-5)
    maps = rows.transpose(1, 2).unflatten(2, mixer.grid)
    if mixer.kernel is not None:
        kernels = mixer.kernel.expand(width, *mixer.kernel.shape[-2:])
        maps = F.conv2d(maps, kernels[:, None], padding=mixer.padding, groups=width)
    if channels is not None:
        maps = maps * channels[:, :, None, None]
    g = F.linear(maps.flatten(2), mixer.weight, mixer.bias).transpose(1, 2)
    h = F.linear(g, pair.down)
    z = F.softmax(h, -1) if family.activation == "softmax" else getattr(F, family.activation)(h)
    z = z if units is None else z * units
    scale = 1 if pair.scale is None else pair.scale
    return g + scale * F.linear(z, pair.up)


# ---- the released implementation's numbers


@pytest.fixture
def released(golden):
    """released(group, precision) -> (arrays of the group, images, labels, model)."""

    def build(group, precision):
        arrays = {k: torch.as_tensor(v) for k, v in golden("vapt").items() if k != "meta_json"}
        vit = VisionTransformer(
            img_size=28, patch_size=2, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2,
            norm_layer=partial(nn.LayerNorm, eps=1e-6), num_classes=10,
        )  # fmt: skip
        # its own stem, all else from the backbone of the other files
        frozen = {k: v for k, v in (golden("backbone") | golden("vapt")).items() if "timm/" in k}
        vit.load_state_dict(
            {k.removeprefix("timm/"): torch.as_tensor(v) for k, v in frozen.items()}
        )
        family = VAPT(5, **WITHOUT_DROPOUT, **(VARIANT if group == "variant" else {}))
        model = pae.PromptedViT(vit.to(PRECISIONS[precision]), family).train()
        images, labels = arrays["images"].to(PRECISIONS[precision]), arrays["labels"]
        arrays = {
            k.removeprefix(f"{group}/"): v for k, v in arrays.items() if k.startswith(f"{group}/")
        }
        own = names_of(family)
        assert {f"param/{name}" for name in own.values()} == {
            k for k in arrays if k.startswith("param/")
        }
        with torch.no_grad():
            for ours, theirs in own.items():
                pick(family, ours).copy_(arrays[f"param/{theirs}"].view_as(pick(family, ours)))
        return arrays, images, labels, model

    return build


def names_of(family):
    """Ours -> the released code's; tokens of several static blocks lie in several parameters."""
    names = {("tokens", 0): "prompt_embeddings"}
    if family.static_blocks == 2:
        names["tokens", 1] = "deep_prompt_embeddings"
    for j in range(len(family.mixers)):
        names["mixers", j, "gain"] = f"deep_prompt_norm.{j}.weight"
        names["mixers", j, "offset"] = f"deep_prompt_norm.{j}.bias"
        names["mixers", j, "kernel"] = f"deep_prompt_downsample.{j}.conv.kernel"
        names["mixers", j, "weight"] = f"deep_prompt_downsample.{j}.linear.weight"
        names["mixers", j, "bias"] = f"deep_prompt_downsample.{j}.linear.bias"
    for j in range(len(family.bottlenecks)):
        where = "deep_prompt_embeddings_mlp" + ("" if family.share_bottleneck else f".{j}")
        names["bottlenecks", j, "down"] = f"{where}.block.0.weight"
        names["bottlenecks", j, "up"] = f"{where}.block.2.weight"
        if family.learn_scale:
            names["bottlenecks", j, "scale"] = f"{where}.scale"
    return {ours: f"transformer.{theirs}" for ours, theirs in names.items()}


def pick(family, path, grad=False):
    name, index, *rest = path
    if name == "tokens":
        return family.tokens.grad[index] if grad else family.tokens[index]
    parameter = getattr(getattr(family, name)[index], rest[0])
    return parameter.grad if grad else parameter


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("group", ["default", "variant", "init"])
def test_released_numbers(released, group, precision, engine):
    arrays, images, labels, model = released(group, precision)
    value, gradient = {"f32": (1e-5, 1e-4), "f64": (1e-9, 1e-6)}[precision]
    made = []
    block_prompts = model.prompts.block_prompts
    model.prompts.block_prompts = lambda i, x: made.append(block_prompts(i, x)) or made[-1]
    logits = model(images, engine=engine)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    assert (logits.double() - arrays[f"{precision}/logits"].double()).abs().max() <= value
    assert abs(loss.item() - arrays[f"{precision}/loss"].item()) <= value
    adaptive = torch.stack(made[model.prompts.static_blocks :]).detach().double()
    expected = arrays[f"{precision}/adaptive_prompts"].double()
    if group == "init":
        assert not expected.any() and not adaptive.any()
        return
    assert error(adaptive, expected) <= max(gradient, 1e-6)  # stored as float32
    for ours, theirs in names_of(model.prompts).items():
        expected = arrays[f"{precision}/grad/{theirs}"]
        got = pick(model.prompts, ours, grad=True)
        assert error(got, expected.view_as(got)) <= gradient, ours
    for name in ("weight", "bias"):
        got = getattr(model.head, name).grad
        assert error(got, arrays[f"{precision}/grad/head.{name}"]) <= gradient


# ---- the literal formula


@pytest.mark.parametrize("masks", [True, False], ids=["dropout", "no_dropout"])
@pytest.mark.parametrize("feature", ["plain", "registers", "not_square", "avg_no_class_token"])
@pytest.mark.parametrize("options", OPTIONS)
def test_prompts_equal_the_literal_formula(options, feature, masks):
    """Value, and gradients of the rows and of every parameter."""
    options = OPTIONS[options]
    if feature == "not_square" and options.get("kernel") == 4:
        options = {"kernel": 2}  # its grid is 2 x 4
    dropouts = {"channel_dropout": 0.4, "hidden_dropout": 0.4} if masks else {}
    model = prompted(feature, **options, **dropouts)
    family, index = model.prompts, 2
    x = model.view.embed(tiny.images(model.backbone)).detach().requires_grad_()
    weights = torch.randn(3, 4, 32, dtype=torch.float64)

    def results(prompts):
        leaves = {"x": x, **dict(family.named_parameters())}
        grads = torch.autograd.grad((prompts * weights).sum(), leaves.values(), allow_unused=True)
        return prompts.detach(), dict(zip(leaves, grads))

    torch.manual_seed(5)
    got, got_grads = results(family.block_prompts(index, x))
    channels = units = None
    if masks:
        torch.manual_seed(5)
        channels = F.dropout(x.new_ones(3, 32), 0.4)
        units = F.dropout(x.new_ones(3, 4, family.hidden), 0.4)
        assert (channels == 0).any() and (channels[0] != channels[1]).any()
    expected, expected_grads = results(literal(family, index, x, channels, units))
    assert error(got, expected) <= 1e-10
    for name, grad in expected_grads.items():
        if grad is None or grad.numel() == 0:
            assert got_grads[name] is None or got_grads[name].numel() == 0, name
        else:
            assert error(got_grads[name], grad) <= 1e-10, name
    assert not got_grads["x"][:, : model.view.num_prefix_tokens].any()


def test_single_precision_of_near_zero_rows():
    """LayerNorm of rows far below sqrt(eps): eps decides."""
    model = prompted(dtype=torch.float32)
    x = 1e-4 * model.view.embed(tiny.images(model.backbone)).detach()
    wide = copy.deepcopy(model).double()
    got = model.prompts.block_prompts(1, x)
    assert error(got, literal(wide.prompts, 1, x.double())) < 1e-5
    constant = torch.ones_like(x)  # no variance at all
    got, expected = (
        f(1, constant) for f in (model.prompts.block_prompts, partial(literal, model.prompts))
    )
    assert torch.isfinite(got).all() and error(got, expected) < 1e-5


def test_dropped_channels_are_dropped_for_all_prompts_of_an_image():
    model = prompted(hidden=0, channel_dropout=0.5)
    with torch.no_grad():
        for mixer in model.prompts.mixers:
            mixer.bias.zero_()
    x = model.view.embed(tiny.images(model.backbone))
    gone = model.prompts.block_prompts(1, x) == 0
    assert gone.any() and not gone.all()
    assert (gone == gone[:, :1]).all() and (gone[0] != gone[1]).any()
    assert (model.prompts.block_prompts(1, x) != model.prompts.block_prompts(1, x)).any()
    model.eval()
    assert torch.equal(model.prompts.block_prompts(1, x), model.prompts.block_prompts(1, x))
    assert error(model.prompts.block_prompts(1, x), literal(model.prompts, 1, x)) < 1e-12


# ---- both engines


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("feature", ["plain", "avg", "qk_norm", "registers"])
def test_engines_agree(options, feature):
    model = prompted(feature, **OPTIONS[options])
    assert_engines_agree(model, tiny.images(model.backbone))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_engines_agree_with_dropout(training):
    chances = {"channel_dropout": 0.3, "hidden_dropout": 0.3, "dropout": 0.3}
    model = prompted(**chances, dropout_scope="sample").train(training)
    x = tiny.images(model.backbone)
    for memory in ("keep", "recompute"):
        assert_engines_agree(model, x, memory=memory, wrt_images=False)
    first, again = (gradients(model, x, "fast", seed=s)[0] for s in (3, 4))
    assert torch.equal(first, again) != training


def test_single_precision():
    model = prompted(dtype=torch.float32, channel_dropout=0.1, hidden_dropout=0.1)
    assert_engines_agree(model, tiny.images(model.backbone))


def test_no_convolution_runs():
    """Nor a LayerNorm that is written out for the prompts: one product of rows per block."""

    class Ops(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    model = prompted(**VARIANT)
    x = tiny.images(model.backbone)
    with Ops() as forward:
        loss = pae.fast_forward(model, x).sum()
    with Ops() as backward:
        loss.backward()
    convolutions = [n for n in (*forward.names, *backward.names) if "convolution" in n]
    assert convolutions == ["convolution"]  # the patch embedding
    assert forward.names.count("token_mix_fwd") == 1
    assert backward.names.count("token_mix_bwd") == 1


def test_compiled_step_equals_eager():
    """The last batch's rows leave the graph, for the regulariser."""
    torch.manual_seed(0)
    vit = tiny.backbone(dtype=torch.float32, depth=2)
    model = pae.PromptedViT(vit, VAPT(4, **WITHOUT_DROPOUT, static_blocks=0), pae.KLD(dim=6))
    x = tiny.images(model.train().backbone)

    def step(x):
        logits = pae.fast_forward(model, x)
        return logits.square().sum() + model.penalty()

    def run(step):
        model.zero_grad()
        loss = step(x)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [loss.detach(), *grads]

    expected = run(step)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager")
    for _ in range(2):
        for got, wanted in zip(run(compiled), expected, strict=True):
            assert error(got, wanted) < 1e-5


# ---- what it reduces to


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_prompts_start_as_exact_zeros(activation):
    """And only the static prompts, the projections and their biases get a gradient at first."""
    model = prompted(trained=False, activation=activation, channel_dropout=0.1)
    x = tiny.images(model.backbone)
    rows = model.view.embed(x)
    for i in (1, 2):
        prompts = model.prompts.block_prompts(i, rows)
        assert prompts.shape == (3, 4, 32) and not prompts.any()
    zeros = pae.PromptedViT(tiny.backbone(), VPTDeep(4)).train()
    with torch.no_grad():
        zeros.prompts.tokens.zero_()[0].copy_(model.prompts.tokens[0])
    for engine in ("reference", "fast"):
        logits, grads = gradients(model, x, engine)
        assert error(logits, gradients(zeros, x, engine)[0]) < 1e-13
        moving = {n for n, g in grads.items() if n.startswith("prompts.") and g.any()}
        if activation == "relu":  # GELU's slope at 0 is 1/2, and then W1 stays, but W2 stays, too
            expected = {"prompts.tokens"}
            expected |= {f"prompts.mixers.{j}.{n}" for j in (0, 1) for n in ("weight", "bias")}
            assert moving == expected


def test_only_static_blocks_are_vpt_deep():
    adaptive, plain = (
        prompted(static_blocks=3),
        pae.PromptedViT(tiny.backbone(), VPTDeep(4)).train(),
    )
    with torch.no_grad():
        plain.prompts.tokens.copy_(adaptive.prompts.tokens)
    x = tiny.images(plain.backbone)
    for engine in ("reference", "fast"):
        got, got_grads = gradients(adaptive, x, engine)
        expected, expected_grads = gradients(plain, x, engine)
        assert error(got, expected) < 1e-13
        assert error(got_grads["prompts.tokens"], expected_grads["prompts.tokens"]) < 1e-12


VIT_B = pae.prompts.BackboneShape(
    depth=12, width=768, num_heads=12, patch_size=(16, 16), in_chans=3, num_tokens=197,
    num_prefix_tokens=1, grid=(14, 14), head_width=64, has_class_token=True,
)  # fmt: skip


def test_parameter_count():
    """ViT-B/16, P = 50, K = 2, r = 8: 161,128 trained parameters without the head."""
    family = VAPT(50)
    family.bind(VIT_B)
    assert sum(p.numel() for p in family.parameters()) == 161_128


def test_initialisation():
    torch.manual_seed(0)
    family = VAPT(50, kernel=7, learn_scale=True)
    family.bind(VIT_B)
    kernels = torch.stack([m.kernel for m in family.mixers])
    assert abs(kernels.mean()) < 0.15 and abs(kernels.std() - 1) < 0.1
    (pair,) = family.bottlenecks
    assert 0.95 / 768**0.5 < pair.down.abs().max() <= 1 / 768**0.5
    assert 0.95 / 8**0.5 < pair.up.abs().max() <= 1 / 8**0.5
    assert pair.scale == 1
    for mixer in family.mixers:
        assert not mixer.weight.any() and not mixer.bias.any() and not mixer.offset.any()
        assert (mixer.gain == 1).all()


# ---- what a regulariser sees


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_raw_prompts_are_the_last_batchs_means_without_dropout(engine):
    model = prompted(channel_dropout=0.3, hidden_dropout=0.3, dropout=0.3)
    family, seen = model.prompts, {}
    block_prompts = family.block_prompts
    family.block_prompts = lambda i, x: seen.update({i: x}) or block_prompts(i, x)
    for seed in (7, 8):  # the second batch is what counts
        model(tiny.images(model.backbone, seed=seed), engine=engine)
    raw = family.raw_prompts()
    assert torch.equal(raw[0], family.tokens[0])
    for i in (1, 2):
        assert error(raw[i], literal(family, i, seen[i]).mean(0)) < 1e-12
    leaves = [family.tokens, family.mixers[0].weight, family.mixers[1].kernel]
    scalar = sum(r.square().sum() for r in raw[1:])
    got = torch.autograd.grad(scalar, leaves, retain_graph=True)
    scalar = sum(literal(family, i, seen[i]).mean(0).square().sum() for i in (1, 2))
    for a, b in zip(got, torch.autograd.grad(scalar, leaves), strict=True):
        assert error(a, b) < 1e-10  # also through the rows, to the static prompts


@pytest.mark.parametrize("training", [True, False])
def test_raw_prompts_without_a_graph_are_constants(training):
    model = prompted(channel_dropout=0.3, hidden_dropout=0.3).train(training)
    x = tiny.images(model.backbone)
    model(x)
    expected = [r.detach() for r in model.prompts.raw_prompts()]
    with torch.no_grad():
        model(x)
    raw = model.prompts.raw_prompts()
    for i in (1, 2):
        assert not raw[i].requires_grad
    if not training:  # in training, dropout of block 1 reaches the rows of block 2
        for a, b in zip(raw, expected, strict=True):
            assert error(a, b) < 1e-13


def test_raw_prompts_before_any_batch():
    model = prompted(kld=pae.KLD(dim=6))
    with pytest.raises(RuntimeError, match="run a forward before asking for them"):
        model.penalty()
    model(tiny.images(model.backbone))
    model.penalty()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match="run a forward"):  # the batch stays with the first
            copied.penalty()
        assert_engines_agree(copied, tiny.images(model.backbone))


def test_regulariser_reaches_every_parameter():
    model = prompted(kld=pae.KLD(dim=6))
    x = tiny.images(model.backbone)

    def grads(engine):
        model.zero_grad()
        (0 * model(x, engine=engine).sum() + model.penalty()).backward()
        return {n: p.grad for n, p in model.prompts.named_parameters()}

    expected, got = grads("reference"), grads("fast")
    for name, grad in expected.items():
        assert grad.any(), name
        assert error(got[name], grad) < 1e-9, name


def test_batch_gradient_is_the_mean_of_the_images():
    """The prompts of an image depend on no other image."""
    model = prompted().eval()
    x = tiny.images(model.backbone)
    together = model(x, engine="fast")
    apart = torch.cat([model(image[None], engine="fast") for image in x])
    assert error(together, apart) < 1e-12
    assert model(x[:0], engine="fast").shape == (0, 5)


# ---- errors


def test_prompts_cannot_be_set():
    model = prompted()
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(VAPT\) computes its prompts, so none can be set"):
        pae.mpa_init(model, tiny.images(model.backbone), labels, 4, 4)


def test_other_image_sizes():
    torch.manual_seed(0)
    model = pae.PromptedViT(tiny.backbone("dynamic_size"), VAPT(4))
    wrong = tiny.images(model.backbone)  # 2 x 5 patches
    for engine in ("reference", "fast"):
        with pytest.raises(ValueError, match="4 x 4 patches for VAPT's token projection, 17 rows"):
            model(wrong, engine=engine)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_tokens": 0}, ValueError, "num_tokens must be at least 1, got 0"),
        ({"num_tokens": 2.0}, TypeError, "num_tokens must be an integer"),
        ({"kernel": -1}, ValueError, "kernel must be at least 0"),
        ({"padding": 2}, ValueError, "padding must be smaller than kernel, 2, got 2"),
        ({"kernel": 0, "padding": 1}, ValueError, "padding must be smaller than kernel, 0, got 1"),
        ({"hidden": True}, TypeError, "hidden must be an integer"),
        ({"activation": "tanh"}, ValueError, "activation must be one of .* got 'tanh'"),
        ({"static_blocks": -1}, ValueError, "static_blocks must be at least 0"),
        ({"kernel_per_channel": 1}, TypeError, "kernel_per_channel must be True or False, got 1"),
        ({"share_bottleneck": None}, TypeError, "share_bottleneck must be True or False"),
        ({"learn_scale": "yes"}, TypeError, "learn_scale must be True or False"),
        ({"channel_dropout": 1.0}, ValueError, r"channel_dropout must be a number in \[0, 1\)"),
        ({"hidden_dropout": -0.1}, ValueError, "hidden_dropout must be a number"),
        ({"dropout": 2}, ValueError, "dropout must be a number"),
        ({"dropout_scope": "image"}, ValueError, "dropout_scope must be"),
    ],
)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        VAPT(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 5}, "kernel must be at most 4 on a 4 x 4 grid padded by 0, got 5"),
        ({"kernel": 7, "padding": 1}, "kernel must be at most 6 on a 4 x 4 grid padded by 1"),
        ({"static_blocks": 4}, "static_blocks must be at most the backbone's 3 blocks, got 4"),
    ],
)
def test_options_that_do_not_fit_the_backbone(options, message):
    with pytest.raises(ValueError, match=message):
        pae.PromptedViT(tiny.backbone(), VAPT(**options))


def test_a_regulariser_without_the_graph_of_its_batch_is_refused():
    """Its part of the gradient would be missing: reentrant checkpointing runs without a graph."""
    model = prompted(kld=pae.KLD(dim=6), **WITHOUT_DROPOUT)
    x = tiny.images(model.backbone).requires_grad_()

    def grads(reentrant):
        logits = checkpoint(partial(model, engine="fast"), x, use_reentrant=reentrant)
        return torch.autograd.grad(logits.sum() + model.penalty(), list(model.prompts.parameters()))

    message = "the penalty on VAPT reads the last forward, which ran without a graph"
    tiny.refused(RuntimeError, message, partial(grads, True))
    for got, wanted in zip(grads(False), gradients_of(model, x)):
        assert error(got, wanted) < 1e-9
    with torch.no_grad():
        model(x)
        model.penalty()  # a number to look at
    tiny.refused(RuntimeError, message, model.penalty)
    plain = prompted()  # without a regulariser nothing reads it
    with torch.no_grad():
        plain(x)
    assert plain.penalty() == 0


def gradients_of(model, x):
    value = model(x).sum() + model.penalty()
    return torch.autograd.grad(value, list(model.prompts.parameters()))
