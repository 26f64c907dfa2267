"""One arm of the study: its masks, its training, what its samples are like. -> rows of results.csv, metric -> value."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.sparsity.arms import COMMON, STEPS, Arm, key
from benchmarks.sparsity.lab import Lab, kept_features, sample_features, uniform
from benchmarks.sparsity.storage import WEIGHT_BITS, reference_share, storage_share
from tasks.core import quality
from tasks.core.calibration import predictions, relative_error
from tasks.core.checkpoint import Checkpoint
from tasks.core.cost import layer_costs
from tasks.core.denoiser import Denoiser
from tasks.core.progress import track
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for, network, trajectory
from tasks.core.sparsity import grain_mask, kept_shares, parse_pattern, stored_bits
from tasks.distill.settings import Settings
from tasks.distill.train import Student, train
from tasks.mask_search.allocate import Option, allocate, around
from tasks.mask_search.allocate import uniform as one_density
from tasks.mask_search.choose import macs_model
from tasks.mask_search.masks import misfits
from tasks.mask_search.permute import permute_model
from tasks.mask_search.saliency import Statistics, input_statistics, made_up, saliency
from tasks.mask_search.sensitivity import Trajectories, cut_errors, cut_masks, masked, priced, unit_cuts, unit_layers
from tasks.runtime.masks import apply_masks, hidden_units, shrink_units
from tasks.runtime.precision import apply_precision, calibrate_ranges, live_precision

UNIT = (50, 100)         # steps of the dense teacher whose distance is the unit of fidelity
UNIT_SAMPLES = 2000      # on which it is measured
UNIT_DENSITIES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
UNIT_OFFERED = tuple(i / 32 for i in range(1, 32))  # to the allocation, errors in between interpolated
UNIT_RADII = (1 / 16, 1 / 8, 3 / 16, 1 / 4)         # of densities around the one for all, see `around`
UNIT_IMAGES = 256        # on which plans are compared as wholes
UNIT_MULTIPLE = 8        # as in params.yaml
SENSED_IMAGES, SENSED_STEPS = 32, 10  # that tell how sensitive a layer is
CALIBRATION_NOISE = 77_777  # of all images that something is chosen by; none that is judged starts from it
CALIBRATION_IMAGES = 16  # of a trajectory of STEPS steps: 320 states for the activation ranges of int8


# ---- masks ----

def masks_of(arm: Arm, lab: Lab, teacher: Denoiser) -> dict[str, Tensor]:
    """Of this teacher's weights, by parameter name; what the grain does not divide stays dense and is named."""
    if arm.grain is None:
        return {}
    if arm.grain == "unit":
        return cut_masks(teacher.model, unit_plan(arm, lab))
    layers = teacher.prunable_layers()
    unfit = misfits(layers, arm.grain)
    for name, reason in unfit.items():
        print(f"{lab.name} {arm.name}: {name} stays dense: {reason}", flush=True)
    statistics = {} if arm.saliency == "magnitude" else input_statistics(teacher, lab.calibration, layers.keys() - unfit)
    scores = {name: saliency(layer.weight, statistics.get(name), arm.saliency) for name, layer in layers.items()
              if name not in unfit}
    if arm.allocation == "uniform":
        return {f"{name}.weight": grain_mask(score, arm.grain, arm.density) for name, score in scores.items()}
    return {f"{name}.weight": grain_mask(scores[name], option.grain, option.density)
            for option in pattern_plan(arm, lab, scores, statistics) for name in option.layers}


def pattern_plan(arm: Arm, lab: Lab, scores: Mapping[str, Tensor], statistics: Mapping[str, Statistics]) -> list[Option]:
    """N of M for each layer, or dense: of those that store no more bits than the arm's pattern in every layer, the one of least
    summed error. A layer's error is what it alone changes in images: a small one in a prediction may lead far from them."""
    _, m = parse_pattern(arm.grain)
    sensed = Trajectories.of(lab.teacher, uniform(lab, SENSED_STEPS), SENSED_IMAGES, CALIBRATION_NOISE)

    def option(name: str, n: int) -> Option:
        pattern, score = f"{n}:{m}", scores[name]
        mask = grain_mask(score, pattern)
        with masked(lab.teacher, {f"{name}.weight": mask}, statistics):
            error = sensed.error(lab.teacher)
        return Option((name,), pattern, n / m, error, WEIGHT_BITS * score.numel() - stored_bits(mask, pattern, WEIGHT_BITS))

    places = [(name, n) for name in scores for n in range(1, m)]
    options = [option(*place) for place in track(places, len(places), f"{lab.name} {arm.name}: sensitivity")]
    return allocate(options, sum(option.saved for option in options if option.grain == arm.grain))


def unit_plan(arm: Arm, lab: Lab) -> list[Option]:
    """Units of feed-forwards and resnets that go: 1 - density of their MACs, chosen block by block or one density for all."""
    costs = layer_costs(lab.teacher)
    model, counted = macs_model(costs), {cost.name for cost in costs}
    blocks = {unit_layers(units, counted): units for units in hidden_units(lab.teacher.model) if not units.products}
    cuts = unit_cuts(blocks, UNIT_DENSITIES, UNIT_MULTIPLE)
    statistics = input_statistics(lab.teacher, lab.calibration, {units.consumer for units in blocks.values()})
    errors = cut_errors(lab.teacher, cuts, lab.calibration, predictions(lab.teacher, lab.calibration), statistics)
    budget = (1 - arm.density) * model.dense({layer for layers in blocks for layer in layers})
    plan = one_density(lambda density: priced(unit_cuts(blocks, [density], UNIT_MULTIPLE), errors, model), budget,
                       min(UNIT_DENSITIES))
    assert plan is not None, "every arm's density is above the lowest that is offered"
    if arm.allocation == "uniform":
        return plan
    options = priced(unit_cuts(blocks, UNIT_OFFERED, UNIT_MULTIPLE), errors, model)
    ways = around(options, plan, sum(option.saved for option in plan), UNIT_RADII)
    trajectories = Trajectories.of(lab.teacher, uniform(lab, STEPS), UNIT_IMAGES, CALIBRATION_NOISE)

    def strays(way: list[Option]) -> float:
        with masked(lab.teacher, cut_masks(lab.teacher.model, way), statistics):
            return trajectories.error(lab.teacher)

    return min(ways, key=strays)


# ---- training ----

def student_of(arm: Arm, lab: Lab, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """-> state_dict in dense shapes, frozen masks, numbers of the training. Trained once, then read from the work folder."""
    folder = lab.folder / "students" / key(arm, seed)
    if not folder.exists():
        found = trained(arm, lab, seed)
        partial = folder.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        save_file(found.weights, partial / "weights.safetensors")
        save_file({name: mask.to(torch.uint8) for name, mask in found.masks.items()}, partial / "masks.safetensors")
        curve = torch.tensor(found.curve or [(0, 0.0, 0.0)], dtype=torch.float64)
        save_file({"curve": curve}, partial / "curve.safetensors")
        partial.rename(folder)
    masks = {name: mask.bool() for name, mask in load_file(folder / "masks.safetensors").items()}
    loss, flips = load_file(folder / "curve.safetensors")["curve"][-1, 1:].tolist()
    return load_file(folder / "weights.safetensors"), masks, {"loss_last": loss, "flip_rate_last": flips}


def trained(arm: Arm, lab: Lab, seed: int) -> Student:
    steps = 0 if arm.method is None else arm.steps
    dropout = {} if lab.teacher.architecture == "dit" else {"label_dropout": 0.0}  # UNet2DModel has no null label
    settings = Settings(**{**COMMON, **dropout, **arm.settings, "steps": steps, "seed": seed})
    checkpoint = Checkpoint(lab.folder / "checkpoints", key(arm, seed))
    teacher = permuted(lab.teacher, arm.grain) if arm.permute else lab.teacher
    masks, start = masks_of(arm, lab, teacher), teacher.model.state_dict()
    if arm.made_up:
        layers = [name.removesuffix(".weight") for name, mask in masks.items() if name.endswith(".weight") and mask.ndim > 1]
        start |= made_up(teacher.model, masks, input_statistics(teacher, lab.calibration, layers))
    student = train(lab.teacher, masks, arm.grain or "fine", arm.method or "fixed", lab.images, settings, checkpoint,
                    f"{lab.name} {arm.name} seed {seed}", start)
    checkpoint.clear()
    return student


def permuted(teacher: Denoiser, grain: str) -> Denoiser:
    """The same function, its hidden units in an order in which N:M keeps more of the weights' magnitude."""
    other = Denoiser(copy.deepcopy(teacher.model), teacher.schedule)
    permute_model(other.model, *parse_pattern(grain), {name: layer.weight.detach().abs()
                                                       for name, layer in other.prunable_layers().items()})
    return other


def network_of(lab: Lab, arm: Arm, weights: dict[str, Tensor], masks: dict[str, Tensor]) -> Denoiser:
    """The student as it would ship: units are cut out of its shapes."""
    model = copy.deepcopy(lab.teacher.model)
    model.load_state_dict(weights)
    if arm.grain == "unit":
        shrink_units(model, masks)
    elif masks:
        apply_masks(model, masks)
    return Denoiser(model.eval().requires_grad_(False), lab.teacher.schedule)


# ---- numbers ----

def measure(arm: Arm, lab: Lab, seed: int, samples: int) -> dict[str, float]:
    """Everything about one arm but its comparison with others."""
    weights, masks, numbers = student_of(arm, lab, seed)
    student, recipe = network_of(lab, arm, weights, masks), uniform(lab, STEPS)
    reference = predictions(lab.teacher, lab.held)
    numbers |= {"prediction_error": relative_error(predictions(student, lab.held), reference)}
    numbers |= costs(lab, arm, masks)
    numbers |= judged(lab, key(arm, seed), student, recipe, samples, seed)
    if arm.int8:
        quantise(student, recipe, lab)
        recipe = replace(recipe, precision=live_precision(student.model))
        quantised = judged(lab, f"{key(arm, seed)}-int8", student, recipe, samples, seed)
        numbers |= {f"{name}_int8": value for name, value in quantised.items()}
    return numbers


def costs(lab: Lab, arm: Arm, masks: dict[str, Tensor]) -> dict[str, float]:
    """Shares of the dense model's MACs, attention products and dense layers counted, of its layers' weights, and of their bits
    with index; references of the masked layers to partial sums."""
    kept, layers = kept_shares(lab.teacher.model, arm.grain, masks) if masks else {}, layer_costs(lab.teacher)
    found = {share: sum(getattr(c, counted) * kept.get(c.name, 1.0) for c in layers) / sum(getattr(c, counted) for c in layers)
             for share, counted in (("macs_share", "macs"), ("weights_share", "weights"))}
    if masks:
        found |= {"storage_share": storage_share(layers, masks, arm.grain, kept),
                  "reference_share": reference_share(layers, masks, arm.grain)}
    return found


def judged(lab: Lab, name: str, student: Denoiser, recipe: Recipe, samples: int, seed: int) -> dict[str, float]:
    """FID of `samples` samples on the report net, and fidelity to the dense teacher at the same steps and noise."""
    found = kept_features(lab, f"{name}-{samples}", lambda: sample_features(lab, student, recipe, samples, seed, name))
    dense = teacher_features(lab, STEPS, samples, seed)
    unit = quality.paired_distance(*(teacher_features(lab, steps, UNIT_SAMPLES) for steps in UNIT))
    return {quality.fid_name(samples): quality.fid(found, lab.judge.reference),
            "fidelity": quality.paired_distance(found, dense) / unit}


def teacher_features(lab: Lab, steps: int, samples: int, seed: int = 0) -> np.ndarray:
    name = f"teacher-{steps}-{samples}" + (f"-{seed}" if seed else "")
    return kept_features(lab, name, lambda: sample_features(lab, lab.teacher, uniform(lab, steps), samples, seed,
                                                            f"{lab.name} {name}"))


def quantise(student: Denoiser, recipe: Recipe, lab: Lab) -> None:
    """Every Linear and Conv2d to int8, with activation ranges along the student's own trajectories."""
    indices = range(CALIBRATION_IMAGES)
    noise, labels = initial_noise(student.sample_shape, indices, CALIBRATION_NOISE), labels_for(indices, student.num_classes)
    states = trajectory(network(student), student.schedule, recipe, noise, labels)
    batches = [(x, torch.full((len(x),), recipe.timesteps[step]), labels) for step, x, _ in states]
    ranges = calibrate_ranges(student.model, batches)
    apply_precision(student.model, dict.fromkeys(ranges, "w8a8"), ranges)
