"""Plans against brute force, their limits, and the rules that they are compared with."""

import itertools

import numpy as np
import pytest

from tasks.cache_learn.baselines import time_threshold, uniform_interval
from tasks.cache_learn.plan import patterns, plan_from_costs


def random_costs(rng, sublayers=2, steps=5, forbidden=0.0):
    costs = rng.lognormal(0, 1, (sublayers, steps, steps))
    costs[rng.random(costs.shape) < forbidden] = np.inf
    costs[:, np.tril(np.ones((steps, steps), bool), -1)] = np.inf
    costs[:, range(steps), range(steps)] = 0
    return costs


def cost_of(costs, compute):
    """Straight from the definition: every skipped step pays for reuse from the last computed one."""
    total = 0.0
    for i, column in enumerate(zip(*compute, strict=True)):
        last = 0
        for step, computed in enumerate(column):
            if computed:
                last = step
            else:
                total += costs[i, last, step]
    return total


def brute_force(costs, budget, max_masks=10**9):
    """The least cost over all plans that remove the budget."""
    count, steps, _ = costs.shape
    rows = list(itertools.product([True, False], repeat=count))
    best = np.inf
    for rest in itertools.product(rows, repeat=steps - 1):
        compute = (rows[0], *rest)
        removed = sum(not c for row in compute for c in row)
        if removed >= budget * count * steps - 1e-9 and len(set(compute)) <= max_masks:
            best = min(best, cost_of(costs, compute))
    return best


def plan(costs, budget, max_masks):
    return plan_from_costs(costs, [f"s{i}" for i in range(len(costs))], budget, max_masks)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.7])
def test_without_a_limit_it_is_the_brute_force_optimum(seed, budget):
    costs = random_costs(np.random.default_rng(seed), forbidden=0.1 * (seed % 3))
    best = brute_force(costs, budget)
    found = plan(costs, budget, max_masks=5)
    if np.isinf(best):
        assert found.removed_share < budget, "as many as can be removed"
    else:
        assert found.removed_share >= budget - 1e-9
        assert cost_of(costs, found.compute) == pytest.approx(best)


def test_with_a_limit_it_is_near_the_brute_force_optimum():
    ratios = []
    for seed, budget in itertools.product(range(12), (0.2, 0.4, 0.6)):
        costs = random_costs(np.random.default_rng(seed))
        found = plan(costs, budget, max_masks=3)
        assert len(found.masks) <= 3 and found.removed_share >= budget - 1e-9
        ratios.append(cost_of(costs, found.compute) / brute_force(costs, budget, max_masks=3))
    assert np.mean(ratios) < 1.03 and max(ratios) < 1.3 and min(ratios) > 1 - 1e-9
    assert np.median(ratios) == pytest.approx(1)


@pytest.mark.parametrize("max_masks", [1, 2, 3, 4, 20])
def test_masks_are_limited_and_larger_budgets_never_remove_less(max_masks):
    costs = random_costs(np.random.default_rng(1), sublayers=5, steps=12, forbidden=0.2)
    shares = []
    for budget in np.linspace(0, 0.99, 12):
        found = plan(costs, budget, max_masks)
        assert len(found.masks) <= max_masks and all(found.compute[0])
        assert np.isfinite(cost_of(costs, found.compute)), "forbidden reuse is never chosen"
        shares.append(found.removed_share)
    assert shares == sorted(shares)


def test_no_budget_computes_everything_but_what_is_free():
    costs = random_costs(np.random.default_rng(0), sublayers=2, steps=4)
    assert plan(costs, 0.0, 4).removed_share == 0
    costs[1] = 0.0
    assert [row[1] for row in plan(costs, 0.0, 4).compute] == [True, False, False, False]


@pytest.mark.parametrize(("steps", "max_masks"), [(1, 1), (1, 4), (2, 4), (4, 2), (6, 4)])
def test_where_no_reuse_is_allowed_everything_is_computed(steps, max_masks):
    costs = np.where(np.eye(steps, dtype=bool), 0.0, np.inf)[None].repeat(3, axis=0)
    assert plan(costs, 0.5, max_masks).compute == ((True, True, True),) * steps


def test_long_runs_are_planned_where_they_pay():
    """Sublayer 0 is free to reuse over any gap, sublayer 1 never: half of all evaluations is one computation of sublayer 0."""
    costs = np.stack([np.zeros((6, 6)), np.full((6, 6), 9.0)])
    found = plan(costs, 5 / 12, 2)
    assert [row[0] for row in found.compute] == [True] + [False] * 5
    assert all(row[1] for row in found.compute)


def test_one_sublayer_needs_no_limit():
    """It has two masks whatever the plan, so the dynamic program's optimum stands."""
    for seed in range(10):
        costs = random_costs(np.random.default_rng(seed), sublayers=1, steps=8)
        assert cost_of(costs, plan(costs, 0.4, 2).compute) == pytest.approx(brute_force(costs, 0.4))


def test_patterns_are_all_choices_that_compute_group_0():
    assert sorted(map(tuple, patterns(3).tolist())) == sorted((True, a, b) for a in (True, False) for b in (True, False))
    assert patterns(1).tolist() == [[True]]


@pytest.mark.parametrize(("budget", "max_masks", "message"), [(1.0, 4, "budget: 1.0"), (-0.1, 4, "budget: -0.1"),
                                                              (0.5, 0, "max_masks: 0")])
def test_bounds(budget, max_masks, message):
    with pytest.raises(ValueError, match=message):
        plan(random_costs(np.random.default_rng(0)), budget, max_masks)


def column(found):
    return [row[0] for row in found.compute]


def test_uniform_interval_spreads_computed_steps_evenly():
    assert column(uniform_interval(6, ["a", "b"], 0.5)) == [True, False] * 3
    assert column(uniform_interval(6, ["a"], 2 / 3)) == [True, False, False] * 2
    assert column(uniform_interval(5, ["a"], 0.4)) == [True, True, False, True, False]
    assert column(uniform_interval(4, ["a"], 0.0)) == [True] * 4


def test_time_threshold_skips_every_second_step_at_the_noisy_end():
    assert column(time_threshold(8, ["a"], 0.25)) == [True, False, True, False, True, True, True, True]
    assert time_threshold(8, ["a"], 0.9).removed_share == 0.5
