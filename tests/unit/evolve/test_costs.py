"""Costs on arithmetic done by hand, and the menus that the target allows."""

from dataclasses import replace

import pytest

from tasks.core.cost import LayerCost
from tasks.core.latency import Times
from tasks.core.params import Goal
from tasks.core.recipe import CachePlan, Recipe
from tasks.evolve.costs import bitops_share, bound_of, latency, precision_menus, weights_bytes

COSTS = [LayerCost("a", "linear", 100, 40, "block"), LayerCost("b", "linear", 300, 60, None)]
TIMES = Times({("a", "fp32"): [(0.5, 3.0), (1.0, 4.0)], ("a", "w8a8"): [(1.0, 1.0)], ("a", "bf16"): [(1.0, 4.0)],
               ("b", "fp32"): [(1.0, 6.0)], ("b", "bf16"): [(1.0, 7.0)], ("b", "w8a8"): [(1.0, 5.0)]},
              remainders={"fp32": 10.0, "bf16": 10.0, "w8a8": 5.0})
DENSE = Recipe(timesteps=(3, 2, 1, 0))


def goal(target: str) -> Goal:
    return Goal(target=target, max_quality_loss=0.05, min_speedup=8.0, max_bitops=0.1, max_size=1000)


def test_latency_by_hand():
    cost = latency(COSTS, TIMES, DENSE)
    assert cost(DENSE) == 1.0
    assert cost(Recipe(timesteps=(3, 0))) == 0.5
    assert cost(Recipe(timesteps=(3, 0), precision={"a": "w8a8"})) == pytest.approx(2 * (1 + 6 + 0.4 * 5 + 0.6 * 10) / 80)


def test_changes_of_precision_are_paid_for_at_every_step():
    times = replace(TIMES, changes={frozenset(("w8a8", "fp32")): 1.5})
    cost = latency(COSTS, times, DENSE)
    assert cost(Recipe(timesteps=(3, 0), precision={"a": "w8a8", "b": "w8a8"})) == 2 * (1 + 5 + 5) / 80
    assert cost(Recipe(timesteps=(3, 0), precision={"a": "w8a8"})) == pytest.approx(2 * (1 + 6 + 0.4 * 5 + 0.6 * 10 + 1.5) / 80)


def test_latency_counts_what_the_cache_plan_computes():
    plan = CachePlan(sublayers=("block",), compute=((True,), (False,)))
    cost = latency(COSTS, TIMES, DENSE)(Recipe(timesteps=(3, 0), cache=plan))
    assert cost == pytest.approx((1 * 4 + 2 * 6 + 2 * 10) / 80)


def test_a_skipped_trunk_saves_its_share_of_the_remainder():
    """One of two layers lies in it, so a step that skips it pays half."""
    inner, outer = (replace(cost, name=name) for cost, name in zip(COSTS, ("up_blocks.0.a", "conv_out"), strict=True))
    times = replace(TIMES, layers={({"a": inner.name, "b": outer.name}[layer], token): points
                                   for (layer, token), points in TIMES.layers.items()})
    plan = CachePlan(sublayers=("trunk",), compute=((True,), (False,)))
    cost = latency([inner, outer], times, DENSE)(Recipe(timesteps=(3, 0), cache=plan))
    assert cost == pytest.approx((1 * 4 + 2 * 6 + 1.5 * 10) / 80)


def test_latency_scales_with_kept_units():
    sparsity = {"grain": "unit", "density": {"a": 0.75}}
    assert latency(COSTS, TIMES, DENSE)(Recipe(timesteps=(3,), sparsity=sparsity)) == pytest.approx((3.5 + 6 + 10) / 80)


def test_bitops_share_by_hand():
    recipe = Recipe(timesteps=(3, 0), precision={"a": "w4a8", "b": "w8a8"})
    assert bitops_share(COSTS, DENSE)(recipe) == pytest.approx(2 * (100 * 32 + 300 * 64) / (4 * 400 * 1024))


def test_bytes_by_hand():
    recipe = Recipe(timesteps=(3,), precision={"a": "w4a8"}, sparsity={"grain": "2:4", "density": {"b": 0.5}})
    assert weights_bytes(COSTS, parameters=110)(recipe) == 40 / 2 + 60 * 0.5 * 4 + 10 * 4


def test_bounds_are_costs():
    assert [bound_of(goal(t)) for t in ("latency", "bitops", "size")] == [1 / 8, 0.1, 1000.0]


def test_menus_hold_classes_that_are_faster_than_every_more_accurate_one_cheapest_first():
    assert precision_menus("latency", ("a", "b"), TIMES) == (("w8a8", "fp32", "bf16"), ("w8a8", "fp32", "bf16"))
    slow = Times({("a", "fp32"): [(1.0, 1.0)], ("a", "w8a8"): [(1.0, 2.0)], ("a", "bf16"): [(1.0, 0.5)]}, remainders={})
    assert precision_menus("latency", ("a",), slow) == (("bf16", "fp32"),)


def test_bf16_stays_on_the_menu_of_a_layer_that_is_fastest_in_fp32():
    layer = Times({("a", "fp32"): [(1.0, 1.0)], ("a", "w8a8"): [(1.0, 1.5)], ("a", "bf16"): [(1.0, 2.0)]}, remainders={})
    assert precision_menus("latency", ("a",), layer) == (("fp32", "bf16"),)


def test_menus_of_bits_are_two_genes_a_layer():
    menus = precision_menus("bitops", ("a", "b"), None)
    assert menus == (("w3", "w4", "w5", "w6", "w7", "w8"), ("a3", "a4", "a5", "a6", "a7", "a8")) * 2
