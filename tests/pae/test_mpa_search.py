"""MPA's searches on constructed losses: what halving may drop, and what bf16 may not change."""

import math

import pytest
import torch

from pae.mpa import Halving
from pae.mpa import search as mpa_search
from pae.mpa.near_ties import MARGIN, confirm
from pae.mpa.search import (
    Ranking,
    _balanced_order,
    rank_all,
    rank_by_halving,
    student_quantile,
)


class Table:
    """Losses (S, B) that are looked up, and counted."""

    def __init__(self, losses):
        self.losses, self.asked = losses, 0

    def __call__(self, windows, images):
        self.asked += len(windows) * len(images)
        return self.losses[windows][:, images]

    def share(self):
        return self.asked / self.losses.numel()


def noisy(means, images=64, spread=1.0, seed=0):
    """Losses of windows with these means: noise of each image that all share, and of each entry."""
    g = torch.Generator().manual_seed(seed)
    shared = 3 * torch.randn(images, generator=g, dtype=torch.float64)
    own = spread * torch.randn(len(means), images, generator=g, dtype=torch.float64)
    return means[:, None] + shared + own - own.mean(dim=1, keepdim=True)


def two_classes(images=64):
    return torch.arange(images) % 2


# ---- every window on every image


def test_exact_search_orders_all_windows():
    losses = torch.tensor([[3.0, 1.0], [0.0, 2.0], [1.0, 1.0], [5.0, 5.0]])
    table = Table(losses)
    ranking = rank_all(table, 4, 2)
    assert ranking.losses.tolist() == [2, 1, 1, 5]
    assert ranking.complete.tolist() == [1, 2, 0, 3]  # equal losses in the order of the windows
    assert ranking.images_seen.tolist() == [2] * 4
    assert table.share() == 1


# ---- halving


def test_halving_finds_clear_winners_at_a_fraction_of_the_work():
    means = torch.cat([torch.zeros(10), torch.full((190,), 4.0)]).double()
    means += 0.05 * torch.arange(200)
    table = Table(noisy(means[torch.randperm(200, generator=torch.Generator().manual_seed(9))]))
    expected = rank_all(Table(table.losses), 200, 64)
    ranking = rank_by_halving(table, 200, two_classes(), 10, Halving())
    assert ranking.complete[:10].tolist() == expected.complete[:10].tolist()
    assert table.share() < 0.4
    assert int(ranking.images_seen.sum()) == table.asked
    whole = ranking.images_seen == 64
    torch.testing.assert_close(ranking.losses[whole], expected.losses[whole])


def test_halving_keeps_what_it_cannot_tell_apart():
    """All windows are equally good up to noise: there is nothing to save, and nothing is lost."""
    table = Table(noisy(torch.zeros(60).double(), seed=1))
    table.losses += 1e-3 * torch.randn(60, 1, generator=torch.Generator().manual_seed(2))
    expected = rank_all(Table(table.losses), 60, 64)
    ranking = rank_by_halving(table, 60, two_classes(), 6, Halving())
    assert table.share() > 0.85
    assert ranking.complete[:6].tolist() == expected.complete[:6].tolist()


def test_halving_misses_no_more_often_than_it_says():
    """Normal losses, and a boundary so narrow that guesses from half the images are often wrong."""
    halving, naive, work = 0, 0, 0.0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        losses = torch.randn(40, 48, generator=generator, dtype=torch.float64)
        table = Table(losses + 0.1 * torch.arange(40)[:, None])
        best = set(rank_all(Table(table.losses), 40, 48).complete[:5].tolist())
        ranking = rank_by_halving(table, 40, two_classes(48), 5, Halving(risk=0.05, seed=seed))
        halving += set(ranking.complete[:5].tolist()) != best
        work += table.share() / 100
        order = _balanced_order(two_classes(48), seed)[:24]
        naive += set(table.losses[:, order].mean(1).argsort()[:5].tolist()) != best
    assert halving <= 5  # 5 % of 100
    assert naive > 30 and work < 0.7  # so the test can fail, and the search earns something


def test_a_bound_of_no_width_misses(monkeypatch):
    """The same search without its quantile drops winners: it is what holds them."""
    monkeypatch.setattr(mpa_search, "student_quantile", lambda *_: 0.0)
    missed = 0
    for seed in range(20):
        losses = torch.randn(40, 48, generator=torch.Generator().manual_seed(seed))
        table = Table(losses + 0.1 * torch.arange(40)[:, None])
        best = set(rank_all(Table(table.losses), 40, 48).complete[:5].tolist())
        ranking = rank_by_halving(table, 40, two_classes(48), 5, Halving(seed=seed))
        missed += set(ranking.complete[:5].tolist()) != best
    assert missed > 5


def test_halving_takes_the_difference_of_classes_for_what_it_is():
    """Losses that differ between classes only are known after two images of each."""
    labels = torch.arange(64) % 4
    by_class = torch.randn(50, 4, generator=torch.Generator().manual_seed(3)).double()
    by_class = by_class - by_class.mean(1, keepdim=True) + torch.arange(50)[:, None] / 50
    table = Table(by_class[:, labels])
    ranking = rank_by_halving(table, 50, labels, 5, Halving(first=12))
    assert ranking.complete.tolist() == [0, 1, 2, 3, 4]
    assert (ranking.images_seen[5:] == 12).all()
    torch.testing.assert_close(ranking.losses, table.losses.mean(1))  # the estimates are exact


def test_halving_of_a_batch_without_repeated_classes():
    labels = torch.arange(64)
    means = torch.cat([torch.zeros(5), torch.full((95,), 9.0)]).double()
    table = Table(noisy(means))
    ranking = rank_by_halving(table, 100, labels, 5, Halving())
    assert set(ranking.complete[:5].tolist()) == set(range(5))
    assert table.share() < 0.5


@pytest.mark.parametrize("images", [1, 3, 8])
def test_halving_of_few_images_is_the_exact_search(images):
    table = Table(torch.randn(30, images, generator=torch.Generator().manual_seed(5)))
    ranking = rank_by_halving(table, 30, torch.arange(images) % 2, 4, Halving(first=8))
    expected = rank_all(table, 30, images)
    assert ranking.complete.tolist() == expected.complete.tolist()
    assert torch.equal(ranking.losses, expected.losses)


@pytest.mark.parametrize("constant", [False, True])
def test_equal_windows_are_never_dropped_for_each_other(constant):
    """Also where they are known without error, and only rounding could tell them apart."""
    losses = torch.randn(1, 37, generator=torch.Generator().manual_seed(8))
    losses = 0 * losses + 1.1 if constant else losses
    table = Table(losses.expand(20, 37).contiguous())
    ranking = rank_by_halving(table, 20, torch.arange(37) % 3, 3, Halving())
    assert ranking.complete.tolist() == list(range(20))


@pytest.mark.parametrize("labels", [torch.arange(40) % 4, torch.tensor([0] * 36 + [1] * 4)])
def test_every_start_of_the_order_has_the_shares_of_the_classes(labels):
    order = _balanced_order(labels, seed=1)
    assert order.sort().values.tolist() == list(range(40))
    for n in range(1, 41):
        for name in labels.unique():
            share = int((labels == name).sum()) / 40
            assert abs(int((labels[order[:n]] == name).sum()) - n * share) < 1.5
    assert not torch.equal(order, _balanced_order(labels, seed=2))


def test_student_quantiles():
    table = {(0.025, 1): 12.7062, (0.005, 2): 9.924843, (0.05, 3): 2.353363, (5e-4, 7): 5.407883}
    table |= {(0.025, 10): 2.228139, (5e-4, 30): 3.645959, (0.025, 120): 1.979930}
    for (risk, freedom), expected in table.items():
        assert student_quantile(risk, freedom) == pytest.approx(expected, rel=1e-6)
    # normal in the limit, and monotonic far out
    assert student_quantile(1e-7, 10**4) == pytest.approx(5.199338, rel=1e-3)
    assert student_quantile(1e-9, 6) > student_quantile(1e-8, 6) > student_quantile(1e-8, 60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"risk": 0.0}, r"Halving.risk must be a number in \(0, 1\), got 0.0"),
        ({"risk": 1.5}, r"Halving.risk must be a number in \(0, 1\), got 1.5"),
        ({"first": 3}, "Halving.first must be an integer of at least 4, got 3"),
        ({"first": 8.0}, "Halving.first must be an integer of at least 4, got 8.0"),
        ({"growth": 1}, "Halving.growth must be above 1, got 1"),
    ],
)
def test_bad_settings_of_halving(change, message):
    with pytest.raises(ValueError, match=message):
        Halving(**change)


def test_stages_grow_to_the_whole_batch():
    assert Halving(first=8, growth=2).stages(64) == [8, 16, 32, 64]
    assert Halving(first=8, growth=1.5).stages(30) == [8, 12, 18, 27, 30]
    assert Halving(first=8).stages(8) == Halving(first=8).stages(8) == [8]
    assert Halving(first=8).stages(5) == [5]


@pytest.mark.parametrize("search", ["exact", "halving"])
def test_a_loss_that_is_not_finite_is_named(search):
    losses = torch.zeros(20, 16)
    losses[3, 1] = math.inf
    losses[4, 2] = math.nan
    with pytest.raises(ValueError, match="no finite loss for 2 of 20 windows"):
        if search == "exact":
            rank_all(Table(losses), 20, 16)
        else:
            rank_by_halving(Table(losses), 20, torch.arange(16) % 2, 3, Halving(first=16))


# ---- rounded losses


def rounded_ranking(losses, error):
    return rank_all(Table((losses.mean(1) + error)[:, None]), len(losses), 1)


def test_near_ties_are_decided_in_full_precision():
    """Rounding swaps windows across the boundary; the selection and its order do not care."""
    means = torch.arange(100).double() / 10
    means[18:24] = 2.0 + 1e-4 * torch.arange(6)  # the boundary of 20 runs through these
    error = 0.3 + 0.02 * torch.randn(100, generator=torch.Generator().manual_seed(0)).double()
    error[18:20], error[22:24] = 0.34, 0.26  # the wrong two look best
    full = Table(noisy(means, images=4))
    ranking, ties = confirm(rounded_ranking(full.losses, error), 20, full, 4)
    assert ranking.complete[:20].tolist() == list(range(20))
    assert ties.dropped.tolist() == [22, 23] and ties.added.tolist() == [18, 19]
    torch.testing.assert_close(ranking.losses[:20], full.losses.mean(1)[:20])
    assert 24 <= len(ties.rechecked) < 40
    assert full.asked == 4 * len(ties.rechecked)
    torch.testing.assert_close(ties.error, torch.tensor([-0.34, -0.26]).double(), atol=0.03, rtol=0)
    # the rest keep their rounded losses, behind those that were measured again
    left = ranking.complete[len(ties.rechecked) :]
    torch.testing.assert_close(ranking.losses[left], (full.losses.mean(1) + error)[left])


def test_a_wide_band_is_measured_as_far_as_it_reaches():
    """A window far down the rounded list comes back when errors of its size have been seen."""
    means = torch.cat([torch.arange(10) / 10, torch.tensor([0.45]), 2 + torch.arange(60) / 30])
    error = torch.zeros(71)
    error[:10] = torch.linspace(-0.9, 0.9, 10)  # known after the first look: half the range 0.9
    error[10] = 1.7  # rounded loss 2.15, behind a dozen others: within MARGIN times it
    full = Table(means[:, None].expand(-1, 2).contiguous())
    ranking, ties = confirm(rounded_ranking(full.losses, error), 6, full, 2)
    assert MARGIN * 0.9 > 1.7
    assert ranking.complete[:6].tolist() == [0, 1, 2, 3, 4, 10]
    assert 10 in ties.rechecked and 10 in ties.added


def test_no_rounding_no_recheck_beyond_the_neighbours():
    full = Table(torch.arange(50.0)[:, None])
    ranking, ties = confirm(rounded_ranking(full.losses, 0.0), 8, full, 1)
    assert ties.rechecked.tolist() == list(range(16))
    assert not len(ties.dropped) and not len(ties.added)
    assert ranking.complete.tolist() == list(range(50))


def test_windows_that_halving_dropped_stay_dropped():
    complete = torch.tensor([4, 2, 7])
    rounded = Ranking(torch.arange(9.0), torch.tensor([8, 8, 16, 8, 16, 8, 8, 16, 8]), complete)
    full = Table((9 - torch.arange(9.0))[:, None].expand(-1, 16))
    ranking, ties = confirm(rounded, 2, full, 16)
    assert ranking.complete.tolist() == [7, 4, 2]
    assert ties.rechecked.tolist() == [2, 4, 7]
    assert torch.equal(ranking.images_seen, rounded.images_seen)
