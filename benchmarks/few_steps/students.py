"""A student of four evaluations: over the dense teacher at three times as many, and under masks and integers over itself."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.few_steps.lab import Lab, read_rows, read_weights, write_learned
from benchmarks.few_steps.solvers import judged, learned_folder, ranked
from benchmarks.results import made
from tasks.core import quality
from tasks.core.artifacts import Inputs, digest
from tasks.core.calibration import Calibration, ranges_on_trajectory
from tasks.core.denoiser import Denoiser
from tasks.core.learned import timesteps_of
from tasks.core.params import read_params, stage_params
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for, network, trajectory
from tasks.core.shipped import FOLDER, read_student
from tasks.core.sparsity import kept_shares
from tasks.core.unroll import PictureLoss, judge_samples
from tasks.distill.few_steps import Beginning, FewSteps, train_student
from tasks.mask_search import stage as mask_stage
from tasks.mask_search.grams import input_statistics
from tasks.mask_search.masks import unit_masks
from tasks.mask_search.saliency import made_up, saliency
from tasks.mask_search.sensitivity import cut_masks, layer_cuts
from tasks.package.variants import uniform_precision
from tasks.package.write import compressed_model
from tasks.pretrain_load.stage import TEACHERS
from tasks.runtime.masks import apply_masks, hidden_units
from tasks.runtime.solver import SolverStep

NFE, BASE = 4, ("dpm2m", 12)  # evaluations of the student; what it is compared with
NAME = f"few_{NFE}"
UNITS = 0.75                  # kept share of the hidden units of every block
CALIBRATION = 512             # states of the student's own trajectories, for masks and for ranges of activations
CALIBRATION_NOISE = 77_777
INTEGERS = "w8a8"


@dataclass(frozen=True, kw_only=True)
class Student:
    """In dense shapes."""

    weights: Mapping[str, Tensor]
    rows: tuple[SolverStep, ...]
    masks: Mapping[str, Tensor]
    grain: str | None


# ---- from the teacher alone ----

def student(lab: Lab, seed: int) -> Student:
    """Seed 0: the one that ships beside the teacher; others are trained here, for most of an hour each."""
    if seed == 0:
        recipe, weights = read_student(TEACHERS / lab.name, NAME, lab.teacher)
        found = Beginning(recipe.rows, weights, "shipped")
        return Student(weights=found.weights, rows=tuple(found.rows), masks={}, grain=None)
    folder = made(lab.folder / "students" / f"{NAME}-{seed}-{lab.sizes.student_steps}", partial(train, lab, seed))
    return Student(weights=read_weights(folder), rows=read_rows(folder), masks={}, grain=None)


def ships(lab: Lab) -> bool:
    return (TEACHERS / lab.name / FOLDER / f"{NAME}.safetensors").exists()


def train(lab: Lab, seed: int, out: Path) -> None:
    """As distill does from a learned solver on. The seed is that of the batches; the noises are the same for all."""
    beginning = Beginning(read_rows(learned_folder(lab, NFE)), {}, "a learned solver")
    how = replace(settings(lab), steps=lab.sizes.student_steps)
    found = train_student(lab.teacher, NFE, "dense", beginning, {}, lab.pairs(lab.sizes.student_noises), lab.search_net, how,
                          lab.distill.bf16, seed, work(lab, NAME, seed, how.steps))
    write_learned(found, out, weights=True)


def settings(lab: Lab) -> FewSteps:
    return replace(lab.distill.few_steps, start="teacher", held=lab.sizes.held)


def work(lab: Lab, *key: object) -> Inputs:
    """What a training needs of a stage's inputs: where its checkpoint lies."""
    return Inputs({}, digest([lab.name, *key]))


# ---- under masks ----

def masked(lab: Lab, grain: str) -> Student:
    """The shipped student under masks of its own weights, trained on for a short while."""
    folder = made(lab.folder / "students" / f"{NAME}-{grain.replace(':', '_')}-{lab.sizes.adapt_steps}",
                  partial(adapt, lab, grain))
    masks = {name: mask.bool() for name, mask in load_file(folder / "masks.safetensors").items()}
    return Student(weights=read_weights(folder), rows=read_rows(folder), masks=masks, grain=grain)


def adapt(lab: Lab, grain: str, out: Path) -> None:
    dense = student(lab, 0)
    masks, weights = pruned(lab, dense, grain)
    how = replace(settings(lab), steps=lab.sizes.adapt_steps, batch=lab.sizes.adapt_batch, ema_decay=0.98)
    beginning = Beginning(dense.rows, {**dense.weights, **weights}, NAME)
    found = train_student(lab.teacher, NFE, grain, beginning, masks, lab.pairs(), lab.search_net, how, lab.distill.bf16, 0,
                          work(lab, NAME, grain, how.steps))
    write_learned(found, out, weights=True)
    save_file({name: mask.to(torch.uint8) for name, mask in masks.items()}, out / "masks.safetensors")


def pruned(lab: Lab, dense: Student, grain: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> masks, and the weights that make up for what they prune; both as the stage mask_search finds them, but from states of
    the student's trajectories, and with one density for the units of all blocks."""
    how, denoiser = stage_params(mask_stage, read_params(scale=lab.sizes.scale)), network_of(lab, dense)
    statistics = input_statistics(denoiser, visited(denoiser, dense), mask_stage.layers_read(denoiser, how))
    if grain == "unit":
        masks = unit_masks(denoiser.model, {units.block: UNITS for units in hidden_units(denoiser.model)}, how.unit_multiple)
    else:
        layers = mask_stage.fitting_layers(denoiser, how.cover, [grain])[0][grain]
        masks = cut_masks(denoiser.model, layer_cuts(layers, grain, ()), lambda layer: saliency(
            denoiser.model.get_parameter(f"{layer}.weight"), statistics[layer], how.saliency))
    return masks, made_up(denoiser.model, masks, statistics)


@torch.inference_mode()
def visited(denoiser: Denoiser, dense: Student) -> Calibration:
    """States of the student's own trajectories."""
    images = range(CALIBRATION // NFE)
    noise, labels = (initial_noise(denoiser.sample_shape, images, CALIBRATION_NOISE), labels_for(images, denoiser.num_classes))
    states = list(trajectory(network(denoiser), denoiser.schedule, recipe_of(dense), noise, labels))
    times = [row.t for row in dense.rows]
    return Calibration(x=torch.cat([x for _, x, _ in states]),
                       t=torch.cat([torch.full((len(x),), times[step]) for step, x, _ in states]),
                       labels=None if labels is None else labels.repeat(len(states)))


def network_of(lab: Lab, one: Student) -> Denoiser:
    model = copy.deepcopy(lab.teacher.model)
    model.load_state_dict(one.weights)
    return Denoiser(model, lab.teacher.schedule)


def recipe_of(one: Student) -> Recipe:
    return Recipe(timesteps=timesteps_of(one.rows), solver="learned", rows=one.rows)


def compressed(lab: Lab, one: Student, token: str) -> tuple[Denoiser, Recipe]:
    """As a package has it: units cut out of its shapes, every layer at the precision."""
    denoiser = network_of(lab, one)
    shares = kept_shares(denoiser.model, one.grain, one.masks) if one.masks else {}
    recipe = replace(recipe_of(one), precision=uniform_precision(denoiser.prunable_layers(), token),
                     sparsity={"grain": one.grain, "density": shares} if one.masks else None)
    apply_masks(denoiser.model, one.masks)
    ranges = ranges_on_trajectory(denoiser, recipe, CALIBRATION, CALIBRATION_NOISE)
    model, _ = compressed_model(denoiser.model, recipe, ranges, one.masks, {})
    return Denoiser(model, denoiser.schedule), recipe


# ---- numbers ----

def over_more_steps(lab: Lab, seed: int) -> dict[str, float]:
    """FID of the student over DPM-Solver++ 2M's at three times as many evaluations of the dense teacher, best spacing."""
    solver, nfe = BASE
    base = judged(lab, ranked(lab, nfe, [solver])[0], lab.sizes.samples)
    one = student(lab, seed)
    own = lab.features(f"{NAME}-{seed}", recipe_of(one), lab.sizes.samples, network_of(lab, one))
    found = lab.difference(own, base)
    return {quality.fid_name(len(own)): quality.fid(own, lab.judge.reference),
            f"fid_{solver}_{nfe}": quality.fid(base, lab.judge.reference),
            f"{NAME}_over_{solver}_{nfe}": found.estimate, f"{NAME}_over_{solver}_{nfe}_upper95": found.upper95}


def over_few_steps(lab: Lab, grain: str | None, token: str) -> dict[str, float]:
    """FID of the student under masks (or none) and at a precision over its own without; and its loss on the held noises,
    of which that FID knows nothing."""
    alone = student(lab, 0)
    base = lab.features(f"{NAME}-0", recipe_of(alone), lab.sizes.samples, network_of(lab, alone))
    denoiser, recipe = compressed(lab, masked(lab, grain) if grain else alone, token)
    own = lab.features(variant(grain, token), recipe, lab.sizes.samples, denoiser)
    found, held = lab.difference(own, base), lab.pairs().split(lab.sizes.held)[1]
    loss = judge_samples(network(denoiser), denoiser.schedule, recipe, held, PictureLoss(lab.search_net, lab.how.loss))
    return {quality.fid_name(len(own)): quality.fid(own, lab.judge.reference), "over_few_steps": found.estimate,
            "over_few_steps_upper95": found.upper95, "held_loss": loss}


def variant(grain: str | None, token: str) -> str:
    return "_".join([NAME, *([grain.replace(":", "of")] if grain else []), token])
