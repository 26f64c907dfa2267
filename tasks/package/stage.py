"""Write one package folder per variant: what ships, and what quality and speed are measured on.

Reads: data, pretrain_load (teacher), mask_search (2:4 masks), distill (student weights, unit masks), cache_learn (plan
on the base list), evolve (recipes of single ideas, integers whose rounding was learned), finish (best recipe, its weights and
ranges of inputs).
Writes: <variant>/ for every variant: a package that plain diffusers opens, with its OpenVINO form in openvino/, whose weights
are those of the package; dull_fp32, dull_bf16, dull_int8: dense weights at the precisions anyone can have, for the dull front.
Report: bytes, NFE and densities.
Left out: a latent model's VAE (its package returns latents); conversion to other runtimes than torch and OpenVINO.
"""

import copy
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tasks.core.artifacts import Inputs, Report, digest, read_json
from tasks.core.calibration import ranges_on_trajectory
from tasks.core.denoiser import Denoiser, load
from tasks.core.params import check_range
from tasks.core.progress import track
from tasks.core.recipe import Recipe
from tasks.core.sparsity import kept_shares
from tasks.package.variants import FINISHED, Variant, variants
from tasks.package.write import seal, write_package
from tasks.runtime.graph import export
from tasks.runtime.graph_store import store
from tasks.runtime.masks import apply_masks
from tasks.runtime.packed import open_model
from tasks.runtime.precision import Integers
from tasks.runtime.rounding import read_integers

INPUTS = ("data", "pretrain_load", "mask_search", "distill", "cache_learn", "evolve", "finish")


@dataclass(frozen=True, kw_only=True)
class Params:
    dense_steps: int         # NFE of the dense variant, DDIM as the teacher's own scheduler has it
    calibration_states: int  # states of a recipe's own trajectories that its activation ranges come from
    seed: int                # of the noise that those trajectories start from

    def __post_init__(self):
        check_range("package.dense_steps", self.dense_steps, 1, 1000)
        check_range("package.calibration_states", self.calibration_states, 128, 10**6)


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    teacher = load(inputs["pretrain_load"] / "teacher")
    table = read_variants(teacher, params.dense_steps, inputs)
    numbers, graphs = {}, {}
    for name, variant in track(table.items(), len(table), "package"):
        denoiser, masks = weights_of(variant, teacher, inputs)
        recipe = with_sparsity(variant, denoiser, masks)
        apply_masks(denoiser.model, masks)
        ranges = read_json(inputs["finish"] / "ranges.json") if variant.weights == FINISHED else \
            ranges_on_trajectory(denoiser, recipe, params.calibration_states, params.seed)
        folder = write_package(denoiser, recipe, ranges, masks, out / name, rounded(variant, masks, inputs))
        add_graph(folder, recipe, graphs)
        numbers[name] = facts(folder, recipe)
    return Report(numbers)


def read_variants(teacher: Denoiser, dense_steps: int, inputs: Inputs) -> dict[str, Variant]:
    plan, best = read_json(inputs["cache_learn"] / "plan.json"), Recipe.from_json(read_json(inputs["finish"] / "recipe.json"))
    single = {name: Recipe.from_json(recipe) for name, recipe in read_json(inputs["evolve"] / "single.json").items()}
    weights = read_json(inputs["finish"] / "weights.json")
    return variants(teacher.schedule, teacher.prunable_layers(), dense_steps, plan, best, single, weights)


def weights_of(variant: Variant, teacher: Denoiser, inputs: Inputs) -> tuple[Denoiser, dict[str, Tensor]]:
    """A copy of the teacher with the variant's weights, and its masks by parameter name."""
    model = copy.deepcopy(teacher.model)
    if variant.weights != "teacher":
        stage = "finish" if variant.weights == FINISHED else "distill"
        model.load_state_dict(load_file(inputs[stage] / f"{variant.weights}.safetensors"))
    return Denoiser(model, teacher.schedule), read_masks(variant, inputs)


def read_masks(variant: Variant, inputs: Inputs) -> dict[str, Tensor]:
    """A student's are those that its training ended with; the teacher's come from the search."""
    if variant.grain is None:
        return {}
    if variant.masks is not None:
        masks = load_file(inputs["distill"] / variant.masks)
    else:
        found, prefix = load_file(inputs["mask_search"] / "masks.safetensors"), f"{variant.grain}/"
        masks = {name.removeprefix(prefix): mask for name, mask in found.items() if name.startswith(prefix)}
    return {name: mask.bool() for name, mask in masks.items()}


def with_sparsity(variant: Variant, denoiser: Denoiser, masks: dict[str, Tensor]) -> Recipe:
    """The recipe with the grain and the density that the masks really have."""
    shares = kept_shares(denoiser.model, variant.grain, masks)
    return replace(variant.recipe, sparsity={"grain": variant.grain, "density": shares} if masks else None)


def rounded(variant: Variant, masks: dict[str, Tensor], inputs: Inputs) -> Integers:
    """Integers that the search learned to round, if it did and for these weights."""
    if variant.weights == FINISHED or variant.weights == "teacher" and masks:
        return {}
    return read_integers(inputs["evolve"] / "rounding" / f"{variant.weights}.safetensors")


def add_graph(folder: Path, recipe: Recipe, graphs: dict[str, Path]) -> None:
    """Export what the package holds, or copy the graphs of one with the same network, cache plan and timesteps of it; then seal
    it again.

    graphs: folders exported so far, by digest of everything that a graph depends on.
    """
    stored = read_json(folder / "package.json")["files"]
    plan = recipe.cache and [recipe.to_json()["cache"], recipe.timesteps]  # without one any list will do
    key = digest([{name: facts for name, facts in stored.items() if name.startswith("denoiser/")}, plan])
    if key in graphs:
        shutil.copytree(graphs[key], folder / "openvino")
    else:
        model, _ = open_model(folder / "denoiser")
        export(model, recipe, folder / "openvino")
        store(folder / "openvino")
        graphs[key] = folder / "openvino"
    seal(folder)


def facts(folder: Path, recipe: Recipe) -> dict:
    """What the report says of one package."""
    return {"nfe": recipe.nfe, "weights_bytes": (folder / "denoiser" / "weights.safetensors").stat().st_size,
            "graph_bytes": folder_bytes(folder / "openvino"), "package_bytes": folder_bytes(folder)}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
