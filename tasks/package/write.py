"""One package folder: a compressed model that opens in plain diffusers (see `tasks/runtime/pipeline.py`)."""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save
from torch import Tensor, nn

from tasks.core.artifacts import write_json
from tasks.core.denoiser import Denoiser
from tasks.core.recipe import Recipe
from tasks.runtime import packed
from tasks.runtime.checks import file_facts
from tasks.runtime.masks import apply_masks, shrink_units
from tasks.runtime.precision import Integers, apply_precision, widths

RUNTIME = Path(packed.__file__).parent
CODE = {"": ("pipeline.py", "solver.py"), "denoiser": ("packed.py", "checks.py", "meaning.py", "masks.py", "cache.py",
                                                        "precision.py")}


def write_package(denoiser: Denoiser, recipe: Recipe, ranges: Mapping[str, object], masks: Mapping[str, Tensor],
                  folder: str | Path, integers: Integers = MappingProxyType({})) -> Path:
    """Write `denoiser` as `recipe` says into `folder`; the same arguments give the same bytes. -> folder

    denoiser: dense shapes, floating-point weights; it is left unchanged. ranges: activation ranges of the layers of integer
    width (`calibrate_ranges`). masks: bool, by parameter name, empty for dense weights; `recipe.sparsity` says whether their
    zeros are cut out of the shapes ("unit") or only not stored ("2:4"). integers: of the dense shapes, of weights that
    are not to go to the nearest one.
    Raises ValueError when masks and recipe disagree on whether there is sparsity.
    """
    if bool(masks) != bool(recipe.sparsity):
        raise ValueError(f"package {folder}: {len(masks)} masks, but the recipe's sparsity is {recipe.sparsity}")
    folder = Path(folder)
    (folder / "denoiser").mkdir(parents=True)
    model, kept = compressed_model(denoiser.model, recipe, ranges, masks, integers)
    stored, layout = packed.encode(model.state_dict(), integer_bits(recipe), {} if kept else stored_masks(recipe, masks))
    (folder / "denoiser" / packed.WEIGHTS).write_bytes(save(stored))
    write_json(folder / "denoiser" / packed.PACKING, {"kept": kept, "ranges": needed_ranges(recipe, ranges), "tensors": layout})
    write_json(folder / "denoiser" / packed.CONFIG, model_config(denoiser.model))
    write_json(folder / packed.RECIPE, recipe.to_json())
    write_index(denoiser, folder)
    copy_code(folder)
    seal(folder)
    return folder


def compressed_model(model: nn.Module, recipe: Recipe, ranges: Mapping[str, object], masks: Mapping[str, Tensor],
                     integers: Integers) -> tuple[nn.Module, dict[str, int]]:
    """A copy of `model` with masks and precision live, and {block: kept units} of those that shrank."""
    model, kept = copy.deepcopy(model), {}
    if masks and recipe.sparsity["grain"] == "unit":
        integers = shrunk(integers, model, recipe, masks)
        kept = shrink_units(model, masks)
    elif masks:
        apply_masks(model, masks)
    apply_precision(model, recipe.precision, ranges, integers=integers)
    return model, kept


def shrunk(integers: Integers, model: nn.Module, recipe: Recipe, masks: Mapping[str, Tensor]) -> Integers:
    """The recipe's integers without the rows and columns that are cut out of the weights: these stand in for them once."""
    carrier = copy.deepcopy(model)
    bits = {layer: widths(token) for layer, token in recipe.precision.items()}
    keys = [(layer, both[0]) for layer, both in bits.items() if both is not None and (layer, both[0]) in integers]
    for layer, width in keys:
        carrier.get_submodule(layer).weight.data = integers[layer, width].float()
    shrink_units(carrier, masks)
    return {(layer, width): carrier.get_submodule(layer).weight.to(torch.int8) for layer, width in keys}


def integer_bits(recipe: Recipe) -> dict[str, int]:
    """Weight bits of every tensor of integers in the compressed model's state dict."""
    quantised = {layer: widths(token) for layer, token in recipe.precision.items()}
    return {f"{layer}.weight_int": bits[0] for layer, bits in quantised.items() if bits is not None}


def stored_masks(recipe: Recipe, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks under the names that their weights have at the recipe's precision."""
    named = {}
    for name, mask in masks.items():
        layer = name.removesuffix(".weight")
        token = recipe.precision.get(layer, "fp32")
        named[{"fp32": name, "bf16": f"{layer}.layer.weight"}.get(token, f"{layer}.weight_int")] = mask.bool().cpu()
    return named


def needed_ranges(recipe: Recipe, ranges: Mapping[str, object]) -> dict[str, object]:
    """Only of the layers that round their inputs."""
    return {layer: ranges[layer] for layer, token in recipe.precision.items() if widths(token) is not None}


def model_config(model: nn.Module) -> dict:
    """The diffusers model's config, without the place and the version it was read with."""
    volatile = ("_name_or_path", "_diffusers_version", "_use_default_values")
    return {k: v for k, v in json.loads(model.to_json_string()).items() if k not in volatile}


def write_index(denoiser: Denoiser, folder: Path) -> None:
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", denoiser.schedule.config)
    write_json(folder / "model_index.json", {"_class_name": ["pipeline", "CompressedPipeline"],
                                             "denoiser": ["packed", "PackedDenoiser"],
                                             "scheduler": ["diffusers", "DDIMScheduler"]})


def copy_code(folder: Path) -> None:
    for place, names in CODE.items():
        for name in names:
            shutil.copyfile(RUNTIME / name, folder / place / name)


def seal(folder: Path) -> None:
    """Write `package.json`: size and hash of every data file now in the folder. Call it again once files were added."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
    facts = {path.relative_to(folder).as_posix(): file_facts(path) for path in files if path.name != packed.MANIFEST}
    write_json(folder / packed.MANIFEST, {"format": packed.FORMAT, "files": facts})
