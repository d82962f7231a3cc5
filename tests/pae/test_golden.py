"""The released implementations' numbers, through both engines, in fp32 and fp64.

tests/golden/README.md says what every file is and where the tolerances come from.
"""

import json

import pytest
import torch
import torch.nn.functional as F

import pae
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
        if group == "init_state":
            # equal singular values: how ties are broken shows in L, and through it in the losses
            assert key == "koopman_grad_norm" or difference.max() <= 1e-3, key
        elif precision == "f64":
            assert difference.max() <= 1e-8 * max(1.0, expected.max()), key
        else:
            assert (difference <= 1e-4 * expected.abs()).all(), key
    if group == "init_state":
        return
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
