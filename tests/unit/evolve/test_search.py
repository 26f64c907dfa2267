"""The search loop on a problem whose optimum is known, without images, models or workers."""

from collections import deque
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pytest
from pymoo.indicators.hv import HV
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from tasks.evolve.search import Evaluation, Strategy, crowding, hypervolume, pareto_front, search, survive

STRATEGY = Strategy(population=20, top=8, random=0.2, crossover=0.2, mutation=0.15)
TARGET = (3, 1, 4, 1, 5, 2, 6, 5, 3, 5)


@dataclass(frozen=True)
class Digits:
    """Ten digits 0..7; the loss is their distance to TARGET, the cost their sum."""

    digits: int = 8
    bound: float = float("inf")

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

    def features(self, candidates):
        return np.stack([np.eye(self.digits)[list(c)].ravel() for c in candidates])

    def unbounded(self):
        return replace(self, bound=float("inf"))


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


@pytest.mark.parametrize("seed", range(20))
def test_crowding_is_pymoos_front_by_front(seed):
    """Of distinct objectives, and of whole numbers, where many are alike."""
    rng = np.random.default_rng(seed)
    for objectives in (rng.random((40, 2)), rng.integers(0, 5, (40, 2)).astype(float)):
        fronts, ranks = NonDominatedSorting().do(objectives, return_rank=True)
        found = crowding(objectives, ranks)
        assert all(np.array_equal(found[front], calc_crowding_distance(objectives[front])) for front in fronts)


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


# ---- the surrogate ----

class Damage(Digits):
    """Forty layers of 3 to 8 bits, some of them thirty times as sensitive as others; the cost is the sum of their bits."""

    SENSITIVITY = np.geomspace(0.01, 0.3, 40)

    def sample(self, rng):
        return tuple(rng.integers(3, 9, size=40).tolist())

    def mutate(self, parent, probability, rng):
        return tuple(int(rng.integers(3, 9)) if rng.random() < probability else x for x in parent)

    def features(self, candidates):
        return 2.0 ** -np.array(candidates)


def damage(candidates):
    return (float(np.exp(8 * Damage.SENSITIVITY @ 2.0 ** -np.array(c))) for c in candidates)


def test_a_surrogate_needs_fewer_evaluations():
    """A third of them."""
    def volume(budget, offspring, seed):
        told = search(Damage(), damage, np.random.default_rng(seed), budget, replace(STRATEGY, offspring=offspring))
        return hypervolume([e for e in told if e.loss < 30 and e.cost < 320], (320.0, 30.0))

    assert all(volume(100, 16, seed) > volume(300, 1, seed) for seed in range(3))


def test_with_a_surrogate_too_a_candidate_sees_only_results_that_far_back():
    def altered(candidates):
        return (value + 50 * (k == 60) for k, value in enumerate(evaluate(candidates, lookahead=6)))

    strategy = replace(STRATEGY, offspring=8)
    a, b = (search(Digits(), f, np.random.default_rng(1), 120, strategy) for f in (altered, evaluate_six))
    same = [x.candidate == y.candidate for x, y in zip(a, b, strict=True)]
    assert all(same[:66]) and not all(same)


def evaluate_six(candidates):
    return evaluate(candidates, lookahead=6)


def test_failures_are_no_lesson_to_the_surrogate():
    def fails(candidates):
        return (None if k % 2 else value for k, value in enumerate(evaluate(candidates)))

    told = search(Digits(), fails, np.random.default_rng(0), 120, replace(STRATEGY, offspring=8))
    assert sum(e.loss is None for e in told) == 60 and least(told) <= 14


# ---- the presets ----

TMPQ_DM, RANDOM = (replace(STRATEGY, kind=kind) for kind in ("tmpq_dm", "random"))


def generations(budget=170, space=None, seeds=((4,) * 10,), seed=0):
    """TMPQ-DM's evolution: the evaluations and the sizes of its generations."""
    sizes = []

    def measured(candidates):
        sizes.append(len(candidates))
        return evaluate(candidates)

    told = search(space or Digits(), measured, np.random.default_rng(seed), budget, TMPQ_DM, seeds)
    return told, sizes


def test_tmpq_dm_waits_for_generations_of_fifty():
    told, sizes = generations()
    assert sizes == [50, 50, 50, 20] and len({e.candidate for e in told}) == 170


def test_tmpq_dm_begins_with_its_seed_and_mutants_of_it():
    told, _ = generations(50)
    near = [sum(x != 4 for x in e.candidate) for e in told]
    assert near[0] == 0 and np.mean(near[1:25]) < 3 and np.mean(near[25:]) > 7  # p = 0.1 of 10 genes, 7 of 8 values differ


def test_tmpq_dm_breeds_from_the_ten_of_least_loss():
    told, _ = generations(100)
    ten = sorted(told[:50], key=lambda e: e.loss)[:10]
    crossed = [e.candidate for e in told[75:85]]
    assert all(any(all(x in (a, b) for x, a, b in zip(child, p.candidate, q.candidate, strict=True))
                   for p in ten for q in ten) for child in crossed)


def test_tmpq_dm_throws_away_what_is_beyond_the_bound():
    space = Digits(bound=30.0)
    told, _ = generations(150, space, seeds=((2,) * 10,))
    assert len(told) == 150 and all(e.cost <= 30 for e in told)


def test_tmpq_dm_minds_the_loss_alone():
    """Of equal losses neither is preferred for its cost: the best are at the target, not on the way to zero cost."""
    told, _ = generations(1000)
    assert least(told) <= 6 and np.mean([e.cost for e in told[-50:-15]]) > 25


def test_tmpq_dm_ends_when_the_space_is_exhausted():
    told, sizes = generations(300, Digits(digits=2), seeds=())
    assert len(told) == 300 and sizes[0] == 50
    told, _ = generations(300, Digits(digits=1), seeds=())
    assert [e.candidate for e in told] == [(0,) * 10]


def test_random_has_no_parents():
    """Results cannot matter to it."""
    told = [run(3, 80, replace(RANDOM, offspring=16, random=0.0)),
            search(Digits(), lambda asked: (float(i) for i, _ in enumerate(asked)), np.random.default_rng(3), 80, RANDOM)]
    assert [e.candidate for e in told[0]] == [e.candidate for e in told[1]]


def test_strategy_names_an_unknown_kind():
    with pytest.raises(ValueError, match="kind: 'tmpq' is not one of ours, tmpq_dm, random"):
        replace(STRATEGY, kind="tmpq")
