"""Promotion on losses worked out by hand."""

import numpy as np
import pytest

from tasks.evolve.promote import Contest, Promotion, Rival, decide, rival_of, with_rival

FRONT = [Rival(0.1, np.array([4.0, 2.0, 3.0, 3.0])), Rival(0.2, np.array([2.0, 1.0, 1.0, 2.0]))]


def test_cheaper_than_all_is_always_promoted():
    assert decide(np.array([9.0, 9.0]), rival_of(0.05, FRONT), z=2).promoted
    assert decide(np.array([9.0, 8.0]), rival_of(0.3, []), z=2).promoted


def test_a_difference_beyond_chance_is_not():
    """Behind the rival of cost 0.2 by 3 and 4 on the first two images: 3.5 with a standard error of 0.5."""
    losses, dear = np.array([5.0, 5.0]), rival_of(0.25, FRONT)
    assert not decide(losses, dear, z=6.9).promoted and decide(losses, dear, z=7.1).promoted
    assert decide(losses, dear, z=2).loss == pytest.approx(1.5 + 3.5)
    assert decide(losses, rival_of(0.15, FRONT), z=2).promoted, "behind that one by 1 and 3: 2 with an error of 1"


def test_a_better_one_is_promoted():
    assert decide(np.array([1.0, 0.5]), rival_of(0.25, FRONT), z=0).promoted


def test_the_front_drops_what_it_leaves_behind():
    assert with_rival([], FRONT[0]) == [FRONT[0]]
    better = Rival(0.1, np.zeros(4))
    assert with_rival(FRONT, better) == [better]
    worse = Rival(0.3, np.ones(4) * 5)
    assert with_rival(FRONT, worse) == FRONT
    between = Rival(0.15, np.ones(4) * 2)
    assert with_rival(FRONT, between) == [FRONT[0], between, FRONT[1]]


def test_a_contest_asks_little_of_those_that_are_behind_and_corrects_their_loss():
    """References of which the second lies one unit from the first: a feature is a loss."""
    references = np.zeros((4, 1)), np.ones((4, 1))
    contest = Contest(Promotion(images=2, z=2.0), references)
    heats = [item[2] for item in contest.asked([("teacher", "a", 0.1)])]
    assert heats[0].rival is None and heats[0].promotes(np.array([[9.0], [9.0]]))
    assert list(contest.told([[4.0, 2.0, 3.0, 3.0]])) == [3.0]
    heats = [item[2] for item in contest.asked([("teacher", "b", 0.2), ("teacher", "c", 0.05), ("teacher", "d", 0.3)])]
    assert [heat.rival and heat.rival.cost for heat in heats] == [0.1, None, 0.1], "the one of cost 0.05 has no cheaper one"
    assert not heats[0].promotes(np.array([[9.0], [7.0]])) and heats[2].promotes(np.array([[1.0], [1.0]]))
    assert list(contest.told([[9.0, 7.0], None, [1.0, 1.0, 2.0, 2.0]])) == [3.0 + 5.0, None, 1.5]
    assert [rival.cost for rival in contest.front] == [0.1, 0.3] and not contest.heats


def test_all_images_decide_no_other_than_the_first_did():
    """Of another search's log all images may be known: who is not promoted keeps what the first ones say."""
    contest = Contest(Promotion(images=2, z=2.0), (np.zeros((4, 1)), np.ones((4, 1))))
    list(contest.asked([("teacher", "a", 0.1)]))
    list(contest.told([[4.0, 2.0, 3.0, 3.0]]))
    list(contest.asked([("teacher", "b", 0.2)]))
    assert list(contest.told([[9.0, 7.0, 0.0, 0.0]])) == [8.0]
