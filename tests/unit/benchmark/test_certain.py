"""Intervals against scipy and by hand, how often they hold, and when timing goes on; on a clock that moves when a case runs."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from tasks.benchmark.certain import ERROR, LOOKS, Question, interval, rounds_needed, settle
from tasks.benchmark.measure import Case


def test_eight_rounds_are_the_fewest_with_an_interval():
    """All eight on one side of the median: 2 / 2^8 = 0.8 %, of 1 % that a look may err by."""
    assert rounds_needed() == 8 and pytest.approx(0.01) == ERROR / LOOKS
    base = [10.0, 11, 12, 13, 14, 15, 16, 17]
    assert interval(base[:7], [1.0] * 7) is None
    assert interval(base, [1.0] * 8) == (10, 17)


@pytest.mark.parametrize("n", [8, 15, 20, 50, 333])
def test_the_interval_is_what_the_sign_test_does_not_reject(n):
    """Against scipy's exact binomial test of every place between two ratios."""
    ratios = np.sort(np.random.default_rng(n).lognormal(size=n))
    low, high = interval(ratios, np.ones(n))
    for k in range(1, n):
        rejected = binomtest(k, n).pvalue <= ERROR / LOOKS  # the median lies between ratio k - 1 and ratio k
        between = (ratios[k - 1] + ratios[k]) / 2
        assert rejected == (not low <= between <= high), k


def test_pairs_take_away_what_slows_both():
    """A machine that gets slower by a factor of ten: the ratio of every round is 2."""
    slow = np.geomspace(1, 10, 20)
    assert interval(2 * slow, slow) == pytest.approx((2, 2))


def test_the_interval_holds_the_tables_ratio_of_medians():
    base, ours = [1.0] * 4 + [9.0] * 5, [1.0] * 5 + [3.0] * 4
    ratios = np.array(base) / np.array(ours)
    assert np.median(base) / np.median(ours) == 9 == max(ratios)
    low, high = interval([*base, 9], [*ours, 1.0])
    assert low <= np.median([*base, 9]) / np.median([*ours, 1.0]) <= high


def cases_with(ratio, noise, rng, clock):
    """dense takes `ratio` times as long as compressed, which takes 1 s; both with noise of their own."""
    def case(name, seconds):
        def run():
            clock.now += seconds * rng.lognormal(0, noise)
        return Case(variant=name, backend="openvino", batch=8, run=run)
    return [case("dense", ratio), case("compressed", 1.0), case("cache", 1.0)]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


QUESTION = Question("dense.openvino.b8", "compressed.openvino.b8", 5.0)


def timed(ratio, noise, seed, budget_s=1e9, first=3):
    clock = Clock()
    cases = cases_with(ratio, noise, np.random.default_rng(seed), clock)
    times = {case.key: [] for case in cases}
    for case in itertools.chain.from_iterable([cases] * first):
        began = clock.now
        case.run()
        times[case.key].append(clock.now - began)
    return settle(cases, times, [QUESTION], budget_s, clock)


@pytest.mark.parametrize("ratio, rounds", [(8.0, 8), (2.0, 8)])
def test_a_clear_answer_ends_it_on_either_side(ratio, rounds):
    found = timed(ratio, 0.02, seed=0)
    assert len(found[QUESTION.ours]) == len(found[QUESTION.base]) == rounds
    assert len(found["cache.openvino.b8"]) == 3, "no question is about it"


def test_a_close_one_takes_all_looks_and_no_more():
    found = timed(5.0, 0.1, seed=1)
    assert len(found[QUESTION.ours]) == 8 * 2**3
    low, high = interval(found[QUESTION.base], found[QUESTION.ours])
    assert low < 5 < high


def test_the_budget_ends_it_in_the_middle_of_a_look():
    assert len(timed(5.0, 0.1, seed=1, budget_s=13)[QUESTION.ours]) == 6  # 3 and three of 6 s
    assert len(timed(5.0, 0.1, seed=1, budget_s=0)[QUESTION.ours]) == 3


def test_a_decided_question_costs_nothing():
    assert len(timed(8.0, 0.02, seed=0, first=9)[QUESTION.ours]) == 9


def test_looking_five_times_lets_no_more_than_one_in_twenty_through_by_luck():
    """At exactly what was wanted neither side is right. Stopping at the first of five looks at plain 95 % intervals would
    be wrong in about one run of ten; here it is one in twenty at most, and as often on either side."""
    found = [timed(5.0, 0.2, seed) for seed in range(250)]
    ends = np.array([interval(times[QUESTION.base], times[QUESTION.ours]) for times in found])
    above, below = (ends[:, 0] > 5).mean(), (ends[:, 1] < 5).mean()
    assert above + below <= ERROR and abs(above - below) < 0.04
