"""PRO-VPT: scores, moves and what they leave alone, the policies, epochs, checkpoints."""

import copy
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import pae
from pae.prompts import ProVPT, VPTDeep, pro_vpt
from pae.prompts.relocation import PPOPolicy, ThompsonPolicy
from tests import tiny

COUNTS = [3, 0, 2]


def made(prompts=None, dtype=torch.float64, **options):
    return tiny.prompted("plain", prompts or ProVPT(COUNTS, **options), dtype)


def batches(model, sizes=(4, 4, 3)):
    """Fixed (images, labels) of those sizes."""
    out = []
    for i, size in enumerate(sizes):
        x = tiny.images(model.backbone, size, seed=i)
        out.append((x, torch.arange(size) % 5))
    return out


def losses_of(model, data, engine="fast"):
    def losses():
        for x, y in data:
            yield F.cross_entropy(model(x, engine=engine), y), len(y)

    return losses


def trained(model, data, epochs, optimizer, done=0, last=None):
    """A plain training loop with the family's hooks: `done` steps of the first epoch lie behind,
    the last epoch stops after `last`.
    """
    for epoch in range(epochs):
        first = done if epoch == 0 else 0
        if first == 0:
            model.prompts.start_of_epoch(
                losses_of(model, data), list(model.head.parameters()), model.last_loss
            )
        for x, y in data[first : last if epoch == epochs - 1 else None]:
            loss = F.cross_entropy(model(x, engine="fast"), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.prompts.end_of_step()
            model.last_loss = loss.item()


def sgd(model):
    model.last_loss = None
    return torch.optim.SGD(model.parameter_groups(0.2, 0.01), momentum=0.9)


def decided(model, scores, loss):
    """One decision from given scores."""
    model.prompts._decide(torch.tensor(scores, dtype=torch.float64), loss)
    return model.prompts.last_move


# ---- moves


def test_the_table_is_a_list_of_lists():
    """Against the literal definition: each block owns an ordered list of prompts."""
    model = made()
    family = model.prompts
    bank = family.tokens
    lists = [[bank[k].clone() for k in ks] for ks in ([0, 1, 2], [], [3, 4])]
    where = {0: 0, 1: 0, 2: 0, 3: 2, 4: 2}
    places = bank.data_ptr(), family.table.data_ptr()
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(25):
        row = int(torch.randint(5, (), generator=generator))
        target = int(torch.randint(3, (), generator=generator))
        old = bank[row].clone()
        family.move(row, target)
        source, where[row] = where[row], target
        if source != target:
            at = next(i for i, p in enumerate(lists[source]) if torch.equal(p, old))
            lists[target].append(lists[source].pop(at) * 1e-3)
            with torch.no_grad():  # grow again, or 25 moves would leave nothing to compare
                bank[row] *= 1e3
                lists[target][-1] = bank[row].clone()
        assert sum(family.prompt_counts) == 5
        assert sorted(family.table.tolist()) == list(range(5))
        for got, expected in zip(family.raw_prompts(), lists, strict=True):
            assert got.tolist() == [p.tolist() for p in expected]
        seen.add(tuple(family.prompt_counts))
    assert (bank.data_ptr(), family.table.data_ptr()) == places and family.tokens is bank
    assert len(seen) > 5 and any(counts.count(0) == 2 for counts in seen)


def test_a_moved_prompt_is_shrunk_and_becomes_the_last():
    family = made().prompts
    before = family.tokens.detach().clone()
    family.move(1, 2)
    assert family.table.tolist() == [0, 2, 3, 4, 1]
    assert family.prompt_counts == [2, 0, 3]
    assert torch.equal(family.tokens[1], before[1] * 1e-3)
    kept = [0, 2, 3, 4]
    assert torch.equal(family.tokens[kept], before[kept])
    family.move(0, 1)
    assert family.table.tolist() == [2, 0, 3, 4, 1] and family.prompt_counts == [1, 1, 3]


def test_a_move_to_the_own_block_changes_nothing():
    model = made()
    before = {n: t.clone() for n, t in model.trained_state().items()}
    version = model.prompts.tokens._version
    for row, block in ((0, 0), (2, 0), (3, 2)):
        model.prompts.move(row, block)
    after = model.trained_state()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert model.prompts.tokens._version == version


def test_optimiser_state_stays_with_its_row():
    model = made()
    optimizer = sgd(model)
    trained(model, batches(model), 1, optimizer)
    momentum = optimizer.state[model.prompts.tokens]["momentum_buffer"]
    before = momentum.clone()
    model.prompts.move(1, 2)
    assert optimizer.state[model.prompts.tokens]["momentum_buffer"] is momentum
    assert torch.equal(momentum, before) and before[1].norm() > 0


@pytest.mark.parametrize("moves", [[], [(0, 1)], [(0, 2), (1, 2), (2, 2)], [(3, 1), (4, 1)]])
def test_both_engines_after_moves(moves):
    """Also with blocks that have no prompt left, or all of them; against VPT-deep, too."""
    model = made(dropout=0.3)
    for row, target in moves:
        model.prompts.move(row, target)
        with torch.no_grad():
            model.prompts.tokens[row] *= 1e3
    x = tiny.images(model.backbone)
    tiny.assert_engines_agree(model, x)
    tiny.assert_engines_agree(model.eval(), x)
    twin = tiny.prompted("plain", VPTDeep(model.prompts.prompt_counts)).eval()
    twin.prompts.set_prompts(model.prompts.raw_prompts())
    twin.head.load_state_dict(model.head.state_dict())
    assert torch.equal(twin(x), model(x))


def test_a_row_that_has_just_moved():
    """Its variance is far below the norm's eps, in fp32 too."""
    model = made(dtype=torch.float32)
    with torch.no_grad():
        model.prompts.tokens *= 0.05
    model.prompts.move(1, 2)
    assert model.prompts.tokens[1].var() < 1e-8
    tiny.assert_engines_agree(model, tiny.images(model.backbone))


def test_set_prompts_follows_the_table():
    family = made().prompts
    family.move(0, 1)
    rows = [torch.full((n, 32), float(i + 1)) if n else None for i, n in enumerate([2, 1, 2])]
    family.set_prompts(rows)
    assert family.tokens[:, 0].tolist() == [2.0, 1.0, 1.0, 3.0, 3.0]
    with pytest.raises(ValueError, match=re.escape("prompts[1] must have shape (1, 32), got None")):
        family.set_prompts([rows[0], None, rows[2]])


# ---- scores


def test_the_score_is_the_derivative_by_a_gate():
    """Central differences in g of L(g p_k), and the by-product <dL/dp, p>."""
    model = made()
    family, data = model.prompts, batches(model, (4,))
    (x, y), state = data[0], copy.deepcopy(model.state_dict())
    scores, loss = family._measure(losses_of(model, data), [], None)
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    value = F.cross_entropy(model(x), y)
    assert loss == pytest.approx(value.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(value, family.tokens)
    torch.testing.assert_close(scores, (grad * family.tokens).sum(1).detach(), rtol=1e-9, atol=0)
    with torch.no_grad():
        family.tokens *= 0.01  # rows of variance near eps have scores worth differencing
    scores, _ = family._measure(losses_of(model, data), [], None)
    assert scores.abs().min() > 1e-5
    step = 1e-4
    for k in range(5):
        ends = []
        for gate in (1 + step, 1 - step):
            with torch.no_grad():
                saved = family.tokens[k].clone()
                family.tokens[k] *= gate
                ends.append(F.cross_entropy(model(x), y).item())
                family.tokens[k] = saved
        assert scores[k].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_the_norm_hides_length_from_the_score():
    """Longer by a: dL/dg shrinks by (var + eps) / (a^2 var + eps), as the docstring says."""
    model = made()
    losses = losses_of(model, batches(model))
    with torch.no_grad():
        model.prompts.tokens *= 0.1
    small, _ = model.prompts._measure(losses, [], None)
    var = model.prompts.tokens.detach().var(1, correction=0)
    with torch.no_grad():
        model.prompts.tokens *= 10
    large, _ = model.prompts._measure(losses, [], None)
    ratio = (var + 1e-6) / (100 * var + 1e-6)
    torch.testing.assert_close(large, small * ratio, rtol=0.02, atol=0)


def test_clean_scores_are_means_over_the_images():
    """Whatever the batches; without dropout, and without a trace in the random stream."""
    model = made(dropout=0.5)
    x, y = batches(model, (12,))[0]
    data = [(x, y)]
    cut = list(zip(x.split([5, 1, 6]), y.split([5, 1, 6])))
    stream = torch.get_rng_state()
    one, loss = model.prompts._measure(losses_of(model, data), [], None)
    many, same = model.prompts._measure(losses_of(model, cut), [], None)
    assert torch.equal(torch.get_rng_state(), stream)
    torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-14)
    assert same == pytest.approx(loss, rel=1e-12)
    assert model.prompts.dropout == 0.5 and model.prompts.training
    model.eval()
    again, _ = model.prompts._measure(losses_of(model, data), [], None)
    assert torch.equal(again, one) and not model.prompts.training


def test_faithful_scores_by_hand():
    """Dropout on; head and gates clipped together, per batch; L the sum of mean / batch size."""
    model = made(dropout=0.4, dropout_scope="sample", faithful=True)
    family, data = model.prompts, batches(model)
    head = list(model.head.parameters())
    torch.manual_seed(7)
    scores, loss = family._measure(losses_of(model, data, "reference"), head, None)

    torch.manual_seed(7)
    expected, total, norms = torch.zeros(5, dtype=torch.float64), 0.0, []
    for x, y in data:
        gates = torch.ones(5, 1, dtype=torch.float64, requires_grad=True)
        rows = (gates * family.tokens.detach()).split(COUNTS)
        dropped = [F.dropout(r.expand(len(x), -1, -1), 0.4) if len(r) else None for r in rows]
        literal = copy.deepcopy(model)
        literal.prompts.block_prompts = lambda i, x, dropped=dropped: dropped[i]
        value = F.cross_entropy(literal(x), y)
        grads = torch.autograd.grad(value, [gates, *literal.head.parameters()])
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
        expected += grads[0][:, 0] * min(1.0, 0.25 / (norms[-1] + 1e-6)) / len(data)
        total += value.item() / len(x)
    assert max(norms) > 0.25
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)
    assert loss == pytest.approx(total, rel=1e-6)


def test_reused_gradients_are_the_extra_pass_when_nothing_is_trained():
    extra, reuse = made(), made(sweep="reuse")
    data = batches(extra, (4, 4, 4))
    expected, loss = extra.prompts._measure(losses_of(extra, data), [], None)
    reuse.prompts.start_of_epoch(losses_of(reuse, []))
    for value, _ in losses_of(reuse, data)():
        value.backward()
        reuse.zero_grad()
        reuse.prompts.end_of_step()
    scores, same = reuse.prompts._measure(losses_of(reuse, []), [], loss)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-14)
    assert same == loss
    reuse.eval()(data[0][0]).sum().backward()  # evaluation does not count
    again, _ = reuse.prompts._measure(losses_of(reuse, []), [], loss)
    assert torch.equal(again, scores)


def test_reused_gradients_are_those_of_this_epoch_and_leave_the_prompts_gradient_alone():
    model, plain = made(sweep="reuse"), made(VPTDeep(COUNTS))
    data = batches(model, (4, 4))
    sums = []
    for _ in range(2):
        if model.prompts._epoch:
            model.prompts._epoch = 0  # no decision between
        model.prompts.start_of_epoch(losses_of(model, []))
        for x, y in data:
            F.cross_entropy(pae.fast_forward(model, x), y).backward()
            model.prompts.end_of_step()
        sums.append(model.prompts._gates.grad.clone())
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-12, atol=0)
    for x, y in data * 2:
        F.cross_entropy(pae.fast_forward(plain, x), y).backward()
    assert torch.equal(model.prompts.tokens.grad, plain.prompts.tokens.grad)


@pytest.mark.parametrize("sweep", ["extra", "reuse"])
def test_norm_scores_are_shares_of_the_block(sweep):
    model = made(score="norm", sweep=sweep)
    family, data = model.prompts, batches(model)
    family.move(0, 2)
    with torch.no_grad():
        for k, scale in enumerate((2.0, 1.0, 3.0, 5.0, 4.0)):
            family.tokens[k] *= scale / family.tokens[k].norm()
    scores, loss = family._measure(losses_of(model, data), [], 0.5)
    expected = torch.tensor([-2 / 11, -1 / 4, -3 / 4, -5 / 11, -4 / 11], dtype=torch.float64)
    torch.testing.assert_close(scores, expected)
    mean = sum(value.item() * n for value, n in losses_of(model, data)()) / 11
    assert loss == pytest.approx(0.5 if sweep == "reuse" else mean, rel=1e-12)


@pytest.mark.parametrize("sweep", ["extra", "reuse"])
def test_ranks_together_measure_what_one_process_does(monkeypatch, sweep):
    model = made(sweep=sweep)
    data = batches(model, (4, 4))
    seen = []

    def measured(shares, others):
        monkeypatch.setattr(
            pro_vpt, "sum_over_ranks", lambda v: seen.append(v.clone()) or sum(others, v)
        )
        model.prompts._epoch = 0
        model.prompts.start_of_epoch(losses_of(model, []))
        for value, _ in losses_of(model, shares)() if sweep == "reuse" else ():
            value.backward()
            model.prompts.end_of_step()
        return model.prompts._measure(losses_of(model, shares), [], 1.0)

    whole, loss = measured(data, [])
    measured(data[:1], [])
    parts, same = measured(data[1:], [seen[-1]])
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-14)
    assert same == pytest.approx(loss, rel=1e-12)


def test_a_process_group(tmp_path):
    model = made()
    data = batches(model, (4,))
    expected, loss = model.prompts._measure(losses_of(model, data), [], None)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        scores, same = model.prompts._measure(losses_of(model, data), [], None)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(scores, expected) and same == loss


# ---- decisions


def test_the_most_idle_prompt_moves_where_the_policy_says():
    model = made()
    family = model.prompts
    states = []
    family.policy.choose = lambda state: states.append(state) or 1
    move = decided(model, [0.1, -0.2, 0.4, 0.3, 0.1], 1.0)
    assert move == (2, 0, 1, 0.4) == family.last_move
    assert family.prompt_counts == [2, 1, 2] and family.table.tolist() == [0, 1, 2, 3, 4]
    sums = torch.tensor([0.3, 0.0, 0.4], dtype=torch.float64)
    expected = (sums - sums.mean()) / sums.std(correction=0)
    torch.testing.assert_close(states[0][:3], expected.float())
    assert states[0][3:].tolist() == pytest.approx([2 / 4, 0, 2 / 4, 1, 0, 0])


@pytest.mark.parametrize("scores", [[0.0] * 5, [-1.0] * 5, [float("nan")] * 5])
def test_nothing_moves_unless_something_is_idle(scores):
    model = made()
    model.prompts.policy.choose = None
    assert decided(model, scores, 1.0) is None
    assert model.prompts.prompt_counts == COUNTS and model.prompts.table.tolist() == [0, 1, 2, 3, 4]


def test_norm_mode_always_moves():
    """And tells the policy the norms of each block, whose shares sum to -1."""
    model = made(score="norm")
    states = []
    model.prompts.policy.choose = lambda state: states.append(state) or 0
    norms = [rows.detach().norm(dim=1).sum() for rows in model.prompts.raw_prompts()]
    assert decided(model, [-0.3, -0.1, -0.6, -0.5, -0.5], 1.0)[:2] == (1, 0)
    sums = torch.stack(norms)
    expected = (sums - sums.mean()) / sums.std(correction=0)
    torch.testing.assert_close(states[0][:3], expected.float())


@pytest.mark.parametrize("score, left", [("taylor", 0.25), ("norm", 0.0)])
def test_rewards(score, left):
    """Only after an epoch that tried to move; a move to the own block is a try."""
    model = made(score=score)
    family, rewards = model.prompts, []
    family.policy.choose = lambda state: 0
    family.policy.reward = rewards.append
    idle, busy = [0.25, 0.0, 0.0, 0.0, 0.0], [-1.0] * 5
    decided(model, idle, 2.0)
    assert rewards == []
    decided(model, idle, 1.5)
    assert rewards == [2.0 - 1.5 - left]
    decided(model, busy, 1.0)
    assert rewards[1:] == [1.5 - 1.0 - (-1.0 if left else 0.0)]
    decided(model, idle, 0.5)
    assert len(rewards) == (2 if score == "taylor" else 3)  # nothing was tried before


def test_the_first_epoch_only_trains():
    model = made()
    model.prompts.start_of_epoch(None)
    assert model.prompts.idleness is None and model.prompts.prompt_counts == COUNTS
    model.prompts.start_of_epoch(losses_of(model, batches(model)))
    assert model.prompts.idleness.shape == (5,)


def test_the_faithful_first_epoch_is_scored_and_moves_nothing():
    model = made(faithful=True)
    with torch.no_grad():
        model.prompts.tokens *= 1e-3
    losses, head = losses_of(model, batches(model)), list(model.head.parameters())
    model.prompts.policy.choose = None
    model.prompts.start_of_epoch(losses, head)
    first = model.prompts.idleness
    assert first.max() > 0 and model.prompts.last_move is None
    assert model.prompts.prompt_counts == COUNTS
    model.prompts.policy.choose = lambda state: 1
    model.prompts.policy.reward = None  # nothing was tried before
    model.prompts.start_of_epoch(losses, head)
    assert torch.equal(model.prompts.idleness, first) and model.prompts.last_move is not None


@pytest.mark.parametrize("options", [{}, {"sweep": "reuse"}, {"faithful": True}], ids=str)
def test_training_keeps_the_total(options):
    model = made(dropout=0.1, **options)
    with torch.no_grad():
        model.prompts.tokens *= 1e-3  # scores of both signs, worth moving for
    data, optimizer = batches(model), sgd(model)
    counts = set()
    for _ in range(6):
        trained(model, data, 1, optimizer)
        counts.add(tuple(model.prompts.prompt_counts))
    assert len(counts) > 1 and {sum(c) for c in counts} == {5}
    assert sorted(model.prompts.table.tolist()) == list(range(5))
    tiny.assert_engines_agree(model, data[0][0])


def test_one_block_and_one_prompt():
    model = tiny.prompted("one_block", ProVPT(1))
    trained(model, batches(model), 3, sgd(model))
    assert model.prompts.prompt_counts == [1]


# ---- policies


def count(net):
    return net.weights.numel()


def test_sizes_of_the_networks():
    nets = PPOPolicy(12, 0).nets
    assert (count(nets["actor"]), count(nets["critic"])) == (7308, 6593)


def test_an_update_of_the_policy_by_hand():
    """The same networks as modules, torch.distributions, the reference loss."""
    depth, policy = 4, PPOPolicy(4, 3)
    hand = {}
    for name, width in (("actor", depth), ("critic", 1)):
        hand[name] = nn.Sequential(
            *(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, width))
        )
        nn.utils.vector_to_parameters(policy.nets[name].weights.detach(), hand[name].parameters())
    optimizer = torch.optim.Adam(
        [
            {"params": hand["actor"].parameters(), "lr": 3e-4},
            {"params": hand["critic"].parameters(), "lr": 1e-3},
        ]
    )
    for round_ in range(2):
        states = torch.randn(2, 12)
        actions = torch.tensor([policy.choose(states[0]), -1])
        policy.reward(0.5 - round_)
        actions[1] = policy.choose(states[1])
        with torch.no_grad():
            old = torch.distributions.Categorical(logits=hand["actor"](states)).log_prob(actions)
            values = hand["critic"](states)[:, 0]
        returns = torch.tensor([0.7071, -0.7071]) * (1 if round_ == 0 else -1)
        policy.reward(0.25)
        for _ in range(60):
            spread = torch.distributions.Categorical(logits=hand["actor"](states))
            ratio = (spread.log_prob(actions) - old).exp()
            gains = (ratio * (returns - values), ratio.clamp(0.8, 1.2) * (returns - values))
            error = (hand["critic"](states)[:, 0] - returns).square().mean()
            loss = -torch.minimum(*gains).mean() + 0.5 * error - 0.01 * spread.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name in hand:
            expected = nn.utils.parameters_to_vector(hand[name].parameters())
            torch.testing.assert_close(policy.nets[name].weights, expected, rtol=1e-3, atol=1e-4)


def test_the_policy_learns_what_is_rewarded():
    policy, state = PPOPolicy(3, 0), torch.randn(9)
    before = policy.nets["actor"](state).softmax(0)[1].item()
    for _ in range(16):
        policy.reward(1.0 if policy.choose(state) == 1 else -1.0)
    assert policy.nets["actor"](state).softmax(0)[1] > before + 0.2


def test_choices_follow_the_probabilities():
    policy, state = PPOPolicy(3, 0), torch.randn(9)
    with torch.no_grad():
        policy.nets["actor"].weights[-3:] = torch.tensor([0.0, 1.0, -1.0]) * 2
    expected = policy.nets["actor"](state).softmax(0)
    drawn = torch.tensor([policy.choose(state) for _ in range(2000)]).bincount(minlength=3) / 2000
    assert (drawn - expected).abs().max() < 0.04
    other = [PPOPolicy(3, seed).choose(torch.zeros(9)) for seed in range(30)]
    assert len(set(other)) == 3


def test_a_reward_that_is_not_finite_teaches_nothing():
    policy, state = PPOPolicy(3, 0), torch.randn(9)
    before = policy.nets["actor"].weights.clone()
    for value in (float("nan"), 1.0):
        policy.choose(state)
        policy.reward(value)
    assert torch.equal(policy.nets["actor"].weights, before) and policy.rewards_seen == 0


def test_thompson_sampling():
    policy = ThompsonPolicy(3, 0)
    hits = []
    for _ in range(200):
        block = policy.choose(None)
        hits.append(block == 2)
        policy.reward(0.0 if block == 2 else -1e-9)
    assert 0 < sum(hits[:20]) < 20 and sum(hits[-50:]) > 40
    assert policy.outcomes[2, 1] == 0 and policy.outcomes[:2, 0].sum() == 0
    assert policy.outcomes.sum() == 200


def test_the_networks_are_no_parameters_of_the_model():
    model = made()
    assert [n for n, _ in model.prompts.named_parameters()] == ["tokens"]
    assert made().to(torch.bfloat16).prompts.policy.nets["actor"].weights.dtype == torch.float32


# ---- checkpoints


RESUMED = [{}, {"sweep": "reuse"}, {"faithful": True}, {"allocation": "thompson"}]


@pytest.mark.parametrize("options", RESUMED, ids=str)
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(options, tmp_path):
    """Stopped in the middle of an epoch, after rewards and a move; bit for bit."""

    def start():
        model = made(dropout=0.2, **options)
        with torch.no_grad():
            model.prompts.tokens *= 1e-3
        return model, batches(model), sgd(model)

    torch.manual_seed(0)
    one, data, optimizer = start()
    trained(one, data, 4, optimizer, last=2)
    stream = torch.get_rng_state()
    assert one.prompts.policy.state()["counters"][0] > 1
    one.save(tmp_path / "a")
    saved = copy.deepcopy((one.trained_state(), optimizer.state_dict(), one.last_loss))
    trained(one, data, 3, optimizer, done=2)

    for load in ("state",) if options else ("state", "file"):
        two, _, again = start()
        if load == "state":
            two.load_state_dict(saved[0], strict=False)
        else:
            two.load(tmp_path / "a")
        again.load_state_dict(copy.deepcopy(saved[1]))
        two.last_loss = saved[2]
        torch.set_rng_state(stream)
        trained(two, data, 3, again, done=2)
        state = two.trained_state()
        assert state.keys() == one.trained_state().keys()
        for name, tensor in one.trained_state().items():
            assert torch.equal(state[name], tensor), name
        assert two.prompts.prompt_counts == one.prompts.prompt_counts
        assert two.prompts.last_move == one.prompts.last_move


def test_from_file_after_moves(tmp_path):
    model = made()
    model.prompts.move(0, 1)
    model.save(tmp_path / "a")
    again = pae.PromptedViT.from_file(tmp_path / "a", tiny.backbone())
    assert again.prompts.prompt_counts == [2, 1, 2]
    x = tiny.images(model.backbone)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_states_that_do_not_fit():
    model, other = made(), made(allocation="thompson")
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"prompts\.policy\.outcomes"):
        other.load_state_dict(state)
    del state["prompts.counts"]
    with pytest.raises(RuntimeError, match=r"Missing key.*prompts\.counts"):
        model.load_state_dict(state)
    state["prompts.counts"] = torch.tensor([5])
    with pytest.raises(RuntimeError, match=r"size mismatch for prompts\.counts: \(1,\)"):
        model.load_state_dict(state)
    assert made().load_state_dict(model.state_dict()).missing_keys == []


# ---- arguments


def refused(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bad_arguments():
    refused(ValueError, "sweep must be one of", lambda: ProVPT(2, sweep="again"))
    refused(ValueError, "score must be one of", lambda: ProVPT(2, score="l2"))
    refused(ValueError, "allocation must be one of", lambda: ProVPT(2, allocation="dqn"))
    refused(TypeError, "faithful must be True or False", lambda: ProVPT(2, faithful=1))
    for options in ({"sweep": "reuse"}, {"score": "norm"}):
        refused(
            ValueError,
            "faithful must be False unless",
            lambda o=options: ProVPT(2, faithful=True, **o),
        )
    refused(ValueError, "seed must be at least 0, got -1", lambda: ProVPT(2, seed=-1))
    refused(ValueError, r"num_tokens\[1\] must be at least 0", lambda: ProVPT([1, -1]))
    refused(ValueError, "must give at least one prompt, got 0", lambda: made(ProVPT(0)))
    refused(ValueError, r"one integer or one per block \(3\)", lambda: made(ProVPT([1, 2])))


def test_kld_says_why_not():
    message = "kld pairs prompt j of a block with prompt j of the next"
    refused(
        ValueError, message, lambda: pae.PromptedViT(tiny.backbone(), ProVPT(2), pae.KLD(dim=4))
    )


def test_misuse_of_the_epoch_hook():
    model = made(sweep="reuse")
    model.prompts.start_of_epoch(None)
    refused(ValueError, "last_loss must be", lambda: model.prompts.start_of_epoch(None))
    refused(
        RuntimeError, "end_of_step must be", lambda: model.prompts.start_of_epoch(None, (), 1.0)
    )
    model = made()
    model.prompts.start_of_epoch(None)
    refused(ValueError, "at least one batch", lambda: model.prompts.start_of_epoch(lambda: []))
    model = made(faithful=True)
    refused(ValueError, "head must hold", lambda: model.prompts.start_of_epoch(lambda: []))


# ---- CUDA graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_step_reads_the_table_and_refuses_other_counts():
    model = made(ProVPT(3, sweep="reuse"), torch.float32).cuda()
    x, y = (t.cuda() for t in batches(model, (4,))[0])
    model.prompts.start_of_epoch(None)  # the gates must be there when the step is captured
    step = pae.graphed_step(model, x, y)

    def agrees():
        loss, logits = step(x, y)
        assert tiny.error(logits, pae.fast_forward(model, x)) < 1e-5
        grad = model.prompts.tokens.grad.clone()
        (expected,) = torch.autograd.grad(
            F.cross_entropy(pae.fast_forward(model, x), y), model.prompts.tokens
        )
        assert tiny.error(grad, expected) < 1e-4
        return loss.item()

    first = agrees()
    model.prompts.move(0, 1)
    with pytest.raises(RuntimeError, match=r"\[2, 4, 3\] prompts per block, .* \[3, 3, 3\]"):
        step(x, y)
    model.prompts.move(4, 0)  # the counts are as they were, the rows are not
    assert agrees() != first
    before = model.prompts._gates.grad.clone()
    step(x, y)
    expected = (model.prompts.tokens.grad * model.prompts.tokens).sum(1)
    assert tiny.error(model.prompts._gates.grad - before, expected) < 1e-3


@pytest.mark.parametrize("average", [AveragedModel, partial(ModelEmaV3, decay=0.5)])
def test_an_average_of_models_whose_prompts_have_moved_is_refused(average):
    """It has the table of now and the counts of when it was made."""
    model = tiny.prompted("plain", ProVPT(4))
    x, mean = tiny.images(model.backbone), average(model)
    update = mean.update if isinstance(mean, ModelEmaV3) else mean.update_parameters
    update(model)
    assert mean.module(x).shape == model(x).shape  # nothing has moved
    model.prompts.move(0, 2)
    assert model(x, engine="fast").isfinite().all()
    update(model)
    for engine in ("reference", "fast"):
        call = partial(mean.module, x, engine=engine)
        tiny.refused(RuntimeError, "ProVPT.table was written by something else than a move", call)
    mean.module.load_state_dict(model.state_dict())
    assert torch.equal(mean.module.eval()(x), model.eval()(x))
    assert copy.deepcopy(model).prompts.prompt_counts == [3, 4, 5]
