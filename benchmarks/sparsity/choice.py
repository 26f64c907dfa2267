"""What an arm prunes where it is not told for every layer alike: N:M layer by layer, units block by block."""

from collections import defaultdict
from collections.abc import Callable, Mapping

from torch import Tensor

from benchmarks.sparsity.arms import Arm
from benchmarks.sparsity.lab import CALIBRATION_NOISE, Lab, live
from benchmarks.sparsity.storage import WEIGHT_BITS
from tasks.core.cost import layer_costs
from tasks.core.progress import track
from tasks.core.sparsity import grain_mask, parse_pattern, stored_bits
from tasks.mask_search.allocate import Option, allocate
from tasks.mask_search.allocate import uniform as one_density
from tasks.mask_search.choose import macs_model
from tasks.mask_search.saliency import Statistics, input_statistics
from tasks.mask_search.sensitivity import (
    Errors,
    Trajectories,
    cut_errors,
    masked_error,
    priced,
    unit_cuts,
    unit_layers,
)
from tasks.runtime.masks import hidden_units

UNIT_DENSITIES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
UNIT_MULTIPLE = 8        # as in params.yaml
SENSED_IMAGES, SENSED_STEPS = 32, 10  # that tell how sensitive a layer is
UNKNOWN: Errors = defaultdict(dict)  # of the cuts of a plan that is not chosen by them


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
    """Units that go, with 1 - density of the MACs of the blocks that have them, by the arm's allocation."""
    costs = layer_costs(lab.teacher)
    model, counted = macs_model(costs), {cost.name for cost in costs}
    blocks = {unit_layers(units, counted): units for units in hidden_units(lab.teacher.model)
              if arm.attention or not units.products}
    budget = (1 - arm.density) * model.dense({layer for layers in blocks for layer in layers})
    plan = one_density(lambda density: priced(unit_cuts(blocks, [density], UNIT_MULTIPLE), UNKNOWN, model), budget,
                       min(UNIT_DENSITIES))
    assert plan is not None, "every arm's density is above the lowest that is offered"
    if arm.allocation == "uniform":
        return plan
    cuts = unit_cuts(blocks, UNIT_DENSITIES, UNIT_MULTIPLE)
    statistics = input_statistics(lab.teacher, lab.calibration, {units.consumer for units in blocks.values()})
    errors = cut_errors(lab.teacher, cuts, image_error(lab, SENSED_STEPS, SENSED_IMAGES), statistics)
    return allocate(priced(cuts, errors, model), budget if arm.allocation == "exact" else sum(option.saved for option in plan))


def image_error(lab: Lab, steps: int, images: int) -> Callable[[], float]:
    """What has changed since now in images of the lab's teacher: its mean square over theirs."""
    dense = Trajectories.of(lab.teacher, live(lab.teacher), steps, images, CALIBRATION_NOISE)
    return lambda: dense.error(live(lab.teacher))
