"""Choose what to zero: 2:4 in every covered layer, and whole units under a budget; and say which of them pays on the goal.

Reads: pretrain_load (teacher/, bank.npy, bank_labels.npy), profile (layers.csv, model.csv).
Writes: masks.safetensors (`<grain>/<parameter>`, uint8; grain 2:4, and unit if any block has units that can go),
weights.safetensors (`<grain>/<parameter>`: the weights under these masks that give each layer's outputs best), density.csv
(grain, layer, density), choice.json:
  chosen, why, by_target, predicted: which of the two mask sets costs least on each target;
  budget: what each plan saves, and counted in what: for goal.target latency the profile's us (MACs where units save too little
  time), bitops MACs, size bits with index;
  plans: units allocated block by block (that mask set), all grains mixed, and the uniform opponent of each at the same budget:
  grain and density of each pruned layer, what it saves, cost against dense, error predicted and measured.
Errors are those of images sampled from fixed noise, against the teacher's; of plans and of the sensitivity table they are had
with weights that make up for the cut ones.
Report: per mask set one-shot error, the same with those weights, density and MACs; the plans; the sensitivity table; why a
layer was left dense.
Left out: training of the mixed plan (students are of one grain); whole blocks as units; permutation of channels before 2:4:
`permute.py` has it, and the arm `one_shot_permuted` of benchmarks/sparsity what it is worth.
"""

import copy
import csv
import functools
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tasks.core import denoiser as denoisers
from tasks.core.artifacts import Inputs, Report, write_json
from tasks.core.calibration import Calibration, noised
from tasks.core.cost import layer_costs
from tasks.core.denoiser import Denoiser
from tasks.core.params import Goal, check_choice, check_range, suggestion
from tasks.core.sampler import network
from tasks.core.sparsity import GRAINS, kept_shares, mask_density
from tasks.mask_search.allocate import TOLERANCE, Cut, Option, ceiling
from tasks.mask_search.choose import CostModel, choose, cost_models, macs_model, storage_model
from tasks.mask_search.grams import bounded_statistics, check_widths
from tasks.mask_search.masks import covered, granule, kept_count, misfit, misfits
from tasks.mask_search.plans import Plan, describe, make_plans
from tasks.mask_search.saliency import KINDS, made_up, saliency
from tasks.mask_search.sensitivity import (
    Errors,
    Trajectories,
    cut_errors,
    cut_masks,
    layer_cuts,
    masked_error,
    priced,
    unit_cuts,
    unit_layers,
)
from tasks.runtime.masks import HiddenUnits, hidden_units

INPUTS = ("pretrain_load", "profile")
TARGETS = ("latency", "bitops", "size")
BASELINE = "2:4"  # the paper's: one pattern in every covered layer
PATTERN = re.compile("([1-9][0-9]*)of([1-9][0-9]*)")  # N:M in params.yaml: a plain string in YAML 1.1 and 1.2


@dataclass(frozen=True, kw_only=True)
class Params:
    cover: tuple[str, ...]        # patterns of the layer paths that 2:4 and `grains` cover; all else stays dense
    densities: tuple[float, ...]  # kept shares of a block's units that are tried, besides 1
    grains: tuple[str, ...]       # tokens of what is tried in each covered layer for the mixed plan, besides units
    grain_densities: tuple[float, ...]  # kept shares of those that are no N:M
    unit_share: float             # share of the cost of all blocks, on goal.target, that every plan saves
    unit_multiple: int            # kept units come in multiples of this
    saliency: str                 # whose largest values stay, of all grains but units: magnitude | activation | second_order
    images: int                   # on which each cut's error is measured, the teacher's from the same noise beside them
    steps: int                    # of DDIM that they are sampled with
    inputs: int                   # teacher samples whose inputs to each layer weights are made up on
    gram_mb: int                  # MiB of these inputs' Gram matrices in memory; changes no result
    min_gain: float               # least predicted gain on the target, as a share of dense, that makes a grain pay
    backend: str                  # whose times in the profile count
    batch: int
    seed: int                     # of the noise of both
    goal: Goal

    def __post_init__(self):
        for key in ("densities", "grain_densities"):
            if not getattr(self, key):
                raise ValueError(f"mask_search.{key}: empty; at least one kept share is needed, such as 0.5")
            for density in getattr(self, key):
                check_range(f"mask_search.{key}", density, 0.01, 0.99)
        for token in self.grains:
            check_grain("mask_search.grains", token)
        check_choice("mask_search.saliency", self.saliency, KINDS)
        for key, low, high in (("unit_share", 0.01, 0.99), ("unit_multiple", 1, 1024), ("images", 1, 10**6),
                               ("steps", 1, 1000), ("inputs", 1, 10**6), ("gram_mb", 1, 10**6), ("min_gain", 0, 1),
                               ("batch", 1, 65_536), ("seed", 0, 2**31)):
            check_range(f"mask_search.{key}", getattr(self, key), low, high)
        if (most := round(1 - min(self.densities), 4)) < self.unit_share:
            raise ValueError(f"mask_search.unit_share: {self.unit_share} is more than densities {list(self.densities)} remove, "
                             f"{most} at most")


def check_grain(key: str, token: str) -> None:
    """NofM with N < M, or one of `tasks.core.sparsity.GRAINS`."""
    if ":" in token:
        raise ValueError(f"{key}: {token!r} is written {token.replace(':', 'of')} here: `dvc exp run -S` drops the quotes "
                         f"of what it writes, and a bare {token} in a list is no YAML")
    pattern = PATTERN.fullmatch(token)
    if not pattern and token not in GRAINS:
        raise ValueError(f"{key}: {token!r} is not one of {', '.join(GRAINS)}, NofM such as 2of4{suggestion(token, GRAINS)}")
    if pattern and int(pattern[1]) >= int(pattern[2]):
        raise ValueError(f"{key}: {token} removes nothing; N of NofM is below M")


def grain_of(token: str) -> str:
    """The grain that a token of params.yaml names: `2of4` -> `2:4`, its name everywhere else; the others are their own."""
    return PATTERN.sub(r"\1:\2", token)


def preflight(params: Params, known: dict) -> None:
    """What the teacher's shapes alone decide. known: as in `tasks.core.params.look_ahead`."""
    if (teacher := known["pretrain_load"]) is None:
        return
    layers = teacher.prunable_layers()
    wanted = {name: layers[name] for name in covered(layers, params.cover)}
    if len(misfits(wanted, BASELINE)) == len(wanted):
        raise ValueError(f"mask_search.cover: {', '.join(params.cover)} match no layer whose inputs are a multiple of 4, as "
                         f"{BASELINE} wants them")
    check_densities(hidden_units(teacher.model), params)
    check_memory(teacher, params)
    if params.goal.target != "latency":  # times are not known yet
        check_reach(teacher, params)


def check_reach(teacher: Denoiser, params: Params) -> None:
    """Whether removed units can save unit_share of MACs or storage, as `budget_of` says it. teacher: on the meta device."""
    costs = layer_costs(Denoiser(copy.deepcopy(teacher.model).to("meta"), teacher.schedule))
    model = macs_model(costs) if params.goal.target == "bitops" else storage_model(costs)
    counted = {cost.name for cost in costs}
    blocks = {unit_layers(units, counted): units for units in hidden_units(teacher.model)}
    cuts = unit_cuts(blocks, params.densities, params.unit_multiple)
    if cuts:
        budget_of([Option(cut.layers, cut.grain, cut.density, 0.0, model.saved(cut.layers, cut.grain, cut.density))
                   for cut in cuts], model, params)


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    teacher = denoisers.load(inputs["pretrain_load"] / "teacher")
    check_memory(teacher, params)
    with tempfile.TemporaryDirectory(prefix=".grams.", dir=out) as waiting:
        return searched(teacher, params, inputs, out, Path(waiting))


def searched(teacher: Denoiser, params: Params, inputs: Inputs, out: Path, waiting: Path) -> Report:
    """waiting: a folder for the Gram matrices that are not worked on."""
    models = cost_models(layer_costs(teacher), inputs["profile"], params.backend, params.batch)
    dense = Trajectories.of(teacher, network(teacher), params.steps, params.images, params.seed)
    layers, left_dense = fitting_layers(teacher, params.cover, dict.fromkeys((BASELINE, *map(grain_of, params.grains))))

    calibration = read_bank(teacher, inputs["pretrain_load"], params.inputs, params.seed)
    statistics = bounded_statistics(teacher, calibration, layers_read(teacher, params), params.gram_mb, waiting)

    def error() -> float:
        return dense.error(network(teacher))

    @functools.cache
    def score(layer: str) -> Tensor:
        return saliency(teacher.model.get_parameter(f"{layer}.weight"), statistics[layer], params.saliency)

    found = search(teacher, layers, models, params, lambda cuts: cut_errors(teacher, cuts, error, statistics, score))
    plans = {name: describe(plan, found.cost_model,
                            masked_error(teacher, cut_masks(teacher.model, plan, score), error, statistics))
             for name, plan in found.plans.items()}
    masks = {**({"unit": cut_masks(teacher.model, found.plans["unit"])} if "unit" in found.plans else {}),
             BASELINE: cut_masks(teacher.model, layer_cuts(layers[BASELINE], BASELINE, ()), score)}
    weights = {grain: made_up(teacher.model, pruned, statistics) for grain, pruned in masks.items()}
    kept = {grain: kept_shares(teacher.model, grain, pruned) for grain, pruned in masks.items()}
    choice = decide(predict(kept, models), params) | {"plans": plans, "budget": found.account(params.goal.target)}
    write(out, masks, weights, kept, choice)
    grains = {grain: {"error": masked_error(teacher, pruned, error),
                      "error_made_up": masked_error(teacher, pruned, error, statistics),
                      "density": mask_density(pruned), "macs_share": models["bitops"].share(kept[grain], grain)}
              for grain, pruned in masks.items()}
    return Report({**grains, "unit_density": found.unit_density(), "chosen": choice["chosen"],
                   "plans": {name: {key: plan[key] for key in ("saved", "cost", "error")} for name, plan in plans.items()},
                   "sensitivity": sensitivity_table(found.errors, found.blocks), "left_dense": left_dense | found.left_dense})


@dataclass(frozen=True, kw_only=True)
class Search:
    """What was found: plans by name, in which cost they keep which budget, and what each cut alone does."""

    plans: dict[str, Plan]
    cost_model: CostModel
    budget: float
    errors: Errors
    blocks: Mapping[tuple[str, ...], HiddenUnits]  # by the layers that make and read their units
    left_dense: dict[str, str]                     # block -> why no density takes units of it

    def account(self, target: str) -> dict:
        return {"target": target, "counted": self.cost_model.counted, "dense": self.cost_model.whole, "saved": self.budget}

    def unit_density(self) -> dict[str, float]:
        """Block -> kept share of its units in the plan of units alone."""
        density = {layer: option.density for option in self.plans.get("unit", ()) for layer in option.layers}
        return {units.block: density.get(units.consumer, 1.0) for units in self.blocks.values()}


def search(teacher: Denoiser, layers: Mapping[str, Mapping[str, nn.Module]], models: Mapping[str, CostModel], params: Params,
           measure: Callable[[list[Cut]], Errors]) -> Search:
    """layers: by grain, those that it divides. measure: the error of each cut alone."""
    counted = {cost.name for cost in layer_costs(teacher)}
    blocks = {unit_layers(units, counted): units for units in hidden_units(teacher.model)}

    def cuts_of(grain: str, densities: Sequence[float]) -> list[Cut]:
        if grain == "unit":
            return unit_cuts(blocks, densities, params.unit_multiple)
        return layer_cuts(layers[grain], grain, densities)

    tried = {"unit": params.densities, **dict.fromkeys(map(grain_of, params.grains), params.grain_densities)}
    cuts = [cut for grain, densities in tried.items() for cut in cuts_of(grain, densities)]
    left_dense = whole_blocks(blocks, cuts, params.unit_multiple)
    check_densities(blocks.values(), params)
    errors = measure(cuts)
    if len(left_dense) == len(blocks):
        print(f"mask_search: no block has units that can go, {params.unit_multiple} at a time (unit_multiple), so there are no "
              f"plans of them and no student; the run goes on with {BASELINE}", flush=True)
        return Search(plans={}, cost_model=models[params.goal.target], budget=0.0, errors=errors, blocks=blocks,
                      left_dense=left_dense)
    model = deciding_model(cuts, errors, models, params)
    options = priced(cuts, errors, model)
    budget = budget_of(options, model, params)
    plans = make_plans(options, lambda grain, density: priced(cuts_of(grain, [density]), errors, model), budget,
                       params.min_gain * model.whole)
    return Search(plans=plans, cost_model=model, budget=budget, errors=errors, blocks=blocks, left_dense=left_dense)


def check_densities(blocks: Iterable[HiddenUnits], params: Params) -> None:
    """Raises ValueError where units could go, but not at these densities."""
    blocks = list(blocks)
    highest = highest_density(blocks, params.unit_multiple)
    kept = [kept_count(units, density, params.unit_multiple) / units.count for units in blocks for density in params.densities]
    if highest and min(kept) == 1:
        raise ValueError(f"mask_search.densities: {list(params.densities)} take no unit of any block; the highest that does is "
                         f"{highest}")


def highest_density(blocks: Iterable[HiddenUnits], multiple: int) -> float:
    """That takes units of a block, rounded down to four digits; 0 where none does."""
    return max((floor(1e4 * (1 - granule(units, multiple) / units.count)) / 1e4 for units in blocks), default=0.0)


def deciding_model(cuts: Sequence[Cut], errors: Errors, models: Mapping[str, CostModel], params: Params) -> CostModel:
    """goal.target's; of MACs where this machine's times do not let units save unit_share, which is said aloud."""
    model = models[params.goal.target]
    if params.goal.target == "latency" and (most := reach(priced(cuts, errors, model), model)) < params.unit_share:
        print(f"mask_search: removed units save {most:.2f} of their blocks' time in this machine's profile at most, unit_share "
              f"is {params.unit_share}: MACs decide in place of times", flush=True)
        return models["bitops"]
    return model


def check_memory(teacher: Denoiser, params: Params) -> None:
    """Raises ValueError for a layer whose Gram matrix is too large for gram_mb. From shapes alone: weights may be on meta."""
    check_widths({name: layer.weight.shape for name, layer in layers_read(teacher, params).items()}, params.gram_mb)


def layers_read(teacher: Denoiser, params: Params) -> dict[str, nn.Module]:
    """Whose inputs decide: the layers that read units, and those that a grain of the cover divides."""
    layers, grains = teacher.prunable_layers(), (BASELINE, *map(grain_of, params.grains))
    read = {units.consumer for units in hidden_units(teacher.model)}
    read |= {name for name in covered(layers, params.cover)
             if not all(misfit(tuple(layers[name].weight.shape), grain) for grain in grains)}
    return {name: layer for name, layer in layers.items() if name in read}


def read_bank(teacher: Denoiser, folder: Path, images: int, seed: int) -> Calibration:
    labels = np.load(folder / "bank_labels.npy") if teacher.num_classes else None
    return noised(teacher.schedule, np.load(folder / "bank.npy"), labels, images, torch.Generator().manual_seed(seed))


def fitting_layers(teacher: Denoiser, cover: tuple[str, ...],
                   grains: Iterable[str]) -> tuple[dict[str, dict[str, nn.Module]], dict[str, str]]:
    """-> grain -> the covered layers that it divides, and layer -> why it stays dense. What was asked for and cannot be is
    said aloud."""
    layers = teacher.prunable_layers()
    wanted = {name: layers[name] for name in covered(layers, cover)}
    left = {name: ["not in mask_search.cover"] for name in layers if name not in wanted}
    fitting = {}
    for grain in grains:
        reasons = misfits(wanted, grain)
        fitting[grain] = {name: layer for name, layer in wanted.items() if name not in reasons}
        for name, reason in reasons.items():
            print(f"mask_search: {grain} leaves {name} dense: {reason}", flush=True)
            left.setdefault(name, []).append(f"{grain}: {reason}")
    return fitting, {name: "; ".join(reasons) for name, reasons in left.items()}


def whole_blocks(blocks: Mapping[tuple[str, ...], HiddenUnits], cuts: Iterable[Cut], multiple: int) -> dict[str, str]:
    """Block -> why no density takes units of it; said aloud."""
    cut = {cut.layers for cut in cuts if cut.grain == "unit"}
    found = {units.block: f"no density takes any of {units.count} units, {granule(units, multiple)} at a time"
             for layers, units in blocks.items() if layers not in cut}
    for block, reason in found.items():
        print(f"mask_search: unit leaves {block} dense: {reason}", flush=True)
    return found


def budget_of(options: Iterable[Option], model: CostModel, params: Params) -> float:
    """unit_share of what the layers cost that make and read units which can go. Raises ValueError with the nearest feasible."""
    most = reach(options, model)
    if params.unit_share > most:
        raise ValueError(f"mask_search.unit_share: {params.unit_share} is out of reach for target {params.goal.target}; the "
                         f"nearest feasible is {most}, with densities {list(params.densities)}")
    return params.unit_share * units_cost(options, model)


def reach(options: Iterable[Option], model: CostModel) -> float:
    """The largest unit_share, rounded down to four digits."""
    units = [option for option in options if option.grain == "unit"]
    return floor(1e4 * ceiling(units) / units_cost(units, model) + TOLERANCE) / 1e4


def units_cost(options: Iterable[Option], model: CostModel) -> float:
    """Of all layers that make and read units which can go."""
    return model.dense({layer for option in options if option.grain == "unit" for layer in option.layers})


def sensitivity_table(errors: Errors, blocks: Mapping[tuple[str, ...], HiddenUnits]) -> dict[str, dict]:
    """Block or layer -> grain -> density -> error. blocks: by the layers that make and read their units."""
    table: dict[str, dict] = {}
    for (layers, grain), row in errors.items():
        place = blocks[layers].block if grain == "unit" else layers[0]
        table.setdefault(place, {})[grain] = {f"{density:g}": error for density, error in row.items()}
    return table


def predict(kept: dict[str, dict[str, float]], models: dict[str, CostModel]) -> dict[str, dict[str, float]]:
    """Grain -> target -> cost against dense."""
    return {grain: {target: model.share(shares, grain) for target, model in models.items()} for grain, shares in kept.items()}


def decide(predicted: dict[str, dict[str, float]], params: Params) -> dict:
    """choice.json: the goal's target decides `chosen`; `by_target` says what other targets would have."""
    chosen, why = choose(predicted, params.goal.target, params.min_gain)
    return {"chosen": chosen, "why": why, "predicted": predicted,
            "by_target": {target: choose(predicted, target, params.min_gain)[0] for target in TARGETS}}


def write(out: Path, masks: dict[str, dict[str, Tensor]], weights: dict[str, dict[str, Tensor]],
          kept: dict[str, dict[str, float]], choice: dict) -> None:
    save_file(by_grain(masks, torch.uint8), out / "masks.safetensors")
    save_file(by_grain(weights, torch.float32), out / "weights.safetensors")
    with open(out / "density.csv", "w", newline="") as file:
        csv.writer(file).writerows([("grain", "layer", "density"), *((grain, layer, share) for grain, shares in kept.items()
                                                                     for layer, share in shares.items())])
    write_json(out / "choice.json", choice)


def by_grain(sets: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    return {f"{grain}/{name}": tensor.to(dtype).contiguous() for grain, found in sets.items() for name, tensor in found.items()}
