"""Which candidates become finalists, and what the verdict's question makes of them."""

from dataclasses import dataclass

import numpy as np
import pytest

from tasks.core.quality import Difference, Gaussian, fid
from tasks.evolve.finals import Final, Finals, apart, decide, finalists, judge_finals, spread
from tasks.evolve.search import Evaluation


@dataclass(frozen=True)
class Named:
    weights: str


def told(weights: str, cost: float, loss: float | None) -> Evaluation:
    return Evaluation(Named(weights), cost, loss)


def family(e: Evaluation) -> str:
    return e.candidate.weights


def final(cost: float, estimate: float, error: float) -> Final:
    return Final(told("teacher", cost, 1.0), Difference(estimate, error))


def test_the_cheapest_that_is_certain_then_that_is_likely_then_the_least_loss():
    sure, likely, bad = final(0.3, 0.01, 0.01), final(0.2, 0.04, 0.05), final(0.1, 0.4, 0.1)
    assert decide([bad, likely, sure], 0.05) == ("certain", sure)
    assert decide([bad, likely, final(0.3, 0.04, 0.01)], 0.05) == ("likely", likely)
    assert decide([bad, final(0.3, 0.2, 0.01)], 0.05)[0] == "nearest"
    assert decide([bad, final(0.3, 0.2, 0.01)], 0.05)[1].loss.estimate == 0.2


def test_of_equal_cost_the_better_one():
    assert decide([final(0.2, 0.03, 0.0), final(0.2, 0.01, 0.0)], 0.05)[1].loss.estimate == 0.01


def test_each_near_family_has_its_front_and_the_nearest_is_last():
    found = [told("teacher", 0.1, 4.0), told("teacher", 0.2, 2.0), told("teacher", 0.3, 3.0), told("few", 0.05, 5.0),
             told("far", 0.01, 9.0), told("teacher", 0.15, None), told("teacher", 2.0, 0.1)]
    chosen = finalists(found, 1.0, 10, family)
    assert [(e.candidate.weights, e.cost) for e in chosen] == [("few", 0.05), ("teacher", 0.1), ("teacher", 0.2)]
    assert [e.cost for e in finalists(found, 1.0, 2, family)] == [0.05, 0.2]


def test_what_is_far_is_no_finalist_in_a_near_family_either():
    found = [told("few", 0.01, 30.0), told("few", 0.03, 2.9), told("few", 0.04, 1.0), told("teacher", 0.02, 4.1)]
    assert [e.cost for e in finalists(found, 1.0, 10, family)] == [0.03, 0.04]


def test_neighbours_at_nearly_one_cost_are_one_finalist():
    front = [told("teacher", cost, 5 - cost) for cost in (0.100, 0.104, 0.107, 0.12, 0.125, 0.2)]
    assert [e.cost for e in apart(front)] == [0.100, 0.12, 0.2]


def test_spread():
    assert spread(range(3), 5) == [0, 1, 2] and spread(range(10), 4) == [0, 3, 6, 9] and spread(range(10), 1) == [0]


def test_nothing_within_the_bound_is_said():
    with pytest.raises(ValueError, match="all 1 evaluations failed"):
        finalists([told("teacher", 0.1, None)], 1.0, 4, family)


def test_the_loss_is_that_of_the_verdict():
    rng = np.random.default_rng(0)
    dense, real = rng.normal(size=(200, 4)), Gaussian.of(rng.normal(size=(500, 4)) + 0.3)
    worse, e = dense - 0.5, told("teacher", 0.1, 1.0)
    same, found = judge_finals([e, e, e], [dense, worse, None], dense, real,
                               Finals(images=200, finalists=3, resamples=100, seed=0), 2)
    assert same.loss == Difference(0.0, 0.0)
    assert found.loss.estimate == pytest.approx(fid(worse, real) / fid(dense, real) - 1) and found.loss.error > 0


@pytest.mark.parametrize(("changed", "message"), [({"images": 50}, "evolve.finals.images: 50 is not between 100"),
                                                  ({"finalists": 0}, "evolve.finals.finalists: 0")])
def test_bad_params(changed, message):
    with pytest.raises(ValueError, match=message):
        Finals(**{"images": 500, "finalists": 6, "resamples": 200, "seed": 1, **changed})
