"""What an arm prunes where it is not told for every layer alike: N:M layer by layer, units block by block."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple

from torch import Tensor

from benchmarks.sparsity.arms import BLOCKS, STEPS, Arm
from benchmarks.sparsity.lab import CALIBRATION_NOISE, Bench, Lab, live
from benchmarks.sparsity.storage import WEIGHT_BITS
from tasks.core.calibration import predictions, relative_error
from tasks.core.cost import layer_costs
from tasks.core.progress import track
from tasks.core.sparsity import grain_mask, parse_pattern, stored_bits
from tasks.mask_search.allocate import Cut, Option, allocate
from tasks.mask_search.allocate import uniform as one_density
from tasks.mask_search.choose import CostModel, macs_model
from tasks.mask_search.grams import input_statistics
from tasks.mask_search.saliency import Statistics
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
UNIT_MULTIPLE = 8        # as in params.yaml
SENSED_IMAGES, SENSED_STEPS = 32, 10  # that tell how sensitive a layer is
CHOSEN_BY = UNIT_DENSITIES, UNIT_MULTIPLE, SENSED_IMAGES, SENSED_STEPS, CALIBRATION_NOISE
WHOLE_IMAGES, WHOLE_NOISES = 128, 2   # on which plans are compared as wholes


def pattern_plan(arm: Arm, lab: Lab, scores: Mapping[str, Tensor], statistics: Mapping[str, Statistics]) -> list[Option]:
    """N of M for each layer, or dense: of those that store no more bits than the arm's pattern in every layer, the one of least
    summed error. A layer's error is what it alone changes in images: a small one in a prediction may lead far from them."""
    _, m = parse_pattern(arm.grain)
    error = image_error(lab)

    def option(name: str, n: int) -> Option:
        pattern, score = f"{n}:{m}", scores[name]
        mask = grain_mask(score, pattern)
        found = masked_error(lab.teacher, {f"{name}.weight": mask}, error, statistics)
        return Option((name,), pattern, n / m, found, WEIGHT_BITS * score.numel() - stored_bits(mask, pattern, WEIGHT_BITS))

    places = [(name, n) for name in scores for n in range(1, m)]
    options = [option(*place) for place in track(places, len(places), f"{lab.name} {arm.name}: sensitivity")]
    return allocate(options, sum(option.saved for option in options if option.grain == arm.grain))


def unit_plan(arm: Arm, lab: Bench, error: Callable[[Lab], Callable[[], float]] | None = None) -> list[Option]:
    """Units that go, with 1 - density of the MACs of the blocks that have them, by the arm's allocation. error: that a cut is
    judged by, `image_error` if none is given; nothing is judged, and no Lab needed, where one density is asked for."""
    costs = layer_costs(lab.teacher)
    model, counted = macs_model(costs), {cost.name for cost in costs}
    blocks = {unit_layers(units, counted): units for units in hidden_units(lab.teacher.model)
              if arm.attention or not units.products}
    budget = (1 - arm.density) * model.dense({layer for layers in blocks for layer in layers})
    plan = one_density(lambda density: unjudged(unit_cuts(blocks, [density], UNIT_MULTIPLE), model), budget,
                       min(UNIT_DENSITIES))
    assert plan is not None, "every arm's density is above the lowest that is offered"
    if arm.allocation == "uniform":
        return plan
    cuts = unit_cuts(blocks, UNIT_DENSITIES, UNIT_MULTIPLE)
    statistics = input_statistics(lab.teacher, lab.calibration, {units.consumer for units in blocks.values()})
    errors = cut_errors(lab.teacher, cuts, (error or image_error)(lab), statistics)
    return allocate(priced(cuts, errors, model), budget if arm.allocation == "exact" else sum(option.saved for option in plan))


def unjudged(cuts: Iterable[Cut], model: CostModel) -> list[Option]:
    """The cuts with what they save, for a plan that does not ask for their errors."""
    return [Option(*astuple(cut), error=math.nan, saved=model.saved(cut.layers, cut.grain, cut.density)) for cut in cuts]


def image_error(lab: Lab, steps: int = SENSED_STEPS, images: int = SENSED_IMAGES,
                noise: int = CALIBRATION_NOISE) -> Callable[[], float]:
    """What has changed since now in images of the lab's teacher: its mean square over theirs. noise: the seed of theirs."""
    dense = Trajectories.of(lab.teacher, live(lab.teacher), steps, images, noise)
    return lambda: dense.error(live(lab.teacher))


def prediction_error(lab: Lab) -> Callable[[], float]:
    """What has changed since now in predictions, on the teacher's own samples, noised."""
    dense = predictions(lab.teacher, lab.calibration)
    return lambda: relative_error(predictions(lab.teacher, lab.calibration), dense)


def plan_errors(lab: Lab) -> dict[str, list[float]]:
    """How far plans of equal MACs lead from the teacher's images, untrained, on WHOLE_NOISES noises that none was chosen by:
    one density, and blocks chosen by what each alone changes in predictions and in images."""
    one, chosen = BLOCKS
    plans = {"one_density": unit_plan(one, lab), "by_predictions": unit_plan(chosen, lab, prediction_error),
             "by_images": unit_plan(chosen, lab)}
    layers = {units.consumer for units in hidden_units(lab.teacher.model)}
    statistics = input_statistics(lab.teacher, lab.calibration, layers)
    errors = [image_error(lab, STEPS, WHOLE_IMAGES, CALIBRATION_NOISE + 1 + other) for other in range(WHOLE_NOISES)]
    return {name: [masked_error(lab.teacher, cut_masks(lab.teacher.model, plan), error, statistics) for error in errors]
            for name, plan in plans.items()}
