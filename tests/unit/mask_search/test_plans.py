"""Plans under one budget, on two blocks of two layers whose savings and errors are round numbers."""

import pytest

from tasks.mask_search.allocate import Option
from tasks.mask_search.choose import CostModel
from tasks.mask_search.plans import describe, make_plans, paying

BLOCKS = {("a", "b"): 1.0, ("c", "d"): 3.0}  # the second suffers more: error of removing all its units


def offer(speed: float, grain: str, density: float) -> list[Option]:
    """Of a block units save up to 20, at an error in proportion; of a layer 2:4 saves `speed` x 10 at a tenth of its error."""
    if grain == "unit":
        return [Option(layers, grain, density, error * (1 - density), 20 * (1 - density)) for layers, error in BLOCKS.items()]
    return [Option((layer,), grain, 0.5, error / 10, 10 * speed) for layers, error in BLOCKS.items() for layer in layers]


def plans(speed: float, budget: float, least: float = 2.0) -> dict:
    options = [option for d in (0.25, 0.5, 0.75) for option in offer(speed, "unit", d)] + offer(speed, "2:4", 0.5)
    return make_plans(options, lambda grain, density: offer(speed, grain, density), budget, least)


def test_where_zeros_save_nothing_units_pay():
    found = plans(speed=0.02, budget=14)  # 0.8 in all: less than `least`, the spread of times
    assert [(o.layers, o.density) for o in found["unit"]] == [(("a", "b"), 0.25)]  # 15 for 0.75; 10 + 5 would cost 0.5 + 0.75
    assert found["mixed"] == found["unit"] and found["uniform"] == found["unit_uniform"]
    assert {option.grain for option in found["mixed"]} == {"unit"}


def test_where_kernels_use_the_pattern_it_pays():
    found = plans(speed=0.45, budget=17)  # all four layers are needed: 18
    assert {option.grain for option in found["mixed"]} == {"2:4"} and len(found["mixed"]) == 4
    assert found["uniform"] == found["mixed"]
    assert {option.grain for option in found["unit"]} == {"unit"}


def test_by_hand_a_budget_is_shared_by_grains():
    found = plans(speed=0.45, budget=19)
    first, second = found["mixed"]  # 15 + 4.5 for 0.75 + 0.3; 10 + 9 would cost 0.5 + 0.6
    assert (first.layers, first.grain, first.density) == (("a", "b"), "unit", 0.25)
    assert second.layers in (("c",), ("d",)) and second.grain == "2:4"
    assert [o.density for o in found["unit_uniform"]] == [0.52, 0.52]  # 40 x 0.48 = 19.2
    assert found["uniform"] == found["unit_uniform"]  # 2:4 everywhere saves 18 and is out


def test_a_grain_pays_if_it_saves_enough_everywhere():
    options = offer(0.02, "2:4", 0.5) + [Option(("e",), "2:4", 0.5, 0.0, -0.3)]
    assert paying(options, least=0.49) == options[:-1]  # four times 0.2, less 0.3
    assert paying(options, least=0.51) == []
    assert paying([*options, Option(("e",), "fine", 0.5, 0.0, 1.0)], least=0.51)[0].grain == "fine"


def test_a_plan_in_words_and_numbers():
    model = CostModel("us", 50, lambda layer, grain, density: 0.0)
    assert describe([Option(("a", "b"), "unit", 0.25, 0.75, 15.0), Option(("c",), "2:4", 0.5, 0.3, 4.5)], model, 1.5) == {
        "layers": {"a": {"grain": "unit", "density": 0.25}, "b": {"grain": "unit", "density": 0.25},
                   "c": {"grain": "2:4", "density": 0.5}},
        "saved": 19.5, "cost": pytest.approx(0.61), "error": {"predicted": pytest.approx(1.05), "measured": 1.5}}
