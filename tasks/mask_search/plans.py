"""One budget and the plans that keep it: units alone, all grains mixed, and the opponent of each, one density for all."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from tasks.mask_search.allocate import Option, allocate, uniform
from tasks.mask_search.choose import CostModel

Plan = list[Option]  # no layer in two of them
Offer = Callable[[str, float], Sequence[Option]]  # grain, density -> its options in all places at that density


def make_plans(options: Sequence[Option], offer: Offer, budget: float, least: float) -> dict[str, Plan]:
    """unit and mixed have the least summed error, unit_uniform and uniform (of the best grain) one density; all save `budget`.

    A grain other than units takes part where it saves `least` if used everywhere. A uniform plan that cannot save as much as
    an allocated one is left out. Raises ValueError if units cannot save the budget.
    """
    units = [option for option in options if option.grain == "unit"]
    taking_part = units + paying([option for option in options if option.grain != "unit"], least)
    alike = {grain: uniform(lambda density, of=grain: offer(of, density), budget, lowest)
             for grain, lowest in lowest_densities(taking_part).items()}
    found = {grain: plan for grain, plan in alike.items() if plan is not None}
    return {"unit": allocate(units, budget), **({"unit_uniform": found["unit"]} if "unit" in found else {}),
            "mixed": allocate(taking_part, budget), **({"uniform": min(found.values(), key=summed_error)} if found else {})}


def paying(options: Sequence[Option], least: float) -> list[Option]:
    """Those that save anything, of the grains that save `least` when used in every place, the places where they lose included:
    timings spread, and the few layers where a useless grain seems to save something are the lucky ones."""
    best: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for option in options:
        best[option.grain][option.layers] = max(option.saved, best[option.grain].get(option.layers, option.saved))
    return [option for option in options if option.saved > 0 and sum(best[option.grain].values()) >= least]


def lowest_densities(options: Iterable[Option]) -> dict[str, float]:
    """By grain, in the options' order."""
    lowest: dict[str, float] = {}
    for option in options:
        lowest[option.grain] = min(option.density, lowest.get(option.grain, 1.0))
    return lowest


def summed_error(plan: Plan) -> float:
    return sum(option.error for option in plan)


def describe(plan: Plan, model: CostModel, measured: float) -> dict:
    """For choice.json. cost: against dense. Errors: predicted is the sum of the cuts' alone, measured that of all, one-shot."""
    saved = sum(option.saved for option in plan)
    return {"layers": {layer: {"grain": option.grain, "density": option.density} for option in plan for layer in option.layers},
            "saved": saved, "cost": 1 - saved / model.whole, "error": {"predicted": summed_error(plan), "measured": measured}}
