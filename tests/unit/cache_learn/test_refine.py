"""Local search over plans: its limits, its gain, and that a kill changes nothing."""

import numpy as np
import pytest

from tasks.cache_learn.baselines import time_threshold, uniform_interval
from tasks.cache_learn.refine import changed, masks_of, proposals, refine, removed
from tasks.core.checkpoint import Checkpoint
from tasks.core.recipe import CachePlan

SUBLAYERS = ("a", "b", "c", "d")
RNG = np.random.default_rng(0)
WORTH = RNG.random((10, 4))  # of each evaluation: what skipping it costs


def plan_of(compute) -> CachePlan:
    return CachePlan(sublayers=SUBLAYERS, compute=tuple(tuple(bool(c) for c in row) for row in compute))


def stray(plan: CachePlan) -> float:
    return float(WORTH[~np.array(plan.compute)].sum())


EVERY_SECOND = plan_of([[step % 2 == 0] * 4 for step in range(10)])  # 20 of 40 removed, 2 masks


@pytest.mark.parametrize("max_masks", [1, 2, 3, 4])
def test_a_change_keeps_to_budget_and_masks(max_masks):
    compute = np.array(EVERY_SECOND.compute) if max_masks > 1 else np.ones((10, 4), bool)
    for k in range(200):
        found = np.array(changed(compute, removed(compute), max_masks, np.random.default_rng(k)))
        assert removed(found) >= removed(compute) and len(np.unique(found, axis=0)) <= max_masks and found[0].all()


def test_masks_and_groups_are_the_plan_again():
    compute = np.array(EVERY_SECOND.compute)
    compute[3, 1] = True
    masks, groups = masks_of(compute, 5)
    assert masks.shape == (5, 4) and masks[0].all() and (masks[groups] == compute).all()


def test_it_finds_cheaper_plans_and_keeps_the_budget(tmp_path):
    found, curve = refine([EVERY_SECOND], stray, 0.5, 4, 300, 0, Checkpoint(tmp_path, "a"))
    assert stray(found) < 0.85 * stray(EVERY_SECOND) and found.removed_share >= 0.5 and len(found.masks) <= 4
    assert curve[0] == (0, stray(EVERY_SECOND)) and curve[-1][1] == stray(found)
    assert [value for _, value in curve] == sorted((value for _, value in curve), reverse=True)


def test_without_tries_it_is_the_best_proposed(tmp_path):
    worse = plan_of(np.vstack([np.ones((1, 4), bool), np.zeros((9, 4), bool)]))
    assert refine([worse, EVERY_SECOND], stray, 0.5, 4, 0, 0, Checkpoint(tmp_path, "a"))[0] == EVERY_SECOND


def test_a_killed_search_ends_as_an_undisturbed_one(tmp_path):
    whole = refine([EVERY_SECOND], stray, 0.5, 4, 60, 0, Checkpoint(tmp_path, "whole"))
    calls = []

    def dies(plan: CachePlan) -> float:
        calls.append(plan)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return stray(plan)

    with pytest.raises(KeyboardInterrupt):
        refine([EVERY_SECOND], dies, 0.5, 4, 60, 0, Checkpoint(tmp_path, "killed", every_s=0))
    assert refine([EVERY_SECOND], stray, 0.5, 4, 60, 0, Checkpoint(tmp_path, "killed")) == whole


def test_the_table_proposes_every_number_of_masks_with_each_forecast():
    costs = np.where(np.triu(np.ones((10, 10), bool), 1), RNG.random((4, 10, 10)), np.inf)
    costs[:, range(10), range(10)] = 0
    found = proposals(costs, SUBLAYERS, 0.3, 4, "taylor")
    kinds, least = ["none", "taylor"] * 3, min(plan.removed_share for plan in found[:6])
    assert [plan.forecast for plan in found[:6]] == kinds and least >= 0.3
    assert all(len(plan.masks) <= 2 + i // 2 for i, plan in enumerate(found[:6]))
    assert {plan.forecast for plan in proposals(costs, SUBLAYERS, 0.3, 4, "learned")} == {"none"}, "weights come later"


def test_rules_are_proposed_where_they_remove_as_much():
    """Costs that forbid nothing and are all alike: the table's plan removes what the budget asks for, and so do the rules."""
    costs = np.where(np.triu(np.ones((10, 10), bool), 1), 1.0, np.inf)[None].repeat(4, axis=0)
    costs[:, range(10), range(10)] = 0
    found = proposals(costs, SUBLAYERS, 0.3, 2, "none")
    assert [plan.removed_share for plan in found] == pytest.approx([0.3] * 4)
    assert found[1] == uniform_interval(10, SUBLAYERS, 0.3) and found[2] == time_threshold(10, SUBLAYERS, 0.3)
    assert found[3] == time_threshold(10, SUBLAYERS, 0.3, "clean")
    assert len(proposals(costs, SUBLAYERS, 0.6, 2, "none")) == 2, "a threshold skips every second step at most"
