"""Choose what to zero: 2:4 in every covered layer, and whole units block by block; and say which of them pays on the goal.

Reads: pretrain_load (teacher/, bank.npy, bank_labels.npy), profile (layers.csv, model.csv).
Writes: masks.safetensors (`<grain>/<parameter>`, uint8), density.csv (grain, layer, density), choice.json (chosen, why,
by_target, predicted). Report: per grain one-shot error, density and MACs; the sensitivity table; why a layer was left dense.
Left out: whole blocks as units; saliency from activations or gradients; permutation of channels before 2:4.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tasks.core import denoiser as denoisers
from tasks.core.artifacts import Inputs, Report, write_json
from tasks.core.calibration import Calibration, noised, predictions
from tasks.core.cost import LayerCost, layer_costs
from tasks.core.denoiser import Denoiser
from tasks.core.latency import load_layers
from tasks.core.params import Goal, check_range
from tasks.core.sparsity import kept_shares, mask_density, parse_pattern
from tasks.mask_search.choose import choose, latency_share, macs_share, size_share
from tasks.mask_search.masks import covered, nm_masks, unit_masks
from tasks.mask_search.sensitivity import masked_error, unit_densities, unit_errors

INPUTS = ("pretrain_load", "profile")
TARGETS = ("latency", "bitops", "size")


@dataclass(frozen=True, kw_only=True)
class Params:
    cover: tuple[str, ...]        # patterns of the layer paths that 2:4 covers; all else stays dense
    densities: tuple[float, ...]  # kept shares of a block's units that are tried, besides 1
    unit_share: float             # share of all blocks' MACs that the unit masks remove together
    unit_multiple: int            # kept units come in multiples of this
    images: int                   # teacher samples that predictions are compared on, each at a noise level of its own
    min_gain: float               # least predicted gain on the target, as a share of dense, that makes a grain pay
    backend: str                  # whose times in the profile count
    batch: int
    seed: int
    goal: Goal

    def __post_init__(self):
        for density in self.densities:
            check_range("mask_search.densities", density, 0.01, 0.99)
        for key, low, high in (("unit_share", 0.01, 0.99), ("unit_multiple", 1, 1024), ("images", 1, 10**6), ("min_gain", 0, 1),
                               ("batch", 1, 65_536), ("seed", 0, 2**31)):
            check_range(f"mask_search.{key}", getattr(self, key), low, high)
        if not self.densities or 1 - min(self.densities) < self.unit_share:
            raise ValueError(f"mask_search.unit_share: {self.unit_share} is more than densities {list(self.densities)} remove")


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    teacher = denoisers.load(inputs["pretrain_load"] / "teacher")
    costs = layer_costs(teacher)
    calibration = read_bank(teacher, inputs["pretrain_load"], params)
    reference = predictions(teacher, calibration)

    two_four, left_dense = pattern_masks(teacher, params.cover)
    errors = unit_errors(teacher, params.densities, params.unit_multiple, calibration, reference)
    densities = unit_densities(teacher, errors, params.unit_multiple, params.unit_share, costs)
    masks = {"unit": unit_masks(teacher.model, densities, params.unit_multiple), "2:4": two_four}

    kept = {grain: kept_shares(teacher.model, grain, found) for grain, found in masks.items()}
    choice = decide(predict(kept, costs, inputs["profile"], params), params)
    write(out, masks, kept, choice)
    grains = {grain: {"error": masked_error(teacher, found, calibration, reference), "density": mask_density(found),
                      "macs_share": macs_share(costs, kept[grain])} for grain, found in masks.items()}
    sensitivity = {block: {str(density): error for density, error in row.items()} for block, row in errors.items()}
    return Report({**grains, "unit_density": densities, "sensitivity": sensitivity, "left_dense": left_dense,
                   "chosen": choice["chosen"]})


def read_bank(teacher: Denoiser, folder: Path, params: Params) -> Calibration:
    labels = np.load(folder / "bank_labels.npy") if teacher.num_classes else None
    rng = torch.Generator().manual_seed(params.seed)
    return noised(teacher.schedule, np.load(folder / "bank.npy"), labels, params.images, rng)


def pattern_masks(teacher: Denoiser, cover: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """-> 2:4 masks, and layer -> reason for all that stay dense. What was asked for and cannot be is said aloud."""
    layers = teacher.prunable_layers()
    wanted = covered(layers, cover)
    masks, indivisible = nm_masks({name: layers[name] for name in wanted}, *parse_pattern("2:4"))
    for name, reason in indivisible.items():
        print(f"mask_search: 2:4 leaves {name} dense: {reason}", flush=True)
    return masks, indivisible | {name: "not in mask_search.cover" for name in layers if name not in wanted}


def predict(kept: dict[str, dict[str, float]], costs: list[LayerCost], profile: Path,
            params: Params) -> dict[str, dict[str, float]]:
    """Grain -> target -> cost against dense."""
    table = load_layers(profile)
    return {grain: {"latency": latency_share(table, shares, grain, params.backend, params.batch),
                    "bitops": macs_share(costs, shares), "size": size_share(costs, shares, grain)}
            for grain, shares in kept.items()}


def decide(predicted: dict[str, dict[str, float]], params: Params) -> dict:
    """choice.json: the goal's target decides `chosen`; `by_target` says what other targets would have."""
    chosen, why = choose(predicted, params.goal.target, params.min_gain)
    return {"chosen": chosen, "why": why, "predicted": predicted,
            "by_target": {target: choose(predicted, target, params.min_gain)[0] for target in TARGETS}}


def write(out: Path, masks: dict[str, dict[str, Tensor]], kept: dict[str, dict[str, float]], choice: dict) -> None:
    save_file({f"{grain}/{name}": mask.to(torch.uint8) for grain, found in masks.items() for name, mask in found.items()},
              out / "masks.safetensors")
    with open(out / "density.csv", "w", newline="") as file:
        csv.writer(file).writerows([("grain", "layer", "density"), *((grain, layer, share) for grain, shares in kept.items()
                                                                     for layer, share in shares.items())])
    write_json(out / "choice.json", choice)
