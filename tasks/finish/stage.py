"""The chosen model trained once more as it will ship: rounded, masked, cached, along its own trajectory, with its solver.

Reads: data (the feature net that guides the search), pretrain_load (teacher), solver_learn (pairs), distill (students, masks),
evolve (recipe, weights, integers whose rounding was learned).
Writes: recipe.json, the recipe with solver and forecast as they were learned on; weights.json, whose weights these are; where
training found something better, finished.safetensors (dense shapes, masks applied) and ranges.json, of the inputs as they were
learned; curve.csv, held.csv. Report: the loss on held noises of what came and of what goes, each computed as a package computes
it. Nothing worse than what came is handed on; it is said.
Left out: a forecast that is a formula (none, taylor) stays one; zero points of inputs and the clipping of weights stay.
"""

import copy
import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks.core.artifacts import Inputs, Report, read_json, write_json
from tasks.core.calibration import ranges_on_trajectory
from tasks.core.denoiser import Denoiser, load
from tasks.core.learned import LearnedSolver, timesteps_of
from tasks.core.pairs import Pairs
from tasks.core.params import check_range
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import cached_network
from tasks.core.unroll import NUMBERS, How, PictureLoss, Weights, check_training, is_number, judge_samples, train_along
from tasks.data.features import load_feature_net
from tasks.finish.rounded import install, learned_ranges
from tasks.runtime.cache import remove_cache
from tasks.runtime.precision import SIMULATED, Integers, Ranges, apply_precision, remove_precision
from tasks.runtime.rounding import read_integers
from tasks.runtime.solver import recipe_steps

INPUTS = ("data", "pretrain_load", "solver_learn", "distill", "evolve")
RANGES = "ranges.json"


@dataclass(frozen=True, kw_only=True)
class Params:
    steps: int              # 0: what came is handed on
    batch: int
    lr: float               # of the weights
    solver_lr: float
    warmup: int
    ema_decay: float
    judge_every: int
    held: int               # pairs that are only judged on
    recompute: bool         # evaluations for the gradient, for less memory
    calibration_states: int # of the recipe's own trajectories, that ranges of inputs come from
    loss: Weights
    seed: int

    def __post_init__(self):
        check_range("finish.calibration_states", self.calibration_states, 128, 10**6)
        check_training("finish", self)

    @property
    def how(self) -> How:
        return How(steps=self.steps, batch=self.batch, lr=self.lr, images_lr=3 * self.lr, solver_lr=self.solver_lr,
                   warmup=self.warmup, ema_decay=self.ema_decay, judge_every=self.judge_every, bf16=False, seed=self.seed,
                   loss=self.loss, recompute=self.recompute)


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    recipe = Recipe.from_json(read_json(inputs["evolve"] / "recipe.json"))
    weights = read_json(inputs["evolve"] / "weights.json")
    denoiser, masks = chosen(weights, inputs)
    net, pairs = load_feature_net(inputs["data"], "search"), Pairs.read(inputs["solver_learn"])
    learn, held = pairs.split(params.held)
    loss = PictureLoss(net, params.loss)
    ranges = ranges_on_trajectory(denoiser, recipe, params.calibration_states, params.seed)
    came = shipped_loss(denoiser, recipe, ranges, held, loss, learned_integers(weights, inputs))

    student = Denoiser(copy.deepcopy(denoiser.model), denoiser.schedule)
    install(student.model, recipe.precision, ranges)
    solver = LearnedSolver(denoiser.schedule, recipe_steps(denoiser.schedule.config, recipe))
    plan = live_forecast(student.model, recipe.cache)
    found = train_along(student, solver, learn, held, net, params.how, inputs.checkpoint("finish"), "finish", masks,
                        plan and (lambda one: cached_network(one, replace(recipe, cache=plan))))
    finished = Denoiser(copy.deepcopy(denoiser.model), denoiser.schedule)
    trained = {name: value for name, value in found.weights.items() if not is_number(name)}
    finished.model.load_state_dict(trained)
    rows = found.solver.rows()
    now = replace(recipe, solver="learned", rows=rows, timesteps=timesteps_of(rows), cache=settled(plan))
    learned = learned_ranges(student.model)
    went = shipped_loss(finished, now, learned, held, loss)

    kept = found.kept_start or not went < came  # a loss that is no number is not less
    print(f"finish: loss on held noises, as it ships: {came:.4f} -> {went:.4f}"
          + ("; what came is handed on as it is" if kept else ""), flush=True)
    write_json(out / "recipe.json", (recipe if kept else now).to_json())
    write_json(out / "weights.json", {**weights, "finished": not kept})
    if not kept:
        save_file(trained, out / "finished.safetensors")
        write_json(out / RANGES, learned)
    for name, rows in (("curve", found.curve), ("held", found.held)):
        with open(out / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("step", "loss"), *rows])
    return Report({"loss_before": came, "loss_trained": went, "kept_start": kept, "steps": found.at})


def live_forecast(model: nn.Module, plan: CachePlan | None) -> CachePlan | None:
    """The plan with the weights of its learned forecast as parameters, which are put on the model so that they are trained."""
    if plan is None or plan.weights is None:
        return plan
    table = [[nn.Parameter(torch.tensor(found, dtype=torch.float64)) if found else () for found in row] for row in plan.weights]
    model.add_module(NUMBERS, nn.ParameterList(found for row in table for found in row if len(found)))
    return replace(plan, weights=table)


def settled(plan: CachePlan | None) -> CachePlan | None:
    """The same plan with numbers again."""
    if plan is None or plan.weights is None:
        return plan
    return replace(plan, weights=[[tuple(found.tolist()) if len(found) else () for found in row] for row in plan.weights])


def chosen(weights: Mapping, inputs: Inputs) -> tuple[Denoiser, dict[str, Tensor]]:
    """The network with the weights that evolve chose, its masks live, and these by parameter name."""
    denoiser = load(inputs["pretrain_load"] / "teacher")
    if weights["file"]:
        denoiser.model.load_state_dict(load_file(inputs["distill"] / weights["file"]))
    masks = {name: mask.bool() for name, mask in load_file(inputs["distill"] / weights["masks"]).items()} \
        if weights["masks"] else {}
    with torch.no_grad():
        for name, mask in masks.items():
            denoiser.model.get_parameter(name).mul_(mask)
    return denoiser, masks


def learned_integers(weights: Mapping, inputs: Inputs) -> Integers:
    """Those that `package` takes where the weights go on as they came; none where the search learned no rounding."""
    return read_integers(inputs["evolve"] / "rounding" / f"{Path(weights['file'] or 'teacher').stem}.safetensors")


def shipped_loss(denoiser: Denoiser, recipe: Recipe, ranges: Ranges, held: Pairs, loss: PictureLoss,
                 integers: Integers = MappingProxyType({})) -> float:
    apply_precision(denoiser.model, recipe.precision, ranges, SIMULATED, integers)
    try:
        return judge_samples(cached_network(denoiser, recipe), denoiser.schedule, recipe, held, loss)
    finally:
        remove_cache(denoiser.model)
        remove_precision(denoiser.model)
