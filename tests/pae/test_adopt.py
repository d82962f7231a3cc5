"""`pae.adopt`: a model of the released layout trains on through the fast engine, and what it trains
stays its own.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pae
from tests.libraries import images
from tests.released import DEPTH, Model
from tests.tiny import backbone, error, refused

LAYOUTS = {
    "vpt_deep": {},
    "vpt_shallow": {"deep": False},
    "vpt_projected": {"project": 6},
    "vpt_shallow_projected": {"deep": False, "project": 6},
    "pae_layerwise": {"koopman": "layerwise"},
    "pae_global": {"koopman": "global"},
    "pae_shallow": {"deep": False, "koopman": "global"},
    "hidden_layers": {"hidden": 2},
    "mae": {"kind": "mae"},
    "mae_shallow": {"kind": "mae", "deep": False},
    "mae_image_rows": {"kind": "img_pool"},
    "mae_prompt_rows": {"kind": "prompt_pool"},
    "mae_koopman": {"kind": "mae", "koopman": "layerwise"},
    "moco": {"kind": "moco"},
    "moco_koopman": {"kind": "moco", "koopman": "global"},
}
LABELS = torch.tensor([0, 3, 4])


def made(name):
    """A model in training mode, and a loss's weights of its regulariser where it has one."""
    model = Model(**LAYOUTS[name]).double()
    model.train()
    mode = LAYOUTS[name].get("koopman")
    deep = LAYOUTS[name].get("deep", True)  # shallow prompts have no neighbours to be paired with
    return model, pae.KLD(8, mode, 0.5, 0.2) if mode and deep else None


def adopted(model, kld=None):
    with pytest.warns(UserWarning, match="kld is None") if _unshared(model, kld) else _nothing():
        return pae.adopt(model, kld)


def _unshared(model, kld):
    return kld is None and any("koopman_in" in name for name, _ in model.named_parameters())


class _nothing:
    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


def step_of(forward, model, seed=5):
    """Logits of one training step and the gradients of what the model trains, by name."""
    torch.manual_seed(seed)
    logits = forward(images())
    model.zero_grad()
    F.cross_entropy(logits, LABELS).backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return logits.detach(), {n: g.clone() for n, g in trained.items() if g is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_the_model(name, training):
    """In value and every gradient, with the masks that the same seed gives."""
    model, kld = made(name)
    fast = adopted(model, kld)
    model.train(training)
    state = copy.deepcopy(model.state_dict())  # BatchNorm's means move
    expected, grads = step_of(model, model)
    for forward in (fast, lambda x: pae.fast_forward(fast, x)):
        model.load_state_dict(state)
        got, own = step_of(forward, model)
        assert error(got, expected) < 1e-9
        assert own.keys() == grads.keys()
        assert all(error(own[n], g) < 1e-7 for n, g in grads.items())
    if training:
        assert error(step_of(fast, model, seed=6)[0], expected) > 1e-3


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_script_trains_on(name):
    """Its optimiser steps the same parameters to the same values, and its checkpoints hold them."""
    plain, kld = made(name)
    plain.eval()  # its first forward must not drop anything in the backbone
    plain.train()
    other = copy.deepcopy(plain)
    fast = adopted(other, kld)
    results = []
    for model, forward in ((plain, plain), (other, lambda x: pae.fast_forward(fast, x))):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
        torch.manual_seed(4)
        for _ in range(3):
            model.train()
            optimiser.zero_grad()
            F.cross_entropy(forward(images()), LABELS).backward()
            optimiser.step()
        results.append(model.state_dict())
    one, two = results
    assert one.keys() == two.keys() == Model(**LAYOUTS[name]).state_dict().keys()
    assert all(error(two[n].double(), p.double()) < 1e-7 for n, p in one.items() if p.numel())
    fresh = Model(**LAYOUTS[name]).double()
    fresh.load_state_dict(two)
    fresh.eval()
    other.eval()
    assert error(fast(images(), engine="fast"), fresh(images())) < 1e-9


@pytest.mark.parametrize("mode", ["layerwise", "global"])
def test_the_regulariser_is_shared(mode):
    model, kld = made(f"pae_{mode}")
    fast, inner = adopted(model, kld), model.enc.transformer
    penalty = fast.penalty()
    own = pae.KLD(8, mode, 0.5, 0.2)
    own.bind(DEPTH, 32)
    own.double()
    with torch.no_grad():
        own.lift.weight.copy_(inner.koopman_in.weight)
        for name, mine in (("K", own.K), ("L", own.L)):
            theirs = getattr(inner, f"{name}_{'layers' if mode == 'layerwise' else 'global'}")
            mine.copy_(torch.stack(list(theirs)) if mode == "layerwise" else theirs)
    rows = torch.cat([inner.prompt_embeddings, inner.deep_prompt_embeddings])
    assert error(penalty, sum(own.terms(rows))) < 1e-12
    penalty.backward()
    assert inner.koopman_in.weight.grad.abs().sum() > 0
    if mode == "layerwise":
        assert inner.K_layers[0].grad.abs().sum() > 0 and inner.L_layers[0].grad is not None
        assert inner.K_layers[-1].grad is None  # in no pair
    else:
        assert inner.K_global.grad.abs().sum() > 0
    assert inner.koopman_out.weight.grad is None


@pytest.mark.parametrize("name", LAYOUTS)
def test_optimiser_and_checkpoint_hold_the_same_tensors(name):
    model, kld = made(name)
    fast = adopted(model, kld)
    own = {id(p) for p in fast.parameters()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    left = {n for n, p in trained.items() if id(p) not in own}
    unused = ("koopman_out",) if kld else ("koopman_out", "koopman_in", "K_global", "L_global")
    assert left == {n for n in trained if any(part in n for part in unused)}
    model.eval()
    before = fast(images(), engine="fast")
    state = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(list(trained.values()), lr=1.0)
    for p in trained.values():
        p.grad = torch.full_like(p, -0.3)
    optimiser.step()
    assert error(fast(images(), engine="fast"), before) > 1e-3
    model.load_state_dict(state)
    assert torch.equal(fast(images(), engine="fast"), before)


def test_everything_is_shared_and_nothing_else_trained():
    model, kld = made("pae_layerwise")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    fast = adopted(model, kld)
    assert {id(p) for p in fast.parameters() if p.requires_grad} <= trained
    unshared = [n for n, p in model.named_parameters() if id(p) in trained]
    own = {id(p) for p in fast.parameters()}
    assert [n for n in unshared if id(model.get_parameter(n)) not in own] == [
        "enc.transformer.koopman_out.weight"
    ]
    assert fast.head is model.head and fast.num_classes == 5
    groups = {g["name"]: g for g in fast.parameter_groups(0.1, 0.01)}
    assert groups["head_bias"]["params"] == [model.head.last_layer.bias]
    model.eval()
    assert not fast.prompts.drop.training and not fast.head.training
    assert not any(part.training for part in fast.backbone.modules())


def test_prompts_are_set_in_the_model():
    model, _ = made("vpt_deep")
    fast = adopted(model)
    model.eval()
    found = pae.mpa_init(fast, images(4), torch.arange(4), window=4, stride=4)
    assert torch.isfinite(found.losses).all()
    rows = torch.cat(
        [model.enc.transformer.prompt_embeddings, model.enc.transformer.deep_prompt_embeddings]
    )
    assert error(torch.stack(fast.prompts.raw_prompts()), rows) == 0
    projected = adopted(made("vpt_projected")[0])
    refused(
        ValueError,
        "prompts that go through prompt_proj cannot be set to given rows",
        lambda: pae.mpa_init(projected, images(4), torch.arange(4), window=4, stride=4),
    )


def test_its_file_is_the_scripts(tmp_path):
    model, _ = made("vpt_deep")
    fast = adopted(model)
    with pytest.raises(TypeError, match="an adopted model is saved by what it belongs to"):
        fast.save(tmp_path / "a.safetensors")
    torch.save({"model": model.state_dict()}, tmp_path / "theirs.pth")
    fresh = pae.PromptedViT(Model().double(), pae.prompts.VPTDeep(4), num_classes=5)
    parts = pae.load_official(fresh, tmp_path / "theirs.pth")
    assert len(parts.prompts) == 2 and len(parts.head) == 2 and parts.compared
    model.eval()
    assert error(fresh.eval()(images(), engine="fast"), model(images())) < 1e-9


def test_the_released_layout_is_a_backbone():
    theirs = Model(count=0).double()
    theirs.eval()
    expected = theirs(images())
    model = pae.PromptedViT(theirs, pae.prompts.VPTDeep(0))
    assert model.head is not None and isinstance(theirs.head, nn.Identity)
    assert error(model(images(), engine="fast"), expected) < 1e-12
    assert error(model(images()), expected) < 1e-12


def test_what_is_refused():
    message = "VisionTransformer has no transformer.encoder.layer, which a prompted model of the"
    refused(pae.UnsupportedBackbone, message, lambda: pae.adopt(backbone()))
    model, _ = made("vpt_deep")
    refused(TypeError, "model must be a torch.nn.Module, got int", lambda: pae.adopt(3))
    refused(
        ValueError,
        "dropout_scope must be one of ('batch', 'sample'), got 'image'",
        lambda: pae.adopt(model, dropout_scope="image"),
    )
    refused(
        ValueError,
        "kld (mode 'global') needs the model's koopman_in, which it does not have",
        lambda: pae.adopt(model, pae.KLD(8)),
    )
    koopman, _ = made("pae_layerwise")
    refused(
        ValueError,
        "kld (mode 'global') needs the model's K_global, which it does not have",
        lambda: pae.adopt(koopman, pae.KLD(8, "global")),
    )
    refused(
        ValueError,
        "kld expects 2 operators (9, 9) and a lift (9, 32), got [2] of [(8, 8)] and (8, 32)",
        lambda: pae.adopt(koopman, pae.KLD(9, "layerwise")),
    )
    refused(
        pae.UnsupportedBackbone,
        "_Inner has no head: give the model that has it",
        lambda: pae.adopt(model.enc),
    )
    del model.enc.transformer.prompt_embeddings
    message = "Model has no transformer.prompt_embeddings"
    refused(pae.UnsupportedBackbone, message, lambda: pae.adopt(model))
