"""BPT: released numbers, what the product can represent, best fits, and whitening that whitens."""

import re
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

import pae
from pae.engine import unprompted
from pae.methods.whitening import official_root, scrambled
from pae.plan import fold
from pae.prompts import BPTDeep, BPTShallow, VPTDeep, VPTShallow
from tests import tiny
from tests.tiny import assert_engines_agree, error, gradients

PRECISIONS = {"f32": torch.float32, "f64": torch.float64}
VALUE = {"f32": 1e-5, "f64": 1e-9}
GRADIENT = {"f32": 1e-4, "f64": 1e-6}
STORED = {"f32": 2e-6, "f64": 1e-7}  # float64 arrays of more than 600 numbers are kept as float32


def model_of(family, feature="plain", dtype=torch.float64, kld=None):
    torch.manual_seed(0)
    return pae.PromptedViT(tiny.backbone(feature, dtype), family, kld).train()


def refused(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def targets(family, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, 32, generator=generator, dtype=torch.float64) if n else None
        for n in family.prompt_counts
    ]


# ---- the released implementation's numbers


def golden_model(golden, tiny_vit, group, precision):
    arrays = {k: torch.as_tensor(v) for k, v in golden("bpt").items() if k != "meta_json"}
    count, rank = arrays[f"{group}/random_vectors"].shape[1:]
    kind = BPTShallow if "shallow" in group else BPTDeep
    vit, pool = tiny_vit(PRECISIONS[precision]), "image"
    if group.startswith("mae"):
        vit, pool = pae.backbones.average_pooled(vit, norm="behind"), "all"
    model = pae.PromptedViT(vit, kind(count, rank), pool=pool).train()
    with torch.no_grad():
        model.prompts.coefficients.copy_(arrays[f"{group}/random_vectors"])
        model.prompts.basis.copy_(arrays[f"{group}/conv_weight"])
    data = golden("data")
    images = torch.as_tensor(data["images"][:6]).to(PRECISIONS[precision])
    found = {k.removeprefix(f"{group}/{precision}/"): v for k, v in arrays.items()}
    return model, images, torch.as_tensor(data["labels"][:6]), found


def compare(model, logits, labels, found, precision):
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    assert (logits - found["logits"]).abs().max() <= VALUE[precision]
    assert (loss - found["loss"]).abs() <= VALUE[precision]
    for got, key in (
        (model.prompts.coefficients.grad, "random_vectors"),
        (model.prompts.basis.grad, "conv_weight"),
        (model.head.weight.grad, "head_weight"),
        (model.head.bias.grad, "head_bias"),
    ):
        assert error(got, found[f"grad_{key}"]) <= GRADIENT[precision], key


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("group", ["shallow", "deep", "mae_shallow", "mae_deep", "mae_deep_linear"])
def test_golden(golden, tiny_vit, group, precision, engine):
    model, images, labels, found = golden_model(golden, tiny_vit, group, precision)
    assert error(model.prompts.products(), found["prompts"]) <= STORED[precision]
    compare(model, model(images, engine=engine), labels, found, precision)


# ---- the family


def test_shapes_and_initialisation():
    deep = model_of(BPTDeep(6, 3)).prompts
    assert deep.coefficients.shape == (3, 6, 3) and deep.basis.shape == (3, 32, 3)
    assert [n for n, _ in deep.named_parameters()] == ["coefficients", "basis"]
    shallow = model_of(BPTShallow(6, 3)).prompts
    assert shallow.coefficients.shape == (1, 6, 3) and shallow.basis.shape == (1, 32, 3)
    assert shallow.prompt_counts == [6, 0, 0]
    large = model_of(BPTDeep(400, 30)).prompts
    assert large.coefficients.std().item() == pytest.approx(0.02, rel=0.02)
    bound = (6 / (32 + 30)) ** 0.5
    assert large.basis.abs().max() <= bound and large.basis.abs().max() > 0.99 * bound
    torch.manual_seed(1)
    assert not torch.equal(large.basis[0], large.basis[1])


def test_every_block_has_its_own_product():
    family = model_of(BPTDeep(4, 2)).prompts
    x = torch.zeros(2, 17, 32)
    rows = family.all_prompts(x)
    for i, got in enumerate(rows):
        expected = torch.einsum("pr,dr->pd", family.coefficients[i], family.basis[i])
        assert error(got, expected) < 1e-14
        assert error(family.block_prompts(i, x), expected) < 1e-14
        assert error(family.raw_prompts()[i], expected) < 1e-14


def test_the_product_is_formed_once_for_all_blocks_and_images(monkeypatch):
    model = model_of(BPTDeep(4, 2))
    calls = []
    products = BPTDeep.products
    monkeypatch.setattr(BPTDeep, "products", lambda self: calls.append(1) or products(self))
    pae.fast_forward(model, tiny.images(model.backbone, 7)).sum().backward()
    assert calls == [1]
    assert products(model.prompts).shape == (3, 4, 32)


@pytest.mark.parametrize("trained", [0, 1, 3])
def test_partly_trained_bases(trained):
    """The released deep scripts train the bases of the last blocks alone."""
    torch.manual_seed(0)
    model = model_of(BPTDeep(4, 2, trained_bases=trained))
    family = model.prompts
    assert (family.basis is None) == (trained == 0)
    assert (family.frozen_basis is None) == (trained == 3)
    torch.manual_seed(0)
    every = model_of(BPTDeep(4, 2)).prompts
    assert torch.equal(family.bases, every.basis)
    assert_engines_agree(model, tiny.images(model.backbone))
    _, grads = gradients(model, tiny.images(model.backbone), "fast")
    names = {n for n in grads if n.startswith("prompts.")}
    assert names == {"prompts.coefficients"} | ({"prompts.basis"} if trained else set())
    assert all(grads[n].norm() > 0 for n in names)
    groups = {g["name"]: g["params"] for g in model.parameter_groups(0.1, 0.01)}
    assert len(groups["prompts"]) == len(names)


def test_frozen_basis_comes_back_from_a_checkpoint(tmp_path):
    for family in (BPTDeep(4, 2, trained_bases=1), BPTShallow(4, 2, train_basis=False)):
        model = model_of(family)
        model.save(tmp_path / "a")
        torch.manual_seed(9)
        again = pae.PromptedViT.from_file(tmp_path / "a", tiny.backbone())
        assert torch.equal(again.prompts.frozen_basis, family.frozen_basis)
        x = tiny.images(model.backbone)
        assert torch.equal(again(x), model(x))


def test_arguments():
    for kind in (BPTDeep, BPTShallow):
        refused(ValueError, "num_tokens must be at least 1, got 0", lambda k=kind: k(0, 2))
        refused(ValueError, "rank must be at least 1, got 0", lambda k=kind: k(2, 0))
        refused(TypeError, "rank must be an integer, got 2.0", lambda k=kind: k(2, 2.0))
        message = "rank must be at most the backbone's width 32, got 33"
        refused(ValueError, message, lambda k=kind: model_of(k(2, 33)))
    refused(ValueError, "trained_bases must be at least 0, got -1", lambda: BPTDeep(2, 2, -1))
    message = "trained_bases must be at most the number of blocks 3, got 4"
    refused(ValueError, message, lambda: model_of(BPTDeep(2, 2, 4)))
    refused(TypeError, "train_basis must be True or False, got 1", lambda: BPTShallow(2, 2, 1))
    family = model_of(BPTDeep(2, 2)).prompts
    message = re.escape("bases must have shape (3, 32, 2), got (2, 32, 2)")
    refused(ValueError, message, lambda: family.set_bases(torch.zeros(2, 32, 2)))
    refused(ValueError, "prompts must hold one entry per block", lambda: family.set_prompts([]))


# ---- setting prompts


@pytest.mark.parametrize("count, rank", [(4, 4), (6, 32), (40, 32)])
def test_full_rank_is_any_vpt(count, rank):
    """Rank min(P, D) or more: the same function as VPT with these prompts, deep and shallow."""
    for product, free in ((BPTDeep, VPTDeep), (BPTShallow, VPTShallow)):
        model, expected = model_of(product(count, rank)), model_of(free(count))
        wanted = targets(model.prompts)
        model.prompts.set_prompts(wanted)
        expected.prompts.set_prompts(wanted)
        expected.head.load_state_dict(model.head.state_dict())
        for got, target in zip(model.prompts.raw_prompts(), wanted, strict=True):
            assert target is None or error(got, target) < 1e-13
        assert max(model.prompts.fit_errors) < 1e-13
        x = tiny.images(model.backbone)
        assert error(pae.fast_forward(model, x), expected(x)) < 1e-12


def test_low_rank_fit_is_the_best_one():
    """What is missed is what no product of this rank can hold (Eckart and Young)."""
    family = model_of(BPTDeep(6, 2)).prompts
    wanted = targets(family)
    family.set_prompts(wanted)
    for i, (got, target) in enumerate(zip(family.raw_prompts(), wanted, strict=True)):
        singular = torch.linalg.svdvals(target)
        missed = (got - target).norm()
        assert missed.item() == pytest.approx(singular[2:].norm().item(), rel=1e-10)
        assert family.fit_errors[i] == pytest.approx((missed / target.norm()).item(), rel=1e-10)
        a, b = family.coefficients[i], family.basis[i]
        assert error(a.T @ a, b.T @ b) < 1e-10  # neither factor carries the scale alone


def test_columns_without_a_singular_value_still_learn():
    """Rank 5 and three prompts: the last columns start at zero in one factor, never in both."""
    model = model_of(BPTDeep(3, 5))
    model.prompts.set_prompts(targets(model.prompts))
    a, b = model.prompts.coefficients, model.prompts.basis
    assert torch.equal(a[:, :, 3:], torch.zeros_like(a[:, :, 3:]))
    _, grads = gradients(model, tiny.images(model.backbone), "fast")
    assert (grads["prompts.coefficients"][:, :, 3:].norm(dim=1) > 1e-6).all()
    assert (b.norm(dim=1) > 1e-2).all()


@pytest.mark.parametrize("family", [BPTDeep(6, 3, trained_bases=1), BPTShallow(6, 3, False)])
def test_a_frozen_basis_is_kept_and_solved_against(family):
    model_of(family)
    before, wanted = family.bases.clone(), targets(family)
    family.set_prompts(wanted)
    frozen = len(family.frozen_basis)
    assert torch.equal(family.bases[:frozen], before[:frozen])
    for i in range(frozen):
        missed = wanted[i] - family.raw_prompts()[i]
        assert (missed @ before[i]).abs().max() < 1e-10  # nothing of it lies in the span
        assert family.fit_errors[i] == pytest.approx((missed.norm() / wanted[i].norm()).item())
        assert 0.5 < family.fit_errors[i] < 1
    if isinstance(family, BPTDeep):
        assert not torch.equal(family.bases[2], before[2])


def test_modal_pre_alignment():
    """With rank enough the prompts are those that VPT gets; below, the nearest of that rank."""
    free, full, low = (model_of(f) for f in (VPTDeep(4), BPTDeep(4, 4), BPTDeep(4, 1)))
    labels = torch.tensor([0, 1, 2])
    for model in (free, full, low):
        model.head.load_state_dict(free.head.state_dict())
        pae.mpa_init(model, tiny.images(model.backbone), labels, window=4, stride=4)
    for i, target in enumerate(free.prompts.raw_prompts()):
        assert error(full.prompts.raw_prompts()[i], target) < 1e-12
        missed = (low.prompts.raw_prompts()[i] - target).norm()
        assert missed.item() == pytest.approx(torch.linalg.svdvals(target)[1:].norm().item())


# ---- whitening


def scores(model, index, columns, x):
    """(H, B N, r): the logits, before scale, that rows x give to keys of `columns` (D, r), read as
    normalised rows under the norm's scale, by the block's own projections.
    """
    block = model.backbone.blocks[index]
    attn = block.attn
    own = attn.num_heads * (attn.qkv.weight.shape[0] // (3 * attn.num_heads))
    q = attn.q_norm(attn.qkv(block.norm1(x))[..., :own].unflatten(-1, (attn.num_heads, -1)))
    k = F.linear(columns.T * block.norm1.weight, attn.qkv.weight[own : 2 * own])
    return torch.einsum("bnhd,rhd->hbnr", q, k.unflatten(-1, (attn.num_heads, -1))).flatten(1, 2)


def rows_entering(model, index, x):
    rows = model.view.embed(x)
    for block in model.view.blocks[:index]:
        rows = block(rows)
    return rows


@torch.no_grad()
@pytest.mark.parametrize("feature", ["plain", "head_width", "registers", "no_qkv_bias"])
@pytest.mark.parametrize("rank", [5, 32])
def test_scores_of_a_whitened_basis_are_white(feature, rank):
    model = model_of(BPTDeep(4, rank), feature)
    x = tiny.images(model.backbone, 40)  # more than one chunk
    before = model.prompts.coefficients.clone(), torch.get_rng_state()
    spectrum = pae.whiten_init(model, x, ridge=1e-12)
    assert torch.equal(model.prompts.coefficients, before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert spectrum.shape == (3, 32) and (spectrum.diff(dim=1) <= 0).all()
    for i in range(3):
        logits = scores(model, i, model.prompts.bases[i], rows_entering(model, i, x))
        moment = torch.einsum("hnr,hns->rs", logits, logits) / (logits.shape[0] * logits.shape[1])
        rank_of_moment = int((spectrum[i] > 1e-9 * spectrum[i, 0]).sum())
        assert rank_of_moment >= rank or feature == "head_width"
        if rank_of_moment >= rank:
            assert error(moment, torch.eye(rank)) < 1e-6, i


@torch.no_grad()
def test_at_full_rank_the_basis_is_the_symmetric_inverse_root():
    model = model_of(BPTDeep(4, 32))
    spectrum = pae.whiten_init(model, tiny.images(model.backbone, 20), ridge=0.01)
    for basis, values in zip(model.prompts.bases, spectrum, strict=True):
        assert error(basis, basis.T) < 1e-10
        expected = (values + 0.01 * values.mean()).rsqrt()
        assert error(torch.linalg.eigvalsh(basis), expected) < 1e-9


@torch.no_grad()
def test_below_full_rank_it_takes_the_directions_in_which_queries_differ_most():
    full, low = model_of(BPTShallow(4, 32)), model_of(BPTShallow(4, 6))
    x = tiny.images(full.backbone, 20)
    spectrum = pae.whiten_init(full, x, ridge=1e-12)
    assert error(pae.whiten_init(low, x, ridge=1e-12), spectrum) < 1e-12
    directions = F.normalize(low.prompts.bases[0], dim=0)
    got = scores(low, 0, directions, rows_entering(low, 0, x)).square().mean(dim=(0, 1))
    assert error(got, spectrum[0, :6]) < 1e-10


@torch.no_grad()
def test_one_image_gives_a_bounded_basis():
    """However few rows there are, no direction is enlarged beyond the ridge's bound."""
    model = model_of(BPTDeep(4, 32))
    spectrum = pae.whiten_init(model, tiny.images(model.backbone, 1))
    for basis, values in zip(model.prompts.bases, spectrum, strict=True):
        assert torch.linalg.matrix_norm(basis, 2) <= (1e-3 * values.mean()).rsqrt() * (1 + 1e-9)


@pytest.mark.parametrize("trained", [0, 3])
def test_whitened_bases_survive_set_prompts_and_checkpoints(trained, tmp_path):
    model = model_of(BPTDeep(4, 8, trained_bases=trained))
    pae.whiten_init(model, tiny.images(model.backbone, 8))
    assert model.prompts.whitened
    model.save(tmp_path / "a")
    again = pae.PromptedViT.from_file(tmp_path / "a", tiny.backbone())
    assert again.prompts.whitened
    bases = again.prompts.bases.clone()
    assert torch.equal(bases, model.prompts.bases)
    wanted = targets(again.prompts)
    again.prompts.set_prompts(wanted)
    assert torch.equal(again.prompts.bases, bases)
    for got, target, basis in zip(again.prompts.raw_prompts(), wanted, bases, strict=True):
        assert error(got, target @ torch.linalg.pinv(basis).T @ basis.T) < 1e-9


def test_full_rank_whitened_bases_lose_nothing():
    """fWhiten under Modal Pre-Alignment: the basis stays, the prompts are VPT's."""
    model, free = model_of(BPTDeep(4, 32, trained_bases=0)), model_of(VPTDeep(4))
    free.head.load_state_dict(model.head.state_dict())
    x, labels = tiny.images(model.backbone), torch.tensor([0, 1, 2])
    pae.whiten_init(model, x)
    before = model.prompts.bases.clone()
    for each in (model, free):
        pae.mpa_init(each, x, labels, window=4, stride=4)
    assert torch.equal(model.prompts.bases, before)
    for got, target in zip(model.prompts.raw_prompts(), free.prompts.raw_prompts(), strict=True):
        assert error(got, target) < 1e-10


def test_what_whitening_refuses():
    model = model_of(BPTDeep(4, 2))
    x = tiny.images(model.backbone)
    message = "model must be a PromptedViT with BPTDeep or BPTShallow prompts"
    refused(TypeError, message, lambda: pae.whiten_init(model_of(VPTDeep(2)), x))
    refused(TypeError, message, lambda: pae.whiten_init(model.backbone, x))
    for wrong in (0, -1.0, "1", True, float("nan")):
        message = f"ridge must be a number above 0, got {wrong!r}"
        refused(ValueError, message, lambda w=wrong: pae.whiten_init(model, x, ridge=w))
    refused(ValueError, "images must hold at least 1", lambda: pae.whiten_init(model, x[:0]))
    normed = model_of(BPTDeep(4, 2), "qk_norm")
    refused(ValueError, "model normalises keys per head", lambda: pae.whiten_init(normed, x))
    wide = model_of(BPTDeep(4, 2), "head_width")
    message = "official whitening needs heads of 32 dimensions in all, got 24"
    refused(ValueError, message, lambda: pae.whiten_init(wide, x, official=True))


# ---- the released whitening, for parity


@pytest.mark.parametrize("group", ["shallow", "deep_last_block", "mae_shallow"])
def test_golden_whitening(golden, group):
    """Sigma^(-1/2) of a well conditioned case, and the entries that each row keeps of it."""
    arrays = {k: torch.as_tensor(v) for k, v in golden("bpt_whiten").items() if k != "meta_json"}
    block = 3 if group == "deep_last_block" else 0
    w_q = arrays[f"wellcond/Wq_{block}"].double()
    w_k = arrays[f"wellcond/Wk_{block}"].double() if group != "mae_shallow" else w_q
    rows = arrays["wellcond/X"].double().mean(dim=0)
    values, root = official_root(w_q, w_k, rows)
    assert error(values, arrays[f"wellcond/{group}/f64/svals"]) < 1e-10
    assert error(root, arrays[f"wellcond/{group}/f64/W_full"]) < 1e-6
    if group != "mae_shallow":
        columns = arrays[f"wellcond/{group}/column_ids"].long()
        expected = arrays[f"wellcond/{group}/f64/conv_weight"]
        assert error(scrambled(root, 12, columns), expected) < 1e-6


def test_golden_whitening_without_enough_rows(golden, tiny_vit):
    """17 rows in 64 dimensions: the leading singular values are all that can be compared."""
    arrays = {k: torch.as_tensor(v) for k, v in golden("bpt_whiten").items() if k != "meta_json"}
    w_q, w_k = tiny_vit(torch.float64).blocks[0].attn.qkv.weight.detach().chunk(3)[:2]
    values, _ = official_root(w_q, w_k, arrays["rankdef/X"].double().mean(dim=0))
    assert error(values[:17], arrays["rankdef/f64/svals"][:17]) < 1e-6


@torch.no_grad()
def test_official_bases_are_scrambled_entries_of_that_root():
    model = model_of(BPTDeep(4, 6))
    x = tiny.images(model.backbone, 20)
    torch.manual_seed(4)
    spectrum = pae.whiten_init(model, x, official=True)
    torch.manual_seed(4)
    for i, basis in enumerate(model.prompts.bases):
        w_q, w_k = model.backbone.blocks[i].attn.qkv.weight.chunk(3)[:2]
        # noise decides the root, so it is that of these very rows
        rows = next(islice(unprompted(model.plan(), model.view.embed(x)), i, None))
        values, root = official_root(w_q, w_k, rows.mean(dim=0))
        assert error(rows, rows_entering(model, i, x)) < 1e-12
        columns = torch.rand(32, 32).argsort(dim=1)[:, :6]
        assert torch.equal(basis, root.gather(1, columns))
        assert torch.equal(spectrum[i], values)
        # the mean of 17 rows: its singular values beyond the 17th, and so the root, are noise
        assert (values[17:] < 1e-12 * values[0]).all()
        assert basis.abs().max() > 1e3 * values[16].rsqrt()
        logits = scores(model, i, basis, rows_entering(model, i, x))
        moment = torch.einsum("hnr,hns->rs", logits, logits)
        assert error(moment / moment.trace(), torch.eye(6) / 6) > 0.5  # far from white
    assert model.prompts.whitened


def test_interaction_is_that_of_the_folded_plan():
    """S from the raw weights equals S from the plan's folded ones, up to the logit scale."""
    model = model_of(BPTDeep(4, 2))
    x = tiny.images(model.backbone, 4)
    spectrum = pae.whiten_init(model, x)
    plan = fold(model.view, torch.float64)
    for i, block in enumerate(plan.blocks):
        w_q, w_k = block.w_qkv.view(3, block.num_heads, block.head_width, -1)[:2]
        b_q = block.b_qkv.view(3, block.num_heads, block.head_width)[0]
        hat = F.layer_norm(rows_entering(model, i, x), (32,), eps=block.norm1.eps)
        q = torch.einsum("bnc,hdc->bnhd", hat, w_q) + b_q
        y = torch.einsum("bnhd,hdc->bnhc", q, w_k).flatten(0, 2) * block.head_width**0.5
        values = torch.linalg.eigvalsh(y.T @ y / len(y)).flip(0)
        assert error(spectrum[i], values) < 1e-10
