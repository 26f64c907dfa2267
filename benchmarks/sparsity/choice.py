"""What an arm prunes where it is not told for every layer alike: N:M layer by layer, units block by block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.sparsity.arms import STEPS, Arm
from benchmarks.sparsity.lab import CALIBRATION_NOISE, Lab, live, uniform
from benchmarks.sparsity.storage import WEIGHT_BITS
from tasks.core.calibration import predictions
from tasks.core.cost import layer_costs
from tasks.core.denoiser import Denoiser
from tasks.core.progress import track
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for, sample
from tasks.core.sparsity import grain_mask, parse_pattern, stored_bits
from tasks.mask_search.allocate import Cut, Option, allocate
from tasks.mask_search.allocate import uniform as one_density
from tasks.mask_search.choose import macs_model
from tasks.mask_search.saliency import Statistics, input_statistics
from tasks.mask_search.sensitivity import Errors, cut_errors, cut_masks, masked, priced, unit_cuts, unit_layers
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
    sensed = Trajectories.of(lab.teacher, uniform(lab, SENSED_STEPS), SENSED_IMAGES, CALIBRATION_NOISE)

    def option(name: str, n: int) -> Option:
        pattern, score = f"{n}:{m}", scores[name]
        mask = grain_mask(score, pattern)
        error = sensed.error_with(lab.teacher, {f"{name}.weight": mask}, statistics)
        return Option((name,), pattern, n / m, error, WEIGHT_BITS * score.numel() - stored_bits(mask, pattern, WEIGHT_BITS))

    places = [(name, n) for name in scores for n in range(1, m)]
    options = [option(*place) for place in track(places, len(places), f"{lab.name} {arm.name}: sensitivity")]
    return allocate(options, sum(option.saved for option in options if option.grain == arm.grain))


def unit_plan(arm: Arm, lab: Lab) -> list[Option]:
    """Units of feed-forwards and resnets that go: of 1 - density of their MACs, by the arm's allocation."""
    costs = layer_costs(lab.teacher)
    model, counted = macs_model(costs), {cost.name for cost in costs}
    blocks = {unit_layers(units, counted): units for units in hidden_units(lab.teacher.model) if not units.products}
    cuts = unit_cuts(blocks, UNIT_DENSITIES, UNIT_MULTIPLE)
    statistics = input_statistics(lab.teacher, lab.calibration, {units.consumer for units in blocks.values()})
    budget = (1 - arm.density) * model.dense({layer for layers in blocks for layer in layers})
    if arm.allocation == "exact":
        return allocate(priced(cuts, image_errors(arm, lab, cuts, statistics), model), budget)
    errors = cut_errors(lab.teacher, cuts, lab.calibration, predictions(lab.teacher, lab.calibration), statistics)
    plan = one_density(lambda density: priced(unit_cuts(blocks, [density], UNIT_MULTIPLE), errors, model), budget,
                       min(UNIT_DENSITIES))
    assert plan is not None, "every arm's density is above the lowest that is offered"
    if arm.allocation == "uniform":
        return plan
    options = priced(unit_cuts(blocks, UNIT_OFFERED, UNIT_MULTIPLE), errors, model)
    ways = around(options, plan, sum(option.saved for option in plan), UNIT_RADII)
    whole = Trajectories.of(lab.teacher, uniform(lab, STEPS), UNIT_IMAGES, CALIBRATION_NOISE)
    return min(ways, key=lambda way: whole.error_with(lab.teacher, cut_masks(lab.teacher.model, way), statistics))


def image_errors(arm: Arm, lab: Lab, cuts: Sequence[Cut], statistics: Mapping[str, Statistics]) -> Errors:
    """What each cut alone changes in images, as in `pattern_plan`."""
    sensed, errors = Trajectories.of(lab.teacher, uniform(lab, SENSED_STEPS), SENSED_IMAGES, CALIBRATION_NOISE), {}
    for cut in track(cuts, len(cuts), f"{lab.name} {arm.name}: sensitivity"):
        error = sensed.error_with(lab.teacher, cut_masks(lab.teacher.model, [cut]), statistics)
        errors.setdefault((cut.layers, cut.grain), {})[cut.density] = error
    return errors


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


@dataclass(frozen=True)
class Trajectories:
    """Images that the dense model samples: how far from them does a plan as a whole lead?"""

    recipe: Recipe
    noise: Tensor
    labels: Tensor | None
    images: Tensor

    @classmethod
    def of(cls, denoiser: Denoiser, recipe: Recipe, n: int, seed: int) -> "Trajectories":
        noise, labels = initial_noise(denoiser.sample_shape, range(n), seed), labels_for(range(n), denoiser.num_classes)
        return cls(recipe, noise, labels, sample(live(denoiser), denoiser.schedule, recipe, noise, labels))

    def error_with(self, denoiser: Denoiser, masks: Mapping[str, Tensor], statistics: Mapping[str, Statistics]) -> float:
        """Mean square of what the plan `masked` changes in the images. The model is left as it was."""
        with masked(denoiser, masks, statistics):
            found = sample(live(denoiser), denoiser.schedule, self.recipe, self.noise, self.labels)
        return (found - self.images).square().mean().item()
