"""load_official: state dicts as the published code writes them, checked by its own numbers."""

import argparse
import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import pae
from pae.prompts import (
    APT,
    DAVPT,
    VAPT,
    BPTDeep,
    BPTShallow,
    ProVPT,
    VFPTDeep,
    VFPTShallow,
    VPTDeep,
    VPTShallow,
)

ENC = "enc.transformer."


def tensors(arrays):
    return {k: torch.as_tensor(v) for k, v in arrays.items() if k != "meta_json"}


@pytest.fixture
def file_of(golden):
    """file_of(parts) -> state dict with the whole frozen backbone and the head beside them."""
    weights = tensors(golden("backbone"))

    def build(parts, prefix=ENC):
        state = {
            prefix + k.removeprefix("official/transformer."): v
            for k, v in weights.items()
            if k.startswith("official/transformer.")
        }
        state |= {f"head.last_layer.{k}": weights[f"official/head.{k}"] for k in ("weight", "bias")}
        return state | {prefix + k: v for k, v in parts.items()}

    return build


def fresh(tiny_vit, family, kld=None):
    """A model whose prompts, regulariser and head are all drawn anew."""
    vit = tiny_vit(torch.float64)
    model = pae.PromptedViT(vit, family, kld, num_classes=10).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    return model


def logits_of(model, golden):
    return pae.fast_forward(model, torch.as_tensor(golden("data")["images"][:6]).double())


def same_logits(model, golden, name, group=""):
    expected = golden(name)[f"{group}f64/logits"]
    return (logits_of(model, golden) - torch.as_tensor(expected)).abs().max() <= 1e-7


# ---- what is loaded gives the published logits


@pytest.mark.parametrize("name", ["vpt_deep", "vpt_shallow"])
def test_vpt(golden, tiny_vit, file_of, name):
    arrays = tensors(golden(name))
    parts = {"prompt_embeddings": arrays["prompt_shallow"][None]}
    if name == "vpt_deep":
        parts["deep_prompt_embeddings"] = arrays["prompt_deep"]
    model = fresh(tiny_vit, VPTDeep(5) if name == "vpt_deep" else VPTShallow(5))
    state = file_of(parts)
    assert not same_logits(model, golden, name)
    loaded = pae.load_official(model, state)
    assert same_logits(model, golden, name)
    assert loaded.prompts == [ENC + k for k in parts]
    assert loaded.head == ["head.last_layer.weight", "head.last_layer.bias"]
    assert loaded.kld == loaded.ignored == []
    assert len(loaded.compared) == len(state) - len(parts) - 2


@pytest.mark.parametrize("group", ["deep_all_half", "deep_all_half_append", "shallow_all_half"])
def test_vfpt(golden, tiny_vit, file_of, group):
    arrays = tensors(golden("vfpt"))
    parts = {"prompt_embeddings": arrays["prompt_shallow"][None]}
    where = "append" if group.endswith("append") else "prepend"
    if group.startswith("deep"):
        parts["deep_prompt_embeddings"] = arrays["prompt_deep"]
        family = VFPTDeep(5, 0.5, location=where)
    else:
        family = VFPTShallow(5, 0.5)
    model = fresh(tiny_vit, family)
    pae.load_official(model, file_of(parts))
    assert same_logits(model, golden, "vfpt", f"{group}/")


@pytest.mark.parametrize("layout", ["list", "one_tensor"])
@pytest.mark.parametrize("mode", ["global", "layerwise"])
def test_pae(golden, tiny_vit, file_of, mode, layout):
    arrays = tensors(golden(f"pae_kld_{mode}"))
    parts = {
        "prompt_embeddings": arrays["prompt_shallow"][None],
        "deep_prompt_embeddings": arrays["prompt_deep"],
        "koopman_in.weight": arrays["koopman_in_weight"],
        "koopman_out.weight": torch.randn(64, 32),
    }
    for letter in "KL":
        if mode == "global":
            parts[f"{letter}_global"] = arrays[letter]
        elif layout == "one_tensor":
            parts[f"{letter}_layers"] = arrays[letter]
        else:
            parts |= {f"{letter}_layers.{j}": m for j, m in enumerate(arrays[letter])}
    state = file_of(parts)
    model = fresh(tiny_vit, VPTDeep(5), pae.KLD(32, mode))
    loaded = pae.load_official(model, state)
    assert same_logits(model, golden, f"pae_kld_{mode}")
    terms = model.kld.terms(model.prompts.raw_prompts())
    for got, key in zip(terms, ("koopman_loss", "lyapunov_loss")):
        assert (got - arrays[f"f64/{key}"]).abs() <= 1e-7
    assert loaded.ignored == [ENC + "koopman_out.weight"]
    assert set(loaded.kld) == {ENC + k for k in parts if k[:2] in ("K_", "L_", "ko")} - {
        ENC + "koopman_out.weight"
    }
    without = fresh(tiny_vit, VPTDeep(5))
    assert set(pae.load_official(without, state).ignored) == {*loaded.kld, *loaded.ignored}
    assert same_logits(without, golden, f"pae_kld_{mode}")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("group", ["shallow", "deep"])
def test_bpt(golden, tiny_vit, group, frozen):
    """A timm model in its file: timm's names for the backbone and the head."""
    arrays, weights = tensors(golden("bpt")), tensors(golden("backbone"))
    vectors, conv = arrays[f"{group}/random_vectors"], arrays[f"{group}/conv_weight"]
    state = {k.removeprefix("timm/"): v for k, v in weights.items() if k.startswith("timm/")}
    state["random_vectors"] = vectors
    if group == "shallow":
        state["conv.weight"] = conv[0][:, :, None, None]
        family = BPTShallow(9, 12, train_basis=not frozen)
    else:
        state |= {f"conv.{i}.weight": w[:, :, None, None] for i, w in enumerate(conv)}
        family = BPTDeep(9, 12, trained_bases=1 if frozen else None)
    model = fresh(tiny_vit, family)
    loaded = pae.load_official(model, {"model": state, "epoch": 7})
    assert same_logits(model, golden, "bpt", f"{group}/")
    assert len(loaded.compared) == sum(k.startswith("timm/") for k in weights) - 2
    if group == "shallow":
        state["conv.0.weight"] = state.pop("conv.weight")
        again = fresh(tiny_vit, BPTShallow(9, 12))
        pae.load_official(again, state)
        assert torch.equal(again.prompts.bases, model.prompts.bases)


@pytest.mark.parametrize("group", ["default", "variant"])
def test_vapt(golden, group):
    arrays = tensors(golden("vapt"))
    vit = VisionTransformer(
        img_size=28,
        patch_size=2,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=2,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        num_classes=10,
    )
    timm = {k: v for k, v in (tensors(golden("backbone")) | arrays).items() if "timm/" in k}
    timm = {k.removeprefix("timm/"): v for k, v in timm.items()}
    vit.load_state_dict(timm)
    variant = {
        "kernel": 3,
        "padding": 1,
        "activation": "gelu",
        "static_blocks": 2,
        "kernel_per_channel": True,
        "share_bottleneck": False,
        "learn_scale": True,
    }
    family = VAPT(5, **(variant if group == "variant" else {}))
    model = pae.PromptedViT(vit.double(), family, num_classes=10).eval()
    own = f"{group}/param/"
    parts = {"enc." + k.removeprefix(own): v for k, v in arrays.items() if k.startswith(own)}
    head = {f"head.last_layer.{k}": timm[f"head.{k}"] for k in ("weight", "bias")}
    loaded = pae.load_official(model, parts | head)
    assert set(loaded.prompts) == set(parts)
    logits = pae.fast_forward(model, arrays["images"].double())
    assert (logits - arrays[f"{group}/f64/logits"]).abs().max() <= 1e-7


@pytest.mark.parametrize(
    "prefix",
    ["", "enc.transformer.", "module.enc.transformer.", "model.", "module.base_encoder."],
)
def test_wrappers_and_nesting(golden, tiny_vit, file_of, prefix):
    arrays = tensors(golden("vpt_deep"))
    parts = {
        "Prompt_embeddings": arrays["prompt_shallow"],
        "deep_prompt_embeddings": arrays["prompt_deep"],
    }
    for wrap in (lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": {"state_dict": s}}):
        model = fresh(tiny_vit, VPTDeep(5))
        pae.load_official(model, wrap(file_of(parts, prefix)))
        assert same_logits(model, golden, "vpt_deep")


# ---- files of other codes, and of prompts alone


@pytest.mark.parametrize("group", ["shallow", "deep"])
@pytest.mark.parametrize("by_path", [False, True])
def test_bpt_as_released(golden, tiny_vit, tmp_path, group, by_path):
    """conv1x1, beside the optimiser's state in a whole checkpoint."""
    arrays, weights = tensors(golden("bpt")), tensors(golden("backbone"))
    state = {k.removeprefix("timm/"): v for k, v in weights.items() if k.startswith("timm/")}
    state["random_vectors"], conv = (
        arrays[f"{group}/random_vectors"],
        arrays[f"{group}/conv_weight"],
    )
    names = ["conv1x1"] if group == "shallow" else [f"conv1x1.{i}" for i in range(len(conv))]
    state |= {f"{n}.weight": w[:, :, None, None] for n, w in zip(names, conv, strict=True)}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
    source = {"model": state, "optimizer": optimizer, "epoch": 99, "args": None}
    if by_path:
        source["args"] = argparse.Namespace(lr=0.1)
        torch.save(source, tmp_path / "checkpoint.pth")
        source = tmp_path / "checkpoint.pth"
    model = fresh(tiny_vit, BPTShallow(9, 12) if group == "shallow" else BPTDeep(9, 12))
    loaded = pae.load_official(model, source)
    assert same_logits(model, golden, "bpt", f"{group}/")
    assert loaded.prompts == ["random_vectors", *(f"{name}.weight" for name in names)]


def golden_head(model, golden):
    weights = tensors(golden("backbone"))
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(model.head, name).copy_(weights[f"official/head.{name}"])


@pytest.mark.parametrize("by_path", [False, True])
@pytest.mark.parametrize("name", ["vpt_deep", "vpt_shallow"])
def test_prompts_alone(golden, tiny_vit, tmp_path, name, by_path):
    """As VPT's code saves them after every epoch: arrays of numpy, without head and backbone."""
    arrays = golden(name)
    source = {"shallow_prompt": arrays["prompt_shallow"][None].copy()}
    if name == "vpt_deep":
        source["deep_prompt"] = arrays["prompt_deep"].copy()
    if by_path:
        source = {k: np.asfortranarray(v) for k, v in source.items()}
        torch.save(source, tmp_path / "prompt_ep100.pth")
        source = tmp_path / "prompt_ep100.pth"
    model = fresh(tiny_vit, VPTDeep(5) if name == "vpt_deep" else VPTShallow(5))
    golden_head(model, golden)
    head = model.head.weight.clone()
    with pytest.warns(UserWarning, match="prompts alone: the head is left as it is"):
        loaded = pae.load_official(model, source)
    assert same_logits(model, golden, name) and torch.equal(model.head.weight, head)
    assert loaded.head == loaded.compared == [] and len(loaded.prompts) == 1 + (name == "vpt_deep")


@pytest.mark.parametrize("name", ["vpt_deep", "vpt_shallow"])
def test_prompts_in_one_tensor_beside_a_head(golden, tiny_vit, name):
    arrays, weights = tensors(golden(name)), tensors(golden("backbone"))
    rows = [arrays["prompt_shallow"][None], *([arrays["prompt_deep"]] if "deep" in name else [])]
    source = {
        "head": {k: weights[f"official/head.{k}"] for k in ("weight", "bias")},
        "Prompt_Tokens": nn.Parameter(torch.cat(rows)),
    }
    model = fresh(tiny_vit, VPTDeep(5) if name == "vpt_deep" else VPTShallow(5))
    loaded = pae.load_official(model, source)
    assert same_logits(model, golden, name)
    assert loaded.prompts == ["Prompt_Tokens"]
    assert loaded.head == ["head.weight", "head.bias"]
    message = r"wrong shape: Prompt_Tokens is \(\d, 5, 64\) for"
    other = VPTShallow(5) if name == "vpt_deep" else VPTDeep(5)
    refused(fresh(tiny_vit, other), source, message)


def test_a_timm_model_inside_an_encoder(golden, tiny_vit):
    arrays, weights = tensors(golden("vpt_deep")), tensors(golden("backbone"))
    source = {
        f"encoder.{k.removeprefix('timm/')}": v for k, v in weights.items() if k.startswith("timm/")
    }
    source["prompt_embeddings"] = arrays["prompt_shallow"][None]
    source["deep_prompt_embeddings"] = arrays["prompt_deep"]
    model = fresh(tiny_vit, VPTDeep(5))
    loaded = pae.load_official(model, source)
    assert same_logits(model, golden, "vpt_deep")
    assert loaded.head == ["encoder.head.weight", "encoder.head.bias"]
    assert len(loaded.compared) == len(source) - 4
    source["encoder.blocks.1.norm1.bias"] = source["encoder.blocks.1.norm1.bias"] + 1
    refused(model, source, "another backbone.*encoder.blocks.1.norm1.bias")


def timm_names(golden, prefix=""):
    weights = tensors(golden("backbone"))
    return {
        prefix + k.removeprefix("timm/"): v
        for k, v in weights.items()
        if k.startswith("timm/") and not k.startswith("timm/norm.")
    }


@pytest.mark.parametrize("mode", ["deep", "shallow"])
def test_vpt_on_mae(golden, tiny_vit, mode):
    """Its backbone under timm's names, without a final norm and with one behind the mean. Which
    rows are in the mean stands nowhere in it.
    """
    arrays = tensors(golden("mae_pool"))
    state = timm_names(golden, "enc.") | {
        f"enc.fc_norm.{k}": arrays[f"fc_norm.{k}"] for k in ("weight", "bias")
    }
    state["enc.prompt_embeddings"] = arrays["prompt_shallow"][None]
    if mode == "deep":
        state["enc.deep_prompt_embeddings"] = arrays["prompt_deep"]
    family = VPTDeep if mode == "deep" else VPTShallow

    def averaging(pool="image"):
        vit = pae.backbones.average_pooled(tiny_vit(torch.float64))
        vit.fc_norm.load_state_dict({k: arrays[f"fc_norm.{k}"] for k in ("weight", "bias")})
        return pae.PromptedViT(vit, family(5), num_classes=10, pool=pool).eval()

    for made, given, pool, name in (
        ("image", None, "all", "original"),
        ("image", "image", "image", "img_pool"),
        ("image", "prompts", "prompts", "prompt_pool"),
        ("prompts", None, "prompts", "prompt_pool"),
        ("prompts", "all", "all", "original"),
    ):
        model = averaging(made)
        loaded = pae.load_official(model, state, pool=given)
        assert loaded.pool == model.pool == pool
        assert same_logits(model, golden, "mae_pool", f"{mode}_{name}/")
        assert "enc.fc_norm.weight" in loaded.compared
    model = averaging()
    refused(model, state | {"enc.fc_norm.bias": torch.ones(64)}, "another backbone.*fc_norm.bias")
    refused(model, state, "pool must be one of", ValueError, pool="original")
    assert model.pool == "image"
    on_a_class_token = fresh(tiny_vit, family(5))
    refused(on_a_class_token, state, "pools no rows", ValueError, pool="all")


@pytest.mark.parametrize("group", ["mae_shallow", "mae_deep"])
def test_bpt_on_mae(golden, tiny_vit, group):
    """Its norm behind the mean is called like the one before it."""
    arrays, weights = tensors(golden("bpt")), tensors(golden("backbone"))
    state = timm_names(golden) | {
        f"norm.{k}": weights[f"timm/norm.{k}"] for k in ("weight", "bias")
    }
    state["random_vectors"] = vectors = arrays[f"{group}/random_vectors"]
    conv = arrays[f"{group}/conv_weight"]
    names = ["conv1x1"] if group == "mae_shallow" else [f"conv1x1.{i}" for i in range(len(conv))]
    state |= {f"{n}.weight": w[:, :, None, None] for n, w in zip(names, conv, strict=True)}
    vit = pae.backbones.average_pooled(tiny_vit(torch.float64), norm="behind")
    family = BPTShallow if group == "mae_shallow" else BPTDeep
    model = pae.PromptedViT(vit, family(*vectors.shape[1:]), num_classes=10).eval()
    loaded = pae.load_official(model, {"model": state, "epoch": 99})
    assert loaded.pool == "all" and "norm.bias" in loaded.compared
    assert same_logits(model, golden, "bpt", f"{group}/")
    state["norm.bias"] = state["norm.bias"] + 1
    refused(model, state, "another backbone.*norm.bias")


def test_vapt_without_a_convolution(tiny_vit):
    """Its mixers are then linear layers themselves."""
    model = fresh(tiny_vit, VAPT(4, kernel=0, padding=0))
    other = fresh(tiny_vit, VAPT(4, kernel=0, padding=0))
    state = {"prompt_embeddings": other.prompts.tokens}
    for j, mixer in enumerate(other.prompts.mixers):
        state[f"deep_prompt_norm.{j}.weight"] = mixer.gain
        state[f"deep_prompt_norm.{j}.bias"] = mixer.offset
        state[f"deep_prompt_downsample.{j}.weight"] = mixer.weight
        state[f"deep_prompt_downsample.{j}.bias"] = mixer.bias
    pair = other.prompts.bottlenecks[0]
    state["deep_prompt_embeddings_mlp.block.0.weight"] = pair.down
    state["deep_prompt_embeddings_mlp.block.2.weight"] = pair.up
    with pytest.warns(UserWarning, match="prompts alone"):
        pae.load_official(model, state)
    own, theirs = model.prompts.state_dict(), other.prompts.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[k], theirs[k]) for k in own)


# ---- what is trained of the backbone


BIAS = re.compile(r".*\.bias")


def biased(state):
    """`state` after a training of all biases, as VPT's "prompt+bias"."""
    return {k: 2 * v + 1 if BIAS.fullmatch(k) and "head" not in k else v for k, v in state.items()}


def in_timm_names(golden, state):
    """`state` with the backbone as timm names it."""
    weights = tensors(golden("backbone"))
    kept = {k: v for k, v in state.items() if "prompt" in k or "head" in k}
    own = {k.removeprefix("timm/"): v for k, v in weights.items() if k.startswith("timm/")}
    return kept | {k: v for k, v in own.items() if not k.startswith("head.")}


@pytest.mark.parametrize("names", ["published", "timm"])
def test_biases_trained_beside_prompts(vpt, golden, names):
    plain, state = vpt
    if names == "timm":
        state = in_timm_names(golden, state)
    family = VPTDeep(5)
    vit = copy.deepcopy(plain.backbone)
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    vit.head = nn.Linear(64, 10, dtype=torch.float64)
    model = pae.PromptedViT(vit, family, train_backbone="biases").eval()
    changed = biased(state)
    loaded = pae.load_official(model, changed)
    for name, tensor in vit.state_dict().items():
        expected = 2 * before[name] + 1 if BIAS.fullmatch(name) else before[name]
        assert torch.equal(tensor, expected), name
    found = [k for k in state if BIAS.fullmatch(k) and "head" not in k]
    assert loaded.backbone == found and not set(found) & set(loaded.compared)
    assert len(loaded.compared + loaded.backbone + loaded.prompts + loaded.head) == len(state)
    for left_out in (found[0], found[-1]):  # of three parts of one bias, and of a whole one
        less = {k: v for k, v in changed.items() if k != left_out}
        refused(model, less, r"does not fit this VPTDeep: missing: \S+$")
    weight = found[0].replace("bias", "weight")
    refused(model, changed | {weight: 2 * changed[weight]}, rf"another backbone, .*: {weight} \(")
    refused(model, changed | {found[2]: changed[found[2]] * torch.nan}, f"values: {found[2]} has")
    loaded = pae.load_official(model, changed, check_backbone=False)
    assert loaded.backbone == found and loaded.compared == []


@pytest.mark.parametrize("names", ["published", "timm"])
def test_a_part_of_a_bias(vpt, golden, names):
    """Of keys and values trained, of queries compared, whether in one tensor or in three."""
    plain, state = vpt
    if names == "timm":
        state = in_timm_names(golden, state)
    vit = copy.deepcopy(plain.backbone)
    vit.head = nn.Linear(64, 10, dtype=torch.float64)
    model = pae.PromptedViT(vit, VPTDeep(5), train_backbone="blocks.*.attn.qkv.bias:kv").eval()
    query = [vit.blocks[i].attn.qkv.bias.chunk(3)[0].clone() for i in range(4)]
    refused(model, biased(state), "state_dict was trained on another backbone")
    for key, value in state.items():
        if re.search(r"attn\.(key|value)\.bias", key):
            state[key] = value + 1
        elif key.endswith("attn.qkv.bias"):
            state[key] = value + torch.cat([torch.zeros(64), torch.ones(128)])
    expected = [block.attn.qkv.bias.chunk(3)[1] + 1 for block in vit.blocks]
    loaded = pae.load_official(model, state)
    for i, block in enumerate(vit.blocks):
        q, k, _ = block.attn.qkv.bias.chunk(3)
        assert torch.equal(q, query[i]) and (k - expected[i]).abs().max() < 1e-6
    assert len(loaded.backbone) == (8 if names == "published" else 4)


def test_prompts_alone_for_a_trained_backbone(tiny_vit):
    model = pae.PromptedViT(tiny_vit(torch.float64), VPTShallow(5), train_backbone="cls_token")
    state = {"prompt_embeddings": torch.zeros(1, 5, 64)}
    refused(model, state, "does not fit this VPTShallow: missing: cls_token$")


@pytest.mark.parametrize("family", [lambda: DAVPT(5, 5, 10), lambda: ProVPT(5)])
def test_kinds_of_vpt_whose_files_have_names_of_their_own(tiny_vit, vpt, family):
    """DA-VPT's, of which every published number is with a trained backbone, and PRO-VPT's."""
    other = fresh(tiny_vit, family())
    state = {k: v for k, v in vpt[1].items() if "prompt" not in k}
    state |= {"vpt.tokens": torch.zeros(4, 5, 64)}
    message = (
        rf"model.prompts \({type(other.prompts).__name__}\) has no published names known here, .*; "
        r"beside backbone and head the file holds vpt.tokens \(4, 5, 64\)$"
    )
    refused(other, state, message, ValueError)
    refused(other, vpt[1], "has no published names known here", ValueError)


# ---- what is refused, and that a refusal changes nothing


def test_values_that_are_none(vpt):
    model, state = vpt
    key = ENC + "prompt_embeddings"
    for bad, message in (
        (torch.full((1, 5, 64), torch.nan), "has NaN or infinite values"),
        (torch.full((1, 5, 64), torch.inf), "has NaN or infinite values"),
        (torch.ones(1, 5, 64, dtype=torch.int8), "is torch.int8"),
    ):
        refused(model, state | {key: bad}, f"wrong values: {key} {message}$")
    refused(model, state | {key: np.array([print])}, "got ndarray at", TypeError)


def test_files_that_cannot_be_read(vpt, tmp_path):
    model, _ = vpt
    path = tmp_path / "prompts.pth"
    refused(model, path, f"weights {path}: no such file")
    refused(model, str(tmp_path), "not a file")
    path.write_bytes(b"PK\x03\x04")
    refused(model, path, f"weights {path} cannot be read, it is damaged")


@pytest.fixture
def vpt(golden, tiny_vit, file_of):
    """(model, state) that fit."""
    arrays = tensors(golden("vpt_deep"))
    state = file_of(
        {
            "prompt_embeddings": arrays["prompt_shallow"][None],
            "deep_prompt_embeddings": arrays["prompt_deep"],
        }
    )
    return fresh(tiny_vit, VPTDeep(5)), state


def refused(model, state, message, kind=pae.CheckpointError, **options):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(kind, match=message) as caught:
        pae.load_official(model, state, **options)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_missing_unknown_and_misshapen_keys_are_all_listed(vpt):
    model, state = vpt
    del state[ENC + "deep_prompt_embeddings"], state["head.last_layer.bias"]
    state["mystery.weight"] = torch.zeros(2)
    state[ENC + "prompt_proj.weight"] = torch.zeros(2)
    state[ENC + "prompt_embeddings"] = torch.zeros(1, 4, 64)
    refused(
        model,
        state,
        "state_dict does not fit this VPTDeep: missing: deep_prompt_embeddings, "
        "head.last_layer.bias; unknown: mystery.weight, enc.transformer.prompt_proj.weight; "
        r"wrong shape: enc.transformer.prompt_embeddings is \(1, 4, 64\) for \(1, 5, 64\)$",
    )


def test_long_lists_are_cut(vpt):
    model, state = vpt
    state |= {f"other.{i}": torch.zeros(1) for i in range(20)}
    refused(model, state, r"unknown: other.0, .*, other.11 and 8 more$")


def test_kld_of_another_mode(golden, tiny_vit, file_of):
    arrays = tensors(golden("pae_kld_global"))
    state = file_of(
        {
            "prompt_embeddings": arrays["prompt_shallow"][None],
            "deep_prompt_embeddings": arrays["prompt_deep"],
            "koopman_in.weight": arrays["koopman_in_weight"],
            "K_global": arrays["K"],
            "L_global": arrays["L"],
        }
    )
    model = fresh(tiny_vit, VPTDeep(5), pae.KLD(32, "layerwise"))
    refused(model, state, "missing: k_layers.0, k_layers.1, .*; unknown: .*K_global, .*L_global$")
    plain = fresh(tiny_vit, VPTDeep(5), pae.KLD(16))
    refused(plain, state, r"koopman_in.weight is \(32, 64\) for \(16, 64\)")


def test_shallow_and_deep_are_told_apart(vpt, tiny_vit):
    _, state = vpt
    refused(fresh(tiny_vit, VPTShallow(5)), state, "unknown: .*deep_prompt_embeddings$")
    del state[ENC + "deep_prompt_embeddings"]
    refused(fresh(tiny_vit, VPTDeep(5)), state, "missing: deep_prompt_embeddings$")


@pytest.mark.parametrize(
    "key",
    ["encoder.layer.2.attn.key.weight", "embeddings.cls_token", "encoder.layer.0.ffn.fc2.bias"],
)
def test_another_backbone(vpt, key):
    model, state = vpt
    state[ENC + key] = state[ENC + key] * 1.05
    message = rf"state_dict was trained on another backbone, relative differences: {ENC}{key} \(5"
    refused(model, state, message)
    loaded = pae.load_official(model, state, check_backbone=False)
    assert loaded.compared == [] and ENC + key in loaded.ignored


def test_a_16_bit_copy_is_the_same_backbone(vpt):
    model, state = vpt
    pae.load_official(model, {k: v.bfloat16() for k, v in state.items()})


def test_a_backbone_of_another_size(vpt):
    model, state = vpt
    key = ENC + "embeddings.position_embeddings"
    state[key] = torch.zeros(1, 50, 64)
    refused(model, state, rf"wrong shape: {key} is \(1, 50, 64\) for \(1, 17, 64\)$")


def test_every_frozen_weight_is_compared(vpt):
    """Under published names as under timm's: qkv in three parts, all else one to one."""
    model, state = vpt
    loaded = pae.load_official(model, state)
    frozen = [k for k in model.backbone.state_dict() if not k.startswith("head.")]
    qkv = sum("qkv" in k for k in frozen)
    assert len(loaded.compared) == len(frozen) + 2 * qkv


def test_arguments(vpt, tiny_vit):
    model, state = vpt
    with pytest.raises(TypeError, match="model must be a PromptedViT, got VisionTransformer"):
        pae.load_official(model.backbone, state)
    refused(model, [1], "state_dict must be a mapping, got list", TypeError)
    refused(model, {"a": 1}, "state_dict must map names to tensors, got int at 'a'", TypeError)
    twice = state | {"prompt_embeddings": state[ENC + "prompt_embeddings"]}
    refused(model, twice, "state_dict holds prompt_embeddings twice")
    ragged = fresh(tiny_vit, VPTDeep([5, 5, 5, 4]))
    message = re.escape("one count for all blocks to take published weights, got [5, 5, 5, 4]")
    refused(ragged, state, message, ValueError)
    other = fresh(tiny_vit, APT(3))
    message = r"model.prompts \(APT\) has no published names known here, expected one of"
    refused(other, state, message, ValueError)
    model.head = nn.Identity()
    refused(model, state, "model.head must be linear, got Identity", ValueError)
