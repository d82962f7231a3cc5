"""The contract of fast_forward, docs/contract.md: each row is tried here, in both engines.

A row says "equal", then the fast engine gives what the reference gives; or "refused", then it
raises one line that names the cause, and the reference gives what is right.
"""

import copy
import io
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import pae
from tests import combinations, tiny
from tests.tiny import assert_engines_agree, error, prompted

PAGE = Path(__file__).parents[2] / "docs" / "contract.md"
ROWS: dict[str, "object"] = {}


def row(name):
    def add(check):
        assert name not in ROWS
        ROWS[name] = check
        return check

    return add


def table():
    """Row -> "equal" or "refused", of all tables of the page."""
    found = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and cells[1] in ("equal", "refused"):
            assert cells[0] not in found
            found[cells[0]] = cells[1]
    return found


def test_every_row_has_a_check_and_every_check_a_row():
    assert set(table()) == set(ROWS)
    assert len(ROWS) > 30


@pytest.fixture(autouse=True)
def differentiable_attention():
    """PyTorch's fused attention has neither second nor forward-mode derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    """`check(engine)` gives what is compared; a check of a refusal also gives the reason."""
    check, said = ROWS[name], table()[name]
    reason = None
    if isinstance(check, tuple):
        check, reason = check
    assert (said == "refused") == (reason is not None)
    torch.manual_seed(0)
    expected = flat(check("reference"))
    assert expected and all(torch.isfinite(t).all() for t in expected)
    torch.manual_seed(0)
    if said == "refused":
        with pytest.raises((pae.UnsupportedBackbone, RuntimeError), match=reason) as raised:
            check("fast")
        assert "\n" not in str(raised.value)
        assert 'engine="reference"' in str(raised.value)
        return
    for got, wanted in zip(flat(check("fast")), expected, strict=True):
        assert got.dtype == wanted.dtype
        assert error(got, wanted) < 1e-9 if wanted.norm() > 0 else got.norm() == 0


def flat(results):
    return [results] if isinstance(results, torch.Tensor) else list(results)


def refused(reason, check):
    return check, reason


# ---- what is differentiated


def model_and_images(feature="avg", family=None, **changes):
    made = prompted(feature, family or pae.prompts.VPTDeep(3), **changes)
    return made, tiny.images(made.backbone)


def loss(model, x, engine):
    return model(x, engine=engine).square().sum()


def of_tokens(engine, feature="avg", model_too=False):
    """(function of the prompts, prompts, images) of a fresh model."""
    model, x = model_and_images(feature)

    def function(tokens, images=x):
        swapped = {"prompts.tokens": tokens}
        return functional_call(model, swapped, (images,), {"engine": engine}).square().sum()

    return function, model.prompts.tokens.detach().clone(), x


@row("every trained parameter and the images")
def _(engine):
    model, x = model_and_images("plain")
    x.requires_grad_()
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return torch.autograd.grad(loss(model, x, engine), wanted)


@row("the images alone, nothing trained")
def _(engine):
    model, x = model_and_images()
    model.requires_grad_(False)
    x.requires_grad_()
    return torch.autograd.grad(loss(model, x, engine), x)


@row("a trained stem, final norm or head")
def _(engine):
    model, x = model_and_images("plain")
    wanted = [model.backbone.patch_embed.proj.weight, model.backbone.norm.weight]
    for p in wanted:
        p.requires_grad_(True)
    return torch.autograd.grad(loss(model, x, engine), [*wanted, model.head.weight])


def trained(part):
    def check(engine):
        model, x = model_and_images()
        model(x, engine=engine)  # a plan made before does not hide it
        for name, p in model.backbone.named_parameters():
            p.requires_grad_(part in name)
        wanted = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(loss(model, x, engine), wanted)

    return check


@row("trained biases and norms of Swin, of what stands between its stages too")
def _(engine):
    which = ["biases", "layers.*norm*"]
    model = tiny.over(combinations.BACKBONES["timm Swin"](), train_backbone=which)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss(model, x, engine), wanted)


ROWS["trained biases of blocks (BitFit)"] = trained("bias")
ROWS["trained norms of blocks"] = trained("norm1")
ROWS["trained matrices of blocks"] = refused(
    r"blocks\.0\.attn\.proj\.weight requires a gradient", trained("proj.weight")
)


@row("`backward(retain_graph=True)`, twice")
def _(engine):
    model, x = model_and_images()
    value = loss(model, x, engine)
    value.backward(retain_graph=True)
    value.backward()
    return model.prompts.tokens.grad


@row("a gradient of the head's gradient by the prompts")
def _(engine):
    model, x = model_and_images()
    (first,) = torch.autograd.grad(loss(model, x, engine), model.head.weight, create_graph=True)
    return torch.autograd.grad(first.square().sum(), [model.prompts.tokens, model.head.weight])


NO_SECOND = r"no second derivatives \(create_graph=True\)"


def second(feature, family):
    def check(engine):
        model, x = model_and_images(feature, family())
        prompts = list(model.prompts.parameters())
        first = torch.autograd.grad(loss(model, x, engine), prompts, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), prompts)

    return refused(NO_SECOND, check)


ROWS["second derivatives (`create_graph=True`)"] = second("plain", lambda: pae.prompts.VPTDeep(3))
ROWS["second derivatives, VPT-shallow"] = second("avg", lambda: pae.prompts.VPTShallow(3))
ROWS["second derivatives, VAPT"] = second("plain", lambda: pae.prompts.VAPT(3, 3, 1, 4, "gelu"))


def by_hvp(engine):
    function, tokens, _ = of_tokens(engine)
    return torch.autograd.functional.hvp(function, tokens, tokens)[1]


ROWS["`torch.autograd.functional.hvp`, `hessian`"] = refused(NO_SECOND, by_hvp)


@row("second derivatives of `model.penalty()`")
def _(engine):
    model, x = prompted("plain", pae.prompts.VPTDeep(3)), None
    with_kld = pae.PromptedViT(tiny.backbone(), pae.prompts.VPTDeep(3), pae.KLD(dim=4)).train()
    with torch.no_grad():
        with_kld.prompts.tokens.copy_(model.prompts.tokens)
        for p in (with_kld.kld.K, with_kld.kld.L):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    x = tiny.images(with_kld.backbone)
    logits = with_kld(x, engine=engine)
    assert logits.requires_grad
    tokens = with_kld.prompts.tokens
    (first,) = torch.autograd.grad(with_kld.penalty(), tokens, create_graph=True)
    (got,) = torch.autograd.grad(first.square().sum(), tokens)
    assert got.norm() > 0
    return got


# ---- torch.func and forward mode


def with_transform(transform):
    def check(engine):
        return transform(*of_tokens(engine))

    return refused(r"fast_forward was called inside a torch\.func transform", check)


def along(function, tokens):
    return lambda s: function(s * tokens)


ONE = torch.ones((), dtype=torch.float64)
TRANSFORMS = {
    "grad": lambda f, t, x: grad(f)(t),
    "vjp": lambda f, t, x: vjp(f, t)[1](ONE)[0],
    "jvp": lambda f, t, x: jvp(f, (t,), (t,))[1],
    "jacrev": lambda f, t, x: jacrev(f)(t),
    "jacfwd": lambda f, t, x: jacfwd(along(f, t))(ONE),
    "hessian": lambda f, t, x: hessian(along(f, t))(ONE),
    "vmap": lambda f, t, x: vmap(f)(torch.stack([t, 2 * t])),
    "vmap(grad)": lambda f, t, x: vmap(grad(lambda t, i: f(t, i[None])), (None, 0))(t, x),
}
for _name, _transform in TRANSFORMS.items():
    ROWS[f"`torch.func.{_name}`"] = with_transform(_transform)


def several_at_once(engine):
    function, tokens, _ = of_tokens(engine)
    value, both = function(tokens.requires_grad_()), torch.stack([ONE, 2 * ONE])
    return torch.autograd.grad(value, tokens, both, is_grads_batched=True)


ROWS["`torch.autograd.grad(is_grads_batched=True)`, `jacobian(vectorize=True)`"] = refused(
    "fast_forward has no backward of several gradients at once", several_at_once
)


def test_transforms_of_the_reference_are_right():
    """Per-sample gradients and Hessians against plain autograd."""
    function, tokens, x = of_tokens("reference")
    per_sample = TRANSFORMS["vmap(grad)"](function, tokens, x)
    for i, got in enumerate(per_sample):
        leaf = tokens.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(leaf, x[i : i + 1]), leaf)
        assert error(got, expected) < 1e-10
    leaf = tokens.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * tokens).sum(), leaf)
    assert abs(TRANSFORMS["hessian"](function, tokens, x) / (second * tokens).sum() - 1) < 1e-9


@row("`torch.func.functional_call` with other prompts or backbone weights")
def _(engine):
    model, x = model_and_images()
    named = dict(model.named_parameters())
    names = ["prompts.tokens", "backbone.blocks.1.mlp.fc1.weight", "backbone.norm.weight"]
    swapped = {n: 0.5 * named[n].detach() for n in names if n in named}
    assert len(swapped) >= 2
    return functional_call(model, swapped, (x,), {"engine": engine}), model(x, engine=engine)


def forward_mode(engine):
    model, x = model_and_images()
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x), engine=engine)).tangent + 0


ROWS["forward-mode derivatives (dual numbers)"] = refused(
    "inside forward-mode differentiation", forward_mode
)

# ---- contexts


@row("`torch.no_grad`, `torch.inference_mode`")
def _(engine):
    model, x = model_and_images("plain")
    with torch.no_grad():
        first = model(x, engine=engine)
    with torch.inference_mode():
        second = model(x, engine=engine)
    return (
        first,
        second.clone(),
        torch.autograd.grad(loss(model, x, engine), model.prompts.tokens)[0],
    )


@row("images or prompts made under `inference_mode`")
def _(engine):
    model, _ = model_and_images()
    with torch.inference_mode():
        x = tiny.images(model.backbone)
        tokens = 2 * model.prompts.tokens
    swapped = functional_call(model, {"prompts.tokens": tokens}, (x,), {"engine": engine})
    return swapped, torch.autograd.grad(loss(model, x, engine), model.prompts.tokens)[0]


def built_in_inference_mode(engine):
    with torch.inference_mode():
        model, x = model_and_images()
        return model(x, engine=engine)


ROWS["a backbone made under `inference_mode`"] = refused(
    r"blocks\.0\.norm1\.weight was made under torch\.inference_mode", built_in_inference_mode
)


@row("deterministic algorithms")
def _(engine):
    model, x = model_and_images()
    torch.use_deterministic_algorithms(True)
    try:
        return torch.autograd.grad(loss(model, x, engine), model.prompts.tokens)
    finally:
        torch.use_deterministic_algorithms(False)


@row("activation checkpointing of the backbone")
def _(engine):
    model, x = model_and_images()
    model.backbone.set_grad_checkpointing(True)
    return torch.autograd.grad(loss(model, x, engine), model.prompts.tokens)


@row("several threads, one model")
def _(engine):
    model, x = model_and_images()
    with ThreadPoolExecutor(4) as pool:
        return [f.result() for f in [pool.submit(model, x, engine) for _ in range(8)]]


def traced(engine):
    model, x = model_and_images()
    model.requires_grad_(False)
    module = torch.jit.trace(lambda images: model(images, engine=engine), x, check_trace=False)
    return module(tiny.images(model.backbone, 3, 5))


ROWS["`torch.jit.trace`"] = refused(r"inside torch\.jit\.trace", traced)


class Wrapped(nn.Module):
    def __init__(self, model, engine):
        super().__init__()
        self.model, self.engine = model, engine

    def forward(self, images):
        return self.model(images, engine=self.engine)


def exported(engine):
    model, x = model_and_images()
    program = torch.export.export(Wrapped(model.eval(), engine), (x,))
    return program.module()(tiny.images(model.backbone, 3, 5))


ROWS["`torch.export`"] = refused(r"inside torch\.export", exported)


@row("`torch.compile`")
def _(engine):
    model, x = model_and_images(depth=1)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: loss(model, x, engine), backend="eager")
    return torch.autograd.grad(compiled(x), model.prompts.tokens)


def in_one_graph(engine):
    model, x = model_and_images(depth=1)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: model(x, engine=engine), backend="eager", fullgraph=True)
    try:
        return compiled(x)
    except RuntimeError as error:
        # PyTorch's own lines around ours
        ours = re.search(r"pae folds[^\n]*", str(error))
        raise RuntimeError(ours[0] if ours else str(error)) from error


ROWS["`torch.compile(fullgraph=True)`"] = refused("leave out fullgraph=True", in_one_graph)


@row("`nn.DataParallel` on one device")
def _(engine):
    model, x = model_and_images()
    return nn.DataParallel(model)(x, engine=engine)


def test_replicas_of_data_parallel_are_refused():
    """On several devices: in both engines, as a replica's backbone is on the first of them."""
    model, x = model_and_images()
    replica = model._replicate_for_data_parallel()
    for engine in ("reference", "fast"):
        with pytest.raises(RuntimeError, match=r"replica of torch\.nn\.DataParallel.*use Distrib"):
            replica(x, engine=engine)


def sharded(engine, ignored=lambda model: None):
    """One process of FullyShardedDataParallel on a CPU."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, x = model_and_images()
        whole = FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            use_orig_params=True,
            ignored_states=ignored(model),
        )
        logits = whole(x, engine=engine)
        logits.sum().backward()
        return logits.detach().clone(), model.prompts.tokens.grad.clone()
    finally:
        dist.destroy_process_group()


ROWS["FullyShardedDataParallel over the backbone"] = refused(
    r"blocks\.0\.attn\.qkv\.weight requires a gradient", sharded
)
ROWS["FullyShardedDataParallel that leaves the backbone out"] = partial(
    sharded, ignored=lambda model: list(model.backbone.parameters())
)


@row("another default device or dtype")
def _(engine):
    model, x = model_and_images("plain")
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            return torch.autograd.grad(loss(model, x, engine), model.prompts.tokens)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- the model


@row("`copy.deepcopy`, pickle, `torch.save`")
def _(engine):
    model, x = model_and_images()
    model(x, engine=engine)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    file = io.BytesIO()
    torch.save(again, file)
    file.seek(0)
    return again(x, engine=engine), torch.load(file, weights_only=False)(x, engine=engine)


@row("another dtype or device (`model.to`)")
def _(engine):
    model, x = model_and_images()
    model(x, engine=engine)
    model.float()
    model(x.float(), engine=engine)
    return model.double()(x, engine=engine)


@row("parameters replaced, or written by an optimiser")
def _(engine):
    model, x = model_and_images()
    model(x, engine=engine)
    model.prompts.tokens = nn.Parameter(model.prompts.tokens.detach() * 2)
    torch.optim.SGD(model.prompts.parameters(), 0.1)
    with torch.no_grad():
        model.backbone.blocks[0].mlp.fc1.weight.mul_(1.5)
        model.backbone.blocks[1].attn.qkv.weight.mul_(0.5)
    return torch.autograd.grad(loss(model, x, engine), model.prompts.tokens)


@row("attributes of blocks changed (eps, heads, scale, activation, LayerScale)")
def _(engine):
    model, x = model_and_images("layer_scale")
    before = model(x, engine=engine)
    blocks = model.backbone.blocks
    blocks[0].norm1.eps, blocks[1].mlp.act = 0.3, nn.SiLU()
    blocks[2].attn.num_heads, blocks[2].attn.head_dim = 2, 16
    with torch.no_grad():
        blocks[1].ls1.gamma.mul_(2)
    after = model(x, engine=engine)
    assert error(after, before) > 1e-3
    return after


@row("gradients of hooks on prompts' tensors, stem, norm and head")
def _(engine):
    model, x = model_and_images("plain")
    model.prompts.tokens.register_hook(lambda g: 2 * g)
    model.backbone.patch_embed.register_forward_hook(lambda _, args, out: 1.1 * out)
    model.head.register_forward_pre_hook(lambda _, args: (args[0] + 0.5,))
    return torch.autograd.grad(loss(model, x, engine), model.prompts.tokens)


@row("a hook on the final norm that reads or mixes all rows")
def _(engine):
    model, x = model_and_images("plain")
    model(x, engine=engine)
    seen = []
    model.backbone.norm.register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    model.backbone.norm.register_forward_pre_hook(
        lambda _, args: (args[0] - args[0].mean(1, True),)
    )
    return [model(x, engine=engine), *seen]


@row("a readout that reads more than the class row, whatever its name")
def _(engine):
    model, x = model_and_images("plain")
    model(x, engine=engine)
    model.backbone.forward_head = lambda x, pre_logits=False: x.mean(1)
    return torch.autograd.grad(loss(model, x, engine), model.prompts.tokens)


@row("dropout in the stem (`pos_drop`, `patch_drop`), switched on")
def _(engine):
    model, x = model_and_images("dropout")
    model.backbone.pos_drop.train()
    model.backbone.patch_drop.train()
    return torch.autograd.grad(loss(model, x, engine), model.prompts.tokens)


def dropping(part):
    def check(engine):
        model, x = model_and_images("dropout")
        model(x, engine=engine)
        part(model.backbone).train()
        return model(x, engine=engine)

    return refused("is in training mode and has dropout", check)


ROWS["dropout or drop-path in blocks, switched on"] = dropping(lambda vit: vit)
ROWS["the same in one part of one block"] = dropping(lambda vit: vit.blocks[2].drop_path1)


def changed(reason, change):
    def check(engine):
        model, x = model_and_images("plain")
        model(x, engine=engine)
        change(model.backbone.blocks)
        return model(x, engine=engine)

    return refused(reason, check)


def hooked(blocks):
    blocks[1].mlp.register_forward_hook(lambda _, args, out: 1.5 * out)


def replaced(blocks):
    forward = blocks[1].forward
    blocks[1].forward = lambda x: 1.1 * forward(x)


def of_another_class(blocks):
    kind = type(blocks[0])
    blocks[0].__class__ = type(
        "Near", (kind,), {"forward": lambda self, x: kind.forward(self, x) + 1e-4 * x}
    )


def fewer(engine):
    model, x = model_and_images()
    model(x, engine=engine)
    model.backbone.blocks = model.backbone.blocks[:2]
    return model(x, engine=engine)


ROWS["fewer blocks than the prompts were made for"] = refused(
    r"the backbone has 2 blocks, and the prompts were made for 3", fewer
)
ROWS["hooks on a block or a part of it"] = changed(r"blocks\.1\.mlp has a forward hook", hooked)
ROWS["a replaced forward"] = changed(r"blocks\.1 has a replaced forward", replaced)
ROWS["a block that computes something else"] = changed(
    r"blocks\.0 \(Near\) computes something else", of_another_class
)


def up_to(limit):
    """A block as timm's up to `limit` rows; windows, masks and biases come in with length."""

    def change(blocks):
        kind = type(blocks[2])

        def forward(self, x):
            x = kind.forward(self, x)
            return x if x.shape[1] <= limit else x.roll(1, 1)

        blocks[2].__class__ = type("Windowed", (kind,), {"forward": forward})

    return change


ROWS["a block that computes something else at the real length"] = changed(
    r"blocks\.2 \(Windowed\) computes something else .* on 20 random rows", up_to(17)
)
ROWS["tensors that are no plain ones (sharded, quantised)"] = changed(
    r"blocks\.0\.norm1\.weight is a Strange",
    lambda blocks: setattr(blocks[0].norm1, "weight", as_strange(blocks[0].norm1.weight)),
)


class Strange(nn.Parameter):
    """A tensor of a kind of its own."""


def as_strange(weight):
    return Strange(weight.detach().clone(), requires_grad=False)


# ---- what the proof of blocks sees


@pytest.mark.parametrize("prompts", [3, 7])
def test_blocks_are_proved_at_the_length_of_image_and_prompts(prompts):
    """17 rows and the prompts: one row more than what is the same is refused."""
    for limit in (17 + prompts, 16 + prompts):
        model = prompted("plain", prompts)
        up_to(limit)(model.backbone.blocks)
        x = tiny.images(model.backbone)
        if limit == 17 + prompts:
            assert_engines_agree(model, x)
        else:
            with pytest.raises(pae.UnsupportedBackbone, match=f"on {17 + prompts} random rows"):
                pae.fast_forward(model, x)


def test_another_image_size_is_proved_again():
    model = prompted("dynamic_size", 2)
    up_to(20)(model.backbone.blocks)
    pae.fast_forward(model, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    wide = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    with pytest.raises(pae.UnsupportedBackbone, match="on 27 random rows"):
        pae.fast_forward(model, wide)
    model(wide)


def test_nothing_is_proved_twice(monkeypatch):
    model, x = model_and_images()
    pae.fast_forward(model, x)
    monkeypatch.setattr(
        pae.backbones.BackboneView, "prove_lengths", lambda *_: pytest.fail("proved again")
    )
    for training in (True, False):
        pae.fast_forward(model.train(training), x).sum().backward()


def test_a_block_that_mixes_images_is_refused_at_once():
    """Attention over the batch, the usual slip of `batch_first`."""
    vit = tiny.backbone()
    kind = type(vit.blocks[1])
    mixing = {"forward": lambda self, x: kind.forward(self, x) if len(x) < 2 else x.flip(0)}
    vit.blocks[1].__class__ = type("Mixing", (kind,), mixing)
    modes = [m.training for m in vit.modules()]
    with pytest.raises(pae.UnsupportedBackbone, match=r"blocks\.1 mixes the images of a batch"):
        pae.PromptedViT(vit, pae.prompts.VPTDeep(2))
    assert [m.training for m in vit.modules()] == modes


# ---- inputs

INPUTS = {
    "another dtype": (lambda x: x.float(), r"images must be torch\.float64 \(backbone\), got"),
    "whole numbers": (lambda x: x.byte(), r"images must be a float tensor \(B, C, H, W\), got"),
    "another size": (lambda x: x[..., :8], r"images must be \(16, 16\) pixels high and wide"),
    "one image": (lambda x: x[0], r"images must be a float tensor \(B, C, H, W\)"),
    "other channels": (lambda x: x[:, :1], "images must have 3 channels, got 1"),
    "not finite": (lambda x: x / 0, "images holds NaN or infinity in 3 of 3 images"),
}


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("case", INPUTS)
def test_images_that_do_not_fit(case, engine):
    change, message = INPUTS[case]
    model, x = model_and_images()
    with pytest.raises(ValueError, match=message):
        model(change(x), engine=engine)


def test_prompts_written_between_forward_and_backward_are_noticed():
    """By PyTorch's own counter of versions, where the backward reads them."""
    model, x = model_and_images("plain")
    value = F.cross_entropy(pae.fast_forward(model, x), torch.tensor([0, 1, 2]))
    with torch.no_grad():
        model.prompts.tokens.add_(1)
    with pytest.raises(RuntimeError, match=r"modified (by an )?in-?place"):
        value.backward()


def test_a_backbone_written_between_forward_and_backward_changes_nothing():
    """The gradient is that of the forward that was computed; the reference refuses it."""
    model, x = model_and_images("plain")
    (expected,) = torch.autograd.grad(loss(model, x, "fast"), model.prompts.tokens)
    value = loss(model, x, "fast")
    with torch.no_grad():
        model.backbone.blocks[1].mlp.fc1.weight.add_(1)
    (got,) = torch.autograd.grad(value, model.prompts.tokens)
    assert torch.equal(got, expected)
