"""Costs on arithmetic done by hand, and the menus that the target allows."""

from dataclasses import replace

import pytest

from tasks.core.cost import LayerCost
from tasks.core.latency import additive_latency, load_layers
from tasks.core.params import Goal
from tasks.core.recipe import CachePlan, Recipe
from tasks.evolve.costs import Times, bitops_share, bound_of, latency, precision_menus, read_times, weights_bytes

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


def test_a_change_costs_what_the_additive_model_misses_where_layers_take_turns(tmp_path):
    write_profile(tmp_path)
    with (tmp_path / "model.csv").open("a") as file:
        file.write("openvino,int8+fp32,8,181,0\n")
    additive = 16 + 120 + (80 * 10 + 120 * 30) / 200  # a at int8, b at fp32; remainders 10 and 30
    changes = read_times(tmp_path, "openvino", 8, "unit").changes
    assert changes == {frozenset(("w8a8", "fp32")): pytest.approx(181 - additive)}


def test_latency_counts_what_the_cache_plan_computes():
    plan = CachePlan(sublayers=("block",), compute=((True,), (False,)))
    cost = latency(COSTS, TIMES, DENSE)(Recipe(timesteps=(3, 0), cache=plan))
    assert cost == pytest.approx((1 * 4 + 2 * 6 + 2 * 10) / 80)


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


@pytest.mark.parametrize("tokens, count", [
    (("bf16", "bf16", "w8a8"), {"bf16+w8a8": 1}),          # everything between the layers runs in bf16
    (("bf16", "bf16", "fp32"), {"bf16+fp32": 4}),          # in fp32: each bf16 layer is a way there and a way back
    (("w8a8", "bf16", "fp32"), {"w8a8+fp32": 1, "bf16+fp32": 2}),
    (("w8a8", "w8a8", "fp32"), {"w8a8+fp32": 1})])
def test_one_fp32_layer_makes_every_bf16_layer_two_changes(tokens, count):
    prices = {"bf16+w8a8": 1.0, "bf16+fp32": 10.0, "w8a8+fp32": 100.0}
    times = Times({}, {}, {frozenset(pair.split("+")): price for pair, price in prices.items()})
    assert times.changing(tokens) == sum(prices[pair] * n for pair, n in count.items())


def test_menus_of_bits_are_two_genes_a_layer():
    menus = precision_menus("bitops", ("a", "b"), None)
    assert menus == (("w3", "w4", "w5", "w6", "w7", "w8"), ("a3", "a4", "a5", "a6", "a7", "a8")) * 2


def write_profile(folder, backend: str = "openvino") -> None:
    """Two layers at two precisions; hidden units were taken from layer a."""
    layers = [("a", "fp32", "dense", 1.0, 80), ("a", "int8", "dense", 1.0, 16), ("b", "fp32", "dense", 1.0, 120),
              ("b", "int8", "dense", 1.0, 40), ("a", "fp32", "unit", 0.5, 50), ("a", "int8", "unit", 0.5, 10),
              ("a", "fp32", "2:4", 0.5, 80)]
    rows = [f"{name},linear,{backend},{token},{grain},{density},8,{us}" for name, token, grain, density, us in layers]
    header = "layer,kind,backend,precision,grain,density,batch,time_us"
    (folder / "layers.csv").write_text("\n".join([header, *rows]) + "\n")
    wholes = f"{backend},fp32,8,230,0\n{backend},int8,8,66,0\n"
    (folder / "model.csv").write_text("backend,precision,batch,time_us,spread\n" + wholes)


@pytest.mark.parametrize("density", [1.0, 0.75, 0.5, 0.3])
@pytest.mark.parametrize("precision", [{}, {"a": "w8a8"}, {"a": "w8a8", "b": "w8a8"}])
def test_profile_is_read_as_the_additive_model_says(tmp_path, density, precision):
    write_profile(tmp_path)
    recipe = Recipe(timesteps=(9, 5, 1), precision=precision, sparsity={"grain": "unit", "density": {"a": density}})
    cost = latency(COSTS, read_times(tmp_path, "openvino", 8, "unit"), DENSE)(recipe)
    table = load_layers(tmp_path)
    once, dense = (additive_latency(table, *plan, "openvino", 8) for plan in ((precision, {"a": density}), ({}, {})))
    assert cost == pytest.approx(3 * once / (4 * dense))


def test_profile_without_the_backend_says_what_it_holds(tmp_path):
    write_profile(tmp_path, "eager")
    with pytest.raises(ValueError, match=r"layers.csv: nothing for .* openvino and batch 8; it holds \[\('eager', 8\)\]"):
        read_times(tmp_path, "openvino", 8, None)
