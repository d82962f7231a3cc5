"""What every family promises, in one place: both engines agree, with and without KLD, in training
and evaluation, in every memory mode; checkpoints come back; copies are independent.

A new family is one entry in `FAMILIES`.
"""

import copy
import json

import pytest
import torch

import pae
from pae import prompts as p
from tests import tiny
from tests.tiny import assert_engines_agree, error, gradients

FAMILIES = {
    "vpt_deep": lambda: p.VPTDeep(4),
    "vpt_deep_dropout": lambda: p.VPTDeep(4, dropout=0.4, dropout_scope="sample"),
    "vpt_shallow": lambda: p.VPTShallow(4),
    "bpt_deep": lambda: p.BPTDeep(4, 4),
    "bpt_deep_frozen_bases": lambda: p.BPTDeep(4, 32, trained_bases=1),
    "bpt_shallow": lambda: p.BPTShallow(4, 4),
    "vfpt": lambda: p.VFPTDeep(4, 0.5),
    "vfpt_random_dropout": lambda: p.VFPTDeep(4, 0.5, "hidden", "random", dropout=0.4),
    "vfpt_addition_ragged": lambda: p.VFPTDeep([5, 4, 4], 0.5, location="addition"),
    "vfpt_shallow": lambda: p.VFPTShallow(4, 0.5, dropout=0.4, dropout_scope="sample"),
    "ivpt": lambda: p.IVPT(4, 3),
    "ivpt_max_shared": lambda: p.IVPT(4, 3, reduction="max", match="shared"),
    "ivpt_all": lambda: p.IVPT(4, reinforced="all"),
    "ivpt_dropout": lambda: p.IVPT(4, 2, dropout=0.4, dropout_scope="sample"),
    "apt": lambda: p.APT(3),
    "apt_part_dropout": lambda: p.APT(3, start=1, end=1, dropout=0.4),
    "e2vpt": lambda: p.E2VPT(4, 3),
    "e2vpt_two_tensors": lambda: p.E2VPT(4, 3, share_kv=False, dropout=0.3, kv_dropout=0.3),
    "e2vpt_masks": lambda: p.E2VPT(4, 3, masks="learned", pieces=8),
    "da_vpt": lambda: p.DAVPT(4, 4, 5),
    "da_vpt_ragged": lambda: p.DAVPT(2, 3, 5, [1], norm="layer", dropout=0.3),
    "lspt": lambda: p.LSPT(4),
    "lspt_add_narrow": lambda: p.LSPT(4, 8, "add", dropout=0.4),
    "e2vpt_kv_alone": lambda: p.E2VPT(0, 3),
    "pro_vpt": lambda: p.ProVPT(4),
    "pro_vpt_ragged_dropout": lambda: p.ProVPT([5, 0, 3], dropout=0.4, dropout_scope="sample"),
    "vapt": lambda: p.VAPT(4),
    "vapt_variant": lambda: p.VAPT(4, 3, 1, 6, "gelu", 2, True, False, True, hidden_dropout=0.3),
}

# why KLD cannot be had on top of a family: part of the error
WITHOUT_KLD = dict.fromkeys(
    (
        "vpt_shallow",
        "bpt_shallow",
        "vfpt_shallow",
        "apt",
        "apt_part_dropout",
        "e2vpt_kv_alone",
        "lspt",
        "lspt_add_narrow",
    ),
    "same number of prompts",
)
WITHOUT_KLD["da_vpt_ragged"] = "same number of prompts"
WITHOUT_KLD["pro_vpt"] = WITHOUT_KLD["pro_vpt_ragged_dropout"] = "moves prompts between blocks"

# not every prompt can be reached: what is missed, and that it is no more, the family's test says
NEAREST = ("vfpt", "vfpt_random_dropout", "vfpt_addition_ragged", "vfpt_shallow")

CANNOT_BE_SET = {"da_vpt_ragged": "under norm 'layer'"}


def kld():
    return pae.KLD(dim=6)


def model(name, with_kld=False, feature="plain", dtype=torch.float64, trained=True):
    """In training mode; `trained` moves every prompt parameter off its initial value."""
    torch.manual_seed(0)
    vit = tiny.backbone(feature, dtype)
    made = pae.PromptedViT(vit, FAMILIES[name](), kld() if with_kld else None).train()
    if trained:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in made.prompts.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter.dtype))
    return made


def losses(made, x, engine, memory="keep", seed=3):
    """A loss of logits and penalty, and its gradients."""
    torch.manual_seed(seed)
    made.zero_grad()
    made.prompts.see_labels(torch.arange(len(x)))
    logits = made(x, engine=engine, memory=memory)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    loss = (logits * weights).sum() + logits.square().sum() + made.penalty()
    loss.backward()
    return loss.detach(), {n: q.grad for n, q in made.named_parameters() if q.requires_grad}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("feature", ["plain", "registers", "qk_norm"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_engines_agree(name, feature, training):
    made = model(name, feature=feature).train(training)
    assert_engines_agree(made, tiny.images(made.backbone))
    assert_engines_agree(made, tiny.images(made.backbone), wrt_images=False)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_engines_agree_under_the_regulariser(name, dtype):
    if name in WITHOUT_KLD:
        with pytest.raises(ValueError, match=WITHOUT_KLD[name]):
            model(name, with_kld=True)
        return
    made = model(name, with_kld=True, dtype=dtype)
    x = tiny.images(made.backbone)
    expected, expected_grads = losses(made, x, "reference")
    got, got_grads = losses(made, x, "fast")
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert error(got, expected) < tolerance
    for key, grad in expected_grads.items():
        assert (grad is None) == (got_grads[key] is None), key
        if grad is not None and grad.norm() > 1e-6:
            assert error(got_grads[key], grad) < 100 * tolerance, key
    moved = [k for k, g in got_grads.items() if k.startswith("prompts.") and g is not None]
    assert moved and any(got_grads[k].norm() > 1e-6 for k in moved)
    made.eval()
    assert made.penalty() == 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("memory", ["recompute8", "recompute"])
def test_memory_modes(name, memory):
    made = model(name)
    grads = 2e-2 if memory == "recompute8" else None
    assert_engines_agree(made, tiny.images(made.backbone), grads=grads, memory=memory)


@pytest.mark.parametrize("name", FAMILIES)
def test_initial_prompts(name):
    """As a user meets the family: nothing has been trained yet."""
    made = model(name, trained=False)
    assert_engines_agree(made, tiny.images(made.backbone))


@pytest.mark.parametrize("name", FAMILIES)
def test_single_precision_autocast_and_no_grad(name):
    made = model(name, dtype=torch.float32).eval()
    x = tiny.images(made.backbone)
    with torch.no_grad():
        expected = made(x)
        assert error(pae.fast_forward(made, x), expected) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert error(pae.fast_forward(made, x).float(), expected) < 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoint_comes_back(name, tmp_path):
    made = model(name, with_kld=name not in WITHOUT_KLD)
    x = tiny.images(made.backbone)
    made.eval()
    made.save(tmp_path / "a.safetensors")
    again = pae.PromptedViT.from_file(tmp_path / "a.safetensors", tiny.backbone()).eval()
    assert type(again.prompts) is type(made.prompts)
    assert again.prompts.config() == made.prompts.config()
    assert torch.equal(again(x), made(x))
    json.dumps(made.prompts.config())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_is_another_model(name):
    made = model(name)
    x = tiny.images(made.backbone)
    pae.fast_forward(made, x).sum().backward()
    made.zero_grad()
    twin = copy.deepcopy(made)
    with torch.no_grad():
        for parameter in twin.prompts.parameters():
            parameter.mul_(0)
    assert_engines_agree(made, x)
    assert error(gradients(twin, x, "fast")[0], gradients(made, x, "fast")[0]) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_belongs_to_one_model(name):
    made = model(name)
    with pytest.raises(RuntimeError, match="already belongs to a model"):
        pae.PromptedViT(tiny.backbone(), made.prompts)


@pytest.mark.parametrize("name", FAMILIES)
def test_raw_prompts_are_what_set_prompts_was_given(name):
    """The effective prompts of each block; families that cannot be set say why."""
    made = model(name)
    counts = made.prompts.prompt_counts
    generator = torch.Generator().manual_seed(5)
    wanted = [
        torch.randn(n, 32, generator=generator, dtype=torch.float64) if n else None for n in counts
    ]
    if type(made.prompts).set_prompts is p.PromptFamily.set_prompts:
        with pytest.raises(ValueError, match="computes its prompts"):
            pae.mpa_init(made, tiny.images(made.backbone), torch.zeros(3, dtype=torch.int64), 4, 4)
        return
    if name in CANNOT_BE_SET:
        with pytest.raises(ValueError, match=CANNOT_BE_SET[name]):
            made.prompts.set_prompts(wanted)
        return
    made.prompts.set_prompts(wanted)
    if name in NEAREST:
        wanted = [None if r is None else r.detach().clone() for r in made.prompts.raw_prompts()]
    made.prompts.set_prompts(wanted)
    for got, expected in zip(made.prompts.raw_prompts(), wanted, strict=True):
        assert (got is None or len(got) == 0) if expected is None else error(got, expected) < 1e-9
