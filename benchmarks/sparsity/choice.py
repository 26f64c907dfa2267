"""What an arm prunes where it is not told for every layer alike: N:M layer by layer, units block by block."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from benchmarks.sparsity.arms import STEPS, Arm
from benchmarks.sparsity.lab import CALIBRATION_NOISE, Lab, live
from benchmarks.sparsity.storage import WEIGHT_BITS
from tasks.core.calibration import predictions, relative_error
from tasks.core.cost import layer_costs
from tasks.core.progress import track
from tasks.core.sparsity import grain_mask, parse_pattern, stored_bits
from tasks.mask_search.allocate import Option, allocate
from tasks.mask_search.allocate import uniform as one_density
from tasks.mask_search.choose import macs_model
from tasks.mask_search.saliency import Statistics, input_statistics
from tasks.mask_search.sensitivity import (
    Trajectories,
    cut_errors,
    cut_masks,
    masked_error,
    priced,
    unit_cuts,
    unit_layers,
)
from tasks.runtime.masks import hidden_units

UNIT_DENSITIES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
UNIT_OFFERED = tuple(i / 32 for i in range(1, 32))  # to the allocation, errors in between interpolated
UNIT_RADII = (1 / 16, 1 / 8, 3 / 16, 1 / 4)         # of densities around the one for all, see `around`
UNIT_IMAGES = 256        # on which plans are compared as wholes
UNIT_MULTIPLE = 8        # as in params.yaml
SENSED_IMAGES, SENSED_STEPS = 32, 10  # that tell how sensitive a layer is


def pattern_plan(arm: Arm, lab: Lab, scores: Mapping[str, Tensor], statistics: Mapping[str, Statistics]) -> list[Option]:
    """N of M for each layer, or dense: of those that store no more bits than the arm's pattern in every layer, the one of least
    summed error. A layer's error is what it alone changes in images: a small one in a prediction may lead far from them."""
    _, m = parse_pattern(arm.grain)
    error = image_error(lab, SENSED_STEPS, SENSED_IMAGES)

    def option(name: str, n: int) -> Option:
        pattern, score = f"{n}:{m}", scores[name]
        mask = grain_mask(score, pattern)
        found = masked_error(lab.teacher, {f"{name}.weight": mask}, error, statistics)
        return Option((name,), pattern, n / m, found, WEIGHT_BITS * score.numel() - stored_bits(mask, pattern, WEIGHT_BITS))

    places = [(name, n) for name in scores for n in range(1, m)]
    options = [option(*place) for place in track(places, len(places), f"{lab.name} {arm.name}: sensitivity")]
    return allocate(options, sum(option.saved for option in options if option.grain == arm.grain))


def unit_plan(arm: Arm, lab: Lab) -> list[Option]:
    """Units of feed-forwards and resnets that go, with 1 - density of their MACs, by the arm's allocation."""
    costs = layer_costs(lab.teacher)
    model, counted = macs_model(costs), {cost.name for cost in costs}
    blocks = {unit_layers(units, counted): units for units in hidden_units(lab.teacher.model) if not units.products}
    cuts = unit_cuts(blocks, UNIT_DENSITIES, UNIT_MULTIPLE)
    statistics = input_statistics(lab.teacher, lab.calibration, {units.consumer for units in blocks.values()})
    budget = (1 - arm.density) * model.dense({layer for layers in blocks for layer in layers})
    if arm.allocation == "exact":
        errors = cut_errors(lab.teacher, cuts, image_error(lab, SENSED_STEPS, SENSED_IMAGES), statistics)
        return allocate(priced(cuts, errors, model), budget)
    now = predictions(lab.teacher, lab.calibration)
    errors = cut_errors(lab.teacher, cuts, lambda: relative_error(predictions(lab.teacher, lab.calibration), now), statistics)
    plan = one_density(lambda density: priced(unit_cuts(blocks, [density], UNIT_MULTIPLE), errors, model), budget,
                       min(UNIT_DENSITIES))
    assert plan is not None, "every arm's density is above the lowest that is offered"
    if arm.allocation == "uniform":
        return plan
    options = priced(unit_cuts(blocks, UNIT_OFFERED, UNIT_MULTIPLE), errors, model)
    ways = around(options, plan, sum(option.saved for option in plan), UNIT_RADII)
    error = image_error(lab, STEPS, UNIT_IMAGES)
    return min(ways, key=lambda way: masked_error(lab.teacher, cut_masks(lab.teacher.model, way), error, statistics))


def image_error(lab: Lab, steps: int, images: int) -> Callable[[], float]:
    """What has changed since now in images of the lab's teacher: its mean square over theirs."""
    dense = Trajectories.of(lab.teacher, live(lab.teacher), steps, images, CALIBRATION_NOISE)
    return lambda: dense.error(live(lab.teacher))


def around(options: Sequence[Option], plan: Sequence[Option], budget: float, radii: Sequence[float]) -> list[list[Option]]:
    """Plans from `plan`, of one density, to that of least summed error: in between those of least error whose densities are
    within each radius of its. options: of the grain of `plan`, which saves the budget.

    Errors of cuts are not additive, so the least sum may be far from the least error; the nearer to `plan`, the less it errs.
    """
    centre = {option.layers: option.density for option in plan}
    pruned = {layer for layers in centre for layer in layers}
    near = [[option for option in options if abs(option.density - centre.get(option.layers, 1.0)) <= radius]
            for radius in radii]
    return [list(plan), *(allocate([*plan, *offered], budget, pruned) for offered in near), allocate(options, budget)]
