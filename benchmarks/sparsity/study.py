"""One arm of the study: its masks, its training, what its samples are like. -> rows of results.csv, metric -> value."""

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.results import kept_features, made
from benchmarks.sparsity.arms import COMMON, STEPS, Arm, key
from benchmarks.sparsity.choice import CHOSEN_BY, pattern_plan, unit_plan
from benchmarks.sparsity.lab import (
    CALIBRATION_NOISE,
    Bench,
    Lab,
    device_of,
    live,
    moved,
    sample_features,
    uniform,
)
from benchmarks.sparsity.storage import reference_share, storage_share
from tasks.core import quality
from tasks.core.artifacts import digest, read_json, write_json
from tasks.core.calibration import predictions, relative_error
from tasks.core.checkpoint import Checkpoint
from tasks.core.cost import kept_share, layer_costs
from tasks.core.denoiser import Denoiser
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for, trajectory
from tasks.core.sparsity import grain_mask, kept_shares, parse_pattern
from tasks.distill.settings import Settings
from tasks.distill.train import Student, train
from tasks.mask_search.grams import input_statistics
from tasks.mask_search.masks import misfits
from tasks.mask_search.permute import permute_model
from tasks.mask_search.saliency import made_up, saliency
from tasks.mask_search.sensitivity import cut_masks
from tasks.runtime.masks import apply_masks, shrink_units
from tasks.runtime.precision import apply_precision, calibrate_ranges, live_precision

FIDELITY_STEPS = (50, 100)  # of the dense teacher, whose distance is the unit of fidelity
FIDELITY_SAMPLES = 2000     # on which it is measured
SECONDS = "seconds.json"    # beside masks that were chosen: CPU time of the choice
CALIBRATION_IMAGES = 16     # of a trajectory of STEPS steps: 320 states for the activation ranges of int8


# ---- masks ----

def masks_of(arm: Arm, lab: Bench, teacher: Denoiser) -> dict[str, Tensor]:
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


def kept_masks(arm: Arm, lab: Lab, teacher: Denoiser) -> dict[str, Tensor]:
    """`masks_of`; what takes minutes to choose is the same for all training seeds, so it is chosen once."""
    if arm.allocation == "uniform":
        return masks_of(arm, lab, teacher)

    def choose(out: Path) -> None:
        began = time.process_time()
        save_masks(masks_of(arm, lab, teacher), out)
        write_json(out / SECONDS, time.process_time() - began)

    return load_masks(made(masks_folder(arm, lab), choose))


def masks_folder(arm: Arm, lab: Lab) -> Path:
    of = digest([arm.grain, arm.density, arm.allocation, arm.saliency, arm.attention, arm.made_up, *CHOSEN_BY])[:8]
    return lab.folder / "masks" / f"{arm.name}-{of}"


def choice_seconds(arm: Arm, lab: Lab) -> float:
    """CPU time that choosing the arm's masks took, if they are kept; 0 before, and where nothing is chosen."""
    path = masks_folder(arm, lab) / SECONDS
    return read_json(path) if path.exists() else 0.0


def is_begun(arm: Arm, lab: Lab, seed: int) -> bool:
    """Whether its training has left a checkpoint, or a student."""
    folders = lab.folder / "students" / key(arm, seed), lab.folder / "checkpoints" / f"{key(arm, seed)}.pt"
    return any(path.exists() for path in folders)


def save_masks(masks: Mapping[str, Tensor], folder: Path) -> None:
    save_file({name: mask.cpu().to(torch.uint8) for name, mask in masks.items()}, folder / "masks.safetensors")


def load_masks(folder: Path) -> dict[str, Tensor]:
    return {name: mask.bool() for name, mask in load_file(folder / "masks.safetensors").items()}


# ---- training ----

def student_of(arm: Arm, lab: Lab, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """-> state_dict in dense shapes, frozen masks, numbers of the training. Trained once, then read from the work folder."""
    folder = lab.folder / "students" / key(arm, seed)
    if not folder.exists():
        found = trained(arm, lab, seed)
        partial = folder.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        save_file(found.weights, partial / "weights.safetensors")
        save_masks(found.masks, partial)
        curve = torch.tensor(found.curve or [(0, 0.0, 0.0)], dtype=torch.float64)
        save_file({"curve": curve}, partial / "curve.safetensors")
        partial.rename(folder)
    loss, flips = load_file(folder / "curve.safetensors")["curve"][-1, 1:].tolist()
    return load_file(folder / "weights.safetensors"), load_masks(folder), {"loss_last": loss, "flip_rate_last": flips}


def trained(arm: Arm, lab: Lab, seed: int) -> Student:
    steps = 0 if arm.method is None else arm.steps
    dropout = {} if lab.teacher.has_null_label else {"label_dropout": 0.0}
    settings = Settings(**{**COMMON, **dropout, **arm.settings, "steps": steps, "seed": seed})
    checkpoint = Checkpoint(lab.folder / "checkpoints", key(arm, seed))
    teacher = permuted(lab.teacher, arm.grain) if arm.permute else lab.teacher
    masks, start = kept_masks(arm, lab, teacher), teacher.model.state_dict()
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


def network_of(lab: Bench, arm: Arm, weights: dict[str, Tensor], masks: dict[str, Tensor]) -> Denoiser:
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


def costs(lab: Bench, arm: Arm, masks: dict[str, Tensor]) -> dict[str, float]:
    """Shares of the dense model's MACs, attention products and dense layers counted, of its layers' weights, and of their bits
    with index; references of the masked layers to partial sums."""
    kept, layers = kept_shares(lab.teacher.model, arm.grain, masks) if masks else {}, layer_costs(lab.teacher)
    found = {f"{counted}_share": kept_share(layers, kept, counted) for counted in ("macs", "weights")}
    if masks:
        found |= {"storage_share": storage_share(layers, masks, arm.grain, kept),
                  "reference_share": reference_share(layers, masks, arm.grain)}
    return found


def judged(lab: Lab, name: str, student: Denoiser, recipe: Recipe, samples: int, seed: int) -> dict[str, float]:
    """FID of `samples` samples on the report net, and fidelity to the dense teacher at the same steps and noise."""
    found = kept_features(lab.folder, f"{name}-{samples}", lambda: sample_features(lab, student, recipe, samples, seed, name))
    dense = teacher_features(lab, STEPS, samples, seed)
    return {quality.fid_name(samples): quality.fid(found, lab.judge.reference),
            "fidelity": quality.paired_distance(found, dense) / fidelity_unit(lab)}


def fidelity_unit(lab: Lab) -> float:
    """Distance of the teacher's images at one to those at the other number of FIDELITY_STEPS."""
    return quality.paired_distance(*(teacher_features(lab, steps, FIDELITY_SAMPLES) for steps in FIDELITY_STEPS))


def teacher_features(lab: Lab, steps: int, samples: int, seed: int = 0) -> np.ndarray:
    name = f"teacher-{steps}-{samples}" + (f"-{seed}" if seed else "")
    return kept_features(lab.folder, name, lambda: sample_features(lab, lab.teacher, uniform(lab, steps), samples, seed,
                                                            f"{lab.name} {name}"))


def quantise(student: Denoiser, recipe: Recipe, lab: Lab) -> None:
    """Every Linear and Conv2d to int8, with activation ranges along the student's own trajectories."""
    indices = range(CALIBRATION_IMAGES)
    noise, labels = initial_noise(student.sample_shape, indices, CALIBRATION_NOISE), labels_for(indices, student.num_classes)
    states = trajectory(live(student), student.schedule, recipe, noise, labels)
    there = device_of(student)
    batches = [(x.to(there), torch.full((len(x),), recipe.timesteps[step], device=there), moved(labels, there))
               for step, x, _ in states]
    ranges = calibrate_ranges(student.model, batches)
    apply_precision(student.model, dict.fromkeys(ranges, "w8a8"), ranges)
