"""Rows of blocks through both engines, heads that make maps of them, and the model of both."""

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer
from torch import nn

import pae
from pae.dense import IGNORED, DenseHeads, as_map, pixel_loss
from pae.prompts import VPTDeep, VPTShallow
from pae_kernels import cpu
from pae_kernels.maps import has_kernel
from tests import libraries, tiny
from tests.errors import assert_rounded
from tests.kernels import host_library
from tests.pae.test_engine import FAMILIES
from tests.pae.test_golden import GRADIENT, PRECISIONS, VALUE, close
from tests.tiny import assert_engines_agree, error, prompted, refused


class Maps(nn.Module):
    """The rows of some blocks, end to end: what `assert_engines_agree` compares."""

    def __init__(self, model, blocks=(0, -1)):
        super().__init__()
        self.model, self.blocks = model, blocks

    def forward(self, images, engine="reference", memory="keep"):
        rows = self.model.forward_features(images, self.blocks, engine, memory)
        return torch.cat([r.flatten(1) for r in rows], dim=1)


# ---- rows of blocks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "feature",
    ["plain", "one_block", "registers", "avg_no_class_token", "qk_norm", "dynamic_size", "swiglu"],
)
def test_engines_agree_on_every_backbone(feature, dtype):
    model = prompted(feature, dtype=dtype)
    blocks = (0, -1) if len(model.view.blocks) > 1 else (-1,)
    assert_engines_agree(Maps(model, blocks), tiny.images(model.backbone))


@pytest.mark.parametrize("family", FAMILIES)
def test_engines_agree_on_any_family(family):
    model = prompted("plain", FAMILIES[family]())
    assert_engines_agree(Maps(model, (0, 1, 2)), tiny.images(model.backbone))


@pytest.mark.parametrize("name", sorted(pae.prompts.METHODS))
def test_engines_agree_on_every_shipped_family(name):
    """Those whose rows live on, are rewritten, or are changed by attention among them."""
    model = prompted("plain", tiny.small(pae.prompts.METHODS[name]))
    x = tiny.images(model.backbone)
    for blocks in ((0, 1, 2), (1,)):
        assert_engines_agree(Maps(model, blocks), x, wrt_images=False)


@pytest.mark.parametrize("memory", ["recompute", "keep"])
@pytest.mark.parametrize("wrt_images", [True, False])
def test_memory_modes(memory, wrt_images):
    model = prompted("plain", VPTDeep(3))
    x = tiny.images(model.backbone)
    assert_engines_agree(Maps(model), x, memory=memory, wrt_images=wrt_images)


def test_eight_bits_are_near():
    model = prompted("plain", VPTDeep(3))
    x = tiny.images(model.backbone)
    grads = []
    for memory in ("keep", "recompute8"):
        model.zero_grad()
        Maps(model)(x, "fast", memory).square().sum().backward()
        grads.append(model.prompts.tokens.grad.clone())
    assert 0 < error(*grads) < 2e-2


def test_gradients_of_each_block_alone():
    """A gradient enters at every block that is asked for, and at no other."""
    model = prompted("plain", VPTDeep(2))
    x = tiny.images(model.backbone)
    found = {}
    for engine in ("reference", "fast"):
        for which in range(3):
            model.zero_grad()
            rows = model.forward_features(x, (0, 1, 2), engine)
            rows[which].square().sum().backward()
            found[engine, which] = model.prompts.tokens.grad.clone()
            reached = [bool(g.any()) for g in found[engine, which]]
            assert reached == [block <= which for block in range(3)]
    for which in range(3):
        assert error(found["fast", which], found["reference", which]) < 1e-9


def test_gradcheck():
    model = prompted("plain", VPTDeep(1), depth=2, embed_dim=8, num_heads=2, img_size=8)
    x = tiny.images(model.backbone, batch=1)
    tokens = model.prompts.tokens

    def rows(values):
        with torch.no_grad():
            tokens.copy_(values)
        return Maps(model)(x, "fast")

    class Held(torch.autograd.Function):
        """The rows as a function of the tokens' values, with the engine's own gradient."""

        @staticmethod
        def forward(ctx, values):
            with torch.enable_grad():
                ctx.out = rows(values.detach())
            return ctx.out.detach().clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.autograd.grad(ctx.out, tokens, grad, retain_graph=True)[0]

    assert torch.autograd.gradcheck(Held.apply, tokens.detach().clone().requires_grad_(True))


def test_rows_are_those_of_timm():
    """Without prompts and without a norm, whatever stands before the patches cut off."""
    model = prompted("registers", VPTDeep(0)).eval()
    x = tiny.images(model.backbone)
    expected = model.backbone.forward_intermediates(
        x, indices=[0, 2], output_fmt="NLC", intermediates_only=True
    )
    for engine in ("reference", "fast"):
        for got, rows in zip(model.forward_features(x, [0, -1], engine), expected, strict=True):
            assert got.shape == rows.shape and error(got, rows) < 1e-12


@pytest.mark.parametrize("kind", ["DINOv2, registers", "CLIP", "torchvision", "open_clip"])
def test_other_libraries(kind):
    model = tiny.over(libraries.model(kind))
    x = libraries.images(2)
    rows = model.forward_features(x, [0, 2])
    assert [tuple(r.shape) for r in rows] == [(2, 16, 32)] * 2
    assert_engines_agree(Maps(model), x)


@pytest.mark.parametrize("family", [VPTDeep, VPTShallow])
@pytest.mark.parametrize("size", [(32, 32), (40, 24)], ids=str)
def test_stages_of_swin(family, size):
    """Each stage on its own grid, row by row, padded windows and shifted ones among them."""
    swin = SwinTransformer(
        **{"img_size": size, "patch_size": 2, "embed_dim": 8, "num_heads": (2, 4)},
        **{"depths": (2, 2), "window_size": 4, "num_classes": 5},
    )
    model = tiny.over(tiny.filled(swin).double(), family(3))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    rows = model.forward_features(x, [1, 3])
    count = size[0] * size[1] // 4
    assert [tuple(r.shape) for r in rows] == [(2, count, 8), (2, count // 4, 16)]
    for blocks in ([1, 3], [0], [0, 2, 3]):
        assert_engines_agree(Maps(model, blocks), x)


def test_dropout_draws_alike_and_leaves_the_same_stream():
    """Also where blocks behind the last that is asked for have prompts."""
    model = prompted("plain", VPTDeep(4, dropout=0.5))
    x, after = tiny.images(model.backbone), []
    assert_engines_agree(Maps(model, (1,)), x)
    for engine in ("reference", "fast"):
        torch.manual_seed(5)
        model.forward_features(x, (0,), engine)
        after.append(torch.rand(()))
    assert after[0] == after[1]


def test_blocks_behind_the_last_are_not_run():
    model = prompted("plain", VPTDeep(2))
    x = tiny.images(model.backbone)
    expected = model.forward_features(x, (1,))[0]
    with torch.no_grad():
        for parameter in model.backbone.blocks[2].parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(model.forward_features(x, (1,))[0], expected)
    assert error(model.forward_features(x, (1,), "fast")[0], expected) < 1e-12


def test_tapped_rows_are_nobodys_buffer():
    """What the next block makes of the rows leaves those that were handed out as they are."""
    model = prompted("plain", VPTDeep(2)).eval()
    x = tiny.images(model.backbone)
    with torch.no_grad():
        rows = model.forward_features(x, (0, 1, 2), "fast")
        for i, each in enumerate(rows):
            assert error(each, model.forward_features(x, (i,), "fast")[0]) < 1e-12


def test_refusals():
    model = prompted("plain", VPTDeep(2))
    call = partial(model.forward_features, tiny.images(model.backbone))
    refused(ValueError, "out_blocks must lie in [-3, 3), got 3", lambda: call([3]))
    refused(ValueError, "out_blocks must be each once, got [2, -1]", lambda: call([2, -1]))
    refused(ValueError, "out_blocks must be ascending, got [1, 0]", lambda: call([1, 0]))
    for wrong in ([], "01", 2, [0.0], [True]):
        refused(ValueError, "out_blocks must be numbers of blocks", lambda given=wrong: call(given))
    refused(ValueError, "engine must be one of", lambda: call([0], "quick"))
    refused(ValueError, "memory must be one of", lambda: call([0], "fast", "low"))


# ---- heads, as released


HEADS = {"decode": (4, 2), "aux": (2, 4), "aux_base": (1, 4), "pup": (4, 2)}


def ours(name):
    """PRO-VPT's names of parameters in those of mmsegmentation, which are ours."""
    kind, _, rest = name.partition("_")
    number, _, part = rest.partition(".")
    if name.startswith("conv_4"):
        return f"conv_seg.{part}"
    if kind in ("conv", "bn") and number.isdigit():
        return f"up_convs.{number}.0.{kind}.{part}"
    return name


def step_of(head, rows, masks, weight, engine="reference"):
    """Logits, loss and gradients of a head in training: what the vectors hold."""
    logits = head(as_map(rows, (2, 2)), engine)
    loss = weight * pixel_loss(logits, masks, engine)
    loss.backward()
    return logits, loss, {name: p.grad for name, p in head.named_parameters()}


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", HEADS)
def test_heads_as_released(golden, name, precision, engine):
    """At the bounds of the vectors' README: logits, losses, all gradients and running statistics.

    A batch norm takes a bias before it out again, so the gradient of one is 0, and both theirs and
    ours are rounding, which no relative bound compares. Ours is held to what rounding the terms of
    its formula leaves of 0 (`tests.errors.rounding`), and to the README's absolute bound.
    """
    arrays, dtype = golden("setr_pup"), PRECISIONS[precision]
    arrays = {k: torch.as_tensor(v) for k, v in arrays.items() if k != "meta_json"}
    at, wide = f"{name}/{precision}/", f"{name}/f64/"
    own = {k.removeprefix(f"{name}/"): v for k, v in arrays.items() if k.startswith(f"{name}/")}
    count, scale = HEADS[name]
    head = pae.SETRPUP(12, 3, 8, count, scale, bias=name == "pup")
    state = {ours(k): v for k, v in own.items() if "/" not in k and k not in ("tokens", "labels")}
    left = head.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all(k.endswith("num_batches_tracked") for k in left.missing_keys)
    exact = copy.deepcopy(head).double().train()
    head = head.to(dtype).train()
    given = arrays["pup/tokens"] if name == "pup" else arrays["features"].flatten(2).mT
    rows = given.to(dtype).requires_grad_(True)
    masks = arrays["pup/labels" if name == "pup" else "labels"].long()
    weight = 0.4 if name.startswith("aux") else 1.0
    logits, loss, grads = step_of(head, rows, masks, weight, engine)
    value = {"f32": 1e-4, "f64": 1e-9}[precision]
    expected = arrays[at + "logits"]
    rounded = 0.0 if expected.dtype == torch.float64 else 1e-7 * float(expected.abs().max())
    assert close(logits, expected, value + rounded)
    assert close(loss, arrays[at + "loss"], VALUE[precision])
    cancelled = {k for k in grads if "up_convs" in k and k.endswith("conv.bias")}
    assert len(cancelled) == (count if name == "pup" else 0)
    compared = 0
    for key in own:
        if key.startswith(f"{precision}/grad_"):
            short = key.partition("grad_")[2]
            got = grads.get(ours(short))
            if short in ("features", "tokens"):
                got = rows.grad if short == "tokens" else as_map(rows.grad, (2, 2))
            if ours(short) in cancelled:
                assert close(got, own[key], {"f32": 1e-7, "f64": 1e-15}[precision]), short
            else:
                assert error(got, own[key]) <= GRADIENT[precision], short
            compared += 1
        elif key.startswith(f"{precision}/after_"):
            got = head.state_dict()[key.partition("after_")[2]]
            assert error(got, own[key]) <= GRADIENT[precision], key
            compared += 1
    assert compared >= 8 * (name != "pup") or compared > 15
    if cancelled:

        def biases():
            exact.zero_grad()
            found = step_of(exact, given.double(), masks, weight)[2]
            return [found[k].clone() for k in sorted(cancelled)]

        assert_rounded([grads[k] for k in sorted(cancelled)], biases, dtype, sorted(cancelled))
    if name == "decode" and precision == "f64":
        head.load_state_dict(state, strict=False)  # the statistics before the step
        eval_logits = arrays[f"{wide}eval_logits"]
        assert error(head.eval()(as_map(rows.detach(), (2, 2)), engine), eval_logits) < 1e-7


def test_biases_of_convolutions_count_where_no_batch_norm_takes_them_out():
    """In eval mode."""
    torch.manual_seed(0)
    head = pae.SETRPUP(12, 3, 8, 3, 2, bias=True).eval()
    maps = torch.randn(2, 12, 4, 6)
    without = head(maps)
    with torch.no_grad():
        for name, p in head.named_parameters():
            if name.endswith("conv.bias"):
                p.copy_(torch.linspace(-2, 2, len(p)))
    expected, got = head(maps), head(maps, "fast")
    assert error(got, expected) < 1e-5
    assert error(expected, without) > 1e-2


def test_the_last_enlargement_may_stand_on_either_side_of_the_classes():
    """As mmsegmentation has it: enlarged first, at four times the work of the 1 x 1 product."""
    head = pae.SETRPUP(6, 3, 4, 2).double()
    maps = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    seen = []
    handle = head.conv_seg.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    got = head(maps)
    handle.remove()
    (before,) = seen
    first = F.interpolate(before, scale_factor=2, mode="bilinear", align_corners=False)
    assert got.shape == (2, 3, 12, 20) and error(got, head.conv_seg(first)) < 1e-12


# ---- the model of both


def segmenter(family=None, dtype=torch.float64, head=None, **changes):
    """Over a tiny ViT of 16 pixels in patches of 4: grid 4 x 4, heads of every kind."""
    model = prompted("registers", VPTDeep(3) if family is None else family, dtype, **changes)
    torch.manual_seed(1)
    head = pae.SETRPUP(32, 4, 8, 2) if head is None else head
    others = [pae.SETRPUP(32, 4, 8, 1, 4), pae.LinearHead(32, 4)]
    return pae.PromptedSegmenter(model, head, (0, 1, -1), others).train()


def masks_of(x, classes=4):
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(classes, (len(x), *x.shape[-2:]), generator=generator)
    masks[:, :2] = IGNORED
    return masks


def test_logits_of_every_pixel():
    model = segmenter()
    x = tiny.images(model.backbone)
    assert model(x).shape == (3, 4, 16, 16) and model.out_blocks == (0, 1, 2)
    outputs = model(x, auxiliary=True)
    # the last enlargement is the loss's, where it leads to the size of the images
    assert [tuple(o.shape) for o in outputs] == [(3, 4, 4, 4), (3, 4, 4, 4), (3, 4, 8, 8)]
    assert torch.equal(F.interpolate(outputs[-1], scale_factor=2.0, mode="bilinear"), model(x))
    other = segmenter(head=pae.SETRPUP(32, 4, 8, 3))  # leads beyond it
    assert other(x, auxiliary=True)[-1].shape == (3, 4, 32, 32)
    flat = pae.PromptedSegmenter(prompted("plain", 2), pae.LinearHead(32, 4))
    (rows,) = flat.model.forward_features(x, [-1])
    small = flat.heads.decode(as_map(rows, (4, 4)))
    expected = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    assert torch.equal(flat(x), expected)


def test_loss_is_that_of_all_heads():
    """Ignored pixels add nothing and count all the same; auxiliary losses weigh 0.4."""
    model = segmenter()
    x = tiny.images(model.backbone)
    masks = masks_of(x)
    model.eval()  # batch norms that stay as they are
    total = 0.0
    for weight, logits in zip((0.4, 0.4, 1.0), model(x, auxiliary=True)):
        logits = F.interpolate(logits, size=(16, 16), mode="bilinear", align_corners=False)
        logs = logits.log_softmax(1).gather(1, masks.clamp(max=3)[:, None])[:, 0]
        total = total - weight * logs[masks != IGNORED].sum() / masks.numel()
    for engine in ("reference", "fast"):
        assert abs(float(model.loss(x, masks, engine).detach() - total.detach())) < 1e-12
    small = model.loss(x, masks.to(torch.uint8)).detach()
    assert float(small) == pytest.approx(float(total.detach()))


@pytest.mark.parametrize("family", [VPTDeep, VPTShallow, pae.prompts.VAPT])
def test_engines_agree_in_loss_and_gradients(family):
    model = segmenter(tiny.small(family))
    x = tiny.images(model.backbone)
    masks, found = masks_of(x), []
    state = copy.deepcopy(model.state_dict())
    for engine in ("reference", "fast"):
        model.load_state_dict(state)  # batch norms have moved
        model.zero_grad()
        torch.manual_seed(2)
        loss = model.loss(x, masks, engine)
        loss.backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((loss, named, {n: b.clone() for n, b in model.named_buffers()}))
    (loss, named, buffers), (other, others, moved) = found
    assert abs(float((loss - other).detach())) < 1e-12
    for name, grad in named.items():
        assert error(others[name], grad) < 1e-9, name
    for name, value in buffers.items():
        assert error(moved[name].double(), value.double()) < 1e-9, name


@pytest.mark.parametrize("size", [(16, 16), (20, 12)], ids=str)
def test_in_fp32_the_fast_engine_is_as_near_to_fp64(size):
    """Where it has kernels of its own: 3 x 3 products at the size before an enlargement, and the
    loss of logits that are nowhere. Masks of the images' size and images that are no square.
    """
    exact = segmenter(VPTDeep(3), img_size=size)
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    masks = masks_of(x)
    state, found = copy.deepcopy(exact.state_dict()), {}
    small = segmenter(VPTDeep(3), torch.float32, img_size=size)
    small.load_state_dict(state)
    with cpu.using(host_library.cpu_library()):
        assert has_kernel("pixel_loss", x.float()) and has_kernel("enlarged_conv", x.float())
        for name, model, engine in (
            *(
                ("exact", exact, "reference"),
                ("plain", small, "reference"),
                ("fast", small, "fast"),
            ),
        ):
            model.load_state_dict(state)
            model.zero_grad()
            loss = model.loss(x.to(model.prompts.tokens.dtype), masks, engine)
            loss.backward()
            grads = [p.grad.double().flatten() for p in model.parameters() if p.requires_grad]
            found[name] = loss.detach(), torch.cat(grads)
    assert abs(float(found["fast"][0] - found["exact"][0])) < 1e-6
    far = {name: error(found[name][1], found["exact"][1]) for name in ("plain", "fast")}
    assert far["fast"] < 2 * far["plain"] + 1e-6, far


def test_running_statistics_are_part_of_the_checkpoint(tmp_path):
    model = segmenter()
    x = tiny.images(model.backbone)
    for _ in range(3):
        model.loss(x, masks_of(x), "fast")
    model.task = pae.TaskInfo(classes=("a", "b", "c", "d"))
    model.save(tmp_path / "it.safetensors")
    names = set(load_file(tmp_path / "it.safetensors"))
    assert "head.decode.up_convs.0.0.bn.running_mean" in names
    assert {n.removeprefix("model.") for n in model.trained_state()} == names
    backbone = tiny.backbone("registers")
    again = pae.PromptedSegmenter.from_file(tmp_path / "it.safetensors", backbone)
    assert again.classes == ("a", "b", "c", "d") and again.out_blocks == (0, 1, 2)
    assert torch.equal(again.eval()(x), model.eval()(x))
    other = segmenter(VPTDeep(3))
    assert not torch.equal(other.eval()(x), model(x))
    other.load(tmp_path / "it.safetensors")
    assert torch.equal(other(x), model(x))
    assert pae.read_checkpoint(tmp_path / "it.safetensors").dense == model.heads.describe()
    json.dumps(model.heads.describe())


def test_files_of_another_kind(tmp_path):
    model, plain = segmenter(), prompted("registers", VPTDeep(3))
    dense, flat = tmp_path / "dense.safetensors", tmp_path / "flat.safetensors"
    model.save(dense)
    plain.save(flat)
    backbone = tiny.backbone("registers")
    error_ = pae.CheckpointError
    refused(
        error_,
        "use PromptedSegmenter.from_file",
        lambda: pae.PromptedViT.from_file(dense, backbone),
    )
    refused(
        error_, "holds no heads for dense", lambda: pae.PromptedSegmenter.from_file(flat, backbone)
    )
    refused(error_, "holds heads for dense prediction", lambda: plain.load(dense))
    refused(error_, "holds a head for features", lambda: model.load(flat))
    small = segmenter(head=pae.SETRPUP(32, 4, 4, 2))
    refused(error_, "build it with the same", lambda: small.load(dense))
    assert isinstance(backbone.head, nn.Linear)  # as it was

    class Mine(pae.LinearHead):
        pass

    custom = pae.PromptedSegmenter(prompted("plain", 2), Mine(32, 4))
    refused(ValueError, "is none of pae.dense", lambda: custom.save(tmp_path / "x.safetensors"))
    assert not (tmp_path / "x.safetensors").exists()


def test_what_does_not_fit():
    make, head = pae.PromptedSegmenter, pae.LinearHead(32, 4)
    model = prompted("plain", VPTDeep(2))
    refused(TypeError, "model must be a PromptedViT", lambda: make(model.backbone, head))
    refused(TypeError, "head must be a module with width", lambda: make(model, nn.Identity()))
    refused(ValueError, "head.width must be 32", lambda: make(model, pae.LinearHead(8, 4)))
    refused(ValueError, "out_blocks must be one per head", lambda: make(model, head, (0, 1)))
    refused(ValueError, "out_blocks must be ascending", lambda: make(model, head, (1, 0), [head]))
    wrong = pae.LinearHead(32, 3)
    refused(ValueError, "auxiliary[0].num_classes", lambda: make(model, head, (0, 1), [wrong]))
    refused(ValueError, "auxiliary_weight", lambda: make(model, head, (-1,), (), -1.0))
    refused(ValueError, "channels must be", lambda: pae.SETRPUP(32, 4, 0))
    proxies = prompted("plain", tiny.small(pae.prompts.DAVPT))
    refused(ValueError, "learn from the class of an image", lambda: make(proxies, head))
    built = make(model, head)
    assert isinstance(model.head, DenseHeads)
    refused(ValueError, "already belongs", lambda: make(model, head))
    x = tiny.images(model.backbone)
    refused(TypeError, "call the PromptedSegmenter", lambda: model(x))
    refused(ValueError, "masks must be an integer tensor", lambda: built.loss(x, x))
    bad = masks_of(x).where(masks_of(x) != 2, torch.tensor(7))
    refused(
        ValueError, "masks must hold numbers below 4, or 255, got 7", lambda: built.loss(x, bad)
    )


def test_groups_have_all_that_is_trained():
    model = segmenter()
    groups = {g["name"]: g["params"] for g in model.parameter_groups(0.1, 5e-4)}
    assert set(groups) == {"prompts", "head"}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for g in groups.values() for p in g} == {id(p) for p in trained}
    model.train()
    assert not model.backbone.training and model.heads.decode.training


def test_swin_is_segmented():
    swin = SwinTransformer(
        **{"img_size": 32, "patch_size": 2, "embed_dim": 8, "num_heads": (2, 4)},
        **{"depths": (2, 2), "window_size": 4, "num_classes": 5},
    )
    model = tiny.over(tiny.filled(swin).double(), VPTDeep(3))
    model = pae.PromptedSegmenter(
        model, pae.SETRPUP(16, 3, 4, 2), (1, 3), [pae.LinearHead(8, 3)]
    ).eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert model(x).shape == (2, 3, 32, 32)
    assert [tuple(o.shape[-2:]) for o in model(x, auxiliary=True)] == [(16, 16), (16, 16)]
    assert error(model(x, "fast"), model(x)) < 1e-9
