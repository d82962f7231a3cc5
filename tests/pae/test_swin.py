"""Prompts on timm's Swin v1: the released numbers, and both engines on models of every kind."""

import json

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer

import pae
from pae.prompts import VPTDeep, VPTShallow
from tests.tiny import error

PRECISIONS = {"f32": torch.float32, "f64": torch.float64}
VALUE = {"f32": 1e-5, "f64": 1e-9}
GRADIENT = {"f32": 1e-4, "f64": 1e-6}
ENGINES = ("reference",)


# ---- golden vectors


def stored(golden, precision):
    """Arrays of swin_vpt.npz in one dtype, and its Swin."""
    arrays, dtype = golden("swin_vpt"), PRECISIONS[precision]
    meta = json.loads(str(arrays["meta_json"]))
    swin = SwinTransformer(
        **{k: meta[k] for k in ("img_size", "patch_size", "embed_dim", "depths", "num_heads")},
        window_size=meta["window"],
        mlp_ratio=meta["mlp_ratio"],
        num_classes=meta["num_classes"],
    )
    found = {k: torch.as_tensor(v) for k, v in arrays.items() if k != "meta_json"}
    weights = {k[5:]: v for k, v in found.items() if k.startswith("timm/")}
    swin.load_state_dict(weights)
    floats = {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}
    return floats, found, swin.to(dtype)


def released(arrays, swin, kind):
    """A model with the stored prompts: "deep", "shallow" (as released) or "fixed"."""
    family = VPTDeep(5) if kind == "deep" else VPTShallow(5, faithful=kind == "shallow")
    model = pae.PromptedViT(swin, family, pool="all").train()
    deep = [rows for s in range(4) for rows in arrays[f"deep_{s}"]]
    family.set_prompts([arrays["prompt_0"], *(deep if kind == "deep" else [None] * 6)])
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["deep", "shallow", "fixed"])
def test_as_released(golden, kind, engine, precision):
    arrays, exact, swin = stored(golden, precision)
    model = released(arrays, swin, kind)
    features = model.features(arrays["images"][:2], engine)
    logits = model.head(features)
    loss = F.cross_entropy(logits, arrays["labels"][:2])
    loss.backward()
    at = f"{kind}/{precision}/"
    for name, got in (("features", features), ("logits", logits), ("loss", loss)):
        off = (got.detach().double() - exact[at + name].double()).abs().max()
        assert off <= VALUE[precision], name
    grads = [g for s in range(4) for g in exact[f"{at}grad_deep_{s}"]] if kind == "deep" else []
    expected = torch.cat([g.flatten() for g in (exact[f"{at}grad_prompt_0"], *grads)])
    got = model.prompts.tokens.grad.flatten()
    assert error(got, expected) <= GRADIENT[precision]
    assert error(model.head.weight.grad, exact[f"{at}grad_head_weight"]) <= GRADIENT[precision]
    assert error(model.head.bias.grad, exact[f"{at}grad_head_bias"]) <= GRADIENT[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["deep", "shallow", "fixed"])
def test_what_other_images_do(golden, kind, engine, precision):
    """In the released shallow kind an image's features depend on its neighbours; in no other."""
    arrays, exact, swin = stored(golden, precision)
    model, images = released(arrays, swin, kind), arrays["images"]
    with torch.no_grad():
        batches = [images[[0, 1]], images[[0, 2]], images[:1]]
        got = torch.stack([model.features(batch, engine)[0] for batch in batches])
    if kind == "fixed":
        assert error(got, got[2].expand_as(got)) <= VALUE[precision]
    else:
        expected = exact[f"leak/{precision}/{kind}"]
        assert (got.double() - expected.double()).abs().max() <= VALUE[precision]
        assert (error(got[0], got[2]) > 0.01) == (kind == "shallow")
