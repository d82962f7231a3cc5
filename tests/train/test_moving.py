"""Clips of moving squares, and that prompts learn them."""

from itertools import pairwise

import numpy as np
import pytest

from tests.train import moving

pytest.importorskip("transformers", reason="pip install pae[hf]")


def test_a_frame_does_not_tell_the_class():
    """Backwards in time, a square that goes left goes right: frames alone are the same."""
    drawn, labels = moving.draw(64, 0)
    assert labels.sum() == 32 and drawn.shape == (64, 16, 32, 32, 3)
    where = (drawn[..., 0] > 100).any(2)  # columns of the square, (clips, frames, columns)
    for square, label in zip(where, labels):
        step = (-2, 2)[label]
        for before, after in pairwise(square):
            assert (np.roll(before, step) == after).all() and not (
                np.roll(before, -step) == after
            ).all()
    still, _ = moving.draw(4, 0, still=True)
    assert (still == still[:, :1]).all()


def test_prompts_learn_what_no_frame_tells():
    assert moving.accuracy("VPT-deep", 60) > 0.75
    assert moving.accuracy("APT", 60) > 0.65
