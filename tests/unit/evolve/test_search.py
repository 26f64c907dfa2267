"""The search loop on a problem whose optimum is known, without images, models or workers."""

from collections import deque
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
from pymoo.indicators.hv import HV

from tasks.evolve.search import Evaluation, Strategy, hypervolume, pareto_front, search, survive

STRATEGY = Strategy(population=20, top=8, random=0.2, crossover=0.2, mutation=0.15)
TARGET = (3, 1, 4, 1, 5, 2, 6, 5, 3, 5)


@dataclass(frozen=True)
class Digits:
    """Ten digits 0..7; the loss is their distance to TARGET, the cost their sum."""

    digits: int = 8

    def key(self, c):
        return c

    def cost(self, c):
        return float(sum(c))

    def sample(self, rng):
        return tuple(rng.integers(self.digits, size=10).tolist())

    def mutate(self, parent, probability, rng):
        return tuple(int(rng.integers(self.digits)) if rng.random() < probability else x for x in parent)

    def crossover(self, a, b, rng):
        return tuple(x if rng.random() < 0.5 else y for x, y in zip(a, b, strict=True))


def loss(c):
    return float(sum(abs(x - y) for x, y in zip(c, TARGET, strict=True)))


def evaluate(candidates, lookahead=4):
    """In order, `lookahead` asked ahead, as the cluster does."""
    source = iter(candidates)
    window = deque(islice(source, lookahead))
    while window:
        yield loss(window.popleft())
        window.extend(islice(source, 1))


def least(told):
    return min(e.loss for e in told if e.loss is not None)


def run(seed=0, budget=600, strategy=STRATEGY, **kwargs):
    return search(Digits(), evaluate, np.random.default_rng(seed), budget, strategy, **kwargs)


def test_finds_the_optimum():
    assert least(run(budget=3000)) <= 1


def test_beats_random_search_at_equal_budget():
    random = Strategy(population=20, top=8, random=1.0, crossover=0.0, mutation=0.15)
    assert all(least(run(seed)) < least(run(seed, strategy=random)) for seed in range(3))


def test_is_reproducible():
    assert run(7, 100) == run(7, 100) and run(7, 100) != run(8, 100)


def test_nothing_is_asked_twice():
    told = run(budget=300)
    assert len({e.candidate for e in told}) == len(told) == 300


def test_ends_when_the_space_is_exhausted():
    space = Digits(digits=1)
    told = search(space, evaluate, np.random.default_rng(0), 50, STRATEGY)
    assert [e.candidate for e in told] == [(0,) * 10]


def test_seeds_come_first_and_once():
    told = run(budget=5, seeds=[TARGET, TARGET, (0,) * 10])
    assert [e.candidate for e in told[:2]] == [TARGET, (0,) * 10] and told[0].loss == 0


def test_a_failed_evaluation_is_no_parent():
    def fails(candidates):
        return (None if k % 2 else value for k, value in enumerate(evaluate(candidates)))

    told = search(Digits(), fails, np.random.default_rng(0), 60, STRATEGY)
    assert sum(e.loss is None for e in told) == 30
    assert all(e.loss is not None for e in survive(told, 100))


def test_a_candidate_sees_only_results_that_far_back():
    """A loss that is changed can only show from `lookahead` candidates later on."""
    def altered(candidates):
        return (value + 50 * (k == 20) for k, value in enumerate(evaluate(candidates, lookahead=6)))

    def plain(candidates):
        return evaluate(candidates, lookahead=6)

    a, b = (search(Digits(), f, np.random.default_rng(1), 60, STRATEGY, seeds=[(7,) * 10]) for f in (altered, plain))
    same = [x.candidate == y.candidate for x, y in zip(a, b, strict=True)]
    assert all(same[:26])


def test_survivors_are_the_first_fronts():
    told = [Evaluation(k, *point) for k, point in enumerate([(1, 5), (5, 1), (3, 3), (4, 4), (6, 6)])]
    assert {e.candidate for e in survive(told, 3)} == {0, 1, 2}
    assert [e.candidate for e in survive(told, 4)][-1] == 3


def test_front_by_hand():
    told = [Evaluation(k, *point) for k, point in enumerate([(3, 3), (1, 5), (2, 5), (5, 1), (4, None)])]
    assert [e.candidate for e in pareto_front(told)] == [1, 0, 3]


def test_hypervolume_by_hand_and_by_pymoo():
    told = [Evaluation(0, 1.0, 3.0), Evaluation(1, 2.0, 1.0)]
    assert hypervolume(told, (4.0, 4.0)) == pytest.approx((3 * 1 + 2 * 2) / 16)
    assert hypervolume(told, (4.0, 4.0)) == pytest.approx(HV(ref_point=[4, 4])(np.array([[1, 3], [2, 1]])) / 16)


def test_strategy_names_the_bad_value():
    with pytest.raises(ValueError, match="random \\+ crossover: 1.4"):
        Strategy(population=20, top=8, random=0.7, crossover=0.7, mutation=0.1)
