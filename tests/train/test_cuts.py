"""Cuts of labelled images: the same for ever, every class in training, in linear time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pae.train.data import stratified_cut
from tests.properties import examples
from tests.train.folders import fill, read, refusal


def cut_in_quadratic_time(labels, sizes, seed):
    """The cut of published runs, as first written: a scan of all images for every class."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    pools = {}
    for name in sorted(set(labels)):
        members = [i for i, label in enumerate(labels) if label == name]
        order = torch.randperm(len(members), generator=generator).tolist()
        pools[name] = [members[i] for i in order]
    parts = []
    for size in sizes:
        left = {name: len(pool) for name, pool in pools.items()}
        shares = {name: size * n / sum(left.values()) for name, n in left.items()}
        take = {name: int(share) for name, share in shares.items()}
        by_remainder = sorted(shares, key=lambda name: (take[name] - shares[name], name))
        for name in by_remainder[: size - sum(take.values())]:
            take[name] += 1
        parts.append(sorted(i for name, n in take.items() for i in pools[name][:n]))
        pools = {name: pool[take[name] :] for name, pool in pools.items()}
    return parts


@examples(150)
@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=9),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_cuts_of_published_runs_stay_as_they_are(counts, seed, data):
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    random.Random(seed).shuffle(labels)
    first = data.draw(st.integers(1, len(labels) - 1))
    sizes = [first, data.draw(st.integers(1, len(labels) - first))]
    before = cut_in_quadratic_time(labels, sizes, seed)
    assert stratified_cut(labels, sizes, seed) == before
    covered = {labels[i] for i in before[0]} == set(labels)
    if covered:
        assert stratified_cut(labels, sizes, seed, cover=True) == before
    elif first >= len(counts):
        parts = stratified_cut(labels, sizes, seed, cover=True)
        assert {labels[i] for i in parts[0]} == set(labels)
        assert [len(part) for part in parts] == sizes and not set(parts[0]) & set(parts[1])
    else:
        with pytest.raises(ValueError, match=f"{first} images cannot cover"):
            stratified_cut(labels, sizes, seed, cover=True)


def test_room_for_one_image_of_every_class_is_enough():
    labels = [c for c, n in enumerate([6, 5, 1, 1, 1, 1, 1, 1]) for _ in range(n)]
    for seed in range(5):
        train, _ = stratified_cut(labels, [8, 9], seed, cover=True)
        assert [labels[i] for i in train] == list(range(8))


def test_a_cut_reads_each_label_once():
    """Linear in the images, whatever the number of classes."""

    class Counted(list):
        read = 0

        def __iter__(self):
            for label in super().__iter__():
                Counted.read += 1
                yield label

    labels = Counted(i % 3000 for i in range(9000))
    parts = stratified_cut(labels, [6000, 3000], 0)
    assert [len(part) for part in parts] == [6000, 3000] and Counted.read == 9000


def test_long_tailed_classes_stay_in_training(tmp_path):
    fill(tmp_path, train={"common": 40, "pair": 2, "single": 1})
    for seed in range(10):
        task, said = read(tmp_path, seed=seed)
        assert set(task.train.labels) == {0, 1, 2} and task.train.labels.count(2) == 1
        assert task.sizes() == {"train": 35, "val": 8, "test": 0}
        lacking = [c for c in ("pair", "single") if task.classes.index(c) not in task.val.labels]
        assert any(f"{len(lacking)} of 3 classes" in line and "'single'" in line for line in said)
    task, _ = read(tmp_path, train_size=4, val_size=30)
    assert set(task.train.labels) == {0, 1, 2} and task.sizes()["val"] == 30
    fill(tmp_path / "rare", train={"common": 2, **dict.fromkeys("abcdefgh", 1)})
    assert read(tmp_path / "rare")[0].sizes() == {"train": 9, "val": 1, "test": 0}


def test_sizes_that_cannot_be_had_name_the_option(tmp_path):
    fill(tmp_path, train={"a": 1, "b": 1})
    assert "2 images of as many classes leave none for validation" in refusal(tmp_path)
    fill(tmp_path, train={"a": 3, "b": 3})
    line = refusal(tmp_path, train_size=5, val_size=4)
    assert "at most 6 images are there, 5 + 4 are wanted" in line
    assert "0 training images cannot cover 2 classes" in refusal(tmp_path, val_size=6)
    fill(tmp_path, val={"a": 1, "b": 1})
    _, said = read(tmp_path, val_size=3)
    assert any("--val-size is ignored" in line for line in said)
