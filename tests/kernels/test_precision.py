"""fp32 products stay fp32 where that was chosen, whatever the process allows elsewhere.

No GPU rounds to TF32 here, so what is asked is what the flags say while a product is made.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pae
import pae_kernels
from pae.methods.nsp2 import NullSpace
from pae.mpa.forward import _Steps
from pae.plan import TrainedVector
from pae.prompts.da_vpt import cosine_kmeans
from pae_kernels import precision
from pae_kernels.attention.reference import sum_groups
from pae_kernels.precision import exact_matmul, exact_products
from tests import tiny

PRODUCTS = {
    torch: ("bmm", "matmul", "mm", "baddbmm", "addmm", "einsum"),
    torch.Tensor: ("__matmul__", "matmul", "mm", "bmm", "baddbmm_", "addmm_"),
    F: ("linear",),
}
STATES = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "cuda": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


def flags() -> tuple:
    """All that PyTorch says about fp32 products; what it refuses to say, in its place."""
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "mixed"
    names = [("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "matmul")]
    return legacy, *(torch._C._get_fp32_precision_getter(*name) for name in names)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for name in ("cuda", "mkldnn"):
        torch._C._set_fp32_precision_setter(name, "matmul", "none")


@pytest.fixture
def products(monkeypatch) -> list[tuple[bool, str]]:
    """(whether factors might be rounded, where) of every product of fp32 factors that follows."""
    made: list[tuple[bool, str]] = []

    def watched(function):
        def product(*given, **named):
            tensors = [t for t in given if isinstance(t, torch.Tensor)]
            wide = tensors and all(t.dtype == torch.float32 for t in tensors)
            if wide and not torch.is_autocast_enabled("cpu"):  # which makes bf16 of them
                caller = sys._getframe(1)
                where = f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"
                made.append((precision.reduced(), where))
            return function(*given, **named)

        return product

    for home, names in PRODUCTS.items():
        for name in names:
            monkeypatch.setattr(home, name, watched(getattr(home, name)))
    return made


@pytest.mark.parametrize("state", STATES)
def test_flags_are_set_and_restored(state):
    assert not precision.reduced()
    STATES[state]()
    before = flags()
    assert precision.reduced()
    with exact_products:
        assert not precision.reduced()
        with exact_products:
            assert not precision.reduced()
        assert not precision.reduced()
    assert flags() == before
    with pytest.raises(ZeroDivisionError), exact_products:
        raise ZeroDivisionError
    assert flags() == before


def test_what_the_flags_inherit_is_inherited_again():
    torch.backends.fp32_precision = "tf32"
    with exact_products:
        pass
    torch.backends.fp32_precision = "ieee"
    assert not precision.reduced()


def test_threads_share_the_flags():
    """The one that leaves first does not restore them under the other."""
    torch.set_float32_matmul_precision("high")
    inside, leave = threading.Event(), threading.Event()

    def other():
        with exact_products:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with exact_products:
        thread.start()
        inside.wait()
    assert not precision.reduced()
    leave.set()
    thread.join()
    assert precision.reduced() and torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("group", [None, torch.tensor([0, 1, 0])])
def test_a_step_in_16_bits(products, monkeypatch, group):
    """What a bf16 step computes in fp32: attention, sums over groups, the last block, KLD."""
    monkeypatch.setenv("PAE_BACKEND", "reference")
    vit = tiny.backbone(dtype=torch.float32)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(num_tokens=3), kld=pae.KLD(dim=4)).train()
    images = tiny.images(vit)
    model.plan(torch.bfloat16)
    products.clear()
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16):
        loss = pae.fast_forward(model, images).float().square().sum()
    (loss + model.penalty()).backward()
    qkv, kv = torch.randn(3, 5, 3, 2, 4), torch.randn(2 if group is not None else 1, 3, 2, 2, 4)
    qkv, kv = (t.bfloat16().requires_grad_() for t in (qkv, kv))
    for queries in ("all", "class"):
        out, lse = pae_kernels.prompt_attention(qkv, kv, group, queries=queries)
        torch.autograd.grad(out.float().sum(), (qkv, kv))
    pae_kernels.class_attention(qkv, kv, lse, group)
    sum_groups(torch.randn(3, 2), torch.tensor([0, 1, 0]), 2)
    assert len(products) > 40
    assert not [where for rounded, where in products if rounded]
    assert torch.get_float32_matmul_precision() == "high"


def proof():
    """A backbone is read, and its blocks are proved to be what was read."""
    vit = tiny.backbone(dtype=torch.float32)
    return lambda: pae.PromptedViT(vit, pae.prompts.VPTDeep(2)).plan()


def anchors():
    """DA-VPT's loss of two images, and its gradients."""
    family = pae.prompts.DAVPT(num_tokens=3, num_proxies=3, num_classes=5)
    features, proxies = (torch.randn(n, 4, requires_grad=True) for n in (2, 3))
    return lambda: family._proxy_anchor(features, proxies, torch.tensor([2, 0])).backward()


def centroids():
    return lambda: cosine_kmeans(torch.randn(9, 4), torch.randn(3, 4))


def null_space():
    model = tiny.prompted(dtype=torch.float32)
    return lambda: NullSpace(model).observe([tiny.images(model.backbone)])


def whitening():
    model = tiny.prompted(prompts=pae.prompts.BPTDeep(num_tokens=3, rank=2), dtype=torch.float32)
    return lambda: pae.whiten_init(model, tiny.images(model.backbone))


def prompt_key():
    """What a window of MPA's search, which is one prompt many times, takes of the attention."""
    model = tiny.prompted(dtype=torch.float32)
    block = model.plan().blocks[0]
    steps = _Steps(block, torch.zeros(1, 1, dtype=torch.float64))
    rows = torch.randn(2, 5, block.w_qkv.shape[1])
    qkv = torch.randn(2, 5, 3, block.num_heads, block.head_width)
    return lambda: steps.attention(rows, qkv, steps.keys, False, None)


def trained_vector():
    weight, shift = torch.randn(3, 2), torch.randn(2, requires_grad=True)
    vector = TrainedVector(0, "", torch.zeros(3), torch.zeros(3), None, weight, shift)
    return lambda: vector.varying().sum().backward()


@pytest.mark.parametrize(
    "work", [proof, anchors, centroids, null_space, whitening, prompt_key, trained_vector]
)
def test_once_and_losses(products, work):
    """What is no layer of a model, in whatever way a user asks for rounded layers."""
    run = work()
    for state in ("high", "allow_tf32", "mkldnn"):
        STATES[state]()
        products.clear()
        run()
        assert len(products) > (work in (anchors, trained_vector, proof))  # with their gradients
        assert not [where for rounded, where in products if rounded]
        assert precision.reduced()
        run = work()


def test_gradients_are_exact_products(products):
    """Of matrices and of batches that broadcast, of one factor or both, and once more."""
    torch.set_float32_matmul_precision("high")
    for sizes in (((3, 2), (2, 4)), ((5, 1, 3, 2), (6, 2, 4)), ((2, 3, 2), (2, 4))):
        wide = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
        assert torch.autograd.gradcheck(exact_matmul, wide)
        assert torch.autograd.gradgradcheck(exact_matmul, wide)
        a, b = (t.detach().float().requires_grad_() for t in wide)
        products.clear()
        exact_matmul(a, b).sum().backward()
        exact_matmul(a.detach(), b).sum().backward()
        assert [rounded for rounded, _ in products] == [False] * 5
        twice = torch.autograd.grad((a @ b).sum(), b)[0]
        torch.testing.assert_close(b.grad, 2 * twice)


def test_values_are_those_of_exact_factors():
    """Where a processor rounds factors to bf16 when it may, which shows; elsewhere nothing does."""
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(i)) for i in range(2))
    exact, d = a @ b, torch.ones(256, 256)
    STATES["mkldnn"]()
    a.requires_grad_()
    made = exact_matmul(a, b)
    (d_a,) = torch.autograd.grad(made, a, d)
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    assert torch.equal(made, exact)
    assert torch.equal(d_a, d @ b.mT)


def test_products_elsewhere_follow_the_flags(products):
    """The fixture sees what it should, and a model's own products remain the user's choice."""
    torch.set_float32_matmul_precision("high")
    a = torch.randn(2, 2)
    a @ a
    exact_matmul(a, a)
    assert [rounded for rounded, _ in products] == [True, False]


def test_a_compiled_product_is_an_op():
    a, b = torch.randn(3, 2, 4), torch.randn(3, 4, 5)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    assert torch.equal(torch.compile(exact_matmul, backend=keep, fullgraph=True)(a, b), a @ b)
    assert torch.ops.pae.exact_matmul in [node.target for node in graphs[0].graph.nodes]
    a.requires_grad_()
    torch.library.opcheck(torch.ops.pae.exact_matmul.default, (a, b[:1]))  # its gradient too


def test_ops_run_inside():
    """The one place where every op of the library is made."""
    source = Path(pae_kernels.__file__).with_name("registration.py").read_text()
    assert source.count("with exact_products ") == 1
