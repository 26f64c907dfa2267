"""Promotion on losses worked out by hand."""

import numpy as np
import pytest

from tasks.evolve.promote import Rival, decide, with_rival

FRONT = [Rival(0.1, np.array([4.0, 2.0, 3.0, 3.0])), Rival(0.2, np.array([2.0, 1.0, 1.0, 2.0]))]


def test_cheaper_than_all_is_always_promoted():
    assert decide(0.05, np.array([9.0, 9.0]), FRONT, z=2).promoted
    assert decide(0.3, np.array([9.0, 8.0]), [], z=2).promoted


def test_a_difference_beyond_chance_is_not():
    """Behind the rival of cost 0.2 by 3 and 4 on the first two images: 3.5 with a standard error of 0.5."""
    losses = np.array([5.0, 5.0])
    assert not decide(0.25, losses, FRONT, z=6.9).promoted and decide(0.25, losses, FRONT, z=7.1).promoted
    assert decide(0.25, losses, FRONT, z=2).loss == pytest.approx(1.5 + 3.5)
    assert decide(0.15, losses, FRONT, z=2).promoted, "the rival there is behind by 1 and 3: 2 with a standard error of 1"


def test_a_better_one_is_promoted():
    assert decide(0.25, np.array([1.0, 0.5]), FRONT, z=0).promoted


def test_the_front_drops_what_it_leaves_behind():
    assert with_rival([], FRONT[0]) == [FRONT[0]]
    better = Rival(0.1, np.zeros(4))
    assert with_rival(FRONT, better) == [better]
    worse = Rival(0.3, np.ones(4) * 5)
    assert with_rival(FRONT, worse) == FRONT
    between = Rival(0.15, np.ones(4) * 2)
    assert with_rival(FRONT, between) == [FRONT[0], between, FRONT[1]]
