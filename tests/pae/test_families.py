"""What every family promises, in one place: both engines agree, with and without KLD, in training
and evaluation, in every memory mode; checkpoints come back; copies are independent.

Every registered family is here, made small, and so is one of each of their further ways.
"""

import copy
import json
from functools import partial

import pytest
import torch

import pae
from pae import prompts as p
from tests import tiny
from tests.tiny import assert_engines_agree, error, gradients

VARIANTS = {
    "vpt_deep_dropout": lambda: p.VPTDeep(4, dropout=0.4, dropout_scope="sample"),
    "bpt_deep_frozen_bases": lambda: p.BPTDeep(4, 32, trained_bases=1),
    "vfpt_random_dropout": lambda: p.VFPTDeep(4, 0.5, "hidden", "random", dropout=0.4),
    "vfpt_addition_ragged": lambda: p.VFPTDeep([5, 4, 4], 0.5, location="addition"),
    "vfpt_shallow_dropout": lambda: p.VFPTShallow(4, 0.5, dropout=0.4, dropout_scope="sample"),
    "ivpt_max_shared": lambda: p.IVPT(4, 3, reduction="max", match="shared"),
    "ivpt_all": lambda: p.IVPT(4, reinforced="all"),
    "ivpt_dropout": lambda: p.IVPT(4, 2, dropout=0.4, dropout_scope="sample"),
    "apt_part_dropout": lambda: p.APT(3, start=1, end=1, dropout=0.4),
    "apt_vl_rows_dropout": lambda: p.ApproximatedPrompts(4, 2, num_rows=3, dropout=0.4),
    "e2vpt_two_tensors": lambda: p.E2VPT(4, 3, share_kv=False, dropout=0.3, kv_dropout=0.3),
    "e2vpt_masks": lambda: p.E2VPT(4, 3, masks="learned", pieces=8),
    "e2vpt_kv_alone": lambda: p.E2VPT(0, 3),
    "da_vpt_ragged": lambda: p.DAVPT(2, 3, 5, [1], norm="layer", dropout=0.3),
    "lspt_add_narrow": lambda: p.LSPT(4, 8, "add", dropout=0.4),
    "pro_vpt_ragged_dropout": lambda: p.ProVPT([5, 0, 3], dropout=0.4, dropout_scope="sample"),
    "vapt_variant": lambda: p.VAPT(4, 3, 1, 6, "gelu", 2, True, False, True, hidden_dropout=0.3),
}
FAMILIES = {method: partial(tiny.small, made) for method, made in p.METHODS.items()} | VARIANTS

# not every prompt can be reached: what is missed, and that it is no more, the family's test says
NEAREST = (p.VFPTDeep, p.VFPTShallow)

CANNOT_BE_SET = {"da_vpt_ragged": "under norm 'layer'"}


def without_kld(name):
    """Why KLD cannot be had on top of a family, as part of the error; None where it can."""
    made = model(name).prompts
    if made.moves_prompts:
        return "moves prompts between blocks"
    counts = made.prompt_counts[1:]  # it leaves block 0 out unless asked
    return "same number of prompts" if len(set(counts)) > 1 or counts[0] == 0 else None


def kld():
    return pae.KLD(dim=6)


def model(name, with_kld=False, dtype=torch.float64, trained=True):
    """In training mode; `trained` moves every prompt parameter off its initial value."""
    torch.manual_seed(0)
    vit = tiny.backbone(dtype=dtype)
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
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_engines_agree(name, training):
    """On other backbones than the plain one: test_random_models."""
    made = model(name).train(training)
    assert_engines_agree(made, tiny.images(made.backbone))
    assert_engines_agree(made, tiny.images(made.backbone), wrt_images=False)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_engines_agree_under_the_regulariser(name, dtype):
    if reason := without_kld(name):
        with pytest.raises(ValueError, match=reason):
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


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("name", FAMILIES)
def test_training_after_evaluation_in_inference_mode(name, engine):
    """Nothing that evaluation leaves behind is refused by autograd, or changes a gradient."""
    made = model(name)
    x = tiny.images(made.backbone)
    expected, expected_grads = losses(made, x, engine)
    expected_grads = {k: None if g is None else g.clone() for k, g in expected_grads.items()}
    with torch.inference_mode():
        made.eval()(x, engine=engine)
    got, got_grads = losses(made.train(), x, engine)
    assert torch.equal(got, expected)
    for key, grad in expected_grads.items():
        assert (grad is None) == (got_grads[key] is None)
        assert grad is None or torch.equal(got_grads[key], grad), key


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
    made = model(name, with_kld=without_kld(name) is None)
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
    if isinstance(made.prompts, NEAREST):
        wanted = [None if r is None else r.detach().clone() for r in made.prompts.raw_prompts()]
    made.prompts.set_prompts(wanted)
    for got, expected in zip(made.prompts.raw_prompts(), wanted, strict=True):
        assert (got is None or len(got) == 0) if expected is None else error(got, expected) < 1e-9
