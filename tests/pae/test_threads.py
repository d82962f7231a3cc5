"""One model serves several threads, in either engine."""

import copy
import pickle
import threading

import pytest
import torch
from timm.models.eva import Eva

import pae
from pae.prompts import METHODS
from tests import tiny
from tests.tiny import prompted

THREADS, ROUNDS = 4, 5
ROTATING = {
    **{**tiny.SIZES, "depth": 1},
    **{"use_rot_pos_emb": True, "use_abs_pos_emb": False, "dynamic_img_size": True},
}


def in_threads(work):
    """`work(thread, round)` in every thread, all at once; the first error is raised here."""
    start, errors = threading.Barrier(THREADS), []

    def run(thread):
        start.wait()
        try:
            for turn in range(ROUNDS):
                work(thread, turn)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(t,)) for t in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def without_dropout(method):
    made = tiny.small(METHODS[method])
    for name in ("dropout", "channel_dropout", "hidden_dropout", "kv_dropout"):
        if hasattr(made, name):
            setattr(made, name, 0.0)
    model = prompted("plain", made)
    if any(name.startswith("cell") for name, _ in made.named_parameters()):
        with torch.no_grad():  # large enough for the states to matter
            for parameter in made.cell.parameters():
                parameter.mul_(2)
    return model


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("method", METHODS)
def test_threads_share_a_model_in_evaluation(method, engine):
    model = without_dropout(method).eval()
    images = [tiny.images(model.backbone, batch=1 + t % 2, seed=t) for t in range(THREADS)]
    with torch.no_grad():
        expected = [model(x, engine=engine) for x in images]

    def work(thread, _):
        with torch.no_grad():
            assert torch.equal(model(images[thread], engine=engine), expected[thread])

    in_threads(work)


@pytest.mark.parametrize("method", METHODS)
def test_threads_share_a_model_in_training(method):
    """Loss, penalty and gradients of every thread are those of its own images and labels."""
    made = without_dropout(method)
    counts = made.prompts.prompt_counts
    if len(set(counts)) == 1 and counts[0] and not made.prompts.moves_prompts:
        made = pae.PromptedViT(tiny.backbone(), unbound(made.prompts), pae.KLD(dim=6)).train()
    images = [tiny.images(made.backbone, batch=2 + t % 2, seed=t) for t in range(THREADS)]
    wanted = [p for p in made.parameters() if p.requires_grad]

    def step(thread, pause=lambda: None):
        x = images[thread]
        made.prompts.see_labels(torch.arange(len(x)) + thread % 2)
        logits = made(x, engine="fast")
        pause()
        loss = logits.square().mean() + made.penalty()
        return [loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True)]

    expected = [step(t) for t in range(THREADS)]
    together = threading.Barrier(THREADS)

    def work(thread, _):
        for got, want in zip(step(thread, lambda: together.wait(60)), expected[thread]):
            assert (got is None) == (want is None)
            assert got is None or torch.equal(got, want)

    in_threads(work)


def unbound(made):
    """Another family of the same configuration, for another model."""
    again = type(made)(**made.config())
    for name in ("channel_dropout", "hidden_dropout", "kv_dropout"):
        if hasattr(again, name):
            setattr(again, name, 0.0)
    return again


@pytest.mark.parametrize("method", METHODS)
def test_a_family_keeps_nothing_of_a_forward(method):
    """No attribute holds what a forward made: neither a tensor with a graph, nor a new one."""
    model = without_dropout(method)
    before = state_of(model.prompts)
    x = tiny.images(model.backbone)
    model.prompts.see_labels(torch.arange(len(x)))
    (model(x, engine="fast").sum() + model.penalty()).backward()
    assert state_of(model.prompts) == before
    twin = pickle.loads(pickle.dumps(model.prompts))
    assert not twin.this_forward and not copy.deepcopy(model.prompts).this_forward


def state_of(made):
    """Identities of all tensors within a family's plain attributes."""

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield id(value)
        elif isinstance(value, dict):
            for v in value.values():
                yield from tensors(v)
        elif isinstance(value, (list, tuple)):
            for v in value:
                yield from tensors(v)

    return sorted(i for module in made.modules() for i in tensors(vars(module)))


@pytest.mark.parametrize("method", ["lspt", "vapt", "da-vpt"])
def test_a_thread_of_its_own_runs_a_compiled_model(method):
    """What a forward leaves reaches the penalty, although another thread compiled the model."""
    model = without_dropout(method)
    first, second = (tiny.images(model.backbone, seed=s) for s in (0, 5))

    def step(run, x):
        model.prompts.see_labels(torch.arange(len(x)))
        return [run(x, engine="fast").detach(), model.penalty().detach()]

    expected = step(model, second)
    compiled = torch.compile(model, backend="aot_eager")
    step(compiled, first)
    got = []
    thread = threading.Thread(target=lambda: got.extend(step(compiled, second)))
    thread.start()
    thread.join()
    for value, wanted in zip(got, expected, strict=True):
        assert (value - wanted).abs().max() <= 1e-9


def raced(owner, name, others):
    """`owner` whose attribute is what another thread put there, right behind every write."""
    other = property(lambda self: others, lambda self, value: None)
    vars(owner).pop(name, None)
    owner.__class__ = type(type(owner).__name__, (type(owner),), {name: other})


def test_what_is_remembered_may_be_overwritten_at_any_time():
    """Between a thread's writing and its reading stands another's."""
    model = tiny.over(tiny.filled(Eva(**ROTATING)).eval())
    sizes = (8, 16), (16, 8)
    own, other = ([g.rotation for g in model.view.geometry(size)] for size in sizes)
    assert not torch.equal(own[0], other[0])
    plans = [model.plan(size=size) for size in sizes]
    raced(model.view, "_known", (None, model.view.geometry(sizes[1]), []))
    assert torch.equal(model.view.geometry(sizes[0])[0].rotation, own[0])
    raced(model._plans, "_placed", (None, None, plans[1]))
    assert torch.equal(model.plan(size=sizes[0]).blocks[0].rotation, plans[0].blocks[0].rotation)

    masked = pae.prompts.E2VPT(4, masks="fixed", pruned="remove", pieces=4)
    prompted("plain", masked)
    raced(masked, "_known_kept", (None, torch.tensor([7]), masked.token_mask))
    assert masked._kept().tolist() == [0, 1, 2, 3]

    served = pae.serve_many([prompted("plain", 2)])
    raced(served, "_known", (None, "another thread's"))
    assert served._of(served.first.plan())[0] != "another thread's"
