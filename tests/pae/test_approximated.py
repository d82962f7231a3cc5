"""APT-VL: the layer by hand, what one engine leaves out, and beside families of other kinds."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer

import pae
from pae.prompts import APT, LSPT, ApproximatedPrompts, Approximation, PromptFamily, VPTShallow
from tests import timm_kinds, tiny
from tests.tiny import assert_engines_agree, error, gradients


def by_hand(family, h, y, index):
    """The formula, entry by entry of the prompts."""
    own = family.approximation
    p, a, b = own.prompts[index], own.down[index], own.up[index]
    r = torch.stack([row + b @ (a @ row) for row in p])
    act = torch.einsum("bnd,md->bnm", h, r).clamp(min=0)
    e = torch.einsum("bnm,md->bnd", act, p)
    w = act.max(dim=-1, keepdim=True).values.detach()
    return own.scale[index].exp() * (y + w * e)


def test_block_by_hand():
    made = tiny.prompted("one_block", ApproximatedPrompts(4, 3))
    vit, x = made.backbone, tiny.images(made.backbone)
    block, rows = vit.blocks[0], made.view.embed(x)
    h = block.norm1(rows)
    rows = rows + by_hand(made.prompts, h, block.attn(h), 0)
    rows = rows + block.mlp(block.norm2(rows))
    expected = made.head(vit.norm(rows)[:, 0])
    for engine in ("reference", "fast"):
        assert error(made(x, engine=engine), expected) < 1e-9


PRECISIONS = {"f32": (torch.float32, 1e-5, 1e-4), "f64": (torch.float64, 1e-9, 1e-6)}
PARTS = {"P": "prompts", "A": "down", "B": "up", "s": "scale"}


def fill(own, arrays, at=slice(None), start=False):
    with torch.no_grad():
        for key, name in PARTS.items():
            value = torch.as_tensor(arrays[key][at])
            value = torch.zeros_like(value) if start and key in "Bs" else value
            getattr(own, name).copy_(value.view(getattr(own, name).shape))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_golden_layer(golden, tiny_vit, precision):
    """One layer's attention alone; the prompts ignore a mask of its rows."""
    arrays = golden("apt_vl")
    dtype, value, gradient = PRECISIONS[precision]
    attn = tiny_vit(dtype).blocks[0].attn
    weight = torch.as_tensor(arrays["layer/weight"]).to(dtype)
    seen = torch.as_tensor(arrays["layer/mask"])
    masks = {"layer": None, "masked": seen[:, None, None].expand(-1, 1, 6, 6)}
    for name, mask in masks.items():
        own = Approximation(1, 5, 64, 4).to(dtype)
        fill(own, arrays, slice(1))
        h = torch.as_tensor(arrays["layer/h"]).to(dtype).requires_grad_()
        out = own(0, h, attn(h, attn_mask=mask))
        (out * weight).sum().backward()
        at = f"{name}/{precision}/"
        expected = torch.as_tensor(arrays[f"{at}output"])  # stored as float32, up to 1e3
        assert error(out, expected) < max(value, 1e-7)
        pairs = {"h": h.grad} | {k: getattr(own, n).grad for k, n in PARTS.items()}
        for key, grad in pairs.items():
            wanted = torch.as_tensor(arrays[f"{at}grad_{key}"])
            assert error(grad.view(wanted.shape), wanted) < gradient, (name, key)


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("state", ["tower", "tower_init"])
def test_golden_tower(golden, tiny_vit, state, precision, engine):
    arrays, data = golden("apt_vl"), golden("data")
    dtype, value, gradient = PRECISIONS[precision]
    model = pae.PromptedViT(tiny_vit(dtype), ApproximatedPrompts(5, 4)).train()
    own = model.prompts.approximation
    fill(own, arrays, start=state == "tower_init")
    images = torch.as_tensor(data["images"][:6]).to(dtype)
    logits = model(images, engine=engine)
    loss = F.cross_entropy(logits, torch.as_tensor(data["labels"][:6]))
    loss.backward()
    at = f"{state}/{precision}/"
    for got, key in ((logits, "logits"), (loss, "loss")):
        wanted = torch.as_tensor(arrays[at + key])
        assert (got.detach().double() - wanted.double()).abs().max() < value, key
    pairs = {k: getattr(own, n).grad for k, n in PARTS.items()}
    pairs |= {"head_weight": model.head.weight.grad, "head_bias": model.head.bias.grad}
    for key, grad in pairs.items():
        wanted = torch.as_tensor(arrays[f"{at}grad_{key}"])
        if state == "tower_init" and key == "A":
            assert not grad.any() and not wanted.any()  # B is 0
        else:
            assert error(grad.view(wanted.shape), wanted) < gradient, key


def test_start_and_size():
    made = pae.PromptedViT(tiny.backbone(), ApproximatedPrompts(50, 4))
    own = made.prompts.approximation
    assert {n: tuple(p.shape) for n, p in own.named_parameters()} == {
        "prompts": (3, 50, 32),
        "down": (3, 4, 32),
        "up": (3, 32, 4),
        "scale": (3,),
    }
    assert abs(own.prompts.std() / 0.02 - 1) < 0.05 and abs(own.down.std() - 1) < 0.1
    assert not own.up.any() and not own.scale.any() and made.prompts.tokens is None


# ---- beside other families: whoever answers the question is asked


class Beside(PromptFamily):
    """An `Approximation` held by a family of another kind."""

    def bind(self, shape):
        super().bind(shape)
        self.approximation = Approximation(shape.depth, 4, shape.width, 2)

    def attention_bypass(self, index, h, y):
        return self.approximation(index, h, y)


class LiveBeside(Beside, VPTShallow):
    pass


class WrittenBeside(Beside, LSPT):
    pass


class KeysBeside(Beside, APT):
    pass


class AttendedBeside(Beside, pae.prompts.IVPT):
    pass


class PerImageBeside(Beside, pae.prompts.VAPT):
    pass


KINDS = (LiveBeside, WrittenBeside, KeysBeside, AttendedBeside, PerImageBeside)


@pytest.mark.parametrize("feature", ["plain", "avg", "qk_norm", "layer_scale", "registers"])
@pytest.mark.parametrize("kind", KINDS)
def test_beside_other_families(kind, feature):
    if kind is AttendedBeside and "no_class" in feature:
        return
    made = tiny.prompted(feature, tiny.small(kind))
    x = tiny.images(made.backbone)
    assert_engines_agree(made, x)
    _, grads = gradients(made, x, "fast")
    assert all(grads[f"prompts.approximation.{n}"].norm() > 1e-6 for n in PARTS.values())


@pytest.mark.parametrize("train", ["biases", "blocks.*.norm1.*", "da-vpt+"])
@pytest.mark.parametrize("feature", ["plain", "avg", "qk_norm"])
def test_beside_what_is_trained_of_the_backbone(feature, train):
    vit = tiny.backbone(feature)
    made = tiny.over(vit, ApproximatedPrompts(4, 2, num_rows=3), train_backbone=train)
    for memory in ("keep", "recompute"):
        assert_engines_agree(made, tiny.images(vit), memory=memory)


@pytest.mark.parametrize("kind", ["parallel", "post-norm", "vitamin", "eva02-b", "differential"])
def test_blocks_of_other_kinds(kind):
    made = tiny.over(timm_kinds.build(kind), ApproximatedPrompts(4, 2, num_rows=3))
    assert_engines_agree(made, timm_kinds.images(made.backbone))
    if kind in ("parallel", "post-norm"):
        again = timm_kinds.build(kind)
        made = tiny.over(again, ApproximatedPrompts(4, 2), train_backbone="biases")
        assert_engines_agree(made, timm_kinds.images(again))


@pytest.mark.parametrize("pool", ["all", "prompts"])
def test_rows_that_are_pooled_are_changed_too(pool):
    made = tiny.over(tiny.backbone("avg"), ApproximatedPrompts(4, 2, num_rows=3), pool=pool)
    assert_engines_agree(made, tiny.images(made.backbone))


def test_dropout_is_the_same_for_every_row_and_image():
    made = tiny.prompted("plain", ApproximatedPrompts(8, 2, num_rows=3, dropout=0.5))
    x = tiny.images(made.backbone)
    assert_engines_agree(made, x)
    torch.manual_seed(1)
    with torch.no_grad():
        both = made(x)
        torch.manual_seed(1)
        assert error(made(x[:1]), both[:1]) < 1e-9
        assert error(made(x), both) > 1e-3
        made.eval()
        assert torch.equal(made(x), made(x))


def test_rows_behind_the_class_row_are_not_asked(monkeypatch):
    """The last block's, where only the class row is read; and no prompt's, in no block."""
    made = tiny.prompted("plain", ApproximatedPrompts(4, 2, num_rows=3))
    shapes = {"reference": [], "fast": []}
    own, into = Approximation.forward, []
    monkeypatch.setattr(
        Approximation,
        "forward",
        lambda s, i, h, y, m: (into.append(h.shape[1]), own(s, i, h, y, m))[1],
    )
    for engine, seen in shapes.items():
        into = seen
        made(tiny.images(made.backbone), engine=engine)
    assert shapes == {"reference": [20, 20, 20], "fast": [17, 17, 1]}


def test_compiled():
    made = tiny.prompted("plain", ApproximatedPrompts(4, 2), depth=2)
    x = tiny.images(made.backbone)
    expected, wanted = gradients(made, x, "fast")
    got, grads = gradients(torch.compile(made, backend="aot_eager"), x, "fast")
    assert error(got, expected) < 1e-9
    for (name, grad), other in zip(wanted.items(), grads.values(), strict=True):
        assert grad is None or error(other, grad) < 1e-9, name


def test_sixteen_bits():
    made = tiny.prompted("plain", ApproximatedPrompts(4, 2, num_rows=3), torch.float32)
    with torch.no_grad():
        for p in made.prompts.approximation.parameters():
            p.mul_(0.3)
    x = tiny.images(made.backbone)
    expected, wanted = gradients(made.double(), x.double(), "reference")
    made.float()
    with torch.autocast("cpu", torch.bfloat16):
        for engine in ("reference", "fast"):
            got, grads = gradients(made, x, engine)
            assert error(got, expected) < 0.05, engine
            assert (
                error(grads["prompts.approximation.up"], wanted["prompts.approximation.up"]) < 0.1
            )


def test_learns():
    made = pae.PromptedViT(tiny.backbone(), ApproximatedPrompts(8, 2)).train()
    x, y = tiny.images(made.backbone, batch=8), torch.arange(8) % 5
    optimiser = torch.optim.Adam(made.prompts.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        losses.append(F.cross_entropy(pae.fast_forward(made, x), y))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]


# ---- what is refused


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"num_rows": -1}, "num_rows must be at least 0"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ApproximatedPrompts(**kwargs)


def test_what_cannot_follow_a_bypass_says_so():
    made = tiny.prompted("plain", ApproximatedPrompts(4, 2, num_rows=3))
    with pytest.raises(ValueError, match=r"ApproximatedPrompts\) changes what attention gives"):
        pae.mpa_init(made, tiny.images(made.backbone), torch.zeros(3, dtype=torch.int64), 4, 4)
    with pytest.raises(ValueError, match="task 0: prompts of ApproximatedPrompts change what"):
        pae.serve_many([made])


def test_swin_refuses_it_by_name():
    class Stages(Beside, pae.prompts.VPTDeep):
        takes_stages = True

    with pytest.raises(ValueError, match=r"prompts \(Stages\) are not defined on a backbone with"):
        pae.PromptedViT(SwinTransformer(img_size=32, embed_dim=8, depths=(1, 1)), Stages(3))


def test_rows_of_another_shape_are_refused():
    class Short(pae.prompts.VPTDeep):
        def attention_bypass(self, index, h, y):
            return y[:, :1]

    made = tiny.prompted("avg", Short(3))
    for engine in ("reference", "fast"):
        with pytest.raises(ValueError, match=r"attention_bypass\(0\) must give rows like y"):
            made(tiny.images(made.backbone), engine=engine)


def test_a_hook_is_refused_by_both():
    """The reference runs the block's formula, which runs none."""
    made = tiny.prompted("plain", ApproximatedPrompts(4, 2))
    made.backbone.blocks[1].mlp.register_forward_hook(lambda *_: None)
    for engine in ("reference", "fast"):
        with pytest.raises(pae.UnsupportedBackbone, match="forward hook"):
            made(tiny.images(made.backbone), engine=engine)
