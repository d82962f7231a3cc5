"""NSP2: what is summed over a task, where the null space begins, how updates are projected."""

import copy

import pytest
import torch

import pae
from pae.methods import nsp2
from pae.methods.nsp2 import NullSpace
from tests import tiny
from tests.tiny import error, prompted


def prepared(eta=0.97, official=False, feature="plain", count=4):
    model = prompted(feature, count)
    space = NullSpace(model, eta, official)
    return model, space, tiny.images(model.backbone, batch=4)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("feature, prefix", [("plain", 1), ("registers", 3), ("layer_scale", 1)])
def test_sums_by_hand(feature, prefix, official):
    model, space, x = prepared(feature=feature, official=official)
    space.observe([x[:3], (x[3:], torch.tensor([1]))])
    inputs = []
    hooks = [
        b.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for b in model.backbone.blocks
    ]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    for i, (block, z) in enumerate(zip(model.backbone.blocks, inputs)):
        q, k, _ = block.attn.qkv(block.norm1(z)).unflatten(-1, (3, 4, 8)).unbind(2)
        prompts = list(range(prefix, prefix + 4))
        rows = [r for r in range(z.shape[1]) if r not in prompts]
        w_k = block.attn.qkv.weight[32:64].view(4, 8, 32)
        if not official:
            w_k = w_k * block.norm1.weight
        c1, c2 = torch.zeros(32, 32).double(), torch.zeros(4, 4).double()
        for h in range(4):
            attention = (q[:, :, h] @ k[:, :, h].mT * 8**-0.5).softmax(-1)
            for b in range(4):
                seen = q[b, rows, h] @ w_k[h]
                c1 += seen.T @ seen
                mass = attention[b][rows][:, prompts]
                c2 += mass.T @ mass
        share = 4 * 4 * len(rows)
        assert error(space.C1[i], c1 / share) < 1e-9
        assert error(space.C2[i], c2 / share) < 1e-9
    assert model.training is False


def test_batches_count_each_as_released():
    model, images, x = prepared()
    batches = NullSpace(model, accumulate="batches")
    images.observe([x[:1]]), images.observe([x[1:]])  # a task each
    batches.observe([x[:1], x[1:]])
    for name in ("C1", "C2"):
        assert error(getattr(batches, name), getattr(images, name)) < 1e-12
    together = NullSpace(model)
    together.observe([x])
    assert error(batches.C1, together.C1) > 0.1


def test_blocks_without_prompts_are_left_out():
    """The published CLIP variant prompts the first blocks alone."""
    model = prompted("plain", [4, 4, 0])
    space, x = NullSpace(model, 1.0), tiny.images(model.backbone, batch=4)
    whole = prompted("plain", 4)
    with torch.no_grad():
        whole.prompts.tokens[:2].copy_(model.prompts.tokens.view(2, 4, -1))
    other = NullSpace(whole, 1.0)
    space.observe([x]), other.observe([x])
    assert space.C1.shape == (2, 32, 32) and space.C2.shape == (2, 4, 4)
    assert error(space.C1, other.C1[:2]) < 1e-12 and error(space.C2, other.C2[:2]) < 1e-12
    optimizer = space.project(torch.optim.SGD([model.prompts.tokens], lr=0.1))
    before = model.prompts.tokens.detach().clone()
    pae.fast_forward(model, x).sum().backward()
    (pi1, pi2), gradient = space.projections(), model.prompts.tokens.grad.view(2, 4, -1)
    optimizer.step()
    moved = (model.prompts.tokens.detach() - before).view(2, 4, -1)
    assert error(moved, -0.1 * (pi2 @ gradient @ pi1)) < 1e-9


def test_tasks_add_up():
    _, space, x = prepared()
    space.observe([x])
    once = space.C1.clone()
    space.observe([x])
    assert error(space.C1, 2 * once) < 1e-12 and space.tasks == 2


@pytest.mark.parametrize("size", [32, 200])
@pytest.mark.parametrize("rank", [5, 11, 20])
def test_rank_is_where_the_values_bend(size, rank):
    """A plateau, a cliff, a floor; smoothing of long curves moves the edge by its width."""
    values = torch.cat([torch.linspace(2, 1.5, rank), torch.linspace(1e-3, 0, size - rank)])
    got = nsp2._rank(values.double())
    assert abs(got - rank) <= (0 if size < nsp2.SMOOTHED_FROM else 15)


def test_zeros_that_are_equal_are_all_zero():
    values = torch.cat([torch.tensor([3.0, 2.9, 2.8, 2.7, 2.6]), torch.zeros(27)]).double()
    assert nsp2._rank(values) == nsp2._rank(values + 1e-18) == 5


def test_released_ranks(golden):
    """Sizes of the null space for spectra of many lengths; see tests/golden/README.md."""
    arrays = golden("nsp2")
    names = [k.removeprefix("spectrum/") for k in arrays if k.startswith("spectrum/")]
    assert len(names) == 60
    for name in names:
        values = torch.from_numpy(arrays[f"spectrum/{name}"]).double()  # as C1 and C2 are kept
        assert len(values) - nsp2._rank(values) == arrays[f"null_size/{name}"][1], name


@pytest.mark.parametrize("values, rank", [([1.0], 1), ([1.0, 1e-20], 1), ([0.0, 0.0], 0)])
def test_rank_of_very_few_values(values, rank):
    assert nsp2._rank(torch.tensor(values).double()) == rank


def with_null_space(eta, official, rank=5):
    """C1 and C2 of known null spaces."""
    model, space, _ = prepared(eta, official, count=12)
    torch.manual_seed(4)
    spans = []
    for C in (space.C1, space.C2):
        basis = torch.linalg.qr(torch.randn(C.shape, dtype=torch.float64)).Q
        C.copy_(basis[..., :rank] @ basis[..., :rank].mT)
        spans.append((basis[..., :rank], basis[..., rank:]))
    space.tasks.fill_(1)
    return model, space, spans


def test_projection_keeps_the_null_space_and_kills_the_rest():
    _, space, spans = with_null_space(1.0, False)
    for projection, (used, null) in zip(space.projections(), spans):
        assert error(projection @ null, null) < 1e-9
        assert (projection @ used).norm() < 1e-9
    _, space, spans = with_null_space(0.9, False)
    for projection, (used, null) in zip(space.projections(), spans):
        assert error(projection @ null, null) < 1e-9
        assert error(projection @ used, 0.1 * used) < 1e-9


def test_official_projection_shrinks_the_null_space_too():
    _, space, spans = with_null_space(0.97, True)
    for projection, (used, null) in zip(space.projections(), spans):
        assert error(projection @ null, (0.97 / null.shape[-1] ** 0.5 + 0.03) * null) < 1e-9
        assert error(projection @ used, 0.03 * used) < 1e-9


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.1, weight_decay=5e-5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_moves_by_the_projected_update(name):
    model, space, _ = with_null_space(0.9, False)
    twin = copy.deepcopy(model)
    x = tiny.images(model.backbone)
    ours = space.project(OPTIMIZERS[name]([model.prompts.tokens, model.head.weight]))
    plain = OPTIMIZERS[name]([twin.prompts.tokens, twin.head.weight])
    pi1, pi2 = space.projections()
    for _ in range(3):
        with torch.no_grad():  # the same start of every step; optimiser states move alike
            twin.prompts.tokens.copy_(model.prompts.tokens)
        before = model.prompts.tokens.detach().clone()
        for m, optimizer in ((model, ours), (twin, plain)):
            optimizer.zero_grad()
            pae.fast_forward(m, x).square().sum().backward()
            optimizer.step()
        expected = pi2 @ (twin.prompts.tokens.detach() - before) @ pi1
        assert error(model.prompts.tokens.detach() - before, expected) < 1e-9
        assert torch.equal(model.head.weight, twin.head.weight)


def test_the_first_task_trains_freely():
    model, space, x = prepared(1.0)
    twin = copy.deepcopy(model)
    ours = space.project(torch.optim.SGD([model.prompts.tokens], lr=0.1))
    plain = torch.optim.SGD([twin.prompts.tokens], lr=0.1)
    for m, optimizer in ((model, ours), (twin, plain)):
        pae.fast_forward(m, x).sum().backward()
        optimizer.step()
    assert error(model.prompts.tokens, twin.prompts.tokens) < 1e-12
    assert space.penalty() == 0


def test_old_attention_stays_where_the_null_space_is_exact():
    """With few rows and few heads C1 has a true null space: logits of the old images barely move
    although the prompts do, next to a free step of the same length.
    """
    model, space, x = prepared(1.0, feature="one_block", count=8)
    with torch.no_grad():  # queries see five directions: the null space has 27
        w = model.backbone.blocks[0].attn.qkv
        basis = torch.linalg.qr(torch.randn(32, 5, dtype=torch.float64)).Q
        w.weight[32:64] = w.weight[32:64] @ basis @ basis.T / model.backbone.blocks[0].norm1.weight
    model.drop_plans()
    space.observe([x])
    pi1, _ = space.projections()
    assert abs(pi1[0].diagonal().sum() - 27) < 1e-6
    seen = space.C1[0]
    free = torch.randn(8, 32, dtype=torch.float64)
    moved = free @ pi1[0]
    assert (moved @ seen).norm() < 1e-9 * (free @ seen).norm()
    assert moved.norm() > 0.5 * free.norm()


def test_penalty_is_the_drift_of_means_and_deviations():
    model, space, x = prepared()
    space.observe([x])
    assert space.penalty() == 0
    with torch.no_grad():
        model.prompts.tokens.mul_(2).add_(1)
    tokens = model.prompts.tokens
    old = (tokens.detach() - 1) / 2
    expected = 0
    for now, before in zip(tokens, old):  # a sum over blocks, as released
        expected = expected + (now.mean(-1) - before.mean(-1)).abs().mean()
        change = now.std(-1, correction=0) - before.std(-1, correction=0)
        expected = expected + change.abs().mean()
    assert error(space.penalty(), expected) < 1e-9
    space.penalty().backward()
    assert model.prompts.tokens.grad.norm() > 0


def test_a_sequence_of_tasks_is_resumed():
    model, space, x = prepared()
    space.observe([x])
    state = copy.deepcopy(space.state_dict())
    assert set(state) == {"C1", "C2", "tasks", "means", "deviations"}
    again = NullSpace(model)
    again.load_state_dict(state)
    for a, b in zip(again.projections(), space.projections()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "model, kind, message",
    [
        (lambda: prompted("qk_norm", 4), ValueError, "normalised per head"),
        (lambda: prompted("plain", [1, 2, 3]), ValueError, "one count of at least 1"),
        (lambda: prompted("plain", 0), ValueError, "one count of at least 1"),
        (lambda: prompted("plain", pae.prompts.VPTShallow(2)), ValueError, "must be VPTDeep"),
        (lambda: tiny.backbone(), TypeError, "model must be a PromptedViT"),
    ],
)
def test_models_that_do_not_fit(model, kind, message):
    with pytest.raises(kind, match=message):
        NullSpace(model())


def test_bad_arguments():
    model, space, _ = prepared()
    with pytest.raises(ValueError, match="eta must be a number"):
        NullSpace(model, 1.5)
    with pytest.raises(ValueError, match=r"or two of them, got \(0.9, 2\)"):
        NullSpace(model, (0.9, 2))
    with pytest.raises(ValueError, match="accumulate must be one of"):
        NullSpace(model, accumulate="tasks")
    with pytest.raises(ValueError, match="at least one image"):
        space.observe([])
    with pytest.raises(ValueError, match="optimizer must hold"):
        space.project(torch.optim.SGD([model.head.weight], lr=0.1))
