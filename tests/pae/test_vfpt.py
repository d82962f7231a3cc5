"""VFPT: released numbers, the real transform against the complex one, inverses, where rows go."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

import pae
from pae.prompts import VFPTDeep, VFPTShallow, VPTDeep, VPTShallow
from pae.prompts.vfpt import DIMENSIONS, LOCATIONS, real_dft
from tests import tiny
from tests.tiny import assert_engines_agree, error, gradients

PRECISIONS = {"f32": torch.float32, "f64": torch.float64}
VALUE = {"f32": 1e-5, "f64": 1e-9}
GRADIENT = {"f32": 1e-4, "f64": 1e-6}
STORED = {"f32": 2e-6, "f64": 1e-7}  # float64 arrays of more than 600 numbers are kept as float32
ROWS = torch.zeros(6, 17, 32, dtype=torch.float64)


def model_of(family, feature="plain", dtype=torch.float64, kld=None):
    torch.manual_seed(0)
    return pae.PromptedViT(tiny.backbone(feature, dtype), family, kld).train()


def refused(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def complex_dft(x, dims):
    return torch.fft.fftn(x, dim=dims).real


def cosines(n):
    """cos and sin of 2 pi j k / n, (n, n)."""
    j = torch.arange(n, dtype=torch.float64)
    angle = 2 * torch.pi * (j[:, None] * j) / n
    return angle.cos(), angle.sin()


def mirror(x, dims):
    """x at minus its indices."""
    for dim in dims:
        x = x.index_select(dim, (-torch.arange(x.shape[dim])) % x.shape[dim])
    return x


# ---- the released implementation's numbers


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "group",
    [
        "deep_all_half",
        "deep_all_half_append",
        "deep_all_full",
        "deep_seq_half",
        "deep_hidden_half",
        "shallow_all_half",
    ],
)
def test_golden(golden, tiny_vit, group, precision, engine):
    arrays = golden("vfpt")
    variant = json.loads(str(arrays["meta_json"]))["variants"][group]
    arrays = {k: torch.as_tensor(v) for k, v in arrays.items() if k != "meta_json"}
    found = {k.removeprefix(f"{group}/{precision}/"): v for k, v in arrays.items()}
    family = (VFPTDeep if variant["DEEP"] else VFPTShallow)(
        5,
        variant["FOURIER_PERCENTAGE"],
        variant["FOURIER_DIMENSION"],
        variant["FOURIER_LOCATION"],
    )
    model = pae.PromptedViT(tiny_vit(PRECISIONS[precision]), family).train()
    shallow, deep = arrays["prompt_shallow"], arrays["prompt_deep"]
    with torch.no_grad():
        family.tokens.copy_(torch.cat([shallow[None], deep]) if variant["DEEP"] else shallow)
    data = golden("data")
    images = torch.as_tensor(data["images"][:6]).to(PRECISIONS[precision])
    logits = model(images, engine=engine)
    loss = F.cross_entropy(logits, torch.as_tensor(data["labels"][:6]))
    loss.backward()
    assert (logits - found["logits"]).abs().max() <= VALUE[precision]
    assert (loss - found["loss"]).abs() <= VALUE[precision]

    expected = found["fourier_out"]
    rows = torch.stack([r for r in family.raw_prompts() if r is not None])
    count = expected.shape[1]
    at = 5 - count if variant["FOURIER_LOCATION"] == "append" else 0
    assert error(rows[:, at : at + count], expected) <= STORED[precision]

    grad = family.tokens.grad
    if variant["DEEP"]:
        assert error(grad[1:], found["grad_prompt_deep"]) <= GRADIENT[precision]
        grad = grad[0]
    for got, key in (
        (grad, "prompt_shallow"),
        (model.head.weight.grad, "head_weight"),
        (model.head.bias.grad, "head_bias"),
    ):
        assert error(got, found[f"grad_{key}"]) <= GRADIENT[precision], key


# ---- the transform


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("rows", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("width", [1, 2, 7, 12])
def test_real_transform_is_the_real_part_of_the_complex_one(dimension, rows, width):
    dims = DIMENSIONS[dimension]
    x = torch.randn(3, rows, width, dtype=torch.float64)
    expected = complex_dft(x, dims)
    assert error(real_dft(x, dims), expected) < 1e-13
    (c_rows, s_rows), (c_width, s_width) = (
        cosines(n) if dim in dims else (torch.eye(n).double(), torch.zeros(n, n).double())
        for n, dim in ((rows, -2), (width, -1))
    )
    assert error(expected, c_rows @ x @ c_width - s_rows @ x @ s_width) < 1e-12


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("size", [(5, 8), (6, 7), (1, 4)])
def test_symmetry(dimension, size):
    """<a, S b> = <S a, b>; S drops the odd part and S S = n E."""
    dims = DIMENSIONS[dimension]
    a, b = torch.randn(2, *size, dtype=torch.float64).unbind(0)
    assert ((a * real_dft(b, dims)).sum() - (real_dft(a, dims) * b).sum()).abs() < 1e-11
    even, odd = (a + mirror(a, dims)) / 2, (a - mirror(a, dims)) / 2
    n = torch.tensor([size[d] for d in dims]).prod()
    assert real_dft(odd, dims).abs().max() < 1e-12
    assert error(real_dft(real_dft(a, dims), dims), n * even) < 1e-12


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_gradients_of_the_transform(dimension):
    dims = DIMENSIONS[dimension]
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: real_dft(t, dims), x)
    assert torch.autograd.gradgradcheck(lambda t: real_dft(t, dims), x)
    y = torch.randn(2, 3, 6, dtype=torch.float64)
    (got,) = torch.autograd.grad((real_dft(x, dims) * y).sum(), x)
    (expected,) = torch.autograd.grad((complex_dft(x, dims) * y).sum(), x)
    assert error(got, expected) < 1e-13


def test_transform_of_16_bits_and_under_compile():
    x = torch.randn(4, 10, 96)
    for dtype in (torch.bfloat16, torch.float16):
        got = real_dft(x.to(dtype), (-2, -1))
        assert got.dtype == dtype
        exact = complex_dft(x.to(dtype).double(), (-2, -1))
        assert error(got, exact) <= 2 * error(exact.to(dtype), exact)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda t: real_dft(t, (-2, -1)).square().sum(), fullgraph=True, backend="aot_eager"
    )
    one, other = (x.clone().requires_grad_() for _ in range(2))
    compiled(one).backward()
    real_dft(other, (-2, -1)).square().sum().backward()
    assert error(one.grad, other.grad) < 1e-6


# ---- what the family makes of it


def test_fraction_zero_is_vpt():
    """Bit for bit, dropout included."""
    for fourier, free in ((VFPTDeep, VPTDeep), (VFPTShallow, VPTShallow)):
        for scope in ("batch", "sample"):
            options = {"dropout": 0.3, "dropout_scope": scope}
            one, other = model_of(fourier(4, 0.0, **options)), model_of(free(4, **options))
            assert torch.equal(one.prompts.tokens, other.prompts.tokens)
            x = tiny.images(one.backbone)
            a, a_grads = gradients(one, x, "fast")
            b, b_grads = gradients(other, x, "fast")
            assert torch.equal(a, b)
            assert all(torch.equal(g, b_grads[n]) for n, g in a_grads.items())


@pytest.mark.parametrize(
    "fraction, counts",
    [(0.0, [0, 0, 0]), (0.5, [5, 1, 3]), (0.7, [7, 2, 4]), (0.99, [9, 2, 5]), (1.0, [10, 3, 6])],
)
def test_how_many_rows_are_transformed(fraction, counts):
    family = model_of(VFPTDeep([10, 3, 6], fraction)).prompts
    raw = list(family.tokens.split([10, 3, 6]))
    for rows, learned, count in zip(family.raw_prompts(), raw, counts, strict=True):
        assert torch.equal(rows[count:], learned[count:])
        if count:
            assert error(rows[:count], complex_dft(learned[:count], (-2, -1))) < 1e-13
    assert family.prompt_counts == [10, 3, 6]


def test_where_transformed_rows_go():
    families = {w: model_of(VFPTDeep(5, 0.4, location=w)).prompts for w in LOCATIONS}
    learned = families["prepend"].tokens[1]
    f = complex_dft(learned[:2], (-2, -1))
    alone = complex_dft(learned[:2], (-1,))
    expected = {
        "prepend": torch.cat([f, learned[2:]]),
        "append": torch.cat([learned[2:], f]),
        "random": torch.cat([alone, learned[2:]]),
        "addition": torch.cat([f, learned]),
    }
    for where, family in families.items():
        assert torch.equal(family.tokens[1], learned)
        assert error(family.raw_prompts()[1], expected[where]) < 1e-13
        family.eval()
        assert error(family.block_prompts(1, ROWS), expected[where]) < 1e-13
        assert error(family.all_prompts(ROWS)[1], expected[where]) < 1e-13
        assert family.prompt_counts == [len(expected[where])] * 3


def test_random_draws_anew_for_every_block_and_forward():
    family = model_of(VFPTDeep(12, 0.5, location="random")).prompts
    alone = real_dft(family.tokens, (-1,)).detach()
    seen = []
    for rows in [*family.all_prompts(ROWS), *family.all_prompts(ROWS)]:
        i = len(seen) % 3
        chosen = (rows == alone[i]).all(dim=1)
        assert chosen.sum() == 6
        assert torch.equal(rows[~chosen], family.tokens[i][~chosen])
        assert not any(torch.equal(chosen, other) for other in seen)
        seen.append(chosen)


@pytest.mark.parametrize(
    "blocks, transformed",
    [
        ("all", [0, 1, 2]),
        ("first_half", [0]),
        ("second_half", [1, 2]),
        ("odd", [1]),
        ([1, 2], [1, 2]),
        ([], []),
    ],
)
def test_which_blocks_are_transformed(blocks, transformed):
    model = model_of(VFPTDeep(4, blocks=blocks))
    for i, (rows, learned) in enumerate(zip(model.prompts.raw_prompts(), model.prompts.tokens)):
        assert torch.equal(rows, learned) == (i not in transformed)
    assert_engines_agree(model, tiny.images(model.backbone))


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("location", LOCATIONS)
def test_dropout_comes_before_the_transform(location, scope):
    """A dropped entry is a zero of the input, so every transformed entry feels it."""
    family = VFPTDeep(6, 0.5, location=location, dropout=0.4, dropout_scope=scope)
    model = model_of(family)
    assert_engines_agree(model, tiny.images(model.backbone))
    torch.manual_seed(5)
    rows = family.block_prompts(1, ROWS)
    torch.manual_seed(5)
    dropped = VPTDeep.block_prompts(family, 1, ROWS)
    assert dropped.dim() == rows.dim() == (3 if scope == "sample" else 2)
    assert (dropped == 0).any()
    if location != "random":
        f = complex_dft(dropped[..., :3, :], (-2, -1))
        at = -3 if location == "append" else 0
        assert error(rows.narrow(-2, at % rows.shape[-2], 3), f) < 1e-12
    assert not torch.equal(family.raw_prompts()[1], rows.reshape(-1, *rows.shape[-2:])[0])


def test_one_transform_for_all_blocks_and_images(monkeypatch):
    model = model_of(VFPTDeep(6, 0.5, dropout=0.2))
    calls = []
    rfftn = torch.fft.rfftn
    monkeypatch.setattr(torch.fft, "rfftn", lambda *a, **k: calls.append(1) or rfftn(*a, **k))
    pae.fast_forward(model, tiny.images(model.backbone, 7)).sum().backward()
    assert len(calls) == 2  # forward and backward


# ---- setting prompts


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("location", ["prepend", "append", "random"])
def test_set_prompts_reaches_what_can_be_reached(location, dimension):
    """The mirror-symmetric part of the transformed rows, and the others exactly."""
    if (location, dimension) == ("random", "sequence"):
        return
    dims = (-1,) if location == "random" else DIMENSIONS[dimension]
    deep, shallow = (c(6, 0.5, dimension, location) for c in (VFPTDeep, VFPTShallow))
    for family in (deep, shallow):
        model_of(family)
        wanted = [
            torch.randn(6, 32, dtype=torch.float64) if n else None for n in family.prompt_counts
        ]
        family.set_prompts(wanted)
        for got, target in zip(family.raw_prompts(), wanted, strict=True):
            if target is None:
                continue
            at = 3 if location == "append" else 0
            f, rest = target[at : at + 3], torch.cat([target[:at], target[at + 3 :]])
            even = (f + mirror(f, dims)) / 2
            assert error(got[at : at + 3], even) < 1e-12
            kept = torch.cat([got[:at], got[at + 3 :]])
            assert torch.equal(kept, rest)
        again = [None if r is None else r.detach().clone() for r in family.raw_prompts()]
        family.set_prompts(again)  # what can be reached is reached exactly
        for got, target in zip(family.raw_prompts(), again, strict=True):
            assert target is None or error(got, target) < 1e-12
    odd = deep.tokens[:, :3] - mirror(deep.tokens[:, :3], dims)
    assert odd.abs().max() < 1e-12  # of the smallest norm: nothing that reaches nothing


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_set_prompts_with_addition_is_the_least_squares_fit(fraction):
    """Rows and their transform are both demanded: at the fit the gradient of the error is zero."""
    for family in (
        VFPTDeep(4, fraction, location="addition"),
        VFPTShallow(4, fraction, location="addition"),
    ):
        model_of(family)
        wanted = [
            torch.randn(n, 32, dtype=torch.float64) if n else None for n in family.prompt_counts
        ]
        family.set_prompts(wanted)
        missed = sum(
            (got - target).square().sum()
            for got, target in zip(family.raw_prompts(), wanted)
            if target is not None
        )
        (grad,) = torch.autograd.grad(missed, family.tokens)
        assert missed > 1 and grad.abs().max() < 1e-10


def test_modal_pre_alignment():
    """The prompts are those of VPT, the transformed ones as far as a real part reaches."""
    free, fourier = model_of(VPTDeep(4)), model_of(VFPTDeep(4, 0.5))
    fourier.head.load_state_dict(free.head.state_dict())
    x, labels = tiny.images(free.backbone), torch.tensor([0, 1, 2])
    for model in (free, fourier):
        pae.mpa_init(model, x, labels, window=4, stride=4)
    for got, target in zip(fourier.prompts.raw_prompts(), free.prompts.tokens, strict=True):
        even = (target[:2] + mirror(target[:2], (-2, -1))) / 2
        assert error(got[:2], even) < 1e-10
        assert error(got[2:], target[2:]) < 1e-10


def test_regulariser_sees_effective_prompts():
    kld = pae.KLD(6)
    model = model_of(VFPTDeep(4, 0.5, dropout=0.3), kld=kld)
    assert torch.equal(model.penalty(), sum(kld.terms(model.prompts.raw_prompts())))
    learned = sum(kld.terms(list(model.prompts.tokens)))
    assert error(model.penalty(), learned) > 0.1
    (grad,) = torch.autograd.grad(model.penalty(), model.prompts.tokens)
    odd = grad[:, :2] - mirror(grad[:, :2], (-2, -1))
    assert odd.abs().max() < 1e-12 and grad[1:].norm() > 0  # the odd part reaches nothing


# ---- arguments


def test_arguments():
    for kind in (VFPTDeep, VFPTShallow):
        for wrong in (-0.1, 1.1, "0.5", None, True, float("nan")):
            message = re.escape(f"fraction must be a number in [0, 1], got {wrong!r}")
            refused(ValueError, message, lambda k=kind, w=wrong: k(4, w))
        message = r"dimension must be one of \('all', 'hidden', 'sequence'\), got 'rows'"
        refused(ValueError, message, lambda k=kind: k(4, dimension="rows"))
        message = r"location must be one of .*, got 'front'"
        refused(ValueError, message, lambda k=kind: k(4, location="front"))
        refused(
            ValueError,
            "dimension must be 'all' or 'hidden' with location 'random'",
            lambda k=kind: k(4, dimension="sequence", location="random"),
        )
        family = model_of(kind(4)).prompts
        refused(ValueError, "prompts must hold one entry", lambda f=family: f.set_prompts([]))
    refused(
        ValueError,
        "blocks must be one of .* or indices, got 'even'",
        lambda: VFPTDeep(4, blocks="even"),
    )
    refused(
        TypeError, r"blocks\[0\] must be an integer, got 1.5", lambda: VFPTDeep(4, blocks=[1.5])
    )
    message = "blocks must lie below 3, got 3"
    refused(ValueError, message, lambda: model_of(VFPTDeep(4, blocks=[0, 3])))
