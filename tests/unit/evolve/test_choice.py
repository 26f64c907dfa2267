"""What is handed over, on costs and losses made up so that the answer can be read off them, and on a profile's tables."""

from dataclasses import dataclass

import pytest

from tasks.core.cost import LayerCost
from tasks.core.latency import read_times
from tasks.core.quality import Difference
from tasks.core.recipe import Recipe
from tasks.evolve.choice import choose, without_idle_precision
from tasks.evolve.costs import latency
from tasks.evolve.search import Evaluation

ERROR = 0.1


@dataclass(frozen=True)
class Told:
    """Losses that are known up to ERROR, their differences up to a tenth of it."""

    error: float = ERROR

    def __call__(self, e, base=None):
        return Difference(e.loss - (0.0 if base is None else base.loss), self.error if base is None else self.error / 10)


def told(*points):
    return [Evaluation(name, cost, loss) for name, cost, loss in points]


def name(choice):
    return choice.best.candidate, choice.rule


def test_the_cheapest_that_holds_both_bounds_for_certain():
    """The fast one's loss is within what is tolerated as measured, not with its error; the nearest is slower than need be."""
    points = told(("fast", 0.1, 0.9), ("good", 0.12, 0.8), ("near", 0.2, 0.1), ("beyond", 0.3, 0.01))
    found = choose(points, 0.25, tolerated=1.0, above=Told())
    assert name(found) == ("good", "cheapest") and found.cheapest is found.best and found.nearest.candidate == "near"
    assert name(choose(points, 0.25, 1.0, Told(error=0.01))) == ("fast", "cheapest")


def test_where_nothing_holds_the_quality_the_nearest_within_the_bound():
    points = told(("fast", 0.1, 3.0), ("near", 0.2, 1.5), ("dear", 0.19, 1.6), ("beyond", 0.3, 0.1))
    found = choose(points, 0.25, 1.0, Told())
    assert name(found) == ("near", "nearest") and found.cheapest is None


def test_of_equals_the_cheaper_and_of_equally_cheap_the_nearer():
    assert choose(told(("a", 0.2, 2.0), ("b", 0.1, 2.0)), 1.0, 1.0, Told()).best.candidate == "b"
    assert choose(told(("a", 0.1, 0.5), ("b", 0.1, 0.4)), 1.0, 1.0, Told()).best.candidate == "b"


def test_failures_are_no_choice():
    assert choose(told(("a", 0.1, None), ("b", 0.2, 3.0)), 1.0, 1.0, Told()).best.candidate == "b"
    with pytest.raises(ValueError, match="all 1 evaluations failed"):
        choose(told(("a", 0.1, None)), 1.0, 1.0, Told())


def test_a_mix_that_costs_more_than_one_precision_has_to_be_shown_to_be_nearer():
    mixed, = told(("mixed", 0.20, 1.00))
    uniform = told(("fp32", 0.30, 0.90), ("bf16", 0.15, 1.01), ("w8a8", 0.14, 4.0))
    assert without_idle_precision(mixed, uniform, Told()).candidate == "bf16", "0.01 nearer may be chance"
    assert without_idle_precision(mixed, uniform, Told(error=0.01)) == mixed, "it is not where the error is small"
    dearer = told(("bf16", 0.21, 1.0))
    assert without_idle_precision(mixed, dearer, Told()) == mixed


def test_the_rule_holds_for_what_is_chosen_as_nearest_and_a_bound_that_is_held_is_a_gain():
    points, idle = told(("mixed", 0.20, 1.50)), told(("bf16", 0.15, 1.51))
    assert name(choose(points, 0.25, 1.0, Told(), lambda e: idle)) == ("bf16", "nearest")
    points, over = told(("mixed", 0.20, 0.83)), told(("bf16", 0.15, 0.84))
    assert name(choose(points, 0.25, 1.0, Told(), lambda e: over)) == ("mixed", "cheapest"), "0.84 may be above 1"
    over = told(("bf16", 0.15, 0.831))
    assert name(choose([*points, *over], 0.25, 1.0, Told(), lambda e: over)) == ("bf16", "cheapest")


def test_on_a_profile_where_changes_of_precision_cost_more_than_int8_saves(tmp_path):
    """Each of four layers is 1 us faster in int8 than in bf16, a change of precision takes 3: the mix that looks best layer by
    layer is slower than plain bf16, and is not handed over for a gain that may be chance."""
    layers, times = [f"l{i}" for i in range(4)], {"fp32": 20, "bf16": 10, "int8": 9}
    rows = [f"{layer},linear,openvino,{token},dense,1.0,8,{us}" for layer in layers for token, us in times.items()]
    (tmp_path / "layers.csv").write_text("\n".join(["layer,kind,backend,precision,grain,density,batch,time_us", *rows]))
    wholes = {token: 4 * us + 100 for token, us in times.items()} | {"w8a8+bf16": 2 * 10 + 2 * 9 + 100 + 3 * 3}
    rows = [f"openvino,{token},8,{us},0.1" for token, us in wholes.items()]
    (tmp_path / "model.csv").write_text("\n".join(["backend,precision,batch,time_us,spread", *rows]))
    cost = latency([LayerCost(layer, "linear", 10, 10, None) for layer in layers],
                   read_times(tmp_path, "openvino", 8, None), Recipe(timesteps=tuple(range(50, 0, -1))))

    def evaluation(label, tokens, loss):
        precision = dict(zip(layers, tokens, strict=True))
        return Evaluation(label, cost(Recipe(timesteps=(9, 6, 3, 0), precision=precision)), loss)

    mixed = evaluation("mixed", ("w8a8", "bf16") * 2, 1.0)
    uniform = [evaluation(token, (token,) * 4, loss) for token, loss in (("fp32", 0.99), ("bf16", 1.01), ("w8a8", 5.0))]
    assert uniform[1].cost < mixed.cost < uniform[0].cost
    assert without_idle_precision(mixed, uniform, Told()).candidate == "bf16"
